"""Where, along a transcript and through the layers, is the intention to refuse held and lost?

`mean_trace` is the cliff: groups of transcripts aligned on their spans, so that the closing tokens keep a place of
their own and are never averaged into the thinking. `token_trace` and `layer_heat` show one transcript.
`probe_quality` says where the score can be believed. None of them knows a model, a probe or a result class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from cliffscope.figures import theme

FloatArray = NDArray[np.floating]
MOST_NAMED = 64
"""More tokens than this cannot be named on one axis and stay legible."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Band:
    """One group's mean refusal score along the aligned bins."""

    mean: FloatArray
    """[bin] mean score; NaN where no transcript has the bin."""
    low: FloatArray
    """[bin] lower bound of the interval; NaN where it is undefined."""
    high: FloatArray
    """[bin] upper bound of the interval; NaN where it is undefined."""
    n: NDArray[np.integer]
    """[bin] transcripts in the mean."""


def mean_trace(
    labels: Sequence[str],
    spans: Sequence[str],
    groups: Mapping[str, Band],
    *,
    n: int | None = None,
    title: str = "Mean refusal score, aligned on spans",
    unit: str = "refusal score",
) -> go.Figure:
    """The mean trace of each group over aligned bins, with its interval as a band.

    Args:
        labels: [bin] names, for instance "thinking 3/10"; a closing bin bears its token.
        spans: [bin] the span of each bin, in order: runs of equal names are marked and labelled.
        groups: Band by group name; the names choose the colours.
        n: Transcripts in all, where groups share some; None adds up the groups.
        title: Title; n is added, that of each group stands in the legend.
        unit: What the vertical axis measures, in [0, 1].

    Returns:
        The figure, or one that says that no group holds a transcript.
    """
    drawn = {name: band for name, band in groups.items() if np.isfinite(band.mean).any()}
    if not drawn:
        return theme.empty_figure(title, "No group has a transcript that could be measured.")
    fig = go.Figure()
    runs = list(dict.fromkeys(name.rpartition(": ")[0] for name in drawn))
    for index, (name, band) in enumerate(drawn.items()):
        _add_band(fig, name, band, labels, index)
        if len(runs) > 1:
            # Of several runs each has one kind of line, and each group its colour and mark.
            dash = theme.DASHES[runs.index(name.rpartition(": ")[0]) % len(theme.DASHES)]
            fig.data[-1].update(line_dash=dash, marker_symbol=theme.group_mark(name.rpartition(": ")[2], index)[1])
    total = sum(int(np.max(band.n, initial=0)) for band in drawn.values()) if n is None else n
    shown = f"{title} (n={total:,} transcripts)"
    theme.themed(fig, title=shown, x="position, aligned on spans", y=f"mean {unit}", height=420)
    fig.update_yaxes(range=[-0.03, 1.03], tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_layout(hovermode="x unified", legend={"y": 1.09})
    theme.make_room(fig, above=22)
    _name_bins(fig, labels, spans)
    _mark_spans(fig, spans)
    return fig


def token_trace(
    tokens: Sequence[str],
    spans: Sequence[str],
    score: FloatArray,
    *,
    title: str = "Refusal score by token",
) -> go.Figure:
    """The refusal score at every token of one transcript.

    Args:
        tokens: [pos] token texts, untrusted.
        spans: [pos] span of each token.
        score: [pos] refusal score in [0, 1].
        title: Title.
    """
    if not tokens:
        return theme.empty_figure(title, "The transcript has no token.")
    fig = go.Figure(
        go.Scatter(
            x=_positions(tokens),
            y=np.round(score, 4),
            mode="lines+markers" if len(tokens) <= MOST_NAMED else "lines",
            line={"color": theme.BLUE, "width": 2, "shape": "hvh"},
            marker={"size": 5},
            hovertemplate="%{x}<br>score %{y:.3f}<extra></extra>",
        )
    )
    theme.themed(fig, title=f"{title} ({len(tokens):,} tokens)", x="token position", y="refusal score", height=300)
    fig.update_yaxes(range=[-0.02, 1.02])
    _name_tokens(fig, tokens)
    _mark_spans(fig, spans)
    return fig


def layer_heat(
    tokens: Sequence[str],
    spans: Sequence[str],
    score: FloatArray,
    *,
    probe_layer: int | None = None,
    title: str = "Refusal score by layer and token",
) -> go.Figure:
    """The score of one transcript at every layer and token.

    Args:
        tokens: [pos] token texts, untrusted.
        spans: [pos] span of each token.
        score: [layer, pos] refusal score in [0, 1], of the probe of each layer.
        probe_layer: The layer whose probe the report uses; outlined.
        title: Title.
    """
    if not tokens or score.size == 0:
        return theme.empty_figure(title, "No layer was scored for this transcript.")
    n_layers = score.shape[0]
    fig = go.Figure(
        go.Heatmap(
            x=_positions(tokens),
            z=np.round(score, 3).tolist(),
            zmin=0,
            zmax=1,
            colorscale=theme.SEQUENTIAL,
            colorbar=theme.colorbar("refusal score", ticks=(0.0, 0.5, 1.0)),
            hovertemplate="%{x}<br>layer %{y}<br>score %{z:.3f}<extra></extra>",
        )
    )
    named = 60 if len(tokens) <= MOST_NAMED else 0
    height = named + int(np.clip(160 + 11 * n_layers, 220, 520))
    theme.themed(fig, title=f"{title} ({len(tokens):,} tokens)", x="token position", y="layer", height=height)
    fig.update_yaxes(range=[-0.5, n_layers - 0.5], showgrid=False, tickformat="d", **_layer_ticks(n_layers))
    fig.update_xaxes(showgrid=False)
    if probe_layer is not None and 0 <= probe_layer < n_layers:
        _outline(fig, x0=-0.5, x1=len(tokens) - 0.5, y0=probe_layer - 0.5, y1=probe_layer + 0.5)
    theme.cross_missing(fig, score, _positions(tokens), range(n_layers))
    _name_tokens(fig, tokens)
    _mark_spans(fig, spans, shade=False)
    return fig


def probe_quality(
    regions: Sequence[str],
    layers: Sequence[int],
    auroc: FloatArray,
    low: FloatArray,
    high: FloatArray,
    *,
    probe_layer: int | None = None,
    title: str = "Held-out AUROC of the probe by layer and position",
) -> go.Figure:
    """How well the probe of each layer tells refused from complied at each position.

    Args:
        regions: [region] names of positions, in order.
        layers: [layer] layer numbers.
        auroc: [layer, region] held-out AUROC in [0, 1]; NaN where it was not measured.
        low: [layer, region] lower bound.
        high: [layer, region] upper bound.
        probe_layer: The layer that the report uses; outlined.
        title: Title, with n.
    """
    if auroc.size == 0 or not np.isfinite(auroc).any():
        return theme.empty_figure(title, "The probe was not evaluated, because one of its classes is empty.")
    names = [theme.caption(region, limit=40) for region in regions]
    fig = go.Figure(
        go.Heatmap(
            x=names,
            y=[str(layer) for layer in layers],
            z=np.round(auroc, 3).tolist(),
            zmin=0,
            zmax=1,
            xgap=1,
            colorscale=[[stop, color] for stop, color in _AUROC_SCALE],
            customdata=[
                [theme.bounds(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)
            ],
            colorbar=theme.colorbar("AUROC", ticks=(0.0, 0.5, 1.0)),
            hovertemplate="layer %{y}, %{x}<br>AUROC %{z:.3f} %{customdata}<extra></extra>",
        )
    )
    height = int(np.clip(190 + 10 * len(layers), 240, 620))
    theme.themed(fig, title=title, x="position", y="layer", height=height)
    fig.update_xaxes(showgrid=False, type="category", tickangle=-35)
    fig.update_yaxes(showgrid=False, type="category", nticks=16)
    theme.cross_missing(fig, auroc, names, [str(layer) for layer in layers])
    if probe_layer is not None and probe_layer in layers:
        row = list(layers).index(probe_layer)
        _outline(fig, x0=-0.5, x1=len(regions) - 0.5, y0=row - 0.5, y1=row + 0.5)
    return fig


def bands_of(aligned: pd.DataFrame) -> tuple[list[str], list[str], dict[str, Band]]:
    """Labels and spans of the aligned bins, and the curve of each group."""
    bins = aligned.drop_duplicates("bin").sort_values("bin")
    order = bins["bin"].to_list()
    groups = {}
    for name, rows in aligned.groupby("group", sort=False):
        placed = rows.drop_duplicates("bin").set_index("bin").reindex(order)
        values = {key: pd.to_numeric(placed[key], errors="coerce") for key in ("mean", "ci_low", "ci_high", "n")}
        groups[str(name)] = Band(
            mean=values["mean"].to_numpy(float),
            low=values["ci_low"].to_numpy(float),
            high=values["ci_high"].to_numpy(float),
            n=values["n"].fillna(0).to_numpy(int),
        )
    return bins["label"].astype(str).to_list(), bins["span"].astype(str).to_list(), groups


def quality_grids(frame: pd.DataFrame) -> tuple[list[str], list[int], FloatArray, FloatArray, FloatArray]:
    """Regions, layers, and [layer, region] AUROC with its bounds, from a table of layer, region, auroc and bounds."""
    regions = list(dict.fromkeys(frame["region"].astype(str))) if len(frame) else []
    layers = sorted(int(layer) for layer in frame["layer"].dropna().unique()) if len(frame) else []
    placed = frame.assign(region=frame["region"].astype(str)).drop_duplicates(["layer", "region"])
    wide = {
        name: placed.pivot(index="layer", columns="region", values=name)
        .reindex(index=layers, columns=regions)
        .apply(pd.to_numeric, errors="coerce")
        .to_numpy(float)
        for name in ("auroc", "auroc_low", "auroc_high")
    }
    return regions, layers, wide["auroc"], wide["auroc_low"], wide["auroc_high"]


_AUROC_SCALE = tuple((1 - stop, color) for stop, color in reversed(theme.DIVERGING))


def _add_band(fig: go.Figure, name: str, band: Band, labels: Sequence[str], index: int) -> None:
    color, place = theme.group_color(name, index), np.arange(len(labels))
    dash, symbol = theme.group_mark(name, index)
    bounded = np.isfinite(band.low) & np.isfinite(band.high)
    shown = f"{theme.caption(name, limit=40)} (n={int(np.max(band.n, initial=0)):,})"
    if bounded.any():
        fig.add_scatter(
            x=np.concatenate([place[bounded], place[bounded][::-1]]),
            y=np.round(np.concatenate([band.high[bounded], band.low[bounded][::-1]]), 4),
            fill="toself",
            fillcolor=theme.fade(color, 0.16),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    rows = zip(band.low, band.high, band.n, strict=True)
    fig.add_scatter(
        x=place,
        y=np.round(band.mean, 4),
        mode="lines+markers",
        name=shown,
        legendgroup=name,
        line={"color": color, "width": 2, "dash": dash},
        marker={"size": 6, "symbol": symbol, "color": color},
        customdata=[f"{theme.bounds(low, high)} n={int(n)}" for low, high, n in rows],
        hovertemplate="%{y:.3f} %{customdata}",
    )


def _positions(tokens: Sequence[str]) -> list[str]:
    return [f"{place} · {theme.label(token)}" for place, token in enumerate(tokens)]


def _name_bins(fig: go.Figure, labels: Sequence[str], spans: Sequence[str]) -> None:
    shown = [_bin_name(name, span) for name, span in zip(labels, spans, strict=True)]
    fig.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=shown,
        tickangle=-45,
        range=[-0.6, len(labels) - 0.4],
        showgrid=False,
    )


def _bin_name(name: str, span: str) -> str:
    # The span's own name is written above its run; on the axis only what differs from bin to bin is worth the ink.
    return theme.caption(name.removeprefix(f"{span} "), limit=18) if name.startswith(f"{span} ") else theme.label(name)


def _name_tokens(fig: go.Figure, tokens: Sequence[str]) -> None:
    fig.update_xaxes(type="category", range=[-0.5, len(tokens) - 0.5], showgrid=False)
    places = _positions(tokens)
    if len(tokens) <= MOST_NAMED:
        # The space that begins most words is left to the hover: on every tick it would only be noise.
        named = [theme.label(token.removeprefix(" ") or token, limit=14) for token in tokens]
        fig.update_xaxes(tickmode="array", tickvals=places, ticktext=named, tickangle=-90, title_text="token")
        fig.update_xaxes(tickfont={"size": 10, "family": theme.MONO})
        return
    step = next(size for size in (10, 20, 50, 100, 200, 500, 1000, 10**9) if len(tokens) / size <= 12)
    fig.update_xaxes(tickmode="array", tickvals=places[::step], ticktext=[str(i) for i in range(0, len(tokens), step)])


def _mark_spans(fig: go.Figure, spans: Sequence[str], *, shade: bool = True) -> None:
    start = 0
    for span, run in groupby(spans):
        stop = start + len(list(run))
        if start:
            line = {"color": theme.GREY, "width": 1, "dash": "dot"}
            fig.add_shape(type="line", x0=start - 0.5, x1=start - 0.5, y0=0, y1=1, yref="paper", line=line)
        if shade and span == "closing":
            ground = theme.fade(theme.GREY, 0.12)
            shape = {"x0": start - 0.5, "x1": stop - 0.5, "fillcolor": ground, "line": {"width": 0}, "layer": "below"}
            fig.add_shape(type="rect", y0=0, y1=1, yref="paper", **shape)
        fig.add_annotation(
            text=theme.caption(span, limit=20),
            x=(start + stop - 1) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            font={"size": 11},
        )
        start = stop


def _outline(fig: go.Figure, *, x0: float, x1: float, y0: float, y1: float) -> None:
    fig.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, line={"color": theme.INK, "width": 1.5})


def _layer_ticks(n_layers: int) -> dict[str, object]:
    step = next(size for size in (1, 2, 4, 8, 16, 32, 10**6) if n_layers / size <= 16)
    return {"tickmode": "array", "tickvals": list(range(0, n_layers, step))}
