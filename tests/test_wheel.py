"""The wheel holds the package with its data files, and nothing else of the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.version import Version

import cliffscope

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PACKAGE = Path(cliffscope.__file__).parent
DATA = {
    "cliffscope/__init__.pyi",
    "cliffscope/py.typed",
    "cliffscope/report/page.html.j2",
    "cliffscope/report/macros.html.j2",
    "cliffscope/report/method.html.j2",
    "cliffscope/report/page.css",
    "cliffscope/report/page.js",
}
ORGANISMS = sorted(p.name for p in (PACKAGE / "organisms" / "assets").glob("*/"))
UNTRACKED = (".*", "*.egg-info", "__pycache__", "runs", "site", "dist", "build", "tutorials")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distribution and wheel, built offline from a copy, so that the checkout stays as it is."""
    for module in ("build", "setuptools"):
        if find_spec(module) is None:
            pytest.skip(f"the package {module} is not installed: pip install -e '.[dev]'")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests do not run in a checkout: there is nothing to build from")
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*UNTRACKED))
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source.parent / "dist"), str(source)]
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return source.parent / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> ZipFile:
    (path,) = distributions.glob("*.whl")
    return ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package(wheel: ZipFile) -> None:
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {p.relative_to(PACKAGE.parent).as_posix() for p in files}
    assert {name for name in wheel.namelist() if name.startswith("cliffscope/")} == expected
    assert expected >= DATA


def test_the_wheel_holds_the_weights_and_the_truth_of_every_organism(wheel: ZipFile) -> None:
    assert "planted-llama" in ORGANISMS
    for organism in ORGANISMS:
        for file in ("model.safetensors", "truth.json", "config.json", "tokenizer.json"):
            assert wheel.getinfo(f"cliffscope/organisms/assets/{organism}/{file}").file_size > 0


def test_the_wheel_holds_neither_tests_nor_documentation(wheel: ZipFile) -> None:
    (metadata,) = {name.split("/")[0] for name in wheel.namelist() if not name.startswith("cliffscope/")}
    assert re.fullmatch(r"cliffscope-.*\.dist-info", metadata)
    assert f"{metadata}/licenses/LICENSE" in wheel.namelist()


def test_the_version_and_the_command_of_the_wheel_are_those_of_the_package(wheel: ZipFile) -> None:
    (metadata,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    headers = Parser().parsestr(wheel.read(f"{metadata}/METADATA").decode())
    assert headers["Version"] == cliffscope.__version__
    assert "cliffscope = cliffscope.cli:main" in wheel.read(f"{metadata}/entry_points.txt").decode()


def test_the_version_stands_in_one_place() -> None:
    version = rf"(?<![\w.]){re.escape(cliffscope.__version__)}(?![\w.])"
    files = [ROOT / "pyproject.toml", *PACKAGE.rglob("*.py")]
    assert [p.name for p in files if re.search(version, p.read_text(encoding="utf-8"))] == ["__init__.py"]


def test_documents_about_the_project_agree_with_the_version() -> None:
    version = Version(cliffscope.__version__)
    minor = f"{version.major}.{version.minor}"
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    expected = f"{minor} (unreleased)" if version.is_devrelease else version.base_version
    assert newest[1].startswith(expected)
    for document in ("README.md", "CITATION.cff", "docs/index.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        stated = re.findall(r"(?i)(?<![\w-])(?:cliffscope==|cliffscope |version:? )v?(\d+\.\d+[\w.]*)", text)
        assert [v for v in stated if not v.startswith(minor)] == [], document


def test_the_source_distribution_builds_the_wheel_and_holds_no_run(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= DATA | {"pyproject.toml", "LICENSE", "README.md"}
    assert not {name for name in names if name.startswith(("runs/", ".venv", "site/"))}
