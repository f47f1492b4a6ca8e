"""How is a file or a folder written completely or not at all?

1. What is written goes to a hidden neighbour of the destination, whose name says which process writes it.
2. It is flushed, renamed into place, and the directory is flushed, so that neither a kill nor a crash of the system
   leaves half of it.
3. A neighbour whose process was killed is removed by the next one that writes to the same destination.

Files are flushed with fsync, which survives a killed process and a crashed system. On macOS the drive may still lose
its own cache in a power cut; F_FULLFSYNC would prevent that and cost a pause per row, for results that can be computed
again. Knows files, no science.
"""

import errno
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from cliffscope.errors import StoreError

PARTIAL = ".partial"
"""Suffix of incomplete files and folders."""
_NAME_CHARACTERS = 48
"""Of the destination's name that the hidden neighbour's repeats: it must not be too long where the destination's is
not."""
_OLD = "old"
"""In a neighbour, the folder that is being replaced."""
_NO_DIRECTORY_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file completely or not at all.

    Args:
        path: the destination.
        write: fills a temporary file, whose path it receives.

    Raises:
        StoreError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with as_store_error(path), _neighbour(path, folder=False) as temporary:
        write(temporary)
        flush_file(temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
        flush_directory(path.parent)


def write_folder(place: Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Writes a folder completely or not at all.

    Args:
        place: the folder to create; its parents are created too.
        write: fills a temporary folder, whose path it receives, with files.
        overwrite: whether an existing folder is replaced.

    Raises:
        StoreError: the place cannot be written, such as on a full disk; nothing is left behind.
    """
    with as_store_error(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _bring_back(place)
        with _neighbour(place, folder=True) as temporary:
            write(temporary)
            # Temporary folders, and files that safetensors writes, are private to the owner; what is written gets the
            # permissions of any new file.
            temporary.chmod(0o777 & ~umask())
            for path in temporary.iterdir():
                path.chmod(0o666 & ~umask())
                flush_file(path)
            flush_directory(temporary)
            _move(temporary, place, overwrite=overwrite)
            flush_directory(place.parent)


def check_writable(path: Path) -> None:
    """Raises StoreError where `path` could not be written later: checked before the work, not after it.

    Args:
        path: a file or folder to be written; neither it nor its parents need exist, and nothing is left behind.
    """
    with as_store_error(path):
        with suppress(FileNotFoundError):
            # A name that is too long fails here.
            path.lstat()
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
        with _neighbour(parent / path.name, folder=False):
            pass


def clear_partial(folder: Path, pattern: str = "*") -> None:
    """Removes incomplete files and folders, hidden or not; only for a folder in which nobody else writes."""
    for rest in folder.glob(f".{pattern}{PARTIAL}"):
        remove(rest)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def umask() -> int:
    """The permissions that new files do not get. The system reports them only when they are set, so they are reset."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Turns what a system or a library says of a failed write to a path into StoreError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch has no type of its own for this.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise StoreError(
            f"{path} cannot be written: {system_reason(error)}. Free space or choose a different directory, then run "
            "again: what was finished is kept, and nothing was left half-written."
        ) from error


@contextmanager
def _neighbour(path: Path, *, folder: bool) -> Iterator[Path]:
    """A hidden file or folder next to the destination, which is gone when the context is left."""
    for rest in _killed(path):
        remove(rest)
    prefix = f"{_stem(path)}{_writer(os.getpid())}."
    if folder:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=PARTIAL))
    else:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
    try:
        yield temporary
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _writer(pid: int) -> str:
    """A process as a part of a file name: machines that share a directory have process numbers of their own."""
    return f"{zlib.crc32(platform.node().encode()):08x}-{pid}"


def _killed(path: Path) -> list[Path]:
    """Neighbours that a killed process of this machine left; never those of a live process or of another machine."""
    host = _writer(0).partition("-")[0]
    name = re.compile(rf"{re.escape(_stem(path))}{host}-(\d+)\..*{re.escape(PARTIAL)}")
    matches = ((entry, name.fullmatch(entry)) for entry in os.listdir(path.parent))
    return [path.parent / entry for entry, match in matches if match and not psutil.pid_exists(int(match[1]))]


def _stem(path: Path) -> str:
    return f".{path.name[:_NAME_CHARACTERS]}."


def _bring_back(place: Path) -> None:
    """Puts a folder back that a process was about to replace when it was killed."""
    for aside in _killed(place):
        if (aside / _OLD).is_dir() and not place.exists():
            (aside / _OLD).rename(place)


def _move(temporary: Path, place: Path, *, overwrite: bool) -> None:
    if not (overwrite and place.exists()):
        # Renaming replaces at most an empty directory that someone has created in the meantime.
        temporary.rename(place)
        return
    with _neighbour(place, folder=True) as aside:
        old = aside / _OLD
        place.rename(old)
        try:
            temporary.rename(place)
        except OSError:
            old.rename(place)
            raise
