"""The sections that show the cliff and the heads.

Each function takes a stored run and returns one section: its verdict sentence, how it was measured, its figures and
tables. A table that is not there makes a section that says why. Only the intervals of group means are computed here;
every other number was stored by the stage that measured it.
"""

from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd

from cliffscope.figures import (
    bands_of,
    head_grid,
    head_ranking,
    mean_trace,
    plateau_final,
)
from cliffscope.report.behaviour import confirmed_table, shown_token
from cliffscope.report.content import (
    Cell,
    Part,
    Plot,
    Remark,
    Row,
    Section,
    Table,
    columns,
    count_cell,
    interval_cell,
    number_cell,
    p_cell,
    plot,
    text_cell,
)
from cliffscope.report.reading import reading_parts
from cliffscope.report.stored import StoredRun, as_float, as_int, as_list
from cliffscope.resampling import bootstrap_mean

COMPLIED = "harmful, complied"
"""The group whose cliff a study claims."""
RANKED = 15
"""Heads in the ranking figure."""
LISTED = 40
"""Heads listed in the table."""
WIDE_GRID = 48
"""A grid with more heads or layers than this takes the whole width."""


def cliff_section(run: StoredRun) -> Section:
    """The mean trace by group, each transcript's plateau against its final score, and where the score drops."""
    edited = run.tables["edited_aligned"]
    aligned, cliffs = run.tables["aligned"], run.tables["cliffs"]
    aligned = pd.concat([aligned, edited]) if len(aligned) and len(edited) else aligned
    parts: list[Part] = []
    if len(aligned):
        labels, spans, groups = bands_of(aligned)
        n = sum(int(np.max(band.n, initial=0)) for name, band in groups.items() if name not in set(edited["group"]))
        note = (
            "Prompt and thinking are divided into equal parts. Each closing token keeps its own position and is never "
            "averaged into the thinking. Band: 95% bootstrap interval of the mean over transcripts. Hover to see n at "
            "each position." + (_edited_note(run) if len(edited) else "")
        )
        parts.append(plot("cliff", mean_trace(labels, spans, groups, n=n), note))
    if len(cliffs):
        parts += _cliff_parts(cliffs, run.tables["edited_cliffs"], run.plateau)
    return Section(
        id="cliff",
        title="The cliff",
        claim=run.finding("cliff"),
        lead=(
            "If the model loses its intention to refuse between thinking and answer, the refusal score stays high "
            "during the thinking and falls at the closing tokens. All transcripts in this section are held out: none "
            "was used to fit the probe."
        ),
        reading=(
            "a curve that is high over the thinking and low at the last closing token is a cliff, provided that what "
            "was complied with ends below 0.5; otherwise the probe reads harm there."
        ),
        parts=parts,
        missing=() if parts else ("This run stored no traces.", *run.notes("traces", "readouts")),
    )


def heads_section(run: StoredRun) -> Section:
    """Every head's effect, the top heads with intervals, and the selected set against random sets."""
    frame, facts = run.tables["heads"], run.heads
    missing: tuple[str, ...] = ()
    parts: list[Part] = []
    if len(frame):
        wide = max(_size(run, frame, "n_heads", "head"), _size(run, frame, "n_layers", "layer")) > WIDE_GRID
        ranking = _ranking(frame)
        grid = _grid(run, frame, None if wide else ranking.height)
        parts += [grid, ranking] if wide else [Row(parts=(grid, ranking))]
    else:
        missing = ("This run ranked no heads.", *run.notes("heads", "readouts"))
    if len(frame):
        parts = [*confirmed_table(run), *parts, _head_table(frame)]
    parts += reading_parts(run)
    scope, method = facts.get("scope", "closing"), facts.get("method", "zero")
    return Section(
        id="heads",
        title="The heads",
        claim=run.finding("heads"),
        lead=(
            f"Effect of the edit “{method}” over the scope “{scope}”: refusal logit at the final token, edited minus "
            "unedited, averaged over transcripts. A positive effect means that the head suppresses refusal."
        ),
        reading=(
            "only heads that are confirmed on test transcripts are claimed, selective ones act on complied harmful "
            "requests more than elsewhere, and broad ones act on all alike."
        ),
        parts=parts,
        missing=missing,
    )


