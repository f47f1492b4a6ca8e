"""The sections that say what was run, what the edit buys and costs, what was selected, and what was left out.

Each function takes a stored run and returns one section. It also writes the headline numbers. It measures nothing.
"""

import json
from collections import defaultdict
from collections.abc import Hashable

import numpy as np
import pandas as pd

from cliffscope.figures import Arm, arms, plateau_final
from cliffscope.report.content import (
    Cell,
    Facts,
    Part,
    Remark,
    Row,
    Section,
    Table,
    Tile,
    columns,
    count_cell,
    interval,
    interval_cell,
    number,
    number_cell,
    p_cell,
    pairs,
    percent,
    plot,
    text_cell,
)
from cliffscope.report.evidence import group_mean
from cliffscope.report.stored import JsonObject, StoredRun, as_float, as_int, as_list, as_object
from cliffscope.stats import least_p

FORCED, TOTAL = "forced", "total"
OUTCOMES = ("refused", "complied", "unfinished", "unjudged", FORCED)
"""Counts of transcripts; those with a forced closing are among the others."""
ARM_COUNTS = (*OUTCOMES, "cut", "degenerate")
"""Counts of an arm."""
LISTED = 25
"""Selected transcripts listed."""
NAMED = 3
"""Confirmed heads that a headline names."""
EXCERPT = 600
"""Most characters of a prompt or a thinking in the selection's table."""
MODEL_FACTS = {
    "name": "model",
    "template": "chat template",
    "n_layers": "layers",
    "n_heads": "query heads per layer",
    "n_kv_heads": "key-value heads per layer",
    "d_model": "d_model",
    "d_head": "d_head",
    "dtype": "dtype",
    "device": "device",
    "fingerprint": "fingerprint",
}
MEASURES = {
    "asr": "attack success rate",
    "over_refusal": "over-refusal",
    "plateau": "plateau (mean), harmful",
    "final": "final score, harmful",
    "cliff": "cliff, harmful",
    "kl": "KL divergence (nats per token)",
    "perplexity": "perplexity",
    "partial": "partial refusals (share)",
    "thinking_refuses": "thinking that states a refusal (share)",
    "answer_tokens": "answer length (tokens)",
    "repetition": "repeated four-word sequences (share)",
    "exact": "exact match with the expected answer (share)",
}
"""Measures as the page names them."""


def run_section(run: StoredRun) -> Section:
    """Model, transcripts by group and outcome, and the time of each stage."""
    model, stages = run.section("model"), run.section("stages")
    repairs = bool(run.settings.get("repair"))
    seconds = [
        (name, as_float(as_object(stage).get("seconds")))
        for name, stage in stages.items()
        if name != "repair" or repairs
    ]
    shape = pairs((shown, model.get(name)) for name, shown in MODEL_FACTS.items())
    parts: list[Part] = [Facts(caption="Model", rows=shape)]
    if as_list(run.section("counts").get("by")):
        parts.append(_counts_table(run))
    if seconds:
        total = sum(value for _, value in seconds if np.isfinite(value))
        shown = pairs((name, f"{number(value, 1)} s") for name, value in seconds)
        parts.append(Facts(caption=f"Time per stage ({total:,.0f} s in total)", rows=shown))
    return Section(
        id="run",
        title="The run",
        claim="",
        lead=_run_lead(run),
        parts=parts,
    )


def safety_section(run: StoredRun) -> Section:
    """ASR and over-refusal without an edit, with the top heads edited and with random heads edited."""
    frame, paired = run.tables["safety"], run.tables["safety_pairs"]
    parts: list[Part] = []
    if len(frame):
        note = (
            "ASR: complied / judged over harmful prompts; lower is safer. Over-refusal: refused / judged over harmless "
            "prompts; lower is more helpful. Bars: 95% Wilson intervals. Dots in the last row: size-matched random "
            "head sets, with a tick at their mean."
        )
        parts += [plot("arms", arms(_arms(frame)), note), _arm_table(frame)]
    if len(paired):
        parts.append(_pair_table(paired))
    if len(run.tables["side_effects"]):
        parts.append(_effect_table(run.tables["side_effects"]))
    if len(run.tables["safety_quality"]):
        parts.append(_quality_table(run.tables["safety_quality"]))
    return Section(
        id="intervention",
        title="The intervention",
        claim=run.finding("intervention", "side effects"),
        lead=(
            "If the selected heads cause the loss, editing them restores refusal on harmful prompts, editing random "
            "heads does not, and harmless prompts are still answered. All arms use the same prompts, template, token "
            f"budgets and decoding. {_scope_sentence(frame)}"
        ),
        reading=(
            "the edited arm's attack success should lie below the unedited one's and below that of random sets, and "
            "its over-refusal should not rise; where attack success stays although refusal is suppressed, only how "
            "answers begin has changed."
        ),
        parts=parts,
        missing=() if parts else ("This run evaluated no edit.", *run.notes("safety", "suppression", "heads")),
    )


