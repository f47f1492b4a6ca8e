"""How certain is a number: every interval, p-value and classifier metric that CliffScope reports.

1. Classifier metrics on two arrays of scores: AUROC (ties count one half), TPR at a fixed FPR, Brier score, ECE.
2. Intervals that stay inside the range of the quantity and do not collapse at its ends: Wilson for shares, the score
   form of Hanley and McNeil's variance for AUROC (Newcombe's method 5), Wilson limits for Cohen's kappa.
3. Pairs: exact McNemar. Bootstrap and permutation tests are in resampling.py.
4. Many heads at once: Benjamini-Hochberg, and the rank of a head set among random sets.

SciPy and scikit-learn compute whatever they offer. Implemented here, because neither has it: the interval of the AUROC,
the calibration error, the limits of kappa and the rank among random sets. A quantity that does not exist (an empty
class, one row) is NaN, never 0 or 1. This file knows no model, transcript or result class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import optimize, special, stats
from sklearn.metrics import brier_score_loss, cohen_kappa_score, roc_curve

from cliffscope.errors import DataError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval; both bounds are NaN where it is undefined."""

    low: float
    """Lower bound, in the unit of the quantity."""
    high: float
    """Upper bound, in the unit of the quantity."""
    level: float = 0.95
    """Confidence level, in (0, 1)."""


def auroc(positive: Shaped[np.ndarray, " n"], negative: Shaped[np.ndarray, " m"]) -> float:
    """Probability that a random positive scores above a random negative, ties counting one half.

    Args:
        positive: [n] scores of the positive class.
        negative: [m] scores of the negative class.

    Returns:
        AUROC in [0, 1]; NaN if a class is empty or a score is NaN.

    Source:
        Hanley and McNeil, Radiology 143 (1982): the Mann-Whitney statistic over n x m.

    Example:
        >>> auroc(np.array([3.0, 2.0]), np.array([2.0, 1.0]))  # 3 wins and 1 tie of 4 pairs
        0.875
    """
    if _undefined(positive, negative):
        return float("nan")
    # The p-value that comes with the statistic is not used; its asymptotic form costs nothing.
    test = stats.mannwhitneyu(positive.astype(np.float64), negative.astype(np.float64), method="asymptotic")
    return float(test.statistic / (len(positive) * len(negative)))


def auroc_interval(
    positive: Shaped[np.ndarray, " n"], negative: Shaped[np.ndarray, " m"], *, level: float = 0.95
) -> Interval:
    """Interval of the AUROC by inverting its score test with Hanley and McNeil's variance.

    The variance is taken at the candidate bound and not at the estimate, so the bounds lie in [0, 1] without a
    transformation, and a perfect AUROC of a few transcripts keeps a wide interval (DeLong's would be a point there).

    Args:
        positive: [n] scores of the positive class.
        negative: [m] scores of the negative class.
        level: confidence level in (0, 1).

    Returns:
        The interval; NaN bounds where the AUROC is NaN.

    Source:
        Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5.

    Example:
        One pair is one trial, so this is Wilson's 1 of 1: the lower bound is 1 / (1 + 1.96**2).

        >>> interval = auroc_interval(np.array([1.0]), np.array([0.0]))
        >>> round(interval.low, 4), interval.high
        (0.2065, 1.0)
    """
    return auroc_bounds(auroc(positive, negative), len(positive), len(negative), level=level)


def auroc_bounds(area: float, n: int, m: int, *, level: float = 0.95) -> Interval:
    """The interval of an AUROC that n positives and m negatives gave; see `auroc_interval`.

    Args:
        area: the AUROC, in [0, 1]; NaN gives NaN bounds.
        n: number of positives.
        m: number of negatives.
        level: confidence level in (0, 1).

    Example:
        >>> auroc_bounds(1.0, 1, 1) == auroc_interval(np.array([1.0]), np.array([0.0]))
        True
    """
    check_level(level)
    z = float(special.ndtri((1 + level) / 2))
    if np.isnan(area):
        return Interval(low=float("nan"), high=float("nan"), level=level)
    spread = (n + m) / 2 - 1

    def excess(bound: float) -> float:
        shape = 1 + spread * ((1 - bound) / (2 - bound) + bound / (1 + bound))
        return (bound - area) ** 2 - z**2 * bound * (1 - bound) * shape / (n * m)

    return Interval(low=1 - _last_root(lambda x: excess(1 - x), 1 - area), high=_last_root(excess, area), level=level)


