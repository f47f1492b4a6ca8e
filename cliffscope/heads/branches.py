"""What is one counterfactual, and what would a plain forward pass make of it?

A branch is a set of heads to edit in a transcript; a change says what is done to their `hook_z`; a job is all branches
of one sweep with the readout that reads them. `plain_logit` is the slow, obvious answer that every fast path must
equal: one hooked forward pass of the plain modules for each path of the readout's continuations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

from cliffscope.heads.editing import edited_hooks
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef, Scope
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.transcript import TokenizedTranscript

AGREEMENT = 1e-4
"""Largest difference of a fast path from the plain one, relative to the larger of 1 and the clean logit, in fp32."""

Branch = tuple[HeadRef, ...]
BranchValues = Float[Tensor, "layer value_pos head d_head"]
"""What is added to `hook_z` of every head; one position stands for all of the scope."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What every branch does to its heads: `hook_z <- factor x hook_z + values`."""

    kind: str = EditKind.ZERO
    """Its label."""
    factor: float = 0.0
    """What `hook_z` is multiplied by."""
    values: tuple[Float[Tensor, "layer _ head d_head"], ...] = ()
    """Added values, as `BranchValues`: one tensor a transcript, or one for all."""
    preserve_norm: bool = False
    """Whether all heads of an edited layer are then scaled, position by position, back to their norm before."""

    def of(self, transcript: int) -> BranchValues | None:
        """The values for one transcript, by its index in the sweep."""
        return None if not self.values else self.values[transcript if len(self.values) > 1 else 0]

    def edit(self, branch: Branch, scope: Scope, transcript: int) -> HeadEdit:
        """The change to the heads of a branch as an edit."""
        values = self.of(transcript)
        if values is not None:
            layers, heads = [ref.layer for ref in branch], [ref.head for ref in branch]
            values = rearrange(values, "layer pos head d_head -> layer head pos d_head")[layers, heads]
        return HeadEdit(
            heads=branch,
            kind=self.kind,
            factor=self.factor,
            values=None if values is None else values.float().cpu().numpy(),
            preserve_norm=self.preserve_norm,
            scope=scope,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What stays the same over the transcripts of a sweep."""

    model: LensModel
    """The model."""
    readout: Readout
    """Whose logit is read at the final position."""
    branches: tuple[Branch, ...]
    """Sets of heads, each edited on its own."""
    change: Change
    """What is done to them."""
    scope: Scope
    """Where."""

    def logits(self, residuals: Float[Tensor, "*batch node d_model"]) -> Float32[np.ndarray, "*batch"]:
        """The readout's logits of residuals at the final position and at its continuations."""
        return np.asarray(self.readout.logits(self.model, residuals).float().cpu().numpy())

    def first_layer(self, branch: int) -> int:
        """Where a branch begins to differ; above every layer if it edits nothing."""
        return min((ref.layer for ref in self.branches[branch]), default=self.model.shape.n_layers)

    def seen(self) -> list[int]:
        """The branches that can change what is read: a head above the readout's layer cannot."""
        return [i for i in range(len(self.branches)) if self.first_layer(i) <= self.readout.layer]

    def agrees(self, logit: float, expected: float) -> bool:
        """Whether two logits are the same within the tolerance of the model's dtype; NaN agrees with NaN alone."""
        if np.isnan(expected):
            return bool(np.isnan(logit))
        allowed = AGREEMENT if self.model.dtype == torch.float32 else 0.1
        return abs(logit - expected) <= allowed * max(1.0, abs(expected))


def plain_logit(job: Job, transcript: TokenizedTranscript, index: int, branch: Branch = ()) -> float:
    """The readout's logit at the final position by hooked forward passes.

    Args:
        job: the sweep.
        transcript: tokens; the answer is ignored.
        index: the transcript's index in the sweep, for values of its own.
        branch: heads to edit; none gives the clean logit.
    """
    model, tree = job.model, job.readout.continuations
    edit = job.change.edit(branch, job.scope, index)
    behind: list[Float[Tensor, "pos d_model"]] = []

    def visit(layer: int, hidden: Float[Tensor, "1 pos d_model"]) -> None:
        if layer == job.readout.layer:
            behind.append(hidden[0, transcript.final :])

    for row in tree.rows(transcript):
        batch = model.to_batch([row.token_ids.tolist()])
        with torch.inference_mode(), edited_hooks(model, edit, [row]), model.residual_hook(visit):
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
    with torch.inference_mode():
        return float(job.logits(torch.stack([behind[path][depth] for path, depth in tree.places])))


def edits_by_layer(job: Job, rows: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, list[int]]]]]:
    """For each edited layer that the readout sees: which row edits which heads, a row being a branch's index."""
    heads: dict[int, dict[int, list[int]]] = {}
    for row, branch in enumerate(rows):
        for ref in job.branches[branch]:
            if ref.layer <= job.readout.layer:
                heads.setdefault(ref.layer, {}).setdefault(row, []).append(ref.head)
    for layer, by_row in heads.items():
        yield layer, list(by_row.items())
