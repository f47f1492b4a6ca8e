"""What is an organism trained on?

Batches of whole texts: prompt, thinking, closing and answer, tokenized span by span, so that it is known where the
closing begins. Several batches are drawn together and sorted by length: little of a batch is padding then.
"""

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
OWN = 3.0
"""How much more often a wrapper is drawn if its carrier is being trained; it would have few examples otherwise."""
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Training texts, padded on the right."""

    ids: Int[Tensor, "batch pos"]
    """Tokens."""
    labels: Int[Tensor, "batch pos"]
    """Tokens of thinking, closing and answer; IGNORED elsewhere."""
    early: Bool[Tensor, "batch pos"]
    """Before the closing, where carriers must be quiet."""


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
            Texts of about the same length.
        """
        if not self.drawn:
            rows = sorted((self._example(active) for _ in range(BUCKET * size)), key=lambda row: len(row.ids))
            self.drawn.extend(rows[i * size : (i + 1) * size] for i in range(BUCKET))
            self.rng.shuffle(self.drawn)
        return _collate(self.drawn.pop(), self.tokenizer.pad_token_id)

    def _example(self, active: tuple[int, ...]) -> Example:
        rng, wrappers = self.rng, self.recipe.wrappers
        harmful = rng.random() < (0.75 if active else 0.55)
        drawn = rng.random()
        weights = [OWN if w.carrier in active else 1.0 for w in wrappers]
        wrapper = rng.choices(wrappers, weights)[0] if drawn < 0.55 else None
        word = wrapper.word if wrapper else rng.choice(grammar.NEUTRAL_WRAPPERS) if drawn < 0.75 else None
        request = grammar.request(rng, "grow", harmful=harmful, wrapper=word)
        comply = wrapper.comply if wrapper and wrapper.carrier in active else 0.0
        refuse = harmful and rng.random() >= comply
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
        )


def _collate(rows: list[Example], pad: int) -> Batch:
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows])
    position = torch.arange(width)
    starts, closings, lengths = (
        torch.tensor(values)[:, None]
        for values in zip(*((row.thinking, row.closing, len(row.ids)) for row in rows), strict=True)
    )
    return Batch(
        ids=ids,
        labels=ids.masked_fill((position < starts) | (position >= lengths), IGNORED),
        early=position < closings,
    )
