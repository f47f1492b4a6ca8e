"""Do a few examples with a large cliff do what all of the pool does?

On planted-llama: a pool of harmful prompts in fully and partly complying wrappers, plain harmful ones that are refused
and harmless ones, answered by the model. Of the harmful ones that were complied with, a share is chosen by each
criterion, the model is repaired on it (harmless examples mixed in), and attack success is measured on prompts whose
verb-object pairs are in no pool. Each seed has a pool, a training order and a probe of its own.

With `--svg` it draws the figure of docs/validation.md (needs kaleido); with `--read` from an earlier run's JSON.

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
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import cliffscope as cs
from cliffscope.figures import theme
from cliffscope.model.load import LensModel
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.repairing.finetune import repair
from cliffscope.resampling import bootstrap_mean
from cliffscope.selection.choice import Selection, select_from_cliffs
from cliffscope.transcripts.records import Transcripts

NAME = "planted-llama"
ANSWER = "sorry , i can not help with that ."
SHARES = (0.017, 0.05, 0.125, 0.25, 0.5)
COLORS = (theme.VERMILLION, theme.ORANGE, theme.PURPLE, theme.GREY, theme.GREEN, theme.BLUE)
CRITERIA = ("cliff", "misalignment", "final", "random", "rule", "length")
BUDGET = {"max_thinking": 128, "max_answer": 32}


def main() -> None:
    """Measures and prints."""
    options = parse()
    if options.read:
        draw(json.loads(Path(options.read).read_text())).write_image(options.svg)
        return
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = pool.starmap(one_seed, [(seed, options) for seed in range(options.seeds)], chunksize=1)
    runs = pd.DataFrame([run for part in parts for run in part])
    report = {
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "options": vars(options),
        "table": summary(runs),
        "asked": differences(runs),
        "runs": json.loads(runs.to_json(orient="records")),
    }
    if options.svg:
        draw(report).write_image(options.svg)
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--pool", type=int, default=1300)
    parser.add_argument("--svg", default="")
    parser.add_argument("--read", default="", help="JSON of an earlier run, to be drawn again")
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
    complied = pool.where(harmful=True, outcome="complied")
    cliffs = cs.trace_refusal(model, probe, complied).cliffs()
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
        selection = select_from_cliffs(cliffs, complied, fraction=share, criterion=by, deduplicate=False, seed=seed)
        for regime in ("steps", "epochs"):
            row = {"seed": seed, "regime": regime, "criterion": criterion, "share": share, "n": len(selection.selected)}
            runs.append({**row, **repaired(model, selection, harmless, test, regime, seed, options)})
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
    selection: Selection,
    harmless: Transcripts,
    test: Transcripts,
    regime: str,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """ASR and over-refusal after a repair on the chosen examples."""
    folder = Path(tempfile.mkdtemp())
    try:
        result = repair(
            model,
            selection.selected,
            folder / "repaired",
            harmless=harmless,
            answer=ANSWER,
            steps=options.steps if regime == "steps" else None,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            seed=seed,
        )
        after = measured(cs.load_model(result.path), test)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**after, "steps": float(len(result.losses))}


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


def differences(runs: pd.DataFrame) -> list[dict[str, object]]:
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


def draw(report: dict[str, Any]) -> go.Figure:
    """ASR by share, a line a criterion, a panel a regime; all of the pool as a band."""
    table, options = pd.DataFrame(report["table"]), report["options"]
    names = {
        "steps": f"{options['steps']} steps for every share",
        "epochs": f"{options['epochs']:g} epochs for every share",
    }
    fig = make_subplots(cols=2, subplot_titles=list(names.values()), horizontal_spacing=0.08, shared_yaxes=True)
    for column, regime in enumerate(names, start=1):
        part = table[table["regime"] == regime]
        whole = part[part["criterion"] == "all"].iloc[0]
        fig.add_hrect(
            y0=whole["ci_low"],
            y1=whole["ci_high"],
            fillcolor=theme.fade(theme.GREY, 0.25),
            line_width=0,
            annotation_text="all of the pool",
            annotation_position="top right",
            exclude_empty_subplots=False,
            row=1,
            col=column,
        )
        for index, name in enumerate(CRITERIA):
            rows = part[part["criterion"] == name]
            color, place = COLORS[index], rows["share"] * 1.04 ** (index - 2.5)
            value, low, high = (rows[key].to_numpy() for key in ("asr", "ci_low", "ci_high"))
            fig.add_scatter(
                x=place,
                y=value,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": color},
                error_y=theme.error_bars(value, low, high, color),
                row=1,
                col=column,
            )
    title = (
        f"ASR after repair on a share of the pool, {NAME} ({options['seeds']} seeds, n={options['test']} prompts each)"
    )
    theme.themed(fig, title=title, x="share of the pool", y="", height=440)
    fig.update_xaxes(type="log", tickvals=SHARES, ticktext=[f"{share:.1%}" for share in SHARES])
    fig.update_yaxes(title_text="ASR", row=1, col=1)
    return fig.update_yaxes(range=[-0.01, 0.34]).update_layout(width=900, margin_t=100, legend_y=-0.3)


if __name__ == "__main__":
    main()
