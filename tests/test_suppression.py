"""Suppression is what a plain model with edited heads says, beside random sets of as many heads."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SEVERAL, SINGLE, answer_readout, log_odds_of, plain_logits, random_probe, tokens_of, written
from torch import Tensor, nn

from cliffscope.errors import DataError, EditError, ProbeError
from cliffscope.heads import sweep
from cliffscope.heads.controls import random_sets
from cliffscope.heads.edits import HeadEdit, HeadRef, compose, scale, zero
from cliffscope.heads.suppression import ALL_LAYERS, SAME_LAYERS, Suppression, measure_suppression
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import read_final
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span

HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=2, head=3)]


def edited_log_odds(
    model: LensModel, ids: Sequence[int], where: slice, heads: Sequence[HeadRef], factor: float, openings: object
) -> float:
    """The oracle: hooks of plain torch on the plain model, which multiply heads at some positions."""

    def hook(head: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z, size = inputs[0].clone(), model.shape.d_head
            z[:, where, head * size : (head + 1) * size] *= factor
            return (z,)

        return call

    with ExitStack() as stack:
        for ref in heads:
            projection = model.hf.model.layers[ref.layer].self_attn.o_proj
            stack.callback(projection.register_forward_pre_hook(hook(ref.head)).remove)
        return log_odds_of(lambda row: plain_logits(model, row), ids, openings)


@pytest.mark.parametrize("openings", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
@pytest.mark.parametrize(("scope", "path"), [("closing", "packed"), ("all", "batched")])
def test_unedited_edited_and_random_rows_are_the_plain_models(
    model: LensModel, complied: Transcripts, openings: object, scope: str, path: str
) -> None:
    answer, some = answer_readout(model, openings), complied[:2]
    measured = measure_suppression(model, answer, some, scale(HEADS, 0.25, scope=scope), controls=2)
    assert measured.path == path
    rng = np.random.default_rng(0)
    within, over = (random_sets(model.shape, HEADS, 2, rng, same_layers=same) for same in (True, False))
    rows = [measured.unedited, measured.edited, *measured.random_same_layers, *measured.random_all_layers]
    for heads, logits in zip([[], HEADS, *within, *over], rows, strict=True):
        for tokens, logit in zip(tokens_of(model, some), logits, strict=True):
            where = tokens.span(Span.CLOSING) if scope == "closing" else slice(None)
            expected = edited_log_odds(model, tokens.token_ids.tolist(), where, heads, 0.25, openings)
            assert logit == pytest.approx(expected, abs=1e-4 * max(1, abs(expected)))
    assert np.abs(measured.effects).min() > 1e-3


def test_the_packed_sweep_says_what_the_plain_path_says(
    llama: LensModel, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, edit = answer_readout(llama, SEVERAL), zero(HEADS, scope="closing")
    packed = measure_suppression(llama, answer, complied[:4], edit, controls=3)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(sweep, "packed_logits", broken)
    monkeypatch.setattr(sweep, "batched_logits", broken)
    plain = measure_suppression(llama, answer, complied[:4], edit, controls=3)
    assert (packed.path, plain.path.split()[0]) == ("packed", "plain")
    for name in ("unedited", "edited", "random_same_layers", "random_all_layers"):
        np.testing.assert_allclose(getattr(packed, name), getattr(plain, name), rtol=1e-4, atol=1e-4)


def test_an_edit_with_values_and_a_plan_are_read_without_random_sets(llama: LensModel, complied: Transcripts) -> None:
    answer, values = answer_readout(llama), np.full((2, 1, llama.shape.d_head), 0.5, np.float32)
    mean = HeadEdit(heads=tuple(HEADS), kind="mean", values=values, scope=zero([], scope="closing").scope)
    plan = compose(zero(HEADS[:1], scope="closing"), scale(HEADS[1:], 2.0, scope="closing"))
    for edit in (mean, plan):
        with pytest.raises(EditError, match="controls=0"):
            measure_suppression(llama, answer, complied[:2], edit)
        measured = measure_suppression(llama, answer, complied[:2], edit, controls=0)
        expected = read_final(llama, answer, tokens_of(llama, complied[:2]), edit=edit)
        np.testing.assert_allclose(measured.edited, expected, rtol=1e-5, atol=1e-5)
        assert np.isnan(list(measured.p.values())).all()
        assert measured.to_frame()["random_mean"].isna().all()
        assert "no random sets" in repr(measured)


def test_random_sets_are_heads_that_the_readout_sees_and_never_edited_ones(
    llama: LensModel, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, branches = random_probe(llama, 2), []
    heads = [HeadRef(layer=1, head=0), HeadRef(layer=1, head=5), HeadRef(layer=6, head=0)]
    original = sweep.sweep_branches

    def record(model: LensModel, readout: object, rows: object, sets: object, **options: object) -> sweep.Sweep:
        branches.extend(sets)
        return original(model, readout, rows, sets, **options)

    monkeypatch.setattr("cliffscope.heads.suppression.sweep_branches", record)
    measure_suppression(llama, probe, complied[:1], zero(heads, scope="closing"), controls=10)
    tested, *drawn = branches
    assert tested == tuple(heads)
    assert len(set(drawn)) == 20
    # The head above the probe's layer cannot act, so that sets of two match.
    assert {len(heads) for heads in drawn} == {2}
    assert all(ref.layer <= 2 and ref not in heads for branch in drawn for ref in branch)
    assert {ref.layer for branch in drawn[:10] for ref in branch} == {1}
    assert {ref.layer for branch in drawn[10:] for ref in branch} == {0, 1, 2}


def by_hand(**changes: object) -> Suppression:
    """Three transcripts whose logits rise by 1, 2 and 3."""
    fields = {
        "ids": ("a", "b", "c"),
        "groups": ("harmful, complied", "harmful, complied", "harmless, complied"),
        "edit": zero(HEADS, scope="closing"),
        "unedited": np.array([-1, -1, -1], np.float32),
        "edited": np.array([0, 1, 2], np.float32),
        "random_same_layers": np.array([[-1, -1, -1], [2, 2, 2], [-1, 0, 1], [-1, 0, -2]], np.float32),
        "random_all_layers": np.array([[-1, -1, -1]], np.float32),
        "readout": "answer",
        "refused_logit": 3.0,
        "can_tell": True,
        "seed": 0,
        "path": "packed",
    }
    return Suppression(**{**fields, **changes})


def test_effect_p_and_restored_share_are_those_of_hand_computation() -> None:
    measured = by_hand()
    assert measured.effect == 2.0
    assert (measured.n, measured.restored) == (3, 0.5)
    assert measured.random_effects[SAME_LAYERS].tolist() == [0, 3, 1, 0]
    # One random set of four reaches 2, and the edited set counts itself.
    assert measured.p == {SAME_LAYERS: 2 / 5, ALL_LAYERS: 1 / 2}
    low, high = measured.interval
    assert 1 <= low < 2 < high <= 3
    assert np.isnan(by_hand(refused_logit=-1.0).restored)


def test_the_frame_has_a_row_a_transcript_with_probabilities() -> None:
    frame = by_hand().to_frame()
    assert frame["suppression"].tolist() == [1, 2, 3]
    assert frame["unedited_p"].tolist() == pytest.approx([0.268941] * 3, abs=1e-6)
    assert frame["edited_p"].tolist() == pytest.approx([0.5, 0.731059, 0.880797], abs=1e-6)
    assert frame["suppression_p"].tolist() == pytest.approx([0.231059, 0.462117, 0.611856], abs=1e-6)
    assert frame["random_mean"].tolist() == pytest.approx([-0.4, 0.0, -0.2], abs=1e-6)
    assert frame["random_mean_p"][0] == pytest.approx((4 * 0.268941 + 0.880797) / 5, abs=1e-6)


def test_it_shows_itself_in_a_line_a_table_by_group_and_a_figure() -> None:
    measured = by_hand()
    line = repr(measured)
    assert "2 heads: +2.00 [" in line
    assert "50% restored" in line
    assert line.endswith("n=3)")
    assert "cannot tell" in repr(by_hand(can_tell=False))
    table = measured.small_table()
    assert table[["group", "n", "suppression"]].to_numpy().tolist() == [
        ["harmful, complied", 2, 1.5],
        ["harmless, complied", 1, 3.0],
    ]
    figure = measured.plot()
    grey, edited = figure.data[1], figure.data[2]
    assert (grey.name, edited.name) == ("random sets, mean", "edited")
    assert list(edited.y) == pytest.approx([0.5, 0.7311, 0.8808])
    assert list(edited.x) == list(grey.x)
    assert "n=3" in figure.layout.title.text
    assert [
        trace.name
        for trace in by_hand(
            random_same_layers=np.zeros((0, 3), np.float32), random_all_layers=np.zeros((0, 3), np.float32)
        )
        .plot()
        .data
    ] == [None, "edited"]


def test_what_cannot_be_measured_is_left_out_with_its_reason(llama: LensModel, complied: Transcripts) -> None:
    answer, edit = answer_readout(llama), zero(HEADS, scope="closing")
    without = complied[0].replace(id="none", thinking=None)
    measured = measure_suppression(llama, answer, Transcripts([without, *complied[1:3]]), edit, controls=1)
    assert measured.ids == tuple(t.id for t in complied[1:3])
    assert [(o.id, "thinking" in o.reason) for o in measured.omitted] == [("none", True)]
    with pytest.raises(DataError):
        measure_suppression(llama, answer, Transcripts([without]), edit)


def test_a_transcript_whose_logits_are_no_numbers_is_left_out(
    llama: LensModel, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sweep.sweep_branches

    def spoil(*args: object, **options: object) -> sweep.Sweep:
        swept = original(*args, **options)
        swept.edited[1, 0] = np.nan
        return swept

    monkeypatch.setattr("cliffscope.heads.suppression.sweep_branches", spoil)
    answer, edit = answer_readout(llama), zero(HEADS, scope="closing")
    measured = measure_suppression(llama, answer, complied[:3], edit, controls=1)
    assert measured.ids == (complied[0].id, complied[2].id)
    assert measured.random_same_layers.shape == (1, 2)
    assert measured.omitted[0].id == complied[1].id
    assert np.isfinite(measured.to_frame()["suppression"]).all()


def test_wrong_settings_are_refused(llama: LensModel, complied: Transcripts) -> None:
    answer, probe = answer_readout(llama), random_probe(llama, 1)
    with pytest.raises(EditError, match="scope"):
        measure_suppression(llama, answer, complied[:1], zero(HEADS, scope="thinking"))
    with pytest.raises(EditError, match="cannot see"):
        measure_suppression(llama, probe, complied[:1], zero([HeadRef(layer=5, head=0)], scope="closing"))
    with pytest.raises(EditError, match="no head L9H0"):
        measure_suppression(llama, answer, complied[:1], zero([HeadRef(layer=9, head=0)], scope="closing"))
    with pytest.raises(DataError, match="controls=-1"):
        measure_suppression(llama, answer, complied[:1], zero(HEADS, scope="closing"), controls=-1)
    with pytest.raises(ProbeError):
        measure_suppression(llama, replace(answer, layer=3), complied[:1], zero(HEADS, scope="closing"))
    every = [HeadRef(layer=layer, head=head) for layer in range(2) for head in range(8)]
    with pytest.raises(EditError, match="controls=0"):
        measure_suppression(llama, probe, complied[:1], zero(every, scope="closing"))


def test_a_model_that_does_not_think_is_measured_at_the_tail_of_its_prompts(chatml_model: LensModel) -> None:
    bare = Transcripts(t.replace(thinking=None) for t in written(2, harmful=True, outcome=Outcome.COMPLIED))
    measured = measure_suppression(chatml_model, random_probe(chatml_model, 4), bare, zero(HEADS, scope="closing"))
    assert measured.n == 2
    assert isinstance(measured.to_frame(), pd.DataFrame)


def test_progress_counts_transcripts(llama: LensModel, complied: Transcripts) -> None:
    done: list[int] = []
    edit = zero(HEADS, scope="closing")
    measure_suppression(llama, answer_readout(llama), complied[:3], edit, controls=1, progress=done.append)
    assert done == [1, 2, 3]
    assert torch.is_grad_enabled()