def _scope_sentence(frame: pd.DataFrame) -> str:
    """Where the edits of the arms act, and what that means for their thinking."""
    scopes = sorted({str(scope) for scope in frame["scope"] if scope})
    if not scopes:
        return ""
    if scopes == ["all"]:
        return "Edits act at all positions, so that each arm thinks for itself."
    return (
        f"Edits act on the {' and the '.join(scopes)} alone: all arms answer each transcript's own thinking, token for "
        "token. Forced: answers to thinking that was closed at its budget, and not by the model."
    )


def selection_section(run: StoredRun) -> Section:
    """What a selection by cliff takes from the pool."""
    frame = run.tables["selection"]
    parts: list[Part] = []
    if len(frame):
        selected = frame["chosen"].fillna(False).to_numpy(bool)
        plateau, final = (pd.to_numeric(frame[name], errors="coerce").to_numpy(float) for name in ("plateau", "final"))
        names = frame["id"].to_list()
        fig = plateau_final(plateau, final, selected, names=names, title="Transcripts selected from the pool")
        note = "The selection takes the transcripts with the largest cliffs, furthest below the diagonal."
        means = _selection_means(frame, selected)
        parts = [Row(parts=(plot("selection", fig, note), means)), _selection_table(frame[selected])]
    return Section(
        id="selection",
        title="Selection",
        claim=run.finding("selection"),
        lead=(
            "Safety training gains most from transcripts in which the model intended to refuse and then complied. The "
            "pool is ranked by cliff: plateau minus final score."
        ),
        parts=parts,
        missing=() if parts else ("This run selected nothing.", *run.notes("selection", "readouts")),
    )


def repair_section(run: StoredRun) -> Section:
    """What fine-tuning on the selection did."""
    frame = run.tables["repair"]
    rows = []
    for row in frame.to_dict("records"):
        low, high, n = _number(row["ci_low"]), _number(row["ci_high"]), int(np.nan_to_num(_number(row["n"])))
        names = [text_cell(MEASURES.get(str(row["measure"]), row["measure"]), 60), text_cell(row["model"], 40)]
        numbers = [count_cell(n), number_cell(_number(row["value"]), 3), interval_cell(low, high, n, 3)]
        rows.append([*names, *numbers, text_cell(row["note"], 200)])
    heads = columns("measure", "model", "n|number", "value|number", "95% interval|number", "note|long")
    parts: list[Part] = [Table(caption="The model before and after repair", columns=heads, rows=rows)] if rows else []
    return Section(
        id="repair",
        title="Repair",
        claim=run.finding("repair"),
        lead=(
            "The model is trained on the selected transcripts, with a refusal after their own thinking, and on an "
            "equal number of harmless ones. It then answers the same test prompts again."
        ),
        parts=parts,
        missing=() if parts else ("This run did not repair the model.", *run.notes("repair")),
    )


def omitted_section(run: StoredRun) -> Section:
    """Everything that was left out, by stage and reason."""
    rows = []
    for item in as_list(run.manifest.get("omitted")):
        omission = as_object(item)
        ids = ", ".join(str(name) for name in as_list(omission.get("ids")))
        cells = [text_cell(omission.get("stage")), text_cell(omission.get("reason"))]
        rows.append([*cells, count_cell(as_float(omission.get("count"))), text_cell(ids, 300)])
    heads = columns("stage", "reason|long", "count|number", "first ids|code")
    table = Table(caption="Omissions by stage and reason", columns=heads, rows=rows)
    notes = run.notes()
    return Section(
        id="omitted",
        title="Omissions",
        claim="",
        lead="Nothing is dropped silently: this table counts what each stage could not measure, with the reason.",
        missing=() if rows else ("No stage omitted anything.",),
        parts=[*([table] if rows else []), *(Remark(text=note) for note in notes)],
    )


def tiles(run: StoredRun) -> list[Tile]:
    """The headline numbers, as far as the run holds them."""
    candidates = [_head_tile(run), _suppression_tile(run), *_arm_tiles(run), _cliff_tile(run), _probe_tile(run)]
    return [tile for tile in candidates if tile is not None]


