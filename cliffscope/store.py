"""Where do the results of a run live, and how do they survive a crash?

1. A run directory belongs to one configuration and, while it is open, to one process, which holds a lock that the
   system releases when the process dies.
2. Every file is written next to its destination, flushed and renamed, so that no half-written file is ever seen.
3. A stage is finished when the manifest says so, after its files; a resumed run skips finished stages.
4. Work that is done row by row goes to a log that is only ever appended to, so that a killed run loses no finished row.

Files are flushed with fsync, which survives a killed process and a crashed system. On macOS the drive may still lose
its own cache in a power cut; F_FULLFSYNC would prevent that and cost a pause per row, for results that can be computed
again. Knows files and JSON, no science.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cliffscope.errors import CliffScopeError, StoreError

SCHEMA = 2
"""Of run directories: 2 has a record and a key for each stage."""
MANIFEST, LOCK = "manifest.json", ".lock"
LOG = ".log"
"""Suffix of append-only files: work of a stage that is not finished."""
PARTIAL = ".partial"
"""Suffix of incomplete files; those that a killed process left behind are removed by the next one."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_DIRECTORY_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True, eq=False, kw_only=True)
class RunStore:
    """An open run directory."""

    path: Path
    """The directory."""

    @property
    def config(self) -> object:
        """The configuration that the directory was created with."""
        return self.manifest.get("config")

    @property
    def manifest(self) -> dict[str, object]:
        """The run's configuration, finished stages and further fields."""
        return self.read_json(MANIFEST)

    def update(self, fields: Mapping[str, object]) -> None:
        """Merges fields into the manifest."""
        self.write_json(MANIFEST, {**self.manifest, **fields})

    def finished(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return stage in self._stages()

    def finish(self, stage: str, seconds: float) -> None:
        """Marks a stage finished; its files must have been written."""
        self.update({"stages": {**self._stages(), stage: {"seconds": round(seconds, 3)}}})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the work inside, and marks the stage finished unless it raises."""
        started = time.perf_counter()
        yield
        self.finish(name, time.perf_counter() - started)

    def has(self, name: str) -> bool:
        """Whether the directory holds a file."""
        return (self.path / name).is_file()

    def write_json(self, name: str, value: object) -> None:
        """Writes JSON; NaN becomes null, since JSON has no NaN."""
        text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False)
        # A path may hold half of a surrogate pair, which is written as JSON's own escape.
        self._write(name, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))

    def read_json(self, name: str) -> dict[str, object]:
        """Reads what `write_json` wrote."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path / name} cannot be read: {error}. Check that it is a run directory of CliffScope."
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
    """Opens a run directory for writing, and creates it if it does not exist.

    A directory created here is removed again if an error of CliffScope ends the run before anything is written.

    Args:
        path: the directory.
        config: JSON-ready; must equal that of the directory once a stage is finished or has logged rows.

    Yields:
        The store.

    Raises:
        StoreError: another process holds it, it belongs to another configuration, or it cannot be written.
    """
    folder = Path(path)
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Run directory {folder} cannot be written: {error.strerror or error}. Choose a different --out."
        ) from error
    with _locked(folder / LOCK, f"Run directory {folder}", "a different --out"):
        store = RunStore(path=folder)
        _claim(store, config)
        # A killed process may have left partial files, and the locks of its logs.
        for rest in (*folder.glob(f".*{PARTIAL}"), *folder.glob(f".*{LOG}{LOCK}")):
            rest.unlink(missing_ok=True)
        try:
            yield store
        except CliffScopeError:
            if created:
                _discard(store)
            raise


@dataclass(frozen=True, eq=False, kw_only=True)
class RowLog:
    """An open log of finished rows."""

    path: Path
    """The file."""
    rows: Mapping[str, Mapping[str, object]]
    """Rows that the file held when it was opened, by key."""
    dropped: int
    """Half-written rows at the end that were cut off: 0, or 1 after a crash."""
    file: IO[bytes]
    """Where rows are appended."""
    lock: BaseFileLock
    """Keeps other processes away from the file."""

    def append(self, key: str, row: Mapping[str, object]) -> None:
        """Adds a finished row; on return it survives a crash."""
        try:
            _append(self.file, {"key": key, **row})
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}. Free space, then rerun the command to "
                "resume after the rows that were written."
            ) from error

    def close(self) -> None:
        """Closes the file and releases its lock, which leaving the context does too."""
        self.file.close()
        _release(self.lock, remove=True)


