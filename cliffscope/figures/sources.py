"""Which tokens does a head read, and what does each make it write against refusal?

One bar a source token: how much of the head's write against refusal at the final position comes from it, with the
attention that it gets on hover. What is not shown is summed up in a bar of its own, so that the bars add up.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]


def source_bars(
    tokens: Sequence[str],
    spans: Sequence[str],
    attention: FloatArray,
    against: FloatArray,
    *,
    most: int = 24,
    title: str = "Tokens that the head reads",
) -> go.Figure:
    """The sources that matter most, in the order of the text.

    Args:
        tokens: [source] text of each token.
        spans: [source] its span.
        attention: [source] attention that it gets.
        against: [source] logit that the head takes from refusal on account of it.
        most: sources shown.
        title: Title.
    """
    if not tokens or not np.isfinite(against).any():
        return theme.empty_figure(title, "No source token was measured.")
    shown = np.sort(np.argsort(-np.abs(against), kind="stable")[:most])
    names = [f"{theme.label(tokens[i])} · {i}" for i in shown]
    values, seen = against[shown], attention[shown]
    hover = [f"{theme.caption(spans[i])}, attention {a:.3f}" for i, a in zip(shown, seen, strict=True)]
    left = len(tokens) - len(shown)
    if left:
        names.append(f"{left} others")
        values = np.append(values, against.sum() - against[shown].sum())
        hover.append(f"attention {attention.sum() - seen.sum():.3f}")
    colors = [theme.VERMILLION if value > 0 else theme.BLUE for value in values]
    fig = go.Figure(
        go.Bar(
            x=np.round(values, 4),
            y=names,
            orientation="h",
            marker={"color": colors},
            customdata=hover,
            hovertemplate="%{y}<br>%{x:.3f} logits<br>%{customdata}<extra></extra>",
        )
    )
    theme.themed(fig, title=title, x="contribution against refusal (logit)", y="", height=110 + 18 * len(names))
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    fig.update_xaxes(zeroline=True, zerolinecolor=theme.GREY, zerolinewidth=1)
    return fig