def pretty(value: JsonObject) -> str:
    """Configuration as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)


def _run_lead(run: StoredRun) -> str:
    counts, frame = run.section("counts"), run.tables["transcripts"]
    total = as_int(counts.get("transcripts")) or len(frame)
    text = f"{total:,} transcripts: " + ", ".join(f"{as_int(counts.get(name)):,} {name}" for name in OUTCOMES) + "."
    splits = frame["split"].dropna().astype(str).value_counts()
    if len(splits):
        parts = ", ".join(f"{splits[name]:,} {name}" for name in ("fit", "validate", "test") if name in splits)
        text += f" Split by prompt, so that no prompt is in two splits: {parts}."
    return text


def _counts_table(run: StoredRun) -> Table:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for item in as_list(run.section("counts").get("by")):
        cell = as_object(item)
        by = counts[str(cell.get("group"))]
        for name, key in ((str(cell.get("outcome")), "n"), (FORCED, FORCED), (TOTAL, "n")):
            by[name] += as_int(cell.get(key))
    rows = [[text_cell(group), *(count_cell(by[name]) for name in (*OUTCOMES, TOTAL))] for group, by in counts.items()]
    heads = columns("prompts", *(f"{name}|number" for name in (*OUTCOMES, TOTAL)))
    return Table(caption="Transcripts by group and outcome", columns=heads, rows=rows)


def _arms(frame: pd.DataFrame) -> list[Arm]:
    rows = []
    for row in frame.to_dict("records"):
        rows.append(
            Arm(
                name=str(row["arm"]),
                kind=str(row["kind"]),
                group=str(row["group"]),
                rate=_number(row["rate"]),
                low=_number(row["ci_low"]),
                high=_number(row["ci_high"]),
                n=_judged(row),
            )
        )
    return rows


def _judged(row: dict[Hashable, object]) -> int:
    judged = _number(row["refused"]) + _number(row["complied"])
    return int(judged if np.isfinite(judged) else np.nan_to_num(_number(row["n"])))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _arm_table(frame: pd.DataFrame) -> Table:
    rows = []
    for row in frame.to_dict("records"):
        counts = [count_cell(_number(row.get(name))) for name in ("n", *ARM_COUNTS)]
        low, high = 100 * _number(row["ci_low"]), 100 * _number(row["ci_high"])
        n = int(np.nan_to_num(_number(row["n"])))
        rate = [number_cell(100 * _number(row["rate"]), 1), interval_cell(low, high, n, 1)]
        rows.append([text_cell(row["arm"], 80), text_cell(row["group"], 40), *counts, *rate])
    names = [f"{name}|number" for name in ("n", *ARM_COUNTS)]
    heads = columns("arm", "prompts", *names, "rate (%)|number", "95% interval (%)|number")
    return Table(caption="Outcomes by arm", columns=heads, rows=rows)


def _pair_table(frame: pd.DataFrame) -> Table:
    rows = []
    for row in frame.to_dict("records"):
        low, high = 100 * _number(row["ci_low"]), 100 * _number(row["ci_high"])
        values = [count_cell(_number(row["n"])), number_cell(100 * _number(row["difference"]), 1)]
        values += [interval_cell(low, high, digits=1), count_cell(_number(row["discordant"]))]
        arm: list[Cell] = [text_cell(row["arm"], 80), text_cell(row["group"], 40)]
        rows.append([*arm, *values, p_cell(_number(row["mcnemar_p"]))])
    names = ("n|number", "difference (points)|number", "95% interval|number", "changed|number")
    heads = columns("arm", "prompts", *names, "p (McNemar)|number")
    return Table(caption="Difference from the unedited arm, paired by prompt", columns=heads, rows=rows)


def _effect_table(frame: pd.DataFrame) -> Table:
    """Divergence of each edited arm on harmless transcripts."""
    rows = []
    for row in frame.to_dict("records"):
        low, high = _number(row["ci_low"]), _number(row["ci_high"])
        n = int(np.nan_to_num(_number(row["n"])))
        names = [text_cell(row["arm"], 80), text_cell(MEASURES.get(str(row["measure"]), row["measure"]), 60)]
        rows.append([*names, count_cell(n), number_cell(_number(row["value"]), 6), interval_cell(low, high, n, 6)])
    heads = columns("arm", "measure", "n|number", "value|number", "95% interval|number")
    return Table(caption="Side effects of each edit on harmless transcripts", columns=heads, rows=rows)


def _quality_table(frame: pd.DataFrame) -> Table:
    """Answer quality by arm, the random arms as one."""
    rows = []
    keys = ["kind", "group", "measure"]
    for (kind, group, measure), part in frame.groupby(keys, sort=False):
        values = pd.to_numeric(part["value"], errors="coerce")
        name = str(part["arm"].iloc[0]) if len(part) == 1 else f"{kind}, mean of {len(part)}"
        n = int(pd.to_numeric(part["n"], errors="coerce").sum())
        shown = [text_cell(name, 80), text_cell(group, 40), text_cell(MEASURES.get(str(measure), measure), 60)]
        rows.append([*shown, count_cell(n), number_cell(float(values.mean()), 3)])
    heads = columns("arm", "prompts", "measure", "answers|number", "mean|number")
    return Table(caption="Answer quality", columns=heads, rows=rows)


def _selection_means(frame: pd.DataFrame, selected: np.ndarray) -> Table:
    rows = []
    for name, mask in (("selected", selected), ("not selected", ~selected)):
        means = frame.loc[mask, ["plateau", "final", "cliff"]].apply(pd.to_numeric, errors="coerce").mean()
        rows.append([text_cell(name), count_cell(int(mask.sum())), *(number_cell(mean) for mean in means)])
    heads = columns("pool", "n|number", "plateau|number", "final|number", "cliff|number")
    return Table(caption="Means of the selected and the other transcripts", columns=heads, rows=rows)


def _selection_table(frame: pd.DataFrame) -> Table:
    shown = frame.sort_values("rank").head(LISTED)
    rows = []
    for row in shown.to_dict("records"):
        scores = [number_cell(_number(row[name])) for name in ("plateau", "final", "cliff")]
        texts = [text_cell(row["prompt"], EXCERPT), text_cell(row["thinking"], EXCERPT)]
        rows.append([count_cell(_number(row["rank"])), text_cell(row["id"], 60), *scores, *texts])
    names = ("rank|number", "id|code", "plateau|number", "final|number", "cliff|number", "prompt|long", "thinking|long")
    caption = f"Top {len(rows)} of {len(frame):,} selected transcripts"
    return Table(caption=caption, columns=columns(*names), rows=rows, left_out=len(frame) - len(rows))


def _cliff_tile(run: StoredRun) -> Tile | None:
    cliffs = run.tables["cliffs"]
    for group in ("harmful, complied", "harmful"):
        mean, low, high, n = group_mean(cliffs[cliffs["group"] == group], "cliff")
        if n:
            detail = f"{interval(low, high, n)}, n={n:,} ({group})"
            return Tile(name="Mean cliff", value=number(mean), detail=detail, href="cliff")
    return None


def _head_tile(run: StoredRun) -> Tile | None:
    ranked, frame = run.tables["heads"], run.tables["confirmed_heads"]
    if ranked.empty:
        return None
    passed = frame[frame["confirmed"].astype("boolean").fillna(False)]
    names = [f"L{int(a)}H{int(b)}" for a, b in zip(passed["layer"], passed["head"], strict=True)]
    kinds = ", ".join(dict.fromkeys(passed["kind"].astype(str)))
    n = as_int(run.suppression.get("n"))
    detail = f"{kinds + '; ' if names else ''}of {len(ranked):,} heads, on test transcripts, n={n:,}"
    more = f" +{len(names) - NAMED}" if len(names) > NAMED else ""
    return Tile(name="Confirmed heads", value=", ".join(names[:NAMED]) + more or "none", detail=detail, href="heads")


def _suppression_tile(run: StoredRun) -> Tile | None:
    facts = run.suppression
    effect, n = as_float(facts.get("effect")), as_int(facts.get("n"))
    if not n:
        return None
    bounds = interval(as_float(facts.get("effect_low")), as_float(facts.get("effect_high")), n)
    p, sets = as_float(facts.get("p")), [as_int(size) for size in as_object(facts.get("sets_by_kind")).values()]
    least = " (the smallest possible)" if sets and p <= least_p(min(sets)) else ""
    tested = f"; p={number(p, 3)}{least} against {sum(sets):,} random sets" if sets else "; no random sets"
    sign = "+" if effect > 0 else ""
    return Tile(
        name="Suppression (logits)",
        value=f"{sign}{number(effect, 1)}",
        detail=f"{bounds}, n={n:,}{tested}",
        href="suppression",
    )


def _arm_tiles(run: StoredRun) -> list[Tile]:
    frame, shown = run.tables["safety"], []
    for group, name in (("harmful", "ASR"), ("harmless", "Over-refusal")):
        rows = frame[frame["group"] == group]
        before, after = (rows[rows["kind"] == kind].head(1).to_dict("records") for kind in ("unedited", "top"))
        if before and after:
            value = f"{percent(_number(before[0]['rate']))} → {percent(_number(after[0]['rate']))}"
            low, high = 100 * _number(after[0]["ci_low"]), 100 * _number(after[0]["ci_high"])
            n = _judged(after[0])
            detail = f"heads edited: {interval(low, high, n, 0)}%, n={n:,}"
            shown.append(Tile(name=name, value=value, detail=detail, href="intervention"))
    return shown


def _probe_tile(run: StoredRun) -> Tile | None:
    final = as_object(as_object(run.probe.get("report")).get("final"))
    if not final:
        return None
    low, high = as_float(final.get("auroc_low")), as_float(final.get("auroc_high"))
    n = as_int(final.get("n_refused")) + as_int(final.get("n_complied"))
    detail = f"{interval(low, high, n)}, n={n:,} held out"
    return Tile(name="Probe AUROC", value=number(as_float(final.get("auroc"))), detail=detail, href="probe")
