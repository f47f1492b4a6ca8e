"""What does a run directory hold, as the report reads it?

Every table is optional: a stage that did not run, or had nothing to measure, leaves none, and the page says so. What
the files are called and which columns they have, `study/artefacts.py` says. Knows nothing of pages or figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import pandas as pd

from cliffscope.errors import DataError, StoreError
from cliffscope.store import MANIFEST, SCHEMA, RunStore
from cliffscope.study.artefacts import (
    ANSWER,
    CLIFFS,
    HEADS,
    HEADS_FACTS,
    PROBE,
    SELECTED_HEADS,
    SUPPRESSION,
    TABLES,
    TEXT_BASELINE,
    WITNESSES,
)
from cliffscope.transcripts.records import Split

JsonValue: TypeAlias = "str | int | float | bool | None | list[JsonValue] | dict[str, JsonValue]"
JsonObject: TypeAlias = "dict[str, JsonValue]"


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredRun:
    """What a run directory holds; an absent table is an empty frame with its columns."""

    manifest: JsonObject
    """manifest.json."""
    probe: JsonObject
    """The probe's document, or empty."""
    heads: JsonObject
    """How heads were ranked, or empty."""
    suppression: JsonObject
    """The selected set against random sets, or empty."""
    answer: JsonObject
    """The answer readout's document, or empty."""
    text_baseline: JsonObject
    """What words alone tell, or empty."""
    witnesses: JsonObject
    """What each witness says, or empty."""
    tables: Mapping[str, pd.DataFrame]
    """Table by name; `heads` has a further column `selected`, `cliffs` holds the test split where there is one."""

    def section(self, name: str) -> JsonObject:
        """An object of the manifest, or an empty one."""
        return as_object(self.manifest.get(name))

    def finding(self, *topics: str) -> str:
        """The sentences on some topics, as one text; empty where nothing was found."""
        verdict = self.section("verdict")
        return " ".join(str(verdict[topic]) for topic in topics if verdict.get(topic))

    @property
    def settings(self) -> JsonObject:
        """The study's configuration."""
        return self.section("settings")

    @property
    def versions(self) -> JsonObject:
        """Versions of the libraries that the stages ran with; several where stages differ."""
        versions: dict[str, dict[str, None]] = {}
        for record in self.section("stages").values():
            for name, value in as_object(as_object(record).get("versions")).items():
                versions.setdefault(name, {})[str(value)] = None
        return {name: ", ".join(values) for name, values in versions.items()}

    @property
    def plateau(self) -> str:
        """The plateau that cliffs are measured from: `mean` or `max`."""
        return str(self.settings.get("plateau") or "mean")

    def notes(self, *stages: str) -> list[str]:
        """Notes of some stages, or of all where none is named."""
        notes = [as_object(note) for note in as_list(self.manifest.get("notes"))]
        return [str(note.get("text")) for note in notes if not stages or note.get("stage") in stages]


def read_run(run_dir: str | Path) -> StoredRun:
    """Reads a run directory.

    Args:
        run_dir: The directory that holds the manifest.

    Returns:
        What is there; absent tables are empty.

    Raises:
        StoreError: There is no manifest, or another version wrote the directory.
        DataError: A file is there and cannot be read.
    """
    folder = Path(run_dir)
    if not folder.exists():
        raise StoreError(f"{folder} does not exist. Pass the directory that a study wrote.")
    if not (folder / MANIFEST).is_file():
        raise StoreError(
            f"{folder} holds no {MANIFEST}, so it is not a run directory. Pass the directory that a study wrote."
        )
    manifest = _read_json(folder, MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"{folder} was written by another version of CliffScope (schema {manifest.get('schema')}, expected "
            f"{SCHEMA}). Open it with that version, or run the study again in a new directory."
        )
    tables = {name: table.read(folder) for name, table in TABLES.items()}
    return StoredRun(
        manifest=manifest,
        probe=_read_json(folder, PROBE.file),
        heads=_read_json(folder, HEADS_FACTS.file),
        suppression=_read_json(folder, SUPPRESSION.file),
        answer=_read_json(folder, ANSWER.file),
        text_baseline=_read_json(folder, TEXT_BASELINE.file),
        witnesses=_read_json(folder, WITNESSES.file),
        tables={
            **tables,
            CLIFFS.name: _held_out(tables[CLIFFS.name]),
            HEADS.name: _with_selected(tables[HEADS.name], tables[SELECTED_HEADS.name]),
        },
    )


def as_object(value: JsonValue) -> JsonObject:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: JsonValue) -> list[JsonValue]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_float(value: JsonValue) -> float:
    """The value if it is a number, else NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def as_int(value: JsonValue) -> int:
    """The value if it is a finite number, else 0."""
    number = as_float(value)
    return int(number) if abs(number) < float("inf") else 0


def _held_out(cliffs: pd.DataFrame) -> pd.DataFrame:
    """The test split where there is one: what the probe was fitted on shows nothing."""
    test = cliffs[cliffs["split"] == Split.TEST]
    return cliffs if test.empty else test.reset_index(drop=True)


def _with_selected(heads: pd.DataFrame, selected: pd.DataFrame) -> pd.DataFrame:
    places = set(zip(selected["layer"], selected["head"], strict=True))
    return heads.assign(selected=[place in places for place in zip(heads["layer"], heads["head"], strict=True)])


def _read_json(folder: Path, name: str) -> JsonObject:
    if not (folder / name).is_file():
        return {}
    try:
        return cast(JsonObject, RunStore(path=folder).read_json(name))
    except StoreError as error:
        raise DataError(f"{error} Run the study again, or restore the file.") from error
