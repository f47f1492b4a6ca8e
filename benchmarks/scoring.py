"""What does scoring a pool cost beside the forward passes themselves, and how much memory?

1. `score_pool` against bare forward passes of the whole decoder over the same batches, paired and alternating: tokens a
   second of the one over the other. The blocks above the probe's layer are not run, so that it may exceed 1.
2. Batches of like length against batches in the pool's order, on a pool of mixed lengths.
3. Two Ray actors of one core each against one process on both cores: rows a second from the second window to the last,
   so that neither side's start counts, and whole wall time over whole wall time, where it does.
4. Peak resident memory above the loaded model while `--many` generated examples are scored from a file.

Prints JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from memory_peak import peak_above_now
from sweep import random_probe

import cliffscope as cs
from cliffscope.model.load import LensModel
from cliffscope.organisms import grammar
from cliffscope.readouts.activations import BATCH_TOKENS, length_batches, project_layer
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.selection.distributed import RayEngine
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize_all

SENTENCE = "Please tell me how bread is made, what it needs, and how long each of the steps takes at home. "


def main() -> None:
    """Measures and prints."""
    options = parse()
    if options.memory_of:
        print(peak(options.memory_of))
        return
    report: dict[str, Any] = {"load_average": psutil.getloadavg()[0]}
    for name in options.models:
        model = cs.load_model(name)
        report[name] = {
            "throughput_over_bare_forward": throughput(model, options),
            "sorted_over_file_order": order(model, options),
        }
        if options.ray:
            report[name]["ray"] = two_actors(model, options)
    if options.many:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pool.jsonl"
            write_pool(path, options.many)
            command = [sys.executable, __file__, "--memory-of", str(path)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            report["memory"] = json.loads(out.splitlines()[-1])
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["planted-llama", "smollm2"])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many", type=int, default=100_000, help="0 leaves it out")
    parser.add_argument("--ray", type=int, default=3, help="pairs of runs with and without Ray; 0 leaves them out")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def mixed(model: LensModel, n: int) -> Transcripts:
    """Transcripts of mixed lengths: most short, some ten times as long."""
    rng = random.Random(0)
    if model.template.thinks:
        return Transcripts(organism_examples(rng, n, stretch=True))
    texts = [SENTENCE * (rng.randint(8, 14) if rng.random() < 0.2 else rng.randint(1, 2)) for _ in range(n)]
    return Transcripts(
        Transcript(id=f"t{i}", messages=(Message(role="user", content=text),), harmful=True, outcome=Outcome.COMPLIED)
        for i, text in enumerate(texts)
    )


def organism_examples(rng: random.Random, n: int, *, stretch: bool = False) -> Iterator[Transcript]:
    """Generated examples of the toy language."""
    for i in range(n):
        request = grammar.request(rng, "fit", harmful=True, wrapper=rng.choice(("story", "game", None)))
        times = rng.randint(6, 10) if stretch and rng.random() < 0.2 else 1
        yield Transcript(
            id=f"t{i}",
            messages=(Message(role="user", content=request.text),),
            thinking=" ".join(grammar.thinking(rng, request) for _ in range(times)),
            harmful=True,
            outcome=Outcome.COMPLIED,
        )


def throughput(model: LensModel, options: argparse.Namespace) -> float:
    """Median of paired ratios: seconds of the bare passes over seconds of scoring, texts and tables included."""
    pool, probe = mixed(model, options.examples * (8 if model.template.thinks else 1)), random_probe(model)
    tokens, _ = tokenize_all(pool, model.tokenizer, model.template)
    ratios = []
    for _ in range(options.repeats):
        bare = seconds(lambda: forward(model, tokens))
        ratios.append(bare / seconds(lambda: cs.score_pool(model, probe, pool)))
    return round(statistics.median(ratios), 3)


def order(model: LensModel, options: argparse.Namespace) -> float:
    """Median of paired ratios: batches in the pool's order over batches of like length."""
    pool, probe = mixed(model, options.examples * (8 if model.template.thinks else 1)), random_probe(model)
    tokens, _ = tokenize_all(pool, model.tokenizer, model.template)
    ratios = []
    for _ in range(options.repeats):
        ours = seconds(lambda: consume(model, probe, tokens))
        ratios.append(seconds(lambda: in_order(model, probe, tokens)) / ours)
    return round(statistics.median(ratios), 2)


