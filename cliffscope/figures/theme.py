"""How does every figure look, and how does untrusted text get into one?

1. One colour-blind-safe palette (Okabe and Ito, "Color universal design", 2008). Blue is refusal, vermillion is
   compliance and whatever suppresses refusal, green is harmless.
2. Both colour scales run through full transparency, so that zero is the page itself, light or dark.
3. One template, set on each figure and never globally: transparent ground, thin rules, and greys that read on white
   and on black alike. `INK` marks what a page may recolour to its own text colour.
4. Text from models and data is made printable, capped and HTML-escaped before plotly sees it.

It does not know what is drawn.
"""

import html
import json
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#8C8C8C"
INK = "#808182"
"""A grey that occurs nowhere else, so that a page can find it and use its own ink instead."""

GROUP_COLORS: Mapping[str, str] = {
    "harmful, refused": BLUE,
    "harmful, complied": VERMILLION,
    "harmless": GREEN,
    "harmless, refused": SKY,
    "harmful": VERMILLION,
    "harmless, complied": GREEN,
    "edited": PURPLE,
    "harmful, complied; top heads zeroed": PURPLE,
    "harmful, complied; random heads zeroed": GREY,
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star", "pentagon", "hexagon")

SEQUENTIAL = ((0.0, "rgba(0,114,178,0)"), (0.5, "rgba(0,114,178,0.5)"), (1.0, "rgba(0,114,178,1)"))
TEXT_GROUND = ((0.0, "#f6f5f1"), (1.0, "#5aa9dd"))
"""Under text: opaque, so that `TEXT` reads on every shade, on a light page and on a dark one."""
TEXT = "#1d1d1b"
DIVERGING = (
    (0.0, "rgba(0,114,178,1)"),
    (0.5, "rgba(0,114,178,0)"),
    (0.5, "rgba(213,94,0,0)"),
    (1.0, "rgba(213,94,0,1)"),
)
"""Blue below zero, nothing at zero, vermillion above."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace'
RULE = "rgba(128,128,128,0.22)"

_AXIS = {
    "gridcolor": RULE,
    "gridwidth": 1,
    "linecolor": RULE,
    "showline": False,
    "zeroline": False,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": RULE,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 12}},
    "tickfont": {"size": 11},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "title": {
            **{"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
            **{"font": {"size": 14}, "pad": {"t": 14}},
        },
        "margin": {"l": 56, "r": 16, "t": 64, "b": 48},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#24272b", "bordercolor": "#24272b", "font": {"color": "#ffffff", "size": 12}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left", "font": {"size": 12}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
        "colorway": [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY],
    }
)

NARROW = 600
"""Pixels that a legend has in a narrow page."""
MOST_CROSSES = 2000
"""Cells marked as not measured; more marks than this would be slow and hide the rest."""
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str, *, limit: int = 60, keep_newlines: bool = False, keep_spaces: bool = True) -> str:
    r"""Untrusted text with nothing invisible in it and at most `limit` characters; not yet HTML-escaped.

    Args:
        text: Any string.
        limit: Longest result in characters; a longer text ends in an ellipsis and its full length.
        keep_newlines: Leave newlines and tabs as they are instead of showing them as symbols.
        keep_spaces: Leave spaces as they are instead of showing them as symbols.

    Returns:
        The text with control, format (bidirectional, zero-width) and unassigned characters as escapes.

    Example:
        >>> printable("a\u202eb\n")
        'a\\u202eb⏎'
    """
    unescaped = ("\n\t" if keep_newlines else "") + (" " if keep_spaces else "")
    cut = text[:limit]
    if cut.isprintable() and keep_spaces and len(text) <= limit:
        return text
    shown = "".join(char if char in unescaped else _show(char) for char in cut)
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"


def label(text: str, *, limit: int = 24) -> str:
    """A token or a name as it may stand in a plotly label or hover: printable, spaces shown, HTML-escaped."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return html.escape(printable(cut, limit=limit, keep_spaces=False), quote=True)


def caption(text: str, *, limit: int = 160) -> str:
    """A title, an axis name or a legend entry: printable and HTML-escaped, spaces as they are."""
    return html.escape(printable(text, limit=limit), quote=False)


def embed(value: object) -> str:
    r"""JSON that may stand inside a script element.

    Example:
        >>> embed({"a": "</script>"})
        '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def group_color(name: str, index: int) -> str:
    """The colour of a group by its name, with the name of a run before it or not; else the next of the palette."""
    return GROUP_COLORS.get(name.rpartition(": ")[2], (PURPLE, ORANGE, SKY)[index % 3])


def group_mark(name: str, index: int) -> tuple[str, str]:
    """Line dash and marker of a group, the same in every figure, so that colour is never the only sign."""
    place = list(GROUP_COLORS).index(name) if name in GROUP_COLORS else index
    return DASHES[place % len(DASHES)], SYMBOLS[place % len(SYMBOLS)]


def fade(color: str, alpha: float) -> str:
    """A `#rrggbb` colour with an opacity.

    Example:
        >>> fade("#0072B2", 0.2)
        'rgba(0,114,178,0.2)'
    """
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def themed(fig: go.Figure, *, title: str, x: str, y: str, height: int) -> go.Figure:
    """The figure with the template, an escaped title and axis names; changes and returns the figure given."""
    fig.update_layout(template=TEMPLATE, height=height, title_text=caption(title))
    fig.update_xaxes(title_text=caption(x))
    fig.update_yaxes(title_text=caption(y))
    return fig


def make_room(fig: go.Figure, *, above: int = 0) -> None:
    """Gives the legend the rows that it takes in a narrow page, so that it never runs into the title.

    Args:
        fig: The figure, its traces named.
        above: Pixels between the plot and the legend.
    """
    names = [trace.name for trace in fig.data if trace.name and trace.showlegend is not False]
    rows, left = 1, float(NARROW)
    for name in names:
        width = 46 + 6.6 * len(html.unescape(name))
        if width > left and left < NARROW:
            rows, left = rows + 1, float(NARROW)
        left -= width
    fig.update_layout(margin_t=44 + above + 21 * rows)


def empty_figure(title: str, reason: str) -> go.Figure:
    """A figure that says why there is nothing to draw."""
    fig = themed(go.Figure(), title=title, x="", y="", height=160)
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    fig.add_annotation(text=caption(reason), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return fig


def colorbar(name: str, *, ticks: tuple[float, ...] | None = None) -> dict[str, object]:
    """A slim colour bar with a named unit."""
    bar: dict[str, object] = {
        "title": {"text": caption(name), "side": "right", "font": {"size": 11}},
        "thickness": 10,
        "outlinewidth": 0,
        "ticklen": 3,
        "tickfont": {"size": 10},
        "xpad": 6,
    }
    return bar if ticks is None else {**bar, "tickvals": list(ticks)}


def bounds(low: float, high: float, *, spec: str = ".3f") -> str:
    """An interval for a hover, or that there is none."""
    return f"[{low:{spec}}, {high:{spec}}]" if np.isfinite(low) and np.isfinite(high) else "(interval n/a)"


def error_bars(value: FloatArray, low: FloatArray, high: FloatArray, color: str) -> dict[str, object]:
    """Horizontal error bars; an undefined interval draws none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": np.round(np.nan_to_num(high - value), 4),
        "arrayminus": np.round(np.nan_to_num(value - low), 4),
        "color": color,
        "thickness": 1.5,
        "width": 0,
    }


def jitter(count: int, width: float) -> FloatArray:
    """Offsets within +-width, fixed by the golden ratio, so that the same run gives the same figure."""
    place: FloatArray = 2 * np.mod(np.arange(count) * 0.6180339887, 1.0) - 1
    return width * place


def cross_missing(fig: go.Figure, values: FloatArray, columns: Sequence[object], rows: Sequence[object]) -> None:
    """Marks the cells of a heat map that were not measured, since no colour already means zero or chance.

    Args:
        fig: The figure that holds the heat map.
        values: [row, column] values; NaN = not measured.
        columns: [column] places on the horizontal axis.
        rows: [row] places on the vertical axis.
    """
    missing = np.argwhere(~np.isfinite(values))[:MOST_CROSSES]
    if missing.size:
        cross = {"symbol": "x-thin", "size": 6, "line": {"color": GREY, "width": 1}}
        x, y = [columns[place] for place in missing[:, 1]], [rows[place] for place in missing[:, 0]]
        hover = "%{x}, %{y}<br>not measured<extra></extra>"
        fig.add_scatter(x=x, y=y, mode="markers", marker=cross, hovertemplate=hover, showlegend=False)


def _show(char: str) -> str:
    if char in _SHOWN:
        return _SHOWN[char]
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"
