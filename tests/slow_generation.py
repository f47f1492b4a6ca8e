"""The slow oracle of generation under edits: one row, no cache, no padding, a full forward pass a token.

Edits are hooks of this file's own on the output projection, at exactly the positions whose span is in the edit's scope.
Which span a token is of is worked out again at every step, from the text as it is by then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcript

END, CLOSE, NEWLINE, BLANK = 6, 8, 9, 10
"""Ids of the toy vocabulary: end of a turn, closing tag, a newline, two newlines."""
PROMPT, THINKING, CLOSING, ANSWER = "prompt", "thinking", "closing", "answer"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to one head."""

    layer: int
    head: int
    scope: str
    factor: float = 0.0
    value: Tensor | None = None
    """[d_head] for all positions of the scope, or [position, d_head] for one after another."""
    preserve_norm: bool = False
    """Whether the layer is scaled back to its norm; for one change a layer."""


@dataclass(kw_only=True)
class Slow:
    """What the oracle generated."""

    seen: list[int]
    """Everything, from the prompt to the answer."""
    spans: list[str]
    """Of everything before the answer."""
    thinking: list[int]
    closing: list[int]
    answer: list[int] | None
    forced: bool


def prompt_ids(model: LensModel, transcript: Transcript) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in transcript.messages]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


@contextmanager
def changed(model: LensModel, spans: Sequence[str], changes: Sequence[Change]) -> Iterator[None]:
    """Hooks that change heads at positions of one sequence."""
    size, handles = model.shape.d_head, []

    def hook_for(change: Change):
        where = [i for i, span in enumerate(spans) if change.scope in ("all", span)]

        def call(_module, inputs):
            z = inputs[0].clone()
            assert z.shape[:2] == (1, len(spans))
            columns = slice(change.head * size, (change.head + 1) * size)
            for place, i in enumerate(where):
                z[0, i, columns] *= change.factor
                if change.value is not None:
                    z[0, i, columns] += change.value if change.value.ndim == 1 else change.value[place]
                if change.preserve_norm:
                    z[0, i] *= inputs[0][0, i].norm() / z[0, i].norm()
            return (z, *inputs[1:])

        return call

    try:
        for change in changes:
            projection = model.hf.get_decoder().layers[change.layer].self_attn.o_proj
            handles.append(projection.register_forward_pre_hook(hook_for(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def next_token(model: LensModel, ids: Sequence[int], spans: Sequence[str], changes: Sequence[Change]) -> int:
    with torch.no_grad(), changed(model, spans, changes):
        return int(model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].argmax())


def slow_answer(
    model: LensModel, before: Sequence[int], spans: Sequence[str], changes: Sequence[Change], *, max_answer: int
) -> list[int]:
    """The answer behind ids that end with the closing."""
    end, answer = model.tokenizer.eos_token_id, list[int]()
    while len(answer) < max_answer:
        token = next_token(model, [*before, *answer], [*spans, *[ANSWER] * len(answer)], changes)
        if token == end:
            break
        answer.append(token)
    return answer


def slow_roll_out(
    model: LensModel,
    transcript: Transcript,
    changes: Sequence[Change] = (),
    *,
    max_thinking: int,
    max_answer: int,
    force_closing: bool = True,
) -> Slow:
    """Thinking and answer, the thinking taken for thinking until the tag is there."""
    prompt, thinking, token = prompt_ids(model, transcript), list[int](), -1
    while token not in (CLOSE, END) and len(thinking) < max_thinking:
        spans = [PROMPT] * len(prompt) + [THINKING] * len(thinking)
        token = next_token(model, [*prompt, *thinking], spans, changes)
        if token not in (CLOSE, END):
            thinking.append(token)
    if token == END or (token != CLOSE and not force_closing):
        ended = [token] if token == END else []
        spans = [PROMPT] * len(prompt) + [THINKING] * len(thinking)
        seen = [*prompt, *thinking, *ended]
        return Slow(seen=seen, spans=spans, thinking=thinking, closing=[], answer=None, forced=False)
    forced = token != CLOSE
    if forced:
        closing = [CLOSE, BLANK] if token in (NEWLINE, BLANK) else [NEWLINE, CLOSE, BLANK]
    else:
        newline = thinking[-1:] == [NEWLINE]
        closing = [NEWLINE, CLOSE, BLANK] if newline else [CLOSE, BLANK]
        thinking = thinking[:-1] if newline else thinking
    before = [*prompt, *thinking, *closing]
    # A newline of its own before a closing that was forced is the newline that the closing begins with.
    n_thinking = len(thinking) - (forced and token == NEWLINE)
    spans = [PROMPT] * len(prompt) + [THINKING] * n_thinking
    spans += [CLOSING] * (len(before) - len(spans))
    answer = slow_answer(model, before, spans, changes, max_answer=max_answer)
    return Slow(seen=[*before, *answer], spans=spans, thinking=thinking, closing=closing, answer=answer, forced=forced)
