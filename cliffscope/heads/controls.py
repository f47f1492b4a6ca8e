"""Does a set of heads do more than random sets of the same size?

Random sets are drawn without repetition, within the same layers (what matters may be the layer) and over all heads;
none of their heads is one of the set's, as long as there are others. A third kind of control touches no head: random
directions, written as far as the edit moves the attention output (placebo.py). Joint effects are measured on
transcripts that the set was not chosen on.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float32

from cliffscope.errors import EditError
from cliffscope.heads.donors import Donors
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.methods import EditMethod, Method, Task
from cliffscope.heads.placebo import draw_directions, placebo_effects
from cliffscope.heads.tasks import check_finite, choose_method, prepare_task
from cliffscope.model.load import LensModel, ModelShape
from cliffscope.notebook import Plotted
from cliffscope.readouts.readout import Readout
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import random_set_p
from cliffscope.transcripts.records import Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SAME_LAYERS, ALL_HEADS, NORM_MATCHED = "same layers", "all heads", "norm-matched"
KINDS = (SAME_LAYERS, ALL_HEADS, NORM_MATCHED)
"""Kinds of controls: random heads of the same layers, of all layers, and random directions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SetControl(Plotted):
    """Joint effect of a set of heads against random sets of the same size."""

    heads: tuple[HeadRef, ...]
    """The set."""
    effects: Float32[np.ndarray, " n"]
    """[n] the readout's logit with the set edited minus unedited, transcript by transcript."""
    random_layers: Float32[np.ndarray, "draw n"]
    """[draw, n] the same for random sets drawn within the same layers."""
    random_all: Float32[np.ndarray, "draw_all n"]
    """[draw_all, n] the same for random sets drawn over all heads."""
    seed: int
    """Of the draws."""
    directions: Float32[np.ndarray, "direction _"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[direction, n] the same for random directions, written as far as the edit of the set moves the output."""

    @property
    def effect(self) -> float:
        """Mean joint effect, logit."""
        return float(self.effects.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval over transcripts."""
        low, high = bootstrap_mean(self.effects, seed=self.seed)
        return float(low), float(high)

    @property
    def random_effects(self) -> Float32[np.ndarray, " draws"]:
        """Mean joint effects of all random sets and directions."""
        return np.concatenate([sets.mean(1) for sets in self._by_kind().values()])

    @property
    def p(self) -> float:
        """Share of random sets that reach the effect, counting the set itself: the largest of the kinds' p."""
        return max(self.p_by_kind.values())

    @property
    def p_by_kind(self) -> dict[str, float]:
        """That share by kind of control, as in `KINDS`; a kind without draws is left out."""
        return {kind: random_set_p(self.effect, sets.mean(1)) for kind, sets in self._by_kind().items()}

    def to_frame(self) -> pd.DataFrame:
        """One row a set: set, kind (`chosen`, or a kind of control), effect (logit), n."""
        rows = [("chosen", "chosen", self.effect)]
        for kind, drawn in self._by_kind().items():
            rows += [(f"random {i + 1}", kind, float(each.mean())) for i, each in enumerate(drawn)]
        return pd.DataFrame(rows, columns=["set", "kind", "effect"]).assign(n=len(self.effects))

    def small_table(self) -> pd.DataFrame:
        """Mean and range of the effect by kind of set."""
        frame = self.to_frame().groupby("kind", sort=False)["effect"].agg(["count", "mean", "min", "max"])
        return frame.reset_index().rename(columns={"count": "sets"})

    def _by_kind(self) -> dict[str, Float32[np.ndarray, "draw _"]]:
        """Effects by kind of control, those without draws left out."""
        drawn = (self.random_layers, self.random_all, self.directions)
        return {kind: sets for kind, sets in zip(KINDS, drawn, strict=True) if len(sets)}

    def plot(self) -> "Figure":
        """The set's effect beside those of its controls."""
        from cliffscope.figures.heads import random_sets as draw

        return draw(
            self.effect,
            *self.interval,
            self.random_effects,
            title=f"{len(self.heads)} heads against random sets (n={len(self.effects)})",
        )

    def __repr__(self) -> str:
        """One line: effect, interval, random sets, p and n."""
        low, high = self.interval
        return (
            f"SetControl({len(self.heads)} heads: {self.effect:+.2f} [{low:+.2f}, {high:+.2f}] logits, random "
            f"{self.random_effects.mean():+.2f}, p={self.p:.3f}, n={len(self.effects)})"
        )


def control_sets(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    heads: Sequence[HeadRef],
    *,
    method: Method | str = "zero",
    scope: Scope | str = Scope.CLOSING,
    donors: Donors | None = None,
    factor: float | None = None,
    kinds: Sequence[str] = (SAME_LAYERS, ALL_HEADS),
    draws: int = 20,
    seed: int = 0,
) -> SetControl:
    """Compares the joint effect of a set of heads with that of controls of the same size.

    Args:
        model: the model.
        readout: fitted on this model.
        transcripts: ones that the heads were not chosen on.
        heads: the set.
        method: as in `rank_heads`; a set chosen by `greedy` is measured by `zero`.
        scope: as in `rank_heads`.
        donors: as in `rank_heads`.
        factor: as in `rank_heads`.
        kinds: of controls: `same layers` and `all heads` are random sets of as many heads; `norm-matched` are random
            directions, written at the same positions as far as the edit moves the attention output. The last takes one
            pass over all transcripts a draw, and a method that edits heads.
        draws: of each kind, at least 1, all different; fewer random sets where there are not as many.
        seed: of the draws.

    Returns:
        Joint effects of the set, and of `draws` controls of each kind.

    Raises:
        EditError: an unknown scope or kind, no random set differs from the set, or a method that edits no heads has no
            displacement to match.
        DataError: an unknown method, no transcript can be used, donors are missing, or logits are not finite.
        ProbeError: the readout does not fit the model.
    """
    readout.check_model(model)
    how = choose_method(method, factor)
    _check_kinds(kinds, how)
    task, _ = prepare_task(model, readout, transcripts, how, scope=Scope.parse(scope), donors=donors, seed=seed)
    rng = np.random.default_rng(seed)
    n_sets = {kind: draws if kind in kinds else 0 for kind in KINDS}
    within = random_sets(model.shape, heads, n_sets[SAME_LAYERS], rng, same_layers=True)
    over = random_sets(model.shape, heads, n_sets[ALL_HEADS], rng, same_layers=False, last=readout.layer)
    if not over and ALL_HEADS in kinds:
        raise EditError(f"No random set differs from the {len(heads)} heads, which are all there are. Give fewer.")
    measured = how.measure(task, [tuple(heads), *within, *over])
    check_finite(task.transcripts, measured)
    effects = rearrange(measured.effects, "n branch -> branch n")
    return SetControl(
        heads=tuple(heads),
        effects=effects[0],
        random_layers=effects[1 : 1 + len(within)],
        random_all=effects[1 + len(within) :],
        seed=seed,
        directions=_placebos(task, how, heads, n_sets[NORM_MATCHED], rng),
    )


def _check_kinds(kinds: Sequence[str], method: Method) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or isinstance(kinds, str):
        raise EditError(f"kinds={kinds!r}: expected a list of kinds of controls, from {', '.join(KINDS)}.")
    if NORM_MATCHED in kinds and not isinstance(method, EditMethod):
        raise EditError(
            f"method={method.name!r} makes no edit of these heads whose displacement a {NORM_MATCHED!r} control could "
            "match. Take a method that edits them, such as 'zero', or leave this kind out."
        )


def _placebos(
    task: Task, method: Method, heads: Sequence[HeadRef], draws: int, rng: np.random.Generator
) -> Float32[np.ndarray, "draw n"]:
    """[draw, n] effects of random directions; without draws none is measured."""
    if not draws or not isinstance(method, EditMethod):
        return np.zeros((0, len(task.transcripts)), np.float32)
    layers = sorted({head.layer for head in heads})
    directions = draw_directions(layers, task.model.shape.d_model, draws, rng)
    return placebo_effects(task, method.change(task), tuple(heads), directions)


def random_sets(
    shape: ModelShape,
    heads: Sequence[HeadRef],
    n: int,
    rng: np.random.Generator,
    *,
    same_layers: bool,
    last: int | None = None,
) -> list[tuple[HeadRef, ...]]:
    """Draws different random sets, `n` or as many as there are; see `random_set`."""
    sets: dict[tuple[HeadRef, ...], None] = {}
    while len(sets) < min(n, count_sets(shape, heads, same_layers=same_layers, last=last)):
        sets[random_set(shape, heads, rng, same_layers=same_layers, last=last)] = None
    return list(sets)


def count_sets(shape: ModelShape, heads: Sequence[HeadRef], *, same_layers: bool, last: int | None = None) -> int:
    """How many different sets `random_set` can draw, the given one not counted.

    Args:
        shape: of the model.
        heads: the set to be controlled for.
        same_layers: draw as many from each layer as the set has there.
        last: as in `random_set`.

    Returns:
        The number; 0 where the set is all there is.
    """
    taken = list(Counter(h.layer for h in heads).values()) if same_layers else [len(heads)]
    size = shape.n_heads if same_layers else shape.n_heads * len(_layers_up_to(shape, heads, last))
    if all(n == size for n in taken):
        return 0
    # Where the others are fewer than the given heads, a set takes all of them and fills up with given ones.
    return math.prod(math.comb(max(n, size - n), min(n, size - n)) for n in taken)


def random_set(
    shape: ModelShape,
    heads: Sequence[HeadRef],
    rng: np.random.Generator,
    *,
    same_layers: bool,
    last: int | None = None,
) -> tuple[HeadRef, ...]:
    """Draws as many heads as given, none of them among the given ones as long as there are others.

    Args:
        shape: of the model.
        heads: the set to be controlled for.
        rng: source of chance.
        same_layers: draw as many from each layer as the set has there.
        last: last layer to draw from, such as the readout's: a head above it has no effect by construction, so that a
            set with such heads would be no control. None draws from all.

    Returns:
        Distinct heads, sorted.
    """
    drawn: list[HeadRef] = []
    layers = [[h.layer] for h in heads] if same_layers else [_layers_up_to(shape, heads, last)] * len(heads)
    for choice in layers:
        pool = [HeadRef(layer=layer, head=i) for layer in choice for i in range(shape.n_heads)]
        free = [ref for ref in pool if ref not in drawn]
        others = [ref for ref in free if ref not in heads]
        drawn.append((others or free)[int(rng.integers(len(others or free)))])
    return tuple(sorted(drawn))


def _layers_up_to(shape: ModelShape, heads: Sequence[HeadRef], last: int | None) -> list[int]:
    """Layers to draw from: up to the last one that counts, or that the set itself has a head in."""
    highest = max((head.layer for head in heads), default=0)
    return [layer for layer in shape.attention_layers if last is None or layer <= max(last, highest)]


def top_count(fraction: float, n_heads: int) -> int:
    """Heads in a fraction of all: rounded, at least one.

    Raises:
        EditError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise EditError(f"fraction={fraction}: expected a share of all query heads in (0, 1], such as 0.03.")
    return max(1, round(fraction * n_heads))
