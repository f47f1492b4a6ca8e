"""How do several prompts become thinking and answers, token by token?

1. The prompts are left-padded into one batch; one forward pass a step, with the cache.
2. Each row thinks, has its closing fed to it and answers (speaking.py); finished rows leave the batch.
3. Rows whose thinking is there already are read once up to the closing (`read`), and any number of rows answer behind
   what was read (`answer_behind`).

Rows may be edited, each in its own way: the loop knows the span of every token it feeds (row_edits.py). Which tokens
belong to the closing shows only once the tag is whole. So where an edit tells thinking from closing, the thinking is
generated first, and the answer behind it, with the edit on exactly the spans that the finished text has.

Knows tokens, not transcripts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from cliffscope.generation.cache import branched, growing_cache, select_rows
from cliffscope.generation.row_edits import (
    PADDING,
    SCOPES,
    SPANS,
    FedTokens,
    RowEdits,
    SpanEdit,
    acts_before_closing,
    spans_of,
)
from cliffscope.generation.speaking import Budget, Decoded, Row, Speaker, pick
from cliffscope.memory import few_threads
from cliffscope.model.load import LensModel
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, spliced_thinking

_BEFORE_CLOSING = frozenset({Span.PROMPT, Span.THINKING})
_AT_ONCE = (frozenset[Span](), frozenset({Span.PROMPT}), SCOPES["all"])
"""Spans of edits that act on a token in the same way whether it turns out to be of the thinking or of the closing."""

Edits = Sequence[SpanEdit | None]
"""One edit a row, or None for a row that is not edited."""


def decode(
    model: LensModel,
    rows: Sequence[TokenizedTranscript],
    budget: Budget,
    edits: Edits | None = None,
    *,
    thinking_only: bool = False,
) -> list[Decoded]:
    """Decodes a batch of rows to their ends.

    Args:
        model: the model, under whatever edit its weights are.
        rows: prompts up to where thinking begins, or up to the answer where the template has no thinking. A row's id
            determines, with the budget's seed, what is drawn.
        budget: equal for all of them.
        edits: one a row; None edits none.
        thinking_only: whether rows end once their thinking has closed.

    Returns:
        One result a row, in order.

    Raises:
        EditError: an edit does not fit the model, or its values the positions; see `RowEdits`.
    """
    each = [None] * len(rows) if edits is None else edits
    if thinking_only:
        return _decode_once(model, rows, budget, each, thinking_only=True)
    if model.template.thinks and any(spans_of(edit) not in _AT_ONCE for edit in each):
        return _decode_in_two(model, rows, budget, each)
    return _decode_once(model, rows, budget, each)


def spans_seen(model: LensModel, thought: Decoded) -> tuple[list[int], list[int], bool]:
    """Which tokens behind a prompt are thinking and which are closing, as `tokenize` counts them.

    Args:
        model: thinks.
        thought: whose thinking closed.

    Returns:
        Ids of thinking and of closing, and whether the template's own splice gives the same ones.
    """
    spliced = spliced_thinking(thought.thinking, model.tokenizer, model.template)
    if [*spliced[0], *spliced[1]] == [*thought.thinking, *thought.closing]:
        return *spliced, True
    return list(thought.thinking), list(thought.closing), False


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix:
    """What a model has read of transcripts, up to their closings."""

    cache: DynamicCache
    """Of the different readings, left-padded."""
    mask: Int[Tensor, "reading pos"]
    """1 where there is a token."""
    lengths: Int[Tensor, " reading"]
    """Tokens of each."""
    readings: tuple[int, ...]
    """[row] which reading each row goes on from."""


def read(model: LensModel, rows: Sequence[TokenizedTranscript], edits: Edits) -> Prefix:
    """Reads rows up to their closings; rows that begin alike, under edits that act alike on it, are read once.

    Args:
        model: the model.
        rows: with thinking, where the template has it, and closing.
        edits: one a row.

    Returns:
        What was read.
    """
    numbers: dict[tuple[object, ...], int] = {}
    firsts: list[int] = []
    readings = []
    for i, (row, edit) in enumerate(zip(rows, edits, strict=True)):
        ids = row.token_ids[: row.span(Span.CLOSING).start]
        key = (ids.tobytes(), id(edit) if acts_before_closing(edit) else None)
        if key not in numbers:
            numbers[key] = len(firsts)
            firsts.append(i)
        readings.append(numbers[key])
    begun = [_cut(rows[i], Span.THINKING) for i in firsts]
    acting = RowEdits(model, [edits[i] for i in firsts], [rows[i] for i in firsts], spans=_BEFORE_CLOSING)
    batch, cache = model.to_batch([row.token_ids.tolist() for row in begun], left=True), growing_cache(model)
    with torch.inference_mode(), few_threads(small=model.small), acting.acting(_fed(begun)):
        model.decoder(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
        )
    return Prefix(cache=cache, mask=batch.mask, lengths=batch.positions[:, -1] + 1, readings=tuple(readings))


def answer_behind(
    model: LensModel,
    prefix: Prefix,
    rows: Sequence[tuple[int, TokenizedTranscript]],
    budget: Budget,
    edits: Edits,
    *,
    last: bool = False,
) -> list[Decoded]:
    """Feeds rows their closings behind what was read of them, and decodes the answers.

    Args:
        model: the model.
        prefix: from `read`, with the same edits.
        rows: place among the rows that were read, and the row.
        budget: equal for all of them; its thinking does not matter.
        edits: one for each of these rows.
        last: whether nothing else will go on from what was read, so that it may be written to.

    Returns:
        One result a row, in order, without its thinking.
    """
    starts = [row for _, row in rows]
    closings = [row.token_ids[row.span(Span.CLOSING)].tolist() for row in starts]
    # Layers of linear attention go on from a state token by token.
    width = 1 if model.shape.attention is not None else min(len(closing) for closing in closings)
    with torch.inference_mode():
        places = torch.tensor([prefix.readings[i] for i, _ in rows], device=prefix.mask.device)
        own_rows = last and places.tolist() == list(range(len(prefix.mask)))
        cache = prefix.cache if own_rows else branched(prefix.cache, places)
        speaker = Speaker(model, budget)
        live = [speaker.start(i, row, closing=closings[i][width:]) for i, row in enumerate(starts)]
        span = np.full((len(rows), width), SPANS.index(Span.CLOSING))
        step = _Step(
            ids=torch.tensor([closing[:width] for closing in closings], device=prefix.mask.device),
            mask=torch.cat([prefix.mask[places], prefix.mask.new_ones(len(rows), width)], 1),
            positions=prefix.lengths[places][:, None] + torch.arange(width, device=prefix.mask.device),
            fed=FedTokens(rows=np.arange(len(rows)), spans=span, places=np.arange(width)[None].repeat(len(rows), 0)),
        )
        spans = frozenset({Span.CLOSING, Span.ANSWER})
        _speak(speaker, live, step, cache, RowEdits(model, edits, starts, spans=spans))
    return [row.finished() for row in live]


def _decode_once(
    model: LensModel, rows: Sequence[TokenizedTranscript], budget: Budget, edits: Edits, *, thinking_only: bool = False
) -> list[Decoded]:
    """Thinking and answer in one go, or the thinking alone."""
    spans = _BEFORE_CLOSING if thinking_only else SCOPES["all"]
    acting = RowEdits(model, edits, rows, spans=spans) if any(edit is not None for edit in edits) else None
    speaker = Speaker(model, budget, thinking_only=thinking_only)
    live = [speaker.start(i, row) for i, row in enumerate(rows)]
    batch = model.to_batch([row.token_ids.tolist() for row in rows], left=True)
    step = _Step(ids=batch.ids, mask=batch.mask, positions=batch.positions, fed=_fed(rows))
    with torch.inference_mode():
        _speak(speaker, live, step, growing_cache(model), acting)
    return [row.finished() for row in live]


def _decode_in_two(
    model: LensModel, rows: Sequence[TokenizedTranscript], budget: Budget, edits: Edits
) -> list[Decoded]:
    """The thinking, under what the edits do to prompt and thinking; then the answers of rows that closed theirs."""
    thought = _decode_once(model, rows, budget, edits, thinking_only=True)
    closed = [i for i, each in enumerate(thought) if each.closed]
    if not closed:
        return thought
    whole = [_joined(model, rows[i], thought[i]) for i in closed]
    theirs = [edits[i] for i in closed]
    prefix = read(model, whole, theirs)
    answered = answer_behind(model, prefix, list(enumerate(whole)), budget, theirs, last=True)
    answers = {i: each.answer for i, each in zip(closed, answered, strict=True)}
    return [replace(each, answer=answers.get(i, ())) for i, each in enumerate(thought)]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Step:
    """What is fed in one pass."""

    ids: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row cached_pos"]
    positions: Int[Tensor, "row pos"]
    fed: FedTokens


def _speak(
    speaker: "Speaker", rows: Sequence["Row"], step: _Step, cache: DynamicCache, acting: RowEdits | None
) -> None:
    """Lets every row speak to its end, from the first tokens that are fed to it."""
    model, live = speaker.model, list(rows)
    with few_threads(small=model.small):
        while live:
            with nullcontext() if acting is None else acting.acting(step.fed):
                output = model.hf(
                    input_ids=step.ids,
                    attention_mask=step.mask,
                    position_ids=step.positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            picked = pick(output.logits[:, -1], live, speaker.temperature)
            tokens = [speaker.advance(row, token) for row, token in zip(live, picked, strict=True)]
            stay = [i for i, row in enumerate(live) if not row.ended]
            mask, positions = step.mask, step.positions
            if len(stay) < len(live):
                keep = torch.tensor(stay, device=mask.device, dtype=torch.long)
                mask, positions = mask[keep], positions[keep]
                if stay:
                    select_rows(cache, keep)
            live = [live[i] for i in stay]
            step = _Step(
                ids=torch.tensor([[tokens[i]] for i in stay], device=mask.device, dtype=torch.long),
                mask=torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
                positions=positions[:, -1:] + 1,
                fed=FedTokens(
                    rows=np.array([row.index for row in live], dtype=int),
                    spans=np.array([[row.span] for row in live], dtype=int),
                    places=np.array([[row.place] for row in live], dtype=int),
                ),
            )


def _fed(rows: Sequence[TokenizedTranscript]) -> FedTokens:
    """All tokens of rows, left-padded."""
    width = max(row.n_pos for row in rows)
    spans, places = np.full((len(rows), width), PADDING), np.zeros((len(rows), width), dtype=int)
    for i, row in enumerate(rows):
        for number, span in enumerate(SPANS):
            start, stop = (width - row.n_pos + end for end in (row.span(span).start, row.span(span).stop))
            spans[i, start:stop], places[i, start:stop] = number, np.arange(stop - start)
    return FedTokens(rows=np.arange(len(rows)), spans=spans, places=places)


def _cut(row: TokenizedTranscript, last: Span) -> TokenizedTranscript:
    """A row up to the end of a span."""
    stop = row.span(last).stop
    bounds = tuple(min(bound, stop) for bound in row.bounds)
    return replace(row, token_ids=row.token_ids[:stop], bounds=(bounds[0], bounds[1], bounds[2], bounds[3]))


def _joined(model: LensModel, prompt: TokenizedTranscript, thought: Decoded) -> TokenizedTranscript:
    """A prompt with the thinking and the closing that were generated behind it."""
    thinking, closing, _ = spans_seen(model, thought)
    stops = np.cumsum([prompt.n_pos, len(thinking), len(closing)]).tolist()
    return TokenizedTranscript(
        id=prompt.id,
        token_ids=np.array([*prompt.token_ids.tolist(), *thinking, *closing], dtype=np.int64),
        bounds=(stops[0], stops[1], stops[2], stops[2]),
    )
