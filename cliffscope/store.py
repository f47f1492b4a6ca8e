"""Where do the results of a run live, and how do they survive a crash?

1. A run directory belongs to one configuration and, while it is open, to one process: it holds a lock that the system
   releases when the process dies.
2. Every file is written beside its place, flushed, and moved there at once, so that no half-written file is ever seen.
3. A stage is finished when the manifest says so, after its files; a run started again skips finished stages.
4. Work that is done row by row goes to a log that is only ever appended to, so that a killed run loses no finished row.

Knows files and JSON, no science.
"""

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cliffscope.errors import CliffScopeError, StoreError

SCHEMA = 2
"""Of run directories: 2 has a record and a key for each stage."""
MANIFEST, LOCK = "manifest.json", ".lock"
LOG = ".log"
"""Ending of append-only files: work of a stage that is not finished."""
PARTIAL = ".partial"
"""Ending of files that are not complete; what a killed process left of them is removed by the next one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RunStore:
    """An open run directory."""

    path: Path
    """The directory."""

    @property
    def config(self) -> object:
        """The configuration that the directory was made with."""
        return self.manifest.get("config")

    @property
    def manifest(self) -> dict[str, object]:
        """What is known of the run so far."""
        return self.read_json(MANIFEST)

    def update(self, **fields: object) -> None:
        """Merges fields into the manifest."""
        self.write_json(MANIFEST, {**self.manifest, **fields})

    def finished(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return stage in self._stages()

    def finish(self, stage: str, seconds: float) -> None:
        """Marks a stage finished; its files must have been written."""
        self.update(stages={**self._stages(), stage: {"seconds": round(seconds, 3)}})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done inside, and marks the stage finished unless it raises."""
        started = time.perf_counter()
        yield
        self.finish(name, time.perf_counter() - started)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file()

    def write_json(self, name: str, value: object) -> None:
        """Writes JSON; NaN becomes null, which JSON knows."""
        text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False)
        self._write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def read_json(self, name: str) -> dict[str, object]:
        """Reads what `write_json` wrote."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path / name} cannot be read: {error}. Is it a run directory of CliffScope?"
            ) from error
        if not isinstance(value, dict):
            raise StoreError(
                f"{self.path / name} holds {type(value).__name__}, not an object. It was not written by CliffScope."
            )
        return value

    def write_frame(self, name: str, frame: pd.DataFrame) -> None:
        """Writes a table as Parquet."""
        self._write(name, lambda path: frame.to_parquet(path, index=False))

    def read_frame(self, name: str) -> pd.DataFrame:
        """Reads a table."""
        try:
            return pd.read_parquet(self.path / name)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / name} cannot be read: {error}.") from error

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays as safetensors."""
        self._write(name, lambda path: save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(path)))

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Reads arrays."""
        try:
            return dict(load_file(str(self.path / name)))
        except (OSError, ValueError, SafetensorError) as error:
            raise StoreError(f"{self.path / name} cannot be read: {error}.") from error

    def write_with(self, name: str, write: Callable[[Path], object]) -> None:
        """Lets `write` fill a temporary file, then moves it into place."""
        self._write(name, write)

    def _stages(self) -> dict[str, object]:
        stages = self.manifest.get("stages")
        return dict(stages) if isinstance(stages, dict) else {}

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        write_atomically(self.path / name, write)


@contextmanager
def open_run(path: str | Path, config: Mapping[str, object]) -> Iterator[RunStore]:
    """Opens a run directory for writing, making it if need be.

    A directory that was made here is removed again if an error of CliffScope ends the run before anything is written.

    Args:
        path: the directory.
        config: JSON-ready; must be the one the directory was made with, once a stage is finished or has kept rows.

    Yields:
        The store.

    Raises:
        StoreError: another process holds it, it belongs to another configuration, or it cannot be written.
    """
    folder = Path(path)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise StoreError(
            f"Run directory {folder} cannot be written: {error.strerror or error}. Give another --out."
        ) from error
    with lock:
        _take(lock, f"Run directory {folder}", "another --out")
        store = RunStore(path=folder)
        _claim(store, config)
        for rest in folder.glob(f".*{PARTIAL}"):
            rest.unlink(missing_ok=True)
        try:
            yield store
        except CliffScopeError:
            if made:
                _discard(store)
            raise


@dataclass(frozen=True, eq=False, kw_only=True)
class RowLog:
    """An open log of finished rows."""

    path: Path
    """The file."""
    rows: Mapping[str, Mapping[str, object]]
    """Rows that were there when it was opened, by key."""
    dropped: int
    """Half-written rows at the end that were cut off: 0, or 1 after a crash."""
    file: IO[bytes]
    """Where rows are appended."""

    def append(self, key: str, row: Mapping[str, object]) -> None:
        """Adds a finished row; on return it survives a crash."""
        try:
            _append(self.file, {"key": key, **row})
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}. Free space, then run the same again; the "
                "rows that were written are kept."
            ) from error


@contextmanager
def open_log(path: str | Path, config: Mapping[str, object]) -> Iterator[RowLog]:
    """Opens an append-only file of finished rows, from which an interrupted run goes on.

    The first line holds the configuration, each further line one row as a JSON object with its `key`. A last line
    without its line break was being written when the process died; it is cut off and counted.

    Args:
        path: the file; made if need be.
        config: JSON-ready; must be the one the file was made with.

    Yields:
        The log.

    Raises:
        StoreError: another process holds it, it belongs to another configuration, it is no such log, or it cannot be
            written.
    """
    place = Path(path)
    try:
        file = place.open("a+b")
    except OSError as error:
        raise StoreError(f"{place} cannot be written: {error.strerror or error}. Give another file.") from error
    with file:
        _take(file, f"File {place}", "another file")
        yield _read_log(place, file, config)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all.

    Args:
        path: where it goes.
        write: fills the temporary file that it is given.

    Raises:
        StoreError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}. Free space or give another "
            "directory, then run the same command again; finished stages are kept."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _take(lock: IO[str] | IO[bytes], what: str, instead: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"{what} is in use by another process. Wait for it to end, or give {instead}.") from error
    except OSError as error:
        raise StoreError(
            f"{what} cannot be locked: {error.strerror or error}. Give {instead} on a file system that has locks, such "
            "as a local disk."
        ) from error


def _append(file: IO[bytes], row: Mapping[str, object]) -> None:
    # One write a line: what a kill leaves of it has no line break, and only then.
    file.write(json.dumps(plain(row), ensure_ascii=True, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _read_log(path: Path, file: IO[bytes], config: Mapping[str, object]) -> RowLog:
    wanted = plain({"schema": SCHEMA, "config": dict(config)})
    head = json.dumps(wanted).encode()
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    if lines and _log_line(path, 1, lines[0]) != wanted or not lines and not head.startswith(data):
        raise StoreError(
            f"{path} is no log of this configuration: it begins with {data[:200].decode(errors='replace')!r}, expected "
            f"{head.decode()}. Give another file, or the same options."
        )
    rows: dict[str, Mapping[str, object]] = {}
    for number, line in enumerate(lines[1:], start=2):
        row = _log_line(path, number, line)
        key = row.pop("key", None)
        if not isinstance(key, str) or key in rows:
            raise StoreError(f"{path}, line {number}: expected a key of its own, found {key!r}. Give another file.")
        rows[key] = row
    # Nothing is cut off a file before it has shown itself to be a log.
    file.truncate(whole)
    if not lines:
        _append(file, {"schema": SCHEMA, "config": dict(config)})
    return RowLog(path=path, rows=rows, dropped=int(whole < len(data)), file=file)


def _log_line(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StoreError(f"{path}, line {number} is not JSON: {error}. Give another file.") from error
    if not isinstance(row, dict):
        raise StoreError(f"{path}, line {number} holds {type(row).__name__}, not an object. Give another file.")
    return row


def _discard(store: RunStore) -> None:
    if {p.name for p in store.path.iterdir()} <= {MANIFEST, LOCK}:
        shutil.rmtree(store.path, ignore_errors=True)


def umask() -> int:
    """The rights that new files are not to have; the system tells it only to whoever sets it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _claim(store: RunStore, config: Mapping[str, object]) -> None:
    wanted = plain(dict(config))
    new: dict[str, object] = {"schema": SCHEMA, "config": wanted, "stages": {}}
    if not store.has(MANIFEST):
        strangers = [p.name for p in store.path.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise StoreError(
                f"Directory {store.path} holds other files, such as {sorted(strangers)[0]!r}, and is no run of "
                "CliffScope. Give an empty or new directory."
            )
        store.write_json(MANIFEST, new)
        return
    found = store.manifest
    if found.get("schema") != SCHEMA:
        raise StoreError(
            f"Run directory {store.path} was written by another version of CliffScope (schema {found.get('schema')}, "
            f"expected {SCHEMA}) and cannot be read. Choose a different --out."
        )
    kept = found.get("config")
    begun = bool(found.get("stages")) or any(p.suffix == LOG for p in store.path.iterdir())
    if kept != wanted and not begun:
        store.write_json(MANIFEST, new)
    elif kept != wanted:
        before = kept if isinstance(kept, dict) else {}
        now = wanted if isinstance(wanted, dict) else {}
        changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        told = "; ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise StoreError(
            f"Run directory {store.path} belongs to another configuration ({told}). Give another --out, or the same "
            "options."
        )


def plain(value: object) -> object:
    """JSON-ready copy: paths and enums as text, NumPy values as numbers, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)
