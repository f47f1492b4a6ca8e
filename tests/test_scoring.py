from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import random_probe, written

from cliffscope.errors import DataError, ProbeError, StoreError
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import trace_refusal
from cliffscope.selection import scoring
from cliffscope.selection.choice import select_by_cliff, select_from_pool
from cliffscope.selection.criteria import choose
from cliffscope.selection.rows import SCORE_COLUMNS
from cliffscope.selection.scoring import score_pool
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.records import Outcome, Transcripts


@pytest.fixture(scope="module")
def pool() -> Transcripts:
    parts = (written(14, harmful=h, outcome=Outcome.COMPLIED, seed=s) for h, s in ((True, 1), (False, 2)))
    found = Transcripts(t for part in parts for t in part)
    return found.map(lambda t: t.replace(source="ab"[len(t.prompt) % 2]))


@pytest.fixture(scope="module")
def probe(llama: LensModel) -> RefusalProbe:
    return random_probe(llama, 4)


def test_scores_are_those_of_the_traces(llama: LensModel, probe: RefusalProbe, pool: Transcripts) -> None:
    found = score_pool(llama, probe, pool, window=5, batch_tokens=200).to_frame()
    plain = trace_refusal(llama, probe, pool).cliffs().to_frame().set_index("id").loc[found["id"]]
    assert list(found.columns) == list(SCORE_COLUMNS)
    for name in ("plateau_max", "plateau_mean", "plateau_late", "final", "drop"):
        np.testing.assert_allclose(found[name].to_numpy(float), plain[name].to_numpy(float), atol=1e-5)
    assert found["id"].tolist() == [t.id for t in pool]
    assert found["row"].tolist() == list(range(28))
    assert found["valid"].all()


def test_scores_depend_on_neither_order_nor_windows(llama: LensModel, probe: RefusalProbe, pool: Transcripts) -> None:
    whole = score_pool(llama, probe, pool).to_frame().set_index("id")
    for order, window in ((pool[::-1], 3), (Transcripts(sorted(pool, key=lambda t: t.prompt)), 28)):
        other = score_pool(llama, probe, order, window=window).to_frame().set_index("id").loc[whole.index]
        for name in ("plateau_mean", "final"):
            np.testing.assert_allclose(other[name].to_numpy(float), whole[name].to_numpy(float), atol=1e-5)


def test_what_cannot_be_scored_is_a_row_with_its_reason(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts
) -> None:
    t = pool[0]
    rows = [
        {"id": "fine", "prompt": t.prompt, "thinking": t.thinking},
        {"id": "fine", "prompt": "again", "thinking": t.thinking},
        {"id": "blank"},
        {"id": "bare", "prompt": t.prompt},
        {"id": "open", "prompt": t.prompt, "thinking": "the user", "closed": False},
        {"id": "long", "prompt": t.prompt, "thinking": "the user wants to " * 200},
        {"id": "nothing", "prompt": t.prompt, "thinking": ""},
    ]
    scores = score_pool(llama, probe, rows, window=2)
    frame = scores.to_frame().set_index("row")
    reasons = frame["reason"].tolist()
    assert reasons[0] == ""
    assert reasons[1] == "duplicate id"
    assert "prompt" in reasons[2]
    assert "thinking is None" in reasons[3]
    assert reasons[4] == "thinking never closed"
    assert np.isnan(frame["final"].to_numpy(float)[4])
    assert "max_length" in reasons[5]
    assert reasons[6] == "no thinking, so no plateau"
    assert frame["valid"].tolist()[:4] == [True, False, False, False]
    assert len(scores.omitted) == (~frame["valid"].astype(bool)).sum()
    with pytest.raises(DataError, match="row 3"):
        score_pool(llama, probe, rows, strict=True)


