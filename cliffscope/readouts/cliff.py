"""How far does the refusal score fall between thinking and answer?

1. Plateau: the score over the thinking, its mean (robust) or its maximum (the paper's).
2. Final: the score at the last closing token. Cliff = plateau - final.
3. Drop: the step between neighbouring tokens, from late thinking on, at which the score falls most.
4. Aligned traces: each transcript is resampled span by span (prompt and thinking to bins, closing tokens one by one
   from the end), so that transcripts of any length can be averaged and the closing never vanishes.

Source: arXiv 2510.06036, sections 3 and 5 (maximum as plateau). NumPy only: arrays and slices in, numbers out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Plateau = Literal["mean", "max"]
PROMPT_BINS, THINKING_BINS = 5, 10


@dataclass(frozen=True, kw_only=True)
class Cliff:
    """The cliff of one trace; scores in [0, 1]."""

    plateau_max: float
    """Highest score over the thinking."""
    plateau_mean: float
    """Mean score over the thinking."""
    plateau_late: float
    """Mean score over the last two fifths of the thinking."""
    final: float
    """Score at the last closing token."""
    drop_position: int
    """Position of the token before which the score falls most, from late thinking on; -1 if it never falls."""
    drop: float
    """How far it falls there."""


def measure_cliff(score: Float[np.ndarray, " pos"], *, thinking: slice, late: slice, final: int) -> Cliff:
    """Measures one trace.

    Args:
        score: [pos] refusal scores.
        thinking: positions of the thinking; may be empty.
        late: positions of late thinking; may be empty.
        final: position of the last closing token.

    Returns:
        The cliff; plateaus are NaN where the thinking is empty.

    Example:
        >>> import numpy as np
        >>> score = np.array([0.1, 0.8, 0.9, 0.7, 0.2])
        >>> found = measure_cliff(score, thinking=slice(1, 3), late=slice(2, 3), final=4)
        >>> round(found.plateau_max - found.final, 2), found.drop_position
        (0.7, 4)
    """
    thought, late_score = score[thinking], score[late]
    start = late.start if len(late_score) else thinking.stop
    steps = np.diff(score[max(start - 1, 0) : final + 1])
    falls = bool(len(steps)) and bool(steps.min() < 0)
    return Cliff(
        plateau_max=float(thought.max()) if len(thought) else float("nan"),
        plateau_mean=float(thought.mean()) if len(thought) else float("nan"),
        plateau_late=float(late_score.mean()) if len(late_score) else float("nan"),
        final=float(score[final]),
        drop_position=max(start - 1, 0) + 1 + int(steps.argmin()) if falls else -1,
        drop=float(-steps.min()) if falls else 0.0,
    )


def align_trace(
    score: Float[np.ndarray, " pos"], *, prompt: slice, thinking: slice, closing: slice, closing_width: int
) -> Float[np.ndarray, " bin"]:
    """Resamples one trace to a common axis: prompt bins, thinking bins, then the closing tokens.

    Args:
        score: [pos] refusal scores.
        prompt: positions of the prompt.
        thinking: positions of the thinking.
        closing: positions of the closing.
        closing_width: closing tokens of the common axis; shorter closings are aligned at their end.

    Returns:
        [PROMPT_BINS + THINKING_BINS + closing_width], NaN where the transcript has no token.
    """
    tail = score[closing][-closing_width:]
    padded = np.concatenate([np.full(closing_width - len(tail), np.nan), tail])
    return np.concatenate([_bin_means(score[prompt], PROMPT_BINS), _bin_means(score[thinking], THINKING_BINS), padded])


def _bin_means(values: Float[np.ndarray, " n"], bins: int) -> Float[np.ndarray, " bins"]:
    """Means of equal shares of the positions; where there are fewer positions than bins, the nearest one."""
    if not len(values):
        return np.full(bins, np.nan)
    edges = np.linspace(0, len(values), bins + 1)
    low = np.minimum(edges[:-1].astype(int), len(values) - 1)
    high = np.maximum(np.ceil(edges[1:]).astype(int), low + 1)
    return np.array([values[a:b].mean() for a, b in zip(low, high, strict=True)])
