import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import plain_logits, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cliffscope.errors import EditError
from cliffscope.heads.editing import edited_hooks, edited_weights
from cliffscope.heads.edits import (
    EditKind,
    EditPlan,
    HeadEdit,
    HeadRef,
    Scope,
    compose,
    scale,
    zero,
)
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=2, head=3), HeadRef(layer=2, head=0)]
refs = st.builds(HeadRef, layer=st.integers(0, 99), head=st.integers(0, 99))
TakeCopy = Callable[[LensModel], Callable[[], None]]


@pytest.fixture
def ids(model: LensModel, refused: Transcripts) -> list[int]:
    return tokens_of(model, refused[:1])[0].token_ids.tolist()


def row_of(ids: list[int], where: slice) -> TokenizedTranscript:
    """A transcript whose closing stands at `where`."""
    return TokenizedTranscript(
        id="row", token_ids=np.array(ids), bounds=(where.start, where.start, where.stop, len(ids))
    )


def whole(ids: list[int]) -> list[TokenizedTranscript]:
    """A transcript that is edited everywhere."""
    return [row_of(ids, slice(0, len(ids)))]


def bridge_logits(model: LensModel, ids: list[int], edit: HeadEdit | EditPlan, where: slice) -> Tensor:
    """The oracle: TransformerLens' own hooks, one a head."""

    def hook_for(one: HeadEdit, i: int) -> Callable[..., Tensor]:
        def hook(z: Tensor, hook: object) -> Tensor:
            changed, head = z.clone(), one.heads[i].head
            changed[:, where, head] = changed[:, where, head] * one.factor
            if one.values is not None:
                changed[:, where, head] += torch.tensor(one.values[i])
            return changed

        return hook

    hooks = [
        (f"blocks.{ref.layer}.attn.hook_z", hook_for(one, i)) for one in edit.edits for i, ref in enumerate(one.heads)
    ]
    with torch.no_grad():
        return model.bridge.run_with_hooks(torch.tensor([ids]), return_type="logits", fwd_hooks=hooks)[0]


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, -2.0])
def test_weight_edit_hook_edit_and_bridge_hooks_give_the_same_logits(
    model: LensModel, ids: list[int], factor: float
) -> None:
    edit = scale(HEADS, factor)
    with edited_weights(model, edit):
        by_weights = plain_logits(model, ids)
    with edited_hooks(model, edit, whole(ids)):
        by_hooks = plain_logits(model, ids)
    expected = bridge_logits(model, ids, edit, slice(None))
    torch.testing.assert_close(by_weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_hooks, expected, rtol=1e-4, atol=1e-5)
    moved = float((by_weights - plain_logits(model, ids)).abs().max())
    assert moved == 0.0 if factor == 1.0 else moved > 0.01


@pytest.mark.parametrize("where", [slice(3, 7), slice(0, 1), slice(5, 5)])
def test_a_hook_edit_acts_at_its_positions_alone(model: LensModel, ids: list[int], where: slice) -> None:
    edit = zero(HEADS, scope=Scope.CLOSING)
    with edited_hooks(model, edit, [row_of(ids, where)]):
        found = plain_logits(model, ids)
    torch.testing.assert_close(found, bridge_logits(model, ids, edit, where), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[: where.start], plain_logits(model, ids)[: where.start])


