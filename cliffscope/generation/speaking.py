"""What does a row do with the token that the model picks for it?

1. Thinking goes on until the closing tag is whole, or until the budget, where the closing is fed to the row.
2. What the template writes after the tag is fed to it before the model speaks again.
3. The answer goes on until the turn ends, or until its budget.

Sampling draws one uniform number a token from a seed and the row's id, counted from the first token of the thinking and
again from the first of the answer: a row depends neither on its batch-mates nor on how long it thought, and answers to
the same prompt are paired draw for draw. Knows no forward pass.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cliffscope.errors import GenerationError
from cliffscope.generation.row_edits import SPANS
from cliffscope.model.load import LensModel
from cliffscope.transcripts.templates import closing_ids, stop_sequences
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

_PART = "\N{REPLACEMENT CHARACTER}"
"""What a token decodes to that holds a part of a character."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how a transcript may be generated; equal for every arm of a comparison."""

    max_thinking: int = 1024
    """Tokens of thinking at most."""
    max_answer: int = 128
    """Tokens of answer at most."""
    temperature: float = 0.0
    """0 is greedy."""
    force_closing: bool = True
    """Whether thinking that reaches its budget is closed for the model; otherwise it is unfinished."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        """Refuses budgets under which nothing can be generated."""
        if self.max_thinking < 1 or self.max_answer < 1 or not self.temperature >= 0:
            raise GenerationError(
                f"max_thinking={self.max_thinking}, max_answer={self.max_answer}, temperature={self.temperature}: "
                "expected at least 1 token each and a temperature of 0 or more."
            )

    def room(self, model: LensModel) -> int:
        """Tokens that may follow a prompt."""
        if not model.template.thinks:
            return self.max_answer
        return self.max_thinking + len(closing_ids(model.tokenizer, model.template)) + self.max_answer


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoded:
    """What was generated for one row."""

    thinking: tuple[int, ...]
    """Ids between the tags; empty without thinking."""
    closing: tuple[int, ...]
    """Ids of the closing as the model saw them, the newline before the tag included; empty where it never closed."""
    answer: tuple[int, ...]
    """Ids after the closing, without the end of the turn."""
    closed: bool
    """Whether an answer could begin."""
    forced: bool
    """Whether the closing was fed at the thinking budget."""
    cut: bool
    """Whether the answer reached its budget before it ended."""


@dataclass(eq=False, kw_only=True)
class Row:
    """One row's generation so far."""

    index: int
    """Place in the batch that it began in."""
    thinking_noise: np.ndarray
    answer_noise: np.ndarray
    closed: bool
    closing: list[int] = field(default_factory=list)
    """Ids of the whole closing, once they are known."""
    thinking: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    """The last ids of the closing, to be fed before the model speaks again."""
    forced: bool = False
    cut: bool = False
    ended: bool = False
    span: int = SPANS.index(Span.THINKING)
    """Number of the span of the token that is fed next."""
    place: int = 0
    """Its place in that span; of the closing alone is it looked at."""

    @property
    def noise(self) -> float:
        """The uniform number that picks the next token."""
        if self.closed:
            return float(self.answer_noise[len(self.answer)])
        return float(self.thinking_noise[len(self.thinking)])

    def finished(self) -> Decoded:
        """What came of it."""
        return Decoded(
            thinking=tuple(self.thinking),
            closing=tuple(self.closing),
            answer=tuple(self.answer),
            closed=self.closed,
            forced=self.forced,
            cut=self.cut,
        )


