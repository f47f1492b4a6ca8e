"""What would the answer be, had the thinking ended earlier?

Mean curves over the share of the thinking that is written, each with its interval. It knows no result class.
"""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
Curve = Mapping[str, FloatArray]
"""[point] each: fraction in (0, 1], mean in [0, 1], ci_low and ci_high (NaN where undefined), n."""
_COLORS = (theme.VERMILLION, theme.BLUE, theme.PURPLE)


def closing_curves(
    curves: Mapping[str, Curve],
    *,
    title: str = "Refusal, had the thinking ended earlier",
    unit: str = "refusal score",
) -> go.Figure:
    """Curves over the thinking, one for each condition.

    Args:
        curves: Curve by name, in the order to show: unedited, edited, and whatever they are compared with.
        title: Title; n is added.
        unit: What the vertical axis measures, in [0, 1].

    Returns:
        The figure, or one that says that there is no curve.
    """
    drawn = {name: curve for name, curve in curves.items() if np.isfinite(curve["mean"]).any()}
    if not drawn:
        return theme.empty_figure(title, "No transcript has thinking that could be closed earlier.")
    fig = go.Figure()
    for index, (name, curve) in enumerate(drawn.items()):
        _add_curve(fig, name, curve, index)
    n = int(max(np.max(curve["n"]) for curve in drawn.values()))
    theme.themed(fig, title=f"{title} (n={n:,} transcripts)", x="share of the thinking", y=f"mean {unit}", height=380)
    theme.make_room(fig)
    fig.update_xaxes(range=[0, 1.02], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_yaxes(range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_layout(hovermode="x unified")
    return fig


def _add_curve(fig: go.Figure, name: str, curve: Curve, index: int) -> None:
    color, place = _COLORS[index % len(_COLORS)], curve["fraction"]
    low, high = curve["ci_low"], curve["ci_high"]
    bounded = np.isfinite(low) & np.isfinite(high)
    if bounded.any():
        fig.add_scatter(
            x=np.concatenate([place[bounded], place[bounded][::-1]]),
            y=np.round(np.concatenate([high[bounded], low[bounded][::-1]]), 4),
            fill="toself",
            fillcolor=theme.fade(color, 0.16),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    fig.add_scatter(
        x=place,
        y=np.round(curve["mean"], 4),
        mode="lines+markers",
        name=theme.caption(name, limit=40),
        legendgroup=name,
        line={"color": color, "width": 2, "dash": theme.DASHES[index % len(theme.DASHES)]},
        marker={"size": 6, "symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)], "color": color},
        customdata=[f"{theme.bounds(a, b)} n={int(n)}" for a, b, n in zip(low, high, curve["n"], strict=True)],
        hovertemplate="%{y:.3f} %{customdata}",
    )