def tpr_at_fpr(positive: Shaped[np.ndarray, " n"], negative: Shaped[np.ndarray, " m"], fpr: float = 0.01) -> float:
    """Highest true positive rate of any threshold whose false positive rate is at most `fpr`.

    Nothing is interpolated: with fewer than 1 / fpr negatives, the threshold lies above all of them.

    Args:
        positive: [n] scores of the positive class.
        negative: [m] scores of the negative class.
        fpr: allowed share of negatives above the threshold, in [0, 1]. 1% is a rate that a safety monitor can afford.

    Returns:
        TPR in [0, 1]; NaN if a class is empty or a score is NaN.

    Example:
        >>> tpr_at_fpr(np.array([3.0, 2.0]), np.array([2.0, 1.0]), fpr=0.01)
        0.5
    """
    if _undefined(positive, negative):
        return float("nan")
    label = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    # scikit-learn accepts no infinite scores; the largest finite ones have the same order.
    score = np.nan_to_num(np.r_[positive, negative].astype(np.float64))
    false_rate, true_rate, _ = roc_curve(label, score, drop_intermediate=False)
    return float(true_rate[false_rate <= fpr + 1e-9].max())


def brier(score: Float[np.ndarray, " n"], label: Shaped[np.ndarray, " m"]) -> float:
    """Mean squared distance between a score in [0, 1] and its label, 0 or 1; NaN without rows or with a NaN score.

    Source:
        Brier, Monthly Weather Review 78 (1950), in its form for two classes.

    Example:
        >>> brier(np.array([1.0, 0.5]), np.array([True, False]))  # (0 + 0.25) / 2
        0.125
    """
    check_same_length(score, label)
    if len(score) == 0 or np.isnan(score).any():
        return float("nan")
    return float(brier_score_loss(label.astype(np.int64), score.astype(np.float64), pos_label=1))


def expected_calibration_error(
    score: Float[np.ndarray, " n"], label: Shaped[np.ndarray, " m"], bins: int = 10
) -> float:
    """Distance between mean score and share of positives, averaged over equal-width bins by their counts.

    Args:
        score: [n] scores in [0, 1].
        label: [n] 0 or 1, or booleans.
        bins: number of bins, right-closed: (0, 0.1], (0.1, 0.2], ...; 0 belongs to the first.

    Returns:
        The error in [0, 1]; NaN without rows or with a NaN score.

    Source:
        Guo et al., ICML 2017, eq. 3.

    Example:
        >>> expected_calibration_error(np.array([0.25, 0.25]), np.array([True, False]))  # |0.5 - 0.25|
        0.25
    """
    check_same_length(score, label)
    if len(score) == 0 or np.isnan(score).any():
        return float("nan")
    index = np.clip(np.ceil(score.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(index, weights=score - label.astype(np.float64), minlength=bins)
    return float(np.abs(gap).sum() / len(score))


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share.

    Args:
        successes: number of successes, in [0, n].
        n: number of trials; 0 gives NaN bounds.
        level: confidence level in (0, 1).

    Returns:
        The interval, inside [0, 1]; a DataError if successes lies outside [0, n].

    Source:
        Wilson, JASA 22 (1927).

    Example:
        At 0 of n the upper bound is z**2 / (n + z**2), here 3.84 / 13.84.

        >>> interval = wilson(0, 10)
        >>> interval.low, round(interval.high, 4)
        (0.0, 0.2775)
    """
    if not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} trials: expected 0 <= successes <= n. Check the counts.")
    check_level(level)
    if n == 0:
        return Interval(low=float("nan"), high=float("nan"), level=level)
    limits = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(low=float(limits.low), high=float(limits.high), level=level)


def benjamini_hochberg(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Adjusted p-values that control the false discovery rate; NaN passes through and is not counted as a test.

    Source:
        Benjamini and Hochberg, JRSS B 57 (1995).

    Example:
        >>> benjamini_hochberg(np.array([0.01, 0.04, np.nan]))  # 0.01 x 2/1 and 0.04 x 2/2
        array([0.02, 0.04,  nan])
    """
    q, tested = np.full(p.shape, np.nan), ~np.isnan(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested].astype(np.float64), method="bh")
    return q


def mcnemar(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " m"]) -> float:
    """Exact two-sided McNemar p: do two conditions differ on the same prompts?

    Only discordant pairs carry information; without any there is nothing to test, and p is NaN.

    Args:
        a: [n] outcome under the first condition.
        b: [n] outcome under the second condition, in the same order.

    Source:
        McNemar, Psychometrika 12 (1947), with the binomial distribution in place of the chi-squared.

    Example:
        >>> mcnemar(np.array([True, True, True]), np.array([False, False, False]))  # 2 x (1/2)**3
        0.25
    """
    check_same_length(a, b)
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    if only_a + only_b == 0:
        return float("nan")
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def least_p(sets: int) -> float:
    """The smallest p that a number of random sets can give: 1 / (1 + sets), which is 0.048 for 20 sets."""
    return 1 / (1 + sets)


