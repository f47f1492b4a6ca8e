import numpy as np
import pytest
import torch
from conftest import count_hooks, plain_residuals, random_probe, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cliffscope.model.load import LensModel
from cliffscope.readouts import activations
from cliffscope.readouts.activations import gather_residuals, length_batches, project_layer, project_residuals
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

lengths = st.lists(st.integers(1, 300), max_size=40)


@pytest.fixture
def tokens(model: LensModel, refused: Transcripts) -> list[TokenizedTranscript]:
    return tokens_of(model, refused[:6])


def test_the_projection_is_the_hidden_state_times_the_direction(
    model: LensModel, tokens: list[TokenizedTranscript]
) -> None:
    probe = random_probe(model, 0)
    found = project_residuals(model, tokens, probe.layer_weights, probe.layer_biases)
    for row, logits in zip(tokens, found, strict=True):
        residuals = plain_residuals(model, row.token_ids.tolist())
        expected = np.einsum("lpd,ld->lp", residuals, probe.layer_weights) + probe.layer_biases[:, None]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert logits.dtype == np.float32


def test_gathered_residuals_are_the_hidden_states_at_these_positions(
    model: LensModel, tokens: list[TokenizedTranscript]
) -> None:
    positions = [np.array([t.final, 0, 2], dtype=np.int64) for t in tokens]
    found = gather_residuals(model, tokens, positions)
    for row, at, residuals in zip(tokens, positions, found, strict=True):
        expected = plain_residuals(model, row.token_ids.tolist())[:, at]
        np.testing.assert_allclose(residuals, expected, rtol=1e-4, atol=2e-5)
        assert residuals.dtype == np.float32


def test_a_transcript_scores_the_same_alone_and_in_a_batch(model: LensModel, tokens: list[TokenizedTranscript]) -> None:
    probe = random_probe(model, 0)
    scale = np.abs(probe.layer_weights).sum(1)[:, None]
    together = project_residuals(model, tokens, probe.layer_weights, probe.layer_biases)
    for row, batched in zip(tokens, together, strict=True):
        (alone,) = project_residuals(model, [row], probe.layer_weights, probe.layer_biases)
        np.testing.assert_allclose(batched / scale, alone / scale, rtol=0, atol=1e-5)


def test_batches_and_order_change_nothing(
    model: LensModel, tokens: list[TokenizedTranscript], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = random_probe(model, 0)
    together = project_residuals(model, tokens, probe.layer_weights, probe.layer_biases)
    monkeypatch.setattr(activations, "BATCH_TOKENS", 1)
    one_by_one = project_residuals(model, tokens[::-1], probe.layer_weights, probe.layer_biases)[::-1]
    for a, b in zip(together, one_by_one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_tokens_after_a_position_do_not_change_its_residual(
    model: LensModel, tokens: list[TokenizedTranscript]
) -> None:
    longest = max(tokens, key=lambda t: t.n_pos)
    cut = longest.n_pos // 2
    at = [np.array([cut - 1], dtype=np.int64)]
    prefix = TokenizedTranscript(id="cut", token_ids=longest.token_ids[:cut], bounds=(cut, cut, cut, cut))
    (whole,), (half,) = gather_residuals(model, [longest], at), gather_residuals(model, [prefix], at)
    np.testing.assert_allclose(whole, half, rtol=1e-4, atol=1e-5)


def test_progress_counts_every_transcript_once(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 120)
    tokens, probe, seen = tokens_of(llama, refused[:9]), random_probe(llama, 0), []
    project_residuals(llama, tokens, probe.layer_weights, probe.layer_biases, progress=seen.append)
    assert seen[-1] == 9
    assert len(seen) > 2
    assert seen == sorted(set(seen))


def test_no_transcripts_give_no_projections(llama: LensModel) -> None:
    probe = random_probe(llama, 0)
    assert project_residuals(llama, [], probe.layer_weights, probe.layer_biases) == []


def test_hooks_are_removed_when_a_pass_fails(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, probe = count_hooks(llama.hf), random_probe(llama, 0)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tensor, "cpu", fail)
    with pytest.raises(KeyboardInterrupt):
        project_residuals(llama, tokens_of(llama, refused[:2]), probe.layer_weights, probe.layer_biases)
    assert count_hooks(llama.hf) == hooks


def test_autocast_around_a_measurement_changes_nothing(llama: LensModel, refused: Transcripts) -> None:
    rows, probe = tokens_of(llama, refused[:2]), random_probe(llama, 3)
    plain = project_residuals(llama, rows, probe.layer_weights, probe.layer_biases)
    ids = torch.from_numpy(rows[0].token_ids)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert not torch.equal(llama.hf(input_ids=ids).logits.float(), plain_logits_of(llama, ids)), "nothing was cast"
        cast = project_residuals(llama, rows, probe.layer_weights, probe.layer_biases)
    for ours, theirs in zip(cast, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def plain_logits_of(model: LensModel, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return model.hf(input_ids=ids).logits


def test_the_language_model_head_is_not_run(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, run = random_probe(llama, 0), []
    handle = llama.hf.lm_head.register_forward_hook(lambda *_: run.append(1))
    try:
        project_residuals(llama, tokens_of(llama, refused[:2]), probe.layer_weights, probe.layer_biases)
    finally:
        handle.remove()
    assert not run


def test_results_keep_no_gradient_graph_and_memory_of_the_batch_alone(llama: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(llama, 0), tokens_of(llama, refused[:2])
    found = project_residuals(llama, rows, probe.layer_weights, probe.layer_biases)
    assert [values.shape for values in found] == [(8, row.n_pos) for row in rows]
    assert all(weight.grad is None for weight in llama.hf.parameters())
    assert torch.is_grad_enabled()


@given(lengths, st.integers(1, 2000))
def test_batches_hold_every_transcript_once_within_the_token_limit(lengths: list[int], limit: int) -> None:
    batches = list(length_batches(lengths, limit))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_batches_are_made_of_neighbours_in_length() -> None:
    assert list(length_batches([3, 9, 4, 8], 18)) == [[1, 3], [2, 0]]
    assert activations.BATCH_TOKENS >= 512


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_is_read_without_the_blocks_above_and_equals_all_of_them(
    model: LensModel, refused: Transcripts, layer: int
) -> None:
    rows = tokens_of(model, refused[:7])
    rng = np.random.default_rng(0)
    shape = (model.shape.n_layers, model.shape.d_model)
    weights, biases = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[0]).astype(np.float32)
    every = project_residuals(model, rows, weights, biases)
    ran: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.blocks)]
    found = dict(project_layer(model, rows, layer, weights[layer], float(biases[layer]), batch_tokens=128))
    for handle in handles:
        handle.remove()
    assert sorted(found) == list(range(7))
    for i, values in found.items():
        np.testing.assert_allclose(values, every[i][layer], atol=2e-5)
    assert set(ran) == set(range(layer + 1))
    assert len(model.blocks) == model.shape.n_layers
