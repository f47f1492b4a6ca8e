"""What stages hand to the runner, as tables and facts."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import random_probe, written

from cliffscope.heads.controls import SetControl, control_sets
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.ranking import HeadRanking, rank_heads
from cliffscope.model.load import LensModel
from cliffscope.readouts.trace import trace_refusal
from cliffscope.study.manifest import library_versions
from cliffscope.study.stages import STAGES
from cliffscope.study.stages.safety import forced_note
from cliffscope.study.stages.suppression import suppression_facts
from cliffscope.study.stages.traces import held_out_first, layer_table
from cliffscope.study.stages.transcripts import count_outcomes, transcript_table
from cliffscope.transcripts.records import FORCED, Outcome, Split, Transcripts


@pytest.fixture(scope="module")
def complied_harmful() -> Transcripts:
    return written(4, harmful=True, outcome=Outcome.COMPLIED)


@pytest.fixture(scope="module")
def ranked(llama: LensModel, complied_harmful: Transcripts) -> tuple[HeadRanking, SetControl]:
    probe = random_probe(llama, 5)
    ranking = rank_heads(llama, probe, complied_harmful)
    return ranking, control_sets(llama, probe, complied_harmful, ranking.top(0.03), draws=3)


def test_layer_traces_have_a_row_for_each_layer_and_position_of_the_transcripts_asked_for(
    llama: LensModel, complied_harmful: Transcripts
) -> None:
    probe = random_probe(llama, 5)
    wanted = [complied_harmful[0].id, complied_harmful[2].id]
    traces = trace_refusal(llama, probe, complied_harmful, layers_of=wanted)
    frame = layer_table(traces)
    assert list(frame.columns) == ["id", "position", "layer", "score"]
    assert frame["id"].unique().tolist() == wanted
    for name, part in frame.groupby("id"):
        i = [row.id for row in traces.tokens].index(name)
        assert len(part) == 8 * traces.tokens[i].n_pos
        assert not part.duplicated(["position", "layer"]).any()
        own = part[part["layer"] == probe.layer].sort_values("position")
        np.testing.assert_array_equal(own["position"], np.arange(traces.tokens[i].n_pos))
        np.testing.assert_allclose(own["score"], traces.scores()[i], atol=1e-5)


def test_without_layers_the_table_is_empty_and_has_its_columns(llama: LensModel, complied_harmful: Transcripts) -> None:
    frame = layer_table(trace_refusal(llama, random_probe(llama, 5), complied_harmful))
    assert len(frame) == 0
    assert list(frame.columns) == ["id", "position", "layer", "score"]


def test_the_facts_of_a_set_are_json_and_say_what_the_objects_say(
    ranked: tuple[HeadRanking, SetControl],
) -> None:
    ranking, control = ranked
    unedited = np.full(4, -1.0, np.float32)
    facts = suppression_facts(control, fraction=0.03, confirmed=1, unedited=unedited, refused=3.0)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["n"] == 4
    assert facts["selected"] == [str(h) for h in ranking.top(0.03)]
    assert facts["top_fraction"] == 0.03
    assert facts["effect"] == pytest.approx(float(control.effects.mean()))
    assert facts["effect_low"] <= facts["effect"] <= facts["effect_high"]
    assert len(facts["random_sets"]) == 6
    assert facts["p"] == control.p == max(control.p_by_kind.values())
    assert facts["restored"] == pytest.approx(control.effect / 4.0)


def control_of(effect: float, random: list[float]) -> SetControl:
    draws = np.array(random, np.float32)[:, None] * np.ones((1, 4), np.float32)
    return SetControl(
        heads=(HeadRef(layer=0, head=0),),
        effects=np.full(4, effect, np.float32),
        random_layers=draws[:1],
        random_all=draws[1:],
        seed=0,
    )


@pytest.mark.parametrize(
    ("effect", "random", "significant", "beats"),
    [
        (5.0, [1.0, 2.0, 4.9], True, True),
        (5.0, [1.0, 2.0, 5.1], True, False),
        (5.0, [1.0, 5.0, 2.0], True, False),
        (5.0, [1.0, 2.0, 3.0], False, False),
    ],
)
def test_heads_beat_random_sets_only_above_all_of_them_and_with_a_significant_head(
    effect: float, random: list[float], significant: bool, beats: bool
) -> None:
    facts = suppression_facts(
        control_of(effect, random),
        fraction=0.03,
        confirmed=int(significant),
        unedited=np.zeros(4, np.float32),
        refused=4.0,
    )
    assert facts["beats_random"] is beats


def test_transcripts_are_counted_by_outcome_and_by_harmfulness(complied_harmful: Transcripts) -> None:
    group = written(3, harmful=False, outcome=Outcome.REFUSED) + complied_harmful
    group = group + Transcripts(
        t.replace(id=f"x{i}", harmful=None, outcome=o)
        for i, (t, o) in enumerate(zip(complied_harmful, [Outcome.UNFINISHED, Outcome.UNJUDGED], strict=False))
    )
    found = count_outcomes(group)
    assert {k: v for k, v in found.items() if k != "by"} == {
        **{"transcripts": 9, "refused": 3, "complied": 4, "unfinished": 1, "unjudged": 1}
    }
    assert sorted((row["group"], row["outcome"], row["n"]) for row in found["by"]) == [
        ("harmful", "complied", 4),
        ("harmless", "refused", 3),
        ("unlabelled", "unfinished", 1),
        ("unlabelled", "unjudged", 1),
    ]
    json.dumps(found, allow_nan=False)


def test_no_transcripts_are_counted_as_none() -> None:
    found = count_outcomes(Transcripts())
    assert found["transcripts"] == 0
    assert found["by"] == []


def test_the_transcript_table_has_splits_and_counts_generated_tokens(complied_harmful: Transcripts) -> None:
    group = Transcripts(
        [
            complied_harmful[0].replace(thinking_ids=(1, 2, 3), answer_ids=(4, 5)),
            complied_harmful[1].replace(harmful=None),
        ]
    )
    frame = transcript_table(group, {group[0].id: Split.FIT, group[1].id: Split.TEST})
    assert set(frame.columns) == {
        *("id", "split", "harmful", "outcome", "source", "prompt", "thinking", "answer", "n_pos")
    }
    assert frame["split"].tolist() == ["fit", "test"]
    assert frame["n_pos"].tolist() == [5, 0]
    assert frame["outcome"].tolist() == ["complied", "complied"]
    assert frame["prompt"].tolist() == [t.prompt for t in group]
    assert frame["harmful"].tolist() == [True, None]


def test_the_transcript_table_survives_parquet(
    complied_harmful: Transcripts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    group = Transcripts([*complied_harmful[:2], complied_harmful[2].replace(harmful=None, thinking=None, answer=None)])
    frame = transcript_table(group, {t.id: Split.FIT for t in group})
    path = tmp_path_factory.mktemp("frame") / "a.parquet"
    frame.to_parquet(path, index=False)
    found = pd.read_parquet(path)
    assert found["harmful"].tolist() == [True, True, None]
    assert found["answer"].isna().tolist() == [False, False, True]


def test_versions_name_what_numbers_depend_on() -> None:
    found = library_versions()
    assert {"python", "torch", "transformers", "transformer-lens", "numpy", "scikit-learn"} == set(found)
    assert all(v[0].isdigit() for v in found.values())


def test_held_out_transcripts_are_shown_before_those_that_were_fitted_on() -> None:
    cliffs = pd.DataFrame({"id": list("abcde"), "split": ["fit", "test", "validate", "test", "fit"]})
    assert held_out_first(cliffs, ["d"]) == ["d", "b", "a", "c", "e"]


def test_what_a_stage_needs_comes_before_it_and_no_artefact_has_two_makers() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(names[:place]), stage.name
    makers: dict[str, list[str]] = {}
    for stage in STAGES:
        for artefact in stage.makes:
            makers.setdefault(artefact.file, []).append(stage.name)
    assert {file for file, stages in makers.items() if len(stages) > 1} <= {"arm-*.log"}


def test_many_forced_closings_are_noted_with_the_budget_to_raise(complied_harmful: Transcripts) -> None:
    def forced(n: int) -> Transcripts:
        return Transcripts(complied_harmful[0].replace(id=str(i), extra={FORCED: i < n}) for i in range(40))

    assert forced_note(forced(4), 96) == ()
    (note,) = forced_note(forced(5), 96)
    assert "5 of 40 test transcripts" in note
    assert "96 tokens. Raise max_thinking" in note
    assert forced_note(Transcripts(), 96) == ()
