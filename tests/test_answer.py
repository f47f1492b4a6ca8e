"""The answer readout is the plain model's own distribution, on any path under any edit, and says what it can tell."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SEVERAL,
    SINGLE,
    MakeCheckpoint,
    answer_readout,
    log_odds_of,
    plain_logits,
    tokens_of,
    written,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import cliffscope as cs
from cliffscope.errors import DataError, EditError, ProbeError, UnsupportedModelError
from cliffscope.heads import sweep
from cliffscope.heads.attribution import attribute_heads
from cliffscope.heads.branches import Branch, Change, Job
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import EditKind, HeadRef, Scope, scale
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model import unembedding
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.answer import fit_answer_readout
from cliffscope.readouts.openings import find_openings, least_alike, opening_of
from cliffscope.readouts.readout import read_final
from cliffscope.stats import auroc
from cliffscope.store import open_run
from cliffscope.study.saved_readouts import load_answer_readout, save_answer_readout
from cliffscope.transcripts.records import Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

OPENINGS = {"one token": SINGLE, "several tokens": SEVERAL}
HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=2, head=3), HeadRef(layer=3, head=0)]
BRANCHES: list[Branch] = [*((head,) for head in HEADS), tuple(HEADS)]
TakeCopy = Callable[[LensModel], Callable[[], None]]


@pytest.fixture(params=list(OPENINGS))
def openings(request: pytest.FixtureRequest) -> Mapping[str, object]:
    return OPENINGS[request.param]


def log_odds(model: LensModel, row: TokenizedTranscript, openings: Mapping[str, object]) -> float:
    return log_odds_of(lambda ids: plain_logits(model, ids), row.token_ids[: row.final + 1].tolist(), openings)


def assert_close(found: object, expected: object, tolerance: float = 1e-5) -> None:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@contextmanager
def heads_zeroed(model: LensModel, branch: Branch, where: slice) -> Iterator[None]:
    """Zeroes heads over positions of a plain forward pass, by hooks of this file's own."""
    size, handles = model.shape.d_head, []

    def cut(head: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].clone()
            z[:, where, head * size : (head + 1) * size] = 0.0
            return (z, *inputs[1:])

        return hook

    for ref in branch:
        projection = model.hf.model.layers[ref.layer].self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(cut(ref.head)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_the_readout_is_the_plain_models_log_odds(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object]
) -> None:
    rows = tokens_of(model, refused[:4])
    expected = [log_odds(model, row, openings) for row in rows]
    assert_close(read_final(model, answer_readout(model, openings), rows), expected)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma2", {"head_dim": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
        ("Gemma3Text", {"head_dim": 12, "final_logit_softcapping": 2.0, "sliding_window": 64}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Phi", {}),
    ],
)
def test_logits_are_scaled_capped_and_biased_as_the_model_does(
    kind: str, settings: dict[str, object], tmp_path: Path, refused: Transcripts, openings: Mapping[str, object]
) -> None:
    from conftest import words_tokenizer
    from test_architectures import build

    tokenizer = words_tokenizer()
    network = build(kind, settings, len(tokenizer) + 5)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if kind == "Phi":
        # Its output embedding has a bias, and its heads another projection than is supported: the path is read alone.
        model = LensModel(
            **dict.fromkeys(("name", "tokenizer", "template", "shape", "bridge"), None), hf=network.train(False)
        )
        states: list[Tensor] = []
        with torch.no_grad(), model.residual_hook(lambda _, hidden: states.append(hidden)):
            expected = network(input_ids=torch.tensor([[2, 9, 30, 41]])).logits
            assert_close(unembedding.next_logits(model, states[-1], [7, 3]), expected[..., [7, 3]])
        assert network.lm_head.bias.abs().max() > 0.01
        return
    model = load_model(tmp_path, device="cpu")
    rows = tokens_of(model, refused[:2])
    found = read_final(model, answer_readout(model, openings), rows)
    assert_close(found, [log_odds(model, row, openings) for row in rows])
    unembedding.check_unembedding(model, rows[0].token_ids.tolist())


