"""A stage's key changes with everything that its results depend on, and with nothing else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeCheckpoint

from cliffscope.model.checkpoints import model_files, resolve_dtype
from cliffscope.study import keys as module
from cliffscope.study.config import StudyConfig
from cliffscope.study.keys import Digests, stage_keys, what_changed
from cliffscope.study.stages import STAGES
from cliffscope.study.stages.heads import HeadStage

ALL = {stage.name for stage in STAGES}


@pytest.fixture
def config(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> StudyConfig:
    """A study of a model directory and two prompt files, all of them the test's own."""
    shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.txt").write_text("how do i bake bread\n", encoding="utf-8")
    return StudyConfig(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "run"),
        harmful=str(tmp_path / "harmful.txt"),
        harmless=str(tmp_path / "harmless.txt"),
    )


def changed(before: StudyConfig, after: StudyConfig, change: Callable[[], object] = lambda: None) -> set[str]:
    """Stages whose key differs once something has been changed."""
    first = stage_keys(before, STAGES, Digests())
    change()
    second = stage_keys(after, STAGES, Digests())
    return {name for name in first if first[name].key != second[name].key}


def test_nothing_changes_with_batch_size_device_or_place(config: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(config.model, tmp_path / "elsewhere" / "model")
    shutil.copy(str(config.harmful), tmp_path / "elsewhere" / "harmful.txt")
    other = replace(
        config,
        batch_size=3,
        device="cpu",
        out="other",
        model=str(tmp_path / "elsewhere" / "model"),
        harmful=str(tmp_path / "elsewhere" / "harmful.txt"),
    )
    assert changed(config, other) == set()


def test_a_prompt_file_counts_by_its_contents(config: StudyConfig) -> None:
    assert changed(config, config, lambda: Path(str(config.harmful)).write_text("how do i fix a bike\n")) == ALL


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_file_of_the_model_counts(config: StudyConfig, file: str) -> None:
    path = Path(config.model) / file
    assert path.is_file()
    data = path.read_bytes()
    assert changed(config, config, lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))) == ALL


def test_a_template_that_is_asked_for_counts_by_what_it_says(config: StudyConfig, tmp_path: Path) -> None:
    assert changed(config, replace(config, template="qwq")) == ALL
    fields = {"think_open": "<a>", "think_close": "</a>", "opening": "", "closing": "</a>\n", "template_kwargs": {}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(fields))
    own = replace(config, template=str(path))
    assert changed(own, own, lambda: path.write_text(json.dumps({**fields, "closing": "</a>"}))) == ALL


def test_settings_count_for_the_stages_that_declare_them_and_those_that_stand_on_them(config: StudyConfig) -> None:
    assert changed(config, replace(config, select_fraction=0.5)) == {"selection", "repair", "report"}
    assert changed(config, replace(config, plateau="max")) == {"traces", "reading", "selection", "repair", "report"}
    assert changed(config, replace(config, repair=True)) == {"report"}
    assert changed(config, replace(config, max_thinking=9)) == ALL


def test_every_setting_is_declared_by_a_stage_or_known_to_change_no_result() -> None:
    declared = {name for stage in STAGES for name in (*stage.settings, *stage.files)}
    assert set(StudyConfig.__dataclass_fields__) - declared == {"model", "out", "template", "batch_size", "device"}


def test_a_version_that_is_raised_counts(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    later = {"heads", "suppression", "reading", "safety", "side effects", "report"}
    assert changed(config, config, lambda: monkeypatch.setattr(HeadStage, "version", 77)) == later


def test_the_code_of_a_users_own_method_counts(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "their_method.py"
    code.write_text("A = 1\n")
    own = replace(config, method="their_method:A")
    assert changed(own, own, lambda: code.write_text("A = 22\n")) >= {"heads", "suppression"}
    assert "transcripts" not in changed(own, own, lambda: code.write_text("A = 333\n"))


def test_a_file_is_read_again_only_when_its_size_or_time_changes(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = Digests()
    stage_keys(config, STAGES, digests)
    again = Digests(entries=json.loads(json.dumps(digests.entries)))
    monkeypatch.setattr(module.hashlib, "sha256", None)
    for path in model_files(config.model):
        assert len(again.of(path)) == 16


def test_what_changed_is_told_in_words(config: StudyConfig) -> None:
    before = stage_keys(config, STAGES, Digests())["suppression"].parts
    after = stage_keys(replace(config, controls=5, limit=3), STAGES, Digests())["suppression"].parts
    assert what_changed(before, after) == "controls was 20, now 5; depends on transcripts, readouts, heads"


def test_the_dtype_is_known_without_loading(config: StudyConfig) -> None:
    assert resolve_dtype(config.model, torch.device("cpu")) == torch.float32
    assert resolve_dtype(config.model, torch.device("cuda")) == torch.float32
    settings = Path(config.model) / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "dtype": "bfloat16"}))
    assert resolve_dtype(config.model, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype(config.model, torch.device("cpu")) == torch.float32


def test_a_hub_name_that_was_not_downloaded_has_no_files() -> None:
    assert model_files("nobody/no-such-model") == []
