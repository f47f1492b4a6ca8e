"""What differs between two runs, and what does not?

1. What was run: every setting, model fact and version that differs.
2. The cliff: the curves of the harmful groups side by side, and the cliffs with their intervals; where both runs traced
   the same prompts, the paired difference too.
3. The heads: each head's effect in the one run against that in the other, and the selected heads of both.
4. The intervention: ASR and over-refusal of every arm.
5. The probes, since numbers of a probe that cannot tell compare nothing.

Runs whose weights, probe, method or scope differ share no scale of logits, which the page says. It measures nothing but
paired differences of stored cliffs and rank correlations of stored effects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from cliffscope.figures import bands_of, effect_pairs, mean_trace, measure_panels
from cliffscope.report.content import (
    Cell,
    Part,
    Remark,
    Section,
    Table,
    Tile,
    columns,
    count_cell,
    interval,
    interval_cell,
    number,
    number_cell,
    plot,
    text_cell,
)
from cliffscope.report.evidence import COMPLIED, cliff_rows
from cliffscope.report.outcomes import tiles
from cliffscope.report.readouts import QUALITY, quality_rows
from cliffscope.report.stored import JsonObject, StoredRun, as_float, as_int, as_list
from cliffscope.resampling import bootstrap_mean

CURVES = ("harmful, complied", "harmful, refused", "harmless, complied")
"""Groups whose curves are drawn; with more, two runs would hide each other."""
HEADLINES = ("Suppression (logits)", "ASR", "Mean cliff", "Probe AUROC")
"""Tiles of a run's own page that stand on top."""
FEWEST_PAIRS = 10
"""Prompts that both runs complied with, below which their difference claims nothing."""
PAIRS_NOTE = "Vermillion: selected in both runs. Orange: selected in one. Grey: selected in neither."
OTHER_SCALES = (
    "Weights, probe, method or scope differ, so the two axes share no scale. Compare the order of the heads, not the "
    "logits."
)
OTHER_SEEDS = "The runs have different seeds, so their prompts were drawn and split differently."
OTHER_WEIGHTS = (
    "The runs use different weights. Heads of the two models correspond only if one model was trained from the other, "
    "or both from the same model."
)


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedRun:
    """A run and what it is called on the page."""

    name: str
    """Such as "A: runs/base"."""
    run: StoredRun
    """What it holds."""

    @property
    def letter(self) -> str:
        """What it is called in figures, where a name would be cut."""
        return self.name[0]


def comparison_sections(runs: Sequence[NamedRun]) -> list[Section]:
    """The sections of a page that compares runs."""
    return [_differences(runs), _cliffs(runs), _heads(runs), _safety(runs), _probes(runs)]


def comparison_tiles(runs: Sequence[NamedRun]) -> list[Tile]:
    """The headline numbers of each run's own page, run beside run."""
    by_run = [(one.name, {tile.name: tile for tile in tiles(one.run)}) for one in runs]
    return [
        replace(headlines[name], detail=f"{run}: {headlines[name].detail}")
        for name in HEADLINES
        for run, headlines in by_run
        if name in headlines
    ]


def _complied(run: StoredRun) -> pd.DataFrame:
    cliffs = run.tables["cliffs"]
    return cliffs[cliffs["group"] == COMPLIED]


def _differences(runs: Sequence[NamedRun]) -> Section:
    rows = []
    for section in ("settings", "model", "versions", "probe", "heads"):
        values = [_settings(one.run, section) for one in runs]
        for key in dict.fromkeys(key for settings in values for key in settings):
            shown = [str(settings.get(key, "–")) for settings in values]
            if len(set(shown)) > 1:
                rows.append([text_cell(section), text_cell(key, 60), *(text_cell(text, 200) for text in shown)])
    heads = columns("part", "setting|code", *(f"{one.name}|long" for one in runs))
    same = "The runs have the same settings, model and versions."
    seeds = {str(one.run.settings.get("seed")) for one in runs}
    return Section(
        id="run",
        title="Differences",
        claim="",
        lead="Every setting, model property and version that differs between the runs.",
        parts=[
            *([Table(caption="Settings that differ", columns=heads, rows=rows)] if rows else [Remark(text=same)]),
            *([Remark(text=OTHER_SEEDS)] if len(seeds) > 1 else []),
        ],
    )


def _settings(run: StoredRun, section: str) -> JsonObject:
    """Settings and selections of a part, without measurements."""
    if section == "probe":
        return {key: run.probe[key] for key in ("layer", "positions", "contrast") if key in run.probe}
    if section == "heads":
        facts = {**run.heads, **run.suppression}
        return {key: facts[key] for key in ("method", "scope", "path", "top_fraction") if key in facts}
    if section == "versions":
        return run.versions
    return run.section(section)


