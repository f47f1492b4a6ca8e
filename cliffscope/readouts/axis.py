"""On which common axis are traces of different lengths averaged?

Prompt and thinking become a fixed number of bins each; closing tokens stay single and are counted from the end, so that
the closing never vanishes in an average. The resampling itself is `cliff.align_trace`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from cliffscope.readouts.cliff import PROMPT_BINS, THINKING_BINS, align_trace
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

MOST_CLOSING = 8
"""Closing tokens on the axis at most; they are counted from the end."""


def closing_width(rows: Sequence[TokenizedTranscript]) -> int:
    """Closing tokens that the axis of these transcripts has: as many as the longest closing, up to `MOST_CLOSING`."""
    return int(min(MOST_CLOSING, max((_closing_length(row) for row in rows), default=1)))


def align_row(row: TokenizedTranscript, score: Float[np.ndarray, " pos"], width: int) -> Float[np.ndarray, " bin"]:
    """One transcript's scores on the axis, NaN where it has no token."""
    return align_trace(
        score.astype(np.float64),
        prompt=row.span(Span.PROMPT),
        thinking=row.span(Span.THINKING),
        closing=row.span(Span.CLOSING),
        closing_width=width,
    )


def axis_table(rows: Sequence[TokenizedTranscript], tokenizer: PreTrainedTokenizerBase, width: int) -> pd.DataFrame:
    """The bins of the axis: bin, label, span; closing tokens are labelled by those of the longest closing."""
    labels = [f"prompt {i + 1}/{PROMPT_BINS}" for i in range(PROMPT_BINS)]
    labels += [f"thinking {i + 1}/{THINKING_BINS}" for i in range(THINKING_BINS)]
    longest = max(rows, key=_closing_length)
    texts = [str(tokenizer.decode([int(i)])) for i in longest.token_ids[longest.span(Span.CLOSING)]]
    labels += [*[""] * width, *texts][-width:]
    spans = [Span.PROMPT] * PROMPT_BINS + [Span.THINKING] * THINKING_BINS + [Span.CLOSING] * width
    return pd.DataFrame({"bin": range(len(labels)), "label": labels, "span": [str(s) for s in spans]})


def _closing_length(row: TokenizedTranscript) -> int:
    closing = row.span(Span.CLOSING)
    return int(closing.stop - closing.start)
