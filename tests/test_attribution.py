"""Attribution is the gradient: against finite differences, and against TransformerLens' own attribution patching."""

import numpy as np
import pytest
import torch
from conftest import random_probe, tokens_of

from cliffscope.heads.attribution import attribute_heads
from cliffscope.heads.branches import Change, Job
from cliffscope.heads.edits import EditKind, HeadRef, Scope
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts

HEADS = [HeadRef(layer=layer, head=head) for layer in range(3) for head in range(4)]


def job_of(model: LensModel, layer: int, scope: Scope, change: Change | None = None) -> Job:
    branches = (*((head,) for head in HEADS), tuple(HEADS[:3]))
    return Job(
        model=model, readout=random_probe(model, layer), branches=branches, change=change or Change(), scope=scope
    )


@pytest.mark.parametrize("scope", list(Scope))
def test_the_estimate_is_the_derivative_of_the_exact_effect(
    model: LensModel, refused: Transcripts, scope: Scope
) -> None:
    rows, step = tokens_of(model, refused[:2]), 1e-2
    estimated = attribute_heads(job_of(model, 2, scope), rows)
    ends = [
        sweep_branches(
            model,
            random_probe(model, 2),
            rows,
            job_of(model, 2, scope).branches,
            change=Change(kind=EditKind.SCALE, factor=1 + sign * step),
            scope=scope,
        ).edited
        for sign in (-1, 1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(estimated.effects, slope, rtol=0.03, atol=0.03)
    assert np.abs(slope).max() > 0.3


def test_heads_above_the_probes_layer_have_no_effect(model: LensModel, refused: Transcripts) -> None:
    found = attribute_heads(job_of(model, 1, Scope.CLOSING), tokens_of(model, refused[:1]))
    assert not found.effects[0, 8:12].any()
    assert found.effects[0, :8].any()


def test_a_sets_estimate_is_the_sum_of_its_heads(model: LensModel, refused: Transcripts) -> None:
    found = attribute_heads(job_of(model, 2, Scope.CLOSING), tokens_of(model, refused[:2]))
    np.testing.assert_allclose(found.effects[:, -1], found.effects[:, :3].sum(1), rtol=1e-4, atol=1e-5)


def test_the_estimate_of_fixed_values_is_gradient_times_change(model: LensModel, refused: Transcripts) -> None:
    rows, shape = tokens_of(model, refused[:1]), model.shape
    zeroed = attribute_heads(job_of(model, 2, Scope.CLOSING), rows).effects
    values = torch.zeros(shape.n_layers, 1, shape.n_heads, shape.d_head)
    as_values = job_of(model, 2, Scope.CLOSING, Change(kind=EditKind.MEAN, values=(values,)))
    np.testing.assert_allclose(attribute_heads(as_values, rows).effects, zeroed, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_transformerlens(model: LensModel, refused: Transcripts) -> None:
    tools = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching", reason="only in 4.x")
    probe, (row,) = random_probe(model, model.shape.n_layers - 1), tokens_of(model, refused[:1])
    ids, final = torch.from_numpy(row.token_ids)[None], row.final
    last: list[torch.Tensor] = []
    handle = model.bridge.blocks[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        cache = tools.cache_activation_and_gradient(
            model.bridge,
            ids,
            lambda logits: last[-1][0, final] @ torch.from_numpy(probe.weight) + probe.bias,
        )
    finally:
        handle.remove()
    found = attribute_heads(job_of(model, model.shape.n_layers - 1, Scope.CLOSING), [row])
    where = Scope.CLOSING.positions(row)
    for i, head in enumerate(HEADS):
        name = f"blocks.{head.layer}.attn.hook_z"
        z, gradient = (part[name][0, where, head.head] for part in (cache.activations, cache.gradients))
        assert found.effects[0, i] == pytest.approx(-float((z * gradient).sum()), rel=1e-3, abs=1e-3)


def test_weights_ask_for_gradients_as_before_and_hold_none(llama: LensModel, refused: Transcripts) -> None:
    before = [p.requires_grad for p in llama.hf.parameters()]
    attribute_heads(job_of(llama, 2, Scope.CLOSING), tokens_of(llama, refused[:1]))
    assert [p.requires_grad for p in llama.hf.parameters()] == before
    assert all(p.grad is None for p in llama.hf.parameters())
