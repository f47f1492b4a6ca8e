"""At which layers and positions does the refusal score fall, on average over many transcripts?

1. Every layer's own probe scores every token, a few transcripts at a time.
2. Each transcript is put on the common axis (axis.py), layer by layer, and added to the sum of its group; nothing else
   of it is kept, so that memory does not grow with the number of transcripts.

Scores of different layers come from probes that were fitted each on its own layer: compare them with
`probe.report.by_region`, which says where each can tell. Knows no heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import expit

from cliffscope.errors import SpanError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import Intervention, project_residuals
from cliffscope.readouts.axis import align_row, axis_table, closing_width
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import group_name
from cliffscope.transcripts.records import Omission, Transcript, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AT_ONCE = 32
"""Transcripts whose scores are held at a time: enough to fill a batch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerMeans(Plotted):
    """Mean refusal scores by group, layer and aligned position."""

    frame: pd.DataFrame
    """One row a cell: group, layer, bin, label, span, mean (refusal score, 0 to 1), n (transcripts that have it)."""
    probe_layer: int
    """Layer that the probe reads."""
    omitted: tuple[Omission, ...]
    """Transcripts that were left out, and why."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The probe's layer at the final position: group, mean, n."""
        last = (self.frame["layer"] == self.probe_layer) & (self.frame["bin"] == self.frame["bin"].max())
        table: pd.DataFrame = self.frame[last][["group", "mean", "n"]].reset_index(drop=True)
        return table

    def plot(self) -> "Figure":
        """A heat map of layer by position for each group; the probe's layer is outlined."""
        from cliffscope.figures.layers import layer_grids

        bins = self.frame.drop_duplicates("bin").sort_values("bin")
        grids, counts = {}, {}
        for name, part in self.frame.groupby("group", sort=False):
            grids[str(name)] = part.pivot(index="layer", columns="bin", values="mean").to_numpy(float)
            counts[str(name)] = int(part["n"].max())
        return layer_grids(
            grids, bins["label"].tolist(), bins["span"].tolist(), counts=counts, probe_layer=self.probe_layer
        )

    def __repr__(self) -> str:
        """One line: groups with n, layers, how many were left out."""
        groups = ", ".join(f"{name} n={part['n'].max()}" for name, part in self.frame.groupby("group", sort=False))
        return f"LayerMeans({groups}; {self.frame['layer'].nunique()} layers, left out {len(self.omitted)})"


def layer_means(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Transcripts,
    *,
    by: Callable[[Transcript], str] | None = None,
    edit: Intervention | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerMeans:
    """Averages every layer's refusal scores over transcripts, on a common axis.

    Args:
        model: the model.
        probe: fitted on this model.
        transcripts: with thinking, if the model thinks.
        by: names the group of a transcript; None takes harmfulness and outcome.
        edit: done to the model meanwhile.
        progress: called with the number of transcripts done.

    Returns:
        The means. Memory is that of 32 transcripts at all layers, and of one grid a group.

    Raises:
        ProbeError: the probe does not fit the model.
        SpanError: not one transcript could be traced; the message holds the first reason.
    """
    probe.check_model(model)
    tokens, omitted = model.tokenize_all(transcripts)
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise SpanError(f"None of {len(transcripts)} transcripts can be traced: {why}. Give transcripts with thinking.")
    names = {t.id: str((by or group_name)(t)) for t in transcripts}
    axis = axis_table(tokens, model.tokenizer, closing_width(tokens))
    width = int((axis["span"] == "closing").sum())
    sums: dict[str, Float[np.ndarray, "layer bin"]] = {}
    counts: dict[str, Float[np.ndarray, "layer bin"]] = {}
    for first in range(0, len(tokens), AT_ONCE):
        part = tokens[first : first + AT_ONCE]
        every = project_residuals(model, part, probe.layer_weights, probe.layer_biases, edit=edit)
        for row, logits in zip(part, every, strict=True):
            grid = np.stack([align_row(row, scores, width) for scores in expit(logits)])
            name = names[row.id]
            sums[name] = sums.get(name, np.zeros(grid.shape)) + np.nan_to_num(grid, nan=0.0)
            counts[name] = counts.get(name, np.zeros(grid.shape)) + np.isfinite(grid)
        if progress is not None:
            progress(first + len(part))
    groups = dict.fromkeys(names[row.id] for row in tokens)
    table = pd.concat([_cells(name, sums[name], counts[name], axis) for name in groups], ignore_index=True)
    return LayerMeans(frame=table, probe_layer=probe.layer, omitted=omitted)


_COLUMNS: Sequence[str] = ("group", "layer", "bin", "label", "span", "mean", "n")


def _cells(
    name: str, sums: Float[np.ndarray, "layer bin"], counts: Float[np.ndarray, "layer bin"], axis: pd.DataFrame
) -> pd.DataFrame:
    """One row a layer and bin of one group."""
    n_layers, n_bins = sums.shape
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    cells = pd.concat([axis] * n_layers, ignore_index=True)
    layers = np.repeat(np.arange(n_layers), n_bins)
    return cells.assign(group=name, layer=layers, mean=means.ravel(), n=counts.ravel().astype(int))[list(_COLUMNS)]