@contextmanager
def open_log(path: str | Path, config: Mapping[str, object]) -> Iterator[RowLog]:
    """Opens an append-only file of finished rows, from which an interrupted run resumes.

    The first line holds the configuration, each further line one row as a JSON object with its `key`. A last line
    without its line break was being written when the process died; it is cut off and counted. While the file is open, a
    hidden lock file stands next to it.

    Args:
        path: the file; created if it does not exist.
        config: JSON-ready; must equal that of the file.

    Yields:
        The log.

    Raises:
        StoreError: another process holds it, it belongs to another configuration, it is not such a log, or it cannot be
            written.
    """
    place = Path(path)
    try:
        file = place.open("a+b")
    except OSError as error:
        raise StoreError(f"{place} cannot be written: {error.strerror or error}. Choose a different file.") from error
    # Windows lets nobody read a locked file, so the lock is a separate one. Symbolic links are resolved, so that a log
    # has one lock under every name.
    target = place.resolve()
    lock_path = target.with_name(f".{target.name}{LOCK}")
    with file, _locked(lock_path, f"File {place}", "a different file", remove=True) as lock:
        yield _read_log(place, file, lock, config)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file completely or not at all.

    Args:
        path: the destination.
        write: fills a temporary file, whose path it receives.

    Raises:
        StoreError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        flush_file(temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
        flush_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} cannot be written: {system_reason(error)}. Free space or choose a different directory, then rerun "
            "the command to resume after the finished stages."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def system_reason(error: Exception) -> str:
    """What the system says about an error, without the numbers and paths around it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def flush_file(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_directory(folder: Path) -> None:
    """Waits until a directory's entries are on the disk, so that a rename in it survives a crash of the system.

    Does nothing where directories cannot be opened (Windows) or flushed (some network file systems).
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FLUSH:
            raise
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, what: str, alternative: str, *, remove: bool = False) -> Iterator[BaseFileLock]:
    # A soft lock would outlive a killed process, so a file system without locks is refused.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"{what} is in use by another process. Wait for it to end, or choose {alternative}."
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise StoreError(
                f"{what} cannot be locked: {system_reason(error)}. Choose {alternative} on a file system that supports "
                "locks, such as a local disk."
            ) from error
        raise StoreError(f"{what} cannot be written: {system_reason(error)}. Choose {alternative}.") from error
    try:
        yield lock
    finally:
        _release(lock, remove=remove)


def _release(lock: BaseFileLock, *, remove: bool) -> None:
    if remove and lock.is_locked:
        # filelock does not take a lock on a file that was removed after it was opened. Windows removes no open file.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def _append(file: IO[bytes], row: Mapping[str, object]) -> None:
    # One write per line: only a line that a kill cut short has no line break.
    file.write(json.dumps(plain(row), ensure_ascii=True, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _read_log(path: Path, file: IO[bytes], lock: BaseFileLock, config: Mapping[str, object]) -> RowLog:
    expected = plain({"schema": SCHEMA, "config": dict(config)})
    head = json.dumps(expected).encode()
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    if lines and _log_line(path, 1, lines[0]) != expected or not lines and not head.startswith(data):
        raise StoreError(
            f"{path} is not a log of this configuration: it begins with {data[:200].decode(errors='replace')!r}, "
            f"expected {head.decode()}. Choose a different file, or use the same options as before."
        )
    rows: dict[str, Mapping[str, object]] = {}
    for number, line in enumerate(lines[1:], start=2):
        row = _log_line(path, number, line)
        key = row.pop("key", None)
        if not isinstance(key, str) or key in rows:
            raise StoreError(f"{path}, line {number}: expected a unique key, got {key!r}. Choose a different file.")
        rows[key] = row
    # A file is cut only after all of it has proved to be a log.
    file.truncate(whole)
    if not lines:
        _append(file, {"schema": SCHEMA, "config": dict(config)})
    return RowLog(path=path, rows=rows, dropped=int(whole < len(data)), file=file, lock=lock)


def _log_line(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise StoreError(f"{path}, line {number} is not JSON: {error}. Choose a different file.") from error
    if not isinstance(row, dict):
        raise StoreError(
            f"{path}, line {number} holds {type(row).__name__}, expected an object. Choose a different file."
        )
    return row


def _discard(store: RunStore) -> None:
    if {p.name for p in store.path.iterdir()} <= {MANIFEST, LOCK}:
        shutil.rmtree(store.path, ignore_errors=True)


def umask() -> int:
    """The permissions that new files do not get. The system reports them only when they are set, so they are reset."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _claim(store: RunStore, config: Mapping[str, object]) -> None:
    """Makes an unused directory the run of a configuration; refuses one that belongs to anything else."""
    new: dict[str, object] = {"schema": SCHEMA, "config": plain(dict(config)), "stages": {}}
    if not store.has(MANIFEST):
        strangers = [p.name for p in store.path.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise StoreError(
                f"Directory {store.path} holds other files, such as {sorted(strangers)[0]!r}, and is not a run "
                "directory of CliffScope. Choose an empty or new directory."
            )
        store.write_json(MANIFEST, new)
        return
    manifest = store.manifest
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"Run directory {store.path} was written by another version of CliffScope (schema "
            f"{manifest.get('schema')}, expected {SCHEMA}) and cannot be read. Choose a different --out."
        )
    if manifest.get("config") == new["config"]:
        return
    if manifest.get("stages") or any(p.suffix == LOG for p in store.path.iterdir()):
        raise StoreError(
            f"Run directory {store.path} belongs to another configuration "
            f"({_differences(manifest.get('config'), new['config'])}). Choose a different --out, or use the same "
            "options as before."
        )
    store.write_json(MANIFEST, new)


def _differences(before: object, now: object) -> str:
    old, new = (value if isinstance(value, dict) else {} for value in (before, now))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names)


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