def _cliffs(runs: Sequence[NamedRun]) -> Section:
    parts: list[Part] = []
    drawn = [(one, bands_of(one.run.tables["aligned"])) for one in runs if len(one.run.tables["aligned"])]
    layouts = {tuple(spans) for _, (_, spans, _) in drawn}
    if len(layouts) == 1:
        labels, spans, _ = drawn[0][1]
        curves = {f"{one.letter}: {g}": bands[g] for one, (_, _, bands) in drawn for g in CURVES if g in bands}
        note = (
            f"{_legend(runs)} Groups of each run, aligned on spans. Closing tokens are labelled as in the first run's "
            "template. Band: 95% bootstrap interval of the mean."
        )
        parts.append(plot("cliff", mean_trace(labels, spans, curves), note))
    elif drawn:
        parts.append(Remark(text="The closings differ in their number of tokens, so each run has its own axis."))
        for place, (one, (labels, spans, bands)) in enumerate(drawn):
            fig = mean_trace(labels, spans, {g: bands[g] for g in CURVES if g in bands}, title=one.name)
            parts.append(plot(f"cliff-{place + 1}", fig, "Band: 95% bootstrap interval of the mean."))
    parts.append(_cliff_table(runs))
    return Section(
        id="cliff",
        title="The cliff",
        claim=_paired_claim(runs),
        lead="Held-out transcripts of each run, scored by that run's own probe.",
        parts=parts,
    )


def _cliff_table(runs: Sequence[NamedRun]) -> Table:
    rows = []
    for one in runs:
        cliffs = one.run.tables["cliffs"]
        plateau = one.run.plateau
        which = [text_cell(one.name, 80), text_cell(plateau)]
        rows += [[*which, *cells] for cells in cliff_rows(cliffs, plateau)]
    names = ("n|number", "plateau|number", "final|number", "cliff|number", "95% interval|number")
    heads = columns("run", "plateau", "group", *names)
    return Table(caption="Mean plateau, final score and cliff by run and group", columns=heads, rows=rows)


def _legend(runs: Sequence[NamedRun]) -> str:
    return "; ".join(one.name for one in runs) + "."


def _paired_claim(runs: Sequence[NamedRun]) -> str:
    """The mean difference over prompts that both complied with, matched by id and text."""
    first, second = (_cliffs_by_prompt(one.run) for one in (runs[0], runs[-1]))
    shared = first.index.intersection(second.index)
    if not len(shared):
        return ""
    kinds = [one.run.plateau for one in (runs[0], runs[-1])]
    if kinds[0] != kinds[1]:
        return f"The cliffs are measured from different plateaus ({kinds[0]} and {kinds[1]}), so they are not paired."
    if len(shared) < FEWEST_PAIRS:
        return f"Both runs complied with {len(shared)} shared prompts: too few for a paired difference of cliffs."
    gaps = (second[shared] - first[shared]).to_numpy(float)
    low, high = bootstrap_mean(gaps, seed=0)
    return (
        f"On the {len(shared)} harmful prompts that both runs complied with, the cliff of {runs[-1].name} minus that "
        f"of {runs[0].name} is {number(float(gaps.mean()))} {interval(float(low), float(high))} (paired)."
    )


def _cliffs_by_prompt(run: StoredRun) -> pd.Series:
    """Valid cliffs by id and prompt: ids alone may be line numbers of other files."""
    rows = _complied(run)
    rows = rows[rows["valid"].fillna(False).astype(bool)].drop_duplicates("id").set_index("id")
    prompts = run.tables["transcripts"].drop_duplicates("id").set_index("id")["prompt"].reindex(rows.index)
    cliffs = pd.to_numeric(rows["cliff"], errors="coerce")
    return pd.Series(cliffs.to_numpy(float), index=pd.MultiIndex.from_arrays([rows.index, prompts.astype(str)]))