class Speaker:
    """Takes one token at a time into a row; what is the same for all rows is worked out once."""

    def __init__(self, model: LensModel, budget: Budget, *, thinking_only: bool = False) -> None:
        """Encodes the closing and what stands for the end of a turn."""
        self.model, self.temperature = model, budget.temperature
        self._tokenizer, self._template, self._budget = model.tokenizer, model.template, budget
        self._thinking_only = thinking_only
        self._ends, self._long_ends = _ends(model)
        thinks = model.template.thinks
        self._closing = closing_ids(model.tokenizer, model.template) if thinks else []
        self._bare = closing_ids(model.tokenizer, model.template, after_newline=True) if thinks else []
        # A token may hold a single byte, so that a tag has at most as many tokens as bytes.
        self._look_back = len(model.template.think_close.encode()) + 1
        self._completes: dict[int, bool] = {}

    def start(self, index: int, row: TokenizedTranscript, *, closing: Sequence[int] = ()) -> Row:
        """A row before its first token, `closing` what will still be fed of its closing."""
        n_thinking, n_answer = (self._budget.max_thinking, self._budget.max_answer) if self.temperature else (0, 0)
        closing_present = row.token_ids[row.span(Span.CLOSING)].tolist()
        return Row(
            index=index,
            thinking_noise=_noise(f"{self._budget.seed}/{row.id}", n_thinking),
            answer_noise=_noise(f"answer/{self._budget.seed}/{row.id}", n_answer),
            closed=bool(closing_present) or not self._template.thinks,
            closing=closing_present,
            waiting=list(closing),
        )

    def advance(self, row: Row, token: int) -> int:
        """Takes one token into a row; returns the token to be fed next."""
        if row.waiting:
            row.span, row.place = SPANS.index(Span.CLOSING), len(row.closing) - len(row.waiting)
            return row.waiting.pop(0)
        if row.closed:
            row.span = SPANS.index(Span.ANSWER)
            row.answer.append(token)
            ending = self._ending(row.answer)
            row.cut = not ending and len(row.answer) >= self._budget.max_answer
            row.ended = row.cut or ending > 0
            del row.answer[len(row.answer) - ending :]
            return token
        row.thinking.append(token)
        # What closes thinking may be a token that ends a turn as well.
        if self._closes(row):
            self._cut_tag(row)
        elif ending := self._ending(row.thinking):
            row.ended = True
            del row.thinking[len(row.thinking) - ending :]
            return token
        elif len(row.thinking) >= self._budget.max_thinking:
            row.forced = row.closed = self._budget.force_closing
            row.ended = not self._budget.force_closing
            carries = str(self._tokenizer.decode(row.thinking[-1:])).endswith("\n")
            row.closing = list(self._bare if carries else self._closing) if row.closed else []
            row.waiting = list(row.closing)
        row.ended |= row.closed and self._thinking_only
        return token

    def _ending(self, ids: Sequence[int]) -> int:
        """How many of the last ids end the turn; 0 if it goes on."""
        if ids[-1] in self._ends:
            return 1
        return next((len(end) for end in self._long_ends if tuple(ids[-len(end) :]) == end), 0)

    def _closes(self, row: Row) -> bool:
        """Whether the last token completed the tag; most tokens cannot, which is looked up once a token."""
        last, tag = row.thinking[-1], self._template.think_close
        if last not in self._completes:
            text = self._tokenizer.decode([last])
            self._completes[last] = tag[-1] in text or _PART in text
        return self._completes[last] and tag in self._tokenizer.decode(row.thinking[-self._look_back :])

    def _cut_tag(self, row: Row) -> None:
        """Ends the thinking before its closing tag and queues what the template writes after the tag."""
        tag, decode_ids = self._template.think_close, self._tokenizer.decode
        written = row.thinking
        length = len(written)
        start = length - next(n for n in range(1, length + 1) if tag in decode_ids(written[length - n :]))
        newline = self._closing[: len(self._closing) - len(self._bare)]
        if newline and written[:start][-len(newline) :] == newline:
            start -= len(newline)
        after = self._tokenizer.encode(self._template.closing.partition(tag)[2], add_special_tokens=False)
        row.thinking, row.closing = written[:start], [*written[start:], *after]
        row.closed, row.waiting, row.span = True, list(after), SPANS.index(Span.CLOSING)


def pick(logits: Float[Tensor, "row vocabulary"], rows: Sequence[Row], temperature: float) -> list[int]:
    """The next token of each row: the likeliest at temperature 0, else the one that the row's number falls on."""
    if not temperature:
        return [int(token) for token in logits.argmax(-1).tolist()]
    totals = torch.softmax(logits.double() / temperature, -1).cumsum(-1).cpu()
    drawn = torch.tensor([[row.noise] for row in rows], dtype=torch.float64) * totals[:, -1:]
    return [int(token) for token in torch.searchsorted(totals, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)]


def _noise(key: str, n: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).random(n)


def _ends(model: LensModel) -> tuple[frozenset[int], tuple[tuple[int, ...], ...]]:
    """What ends a turn: single ids, and sequences of several; from chat template, generation config and tokenizer."""
    config = model.hf.generation_config
    declared = config.eos_token_id if config is not None else None
    single = {(int(i),) for i in (declared if isinstance(declared, list) else [declared]) if i is not None}
    ends = single.union(stop_sequences(model.tokenizer, model.template))
    return frozenset(end[0] for end in ends if len(end) == 1), tuple(sorted(end for end in ends if len(end) > 1))
