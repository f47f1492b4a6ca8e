"""How large is the cliff of every example of a pool, however large the pool?

1. The pool is read window by window; rows that cannot be scored are counted, each with its reason, and the rest go on.
2. Windows are scored in this process, or by actors on the nodes of a Ray cluster, in any order.
3. A finished window is written as a shard with the hash of what it was made from. A run started again reads the shards
   that are there, checks that the pool still holds the same rows, and scores the others.

Scores do not depend on the pool's order or on windows. Memory: the model, one window of text, one row an example.
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
from cliffscope.selection.rows import COLUMNS, score_window
from cliffscope.store import RunStore, open_run
from cliffscope.transcripts.pools import STAGE, WINDOW, PoolSource, Window, read_windows
from cliffscope.transcripts.records import Omission, Transcript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Engine = Literal["local", "ray"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolScores(Plotted):
    """One row an example of a pool."""

    frame: pd.DataFrame
    """`COLUMNS`: every row of the pool; scores in [0, 1], NaN where `reason` says why there are none."""
    resumed: int
    """Rows that were there already."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, in the pool's order."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The first rows: id, plateau_mean, final, cliff, valid, reason."""
        return self.frame[["id", "plateau_mean", "final", "cliff", "valid", "reason"]]

    def plot(self) -> "Figure":
        """Plateau against final of every row with a valid cliff."""
        from cliffscope.figures.safety import plateau_final

        shown = self.frame[self.frame["valid"].astype(bool)]
        return plateau_final(shown["plateau_mean"].to_numpy(float), shown["final"].to_numpy(float))

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
    engine: Engine | RayEngine = "local",
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
        engine: `local` scores in this process; `ray`, or a `RayEngine`, over the nodes of a Ray cluster.
        progress: called with the number of rows done.

    Returns:
        The scores of every row.

    Raises:
        ProbeError: the probe does not fit the model.
        DataError: the pool cannot be read or is empty.
        StoreError: the directory belongs to another model, probe or window, or the pool has changed under the run.
        MissingExtraError: `engine="ray"` without Ray.

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
    probe = linear_probe(probe, "A cliff is measured from scores over the thinking, which a probe reads.")
    probe.check_model(model)
    if probe.fingerprint != model.fingerprint:
        _log.warning(
            "the probe was fitted on other weights than those of %s; its scores may not hold there", model.name
        )
    if not isinstance(engine, RayEngine) and engine not in ("local", "ray"):
        raise DataError(f"engine={engine!r}: expected 'local', 'ray' or a RayEngine.")
    workers = RayEngine() if engine == "ray" else engine
    parts: dict[int, pd.DataFrame] = {}
    resumed = 0
    with _shards(out, model, probe, window) as store:

        def missing() -> Iterator[Window]:
            nonlocal resumed
            for part in _without_duplicates(read_windows(pool, size=window, strict=strict)):
                kept = None if store is None else _read_shard(store, part)
                if kept is None:
                    yield part
                else:
                    resumed += len(kept)
                    parts[part.index] = kept

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
        raise DataError("The pool holds no row. Give transcripts to score.")
    table = pd.concat([parts[index] for index in sorted(parts)], ignore_index=True)
    return PoolScores(frame=table, resumed=resumed)


def _score_here(
    model: LensModel, probe: RefusalProbe, windows: Iterable[Window], batch_tokens: int
) -> Iterator[tuple[Window, pd.DataFrame]]:
    for window in windows:
        yield window, score_window(model, probe, window, batch_tokens=batch_tokens)


def _without_duplicates(windows: Iterable[Window]) -> Iterator[Window]:
    """The windows, with a reason in place of every row whose id came before."""
    seen: set[str] = set()
    for window in windows:
        rows: list[Transcript | Omission] = []
        for row in window.rows:
            again = isinstance(row, Transcript) and row.id in seen
            rows.append(Omission(stage=STAGE, reason="duplicate id", id=row.id) if again else row)
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
