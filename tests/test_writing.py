"""Files and folders are whole or not there, and what a killed writer left goes with the next one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest

from cliffscope.errors import DataError, StoreError
from cliffscope.figures.images import save_figures
from cliffscope.model import checkpoints
from cliffscope.store import open_log, open_run
from cliffscope.writing import PARTIAL, check_writable, clear_partial, write_atomically, write_folder

ROOT = Path(__file__).parents[1]
KILLED = """
import os, signal, sys
from pathlib import Path
from cliffscope.writing import write_atomically, write_folder
def write(path):
    (path / "a" if path.is_dir() else path).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "file":
    write_atomically(Path(sys.argv[2]), write)
write_folder(Path(sys.argv[2]), write, overwrite=True)
"""
REPLACING = """
import os, signal, sys
from pathlib import Path
from cliffscope.writing import write_folder
plain, moved = Path.rename, []
def rename(path, target):
    moved.append(path)
    if len(moved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, target)
Path.rename = rename
write_folder(Path(sys.argv[1]), lambda path: (path / "a").write_text("new"), overwrite=True)
"""
FULL = """
import resource, signal, sys
from cliffscope.errors import StoreError
from cliffscope.store import open_log
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open_log(sys.argv[1], {}) as log:
        log.append("a", {"text": "x"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
        log.append("b", {"text": "y" * 1000})
except StoreError as error:
    print(type(error).__name__, error.exit_code, error)
"""


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(path: Path) -> None:
    (path / "a").write_text("whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    assert run(KILLED, kind, target).returncode == -9
    (left,) = names(tmp_path)
    assert left.endswith(PARTIAL), "the old name is not touched before the new one is whole"
    if kind == "file":
        write_atomically(target, lambda path: path.write_text("whole"))
    else:
        write_folder(target, fill, overwrite=False)
    assert names(tmp_path) == ["out"]


def test_what_a_live_writer_or_another_machine_writes_is_left_alone(tmp_path: Path) -> None:
    live = tmp_path / f".out.{_host()}-{os.getpid()}.abc{PARTIAL}"
    foreign = tmp_path / f".out.00000000-1.abc{PARTIAL}"
    other = tmp_path / f".out2.{_host()}-4194303.abc{PARTIAL}"
    dead = tmp_path / f".out.{_host()}-4194303.abc{PARTIAL}"
    for path in (live, foreign, other, dead):
        path.write_text("half")
    write_atomically(tmp_path / "out", lambda path: path.write_text("whole"))
    assert names(tmp_path) == sorted([live.name, foreign.name, other.name, "out"])


def _host() -> str:
    from cliffscope.writing import _writer

    return _writer(0).partition("-")[0]


def test_a_folder_that_was_being_replaced_at_a_kill_is_brought_back_or_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(target, fill, overwrite=False)
    assert run(REPLACING, target).returncode == -9
    assert not target.exists(), "the kill came between the two renames"

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        write_folder(target, fail, overwrite=True)
    assert (target / "a").read_text() == "whole"
    assert names(tmp_path) == ["out"]


def test_folders_and_files_that_a_killed_run_left_are_removed_when_it_is_opened_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}):
        pass
    folder = tmp_path / "run" / f".repaired.x{PARTIAL}"
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    (tmp_path / "run" / f".a.json.x{PARTIAL}").write_text("half")
    with open_run(tmp_path / "run", {}) as store:
        assert names(store.path) == [".lock", "manifest.json"]
    clear_partial(tmp_path / "run")


def test_a_disk_that_is_full_while_a_log_is_closed_is_a_store_error_and_the_row_before_is_kept(tmp_path: Path) -> None:
    done = run(FULL, tmp_path / "rows.log")
    assert done.stdout.startswith("StoreError 5 "), done.stderr[-2000:]
    assert "cannot be written: File too large" in done.stdout
    with open_log(tmp_path / "rows.log", {}) as log:
        assert log.rows == {"a": {"text": "x"}}
        assert log.dropped == 1


@pytest.mark.parametrize("long", ["x" * 255, "ü" * 127, "x" * 300])
def test_a_long_name_is_written_or_refused_beforehand(tmp_path: Path, long: str) -> None:
    target = tmp_path / long
    if len(long.encode()) > 255:
        for attempt in (lambda: check_writable(target), lambda: open_run(target, {}).__enter__()):
            with pytest.raises(StoreError, match="File name too long"):
                attempt()
        return
    check_writable(target)
    assert names(tmp_path) == []
    write_atomically(target, lambda path: path.write_text("whole"))
    assert names(tmp_path) == [long]


def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "deep" / "out")
    with pytest.raises(StoreError, match="Not a directory"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(StoreError, match="cannot be written"):
        check_writable(Path("/proc/none.jsonl"))
    assert names(tmp_path) == ["file"]


def test_a_user_without_a_home_directory_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(_uid: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", checkpoints.CACHE):
        monkeypatch.delenv(name, raising=False)
    assert checkpoints.cache_folder() is None


def test_a_figure_that_cannot_be_written_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = go.Figure(go.Scatter(y=[1, 2]))
    save_figures({tmp_path / "a.html": figure, tmp_path / "a.json": figure})
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fill_half(self: Path, text: str, **_options: object) -> int:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_half)
    for name in ("a.html", "a.json"):
        with pytest.raises(StoreError, match="No space left"):
            save_figures({tmp_path / name: go.Figure(go.Scatter(y=[3, 4]))})
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    with pytest.raises(DataError, match="expected a file name"):
        save_figures({tmp_path / "a.bmp": figure})


TASKS = ["export", "export --overwrite", "figures"]


@pytest.fixture(scope="module")
def killed_tasks() -> dict[str, dict[str, object]]:
    """What became of each task in two rounds, one killed between its steps and one inside of a write."""
    words = [word for task in TASKS for word in ("--task", task)]
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", *words, "--rounds", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(TASKS), f"status {done.returncode}: {done.stderr[-3000:]}"
    return {line["task"]: line for line in lines}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_lost_when_a_process_is_killed_in_the_middle_of_a_write(
    killed_tasks: dict[str, dict[str, object]], task: str
) -> None:
    """benchmarks/kills.py does 25 rounds of each, of scoring a pool, and of repairs alone and in a study."""
    assert killed_tasks[task]["killed"] == 2
    assert killed_tasks[task]["wrong"] == []
