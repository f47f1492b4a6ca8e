"""The logit is the sum of its shares, and each share is what transformers' own tensors give."""

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, random_probe, tokens_of

from cliffscope.errors import DataError, UnsupportedModelError
from cliffscope.heads.shares import decompose_logit
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_heads_mlps_embedding_and_biases_sum_to_the_logit(model: LensModel, refused: Transcripts, layer: int) -> None:
    probe = random_probe(model, layer)
    shares = decompose_logit(model, probe, tokens_of(model, refused[:5]))
    np.testing.assert_allclose(shares.sums, shares.logits, rtol=1e-5, atol=1e-4)
    assert not shares.heads[:, layer + 1 :].any()
    assert np.abs(shares.heads[:, : layer + 1]).max() > 0.01


def test_each_share_is_what_transformerlens_caches(model: LensModel, refused: Transcripts) -> None:
    probe, (row,) = random_probe(model, 2), tokens_of(model, refused[:1])
    shares = decompose_logit(model, probe, [row])
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(torch.from_numpy(row.token_ids)[None])
    weight, final = torch.from_numpy(probe.weight), row.final
    size, thinking = model.shape.d_head, slice(row.bounds[0], row.bounds[1])
    for layer in range(3):
        columns = model.output_projection(layer).weight.detach()
        for head in range(model.shape.n_heads):
            own = columns[:, head * size : (head + 1) * size]
            written = cache[f"blocks.{layer}.attn.hook_z"][0, :, head] @ own.T @ weight
            assert shares.heads[0, layer, head] == pytest.approx(float(written[final]), abs=1e-4)
            assert shares.plateau_heads[0, layer, head] == pytest.approx(float(written[thinking].mean()), abs=1e-4)
        mlp = cache[f"blocks.{layer}.hook_mlp_out"][0, final] @ weight
        assert shares.mlps[0, layer] == pytest.approx(float(mlp), abs=1e-4)
    entering = cache["blocks.0.hook_resid_pre"][0, final] @ weight
    assert shares.embedding[0] == pytest.approx(float(entering), abs=1e-4)


def test_a_transcript_has_the_same_shares_in_any_batch(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 3), tokens_of(model, refused[:4])
    together = decompose_logit(model, probe, rows)
    alone = decompose_logit(model, probe, rows[2:3])
    np.testing.assert_allclose(together.heads[2], alone.heads[0], rtol=1e-4, atol=1e-4)


def test_output_biases_have_a_share_of_their_own(make_checkpoint: MakeCheckpoint, refused: Transcripts) -> None:
    from cliffscope.model.load import load_model

    model = load_model(make_checkpoint("llama", attention_bias=True), device="cpu")
    probe = random_probe(model, 4)
    shares = decompose_logit(model, probe, tokens_of(model, refused[:2]))
    np.testing.assert_allclose(shares.sums, shares.logits, rtol=1e-5, atol=1e-4)
    expected = float(model.output_projection(3).bias.detach() @ torch.from_numpy(probe.weight))
    assert shares.biases[0, 3] == pytest.approx(expected, abs=1e-5)
    assert expected != 0.0


def test_blocks_that_do_more_than_add_are_refused(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, rows = random_probe(llama, 5), tokens_of(llama, refused[:2])
    handle = llama.blocks[2].register_forward_hook(lambda module, inputs, output: output * 1.01)
    try:
        with pytest.raises(UnsupportedModelError, match="more than add"):
            decompose_logit(llama, probe, rows)
    finally:
        handle.remove()


def test_no_transcript_is_refused(llama: LensModel) -> None:
    with pytest.raises(DataError, match="No transcript"):
        decompose_logit(llama, random_probe(llama, 2), [])
