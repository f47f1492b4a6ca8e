import errno
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cliffscope import store as store_module
from cliffscope.errors import StoreError
from cliffscope.store import LOCK, MANIFEST, SCHEMA, RunStore, open_log, open_run, write_atomically

CONFIG = {"model": "toy", "seed": 0, "fraction": 0.5}
HOLD = """
import sys, time
from cliffscope.store import open_run
with open_run(sys.argv[1], {"model": "toy", "seed": 0, "fraction": 0.5}) as store:
    store.finish("first", 1.0)
    print("held", flush=True)
    time.sleep(120)
"""
HOLD_LOG = """
import sys, time
from cliffscope.store import open_log
with open_log(sys.argv[1], {}) as log:
    log.append("a", {"n": 1})
    print("held", flush=True)
    time.sleep(120)
"""
FORK = """
import os, sys, time
from cliffscope.store import open_run
with open_run(sys.argv[1], {"model": "toy", "seed": 0, "fraction": 0.5}) as store:
    store.finish("first", 1.0)
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunStore]:
    with open_run(tmp_path / "run", CONFIG) as store:
        yield store


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes a file: the kernel refuses the write in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# Writing


def test_a_file_is_written_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, lambda p: p.write_text("old"))
    write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new"
    assert names(tmp_path) == {"a.txt"}


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".")
        temporary.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing_behind_and_its_error_is_not_changed(
    tmp_path: Path, error: BaseException
) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(tmp_path / "a.txt", write)
    assert caught.value is error
    assert names(tmp_path) == set()


def test_a_disk_that_fills_up_while_writing_is_a_store_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device.*Free space"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_disk_that_fills_up_while_flushing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write_atomically(tmp_path / "a.txt", lambda p: p.write_text("all"))
    assert names(tmp_path) == set()


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "a.txt", []
    fsync = os.fsync

    def flush(handle: int) -> None:
        folder = os.path.samestat(os.fstat(handle), tmp_path.stat())
        events.append(("folder" if folder else "file", path.exists()))
        fsync(handle)

    monkeypatch.setattr(store_module.os, "fsync", flush)
    write_atomically(path, lambda p: p.write_text("x"))
    assert events == [("file", False), ("folder", True)]


def test_a_system_that_cannot_flush_a_directory_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def no_flush(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(store_module.os, "fsync", no_flush)
    write_atomically(tmp_path / "a.txt", lambda p: p.write_text("x"))
    monkeypatch.undo()
    open_file = os.open

    def no_folder(path: object, *args: int, **options: int) -> int:
        if Path(str(path)).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, *args, **options)

    monkeypatch.setattr(store_module.os, "open", no_folder)
    write_atomically(tmp_path / "b.txt", lambda p: p.write_text("y"))
    monkeypatch.undo()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "x", "b.txt": "y"}


def test_a_disk_that_fails_while_a_directory_is_flushed_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(store_module.os, "fsync", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        write_atomically(tmp_path / "a.txt", lambda p: p.write_text("x"))
    assert names(tmp_path) == {"a.txt"}


WRITERS: dict[str, Callable[[RunStore], None]] = {
    "a.json": lambda run: run.write_json("a.json", {"text": "x" * 100_000}),
    "a.parquet": lambda run: run.write_frame(
        "a.parquet", pd.DataFrame({"x": np.random.default_rng(0).normal(size=50_000)})
    ),
    "a.safetensors": lambda run: run.write_arrays("a.safetensors", {"x": np.ones(50_000, np.float32)}),
    "a.txt": lambda run: run.write_with("a.txt", lambda p: p.write_bytes(b"x" * 100_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_meets_a_full_disk_with_a_store_error_and_no_rest(run: RunStore, name: str) -> None:
    with files_limited_to(20_000), pytest.raises(StoreError, match=name.replace(".", r"\.")):
        WRITERS[name](run)
    assert names(run.path) == {MANIFEST, LOCK}
    WRITERS[name](run)
    assert names(run.path) == {MANIFEST, LOCK, name}


def test_a_folder_that_is_not_there_or_cannot_be_written_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="No such file"):
        write_atomically(tmp_path / "none" / "a.txt", lambda p: p.write_text("x"))

    def refuse(*args: object, **options: object) -> tuple[int, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module.tempfile, "mkstemp", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        write_atomically(tmp_path / "a.txt", lambda p: p.write_text("x"))


def test_a_name_that_is_a_directory_is_a_store_error_without_rest(run: RunStore) -> None:
    (run.path / "taken").mkdir()
    with pytest.raises(StoreError, match="taken"):
        run.write_json("taken", {})
    assert names(run.path) == {MANIFEST, LOCK, "taken"}


# Reading back


def test_nan_and_infinity_become_null_and_numpy_numbers_plain_ones(run: RunStore) -> None:
    value = {
        "nan": float("nan"),
        "inf": [math.inf, -math.inf],
        "float32": np.float32("nan"),
        "int": np.int64(3),
        "bool": np.bool_(True),
        "true": True,
        "none": None,
        "path": Path("a/b"),
        "nested": {"tuple": (1, np.float64(0.5))},
        "text": "ü </script> 日本",
        7: "number key",
    }
    run.write_json("a.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((run.path / "a.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert run.read_json("a.json") == {
        "nan": None,
        "inf": [None, None],
        "float32": None,
        "int": 3,
        "bool": True,
        "true": True,
        "none": None,
        "path": "a/b",
        "nested": {"tuple": [1, 0.5]},
        "text": "ü </script> 日本",
        "7": "number key",
    }


def test_frames_and_arrays_are_read_back_as_they_were(run: RunStore) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "x": [1.5, np.nan], "n": [1, 2], "ok": [True, None]})
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4).T, "nan": np.array([np.nan, np.inf], np.float32)}
    run.write_frame("a.parquet", frame)
    run.write_arrays("a.safetensors", arrays)
    pd.testing.assert_frame_equal(run.read_frame("a.parquet"), frame)
    stored = run.read_arrays("a.safetensors")
    assert set(stored) == {"w", "nan"}
    for name, values in arrays.items():
        np.testing.assert_array_equal(stored[name], values)
        assert stored[name].dtype == np.float32


def test_an_empty_table_keeps_its_columns(run: RunStore) -> None:
    run.write_frame("a.parquet", pd.DataFrame(columns=["id", "reason"]))
    assert list(run.read_frame("a.parquet").columns) == ["id", "reason"]


@pytest.mark.parametrize("reader", ["read_json", "read_frame", "read_arrays"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"not what it says", b"PAR1\x00\x00PAR1", b"\xff" * 64],
    ids=["missing", "empty", "text", "parquet", "binary"],
)
def test_a_missing_or_damaged_file_is_a_store_error_that_names_it(
    run: RunStore, reader: str, content: bytes | None
) -> None:
    if content is not None:
        (run.path / "a.file").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.file cannot be read"):
        getattr(run, reader)("a.file")


def test_json_that_is_no_object_is_a_store_error(run: RunStore) -> None:
    (run.path / "a.json").write_text("[1]")
    with pytest.raises(StoreError, match="holds list, not an object"):
        run.read_json("a.json")


def test_a_truncated_table_is_a_store_error(run: RunStore) -> None:
    run.write_frame("a.parquet", pd.DataFrame({"x": range(1000)}))
    run.write_arrays("a.safetensors", {"x": np.ones(1000, np.float32)})
    for name in ("a.parquet", "a.safetensors"):
        whole = (run.path / name).read_bytes()
        (run.path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"a\.parquet"):
        run.read_frame("a.parquet")
    with pytest.raises(StoreError, match=r"a\.safetensors"):
        run.read_arrays("a.safetensors")


# The manifest


def test_a_new_directory_is_made_with_its_configuration_and_no_stage(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "b", {**CONFIG, "out": Path("x"), "nan": math.nan}) as run:
        assert run.manifest == {
            "schema": SCHEMA,
            "config": {**CONFIG, "out": "x", "nan": None},
            "stages": {},
        }
        assert not run.finished("first")
        assert run.has(MANIFEST)
        assert not run.has("nothing")


def test_stages_and_fields_are_kept_and_seen_by_the_next_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.finish("first", 1.23456)
        run.update({"verdict": {"cliff": "yes"}})
        run.finish("second", 2.0)
        run.update({"verdict": {"heads": "none"}})
    with open_run(tmp_path / "run", dict(CONFIG)) as run:
        assert run.finished("first")
        assert run.finished("second")
        assert not run.finished("third")
        assert run.manifest["stages"] == {"first": {"seconds": 1.235}, "second": {"seconds": 2}}
        assert run.manifest["verdict"] == {"heads": "none"}


def test_a_configuration_with_tuples_paths_and_nan_is_the_same_again(tmp_path: Path) -> None:
    config = {"a": (1, 2), "b": Path("c"), "d": math.nan, "e": {"f": np.float32(0.5)}}
    for _ in range(2):
        with open_run(tmp_path / "run", config) as run:
            assert run.manifest["config"] == {"a": [1, 2], "b": "c", "d": None, "e": {"f": 0.5}}


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.finish("first", 1.0)
    before = (tmp_path / "run" / MANIFEST).read_bytes()
    with (
        pytest.raises(StoreError, match="another configuration") as caught,
        open_run(tmp_path / "run", {**CONFIG, "seed": 1, "limit": 5}),
    ):
        pass
    assert "seed was 0, now 1" in str(caught.value)
    assert "limit was None, now 5" in str(caught.value)
    assert "model was" not in str(caught.value)
    assert (tmp_path / "run" / MANIFEST).read_bytes() == before


def test_a_refused_configuration_releases_the_lock(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.finish("first", 1.0)
    with pytest.raises(StoreError, match="another configuration"), open_run(tmp_path / "run", {"model": "other"}):
        pass
    with open_run(tmp_path / "run", CONFIG) as run:
        assert run.finished("first")


def test_a_directory_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"'thesis\.tex', and is not a run directory"), open_run(tmp_path, CONFIG):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / MANIFEST).exists()


def test_hidden_files_do_not_make_a_directory_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
    with open_run(tmp_path, CONFIG) as run:
        assert run.has(MANIFEST)


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None])
def test_another_schema_is_refused(tmp_path: Path, schema: object) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": schema, "config": CONFIG, "stages": {}}))
    with pytest.raises(StoreError, match=f"schema {schema}, expected {SCHEMA}"), open_run(tmp_path, CONFIG):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_manifest_is_a_store_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"), open_run(tmp_path, CONFIG):
        pass


# The directory


def test_a_path_below_a_file_or_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StoreError, match="cannot be written.*--out"), open_run(path, CONFIG):
            pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_directory_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="cannot be written: Read-only file system.*--out"), open_run(tmp_path, CONFIG):
        pass
    monkeypatch.undo()
    assert names(tmp_path) == set()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="Read-only file system"), open_run(tmp_path / "new", CONFIG):
        pass


def test_a_disk_full_at_the_first_manifest_leaves_an_empty_run_that_can_be_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"), open_run(tmp_path / "run", CONFIG):
        pass
    monkeypatch.undo()
    assert names(tmp_path / "run") == {LOCK}
    with open_run(tmp_path / "run", CONFIG) as run:
        assert run.has(MANIFEST)


# The lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match="in use by another process"), open_run(path, CONFIG):
                pass
            # Whose directory it is, is only asked once it is free.
            with pytest.raises(StoreError, match="in use by another process"), open_run(path, {"model": "other"}):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    assert holder.returncode == -signal.SIGKILL
    with open_run(path, CONFIG) as run:
        assert run.finished("first")


def test_the_lock_holds_within_one_process_too_and_is_released_by_an_exception(tmp_path: Path) -> None:
    def use() -> None:
        with open_run(tmp_path / "run", CONFIG):
            with pytest.raises(StoreError, match="in use"), open_run(tmp_path / "run", CONFIG):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    with open_run(tmp_path / "run", CONFIG):
        pass


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOLCK, "No locks available"), (errno.ENOSYS, "Not implemented")])
def test_a_file_system_without_locks_is_not_reported_as_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, reason)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=f"cannot be locked: {reason}.*local disk"), open_run(tmp_path, {}):
        pass
    with (
        pytest.raises(StoreError, match=f"cannot be locked: {reason}.*local disk"),
        open_log(tmp_path / "rows.jsonl", {}),
    ):
        pass


def test_a_process_that_was_forked_from_the_killed_one_does_not_hold_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", FORK, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(StoreError, match="in use by another process"), open_run(path, CONFIG):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            os.kill(child, 0)
            with open_run(path, CONFIG) as run:
                assert run.finished("first")
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_a_log_until_the_first_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD_LOG, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=r"rows\.jsonl is in use by another process"), open_log(file, {}):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with open_log(file, {}) as log:
        assert log.rows == {"a": {"n": 1}}
    assert names(tmp_path) == {"rows.jsonl"}


def test_a_log_has_one_lock_by_whatever_name_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with (
        open_log(tmp_path / "rows.jsonl", {}),
        pytest.raises(StoreError, match=r"link\.jsonl is in use by another process"),
        open_log(tmp_path / "link.jsonl", {}),
    ):
        pass


def test_a_log_that_is_closed_early_can_be_opened_again(tmp_path: Path) -> None:
    with open_log(tmp_path / "rows.jsonl", {}) as log:
        log.append("a", {"n": 1})
        log.close()
        with open_log(tmp_path / "rows.jsonl", {}) as again:
            assert again.rows == {"a": {"n": 1}}
    assert names(tmp_path) == {"rows.jsonl"}


# What is left behind


def test_files_that_a_killed_process_left_half_written_are_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path, CONFIG) as run:
        run.write_with("a.txt", lambda p: (path / f"{p.name}x{store_module.PARTIAL}").touch())
        (path / ".arm-a.log.lock").touch()
        for name in (".keep", "mine.partial", "mine.log.lock", ".mine.lock"):
            (path / name).touch()
    assert len(names(path)) == 9
    with open_run(path, CONFIG):
        assert names(path) == {MANIFEST, LOCK, "a.txt", ".keep", "mine.partial", "mine.log.lock", ".mine.lock"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_user_asks_for_and_the_mask_stays(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a.txt", lambda p: p.write_text("x"))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_a_directory_in_which_nothing_was_done_belongs_to_nobody(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG) as run:
        run.update({"verdict": {"cliff": "yes"}})
    with open_run(tmp_path / "run", {"model": "other"}) as run:
        assert run.manifest == {"schema": SCHEMA, "config": {"model": "other"}, "stages": {}}


def test_an_error_before_anything_is_written_removes_the_directory_that_was_made(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name, left in (("new", False), ("old", True)):
        with pytest.raises(StoreError, match="wrong"), open_run(tmp_path / name, CONFIG):
            raise StoreError("Something is wrong.")
        assert (tmp_path / name).exists() is left


def test_an_error_after_something_was_written_leaves_it(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with open_run(tmp_path / "run", CONFIG) as run:
            run.write_json("a.json", {})
            raise StoreError("Something is wrong.")

    with pytest.raises(StoreError, match="wrong"):
        write_and_fail()
    assert names(tmp_path / "run") == {MANIFEST, LOCK, "a.json"}


def test_a_stage_is_finished_where_it_did_not_raise(run: RunStore) -> None:
    with run.stage("first"):
        assert not run.finished("first")
    with pytest.raises(ZeroDivisionError), run.stage("second"):
        raise ZeroDivisionError
    assert list(run.manifest["stages"]) == ["first"]


def test_an_array_is_written_as_its_numbers(run: RunStore) -> None:
    run.write_json("a.json", {"x": np.array([[1.0, np.nan], [2.0, 3.0]]), "n": np.array(3)})
    assert run.read_json("a.json") == {"x": [[1.0, None], [2.0, 3.0]], "n": 3}


def test_a_log_keeps_its_rows_and_refuses_another_configuration(tmp_path):
    file = tmp_path / "rows.jsonl"
    with open_log(file, {"model": "toy"}) as log:
        log.append("a", {"n": 1})
        log.append("b", {"n": 2})
    with open_log(file, {"model": "toy"}) as log:
        assert log.rows == {"a": {"n": 1}, "b": {"n": 2}}
        assert log.dropped == 0
    with pytest.raises(StoreError, match="not a log of this configuration"), open_log(file, {"model": "other"}):
        pass


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_log_cut_anywhere_loses_at_most_its_last_row(tmp_path, cut):
    file = tmp_path / "rows.jsonl"
    with open_log(file, {}) as log:
        log.append("a", {"n": 1})
        log.append("b", {"n": 2})
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - cut])
    with open_log(file, {}) as log:
        survivors = dict(log.rows)
        for key in ("a", "b"):
            if key not in survivors:
                log.append(key, {"n": 1 + (key == "b")})
    assert set(survivors) <= {"a", "b"}
    assert file.read_bytes() == whole


def test_a_log_is_held_by_one_process_at_a_time(tmp_path):
    with (
        open_log(tmp_path / "rows.jsonl", {}),
        pytest.raises(StoreError, match=r"rows\.jsonl is in use by another process"),
        open_log(tmp_path / "rows.jsonl", {}),
    ):
        pass


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"n": 1}', b'{"key": "a"}'])
def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    with open_log(file, {}) as log:
        log.append("a", {})
    file.write_bytes(file.read_bytes() + line + b"\n")
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"rows\.jsonl, line 3"), open_log(file, {}):
        pass
    assert file.read_bytes() == before


def test_a_log_in_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"), open_log(tmp_path / "none" / "rows.jsonl", {}):
        pass


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"my": "notes"}\nand more'])
def test_another_file_is_never_cut(tmp_path, text):
    file = tmp_path / "notes.txt"
    file.write_text(text)
    with pytest.raises(StoreError, match=r"notes\.txt"), open_log(file, {}):
        pass
    assert file.read_text() == text
