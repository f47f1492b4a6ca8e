"""Figures as images: kaleido draws them, and what is missing is named."""

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from synthetic import write_run

from cliffscope.errors import DataError, MissingExtraError, StoreError
from cliffscope.figures import head_grid
from cliffscope.figures.images import save_figure
from cliffscope.report.images import write_images
from cliffscope.store import SCHEMA

drawn = pytest.mark.skipif(shutil.which("chromium") is None, reason="kaleido needs Chrome or chromium")
# kaleido's browser is asked to stop and is not waited for.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def figure() -> go.Figure:
    return head_grid(*[np.arange(8.0).reshape(2, 4)] * 3)


@drawn
def test_an_svg_holds_text_that_is_dark_and_leaves_the_figure_alone(figure: go.Figure, tmp_path: Path) -> None:
    before = figure.to_json()
    text = save_figure(figure, tmp_path / "new" / "heads.svg", width=500).read_text()
    assert text.startswith("<svg")
    assert 'width="500"' in text
    assert "rgb(29, 29, 27)" in text
    assert figure.to_json() == before


@drawn
def test_a_png_has_the_size_that_was_asked_for(figure: go.Figure, tmp_path: Path) -> None:
    data = save_figure(figure, tmp_path / "heads.png", width=300, scale=2).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 600


@drawn
def test_every_figure_of_a_report_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", n=6, n_layers=2, n_heads=2, length=12)
    names = {path.name for path in write_images(run, tmp_path / "out")}
    assert {"cliff.svg", "grid.svg", "arms.svg", "probe.svg", "sources-1.svg", "transcript-1.svg"} <= names
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_another_ending_is_refused(figure: go.Figure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heads\.bmp: expected a file name that ends in one of \.svg, \.png"):
        save_figure(figure, tmp_path / "heads.bmp")


def test_without_kaleido_the_extra_is_named(figure: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith(("kaleido", "choreographer")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"cliffscope\[figures\]"):
        save_figure(figure, tmp_path / "heads.svg")


def test_a_run_without_results_has_no_images(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": SCHEMA}))
    with pytest.raises(DataError, match="holds no results to draw"):
        write_images(tmp_path, tmp_path / "out")
    with pytest.raises(StoreError, match="does not exist"):
        write_images(tmp_path / "none", tmp_path / "out")
