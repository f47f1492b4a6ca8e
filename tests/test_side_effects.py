"""Side effects against plain forward passes, one transcript at a time, with transformers alone."""

import numpy as np
import pytest
import torch
from conftest import written
from slow_generation import Change, changed
from transformers import PreTrainedModel

from cliffscope.errors import DataError, EditError
from cliffscope.evaluation import side_effects
from cliffscope.evaluation.arms import TOP, UNEDITED
from cliffscope.evaluation.side_effects import KL, PERPLEXITY, SideEffects, measure_side_effects
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef, Scope, compose, scale, zero
from cliffscope.model.load import LensModel
from cliffscope.resampling import bootstrap_mean, bootstrap_ratio
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span, tokenize

HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=2, head=0))
TEXTS = ("the user wants to paint the fence .", "sure , here is a way . find the lamp . then , polish it .", "help me")


@pytest.fixture(scope="module")
def answered() -> Transcripts:
    return written(5, harmful=False, outcome=Outcome.COMPLIED)


def zeroed(model: LensModel) -> PreTrainedModel:
    """A copy of the network whose columns were set to zero by hand."""
    import copy

    network = copy.deepcopy(model.hf)
    size = model.shape.d_head
    with torch.no_grad():
        for ref in HEADS:
            projection = network.model.layers[ref.layer].self_attn.o_proj
            projection.weight[:, ref.head * size : (ref.head + 1) * size] = 0
    return network


def shares(network: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1)


def row_of(found: SideEffects, measure: str, arm: str) -> dict[str, float]:
    frame = found.to_frame()
    return frame[(frame["measure"] == measure) & (frame["arm"] == arm)].iloc[0].to_dict()


@pytest.mark.parametrize("room", [None, 1, 4000], ids=["at once", "a position at a time", "in windows"])
def test_the_divergence_is_the_plain_one(
    model: LensModel, answered: Transcripts, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room is not None:
        monkeypatch.setattr(side_effects, "ROOM_BYTES", room * (1 if room > 1 else 4 * len(model.tokenizer)))
    found = row_of(measure_side_effects(model, zero(HEADS), transcripts=answered, controls=0), KL, TOP)
    edited, values = zeroed(model), []
    for transcript in answered:
        row = tokenize(transcript, model.tokenizer, model.template, with_answer=True)
        ids = [int(i) for i in row.token_ids]
        plain, other = shares(model.hf, ids), shares(edited, ids)
        each = (plain.exp() * (plain - other)).sum(-1)
        values.append(float(each[row.span(Span.PROMPT).stop - 1 : -1].mean()))
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-6)
    assert found["n"] == 5
    low, high = bootstrap_mean(np.array(values), seed=0)
    assert (found["ci_low"], found["ci_high"]) == (
        pytest.approx(float(low), rel=1e-3),
        pytest.approx(float(high), rel=1e-3),
    )
    assert 0 < found["ci_low"] < found["value"] < found["ci_high"]


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("zero", "closing"), ("zero", "thinking"), ("zero", "prompt"), ("by position", "closing")],
)
def test_the_divergence_of_an_edit_of_a_span_is_the_plain_one(
    model: LensModel, answered: Transcripts, scope: str, kind: str
) -> None:
    """Whole sequences through plain transformers, one at a time, edited by hooks of the tests at the span alone."""
    rows = [tokenize(t, model.tokenizer, model.template, with_answer=True) for t in answered]
    labels = [[str(span) for span in row.labels()] for row in rows]
    edit, value = zero(HEADS, scope=scope), None
    if kind == "by position":
        values = np.random.default_rng(0).normal(size=(2, 3, model.shape.d_head)).astype(np.float32)
        edit, value = (
            HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=values, scope=Scope.parse(scope)),
            torch.tensor(values),
        )
    changes = [
        Change(layer=ref.layer, head=ref.head, scope=scope, value=None if value is None else value[i])
        for i, ref in enumerate(HEADS)
    ]
    expected = []
    for row, spans in zip(rows, labels, strict=True):
        ids = row.token_ids.tolist()
        plain = shares(model.hf, ids)
        with changed(model, spans, changes):
            other = shares(model.hf, ids)
        first = spans.index("answer") if scope == "closing" else spans.index("thinking")
        expected.append(float((plain.exp() * (plain - other)).sum(-1)[first - 1 : -1].mean()))
    found = row_of(measure_side_effects(model, edit, transcripts=answered, controls=0), KL, TOP)
    assert found["value"] == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-6)
    assert found["value"] > 1e-3
    assert (found["n"], found["scope"]) == (5, scope)


def test_random_sets_of_a_span_are_edited_there_too_and_nothing_stays(
    llama: LensModel, answered: Transcripts, unchanged: object
) -> None:
    check = unchanged(llama)
    frame = measure_side_effects(llama, zero(HEADS, scope="closing"), transcripts=answered, controls=3).frame
    check()
    assert set(frame["scope"]) == {"closing"}
    assert frame["value"].gt(0).all()