def random_set_p(observed: float, control: Shaped[np.ndarray, " r"]) -> float:
    """Share of head sets, the observed one included, that do at least as well as the observed one.

    The smallest possible p is `least_p`.

    Args:
        observed: effect of the head set under test.
        control: [r] effects of random head sets of the same size.

    Returns:
        p in (0, 1]; NaN if an effect is NaN or no control was run.

    Source:
        Phipson and Smyth, SAGMB 9 (2010): the observed set counts as one of the draws, so that p is never 0.

    Example:
        >>> random_set_p(3.0, np.array([1.0, 2.0, 4.0]))  # (1 + 1) / (1 + 3)
        0.5
    """
    if len(control) == 0 or np.isnan(observed) or np.isnan(control).any():
        return float("nan")
    return float((1 + np.sum(control >= observed)) / (1 + len(control)))


def cohen_kappa(table: Int[np.ndarray, "k k"], *, level: float = 0.95) -> tuple[float, Interval]:
    """Agreement of two judges beyond chance, with an interval.

    Cohen's standard error takes the agreement expected by chance as fixed; Wilson limits on the observed agreement
    replace its normal limits, so that perfect agreement on few items is not reported as certain.

    Args:
        table: [k, k] counts; rows are the first judge's classes, columns the second's.
        level: confidence level in (0, 1).

    Returns:
        Kappa in [-1, 1] and its interval; NaN when there are no items or both judges use one and the same class.

    Source:
        Cohen, Educational and Psychological Measurement 20 (1960).

    Example:
        Observed agreement 0.7, by chance 0.5: kappa = 0.2 / 0.5.

        >>> kappa, interval = cohen_kappa(np.array([[20, 5], [10, 15]]))
        >>> round(kappa, 4)
        0.4
    """
    n = int(table.sum())
    observed = wilson(int(np.trace(table)), n, level=level)
    chance = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2 if n else 1.0
    if chance == 1:
        return float("nan"), Interval(low=float("nan"), high=float("nan"), level=level)
    first, second = np.indices(table.shape)
    kappa = cohen_kappa_score(first.ravel(), second.ravel(), sample_weight=table.ravel())
    low, high = ((limit - chance) / (1 - chance) for limit in (observed.low, observed.high))
    return float(kappa), Interval(low=low, high=high, level=level)


def check_level(level: float) -> None:
    """Raises DataError unless a confidence level lies in (0, 1)."""
    if not 0 < level < 1:
        raise DataError(f"Confidence level {level}: expected a number between 0 and 1, such as 0.95.")


def check_same_length(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " m"]) -> None:
    """Raises ShapeError if paired arrays differ in length, which is why the signatures name the two lengths apart."""
    if a.shape != b.shape:
        raise ShapeError(f"Paired arrays have shapes {a.shape} and {b.shape}: expected the same rows in both.")


def _undefined(positive: Shaped[np.ndarray, " n"], negative: Shaped[np.ndarray, " m"]) -> bool:
    """Whether no classifier metric exists: a class is empty, or a score is NaN."""
    return any(len(scores) == 0 or bool(np.isnan(scores).any()) for scores in (positive, negative))


def _last_root(excess: Callable[[float], float], start: float) -> float:
    """Root of `excess` in [start, 1]; a search from 0, which is itself a root, begins just above it."""
    return 1.0 if start == 1 else float(optimize.brentq(excess, max(start, 1e-12), 1.0, xtol=1e-12))
