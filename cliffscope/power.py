"""How many transcripts does a claim need?

1. A claim says what is taken for true (an AUROC, a share, two rates) and what must then be shown.
2. `possible(n)` asks whether n transcripts that come out exactly so would show it, by the test or interval that the
   package reports.
3. `needed_n` is the least n for which they would.

It is the n from which a claim can be made at all, not the n at which it will be made in four of five repetitions: half
of all samples come out worse than what is taken for true. Knows no model and no transcript.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from scipy import stats

from cliffscope.errors import DataError
from cliffscope.stats import auroc_bounds, least_p

ALPHA = 0.05
"""Level of every test, as is usual."""
MOST = 1_000_000
"""Transcripts up to which the search goes."""


class Claim(Protocol):
    """Something that enough transcripts can show."""

    def possible(self, n: int) -> bool:
        """Whether n transcripts could show it."""
        ...


@dataclass(frozen=True, kw_only=True)
class AurocAbove:
    """The lower end of an AUROC's interval reaches a bound; n counts the transcripts of each class."""

    bound: float = 0.75
    """In [0.5, 1); 0.75 is what a readout must reach to be said to tell."""
    auroc: float = 0.95
    """AUROC that is measured, in [0, 1]; 0.95 is what a readout of refusal reaches on models that it suits."""
    level: float = 0.95
    """Confidence level, in (0, 1)."""

    def possible(self, n: int) -> bool:
        """Whether the interval of that AUROC from n + n transcripts lies above the bound."""
        return auroc_bounds(self.auroc, n, n, level=self.level).low >= self.bound


@dataclass(frozen=True, kw_only=True)
class SignTest:
    """A head turns more answers towards refusal than away from it; n counts transcripts whose answer it can turn."""

    heads: int = 1
    """Heads that are tested at once, at least 1; each counts."""
    share: float = 1.0
    """Share of the answers that are turned towards refusal, in (0.5, 1]."""
    q: float = ALPHA
    """What q, or the adjusted p, must reach; in (0, 1)."""

    def possible(self, n: int) -> bool:
        """Whether one head alone could reach q."""
        towards = math.floor(self.share * n + 1e-9)
        return bool(n > 0 and self.heads * stats.binom.sf(towards - 1, n, 0.5) <= self.q)


@dataclass(frozen=True, kw_only=True)
class RatesDiffer:
    """Two conditions answer the same prompts at different rates; n counts prompts."""

    before: float
    """Rate of the one condition, in [0, 1]."""
    after: float
    """Rate of the other."""
    alpha: float = ALPHA
    """Level, in (0, 1)."""

    def possible(self, n: int) -> bool:
        """Whether McNemar's exact test could reach the level, where no prompt goes against the others."""
        turned = math.floor(abs(self.before - self.after) * n + 1e-9)
        return 2 * 0.5**turned <= self.alpha


@dataclass(frozen=True, kw_only=True)
class BeatsRandomSets:
    """A set of heads does more than random sets of heads; n counts random sets."""

    alpha: float = ALPHA
    """Level, in (0, 1)."""

    def possible(self, n: int) -> bool:
        """Whether a set that does more than n random sets has a p that low."""
        return least_p(n) <= self.alpha


def needed_n(claim: Claim) -> int:
    """The least n with which a claim becomes possible.

    Args:
        claim: `AurocAbove`, `SignTest`, `RatesDiffer`, `BeatsRandomSets`, or any object with `possible(n)`.

    Returns:
        The least n, of what the claim counts.

    Raises:
        DataError: no number of transcripts would show it, such as an AUROC of 0.7 above 0.75.

    Example:
        >>> from cliffscope.power import AurocAbove, SignTest
        >>> needed_n(AurocAbove(auroc=0.95)), needed_n(SignTest(heads=64))
        (12, 11)
    """
    high = 1
    while not claim.possible(high):
        high *= 2
        if high > MOST:
            raise DataError(f"{claim!r} is not shown by {MOST:,} either: no n is enough. Claim less.")
    # Rounded counts make what is possible uneven in n, so that the least n is looked for one by one.
    return next(n for n in range(high // 2 if high > 4096 else 1, high + 1) if claim.possible(n))
