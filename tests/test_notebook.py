"""Results show themselves: a headline, a small table and a figure, with every text escaped."""

import inspect
import re
import sys
import types

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import cliffscope as cs
from cliffscope.evaluation.dose import DoseResponse
from cliffscope.heads.agreement import RankingAgreement
from cliffscope.heads.controls import SetControl
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.sources import HeadSources
from cliffscope.notebook import ROWS, Plotted, Shown
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.reports import ProbeReport
from cliffscope.readouts.trace import Cliffs, RefusalTraces
from cliffscope.repairing.comparison import RepairReport
from cliffscope.selection.scoring import PoolScores

RESULTS = (
    *(RefusalProbe, ProbeReport, RefusalTraces, Cliffs, cs.HeadRanking, cs.SafetyReport, cs.SideEffects),
    cs.Mediation,
    *(DoseResponse, cs.Selection, RepairReport, HeadSources, SetControl, RankingAgreement, PoolScores),
    *(cs.Study, cs.Transcripts),
)


class Made(Shown):
    """A result with given rows."""

    def __init__(self, rows: int = 2, text: str = "a") -> None:
        self.rows, self.text = rows, text

    def small_table(self) -> pd.DataFrame:
        return pd.DataFrame({"<name>": [self.text] * self.rows, "value": [np.nan, *[1 / 3] * (self.rows - 1)]})

    def __repr__(self) -> str:
        return f"Made({self.text})"


class Drawn(Made, Plotted):
    """The same with a figure."""

    figure = go.Figure()

    def plot(self) -> go.Figure:
        return self.figure


@pytest.mark.parametrize("result", RESULTS)
def test_every_result_shows_itself(result: type) -> None:
    assert issubclass(result, Shown)
    assert not getattr(result, "__abstractmethods__", None)
    written = inspect.unwrap(result.__repr__).__code__.co_filename
    assert written.endswith(".py"), "a generated repr is no headline"
    assert issubclass(result, Plotted) or result in (cs.Study, cs.Transcripts)


@pytest.mark.parametrize("text", ["<script>x</script>", "a\u202eb", "x" * 5000, "{{ 7 * 7 }}"])
def test_texts_are_escaped_printable_and_short(text: str) -> None:
    page = Made(text=text)._repr_html_()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "x" * 500 not in page
    assert "&lt;name&gt;" in page


def test_numbers_are_rounded_and_what_is_not_known_says_so() -> None:
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", Made(rows=2)._repr_html_())
    assert cells == ["a", "n/a", "a", "0.333"]


def test_a_long_table_is_cut_and_says_so() -> None:
    page = Made(rows=ROWS + 3)._repr_html_()
    assert page.count("<tr>") == ROWS + 1
    assert "3 more rows" in page


def shell(monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> list[object]:
    """Puts a false IPython in the place of the real one; returns what is displayed."""
    shown: list[object] = []
    traits = ("history_manager", "kernel") if kernel else ("history_manager",)
    module, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.get_ipython = lambda: types.SimpleNamespace(has_trait=traits.__contains__)
    display.HTML, display.display = lambda text: ("html", text), shown.append
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_notebook_gets_headline_table_and_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shell(monkeypatch, kernel=True)
    Drawn()._ipython_display_()
    assert [item[0] if isinstance(item, tuple) else item for item in shown] == ["html", Drawn.figure]
    assert "Made(a)" in shown[0][1]


def test_a_result_without_a_figure_shows_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shell(monkeypatch, kernel=True)
    Made()._ipython_display_()
    assert len(shown) == 1


def test_a_terminal_falls_back_to_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shell(monkeypatch, kernel=False)
    with pytest.raises(NotImplementedError):
        Drawn()._ipython_display_()
    sys.modules["IPython"].get_ipython = lambda: None
    with pytest.raises(NotImplementedError):
        Drawn()._ipython_display_()
    assert shown == []


def test_jupyters_shell_has_a_kernel_and_the_terminals_has_none() -> None:
    zmqshell, interactiveshell = (
        pytest.importorskip(name) for name in ("ipykernel.zmqshell", "IPython.core.interactiveshell")
    )
    assert "kernel" in zmqshell.ZMQInteractiveShell.class_traits()
    assert "kernel" not in interactiveshell.InteractiveShell.class_traits()


def test_the_table_of_a_set_counts_every_random_set() -> None:
    drawn = np.arange(6, dtype=np.float32).reshape(3, 2)
    control = SetControl(
        heads=(HeadRef(layer=0, head=1),),
        effects=np.array([2.0, 4.0], np.float32),
        random_layers=drawn,
        random_all=drawn[:2] - 1,
        seed=0,
    )
    table = control.small_table().set_index("kind")
    assert table["sets"].to_dict() == {"chosen": 1, "same layers": 3, "all heads": 2}
    assert table.loc["same layers", "mean"] == pytest.approx(2.5)
    assert table.loc["all heads", "max"] == pytest.approx(1.5)
    assert table.loc["chosen", "mean"] == 3.0
    assert len(control.plot().data) == 2


def test_agreement_is_drawn_as_a_symmetric_matrix() -> None:
    row = {"first": "zero", "second": "mean", "spearman": 0.5, "overlap": 1.0, "count": 1, "n_first": 4, "n_second": 6}
    agreement = RankingAgreement(frame=pd.DataFrame([row]))
    heat = agreement.plot().data[0]
    np.testing.assert_allclose(np.array(heat.z, dtype=float), [[1, 0.5], [0.5, 1]])
    assert "n=4 to 6" in agreement.plot().layout.title.text
    assert repr(agreement) == "RankingAgreement(1 pairs, Spearman 0.50 to 0.50, n=4 to 6)"
