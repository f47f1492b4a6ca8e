"""What do residual streams hold, without ever keeping them?

1. Transcripts are sorted by length and packed into batches of a bounded number of tokens.
2. One forward pass of the blocks (the language-model head is not run) visits every layer.
3. Inside the hook, the residual is reduced at once: to a projection on each layer's direction, or to a few positions.
4. A transcript longer than `LONG` tokens goes through in chunks, each of which sees the cache of those before it.
5. Where memory runs out, batches are halved, this one and all that follow.

Memory: the activations of a batch or a chunk, the cache of one long transcript, and what is kept: [layer, pos] floats a
transcript for projections, [layer, k, d_model] for k gathered positions. It grows linearly with the length. Knows
nothing of probes or labels.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cliffscope.errors import ResourceError
from cliffscope.memory import is_out_of_memory
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import TokenizedTranscript

_log = logging.getLogger(__name__)
BATCH_TOKENS = 4096
"""Tokens of a batch, padding included: enough to keep two cores or a GPU busy at short lengths."""

LONG, CHUNK = 2048, 512
"""Tokens above which a transcript that is alone in its batch is cut, and of a chunk: of 256 to 1,024 the fastest that
keeps mask and activations small beside the cache (benchmarks/context.py)."""


@runtime_checkable
class Intervention(Protocol):
    """What changes a model's passes while a context lasts, such as a `HeadEdit`."""

    def hooks(
        self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0
    ) -> AbstractContextManager[None]:
        """Acts on every pass inside the context over these rows, which begins at position `start` of them."""


Result = TypeVar("Result")
Reduced = Float32[np.ndarray, "layer ..."]
_Piece = Float[Tensor, "_ ..."]
_Pieces = dict[int, dict[int, list[_Piece]]]
"""By transcript and layer: what was reduced of each chunk, one after another."""
_Keys = Float[Tensor, "batch head _ _"]
"""Keys or values of some tokens: latent attention gives them sizes of their own."""


def project_residuals(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    weight: Float32[np.ndarray, "layer d_model"],
    bias: Float32[np.ndarray, " layer"],
    *,
    edit: Intervention | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Float32[np.ndarray, "layer _"]]:
    """The probes' logits at every token of every transcript.

    Args:
        model: the model.
        transcripts: tokens; nothing after their last token is needed.
        weight: one direction a layer, on `hook_resid_post`.
        bias: one bias a layer.
        edit: done to the model during the passes.
        progress: called with the number of transcripts done.

    Returns:
        For each transcript, in the order given, residual . weight + bias in fp32.
    """
    directions = torch.from_numpy(weight)

    def reduce(layer: int, residual: Float[Tensor, "pos d_model"], _row: int, _start: int) -> Float[Tensor, " pos"]:
        return residual @ directions[layer].to(residual.device)

    projected = _reduce(model, transcripts, reduce, progress, edit)
    return [logits + bias[:, None] for logits in projected]


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
    sorted_positions = [torch.from_numpy(np.sort(p)) for p in positions]

    def reduce(_layer: int, residual: Float[Tensor, "pos d_model"], row: int, start: int) -> Float[Tensor, "k d_model"]:
        every = sorted_positions[row]
        inside = every[(every >= start) & (every < start + len(residual))]
        return residual[(inside - start).to(residual.device)]

    gathered = _reduce(model, transcripts, reduce, progress)
    # Back from ascending positions to the order that was asked for.
    return [residuals[:, np.argsort(np.argsort(p))] for residuals, p in zip(gathered, positions, strict=True)]


def project_layer(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    layer: int,
    weight: Float32[np.ndarray, " d_model"],
    bias: float,
    *,
    batch_tokens: int = BATCH_TOKENS,
    edit: Intervention | None = None,
    skip: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Float32[np.ndarray, " _"]]]:
    """One layer's probe at every token, batch by batch; the blocks above are not run.

    Args:
        model: the model.
        transcripts: tokens.
        layer: whose `hook_resid_post` is read.
        weight: the direction.
        bias: its bias.
        batch_tokens: tokens of a batch, padding included.
        edit: done to the model during the passes.
        skip: as in `run_batches`.

    Yields:
        Index of a transcript and its logits; the longest transcripts first.

    Raises:
        ResourceError: as in `run_batches`.
    """
    direction = torch.from_numpy(weight)

    def read(rows: list[int]) -> Float32[np.ndarray, "row pos"]:
        """The logits of one batch."""
        parts: list[Float[Tensor, "batch pos"]] = []

        def visit(index: int, hidden: Float[Tensor, "batch pos d_model"], _start: int) -> None:
            if index == layer:
                parts.append((hidden.float() @ direction.to(hidden.device) + bias).cpu())

        with model.only_blocks(0, layer):
            run_decoder(model, [transcripts[row] for row in rows], visit, edit)
        return np.asarray(torch.cat(parts, 1).numpy())

    for rows, logits in run_batches([t.n_pos for t in transcripts], read, batch_tokens, skip=skip):
        for i, row in enumerate(rows):
            yield row, logits[i, : transcripts[row].n_pos].copy()


