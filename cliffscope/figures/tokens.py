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
LINE = 64
"""Characters of a line."""
MOST_TOKENS = 1200
"""Tokens written; of a longer transcript the last ones."""
MOST_SCORES = 40_000
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
    title: str = "Refusal score by token",
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
    window = slice(max(0, len(tokens) - max(1, min(MOST_TOKENS, MOST_SCORES // len(grid)))), len(tokens))
    shown = [_written(token) for token in tokens[window]]
    lines, starts, marks = _placed([_width(text) for text in shown], spans[window])
    bars = _bars(shown, (lines, starts), hover=_hover(tokens, spans, window), score=grid[first, window])
    fig = go.Figure([bars, _scale(max(lines) + 1)])
    cut = f", the last {len(shown):,} shown" if window.start else ""
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
        fig.update_layout(sliders=[_slider(grid[:, window], names, first)], margin={"b": 80})
    return fig


def _bars(texts: Sequence[str], places: tuple[list[int], list[int]], *, hover: list[str], score: FloatArray) -> go.Bar:
    lines, starts = places
    return go.Bar(
        orientation="h",
        base=starts,
        x=[_width(text) for text in texts],
        y=lines,
        text=[theme.label(text.strip() or text, limit=TOKEN + 2) for text in texts],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"family": theme.MONO, "size": 12, "color": theme.TEXT},
        customdata=hover,
        hovertext=_score_labels(score),
        marker={"color": _grounds(score), "line": {"width": 0}},
        hovertemplate="%{customdata}<br>score %{hovertext}<extra></extra>",
    )


def _scale(n_lines: int) -> go.Scatter:
    # plotly looks for a text colour beside the colour of each bar, so that bars have colours and no numbers; the
    # colour bar therefore belongs to a mark that is nowhere.
    bar = theme.colorbar("refusal score", ticks=(0.0, 0.5, 1.0) if n_lines > 3 else (0.0, 1.0))
    marker = {"color": [0], "cmin": 0, "cmax": 1, "colorscale": theme.TEXT_GROUND, "colorbar": bar, "showscale": True}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _slider(grid: FloatArray, names: Sequence[int], first: int) -> dict[str, object]:
    steps = [
        {
            "method": "restyle",
            "label": str(name),
            "args": [{"marker.color": [_grounds(row)], "hovertext": [_score_labels(row)]}, [0]],
        }
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


def _grounds(score: FloatArray) -> list[str]:
    """Colours of scores; a token without a score has no ground."""
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for _, color in theme.TEXT_GROUND]
    low, high = np.array(ends)
    share = np.clip(np.nan_to_num(score), 0, 1)[:, None]
    mixed = np.round(low + share * (high - low)).astype(int)
    rows = zip(mixed.tolist(), np.isfinite(score), strict=True)
    return [f"#{r:02x}{g:02x}{b:02x}" if there else "#ffffff" for (r, g, b), there in rows]


def _score_labels(score: FloatArray) -> list[str]:
    return [f"{value:.3f}" if np.isfinite(value) else "n/a" for value in score]


def _hover(tokens: Sequence[str], spans: Sequence[str], window: slice) -> list[str]:
    return [
        f"{place} · {theme.label(tokens[place])} · {theme.caption(spans[place], limit=20)}"
        for place in range(window.start, window.stop)
    ]


def _written(token: str) -> str:
    """A token as it is written: the space that begins a word is room, a token of white space alone its symbol."""
    text = theme.printable(token, limit=TOKEN, keep_spaces=bool(token.strip()))
    return text[: TOKEN + 1] or "∅"


def _width(text: str) -> int:
    # A character of room, since plotly shrinks a text that touches the ends of its bar.
    return len(text.strip() or text) + 1


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
