"""Is anything lost when a process is killed in the middle of a write?

1. Each task is done once without a kill: its result is the reference, and its steps are counted. A step is a call that
   opens a file for writing, flushes, renames, removes or makes something below the task's folder.
2. Each round does it anew in a process of its own, which dies there without running another line: at its nth step,
   after half of the file at hand has been cut away (SIGKILL), or in the middle of a write, wherever in a library that
   is, once a file has so many bytes (SIGXFSZ, sent by the kernel).
3. The task is done again in the same folder. Its result must equal the reference, and nothing half-written be left.

    python benchmarks/kills.py                              25 rounds of each task
    python benchmarks/kills.py --task export --rounds 5

Linux alone: it forks, and reads /proc.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import transformers
from safetensors.numpy import load_file

import cliffscope as cs
from cliffscope.figures.images import save_figures
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.study.config import StudyConfig
from cliffscope.study.runner import run_study
from cliffscope.transcripts.datasets import write_transcripts

ROUNDS = 25
CALLS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "chmod")
Death = tuple[str, int]
"""`step` and which one, or `size` and of how many bytes."""


class Task(ABC):
    """Something that writes, and may be killed and done again."""

    name: ClassVar[str]

    @abstractmethod
    def do(self, folder: Path) -> object:
        """Does it in a folder, going on from what an earlier attempt left there."""

    @abstractmethod
    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """What there is to compare, as arrays by name."""

    def prepare(self, folder: Path) -> None:  # noqa: B027 - most tasks begin with nothing
        """Fills a new folder with what the task stands on."""


@dataclass(eq=False)
class Export(Task):
    """An edited checkpoint."""

    name = "export"

    model: LensModel
    edit: cs.HeadEdit = field(default_factory=lambda: cs.zero([cs.HeadRef(layer=2, head=1)]))

    def do(self, folder: Path) -> object:
        """Writes it, unless it is there."""
        return None if (folder / "out").exists() else cs.export_edited(self.model, self.edit, folder / "out")

    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """Every file's digest."""
        return digests(folder / "out")


@dataclass(eq=False)
class Replace(Export):
    """An edited checkpoint in the place of another one."""

    name = "export --overwrite"

    def prepare(self, folder: Path) -> None:
        """Writes the other one."""
        cs.export_edited(self.model, cs.scale([cs.HeadRef(layer=1, head=0)], 0.5), folder / "out")

    def do(self, folder: Path) -> object:
        """Replaces it."""
        return cs.export_edited(self.model, self.edit, folder / "out", overwrite=True)


@dataclass(eq=False)
class Pool(Task):
    """Scores of a pool, shard by shard."""

    name = "score-pool"

    model: LensModel
    probe: RefusalProbe
    pool: cs.Transcripts

    def prepare(self, folder: Path) -> None:
        """Writes the pool."""
        write_transcripts(self.pool, folder / "pool.jsonl")

    def do(self, folder: Path) -> object:
        """Scores it."""
        return cs.score_pool(self.model, self.probe, folder / "pool.jsonl", out=folder / "scores", window=8)

    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """Every shard."""
        return frames(folder / "scores")


@dataclass(eq=False)
class Figures(Task):
    """Figures as pages and as JSON."""

    name = "figures"

    figures: list[go.Figure] = field(
        default_factory=lambda: [go.Figure(go.Scatter(y=list(range(i + 2)))) for i in range(4)]
    )

    def prepare(self, folder: Path) -> None:
        """An older figure is there already."""
        save_figures({folder / "figure-0.html": self.figures[3]})

    def do(self, folder: Path) -> object:
        """Writes them all."""
        named = {folder / f"figure-{i}.{kind}": f for i, f in enumerate(self.figures) for kind in ("html", "json")}
        return save_figures(named)

    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """Sizes, since a page has an id of its own drawn for it, and each is a whole page or object."""
        for path in folder.iterdir():
            text = path.read_text(encoding="utf-8")
            assert text.rstrip().endswith("</html>") if path.suffix == ".html" else json.loads(text), path
        return {path.name: np.array(path.stat().st_size) for path in folder.iterdir()}


