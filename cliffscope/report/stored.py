"""What does a run directory hold, as far as the report reads it?

Every table is optional: a stage that did not run, or had nothing to measure, leaves none, and the page says so.
Columns that an older run lacks are filled with missing values. It reads, and knows nothing of pages or figures.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import pyarrow as pa

from cliffscope.errors import DataError, StoreError

JsonValue: TypeAlias = "str | int | float | bool | None | list[JsonValue] | dict[str, JsonValue]"
JsonObject: TypeAlias = "dict[str, JsonValue]"

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "transcripts": ("id", "split", "harmful", "outcome", "source", "prompt", "thinking", "answer", "n_pos"),
    "probe_layers": ("layer", "region", "auroc", "auroc_low", "auroc_high", "n_refused", "n_complied"),
    "traces": ("id", "position", "span", "token", "logit", "score"),
    "layer_traces": ("id", "position", "layer", "score"),
    "aligned": ("group", "bin", "label", "span", "mean", "ci_low", "ci_high", "n"),
    "cliffs": (
        *("id", "group", "harmful", "outcome", "plateau_max", "plateau_mean", "final", "cliff"),
        *("drop_position", "drop_token", "valid", "reason", "split"),
    ),
    "edited_aligned": ("group", "bin", "label", "span", "mean", "ci_low", "ci_high", "n"),
    "edited_cliffs": ("id", "group", "plateau_max", "plateau_mean", "final", "cliff", "valid"),
    "head_sources": ("id", "head", "kv_group", "query", "position", "token", "span", "attention", "share"),
    "heads": (
        *("layer", "head", "kv_group", "effect", "effect_score", "ci_low", "ci_high", "p", "q"),
        *("effect_harmless", "n", "rank", "selected"),
    ),
    "safety": (
        *("arm", "kind", "group", "n", "refused", "complied", "unfinished", "unjudged"),
        *("rate", "ci_low", "ci_high"),
    ),
    "safety_pairs": ("arm", "group", "difference", "ci_low", "ci_high", "mcnemar_p"),
    "safety_quality": ("arm", "kind", "group", "measure", "n", "value", "ci_low", "ci_high"),
    "side_effects": ("arm", "kind", "measure", "n", "value", "ci_low", "ci_high", "unit"),
    "repair": ("model", "measure", "n", "value", "ci_low", "ci_high", "note"),
    "selection": ("id", "prompt", "thinking", "answer", "plateau", "final", "cliff", "rank", "chosen"),
}
"""Columns by table; every table is `<name>.parquet`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredRun:
    """What a run directory holds; an absent table is an empty frame with its columns."""

    manifest: JsonObject
    """manifest.json."""
    probe: JsonObject
    """probe.json, or empty."""
    heads: JsonObject
    """heads.json, or empty."""
    tables: Mapping[str, pd.DataFrame]
    """Table by name, each with all of its `COLUMNS`."""

    def section(self, name: str) -> JsonObject:
        """An object of the manifest, or an empty one."""
        return as_object(self.manifest.get(name))

    def notes(self, *words: str) -> list[str]:
        """The manifest's notes that hold one of the words, or all notes when none does."""
        notes = [str(note) for note in as_list(self.manifest.get("notes"))]
        about = [note for note in notes if any(word in note.lower() for word in words)]
        return about or notes


def read_run(run_dir: str | Path) -> StoredRun:
    """Reads a run directory.

    Args:
        run_dir: The directory that holds manifest.json.

    Returns:
        What is there; absent tables are empty.

    Raises:
        StoreError: There is no manifest.json.
        DataError: A file is there and cannot be read.
    """
    folder = Path(run_dir)
    if not folder.exists():
        raise StoreError(f"{folder} does not exist. Pass the directory that a study wrote.")
    if not (folder / "manifest.json").is_file():
        raise StoreError(
            f"{folder} holds no manifest.json, so it is not a run directory. Pass the directory that a study wrote."
        )
    tables = {name: _read_table(folder / f"{name}.parquet", columns) for name, columns in COLUMNS.items()}
    return StoredRun(
        manifest=_read_json(folder / "manifest.json"),
        probe=_read_json(folder / "probe.json"),
        heads=_read_json(folder / "heads.json"),
        tables={**tables, "cliffs": _held_out(tables["cliffs"])},
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
    test = cliffs[cliffs["split"] == "test"]
    return cliffs if test.empty else test.reset_index(drop=True)


def _read_json(path: Path) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        found: JsonValue = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Run the study again, or restore the file.") from error
    return as_object(found)


def _read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a Parquet table ({error}). Run its stage again.") from error
    frame = frame.reindex(columns=list(columns))
    return frame.assign(id=frame["id"].astype(str)) if "id" in columns else frame
