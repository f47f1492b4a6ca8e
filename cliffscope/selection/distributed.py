"""How is a pool scored on the nodes of a cluster?

1. The driver reads the pool and puts windows into Ray's object store, a bounded number at a time.
2. Ray Data hands them to actors. Each actor loads the model once and checks that it equals the driver's.
3. Scores come back in any order, and the caller writes them. If a worker or node is lost, another one scores its
   window. A window is finished only when its scores have arrived, so none is lost or counted twice.

The nodes need the model's files but not the pool's. This file knows nothing of shards.
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
from cliffscope.transcripts.pools import PoolWindow

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

ROUND_WINDOWS = 256
"""Windows in the object store at a time. Every round loads the models again, so it must take much longer than that."""


@dataclass(frozen=True, kw_only=True)
class RayEngine:
    """Actors on a Ray cluster, each with its own copy of the model."""

    actors: int | tuple[int, int] | None = None
    """Number of actors, or (minimum, maximum); None starts as many as fit the cluster and lets Ray add more."""
    cpus: float = 1
    """CPU cores of each actor, and its number of threads."""
    gpus: float | None = None
    """GPUs of each actor; None uses one if the cluster has any. With more than one, the model is spread over them."""
    address: str | None = None
    """Address of a running cluster, such as `auto`; None uses RAY_ADDRESS, or starts Ray on this machine."""


def score_on_ray(
    engine: RayEngine,
    model: LensModel,
    probe: RefusalProbe,
    windows: Iterable[PoolWindow],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[PoolWindow, pd.DataFrame]]:
    """Scores windows on a cluster.

    Args:
        engine: which actors, and where.
        model: the driver's copy, which is compared with those of the actors. The actors load theirs from the same path
            or name, which must exist on every node.
        probe: fitted on this model.
        windows: read as they are needed.
        batch_tokens: tokens in a batch, including padding.

    Yields:
        A window and its scores, in the order in which the scores arrive.

    Raises:
        MissingExtraError: Ray is not installed.
        DataError: there is no cluster at the address, or the engine's numbers are out of range.
        UnsupportedModelError: an actor loaded a different model.
        ResourceError: no actor fits the cluster, or Ray failed.
    """
    _check(engine)
    pending = iter(windows)
    while chunk := list(islice(pending, ROUND_WINDOWS)):
        yield from _score_round(engine, model, probe, chunk, batch_tokens)


class _Actor:
    """One model on one worker."""

    def __init__(
        self, source: str, options: dict[str, Any], fingerprint: str, probe: RefusalProbe, batch_tokens: int
    ) -> None:
        # Ray restarts a worker whose constructor fails, forever. So an error is kept and reported by its first window.
        self.error: CliffScopeError | None = None
        self.probe, self.batch_tokens = probe, batch_tokens
        try:
            self.model = load_model(source, **options)
        except CliffScopeError as error:
            self.error = error
            return
        if self.model.fingerprint != fingerprint:
            self.error = UnsupportedModelError(
                f"A worker loaded a different model from {source!r} than the driver: fingerprint "
                f"{self.model.fingerprint}, expected {fingerprint}. Put the same files on every node, and do not edit "
                "the driver's model."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scores the single window of a batch."""
        window: PoolWindow = pickle.loads(batch["window"][0])
        result: pd.DataFrame | CliffScopeError
        try:
            result = self.error or score_window(self.model, self.probe, window, batch_tokens=self.batch_tokens)
        except CliffScopeError as error:
            result = error
        return {"index": np.array([window.index]), "result": np.array([pickle.dumps(result)], dtype=object)}


def _score_round(
    engine: RayEngine, model: LensModel, probe: RefusalProbe, windows: list[PoolWindow], batch_tokens: int
) -> Iterator[tuple[PoolWindow, pd.DataFrame]]:
    ray = _connect(engine)
    gpus = engine.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    unscored = {window.index: window for window in windows}
    # Pickled only between processes of one run, as Ray does with everything that it moves; never read from a file.
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
            yield unscored.pop(int(row["index"])), result
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"Ray failed: {str(error).strip().splitlines()[-1]} Rerun the command to resume."
        ) from error
    if unscored:
        raise ResourceError(f"Ray ended before {len(unscored)} windows were scored. Rerun the command to resume.")


def _check(engine: RayEngine) -> None:
    minimum, maximum = (1, 1) if engine.actors is None else _range(engine.actors)
    if not 1 <= minimum <= maximum or engine.cpus <= 0 or (engine.gpus is not None and engine.gpus < 0):
        raise DataError(
            f"{engine}: expected at least 1 actor, a minimum no larger than the maximum, and more than 0 cores."
        )


def _range(actors: int | tuple[int, int]) -> tuple[int, int]:
    return actors if isinstance(actors, tuple) else (actors, actors)


def _connect(engine: RayEngine) -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs Ray. Install it with pip install 'cliffscope[ray]'.") from error
    if not ray.is_initialized():
        try:
            _knock(engine.address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address=engine.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"There is no Ray cluster at {engine.address!r}: {str(error).splitlines()[0]} Start one with `ray "
                "start --head`, or use address=None to run on this machine alone."
            ) from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray


def _knock(address: str) -> None:
    """Raises OSError if nothing answers at the address; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _pool(engine: RayEngine, gpus: float, windows: int) -> "ActorPoolStrategy":
    import ray
    from ray.data import ActorPoolStrategy

    if engine.actors is not None:
        minimum, maximum = _range(engine.actors)
        return ActorPoolStrategy(min_size=minimum, max_size=maximum)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no annotation there.
    cores, devices = resources.get("CPU", 0), resources.get("GPU", 0)
    fitting = int(min(cores / engine.cpus, devices / gpus if gpus else float("inf")))
    if not fitting:
        raise ResourceError(
            f"No actor with {engine.cpus} cores and {gpus} GPUs fits the cluster, which has {cores} cores and "
            f"{devices} GPUs. Lower the numbers, or add a node."
        )
    return ActorPoolStrategy(min_size=1, initial_size=min(fitting, windows), max_size=windows)


def _device(gpus: float) -> str:
    if gpus > 1:
        return "auto"
    return "cuda" if gpus else "cpu"


def _source(model: LensModel) -> str:
    """Where the actors load the model from: a path that does not depend on their working directory."""
    path = Path(model.name)
    return str(path.resolve()) if path.exists() else model.name
