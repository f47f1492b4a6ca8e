"""Which rows does a table hold, whatever its file format?

CSV, TSV, JSON (a list, or an object of columns of equal length), JSONL, plain text (one row a line) and Parquet all
become a list of plain dictionaries. This file knows nothing of prompts or transcripts.
"""

import csv
import io
import json
from pathlib import Path
from typing import NoReturn, cast

import pyarrow
import pyarrow.parquet

from cliffscope.errors import DataError
from cliffscope.transcripts.records import JsonValue

TableRow = dict[str, JsonValue]


def read_rows(path: Path) -> list[TableRow]:
    """Reads every row of a table.

    Args:
        path: .csv, .tsv, .json, .jsonl, .txt or .parquet. Rows of plain values get the column `text`.

    Returns:
        At least one row, in the order of the file.

    Raises:
        DataError: the file is missing, empty, not UTF-8, malformed, or has another suffix.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix in (".csv", ".tsv"):
        rows = _parse_csv(read_text(path), path, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        rows = _parse_json_table(read_text(path), path)
    elif suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), start=1)
        rows = [_as_row(parse_json(line, f"{path}:{number}")) for number, line in lines if line.strip()]
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
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} cannot be decoded. Save it as UTF-8.") from error
    except OSError as error:
        _fail_unreadable(path, error)
    if not text.strip():
        raise DataError(f"{path} is empty. Expected at least one row.")
    return text


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

    def reject(constant: str) -> NoReturn:
        raise DataError(f"{place}: {constant} is not JSON. Write null instead.")

    try:
        value: JsonValue = json.loads(text, parse_constant=reject)
        # An escaped lone surrogate parses, but no tokenizer and no file accepts it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a string holds half of a surrogate pair. Replace it with valid Unicode.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}. Correct this line.") from error
    return value


def _fail_unreadable(path: Path, error: OSError) -> NoReturn:
    raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def _as_row(value: JsonValue) -> TableRow:
    return value if isinstance(value, dict) else {"text": value}


def _parse_csv(text: str, path: Path, delimiter: str) -> list[TableRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[TableRow] = []
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path}:{reader.line_num}: more cells than the {len(reader.fieldnames or ())} columns. "
                    "Quote the cells that hold the delimiter."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: {error}. Expected a table with quoted cells.") from error
    return rows


def _parse_json_table(text: str, path: Path) -> list[TableRow]:
    value = parse_json(text, str(path))
    if isinstance(value, list):
        return [_as_row(item) for item in value]
    columns = value if isinstance(value, dict) else {}
    lists = [column for column in columns.values() if isinstance(column, list)]
    if not lists or len(lists) != len(columns) or len({len(column) for column in lists}) != 1:
        raise DataError(f"{path}: expected a list of objects, or one object of lists of equal length.")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*lists, strict=True)]


def _read_parquet(path: Path) -> list[TableRow]:
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        _fail_unreadable(path, error)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}. Check the file.") from error
    # JSON has no dates, decimals or NaN, and every row must be writable as JSON.
    text = json.dumps(table.to_pylist(), default=str)
    return cast(list[TableRow], json.loads(text, parse_constant=lambda _: None))
