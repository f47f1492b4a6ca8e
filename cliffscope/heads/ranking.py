"""Which heads suppress refusal?

1. Every head up to the probe's layer is edited on its own, at the closing, in every transcript (the packed sweep).
2. Effect of a head: refusal logit at the final position, edited minus unedited, mean over transcripts, with a bootstrap
   interval over transcripts. Positive: the head suppresses refusal.
3. p: sign-flip permutation over transcripts of the head's effect beyond that of the typical head, and beyond the
   smallest effect that matters: two fifths of an equal part, among the first 3% of the heads, of the gap between the
   refused transcripts' logit and these transcripts'. Where the gap is below `LEAST_GAP` in score nothing is suppressed,
   and no head can be significant. q: Benjamini-Hochberg over all heads.
4. Controls: the same heads on harmless transcripts; and, for the top heads together, random sets of the same size,
   drawn within the same layers and over all heads, on transcripts that the ranking has not seen.

Source: refusal suppression heads, arXiv 2510.06036, section 4; intervals and controls are added here.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32

from cliffscope.errors import DataError, EditError
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.sweep import Branch, Sweep, sweep_branches
from cliffscope.models import LensModel, ModelShape
from cliffscope.probing.probe import RefusalProbe
from cliffscope.stats import benjamini_hochberg, bootstrap_mean, random_set_p, sign_flip_p
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize_all

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FRACTION = 0.03
"""Share of all heads that the paper edits."""
SHARE = 0.4
"""An effect matters from this share of what each of the first `FRACTION` of the heads would have to restore, were they
to close the refusal gap in equal parts: small heads count in a large model, where many share the work."""
LEAST_GAP = 0.1
"""Refusal gap in score below which nothing counts as suppressed: where all transcripts are refused anyway, heads still
move the logit, but there is nothing to restore."""
METHODS = {"zero": 0.0}


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRanking:
    """Effects of all heads, each edited on its own."""

    heads: tuple[HeadRef, ...]
    """Every query head, layer by layer."""
    effects: Float32[np.ndarray, "n head"]
    """[n, head] refusal logit, edited minus unedited; exactly 0 above the probe's layer, which the probe cannot see."""
    clean: Float32[np.ndarray, " n"]
    """[n] unedited logits."""
    harmless_effects: Float32[np.ndarray, "m head"]
    """[m, head] the same on harmless transcripts; m = 0 if none were given."""
    gap: float
    """Mean logit at the final token of held-out refused transcripts, minus that of these: what is there to restore."""
    gap_score: float
    """The same gap in score."""
    shape: ModelShape
    """Of the model."""
    method: str
    """How heads were edited."""
    scope: Scope
    """Where."""
    path: str
    """How it was computed: `packed`, or `plain` with the reason."""
    probe_layer: int
    """Layer of the probe."""
    seed: int
    """Of intervals and permutations."""
    omitted: tuple[Omission, ...]
    """Transcripts left out, and why."""

    def to_frame(self) -> pd.DataFrame:
        """One row a head, best first.

        Returns:
            layer, head, kv_group, effect (logit), effect_score, ci_low, ci_high (NaN with one transcript), p, q,
            effect_harmless, n, rank.
        """
        mean = self.effects.mean(0)
        low, high = bootstrap_mean(self.effects, seed=self.seed)
        p = self._p_values()
        frame = pd.DataFrame(
            {
                "layer": [h.layer for h in self.heads],
                "head": [h.head for h in self.heads],
                "kv_group": [self.shape.kv_group(h.head) for h in self.heads],
                "effect": mean,
                "effect_score": (_sigmoid(self.clean[:, None] + self.effects) - _sigmoid(self.clean)[:, None]).mean(0),
                "ci_low": low,
                "ci_high": high,
                "p": p,
                "q": benjamini_hochberg(p),
                "effect_harmless": self.harmless_effects.mean(0) if len(self.harmless_effects) else np.nan,
                "n": len(self.clean),
            }
        )
        frame["rank"] = frame["effect"].rank(ascending=False, method="first").astype(int)
        return frame.sort_values("rank", ignore_index=True)

    def top(self, fraction: float = FRACTION) -> tuple[HeadRef, ...]:
        """The heads with the largest effects.

        Args:
            fraction: of all query heads of the model, in (0, 1]; rounded, at least one head.

        Returns:
            Heads, best first. They need not be significant.
        """
        order = np.argsort(-self.effects.mean(0), kind="stable")
        return tuple(self.heads[i] for i in order[: top_count(fraction, len(self.heads))])

    def significant(self, q: float = 0.05) -> tuple[HeadRef, ...]:
        """The suppression heads: those whose q is at most `q`, best first."""
        frame = self.to_frame()
        passing = frame[frame["q"] <= q]
        return tuple(
            HeadRef(layer=int(layer), head=int(head))
            for layer, head in zip(passing["layer"], passing["head"], strict=True)
        )

    @property
    def least_effect(self) -> float:
        """Smallest effect that matters, logit."""
        return SHARE * self.gap / top_count(FRACTION, len(self.heads))

    def plot(self) -> "Figure":
        """Layer by head grid of the effects, significant heads outlined."""
        from cliffscope.figures.heads import head_grid

        grid = (self.shape.n_layers, self.shape.n_heads)
        low, high = bootstrap_mean(self.effects, seed=self.seed)
        selected = np.zeros(grid, dtype=bool)
        for ref in self.significant():
            selected[ref.layer, ref.head] = True
        return head_grid(
            self.effects.mean(0).reshape(grid),
            np.asarray(low).reshape(grid),
            np.asarray(high).reshape(grid),
            selected=selected,
            harmless=self.harmless_effects.mean(0).reshape(grid) if len(self.harmless_effects) else None,
            title=f"Effect of each head on refusal ({self.method}, {self.scope}, n={len(self.clean)})",
        )

    def _p_values(self) -> Float[np.ndarray, " head"]:
        if len(self.clean) < 2:
            return np.full(len(self.heads), np.nan)
        if self.gap <= 0 or self.gap_score < LEAST_GAP:
            return np.ones(len(self.heads))
        seen = np.array([h.layer <= self.probe_layer for h in self.heads])
        typical = np.median(self.effects[:, seen], axis=1, keepdims=True)
        p = np.ones(len(self.heads))
        p[seen] = sign_flip_p(self.effects[:, seen] - typical - self.least_effect, seed=self.seed)
        return p

    def __repr__(self) -> str:
        """One line: the first head, its effect, n and path."""
        best = self.top(1e-9)[0]
        first = f"first {best}: {self.effects.mean(0)[self.heads.index(best)]:+.2f} logits"
        return f"HeadRanking({first}, {len(self.heads)} heads, n={len(self.clean)}, {self.path})"


