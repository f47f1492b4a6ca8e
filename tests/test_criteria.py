"""A criterion declares what it reads, is checked when it is made and when it is used, and is found by name."""

from collections.abc import Callable
from importlib.metadata import EntryPoint

import numpy as np
import pandas as pd
import pytest
from conftest import check_documented

from cliffscope import registry
from cliffscope.cli import training
from cliffscope.errors import DataError
from cliffscope.selection.criteria import CANDIDATE_COLUMNS, CRITERIA, TRACE_COLUMNS, Criterion, choose

TABLE = pd.DataFrame(
    {
        "id": ["a", "b", "c"],
        "source": ["x", "x", "y"],
        "prompt_key": ["1", "2", "3"],
        "n_thinking": [3, 1, 2],
        "thinking_refuses": [False, True, False],
        "judge_refusal": [0.1, 0.9, float("nan")],
        "plateau_max": [0.9, 0.95, 0.6],
        "plateau_mean": [0.8, 0.6, 0.5],
        "final": [0.1, 0.3, 0.05],
        "suppression": [0.5, -1.0, 2.0],
        "valid": [True, True, False],
        "reason": ["", "", "cannot tell"],
    }
)


def make(
    values: Callable[[pd.DataFrame], object] = lambda table: -table["n_thinking"],
    *,
    columns: tuple[str, ...] = ("n_thinking",),
    needs_trace: bool = False,
    name: str = "shortest",
    summary: str = "the shortest thinking",
) -> Criterion:
    return Criterion(name=name, summary=summary, columns=columns, values=values, needs_trace=needs_trace)


def ids(ranked: pd.DataFrame) -> list[str]:
    return ranked["id"].tolist()


def test_a_criterion_of_the_users_own_ranks_like_a_built_in_one() -> None:
    ranked, left_out = choose(TABLE, number=1, criterion=make())
    assert ids(ranked) == ["b", "c", "a"]
    assert ids(ranked[ranked["chosen"]]) == ["b"]
    assert left_out.empty


def test_one_that_needs_a_trace_ranks_valid_candidates_alone() -> None:
    lowest = make(lambda table: -table["final"], columns=("final",), needs_trace=True)
    ranked, left_out = choose(TABLE, number=3, criterion=lowest)
    assert ids(ranked) == ["a", "b"]
    assert left_out[["id", "reason"]].to_numpy().tolist() == [["c", "cannot tell"]]


def test_a_candidate_without_a_value_is_left_out_with_the_criterions_name() -> None:
    ranked, left_out = choose(TABLE, number=3, criterion=make(lambda table: [1.0, float("nan"), 2.0]))
    assert ids(ranked) == ["c", "a"]
    assert left_out["reason"].tolist() == ["no value of the criterion 'shortest'"]


def test_values_in_another_order_belong_to_their_own_rows() -> None:
    ranked, _ = choose(TABLE, number=3, criterion=make(lambda table: table["n_thinking"].sort_values()))
    assert ids(ranked) == ["a", "c", "b"]


def test_derived_columns_are_the_callers_plateau_and_a_draw_of_the_seed() -> None:
    seen: list[pd.DataFrame] = []
    columns = tuple(CANDIDATE_COLUMNS)
    watcher = make(lambda table: seen.append(table) or table["draw"], columns=columns, needs_trace=True)
    choose(TABLE, number=1, criterion=watcher, plateau="max", seed=3)
    choose(TABLE, number=1, criterion=watcher, plateau="mean", seed=4)
    assert seen[0].columns.tolist() == list(columns)
    assert seen[0]["plateau"].tolist() == [0.9, 0.95, 0.6]
    assert seen[1]["cliff"].tolist() == pytest.approx([0.7, 0.3, 0.45])
    assert seen[0]["draw"].between(0, 1).all()
    assert set(seen[0]["draw"]).isdisjoint(seen[1]["draw"])


def test_a_criterion_cannot_change_the_table() -> None:
    def spoil(table: pd.DataFrame) -> pd.Series:
        table["n_thinking"] = 0
        return table["n_thinking"]

    ranked, _ = choose(TABLE, number=1, criterion=make(spoil))
    assert ranked["n_thinking"].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "expected text for both"),
        ({"summary": ""}, "expected text for both"),
        ({"columns": ("thinking",)}, r"reads the column 'thinking'\. Expected columns among id, source"),
        ({"columns": ("cliff",)}, r"reads 'cliff', which means nothing .* needs_trace=True"),
    ],
)
def test_a_declaration_that_cannot_hold_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda table: table["source"], "'source', which is not among its columns"),
        (lambda table: table["n_thinking"].astype(str) + "x", "values that are not numbers"),
        (lambda table: table["n_thinking"][:2], r"values of shape \(2,\) for 3 candidates"),
        (lambda table: 1.0, r"values of shape \(\) for 3 candidates"),
        (lambda table: np.ones((3, 2)), r"values of shape \(3, 2\)"),
    ],
)
def test_values_that_are_not_one_number_a_candidate_are_refused(
    values: Callable[[pd.DataFrame], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose(TABLE, number=1, criterion=make(values))


def test_a_column_that_the_table_lacks_is_named() -> None:
    with pytest.raises(DataError, match="needs the column 'n_thinking', which the table lacks"):
        make().rank_values(TABLE[["id"]])


def test_an_entry_point_of_another_package_is_a_criterion_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        assert group == "cliffscope.criteria"
        return [EntryPoint("theirs", f"{__name__}:THEIRS", group)]

    monkeypatch.setattr(registry, "entry_points", points)
    assert CRITERIA.names()[-1] == "theirs"
    assert ids(choose(TABLE, number=1, criterion="theirs")[0]) == ["b", "c", "a"]
    with pytest.raises(
        DataError, match=r"no criterion 'best'\. Expected one of cliff, .*theirs, or package\.module:name"
    ):
        choose(TABLE, number=1, criterion="best")


THEIRS = make(name="theirs")


def test_criteria_are_registered_under_their_own_names_and_read_trace_columns_only_with_a_trace() -> None:
    for name, criterion in CRITERIA:
        assert criterion.name == name
        assert criterion.needs_trace == bool(set(criterion.columns) & set(TRACE_COLUMNS))


def test_the_documented_criteria_and_columns_are_those_of_the_code() -> None:
    rows = [f"| `{c.name}` | {c.summary} | {'yes' if c.needs_trace else 'no'} |" for _, c in CRITERIA]
    head = "| criterion | chooses first | needs a probe that can tell |\n|---|---|---|\n"
    check_documented("criteria", head + "\n".join(rows) + "\n", page_name="guide/selection.md")
    columns = [f"| `{name}` | {meaning} |" for name, meaning in CANDIDATE_COLUMNS.items()]
    table = "| column | meaning |\n|---|---|\n" + "\n".join(columns) + "\n"
    check_documented("candidate columns", table, page_name="guide/selection.md")


def test_the_help_of_select_names_every_criterion() -> None:
    option = training.CriterionOption.__metadata__[0]
    assert option.help.split(", or ")[0].split(", ") == list(dict(CRITERIA))
