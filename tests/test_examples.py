"""The notebooks of examples/ run from top to bottom, find what was planted, and are kept without outputs.

What they gave is left in docs/tutorials/, from which the documentation is built.
"""

import re
import time
from pathlib import Path

import nbformat
import pytest

import cliffscope as cs
from cliffscope.errors import MissingExtraError

pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the extra dev")
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TUTORIALS = ROOT / "docs" / "tutorials"
SECONDS = 240
"""For all notebooks together, on two cores."""
MATHJAX = re.compile(r'<script src="https://cdnjs[^"]*mathjax[^"]*"></script>', re.IGNORECASE)
"""plotly asks a server for it in every exported figure; no figure of ours has a formula."""

pytestmark = [
    pytest.mark.slow,
    # The kernel says that its sockets are on this machine alone and not encrypted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
took: dict[str, float] = {}


def run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The executed notebook; an exception in a cell is raised here."""
    # plotly's script stands once in each notebook, so that its page needs no network.
    for name, value in {"PLOTLY_RENDERER": "notebook", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    start = time.perf_counter()
    try:
        NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    except CellExecutionError as error:
        if error.ename != MissingExtraError.__name__:
            raise
        pytest.skip(error.evalue)
    took[path.stem] = time.perf_counter() - start
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def pages(notebook: nbformat.NotebookNode) -> str:
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    return "\n".join(str(o.data.get("text/html", "")) for o in outputs)


def publish(notebook: nbformat.NotebookNode, name: str) -> None:
    """Leaves the notebook for the documentation, without what libraries say of their progress or ask of servers."""
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in (o for o in cell.outputs if "text/html" in o.get("data", {})):
                output.data["text/html"] = MATHJAX.sub("", output.data["text/html"])
    TUTORIALS.mkdir(exist_ok=True)
    nbformat.write(notebook, TUTORIALS / name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_results(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = run(path, tmp_path, monkeypatch)
    shown, said = pages(notebook), printed(notebook)
    assert shown.count("plotly-graph-div") >= 1 or path.stem == "02_bring_your_model"
    planted = [str(head) for head in cs.organisms.read_truth("planted-llama").planted]
    if path.stem == "01_quickstart":
        found = re.search(r"found: +(.*)\nplanted: (.*)", said)
        assert found is not None
        assert sorted(found[1].split()) == sorted(found[2].split()) == sorted(planted)
        # The text says that the probe reads harm: its score stays above one half where the model complies.
        complied = re.search(r"Calibration\(.*complied [\d.]+ \[([\d.]+), ", said)
        assert complied is not None
        assert float(complied[1]) > 0.5
    elif path.stem == "02_bring_your_model":
        assert (tmp_path / "runs" / "mine" / "report.html").is_file()
        assert "That the selected heads suppress refusal cannot be shown with 3 random sets" in shown
    elif path.stem == "03_heads_in_depth":
        rows = dict(re.findall(r"^ *(\w+) (L\d+H\d+ L\d+H\d+)", said, re.MULTILINE))
        assert {name for name, heads in rows.items() if sorted(heads.split()) == sorted(planted)} >= {"zero", "mean"}
        on_probe = re.search(r"on the probe: (.*)", said)
        assert on_probe is not None
        assert sorted(on_probe[1].split()) == sorted(planted)
    else:
        falls = re.search(r"(\d+) of (\d+) transcripts fall", said)
        assert falls is not None
        assert int(falls[1]) <= 0.1 * int(falls[2])
        assert re.search(r"^Selection\(.* by suppression", said, re.MULTILINE)
        assert (tmp_path / "repaired" / "model.safetensors").is_file()
        assert (tmp_path / "edited" / "model.safetensors").is_file()
    publish(notebook, path.name)


def test_all_notebooks_together_take_less_than_four_minutes() -> None:
    if len(took) < len(NOTEBOOKS):
        pytest.skip("not all notebooks were run")
    assert sum(took.values()) < SECONDS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_says_what_it_is_for(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith(f"# {int(path.stem[:2])}. ")
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))
