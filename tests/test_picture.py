"""The picture of the README is what the demo gives today."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from cliffscope.model.checkpoints import ASSETS
from cliffscope.report.behaviour import CURVES
from cliffscope.study.config import StudyConfig
from cliffscope.study.runner import run_study

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def numbers(values: dict[str, str] | Sequence[float]) -> np.ndarray:
    """An array of plotly's, which it may write as bytes."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float)
    return np.asarray(values, dtype=float)


@pytest.mark.slow
@pytest.mark.skipif(
    not (ASSETS / "planted-llama" / "truth.json").is_file(), reason="the organism is not in the package"
)
def test_the_picture_shows_the_curves_that_the_demo_measures(tmp_path: Path) -> None:
    config = StudyConfig(
        model="planted-llama", out=str(tmp_path / "run"), max_thinking=128, max_answer=32, temperature=1.0
    )
    run_study(config, until="early closings")
    table = pd.read_parquet(tmp_path / "run" / "early_curves.parquet")
    measured = {CURVES[str(name)]: part for name, part in table.groupby("curve")}
    drawn = go.Figure(json.loads((FIGURES / "closings.json").read_text()))
    curves = {str(trace.name): trace for trace in drawn.data if trace.name}
    assert set(curves) == set(measured)
    n = int(re.search(r"\(n=(\d+) transcripts\)", str(drawn.layout.title.text))[1])
    for name, curve in curves.items():
        # Answers are drawn at a temperature, and another processor rounds another way: some prompts change groups.
        assert abs(n - measured[name]["n"].max()) <= 0.1 * n
        np.testing.assert_allclose(numbers(curve.x), measured[name]["fraction"])
        np.testing.assert_allclose(numbers(curve.y), measured[name]["mean"], rtol=0, atol=0.06)


def test_the_picture_shows_what_its_caption_says() -> None:
    drawn = go.Figure(json.loads((FIGURES / "closings.json").read_text()))
    curves = {str(trace.name): numbers(trace.y) for trace in drawn.data if trace.name}
    assert curves[CURVES["unedited"]].max() < 0.3
    assert curves[CURVES["edited"]].min() > 0.99
    assert 0.68 < curves[CURVES["probe"]].min() <= curves[CURVES["probe"]].max() < 0.8
    for page in ("README.md", "docs/index.md"):
        text = " ".join((FIGURES.parents[1] / page).read_text(encoding="utf-8").split())
        assert re.search(r"over (\d+) held-out", text)[1] in str(drawn.layout.title.text)


def test_the_picture_is_one_file_without_scripts() -> None:
    text = (FIGURES / "closings.svg").read_text()
    assert text.startswith("<svg")
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
