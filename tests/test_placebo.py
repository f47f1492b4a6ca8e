"""Norm-matched directions: against hooks written by hand and TransformerLens' placebo, and as controls of a set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import plain_logits, random_probe, tokens_of
from torch import Tensor

import cliffscope as cs
from cliffscope.errors import EditError
from cliffscope.heads.controls import KINDS, SetControl, control_sets
from cliffscope.heads.edits import HeadRef, Scope, zero
from cliffscope.heads.placebo import NormMatched, draw_directions
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

HEADS = (HeadRef(layer=0, head=1), HeadRef(layer=2, head=3), HeadRef(layer=2, head=0))
Directions = Mapping[int, np.ndarray]


@contextmanager
def by_hand(
    model: LensModel, where: slice, directions: Directions, z_after: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Hooks of the test's own: what the weights make of the change in `hook_z` says how far the output is moved."""
    handles = []

    def hook_for(layer: int) -> Callable[..., Tensor]:
        def hook(module: torch.nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            moved = output.clone()
            for position in range(where.start, where.stop):
                z = inputs[0][0, position]
                delta = module.weight @ (z_after(layer, z) - z)
                moved[0, position] += delta.norm() * torch.from_numpy(directions[layer])
            return moved

        return hook

    try:
        for layer in directions:
            projection = model.hf.get_decoder().layers[layer].self_attn.o_proj
            handles.append(projection.register_forward_hook(hook_for(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def scaled(model: LensModel, factor: float) -> Callable[[int, Tensor], Tensor]:
    def after(layer: int, z: Tensor) -> Tensor:
        heads = z.clone().view(model.shape.n_heads, -1)
        for ref in HEADS:
            if ref.layer == layer:
                heads[ref.head] *= factor
        return heads.flatten()

    return after


def logit(model: LensModel, probe: RefusalProbe, row: TokenizedTranscript) -> float:
    with torch.no_grad():
        states = model.hf(input_ids=torch.from_numpy(row.token_ids)[None], output_hidden_states=True).hidden_states
    return float(states[probe.layer + 1][0, row.final] @ torch.from_numpy(probe.weight)) + probe.bias


@pytest.mark.parametrize("scope", ["closing", "thinking"])
@pytest.mark.parametrize(("method", "factor"), [("zero", 0.0), ("scale", -0.5)])
def test_the_controls_are_the_loop_by_hand(
    model: LensModel, refused: Transcripts, scope: str, method: str, factor: float
) -> None:
    probe, rows = random_probe(model, 2), tokens_of(model, refused[:2])
    control = control_sets(
        *(model, probe, refused[:2], HEADS),
        method=method,
        factor=factor or None,
        scope=scope,
        kinds=["norm-matched"],
        draws=3,
        seed=7,
    )
    directions = draw_directions([0, 2], model.shape.d_model, 3, np.random.default_rng(7))
    assert control.directions.shape == (3, 2)
    for i, row in enumerate(rows):
        clean = logit(model, probe, row)
        for drawn, effects in zip(directions, control.directions, strict=True):
            with by_hand(model, Scope(scope).positions(row), drawn, scaled(model, factor)):
                expected = logit(model, probe, row) - clean
            assert effects[i] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert np.abs(control.directions).max() > 1e-2


def test_values_of_donors_and_preserved_norms_are_matched(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe, (row,) = random_probe(llama, 2), tokens_of(llama, refused[:1])
    drawn = draw_directions([0, 2], llama.shape.d_model, 1, np.random.default_rng(0))[0]
    preserving = control_sets(
        llama, probe, refused[:1], HEADS, method="norm-preserving", kinds=["norm-matched"], draws=1
    )

    def after(layer: int, z: Tensor) -> Tensor:
        zeroed = scaled(llama, 0.0)(layer, z)
        return zeroed * z.norm() / zeroed.norm()

    with by_hand(llama, Scope.CLOSING.positions(row), drawn, after):
        expected = logit(llama, probe, row)
    assert preserving.directions[0, 0] == pytest.approx(expected - logit(llama, probe, row), rel=1e-3, abs=1e-3)

    patched = control_sets(
        *(llama, probe, refused[:1], HEADS),
        method="patch",
        donors={refused[0].id: complied[0]},
        kinds=["norm-matched"],
        draws=1,
    )
    (donor,) = tokens_of(llama, complied[:1])
    names = [f"blocks.{layer}.attn.hook_z" for layer in (0, 2)]
    with torch.no_grad():
        _, cache = llama.bridge.run_with_cache(torch.from_numpy(donor.token_ids)[None], names_filter=names)
    closing, places = Scope.CLOSING.positions(donor), dict[int, int]()

    def with_the_donors(layer: int, z: Tensor) -> Tensor:
        place = places[layer] = places.get(layer, -1) + 1
        heads = z.clone().view(llama.shape.n_heads, -1)
        for ref in HEADS:
            if ref.layer == layer:
                heads[ref.head] = cache[f"blocks.{layer}.attn.hook_z"][0, closing.start + place, ref.head]
        return heads.flatten()

    with by_hand(llama, Scope.CLOSING.positions(row), drawn, with_the_donors):
        expected = logit(llama, probe, row)
    assert patched.directions[0, 0] == pytest.approx(expected - logit(llama, probe, row), rel=1e-3, abs=1e-3)


def test_it_is_the_placebo_of_transformerlens_up_to_the_sign(model: LensModel, refused: Transcripts) -> None:
    upstream = pytest.importorskip("transformer_lens.tools.analysis", reason="placebos are in TransformerLens 4")
    (row,) = tokens_of(model, refused[:1])
    heads, where = [ref for ref in HEADS if ref.layer == 2], Scope.CLOSING.positions(row)
    (direction,) = draw_directions([2], model.shape.d_model, 1, np.random.default_rng(3))
    edit = zero(heads, scope="closing")
    outputs: list[Tensor] = []
    projection = model.output_projection(2)

    def output(acting: object | None) -> Tensor:
        context = None if acting is None else acting.hooks(model, [row])
        if context is not None:
            context.__enter__()
        handle = projection.register_forward_hook(lambda _module, _inputs, out: outputs.append(out[0, where].clone()))
        plain_logits(model, row.token_ids.tolist())
        handle.remove()
        if context is not None:
            context.__exit__(None, None, None)
        return outputs[-1].detach()

    base, source = output(None), output(edit)
    placebo = output(NormMatched(edits={row.id: edit}, directions=direction))
    whole = upstream.SubspaceInterchange(torch.eye(model.shape.d_model))
    expected = upstream.NormMatchedPlacebo(whole, torch.from_numpy(direction[2])[:, None])(base, source)
    sign = torch.sign((source - base) @ torch.from_numpy(direction[2]))[:, None]
    torch.testing.assert_close(placebo - base, sign * (expected - base), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((placebo - base).norm(dim=-1), (source - base).norm(dim=-1), rtol=1e-3, atol=1e-5)


def test_directions_are_unit_vectors_all_different_and_drawn_by_the_seed() -> None:
    drawn, again = (draw_directions([1, 4], 16, 5, np.random.default_rng(2)) for _ in range(2))
    vectors = np.array([each[layer] for each in drawn for layer in (1, 4)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(vectors, [each[layer] for each in again for layer in (1, 4)])
    assert len(np.unique(vectors, axis=0)) == 10
    many = np.array([each[0] for each in draw_directions([0], 3, 4000, np.random.default_rng(0))])
    np.testing.assert_allclose(many.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(many.T @ many / len(many), np.eye(3) / 3, atol=0.03)


def test_nothing_but_the_scope_is_moved_and_the_model_is_as_it_was(
    llama: LensModel, refused: Transcripts, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    check, (row,) = unchanged(llama), tokens_of(llama, refused[:1])
    ids, closing = row.token_ids.tolist(), Scope.CLOSING.positions(row)
    clean = plain_logits(llama, ids)
    (directions,) = draw_directions([0, 2], llama.shape.d_model, 1, np.random.default_rng(0))
    placebo = NormMatched(edits={row.id: zero(HEADS, scope="closing")}, directions=directions)
    with placebo.hooks(llama, [row]):
        moved = plain_logits(llama, ids)
    assert torch.equal(moved[: closing.start], clean[: closing.start])
    assert (moved[closing] - clean[closing]).abs().max() > 1e-3
    with pytest.raises(KeyboardInterrupt), placebo.hooks(llama, [row]):
        raise KeyboardInterrupt
    check()


# As controls


def control_of(effects: Sequence[float], **kinds: Sequence[float]) -> SetControl:
    columns = {name: np.repeat(np.array(means, np.float32)[:, None], len(effects), 1) for name, means in kinds.items()}
    empty = np.zeros((0, len(effects)), np.float32)
    every = {"random_layers": empty, "random_all": empty, **columns}
    return SetControl(heads=HEADS, effects=np.array(effects, np.float32), seed=0, **every)


def test_each_kind_has_its_p_and_the_largest_counts() -> None:
    control = control_of([2.0, 4.0], random_layers=[1.0, 3.5], random_all=[0.0, 0.0, 0.0], directions=[3.0, 5.0, -9.0])
    # The effect is 3; reached by one of two, none of three, and two of three.
    assert control.p_by_kind == {"same layers": 2 / 3, "all heads": 1 / 4, "norm-matched": 3 / 4}
    assert control.p == 3 / 4
    assert control.random_effects.tolist() == [1.0, 3.5, 0.0, 0.0, 0.0, 3.0, 5.0, -9.0]
    frame = control.to_frame()
    assert frame.groupby("kind", sort=False).size().to_dict() == {
        "chosen": 1,
        **dict(zip(KINDS, (2, 3, 3), strict=True)),
    }
    assert control.small_table().set_index("kind").loc["norm-matched", ["min", "max"]].tolist() == [-9.0, 5.0]
    assert len(control.plot().data[0].x) == 8
    alone = control_of([2.0, 4.0], directions=[0.0, 1.0])
    assert alone.p_by_kind == {"norm-matched": 1 / 3}
    assert "random +0.50, p=0.333" in repr(alone)


def test_a_kind_more_leaves_the_others_as_they_are(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 5)
    two, three = (control_sets(llama, probe, refused[:2], HEADS, kinds=kinds, draws=4) for kinds in (KINDS[:2], KINDS))
    np.testing.assert_array_equal(two.random_layers, three.random_layers)
    np.testing.assert_array_equal(two.random_all, three.random_all)
    assert (len(two.directions), len(three.directions)) == (0, 4)
    assert list(two.p_by_kind) == ["same layers", "all heads"]
    assert list(three.p_by_kind) == list(KINDS)


def test_kinds_that_are_not_there_and_methods_without_an_edit_are_refused(
    llama: LensModel, refused: Transcripts
) -> None:
    arguments = (llama, random_probe(llama, 5), refused[:1], HEADS)
    for kinds in (["placebo"], [], "all heads"):
        with pytest.raises(EditError, match="expected a list of kinds of controls, from same layers, all heads, norm"):
            control_sets(*arguments, kinds=kinds)
    for method in ("direct", "greedy", "attribution"):
        with pytest.raises(EditError, match=f"method='{method}' makes no edit .* such as 'zero'"):
            control_sets(*arguments, kinds=["norm-matched"], method=method)


def test_planted_heads_do_more_than_any_direction_of_their_size() -> None:
    model, truth = cs.load_model("planted-llama"), cs.organisms.read_truth("planted-llama")
    prompts, _ = cs.organisms.study_prompts("planted-llama", n=120)
    ts = cs.judge(cs.roll_out(model, prompts, max_thinking=128, max_answer=32))
    answer = cs.fit_answer_readout(model, ts.where(outcome="refused"), ts.where(outcome="complied"))
    suppressed = ts.where(harmful=True, outcome="complied")[:12]
    control = control_sets(model, answer, suppressed, truth.planted, kinds=["norm-matched"], draws=19)
    assert control.p_by_kind == {"norm-matched": 1 / 20}
    assert control.effect > control.directions.mean(1).max()
