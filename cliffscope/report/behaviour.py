"""The sections that show what the model does: with heads edited, head by head, and had it stopped thinking earlier.

Each function takes a stored run and returns one section. It measures nothing.
"""

import numpy as np
import pandas as pd

from cliffscope.figures import closing_curves, paired_points, random_sets
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
    p_cell,
    plot,
    text_cell,
)
from cliffscope.report.stored import StoredRun, as_float, as_int, as_list, as_object
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import least_p

SETTLED = 24
"""Transcripts listed with the token at which their answer is settled."""
CURVES = {
    "unedited": "the answer, unedited",
    "edited": "the answer, selected heads zeroed",
    "probe": "the probe's score at the token",
}
"""Names of the curves on the page."""
_KINDS = {"same layers": "the same layers"}
SAYS = {True: "yes", False: "no", None: "could not be tested"}


def suppression_section(run: StoredRun) -> Section:
    """Each transcript unedited and edited, means by group, and the set against random sets."""
    frame = run.tables["suppression"]
    parts: list[Part] = []
    if len(frame):
        parts.append(_pairs(frame))
    if as_list(run.suppression.get("random_sets")):
        parts.append(_random(run))
    if len(frame):
        parts.append(_means(frame))
    return Section(
        id="suppression",
        title="What the heads do to the answer",
        claim=run.finding("suppression"),
        lead=(
            "The selected heads are zeroed at the closing, on held-out transcripts whose thinking stays as it is, and "
            "the model's own next-token distribution is read: the log-odds of refusing against complying openings."
        ),
        reading=(
            "a marker far above the diagonal is an answer that turns towards refusal when the heads are zeroed, and "
            "random sets of heads should stay on the diagonal."
        ),
        parts=parts,
        missing=() if parts else ("This run measured no suppression.", *run.notes("suppression", "heads", "readouts")),
    )


def closings_section(run: StoredRun) -> Section:
    """The answer behind early closings, unedited and edited, with the probe's trace, and where answers settle."""
    curves, settled = run.tables["early_curves"], run.tables["settled"]
    parts: list[Part] = []
    if len(curves):
        shown = {
            CURVES.get(str(name), str(name)): {
                key: pd.to_numeric(part[key], errors="coerce").to_numpy(float)
                for key in ("fraction", "mean", "ci_low", "ci_high", "n")
            }
            for name, part in curves.groupby("curve", sort=False)
        }
        fig = closing_curves(shown, title="What would be answered, had the thinking ended earlier")
        note = "Band: 95% bootstrap interval of the mean over harmful held-out transcripts that were complied with."
        parts.append(plot("closings", fig, note))
    if len(settled):
        parts.append(_settled_table(settled))
    parts += [Remark(text=note) for note in run.notes("early closings")]
    return Section(
        id="closings",
        title="Had it stopped thinking earlier",
        claim="",
        lead=(
            "The closing is put after each thinking token, and the readout is read behind it: what the model would "
            "answer, had it stopped there. The probe's curve is its score at the token itself."
        ),
        reading=(
            "where the unedited curve falls, the model gives up refusing; where the edited one stays high, the heads "
            "are what stands between thinking and refusal; where only the probe stays high, it sees what the model "
            "does not act on."
        ),
        parts=parts,
        missing=() if parts else ("This run closed no thinking early.",),
    )


def witnesses_section(run: StoredRun) -> Section:
    """What each witness says, side by side."""
    rows = []
    for item in as_list(run.witnesses.get("witnesses")):
        witness = as_object(item)
        says = witness.get("says")
        answer = SAYS[says if isinstance(says, bool) else None]
        rows.append([text_cell(witness.get("name"), 40), text_cell(answer), text_cell(witness.get("saw"), 400)])
    heads = columns("witness", "do heads suppress refusal?", "what it saw|long")
    parts: list[Part] = [Table(caption="The witnesses", columns=heads, rows=rows)] if rows else []
    agree = "No two witnesses contradict each other." if rows and not run.finding("witnesses") else ""
    return Section(
        id="witnesses",
        title="Do the witnesses agree?",
        claim=run.finding("witnesses") or agree,
        lead=(
            "The answer's log-odds with heads edited, the judged answers, single heads on test transcripts, and the "
            "probe's score each say whether heads suppress refusal."
        ),
        reading=(
            "the first three read what the model does, the last what one direction in its residual stream holds, so "
            "that a contradiction says which of the two changed."
        ),
        parts=parts,
        missing=() if rows else ("This run heard no witness.",),
    )


