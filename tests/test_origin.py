"""Whatever was made with one model is refused on another, and noted where that is allowed by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeCheckpoint, answer_readout, random_probe, written
from transformers import PreTrainedModel

from cliffscope.errors import OtherModelError
from cliffscope.evaluation.dose import dose_response
from cliffscope.evaluation.mediation import measure_mediation
from cliffscope.evaluation.safety import evaluate_safety
from cliffscope.evaluation.side_effects import measure_side_effects
from cliffscope.generation.rollout import roll_out
from cliffscope.heads.confirmation import confirm_heads
from cliffscope.heads.controls import control_sets
from cliffscope.heads.donors import mean
from cliffscope.heads.early_closings import trace_early_closings
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import EditPlan, HeadEdit, HeadRef, RankedHeads, compose, scale, zero
from cliffscope.heads.export import export_edited
from cliffscope.heads.ranking import HeadRanking, rank_heads
from cliffscope.heads.sources import trace_all_sources, trace_sources
from cliffscope.heads.suppression import measure_suppression
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel, load_model
from cliffscope.model.origin import Origin
from cliffscope.readouts.layer_means import layer_means
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.readouts.trace import trace_refusal
from cliffscope.repairing.finetune import repair
from cliffscope.selection.choice import select_by_cliff, select_from_pool
from cliffscope.selection.scoring import score_pool
from cliffscope.transcripts.records import Outcome
from cliffscope.transcripts.templates import TEMPLATES
from cliffscope.transcripts.transcript import tokenize_all

COMPLIED = written(4, harmful=True, outcome=Outcome.COMPLIED)
HEAD = HeadRef(layer=1, head=2)


@pytest.fixture(scope="module")
def other(make_checkpoint: MakeCheckpoint) -> LensModel:
    """Of the same sizes as `llama`, one weight of it changed."""

    def change(network: PreTrainedModel) -> None:
        network.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 5] += 0.5

    return load_model(make_checkpoint("llama", change=change), device="cpu")


@pytest.fixture(scope="module")
def elsewhere(llama: LensModel) -> LensModel:
    """The same weights with a template that closes thinking in another way."""
    return replace(llama, template=replace(TEMPLATES.get("organism"), name="other", closing="</think>\n"))


@pytest.fixture(scope="module")
def ranking(llama: LensModel) -> HeadRanking:
    return rank_heads(llama, random_probe(llama, 3), COMPLIED)


def tokens_of(model: LensModel) -> list:
    return tokenize_all(COMPLIED, model.tokenizer, model.template)[0]


READERS: dict[str, Callable[[LensModel, RefusalProbe], object]] = {
    "trace_refusal": lambda model, probe: trace_refusal(model, probe, COMPLIED),
    "read_final": lambda model, probe: read_final(model, probe, tokens_of(model)),
    "rank_heads": lambda model, probe: rank_heads(model, probe, COMPLIED),
    "control_sets": lambda model, probe: control_sets(model, probe, COMPLIED, [HEAD], draws=2),
    "confirm_heads": lambda model, probe: confirm_heads(model, probe, COMPLIED, [HEAD]),
    "sweep_branches": lambda model, probe: sweep_branches(model, probe, tokens_of(model), [(HEAD,)]),
    "measure_suppression": lambda model, probe: measure_suppression(model, probe, COMPLIED, zero([HEAD]), controls=2),
    "trace_early_closings": lambda model, probe: trace_early_closings(model, probe, COMPLIED[:1]),
    "trace_sources": lambda model, probe: trace_sources(model, probe, COMPLIED[0], HEAD),
    "layer_means": lambda model, probe: layer_means(model, probe, COMPLIED),
    "score_pool": lambda model, probe: score_pool(model, probe, COMPLIED),
    "select_by_cliff": lambda model, probe: select_by_cliff(model, probe, COMPLIED, number=1),
}


@pytest.mark.parametrize("name", READERS)
def test_a_probe_is_refused_wherever_it_meets_other_weights_or_another_template(
    llama: LensModel, other: LensModel, elsewhere: LensModel, name: str
) -> None:
    probe = replace(random_probe(llama, 3), template="organism")
    READERS[name](llama, probe)
    with pytest.raises(OtherModelError, match=f"fingerprint {llama.fingerprint}, these {other.fingerprint}"):
        READERS[name](other, probe)
    with pytest.raises(OtherModelError, match="as template 'organism' does, this one as 'other'"):
        READERS[name](elsewhere, probe)
    READERS[name](other, probe.for_model(other, allow_other_model=True))


@pytest.mark.parametrize("make", [lambda m: random_probe(m, 3), answer_readout], ids=["probe", "answer"])
def test_a_readout_that_is_allowed_says_so_and_the_one_it_was_made_of_stays(
    llama: LensModel, other: LensModel, make: Callable[[LensModel], Readout]
) -> None:
    readout = make(llama)
    assert readout.for_model(llama) is readout
    assert readout.for_model(llama, allow_other_model=True).note == ""
    allowed = readout.for_model(other, allow_other_model=True)
    assert llama.fingerprint in allowed.note
    assert repr(other.name) in allowed.note
    assert (readout.note, readout.fingerprint) == ("", llama.fingerprint)
    with pytest.raises(OtherModelError, match="was made with another model"):
        readout.for_model(other)
    with pytest.raises(OtherModelError):
        allowed.check_model(llama)


def test_sizes_that_do_not_fit_are_refused_even_where_another_model_is_allowed(models: dict[str, LensModel]) -> None:
    from cliffscope.errors import ProbeError

    with pytest.raises(ProbeError, match="layer 7 of width 32"):
        random_probe(models["llama"], 7).for_model(models["qwen3"], allow_other_model=True)


def test_results_carry_the_note(llama: LensModel, other: LensModel) -> None:
    probe = random_probe(llama, 3).for_model(other, allow_other_model=True)
    ranked = rank_heads(other, probe, COMPLIED)
    scores = score_pool(other, probe, COMPLIED)
    chosen = select_from_pool(scores, COMPLIED, number=1)
    notes = [
        ranked.origin.note,
        scores.origin.note,
        chosen.origin.note,
        trace_refusal(other, probe, COMPLIED).probe.note,
    ]
    assert notes == [probe.note] * 4
    assert select_by_cliff(other, probe, COMPLIED, number=1).origin.note == probe.note
    assert ranked.origin.fingerprint == other.fingerprint


def test_ranked_heads_remember_their_model_in_every_edit_of_them(ranking: HeadRanking, llama: LensModel) -> None:
    origin = Origin.of(llama)
    assert ranking.top(0.03).origin == origin
    assert ranking.significant(1.0).origin == origin
    assert zero(ranking.top()).origin == origin
    assert scale(ranking.top(), 0.5).origin == origin
    assert zero(ranking.top()).on([HEAD]).origin == origin
    assert zero([HEAD]).origin is None
    assert zero(ranking.top()) == zero(tuple(ranking.top())), "where an edit comes from is no part of what it does"


EDITED: dict[str, Callable[[LensModel, HeadEdit], object]] = {
    "evaluate_safety": lambda model, edit: evaluate_safety(
        model, COMPLIED[:1], edit=edit, controls=0, max_thinking=2, max_answer=2
    ),
    "measure_mediation": lambda model, edit: measure_mediation(model, COMPLIED[:1], edit, max_thinking=2, max_answer=2),
    "roll_out": lambda model, edit: roll_out(model, COMPLIED[:1], edit=edit, max_thinking=2, max_answer=2),
    "measure_side_effects": lambda model, edit: measure_side_effects(model, edit, transcripts=COMPLIED, controls=0),
    "edited_weights": lambda model, edit: edited_weights(model, edit).__enter__(),
    "measure_suppression": lambda model, edit: measure_suppression(
        model, random_probe(model, 3), COMPLIED, edit, controls=0
    ),
    "early closings": lambda model, edit: trace_early_closings(model, random_probe(model, 3), COMPLIED[:1], edit=edit),
    "trace_refusal": lambda model, edit: trace_refusal(model, random_probe(model, 3), COMPLIED, edit=edit),
}


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("kind", ["zero", "mean", "plan"])
def test_an_edit_is_refused_wherever_it_meets_another_model(
    llama: LensModel, other: LensModel, ranking: HeadRanking, name: str, kind: str
) -> None:
    edits: dict[str, HeadEdit | EditPlan] = {
        "zero": zero(ranking.top()),
        "mean": mean(llama, [HEAD], COMPLIED),
        "plan": compose(zero(ranking.top(0.01)), zero([HeadRef(layer=5, head=5)])),
    }
    with pytest.raises(OtherModelError, match="The edit was made with another model"):
        EDITED[name](other, edits[kind])


def test_an_edit_that_is_allowed_is_noted_and_its_file_keeps_where_it_comes_from(
    llama: LensModel, other: LensModel, ranking: HeadRanking, tmp_path: Path
) -> None:
    edit = zero(ranking.top())
    again = HeadEdit.from_dict(edit.to_dict())
    assert again.origin == edit.origin
    with pytest.raises(OtherModelError):
        export_edited(other, again, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    allowed = again.for_model(other, allow_other_model=True)
    card = (export_edited(other, allowed, tmp_path / "out") / "README.md").read_text()
    assert "was made with another model than" in card
    assert llama.fingerprint in card
    assert "was made with another model" not in (export_edited(llama, edit, tmp_path / "own") / "README.md").read_text()
    plan = EditPlan(edits=(edit,)).for_model(other, allow_other_model=True)
    assert plan.edits[0].origin.note


def test_a_ranking_is_refused_wherever_it_meets_another_model(
    llama: LensModel, other: LensModel, ranking: HeadRanking
) -> None:
    probe = random_probe(other, 3)
    meet: list[Callable[[HeadRanking | RankedHeads], object]] = [
        lambda r: dose_response(other, probe, r, COMPLIED, fractions=[0.02], controls=1),
        lambda r: control_sets(other, probe, COMPLIED, r.top(0.02), draws=1),
        lambda r: confirm_heads(other, probe, COMPLIED, r.top(0.02)),
        lambda r: mean(other, r.top(0.02), COMPLIED),
        lambda r: sweep_branches(other, probe, tokens_of(other), [r.top(0.02)]),
        lambda r: trace_all_sources(other, probe, COMPLIED[0], r.top(0.02)),
    ]
    for function in meet:
        with pytest.raises(OtherModelError, match="The ranking was made with another model"):
            function(ranking)
        function(ranking.for_model(other, allow_other_model=True))
    assert ranking.top().for_model(other, allow_other_model=True).origin.note
    with pytest.raises(OtherModelError):
        ranking.top().for_model(other)


def test_a_selection_of_another_models_pool_is_refused_by_repair(
    llama: LensModel, other: LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    chosen = select_from_pool(score_pool(llama, random_probe(llama, 3), COMPLIED), COMPLIED, number=2)
    with pytest.raises(OtherModelError, match="The selection was made with another model"):
        repair(other, chosen, tmp_path / "refused", steps=1)
    repaired = repair(other, chosen.for_model(other, allow_other_model=True), tmp_path / "out", steps=1, lora_rank=0)
    assert "The selection was made with another model" in (repaired.path / "README.md").read_text()


def test_the_fingerprint_is_that_of_the_unedited_weights_even_where_it_is_first_asked_for_under_an_edit(
    llama: LensModel, make_checkpoint: MakeCheckpoint
) -> None:
    again = load_model(llama.name, device="cpu")
    with edited_weights(again, zero([HEAD])):
        trace_refusal(again, random_probe(llama, 3), COMPLIED)
    assert again.fingerprint == llama.fingerprint


def test_an_origin_that_is_not_known_is_compared_with_nothing(llama: LensModel) -> None:
    Origin(fingerprint="").check("It", llama)
    Origin(fingerprint=llama.fingerprint).check("It", llama)
    assert Origin.from_dict(Origin.of(llama).to_dict()) == Origin.of(llama)
