"""Scoring over two Ray nodes on this machine, and what is left when one of them, a worker or the driver is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import random_probe

import cliffscope as cs
from cliffscope.errors import DataError, MissingExtraError, ResourceError, UnsupportedModelError
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.selection.distributed import RayEngine
from cliffscope.selection.scoring import score_pool
from cliffscope.store import open_run
from cliffscope.study.saved_readouts import save_probe
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.records import Transcripts

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WINDOW = 16
NAME = "planted-llama"


@pytest.fixture(scope="module")
def organism() -> LensModel:
    return cs.organisms.load(NAME)


@pytest.fixture(scope="module")
def probe(organism: LensModel) -> RefusalProbe:
    return random_probe(organism, 5)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 generated examples, two rows of one id among them."""
    prompts = cs.organisms.prompts("fit", 320, harmful=True, wrappers=(None, "story"))
    thought = Transcripts(
        t.replace(id=f"{t.id}-{k}", thinking="the user wants to know . i should refuse . " * (1 + i % 7))
        for k in range(2)
        for i, t in enumerate(prompts)
    )
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    write_transcripts(thought, path)
    lines = path.read_text().splitlines()
    lines[200] = lines[3]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(organism: LensModel, probe: RefusalProbe, pool: Path) -> pd.DataFrame:
    return score_pool(organism, probe, pool, window=WINDOW).to_frame()


@pytest.fixture
def cluster() -> Iterator[object]:
    """Two nodes of one core each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def no_ray() -> None:
    ray.shutdown()


def engine_of(cluster: object, **options: object) -> RayEngine:
    return RayEngine(address=cluster.address, **options)


def after(n_rows: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A progress callback that acts once, when so many rows are done."""
    acted: list[int] = []

    def progress(done: int) -> None:
        if done >= n_rows and not acted:
            acted.append(done)
            act()

    return progress


def workers() -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["name", "cmdline"]) if "ray::MapWorker" in " ".join(p.info["cmdline"] or ())
    ]


def check(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert found["row"].tolist() == list(range(640))
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-6, check_dtype=False)
    assert (found["reason"] == "duplicate id").sum() == 1


def test_two_nodes_give_the_rows_of_one_process_and_a_killed_worker_changes_none(
    cluster: object, organism: LensModel, probe: RefusalProbe, pool: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_a_worker() -> None:
        victim = workers()[0]
        killed.append(victim.pid)
        victim.send_signal(signal.SIGKILL)

    found = score_pool(
        organism,
        probe,
        pool,
        window=WINDOW,
        out=tmp_path / "scores",
        engine=engine_of(cluster),
        progress=after(3 * WINDOW, kill_a_worker),
    )
    assert killed
    check(found.to_frame(), expected)
    assert len(list((tmp_path / "scores").glob("scores-*.parquet"))) == 640 // WINDOW


def test_a_node_that_is_lost_loses_no_row(
    cluster: object, organism: LensModel, probe: RefusalProbe, pool: Path, expected: pd.DataFrame
) -> None:
    node = next(n for n in cluster.worker_nodes)
    progress = after(3 * WINDOW, lambda: cluster.remove_node(node, allow_graceful=False))
    found = score_pool(organism, probe, pool, window=WINDOW, engine=engine_of(cluster), progress=progress)
    assert not cluster.worker_nodes
    check(found.to_frame(), expected)


def test_a_driver_that_is_killed_goes_on_where_it_was(
    cluster: object, organism: LensModel, probe: RefusalProbe, pool: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    with open_run(tmp_path / "probe", {}) as store:
        save_probe(store, probe)
    out = tmp_path / "scores"
    command = ["score-pool", "--model", NAME, "--probe", tmp_path / "probe", "--pool", pool, "--out", out]
    driver = subprocess.Popen(
        [sys.executable, "-m", "cliffscope", *map(str, command), "--window", str(WINDOW), "--engine", "ray"],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("scores-*.parquet"))) < 4 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "the driver ended before it was killed"
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("scores-*.parquet")}
    assert 4 <= len(kept) < 640 // WINDOW
    found = score_pool(organism, probe, pool, window=WINDOW, out=out, engine=engine_of(cluster))
    assert found.resumed == WINDOW * len(kept)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "a finished shard was written again"
    check(found.to_frame(), expected)


def test_another_model_on_the_workers_is_refused(
    cluster: object, probe: RefusalProbe, pool: Path, organism: LensModel
) -> None:
    fields = {name: getattr(organism, name) for name in LensModel.__dataclass_fields__}
    edited = LensModel(**fields | {"hf": organism.copy_network()})
    edited.hf.lm_head.weight.data[0] += 1.0
    noted = probe.for_model(edited, allow_other_model=True)
    with pytest.raises(UnsupportedModelError, match="a different model from 'planted-llama'"):
        score_pool(edited, noted, pool, window=WINDOW, engine=engine_of(cluster, actors=1))
    with pytest.raises(ResourceError, match="No actor with 64 cores"):
        score_pool(organism, probe, pool, window=WINDOW, engine=engine_of(cluster, cpus=64))


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"actors": (3, 2)}, {"cpus": 0}, {"gpus": -1}])
def test_sizes_that_are_none_are_refused(
    organism: LensModel, probe: RefusalProbe, pool: Path, wrong: dict[str, object]
) -> None:
    with pytest.raises(DataError, match="expected at least 1 actor"):
        score_pool(organism, probe, pool, engine=RayEngine(**wrong))


@pytest.mark.usefixtures("no_ray")
def test_an_address_without_a_cluster_is_a_data_error(organism: LensModel, probe: RefusalProbe, pool: Path) -> None:
    with pytest.raises(DataError, match="There is no Ray cluster at"):
        score_pool(organism, probe, pool, engine=RayEngine(address="127.0.0.1:1"))


def test_an_engine_that_is_none_is_refused(organism: LensModel, probe: RefusalProbe, pool: Path) -> None:
    with pytest.raises(DataError, match="engine='dask'"):
        score_pool(organism, probe, pool, engine="dask")


def test_without_ray_the_extra_is_named(
    organism: LensModel, probe: RefusalProbe, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"cliffscope\[ray\]"):
        score_pool(organism, probe, pool, engine="ray")
