"""All branches of an edit that starts early: rows of batches, each entering the model at its own first edited layer.

1. Transcripts are taken in chunks of bounded size. One clean pass of a chunk keeps the residual entering each layer,
   and, where the scope begins behind the prompt, the prompt's cache.
2. Layer by layer, the branches first edited there become rows: the clean residual of their transcript from the first
   edited position on. Nothing before it, and no layer below, is computed again.
3. A hook on `hook_z` edits in each row its own heads at its own positions, and the row leaves at the probe's layer.
4. Rows that edit nothing run once a chunk, from the middle of the model; they must give the clean logit.

Exact for any model whose blocks are causal. Memory is the residual of one chunk at every layer and one batch.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cliffscope.errors import ResourceError
from cliffscope.heads.branches import Job, edits_by_layer
from cliffscope.heads.editing import change_heads
from cliffscope.heads.edits import Scope
from cliffscope.heads.packed import Disagreement, PackSize
from cliffscope.memory import is_out_of_memory
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

log = logging.getLogger(__name__)
CHUNK_TOKENS = 4096
"""Tokens of a chunk and of a batch of rows, padding and prompt included; one longer transcript is a chunk of its
own."""

Row = tuple[int, int]
"""Place of a transcript in its chunk, and a branch; -1 edits nothing."""


def chunks(job: Job, transcripts: Sequence[TokenizedTranscript]) -> Iterator[list[int]]:
    """Indices of transcripts that are swept together, longest first: alone where the prompt's cache is shared."""
    order = sorted(range(len(transcripts)), key=lambda i: (-transcripts[i].final, i))
    chunk: list[int] = []
    for i in order:
        width = transcripts[chunk[0]].final + 1 if chunk else 0
        if chunk and (job.scope is Scope.THINKING or (len(chunk) + 1) * width > CHUNK_TOKENS):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def batched_logits(
    job: Job, chunk: Sequence[tuple[int, TokenizedTranscript]], size: PackSize
) -> tuple[np.ndarray, np.ndarray]:
    """The clean logits and those of every branch, at the final position of the transcripts of a chunk.

    Args:
        job: the sweep.
        chunk: transcripts with their indices in the sweep, longest first.
        size: tokens of a batch of rows.

    Returns:
        [transcript] clean and [transcript, branch] edited logits.

    Raises:
        Disagreement: a row that edits nothing does not have the clean logit.
        ResourceError: not even one row fits into memory.
    """
    with torch.inference_mode():
        clean = _clean_pass(job, chunk)
        found = np.repeat(clean.logits[:, None], len(job.branches), axis=1)
        middle = (job.probe.layer + 1) // 2
        unedited: list[Row] = [(place, -1) for place in range(len(chunk))]
        control = _run_layer(job, clean, middle, unedited, size)
        for row, expected in zip(unedited, clean.logits, strict=True):
            if not job.agrees(control[row], float(expected)):
                raise Disagreement(f"an unedited row differs by {abs(control[row] - expected):.1e}")
        for layer in range(job.probe.layer + 1):
            mine = [i for i in range(len(job.branches)) if job.first_layer(i) == layer]
            rows = [(place, branch) for place in range(len(chunk)) for branch in mine]
            for (place, branch), logit in _run_layer(job, clean, layer, rows, size).items():
                found[place, branch] = logit
    return clean.logits, found


@dataclass(frozen=True, eq=False, kw_only=True)
class _Clean:
    """The unedited pass of a chunk."""

    chunk: Sequence[tuple[int, TokenizedTranscript]]
    """Index in the sweep and tokens."""
    start: int
    """Position from which rows are computed."""
    entering: list[Tensor]
    """[transcript, pos from start on, d_model] a layer."""
    logits: np.ndarray
    """[transcript] the clean logits."""
    cache: DynamicCache | None
    """Of what comes before `start`; never written to."""

    def cache_for(self, rows: int, first: int) -> DynamicCache | None:
        """The cache of the prompt for as many rows, from a layer on."""
        if self.cache is None:
            return None
        fresh = DynamicCache()
        fresh.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fresh.layers[first:]:
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
        return fresh


