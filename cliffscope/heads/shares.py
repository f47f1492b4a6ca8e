"""Who writes the refusal logit, and who makes the drop?

The residual that the probe reads is the sum of what was written into it, so the logit at a position is an exact sum:

    logit = probe bias + embedding + sum over layers of (sum over heads + output bias + MLP), each . probe weight

1. A head's share at a position is (hook_z of the head . its columns of the output projection) . probe weight.
2. The parts are read from the modules that write them, and their sum is compared with the logit read off the residual;
   where a block does something else than add them, the model is refused.
3. `direct` effect of a head: minus its share at the final position. `cliff` effect: its mean share over the thinking
   minus its share at the final position, so that the effects of all parts add up to the drop of the logit.

Direct shares are exact and not causal: what a head does through later layers is not in them. Only a linear probe has
them: any other readout of a sum is no sum of readouts.
Source: direct logit attribution, as in Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from cliffscope.errors import DataError, EditError, UnsupportedModelError
from cliffscope.heads.branches import AGREEMENT, Branch
from cliffscope.heads.donors import DonorTokens
from cliffscope.heads.edits import Scope
from cliffscope.heads.methods import Effects, Method, Progress, Task
from cliffscope.model.load import LensModel
from cliffscope.readouts.activations import length_batches
from cliffscope.readouts.probe import RefusalProbe, linear_probe
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

NOT_LINEAR = (
    "A logit is a sum of what heads write only where it is linear in the residual (method='zero' needs no sum)."
)


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitShares:
    """A probe's logit as a sum, at the final position and on average over the thinking."""

    heads: Float32[np.ndarray, "n layer head"]
    """[n, layer, head] at the final position; 0 above the probe's layer."""
    mlps: Float32[np.ndarray, "n layer"]
    """[n, layer] of the MLPs."""
    biases: Float32[np.ndarray, "n layer"]
    """[n, layer] of the output projections' biases."""
    embedding: Float32[np.ndarray, " n"]
    """[n] of what enters the first block."""
    bias: float
    """The probe's."""
    logits: Float32[np.ndarray, " n"]
    """[n] the logit itself, read off the residual."""
    plateau_heads: Float32[np.ndarray, "n layer head"]
    """[n, layer, head] mean over the thinking; NaN where there is none."""

    @property
    def sums(self) -> Float32[np.ndarray, " n"]:
        """[n] the parts added up."""
        return np.asarray(
            self.heads.sum((1, 2)) + self.mlps.sum(1) + self.biases.sum(1) + self.embedding + np.float32(self.bias)
        )

    def __repr__(self) -> str:
        """One line: how much heads and MLPs write, n, and the largest error of the sum."""
        error = float(np.abs(self.sums - self.logits).max())
        return (
            f"LogitShares(heads {self.heads.sum((1, 2)).mean():+.2f}, MLPs {self.mlps.sum(1).mean():+.2f}, "
            f"n={len(self.logits)}, largest error {error:.1e})"
        )


class ShareMethod(Method):
    """A method that reads shares of the logit and edits nothing."""

    causal = False

    def check(self, scope: Scope, donors: DonorTokens | None) -> None:
        """Raises EditError for another scope than the closing: shares are read at the final position."""
        super().check(scope, donors)
        if scope is not Scope.CLOSING:
            raise EditError(
                f"method={self.name!r} edits nothing and reads shares at the final position; scope={str(scope)!r} "
                "has no meaning for it. Leave the scope out."
            )

    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """Sums of the heads' shares; see `Method.measure`."""
        shares = decompose_logit(task.model, task.readout, task.transcripts)
        by_head = self.effects(shares)
        if progress is not None:
            progress(len(task.transcripts))
        effects = [by_head[:, [h.layer for h in branch], [h.head for h in branch]].sum(1) for branch in branches]
        return Effects(clean=shares.logits, effects=np.stack(effects, axis=1).astype(np.float32), path="shares")

    @abstractmethod
    def effects(self, shares: "LogitShares") -> Float32[np.ndarray, "n layer head"]:
        """The effect of every head, positive where it writes against refusal."""


class DirectShare(ShareMethod):
    """Direct logit attribution."""

    name = "direct"
    summary = "minus the head's share of the logit at the final position"

    def effects(self, shares: "LogitShares") -> Float32[np.ndarray, "n layer head"]:
        """What the head takes from the logit."""
        return np.asarray(-shares.heads)


class CliffShare(ShareMethod):
    """Who makes the drop."""

    name = "cliff"
    summary = "the head's mean share over the thinking minus that at the final position: who makes the drop"

    def span(self, scope: Scope) -> Scope:
        """The thinking, over which shares are averaged."""
        del scope
        return Scope.THINKING

    def effects(self, shares: "LogitShares") -> Float32[np.ndarray, "n layer head"]:
        """What the head's share falls by; raises DataError where a transcript has no thinking."""
        effects = np.asarray(shares.plateau_heads - shares.heads)
        if np.isnan(effects).any():
            raise DataError(
                "method='cliff' sets the final position against the thinking, and a transcript has none. Take 'direct'."
            )
        return effects


