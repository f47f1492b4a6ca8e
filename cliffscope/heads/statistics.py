"""Does a head change what the model answers, and does it do so only where refusal is suppressed?

1. Decisive transcripts of a head are those whose answer its effect could turn: the effect is larger than the distance
   of the unedited logit from zero. A head that is no suppression head would turn them either way alike, so the number
   that it turns towards refusal is binomial with one half: an exact sign test, one-sided. The floor below which
   effects do not count is thus set by each transcript itself, at the point where the answer changes; there is no
   constant.
2. Benjamini-Hochberg over the heads that the readout can see gives q. `least_q` is what so few transcripts allow. A
   head that could turn no answer is not tested: its p and q are NaN.
3. A head is selective if its effect on complied harmful transcripts exceeds that on refused and that on harmless ones,
   each by Welch's t test, one-sided, both at 5% (an intersection-union test); else it is broad. Both samples carry
   their own error. A group of fewer than `FEWEST` transcripts tells nothing: the head's kind is then unknown.

Arrays in, arrays out; knows no model.

Source: sign test, Dixon and Mood, JASA 41 (1946); Benjamini and Hochberg, JRSS B 57 (1995); Welch, Biometrika 34
(1947); intersection-union tests, Berger, Technometrics 24 (1982).
"""

from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy import stats

from cliffscope.stats import benjamini_hochberg

ALPHA = 0.05
"""Level of every test, as is usual; reported p and q let a reader choose another."""
FEWEST = 3
"""Transcripts of a group from which its spread can be estimated at all."""


class HeadKind(StrEnum):
    """Where a suppression head acts."""

    SELECTIVE = "selective"
    BROAD = "broad"
    UNKNOWN = "unknown"


def decisive(
    clean: Float[np.ndarray, " n"], effects: Float[np.ndarray, "n head"]
) -> tuple[Int64[np.ndarray, " head"], Int64[np.ndarray, " head"]]:
    """How many answers each head could turn, and how many it turns towards refusal.

    Args:
        clean: [n] unedited logits.
        effects: [n, head] edited minus unedited; positive where the head suppresses refusal.

    Returns:
        [head] decisive transcripts, and those among them with a positive effect.

    Example:
        >>> decisive(np.array([-1.0, -1.0, 3.0]), np.array([[2.0], [0.5], [-4.0]]))[0].tolist()
        [2]
    """
    turns: Bool[np.ndarray, "n head"] = np.abs(effects) > np.abs(clean)[:, None]
    return turns.sum(0), (turns & (effects > 0)).sum(0)


def decisive_p(clean: Float[np.ndarray, " n"], effects: Float[np.ndarray, "n head"]) -> Float[np.ndarray, " head"]:
    """Exact one-sided sign test over the decisive transcripts of each head; NaN where there is none to test."""
    trials, towards = decisive(clean, effects)
    return np.where(trials > 0, stats.binom.sf(towards - 1, trials, 0.5), np.nan)


def decisive_q(p: Float[np.ndarray, " head"]) -> Float[np.ndarray, " head"]:
    """Benjamini-Hochberg over all heads that were measured; NaN where a head could turn no answer.

    Such heads count as tests all the same, so that q does not fall with the number of heads that do nothing.

    Args:
        p: [head] as `decisive_p` gives them.

    Example:
        >>> decisive_q(np.array([0.01, np.nan])).tolist()  # 0.01 x 2/1
        [0.02, nan]
    """
    untested = np.isnan(p)
    return np.where(untested, np.nan, benjamini_hochberg(np.where(untested, 1.0, p)))


def least_q(n: int, heads: int) -> float:
    """The smallest q that one head alone could reach, with every transcript turned; 1 at most.

    Args:
        n: transcripts.
        heads: heads that are tested.
    """
    return float(min(1.0, heads * 0.5**n))


def exceeds_p(
    effects: Float[np.ndarray, "n head"], elsewhere: Float[np.ndarray, "m head"]
) -> Float[np.ndarray, " head"]:
    """Welch's one-sided test that a head does more here than elsewhere; NaN where a group is too small.

    Args:
        effects: [n, head] on complied harmful transcripts.
        elsewhere: [m, head] on refused or on harmless ones.
    """
    if min(len(effects), len(elsewhere)) < FEWEST:
        return np.full(effects.shape[1], np.nan)
    gap = effects.mean(0) - elsewhere.mean(0)
    parts = [group.var(0, ddof=1) / len(group) for group in (effects, elsewhere)]
    error = parts[0] + parts[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = error**2 / (parts[0] ** 2 / (len(effects) - 1) + parts[1] ** 2 / (len(elsewhere) - 1))
        p = stats.t.sf(gap / np.sqrt(error), degrees)
    # Without any spread the means themselves decide.
    return np.where(error > 0, p, np.where(gap > 0, 0.0, 1.0))


def kinds_of(
    effects: Float[np.ndarray, "n head"],
    refused: Float[np.ndarray, "r head"],
    harmless: Float[np.ndarray, "m head"],
) -> list[HeadKind]:
    """Whether each head acts on complied harmful transcripts more than elsewhere.

    Args:
        effects: [n, head] on complied harmful transcripts.
        refused: [r, head] on refused ones; r = 0 if there are none.
        harmless: [m, head] on harmless ones; m = 0 if there are none.

    Returns:
        One kind a head; unknown where a group has fewer than `FEWEST` transcripts.
    """
    larger = np.maximum(exceeds_p(effects, refused), exceeds_p(effects, harmless))
    return [HeadKind.UNKNOWN if np.isnan(p) else HeadKind.SELECTIVE if p <= ALPHA else HeadKind.BROAD for p in larger]
