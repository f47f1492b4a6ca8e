"""What would a readout say, had the thinking ended earlier? All positions of a transcript as a few long sequences.

1. One forward pass of the transcript keeps the cache of prompt and thinking, and reads the logit at its final position.
2. The closing, followed by the readout's continuations, is repeated once a position. The copy of position t stands at
   t + 1, and sees prompt and thinking up to t, and itself. Thinking that ends in a newline is closed as the tokenizer
   would have it, with a closing that is a token shorter or begins a token earlier.
3. An edit at the closing acts on the closing of every copy.
4. Each pack repeats the last copy of the pack before it, which must have the same logit, and the copy behind the whole
   thinking must have that of the forward pass. Before the first transcript, copies are compared with plain passes of
   cut transcripts on a short piece.

Where that does not hold, and for edits of other scopes, every cut transcript is a plain pass. Memory is the prefix's
cache and one pack. Source of the packing: packed.py.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Float32
from torch import Tensor

from cliffscope.errors import ResourceError
from cliffscope.heads.branches import Change, Job
from cliffscope.heads.editing import change_heads
from cliffscope.heads.edits import EditPlan, HeadEdit, Scope
from cliffscope.heads.packed import Disagreement, Layout, PackSize, Window, branch_masks, clean_pass
from cliffscope.memory import is_out_of_memory
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.transcripts.transcript import ClosingRule, Span, TokenizedTranscript

log = logging.getLogger(__name__)
PIECE = 8
"""Tokens of thinking on which copies are compared with plain passes."""

Edit = HeadEdit | EditPlan
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class EarlyClosing:
    """One place at which the thinking could have ended."""

    position: int
    """Position of the last thinking token."""
    start: int
    """Where the closing begins: behind that token, or on it where it is the closing's own newline."""
    closing: tuple[int, ...]
    """Token ids of the closing."""

    def cut(self, transcript: TokenizedTranscript) -> TokenizedTranscript:
        """The transcript, had the thinking ended here."""
        stop = self.start + len(self.closing)
        return TokenizedTranscript(
            id=transcript.id,
            token_ids=np.concatenate([transcript.token_ids[: self.start], np.array(self.closing, dtype=np.int64)]),
            bounds=(transcript.bounds[0], self.start, stop, stop),
        )


def early_closings(transcript: TokenizedTranscript, rule: ClosingRule, *, every: int = 1) -> list[EarlyClosing]:
    """Where the thinking of a transcript could have ended: at its first token, each `every`-th on, and its last.

    The last one is the transcript's own closing.
    """
    span, ids = transcript.span(Span.THINKING), transcript.token_ids.tolist()
    places = []
    for position in range(span.start, span.stop - 1, every):
        length, closing = rule.after(ids[span.start : position + 1])
        places.append(EarlyClosing(position=position, start=span.start + length, closing=closing))
    written = tuple(ids[span.stop : transcript.final + 1])
    return [*places, EarlyClosing(position=span.stop - 1, start=span.stop, closing=written)]


