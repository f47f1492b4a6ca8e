"""Every file of a run directory is described once, checked when it is written, and documented from there."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cliffscope.errors import DataError, StoreError
from cliffscope.store import RunStore
from cliffscope.study.artefact_kinds import Place, describe
from cliffscope.study.artefacts import (
    ARTEFACTS,
    CLIFFS,
    PROBE_ARRAYS,
    REPORT,
    SELECTED,
    SELECTED_HEADS,
    SUPPRESSION,
    TABLES,
)
from cliffscope.study.stages import STAGES

ROOT = Path(__file__).parent.parent
HEADS = pd.DataFrame({"layer": [4, 5], "head": [5, 2], "rank": [1, 2]})


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(path=tmp_path)


def test_a_table_is_read_back_with_its_columns_in_order(store: RunStore) -> None:
    SELECTED_HEADS.write(store, HEADS[["rank", "head", "layer"]])
    pd.testing.assert_frame_equal(SELECTED_HEADS.read(store.path), HEADS)


def test_a_table_that_was_not_written_is_empty_and_has_its_columns(store: RunStore) -> None:
    for table in TABLES.values():
        frame = table.read(store.path)
        assert frame.empty
        assert list(frame.columns) == table.column_names


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (HEADS.drop(columns="rank"), r"missing columns \['rank'\]"),
        (HEADS.assign(effect=1.0), r"unknown columns \['effect'\]"),
        (HEADS.assign(head=[0.5, 1.5]), r"another type \['head'\]"),
        (HEADS.assign(head=["a", "b"]), r"another type \['head'\]"),
        ({"layer": [1]}, "takes a DataFrame, not dict"),
    ],
)
def test_another_table_is_refused_and_leaves_nothing(store: RunStore, frame: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        SELECTED_HEADS.write(store, frame)
    assert not list(store.path.iterdir())


def test_an_optional_column_may_be_missing_and_text_and_bool_may_hold_nothing(store: RunStore) -> None:
    row = {c.name: [np.nan] if c.kind == "float" else [None] for c in CLIFFS.columns if not c.optional}
    frame = pd.DataFrame(row).assign(drop_position=[3], id=["a"], harmful=[None])
    CLIFFS.write(store, frame)
    assert CLIFFS.read(store.path)["split"].isna().all()


def test_a_file_that_is_no_such_table_is_named(store: RunStore) -> None:
    (store.path / SELECTED_HEADS.file).write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"selected_heads\.parquet is not a Parquet table"):
        SELECTED_HEADS.read(store.path)
    HEADS[["layer"]].to_parquet(store.path / SELECTED_HEADS.file)
    with pytest.raises(DataError, match="lacks the columns head, rank"):
        SELECTED_HEADS.read(store.path)


def test_other_kinds_refuse_what_they_do_not_hold(store: RunStore) -> None:
    for artefact, value in (
        (SUPPRESSION, {"p": 1.0}),
        (SUPPRESSION, 3),
        (PROBE_ARRAYS, {"weights": np.zeros(2)}),
        (SELECTED, []),
        (REPORT, b"x"),
    ):
        with pytest.raises(StoreError, match=re.escape(artefact.file)):
            artefact.write(store, value)
    places = [a for a in ARTEFACTS if isinstance(a, Place)]
    assert places
    for place in places:
        with pytest.raises(StoreError, match="filled while its stage runs"):
            place.write(store, "x")
    assert not list(store.path.iterdir())


def test_every_artefact_has_a_maker_and_every_maker_is_listed() -> None:
    made = {artefact.file for stage in STAGES for artefact in stage.makes}
    # The runner writes the manifest and the omissions of all stages.
    assert {artefact.file for artefact in ARTEFACTS} == made | {"manifest.json", "omitted.parquet"}


def test_every_column_says_what_it_means() -> None:
    for table in TABLES.values():
        assert len(set(table.column_names)) == len(table.columns)
        assert all(column.meaning for column in table.columns), table.file


def test_the_guide_lists_the_artefacts_as_they_are() -> None:
    assert describe(ARTEFACTS) in (ROOT / "docs" / "guide" / "study.md").read_text(encoding="utf-8")


def test_no_other_module_names_a_file_of_a_run_directory() -> None:
    names = {a.file for a in ARTEFACTS if "*" not in a.file} - {"manifest.json", "repaired"}
    for path in sorted((ROOT / "cliffscope").rglob("*.py")):
        if path.name not in ("artefacts.py", "artefact_kinds.py"):
            strings = set(re.findall(r"[\"']([\w.-]+)[\"']", path.read_text(encoding="utf-8")))
            assert not strings & names, path
