"""How certain is a number, judged by resampling its rows?

1. Bootstrap over rows: of a mean, of a paired difference, of a ratio of sums (items that come in groups).
2. Sign-flip permutation over rows.

A quantity that does not exist (fewer than two rows) is NaN, never 0 or 1. The same seed draws the same rows whatever
the number of columns, so that heads measured together or apart have the same intervals. SciPy's `bootstrap` and
`permutation_test` leave out no missing values, and gather every resample instead of multiplying by counts, which is
too slow for thousands of heads.
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from cliffscope.stats import Interval, check_level, check_same_length

EXACT_SIGN_FLIPS = 12
"""Up to this many rows, all 2**n sign patterns (4,096) are enumerated, so that p has no Monte Carlo error."""

_BLOCK = 1_000_000
"""Numbers that a resampling step holds at once: 8 MB of float64."""

Alternative = Literal["greater", "less", "two-sided"]


def bootstrap_mean(
    values: Shaped[np.ndarray, "n ..."], *, seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Percentile bootstrap of the mean over rows, with the same resampled rows for every column.

    NaN marks a value that the row does not have; it is left out of the mean of its column. With fewer than about
    ten rows a percentile interval is too narrow (coverage near 0.9 at ten rows): read it with its n.

    Args:
        values: [n, ...] one row per transcript.
        seed: seed of the resampling; the result does not depend on how columns are grouped into calls.
        draws: resamples; 2,000 puts the Monte Carlo error of a 95% bound near 1/20 of the interval's width.
        level: confidence level in (0, 1).

    Returns:
        Low [...] and high [...]; NaN for a column with fewer than two values.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Example:
        >>> low, high = bootstrap_mean(np.array([[1.0, 0.0], [1.0, 2.0]]), seed=0)
        >>> low.tolist(), high.tolist()
        ([1.0, 0.0], [1.0, 2.0])
    """
    check_level(level)
    flat = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    usable = np.flatnonzero((~np.isnan(flat)).sum(axis=0) >= 2)
    for columns in _blocks(usable, draws):
        means = _resampled_means(flat[:, columns], seed, draws)
        low[columns], high[columns] = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def paired_bootstrap_difference(
    a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " m"], *, seed: int, draws: int = 2000, level: float = 0.95
) -> Interval:
    """Interval of mean(a - b), where row i of both is the same prompt.

    Args:
        a: [n] values under the first condition (booleans count as 0 and 1).
        b: [n] values under the second condition.
        seed: seed of the resampling.
        draws: resamples.
        level: confidence level in (0, 1).

    Returns:
        The percentile interval; NaN bounds with fewer than two pairs.

    Example:
        >>> paired_bootstrap_difference(np.array([3.0, 4.0]), np.array([1.0, 2.0]), seed=0)
        Interval(low=2.0, high=2.0, level=0.95)
    """
    check_same_length(a, b)
    low, high = bootstrap_mean(a.astype(np.float64) - b.astype(np.float64), seed=seed, draws=draws, level=level)
    return Interval(low=float(low), high=float(high), level=level)


