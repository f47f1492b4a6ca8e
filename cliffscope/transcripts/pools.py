"""How is a pool of any size read, one window at a time?

1. A source is a file of transcripts (JSONL or Parquet), a folder of such files, transcripts in memory, or any iterable
   of rows, such as a Hugging Face dataset.
2. Rows come in windows of a fixed size, in the order of the source. Each window has a hash of its content.
3. A row that is not a transcript is reported with its place and the reason; the other rows are read.

Memory use is that of one window. This file knows no tokenizer and no model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeAlias

import pyarrow
import pyarrow.parquet

from cliffscope.errors import DataError
from cliffscope.transcripts.datasets import parse_record
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.tables import decode_line, json_value, parse_json

PoolSource: TypeAlias = str | Path | Transcripts | Iterable[Mapping[str, object]]
WINDOW_ROWS = 1024
"""Rows in a window."""
POOL_STAGE = "pool"
_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolWindow:
    """Consecutive rows of a pool."""

    index: int
    """Index of the window, from 0."""
    start: int
    """Index of its first row in the pool, from 0."""
    rows: tuple[Transcript | Omission, ...]
    """Each row as a transcript, or the reason why it is not one."""
    digest: str
    """Hash of the rows."""


def read_windows(pool: PoolSource, *, size: int = WINDOW_ROWS, strict: bool = False) -> Iterator[PoolWindow]:
    """Reads a pool window by window.

    Args:
        pool: a .jsonl or .parquet file with the fields of `read_transcripts`, a folder of them, transcripts, or an
            iterable of such rows.
        size: rows in a window.
        strict: raise at the first row that is not a transcript instead of reporting it.

    Yields:
        The windows.

    Raises:
        DataError: a file cannot be read, the folder holds no such file, or, if strict, a row is not a transcript.
    """
    if size < 1:
        raise DataError(f"size={size}: expected a window of at least 1 row.")
    rows = _rows(pool)
    start = index = 0
    while chunk := list(islice(rows, size)):
        parsed = [_parse(place, value, strict=strict) for place, value in chunk]
        digest = hashlib.sha256()
        for _, value in chunk:
            digest.update(_bytes(value))
        yield PoolWindow(index=index, start=start, rows=tuple(parsed), digest=digest.hexdigest()[:16])
        index, start = index + 1, start + len(chunk)


def _rows(pool: PoolSource) -> Iterator[tuple[str, object]]:
    """Every row with its place."""
    if isinstance(pool, Transcripts):
        yield from ((t.id, t) for t in pool)
    elif isinstance(pool, str | Path):
        for path in _files(Path(pool)):
            yield from _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    else:
        yield from ((f"row {i}", row) for i, row in enumerate(pool, start=1))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no {' or '.join(_SUFFIXES)} file. Pass a folder that does.")
        return files
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is not a pool. Expected a {' or '.join(_SUFFIXES)} file, or a folder of them.")
    if not path.is_file():
        raise DataError(f"{path} cannot be read: no such file. Check the path.")
    return [path]


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from error


def _parse(place: str, value: object, *, strict: bool) -> Transcript | Omission:
    if isinstance(value, Transcript):
        return value
    path, _, number = place.rpartition(":")
    try:
        if isinstance(value, bytes):
            value = parse_json(decode_line(value, place), place)
        elif isinstance(value, Mapping):
            # Values of other libraries (dates, bytes, NumPy numbers) must become JSON first; a null field counts as
            # absent.
            plain = json.dumps(
                {str(k): json_value(v) for k, v in value.items() if v is not None}, default=_refuse_bytes
            )
            value = parse_json(plain, place)
        return parse_record(value, Path(path or "pool"), int(number) if number.isdigit() else 0)
    except (DataError, TypeError, ValueError) as error:
        if strict:
            raise DataError(f"{place}: {error}") from error
        return Omission(stage=POOL_STAGE, reason=str(error), id=place)


def _refuse_bytes(value: object) -> NoReturn:
    raise DataError(f"{value!r:.80} is not text: expected UTF-8.")


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Transcript):
        return f"{value.id}\0{value.messages}\0{value.thinking}\0{value.thinking_ids}\0{value.answer}".encode()
    return json.dumps(value, sort_keys=True, default=str).encode()
