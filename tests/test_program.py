import ast
import json
import logging
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import written
from test_cli import Shell, files, model, probe, shell

import cliffscope
from cliffscope.cli.program import say, say_table, show
from cliffscope.progress import log_to_standard_error
from cliffscope.text import is_unicode, visible
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript

__all__ = ["files", "model", "probe", "shell"]

PACKAGE = Path(cliffscope.__file__).parent
HOSTILE = {
    "escape": ("\x1b[31mred\x1b[0m", "\\u001b[31mred\\u001b[0m"),
    "title": ("\x1b]0;owned\x07", "\\u001b]0;owned\\u0007"),
    "C1": ("\x9b2J", "\\u009b2J"),
    "backspace": ("safe\x08\x08\x08\x08evil", "safe\\u0008\\u0008\\u0008\\u0008evil"),
    "return": ("a\rb", "a\\u000db"),
    "NUL": ("a\x00b", "a\\u0000b"),
    "right to left": ("\u202egnp.exe", "\\u202egnp.exe"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "surrogate": ("a\ud800b", "a\\ud800b"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_control_characters_are_shown_as_escapes_wherever_the_program_prints(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, shown = HOSTILE[name]
    cell = raw if is_unicode(raw) else "no table holds half of a surrogate pair"
    table = pd.DataFrame({"id": [cell], "model": [f"{cell} model"]})
    say(False, {}, f"text {raw}", (Omission(stage="judge", reason=f"reason {raw}", id="a"),))
    say_table(False, table, f"result {raw}", Path("out"), ())
    show(f"colored {raw}", color="red")
    seen = capsys.readouterr()
    for text in (seen.out, seen.err):
        assert raw not in text
        assert is_unicode(text)
    for label in ("text", "result", "colored"):
        assert f"{label} {shown}" in seen.out.replace("\x1b[31mcolored", "colored")
    assert f"reason {shown}" in seen.err or f"reason {json.dumps(raw)[1:-1]}" in seen.err


@pytest.mark.parametrize("name", HOSTILE)
def test_json_output_holds_the_same_text_without_control_characters(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, _ = HOSTILE[name]
    say(True, {"id": raw}, "")
    out = capsys.readouterr().out
    assert raw not in out
    assert json.loads(out) == {"id": raw}


def test_emoji_and_scripts_are_shown_as_they_are() -> None:
    text = "👩‍👩‍👧 שלום أهلا 你好 é\tand\nnext"
    assert visible(text) == text
    assert visible("a\nb\tc", one_line=True) == "a\\nb\\tc"


def test_ids_with_escape_codes_reach_no_terminal_through_a_table(
    shell: Shell, model: Path, probe: Path, tmp_path: Path
) -> None:
    rows = written(4, harmful=True, outcome=Outcome.COMPLIED)
    write_transcripts((t.replace(id=f"\x1b[2J\x9b{t.id}") for t in rows), tmp_path / "t.jsonl")
    common = ("--model", model, "--probe", probe, "--transcripts", tmp_path / "t.jsonl")
    result = shell("trace", *common, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "\\u001b[2J\\u009b" in result.out
    assert "\x1b" not in result.out + result.err
    assert "\x9b" not in result.out + result.err


def test_an_error_that_names_an_id_stays_one_line(shell: Shell, tmp_path: Path) -> None:
    twice = Transcript(id="a\n\x1b[31mcliffscope: all is well", messages=(Message(role="user", content="hi"),))
    record = json.dumps({"id": twice.id, "prompt": "hi"})
    (tmp_path / "t.jsonl").write_text(f"{record}\n{record}\n")
    line = shell.fails(3, "judge", "--transcripts", tmp_path / "t.jsonl", "--out", tmp_path / "out.jsonl")
    assert "\x1b" not in line
    assert "all is well" in line


def test_a_path_with_escape_codes_is_shown_as_escapes(shell: Shell, tmp_path: Path) -> None:
    line = shell.fails(3, "judge", "--transcripts", tmp_path / "\x1b[31m.jsonl", "--out", tmp_path / "out.jsonl")
    assert "\\u001b[31m.jsonl" in line


def test_log_lines_show_control_characters_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers.clear()
    try:
        log_to_standard_error()
        logging.getLogger("cliffscope.test").warning("Judge %s left 1 unjudged.", "\x1b[31mname")
        assert capsys.readouterr().err == "Judge \\u001b[31mname left 1 unjudged.\n"
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_one_function_prints_and_no_other() -> None:
    printing: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "typer.echo", "typer.secho", "click.echo", "sys.stdout.write", "sys.stderr.write"):
                printing.append(f"{path.relative_to(PACKAGE)}: {called}")
    assert printing == ["cli/program.py: typer.echo"]
    assert "cliffscope.cli.program" in sys.modules
