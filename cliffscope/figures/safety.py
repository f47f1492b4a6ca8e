"""What does an edit cost and buy, and which transcripts fall off the cliff?

`arms` compares the unedited model with edits of the top heads and of random heads: ASR on harmful prompts,
over-refusal on harmless ones. `plateau_final` shows each transcript's plateau against its final score, which is what
a selection ranks by. Neither knows how an outcome was judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
MOST_POINTS = 3000
"""More transcripts than this are counted in cells instead of drawn one by one."""
_RATES = {"harmful": "ASR", "harmless": "over-refusal"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm on one group of prompts."""

    name: str
    """Shown beside the mark; the random arms share a row."""
    kind: str
    """`unedited`, `top` or `random`."""
    group: str
    """`harmful` (the rate is the ASR) or `harmless` (the rate is the over-refusal)."""
    rate: float
    """Share in [0, 1]; NaN when nothing was judged."""
    low: float
    """Lower bound; NaN when undefined."""
    high: float
    """Upper bound; NaN when undefined."""
    n: int
    """Prompts judged."""


def arms(rows: Sequence[Arm], *, title: str = "Outcomes with and without the edit") -> go.Figure:
    """ASR and over-refusal of every arm, with intervals; random arms as one row of dots and their mean.

    Args:
        rows: One row an arm and group.
        title: Title.
    """
    judged = [row for row in rows if np.isfinite(row.rate)]
    groups = [group for group in _RATES if any(row.group == group for row in judged)]
    if not groups:
        return theme.empty_figure(title, "No arm has a judged prompt.")
    names = [f"{_RATES[group]}, {group} prompts ({_n_range(judged, group)})" for group in groups]
    fig = make_subplots(cols=len(groups), shared_yaxes=True, horizontal_spacing=0.08, subplot_titles=names)
    order = _arm_order(judged)
    for column, group in enumerate(groups, start=1):
        for kind, run in groupby(sorted((r for r in judged if r.group == group), key=_kind), key=_kind):
            _add_arms(fig, kind, list(run), order, column)
    theme.themed(fig, title=title, x="share of judged prompts", y="", height=120 + 60 * len(order))
    fig.update_xaxes(range=[-0.02, 1.02], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_yaxes(tickvals=list(range(len(order))), range=[len(order) - 0.5, -0.5], showgrid=False)
    fig.update_yaxes(ticktext=[theme.caption(name, limit=32) for name in order])
    fig.update_annotations(font_size=12)
    fig.update_layout(showlegend=False)
    return fig


def plateau_final(
    plateau: FloatArray,
    final: FloatArray,
    selected: NDArray[np.bool_] | None = None,
    *,
    groups: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    title: str = "Plateau against final score",
) -> go.Figure:
    """Each transcript's plateau against its final score; the distance below the diagonal is its cliff.

    Args:
        plateau: [transcript] plateau in [0, 1].
        final: [transcript] final score in [0, 1].
        selected: [transcript] the selection, drawn on top.
        groups: [transcript] group names, for colour; not used together with `selected`.
        names: [transcript] ids for the hover, untrusted.
        title: Title; n is added.
    """
    scored = np.isfinite(plateau) & np.isfinite(final)
    if not scored.any():
        return theme.empty_figure(title, "No transcript has both a plateau and a final score.")
    fig = go.Figure()
    line = {"color": theme.GREY, "width": 1, "dash": "dot"}
    fig.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    kinds = np.asarray(_kinds(len(plateau), selected, groups))
    texts = np.asarray([""] * len(plateau) if names is None else [theme.label(name, limit=40) for name in names])
    for index, kind in enumerate(sorted(set(kinds[scored].tolist()), key=lambda name: (name == "selected", name))):
        mask = scored & (kinds == kind)
        _add_points(fig, kind, (plateau[mask], final[mask], texts[mask].tolist()), index)
    theme.themed(fig, title=f"{title} (n={int(scored.sum()):,})", x="plateau score", y="final score", height=440)
    theme.make_room(fig)
    square = {"range": [-0.03, 1.03], "constrain": "domain", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    fig.update_xaxes(**square)
    fig.update_yaxes(**square, scaleanchor="x")
    note = {"text": "final = plateau", "showarrow": False, "textangle": -45, "font": {"size": 10}}
    fig.add_annotation(x=0.3, y=0.3, xshift=-7, yshift=7, **note)
    return fig


def _add_arms(fig: go.Figure, kind: str, rows: list[Arm], order: list[str], column: int) -> None:
    color = {"unedited": theme.INK, "top": theme.BLUE}.get(kind, theme.GREY)
    place = [float(order.index(_row_name(row, order))) for row in rows]
    rate = np.array([row.rate for row in rows])
    hover = [_arm_hover(row) for row in rows]
    common = {"hovertemplate": "%{customdata}<extra></extra>", "customdata": hover, "x": np.round(rate, 4)}
    if kind == "random" and len(rows) > 1:
        dots = {"color": color, "size": 7, "opacity": 0.5}
        fig.add_scatter(
            y=place + theme.jitter(len(rows), 0.24), mode="markers", marker=dots, row=1, col=column, **common
        )
        bar = {"symbol": "line-ns", "size": 28, "line": {"color": theme.INK, "width": 2}}
        hover_mean = f"mean of {len(rows)} random sets<br>{rate.mean():.1%}<extra></extra>"
        fig.add_scatter(x=[rate.mean()], y=place[:1], mode="markers", marker=bar, row=1, col=column)
        fig.data[-1].update(hovertemplate=hover_mean)
        _write_rates(fig, [(float(rate.max()), place[0], float(rate.mean()))], column)
        return
    low, high = np.array([row.low for row in rows]), np.array([row.high for row in rows])
    error = theme.error_bars(rate, low, high, color)
    mark = {"color": color, "size": 11}
    fig.add_scatter(y=place, mode="markers", marker=mark, error_x=error, row=1, col=column, **common)
    ends = [row.high if np.isfinite(row.high) else row.rate for row in rows]
    _write_rates(fig, list(zip(ends, place, rate.tolist(), strict=True)), column)


def _arm_hover(row: Arm) -> str:
    bounds = theme.bounds(row.low, row.high, spec=".1%")
    return f"{theme.caption(row.name, limit=40)}<br>{row.rate:.1%} {bounds}, n={row.n:,}"


def _write_rates(fig: go.Figure, marks: Sequence[tuple[float, float, float]], column: int) -> None:
    # Beside the interval's end and not above the mark, where it would be cut off at 0% and hidden by dots.
    ends, places, rates = zip(*marks, strict=True)
    texts = [f"&nbsp;&nbsp;{rate:.0%}" for rate in rates]
    common = {"mode": "text", "textposition": "middle right", "hoverinfo": "skip", "cliponaxis": False}
    fig.add_scatter(x=ends, y=places, text=texts, row=1, col=column, **common)


def _add_points(fig: go.Figure, kind: str, points: tuple[FloatArray, FloatArray, list[str]], index: int) -> None:
    plateau, final, texts = points
    shown = f"{theme.caption(kind, limit=40)} (n={len(plateau):,})"
    if len(plateau) > MOST_POINTS:
        counts, _, _ = np.histogram2d(final, plateau, bins=40, range=[[0, 1], [0, 1]])
        centres = (np.arange(40) + 0.5) / 40
        grey = [
            [0, theme.fade(theme.GREY, 0.0)],
            [0.02, theme.fade(theme.GREY, 0.25)],
            [1, theme.fade(theme.GREY, 1.0)],
        ]
        hover = "plateau %{x:.2f}, final %{y:.2f}<br>%{z} transcripts<extra></extra>"
        bar = theme.colorbar(f"{shown}, transcripts per cell")
        fig.add_heatmap(x=centres, y=centres, z=counts, colorscale=grey, colorbar=bar, hovertemplate=hover)
        return
    color = {"selected": theme.VERMILLION, "not selected": theme.GREY}.get(kind, theme.group_color(kind, index))
    fig.add_scatter(
        x=np.round(plateau, 4),
        y=np.round(final, 4),
        mode="markers",
        name=shown,
        text=texts,
        marker={"color": color, "size": 8, "opacity": 0.75, "symbol": theme.group_mark(kind, index)[1]},
        hovertemplate="%{text}<br>plateau %{x:.3f}, final %{y:.3f}<extra></extra>",
    )


def _kinds(count: int, selected: NDArray[np.bool_] | None, groups: Sequence[str] | None) -> list[str]:
    if selected is not None:
        return ["selected" if flag else "not selected" for flag in selected]
    return ["transcripts"] * count if groups is None else list(groups)


def _kind(row: Arm) -> str:
    return row.kind


def _arm_order(rows: Sequence[Arm]) -> list[str]:
    n_random = len({row.name for row in rows if row.kind == "random"})
    plain = [row.name for kind in ("unedited", "top") for row in rows if row.kind == kind]
    other = [row.name for row in rows if row.kind not in ("unedited", "top", "random")]
    return list(dict.fromkeys([*plain, *other])) + ([f"random sets ({n_random})"] if n_random else [])


def _row_name(row: Arm, order: list[str]) -> str:
    return order[-1] if row.kind == "random" else row.name


def _n_range(rows: Sequence[Arm], group: str) -> str:
    sizes = {row.n for row in rows if row.group == group}
    return f"n={min(sizes):,}" if len(sizes) == 1 else f"n={min(sizes):,} to {max(sizes):,}"