def early_logits(
    model: LensModel,
    readout: Readout,
    transcripts: Sequence[TokenizedTranscript],
    places: Sequence[Sequence[EarlyClosing]],
    *,
    edit: Edit | None = None,
    progress: Progress | None = None,
) -> tuple[list[Float32[np.ndarray, " _"]], str]:
    """The readout's logits behind every early closing.

    Args:
        model: the model.
        readout: fits the model.
        transcripts: tokens with thinking; answers are ignored.
        places: for each transcript, the last one being its own closing.
        edit: done to the model meanwhile.
        progress: called with the number of transcripts done; starts again if the path has to be changed.

    Returns:
        [position] fp32 logits of each transcript; and the path, `packed` or `plain` with the reason.

    Raises:
        EditError: the edit does not fit the model or a closing.
        ResourceError: memory runs out even with one copy at a time.
    """
    job = Job(model=model, readout=readout, branches=(), change=Change(), scope=Scope.CLOSING)
    wider = sorted({str(one.scope) for one in edit.edits if one.scope is not Scope.CLOSING}) if edit else []
    if wider:
        return _plain(job, transcripts, places, edit, progress), f"plain (scope {' and '.join(wider)})"
    size = PackSize()
    try:
        _compare(job, transcripts, places, edit, size)
        logits = []
        for transcript, early in zip(transcripts, places, strict=True):
            logits.append(packed_closings(job, transcript, early, edit, size))
            if progress is not None:
                progress(len(logits))
    except (Disagreement, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        log.warning("packed early closings do not hold on %s: %s", model.name, error)
        why = str(error) if isinstance(error, Disagreement) else f"fails ({type(error).__name__})"
        return _plain(job, transcripts, places, edit, progress), f"plain (packed: {why})"
    halved = f" (halved {size.halvings} times, out of memory)" if size.halvings else ""
    return logits, f"packed{halved}"


def packed_closings(
    job: Job,
    transcript: TokenizedTranscript,
    places: Sequence[EarlyClosing],
    edit: Edit | None,
    size: PackSize,
) -> Float32[np.ndarray, " position"]:
    """The logits behind every early closing of one transcript; arguments, errors and checks as of the module.

    Raises:
        Disagreement: a copy has another logit in another pack, or the last one than in a plain pass.
    """
    logits = np.zeros(len(places), np.float32)
    with torch.inference_mode():
        window, expected = clean_pass(job, transcript, edit=edit)
        for members in _same_closing(places):
            control: int | None = None
            left = list(members)
            while left:
                width = len(places[left[0]].closing) + len(job.readout.continuations)
                pack = left[: max(1, size.tokens // width - 1)]
                copies = pack if control is None else [control, *pack]
                try:
                    read = _run_pack(job, window, [places[i] for i in copies], edit)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    _halve(error, size, len(pack), width)
                    continue
                if control is not None:
                    _check(job, float(read[0]), float(logits[control]), "a copy in another pack")
                logits[pack] = read[-len(pack) :]
                control, left = pack[-1], left[len(pack) :]
    _check(job, float(logits[-1]), expected, "the closing behind all of the thinking")
    return logits


def _same_closing(places: Sequence[EarlyClosing]) -> Iterator[list[int]]:
    """Indices of places whose closings have the same tokens, in order."""
    order = sorted(range(len(places)), key=lambda i: (places[i].closing, i))
    for _, members in groupby(order, key=lambda i: places[i].closing):
        yield list(members)


def _halve(error: Exception, size: PackSize, copies: int, width: int) -> None:
    """Halves the packs; raises what is no lack of memory again, and ResourceError for a single copy."""
    if not is_out_of_memory(error):
        raise error
    if copies == 1:
        raise ResourceError(
            f"Memory ran out with one closing of {width} tokens. Free some, take a smaller dtype, or drop the longest "
            "transcripts."
        ) from error
    size.halve()


def _check(job: Job, logit: float, expected: float, what: str) -> None:
    if not job.agrees(logit, expected):
        raise Disagreement(f"{what} differs by {abs(logit - expected):.1e}")


def _run_pack(
    job: Job, window: Window, places: Sequence[EarlyClosing], edit: Edit | None
) -> Float32[np.ndarray, " copy"]:
    """The logits of copies of one closing."""
    model, tree, closing, n = job.model, job.readout.continuations, places[0].closing, len(places)
    device = window.layout.offsets.device
    starts = torch.tensor([place.start for place in places], device=device)
    longest = max(place.start for place in places)
    layout = Layout.of_window(longest, len(closing), tree, device)
    leaving: list[Float[Tensor, "copy node d_model"]] = []

    def visit(layer: int, hidden: Float[Tensor, "1 pack d_model"]) -> None:
        if layer == job.readout.layer:
            branched = rearrange(hidden, "1 (copy token) d_model -> copy token d_model", copy=n)
            leaving.append(branched[:, len(closing) - 1 :])

    with ExitStack() as stack:
        stack.enter_context(model.only_blocks(0, job.readout.layer))
        stack.enter_context(model.residual_hook(visit))
        for one in edit.edits if edit else ():
            for layer in sorted({ref.layer for ref in one.heads if ref.layer <= job.readout.layer}):
                change = _copy_edit(one, layer, n, len(closing))
                stack.enter_context(model.head_hook(layer, change, preserve_norm=one.preserve_norm))
        model.decoder(
            input_ids=repeat(torch.tensor([*closing, *tree.tokens], device=device), "t -> 1 (n t)", n=n),
            attention_mask=branch_masks(model, layout, starts, window.entering[0]),
            position_ids=layout.positions(starts),
            past_key_values=window.fresh_cache(longest),
            use_cache=True,
        )
    return job.logits(leaving[0])


def _copy_edit(
    edit: HeadEdit, layer: int, n: int, closing: int
) -> Callable[[Float[Tensor, "1 pack head d_head"]], None]:
    """Edits one layer's heads in the closing of every copy."""
    rows = [i for i, ref in enumerate(edit.heads) if ref.layer == layer]
    heads = [edit.heads[i].head for i in rows]
    values = None if edit.values is None else torch.tensor(edit.values[rows])

    def change(z: Float[Tensor, "1 pack head d_head"]) -> None:
        branched = rearrange(z, "1 (copy token) head d_head -> copy token head d_head", copy=n)
        before = rearrange(branched[:, :closing, heads], "copy token head d_head -> token (copy head) d_head")
        added = None if values is None else repeat(values.to(z), "head pos d_head -> pos (copy head) d_head", copy=n)
        after = change_heads(before, edit.factor, added)
        branched[:, :closing, heads] = rearrange(after, "token (copy head) d_head -> copy token head d_head", copy=n)

    return change


def _plain(
    job: Job,
    transcripts: Sequence[TokenizedTranscript],
    places: Sequence[Sequence[EarlyClosing]],
    edit: Edit | None,
    progress: Progress | None,
) -> list[Float32[np.ndarray, " _"]]:
    """A plain pass of every cut transcript."""
    logits: list[Float32[np.ndarray, " _"]] = []
    for transcript, early in zip(transcripts, places, strict=True):
        logits.append(read_final(job.model, job.readout, [place.cut(transcript) for place in early], edit=edit))
        if progress is not None:
            progress(len(logits))
    return logits


def _compare(
    job: Job,
    transcripts: Sequence[TokenizedTranscript],
    places: Sequence[Sequence[EarlyClosing]],
    edit: Edit | None,
    size: PackSize,
) -> None:
    """Raises Disagreement unless copies equal plain passes at the end of the shortest transcript's thinking."""
    index = min(range(len(transcripts)), key=lambda i: (transcripts[i].final, i))
    piece, early = _piece(transcripts[index], places[index])
    plain = _plain(job, [piece], [early], edit, None)[0]
    for logit, expected in zip(packed_closings(job, piece, early, edit, size), plain, strict=True):
        _check(job, float(logit), float(expected), "a copy")


def _piece(
    transcript: TokenizedTranscript, places: Sequence[EarlyClosing]
) -> tuple[TokenizedTranscript, list[EarlyClosing]]:
    """The last tokens of the thinking with the closing, and the places among them behind which a token is left."""
    start = max(0, transcript.bounds[1] - PIECE)
    ids = transcript.token_ids[start : transcript.final + 1]
    bounds = [max(0, bound - start) for bound in transcript.bounds[:3]]
    piece = TokenizedTranscript(id=transcript.id, token_ids=ids, bounds=(bounds[0], bounds[1], bounds[2], bounds[2]))
    moved = [replace(place, position=place.position - start, start=place.start - start) for place in places]
    return piece, [place for place in moved if place.start > 0]
