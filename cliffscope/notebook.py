"""How does a result show itself in a notebook?

A result that is `Shown` has a one-line headline (its repr) and a small table; one that is `Plotted` has a figure too.
Jupyter gets the headline and table as HTML and the figure from plotly's own renderer, which loads plotly.js once per
notebook; a terminal gets the headline. All text is escaped and made printable. This file knows no science.
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROWS = 6
"""Rows of the small table: as many as fit under a headline without scrolling."""
TEXT = 60
"""Maximum number of characters of a text in the table."""
_HEAD = "padding:2px 12px 2px 0;text-align:left;font-weight:600;border-bottom:1px solid currentColor"
_CELL = "padding:2px 12px 2px 0;text-align:left;font-variant-numeric:tabular-nums"


class Shown(ABC):
    """A result that shows itself as a headline and a small table."""

    @abstractmethod
    def small_table(self) -> pd.DataFrame:
        """The table under the headline, of which only the first rows are shown."""

    def _figures(self) -> list["Figure"]:
        return []

    def _repr_html_(self) -> str:
        """Headline and table, for every host that shows HTML."""
        from cliffscope.figures.theme import printable

        return f'<div style="margin:4px 0 8px">{html.escape(printable(repr(self), limit=400))}</div>{_table(self)}'

    def _ipython_display_(self) -> None:
        """Headline, table and figure in a notebook; elsewhere IPython falls back to the headline."""
        from IPython import get_ipython
        from IPython.display import HTML, display

        # Of IPython's shells, only those that a notebook talks to have a kernel.
        shell = get_ipython()
        if shell is None or not shell.has_trait("kernel"):
            raise NotImplementedError
        # IPython's functions are not annotated.
        show: Callable[[object], None] = display
        make: Callable[[str], object] = HTML
        show(make(self._repr_html_()))
        for figure in self._figures():
            show(figure)


class Plotted(Shown):
    """A result that has a figure too."""

    @abstractmethod
    def plot(self) -> "Figure":
        """The figure."""

    def _figures(self) -> list["Figure"]:
        return [self.plot()]


def _table(result: Shown) -> str:
    frame = result.small_table()
    if not len(frame.columns):
        return ""
    head = "".join(f'<th style="{_HEAD}">{html.escape(str(name))}</th>' for name in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_cell(value)}</td>' for value in row) + "</tr>"
        for row in frame.head(ROWS).itertuples(index=False)
    )
    hidden = len(frame) - ROWS
    more = f'<div style="opacity:.7">{hidden:,} more rows</div>' if hidden > 0 else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    table = f'<table class="cliffscope" style="border-collapse:collapse">{body}</table>'
    return f'<div style="overflow-x:auto;max-width:100%">{table}</div>{more}'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "n/a" if pd.isna(value) else f"{value:.3f}"
    from cliffscope.figures.theme import printable

    return html.escape(printable(str(value), limit=TEXT))
