"""How large is the cliff of every example of a pool, however large the pool?

1. The pool is read window by window; rows that cannot be scored are counted, each with its reason, and the rest go on.
2. A window's transcripts are sorted by length into batches of a bounded number of tokens; the blocks up to the probe's
   layer run, and each trace becomes one row at once.
3. A finished window is written as a shard with the hash of what it was made from. A run started again reads the shards
   that are there, checks that the pool still holds the same rows, and goes on behind them.

Scores do not depend on the pool's order or on windows. Memory: the model, one window of text, one row an example.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cliffscope.alignment.criteria import prompt_key
from cliffscope.errors import DataError, StoreError
from cliffscope.models import LensModel
from cliffscope.probing.activations import BATCH_TOKENS, project_layer
from cliffscope.probing.probe import RefusalProbe
from cliffscope.probing.trace import cliff_of, why_invalid
from cliffscope.safety.thinking import states_refusal
from cliffscope.store import RunStore, open_run
from cliffscope.transcripts.pools import WINDOW, PoolSource, Window, read_windows
from cliffscope.transcripts.records import Omission, Transcript
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize_all

COLUMNS = (
    *("row", "id", "source", "harmful", "outcome", "prompt_key", "n_tokens", "n_thinking", "thinking_refuses"),
    *("judge_refusal", "plateau_max", "plateau_mean", "plateau_late", "final", "drop_position", "drop"),
    *("valid", "reason"),
)
_NOTHING: Mapping[str, object] = {
    **{"source": "", "harmful": None, "outcome": "", "prompt_key": "", "thinking_refuses": False},
    **{"judge_refusal": float("nan"), "n_tokens": 0, "n_thinking": 0, "drop_position": -1},
    **dict.fromkeys(("plateau_max", "plateau_mean", "plateau_late", "final", "drop"), float("nan")),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolScores:
    """One row an example of a pool."""

    frame: pd.DataFrame
    """`COLUMNS`: every row of the pool; scores in [0, 1], NaN where `reason` says why there are none."""
    resumed: int
    """Rows that were there already."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, in the pool's order."""
        return self.frame.copy()

    @property
    def omitted(self) -> tuple[Omission, ...]:
        """Rows without a valid cliff, and why."""
        rows = self.frame[~self.frame["valid"].astype(bool)]
        return tuple(Omission(stage="pool", reason=str(r.reason), id=str(r.id)) for r in rows.itertuples())

    def __repr__(self) -> str:
        """One line: how many, and how many without a valid cliff."""
        valid = int(self.frame["valid"].sum())
        return f"PoolScores({valid} with a valid cliff of {len(self.frame)}, {self.resumed} of them from before)"


