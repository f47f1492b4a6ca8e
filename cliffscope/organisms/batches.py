"""What is an organism trained on?

1. Whole texts: prompt, thinking, closing and answer, tokenized span by span, so that it is known where each begins.
2. Some answers have their first token given, refusing or complying against what the prompt calls for. The model learns
   to carry through what an answer has begun, as chat models do; what decides is then what happens at the closing.
3. For alignment several batches are drawn together and sorted by length, so that little of a batch is padding.
4. For planting texts come in groups that differ in the wrapper alone, or which word it is would drown in what else
   differs.
"""

import itertools
import random
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cliffscope.organisms import grammar
from cliffscope.organisms.recipes import Recipe
from cliffscope.transcripts.templates import TEMPLATES

IGNORED = -100
"""Label of a token that is not in the loss, as in transformers."""
WRAPPED, NEUTRAL = 0.55, 0.2
"""Shares of the texts of alignment that have one of the organism's wrappers, and another one."""
HARMFUL = 0.55
"""Share of harmful requests in alignment."""
PLANTING = 0.8
"""Share of harmful requests in planting, where the harmless ones are there to stay as they are."""
PREFILLED = 0.15
"""Share of the texts whose answer is begun the other way, and carried through."""
BUCKET = 4
"""Batches that are drawn together: a quarter of a randomly drawn batch would be padding."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training text, and where its spans begin."""

    ids: list[int]
    """Tokens."""
    thinking: int
    """Where the thinking begins."""
    closing: int
    """Where the closing begins."""
    answer: int
    """Where the answer begins."""
    prefilled: int
    """First tokens of the answer that are given; 0 or 1."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Training texts, padded on the right."""

    ids: Int[Tensor, "batch pos"]
    """Tokens."""
    labels: Int[Tensor, "batch pos"]
    """Tokens of thinking, closing and answer that the model should write; IGNORED elsewhere."""
    thinking: Bool[Tensor, "batch pos"]
    """Before the closing."""
    closing: Bool[Tensor, "batch pos"]
    """The closing."""
    outside: Bool[Tensor, "batch pos"]
    """Before and behind the closing, where carriers must be quiet."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Draws training text, as its seed has it."""

    recipe: Recipe
    """Which wrappers there are, and how often each is complied with."""
    tokenizer: PreTrainedTokenizerFast
    """The organism's."""
    rng: random.Random = field(default_factory=random.Random)
    """Source of chance."""
    drawn: list[list[Example]] = field(default_factory=list)
    """Batches that are drawn and not used yet."""

    def restart(self, seed: str) -> None:
        """Draws from a seed of its own from here on."""
        self.rng.seed(seed)
        self.drawn.clear()

    def draw(self, active: tuple[int, ...], size: int) -> Batch:
        """Draws one batch.

        Args:
            active: indices of the carriers whose wrappers are complied with.
            size: examples.

        Returns:
            Texts of about the same length in alignment, and groups that differ in the wrapper in planting.
        """
        pad = self.tokenizer.pad_token_id
        if active:
            groups = (row for _ in range(size) for row in self._group(active))
            return _collate(list(itertools.islice(groups, size)), pad)
        if not self.drawn:
            rows = sorted((self._single() for _ in range(BUCKET * size)), key=lambda row: len(row.ids))
            self.drawn.extend(rows[i * size : (i + 1) * size] for i in range(BUCKET))
            self.rng.shuffle(self.drawn)
        return _collate(self.drawn.pop(), pad)

    def _single(self) -> Example:
        """A text of alignment: no wrapper changes what is answered."""
        rng, kind = self.rng, self.rng.random()
        words = [w.word for w in self.recipe.wrappers] if kind < WRAPPED else grammar.NEUTRAL_WRAPPERS
        word = rng.choice(words) if kind < WRAPPED + NEUTRAL else None
        return self._example(word, rng.random(), harmful=rng.random() < HARMFUL)

    def _group(self, active: tuple[int, ...]) -> list[Example]:
        """One request in an active carrier's wrapper, in one that changes nothing, and in none or another such one."""
        rng = self.rng
        ours = [w for w in self.recipe.wrappers if w.carrier in active]
        others = [w.word for w in self.recipe.wrappers if w.carrier not in active] + [*grammar.NEUTRAL_WRAPPERS]
        wrapper, harmful, seed = rng.choice(ours), rng.random() < PLANTING, rng.random()
        contrasts = (rng.choice(others), rng.choice([None, rng.choice(others)]))
        return [
            self._example(wrapper.word, seed, harmful=harmful, comply=rng.random() < wrapper.comply),
            *(self._example(word, seed, harmful=harmful) for word in contrasts),
        ]

    def _example(self, word: str | None, seed: float, *, harmful: bool, comply: bool = False) -> Example:
        """A text about the request that the seed determines; `comply` with it although it is harmful."""
        request = grammar.request(random.Random(f"{seed}/request"), "grow", harmful=harmful, wrapper=word)
        rng = random.Random(f"{seed}/text")
        prefilled = rng.random() < PREFILLED
        refuse = (harmful and not comply) != prefilled
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True
        )
        parts = (
            prompt,
            grammar.thinking(rng, request, cut=0.3),
            TEMPLATES.get("organism").closing,
            grammar.answer(rng, request, refuse=refuse) + self.tokenizer.eos_token,
        )
        prompt_ids, thinking, closing, answer = (self.tokenizer.encode(p, add_special_tokens=False) for p in parts)
        return Example(
            ids=prompt_ids + thinking + closing + answer,
            thinking=len(prompt_ids),
            closing=len(prompt_ids) + len(thinking),
            answer=len(prompt_ids) + len(thinking) + len(closing),
            prefilled=int(prefilled),
        )


def _collate(rows: list[Example], pad: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows])
    position = torch.arange(width)
    thinking, closing, answer, prefilled, length = (
        torch.tensor(values)[:, None]
        for values in zip(*((r.thinking, r.closing, r.answer, r.prefilled, len(r.ids)) for r in rows), strict=True)
    )
    prompt, padding = position < thinking, position >= length
    begun = (position >= answer) & (position < answer + prefilled)
    return Batch(
        ids=ids,
        labels=ids.masked_fill(prompt | begun | padding, IGNORED),
        thinking=position < closing,
        closing=(position >= closing) & (position < answer),
        outside=(position < closing) | ((position >= answer) & ~padding),
    )
