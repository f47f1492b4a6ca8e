import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import written

from cliffscope.errors import DataError
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.pools import PoolWindow, read_windows
from cliffscope.transcripts.records import Omission, Outcome, Transcript

TEN = written(10, harmful=True, outcome=Outcome.COMPLIED)


def flat(windows: Iterator[PoolWindow]) -> list[Transcript | Omission]:
    return [row for window in windows for row in window.rows]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    write_transcripts(TEN, tmp_path / "pool.jsonl")
    return tmp_path / "pool.jsonl"


def test_windows_follow_each_other_and_hold_every_row(jsonl: Path) -> None:
    windows = list(read_windows(jsonl, size=4))
    assert [(w.index, w.start, len(w.rows)) for w in windows] == [(0, 0, 4), (1, 4, 4), (2, 8, 2)]
    assert flat(iter(windows)) == list(TEN)
    assert len({w.digest for w in windows}) == 3


def test_files_folders_memory_and_rows_of_other_libraries_hold_the_same(jsonl: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    pd.DataFrame(rows).to_parquet(tmp_path / "pool.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_transcripts(TEN[:6], folder / "a.jsonl")
    write_transcripts(TEN[6:], folder / "b.jsonl")
    for source in (TEN, rows, tmp_path / "pool.parquet", folder, str(jsonl)):
        assert flat(read_windows(source, size=3)) == list(TEN)


def test_broken_rows_are_counted_with_their_place_and_the_others_go_on(jsonl: Path) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)
    bad = [b'{"id": "x", "prompt"\n', b"\xff\xfe\n", b'{"id": "y"}\n', b"[1]\n", b'{"prompt": "p", "outcome": "hm"}\n']
    jsonl.write_bytes(b"".join([*lines[:2], *bad, b"\n", *lines[2:]]))
    rows = flat(read_windows(jsonl))
    assert [r for r in rows if isinstance(r, Transcript)] == list(TEN)
    omitted = [r for r in rows if isinstance(r, Omission)]
    assert [o.id.rsplit(":", 1)[1] for o in omitted] == ["3", "4", "5", "6", "7"]
    for omission, word in zip(omitted, ("JSON", "UTF-8", "prompt", "object", "outcome"), strict=True):
        assert word in omission.reason
    with pytest.raises(DataError, match=r"pool.jsonl:3"):
        list(read_windows(jsonl, strict=True))


def test_a_changed_row_changes_its_windows_hash_alone(jsonl: Path) -> None:
    before = [w.digest for w in read_windows(jsonl, size=5)]
    jsonl.write_text(jsonl.read_text().replace(TEN[7].prompt, TEN[7].prompt + " now"))
    after = [w.digest for w in read_windows(jsonl, size=5)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_what_is_no_pool_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n")
    (tmp_path / "broken.parquet").write_text("no")
    for source, word in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "x.csv", "is not a pool. Expected a .jsonl or .parquet file"),
        (tmp_path / "broken.parquet", "cannot be read as Parquet"),
    ):
        with pytest.raises(DataError, match=word):
            list(read_windows(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        list(read_windows(tmp_path / "empty"))
    with pytest.raises(DataError, match="at least 1 row"):
        list(read_windows(TEN, size=0))
