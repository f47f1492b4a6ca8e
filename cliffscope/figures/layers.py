"""At which layers and positions is the mean refusal score high, group by group?"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]


def layer_grids(
    grids: Mapping[str, FloatArray],
    labels: Sequence[str],
    spans: Sequence[str],
    *,
    counts: Mapping[str, int],
    probe_layer: int | None = None,
    title: str = "Mean refusal score by layer and position",
) -> go.Figure:
    """Mean scores of every layer on the common axis, one heat map a group, under one another.

    Args:
        grids: [layer, bin] mean score in [0, 1] by group; NaN where no transcript has a token.
        labels: [bin] names of the positions, untrusted.
        spans: [bin] span of each.
        counts: transcripts by group.
        probe_layer: layer that is outlined.
        title: title.
    """
    if not grids:
        return theme.empty_figure(title, "No transcript was traced.")
    names = [f"{theme.caption(name, limit=40)} (n={counts[name]})" for name in grids]
    fig = make_subplots(rows=len(grids), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.12)
    places = list(range(len(labels)))
    shown = [f"{theme.caption(span, limit=20)}: {theme.label(text)}" for text, span in zip(labels, spans, strict=True)]
    for line, grid in enumerate(grids.values(), 1):
        fig.add_heatmap(
            x=places,
            y=list(range(len(grid))),
            z=np.round(grid, 3).tolist(),
            zmin=0,
            zmax=1,
            colorscale=theme.SEQUENTIAL,
            colorbar=theme.colorbar("refusal score", ticks=(0.0, 0.5, 1.0)),
            showscale=line == 1,
            customdata=[shown] * len(grid),
            hovertemplate="%{customdata}<br>layer %{y}<br>mean score %{z:.3f}<extra></extra>",
            row=line,
            col=1,
        )
        for place, (before, after) in enumerate(pairwise(spans)):
            if before != after:
                mark = {"color": theme.GREY, "width": 1, "dash": "dot"}
                fig.add_vline(x=place + 0.5, line=mark, row=line, col=1)
        if probe_layer is not None and probe_layer < len(grid):
            corners = {"x0": -0.5, "x1": len(labels) - 0.5, "y0": probe_layer - 0.5, "y1": probe_layer + 0.5}
            fig.add_shape(type="rect", **corners, line={"color": theme.INK, "width": 1.5}, row=line, col=1)
    layers = max(len(grid) for grid in grids.values())
    height = 120 + len(grids) * int(np.clip(60 + 11 * layers, 150, 420))
    theme.themed(fig, title=title, x="", y="layer", height=height)
    fig.update_xaxes(showgrid=False, tickmode="array", tickvals=places, ticktext=shown, tickangle=-45)
    fig.update_yaxes(showgrid=False, title_text="layer")
    return fig
