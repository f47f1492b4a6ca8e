"""No checkpoint's own code is run unless it was asked for by name, and nobody is asked on a terminal."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeCheckpoint

from cliffscope import cli
from cliffscope.errors import UnsupportedModelError
from cliffscope.judging.classifiers import ClassifierJudge
from cliffscope.judging.lookup import find_judge
from cliffscope.model import checkpoints
from cliffscope.model.export import stored_dtype
from cliffscope.model.lens import LensModel
from cliffscope.model.load import load_model
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.records import Message, Transcript

TRAP = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
Path(TRAPPED).write_text("this code was run")
class TrapConfig(LlamaConfig):
    model_type = "trap"
class TrapForCausalLM(LlamaForCausalLM):
    config_class = TrapConfig
class TrapForSequenceClassification(LlamaForSequenceClassification):
    config_class = TrapConfig
class TrapTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A person who answers yes to every question; yields the questions."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, modules = list(sys.path), set(sys.modules)
    yield asked
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def trap(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint whose config, model and tokenizer name code that writes a file when it is imported."""
    folder = tmp_path / "trap"
    shutil.copytree(make_checkpoint("llama", chatml=True), folder)
    config = json.loads((folder / "config.json").read_text())
    names = ("Config", "ModelForCausalLM", "ModelForSequenceClassification")
    auto = {f"Auto{name}": f"trap.Trap{name.removeprefix('Model')}" for name in names}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "trap", "auto_map": auto}))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "TrapTokenizer", "auto_map": {"AutoTokenizer": [None, "trap.TrapTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "trap.py").write_text(TRAP.replace("TRAPPED", repr(str(tmp_path / "trapped"))))
    return folder


READERS: dict[str, Callable[[str], object]] = {
    "load_model": load_model,
    "read_checkpoint": lambda name: checkpoints.read_checkpoint(name, torch.float32, None),
    "read_tokenizer": checkpoints.read_tokenizer,
    "ClassifierJudge.load": lambda name: ClassifierJudge.load(name, format="wildguard"),
    "find_judge": lambda name: find_judge(f"classifier:wildguard@{name}"),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_code_or_asks(reader: str, trap: Path, yes: list[str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="needs Python code that comes with the checkpoint"):
        READERS[reader](str(trap))
    assert yes == []
    assert not (tmp_path / "trapped").exists()


def test_a_dtype_is_read_without_code(trap: Path, llama: LensModel, yes: list[str], tmp_path: Path) -> None:
    assert checkpoints.resolve_dtype(str(trap), torch.device("meta")) == "auto"
    assert stored_dtype(replace(llama, name=str(trap))) is llama.dtype
    assert yes == []
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("command", ["template", "judge", "roll-out"])
def test_no_command_runs_code_or_asks(
    command: str,
    trap: Path,
    yes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answered = Transcript(id="a", messages=(Message(role="user", content="hi"),), answer="hello", harmful=True)
    write_transcripts([answered], tmp_path / "t.jsonl")
    words = {
        "template": ["--model", trap],
        "judge": [*("--transcripts", tmp_path / "t.jsonl", "--judge", "wildguard"), "--classifier", trap],
        "roll-out": ["--model", trap, "--prompts", tmp_path / "t.jsonl"],
    }[command]
    out = [] if command == "template" else ["--out", tmp_path / "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["cliffscope", command, *map(str, [*words, *out])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == UnsupportedModelError.exit_code
    assert "needs Python code" in capsys.readouterr().err
    assert yes == []
    assert not (tmp_path / "trapped").exists()


def test_code_that_is_trusted_is_run(trap: Path, yes: list[str], tmp_path: Path) -> None:
    """Otherwise the other tests here could not fail."""
    tokenizer = checkpoints.read_tokenizer(str(trap), trust_remote_code=True)
    assert type(tokenizer).__name__ == "TrapTokenizer"
    assert (tmp_path / "trapped").exists()
    assert yes == []
