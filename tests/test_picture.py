"""The picture of the README is what the demo gives today."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from cliffscope.model.checkpoints import ASSETS
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
def test_the_picture_shows_the_means_that_the_demo_measures(tmp_path: Path) -> None:
    config = StudyConfig(
        model="planted-llama", out=str(tmp_path / "run"), max_thinking=128, max_answer=32, temperature=1.0
    )
    run_study(config, until="reading")
    tables = [pd.read_parquet(tmp_path / "run" / f"{name}.parquet") for name in ("aligned", "edited_aligned")]
    measured = {str(name): part for table in tables for name, part in table.groupby("group")}
    drawn = go.Figure(json.loads((FIGURES / "cliff.json").read_text()))
    curves = {trace.name.rpartition(" (n=")[0]: trace for trace in drawn.data if trace.name}
    assert set(curves) == set(measured)
    for name, curve in curves.items():
        n = int(curve.name.rpartition("n=")[2].rstrip(")").replace(",", ""))
        # Answers are drawn at a temperature, and another processor rounds another way: some prompts change groups.
        assert abs(n - measured[name]["n"].max()) <= 0.1 * n
        np.testing.assert_allclose(numbers(curve.y), measured[name]["mean"], rtol=0, atol=0.06)


def test_the_picture_is_one_file_without_scripts() -> None:
    text = (FIGURES / "cliff.svg").read_text()
    assert text.startswith("<svg")
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