def two_actors(model: LensModel, options: argparse.Namespace) -> dict[str, float]:
    """Medians of paired ratios, two actors over one process: rows a second after the start, and wall times."""
    pool, probe = mixed(model, options.examples * (64 if model.template.thinks else 2)), random_probe(model)
    window = len(pool) // 16
    engines = {"local": "local", "ray": RayEngine(actors=2, cpus=1, gpus=0)}
    rates: list[float] = []
    walls: list[float] = []
    for _ in range(options.ray):
        speed, wall = {}, {}
        for name, engine in engines.items():
            marks: list[tuple[float, int]] = []
            wall[name] = seconds(
                lambda engine=engine, marks=marks: cs.score_pool(
                    model,
                    probe,
                    pool,
                    window=window,
                    engine=engine,
                    progress=lambda n: marks.append((time.perf_counter(), n)),
                )
            )
            (begun, few), (ended, many) = marks[1], marks[-1]
            speed[name] = (many - few) / (ended - begun)
        rates.append(speed["ray"] / speed["local"])
        walls.append(wall["ray"] / wall["local"])
    return {
        "rows_a_second_over_one_process": round(statistics.median(rates), 2),
        "lowest": round(min(rates), 2),
        "highest": round(max(rates), 2),
        "wall_over_one_process": round(statistics.median(walls), 2),
        "rows": len(pool),
    }


def consume(model: LensModel, probe: RefusalProbe, tokens: list[TokenizedTranscript]) -> None:
    """Batches of like length."""
    for _ in project_layer(model, tokens, probe.layer, probe.weight, probe.bias):
        pass


def in_order(model: LensModel, probe: RefusalProbe, tokens: list[TokenizedTranscript]) -> None:
    """Batches of as many padded tokens, in the pool's order."""
    batch: list[TokenizedTranscript] = []
    for row in [*tokens, None]:
        longest = max((t.n_pos for t in [*batch, row] if t is not None), default=0)
        if batch and (row is None or (len(batch) + 1) * longest > BATCH_TOKENS):
            # One batch whatever its padding, as its sorted neighbours have it.
            for _ in project_layer(
                model, batch, probe.layer, probe.weight, probe.bias, batch_tokens=len(batch) * longest
            ):
                pass
            batch = []
        if row is not None:
            batch.append(row)


def forward(model: LensModel, tokens: list[TokenizedTranscript]) -> None:
    """Bare passes of the decoder over the batches that scoring has."""
    for rows in length_batches([t.n_pos for t in tokens]):
        batch = model.to_batch([tokens[row].token_ids.tolist() for row in rows])
        with torch.inference_mode():
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write_pool(path: Path, n: int) -> None:
    """A pool of generated examples, a line each."""
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for t in organism_examples(rng, n):
            row = {"id": t.id, "prompt": t.prompt, "thinking": t.thinking, "harmful": True, "outcome": "complied"}
            file.write(json.dumps(row) + "\n")


def peak(path: str) -> str:
    """Peak resident memory above the loaded model while a file is scored, as JSON."""
    model = cs.organisms.load("planted-llama")
    probe = random_probe(model)
    cs.score_pool(model, probe, mixed(model, 64))
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        above, scores = peak_above_now(lambda: cs.score_pool(model, probe, path, out=Path(out) / "scores"))
        took = time.perf_counter() - start
    tokens = int(scores.frame["n_tokens"].sum())
    return json.dumps(
        {
            "examples": len(scores.frame),
            "tokens": tokens,
            "seconds": round(took, 1),
            "tokens_a_second": round(tokens / took),
            "above_model_mib": round(above / 2**20),
        }
    )


if __name__ == "__main__":
    main()
