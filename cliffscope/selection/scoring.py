"""How large is the cliff of every example in a pool of any size?

1. The pool is read window by window. A row that cannot be scored is kept with the reason; the others are scored.
2. Windows are scored in this process, or by actors on the nodes of a Ray cluster, in any order.
3. A finished window is written as a shard, with the hash of the rows that it was computed from. A resumed run reads the
   existing shards, checks that the pool still holds the same rows, and scores the remaining windows.

Scores do not depend on the order of the pool or on the window size. Memory: the model, one window of text, and one row
for each example.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cliffscope.errors import DataError, StoreError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import BATCH_TOKENS
from cliffscope.readouts.probe import RefusalProbe, linear_probe
from cliffscope.selection.distributed import RayEngine, score_on_ray
from cliffscope.selection.rows import SCORE_COLUMNS, score_window
from cliffscope.store import RunStore, open_run
from cliffscope.transcripts.pools import POOL_STAGE, WINDOW_ROWS, PoolSource, PoolWindow, read_windows
from cliffscope.transcripts.records import Omission, Transcript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PoolEngine = Literal["local", "ray"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolScores(Plotted):
    """Scores of a pool, one row for each example."""

    frame: pd.DataFrame
    """`SCORE_COLUMNS`: every row of the pool. Scores are in [0, 1], or NaN if `reason` says why there are none."""
    resumed: int
    """Rows that an earlier run had scored."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, in the order of the pool."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The first rows: id, plateau_mean, final, cliff, valid, reason."""
        return self.frame[["id", "plateau_mean", "final", "cliff", "valid", "reason"]]

    def plot(self) -> "Figure":
        """Plots plateau against final of every row with a valid cliff."""
        from cliffscope.figures.safety import plateau_final

        shown = self.frame[self.frame["valid"].astype(bool)]
        return plateau_final(shown["plateau_mean"].to_numpy(float), shown["final"].to_numpy(float))

    @property
    def omitted(self) -> tuple[Omission, ...]:
        """Rows without a valid cliff, and why."""
        rows = self.frame[~self.frame["valid"].astype(bool)]
        return tuple(Omission(stage=POOL_STAGE, reason=str(r.reason), id=str(r.id)) for r in rows.itertuples())

    def __repr__(self) -> str:
        """One line: how many rows, how many with a valid cliff, how many resumed."""
        valid = int(self.frame["valid"].sum())
        return f"PoolScores({valid} of {len(self.frame)} rows with a valid cliff, {self.resumed} rows resumed)"


def score_pool(
    model: LensModel,
    probe: RefusalProbe,
    pool: PoolSource,
    *,
    out: str | Path | None = None,
    window: int = WINDOW_ROWS,
    batch_tokens: int = BATCH_TOKENS,
    strict: bool = False,
    engine: PoolEngine | RayEngine = "local",
    progress: Callable[[int], None] | None = None,
) -> PoolScores:
    """Scores every example of a pool.

    Args:
        model: the model.
        probe: fitted on this model.
        pool: a .jsonl or .parquet file of transcripts, a folder of them, transcripts, or an iterable of rows.
        out: directory of shards, from which a repeated call resumes; None writes nothing.
        window: rows read at a time.
        batch_tokens: tokens in a batch, including padding.
        strict: raise at the first broken row instead of reporting it.
        engine: `local` scores in this process; `ray`, or a `RayEngine`, on the nodes of a Ray cluster.
        progress: called with the number of rows done.

    Returns:
        The scores of every row.

    Raises:
        ProbeError: the probe does not fit the model.
        DataError: the pool cannot be read or is empty.
        StoreError: the directory belongs to a different model, probe or window size, or the pool has changed since.
        MissingExtraError: `engine="ray"`, and Ray is not installed.

    Source:
        Cliff-as-a-Judge, arXiv 2510.06036, section 5.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts = cs.organisms.prompts("fit", 40, harmful=True, wrappers=(None, "story"))
        >>> pool = cs.judge(cs.roll_out(model, prompts, max_thinking=96, max_answer=16))
        >>> probe = cs.fit_probe(model, pool.where(outcome="refused"), pool.where(outcome="complied"))
        >>> len(cs.score_pool(model, probe, pool).to_frame())
        40
    """
    probe = linear_probe(probe, "A cliff is measured from scores over the thinking, which a probe reads.")
    probe.check_model(model)
    if probe.fingerprint != model.fingerprint:
        _log.warning("The probe was fitted on weights other than those of %s, so its scores may not hold.", model.name)
    if not isinstance(engine, RayEngine) and engine not in ("local", "ray"):
        raise DataError(f"engine={engine!r}: expected 'local', 'ray' or a RayEngine.")
    workers = RayEngine() if engine == "ray" else engine
    parts: dict[int, pd.DataFrame] = {}
    resumed = 0
    with _shards(out, model, probe, window) as store:

        def missing() -> Iterator[PoolWindow]:
            nonlocal resumed
            for part in _without_duplicates(read_windows(pool, size=window, strict=strict)):
                shard = None if store is None else _read_shard(store, part)
                if shard is None:
                    yield part
                else:
                    resumed += len(shard)
                    parts[part.index] = shard

        if isinstance(workers, RayEngine):
            scored = score_on_ray(workers, model, probe, missing(), batch_tokens=batch_tokens)
        else:
            scored = _score_here(model, probe, missing(), batch_tokens)
        for part, frame in scored:
            if store is not None:
                _write_shard(store, part, frame)
            parts[part.index] = frame
            if progress is not None:
                progress(sum(map(len, parts.values())))
        if store is not None:
            _check_end(store, len(parts))
    if not parts:
        raise DataError("The pool holds no row. Pass transcripts to score.")
    table = pd.concat([parts[index] for index in sorted(parts)], ignore_index=True)
    return PoolScores(frame=table, resumed=resumed)


def _score_here(
    model: LensModel, probe: RefusalProbe, windows: Iterable[PoolWindow], batch_tokens: int
) -> Iterator[tuple[PoolWindow, pd.DataFrame]]:
    for window in windows:
        yield window, score_window(model, probe, window, batch_tokens=batch_tokens)


def _without_duplicates(windows: Iterable[PoolWindow]) -> Iterator[PoolWindow]:
    """The windows, with an omission in place of every row whose id has already occurred."""
    seen: set[str] = set()
    for window in windows:
        rows: list[Transcript | Omission] = []
        for row in window.rows:
            repeated = isinstance(row, Transcript) and row.id in seen
            rows.append(Omission(stage=POOL_STAGE, reason="duplicate id", id=row.id) if repeated else row)
            seen.add(row.id)
        yield replace(window, rows=tuple(rows))


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
        # Without a finished stage, a run directory accepts a different configuration.
        if not store.finished("opened"):
            store.finish("opened", 0.0)
        yield store


def _shard_name(index: int) -> str:
    return f"scores-{index:06d}.parquet"


def _read_shard(store: RunStore, window: PoolWindow) -> pd.DataFrame | None:
    name = _shard_name(window.index)
    if not store.has(name):
        return None
    frame = store.read_frame(name)
    digests = set(frame.pop("digest"))
    if digests != {window.digest} or len(frame) != len(window.rows):
        raise StoreError(
            f"{store.path / name} was not computed from rows {window.start + 1} to {window.start + len(window.rows)} "
            "of the pool: the pool has changed since. Pass the same pool, or choose a different directory."
        )
    return _plain(frame)


def _check_end(store: RunStore, windows: int) -> None:
    if store.has(_shard_name(windows)):
        raise StoreError(
            f"{store.path} holds more than {windows} windows: the pool has changed since. Pass the same pool, or "
            "choose a different directory."
        )


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its labels as before Parquet stored None as NaN."""
    labels = [None if pd.isna(value) else bool(value) for value in frame["harmful"]]
    return frame.assign(harmful=pd.Series(labels, dtype=object))[list(SCORE_COLUMNS)]


def _write_shard(store: RunStore, window: PoolWindow, frame: pd.DataFrame) -> None:
    labels = pd.array(frame["harmful"].tolist(), dtype="boolean")
    store.write_frame(_shard_name(window.index), frame.assign(harmful=labels, digest=window.digest))
