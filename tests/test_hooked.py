"""HookedTransformers of TransformerLens 3 give what the bridge over the same checkpoint gives."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_probe, tokens_of, written

import cliffscope as cs
from cliffscope.errors import UnsupportedModelError
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import HeadRef
from cliffscope.model.load import LensModel, load_model
from cliffscope.transcripts.records import Outcome

if int(version("transformer-lens").partition(".")[0]) >= 4:
    pytest.skip("TransformerLens 4 has no HookedTransformer; make test-oldest runs these", allow_module_level=True)

from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

CONVERT = {
    "llama": weight_conversions.convert_llama_weights,
    "qwen2": weight_conversions.convert_qwen2_weights,
    "qwen3": weight_conversions.convert_qwen3_weights,
}


def hooked_from(model: LensModel, kind: str, *, fold: bool, **changes: Any) -> HookedTransformer:
    """TransformerLens' own arrangement of a checkpoint's weights."""
    shape, config = model.shape, model.hf.config
    settings = {
        "model_name": f"tiny-{kind}",
        "original_architecture": type(model.hf).__name__,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "d_head": shape.d_head,
        "n_heads": shape.n_heads,
        "n_key_value_heads": shape.n_kv_heads if kind == "qwen2" or shape.n_kv_heads != shape.n_heads else None,
        "d_mlp": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "n_ctx": shape.context,
        "eps": config.rms_norm_eps,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "rotary_adjacent_pairs": False,
        "rotary_dim": shape.d_head,
        "final_rms": True,
        "gated_mlp": True,
        "use_qk_norm": kind == "qwen3",
        "device": "cpu",
        **changes,
    }
    cfg = HookedTransformerConfig.from_dict(settings)
    with pytest.warns(DeprecationWarning, match="removed in 4.0"):
        hooked = HookedTransformer(cfg, tokenizer=model.tokenizer)
    state = CONVERT[kind](model.hf, cfg)
    hooked.load_and_process_state_dict(
        state,
        fold_ln=fold,
        center_writing_weights=False,
        center_unembed=fold,
        fold_value_biases=fold,
    )
    return hooked.eval()


@pytest.fixture(params=[(kind, fold) for kind in ARCHITECTURES for fold in (False, True)], ids=str)
def pair(request: pytest.FixtureRequest, models: dict[str, LensModel]) -> tuple[LensModel, LensModel, bool]:
    """The checkpoint by the bridge, and by a HookedTransformer with its weights as they are or folded."""
    kind, fold = request.param
    return models[kind], load_model(hooked_from(models[kind], kind, fold=fold)), fold


def test_traces_and_effects_are_those_of_the_bridge(pair: tuple[LensModel, LensModel, bool]) -> None:
    bridged, hooked, fold = pair
    ts = written(3, harmful=True, outcome=Outcome.COMPLIED)
    probe = random_probe(bridged, bridged.shape.n_layers - 2)
    # Weights that TransformerLens has folded are other weights, though they compute the same.
    noted = probe.for_model(hooked, allow_other_model=True)
    assert hooked.shape.places == bridged.shape.places
    for ours, theirs in zip(
        cs.trace_refusal(hooked, noted, ts).logits, cs.trace_refusal(bridged, probe, ts).logits, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(np.abs(theirs).max())))
    if hooked.hf.config.attention_bias and fold:
        return  # Folded value biases leave hook_z, so that zeroing a head is another edit, by definition.
    here, there = (cs.rank_heads(m, p, ts) for m, p in ((hooked, noted), (bridged, probe)))
    assert here.path == "packed"
    np.testing.assert_allclose(
        here.effects, there.effects, rtol=0, atol=1e-4 * max(1.0, float(np.abs(there.clean).max()))
    )


def test_generated_text_is_that_of_the_checkpoint(pair: tuple[LensModel, LensModel, bool]) -> None:
    bridged, hooked, _ = pair
    ts = written(3, harmful=True, outcome=Outcome.COMPLIED)
    generated = [
        [(t.thinking_ids, t.answer_ids) for t in cs.roll_out(m, ts, max_thinking=12, max_answer=8)]
        for m in (bridged, hooked)
    ]
    assert generated[0] == generated[1]


def test_folded_and_rearranged_weights_are_not_exported(
    pair: tuple[LensModel, LensModel, bool], tmp_path: Path
) -> None:
    bridged, hooked, fold = pair
    edit = cs.zero([HeadRef(layer=1, head=0)])
    if fold or type(bridged.hf).__name__ == "Qwen2ForCausalLM":
        with pytest.raises(UnsupportedModelError, match="folded" if fold else "arranged as LlamaForCausalLM"):
            cs.export_edited(hooked, edit, tmp_path / "edited")
        return
    place = cs.export_edited(hooked, edit, tmp_path / "edited")
    again = load_model(place, device="cpu")
    ids = torch.tensor([tokens_of(bridged, written(1, harmful=True, outcome=Outcome.COMPLIED))[0].token_ids.tolist()])
    with edited_weights(bridged, edit), torch.no_grad():
        expected = bridged.hf(input_ids=ids).logits
    torch.testing.assert_close(again.hf(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_plain_modules_cannot_hold_is_refused(models: dict[str, LensModel]) -> None:
    with pytest.raises(UnsupportedModelError, match="its attention"):
        load_model(hooked_from(models["llama"], "llama", fold=False, attn_scores_soft_cap=30.0))
