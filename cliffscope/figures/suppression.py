"""How far does refusal come back, transcript by transcript, when heads are edited?

Each transcript is a pair of points above its unedited value: with the edit, and on average with random sets. What does
nothing lies on the diagonal. It knows no result class.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]


def paired_points(
    unedited: FloatArray,
    edited: FloatArray,
    random_mean: FloatArray,
    *,
    names: Sequence[str] | None = None,
    title: str = "Refusal with heads edited",
    unit: str = "probability of refusal",
) -> go.Figure:
    """Every transcript edited, and under random sets, against unedited.

    Args:
        unedited: [transcript] values in [0, 1] of the unedited model.
        edited: [transcript] values with the edit.
        random_mean: [transcript] mean values over random sets; NaN where none was drawn.
        names: [transcript] ids for the hover, untrusted.
        title: Title; n is added.
        unit: What both axes measure.

    Returns:
        The figure, or one that says that nothing was measured.
    """
    measured = np.isfinite(unedited) & np.isfinite(edited)
    if not measured.any():
        return theme.empty_figure(title, "No transcript was measured.")
    texts = np.asarray([""] * len(unedited) if names is None else [theme.label(name, limit=40) for name in names])
    fig = go.Figure()
    line = {"color": theme.GREY, "width": 1, "dash": "dot"}
    fig.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    pairs = (("random sets, mean", random_mean, theme.GREY, "circle"), ("edited", edited, theme.VERMILLION, "diamond"))
    for name, values, color, symbol in pairs:
        shown = measured & np.isfinite(values)
        if shown.any():
            fig.add_scatter(
                x=np.round(unedited[shown], 4),
                y=np.round(values[shown], 4),
                mode="markers",
                name=name,
                marker={"color": color, "symbol": symbol, "size": 9, "opacity": 0.7},
                customdata=texts[shown].tolist(),
                hovertemplate=f"%{{customdata}}<br>unedited %{{x:.3f}}<br>{name} %{{y:.3f}}<extra></extra>",
            )
    theme.themed(
        fig, title=f"{title} (n={int(measured.sum()):,})", x=f"{unit}, unedited", y=f"{unit}, edited", height=440
    )
    theme.make_room(fig)
    square = {"range": [-0.03, 1.03], "constrain": "domain", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    fig.update_xaxes(**square)
    fig.update_yaxes(**square, scaleanchor="x")
    return fig
