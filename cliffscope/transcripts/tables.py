"""Which rows does a table hold, whatever its file format?

CSV, TSV, JSON (a list, or an object of columns of equal length), JSONL, plain text (one row a line) and Parquet all
become a list of plain dictionaries. A row that cannot be read is a `BrokenRow` with the reason, and the others are
read. This file knows nothing of prompts or transcripts.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow
import pyarrow.parquet

from cliffscope.errors import DataError
from cliffscope.transcripts.records import JsonValue

TableRow = dict[str, JsonValue]
_log = logging.getLogger(__name__)
_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_CELL = (1 << 31) - 1  # what a C long holds on every system; Python's default is 131,072 characters


@dataclass(frozen=True, kw_only=True)
class BrokenRow:
    """A row that cannot be read."""

    reason: str
    """Why, with file and line."""


def read_rows(path: Path) -> list[TableRow | BrokenRow]:
    """Reads every row of a table.

    Args:
        path: .csv, .tsv, .json, .jsonl, .txt or .parquet. Rows of plain values get the column `text`.

    Returns:
        At least one row, in the order of the file. Bytes of Parquet that are not UTF-8 stay bytes.

    Raises:
        DataError: the file is missing, empty, not UTF-8, malformed as a whole, or has another suffix.
    """
    suffix = path.suffix.lower()
    rows: list[TableRow | BrokenRow]
    if suffix == ".parquet":
        rows = [*_read_parquet(path)]
    elif suffix in (".csv", ".tsv"):
        rows = _parse_csv(read_text(path), path, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        rows = _parse_json_table(read_text(path), path)
    elif suffix == ".jsonl":
        rows = [row if isinstance(row, BrokenRow) else _as_row(row) for _, row in read_json_lines(path)]
    elif suffix == ".txt":
        rows = [{"text": line.removesuffix("\r")} for line in read_text(path).removesuffix("\n").split("\n")]
    else:
        raise DataError(
            f"{path}: cannot read {suffix or 'a file without suffix'!r}. Expected csv, tsv, json, jsonl, txt or "
            "parquet."
        )
    if not rows:
        raise DataError(f"{path} has no rows. Expected at least one.")
    return rows


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file that is not empty, without a byte order mark.

    Raises:
        DataError: the file is missing, unreadable, empty or not UTF-8.
    """
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.start}, in line {line}, cannot be decoded. Save it as UTF-8."
        ) from error


def read_json_lines(path: Path) -> Iterator[tuple[int, JsonValue | BrokenRow]]:
    """Reads JSONL line by line, so that a line that is not UTF-8 or not JSON costs that line alone.

    Args:
        path: the file.

    Yields:
        The number of each line that is not blank, from 1, and its value.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    # Only "\n" ends a line: JSON strings may hold the other characters at which splitlines() splits.
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(decode_line(line, f"{path}:{number}"), f"{path}:{number}")
            except DataError as error:
                yield number, BrokenRow(reason=str(error))


def decode_line(line: bytes, place: str) -> str:
    """Decodes one line; raises DataError if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: byte {error.start} cannot be decoded. Save it as UTF-8.") from error


def parse_json(text: str, place: str) -> JsonValue:
    """Parses strict JSON whose strings are valid Unicode.

    Args:
        text: the JSON.
        place: path and line, for the message.

    Returns:
        The value.

    Raises:
        DataError: the text is not JSON, or holds NaN, an infinity or half of a surrogate pair.
    """
    return _unicode(_load_json(text, place), place)


def _load_json(text: str, place: str) -> JsonValue:
    def reject(constant: str) -> NoReturn:
        raise DataError(f"{place}: {constant} is not JSON. Write null instead.")

    try:
        value: JsonValue = json.loads(text, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}. Correct this line.") from error
    return value


def _unicode(value: JsonValue, place: str) -> JsonValue:
    """The value; raises DataError if it holds an escaped half of a surrogate pair, which parses all the same."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a string holds half of a surrogate pair. Replace it with valid Unicode.") from error
    except RecursionError as error:
        raise DataError(f"{place}: not valid JSON: nested too deeply. Correct this line.") from error
    return value


def json_value(value: object) -> JsonValue:
    """A value of another library as JSON has it.

    Args:
        value: of Parquet, a data set or a data frame.

    Returns:
        Dates and decimals as text, NaN and infinities as None, UTF-8 bytes as text. Other bytes stay bytes, for the
        reader to refuse or to show.
    """
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        _fail_unreadable(path, error)
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{path} is empty. Expected at least one row.")
    return data


def _fail_unreadable(path: Path, error: OSError) -> NoReturn:
    raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def _as_row(value: JsonValue) -> TableRow:
    return value if isinstance(value, dict) else {"text": value}


def _parse_csv(text: str, path: Path, usual: str) -> list[TableRow | BrokenRow]:
    text, delimiter = _find_delimiter(text, usual)
    if delimiter != usual:
        _log.info("%s: the columns are separated by %r.", path, delimiter)
    with _long_cells():
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows: list[TableRow | BrokenRow] = []
        try:
            _check_header(list(reader.fieldnames or ()), path)
            for row in reader:
                if None in row:
                    reason = (
                        f"{path}:{reader.line_num}: more cells than the {len(reader.fieldnames or ())} columns. "
                        "Quote the cells that hold the delimiter."
                    )
                    rows.append(BrokenRow(reason=reason))
                else:
                    rows.append(dict(row))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: {error}. Expected a table with quoted cells.") from error
    return rows


def _check_header(names: list[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"{path} has several columns named {repeated[0]!r}, of which only one could be read. Rename them."
        )


def _find_delimiter(text: str, usual: str) -> tuple[str, str]:
    """The text without Excel's line `sep=;`, and the delimiter: the one that cuts the header into most columns."""
    first, _, rest = text.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:
        return rest, first.strip()[-1]
    counts = {delimiter: _count_columns(first, delimiter) for delimiter in (usual, *_DELIMITERS)}
    return text, max(counts, key=lambda delimiter: counts[delimiter])


def _count_columns(header: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse_json_table(text: str, path: Path) -> list[TableRow | BrokenRow]:
    value = _load_json(text, str(path))
    if isinstance(value, list):
        return [_parse_item(item, f"{path}:{number}") for number, item in enumerate(value, start=1)]
    value = _unicode(value, str(path))
    columns = value if isinstance(value, dict) else {}
    lists = [column for column in columns.values() if isinstance(column, list)]
    if not lists or len(lists) != len(columns) or len({len(column) for column in lists}) != 1:
        raise DataError(f"{path}: expected a list of objects, or one object of lists of equal length.")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*lists, strict=True)]


def _parse_item(item: JsonValue, place: str) -> TableRow | BrokenRow:
    try:
        return _as_row(_unicode(item, place))
    except DataError as error:
        return BrokenRow(reason=str(error))


def _read_parquet(path: Path) -> list[TableRow]:
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        _fail_unreadable(path, error)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}. Check the file.") from error
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        # A writer may have put bytes of another encoding into a column of text.
        rows = _as_bytes(table).to_pylist()
    return [{str(name): json_value(value) for name, value in row.items()} for row in rows]


def _as_bytes(table: pyarrow.Table) -> pyarrow.Table:
    """The table with its columns of text as bytes, which are decoded cell by cell."""
    for i, field in enumerate(table.schema):
        if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pyarrow.large_binary()))
    return table
