"""Do rankings of the same heads agree: between methods, and between halves of the transcripts?

1. Agreement of two rankings: Spearman correlation of the mean effects over the heads that both readouts see, and the
   share of the first heads that both have.
2. Stability of one ranking: the transcripts are split in two at random, many times, and the halves are compared.

A ranking that its own halves do not share is no ranking, whatever its intervals say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import spearmanr

from cliffscope.errors import EditError
from cliffscope.heads.ranking import FRACTION, HeadRanking, top_count
from cliffscope.notebook import Plotted

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Stability:
    """How alike the rankings by two halves of the transcripts are."""

    spearman: Float[np.ndarray, " split"]
    """[split] rank correlation of the halves' mean effects."""
    overlap: Float[np.ndarray, " split"]
    """[split] share of the first heads that both halves have."""
    n: int
    """Transcripts in all."""
    count: int
    """Heads that count as the first ones."""

    def __repr__(self) -> str:
        """One line: means, ranges and n."""
        return (
            f"Stability(Spearman {self.spearman.mean():.2f} [{self.spearman.min():.2f}, {self.spearman.max():.2f}], "
            f"{self.overlap.mean():.0%} of the first {self.count} shared, halves of n={self.n}, "
            f"{len(self.spearman)} splits)"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class RankingAgreement(Plotted):
    """How alike rankings of the same heads are, two by two."""

    frame: pd.DataFrame
    """One row a pair: first, second, spearman, overlap (share of the first heads that both have), count, n_first,
    n_second."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """One row a pair, as in `to_frame`."""
        return self.frame

    def plot(self) -> "Figure":
        """Rank correlation of every two, as a matrix."""
        from cliffscope.figures.dose import agreement

        names = list(dict.fromkeys([*self.frame["first"], *self.frame["second"]]))
        place = {name: i for i, name in enumerate(names)}
        grid = np.eye(len(names))
        for first, second, spearman in zip(*(self.frame[c] for c in ("first", "second", "spearman")), strict=True):
            grid[place[first], place[second]] = grid[place[second], place[first]] = spearman
        return agreement(names, grid, title=f"Agreement of methods ({self._n()})")

    def _n(self) -> str:
        n = sorted({*self.frame["n_first"], *self.frame["n_second"]})
        return f"n={n[0]}" if len(n) == 1 else f"n={n[0]} to {n[-1]}"

    def __repr__(self) -> str:
        """One line: pairs, lowest and highest correlation, n."""
        low, high = self.frame["spearman"].min(), self.frame["spearman"].max()
        return f"RankingAgreement({len(self.frame)} pairs, Spearman {low:.2f} to {high:.2f}, {self._n()})"


def split_half(ranking: HeadRanking, *, splits: int = 20, fraction: float = FRACTION, seed: int = 0) -> Stability:
    """Compares the rankings by random halves of the transcripts.

    Args:
        ranking: of a method that measures each head alone; what `greedy` chooses depends on all transcripts.
        splits: random splits.
        fraction: of the heads that count as the first ones.
        seed: of the splits.

    Returns:
        Correlation and overlap a split.

    Raises:
        EditError: fewer than four transcripts, or a ranking in which heads were not measured one by one.
    """
    n = len(ranking.clean)
    if n < 4 or not ranking.each_alone:
        raise EditError(
            f"A ranking by {ranking.method!r} of {n} transcripts cannot be split in two. Give at least 4 transcripts "
            "and a method that measures each head on its own."
        )
    rng, count = np.random.default_rng(seed), top_count(fraction, len(ranking.heads))
    pairs = []
    for _ in range(splits):
        order = rng.permutation(n)
        halves = [ranking.effects[order[: n // 2]].mean(0), ranking.effects[order[n // 2 :]].mean(0)]
        pairs.append(_agreement(halves[0], halves[1], _seen(ranking), count))
    return Stability(
        spearman=np.array([s for s, _ in pairs]), overlap=np.array([o for _, o in pairs]), n=n, count=count
    )


def compare_rankings(rankings: Mapping[str, HeadRanking], *, fraction: float = FRACTION) -> RankingAgreement:
    """Compares every two rankings of the same model.

    Args:
        rankings: by name, such as the method.
        fraction: of the heads that count as the first ones.

    Returns:
        One row a pair.

    Raises:
        EditError: rankings of different models, or fewer than two.
    """
    if len(rankings) < 2 or len({ranking.heads for ranking in rankings.values()}) > 1:
        raise EditError(f"{len(rankings)} rankings were given; expected at least two, of the same heads.")
    rows = []
    for (first, a), (second, b) in combinations(rankings.items(), 2):
        count = top_count(fraction, len(a.heads))
        spearman, _ = _agreement(a.effects.mean(0), b.effects.mean(0), _seen(a) & _seen(b), count)
        shared = len(set(a.top(fraction)) & set(b.top(fraction))) / count
        rows.append((first, second, spearman, shared, count, len(a.clean), len(b.clean)))
    columns = ["first", "second", "spearman", "overlap", "count", "n_first", "n_second"]
    return RankingAgreement(frame=pd.DataFrame(rows, columns=columns))


def _seen(ranking: HeadRanking) -> Bool[np.ndarray, " head"]:
    return np.array([head.layer <= ranking.readout_layer for head in ranking.heads])


def _agreement(
    a: Float[np.ndarray, " head"], b: Float[np.ndarray, " head"], seen: Bool[np.ndarray, " head"], count: int
) -> tuple[float, float]:
    first, second = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (a, b))
    constant = not np.ptp(a[seen]) or not np.ptp(b[seen])
    return float("nan") if constant else float(spearmanr(a[seen], b[seen]).statistic), len(first & second) / count