def _clean_pass(job: Job, chunk: Sequence[tuple[int, TokenizedTranscript]]) -> _Clean:
    model, rows = job.model, [t for _, t in chunk]
    start = rows[0].span(Span.THINKING).start if job.scope is Scope.THINKING else 0
    cache = DynamicCache() if start else None
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    finals = torch.tensor([row.final for row in rows])

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0][:, start:].clone())

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer:
            leaving.append(hidden[torch.arange(len(rows)), finals])

    batch = model.to_batch([row.token_ids[: row.final + 1].tolist() for row in rows])
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    with ExitStack() as stack:
        blocks = stack.enter_context(model.only_blocks(0, job.probe.layer))
        stack.enter_context(model.residual_hook(visit))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        # Padding stands on the right, where causal attention does not look, so that no mask is needed.
        model.decoder(input_ids=batch.ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
    if cache is not None:
        cache.crop(start - batch.ids.shape[1])
    logits = np.asarray(job.logit(leaving[0]), dtype=np.float32)
    return _Clean(chunk=chunk, start=start, entering=entering, logits=logits, cache=cache)


def _run_layer(job: Job, clean: _Clean, first: int, rows: list[Row], size: PackSize) -> dict[Row, float]:
    """The logits of rows that enter at one layer."""
    found: dict[Row, float] = {}
    left = list(rows)
    while left:
        width = clean.chunk[left[0][0]][1].final + 1
        batch = left[: max(1, size.tokens // width)]
        try:
            logits = _run_rows(job, clean, first, batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"Memory ran out with one row of {width} tokens. Free some, take a smaller dtype, or drop the "
                    "longest transcripts."
                ) from error
            size.halve()
            continue
        found |= dict(zip(batch, logits.tolist(), strict=True))
        left = left[len(batch) :]
    return found


def _run_rows(job: Job, clean: _Clean, first: int, rows: list[Row]) -> np.ndarray:
    model, places = job.model, [place for place, _ in rows]
    finals = torch.tensor([clean.chunk[place][1].final - clean.start for place in places])
    width = int(finals.max()) + 1
    residual = clean.entering[first][places, :width]
    positions = torch.arange(clean.start, clean.start + width, device=residual.device)[None]
    cache = clean.cache_for(len(rows), first)
    leaving: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> None:
        if layer == job.probe.layer - first:
            leaving.append(hidden[torch.arange(len(rows)), finals])

    edited = [i for i, (_, branch) in enumerate(rows) if branch >= 0]
    with ExitStack() as stack:
        for layer, mine in edits_by_layer(job, [rows[i][1] for i in edited]):
            changes = [(edited[i], clean.chunk[places[edited[i]]], heads) for i, heads in mine]
            stack.enter_context(model.head_hook(layer, _row_edit(job, layer, changes, clean.start)))
        stack.enter_context(model.only_blocks(first, job.probe.layer))
        stack.enter_context(model.residual_hook(visit))
        model.decoder(
            inputs_embeds=residual, position_ids=positions, past_key_values=cache, use_cache=cache is not None
        )
    return job.logit(leaving[0])


def _row_edit(
    job: Job, layer: int, changes: list[tuple[int, tuple[int, TokenizedTranscript], list[int]]], start: int
) -> Callable[[Tensor], None]:
    def change(z: Tensor) -> None:
        for row, (index, transcript), heads in changes:
            scope, values = job.scope.positions(transcript), job.change.of(index)
            where = slice(scope.start - start, scope.stop - start)
            own = None if values is None else values[layer][:, heads].to(z.device)
            z[row, where, heads] = change_heads(z[row, where][:, heads], job.change.factor, own)

    return change
