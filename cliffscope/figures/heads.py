"""Which attention heads suppress refusal, and do they beat random sets of heads?

`head_grid` shows every head at once on a scale centred at zero, `head_ranking` the top heads with their intervals
and their effect on harmless transcripts, `random_sets` the selected set against random sets of the same size.
None of them knows how an effect was measured.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
EFFECT = "effect (refusal logit)"


def head_grid(
    effect: FloatArray,
    low: FloatArray,
    high: FloatArray,
    *,
    selected: NDArray[np.bool_] | None = None,
    harmless: FloatArray | None = None,
    title: str = "Effect of each head",
    unit: str = EFFECT,
) -> go.Figure:
    """Every head's effect, layer by head, on a diverging scale centred at zero.

    Args:
        effect: [layer, head] effect; positive = the head suppresses refusal; NaN = not measured.
        low: [layer, head] lower bound.
        high: [layer, head] upper bound.
        selected: [layer, head] heads to outline.
        harmless: [layer, head] effect on harmless transcripts, shown on hover.
        title: Title, with n.
        unit: What the colour measures.
    """
    if effect.size == 0 or not np.isfinite(effect).any():
        return theme.empty_figure(title, "No head was measured.")
    n_layers, n_heads = effect.shape
    limit = float(np.nanmax(np.abs(effect))) or 1.0
    fig = go.Figure(
        go.Heatmap(
            z=np.round(effect, 4).astype(np.float32),
            zmin=-limit,
            zmax=limit,
            xgap=1 if n_heads <= 64 else 0,
            ygap=1 if n_layers <= 64 else 0,
            colorscale=theme.DIVERGING,
            colorbar=theme.colorbar(unit),
            **_grid_hover(low, high, harmless),
        )
    )
    theme.themed(fig, title=title, x="head", y="layer", height=int(np.clip(120 + 16 * n_layers, 180, 640)))
    fig.update_xaxes(range=[-0.5, n_heads - 0.5], showgrid=False, **_ticks(n_heads))
    fig.update_yaxes(range=[-0.5, n_layers - 0.5], showgrid=False, **_ticks(n_layers))
    frame = {"type": "rect", "x0": -0.5, "x1": n_heads - 0.5, "y0": -0.5, "y1": n_layers - 0.5}
    fig.add_shape(**frame, line={"color": theme.RULE, "width": 1})
    if selected is not None:
        _outline_cells(fig, selected)
    theme.cross_missing(fig, effect, range(n_heads), range(n_layers))
    return fig


def head_ranking(
    names: Sequence[str],
    effect: FloatArray,
    low: FloatArray,
    high: FloatArray,
    *,
    harmless: FloatArray | None = None,
    selected: NDArray[np.bool_] | None = None,
    title: str = "Top heads",
    unit: str = EFFECT,
) -> go.Figure:
    """The top heads, best first, with intervals; hollow marks are the effect on harmless transcripts.

    Args:
        names: [head] names such as "L12H5", best first.
        effect: [head] effect.
        low: [head] lower bound; NaN where undefined.
        high: [head] upper bound; NaN where undefined.
        harmless: [head] effect on harmless transcripts.
        selected: [head] heads that were selected: drawn in colour, the others in grey.
        title: Title, with n.
        unit: What the horizontal axis measures.
    """
    if not names:
        return theme.empty_figure(title, "No head was measured.")
    marked = np.zeros(len(names), dtype=bool) if selected is None else selected
    shown = [theme.caption(name, limit=20) for name in names]
    fig = go.Figure()
    for mask, color, name in ((marked, theme.VERMILLION, "selected"), (~marked, theme.GREY, "not selected")):
        if mask.any():
            _add_ranked(fig, [shown[i] for i in np.flatnonzero(mask)], effect[mask], (low[mask], high[mask]))
            fig.data[-1].update(name=name, marker={"color": color, "size": 9}, error_x={"color": color})
    if harmless is not None and np.isfinite(harmless).any():
        ring = {"symbol": "circle-open", "size": 9, "color": theme.GREEN, "line": {"width": 1.5}}
        hover = "%{y}<br>harmless %{x:.3f}<extra></extra>"
        y, x = shown, np.round(harmless, 4)
        fig.add_scatter(x=x, y=y, mode="markers", marker=ring, name="harmless", hovertemplate=hover)
    theme.themed(fig, title=title, x=unit, y="head", height=max(180, 110 + 20 * len(names)))
    theme.make_room(fig)
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=shown[::-1], gridcolor=theme.RULE)
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    return fig


def random_sets(
    observed: float,
    low: float,
    high: float,
    control: FloatArray,
    *,
    title: str = "Selected heads against size-matched random head sets",
    unit: str = EFFECT,
) -> go.Figure:
    """The effect of the selected set against that of size-matched random sets.

    Args:
        observed: Effect of editing the selected heads together.
        low: Lower bound.
        high: Upper bound.
        control: [set] effect of each random set.
        title: Title.
        unit: What the horizontal axis measures.
    """
    control = control[np.isfinite(control)]
    if not np.isfinite(observed) and control.size == 0:
        return theme.empty_figure(title, "No head set was measured.")
    rows = f"random sets ({control.size})"
    fig = go.Figure()
    dots = {"color": theme.GREY, "size": 9, "opacity": 0.55}
    hover = "random set<br>%{x:.3f}<extra></extra>"
    places = theme.jitter(control.size, 0.28)
    fig.add_scatter(x=np.round(control, 4), y=places, mode="markers", marker=dots, hovertemplate=hover, name=rows)
    _add_ranked(fig, [1], np.array([observed]), (np.array([low]), np.array([high])))
    fig.data[-1].update(name="selected heads", marker={"color": theme.VERMILLION, "size": 11, "symbol": "diamond"})
    fig.data[-1].update(hovertemplate="selected heads<br>%{x:.3f} %{customdata}<extra></extra>")
    theme.themed(fig, title=title, x=unit, y="", height=190)
    fig.update_layout(showlegend=False)
    fig.update_yaxes(tickvals=[1, 0], ticktext=["selected heads", rows], range=[-0.6, 1.6], showgrid=False)
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    return fig


def effect_pairs(
    names: Sequence[str],
    first: FloatArray,
    second: FloatArray,
    selections: NDArray[np.integer],
    *,
    runs: tuple[str, str] = ("first run", "second run"),
    same_scale: bool = True,
    title: str = "Effect of each head in both runs",
) -> go.Figure:
    """Every head's effect in one run against that in another.

    Args:
        names: [head] names such as "L12H5".
        first: [head] effect in the first run; NaN = not measured.
        second: [head] effect in the second run.
        selections: [head] number of runs in which the head was selected: 0, 1 or 2.
        runs: names of the runs, for the axes.
        same_scale: whether logits of both are comparable; equal effects then lie on a line that is drawn.
        title: Title; the number of heads is added.
    """
    measured = np.isfinite(first) & np.isfinite(second)
    if not measured.any():
        return theme.empty_figure(title, "No head was measured in both runs.")
    fig = go.Figure()
    kinds = ((0, theme.GREY, "in neither"), (1, theme.ORANGE, "in one run"), (2, theme.VERMILLION, "in both"))
    for count, color, name in kinds:
        mask = measured & (selections == count)
        if mask.any():
            marker = {"color": color, "size": 7 + 2 * count, "symbol": theme.SYMBOLS[count], "opacity": 0.8}
            fig.add_scatter(
                x=np.round(first[mask], 4),
                y=np.round(second[mask], 4),
                text=[theme.caption(names[i], limit=20) for i in np.flatnonzero(mask).tolist()],
                mode="markers",
                marker=marker,
                name=f"selected {name} ({int(mask.sum()):,})",
                hovertemplate="%{text}<br>%{x:.3f} and %{y:.3f}<extra></extra>",
            )
    shown = f"{title} ({int(measured.sum()):,} heads)"
    theme.themed(fig, title=shown, x=f"{EFFECT}, {runs[0]}", y=f"{EFFECT}, {runs[1]}", height=440)
    theme.make_room(fig)
    line = {"color": theme.GREY, "width": 1}
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    fig.update_yaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    if not same_scale:
        return fig
    both = [first[measured], second[measured]]
    low, high = float(np.min(both)), float(np.max(both))
    fig.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line={**line, "dash": "dot"}, layer="below")
    return fig


def _add_ranked(
    fig: go.Figure, rows: Sequence[str | int], value: FloatArray, bounds: tuple[FloatArray, FloatArray]
) -> None:
    low, high = bounds
    fig.add_scatter(
        x=np.round(value, 4),
        y=list(rows),
        mode="markers",
        error_x=theme.error_bars(value, low, high, theme.VERMILLION),
        customdata=[theme.bounds(a, b) for a, b in zip(low, high, strict=True)],
        hovertemplate="%{y}<br>effect %{x:.3f} %{customdata}<extra></extra>",
    )


def _grid_hover(low: FloatArray, high: FloatArray, harmless: FloatArray | None) -> dict[str, object]:
    """Numbers where all are finite, which take a fraction of the space of texts; else texts that say what is not."""
    parts = [low, high] if harmless is None else [low, high, harmless]
    begin, other = "L%{y}H%{x}<br>effect %{z:.3f} ", "" if harmless is None else "; harmless %{customdata[2]:.3f}"
    if all(np.isfinite(values).all() for values in parts):
        bounds = "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
        numbers = np.stack(parts, axis=-1).round(4).astype(np.float32)
        return {"customdata": numbers, "hovertemplate": f"{begin}{bounds}{other}<extra></extra>"}
    third = np.full(low.shape, np.nan) if harmless is None else harmless
    cells = zip(low.ravel().tolist(), high.ravel().tolist(), third.ravel().tolist(), strict=True)
    flat = [theme.bounds(a, b) + (f"; harmless {c:.3f}" if np.isfinite(c) else "") for a, b, c in cells]
    width = low.shape[1]
    rows = [flat[start : start + width] for start in range(0, len(flat), width)]
    return {"text": rows, "hovertemplate": f"{begin}%{{text}}<extra></extra>"}


def _outline_cells(fig: go.Figure, selected: NDArray[np.bool_]) -> None:
    # One trace of closed squares, broken by gaps: hundreds of shapes would make a 128 x 128 grid slow.
    xs: list[float | None] = []
    ys: list[float | None] = []
    for layer, head in np.argwhere(selected):
        xs += [head - 0.5, head + 0.5, head + 0.5, head - 0.5, head - 0.5, None]
        ys += [layer - 0.5, layer - 0.5, layer + 0.5, layer + 0.5, layer - 0.5, None]
    line = {"color": theme.INK, "width": 2 if max(selected.shape) <= 64 else 1}
    fig.add_scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _ticks(count: int) -> dict[str, object]:
    step = next(size for size in (1, 2, 4, 8, 16, 32, 64, 10**6) if count / size <= 16)
    return {"tickmode": "array", "tickvals": list(range(0, count, step))}
