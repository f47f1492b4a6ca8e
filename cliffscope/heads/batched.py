"""All branches of an edit that starts early: rows of batches, each entering the model at its own first edited layer.

1. Transcripts are taken in chunks of bounded size. One clean pass of a chunk keeps the residual entering each layer,
   and, where the scope begins behind the prompt, the prompt's cache.
2. Layer by layer, the branches first edited there become rows: the clean residual of their transcript from the first
   edited position on. Nothing before it, and no layer below, is computed again.
3. A hook on `hook_z` edits in each row its own heads at its own positions, and the row leaves at the readout's layer.
4. Rows that edit nothing run once a chunk, from the middle of the model; they must give the clean logit.

Where the readout has continuations, a row is as many sequences as these have paths, each with its path at the end.

Exact for any model whose blocks are causal. Memory is the residual of one chunk at every layer and one batch.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Float32, Int
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

Chunk = Sequence[tuple[int, TokenizedTranscript]]
"""Transcripts with their indices in the sweep, longest first."""


def chunks(job: Job, transcripts: Sequence[TokenizedTranscript]) -> Iterator[list[int]]:
    """Indices of transcripts that are swept together, longest first: alone where the prompt's cache is shared."""
    order = sorted(range(len(transcripts)), key=lambda i: (-transcripts[i].final, i))
    chunk: list[int] = []
    for i in order:
        width = _width(job, transcripts[chunk[0]]) if chunk else 0
        if chunk and (job.scope is Scope.THINKING or (len(chunk) + 1) * width > CHUNK_TOKENS):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _width(job: Job, transcript: TokenizedTranscript) -> int:
    """Tokens of all sequences of one row."""
    paths = job.readout.continuations.paths
    return len(paths) * (transcript.final + 1 + max(len(path) for path in paths))


def batched_logits(
    job: Job, chunk: Chunk, size: PackSize
) -> tuple[Float32[np.ndarray, " transcript"], Float32[np.ndarray, "transcript branch"]]:
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
        edited = repeat(clean.logits, "transcript -> transcript branch", branch=len(job.branches)).copy()
        middle = (job.readout.layer + 1) // 2
        unedited: list[Row] = [(place, -1) for place in range(len(chunk))]
        control = _run_layer(job, clean, middle, unedited, size)
        for row, expected in zip(unedited, clean.logits, strict=True):
            if not job.agrees(control[row], float(expected)):
                raise Disagreement(f"an unedited row differs by {abs(control[row] - expected):.1e}")
        for layer in range(job.readout.layer + 1):
            entering = [i for i in range(len(job.branches)) if job.first_layer(i) == layer]
            rows = [(place, branch) for place in range(len(chunk)) for branch in entering]
            for (place, branch), logit in _run_layer(job, clean, layer, rows, size).items():
                edited[place, branch] = logit
    return clean.logits, edited


@dataclass(frozen=True, eq=False, kw_only=True)
class _Clean:
    """The unedited pass of a chunk."""

    chunk: Chunk
    """Index in the sweep and tokens."""
    sequences: list[TokenizedTranscript]
    """Each transcript once for each path of the continuations, with the path as its answer."""
    start: int
    """Position from which rows are computed."""
    entering: list[Float[Tensor, "sequence pos d_model"]]
    """The residual entering each layer, from `start` on."""
    logits: Float32[np.ndarray, " transcript"]
    """[transcript] the clean logits."""
    cache: DynamicCache | None
    """Of what comes before `start`; never written to."""

    def cache_for(self, n: int, first: int) -> DynamicCache | None:
        """The cache of the prompt for as many sequences, from a layer on."""
        if self.cache is None:
            return None
        fresh = DynamicCache()
        fresh.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fresh.layers[first:]:
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
                # All sequences of a chunk with a cache have the same prompt.
                layer.keys, layer.values = (
                    repeat(part[0], "head pos d_head -> sequence head pos d_head", sequence=n)
                    for part in (layer.keys, layer.values)
                )
        return fresh


