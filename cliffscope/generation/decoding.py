"""How do several prompts become thinking and answers, token by token?

1. The prompts are left-padded into one batch; one forward pass a step, with the cache.
2. Each row thinks until it writes the closing tag; then the rest of the closing is fed to it, as the template has it.
3. A row that reaches its thinking budget has the whole closing fed to it (or, on request, is left unfinished).
4. It answers until it ends its turn or reaches its answer budget. Finished rows leave the batch.

Sampling draws one uniform number a row and step from a seed and the row's key, so that a row does not depend on its
batch-mates. The cache grows in steps instead of being copied for every token, which changes no number. Knows tokens,
not transcripts.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cliffscope.errors import GenerationError
from cliffscope.memory import few_threads
from cliffscope.model.load import LensModel
from cliffscope.transcripts.templates import closing_ids

_ROOM = 64
"""Positions that a cache grows by at least."""
_LOOK_BACK = 8
"""Tokens of thinking in which a closing tag is looked for; the longest known tag has five."""


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
    """What was generated for one prompt."""

    thinking: tuple[int, ...]
    """Ids between the tags; empty without thinking."""
    answer: tuple[int, ...]
    """Ids after the closing, without the end of the turn."""
    closed: bool
    """Whether an answer could begin."""
    forced: bool
    """Whether the closing was fed at the thinking budget."""


def decode(model: LensModel, prompts: Sequence[Sequence[int]], keys: Sequence[str], budget: Budget) -> list[Decoded]:
    """Decodes a batch of prompts to their ends.

    Args:
        model: the model, under whatever edit holds.
        prompts: ids up to where thinking begins, or the answer where the template has no thinking.
        keys: one a prompt; with the budget's seed it determines what is drawn.
        budget: equal for all of them.

    Returns:
        One result a prompt, in order.
    """
    speaker = _Speaker(model, budget)
    rows = [speaker.start(key) for key in keys]
    batch = model.to_batch(prompts, left=True)
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    cache, live = _growing_cache(model), rows
    with torch.inference_mode(), few_threads(small=model.small):
        while live:
            output = model.hf(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = _choose(output.logits[:, -1], live, budget)
            fed = [speaker.advance(row, token) for row, token in zip(live, chosen, strict=True)]
            stay = [i for i, row in enumerate(live) if not row.ended]
            ids = torch.tensor([[fed[i]] for i in stay], device=mask.device, dtype=torch.long)
            if len(stay) < len(live):
                keep = torch.tensor(stay, device=mask.device, dtype=torch.long)
                mask, positions = mask[keep], positions[keep]
                if stay:
                    cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions[:, -1:] + 1
            live = [live[i] for i in stay]
    return [row.finished() for row in rows]


@dataclass(eq=False, kw_only=True)
class _Row:
    """One prompt's generation so far."""

    noise: np.ndarray
    closed: bool
    thinking: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    """Ids to be fed before the model speaks again."""
    forced: bool = False
    ended: bool = False
    steps: int = 0

    def finished(self) -> Decoded:
        """What came of it."""
        return Decoded(thinking=tuple(self.thinking), answer=tuple(self.answer), closed=self.closed, forced=self.forced)


