"""Repair on small models: what is trained, what stays, and what comes back from disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import written
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cliffscope as cs
from cliffscope.errors import DataError, MissingExtraError, StoreError
from cliffscope.model.load import LensModel
from cliffscope.repairing import finetune as module
from cliffscope.repairing.comparison import compare_repair
from cliffscope.repairing.finetune import repair
from cliffscope.repairing.formats import IGNORED, examples, with_safe_answer
from cliffscope.repairing.saves import MARK, check_not_trained_on, last_save
from cliffscope.transcripts.records import Outcome, Transcripts

pytest.importorskip("trl", reason="the extra repair is not installed")
SAFE = "sorry , i can not help with that ."


@pytest.fixture(scope="module")
def chosen() -> Transcripts:
    return written(6, harmful=True, outcome=Outcome.COMPLIED)


@pytest.fixture(scope="module")
def harmless() -> Transcripts:
    return written(9, harmful=False, outcome=Outcome.COMPLIED)


def mean_loss(network: torch.nn.Module, model: LensModel, transcripts: Transcripts) -> float:
    """Cross entropy of the labelled tokens, by a plain forward pass of each example."""
    losses = []
    for example in examples(transcripts, model.tokenizer, model.template):
        with torch.no_grad():
            logs = torch.log_softmax(network(torch.tensor([example.input_ids])).logits[0].double(), -1)
        where = [i for i, label in enumerate(example.labels) if label != IGNORED]
        losses += [-float(logs[i - 1, example.labels[i]]) for i in where]
    return float(np.mean(losses))


@pytest.mark.parametrize(("rank", "rate"), [(0, 5e-3), (4, 2e-2)], ids=["all weights", "adapter"])
def test_the_copy_learns_the_safe_answer_and_the_model_stays_as_it_was(
    llama: LensModel,
    chosen: Transcripts,
    harmless: Transcripts,
    tmp_path: Path,
    unchanged: Callable[[LensModel], Callable[[], None]],
    rank: int,
    rate: float,
) -> None:
    check = unchanged(llama)
    safe = with_safe_answer(chosen, SAFE)
    before = mean_loss(llama.hf, llama, safe)
    found = repair(
        llama,
        chosen,
        tmp_path / "repaired",
        harmless=harmless,
        answer=SAFE,
        lora_rank=rank,
        steps=12,
        learning_rate=rate,
    )
    check()
    assert (found.n_harmful, found.n_harmless) == (6, 6)
    assert found.losses["step"].tolist() == list(range(1, 13))
    plain = AutoModelForCausalLM.from_pretrained(found.path).eval()
    assert mean_loss(plain, llama, safe) < 0.5 * before
    assert mean_loss(llama.hf, llama, safe) == pytest.approx(before)
    assert type(plain) is type(llama.hf)
    assert "adapter_config.json" not in {p.name for p in found.path.iterdir()}
    assert "6 harmful transcripts" in (found.path / "README.md").read_text()
    assert cs.load_model(found.path, device="cpu").shape == llama.shape


def test_the_first_loss_is_that_of_the_labelled_tokens_alone(
    llama: LensModel, chosen: Transcripts, tmp_path: Path
) -> None:
    found = repair(llama, chosen, tmp_path / "repaired", answer=SAFE, steps=1, batch_size=6, lora_rank=0)
    expected = mean_loss(llama.hf, llama, with_safe_answer(chosen, SAFE))
    assert found.losses["loss"].iloc[0] == pytest.approx(expected, rel=2e-3)


def test_the_same_seed_trains_the_same_weights(llama: LensModel, chosen: Transcripts, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        found = repair(llama, chosen, tmp_path / name, answer=SAFE, steps=3, batch_size=2, lora_rank=0, seed=seed)
        return AutoModelForCausalLM.from_pretrained(found.path).model.layers[3].self_attn.q_proj.weight.detach()

    first = weights("a", 1)
    assert torch.equal(first, weights("b", 1))
    assert not torch.equal(first, weights("c", 2))


def test_harmless_ones_that_were_refused_are_not_mixed_in(
    llama: LensModel, chosen: Transcripts, harmless: Transcripts, tmp_path: Path
) -> None:
    refused = harmless.map(lambda t: t.replace(outcome=Outcome.REFUSED))
    options = {"answer": SAFE, "steps": 1, "lora_rank": 0}
    assert repair(llama, chosen, tmp_path / "a", harmless=refused, **options).n_harmless == 0
    assert repair(llama, chosen, tmp_path / "b", harmless=harmless, harmless_share=0.25, **options).n_harmless == 2
    assert repair(llama, chosen, tmp_path / "c", harmless=harmless, harmless_share=0.9, **options).n_harmless == 9


def test_a_stopped_run_goes_on_from_its_last_save(
    llama: LensModel, chosen: Transcripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"answer": SAFE, "steps": 10, "batch_size": 2, "lora_rank": 0, "seed": 4}
    whole = repair(llama, chosen, tmp_path / "whole", **options)
    real = module.write_checkpoint

    def fail(*args: object, **kwargs: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        repair(llama, chosen, tmp_path / "again", work=tmp_path / "work", **{**options, "steps": 6})
    monkeypatch.setattr(module, "write_checkpoint", real)
    assert any((tmp_path / "work").glob("checkpoint-*"))
    again = repair(llama, chosen, tmp_path / "again", work=tmp_path / "work", **options)
    assert again.losses["step"].tolist() == list(range(1, 11))
    np.testing.assert_allclose(again.losses["loss"], whole.losses["loss"], rtol=1e-4)


def test_training_stops_once_the_held_out_loss_has_not_fallen_and_goes_back_to_the_best(
    llama: LensModel, chosen: Transcripts, tmp_path: Path
) -> None:
    # Answers that say nothing of each other: what is learnt of some makes the one held out less likely.
    words = ["story", "bread", "the", "user", "wants", "know"]
    answers = [" ".join([word] * 3) for word in words]
    told = iter(answers)
    found = repair(
        llama,
        chosen,
        tmp_path / "repaired",
        answer=lambda _t: next(told),
        steps=40,
        batch_size=5,
        learning_rate=2e-2,
        lora_rank=0,
        patience=2,
        seed=1,
    )
    looks = found.losses["held_out"].dropna()
    assert len(found.losses) < 40
    assert len(looks) == looks.to_numpy().argmin() + 3, "two looks without a fall, and no more"
    away = torch.randperm(6, generator=torch.Generator().manual_seed(1)).tolist()[0]
    held_out = Transcripts([chosen[away].replace(answer=answers[away], answer_ids=None)])
    plain = AutoModelForCausalLM.from_pretrained(found.path).eval()
    assert mean_loss(plain, llama, held_out) == pytest.approx(looks.min(), rel=2e-3)
    with pytest.raises(DataError, match="One example cannot"):
        repair(llama, chosen[:1], tmp_path / "x", answer=SAFE, patience=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"harmless_share": 1.0},
        {"harmless_share": -0.1},
        {"epochs": 0},
        {"batch_size": 0},
        {"steps": 0},
        {"patience": 0},
    ],
)
def test_numbers_out_of_range_are_refused(
    llama: LensModel, chosen: Transcripts, tmp_path: Path, wrong: dict[str, float]
) -> None:
    with pytest.raises(DataError, match="expected a share"):
        repair(llama, chosen, tmp_path / "x", **wrong)
    with pytest.raises(DataError, match="No transcript was given"):
        repair(llama, Transcripts(), tmp_path / "x")


def test_a_directory_that_is_there_is_refused_before_anything_is_trained(
    llama: LensModel, chosen: Transcripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()

    def train(*args: object, **options: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(module, "_train", train)
    with pytest.raises(StoreError, match="exists already"):
        repair(llama, chosen, tmp_path / "there")


def test_without_the_extra_it_is_said_what_to_install(
    llama: LensModel, chosen: Transcripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"cliffscope\[repair\]"):
        repair(llama, chosen, tmp_path / "x", steps=1)


STEPS = {"answer": SAFE, "steps": 4, "batch_size": 2, "lora_rank": 0, "seed": 4}


def test_saves_of_another_training_are_refused_whatever_differs(
    llama: LensModel, models: dict[str, LensModel], chosen: Transcripts, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    repair(llama, chosen, tmp_path / "first", work=work, **STEPS)
    others = {
        "examples was": (llama, chosen[:5], {}),
        "seed was 4, now 5": (llama, chosen, {"seed": 5}),
        "rate was 5e-05, now 0.001": (llama, chosen, {"learning_rate": 1e-3}),
        "model was": (models["qwen2"], chosen, {}),
    }
    for i, (difference, (model, transcripts, options)) in enumerate(others.items()):
        with pytest.raises(StoreError, match=f"belongs to another configuration .*{difference}"):
            repair(model, transcripts, tmp_path / f"other-{i}", work=work, **{**STEPS, **options})
        assert not (tmp_path / f"other-{i}").exists()


def test_a_save_that_was_half_written_is_not_gone_on_from(
    llama: LensModel, chosen: Transcripts, tmp_path: Path
) -> None:
    whole = repair(llama, chosen, tmp_path / "whole", work=tmp_path / "work", **STEPS)
    saves = sorted((tmp_path / "work").glob("checkpoint-*"))
    assert [path.name for path in saves] == ["checkpoint-3", "checkpoint-4"]
    # As a kill leaves the last one while it is written, and the one before whole.
    (saves[1] / MARK).unlink()
    for path in saves[1].iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (saves[1] / "trainer_state.json").unlink()
    again = repair(llama, chosen, tmp_path / "again", work=tmp_path / "work", **STEPS)
    np.testing.assert_allclose(again.losses["loss"], whole.losses["loss"], rtol=1e-4)
    weights = [load_file(found.path / "model.safetensors") for found in (whole, again)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


def test_a_save_beyond_the_last_step_is_not_taken_for_it(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / MARK).touch()
    assert last_save(tmp_path, 5) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert last_save(tmp_path, 3) is None


def test_a_repaired_model_is_not_measured_on_prompts_that_it_was_trained_on(
    llama: LensModel, chosen: Transcripts, harmless: Transcripts, tmp_path: Path
) -> None:
    repaired = repair(llama, chosen, tmp_path / "out", harmless=harmless[:3], **STEPS)
    after = cs.load_model(repaired.path, device="cpu")
    for trained in (chosen[2], harmless[1]):
        same = trained.replace(
            id="the same", messages=tuple(replace(m, content=f" {m.content}") for m in trained.messages)
        )
        with pytest.raises(DataError, match="was trained on 1 of these 2 prompts, such as that of 'the same'"):
            compare_repair(llama, after, Transcripts([harmless[5], same]))
    check_not_trained_on(after, harmless[4:])
    check_not_trained_on(llama, chosen)
