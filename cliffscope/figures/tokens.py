"""Where in the text of one transcript is the intention to refuse held and lost?

`token_text` writes the tokens as text, each on a ground of its refusal score, with a slider for the layer. Every token
is a bar as long as its text, so that lines read like lines; long transcripts keep their end, where the cliff is.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
LINE = 96
"""Characters of a line."""
MOST_TOKENS = 1200
"""Tokens written; of a longer transcript the last ones."""
MOST_SCORES = 60_000
"""Scores that a figure holds: with many layers, fewer tokens are written."""
TOKEN = 24
"""Most characters of a token."""
ROW = 26
"""Height of a line, pixels."""


def token_text(
    tokens: Sequence[str],
    spans: Sequence[str],
    score: FloatArray,
    *,
    layers: Sequence[int] | None = None,
    probe_layer: int | None = None,
    title: str = "Refusal score, token by token",
) -> go.Figure:
    """The tokens of one transcript as text, each on a ground of its score.

    Args:
        tokens: [pos] token texts, untrusted.
        spans: [pos] span of each token; each run of equal names begins a line of its own.
        score: [pos] refusal score in [0, 1], or [layer, pos] for a slider over layers; NaN = not measured.
        layers: [layer] layer numbers; None counts from 0.
        probe_layer: the layer that is shown first; None shows the last one.
        title: Title; the number of tokens is added.
    """
    grid = np.atleast_2d(np.asarray(score, dtype=float))
    if not tokens or not grid.size:
        return theme.empty_figure(title, "The transcript has no token.")
    names = list(range(len(grid))) if layers is None else list(layers)
    first = names.index(probe_layer) if probe_layer in names else len(names) - 1
    kept = slice(max(0, len(tokens) - max(1, min(MOST_TOKENS, MOST_SCORES // len(grid)))), len(tokens))
    shown = [_written(token) for token in tokens[kept]]
    lines, starts, marks = _placed([len(text) for text in shown], spans[kept])
    fig = go.Figure(_bars(shown, (lines, starts), hover=_hover(tokens, spans, kept), score=grid[first, kept]))
    cut = f", the last {len(shown):,} shown" if kept.start else ""
    n_lines = max(lines) + 1
    theme.themed(fig, title=f"{title} ({len(tokens):,} tokens{cut})", x="", y="", height=ROW * n_lines + 150)
    fig.update_xaxes(visible=False, range=[0, LINE], fixedrange=True)
    fig.update_yaxes(
        range=[n_lines - 0.5, -0.5],
        tickvals=[line for line, _ in marks],
        ticktext=[theme.caption(span, limit=20) for _, span in marks],
        showgrid=False,
        ticks="",
        fixedrange=True,
    )
    fig.update_layout(barmode="overlay", bargap=0.12, showlegend=False)
    if len(grid) > 1:
        fig.update_layout(sliders=[_slider(grid[:, kept], names, first)], margin={"b": 80})
    return fig


def _bars(texts: Sequence[str], places: tuple[list[int], list[int]], *, hover: list[str], score: FloatArray) -> go.Bar:
    lines, starts = places
    return go.Bar(
        orientation="h",
        base=starts,
        x=[len(text) for text in texts],
        y=lines,
        text=[theme.label(text.strip() or text, limit=TOKEN + 2) for text in texts],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"family": theme.MONO, "size": 12, "color": theme.TEXT},
        customdata=hover,
        marker={
            "color": _colors(score),
            "cmin": 0,
            "cmax": 1,
            "colorscale": theme.TEXT_GROUND,
            "colorbar": theme.colorbar("refusal score", ticks=(0.0, 0.5, 1.0)),
            "line": {"width": 0},
        },
        hovertemplate="%{customdata}<br>score %{marker.color:.3f}<extra></extra>",
    )


def _slider(grid: FloatArray, names: Sequence[int], first: int) -> dict[str, object]:
    steps = [
        {"method": "restyle", "label": str(name), "args": [{"marker.color": [_colors(row)]}]}
        for name, row in zip(names, grid, strict=True)
    ]
    return {
        "active": first,
        "steps": steps,
        "currentvalue": {"prefix": "layer ", "xanchor": "left", "font": {"size": 12}},
        "pad": {"t": 8, "b": 0},
        "len": 0.6,
        "font": {"size": 10, "color": theme.GREY},
        "bordercolor": theme.RULE,
        "activebgcolor": theme.BLUE,
    }


def _colors(score: FloatArray) -> list[float]:
    # A token without a score stays without a ground; its hover says so.
    return [float(value) for value in np.round(np.nan_to_num(score), 3)]


def _hover(tokens: Sequence[str], spans: Sequence[str], kept: slice) -> list[str]:
    return [
        f"{place} · {theme.label(tokens[place])} · {theme.caption(spans[place], limit=20)}"
        for place in range(kept.start, kept.stop)
    ]


def _written(token: str) -> str:
    """A token as it is written: the space that begins a word is room, a token of white space alone its symbol."""
    text = theme.printable(token, limit=TOKEN, keep_spaces=bool(token.strip()))
    return text[: TOKEN + 1] or "∅"


def _placed(lengths: Sequence[int], spans: Sequence[str]) -> tuple[list[int], list[int], list[tuple[int, str]]]:
    """Line and first column of each token, and the lines on which spans begin."""
    lines: list[int] = []
    starts: list[int] = []
    marks: list[tuple[int, str]] = []
    line, place = -1, 0
    for span, run in groupby(spans):
        line, column = line + 1, 0
        marks.append((line, span))
        for _ in run:
            if column + lengths[place] > LINE:
                line, column = line + 1, 0
            lines.append(line)
            starts.append(column)
            column += lengths[place]
            place += 1
    return lines, starts, marks
