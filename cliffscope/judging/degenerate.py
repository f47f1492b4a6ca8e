"""Is an answer broken, so that no judge should read it?

1. It has no words, or hardly any letter or digit.
2. It repeats itself: few of its runs of words, or of characters, differ.

A model that an edit has broken writes such text. A repeated refusal is not a refusal, and repeated help is no help.
"""

import re

DEGENERATE = "degenerate"
"""Begins the reason why such an answer is unjudged."""
LEAST_DISTINCT = 0.3
"""Least share of distinct runs. Text in which every sentence stands twice has 0.5, four times 0.25."""
WORD_RUN = 4
"""Words of a run."""
FEWEST_WORDS = 12
"""Words below which a text cannot repeat itself."""
CHARACTER_RUN = 8
"""Characters of a run, for scripts without spaces."""
FEWEST_CHARACTERS = 60
"""Letters and digits below which runs of characters are not counted."""
LEAST_WORDLIKE = 0.15
"""Least share of letters and digits among characters that are no space."""


def degeneration(answer: str) -> str | None:
    """Why an answer is broken; None if it is not.

    Example:
        >>> degeneration("I cannot help with that. " * 30)
        'degenerate: repeats itself'
        >>> degeneration("I cannot help with that. I cannot help with this either.")
    """
    dense = "".join(answer.split())
    wordlike = [c for c in dense if c.isalnum()]
    if not wordlike or (len(dense) >= FEWEST_CHARACTERS and len(wordlike) < LEAST_WORDLIKE * len(dense)):
        return f"{DEGENERATE}: no words"
    words = re.findall(r"\w+", answer.lower())
    repeats_words = (len(words) >= FEWEST_WORDS and _distinct(words, WORD_RUN) < LEAST_DISTINCT) or (
        len(words) >= WORD_RUN and len(set(words)) == 1
    )
    letters = "".join(wordlike).lower()
    repeats_letters = len(letters) >= FEWEST_CHARACTERS and _distinct(letters, CHARACTER_RUN) < LEAST_DISTINCT
    return f"{DEGENERATE}: repeats itself" if repeats_words or repeats_letters else None


def is_degenerate(reason: str) -> bool:
    """Whether a verdict's reason says that the answer is broken."""
    return reason.startswith(DEGENERATE)


def _distinct(items: str | list[str], length: int) -> float:
    """Share of distinct runs of a length."""
    runs = [tuple(items[i : i + length]) for i in range(len(items) - length + 1)]
    return len(set(runs)) / len(runs)