def test_log_probabilities_and_their_normaliser_are_the_models(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = tokens_of(model, refused[:1])
    readout, nodes, ids = answer_readout(model, openings), [], row.token_ids[: row.final + 1].tolist()
    for path in readout.continuations.rows(row):
        with model.residual_hook(lambda layer, hidden: nodes.append(hidden[0]) if layer == readout.layer else None):
            plain_logits(model, path.token_ids.tolist())
    residuals = torch.stack([nodes[path][row.final + behind] for path, behind in readout.continuations.places])
    with torch.no_grad():
        whole = readout.log_probabilities(model, residuals)
        monkeypatch.setattr(unembedding, "ROOM", 300)
        monkeypatch.setattr(unembedding, "ROWS", 7)
        torch.testing.assert_close(readout.log_probabilities(model, residuals), whole, rtol=1e-5, atol=1e-5)
    for opening, log in zip(readout.openings, whole, strict=True):
        logs = torch.log_softmax(plain_logits(model, [*ids, *opening.token_ids[:-1]]).double(), -1)
        expected = sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(opening.token_ids))
        assert_close(float(log), expected)


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.THINKING, Scope.PROMPT, Scope.ALL])
def test_a_sweep_is_a_loop_of_plain_forward_passes(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object], scope: Scope
) -> None:
    readout, rows = answer_readout(model, openings), tokens_of(model, refused[:2])
    swept = sweep_branches(model, readout, rows, BRANCHES, scope=scope)
    assert swept.path == ("packed" if scope is Scope.CLOSING else "batched")
    for i, row in enumerate(rows):
        where = slice(None) if scope is Scope.ALL else row.span(Span(scope.value))
        expected = []
        for branch in BRANCHES:
            with heads_zeroed(model, branch, where):
                expected.append(log_odds(model, row, openings))
        assert_close(swept.edited[i], expected, 1e-4)
        assert_close(swept.clean[i], log_odds(model, row, openings), 1e-4)
    assert np.abs(swept.effects).max() > 1e-2


@pytest.mark.parametrize("change", [Change(), Change(kind=EditKind.SCALE, factor=-1.5), "values"], ids=str)
def test_packed_batched_and_plain_are_the_same(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object], change: Change | str
) -> None:
    rows, shape = tokens_of(model, refused[:3]), model.shape
    if isinstance(change, str):
        widths = [row.final + 1 - row.span(Span.CLOSING).start for row in rows]
        rng = torch.Generator().manual_seed(0)
        values = (torch.randn(shape.n_layers, w, shape.n_heads, shape.d_head, generator=rng) for w in widths)
        change = Change(kind=EditKind.PATCH, values=tuple(values))
    job = Job(
        model=model,
        readout=answer_readout(model, openings),
        branches=tuple(BRANCHES),
        change=change,
        scope=Scope.CLOSING,
    )
    results = []
    for run in (sweep._Packed(), sweep._Batched(), sweep._Plain()):
        logits: dict[int, tuple[float, np.ndarray]] = {}
        run.sweep(job, list(enumerate(rows)), lambda i, found, logits=logits: logits.update({i: found}))
        results.append(np.array([[logits[i][0], *logits[i][1]] for i in range(len(rows))]))
    assert_close(results[0], results[2], 1e-4)
    assert_close(results[1], results[2], 1e-4)
    assert np.ptp(results[2], axis=1).min() > 1e-2


def test_a_transcript_does_not_depend_on_its_neighbours(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object]
) -> None:
    readout, rows = answer_readout(model, openings), tokens_of(model, refused[:5])
    together = read_final(model, readout, rows)
    assert_close(together, [read_final(model, readout, [row])[0] for row in rows])
    for scope in (Scope.CLOSING, Scope.ALL):
        swept = sweep_branches(model, readout, rows, BRANCHES, scope=scope)
        for i, row in enumerate(rows):
            alone = sweep_branches(model, readout, [row], BRANCHES, scope=scope)
            assert_close(swept.edited[i], alone.edited[0])


def test_an_edit_of_all_positions_is_the_edit_of_the_weights(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object]
) -> None:
    readout, rows = answer_readout(model, openings), tokens_of(model, refused[:2])
    swept = sweep_branches(
        model, readout, rows, [tuple(HEADS)], change=Change(kind="flip", factor=-1.0), scope=Scope.ALL
    )
    with edited_weights(model, scale(HEADS, -1.0)):
        assert_close(swept.edited[:, 0], [log_odds(model, row, openings) for row in rows], 1e-4)
        assert_close(swept.edited[:, 0], read_final(model, readout, rows), 1e-4)
    assert_close(swept.edited[:, 0], read_final(model, readout, rows, edit=scale(HEADS, -1.0)), 1e-4)


