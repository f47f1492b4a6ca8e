"""The sections that show what the readouts can tell: the model's own answers, and the probe.

Both show held-out quality at the positions that claims rest on. The answer readout's section lists how answers begin,
the probe's where it can tell, by layer and position. A readout that could not be fitted makes a section that says why.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from cliffscope.figures import opening_bars, probe_quality, quality_grids
from cliffscope.report.content import (
    Cell,
    Part,
    Remark,
    Section,
    Table,
    columns,
    count_cell,
    interval_cell,
    number_cell,
    percent,
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
ANSWER_CLAIMED = {"final": "All transcripts", "within_harmful_final": "Harmful only"}
"""The parts of the answer readout's report that the claims about heads rest on."""
QUALITY = (
    *("position", "AUROC|number", "95% interval (or range)|number"),
    *("TPR at 1% FPR|number", "Brier|number", "ECE|number", "refused + complied|number"),
)
"""Columns of a table of it."""


def answer_section(run: StoredRun) -> Section:
    """Can the model's own answer distribution tell? Held-out quality, and how refusals and compliances begin."""
    report = as_object(run.answer.get("report"))
    parts: list[Part] = [Remark(text=str(text), tone="warning") for text in as_list(report.get("warnings"))]
    openings = [as_object(row) for row in as_list(report.get("openings"))]
    if report:
        parts.append(
            Table(
                caption="Held-out quality of the answer readout",
                columns=columns(*QUALITY),
                rows=_quality_rows(report, ANSWER_CLAIMED),
            )
        )
    if openings:
        parts += [_opening_figure(report, openings), _opening_table(openings)]
    covered, mass = (percent(as_float(report.get(name))) for name in ("covered", "mass"))
    return Section(
        id="answer",
        title="Can the answer readout tell?",
        claim=run.finding("answer"),
        lead=(
            "The answer readout is the log-odds of refusing against complying openings in the model's own next-token "
            f"distribution at the final position. {covered} of the held-out answers begin with one of the openings, "
            f"which hold {mass} of the probability there."
        ),
        parts=parts,
        missing=() if parts else ("This run fitted no answer readout.", *run.notes("readouts")),
    )


def probe_section(run: StoredRun) -> Section:
    """Can the probe tell? Held-out quality at the positions that the claim rests on, and by layer and position."""
    report, frame = as_object(run.probe.get("report")), run.tables["probe_layers"]
    parts: list[Part] = [Remark(text=str(text), tone="warning") for text in as_list(run.probe.get("warnings"))]
    if report:
        parts.append(_probe_table(run))
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
        parts=parts,
        missing=() if parts else ("This run fitted no probe.", *run.notes("readouts")),
    )


def quality_rows(run: StoredRun) -> list[list[Cell]]:
    """The probe's quality at the positions that claims rest on, in the columns of `QUALITY`."""
    return _quality_rows(as_object(run.probe.get("report")), CLAIMED)


def _quality_rows(report: JsonObject, claimed: Mapping[str, str]) -> list[list[Cell]]:
    rows = []
    for name, shown in claimed.items():
        part = as_object(report.get(name))
        value = {key: as_float(part.get(key)) for key in ("auroc", "auroc_low", "auroc_high", "brier", "ece")}
        n = [as_int(part.get("n_refused")), as_int(part.get("n_complied"))]
        rows.append(
            [
                text_cell(shown),
                number_cell(value["auroc"]),
                interval_cell(value["auroc_low"], value["auroc_high"], min(n)),
                number_cell(as_float(part.get("tpr_at_1_fpr"))),
                number_cell(value["brier"], 3),
                number_cell(value["ece"], 3),
                text_cell(f"{n[0]:,} + {n[1]:,}" if sum(n) else None),
            ]
        )
    return rows


def _opening_figure(report: JsonObject, openings: list[JsonObject]) -> Part:
    final = as_object(report.get("final"))
    n = {name: as_int(final.get(f"n_{name}")) for name in ("refused", "complied")}
    shares = {
        name: np.array([as_float(row.get(f"test_{name}")) for row in openings]) / max(1, count)
        for name, count in n.items()
    }
    fig = opening_bars(
        [str(row.get("opening")) for row in openings],
        [str(row.get("class")) for row in openings],
        shares["refused"],
        shares["complied"],
        title=f"How held-out answers begin (n={n['refused']:,} refused, {n['complied']:,} complied)",
    )
    return plot("openings", fig, "An opening that separates refusals from compliances has one bar.")


def _opening_table(openings: list[JsonObject]) -> Table:
    names = ("fit_refused", "fit_complied", "test_refused", "test_complied")
    rows = [
        [
            *(text_cell(row.get("opening")), text_cell(row.get("class")), count_cell(as_float(row.get("tokens")))),
            *(count_cell(as_float(row.get(name))) for name in names),
        ]
        for row in openings
    ]
    heads = columns(
        *("opening|code", "class", "tokens|number", "refused (fit)|number", "complied (fit)|number"),
        *("refused (test)|number", "complied (test)|number"),
    )
    return Table(caption="Answers that begin with each opening", columns=heads, rows=rows)


def _most(column: pd.Series) -> int:
    return int(np.nan_to_num(pd.to_numeric(column, errors="coerce").to_numpy(float)).max(initial=0))


def _probe_table(run: StoredRun) -> Table:
    caption = "Held-out quality of the probe at the positions that the claim rests on"
    return Table(caption=caption, columns=columns(*QUALITY), rows=quality_rows(run))


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
