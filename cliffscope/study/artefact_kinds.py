"""Of which kinds are the files of a run directory?

Tables, JSON documents, arrays, transcripts, pages, and places that others fill. Each kind checks a value against what
the artefact says of itself when it is written, and reads it back. Which artefacts there are, artefacts.py says.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa

from cliffscope.errors import DataError, StoreError
from cliffscope.store import RunStore
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Transcripts

Kind = Literal["text", "int", "float", "bool"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    name: str
    """Its name in the file."""
    kind: Kind
    """Type of its values; text and bool may be missing, a float may be NaN."""
    meaning: str
    """What a value says, with its unit."""
    optional: bool = False
    """Whether a table may lack it."""


Row: TypeAlias = tuple[str, Kind, str]
"""Name, kind and meaning of a column."""


def columns_of(*rows: Row, optional: Sequence[str] = ()) -> tuple[Column, ...]:
    """Columns from rows, in order; a table may lack those whose names are `optional`."""
    return tuple(Column(name=n, kind=k, meaning=m, optional=n in optional) for n, k, m in rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class Artefact(ABC):
    """One file, or one family of files, of a run directory."""

    file: str
    """Name in the run directory; a family has a `*` in it."""
    meaning: str
    """What it holds, in one line."""

    def paths(self, folder: Path) -> list[Path]:
        """What is there of it."""
        return sorted(folder.glob(self.file))

    @abstractmethod
    def write(self, store: RunStore, value: object) -> None:
        """Checks and writes a value; raises StoreError where it is not what the artefact holds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Artefact):
    """A Parquet table."""

    columns: tuple[Column, ...]
    """Its columns, in order."""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.removesuffix(".parquet")

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, in order."""
        return [column.name for column in self.columns]

    def write(self, store: RunStore, value: object) -> None:
        """Checks and writes a data frame; raises StoreError where columns or types differ."""
        if not isinstance(value, pd.DataFrame):
            raise StoreError(f"{self.file} takes a DataFrame, not {type(value).__name__}.")
        store.write_frame(self.file, self._checked(value))

    def read(self, folder: Path) -> pd.DataFrame:
        """The table, with every column; empty where it was not written.

        Raises:
            DataError: the file is there and is not this table.
        """
        path = folder / self.file
        if not path.is_file():
            return pd.DataFrame({c.name: pd.Series(dtype=_DTYPES[c.kind]) for c in self.columns})
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{path} is not a Parquet table ({error}). Delete it and rerun the study to write it again."
            ) from error
        lacking = [c.name for c in self.columns if c.name not in frame and not c.optional]
        if lacking:
            raise DataError(f"{path} lacks the columns {', '.join(lacking)}. Delete it and rerun the study.")
        return frame.reindex(columns=self.column_names)

    def _checked(self, frame: pd.DataFrame) -> pd.DataFrame:
        lacking = [c.name for c in self.columns if c.name not in frame and not c.optional]
        unknown = [str(name) for name in frame.columns if name not in self.column_names]
        wrong = [c.name for c in self.columns if c.name in frame and not _holds(frame[c.name], c.kind)]
        if lacking or unknown or wrong:
            raise StoreError(
                f"{self.file} was handed another table: missing columns {lacking}, unknown columns {unknown}, columns "
                f"of another type {wrong}. Expected {', '.join(self.column_names)}, as cliffscope.study.artefacts says."
            )
        return frame[[name for name in self.column_names if name in frame]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Document(Artefact):
    """A JSON object."""

    keys: Mapping[str, str]
    """Top-level keys and what each says."""

    def write(self, store: RunStore, value: object) -> None:
        """Checks and writes a mapping; raises StoreError where its keys differ."""
        if not isinstance(value, Mapping) or set(value) != set(self.keys):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise StoreError(f"{self.file} was handed {got}, expected the keys {sorted(self.keys)}.")
        store.write_json(self.file, value)

    def read(self, folder: Path) -> dict[str, object]:
        """The object; empty where it was not written; raises StoreError where the file is not JSON."""
        return RunStore(path=folder).read_json(self.file) if (folder / self.file).is_file() else {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrays(Artefact):
    """Arrays in a safetensors file."""

    arrays: Mapping[str, str]
    """Names and what each holds, with its shape."""

    def write(self, store: RunStore, value: object) -> None:
        """Checks and writes arrays by name; raises StoreError where names differ."""
        if not isinstance(value, Mapping) or set(value) != set(self.arrays):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise StoreError(f"{self.file} was handed {got}, expected the arrays {sorted(self.arrays)}.")
        store.write_arrays(self.file, value)

    def read(self, folder: Path) -> dict[str, np.ndarray]:
        """The arrays by name; raises StoreError where the file cannot be read."""
        return RunStore(path=folder).read_arrays(self.file)


@dataclass(frozen=True, eq=False, kw_only=True)
class TranscriptFile(Artefact):
    """Transcripts as JSONL."""

    def write(self, store: RunStore, value: object) -> None:
        """Writes transcripts; raises StoreError where it is handed something else."""
        if not isinstance(value, Transcripts):
            raise StoreError(f"{self.file} takes Transcripts, not {type(value).__name__}.")
        write_transcripts(value, store.path / self.file)

    def read(self, folder: Path) -> Transcripts:
        """The transcripts; raises DataError where the file is not there or cannot be read."""
        return read_transcripts(folder / self.file, strict=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Page(Artefact):
    """A text that is shown as it is."""

    def write(self, store: RunStore, value: object) -> None:
        """Writes a text; raises StoreError where it is handed something else."""
        if not isinstance(value, str):
            raise StoreError(f"{self.file} takes text, not {type(value).__name__}.")
        # Bytes, because a changed newline would break the hashes of the page's security policy.
        store.write_with(self.file, lambda path: path.write_bytes(value.encode("utf-8")))


@dataclass(frozen=True, eq=False, kw_only=True)
class Place(Artefact):
    """A file or folder that is filled row by row or by another library while a stage runs."""

    transient: bool = False
    """Whether it is removed once its stage has ended."""

    def write(self, store: RunStore, value: object) -> None:
        """Nothing is handed over: refuses with StoreError."""
        raise StoreError(
            f"{store.path / self.file} is filled while its stage runs and takes no {type(value).__name__}."
        )


def describe(artefacts: Sequence[Artefact]) -> str:
    """Files of a run directory as a Markdown table, for the documentation."""
    rows = [f"| `{a.file}` | {a.meaning} | {_contents(a)} |" for a in artefacts]
    return "\n".join(["| file | content | columns or keys |", "|---|---|---|", *rows])


def _contents(artefact: Artefact) -> str:
    if isinstance(artefact, Table):
        return ", ".join(f"`{name}`" for name in artefact.column_names)
    if isinstance(artefact, Document):
        return ", ".join(f"`{key}`" for key in artefact.keys)
    if isinstance(artefact, Arrays):
        return ", ".join(f"`{name}` {shape}" for name, shape in artefact.arrays.items())
    return ""


_DTYPES: Mapping[Kind, str] = {"text": "object", "int": "int64", "float": "float64", "bool": "object"}


def _holds(values: pd.Series, kind: Kind) -> bool:
    """Whether a column's values are of a kind; an empty column is of any."""
    present = values.dropna()
    if present.empty:
        return True
    if kind == "text":
        return all(isinstance(value, str) for value in present)
    if kind == "bool":
        return all(isinstance(value, bool | np.bool_) for value in present)
    if kind == "int":
        return pd.api.types.is_integer_dtype(values.dtype)
    return pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)