@dataclass(frozen=True, eq=False, kw_only=True)
class SetControl:
    """Joint effect of a set of heads against random sets of the same size."""

    heads: tuple[HeadRef, ...]
    """The set."""
    effects: Float32[np.ndarray, " n"]
    """[n] refusal logit with the set edited minus unedited, transcript by transcript."""
    random_layers: Float32[np.ndarray, "draw n"]
    """[draw, n] the same for random sets drawn within the same layers."""
    random_all: Float32[np.ndarray, "draw_all n"]
    """[draw, n] the same for random sets drawn over all heads."""
    seed: int
    """Of the draws."""

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
        """Mean joint effects of all random sets."""
        return np.asarray(np.concatenate([self.random_layers, self.random_all]).mean(1))

    @property
    def p(self) -> float:
        """Share of random sets that reach the effect, counting the set itself."""
        return random_set_p(self.effect, self.random_effects)

    def __repr__(self) -> str:
        """One line: effect, interval, random sets, p and n."""
        low, high = self.interval
        return (
            f"SetControl({len(self.heads)} heads: {self.effect:+.2f} [{low:+.2f}, {high:+.2f}] logits, random "
            f"{self.random_effects.mean():+.2f}, p={self.p:.3f}, n={len(self.effects)})"
        )


def rank_heads(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Transcripts,
    *,
    method: str = "zero",
    scope: Scope | str = Scope.CLOSING,
    harmless: Transcripts | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HeadRanking:
    """Ranks every query head by what editing it does to the refusal logit.

    Args:
        model: the model.
        probe: fitted on this model, on other transcripts.
        transcripts: usually harmful ones that were complied with.
        method: `zero` ablation.
        scope: where heads are edited; `closing` is packed and fast.
        harmless: transcripts for the specificity control.
        seed: of intervals and permutations.
        progress: called with the number of transcripts done.

    Returns:
        The ranking.

    Raises:
        EditError: an unknown method or scope.
        DataError: no transcript can be used, or logits are not finite.
        ProbeError: the probe does not fit the model.

    Source:
        arXiv 2510.06036, section 4.
    """
    factor, where = _factor(method), Scope.parse(scope)
    tokens, omitted = _usable(model, transcripts)
    control, control_omitted = _usable(model, harmless) if harmless else ([], ())
    heads = tuple(
        HeadRef(layer=layer, head=head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)
    )
    branches: list[Branch] = [(head,) for head in heads]
    swept = _sweep(model, probe, tokens, branches, factor=factor, scope=where, progress=progress)
    beside = _sweep(model, probe, control, branches, factor=factor, scope=where) if control else None
    return HeadRanking(
        heads=heads,
        effects=swept.edited - swept.clean[:, None],
        clean=swept.clean,
        harmless_effects=beside.edited - beside.clean[:, None] if beside else np.zeros((0, len(heads)), np.float32),
        gap=probe.refused_logit - float(swept.clean.mean()),
        gap_score=float(_sigmoid(np.array([probe.refused_logit], np.float32))[0] - _sigmoid(swept.clean).mean()),
        shape=model.shape,
        method=method,
        scope=where,
        path=swept.path,
        probe_layer=probe.layer,
        seed=seed,
        omitted=(*omitted, *control_omitted),
    )


def control_sets(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Transcripts,
    heads: Sequence[HeadRef],
    *,
    method: str = "zero",
    draws: int = 20,
    seed: int = 0,
) -> SetControl:
    """Compares a set of heads with random sets of the same size.

    Args:
        model: the model.
        probe: fitted on this model.
        transcripts: ones that the heads were not chosen on.
        heads: the set.
        method: as in `rank_heads`; edits act at the closing.
        draws: random sets of each kind, at least 1, all different; fewer where there are not as many.
        seed: of the draws.

    Returns:
        Joint effects of the set, of `draws` sets within the same layers, and of `draws` sets over all layers.

    Raises:
        EditError: an unknown method, or no random set differs from the set.
    """
    tokens, _ = _usable(model, transcripts)
    rng = np.random.default_rng(seed)
    within = random_sets(model.shape, heads, draws, rng, same_layers=True)
    over = random_sets(model.shape, heads, draws, rng, same_layers=False)
    if not over:
        raise EditError(f"No random set differs from the {len(heads)} heads, which are all there are. Give fewer.")
    swept = _sweep(model, probe, tokens, [tuple(heads), *within, *over], factor=_factor(method), scope=Scope.CLOSING)
    effects = (swept.edited - swept.clean[:, None]).T
    return SetControl(
        heads=tuple(heads),
        effects=effects[0],
        random_layers=effects[1 : 1 + len(within)],
        random_all=effects[1 + len(within) :],
        seed=seed,
    )


def random_sets(
    shape: ModelShape, heads: Sequence[HeadRef], n: int, rng: np.random.Generator, *, same_layers: bool
) -> list[tuple[HeadRef, ...]]:
    """Draws different random sets, `n` or as many as there are; see `random_set`."""
    found: dict[tuple[HeadRef, ...], None] = {}
    while len(found) < min(n, count_sets(shape, heads, same_layers=same_layers)):
        found[random_set(shape, heads, rng, same_layers=same_layers)] = None
    return list(found)


def count_sets(shape: ModelShape, heads: Sequence[HeadRef], *, same_layers: bool) -> int:
    """How many different sets `random_set` can draw, the given one not counted.

    Args:
        shape: of the model.
        heads: the set to be controlled for.
        same_layers: draw as many from each layer as the set has there.

    Returns:
        The number; 0 where the set is all there is.
    """
    taken = list(Counter(h.layer for h in heads).values()) if same_layers else [len(heads)]
    size = shape.n_heads if same_layers else shape.n_heads * shape.n_layers
    if all(n == size for n in taken):
        return 0
    # Where the others are fewer than the given heads, a set takes all of them and fills up with given ones.
    return math.prod(math.comb(max(n, size - n), min(n, size - n)) for n in taken)


def random_set(
    shape: ModelShape, heads: Sequence[HeadRef], rng: np.random.Generator, *, same_layers: bool
) -> tuple[HeadRef, ...]:
    """Draws as many heads as given, none of them among the given ones as long as there are others.

    Args:
        shape: of the model.
        heads: the set to be controlled for.
        rng: source of chance.
        same_layers: draw as many from each layer as the set has there.

    Returns:
        Distinct heads, sorted.
    """
    drawn: list[HeadRef] = []
    layers = [[h.layer] for h in heads] if same_layers else [list(range(shape.n_layers))] * len(heads)
    for choice in layers:
        pool = [HeadRef(layer=layer, head=i) for layer in choice for i in range(shape.n_heads)]
        free = [ref for ref in pool if ref not in drawn]
        others = [ref for ref in free if ref not in heads]
        drawn.append((others or free)[int(rng.integers(len(others or free)))])
    return tuple(sorted(drawn))


def top_count(fraction: float, n_heads: int) -> int:
    """Heads in a fraction of all: rounded, at least one.

    Raises:
        EditError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise EditError(f"fraction={fraction}: expected a share of all query heads in (0, 1], such as 0.03.")
    return max(1, round(fraction * n_heads))


def _factor(method: str) -> float:
    if method not in METHODS:
        raise EditError(f"method={method!r}: expected one of {', '.join(METHODS)}.")
    return METHODS[method]


def _usable(model: LensModel, transcripts: Transcripts) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    tokens, omitted = tokenize_all(transcripts, model.tokenizer, model.template, max_length=model.shape.context)
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise DataError(f"None of {len(transcripts)} transcripts can be used: {why}")
    return tokens, omitted


def _sweep(
    model: LensModel,
    probe: RefusalProbe,
    tokens: list[TokenizedTranscript],
    branches: Sequence[Branch],
    *,
    factor: float,
    scope: Scope,
    progress: Callable[[int], None] | None = None,
) -> Sweep:
    swept = sweep_branches(model, probe, tokens, branches, factor=factor, scope=scope, progress=progress)
    if not np.isfinite(swept.edited).all() or not np.isfinite(swept.clean).all():
        bad = int(np.argwhere(~np.isfinite(swept.edited.sum(1)))[0][0]) if len(tokens) else 0
        raise DataError(
            f"The refusal logit of transcript {tokens[bad].id!r} is not finite. Load the model in another dtype, such "
            "as float32."
        )
    return swept


def _sigmoid(values: Float[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -60, 60))), dtype=np.float32)
