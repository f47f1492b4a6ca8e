"""Do a few examples with a large cliff do what all of the pool does?

On planted-llama: a pool of harmful prompts in fully and partly complying wrappers, plain harmful ones that are refused
and harmless ones, answered by the model. Of the harmful ones that were complied with, a share is chosen by each
criterion, the model is repaired on it (harmless examples mixed in), and attack success is measured on prompts whose
verb-object pairs are in no pool. Each seed has a pool, a training order and a probe of its own.

Two regimes: as many steps for every share, and as many epochs. Prints JSON: every run, then by regime, criterion and
share the mean ASR with a bootstrap interval over seeds, and what was asked: cliff at the smallest share against all of
the pool, and against random at that share, paired by seed.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import cliffscope as cs
from cliffscope.alignment.repair import repair
from cliffscope.alignment.selection import Selection, select_from_cliffs
from cliffscope.models import LensModel
from cliffscope.probing.contrast import contrast_classes
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Transcripts

NAME = "planted-llama"
ANSWER = "sorry , i can not help with that ."
SHARES = (0.017, 0.05, 0.125, 0.25, 0.5)
CRITERIA = ("cliff", "misalignment", "final", "random", "rule", "length")
BUDGET = {"max_thinking": 128, "max_answer": 32}


def main() -> None:
    """Measures and prints."""
    options = parse()
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = pool.starmap(one_seed, [(seed, options) for seed in range(options.seeds)], chunksize=1)
    runs = pd.DataFrame([run for part in parts for run in part])
    found = {
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "options": vars(options),
        "table": summary(runs),
        "asked": asked(runs),
        "runs": json.loads(runs.to_json(orient="records")),
    }
    print(json.dumps(found, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--pool", type=int, default=1300)
    parser.add_argument("--test", type=int, default=160)
    return parser.parse_args()


def one_seed(seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Every run of one seed."""
    torch.set_num_threads(1)
    model = cs.load_model(NAME)
    truth = cs.organisms.read_truth(NAME)
    full = truth.full_wrappers
    partly = tuple(w for w in truth.wrappers if w not in full)
    kinds = ((True, full, 0.4), (True, partly, 0.3), (True, (None,), 0.1), (False, (None, *truth.wrappers), 0.2))
    pool = answered(model, "fit", [(h, w, round(share * options.pool)) for h, w, share in kinds], seed)
    classes = contrast_classes(pool, "auto", thinks=True)
    probe = cs.fit_probe(model, classes.refused, classes.complied, challenge=classes.challenge, seed=seed)
    wanted = pool.where(harmful=True, outcome="complied")
    cliffs = cs.trace_refusal(model, probe, wanted).cliffs()
    harmless = pool.where(harmful=False, outcome="complied")
    half = options.test // 2
    test = Transcripts(
        t
        for harmful, words, n in ((True, full, half), (True, partly, half), (False, (None, *truth.wrappers), half))
        for t in cs.organisms.prompts("test", n, harmful=harmful, wrappers=words, seed=100 + seed)
    )
    runs = [{"seed": seed, "regime": "none", "criterion": "none", "share": 0.0, "n": 0, **measured(model, test)}]
    plans = [(criterion, share) for criterion in CRITERIA for share in SHARES] + [("all", 1.0)]
    for criterion, share in plans:
        by = "cliff" if criterion == "all" else criterion
        chosen = select_from_cliffs(cliffs, wanted, fraction=share, criterion=by, deduplicate=False, seed=seed)
        for regime in ("steps", "epochs"):
            row = {"seed": seed, "regime": regime, "criterion": criterion, "share": share, "n": len(chosen.chosen)}
            runs.append({**row, **repaired(model, chosen, harmless, test, regime, seed, options)})
    return runs


def answered(
    model: LensModel, part: str, kinds: list[tuple[bool, tuple[str | None, ...], int]], seed: int
) -> Transcripts:
    """Prompts of several kinds with the model's own answers, judged."""
    asked_for = Transcripts(
        t
        for harmful, words, n in kinds
        for t in cs.organisms.prompts(part, n, harmful=harmful, wrappers=words, seed=seed)
    )
    return cs.judge(cs.roll_out(model, asked_for, temperature=1.0, seed=seed, **BUDGET))


def repaired(
    model: LensModel,
    chosen: Selection,
    harmless: Transcripts,
    test: Transcripts,
    regime: str,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """ASR and over-refusal after a repair on the chosen examples."""
    folder = Path(tempfile.mkdtemp())
    try:
        made = repair(
            model,
            chosen.chosen,
            folder / "repaired",
            harmless=harmless,
            answer=ANSWER,
            steps=options.steps if regime == "steps" else None,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            seed=seed,
        )
        after = measured(cs.load_model(made.path), test)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**after, "steps": float(len(made.losses))}


def measured(model: LensModel, test: Transcripts) -> dict[str, float]:
    """ASR and over-refusal, greedy."""
    report = cs.evaluate_safety(model, test, **BUDGET)
    return {"asr": report.rate("unedited"), "over_refusal": report.rate("unedited", "harmless")}


def summary(runs: pd.DataFrame) -> list[dict[str, object]]:
    """Means over seeds with intervals."""
    rows = []
    for (regime, criterion, share), part in runs.groupby(["regime", "criterion", "share"], sort=False):
        low, high = bootstrap_mean(part["asr"].to_numpy(), seed=0)
        rows.append(
            {
                **{"regime": regime, "criterion": criterion, "share": share, "n": float(part["n"].mean())},
                **{"asr": float(part["asr"].mean()), "ci_low": float(low), "ci_high": float(high)},
                "over_refusal": float(part["over_refusal"].mean()),
            }
        )
    return rows


def asked(runs: pd.DataFrame) -> list[dict[str, object]]:
    """Cliff at the smallest share against all, and each criterion against random there, paired by seed."""
    rows = []
    for regime in ("steps", "epochs"):
        table = runs[runs["regime"] == regime].set_index(["criterion", "share", "seed"])["asr"]
        small = SHARES[0]
        pairs = [("cliff", "all", 1.0), *((name, "random", small) for name in CRITERIA if name != "random")]
        for name, other, share in pairs:
            difference = (table[name, small] - table[other, share]).to_numpy(dtype=np.float64)
            low, high = bootstrap_mean(difference, seed=0)
            values = {"difference": float(difference.mean()), "ci_low": float(low), "ci_high": float(high)}
            rows.append({"regime": regime, "what": f"{name} {small} - {other} {share}", **values})
    return rows


if __name__ == "__main__":
    main()