def run_decoder(
    model: LensModel,
    rows: Sequence[TokenizedTranscript],
    visit: Callable[[int, Float[Tensor, "batch pos d_model"], int], None],
    edit: Intervention | None = None,
) -> None:
    """One pass of the blocks over a batch; a long transcript that is alone in its batch goes through in chunks.

    Args:
        model: the model; inside `only_blocks`, only those run.
        rows: one batch.
        visit: called with layer, residual after it, and the position at which that begins.
        edit: done to the model during the pass.
    """
    batch = model.to_batch([row.token_ids.tolist() for row in rows])
    start, width = 0, batch.ids.shape[1]
    chunked = len(rows) == 1 and width > LONG
    with torch.inference_mode(), model.residual_hook(lambda layer, hidden: visit(layer, hidden, start)):
        if not chunked:
            with _acting(edit, model, rows, 0):
                model.decoder(
                    input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
                )
            return
        cache = _reserved_cache(model, width)
        for start in range(0, width, CHUNK):
            part = slice(start, start + CHUNK)
            with _acting(edit, model, rows, start):
                model.decoder(
                    input_ids=batch.ids[:, part],
                    position_ids=batch.positions[:, part],
                    past_key_values=cache,
                    use_cache=True,
                )


def _acting(
    edit: Intervention | None, model: LensModel, rows: Sequence[TokenizedTranscript], start: int
) -> AbstractContextManager[None]:
    return nullcontext() if edit is None else edit.hooks(model, rows, start=start)


class _ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
    """Keys and values of a known number of tokens: written in place, where growing would copy all of them a chunk."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
        self.length = length
        self.reserved: tuple[_Keys, _Keys] | None = None

    def update(self, key_states: _Keys, value_states: _Keys, *_args: object, **_kwargs: object) -> tuple[_Keys, _Keys]:
        """Writes behind what is there, and gives all that is there now."""
        if self.reserved is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = (
                new.new_empty(*new.shape[:-2], self.length, new.shape[-1]) for new in (key_states, value_states)
            )
            self.reserved = keys, values
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for whole, new in zip(self.reserved, (key_states, value_states), strict=True):
            whole[..., start:stop, :] = new
        self.keys, self.values = (whole[..., :stop, :] for whole in self.reserved)
        return self.keys, self.values


def _reserved_cache(model: LensModel, length: int) -> DynamicCache:
    """The model's own cache, with room reserved in layers that keep all keys."""
    cache = DynamicCache(config=model.hf.config.get_text_config())
    cache.layers = [_ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


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


def run_batches(
    lengths: Sequence[int],
    work: Callable[[list[int]], Result],
    batch_tokens: int | None = None,
    *,
    skip: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[int], Result]]:
    """Works through transcripts batch by batch, in halves from where memory runs out.

    Args:
        lengths: tokens of each transcript.
        work: what is done with the indices of a batch; done again with less of them where memory ran out.
        batch_tokens: tokens of a batch at first, padding included; None takes `BATCH_TOKENS`.
        skip: told the index of a transcript for which memory does not even suffice alone, which is then left out; None
            raises.

    Yields:
        Indices of a batch, longest transcripts first, and what came of it.

    Raises:
        ResourceError: memory does not suffice for one transcript.
    """
    waiting = deque(length_batches(lengths, BATCH_TOKENS if batch_tokens is None else batch_tokens))
    most = float("inf")
    while waiting:
        rows = waiting.popleft()
        if len(rows) > 1 and len(rows) * lengths[rows[0]] > most:
            waiting.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
            continue
        result = _attempt(work, rows)
        if result is not None:
            yield rows, result[0]
        elif len(rows) > 1:
            most = len(rows) * lengths[rows[0]] / 2
            waiting.appendleft(rows)
            _log.warning("Memory ran out with %d transcripts at once; going on with half of them.", len(rows))
        elif skip is not None:
            skip(rows[0])
        else:
            raise ResourceError(
                f"Memory does not suffice for one transcript of {lengths[rows[0]]} tokens. Drop it, or load the model "
                "in a smaller dtype."
            )


def _attempt(work: Callable[[list[int]], Result], rows: list[int]) -> tuple[Result] | None:
    """What the work gives; None where memory ran out, which is then free again."""
    try:
        return (work(rows),)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _reduce(
    model: LensModel,
    transcripts: Sequence[TokenizedTranscript],
    reduce: Callable[[int, Float[Tensor, "pos d_model"], int, int], _Piece],
    progress: Callable[[int], None] | None,
    edit: Intervention | None = None,
) -> list[Reduced]:
    done: list[Reduced] = [np.empty(0, dtype=np.float32)] * len(transcripts)
    finished = 0

    def read(rows: list[int]) -> _Pieces:
        """What is reduced of one batch."""
        pieces: _Pieces = {row: {} for row in rows}

        def visit(layer: int, hidden: Float[Tensor, "batch pos d_model"], start: int) -> None:
            for i, row in enumerate(rows):
                residual = hidden[i, : transcripts[row].n_pos - start].float()
                pieces[row].setdefault(layer, []).append(reduce(layer, residual, row, start).cpu())

        run_decoder(model, [transcripts[row] for row in rows], visit, edit)
        return pieces

    for rows, pieces in run_batches([t.n_pos for t in transcripts], read):
        for row in rows:
            done[row] = torch.stack([torch.cat(parts) for _, parts in sorted(pieces[row].items())]).numpy()
        finished += len(rows)
        if progress is not None:
            progress(finished)
    return done
