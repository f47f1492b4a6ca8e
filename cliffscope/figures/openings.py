"""How do refusals and compliances begin?

Two bars an opening: the share of refused and of complied answers that begin with it. An opening that tells them apart
has one bar. It knows no readout.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]


def opening_bars(
    openings: Sequence[str],
    classes: Sequence[str],
    refused: FloatArray,
    complied: FloatArray,
    *,
    title: str = "How answers begin",
) -> go.Figure:
    """Shares of answers by opening.

    Args:
        openings: [opening] texts.
        classes: [opening] `refused` or `complied`: what the opening counts for.
        refused: [opening] share of refused answers that begin with it.
        complied: [opening] share of complied answers that begin with it.
        title: Title.
    """
    if not openings:
        return theme.empty_figure(title, "There is no opening.")
    names = [f"{theme.label(text)} · {theme.caption(kind)}" for text, kind in zip(openings, classes, strict=True)]
    fig = go.Figure()
    bars = (("refused answers", refused, theme.BLUE), ("complied answers", complied, theme.VERMILLION))
    for name, shares, color in bars:
        fig.add_bar(
            x=np.round(shares, 4),
            y=names,
            orientation="h",
            name=name,
            marker={"color": color},
            hovertemplate=f"%{{y}}<br>%{{x:.1%}} of {name}<extra></extra>",
        )
    theme.themed(fig, title=title, x="share of answers that begin so", y="", height=150 + 34 * len(names))
    fig.update_layout(barmode="group")
    fig.update_xaxes(range=[0, 1.03], tickformat=".0%")
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return fig