def _heads(runs: Sequence[NamedRun]) -> Section:
    parts: list[Part] = []
    claim = ""
    first, second = (one.run.tables["heads"].set_index(["layer", "head"]) for one in (runs[0], runs[-1]))
    shared = first.index.intersection(second.index)
    if len(shared) and len(first) == len(second) == len(shared):
        effect, other = (
            pd.to_numeric(f.loc[shared, "effect"], errors="coerce").to_numpy(float) for f in (first, second)
        )
        names = [f"L{int(layer)}H{int(head)}" for layer, head in shared]
        selected = [set(_selected(one.run)) for one in (runs[0], runs[-1])]
        count = np.array([(name in selected[0]) + (name in selected[1]) for name in names])
        same_weights = len({str(one.run.section("model").get("fingerprint")) for one in runs}) == 1
        settings = {str([_settings(one.run, section) for section in ("probe", "heads")]) for one in runs}
        alike = same_weights and len(settings) == 1
        letters = (f"run {runs[0].letter}", f"run {runs[-1].letter}")
        fig = effect_pairs(names, effect, other, count, runs=letters, same_scale=alike)
        parts.append(plot("pairs", fig, f"{_legend(runs)} {PAIRS_NOTE}"))
        if not alike:
            parts.append(Remark(text=OTHER_SCALES))
        if not same_weights:
            parts.append(Remark(text=OTHER_WEIGHTS))
        measured = np.isfinite(effect) & np.isfinite(other) & ((effect != 0) | (other != 0))
        varied = measured.sum() > 2 and np.ptp(effect[measured]) > 0 and np.ptp(other[measured]) > 0
        rank = float(spearmanr(effect[measured], other[measured]).statistic) if varied else float("nan")
        claim = (
            f"{len(selected[0] & selected[1])} heads are selected in both runs, of {len(selected[0])} and "
            f"{len(selected[1])}. The rank correlation of the effects is {number(rank)} over the "
            f"{int(measured.sum())} heads with an effect."
        )
    elif len(first) and len(second):
        parts.append(Remark(text="The models have different heads, so single heads cannot be compared."))
    rows = [
        [text_cell(one.name, 80), text_cell(", ".join(_selected(one.run)) or "none", 400), *_set_cells(one.run)]
        for one in runs
    ]
    heads = columns(
        "run", "selected|long", "n|number", "joint effect (logit)|number", "95% interval|number", "p (random)|number"
    )
    parts.append(Table(caption="Selected heads", columns=heads, rows=rows))
    return Section(
        id="heads",
        title="The heads",
        claim=claim,
        lead="Effect of each head in one run against its effect in the other.",
        parts=parts,
    )


def _selected(run: StoredRun) -> list[str]:
    return [str(name) for name in as_list(run.suppression.get("selected"))]


def _set_cells(run: StoredRun) -> list[Cell]:
    facts = run.suppression
    low, high = as_float(facts.get("effect_low")), as_float(facts.get("effect_high"))
    effect, p, n = as_float(facts.get("effect")), as_float(facts.get("p")), as_int(facts.get("n"))
    return [count_cell(n), number_cell(effect), interval_cell(low, high, n), number_cell(p, 3)]


def _safety(runs: Sequence[NamedRun]) -> Section:
    tables = []
    names = {"harmful": "ASR", "harmless": "over-refusal"}
    for one in runs:
        frame = one.run.tables["safety"]
        arm = frame["arm"].astype(str).where(frame["kind"] != "random", "random sets")
        measure = frame["group"].map(names).fillna(frame["group"])
        tables.append(frame.assign(arm=one.letter + ", " + arm, measure=measure, value=frame["rate"]))
    frame = pd.concat(tables, ignore_index=True)
    numeric = ("value", "ci_low", "ci_high", "n")
    shown = frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in numeric})
    rows = []
    for key, part in shown.groupby(["arm", "measure"], sort=False):
        low, high, n = (float(part[name].iloc[0]) for name in ("ci_low", "ci_high", "n"))
        many = text_cell(f"{len(part)} sets")
        bounds = interval_cell(low, high, int(np.nan_to_num(n))) if len(part) == 1 else many
        shown_key = [text_cell(text, 120) for text in key]
        rows.append([*shown_key, count_cell(n), number_cell(float(part["value"].mean())), bounds])
    heads = columns("arm", "measure", "n|number", "rate|number", "95% interval|number")
    fig = measure_panels(shown, title="Outcomes by run and arm", share=True)
    note = f"{_legend(runs)} Bars: 95% Wilson intervals. Dots: size-matched random head sets."
    parts: list[Part] = [plot("arms", fig, note)] if rows else []
    return Section(
        id="intervention",
        title="The intervention",
        claim="",
        lead="ASR: complied / judged over harmful prompts. Over-refusal: refused / judged over harmless prompts.",
        parts=[*parts, Table(caption="Outcomes by run and arm", columns=heads, rows=rows)] if rows else [],
        missing=() if rows else ("Neither run evaluated an edit.",),
    )


def _probes(runs: Sequence[NamedRun]) -> Section:
    rows = [[text_cell(one.name, 80), *cells] for one in runs for cells in quality_rows(one.run)]
    heads = columns("run", *QUALITY)
    return Section(
        id="probe",
        title="Can the probes tell?",
        claim="",
        lead="A difference between runs is meaningful only where both probes separate refused from complied.",
        parts=[Table(caption="Held-out quality of each run's probe", columns=heads, rows=rows)],
    )