def group_mean(frame: pd.DataFrame, column: str) -> tuple[float, float, float, int]:
    """Mean of the valid rows, with the bounds of its bootstrap interval and n."""
    values = pd.to_numeric(frame.loc[frame["valid"].fillna(False).astype(bool), column], errors="coerce").dropna()
    if values.empty:
        return float("nan"), float("nan"), float("nan"), 0
    low, high = bootstrap_mean(values.to_numpy(float), seed=0)
    return float(values.mean()), float(low), float(high), len(values)


def _edited_note(run: StoredRun) -> str:
    heads = [str(head) for head in as_list(run.suppression.get("selected"))]
    more = f" and {len(heads) - 6} more" if len(heads) > 6 else ""
    random = any("random" in str(group) for group in run.tables["edited_aligned"]["group"])
    control = ", and with one size-matched random head set from the same layers," if random else ""
    return (
        f" Further curves show the same transcripts with the selected heads ({', '.join(heads[:6])}{more}){control} "
        "zeroed at every token."
    )


def cliff_rows(cliffs: pd.DataFrame, plateau: str) -> list[list[Cell]]:
    """By group: name, n, means of plateau, final score and cliff, and the cliff's interval."""
    rows = []
    for name, group in cliffs.groupby("group", sort=False):
        mean, low, high, n = group_mean(group, "cliff")
        means = [group_mean(group, column)[0] for column in (f"plateau_{plateau}", "final")]
        cells = [*(number_cell(value) for value in means), number_cell(mean), interval_cell(low, high, n)]
        rows.append([text_cell(name), count_cell(n), *cells])
    return rows


def _cliff_parts(cliffs: pd.DataFrame, edited: pd.DataFrame, plateau: str) -> list[Part]:
    valid = cliffs["valid"].fillna(False).astype(bool)
    shown = cliffs[valid]
    fig = plateau_final(
        _floats(shown[f"plateau_{plateau}"]),
        _floats(shown["final"]),
        groups=shown["group"].astype(str).to_list(),
        names=shown["id"].to_list(),
        title="Plateau against final score, one marker per transcript",
    )
    note = f"Plateau: {plateau} over the thinking. A transcript's cliff is its distance below the diagonal."
    scatter = plot("plateau", fig, note)
    parts: list[Part] = [_cliff_table(pd.concat([cliffs, edited]) if len(edited) else cliffs, plateau)]
    # Transcripts without a cliff have a steepest drop too, close to zero.
    complied = shown[shown["group"] == COMPLIED]
    fallen = complied if len(complied) else shown
    parts.append(Row(parts=(scatter, _drop_table(fallen))) if fallen["drop_token"].notna().any() else scatter)
    if not valid.all():
        why = cliffs.loc[~valid, "reason"].fillna("no reason stored").astype(str).value_counts()
        text = "; ".join(f"{count:,} {reason}" for reason, count in why.items())
        parts.append(Remark(text=f"Transcripts without a valid cliff: {text}."))
    return parts


def _cliff_table(cliffs: pd.DataFrame, plateau: str) -> Table:
    rows = cliff_rows(cliffs, plateau)
    heads = columns(
        "group", "n|number", f"plateau ({plateau})|number", "final|number", "cliff|number", "95% interval|number"
    )
    return Table(caption="Mean plateau, final score and cliff by group", columns=heads, rows=rows)


def _drop_table(cliffs: pd.DataFrame) -> Table:
    tokens = cliffs["drop_token"].dropna().astype(str)
    counts, groups = tokens.value_counts(), "; ".join(sorted(set(cliffs["group"].astype(str))))
    rows = [
        [text_cell(shown_token(token)), count_cell(count), number_cell(100 * count / len(tokens), 0)]
        for token, count in counts.head(8).items()
    ]
    return Table(
        caption=f"Token of the steepest drop, {groups} (n={len(tokens):,})",
        columns=columns("token|code", "transcripts|number", "share (%)|number"),
        rows=rows,
        left_out=max(0, len(counts) - 8),
    )