def bootstrap_ratio(
    amounts: Shaped[np.ndarray, " n"],
    sizes: Shaped[np.ndarray, " m"],
    *,
    seed: int,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of sum(amounts) / sum(sizes) over rows.

    It is the mean over items in groups, such as tokens in texts or answers to prompts: whole groups are drawn.

    Args:
        amounts: [n] sum over each group's items.
        sizes: [n] number of each group's items; empty groups are left out.
        seed: seed of the resampling.
        draws: resamples.
        level: confidence level in (0, 1).

    Returns:
        The interval; NaN bounds with fewer than two groups.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.

    Example:
        >>> bootstrap_ratio(np.array([1.0, 4.0]), np.array([1.0, 4.0]), seed=0)
        Interval(low=1.0, high=1.0, level=0.95)
    """
    check_level(level)
    check_same_length(amounts, sizes)
    groups = np.stack([amounts, sizes], axis=1)[sizes > 0].astype(np.float64)
    if len(groups) < 2:
        return Interval(low=float("nan"), high=float("nan"), level=level)
    means = _resampled_means(groups, seed, draws)
    low, high = np.quantile(means[:, 0] / means[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


def sign_flip_p(
    values: Shaped[np.ndarray, "n ..."], *, seed: int, draws: int = 2000, alternative: Alternative = "greater"
) -> Float[np.ndarray, "..."]:
    """Paired sign-flip permutation test that the mean of each column is zero.

    Under the null each difference is as likely to be positive as negative. The same flips serve all columns. Up to
    `EXACT_SIGN_FLIPS` rows all patterns are enumerated; above that p = (1 + #) / (1 + draws).

    Args:
        values: [n, ...] paired differences, one row per transcript; NaN marks a value that the row does not have.
        seed: seed of the flips; unused when they are enumerated.
        draws: random sign patterns; the smallest p is 1 / (1 + draws).
        alternative: the mean is "greater" than zero, "less", or differs from it ("two-sided").

    Returns:
        p [...]; NaN for a column without values.

    Source:
        Phipson and Smyth, SAGMB 9 (2010), for the added one.

    Example:
        Of the 8 patterns only the observed one reaches the sum 3.

        >>> sign_flip_p(np.array([[1.0], [1.0], [1.0]]), seed=0)
        array([0.125])
    """
    direction = {"greater": np.positive, "less": np.negative, "two-sided": np.abs}[alternative]
    flat = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)
    exact = len(flat) <= EXACT_SIGN_FLIPS
    p = np.full(flat.shape[1], np.nan)
    patterns = 2 ** len(flat) if exact else draws
    for columns in _blocks(np.flatnonzero((~np.isnan(flat)).any(axis=0)), patterns):
        block, count = np.nan_to_num(flat[:, columns], nan=0.0), np.zeros(len(columns))
        # Rounding must not hide a tie with the observed sum.
        reached = direction(block.sum(axis=0)) - 1e-9 * np.abs(block).sum(axis=0)
        for signs in _sign_patterns(len(flat), seed, draws):
            count += (direction(signs @ block) >= reached).sum(axis=0)
        p[columns] = count / patterns if exact else (1 + count) / (1 + draws)
    return p.reshape(values.shape[1:])


def _blocks(columns: Int[np.ndarray, " c"], rows: int) -> Iterator[Int[np.ndarray, " b"]]:
    """Column indices in groups whose [rows, group] array stays within `_BLOCK`."""
    width = max(1, _BLOCK // max(rows, 1))
    for start in range(0, len(columns), width):
        yield columns[start : start + width]


def _resampled_means(values: Float[np.ndarray, "n b"], seed: int, draws: int) -> Float[np.ndarray, "draws b"]:
    """Means of each column over resampled rows; the rows of draw i depend on n, the seed and i alone."""
    n, rng = len(values), np.random.default_rng(seed)
    present = (~np.isnan(values)).astype(np.float64)
    filled = np.nan_to_num(values, nan=0.0)
    means = np.empty((draws, values.shape[1]))
    step = max(1, _BLOCK // n)
    for start in range(0, draws, step):
        rows = rng.integers(0, n, size=(min(step, draws - start), n))
        offsets = np.arange(len(rows))[:, None] * n
        counts = np.bincount((rows + offsets).ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64)
        # A resample that holds none of a column's values has no mean: it is NaN, and left out.
        with np.errstate(invalid="ignore"):
            means[start : start + len(rows)] = (counts @ filled) / (counts @ present)
    return means


def _sign_patterns(n: int, seed: int, draws: int) -> Iterator[Float[np.ndarray, "patterns n"]]:
    """All sign patterns of few rows, or random ones of many in groups within `_BLOCK`."""
    if n <= EXACT_SIGN_FLIPS:
        yield 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return
    rng, step = np.random.default_rng(seed), max(1, _BLOCK // n)
    for start in range(0, draws, step):
        yield 1.0 - 2.0 * rng.integers(0, 2, size=(min(step, draws - start), n))