def test_each_row_of_a_batch_is_edited_at_its_own_positions(model: LensModel, refused: Transcripts) -> None:
    rows = [t.token_ids.tolist() for t in tokens_of(model, refused[:3])]
    where = [slice(2, 4), slice(0, 0), slice(5, 6)]
    edit = scale(HEADS, 0.5, scope=Scope.CLOSING)
    batch = model.to_batch(rows)
    marked = [row_of(ids, at) for ids, at in zip(rows, where, strict=True)]
    with torch.no_grad(), edited_hooks(model, edit, marked):
        found = model.hf(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
    for ids, logits, at in zip(rows, found, where, strict=True):
        torch.testing.assert_close(logits[: len(ids)], bridge_logits(model, ids, edit, at), rtol=1e-3, atol=1e-4)


def test_the_bridge_sees_a_weight_edit(model: LensModel, ids: list[int]) -> None:
    with edited_weights(model, zero(HEADS)), torch.no_grad():
        through_bridge = model.bridge(torch.tensor([ids]), return_type="logits")[0]
        torch.testing.assert_close(through_bridge, plain_logits(model, ids), rtol=1e-4, atol=1e-5)


def test_weights_are_restored_bit_for_bit(model: LensModel, unchanged: TakeCopy) -> None:
    check = unchanged(model)
    with edited_weights(model, scale(HEADS, 1 / 3)):
        pass
    check()


def test_weights_are_restored_after_an_exception(model: LensModel, unchanged: TakeCopy) -> None:
    check = unchanged(model)
    with pytest.raises(KeyboardInterrupt), edited_weights(model, zero(HEADS)):
        raise KeyboardInterrupt
    check()


def test_weights_are_restored_when_nested_edits_share_a_head(model: LensModel, unchanged: TakeCopy) -> None:
    check = unchanged(model)
    with edited_weights(model, zero(HEADS[:2])), edited_weights(model, scale(HEADS[1:], 7.0)):
        assert not model.output_projection(0).weight[:, model.shape.d_head : 2 * model.shape.d_head].any()
    check()


def test_weights_are_restored_when_an_edit_fails_half_way(
    model: LensModel, unchanged: TakeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, real, calls = unchanged(model), Tensor.mul_, []

    def fail_at_the_second(self: Tensor, other: float) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(self, other)

    monkeypatch.setattr(Tensor, "mul_", fail_at_the_second)
    with pytest.raises(MemoryError), edited_weights(model, zero(HEADS)):
        pass
    monkeypatch.undo()
    check()


def test_hooks_are_gone_after_an_exception(model: LensModel, unchanged: TakeCopy, ids: list[int]) -> None:
    check, clean = unchanged(model), plain_logits(model, ids)
    with pytest.raises(KeyboardInterrupt), edited_hooks(model, zero(HEADS), whole(ids)):
        raise KeyboardInterrupt
    check()
    assert torch.equal(plain_logits(model, ids), clean)


def test_an_edit_of_no_heads_changes_nothing(model: LensModel, ids: list[int]) -> None:
    clean = plain_logits(model, ids)
    with edited_weights(model, zero([])), edited_hooks(model, zero([]), whole(ids)):
        assert torch.equal(plain_logits(model, ids), clean)


def test_a_head_named_twice_is_refused() -> None:
    with pytest.raises(EditError, match=r"L2H3 edited twice"):
        zero([HEADS[1], HEADS[0], HeadRef(layer=2, head=3)])


@pytest.mark.parametrize("ref", [HeadRef(layer=8, head=0), HeadRef(layer=0, head=8), HeadRef(layer=-1, head=0)])
def test_a_head_that_the_model_lacks_is_refused_before_anything_changes(
    llama: LensModel, unchanged: TakeCopy, ref: HeadRef
) -> None:
    check = unchanged(llama)
    edit = zero([HEADS[0], ref])
    with (
        pytest.raises(EditError, match=rf"no head {re.escape(str(ref))}: it has layers 0 to 7"),
        edited_weights(llama, edit),
    ):
        pass
    with pytest.raises(EditError, match="no head"), edited_hooks(llama, edit, []):
        pass
    check()


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.THINKING, Scope.PROMPT])
def test_weights_cannot_hold_an_edit_of_some_positions(llama: LensModel, scope: Scope) -> None:
    edit = zero(HEADS, scope=scope)
    with pytest.raises(EditError, match=f"Scope {scope}.*edited_hooks"), edited_weights(llama, edit):
        pass


