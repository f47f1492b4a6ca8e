"""How is a pool scored over the nodes of a cluster?

1. The driver reads the pool and puts windows into Ray's object store, a bounded number at a time.
2. Ray Data hands them to actors, each of which has loaded the model once, and checked that it is the driver's.
3. Scores come back in any order; whoever asked for them writes them. A window whose worker or node is lost goes to
   another; a window is done when its scores have arrived, so that none is lost or counted twice.

Nodes need the model's files, not the pool's. Knows nothing of shards.
"""

import logging
import os
import pickle
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cliffscope.errors import CliffScopeError, DataError, MissingExtraError, ResourceError, UnsupportedModelError
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.activations import BATCH_TOKENS
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.selection.rows import score_window
from cliffscope.transcripts.pools import Window

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

ROUND = 256
"""Windows in the object store at a time; each round loads the models anew, so it must be long beside that."""


@dataclass(frozen=True, kw_only=True)
class RayEngine:
    """Actors on a Ray cluster, each with a model of its own."""

    actors: int | tuple[int, int] | None = None
    """Actors, or the fewest and the most; None begins with as many as fit the cluster and lets Ray start more."""
    cpus: float = 1
    """CPU cores of an actor, which are also its threads."""
    gpus: float | None = None
    """GPUs of an actor; None takes one where the cluster has any. With more than one the model is spread over them."""
    address: str | None = None
    """Of a running cluster, such as `auto`; None takes RAY_ADDRESS, or starts Ray on this machine."""


def score_on_ray(
    engine: RayEngine,
    model: LensModel,
    probe: RefusalProbe,
    windows: Iterable[Window],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[Window, pd.DataFrame]]:
    """Scores windows on a cluster.

    Args:
        engine: which actors, and where.
        model: loaded by the actors from the same place, which must exist on every node; the driver's own copy is only
            compared with theirs.
        probe: fitted on this model.
        windows: read as they are needed.
        batch_tokens: tokens of a batch, padding included.

    Yields:
        A window, without its rows, and its scores, in the order in which they arrive.

    Raises:
        MissingExtraError: Ray is not installed.
        DataError: there is no cluster at the address, or the engine's sizes are none.
        UnsupportedModelError: an actor's model is another.
        ResourceError: no actor fits the cluster, or Ray gives up.
    """
    _check(engine)
    pending = iter(windows)
    while chunk := list(islice(pending, ROUND)):
        yield from _score_round(engine, model, probe, chunk, batch_tokens)


class _Actor:
    """One model on one worker."""

    def __init__(
        self, source: str, options: dict[str, Any], fingerprint: str, probe: RefusalProbe, batch_tokens: int
    ) -> None:
        # Ray starts a worker that fails again and again: what is no accident is told by its first window instead.
        self.error: CliffScopeError | None = None
        self.probe, self.batch_tokens = probe, batch_tokens
        try:
            self.model = load_model(source, **options)
        except CliffScopeError as error:
            self.error = error
            return
        if self.model.fingerprint != fingerprint:
            self.error = UnsupportedModelError(
                f"A worker found another model at {source!r} than the driver: fingerprint {self.model.fingerprint}, "
                f"expected {fingerprint}. Put the same files on every node, and do not edit the driver's model."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scores the one window of a batch."""
        window: Window = pickle.loads(batch["window"][0])
        result: pd.DataFrame | CliffScopeError
        try:
            result = self.error or score_window(self.model, self.probe, window, batch_tokens=self.batch_tokens)
        except CliffScopeError as error:
            result = error
        return {"index": np.array([window.index]), "result": np.array([pickle.dumps(result)], dtype=object)}


def _score_round(
    engine: RayEngine, model: LensModel, probe: RefusalProbe, windows: list[Window], batch_tokens: int
) -> Iterator[tuple[Window, pd.DataFrame]]:
    ray = _connect(engine)
    gpus = engine.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    known = {window.index: window for window in windows}
    # Pickled between processes of one run, as Ray does with all that it moves; never read from a file.
    items = ray.data.from_items([{"window": pickle.dumps(w)} for w in windows], override_num_blocks=len(windows))
    options = {"template": model.template, "dtype": model.dtype, "device": _device(gpus)}
    scored = items.map_batches(
        _Actor,
        batch_size=1,
        compute=_pool(engine, gpus, len(windows)),
        fn_constructor_args=(_source(model), options, model.fingerprint, probe, batch_tokens),
        num_cpus=engine.cpus,
        num_gpus=gpus,
    )
    try:
        for row in scored.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, CliffScopeError):
                raise result
            yield known.pop(int(row["index"])), result
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"Ray gave up: {str(error).strip().splitlines()[-1]} Run the same again: it goes on."
        ) from error
    if known:
        raise ResourceError(f"Ray ended without scores of {len(known)} windows. Run the same again: it goes on.")


def _check(engine: RayEngine) -> None:
    fewest, most = (1, 1) if engine.actors is None else _range(engine.actors)
    if not 1 <= fewest <= most or engine.cpus <= 0 or (engine.gpus is not None and engine.gpus < 0):
        raise DataError(f"{engine}: expected at least one actor, the fewest before the most, and more than 0 cores.")


def _range(actors: int | tuple[int, int]) -> tuple[int, int]:
    return actors if isinstance(actors, tuple) else (actors, actors)


def _connect(engine: RayEngine) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs Ray: pip install 'cliffscope[ray]'.") from error
    if not ray.is_initialized():
        try:
            _knock(engine.address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"No Ray cluster at {engine.address!r}: {str(error).splitlines()[0]} Start one with `ray start --head`,"
                " or give address=None to use this machine alone."
            ) from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nothing answers; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _pool(engine: RayEngine, gpus: float, windows: int) -> "ActorPoolStrategy":
    import ray
    from ray.data import ActorPoolStrategy

    if engine.actors is not None:
        fewest, most = _range(engine.actors)
        return ActorPoolStrategy(min_size=fewest, max_size=most)
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = int(min(have.get("CPU", 0) / engine.cpus, have.get("GPU", 0) / gpus if gpus else float("inf")))
    if not fits:
        raise ResourceError(
            f"No actor of {engine.cpus} cores and {gpus} GPUs fits the cluster, which has {have.get('CPU', 0)} cores "
            f"and {have.get('GPU', 0)} GPUs. Ask for less, or add a node."
        )
    return ActorPoolStrategy(min_size=1, initial_size=min(fits, windows), max_size=windows)


def _device(gpus: float) -> str:
    if gpus > 1:
        return "auto"
    return "cuda" if gpus else "cpu"


def _source(model: LensModel) -> str:
    """Where actors find the model: a path that does not depend on the directory that they run in."""
    path = Path(model.name)
    return str(path.resolve()) if path.exists() else model.name
