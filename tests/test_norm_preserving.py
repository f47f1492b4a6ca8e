"""Ablation that leaves a layer its norm: against hooks written by hand, in sweeps and while text is generated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import plain_logits, random_probe, tokens_of, written
from slow_generation import Change, slow_answer, slow_roll_out
from torch import Tensor

import cliffscope as cs
from cliffscope.errors import EditError
from cliffscope.generation.answering import answer_transcripts
from cliffscope.heads.attribution import attribute_heads
from cliffscope.heads.branches import Change as SweepChange
from cliffscope.heads.branches import Job
from cliffscope.heads.early_closings import trace_early_closings
from cliffscope.heads.editing import edited_everywhere, edited_hooks, edited_weights
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef, Scope, compose, scale, zero
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.suppression import measure_suppression
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

HEADS = (HeadRef(layer=0, head=1), HeadRef(layer=2, head=3), HeadRef(layer=2, head=0))
APART = (HeadRef(layer=1, head=2), HeadRef(layer=3, head=0))
SCOPES = ("closing", "thinking", "prompt", "all")
BUDGET = {"max_thinking": 9, "max_answer": 6}


@contextmanager
def by_hand(
    model: LensModel, heads: Sequence[HeadRef], where: Sequence[slice], *, factor: float = 0.0
) -> Iterator[Mapping[int, list[tuple[Tensor, Tensor]]]]:
    """Hooks on the output projections that know nothing of the package; yields what came in and went on, by layer."""
    handles, seen = [], dict[int, list[tuple[Tensor, Tensor]]]()
    size = model.hf.config.head_dim if getattr(model.hf.config, "head_dim", None) else None
    size = size or model.hf.config.hidden_size // model.hf.config.num_attention_heads

    def hook_for(layer: int) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            before, after = inputs[0], inputs[0].clone()
            for row, part in enumerate(where):
                for position in range(*part.indices(before.shape[1])):
                    for ref in heads:
                        if ref.layer == layer:
                            after[row, position, ref.head * size : (ref.head + 1) * size] *= factor
                    old, new = (x[row, position].double().square().sum().sqrt() for x in (before, after))
                    after[row, position] *= (old / new).float()
            seen.setdefault(layer, []).append((before, after))
            return (after, *inputs[1:])

        return hook

    try:
        for layer in {ref.layer for ref in heads}:
            projection = model.hf.get_decoder().layers[layer].self_attn.o_proj
            handles.append(projection.register_forward_pre_hook(hook_for(layer)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def row(model: LensModel, refused: Transcripts) -> TokenizedTranscript:
    return tokens_of(model, refused[:1])[0]


@pytest.mark.parametrize("factor", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_the_hook_written_by_hand_with_and_without_grouped_heads(
    model: LensModel, row: TokenizedTranscript, scope: str, factor: float
) -> None:
    ids, where = row.token_ids.tolist(), Scope(scope).positions(row)
    with edited_hooks(model, scale(HEADS, factor, scope=scope, preserve_norm=True), [row]):
        by_edit = plain_logits(model, ids)
    with by_hand(model, HEADS, [where], factor=factor) as seen:
        expected = plain_logits(model, ids)
    torch.testing.assert_close(by_edit, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_edit[: where.start], plain_logits(model, ids)[: where.start])
    with edited_hooks(model, scale(HEADS, factor, scope=scope), [row]):
        assert (by_edit - plain_logits(model, ids)).abs().max() > 1e-3, "the norm makes no difference"
    for before, after in seen[2]:
        torch.testing.assert_close(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_it_is_the_same_on_the_hooks_of_transformerlens(model: LensModel, row: TokenizedTranscript) -> None:
    def hook(heads: Sequence[int]) -> Callable[..., Tensor]:
        def change(z: Tensor, hook: object) -> Tensor:
            after = z.clone()
            after[:, :, list(heads)] = 0
            return after * (z.flatten(2).norm(dim=-1) / after.flatten(2).norm(dim=-1))[..., None, None]

        return change

    hooks = [("blocks.0.attn.hook_z", hook([1])), ("blocks.2.attn.hook_z", hook([3, 0]))]
    ids = row.token_ids.tolist()
    with torch.no_grad():
        expected = model.bridge.run_with_hooks(torch.tensor([ids]), return_type="logits", fwd_hooks=hooks)[0]
    with edited_everywhere(model, zero(HEADS, preserve_norm=True)):
        torch.testing.assert_close(plain_logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(model: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(model, refused[:3])
    batch, edit = model.to_batch([r.token_ids.tolist() for r in rows]), zero(HEADS, scope="closing", preserve_norm=True)
    with torch.no_grad(), edited_hooks(model, edit, rows):
        together = model.hf(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
    for r, logits in zip(rows, together, strict=True):
        with edited_hooks(model, edit, [r]):
            alone = plain_logits(model, r.token_ids.tolist())
        torch.testing.assert_close(logits[: r.n_pos], alone, rtol=1e-3, atol=1e-4)


def test_what_is_not_edited_keeps_every_bit(llama: LensModel, row: TokenizedTranscript) -> None:
    clean = plain_logits(llama, row.token_ids.tolist())
    with edited_hooks(llama, scale(HEADS, 1.0, preserve_norm=True), [row]):
        assert torch.equal(plain_logits(llama, row.token_ids.tolist()), clean)


def test_a_layer_without_any_head_left_writes_nothing(llama: LensModel, row: TokenizedTranscript) -> None:
    every = [HeadRef(layer=2, head=i) for i in range(8)]
    ids = row.token_ids.tolist()
    with edited_hooks(llama, zero(every, preserve_norm=True), [row]):
        preserved = plain_logits(llama, ids)
    with edited_hooks(llama, zero(every), [row]):
        assert torch.equal(preserved, plain_logits(llama, ids))
    assert preserved.isfinite().all()


# Sweeps


def logit_by_hand(model: LensModel, probe: RefusalProbe, row: TokenizedTranscript, heads: Sequence[HeadRef]) -> float:
    where = [Scope.CLOSING.positions(row)]
    with torch.no_grad(), by_hand(model, heads, where):
        states = model.hf(input_ids=torch.from_numpy(row.token_ids)[None], output_hidden_states=True).hidden_states
    return float(states[probe.layer + 1][0, row.final] @ torch.from_numpy(probe.weight)) + probe.bias


def test_the_method_measures_what_the_hook_by_hand_does(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 2), tokens_of(model, refused[:2])
    ranking = rank_heads(model, probe, refused[:2], method="norm-preserving")
    assert ranking.path == "packed"
    for i, row in enumerate(rows):
        clean = logit_by_hand(model, probe, row, [])
        for head in HEADS:
            effect = ranking.effects[i, ranking.heads.index(head)]
            expected = logit_by_hand(model, probe, row, [head]) - clean
            assert effect == pytest.approx(expected, rel=1e-3, abs=1e-3)
    zeroed = rank_heads(model, probe, refused[:2])
    assert np.abs(ranking.effects - zeroed.effects).max() > 1e-2


@pytest.mark.parametrize("scope", SCOPES)
def test_every_sweep_is_the_plain_pass(model: LensModel, refused: Transcripts, scope: str) -> None:
    from cliffscope.heads.branches import plain_logit
    from cliffscope.heads.sweep import sweep_branches

    probe, rows = random_probe(model, 3), tokens_of(model, refused[:3])
    change = SweepChange(kind=EditKind.NORM_PRESERVING, preserve_norm=True)
    job = Job(model=model, readout=probe, branches=((HEADS[0],), HEADS, ()), change=change, scope=Scope(scope))
    swept = sweep_branches(model, probe, rows, job.branches, change=change, scope=Scope(scope))
    assert swept.path == ("packed" if scope == "closing" else "batched")
    expected = [[plain_logit(job, row, i, branch) for branch in job.branches] for i, row in enumerate(rows)]
    np.testing.assert_allclose(swept.edited, expected, rtol=1e-4, atol=1e-3)


def test_suppression_and_early_closings_take_it(llama: LensModel, refused: Transcripts) -> None:
    probe, edit = random_probe(llama, 4), zero(HEADS, scope="closing", preserve_norm=True)
    measured = measure_suppression(llama, probe, refused[:2], edit, controls=2)
    for i, row in enumerate(tokens_of(llama, refused[:2])):
        assert measured.edited[i] == pytest.approx(logit_by_hand(llama, probe, row, HEADS), rel=1e-3, abs=1e-3)
    curves = trace_early_closings(llama, probe, refused[:1], edit=edit)
    assert curves.path == "packed"
    assert curves.logits[0][-1] == pytest.approx(float(measured.edited[0]), rel=1e-3, abs=1e-3)


# While text is generated


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    both = written(6, harmful=True, outcome=Outcome.UNJUDGED) + written(4, harmful=False, outcome=Outcome.UNJUDGED)
    return both.map(lambda t: t.replace(thinking=None, answer=None))


@pytest.mark.parametrize("scope", SCOPES)
def test_generation_under_it_is_the_slow_loop(talker: LensModel, prompts: Transcripts, scope: str) -> None:
    edit = zero(APART, scope=scope, preserve_norm=True)
    changes = [Change(layer=ref.layer, head=ref.head, scope=scope, preserve_norm=True) for ref in APART]
    checked = 0
    for prompt, rolled in zip(prompts, cs.roll_out(talker, prompts, edit=edit, **BUDGET), strict=True):
        slow = slow_roll_out(talker, prompt, changes, **BUDGET)
        if (rolled.thinking or "").startswith("<think>"):
            continue
        assert rolled.answer_ids == (None if slow.answer is None else tuple(slow.answer))
        assert list(rolled.thinking_ids or ()) == slow.thinking
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("scope", SCOPES)
def test_answers_under_it_are_the_slow_loops_on_thinking_that_is_there(
    talker: LensModel, prompts: Transcripts, scope: str
) -> None:
    thought = [t for t in cs.roll_out(talker, prompts, **BUDGET) if t.closed]
    closed = Transcripts(t for t in thought if not t.thinking.startswith("<think>"))
    changes = [Change(layer=ref.layer, head=ref.head, scope=scope, preserve_norm=True) for ref in APART]
    answered = answer_transcripts(talker, closed, edit=zero(APART, scope=scope, preserve_norm=True), max_answer=6)
    differ = 0
    for before, after in zip(closed, answered, strict=True):
        slow = slow_roll_out(talker, before.replace(thinking=None, answer=None), **BUDGET)
        ids = slow.seen[: len(slow.spans)]
        assert list(after.answer_ids) == slow_answer(talker, ids, slow.spans, changes, max_answer=6)
        differ += after.answer_ids != before.answer_ids
    assert len(closed) > 5
    assert differ


def test_rows_under_other_edits_are_left_alone(talker: LensModel, prompts: Transcripts) -> None:
    closed = Transcripts(t for t in cs.roll_out(talker, prompts, **BUDGET) if t.closed)
    arms = [None, zero(APART), zero(APART, preserve_norm=True), zero(APART, scope="closing", preserve_norm=True)]
    mixed = [arms[i % len(arms)] for i in range(len(closed))]
    together = answer_transcripts(talker, closed, edit=mixed, max_answer=6)
    for i, (t, edit) in enumerate(zip(closed, mixed, strict=True)):
        alone = answer_transcripts(talker, Transcripts([t]), edit=edit, max_answer=6)
        assert together[i].answer_ids == alone[0].answer_ids


def test_an_evaluation_everywhere_is_the_roll_out_under_the_edit(llama: LensModel, prompts: Transcripts) -> None:
    edit = zero(APART, preserve_norm=True)
    answers: dict[str, Transcripts] = {}
    cs.evaluate_safety(llama, prompts, edit=edit, controls=1, on_arm=answers.__setitem__, **BUDGET)
    rolled = cs.roll_out(llama, prompts, edit=edit, **BUDGET)
    assert [t.answer_ids for t in answers["top heads"]] == [t.answer_ids for t in rolled]
    assert list(answers) == ["unedited", "top heads", "random 1"]


# What it cannot be


def test_weights_and_checkpoints_cannot_hold_it(
    llama: LensModel, unchanged: Callable[[LensModel], Callable[[], None]], tmp_path: Path
) -> None:
    check, edit = unchanged(llama), zero(HEADS, preserve_norm=True)
    with pytest.raises(EditError, match=r"cannot be held in weights: it scales .* at every position"):
        edited_weights(llama, edit).__enter__()
    with pytest.raises(EditError, match="cannot be held in weights"):
        edited_weights(llama, compose(zero(APART[:1]), edit)).__enter__()
    with pytest.raises(EditError, match="cannot be held in weights"):
        cs.export_edited(llama, edit, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    check()


def test_two_edits_of_one_layer_have_no_common_norm() -> None:
    with pytest.raises(EditError, match="preserves the norm of layer 2, in which another edit"):
        compose(zero(HEADS[1:2], preserve_norm=True), zero(HEADS[2:]))
    with pytest.raises(EditError, match="norm of layer 2"):
        compose(zero(HEADS[1:2], preserve_norm=True), scale(HEADS[2:], 0.5, preserve_norm=True))
    assert len(compose(zero(HEADS[1:], preserve_norm=True), zero(HEADS[:1])).edits) == 2


def test_it_has_no_estimate_head_by_head(llama: LensModel, refused: Transcripts) -> None:
    change = SweepChange(kind=EditKind.NORM_PRESERVING, preserve_norm=True)
    job = Job(model=llama, readout=random_probe(llama, 4), branches=(HEADS,), change=change, scope=Scope.CLOSING)
    with pytest.raises(EditError, match="no estimate head by head"):
        attribute_heads(job, tokens_of(llama, refused[:1]))


def test_an_edit_of_ones_own_can_preserve_norms_too(llama: LensModel, row: TokenizedTranscript) -> None:
    values = np.random.default_rng(1).normal(size=(3, 1, llama.shape.d_head)).astype(np.float32)
    edit = HeadEdit(heads=HEADS, kind="shift", factor=1.0, values=values, preserve_norm=True)
    assert HeadEdit.from_dict(edit.to_dict()) == edit
    seen: list[Tensor] = []
    projection = llama.hf.get_decoder().layers[0].self_attn.o_proj

    def look(_module: object, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].clone())

    first = projection.register_forward_pre_hook(look)
    with edited_hooks(llama, edit, [row]):
        second = projection.register_forward_pre_hook(look)
        plain_logits(llama, row.token_ids.tolist())
    first.remove()
    second.remove()
    before, after = (z[0].unflatten(-1, (8, -1)) for z in seen)
    shifted = before.clone()
    shifted[:, 1] += torch.from_numpy(values[0, 0])
    shifted *= (before.flatten(1).norm(dim=1) / shifted.flatten(1).norm(dim=1))[:, None, None]
    torch.testing.assert_close(after, shifted, rtol=1e-5, atol=1e-6)
