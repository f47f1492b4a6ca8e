"""How do several prompts become thinking and answers, token by token?

1. The prompts are left-padded into one batch. Each step is one forward pass with the cache.
2. Each row thinks until it writes the closing tag. The rest of the template's closing is then fed to it.
3. If a row reaches its thinking budget, the complete closing is fed to it (or, on request, the row stays unfinished).
4. The row answers until it ends its turn or reaches its answer budget. Finished rows leave the batch.

Sampling draws one uniform number for each row and step from a seed and the row's key, so that a row does not depend on
its batch-mates. The cache grows in steps instead of being copied for every token, which changes no number. This file
knows tokens, not transcripts.
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

_SPARE = 64
"""Minimum number of positions by which a cache grows."""
_LOOK_BACK = 8
"""Last tokens of the thinking that are searched for a closing tag; the longest known tag has five."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length limits and sampling of a transcript, equal for every arm of a comparison.

    Raises:
        GenerationError: a limit is below 1 token, or the temperature is negative.
    """

    max_thinking: int = 1024
    """Maximum tokens of thinking."""
    max_answer: int = 128
    """Maximum tokens of answer."""
    temperature: float = 0.0
    """0 is greedy."""
    force_closing: bool = True
    """Whether thinking that reaches its budget is closed for the model; otherwise the row stays unfinished."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Rejects budgets under which nothing can be generated."""
        if self.max_thinking < 1 or self.max_answer < 1 or not self.temperature >= 0:
            raise GenerationError(
                f"max_thinking={self.max_thinking}, max_answer={self.max_answer}, temperature={self.temperature}: "
                "expected at least 1 token each and a temperature of 0 or more."
            )

    def room(self, model: LensModel) -> int:
        """Maximum number of tokens after a prompt."""
        if not model.template.thinks:
            return self.max_answer
        return self.max_thinking + len(closing_ids(model.tokenizer, model.template)) + self.max_answer


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoded:
    """The ids that were generated for one prompt."""

    thinking: tuple[int, ...]
    """Ids between the tags; empty without thinking."""
    answer: tuple[int, ...]
    """Ids after the closing, without the end of the turn."""
    closed: bool
    """Whether an answer could start."""
    forced: bool
    """Whether the closing was fed because the thinking reached its budget."""


def decode(model: LensModel, prompts: Sequence[Sequence[int]], keys: Sequence[str], budget: Budget) -> list[Decoded]:
    """Decodes a batch of prompts to their ends.

    Args:
        model: the model, with any active edit.
        prompts: ids up to the start of the thinking, or of the answer if the template has no thinking.
        keys: one for each prompt; with the budget's seed it determines the random numbers.
        budget: equal for all prompts.

    Returns:
        One result for each prompt, in order.
    """
    advancer = _Advancer(model, budget)
    rows = [advancer.start(key) for key in keys]
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
            tokens = _choose(output.logits[:, -1], live, budget)
            fed = [advancer.advance(row, token) for row, token in zip(live, tokens, strict=True)]
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
class _Generation:
    """The state of one prompt's generation."""

    noise: np.ndarray
    closed: bool
    thinking: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    """Ids to feed before the model writes again."""
    forced: bool = False
    ended: bool = False
    steps: int = 0

    def finished(self) -> Decoded:
        """The result."""
        return Decoded(thinking=tuple(self.thinking), answer=tuple(self.answer), closed=self.closed, forced=self.forced)


class _Advancer:
    """Adds one token at a time to a row; whatever is equal for all rows is computed once."""

    def __init__(self, model: LensModel, budget: Budget) -> None:
        """Encodes the closing and collects the ids that end a turn."""
        self._tokenizer, self._template, self._budget = model.tokenizer, model.template, budget
        self._ends, self._room = _end_ids(model), budget.room(model)
        thinks = model.template.thinks
        self._closing = closing_ids(model.tokenizer, model.template) if thinks else []
        self._bare = closing_ids(model.tokenizer, model.template, after_newline=True) if thinks else []
        self._completes: dict[int, bool] = {}

    def start(self, key: str) -> _Generation:
        """The state of a row before its first token."""
        drawn = _noise(f"{self._budget.seed}/{key}", self._room) if self._budget.temperature else np.empty(0)
        return _Generation(noise=drawn, closed=not self._template.thinks)

    def advance(self, row: _Generation, token: int) -> int:
        """Adds one token to a row and returns the token to feed next."""
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

    def _closes(self, row: _Generation) -> bool:
        """Whether the last token completed the tag. Most tokens cannot, which is cached for each token."""
        last, tag = row.thinking[-1], self._template.think_close
        if last not in self._completes:
            self._completes[last] = tag[-1] in self._tokenizer.decode([last])
        return self._completes[last] and tag in self._tokenizer.decode(row.thinking[-_LOOK_BACK:])

    def _cut_tag(self, row: _Generation) -> None:
        """Cuts the thinking before its closing tag and queues the text that the template writes after the tag."""
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
    """A cache layer with spare positions, so that a new token does not copy the whole layer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_options: object
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values, and returns all of them as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if self._buffers[i].shape[-2] < stop:
                self._buffers[i] = _enlarged(self._buffers[i], start, stop + max(_SPARE, stop // 4))
            self._buffers[i][:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows, with their spare positions."""
        length = self.get_seq_length()
        if length:
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _enlarged(buffer: Tensor, used: int, size: int) -> Tensor:
    larger = buffer.new_empty((*buffer.shape[:2], size, buffer.shape[-1]))
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


def _growing_cache(model: LensModel) -> DynamicCache:
    """The architecture's own cache, with its plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.hf.config)
    grow: Callable[[], DynamicLayer] = _GrowingLayer
    cache.layers = [grow() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _choose(logits: Tensor, rows: Sequence[_Generation], budget: Budget) -> list[int]:
    if not budget.temperature:
        return [int(token) for token in logits.argmax(-1).tolist()]
    totals = torch.softmax(logits.double() / budget.temperature, -1).cumsum(-1).cpu()
    drawn = torch.tensor([[row.noise[row.steps]] for row in rows], dtype=torch.float64) * totals[:, -1:]
    return [int(token) for token in torch.searchsorted(totals, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)]


def _noise(key: str, n: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).random(n)


def _end_ids(model: LensModel) -> frozenset[int]:
    """Ids that end a turn, according to the generation config and the tokenizer."""
    config = model.hf.generation_config
    declared = config.eos_token_id if config is not None else None
    ends = declared if isinstance(declared, list) else [declared]
    return frozenset(int(i) for i in (*ends, model.tokenizer.eos_token_id) if i is not None)