def _floats(column: pd.Series) -> np.ndarray:
    values: np.ndarray = pd.to_numeric(column, errors="coerce").to_numpy(float)
    return values


def _most(column: pd.Series) -> int:
    return int(np.nan_to_num(_floats(column)).max(initial=0))


def _size(run: StoredRun, frame: pd.DataFrame, fact: str, column: str) -> int:
    return max(as_int(run.section("model").get(fact)), int(_floats(frame[column]).max()) + 1)


def _grid(run: StoredRun, frame: pd.DataFrame, height: int | None) -> Plot:
    shape = (_size(run, frame, "n_layers", "layer"), _size(run, frame, "n_heads", "head"))
    place = (_floats(frame["layer"]).astype(int), _floats(frame["head"]).astype(int))
    cells = {}
    for name in ("effect", "ci_low", "ci_high", "effect_harmless"):
        cells[name] = np.full(shape, np.nan)
        cells[name][place] = _floats(frame[name])
    selected = np.zeros(shape, dtype=bool)
    selected[place] = frame["selected"].fillna(False).astype(bool)
    n = _most(frame["n"])
    fig = head_grid(
        cells["effect"],
        cells["ci_low"],
        cells["ci_high"],
        selected=selected,
        harmless=cells["effect_harmless"],
        title=f"Effect of each of {len(frame):,} heads (n={n:,} transcripts)",
    )
    if height is not None:
        fig.update_layout(height=height)
    note = "Vermillion: suppresses refusal. Blue: supports refusal. No colour: no effect. Outlined: selected."
    return plot("grid", fig, note)


def _ranking(frame: pd.DataFrame) -> Plot:
    first = _ranked(frame).head(RANKED)
    fig = head_ranking(
        [f"L{int(a)}H{int(b)}" for a, b in zip(first["layer"], first["head"], strict=True)],
        _floats(first["effect"]),
        _floats(first["ci_low"]),
        _floats(first["ci_high"]),
        harmless=_floats(first["effect_harmless"]),
        selected=first["selected"].fillna(False).to_numpy(bool),
        title=f"Top {len(first)} heads with 95% intervals (n={_most(frame['n']):,})",
    )
    note = "Filled: harmful transcripts, with bootstrap intervals. Hollow: the same edit on harmless transcripts."
    return plot("ranking", fig, note)


def _ranked(frame: pd.DataFrame) -> pd.DataFrame:
    by = "rank" if frame["rank"].notna().any() else "effect"
    return frame.sort_values(by, ascending=by == "rank", kind="stable")


def _head_table(frame: pd.DataFrame) -> Table:
    rows = []
    for row in _ranked(frame).head(LISTED).to_dict("records"):
        low, high, n = (_float(row[key]) for key in ("ci_low", "ci_high", "n"))
        rows.append(
            [
                text_cell(f"L{int(row['layer'])}H{int(row['head'])}"),
                count_cell(_float(row["kv_group"])),
                number_cell(_float(row["effect"]), 3),
                interval_cell(low, high, int(np.nan_to_num(n)), 3),
                number_cell(_float(row["effect_harmless"]), 3),
                number_cell(_float(row["effect_score"]), 3),
                _q_cell(row),
                text_cell("yes" if row["selected"] is True or row["selected"] == 1 else "no"),
            ]
        )
    names = (
        "head|code",
        "key-value group|number",
        "effect (logit)|number",
        "95% interval|number",
        "effect on harmless|number",
    )
    return Table(
        caption=f"Top {len(rows)} heads by effect",
        columns=columns(*names, "effect (score)|number", "q (BH)|number", "selected"),
        rows=rows,
        left_out=len(frame) - len(rows),
    )


def _q_cell(row: Mapping[Hashable, object]) -> Cell:
    """The q of a head, or why it was not tested."""
    q, why = _float(row["q"]), row["untested"]
    return p_cell(q) if np.isfinite(q) or not isinstance(why, str) or not why else text_cell(f"n/a: {why}", 60)


def _float(value: object) -> float:
    return as_float(value) if isinstance(value, int | float) else float("nan")