def score_pool(
    model: LensModel,
    probe: RefusalProbe,
    pool: PoolSource,
    *,
    out: str | Path | None = None,
    window: int = WINDOW,
    batch_tokens: int = BATCH_TOKENS,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PoolScores:
    """Scores every example of a pool.

    Args:
        model: the model.
        probe: fitted on this model.
        pool: a .jsonl or .parquet file of transcripts, a folder of them, transcripts, or an iterable of rows.
        out: directory of shards; a run with the same one goes on where it stopped. None keeps nothing.
        window: rows read at a time.
        batch_tokens: tokens of a batch, padding included.
        strict: raise at the first broken row, instead of counting it.
        progress: called with the number of rows done.

    Returns:
        The scores of every row.

    Raises:
        ProbeError: the probe does not fit the model.
        DataError: the pool cannot be read or is empty.
        StoreError: the directory belongs to another model, probe or window, or the pool has changed under the run.

    Source:
        Cliff-as-a-Judge, arXiv 2510.06036, section 5.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> asked = cs.organisms.prompts("fit", 40, harmful=True, wrappers=(None, "story"))
        >>> pool = cs.judge(cs.roll_out(model, asked, max_thinking=96, max_answer=16))
        >>> probe = cs.fit_probe(model, pool.where(outcome="refused"), pool.where(outcome="complied"))
        >>> len(cs.score_pool(model, probe, pool).to_frame())
        40
    """
    probe.check_model(model)
    seen: set[str] = set()
    parts: list[pd.DataFrame] = []
    done = resumed = 0
    with _shards(out, model, probe, window) as store:
        for part in read_windows(pool, size=window, strict=strict):
            kept = None if store is None else _read_shard(store, part)
            frame = score_window(model, probe, part, seen, batch_tokens=batch_tokens) if kept is None else kept
            if kept is None and store is not None:
                _write_shard(store, part, frame)
            seen.update(frame["id"])
            parts.append(frame)
            done += len(frame)
            resumed += 0 if kept is None else len(frame)
            if progress is not None:
                progress(done)
        if store is not None:
            _check_end(store, len(parts))
    if not parts:
        raise DataError("The pool holds no row. Give transcripts to score.")
    return PoolScores(frame=pd.concat(parts, ignore_index=True), resumed=resumed)


def score_window(
    model: LensModel,
    probe: RefusalProbe,
    window: Window,
    seen: set[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Scores one window.

    Args:
        model: the model.
        probe: fitted on this model.
        window: rows of the pool.
        seen: ids that came before; a second row of an id is not scored.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        `COLUMNS`, one row a row of the window, in its order.
    """
    reasons: dict[int, Omission] = {}
    first: dict[str, int] = {}
    for i, row in enumerate(window.rows):
        if isinstance(row, Omission):
            reasons[i] = row
        elif row.id in seen or row.id in first:
            reasons[i] = Omission(stage="pool", reason="duplicate id", id=row.id)
        else:
            first[row.id] = i
    kept = [t for i, t in enumerate(window.rows) if isinstance(t, Transcript) and i not in reasons]
    tokens, omitted = tokenize_all(kept, model.tokenizer, model.template, max_length=model.shape.context)
    reasons |= {first[o.id]: o for o in omitted}
    rows: dict[int, dict[str, object]] = {}
    for t, logits in project_layer(model, tokens, probe.layer, probe.weight, probe.bias, batch_tokens=batch_tokens):
        rows[first[tokens[t].id]] = _measured(tokens[t], logits, probe)
    table = []
    for i, row in enumerate(window.rows):
        known = _labels(row) if isinstance(row, Transcript) else {}
        reason = {"reason": reasons[i].reason, "valid": False} if i in reasons else {}
        table.append({"row": window.start + i, "id": row.id, **_NOTHING, **known, **rows.get(i, {}), **reason})
    return pd.DataFrame(table, columns=list(COLUMNS)).astype({"harmful": object})


def judge_refusal(transcript: Transcript) -> float:
    """The probability of a refusal that a judge gave the answer; NaN where none did."""
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


def _measured(tokens: TokenizedTranscript, logits: np.ndarray, probe: RefusalProbe) -> dict[str, object]:
    found, thinking = cliff_of(tokens, logits), tokens.span(Span.THINKING)
    reason = why_invalid(found, probe) if np.isfinite(logits).all() else "residuals are NaN or infinite"
    sizes = {"n_tokens": tokens.n_pos, "n_thinking": thinking.stop - thinking.start}
    return {**asdict(found), **sizes, "valid": not reason, "reason": reason}


@contextmanager
def _shards(out: str | Path | None, model: LensModel, probe: RefusalProbe, window: int) -> Iterator[RunStore | None]:
    if out is None:
        yield None
        return
    config = {
        "command": "score-pool",
        "model": model.fingerprint,
        "layer": probe.layer,
        "probe": [float(probe.weight.sum()), float(np.abs(probe.weight).sum()), probe.bias],
        "window": window,
    }
    with open_run(out, config) as store:
        # The configuration holds from the first shard on.
        if not store.finished("opened"):
            store.finish("opened", 0.0)
        yield store


def _shard_name(index: int) -> str:
    return f"scores-{index:06d}.parquet"


def _read_shard(store: RunStore, window: Window) -> pd.DataFrame | None:
    name = _shard_name(window.index)
    if not store.has(name):
        return None
    frame = store.read_frame(name)
    digests = set(frame.pop("digest"))
    if digests != {window.digest} or len(frame) != len(window.rows):
        raise StoreError(
            f"{store.path / name} was made from other rows than rows {window.start + 1} to "
            f"{window.start + len(window.rows)} of the pool: the pool has changed under the run. Give the same "
            "pool, or another directory."
        )
    return _plain(frame)


def _check_end(store: RunStore, windows: int) -> None:
    if store.has(_shard_name(windows)):
        raise StoreError(
            f"{store.path} holds more than {windows} windows: the pool has changed under the run. Give the same pool, "
            "or another directory."
        )


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Labels as they were before Parquet took None for NaN."""
    labels = [None if pd.isna(value) else bool(value) for value in frame["harmful"]]
    return frame.assign(harmful=pd.Series(labels, dtype=object))[list(COLUMNS)]


def _write_shard(store: RunStore, window: Window, frame: pd.DataFrame) -> None:
    labels = pd.array(frame["harmful"].tolist(), dtype="boolean")
    store.write_frame(_shard_name(window.index), frame.assign(harmful=labels, digest=window.digest))