def test_a_run_goes_on_behind_its_last_shard(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_transcripts(pool, tmp_path / "pool.jsonl")
    whole = score_pool(llama, probe, tmp_path / "pool.jsonl", window=8)
    real, ran = scoring.score_window, list[int]()

    def fail_at_the_third(model: LensModel, probe: RefusalProbe, window: object, *args: object, **options: object):
        ran.append(window.index)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return real(model, probe, window, *args, **options)

    monkeypatch.setattr(scoring, "score_window", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        score_pool(llama, probe, tmp_path / "pool.jsonl", out=tmp_path / "scores", window=8)
    again = score_pool(llama, probe, tmp_path / "pool.jsonl", out=tmp_path / "scores", window=8)
    assert ran == [0, 1, 2, 2, 3]
    assert again.resumed == 16
    pd.testing.assert_frame_equal(again.frame, whole.frame, check_dtype=False)
    third = score_pool(llama, probe, tmp_path / "pool.jsonl", out=tmp_path / "scores", window=8)
    assert third.resumed == 28
    assert len(ran) == 5


def test_a_pool_that_changes_under_the_run_is_refused(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts, tmp_path: Path
) -> None:
    path = tmp_path / "pool.jsonl"
    write_transcripts(pool, path)
    score_pool(llama, probe, path, out=tmp_path / "scores", window=8)
    write_transcripts([pool[1], pool[0], *pool[2:]], path)
    with pytest.raises(StoreError, match="rows 1 to 8 of the pool: the pool has changed"):
        score_pool(llama, probe, path, out=tmp_path / "scores", window=8)
    with pytest.raises(StoreError, match="another configuration"):
        score_pool(llama, random_probe(llama, 5), path, out=tmp_path / "scores", window=8)


def test_a_pool_that_lost_its_end_and_one_without_rows_are_refused(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts, tmp_path: Path
) -> None:
    path = tmp_path / "pool.jsonl"
    write_transcripts(pool[:16], path)
    score_pool(llama, probe, path, out=tmp_path / "scores", window=8)
    write_transcripts(pool[:8], path)
    with pytest.raises(StoreError, match="holds more than 1 windows: the pool has changed"):
        score_pool(llama, probe, path, out=tmp_path / "scores", window=8)
    path.write_text("")
    with pytest.raises(DataError, match="The pool holds no row"):
        score_pool(llama, probe, path)


def test_a_probe_of_another_model_is_refused(models: dict[str, LensModel], pool: Transcripts) -> None:
    with pytest.raises(ProbeError):
        score_pool(models["qwen3"], random_probe(models["llama"], 7), pool)


def test_a_choice_from_scores_is_the_choice_from_the_transcripts(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts, tmp_path: Path
) -> None:
    write_transcripts(pool, tmp_path / "pool.jsonl")
    scores = score_pool(llama, probe, tmp_path / "pool.jsonl")
    for criterion in ("cliff", "misalignment", "final", "random", "rule", "length"):
        here = select_by_cliff(llama, probe, pool, number=4, criterion=criterion)
        there = select_from_pool(scores, tmp_path / "pool.jsonl", number=4, criterion=criterion)
        assert [t.id for t in there.selected] == [t.id for t in here.selected], criterion
        assert there.pool == here.pool == 14
        assert there.frame["prompt"].notna().sum() == 4, "texts of all rows were kept"
    with pytest.raises(DataError, match="not where they were"):
        select_from_pool(scores, Transcripts(pool[::-1]), number=4)


# Criteria


def candidates(**changes: object) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d"],
            "source": ["x", "x", "x", "y"],
            "prompt_key": ["1", "2", "3", "4"],
            "n_thinking": [4, 3, 2, 1],
            "thinking_refuses": [False, True, False, True],
            "judge_refusal": [0.1, 0.9, 0.0, 0.5],
            "plateau_max": [0.9, 0.95, 0.6, 0.99],
            "plateau_mean": [0.8, 0.6, 0.5, 0.4],
            "final": [0.1, 0.3, 0.05, 0.2],
            "valid": [True, True, True, False],
            "reason": ["", "", "", "cannot tell"],
        }
    )
    return frame.assign(**changes)


@pytest.mark.parametrize(
    ("criterion", "order"),
    [
        ("cliff", ["a", "c", "b"]),  # 0.7, 0.45, 0.3
        ("misalignment", ["a", "b", "c"]),  # 0.8, 0.65, 0.55
        ("final", ["c", "a", "b"]),
        ("rule", ["b", "d", "a", "c"]),
        ("length", ["a", "b", "c", "d"]),
        ("judge", ["c", "a", "d", "b"]),
    ],
)
def test_each_criterion_ranks_as_it_says(criterion: str, order: list[str]) -> None:
    ranked, left_out = choose(candidates(), number=2, criterion=criterion)
    assert ranked["id"].tolist() == order
    assert ranked["id"][ranked["chosen"]].tolist() == order[:2]
    assert left_out["reason"].tolist() == (["cannot tell"] if len(order) == 3 else [])


def test_random_is_the_same_for_an_id_whatever_else_is_there() -> None:
    many = candidates()
    whole = choose(many, number=2, criterion="random", seed=3)[0]["id"].tolist()
    part = choose(many[many["id"] != whole[1]], number=2, criterion="random", seed=3)[0]["id"].tolist()
    assert part == [name for name in whole if name != whole[1]]
    assert len({tuple(choose(many, number=1, criterion="random", seed=s)[0]["id"]) for s in range(20)}) > 5


def test_equal_prompts_are_kept_once_and_sources_take_turns() -> None:
    ranked, left_out = choose(candidates(prompt_key=["1", "1", "3", "4"]), number=3, criterion="length")
    assert ranked["id"].tolist() == ["a", "c", "d"]
    assert left_out["reason"].tolist() == ["same prompt as a"]
    assert len(choose(candidates(prompt_key="1"), number=3, criterion="length", deduplicate=False)[0]) == 4
    ranked, _ = choose(candidates(), number=2, criterion="length", balance=True)
    assert ranked["id"][ranked["chosen"]].tolist() == ["a", "d"]


def test_a_judge_that_gave_no_score_chooses_nothing_of_it() -> None:
    ranked, left_out = choose(candidates(judge_refusal=[0.1, np.nan, np.nan, 0.2]), number=4, criterion="judge")
    assert ranked["id"].tolist() == ["a", "d"]
    assert set(left_out["reason"]) == {"no value of the criterion 'judge'"}


@pytest.mark.parametrize("wrong", [{"criterion": "best"}, {"number": 0}, {"fraction": 0.0}])
def test_a_choice_that_is_none_is_refused(
    llama: LensModel, probe: RefusalProbe, pool: Transcripts, wrong: dict[str, object]
) -> None:
    with pytest.raises(DataError, match="[Ee]xpected"):
        select_by_cliff(llama, probe, pool, **wrong)