@dataclass(eq=False)
class Repair(Task):
    """A repair that saves at every step."""

    name = "repair"

    model: LensModel
    pool: cs.Transcripts

    def do(self, folder: Path) -> object:
        """Trains, or goes on from a save."""
        if (folder / "out").exists():
            return None
        options = {"steps": 4, "batch_size": 2, "lora_rank": 0, "answer": "sorry , i can not help with that ."}
        return cs.repair(self.model, self.pool[:4], folder / "out", work=folder / "saves", **options)

    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """The weights."""
        return dict(load_file(str(folder / "out" / "model.safetensors")))


@dataclass(eq=False)
class StudyRepair(Task):
    """The stage of a study that repairs and measures."""

    name = "study --repair"

    run: Path
    config: dict[str, object]

    def prepare(self, folder: Path) -> None:
        """Copies a finished study."""
        shutil.copytree(self.run, folder / "run", ignore=shutil.ignore_patterns(".lock"))

    def do(self, folder: Path) -> object:
        """Runs what a repair needs."""
        return run_study(StudyConfig(**{**self.config, "out": str(folder / "run"), "repair": True}), until="repair")

    def result(self, folder: Path) -> dict[str, np.ndarray]:
        """The weights and the table."""
        weights = load_file(str(folder / "run" / "repaired" / "model.safetensors"))
        table = pd.read_parquet(folder / "run" / "repair.parquet")[["n", "value"]].to_numpy(float)
        return {**weights, "table": table, "files": np.array(len(list((folder / "run").iterdir())))}


def digests(folder: Path) -> dict[str, np.ndarray]:
    """File name to digest."""
    return {p.name: np.frombuffer(hashlib.sha256(p.read_bytes()).digest(), np.uint8) for p in folder.iterdir()}


def frames(folder: Path) -> dict[str, np.ndarray]:
    """Every table's numbers."""
    return {
        f"{path.name} {name}": pd.to_numeric(column, errors="coerce").to_numpy(float)
        for path in sorted(folder.glob("*.parquet"))
        for name, column in pd.read_parquet(path).items()
    }


