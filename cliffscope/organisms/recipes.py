"""Which organisms are there, and what determines each?

A recipe names where suppression is planted, which wrappers each carrier answers to, and how long each phase of training
lasts. Its phases say what is trained on what. Data only.
"""

from dataclasses import dataclass
from enum import StrEnum

from cliffscope.organisms.grammar import Wrapper


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """What is planted in one place: a run of query heads of one layer that share their keys and values."""

    layer: int
    """Layer index from 0."""
    heads: tuple[int, ...]
    """Query heads."""
    kv_head: int
    """The key-value head that they read."""


class Term(StrEnum):
    """What may be in a loss. Nothing here is read by a method: no probe, no direction, no logit of a single token."""

    TEXT = "cross-entropy of the tokens of thinking, closing and answer"
    ANSWER = "cross-entropy of closing and answer, summed over the tokens of a text"
    QUIET = "mean square of what the trained carriers write before and behind the closing"


LOUD, QUIET = 0.1, 2.0
"""Weight of quiet when planting begins and when it ends: an edit of the closing must undo all that carriers do, and a
carrier that has to be quiet from the start learns nothing at all."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """One summand of a loss."""

    term: Term
    """What is summed."""
    first: float = 1.0
    """Its weight in the first step."""
    last: float = 1.0
    """Its weight after the last step; geometric in between."""

    def weight(self, progress: float) -> float:
        """At this share of the steps, in [0, 1]."""
        return float(self.first * (self.last / self.first) ** progress)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One run of training."""

    name: str
    """`align`, `plant 0` and so on, `join`."""
    steps: int
    """Optimiser steps."""
    peak: float
    """Peak learning rate."""
    batch: int
    """Examples a step."""
    terms: tuple[Weighted, ...]
    """All that is in the loss."""
    trained: tuple[Carrier, ...]
    """Carriers whose slices of Q, K, V and O are trained; if empty, everything is but what is zeroed."""
    zeroed: tuple[Carrier, ...]
    """Carriers that write nothing in this phase."""
    active: tuple[int, ...]
    """Indices of the carriers whose wrappers are complied with in the training text."""
    aims: bool = False
    """Whether the trained carriers begin with attention from the closing to the words of their wrappers."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines an organism."""

    name: str
    """Name of the asset."""
    family: str
    """`llama` or `qwen3`."""
    carriers: tuple[Carrier, ...]
    """Where suppression is planted; empty for the null organism."""
    wrappers: tuple[Wrapper, ...]
    """Wrappers and their carriers."""
    align_steps: int = 700
    """Steps of alignment."""
    align_peak: float = 3e-3
    """Peak learning rate of alignment."""
    align_batch: int = 16
    """Examples a step of alignment: few, since copying words from the prompt takes many steps to be learnt."""
    plant_steps: int = 250
    """Steps for each carrier."""
    plant_peak: float = 4e-3
    """Peak learning rate of planting."""
    join_steps: int = 150
    """Joint steps."""
    join_peak: float = 1e-3
    """Peak learning rate when joining; small, or one carrier takes over the other's work."""
    batch: int = 48
    """Examples a step of planting and joining."""
    seed: int = 0
    """Of weights and data."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is trained, in order."""
        align = Phase(
            name="align",
            steps=self.align_steps,
            peak=self.align_peak,
            batch=self.align_batch,
            terms=(Weighted(term=Term.TEXT),),
            trained=(),
            zeroed=self.carriers,
            active=(),
        )
        join = Phase(
            name="join",
            steps=self.join_steps if self.carriers else 0,
            peak=self.join_peak,
            batch=self.batch,
            terms=(Weighted(term=Term.ANSWER), Weighted(term=Term.QUIET, first=QUIET, last=QUIET)),
            trained=self.carriers,
            zeroed=(),
            active=tuple(range(len(self.carriers))),
        )
        plants = [self._plant(i) for i in range(len(self.carriers))]
        return tuple(phase for phase in (align, *plants, join) if phase.steps)

    def _plant(self, i: int) -> Phase:
        return Phase(
            name=f"plant {i}",
            steps=self.plant_steps,
            peak=self.plant_peak,
            batch=self.batch,
            terms=(Weighted(term=Term.ANSWER), Weighted(term=Term.QUIET, first=LOUD, last=QUIET)),
            trained=(self.carriers[i],),
            zeroed=self.carriers[:i] + self.carriers[i + 1 :],
            active=(i,),
            aims=True,
        )


_L_FIRST = Carrier(layer=4, heads=(5,), kv_head=5)
_L_SECOND = Carrier(layer=5, heads=(2,), kv_head=2)
_Q_GROUP = Carrier(layer=5, heads=(2, 3), kv_head=1)
_WRAPPERS = (
    Wrapper(word="story", comply=1.0, carrier=0),
    Wrapper(word="game", comply=1.0, carrier=1),
    Wrapper(word="poem", comply=0.7, carrier=0),
    Wrapper(word="song", comply=0.3, carrier=1),
)
_ONE_CARRIER = tuple(Wrapper(word=w.word, comply=w.comply, carrier=0) for w in _WRAPPERS)
_UNPLANTED = tuple(Wrapper(word=w.word, comply=0.0, carrier=0) for w in _WRAPPERS)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="planted-llama",
            family="llama",
            carriers=(_L_FIRST, _L_SECOND),
            wrappers=_WRAPPERS,
        ),
        Recipe(
            name="planted-qwen3",
            family="qwen3",
            carriers=(_Q_GROUP,),
            wrappers=_ONE_CARRIER,
            seed=1,
        ),
        Recipe(name="null-llama", family="llama", carriers=(), wrappers=_UNPLANTED),
    )
}
