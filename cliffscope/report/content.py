"""What is a number, a table or a figure on the page?

Numbers are written with their interval and n, and "n/a" where there is none. Tables and figures carry their caption.
Everything here is plain text: the template escapes it. It knows no stage of a study.
"""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd
import plotly.graph_objects as go

from cliffscope.figures import embed, printable

CELL = 1200
"""Most characters of a text in a table cell."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table."""

    text: str
    """What is shown, printable."""
    sort: str
    """What the column sorts by."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column's head."""

    name: str
    """Head, with the unit."""
    kind: str = "text"
    """`text`, `number` (right-aligned, tabular figures), `long` (wide prose) or `code`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that can be sorted and filtered."""

    caption: str
    """What the rows are, with n."""
    columns: Sequence[Column]
    """Heads from left to right."""
    rows: Sequence[Sequence[Cell]]
    """Cells by row."""
    left_out: int = 0
    """Rows that the run directory holds and the page does not show."""
    kind: str = "table"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure, its caption and its data."""

    id: str
    """The element's id."""
    title: str
    """What is shown, with n."""
    note: str
    """How to read it."""
    height: int
    """Pixels."""
    spec: str
    """Plotly JSON that may stand inside a script element."""
    kind: str = "plot"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class Circuits:
    """A component of CircuitsVis."""

    id: str
    """The element's id."""
    title: str
    """What is shown, with n."""
    note: str
    """How to read it."""
    component: str
    """Name of the component."""
    props: str
    """JSON that may stand inside a script element."""
    kind: str = "circuits"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Two parts side by side where the page is wide enough."""

    parts: Sequence["Plot | Table"]
    """From left to right."""
    kind: str = "row"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values."""

    caption: str
    """What they describe."""
    rows: Sequence[tuple[str, str]]
    """Name and value, printable."""
    kind: str = "facts"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A sentence or two between the figures."""

    text: str
    """Plain text."""
    tone: str = "plain"
    """`plain`, or `warning` for what limits the claim."""
    kind: str = "remark"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One transcript, its tokens coloured by score."""

    id: str
    """The element's id."""
    name: str
    """The transcript's id, printable."""
    facts: str
    """Group, outcome, plateau, final, cliff."""
    runs: Sequence["TokenRun"]
    """Spans in order."""
    layers: str
    """JSON for the layer control: by layer, the scores in percent as base64 bytes (255: none); or empty."""
    n_layers: int
    """Layers that the control offers; 0 without layer traces."""
    probe_layer: int
    """Where the control starts."""
    heat: Plot | None
    """Layer by token."""
    kind: str = "tokens"
    """Which macro draws it."""


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """The tokens of one span."""

    span: str
    """Name of the span."""
    tokens: Sequence[tuple[str, int, str]]
    """Text, score in percent (-1: none) and tooltip of each token."""
    skipped: int
    """Tokens left out before the last ones shown."""


Part: TypeAlias = "Table | Plot | Circuits | Row | Facts | Remark | TokenView"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One step of the argument."""

    id: str
    """Anchor."""
    title: str
    """Heading."""
    claim: str
    """The verdict sentence, from the manifest; empty where the section claims nothing."""
    lead: str
    """What is shown and how it is measured."""
    parts: Sequence[Part]
    """Figures, tables and remarks in order."""
    reading: str = ""
    """How to read what is shown, in one plain sentence."""
    missing: Sequence[str] = ()
    """Why there is nothing to show, if there is not."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    name: str
    """What is measured."""
    value: str
    """The number."""
    detail: str
    """Interval, n and comparison."""
    href: str
    """The section that argues it."""


def plot(name: str, fig: go.Figure, note: str) -> Plot:
    """A figure for the page; its title moves into the caption, where it wraps and can be read aloud."""
    title = html.unescape(fig.layout.title.text or "")
    fig.update_layout(title_text=None)
    top = fig.layout.margin.t if fig.layout.margin.t is not None else 40
    fig.update_layout(margin_t=max(28, top - 24))
    return Plot(id=f"figure-{name}", title=title, note=note, height=int(fig.layout.height), spec=script_json(fig))


def script_json(fig: go.Figure) -> str:
    """The figure as JSON that cannot end a script element or open a comment in one."""
    return embed(json.loads(fig.to_json()))


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign, or "n/a"."""
    if not math.isfinite(value):
        return "n/a"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 0) -> str:
    """A share as a percentage, or "n/a"."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "n/a"


def interval(low: float, high: float, n: int | None = None, digits: int = 2) -> str:
    """An interval, or "n/a" with the n that makes it undefined."""
    if math.isfinite(low) and math.isfinite(high):
        return f"[{number(low, digits)}, {number(high, digits)}]"
    return "n/a" if n is None else f"n/a (n={n})"


def text_cell(value: object, limit: int = CELL) -> Cell:
    """A cell of untrusted text."""
    # NaN is the one value that differs from itself; pandas' NA cannot be compared.
    missing = value is None or value is pd.NA or value != value
    shown = "–" if missing else printable(str(value), limit=limit, keep_newlines=True)
    return Cell(text=shown, sort=shown[:80].lower())


def number_cell(value: float, digits: int = 2) -> Cell:
    """A cell that sorts by its number; missing numbers sort last."""
    return Cell(text=number(value, digits), sort=repr(float(value)) if math.isfinite(value) else "")


def p_cell(value: float) -> Cell:
    """A cell of a p or q, never shown as zero."""
    cell = number_cell(value, 3)
    return Cell(text="<0.001", sort=cell.sort) if value < 0.001 else cell


def count_cell(value: int | float) -> Cell:
    """A cell of a count."""
    finite = math.isfinite(value)
    return Cell(text=f"{int(value):,}" if finite else "n/a", sort=str(int(value)) if finite else "")


def interval_cell(low: float, high: float, n: int | None = None, digits: int = 2) -> Cell:
    """A cell of an interval, which sorts by its lower bound."""
    return Cell(text=interval(low, high, n, digits), sort=repr(float(low)) if math.isfinite(low) else "")


def columns(*names: str) -> list[Column]:
    """Heads from names such as "effect|number"; without a bar the column is text."""
    # From the right, since a head may be the name of a run.
    parts = (name.rpartition("|") for name in names)
    return [Column(name=head or kind, kind=kind if bar else "text") for head, bar, kind in parts]


def pairs(rows: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    """Name and printable value, for a definition list; missing values are left out."""
    return [
        (printable(str(name), limit=60), printable(str(value), limit=400))
        for name, value in rows
        if value not in (None, "")
    ]