def confirmed_table(run: StoredRun) -> list[Part]:
    """Candidate heads on test transcripts, one by one."""
    frame = run.tables["confirmed_heads"]
    if frame.empty:
        return []
    rows = []
    for row in frame.to_dict("records"):
        n = int(np.nan_to_num(_number(row["n"])))
        effect = [
            number_cell(_number(row["effect"])),
            interval_cell(_number(row["ci_low"]), _number(row["ci_high"]), n),
        ]
        rows.append(
            [
                text_cell(f"L{int(row['layer'])}H{int(row['head'])}"),
                text_cell("yes" if row["confirmed"] is True or row["confirmed"] == 1 else "no"),
                text_cell(row["kind"]),
                *effect,
                number_cell(_number(row["added"])),
                count_cell(_number(row["decisive"])),
                p_cell(_number(row["p"])),
                count_cell(n),
            ]
        )
    heads = columns(
        *("head|code", "confirmed", "kind", "effect alone (logit)|number", "95% interval|number"),
        *("added (logit)|number", "answers it could turn|number", "p (adjusted)|number", "test n|number"),
    )
    confirmed = sum(row[1].text == "yes" for row in rows)
    caption = (
        f"{confirmed} of {len(rows)} significant heads confirmed on test transcripts, each on top of those before it"
    )
    return [Table(caption=caption, columns=heads, rows=rows)]


def shown_token(token: object) -> str:
    """A token with its spaces and line breaks as symbols."""
    return str(token).replace(" ", "␣").replace("\n", "⏎")


def _pairs(frame: pd.DataFrame) -> Part:
    complied = frame[frame["random_mean"].notna()]
    shown = complied if len(complied) else frame
    values = [pd.to_numeric(shown[name], errors="coerce").to_numpy(float) for name in _PROBABILITIES]
    groups = "; ".join(sorted(set(shown["group"].astype(str))))
    fig = paired_points(*values, names=shown["id"].astype(str).to_list(), title=f"Refusal with heads zeroed, {groups}")
    note = "Each transcript is a pair of markers: with the selected heads zeroed, and on average over the random sets."
    return plot("suppression", fig, note)


_PROBABILITIES = ("unedited_p", "edited_p", "random_mean_p")


def _means(frame: pd.DataFrame) -> Table:
    rows = []
    for name, part in frame.groupby("group", sort=False):
        values = pd.to_numeric(part["suppression"], errors="coerce").to_numpy(float)
        low, high = bootstrap_mean(values, seed=0)
        means = [float(pd.to_numeric(part[key], errors="coerce").mean()) for key in ("unedited", "edited")]
        random = float(pd.to_numeric(part["random_mean"], errors="coerce").mean())
        cells: list[Cell] = [text_cell(name), count_cell(len(part)), *(number_cell(mean) for mean in means)]
        cells += [number_cell(float(values.mean())), interval_cell(float(low), float(high), len(part))]
        rows.append([*cells, number_cell(random)])
    heads = columns(
        *("group", "n|number", "unedited (logit)|number", "edited (logit)|number", "suppression|number"),
        *("95% interval|number", "random sets (logit)|number"),
    )
    return Table(caption="Mean readout by group of held-out transcripts", columns=heads, rows=rows)


def _random(run: StoredRun) -> Part:
    facts = run.suppression
    control = np.array([as_float(value) for value in as_list(facts.get("random_sets"))])
    low, high = as_float(facts.get("effect_low")), as_float(facts.get("effect_high"))
    count, n = len(as_list(facts.get("selected"))), as_int(facts.get("n"))
    title = f"Selected heads against size-matched random head sets (n={n:,} transcripts)"
    fig = random_sets(as_float(facts.get("effect")), low, high, control, title=title)
    kinds = {kind: as_int(sets) for kind, sets in as_object(facts.get("sets_by_kind")).items()}
    p = as_object(facts.get("p_by_kind"))
    tests = "; ".join(
        f"{sets} sets of {_KINDS.get(kind, kind)}: p = {number(as_float(p.get(kind)), 3)}, at least "
        f"{number(least_p(sets), 3)}"
        for kind, sets in kinds.items()
    )
    note = (
        f"{count} selected heads zeroed together, against {len(control)} size-matched random head sets. p is the share "
        f"of the sets of a kind, the selected one counted in, that have at least its effect ({tests})."
    )
    return plot("random", fig, note)


def _settled_table(frame: pd.DataFrame) -> Table:
    rows = []
    for row in frame.head(SETTLED).to_dict("records"):
        place = f"{int(np.nan_to_num(_number(row['fraction'])) * 100)}%"
        numbers = [number_cell(_number(row["first"])), number_cell(_number(row["final"]))]
        rows.append(
            [
                text_cell(row["id"], 60),
                text_cell(row["group"]),
                text_cell("refusing" if row["refuses"] is True or row["refuses"] == 1 else "complying"),
                count_cell(_number(row["position"])),
                text_cell(place),
                text_cell(shown_token(row["token"]), 40),
                *numbers,
                count_cell(_number(row["n"])),
            ]
        )
    names = ("id|code", "group", "ends on the side of", "settled at token|number", "of the thinking|number")
    heads = columns(*names, "token|code", "first (logit)|number", "final (logit)|number", "thinking tokens|number")
    caption = f"The token from which on the unedited answer stays on one side (n={len(frame):,})"
    return Table(caption=caption, columns=heads, rows=rows, left_out=max(0, len(frame) - SETTLED))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else float("nan")
