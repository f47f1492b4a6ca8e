"""No interface of one operating system alone: none in the sources, and none missed where they are hidden."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cliffscope

PACKAGE = Path(cliffscope.__file__).parent
LINUX_ALONE = {"kills.py"}
"""Benchmarks that say that they need Linux: this one forks processes that die in the middle of a write."""
SOURCES = sorted(
    path
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").glob("*.py"))
    if path.name not in LINUX_ALONE
)
MODULES = {"fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "winreg"}
FUNCTIONS = {
    *("chown", "fchmod", "fork", "geteuid", "getloadavg", "getuid", "mkfifo", "nice", "sched_getaffinity", "statvfs"),
    *("sysconf", "uname", "wait4"),
}
BELOW = {"fchmod", "geteuid", "statvfs"}
"""Functions that filelock and shutil call on Linux, which cannot be hidden from them."""
SIGNALS = {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGXFSZ"}
FOLDERS = ("/dev/", "/etc/", "/proc/", "/sys/", "/tmp", "/var/")

HIDDEN = """
import importlib, os, pkgutil, sys
from pathlib import Path

# Libraries have branches for each system. They are imported first, so that everything is hidden from CliffScope alone.
import filelock, numpy as np, pandas as pd, platformdirs, psutil, pyarrow.parquet, safetensors.numpy, sklearn.metrics
import torch, transformers, transformer_lens.model_bridge

for name in sys.argv[2].split():
    sys.modules[name] = None
for name in sys.argv[3].split():
    if hasattr(os, name):
        delattr(os, name)


def refuse(event, arguments):
    if event != "open" or not isinstance(arguments[0], str):
        return
    if arguments[0].startswith(("/proc/", "/sys/")):
        frame = sys._getframe(1)
        while frame and not frame.f_globals["__name__"].startswith("psutil"):
            frame = frame.f_back
        if frame is None:
            raise FileNotFoundError(arguments[0])


sys.addaudithook(refuse)
plain_open = os.open


def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return plain_open(path, *arguments, **options)


os.open = open_no_folder

import cliffscope

for module in pkgutil.walk_packages(cliffscope.__path__, "cliffscope."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from cliffscope.errors import StoreError
from cliffscope.memory import free_bytes, held_bytes
from cliffscope.model.checkpoints import cache_folder
from cliffscope.store import open_log, open_run
from cliffscope.study.doctor import examine

folder = Path(sys.argv[1])
frame, arrays = pd.DataFrame({"x": [1.0, 2.0]}), {"w": np.arange(3.0)}
with open_run(folder / "run", {"seed": 0}) as run, run.stage("first"):
    run.write_json("a.json", {"x": 1})
    run.write_frame("a.parquet", frame)
    run.write_arrays("a.safetensors", arrays)
    try:
        with open_run(folder / "run", {"seed": 0}):
            raise AssertionError("opened twice")
    except StoreError as error:
        assert "in use by another process" in str(error)
with open_run(folder / "run", {"seed": 0}) as run:
    assert run.finished("first")
    assert run.read_json("a.json") == {"x": 1}
    pd.testing.assert_frame_equal(run.read_frame("a.parquet"), frame)
    np.testing.assert_array_equal(run.read_arrays("a.safetensors")["w"], arrays["w"])
with open_log(folder / "rows.jsonl", {}) as log:
    log.append("a", {"n": 1})
with open_log(folder / "rows.jsonl", {}) as log:
    assert log.rows == {"a": {"n": 1}}
cpu = torch.device("cpu")
assert free_bytes(cpu) > 0 and held_bytes(cpu) > 0
assert {"system", "memory", "disk"} <= {finding.name for finding in examine(folder)}
assert cache_folder() is not None
print("whole")
"""


def interfaces_of_one_system(source: str) -> set[str]:
    """Modules, functions, signals and folders that only some operating systems have."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} & MODULES
            if node.module in ("os", "signal"):
                names |= {alias.name for alias in node.names} & (FUNCTIONS | SIGNALS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            names |= {node.attr} & (FUNCTIONS | SIGNALS)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(FOLDERS):
            names.add(node.value)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_no_module_uses_an_interface_of_one_system(path: Path) -> None:
    assert interfaces_of_one_system(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os, fcntl", {"fcntl"}),
        ("from resource import getrusage", {"resource"}),
        ("from os import sysconf", {"sysconf"}),
        ("import os\nos.sysconf('SC_AVPHYS_PAGES')", {"sysconf"}),
        ("import signal\nsignal.SIGKILL", {"SIGKILL"}),
        ("open('/proc/self/statm')", {"/proc/self/statm"}),
        ("import os\nos.fsync(3)", set()),
    ],
)
def test_an_interface_of_one_system_is_noticed(source: str, names: set[str]) -> None:
    assert interfaces_of_one_system(source) == names


def test_the_package_works_where_the_interfaces_of_linux_are_hidden(tmp_path: Path) -> None:
    hidden = " ".join(MODULES), " ".join(FUNCTIONS - BELOW)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:cliffscope", "-c", HIDDEN, str(tmp_path), *hidden],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1:] == ["whole"], done.stderr
