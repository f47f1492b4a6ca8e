"""What do residual streams hold, without ever keeping them?

1. Transcripts are sorted by length and packed into batches of a bounded number of tokens.
2. One forward pass of the blocks (the language-model head is not run) visits every layer.
3. Inside the hook, the residual is reduced at once: to a projection on each layer's direction, or to a few positions.

Memory: the batch's own activations, plus what is kept: [layer, pos] floats a transcript for projections,
[layer, k, d_model] for k gathered positions. Knows nothing of probes or labels.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from cliffscope.models import LensModel
from cliffscope.transcripts.transcript import TokenizedTranscript

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included: enough to keep two cores or a GPU busy at short lengths."""

Reduced = Float32[np.ndarray, "layer ..."]


def project_residuals(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    weight: Float32[np.ndarray, "layer d_model"],
    bias: Float32[np.ndarray, " layer"],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Float32[np.ndarray, "layer _"]]:
    """The probes' logits at every token of every transcript.

    Args:
        model: the model.
        transcripts: tokens; nothing after their last token is needed.
        weight: one direction a layer, on `hook_resid_post`.
        bias: one bias a layer.
        progress: called with the number of transcripts done.

    Returns:
        For each transcript, in the order given, residual . weight + bias in fp32.
    """
    directions = torch.from_numpy(weight)

    def reduce(layer: int, residual: Float[Tensor, "pos d_model"], _row: int) -> Tensor:
        return residual @ directions[layer].to(residual.device)

    found = _reduce(model, transcripts, reduce, progress)
    return [logits + bias[:, None] for logits in found]


def gather_residuals(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    positions: Sequence[Int64[np.ndarray, " _"]],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Float32[np.ndarray, "layer _ d_model"]]:
    """Residuals of every layer at chosen positions of each transcript.

    Args:
        model: the model.
        transcripts: tokens.
        positions: positions to keep, one array a transcript.
        progress: called with the number of transcripts done.

    Returns:
        For each transcript, in the order given, fp32 residuals.
    """
    wanted = [torch.from_numpy(p) for p in positions]

    def reduce(_layer: int, residual: Float[Tensor, "pos d_model"], row: int) -> Tensor:
        return residual[wanted[row].to(residual.device)]

    return _reduce(model, transcripts, reduce, progress)


def project_layer(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    layer: int,
    weight: Float32[np.ndarray, " d_model"],
    bias: float,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[int, Float32[np.ndarray, " _"]]]:
    """One layer's probe at every token, batch by batch; the blocks above are not run.

    Args:
        model: the model.
        transcripts: tokens.
        layer: whose `hook_resid_post` is read.
        weight: the direction.
        bias: its bias.
        batch_tokens: tokens of a batch, padding included.

    Yields:
        Index of a transcript and its logits; the longest transcripts first.
    """
    direction = torch.from_numpy(weight)
    found: list[Tensor] = []

    def visit(index: int, hidden: Float[Tensor, "batch pos d_model"]) -> None:
        if index == layer:
            found.append((hidden.float() @ direction.to(hidden.device) + bias).cpu())

    for rows in length_batches([t.n_pos for t in transcripts], batch_tokens):
        batch = model.to_batch([transcripts[row].token_ids.tolist() for row in rows])
        with torch.inference_mode(), model.only_blocks(0, layer), model.residual_hook(visit):
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        logits = found.pop().numpy()
        for i, row in enumerate(rows):
            yield row, logits[i, : transcripts[row].n_pos].copy()


def length_batches(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of transcripts, longest first, in batches whose padded size stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _reduce(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    reduce: Callable[[int, Tensor, int], Tensor],
    progress: Callable[[int], None] | None,
) -> list[Reduced]:
    done: list[Reduced] = [np.empty(0, dtype=np.float32)] * len(transcripts)
    finished = 0
    for rows in length_batches([t.n_pos for t in transcripts]):
        kept: dict[int, list[Tensor]] = {row: [] for row in rows}

        def visit(layer: int, hidden: Tensor, rows: list[int] = rows, kept: dict[int, list[Tensor]] = kept) -> None:
            for i, row in enumerate(rows):
                residual = hidden[i, : transcripts[row].n_pos].float()
                kept[row].append(reduce(layer, residual, row).cpu())

        batch = model.to_batch([transcripts[row].token_ids.tolist() for row in rows])
        with torch.inference_mode(), model.residual_hook(visit):
            model.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
        for row in rows:
            done[row] = torch.stack(kept[row]).numpy()
        finished += len(rows)
        if progress is not None:
            progress(finished)
    return done
