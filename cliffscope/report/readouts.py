"""The sections that show what the readouts can tell: the model's own answers, and the probe.

Both show held-out quality at the positions that claims rest on. The answer readout's section lists how answers begin,
the probe's where it can tell, by layer and position. A readout that could not be fitted makes a section that says why.
"""

import numpy as np
import pandas as pd

from cliffscope.figures import opening_bars, probe_quality, quality_grids, transfer_heat
from cliffscope.readouts.reports import CAN_TELL
from cliffscope.report.behaviour import shown_token
from cliffscope.report.content import (
    Cell,
    Part,
    Remark,
    Section,
    Table,
    columns,
    count_cell,
    interval_cell,
    number,
    number_cell,
    plot,
    text_cell,
)
from cliffscope.report.stored import JsonObject, StoredRun, as_float, as_int, as_list, as_object

CLAIMED = {
    "final": "At the final token, all transcripts",
    "late_thinking": "Late thinking (the plateau)",
    "within_harmful_final": "At the final token, harmful only",
    "shuffled_final": "Control: shuffled labels (mean and range of refits)",
}
"""The parts of the probe's report that the claim rests on."""
WORDS = {
    "overall": "N-grams of prompt and thinking, all transcripts",
    "within_harmful": "N-grams of prompt and thinking, harmful only",
}
"""The parts of the text baseline that the probe is held against."""
QUALITY = (
    *("position", "AUROC|number", "95% interval (or range)|number"),
    *("TPR at 1% FPR|number", "Brier|number", "ECE|number", "refused + complied|number"),
)
"""Columns of a table of it."""
_COUNTS = ("fit_refused", "fit_complied", "test_refused", "test_complied")


def answer_section(run: StoredRun) -> Section:
    """How answers begin, and what the openings tell on held-out transcripts."""
    report = as_object(run.answer.get("report"))
    openings = [as_object(item) for item in as_list(report.get("openings"))]
    parts: list[Part] = [Remark(text=str(text), tone="warning") for text in as_list(report.get("warnings"))]
    if report:
        parts += [_answer_quality(report), *(_openings(openings, report) if openings else [])]
    return Section(
        id="answer",
        title="Can the answer be read?",
        claim=run.finding("answer"),
        lead=(
            "Openings are how the model's own refusals and compliances of the fit split begin. Their log-odds at the "
            "final token are compared with the judged outcomes of held-out answers."
        ),
        reading=(
            "an AUROC near 1 means that the first tokens say whether the answer will refuse, and an opening with one "
            "bar tells the two apart; below 0.75 at the interval's lower end, nothing above may be believed."
        ),
        parts=parts,
        missing=() if report else ("This run fitted no answer readout.", *run.notes("readouts")),
    )


def probe_section(run: StoredRun) -> Section:
    """Can the probe tell? Held-out quality at the positions that the claim rests on, and by layer and position."""
    report, frame = as_object(run.probe.get("report")), run.tables["probe_layers"]
    parts: list[Part] = [Remark(text=str(text), tone="warning") for text in as_list(run.probe.get("warnings"))]
    if report:
        parts.append(_probe_table(run))
    if len(run.tables["transfer"]):
        parts.append(_transfer(run.tables["transfer"]))
    if len(frame):
        parts.append(_probe_heat(run, frame))
    if as_list(run.probe.get("cells")):
        parts.append(_probe_cells(run))
    positions, layer = run.probe.get("positions", "n/a"), run.probe.get("layer", "n/a")
    return Section(
        id="probe",
        title="Can the probe tell?",
        claim=run.finding("probe"),
        lead=(
            "A plateau is meaningful only where the probe separates refused from complied held-out transcripts at "
            f"that position. The probe reads layer {layer} and was fitted on positions “{positions}”. An AUROC of 0.5 "
            "is chance. Shuffled labels give about 0.5 on average, with a wide spread if there are few transcripts."
        ),
        reading=(
            "the probe says more than the words only where its AUROC lies above that of the n-grams, above all among "
            "harmful transcripts, and it reads refusal rather than topic where it carries over to other sources."
        ),
        parts=parts,
        missing=() if parts else ("This run fitted no probe.", *run.notes("readouts")),
    )


def quality_rows(run: StoredRun) -> list[list[Cell]]:
    """The probe's quality at the positions that claims rest on, in the columns of `QUALITY`."""
    report = as_object(run.probe.get("report"))
    return [_quality_row(shown, as_object(report.get(name))) for name, shown in CLAIMED.items()]


def _quality_row(shown: str, part: JsonObject) -> list[Cell]:
    value = {key: as_float(part.get(key)) for key in ("auroc", "auroc_low", "auroc_high", "brier", "ece")}
    n = [as_int(part.get("n_refused")), as_int(part.get("n_complied"))]
    return [
        text_cell(shown),
        number_cell(value["auroc"]),
        interval_cell(value["auroc_low"], value["auroc_high"], min(n)),
        number_cell(as_float(part.get("tpr_at_1_fpr"))),
        number_cell(value["brier"], 3),
        number_cell(value["ece"], 3),
        text_cell(f"{n[0]:,} + {n[1]:,}" if sum(n) else None),
    ]