def decompose_logit(model: LensModel, probe: Readout, transcripts: Sequence[TokenizedTranscript]) -> LogitShares:
    """Splits a probe's logit into the shares of all that write into the residual stream.

    Args:
        model: the model.
        probe: a linear one, whose logit is split.
        transcripts: tokens; answers are ignored.

    Returns:
        The shares; they sum to the logit.

    Raises:
        ProbeError: the probe does not fit the model, or the readout is no linear probe.
        DataError: there is no transcript.
        UnsupportedModelError: the parts do not sum to the logit, as where a block norms or scales what it adds.
    """
    linear = linear_probe(probe, NOT_LINEAR)
    linear.check_model(model)
    if not transcripts:
        raise DataError("No transcript was given whose logit could be split. Give at least one.")
    parts = _Parts(model, linear, transcripts)
    for rows in length_batches([t.final + 1 for t in transcripts]):
        parts.run(rows)
    shares = LogitShares(
        heads=parts.heads,
        mlps=parts.mlps,
        biases=parts.biases,
        embedding=parts.embedding,
        bias=linear.bias,
        logits=parts.logits,
        plateau_heads=parts.plateau,
    )
    error = np.abs(shares.sums - shares.logits)
    allowed = (AGREEMENT if model.dtype == torch.float32 else 0.1) * parts.scale
    if not (error <= allowed).all():
        raise UnsupportedModelError(
            f"The parts that {model.name!r} writes sum to a logit that is off by {float(error.max()):.2g}: its blocks "
            "do more than add what heads and MLPs write, such as norm it. Use method='zero'."
        )
    return shares


class _Parts:
    """Collects the shares, batch by batch."""

    def __init__(self, model: LensModel, probe: RefusalProbe, transcripts: Sequence[TokenizedTranscript]) -> None:
        n, shape = len(transcripts), model.shape
        self.model, self.probe, self.transcripts = model, probe, transcripts
        self.weight = torch.from_numpy(probe.weight).to(model.device)
        self.heads = np.zeros((n, shape.n_layers, shape.n_heads), np.float32)
        self.plateau = np.zeros((n, shape.n_layers, shape.n_heads), np.float32)
        self.mlps, self.biases = (np.zeros((n, shape.n_layers), np.float32) for _ in range(2))
        self.embedding, self.logits, self.scale = (np.zeros(n, np.float32) for _ in range(3))

    def run(self, rows: list[int]) -> None:
        """One batch of transcripts, by index."""
        model, layers = self.model, range(self.probe.layer + 1)
        tokens = [self.transcripts[i] for i in rows]
        finals = torch.tensor([t.final for t in tokens], device=model.device)
        batch = model.to_batch([t.token_ids[: t.final + 1].tolist() for t in tokens])
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(model.outputs_hook(lambda layer, z: self._see_heads(rows, layer, z)))
            stack.enter_context(model.residual_hook(lambda layer, hidden: self._see_logit(rows, finals, layer, hidden)))
            entering = model.blocks[0].register_forward_pre_hook(self._reader(self.embedding, rows, finals))
            stack.callback(entering.remove)
            for layer in layers:
                hook = self._reader(self.mlps[:, layer], rows, finals)
                handle = model.mlp(layer).register_forward_hook(lambda _m, _i, out, hook=hook: hook(None, (out,)))
                stack.callback(handle.remove)
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)

    def _see_heads(self, rows: list[int], layer: int, z: Float[Tensor, "batch pos head d_head"]) -> None:
        if layer > self.probe.layer:
            return
        projection = self.model.output_projection(layer)
        columns = self.model.output_columns(layer)
        written = einsum(columns, self.weight, "d_model head d_head, d_model -> head d_head")
        share = einsum(z.float(), written, "batch pos head d_head, head d_head -> batch pos head").cpu().numpy()
        for place, index in enumerate(rows):
            transcript = self.transcripts[index]
            self.heads[index, layer] = share[place, transcript.final]
            thinking = share[place, transcript.span(Span.THINKING)]
            self.plateau[index, layer] = thinking.mean(0) if len(thinking) else np.nan
        if projection.bias is not None:
            self.biases[rows, layer] = float(projection.bias.detach().float() @ self.weight)

    def _see_logit(
        self, rows: list[int], finals: Int[Tensor, " batch"], layer: int, hidden: Float[Tensor, "batch pos d_model"]
    ) -> None:
        if layer == self.probe.layer:
            last = hidden[torch.arange(len(rows), device=hidden.device), finals].float()
            self.logits[rows] = (last @ self.weight + self.probe.bias).cpu().numpy()
            # A logit that is the small difference of large terms is as exact as those are.
            self.scale[rows] = (last.abs() @ self.weight.abs()).clamp(min=1.0).cpu().numpy()

    def _reader(
        self, into: Float32[np.ndarray, " n"], rows: list[int], finals: Int[Tensor, " batch"]
    ) -> Callable[[nn.Module | None, tuple[object, ...]], None]:
        def read(_module: nn.Module | None, values: tuple[object, ...]) -> None:
            written = values[0][0] if isinstance(values[0], tuple) else values[0]
            if not isinstance(written, Tensor):
                raise UnsupportedModelError(f"A block is given {type(written).__name__}, not a tensor.")
            last = written[torch.arange(len(rows), device=written.device), finals].float()
            into[rows] = (last @ self.weight).cpu().numpy()

        return read
