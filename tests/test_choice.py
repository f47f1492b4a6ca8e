from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import random_probe, written

from cliffscope.errors import DataError, ProbeError
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.suppression import Suppression
from cliffscope.model.load import LensModel
from cliffscope.readouts.cliff import Plateau
from cliffscope.readouts.trace import Cliffs, trace_refusal
from cliffscope.selection import choice as selection_module
from cliffscope.selection.choice import Selection, select_by_cliff, select_from_cliffs, select_from_suppression
from cliffscope.transcripts.datasets import read_transcripts
from cliffscope.transcripts.records import Omission, Outcome, Transcripts


@pytest.fixture(scope="module")
def pool() -> Transcripts:
    """Ten transcripts, t0 to t9."""
    found = written(10, harmful=True, outcome=Outcome.COMPLIED)
    return Transcripts(t.replace(id=f"t{i}", extra={"note": i}) for i, t in enumerate(found))


def cliffs_of(values: Sequence[float], *, invalid: Sequence[str] = (), plateau: Plateau = "mean") -> Cliffs:
    """Cliffs of t0, t1, ...; the maximum lies 0.05 above the mean."""
    ids = [f"t{i}" for i in range(len(values))]
    mean = np.array(values) + 0.1
    frame = pd.DataFrame(
        {
            "id": ids,
            "plateau_mean": mean,
            "plateau_max": mean + 0.05,
            "final": 0.1,
            "cliff": values,
            "valid": [i not in invalid for i in ids],
            "reason": ["the probe cannot tell" if i in invalid else "" for i in ids],
        }
    )
    return Cliffs(frame=frame, plateau=plateau)


def ids_of(selection: Selection) -> list[str]:
    return [t.id for t in selection.selected]


def test_the_largest_cliffs_are_chosen_largest_first(pool: Transcripts) -> None:
    values = [0.1, 0.9, 0.3, 0.8, 0.2, -0.5, 0.0, 0.4, 0.7, 0.6]
    found = select_from_cliffs(cliffs_of(values), pool, fraction=0.3)
    assert ids_of(found) == ["t1", "t3", "t8"]
    frame = found.to_frame()
    assert frame["id"].tolist() == ["t1", "t3", "t8", "t9", "t7", "t2", "t4", "t0", "t6", "t5"]
    assert frame["rank"].tolist() == list(range(1, 11))
    assert frame["chosen"].tolist() == [True] * 3 + [False] * 7
    assert frame["cliff"].tolist() == pytest.approx(sorted(values, reverse=True))
    assert list(frame.columns) == ["id", "prompt", "thinking", "answer", "plateau", "final", "cliff", "rank", "chosen"]
    by_id = {t.id: t for t in pool}
    for row in frame.itertuples():
        assert (row.prompt, row.thinking, row.answer) == (
            by_id[row.id].prompt,
            by_id[row.id].thinking,
            by_id[row.id].answer,
        )


def test_ties_are_broken_by_id_whatever_the_order(pool: Transcripts) -> None:
    cliffs = cliffs_of([0.5] * 10)
    shuffled = Cliffs(frame=cliffs.frame.sample(frac=1, random_state=1), plateau="mean")
    backwards = Transcripts(reversed(pool))
    for found in (
        select_from_cliffs(cliffs, pool, fraction=0.4),
        select_from_cliffs(shuffled, backwards, fraction=0.4),
    ):
        assert ids_of(found) == ["t0", "t1", "t2", "t3"]


@pytest.mark.parametrize(
    ("fraction", "n"),
    [(1e-9, 1), (0.017, 1), (0.1, 1), (0.14, 1), (0.16, 2), (0.34, 3), (0.96, 10), (1.0, 10)],
)
def test_the_fraction_is_rounded_to_one_at_least(pool: Transcripts, fraction: float, n: int) -> None:
    assert len(select_from_cliffs(cliffs_of(np.linspace(0, 1, 10)), pool, fraction=fraction).selected) == n


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, 17.0, float("nan"), float("inf")])
def test_a_fraction_outside_its_range_is_refused(pool: Transcripts, fraction: float) -> None:
    with pytest.raises(DataError, match=r"expected a share of the pool in \(0, 1\]"):
        select_from_cliffs(cliffs_of([0.5] * 10), pool, fraction=fraction)


