"""Which token positions are looked at together?

A region is a named run of positions of one transcript, defined by its spans alone, so that transcripts of any length
can be compared: fifths of the thinking, each closing token, the final token. NumPy only; knows no model.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from cliffscope.transcripts.transcript import Span, TokenizedTranscript

THINKING_BINS = 5
LATE_BINS = 2
"""Late thinking is the last two fifths: the verdict has been reached, the closing has not begun."""
FINAL, LATE_THINKING = "final", "late thinking"

Positions = Int64[np.ndarray, " k"]


def late_thinking(transcript: TokenizedTranscript) -> Positions:
    """Positions of the last two fifths of the thinking, at least one unless the thinking is empty."""
    thinking = transcript.span(Span.THINKING)
    length = thinking.stop - thinking.start
    return np.arange(thinking.stop - -(-length * LATE_BINS // THINKING_BINS), thinking.stop, dtype=np.int64)


def regions(transcript: TokenizedTranscript) -> dict[str, Positions]:
    """Every region of a transcript that holds a token, in order of position.

    Args:
        transcript: tokens and spans.

    Returns:
        Name to positions. Closing tokens are counted from the end ("closing -2" is two before the final one), since
        the final token is the one that all transcripts share.
    """
    prompt, thinking = transcript.span(Span.PROMPT), transcript.span(Span.THINKING)
    closing = transcript.span(Span.CLOSING)
    by_name = {"prompt": np.arange(prompt.start, prompt.stop, dtype=np.int64)}
    parts = np.array_split(np.arange(thinking.start, thinking.stop, dtype=np.int64), THINKING_BINS)
    for i, part in enumerate(parts):
        by_name[f"thinking {i * 100 // THINKING_BINS}-{(i + 1) * 100 // THINKING_BINS}%"] = part
    by_name[LATE_THINKING] = late_thinking(transcript)
    for position in range(closing.start, closing.stop - 1):
        by_name[f"closing {position - closing.stop + 1}"] = np.array([position], dtype=np.int64)
    by_name[FINAL] = np.array([transcript.final], dtype=np.int64)
    return {name: positions for name, positions in by_name.items() if len(positions)}


def balanced_positions(transcript: TokenizedTranscript, most: int, rng: np.random.Generator) -> Positions:
    """Positions that a probe is fitted on: thinking, stratified over its length, and every closing token.

    Args:
        transcript: tokens and spans.
        most: thinking positions at the most.
        rng: draws one position from each stratum.

    Returns:
        Sorted positions; those of the closing come last.
    """
    thinking, closing = transcript.span(Span.THINKING), transcript.span(Span.CLOSING)
    length = thinking.stop - thinking.start
    strata = np.array_split(np.arange(thinking.start, thinking.stop, dtype=np.int64), min(most, length) or 1)
    drawn = [int(rng.choice(stratum)) for stratum in strata if len(stratum)]
    return np.array([*drawn, *range(closing.start, closing.stop)], dtype=np.int64)


def region_names(transcripts: Sequence[TokenizedTranscript]) -> list[str]:
    """Every region that any of the transcripts has, in order of position."""
    names = {name: None for transcript in transcripts for name in regions(transcript)}

    def place(name: str) -> tuple[int, int]:
        kinds = ("prompt", "thinking", LATE_THINKING, "closing", FINAL)
        kind = max((k for k in kinds if name.startswith(k)), key=len)
        number = name.removeprefix(kind).split("-")[0] if kind == "thinking" else name.removeprefix(kind)
        return kinds.index(kind), int(number or 0)

    return sorted(names, key=place)