def _clean_pass(job: Job, chunk: Chunk) -> _Clean:
    model, tree = job.model, job.readout.continuations
    sequences = list(chain.from_iterable(tree.rows(transcript) for _, transcript in chunk))
    start = sequences[0].span(Span.THINKING).start if job.scope is Scope.THINKING else 0
    cache = DynamicCache() if start else None
    entering: list[Float[Tensor, "sequence pos d_model"]] = []
    read = _Reading.at(job, job.readout.layer, [row.final for row in sequences])

    def keep(_module: nn.Module, inputs: tuple[Float[Tensor, "sequence pos d_model"], ...]) -> None:
        entering.append(inputs[0][:, start:].clone())

    batch = model.to_batch([row.token_ids.tolist() for row in sequences])
    positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    with ExitStack() as stack:
        blocks = stack.enter_context(model.only_blocks(0, job.readout.layer))
        stack.enter_context(model.residual_hook(read.visit))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        # Padding stands on the right, where causal attention does not look, so that no mask is needed.
        model.decoder(input_ids=batch.ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
    if cache is not None:
        cache.crop(start - batch.ids.shape[1])
    return _Clean(
        chunk=chunk, sequences=sequences, start=start, entering=entering, logits=job.logits(read.nodes()), cache=cache
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reading:
    """Reads one layer's residual at the final position and the continuations of a batch of rows."""

    layer: int
    """Index of the block among those that run."""
    sequence: Int[Tensor, "row node"]
    """[row, node] which sequence of the batch."""
    position: Int[Tensor, "row node"]
    """[row, node] which position of it."""
    leaving: list[Float[Tensor, "row node d_model"]] = field(default_factory=list)
    """What was read."""

    @classmethod
    def at(cls, job: Job, layer: int, finals: Sequence[int]) -> "_Reading":
        """Of sequences whose final position is given, the paths of a row one after another."""
        tree = job.readout.continuations
        path, behind = (torch.tensor(column)[None] for column in zip(*tree.places, strict=True))
        first = torch.arange(0, len(finals), len(tree.paths))
        final = torch.tensor(finals)[first]
        return cls(
            layer=layer,
            sequence=rearrange(first, "row -> row 1") + path,
            position=rearrange(final, "row -> row 1") + behind,
        )

    def visit(self, layer: int, hidden: Float[Tensor, "sequence pos d_model"]) -> None:
        """To be called in every block."""
        if layer == self.layer:
            self.leaving.append(hidden[self.sequence, self.position])

    def nodes(self) -> Float[Tensor, "row node d_model"]:
        """The residuals of the pass."""
        return self.leaving[0]


def _run_layer(job: Job, clean: _Clean, first: int, rows: list[Row], size: PackSize) -> dict[Row, float]:
    """The logits of rows that enter at one layer."""
    logits: dict[Row, float] = {}
    left = list(rows)
    while left:
        width = _width(job, clean.chunk[left[0][0]][1])
        batch = left[: max(1, size.tokens // width)]
        try:
            values = _run_rows(job, clean, first, batch)
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
        logits |= dict(zip(batch, values.tolist(), strict=True))
        left = left[len(batch) :]
    return logits


def _run_rows(job: Job, clean: _Clean, first: int, rows: list[Row]) -> Float32[np.ndarray, " row"]:
    model, paths = job.model, len(job.readout.continuations.paths)
    places = [place * paths + path for place, _ in rows for path in range(paths)]
    sequences = [clean.sequences[place] for place in places]
    width = max(sequence.n_pos for sequence in sequences) - clean.start
    residual = clean.entering[first][places, :width]
    positions = torch.arange(clean.start, clean.start + width, device=residual.device)[None]
    cache = clean.cache_for(len(sequences), first)
    read = _Reading.at(job, job.readout.layer - first, [sequence.final - clean.start for sequence in sequences])
    edited = [i for i, (_, branch) in enumerate(rows) if branch >= 0]
    with ExitStack() as stack:
        for layer, by_row in edits_by_layer(job, [rows[i][1] for i in edited]):
            changes = [
                (edited[i] * paths + path, clean.chunk[rows[edited[i]][0]][0], heads)
                for i, heads in by_row
                for path in range(paths)
            ]
            change = _row_edit(job, layer, changes, sequences, clean.start)
            stack.enter_context(model.head_hook(layer, change, preserve_norm=job.change.preserve_norm))
        stack.enter_context(model.only_blocks(first, job.readout.layer))
        stack.enter_context(model.residual_hook(read.visit))
        model.decoder(
            inputs_embeds=residual, position_ids=positions, past_key_values=cache, use_cache=cache is not None
        )
    return job.logits(read.nodes())


def _row_edit(
    job: Job,
    layer: int,
    changes: list[tuple[int, int, list[int]]],
    sequences: Sequence[TokenizedTranscript],
    start: int,
) -> Callable[[Float[Tensor, "sequence pos head d_head"]], None]:
    """Edits heads in some sequences; a change is the sequence, the transcript's index in the sweep, and heads."""

    def change(z: Float[Tensor, "sequence pos head d_head"]) -> None:
        for place, index, heads in changes:
            scope, values = job.scope.positions(sequences[place]), job.change.of(index)
            where = slice(scope.start - start, scope.stop - start)
            added = None if values is None else values[layer][:, heads].to(z.device)
            z[place, where, heads] = change_heads(z[place, where][:, heads], job.change.factor, added)

    return change
