"""How well does a probe of one source tell refusals of another?"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
_DARK = 0.3
"""Distance from chance beyond which a cell is so dark that its number is written in white."""
_SCALE = [[1 - stop, color] for stop, color in reversed(theme.DIVERGING)]
"""Blue above chance, red below it, as in `probe_quality`."""


def transfer_heat(
    sources: Sequence[str], auroc: FloatArray, low: FloatArray, high: FloatArray, *, title: str
) -> go.Figure:
    """AUROC of probes by the source that they were fitted on and the source that they are tested on.

    Args:
        sources: [source] names.
        auroc: [fit_source, test_source] held-out AUROC in [0, 1]; NaN where it was not measured.
        low: [fit_source, test_source] lower bound.
        high: [fit_source, test_source] upper bound.
        title: title, with n.
    """
    if auroc.size == 0 or not np.isfinite(auroc).any():
        return theme.empty_figure(title, "No probe was tested.")
    names = [theme.caption(name, limit=24) for name in sources]
    hover = "fitted on %{y}, tested on %{x}<br>AUROC %{z:.3f} %{customdata}<extra></extra>"
    fig = go.Figure(
        go.Heatmap(
            z=np.round(auroc, 3).tolist(),
            x=names,
            y=names,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            colorscale=_SCALE,
            colorbar=theme.colorbar("AUROC", ticks=(0.0, 0.5, 1.0)),
            customdata=[
                [theme.bounds(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)
            ],
            hovertemplate=hover,
        )
    )
    theme.themed(fig, title=title, x="tested on", y="fitted on", height=170 + 34 * len(names))
    for row, line in enumerate(auroc):
        for column, value in enumerate(line):
            if np.isfinite(value):
                color = "#ffffff" if abs(value - 0.5) > _DARK else theme.INK
                fig.add_annotation(
                    x=names[column], y=names[row], text=f"{value:.2f}", showarrow=False, font={"color": color}
                )
    fig.update_yaxes(autorange="reversed", showgrid=False, type="category")
    fig.update_xaxes(showgrid=False, type="category")
    theme.cross_missing(fig, auroc, names, names)
    return fig