def test_scopes_are_the_spans_up_to_the_final_position(llama: LensModel, refused: Transcripts) -> None:
    (row,) = tokens_of(llama, refused[:1])
    prompt, thinking, closing, _ = row.bounds
    assert Scope.ALL.positions(row) == slice(0, row.final + 1)
    assert Scope.PROMPT.positions(row) == slice(0, prompt)
    assert Scope.THINKING.positions(row) == slice(prompt, thinking)
    assert Scope.CLOSING.positions(row) == slice(thinking, closing)


def test_a_head_is_printed_and_read_as_layer_and_head() -> None:
    assert str(HeadRef(layer=12, head=5)) == "L12H5"
    assert HeadRef.parse("L12H5") == HeadRef(layer=12, head=5)


@pytest.mark.parametrize("text", ["", "L1", "H2L1", "L1H", "L-1H2", "L1H2 ", "l1h2", "L1H2H3", "L1H2\n"])
def test_anything_else_names_no_head(text: str) -> None:
    with pytest.raises(EditError, match="names no head"):
        HeadRef.parse(text)


@given(
    st.lists(refs, unique=True, max_size=6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(list(Scope)),
)
def test_an_edit_round_trips_through_json(heads: list[HeadRef], factor: float, scope: Scope) -> None:
    values = np.array([[(float(i), factor % 7)] for i in range(len(heads))], np.float32).reshape(len(heads), 1, 2)
    edits = [
        scale(heads, factor, scope=scope),
        zero(heads, scope=scope),
        zero(heads, scope=scope, preserve_norm=True),
        scale(heads, factor, scope=scope, preserve_norm=True),
        *(HeadEdit(heads=tuple(heads), kind=EditKind(k), values=values, scope=scope) for k in ("mean", "patch")),
    ]
    for edit in edits:
        assert HeadEdit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
        assert EditPlan.from_dict(json.loads(json.dumps(edit.to_dict()))) == compose(edit)
        assert EditPlan.from_dict(json.loads(json.dumps(compose(edit).to_dict()))) == compose(edit)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"heads": "L1H2", "kind": "zero"},
        {"heads": ["L1H2"]},
        {"heads": ["L1H2"], "kind": "remove"},
        {"heads": ["L1H2"], "kind": "scale", "factor": "none"},
        {"heads": ["L1H2"], "kind": "zero", "scope": "everywhere"},
        {"heads": ["L1H2"], "kind": "zero", "scope": ["all"]},
        {"heads": ["1.2"], "kind": "zero"},
        {"heads": ["L1H2", "L1H2"], "kind": "zero"},
        {"heads": ["L1H2"], "kind": "scale", "factor": float("nan")},
        {"heads": ["L1H2"], "kind": "zero", "factor": 0.5},
        {"heads": ["L1H2"], "kind": "zero", "preserve_norm": True},
        {"heads": ["L1H2"], "kind": "norm-preserving", "preserve_norm": False},
        {"heads": ["L1H2"], "kind": "norm-preserving", "preserve_norm": "yes"},
        {"heads": ["L1H2"], "kind": "norm-preserving", "values": [[[1.0]]]},
        {"heads": ["L1H2"], "kind": "mean"},
        {"heads": ["L1H2"], "kind": "mean", "values": [["x"]]},
        {"heads": ["L1H2"], "kind": "mean", "values": [[[float("inf")]]]},
        {"heads": ["L1H2"], "kind": "mean", "values": [[[1e39]]]},
        {"heads": ["L1H2"], "kind": "mean", "values": [[1.0, 2.0]]},
        {"heads": ["L1H2", "L1H3"], "kind": "mean", "values": [[[1.0]], [[1.0, 2.0]]]},
    ],
)
def test_what_is_no_edit_cannot_be_read(data: dict[str, object]) -> None:
    with pytest.raises(EditError):
        HeadEdit.from_dict(data)


