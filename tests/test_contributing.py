"""docs/contributing.md holds: the files that it names are there, at most three a kind, and a toy of each kind works."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from conftest import random_probe, written
from synthetic import write_run

import cliffscope as cs
from cliffscope.figures.measures import measure_panels
from cliffscope.heads.branches import Change
from cliffscope.heads.catalogue import METHODS
from cliffscope.heads.methods import EditMethod, Task
from cliffscope.judging.lookup import JUDGES
from cliffscope.judging.protocols import Verdict
from cliffscope.model.load import LensModel
from cliffscope.readouts.catalogue import READOUTS, fit_readout
from cliffscope.readouts.readout import Readout
from cliffscope.report import evidence, page
from cliffscope.report.content import Part, plot
from cliffscope.report.stored import StoredRun
from cliffscope.selection.criteria import CRITERIA
from cliffscope.store import RunStore
from cliffscope.study import artefacts, runner, stages
from cliffscope.study.artefact_kinds import Column, Table
from cliffscope.study.config import StudyConfig
from cliffscope.study.runner import plan_study
from cliffscope.study.stages import Stage, StageOutputs, Workspace
from cliffscope.transcripts.families import TEMPLATES, Template
from cliffscope.transcripts.records import Outcome, Transcripts

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
SECTIONS = {title: body for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)}
KINDS = {
    *("A method", "A judge", "A template", "A readout", "A criterion"),
    *("A stage", "A table", "A figure", "An architecture"),
}
TOYS = Table(
    file="toys.parquet",
    meaning="numbers",
    columns=(Column(name="number", kind="float", meaning="a number"),),
)


class ToyStage(Stage):
    """Makes one table."""

    name = "toy"
    version = 1
    needs = ("transcripts",)
    makes = (TOYS,)
    settings = ("seed",)
    uses_model = False

    def run(self, work: Workspace) -> StageOutputs:
        return StageOutputs(files={TOYS: pd.DataFrame({"number": [float(work.config.seed)]})})


class Flip(EditMethod):
    """Turns the sign."""

    name = "toy"
    summary = "the sign turned"

    def change(self, task: Task) -> Change:
        return Change(kind=self.name, factor=-1.0)


def test_every_kind_has_a_section_that_names_at_most_three_files_which_are_there() -> None:
    assert set(SECTIONS) == KINDS
    for title, body in SECTIONS.items():
        files = re.findall(r"^\d\. `([^`]+)`", body, re.MULTILINE)
        assert 1 <= len(files) <= 3, title
        assert all((ROOT / file).is_file() for file in files), title


def test_a_method_in_the_catalogue_is_found_by_name(llama: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS.objects, "toy", Flip())
    asked = written(3, harmful=True, outcome=Outcome.COMPLIED)
    ranking = cs.rank_heads(llama, random_probe(llama, 5), asked, method="toy")
    zeroed = cs.rank_heads(llama, random_probe(llama, 5), asked, method="zero")
    assert ranking.method == "toy"
    assert not np.allclose(ranking.effects, zeroed.effects)


def test_a_registered_judge_template_and_criterion_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class ToyJudge:
        name = "toy"

        def __call__(self, prompt: str, answer: str) -> Verdict:
            return Verdict(outcome=Outcome.REFUSED, score=None, reason="always")

    monkeypatch.setitem(JUDGES.objects, "toy", ToyJudge())
    judged = cs.judge(written(2, harmful=True, outcome=Outcome.COMPLIED), "toy")
    assert {t.outcome for t in judged} == {Outcome.REFUSED}
    template = Template(name="toy", think_open="<a>", think_close="</a>", opening="", closing="</a>")
    monkeypatch.setitem(TEMPLATES.objects, "toy", template)
    assert TEMPLATES.get("toy") is template
    criterion = cs.Criterion(
        name="toy", summary="the shortest", columns=("n_thinking",), values=lambda table: -table["n_thinking"]
    )
    monkeypatch.setitem(CRITERIA.objects, "toy", criterion)
    assert CRITERIA.get("toy") is criterion


def test_a_registered_readout_is_fitted_by_name(
    llama: LensModel, refused: Transcripts, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(model: LensModel, a: Transcripts, b: Transcripts, splits: Mapping[str, str], seed: int) -> Readout:
        return replace(random_probe(model, 3), bias=1.0)

    monkeypatch.setitem(READOUTS.objects, "toy", fit)
    assert fit_readout("toy", llama, refused, complied, splits={}).layer == 3
    monkeypatch.setitem(READOUTS.objects, "toy", lambda *_: "no readout")
    with pytest.raises(cs.CliffScopeError, match="gave a str"):
        fit_readout("toy", llama, refused, complied, splits={})


def test_a_stage_and_its_table_are_planned_written_and_read(
    llama: LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STAGES", (*stages.STAGES, ToyStage()))
    monkeypatch.setattr(runner, "NAMES", (*runner.NAMES, "toy"))
    monkeypatch.setitem(artefacts.TABLES, "toys", TOYS)
    config = StudyConfig(model="planted-llama", out=str(tmp_path / "run"), seed=7)
    plan = plan_study(config).set_index("stage")
    assert plan["action"]["toy"] == "run"
    outputs = ToyStage().run(Workspace(config=config, store=RunStore(path=tmp_path), progress=lambda *_: None))
    TOYS.write(RunStore(path=tmp_path), outputs.files[TOYS])
    assert TOYS.read(tmp_path)["number"].tolist() == [7.0]


def test_a_figure_among_a_sections_parts_stands_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figure() -> go.Figure:
        row = {
            "arm": ["a"],
            "kind": ["top"],
            "measure": ["toy"],
            "value": [0.5],
            "ci_low": [0.4],
            "ci_high": [0.6],
            "n": [3],
        }
        return measure_panels(pd.DataFrame(row), title="A toy figure")

    def with_toy(run: StoredRun) -> list[Part]:
        return [plot("toy", figure(), "A note.")]

    monkeypatch.setattr(evidence, "reading_parts", with_toy)
    folder = write_run(tmp_path / "run", n=6, n_layers=2, n_heads=2, length=12)
    assert 'id="figure-toy"' in page.write_report(folder).read_text(encoding="utf-8")
