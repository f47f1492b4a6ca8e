"""How do refusal and attack success change with the number of heads, and do methods agree on which heads?

`dose_response` draws the top heads against random sets of the same size, one panel a quantity; `agreement` a matrix
of rank correlations. Arrays and names in, no result class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity at every dose."""

    name: str
    """Of the quantity, with its unit."""
    top: FloatArray
    """[dose] with the top heads edited; NaN = not measured."""
    low: FloatArray
    """[dose] lower bounds."""
    high: FloatArray
    """[dose] upper bounds."""
    random: FloatArray
    """[dose, set] with random sets edited."""
    unedited: float
    """With nothing edited."""


def dose_response(counts: Sequence[int], panels: Sequence[Panel], *, n: int, title: str = "") -> go.Figure:
    """Quantities against the number of heads edited, for top heads and random sets.

    Args:
        counts: [dose] heads edited.
        panels: quantities, one panel each.
        n: Transcripts.
        title: Title; n is added.
    """
    named = f"{title or 'Dose-response'} (n={n})"
    measured = [panel for panel in panels if np.isfinite(panel.top).any()]
    if not measured or not counts:
        return theme.empty_figure(named, "No dose was measured.")
    fig = make_subplots(cols=len(measured), horizontal_spacing=0.12)
    places = list(range(len(counts)))
    for column, panel in enumerate(measured, start=1):
        _add_random(fig, panel, column)
        bars = theme.error_bars(panel.top, panel.low, panel.high, theme.VERMILLION)
        fig.add_scatter(
            x=places,
            y=np.round(panel.top, 4),
            mode="lines+markers",
            name="top heads",
            legendgroup="top",
            showlegend=column == 1,
            line={"color": theme.VERMILLION},
            marker={"size": 8, "symbol": "diamond"},
            error_y=bars,
            customdata=[theme.bounds(a, b) for a, b in zip(panel.low, panel.high, strict=True)],
            hovertemplate="%{y:.3f} %{customdata}<extra>top heads</extra>",
            row=1,
            col=column,
        )
        fig.add_hline(y=panel.unedited, line={"color": theme.GREY, "dash": "dot", "width": 1}, row=1, col=column)
    theme.themed(fig, title=named, x="heads edited", y="", height=340)
    theme.make_room(fig)
    fig.update_xaxes(tickvals=places, ticktext=[str(count) for count in counts])
    for column, panel in enumerate(measured, start=1):
        fig.update_yaxes(title_text=theme.caption(panel.name), row=1, col=column)
    return fig


def agreement(names: Sequence[str], correlation: FloatArray, *, title: str = "Agreement between methods") -> go.Figure:
    """Rank correlation of every two methods.

    Args:
        names: [method] names.
        correlation: [method, method] Spearman correlation; NaN = not compared.
        title: Title, with n.
    """
    if len(names) < 2 or not np.isfinite(correlation).any():
        return theme.empty_figure(title, "Fewer than two methods were compared.")
    shown = [theme.caption(name, limit=24) for name in names]
    fig = go.Figure(
        go.Heatmap(
            z=np.round(correlation, 3).tolist(),
            x=shown,
            y=shown,
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            colorscale=theme.DIVERGING,
            colorbar=theme.colorbar("Spearman correlation"),
            texttemplate="%{z:.2f}",
            hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        )
    )
    theme.themed(fig, title=title, x="", y="", height=140 + 34 * len(names))
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_xaxes(showgrid=False)
    theme.cross_missing(fig, correlation, shown, shown)
    return fig


def _add_random(fig: go.Figure, panel: Panel, column: int) -> None:
    dose, _ = np.nonzero(np.isfinite(panel.random))
    values = panel.random[np.isfinite(panel.random)]
    spread = dose + theme.jitter(len(values), 0.18)
    fig.add_scatter(
        x=np.round(spread, 3),
        y=np.round(values, 4),
        mode="markers",
        name="random sets",
        legendgroup="random",
        showlegend=column == 1 and bool(len(values)),
        marker={"color": theme.GREY, "size": 6, "opacity": 0.5},
        hovertemplate="%{y:.3f}<extra>random set</extra>",
        row=1,
        col=column,
    )
