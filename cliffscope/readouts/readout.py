"""What is read at one position to say whether the answer will refuse?

A readout turns a residual stream into a logit: high where the answer will refuse. `RefusalProbe` reads a direction of
one layer's residual; `AnswerReadout` reads the model's own next-token distribution. Whatever measures an effect on
refusal (sweeps, attribution, control sets) takes a `Readout` and knows no more of it than this file says, so that a
user's own readout is a subclass.

1. The residual is `blocks.{layer}.hook_resid_post` at the final position, and, where the readout names continuations,
   at each of their tokens too.
2. `logits` maps these residuals to one number; it is differentiable, since attribution needs its gradient.
3. `report.can_tell` says whether the number means anything on held-out transcripts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.readouts.activations import LONG, Intervention, length_batches, run_decoder
from cliffscope.readouts.continuations import NOTHING, Continuations
from cliffscope.transcripts.transcript import TokenizedTranscript


@runtime_checkable
class ReadoutReport(Protocol):
    """What a readout can tell on held-out transcripts."""

    @property
    def can_tell(self) -> bool:
        """Whether it tells refused from complied at the final position."""


class Readout(ABC):
    """A number read off the residual stream at the final position, high where the answer will refuse."""

    name: str
    """What it is, in one word, for tables and figures."""
    layer: int
    """Last layer whose residual it reads; heads above it cannot change it."""
    refused_logit: float
    """Mean logit of held-out refused transcripts: what there is to restore is measured against it."""
    fingerprint: str
    """Of the model that it was fitted on."""
    template: str
    """Name of the template that it was fitted with; "" where that is not recorded."""
    report: ReadoutReport
    """What it can tell on held-out transcripts."""

    @property
    def continuations(self) -> Continuations:
        """Tokens after the final position at which it reads too; none unless a readout says otherwise."""
        return NOTHING

    @abstractmethod
    def logits(self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]) -> Float[Tensor, "*batch"]:
        """Its logits.

        Args:
            model: the model that the residuals come from.
            residuals: `hook_resid_post` of `layer`, in any dtype and on any device: at the final position, then at
                each token of `continuations`.

        Returns:
            One fp32 logit for each entry of the batch, with a gradient where the residuals have one.
        """

    def check_model(self, model: LensModel) -> None:
        """Raises ProbeError if the readout does not fit the model's layers, width or template."""
        if not 0 <= self.layer < model.shape.n_layers:
            raise ProbeError(
                f"The {self.name} readout reads layer {self.layer}, but {model.name!r} has {model.shape.n_layers} "
                "layers. Fit it on this model."
            )
        if self.template and self.template != model.template.name:
            raise ProbeError(
                f"The {self.name} readout was fitted with template {self.template!r}, but {model.name!r} is loaded "
                f"with {model.template.name!r}, which closes the thinking in another way. Fit it with this template, "
                f"or load the model with template={self.template!r}."
            )


def read_final(
    model: LensModel,
    readout: Readout,
    transcripts: Sequence[TokenizedTranscript],
    *,
    edit: Intervention | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float32[np.ndarray, " transcript"]:
    """The readout at the final position of every transcript.

    Args:
        model: the model.
        readout: any that fits the model.
        transcripts: tokens; answers are ignored.
        edit: done to the model during the passes.
        progress: called with the number of transcripts done.

    Returns:
        Logits in the order of the transcripts. Memory is one batch and what is read of it.

    Raises:
        ProbeError: the readout does not fit the model.
    """
    logits = np.zeros(len(transcripts), np.float32)
    for batch, residuals in gather_nodes(model, readout, transcripts, edit=edit, progress=progress):
        with torch.inference_mode():
            logits[batch] = readout.logits(model, residuals).float().cpu().numpy()
    return logits


def gather_nodes(
    model: LensModel,
    readout: Readout,
    transcripts: Sequence[TokenizedTranscript],
    *,
    edit: Intervention | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "transcript node d_model"]]]:
    """What a readout reads, batch by batch; arguments and errors as of `read_final`.

    Yields:
        Indices of transcripts, and their residuals at the final position and at the readout's continuations.
    """
    readout.check_model(model)
    rows = [readout.continuations.rows(transcript) for transcript in transcripts]
    done = 0
    # Paths of one transcript stay together: its logit may need all of them.
    for batch in length_batches([len(paths) * max(row.n_pos for row in paths) for paths in rows]):
        yield batch, _gather(model, readout, [row for i in batch for row in rows[i]], edit)
        done += len(batch)
        if progress is not None:
            progress(done)


def _gather(
    model: LensModel, readout: Readout, rows: Sequence[TokenizedTranscript], edit: Intervention | None
) -> Float[Tensor, "transcript node d_model"]:
    """Residuals at the final position and at the continuations, of rows that are the paths of whole transcripts."""
    tree, first = readout.continuations, 0
    residuals: dict[tuple[int, int], Float[Tensor, " d_model"]] = {}

    def visit(layer: int, hidden: Float[Tensor, "row pos d_model"], start: int) -> None:
        if layer == readout.layer:
            for i in range(len(hidden)):
                row = rows[first + i]
                for position in range(max(row.final, start), min(row.n_pos, start + hidden.shape[1])):
                    residuals[first + i, position - row.final] = hidden[i, position - start]

    # A long row goes through in chunks where it is alone.
    size = 1 if max(row.n_pos for row in rows) > LONG else len(rows)
    with model.only_blocks(0, readout.layer):
        for first in range(0, len(rows), size):
            run_decoder(model, rows[first : first + size], visit, edit)
    nodes = [
        residuals[start + path, behind]
        for start in range(0, len(rows), len(tree.paths))
        for path, behind in tree.places
    ]
    return rearrange(nodes, "(transcript node) d_model -> transcript node d_model", node=len(tree) + 1)
