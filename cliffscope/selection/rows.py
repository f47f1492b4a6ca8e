"""What is one row of a pool's scores?

1. A window's transcripts are sorted by length into batches of a bounded number of tokens.
2. The blocks up to the probe's layer run on each batch, and every trace becomes one row.

This file knows neither files nor other windows.
"""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from cliffscope.judging.thinking import states_refusal
from cliffscope.model.load import LensModel
from cliffscope.readouts.activations import BATCH_TOKENS, project_layer
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import NO_MEMORY, cliff_of, why_invalid
from cliffscope.selection.criteria import prompt_key
from cliffscope.transcripts.pools import PoolWindow
from cliffscope.transcripts.records import Omission, Transcript
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize_all

SCORE_COLUMNS = (
    *("row", "id", "source", "harmful", "outcome", "prompt_key", "n_tokens", "n_thinking", "thinking_refuses"),
    *("judge_refusal", "plateau_max", "plateau_mean", "plateau_late", "final", "drop_position", "drop"),
    *("valid", "reason"),
)
UNCLOSED = "thinking never closed"
_MISSING: Mapping[str, object] = {
    **{"source": "", "harmful": None, "outcome": "", "prompt_key": "", "thinking_refuses": False},
    **{"judge_refusal": float("nan"), "n_tokens": 0, "n_thinking": 0, "drop_position": -1},
    **dict.fromkeys(("plateau_max", "plateau_mean", "plateau_late", "final", "drop"), float("nan")),
}


def score_window(
    model: LensModel, probe: RefusalProbe, window: PoolWindow, *, batch_tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Scores one window.

    Args:
        model: the model.
        probe: fitted on this model.
        window: rows of the pool.
        batch_tokens: tokens in a batch, including padding.

    Returns:
        `SCORE_COLUMNS`: one row for each row of the window, in order.
    """
    index_of = {t.id: i for i, t in enumerate(window.rows) if isinstance(t, Transcript)}
    tokens, omitted = tokenize_all(
        [t for t in window.rows if isinstance(t, Transcript) and t.closed],
        model.tokenizer,
        model.template,
        max_length=model.shape.context,
    )
    reasons = {i: row.reason for i, row in enumerate(window.rows) if isinstance(row, Omission)}
    reasons |= {i: UNCLOSED for i, row in enumerate(window.rows) if isinstance(row, Transcript) and not row.closed}
    reasons |= {index_of[o.id]: o.reason for o in omitted}
    measured: dict[int, dict[str, object]] = {}

    def skip(t: int) -> None:
        reasons[index_of[tokens[t].id]] = NO_MEMORY

    for t, logits in project_layer(
        model, tokens, probe.layer, probe.weight, probe.bias, batch_tokens=batch_tokens, skip=skip
    ):
        measured[index_of[tokens[t].id]] = _measure(tokens[t], logits, probe)
    table = []
    for i, row in enumerate(window.rows):
        labels = _labels(row) if isinstance(row, Transcript) else {}
        reason = {"reason": reasons[i], "valid": False} if i in reasons else {}
        table.append({"row": window.start + i, "id": row.id, **_MISSING, **labels, **measured.get(i, {}), **reason})
    return pd.DataFrame(table, columns=list(SCORE_COLUMNS)).astype({"harmful": object})


def judge_refusal(transcript: Transcript) -> float:
    """The refusal probability that a judge gave the answer; NaN if there is none."""
    verdict = transcript.extra.get("verdict")
    score = verdict.get("score") if isinstance(verdict, dict) else None
    return float(score) if isinstance(score, int | float) else float("nan")


def _labels(transcript: Transcript) -> dict[str, object]:
    return {
        "source": transcript.source,
        "harmful": transcript.harmful,
        "outcome": str(transcript.outcome),
        "prompt_key": prompt_key(transcript.prompt),
        "thinking_refuses": states_refusal(transcript.thinking or ""),
        "judge_refusal": judge_refusal(transcript),
    }


def _measure(tokens: TokenizedTranscript, logits: np.ndarray, probe: RefusalProbe) -> dict[str, object]:
    cliff, thinking = cliff_of(tokens, logits), tokens.span(Span.THINKING)
    reason = why_invalid(cliff, probe) if np.isfinite(logits).all() else "residuals are NaN or infinite"
    sizes = {"n_tokens": tokens.n_pos, "n_thinking": thinking.stop - thinking.start}
    return {**asdict(cliff), **sizes, "valid": not reason, "reason": reason}