def test_values_by_position_over_all_positions_say_nothing_about_an_opening(
    model: LensModel, refused: Transcripts
) -> None:
    (row,), shape = tokens_of(model, refused[:1]), model.shape
    values = torch.zeros(shape.n_layers, row.final + 1, shape.n_heads, shape.d_head)
    change = Change(kind=EditKind.PATCH, values=(values,))
    for openings in (SINGLE, SEVERAL):
        readout = answer_readout(model, openings)
        if openings is SINGLE:
            assert sweep_branches(model, readout, [row], BRANCHES, change=change, scope=Scope.ALL).path == "batched"
        else:
            with pytest.raises(EditError, match="scope='closing'"):
                sweep_branches(model, readout, [row], BRANCHES, change=change, scope=Scope.ALL)


def test_rank_heads_is_a_loop_over_heads(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object]
) -> None:
    ranking = rank_heads(model, answer_readout(model, openings), refused[:2])
    assert (ranking.readout, ranking.path, ranking.readout_layer) == ("answer", "packed", model.shape.n_layers - 1)
    for i, row in enumerate(tokens_of(model, refused[:2])):
        clean, edited = log_odds(model, row, openings), []
        for ref in ranking.heads:
            with heads_zeroed(model, (ref,), row.span(Span.CLOSING)):
                edited.append(log_odds(model, row, openings))
        assert_close(ranking.effects[i], np.array(edited) - clean, 1e-4)


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.ALL])
def test_attribution_is_the_derivative_of_the_log_odds(
    model: LensModel, refused: Transcripts, openings: Mapping[str, object], scope: Scope
) -> None:
    readout, rows, step = answer_readout(model, openings), tokens_of(model, refused[:2]), 1e-2
    job = Job(model=model, readout=readout, branches=tuple(BRANCHES[:3]), change=Change(), scope=scope)
    ends = [
        sweep_branches(
            model, readout, rows, BRANCHES[:3], change=Change(kind="nudge", factor=1 + sign * step), scope=scope
        ).edited
        for sign in (-1, 1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(attribute_heads(job, rows).effects, slope, rtol=0.03, atol=0.02)
    assert np.abs(slope).max() > 0.05


def test_the_model_is_unchanged_afterwards(
    model: LensModel,
    refused: Transcripts,
    openings: Mapping[str, object],
    unchanged: TakeCopy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check, head = unchanged(model), model.hf.get_output_embeddings()
    readout, rows = answer_readout(model, openings), tokens_of(model, refused[:2])
    expected = plain_logits(model, rows[0].token_ids.tolist())
    sweep_branches(model, readout, rows, BRANCHES)
    rank_heads(model, readout, refused[:1], method="attribution")
    for place, name in ((unembedding._Rows, "forward"), (sweep, "_compare")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, interrupt)
            patched.setattr(sweep, "_PROVEN", {})
            with pytest.raises(KeyboardInterrupt):
                sweep_branches(model, readout, rows, BRANCHES)
    check()
    assert model.hf.get_output_embeddings() is head
    assert "forward" not in vars(model.decoder)
    assert torch.equal(plain_logits(model, rows[0].token_ids.tolist()), expected)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_readout_of_another_model_is_refused(models: dict[str, LensModel], refused: Transcripts) -> None:
    with pytest.raises(ProbeError, match="reads layer 7, but .* has 4 layers"):
        rank_heads(models["qwen2"], answer_readout(models["llama"]), refused[:1])
    with pytest.raises(ProbeError, match=r"fitted on a model of 4 layers and \d+ tokens. .* it has 8 layers"):
        rank_heads(models["llama"], answer_readout(models["qwen2"]), refused[:1])


def test_a_tokenizer_that_writes_the_openings_in_another_way_is_refused(models: dict[str, LensModel]) -> None:
    from dataclasses import replace

    readout = answer_readout(models["llama"])
    other = replace(readout, openings=(replace(readout.openings[0], text="pardon"), *readout.openings[1:]))
    with pytest.raises(ProbeError, match="writes? 'pardon' in another way"):
        other.check_model(models["llama"])


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (torch.zeros(276, 32, dtype=torch.int8), "quantised, of dtype torch.int8"),
        (torch.zeros(276, 32, device="meta"), "offloaded"),
    ],
)
def test_weights_that_are_not_there_to_be_read_are_refused(
    make_checkpoint: MakeCheckpoint, refused: Transcripts, weight: Tensor, what: str
) -> None:
    model = load_model(make_checkpoint("llama"), device="cpu")
    rows, readout = tokens_of(model, refused[:1]), answer_readout(model)
    for module in (model.hf.lm_head, model.hf.model.norm):
        before = module.weight
        module.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(UnsupportedModelError, match=f"(final norm|output embedding) .* is {what}"):
            read_final(model, readout, rows)
        module.weight = before


def test_a_model_that_does_more_behind_its_last_block_is_refused(
    make_checkpoint: MakeCheckpoint, refused: Transcripts, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_checkpoint("llama"), device="cpu")
    real = model.decoder.forward

    def doubled(*args: object, **kwargs: object) -> BaseModelOutputWithPast:
        states = real(*args, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=2 * states.last_hidden_state)

    monkeypatch.setattr(model.decoder, "forward", doubled)
    with pytest.raises(UnsupportedModelError, match="does more behind its last block"):
        fit_answer_readout(model, refused, complied)
    assert model.decoder.forward is doubled


# Fitting


def answering(transcripts: Transcripts, *answers: str) -> Transcripts:
    """The same transcripts with other answers, in turn."""
    return Transcripts(t.replace(answer=answers[i % len(answers)], answer_ids=None) for i, t in enumerate(transcripts))


def fitted_texts(readout: cs.AnswerReadout) -> dict[str, list[str]]:
    return {
        kind: [opening.text for opening in readout.openings if opening.kind == kind] for kind in ("refused", "complied")
    }


def test_first_tokens_that_separate_are_the_openings(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    seen: list[int] = []
    readout = fit_answer_readout(llama, refused, complied, progress=seen.append)
    assert fitted_texts(readout) == {"refused": ["sorry"], "complied": ["sure"]}
    assert len(readout.continuations) == 0
    table, report = readout.to_frame(), readout.report
    n = {kind: table[f"fit_{kind}"].sum() for kind in ("refused", "complied")}
    assert table[["class", "opening", "tokens"]].to_numpy().tolist() == [
        ["refused", "sorry", 1],
        ["complied", "sure", 1],
    ]
    assert table["fit_refused"].tolist() == [n["refused"], 0]
    assert table["test_complied"].tolist() == [0, report.final.n_complied]
    assert (report.covered, report.separation) == (1.0, 1.0)
    assert seen[-1] == report.final.n_refused + report.final.n_complied
    assert "2 openings of 1 token, held-out AUROC" in repr(readout)
    assert "sorry" in str(readout.plot().to_dict())
    assert "AUROC" in readout._repr_html_()


def test_the_report_is_of_the_test_split(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    harmful = written(24, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    every = Transcripts([*refused, *complied, *harmful])
    splits = {t.id: name for name, part in every.split(seed=3).items() for t in part}
    readout = fit_answer_readout(llama, refused, Transcripts([*complied, *harmful]), splits=splits)
    test = {
        name: [
            log_odds(llama, row, SORRY_SURE) for row in tokens_of(llama, [t for t in group if splits[t.id] == "test"])
        ]
        for name, group in (("refused", refused), ("harmless", complied), ("harmful", harmful))
    }
    final, within = readout.report.final, readout.report.within_harmful
    assert final.auroc == pytest.approx(auroc(np.array(test["refused"]), np.array(test["harmless"] + test["harmful"])))
    assert within.auroc == pytest.approx(auroc(np.array(test["refused"]), np.array(test["harmful"])))
    assert (final.n_refused, within.n_complied) == (len(test["refused"]), len(test["harmful"]))
    scores = 1 / (1 + np.exp(-np.array([*test["refused"], *test["harmless"], *test["harmful"]])))
    labels = np.arange(len(scores)) < len(test["refused"])
    assert final.brier == pytest.approx(((scores - labels) ** 2).mean(), rel=1e-4)
    assert readout.refused_logit == pytest.approx(np.mean(test["refused"]), rel=1e-4)
    rows = tokens_of(llama, [t for group in (refused, complied, harmful) for t in group if splits[t.id] == "test"])
    shares = [torch.softmax(plain_logits(llama, row.token_ids.tolist())[-1].double(), -1) for row in rows]
    assert readout.report.mass == pytest.approx(np.mean([float(s[193] + s[205]) for s in shares]), rel=1e-4)
    assert readout.report.can_tell is bool(final.interval.low >= 0.75)


SORRY_SURE = {"refused": [(193,)], "complied": [(205,)]}


def test_answers_that_begin_alike_are_told_by_longer_openings(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    readout = fit_answer_readout(
        llama,
        answering(refused, "i can not help with that .", "i will not help you ."),
        answering(complied, "i can help with that .", "sure , here is a way .", "i will help you ."),
    )
    texts = fitted_texts(readout)
    assert sorted(texts["refused"]) == ["i can not", "i will not"]
    assert sorted(texts["complied"]) == ["i can help", "i will help", "sure"]
    assert readout.report.separation == 1.0
    assert len(readout.continuations) == 3
    assert readout.report.warnings == () or readout.report.can_tell is False
    with pytest.raises(ProbeError, match="begin with the same 1 tokens"):
        fit_answer_readout(
            llama, answering(refused, "i can not help ."), answering(complied, "i can help ."), max_opening=1
        )


def test_an_opening_of_both_classes_is_not_used(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    readout = fit_answer_readout(
        llama,
        answering(refused, "sorry , i can not .", "first think about it .", "sorry , i will not ."),
        answering(complied, "sure , here is a way .", "first think about it .", "sure , use this ."),
    )
    assert fitted_texts(readout) == {"refused": ["sorry"], "complied": ["sure"]}
    assert readout.report.covered < 0.8
    assert any("begin with one of the openings" in warning for warning in readout.report.warnings)


def test_a_few_turned_answers_do_not_make_openings_longer(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    turned = [t.replace(answer="sure , i can not help .") if i % 12 == 0 else t for i, t in enumerate(refused)]
    readout = fit_answer_readout(llama, Transcripts(turned), complied)
    assert fitted_texts(readout) == {"refused": ["sorry"], "complied": ["sure"]}
    assert readout.to_frame()[["fit_refused", "test_refused"]].to_numpy()[1].sum() >= 1


def test_answers_that_cannot_be_told_apart_are_said_to_be(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    alike = ("first look at it .", "then use it .", "let me think .")
    readout = fit_answer_readout(llama, answering(refused, *alike), answering(complied, *alike))
    assert readout.report.can_tell is False
    assert readout.report.separation < 0.75
    assert "cannot be told apart by how they begin" in readout.report.warnings[0]
    assert all(fitted_texts(readout).values())


def test_answers_that_all_begin_alike_are_refused(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    with pytest.raises(ProbeError, match=r"same 4 tokens.*max_opening"):
        fit_answer_readout(
            llama, answering(refused, "let me think . no ."), answering(complied, "let me think . yes .")
        )
    longer = fit_answer_readout(
        llama, answering(refused, "let me think . no ."), answering(complied, "let me think . yes ."), max_opening=5
    )
    assert fitted_texts(longer) == {"refused": ["let me think . no"], "complied": ["let me think . yes"]}


def test_classes_that_are_missing_are_refused(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    with pytest.raises(ProbeError, match="fit split holds 0 refused"):
        fit_answer_readout(llama, Transcripts(), complied)
    splits = {t.id: "test" for t in refused} | {t.id: "fit" for t in complied}
    by_hand = {"refused": ["sorry"], "complied": ["sure"]}
    with pytest.raises(ProbeError, match="test split holds 0 complied"):
        fit_answer_readout(llama, refused, complied, splits=splits, openings=by_hand)
    with pytest.raises(ProbeError, match="fit split holds 0 complied .*answer is None"):
        fit_answer_readout(llama, refused, complied.map(lambda t: t.replace(answer=None, answer_ids=None)))
    with pytest.raises(ProbeError, match="max_opening=0"):
        fit_answer_readout(llama, refused, complied, max_opening=0)


def test_generated_ids_are_what_openings_are_taken_from(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    def with_ids(t: Transcript, first: int) -> Transcript:
        ids = (first, *llama.tokenizer.encode(" , here", add_special_tokens=False))
        return t.replace(answer=llama.tokenizer.decode(list(ids)), answer_ids=ids)

    readout = fit_answer_readout(
        llama, refused.map(lambda t: with_ids(t, 194)), complied.map(lambda t: with_ids(t, 206))
    )
    assert [opening.token_ids for opening in readout.openings] == [(194,), (206,)]


def test_openings_can_be_given_as_text_or_as_ids(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    given_openings = {"refused": ["sorry , i", (101, 46, 148)], "complied": ["sure", "i can help"]}
    readout = fit_answer_readout(llama, refused, complied, openings=given_openings)
    assert [(o.kind, o.token_ids) for o in readout.openings] == [
        *(("refused", ids) for ids in ((193, 12, 102), (101, 46, 148))),
        *(("complied", ids) for ids in ((205,), (101, 46, 94))),
    ]
    rows = tokens_of(llama, refused[:2])
    expected = [
        log_odds(llama, row, {"refused": [(193, 12, 102), (101, 46, 148)], "complied": [(205,), (101, 46, 94)]})
        for row in rows
    ]
    assert_close(read_final(llama, readout, rows), expected)


@pytest.mark.parametrize(
    ("openings", "message"),
    [
        ({"refused": ["sorry"]}, "at least one opening for each"),
        ({"refused": ["sorry"], "complied": []}, "at least one opening for each"),
        ({"refused": ["sorry"], "complied": ["sure"], "other": ["a"]}, "at least one opening for each"),
        ({"refused": [""], "complied": ["sure"]}, "'' has no token"),
        ({"refused": [()], "complied": ["sure"]}, "has no token"),
        ({"refused": [(100_000,)], "complied": ["sure"]}, "outside the vocabulary"),
        ({"refused": ["pardon"], "complied": ["sure"]}, "is unknown"),
        ({"refused": ["sorry"], "complied": ["sorry"]}, "complied opening 'sorry' is the same as the refused"),
        ({"refused": ["i can not"], "complied": ["i can"]}, "refused opening 'i can not' begins with the complied"),
        (
            {"refused": ["i can", "i can not"], "complied": ["sure"]},
            "begins with the refused .*Leave the longer one out",
        ),
    ],
)
def test_openings_that_overlap_or_say_nothing_are_refused(
    llama: LensModel, refused: Transcripts, complied: Transcripts, openings: dict[str, list[object]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit_answer_readout(llama, refused, complied, openings=openings)


def test_a_readout_is_read_back_as_it_was(
    llama: LensModel, refused: Transcripts, complied: Transcripts, tmp_path: Path
) -> None:
    readout = fit_answer_readout(llama, answering(refused, "i can not ."), answering(complied, "i can help ."))
    with open_run(tmp_path / "run", {}) as store:
        save_answer_readout(store, readout)
        again = load_answer_readout(store)
        assert repr(again) == repr(readout)
        assert (again.openings, again.layer, again.vocabulary) == (readout.openings, readout.layer, readout.vocabulary)
        assert (again.refused_logit, again.fingerprint, again.template) == (
            readout.refused_logit,
            readout.fingerprint,
            "organism",
        )
        assert again.to_frame().equals(readout.to_frame())
        assert (again.report.mass, again.report.warnings) == (readout.report.mass, readout.report.warnings)
        assert again.small_table().equals(readout.small_table())
        rows = tokens_of(llama, refused[:2])
        np.testing.assert_array_equal(read_final(llama, again, rows), read_final(llama, readout, rows))
        store.write_json("answer.json", {"layer": 7})
        with pytest.raises(ProbeError, match="is no answer readout"):
            load_answer_readout(store)


answers = st.lists(st.lists(st.integers(0, 3), max_size=6).map(tuple), min_size=1, max_size=12)


@given(answers, answers, st.integers(1, 4))
def test_no_opening_is_the_beginning_of_another(
    refusals: list[tuple[int, ...]], compliances: list[tuple[int, ...]], longest: int
) -> None:
    by_class = {"refused": refusals, "complied": compliances}
    try:
        choices = [find_openings(by_class, longest), least_alike(by_class, longest)]
    except ProbeError:
        choices = [find_openings(by_class, longest)]
    for choice in choices:
        every = [ids for group in choice.values() for ids in group]
        assert len(set(every)) == len(every)
        assert not any(a != b and a[: len(b)] == b for a in every for b in every)
        assert all(1 <= len(ids) <= longest for ids in every)
    for kind, group in choices[0].items():
        for ids in group:
            rates = {k: np.mean([a[: len(ids)] == ids for a in answers]) for k, answers in by_class.items()}
            assert rates[kind] >= 0.75 * sum(rates.values())
            assert opening_of((*ids, 9), group) == ids


@pytest.mark.slow
def test_the_planted_heads_come_first() -> None:
    model, truth = cs.load_model("planted-llama"), cs.organisms.read_truth("planted-llama")
    prompts, _ = cs.organisms.study_prompts("planted-llama", n=120)
    written_by_model = cs.judge(cs.roll_out(model, prompts, max_thinking=128, max_answer=32))
    refusals, compliances = (written_by_model.where(outcome=outcome) for outcome in ("refused", "complied"))
    readout = fit_answer_readout(model, refusals, compliances)
    assert readout.report.can_tell
    ranking = rank_heads(model, readout, compliances.where(harmful=True))
    assert set(ranking.top(len(truth.planted) / len(ranking.heads))) == set(truth.planted)