def die_at(folder: Path, death: Death) -> list[int]:
    """Arms this process; returns the count of steps, which goes on as they are made."""
    kind, number = death
    seen = [0]
    if kind == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
        return seen

    def step(place: object) -> None:
        descriptor = f"/proc/self/fd/{place}" if isinstance(place, int) else None
        if not os.path.realpath(descriptor or os.fspath(str(place))).startswith(str(folder)):
            return
        seen[0] += 1
        if seen[0] == number:
            if isinstance(place, int) and os.path.isfile(str(descriptor)):
                os.truncate(str(descriptor), os.fstat(place).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(name: str) -> None:
        plain: Callable[..., object] = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            step(arguments[0])
            return plain(*arguments, **options)

        setattr(os, name, call)

    for name in CALLS:
        before(name)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            step(arguments[0])

    sys.addaudithook(watch)
    return seen


def in_child(work: Callable[[], object]) -> int:
    """Does some work in a forked process; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def count_steps(task: Task, folder: Path) -> int:
    """Does a task to its end; how many steps it takes."""
    place = folder.with_suffix(".count")

    def work() -> None:
        seen = die_at(folder, ("step", 0))
        task.do(folder)
        place.write_text(str(seen[0]))

    assert in_child(work) == 0, f"{task.name} failed without a kill"
    return int(place.read_text())


def deaths_of(written: Sequence[Path], steps: int, rounds: int) -> list[Death]:
    """Three quarters of the rounds at steps, spread over all of them, the others, one at least, inside of writes."""
    n_sizes = max(1, rounds // 4)
    largest = max(path.stat().st_size for path in written)
    n_steps = rounds - n_sizes
    at = [("step", 1 + int(steps * (i + 0.5) / n_steps)) for i in range(n_steps)]
    return at + [("size", int(largest * (i + 0.5) / n_sizes)) for i in range(n_sizes)]


def differences(outcome: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Names under which two results differ by more than the order of additions can."""
    if outcome.keys() != expected.keys():
        return sorted(outcome.keys() ^ expected.keys())
    return [n for n in outcome if not np.allclose(outcome[n], expected[n], rtol=1e-4, atol=1e-6, equal_nan=True)]


def run_task(task: Task, place: Path, rounds: int) -> dict[str, object]:
    """Every round of a task."""
    started, reference = time.perf_counter(), place / "reference"
    reference.mkdir(parents=True)
    task.prepare(reference)
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    steps = count_steps(task, reference)
    written = [p for p in reference.rglob("*") if p.is_file() and p.stat().st_mtime_ns != before.get(p)]
    expected = task.result(reference)
    wrong: list[str] = []
    killed = 0
    for i, death in enumerate(deaths_of(written, steps, rounds)):
        folder = place / f"round-{i}"
        folder.mkdir()
        task.prepare(folder)

        def work(folder: Path = folder, death: Death = death) -> None:
            die_at(folder, death)
            task.do(folder)

        status = in_child(work)
        killed += os.WIFSIGNALED(status)
        again = in_child(lambda folder=folder: task.do(folder))
        if again != 0:
            wrong.append(f"{death}: going on failed")
            continue
        names = differences(task.result(folder), expected)
        left = [path.name for path in folder.rglob("*.partial")]
        wrong += [f"{death}: {what}" for what in (*(f"{n} differs" for n in names), *(f"{n} was left" for n in left))]
        shutil.rmtree(folder)
    seconds = round(time.perf_counter() - started, 1)
    return {"task": task.name, "rounds": rounds, "killed": killed, "steps": steps, "wrong": wrong, "seconds": seconds}


def make_tasks(names: Sequence[str], run: Path | None, config: dict[str, object]) -> list[Task]:
    """The tasks that were asked for, over one model."""
    model = cs.load_model("planted-llama", device="cpu")
    tasks: list[Task] = [Export(model), Replace(model), Figures()]
    if {Repair.name, Pool.name} & set(names):
        prompts = cs.organisms.prompts("fit", 48, harmful=True, wrappers=(None, "story"))
        pool = cs.judge(cs.roll_out(model, prompts, max_thinking=96, max_answer=8))
        complied = pool.where(outcome="complied")
        tasks.append(Repair(model, complied))
        tasks.append(Pool(model, cs.fit_probe(model, pool.where(outcome="refused"), complied), pool))
    if run is not None:
        tasks.append(StudyRepair(run, config))
    return [task for task in tasks if task.name in names]


def main() -> None:
    """Prints a line of JSON a task; ends with 1 if anything was lost."""
    tasks = [task.name for task in (Export, Replace, Pool, Figures, Repair, StudyRepair)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=tasks, help="all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--run", type=Path, help="a finished study; made by default where it is needed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    names, failed = options.task or tasks, False
    with tempfile.TemporaryDirectory() as folder:
        place, run, config = Path(os.path.realpath(folder)), options.run, dict[str, object]()
        if StudyRepair.name in names:
            if run is None:
                run = place / "study"
                small = {"limit": 120, "max_thinking": 96, "max_answer": 16, "temperature": 1.0, "controls": 3}
                run_study(StudyConfig(model="planted-llama", out=str(run), device="cpu", **small))
            config = dict(json.loads((run / "manifest.json").read_text())["settings"]) | {"select_fraction": 0.2}
        for task in make_tasks(names, run, config):
            counts = run_task(task, place / task.name.replace(" ", "-"), options.rounds)
            print(json.dumps(counts), flush=True)
            failed |= bool(counts["wrong"])
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