def test_values_are_a_read_only_copy_compared_number_by_number() -> None:
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    edits = [HeadEdit(heads=tuple(HEADS[:1]), kind=EditKind.PATCH, values=array) for _ in range(2)]
    array[0, 0, 0] = 7.0
    assert edits[0].values is not None
    assert edits[0].values.dtype == np.float32
    assert edits[0].values[0, 0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        edits[0].values[0, 0, 0] = 1.0
    other = HeadEdit(heads=tuple(HEADS[:1]), kind=EditKind.PATCH, values=array)
    assert edits[0] == edits[1] != other
    assert len({*edits, other}) == 2
    assert edits[0] != HeadEdit(heads=tuple(HEADS[:1]), kind=EditKind.PATCH, values=edits[0].values.reshape(1, 3, 2))


@pytest.mark.parametrize("shape", [(2, 1, 3), (0, 1, 3), (1, 0, 3)])
def test_values_for_another_number_of_heads_or_no_position_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(EditError, match=f"shape .{shape[0]}, .*1 heads need"):
        HeadEdit(heads=tuple(HEADS[:1]), kind=EditKind.MEAN, values=np.zeros(shape, np.float32))


def test_an_edit_of_another_kind_is_its_numbers(model: LensModel, ids: list[int]) -> None:
    edit = HeadEdit(heads=tuple(HEADS), kind="halve and shift", factor=0.5, values=values_for(model, HEADS, 1))
    assert HeadEdit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
    with edited_weights(model, edit):
        by_weights = plain_logits(model, ids)
    with edited_hooks(model, edit, whole(ids)):
        by_hooks = plain_logits(model, ids)
    expected = bridge_logits(model, ids, edit, slice(None))
    torch.testing.assert_close(by_weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_hooks, expected, rtol=1e-4, atol=1e-5)
    assert repr(HeadEdit(heads=(), kind="flip", factor=-1.0)) == "HeadEdit(flip by -1, 0 heads, scope all)"


def test_an_edit_prints_what_it_does() -> None:
    assert repr(zero(HEADS)) == "HeadEdit(zero, 3 heads, scope all)"
    assert repr(zero(HEADS, preserve_norm=True)) == "HeadEdit(norm-preserving, 3 heads, scope all)"
    assert repr(scale(HEADS, 0.5, preserve_norm=True)) == "HeadEdit(norm-preserving by 0.5, 3 heads, scope all)"
    assert repr(scale(HEADS[:1], 0.5, scope=Scope.CLOSING)) == "HeadEdit(scale by 0.5, 1 heads, scope closing)"


def values_for(model: LensModel, heads: list[HeadRef], positions: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(len(heads), positions, model.shape.d_head)).astype(np.float32)


def test_fixed_values_by_weights_by_hooks_and_by_the_bridge_give_the_same_logits(
    model: LensModel, ids: list[int], unchanged: TakeCopy
) -> None:
    check = unchanged(model)
    edit = HeadEdit(heads=tuple(HEADS), kind=EditKind.MEAN, values=values_for(model, HEADS, 1))
    with edited_weights(model, edit):
        by_weights = plain_logits(model, ids)
    with edited_hooks(model, edit, whole(ids)):
        by_hooks = plain_logits(model, ids)
    expected = bridge_logits(model, ids, edit, slice(None))
    torch.testing.assert_close(by_weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_hooks, expected, rtol=1e-4, atol=1e-5)
    check()


def test_values_of_each_position_act_at_their_own(model: LensModel, ids: list[int]) -> None:
    where = slice(4, 7)
    edit = HeadEdit(heads=tuple(HEADS), kind=EditKind.PATCH, values=values_for(model, HEADS, 3), scope=Scope.CLOSING)
    with edited_hooks(model, edit, [row_of(ids, where)]):
        found = plain_logits(model, ids)
    torch.testing.assert_close(found, bridge_logits(model, ids, edit, where), rtol=1e-4, atol=1e-5)


def test_values_for_another_number_of_positions_are_refused(llama: LensModel, refused: Transcripts) -> None:
    ids = tokens_of(llama, refused[:1])[0].token_ids.tolist()
    edit = HeadEdit(heads=(HEADS[0],), kind=EditKind.PATCH, values=values_for(llama, HEADS[:1], 2), scope=Scope.CLOSING)
    with (
        pytest.raises(EditError, match="2 positions .* scope has 3"),
        edited_hooks(llama, edit, [row_of(ids, slice(4, 7))]),
    ):
        plain_logits(llama, ids)
    with pytest.raises(EditError, match="cannot be held"), edited_weights(llama, edit):
        pass


def test_values_of_another_models_heads_are_refused(models: dict[str, LensModel]) -> None:
    edit = HeadEdit(heads=(HEADS[0],), kind=EditKind.MEAN, values=values_for(models["qwen3"], HEADS[:1], 1))
    with pytest.raises(EditError, match="12 numbers a head"), edited_weights(models["llama"], edit):
        pass


def test_a_plan_is_its_edits_together(model: LensModel, ids: list[int], unchanged: TakeCopy) -> None:
    check = unchanged(model)
    mean = HeadEdit(heads=(HEADS[2],), kind=EditKind.MEAN, values=values_for(model, HEADS[2:], 1))
    plan = compose(zero(HEADS[:1]), compose(scale(HEADS[1:2], 2.0), mean))
    expected = bridge_logits(model, ids, plan, slice(None))
    with edited_weights(model, plan):
        torch.testing.assert_close(plain_logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    with edited_hooks(model, plan, whole(ids)):
        torch.testing.assert_close(plain_logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    assert plan.heads == tuple(HEADS[:1] + HEADS[1:2] + HEADS[2:])
    assert plan.scope is Scope.ALL
    check()


def test_each_edit_of_a_plan_acts_in_its_own_scope(model: LensModel, refused: Transcripts) -> None:
    (row,) = tokens_of(model, refused[:1])
    ids, first, second = row.token_ids.tolist(), zero(HEADS[:1], scope="prompt"), zero(HEADS[1:], scope="closing")
    plan = compose(first, second)
    with edited_hooks(model, plan, [row]):
        found = plain_logits(model, ids)
    with edited_hooks(model, first, [row]), edited_hooks(model, second, [row]):
        torch.testing.assert_close(found, plain_logits(model, ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(EditError, match="scopes closing, prompt"):
        _ = plan.scope


def test_two_edits_of_one_head_in_one_plan_are_refused() -> None:
    with pytest.raises(EditError, match="L0H1 edited twice in one plan"):
        compose(zero(HEADS[:2]), scale(HEADS[:1], 0.5))


def test_an_edit_can_be_made_on_other_heads_unless_its_values_are_theirs(llama: LensModel) -> None:
    assert scale(HEADS, 0.5).on(HEADS[:1]) == scale(HEADS[:1], 0.5)
    with pytest.raises(EditError, match="values of its own heads"):
        HeadEdit(heads=(HEADS[0],), kind=EditKind.MEAN, values=values_for(llama, HEADS[:1], 1)).on(HEADS[1:])


def test_a_cached_start_shifts_the_positions(llama: LensModel, refused: Transcripts) -> None:
    from transformers import DynamicCache

    (row,) = tokens_of(llama, refused[:1])
    ids, start = torch.from_numpy(row.token_ids)[None], row.bounds[0]
    with torch.no_grad(), edited_hooks(llama, edit := zero(HEADS, scope="closing"), [row]):
        expected = llama.hf(input_ids=ids).logits[0, start:]
    cache = DynamicCache()
    with torch.no_grad():
        llama.hf(input_ids=ids[:, :start], past_key_values=cache, use_cache=True)
        with edited_hooks(llama, edit, [row], start=start):
            found = llama.hf(input_ids=ids[:, start:], past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
