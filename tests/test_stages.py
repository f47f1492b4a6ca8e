"""What stages hand to the runner, as tables and facts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import random_probe, written

from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.suppression import Suppression, measure_suppression
from cliffscope.model.load import LensModel
from cliffscope.progress import silent
from cliffscope.readouts.trace import trace_refusal
from cliffscope.store import RunStore
from cliffscope.study.artefacts import TRANSCRIPT_TABLE, TRANSCRIPTS
from cliffscope.study.claims import SuppressionClaim
from cliffscope.study.config import StudyConfig
from cliffscope.study.manifest import library_versions
from cliffscope.study.stages import STAGES, Workspace
from cliffscope.study.stages.base import CUT_OFF
from cliffscope.study.stages.suppression import suppression_facts
from cliffscope.study.stages.traces import held_out_first, layer_table
from cliffscope.study.stages.transcripts import count_outcomes, transcript_table
from cliffscope.transcripts.records import FORCED, Outcome, Split, Transcripts


@pytest.fixture(scope="module")
def complied_harmful() -> Transcripts:
    return written(4, harmful=True, outcome=Outcome.COMPLIED)


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


@pytest.fixture(scope="module")
def measured(llama: LensModel, complied_harmful: Transcripts) -> Suppression:
    edit = zero([HeadRef(layer=1, head=2), HeadRef(layer=3, head=0)], scope="closing")
    read = measure_suppression(llama, random_probe(llama, 5), complied_harmful, edit, controls=3)
    return replace(read, refused_logit=float(read.unedited.mean()) + 4.0)


def test_the_facts_of_a_set_are_json_and_say_what_the_objects_say(measured: Suppression) -> None:
    facts = suppression_facts(measured, fraction=0.03)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["n"] == 4
    assert facts["selected"] == ["L1H2", "L3H0"]
    assert facts["top_fraction"] == 0.03
    assert facts["effect"] == pytest.approx(float(measured.effects.mean()))
    assert facts["effect_low"] <= facts["effect"] <= facts["effect_high"]
    assert len(facts["random_sets"]) == 6
    assert facts["sets_by_kind"] == {"same layers": 3, "all layers": 3}
    assert facts["p_by_kind"] == dict(measured.p)
    assert facts["p"] == max(measured.p.values())
    assert facts["restored"] == pytest.approx(measured.effect / 4.0)
    assert facts["why"] == SuppressionClaim.of(facts).why


def test_the_facts_of_a_set_without_random_sets_have_no_p(measured: Suppression) -> None:
    nothing = np.zeros((0, measured.n), np.float32)
    facts = suppression_facts(replace(measured, random_same_layers=nothing, random_all_layers=nothing), fraction=0.03)
    assert np.isnan(facts["p"])
    assert facts["sets_by_kind"] == {}
    assert facts["why"]


def test_forced_closings_are_counted_by_group_and_stand_in_the_table(complied_harmful: Transcripts) -> None:
    group = Transcripts(t.replace(extra={**t.extra, FORCED: i < 3}) for i, t in enumerate(complied_harmful))
    found = count_outcomes(group)
    assert found["forced"] == 3
    assert found["by"] == [{"group": "harmful", "outcome": "complied", "n": 4, "forced": 3}]
    frame = transcript_table(group, {t.id: Split.TEST for t in group})
    assert frame["forced"].tolist() == [True, True, True, False]


def test_no_claim_rests_on_thinking_that_was_closed_at_its_budget(
    llama: LensModel, complied_harmful: Transcripts, tmp_path: Path
) -> None:
    group = Transcripts(t.replace(extra={**t.extra, FORCED: i == 1}) for i, t in enumerate(complied_harmful))
    work = Workspace(config=StudyConfig(model="x", out="y"), store=RunStore(path=tmp_path), progress=silent)
    TRANSCRIPTS.write(work.store, group)
    TRANSCRIPT_TABLE.write(work.store, transcript_table(group, {t.id: Split.TEST for t in group}))
    cut = group[1].id
    assert cut not in {t.id for t in work.closed}
    assert cut in {t.id for t in work.part(Split.TEST)}
    assert [t.id for t in work.part(Split.TEST, forced=False)] == [t.id for t in group if t.id != cut]
    assert [(o.id, o.reason) for o in work.left_open] == [(cut, CUT_OFF)]
    cliffs = trace_refusal(llama, random_probe(llama, 5), group).cliffs().to_frame().set_index("id")
    assert not cliffs.loc[cut, "valid"]
    assert cliffs.loc[cut, "reason"] == "the thinking was closed at its budget"
    assert cliffs.drop(index=cut)["valid"].all()


def test_transcripts_are_counted_by_outcome_and_by_harmfulness(complied_harmful: Transcripts) -> None:
    group = written(3, harmful=False, outcome=Outcome.REFUSED) + complied_harmful
    group = group + Transcripts(
        t.replace(id=f"x{i}", harmful=None, outcome=o)
        for i, (t, o) in enumerate(zip(complied_harmful, [Outcome.UNFINISHED, Outcome.UNJUDGED], strict=False))
    )
    found = count_outcomes(group)
    assert {k: v for k, v in found.items() if k != "by"} == {
        **{"transcripts": 9, "refused": 3, "complied": 4, "unfinished": 1, "unjudged": 1, "forced": 0}
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
        *("id", "split", "harmful", "outcome", "source", "prompt", "thinking", "answer", "n_pos", "forced")
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
