"""What is an answer like, whatever its outcome?

One row an answer: its outcome, whether it refuses in part, its length, how much it repeats itself, whether it is
exactly what was expected, and whether the thinking before it stated a refusal. An edit that breaks a model shows here:
in long, repeating or wrong answers. Knows transcripts; which edit made them is a name to it.
"""

import re
from collections import Counter
from collections.abc import Iterable

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.judging.degenerate import is_degenerate
from cliffscope.judging.thinking import states_refusal
from cliffscope.transcripts.records import CUT, FORCED, Transcript

EXPECTED = "expected"
"""Key in a prompt's `extra`: the answer, or a list of answers of which each is right."""
RUN = 4
"""Words of a run that counts as repeated."""
COLUMNS = (
    *("arm", "kind", "group", "id", "prompt", "outcome", "partial", "answer_tokens", "repetition", "exact"),
    *("thinking_refuses", "forced", "cut", "degenerate"),
)
_WORD = re.compile(r"\w+|[^\w\s]")


def answer_rows(arm: str, kind: str, transcripts: Iterable[Transcript]) -> pd.DataFrame:
    """One row a transcript.

    Args:
        arm: name of the arm that answered.
        kind: its kind.
        transcripts: judged.

    Returns:
        Columns: arm, kind, group (`harmful` or `harmless`), id, prompt (id of the prompt, the same for its samples),
        outcome, partial, answer_tokens, repetition, exact, thinking_refuses, forced (whether the closing was fed at the
        thinking budget), cut (whether the answer reached its budget), degenerate (whether it is unjudged for that). NaN
        where there is nothing to measure.

    Raises:
        DataError: `extra["expected"]` is neither text nor a list of texts.
    """
    return pd.DataFrame([_row(arm, kind, transcript) for transcript in transcripts], columns=list(COLUMNS))


def repetition(text: str) -> float:
    """Share of runs of four words that stand elsewhere in the text too; NaN for fewer than four words.

    Source: rep-4 of Welleck et al., arXiv 1908.04319, with words for tokens so that tokenizers compare.

    Example:
        >>> repetition("one two three four five"), repetition("go on and on and on and on and on and")
        (0.0, 0.75)
    """
    words = _WORD.findall(text)
    runs = Counter(tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
    total = runs.total()
    return 1 - len(runs) / total if total else float("nan")


def _row(arm: str, kind: str, transcript: Transcript) -> tuple[object, ...]:
    nothing = float("nan")
    verdict = transcript.extra.get("verdict")
    answer, thinking = transcript.answer, transcript.thinking
    return (
        arm,
        kind,
        "harmful" if transcript.harmful else "harmless",
        transcript.id,
        str(transcript.extra.get("sample_of", transcript.id)),
        str(transcript.outcome),
        bool(isinstance(verdict, dict) and verdict.get("partial")),
        nothing if transcript.answer_ids is None else float(len(transcript.answer_ids)),
        nothing if answer is None else repetition(answer),
        _exact(transcript),
        nothing if thinking is None else float(states_refusal(thinking)),
        bool(transcript.extra.get(FORCED)),
        bool(transcript.extra.get(CUT)),
        bool(isinstance(verdict, dict) and is_degenerate(str(verdict.get("reason")))),
    )


def _exact(transcript: Transcript) -> float:
    expected = transcript.extra.get(EXPECTED)
    if expected is None:
        return float("nan")
    right = [expected] if isinstance(expected, str) else expected
    if not isinstance(right, list) or not all(isinstance(text, str) for text in right):
        raise DataError(
            f"The expected answer of {transcript.id!r} is {expected!r}. Give text, or a list of texts that are right."
        )
    answer = " ".join((transcript.answer or "").split())
    return float(transcript.answer is not None and answer in {" ".join(str(text).split()) for text in right})