def _answer_quality(report: JsonObject) -> Table:
    rows = []
    for name, shown in (("final", "All held-out transcripts"), ("within_harmful_final", "Harmful ones only")):
        part = as_object(report.get(name))
        value = {key: as_float(part.get(key)) for key in ("auroc", "auroc_low", "auroc_high", "brier", "ece")}
        n = [as_int(part.get("n_refused")), as_int(part.get("n_complied"))]
        can_tell = "yes" if value["auroc_low"] >= CAN_TELL else "no"
        rows.append(
            [
                text_cell(shown),
                number_cell(value["auroc"]),
                interval_cell(value["auroc_low"], value["auroc_high"], min(n)),
                text_cell(can_tell),
                number_cell(value["brier"], 3),
                number_cell(value["ece"], 3),
                text_cell(f"{n[0]:,} + {n[1]:,}" if sum(n) else None),
            ]
        )
    names = ("transcripts", "AUROC|number", "95% interval|number", "can tell", "Brier|number", "ECE|number")
    covered, mass = (number(100 * as_float(report.get(key)), 0) for key in ("covered", "mass"))
    caption = (
        f"Held-out quality at the final token; {covered}% of the answers begin with a known opening, which on average "
        f"have {mass}% of the probability"
    )
    return Table(caption=caption, columns=columns(*names, "refused + complied|number"), rows=rows)


def _openings(openings: list[JsonObject], report: JsonObject) -> list[Part]:
    final = as_object(report.get("final"))
    n = [max(1, as_int(final.get(name))) for name in ("n_refused", "n_complied")]
    counts = [[as_int(item.get(name)) for item in openings] for name in ("test_refused", "test_complied")]
    texts, kinds = ([str(item.get(key)) for item in openings] for key in ("opening", "class"))
    fig = opening_bars(
        texts,
        kinds,
        np.array(counts[0]) / n[0],
        np.array(counts[1]) / n[1],
        title=f"How held-out answers begin (n={n[0]:,} refused, {n[1]:,} complied)",
    )
    rows = [
        [
            *(text_cell(shown_token(item.get("opening")), 60), text_cell(item.get("class"))),
            *(count_cell(as_float(item.get(key))) for key in _COUNTS),
        ]
        for item in openings
    ]
    heads = columns("opening|code", "counts for", *(f"{key.replace('_', ', ')}|number" for key in _COUNTS))
    table = Table(caption="Openings, and the answers that begin with each", columns=heads, rows=rows)
    return [plot("openings", fig, "Blue: refused answers. Vermillion: complied answers."), table]


def _probe_table(run: StoredRun) -> Table:
    caption = "Held-out quality of the probe at the positions that the claim rests on, and of the words alone"
    rows = [*quality_rows(run), *_text_rows(run)]
    return Table(caption=caption, columns=columns(*QUALITY), rows=rows)


def _text_rows(run: StoredRun) -> list[list[Cell]]:
    """What n-grams of prompt and thinking tell, in the columns of `QUALITY`."""
    parts = [(shown, as_object(run.text_baseline.get(name))) for name, shown in WORDS.items()]
    return [_quality_row(shown, part) for shown, part in parts if part]


def _transfer(frame: pd.DataFrame) -> Part:
    names = sorted(set(frame["fit_source"].astype(str)))
    grids = [
        frame.pivot(index="fit_source", columns="test_source", values=value)
        .reindex(index=names, columns=names)
        .apply(pd.to_numeric, errors="coerce")
        .to_numpy(float)
        for value in ("auroc", "ci_low", "ci_high")
    ]
    n = int(np.nan_to_num(_floats(frame["n_refused"]) + _floats(frame["n_complied"])).max(initial=0))
    title = f"AUROC of probes fitted on one source of prompts and tested on another (up to n={n:,} a cell)"
    note = "Rows: source that the probe was fitted on. Columns: source that it was tested on. 0.5 is chance."
    return plot("transfer", transfer_heat(names, *grids, title=title), note)


def _probe_heat(run: StoredRun, frame: pd.DataFrame) -> Part:
    sizes = [_most(frame[name]) for name in ("n_refused", "n_complied")]
    fig = probe_quality(
        *quality_grids(frame),
        probe_layer=as_int(run.probe.get("layer")) if run.probe else None,
        title=f"Held-out AUROC by layer and position (up to {sizes[0]:,} refused, {sizes[1]:,} complied)",
    )
    note = (
        "Blue: refused transcripts score higher than complied ones. No colour: chance. Outlined: the layer used here."
    )
    return plot("probe", fig, note)


def _probe_cells(run: StoredRun) -> Table:
    rows = []
    for item in as_list(run.probe.get("cells")):
        cell = as_object(item)
        harmful = cell.get("harmful")
        prompts = "unknown" if harmful is None else "harmful" if harmful else "harmless"
        rows.append([text_cell(cell.get("class")), text_cell(prompts), count_cell(as_float(cell.get("n")))])
    heads = columns("probe class", "prompts", "transcripts|number")
    return Table(caption="Transcripts in each class of the probe", columns=heads, rows=rows)


def _most(column: pd.Series) -> int:
    return int(np.nan_to_num(_floats(column)).max(initial=0))


def _floats(column: pd.Series) -> np.ndarray:
    values: np.ndarray = pd.to_numeric(column, errors="coerce").to_numpy(float)
    return values