def test_invalid_cliffs_are_never_chosen_and_counted_with_their_reason(pool: Transcripts) -> None:
    values = [0.99, 0.98, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    before = (Omission(stage="trace", reason="too long", id="lost"),)
    found = select_from_cliffs(cliffs_of(values, invalid=["t0", "t1"]), pool, fraction=1.0, omitted=before)
    assert ids_of(found) == ["t9", "t8", "t7", "t6", "t5", "t4", "t3", "t2"]
    assert "t0" not in set(found.frame["id"])
    assert found.pool == 10
    assert found.omitted == (
        *before,
        Omission(stage="select", reason="the probe cannot tell", id="t0"),
        Omission(stage="select", reason="the probe cannot tell", id="t1"),
    )
    assert repr(found) == "Selection(8 of 10, left out 3)"


def test_a_pool_without_a_valid_cliff_gives_nothing_and_a_file_that_can_be_read(
    pool: Transcripts, tmp_path: Path
) -> None:
    found = select_from_cliffs(cliffs_of([np.nan] * 10, invalid=[f"t{i}" for i in range(10)]), pool, fraction=0.5)
    assert len(found.selected) == 0
    assert len(found.omitted) == 10
    assert list(found.to_frame().columns)[:2] == ["id", "prompt"]
    found.to_jsonl(tmp_path / "chosen.jsonl")
    assert (tmp_path / "chosen.jsonl").read_text() == ""
    assert len(found.plot().data) >= 0


def test_cliffs_of_other_transcripts_than_the_pools_are_not_looked_at(pool: Transcripts) -> None:
    found = select_from_cliffs(cliffs_of([0.9, 0.8, 0.7, 0.6], invalid=["t0"]), pool[2:4], fraction=1.0)
    assert ids_of(found) == ["t2", "t3"]
    assert found.pool == 2
    assert found.omitted == ()


@pytest.mark.parametrize(("plateau", "height"), [("mean", 0.6), ("max", 0.65)])
def test_the_plateau_shown_is_the_one_that_was_asked_for(pool: Transcripts, plateau: Plateau, height: float) -> None:
    found = select_from_cliffs(cliffs_of([0.5] * 10, plateau=plateau), pool)
    assert found.frame["plateau"].tolist() == pytest.approx([height] * 10)


def test_the_chosen_are_written_as_jsonl_that_reads_back_as_they_were(pool: Transcripts, tmp_path: Path) -> None:
    found = select_from_cliffs(cliffs_of(np.linspace(0, 1, 10)), pool, fraction=0.3)
    found.to_jsonl(tmp_path / "chosen.jsonl")
    assert list(read_transcripts(tmp_path / "chosen.jsonl")) == list(found.selected) == [pool[9], pool[8], pool[7]]


def test_the_selection_plots_itself_and_its_frame_is_a_copy(pool: Transcripts) -> None:
    found = select_from_cliffs(cliffs_of(np.linspace(0, 1, 10)), pool, fraction=0.3)
    assert len(found.plot().data) > 0
    copy = found.to_frame()
    copy["cliff"] = 0.0
    assert found.frame["cliff"].max() == 1.0


def test_a_pool_is_traced_and_the_largest_traced_cliff_chosen(llama: LensModel, pool: Transcripts) -> None:
    probe = random_probe(llama, 4)
    cliffs = trace_refusal(llama, probe, pool).cliffs(plateau="max").to_frame()
    found = select_by_cliff(llama, probe, pool, fraction=0.2, plateau="max")
    assert ids_of(found) == cliffs.sort_values("cliff", ascending=False)["id"].head(2).tolist()
    np.testing.assert_array_equal(found.frame["plateau"] - found.frame["final"], found.frame["cliff"])


def test_what_cannot_be_traced_is_counted(llama: LensModel, pool: Transcripts) -> None:
    given = Transcripts(
        t.replace(thinking=None) if t.id == "t3" else t.replace(thinking="", thinking_ids=None) if t.id == "t4" else t
        for t in pool
    )
    found = select_by_cliff(llama, random_probe(llama, 4), given, fraction=1.0)
    assert set(ids_of(found)) == {f"t{i}" for i in range(10)} - {"t3", "t4"}
    assert found.pool == 10
    assert sorted(o.id for o in found.omitted) == ["t3", "t4"]


def test_a_probe_that_cannot_tell_chooses_nothing(llama: LensModel, pool: Transcripts) -> None:
    found = select_by_cliff(llama, random_probe(llama, 4, late_low=0.5), pool, fraction=1.0)
    assert len(found.selected) == 0
    assert {o.reason.split(":")[0] for o in found.omitted} == {"the probe cannot tell at late thinking"}


def test_a_wrong_fraction_is_refused_before_the_pool_is_traced(
    llama: LensModel, pool: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*args: object, **options: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(selection_module, "trace_refusal", trace)
    with pytest.raises(DataError, match="fraction"):
        select_by_cliff(llama, random_probe(llama, 4), pool, fraction=1.7)


def test_a_probe_of_another_width_is_refused(models: dict[str, LensModel], pool: Transcripts) -> None:
    other = random_probe(models["llama"], 7)
    with pytest.raises(ProbeError, match="layer 7"):
        select_by_cliff(models["qwen3"], other, pool)


def test_harmless_and_refused_ones_are_counted_and_not_traced(llama: LensModel, pool: Transcripts) -> None:
    changes = {"t0": {"harmful": False}, "t1": {"outcome": Outcome.REFUSED}, "t2": {"outcome": Outcome.UNFINISHED}}
    unlabelled = {"t3": {"harmful": None, "outcome": Outcome.UNJUDGED}}
    given = pool.map(lambda t: t.replace(**(changes | unlabelled).get(t.id, {})))
    found = select_by_cliff(llama, random_probe(llama, 4), given, fraction=1.0)
    assert set(ids_of(found)) == {f"t{i}" for i in range(3, 10)}
    assert found.pool == 7
    assert [(o.id, o.stage, o.reason) for o in found.omitted] == [
        *(("t0", "select", "harmless"), ("t1", "select", "refused"), ("t2", "select", "unfinished"))
    ]
    with pytest.raises(DataError, match="None of the 3 transcripts of the pool is a candidate"):
        select_by_cliff(llama, random_probe(llama, 4), given[:3])


def test_thinking_that_never_closed_is_counted_and_not_chosen(llama: LensModel, pool: Transcripts) -> None:
    open_one = pool.map(lambda t: t.replace(closed=t.id != "t3"))
    found = select_by_cliff(llama, random_probe(llama, 4), open_one, fraction=1.0, criterion="random")
    assert "t3" not in ids_of(found)
    assert Omission(stage="select", reason="thinking never closed", id="t3") in found.omitted
    assert found.pool == 9


def suppression_of(effects: dict[str, float]) -> Suppression:
    """Suppression of these transcripts, from unedited logits of -1."""
    unedited = np.full(len(effects), -1, np.float32)
    return Suppression(
        ids=tuple(effects),
        groups=("harmful, complied",) * len(effects),
        edit=zero([HeadRef(layer=0, head=0)], scope="closing"),
        unedited=unedited,
        edited=unedited + np.array(list(effects.values()), np.float32),
        random_same_layers=np.zeros((0, len(effects)), np.float32),
        random_all_layers=np.zeros((0, len(effects)), np.float32),
        readout="answer",
        refused_logit=3.0,
        can_tell=True,
        seed=0,
        path="packed",
    )


def test_the_largest_suppression_is_chosen_without_a_probe(pool: Transcripts) -> None:
    effects = {f"t{i}": effect for i, effect in enumerate([0.5, 3.0, -1.0, 2.0, 0.0])}
    chosen = select_from_suppression(suppression_of(effects), pool, number=2)
    assert ids_of(chosen) == ["t1", "t3"]
    assert chosen.criterion == "suppression"
    assert chosen.to_frame()["id"].tolist() == ["t1", "t3", "t0", "t4", "t2"]
    assert chosen.to_frame()[["plateau", "final", "cliff"]].isna().all(axis=None)
    assert (chosen.pool, len(chosen.omitted)) == (5, 5)
    assert {o.reason for o in chosen.omitted} == {"suppression not measured"}
    assert "No transcript has both" in chosen.plot().layout.annotations[0].text


def test_only_candidates_whose_suppression_was_measured_are_chosen(pool: Transcripts) -> None:
    measured = suppression_of({"t0": 1.0, "t1": 5.0})
    refused = Transcripts(t.replace(outcome=Outcome.REFUSED) if t.id == "t1" else t for t in pool)
    assert ids_of(select_from_suppression(measured, refused, fraction=1.0)) == ["t0"]
    with pytest.raises(DataError, match="measured"):
        select_from_suppression(measured, pool[2:])
    with pytest.raises(DataError, match="needs the column 'suppression'"):
        select_from_cliffs(cliffs_of([0.1, 0.2]), pool, criterion="suppression")