class _Speaker:
    """Takes one token at a time into a row; what is the same for all rows is worked out once."""

    def __init__(self, model: LensModel, budget: Budget) -> None:
        """Encodes the closing and what stands for the end of a turn."""
        self._tokenizer, self._template, self._budget = model.tokenizer, model.template, budget
        self._ends, self._room = _end_ids(model), budget.room(model)
        thinks = model.template.thinks
        self._closing = closing_ids(model.tokenizer, model.template) if thinks else []
        self._bare = closing_ids(model.tokenizer, model.template, after_newline=True) if thinks else []
        self._completes: dict[int, bool] = {}

    def start(self, key: str) -> _Row:
        """A row before its first token."""
        drawn = _noise(f"{self._budget.seed}/{key}", self._room) if self._budget.temperature else np.empty(0)
        return _Row(noise=drawn, closed=not self._template.thinks)

    def advance(self, row: _Row, token: int) -> int:
        """Takes one token into a row; returns the token to be fed next."""
        row.steps += 1
        if row.waiting:
            return row.waiting.pop(0)
        if row.closed:
            row.answer.append(token)
            row.ended = token in self._ends or len(row.answer) >= self._budget.max_answer
            if token in self._ends:
                row.answer.pop()
            return token
        if token in self._ends:
            row.ended = True
            return token
        row.thinking.append(token)
        if self._closes(row):
            self._cut_tag(row)
        elif len(row.thinking) >= self._budget.max_thinking:
            row.forced = row.closed = self._budget.force_closing
            row.ended = not self._budget.force_closing
            carries = str(self._tokenizer.decode(row.thinking[-1:])).endswith("\n")
            row.waiting = list(self._bare if carries else self._closing)
        return token

    def _closes(self, row: _Row) -> bool:
        """Whether the last token completed the tag; most tokens cannot, which is looked up once a token."""
        last, tag = row.thinking[-1], self._template.think_close
        if last not in self._completes:
            self._completes[last] = tag[-1] in self._tokenizer.decode([last])
        return self._completes[last] and tag in self._tokenizer.decode(row.thinking[-_LOOK_BACK:])

    def _cut_tag(self, row: _Row) -> None:
        """Ends the thinking before its closing tag and queues what the template writes after the tag."""
        tag, decode_ids = self._template.think_close, self._tokenizer.decode
        length = len(row.thinking)
        cut = next(n for n in range(1, length + 1) if tag in decode_ids(row.thinking[length - n :]))
        row.thinking = row.thinking[: length - cut]
        after = self._tokenizer.encode(self._template.closing.partition(tag)[2], add_special_tokens=False)
        row.closed, row.waiting = True, list(after)
        newline = self._closing[: len(self._closing) - len(self._bare)]
        if newline and row.thinking[-len(newline) :] == newline:
            row.thinking = row.thinking[: -len(newline)]


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with room ahead, so that a token is written and not the whole layer copied for it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values; returns all of them, as views of the rooms."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if self._rooms[i].shape[-2] < stop:
                self._rooms[i] = _enlarged(self._rooms[i], start, stop + max(_ROOM, stop // 4))
            self._rooms[i][:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows, with their room."""
        length = self.get_seq_length()
        if length:
            self._rooms = [room[indices] for room in self._rooms]
            self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def _enlarged(room: Tensor, used: int, size: int) -> Tensor:
    larger = room.new_empty((*room.shape[:2], size, room.shape[-1]))
    larger[:, :, :used] = room[:, :, :used]
    return larger


def _growing_cache(model: LensModel) -> DynamicCache:
    """The architecture's own cache, its plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.hf.config)
    grow: Callable[[], DynamicLayer] = _GrowingLayer
    cache.layers = [grow() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _choose(logits: Tensor, rows: Sequence[_Row], budget: Budget) -> list[int]:
    if not budget.temperature:
        return [int(token) for token in logits.argmax(-1).tolist()]
    totals = torch.softmax(logits.double() / budget.temperature, -1).cumsum(-1).cpu()
    drawn = torch.tensor([[row.noise[row.steps]] for row in rows], dtype=torch.float64) * totals[:, -1:]
    return [int(token) for token in torch.searchsorted(totals, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)]


def _noise(key: str, n: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).random(n)


def _end_ids(model: LensModel) -> frozenset[int]:
    """Ids that end a turn, from the generation config and the tokenizer."""
    config = model.hf.generation_config
    declared = config.eos_token_id if config is not None else None
    found = declared if isinstance(declared, list) else [declared]
    return frozenset(int(i) for i in (*found, model.tokenizer.eos_token_id) if i is not None)
