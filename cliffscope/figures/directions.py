"""How far does a step along a direction move a readout, against steps along random ones?"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]

STEPS = ("added", "subtracted")
"""What is done with the direction."""


def direction_effects(
    means: tuple[float, float],
    bounds: Sequence[tuple[float, float]],
    random: FloatArray,
    *,
    title: str,
    unit: str,
) -> go.Figure:
    """Effects of adding and of subtracting a direction, and of random directions of the same norm.

    Args:
        means: mean effect of adding, and of subtracting.
        bounds: interval of each.
        random: [draw] mean effect of each random direction.
        title: title, with n.
        unit: what the horizontal axis measures.
    """
    random = random[np.isfinite(random)]
    if not np.isfinite(means).any() and random.size == 0:
        return theme.empty_figure(title, "No direction was measured.")
    fig = go.Figure()
    fig.add_scatter(
        x=np.round(random, 4),
        y=theme.jitter(random.size, 0.28),
        mode="markers",
        marker={"color": theme.GREY, "size": 9, "opacity": 0.55},
        hovertemplate="random direction<br>%{x:.3f}<extra></extra>",
    )
    for place, (name, mean, (low, high)) in enumerate(zip(STEPS, means, bounds, strict=True), 1):
        fig.add_scatter(
            x=[mean],
            y=[place],
            mode="markers",
            marker={"color": theme.VERMILLION, "size": 11, "symbol": "diamond"},
            error_x=theme.error_bars(np.array([mean]), np.array([low]), np.array([high]), theme.VERMILLION),
            hovertemplate=f"direction {name}<br>%{{x:.3f}} {theme.bounds(low, high)}<extra></extra>",
        )
    theme.themed(fig, title=title, x=unit, y="", height=220)
    rows = [f"random directions ({random.size})", *(f"direction {name}" for name in STEPS)]
    fig.update_layout(showlegend=False)
    fig.update_yaxes(tickvals=[0, 1, 2], ticktext=rows, range=[-0.6, 2.6], showgrid=False)
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    return fig
