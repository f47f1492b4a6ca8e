"""What does each arm measure, quantity by quantity?

One panel a quantity with its own unit, one row an arm, each value with its interval. Made for side effects, and for a
model before and after its repair. It knows no result class.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cliffscope.figures import theme

MOST_COLUMNS = 3
"""Panels side by side; more would have no room for their axes."""
_COLORS = {"top": theme.BLUE, "after": theme.BLUE, "random": theme.GREY}


def measure_panels(frame: pd.DataFrame, *, share: bool = False, title: str = "Measures by arm") -> go.Figure:
    """One panel a quantity, one row an arm.

    Args:
        frame: One row a quantity and arm, in the order to show: measure (name, with its unit), arm (several values of
            one name share a row), kind (`top`, `after`, `random` or another: the colour), value, ci_low, ci_high, n.
        share: Whether all quantities are shares, on axes from 0 to 100%.
        title: Title.

    Returns:
        The figure, or one that says that nothing was measured.
    """
    measured = frame[np.isfinite(frame["value"].to_numpy(float))] if len(frame) else frame
    if not len(measured):
        return theme.empty_figure(title, "Nothing was measured.")
    measures, arms = measured["measure"].astype(str).unique(), measured["arm"].astype(str).unique()
    width = min(MOST_COLUMNS, len(measures))
    height = -(-len(measures) // width)
    fig = make_subplots(
        rows=height, cols=width, shared_yaxes=True, horizontal_spacing=0.06, vertical_spacing=0.3 / height
    )
    theme.themed(fig, title=title, x="", y="", height=height * (100 + 34 * len(arms)) + 60)
    for place, measure in enumerate(measures):
        cell = {"row": place // width + 1, "col": place % width + 1}
        part = measured[measured["measure"] == measure]
        for line, arm in enumerate(arms):
            _add_arm(fig, part[part["arm"] == arm], line, cell)
        n = _n(part["n"].to_numpy(float))
        fig.update_xaxes(title_text=f"{theme.caption(measure, limit=48)} ({n})", **cell)
    names = [theme.caption(name, limit=28) for name in arms]
    fig.update_yaxes(tickvals=list(range(len(arms))), ticktext=names, range=[len(arms) - 0.5, -0.5], showgrid=False)
    if share:
        fig.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    fig.update_layout(showlegend=False)
    return fig


def _add_arm(fig: go.Figure, rows: pd.DataFrame, line: int, cell: dict[str, int]) -> None:
    if not len(rows):
        return
    value, low, high = (rows[name].to_numpy(float) for name in ("value", "ci_low", "ci_high"))
    color, one = _COLORS.get(str(rows["kind"].iloc[0]), theme.INK), len(rows) == 1
    name = theme.caption(str(rows["arm"].iloc[0]), limit=40)
    values = zip(value, low, high, rows["n"].to_numpy(float), strict=True)
    fig.add_scatter(
        x=np.round(value, 5),
        y=line + (np.zeros(1) if one else theme.jitter(len(rows), 0.24)),
        mode="markers",
        marker={"color": color, "size": 11 if one else 7, "opacity": 1 if one else 0.55},
        error_x=theme.error_bars(value, low, high, color) if one else None,
        customdata=[f"{name}<br>{v:.4g} {theme.bounds(a, b)}, {_n(np.array([n]))}" for v, a, b, n in values],
        hovertemplate="%{customdata}<extra></extra>",
        **cell,
    )


def _n(counts: NDArray[np.floating]) -> str:
    stored = counts[np.isfinite(counts)]
    if not stored.size:
        return "n not stored"
    least, most = int(stored.min()), int(stored.max())
    return f"n={least:,}" if least == most else f"n={least:,} to {most:,}"
