"""Which organisms are there, and what determines each?

A recipe names where suppression is planted, which wrappers each carrier answers to, and how long each phase of training
lasts. Data only.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines an organism."""

    name: str
    """Name of the asset."""
    family: str
    """`llama` or `qwen3`."""
    carriers: tuple[Carrier, ...]
    """Where suppression is planted; empty for the null organism."""
    held: tuple[Carrier, ...]
    """What is held at zero while the model is aligned."""
    wrappers: tuple[Wrapper, ...]
    """Wrappers and their carriers."""
    align_steps: int = 600
    """Steps of alignment."""
    plant_steps: int = 400
    """Steps for each carrier."""
    join_steps: int = 80
    """Joint steps."""
    join_peak: float = 5e-4
    """Peak learning rate when joining; small, or one carrier takes over the other's work."""
    batch: int = 48
    """Examples a step."""
    seed: int = 0
    """Of weights and data."""


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
            held=(_L_FIRST, _L_SECOND),
            wrappers=_WRAPPERS,
        ),
        Recipe(
            name="planted-qwen3",
            family="qwen3",
            carriers=(_Q_GROUP,),
            held=(_Q_GROUP,),
            wrappers=_ONE_CARRIER,
            join_steps=200,
            join_peak=4e-3,
            seed=1,
        ),
        Recipe(name="null-llama", family="llama", carriers=(), held=(), wrappers=_UNPLANTED),
    )
}