def test_an_answer_without_a_token_has_nothing_that_an_edit_of_the_closing_changes(
    llama: LensModel, answered: Transcripts
) -> None:
    some = Transcripts([answered[0].replace(id="short", answer="", answer_ids=()), *answered[1:]])
    found = measure_side_effects(llama, zero(HEADS, scope="closing"), transcripts=some, controls=0)
    assert row_of(found, KL, TOP)["n"] == 4
    assert [(o.id, o.stage) for o in found.omitted] == [("short", "side_effects")]


def test_texts_have_no_spans(llama: LensModel, answered: Transcripts) -> None:
    with pytest.raises(EditError, match="Texts have no closing"):
        measure_side_effects(llama, zero(HEADS, scope="closing"), transcripts=answered, texts=TEXTS, controls=0)


def test_perplexity_is_the_plain_one_over_all_tokens(llama: LensModel) -> None:
    found = measure_side_effects(llama, zero(HEADS), texts=TEXTS, controls=0)
    for arm, network in ((UNEDITED, llama.hf), (TOP, zeroed(llama))):
        losses, counts = [], []
        for text in TEXTS:
            ids = llama.tokenizer.encode(text)
            logs = shares(network, ids)
            losses.append(-float(sum(logs[i, ids[i + 1]] for i in range(len(ids) - 1))))
            counts.append(len(ids) - 1)
        row = row_of(found, PERPLEXITY, arm)
        assert row["value"] == pytest.approx(np.exp(sum(losses) / sum(counts)), rel=1e-4)
        interval = bootstrap_ratio(np.array(losses), np.array(counts), seed=0)
        assert row["ci_low"] == pytest.approx(np.exp(interval.low), rel=1e-3)
        assert row["n"] == 3


def test_an_edit_that_changes_nothing_diverges_by_nothing(llama: LensModel, answered: Transcripts) -> None:
    found = measure_side_effects(llama, scale(HEADS, 1.0), transcripts=answered, texts=TEXTS, controls=0)
    assert row_of(found, KL, TOP)["value"] == pytest.approx(0, abs=1e-7)
    assert row_of(found, PERPLEXITY, TOP)["value"] == row_of(found, PERPLEXITY, UNEDITED)["value"]


def test_random_sets_stand_beside_and_the_weights_are_as_they_were(
    llama: LensModel, answered: Transcripts, unchanged: object
) -> None:
    check = unchanged(llama)
    found = measure_side_effects(llama, zero(HEADS), transcripts=answered, controls=3)
    check()
    assert found.frame["kind"].tolist() == ["top", "random", "random", "random"]
    assert found.value(KL, "random") > 0
    assert "kl" in repr(found)


def test_a_text_longer_than_the_context_is_read_in_pieces_and_a_short_one_is_left_out(llama: LensModel) -> None:
    long = "the user wants to paint the fence . " * 40
    ids = llama.tokenizer.encode(long)
    assert len(ids) > llama.shape.context
    found = measure_side_effects(llama, zero(HEADS), texts=[long, "help"], controls=0)
    cut = [ids[: llama.shape.context], ids[llama.shape.context :]]
    losses = [-float(sum(shares(llama.hf, p)[i, p[i + 1]] for i in range(len(p) - 1))) for p in cut]
    expected = np.exp(sum(losses) / sum(len(p) - 1 for p in cut))
    assert row_of(found, PERPLEXITY, UNEDITED)["value"] == pytest.approx(expected, rel=1e-4)
    assert [(o.id, o.reason) for o in found.omitted] == [("text-2", "text of less than two tokens")]
    assert np.isnan(row_of(found, PERPLEXITY, UNEDITED)["ci_low"]), "one text has no interval"


def test_nothing_to_measure_on_is_an_error(llama: LensModel, answered: Transcripts) -> None:
    with pytest.raises(DataError, match="Nothing was given"):
        measure_side_effects(llama, zero(HEADS))
    unanswered = answered.map(lambda t: t.replace(answer=None, answer_ids=None))
    with pytest.raises(DataError, match="Nothing is left to measure on"):
        measure_side_effects(llama, zero(HEADS), transcripts=unanswered)


def test_a_plan_needs_to_be_told_how_random_sets_are_edited(llama: LensModel, answered: Transcripts) -> None:
    plan = compose(zero(HEADS[:1]), scale(HEADS[1:], 0.5))
    with pytest.raises(EditError, match="Give control_edit"):
        measure_side_effects(llama, plan, transcripts=answered, controls=2)
    found = measure_side_effects(llama, plan, transcripts=answered, controls=2, control_edit=zero)
    assert found.frame["kind"].tolist() == ["top", "random", "random"]
