"""Models whose weights are not simply in memory: offloaded, quantised, or in half precision."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, random_probe, tokens_of, written
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import cliffscope as cs
from cliffscope.errors import DataError, EditError, UnsupportedModelError
from cliffscope.heads.editing import edited_everywhere, edited_weights
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef
from cliffscope.heads.shares import decompose_logit
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.checkpoints import ASSETS
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.activations import project_residuals
from cliffscope.transcripts.records import Outcome, Transcripts

EDIT = [HeadRef(layer=1, head=2), HeadRef(layer=6, head=0)]
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 6e-3}
"""Of a probe's logit, relative to the largest: what docs/models.md states."""


@pytest.fixture(scope="module")
def texts() -> Transcripts:
    return Transcripts(
        [t for w in (None, "story") for t in written(3, harmful=True, outcome=Outcome.COMPLIED, wrapper=w)]
    )


@pytest.fixture(scope="module")
def offloaded(checkpoints: dict[str, Path]) -> LensModel:
    """Half of the blocks on disk, read whenever they run."""
    if version("transformer-lens") < "4":
        pytest.skip("TransformerLens 3.9 refuses blocks on disk; load_model says so")
    places = {f"model.layers.{i}": "cpu" if i < 4 else "disk" for i in range(8)}
    rest = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    return load_model(checkpoints["llama"], device={**places, **rest})


def test_an_offloaded_model_is_the_model(llama: LensModel, offloaded: LensModel, texts: Transcripts) -> None:
    assert offloaded.output_projection(6).weight.is_meta
    assert offloaded.fingerprint == llama.fingerprint
    rows, probe = tokens_of(llama, texts), random_probe(llama, 6)
    for ours, theirs in zip(
        *(project_residuals(m, rows, probe.layer_weights, probe.layer_biases) for m in (offloaded, llama)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    branches = [(HeadRef(layer=layer, head=3),) for layer in range(8)]
    found, expected = (sweep_branches(m, probe, rows[:2], branches) for m in (offloaded, llama))
    assert found.path == "packed"
    np.testing.assert_allclose(found.edited, expected.edited, rtol=0, atol=1e-5 * np.abs(expected.edited).max())


def test_weights_that_are_not_there_are_edited_by_hooks_alone(
    llama: LensModel, offloaded: LensModel, texts: Transcripts
) -> None:
    with (
        pytest.raises(EditError, match="Layer 6: weights that are offloaded cannot be edited"),
        edited_weights(offloaded, cs.zero(EDIT)),
    ):
        pass
    with pytest.raises(UnsupportedModelError, match="Layer 4 of .* offloaded cannot be read"):
        decompose_logit(offloaded, random_probe(llama, 6), tokens_of(llama, texts))
    answers = []
    for model in (llama, offloaded):
        with edited_everywhere(model, cs.zero(EDIT)):
            answers.append([t.answer_ids for t in cs.roll_out(model, texts, max_thinking=8, max_answer=8)])
    assert answers[0] == answers[1]
    assert answers[0] != [t.answer_ids for t in cs.roll_out(llama, texts, max_thinking=8, max_answer=8)]


def test_hooks_everywhere_are_the_edit_of_the_weights(llama: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    value = np.linspace(-1, 1, llama.shape.d_head, dtype=np.float32)
    plan = cs.compose(
        cs.scale([HeadRef(layer=0, head=1)], 0.3),
        HeadEdit(heads=tuple(EDIT), kind=EditKind.MEAN, values=np.stack([value, value])[:, None]),
    )
    with torch.no_grad():
        with edited_weights(llama, plan):
            expected = llama.hf(input_ids=ids).logits
        monkeypatch.setattr(LensModel, "holds_weights", lambda self, layer: False)
        with edited_everywhere(llama, plan):
            found = llama.hf(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def quantised(folder: Path, **how: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32, device_map={"": "cpu"}
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ({"load_in_8bit": True}, torch.int8),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, torch.uint8),
    ],
    ids=["8 bit", "4 bit"],
)
def test_a_quantised_model_is_traced_and_swept_and_its_weights_are_left_alone(
    make_checkpoint: MakeCheckpoint,
    texts: Transcripts,
    unchanged: Callable[[LensModel], Callable[[], None]],
    tmp_path: Path,
    how: dict[str, object],
    dtype: torch.dtype,
) -> None:
    # The kernels of 4 bits want sizes that are powers of two.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    folder = ASSETS / "planted-llama" if dtype == torch.int8 else make_checkpoint("llama", **sizes)
    plain, model = quantised(folder, **how), load_model(folder, hf_model=quantised(folder, **how))
    assert model.output_projection(2).weight.dtype == dtype
    check = unchanged(model)
    rows, probe = tokens_of(model, texts), random_probe(model, 5)
    assert probe.weight.dtype == np.float32
    (ours,) = project_residuals(model, rows[:1], probe.layer_weights, probe.layer_biases)
    with torch.no_grad():
        states = plain(torch.tensor([rows[0].token_ids.tolist()]), output_hidden_states=True).hidden_states
    theirs = states[6][0].float().numpy() @ probe.weight + probe.bias
    np.testing.assert_allclose(ours[5], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    found = sweep_branches(model, probe, rows[:1], [(ref,) for ref in EDIT])
    assert np.abs(found.effects[0, 0]) > 1e-4
    with pytest.raises(UnsupportedModelError, match="quantised or offloaded cannot be read"):
        decompose_logit(model, probe, rows[:1])
    with pytest.raises(EditError, match=f"quantised, of dtype {dtype}"):
        cs.export_edited(model, cs.zero(EDIT), tmp_path / "edited")
    with edited_everywhere(model, cs.zero(EDIT)):
        cs.roll_out(model, texts[:1], max_thinking=4, max_answer=4)
    check()


def test_a_model_of_ones_own_keeps_its_place_and_dtype(checkpoints: dict[str, Path]) -> None:
    hf = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    with pytest.raises(DataError, match="are those of hf_model"):
        load_model(checkpoints["llama"], hf_model=hf, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_half_precision_is_within_its_stated_tolerance(dtype: torch.dtype, texts: Transcripts) -> None:
    folder = ASSETS / "planted-llama"
    narrow = load_model(folder, device="cpu", dtype=dtype)
    wide = load_model(folder, hf_model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float())
    assert narrow.fingerprint == wide.fingerprint
    rows, probe = tokens_of(wide, texts), random_probe(wide, 6)
    read = [project_residuals(m, rows, probe.layer_weights, probe.layer_biases) for m in (narrow, wide)]
    for ours, theirs in zip(*read, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES[dtype] * np.abs(theirs).max())
