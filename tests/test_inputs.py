"""What a study starts from: which files, which columns, and what is said about them."""

from pathlib import Path

import pytest
from test_cli import Shell, files, model, shell

from cliffscope.errors import DataError
from cliffscope.study.config import StudyConfig, read_inputs
from cliffscope.study.runner import plan_study
from cliffscope.study.stages.transcripts import suspect_swapped
from cliffscope.transcripts.control_tokens import is_escaped
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts

__all__ = ["files", "model", "shell"]


@pytest.fixture
def two(tmp_path: Path) -> StudyConfig:
    """Six harmful and six harmless prompts, in columns of other names."""
    (tmp_path / "bad.csv").write_text("text,request\n" + "".join(f"x,steal {i}\n" for i in range(6)))
    (tmp_path / "good.csv").write_text("question,text\n" + "".join(f"bake {i},x\n" for i in range(6)))
    return StudyConfig(
        model="m", out=str(tmp_path / "run"), harmful=str(tmp_path / "bad.csv"), harmless=str(tmp_path / "good.csv")
    )


def changed(config: StudyConfig, **changes: object) -> StudyConfig:
    from dataclasses import replace

    return replace(config, **changes)


def test_each_file_has_its_column(two: StudyConfig) -> None:
    read = read_inputs(changed(two, column="request", harmless_column="question")).transcripts
    assert [t.prompt for t in read if t.harmful] == [f"steal {i}" for i in range(6)]
    assert [t.prompt for t in read if t.harmful is False] == [f"bake {i}" for i in range(6)]
    with pytest.raises(DataError, match=r"good\.csv does not have the column 'request'.*--column"):
        read_inputs(changed(two, column="request"))


@pytest.mark.parametrize("spelling", ["steal 3", "  Steal   3 ", "ＳＴＥＡＬ 3"])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_prompt_in_both_files_is_an_error_whichever_are_drawn(
    two: StudyConfig, spelling: str, limit: int | None
) -> None:
    with Path(str(two.harmless)).open("a", encoding="utf-8") as file:
        file.write(f"{spelling},x\n")
    with pytest.raises(DataError, match=r"1 of the prompts of .*bad\.csv and .*good\.csv.*'bad-4' and 'good-7'"):
        read_inputs(changed(two, column="request", harmless_column="question", limit=limit))


def test_transcripts_with_both_labels_for_one_prompt_are_an_error(two: StudyConfig, tmp_path: Path) -> None:
    rows = [
        Transcript(id=str(i), messages=(Message(role="user", content="a"),), answer="b", harmful=bool(i))
        for i in range(2)
    ]
    write_transcripts(rows, tmp_path / "t.jsonl")
    config = StudyConfig(model="m", out=str(tmp_path / "run"), transcripts=str(tmp_path / "t.jsonl"))
    with pytest.raises(DataError, match="both as harmful and as harmless"):
        read_inputs(config)


def test_samples_are_those_of_one_file_and_repeated_prompts_are_counted(two: StudyConfig) -> None:
    with Path(str(two.harmful)).open("a", encoding="utf-8") as file:
        file.write("x,steal 1\n")
    config = changed(two, column="request", harmless_column="question", limit=3, escape_control_tokens=True)
    read = read_inputs(config).transcripts
    assert (len(read.where(harmful=True)), len(read.where(harmful=False))) == (3, 3)
    assert [o.reason for o in read.omitted] == ["exact duplicate of bad-2"]
    assert all(is_escaped(t) for t in read)


def judged(harmful: tuple[int, int], harmless: tuple[int, int]) -> Transcripts:
    """(refused, complied) of each side."""
    made = []
    for side, counts in ((True, harmful), (False, harmless)):
        for outcome, n in zip((Outcome.REFUSED, Outcome.COMPLIED), counts, strict=True):
            made += [(side, outcome)] * n
    return Transcripts(
        Transcript(id=str(i), messages=(Message(role="user", content=str(i)),), harmful=side, outcome=outcome)
        for i, (side, outcome) in enumerate(made)
    )


@pytest.mark.parametrize(
    ("harmful", "harmless", "suspected"),
    [
        ((0, 60), (61, 0), True),
        ((1, 59), (24, 36), True),
        ((60, 0), (0, 61), False),
        ((0, 60), (2, 58), False),
        ((2, 2), (3, 1), False),
        ((0, 0), (0, 0), False),
    ],
)
def test_swapped_files_are_suspected_aloud(
    harmful: tuple[int, int], harmless: tuple[int, int], suspected: bool
) -> None:
    told = suspect_swapped(judged(harmful, harmless))
    assert (told is not None) == suspected
    if told is not None:
        assert f"{harmful[0]} of 60 harmful prompts were refused, and {harmless[0]} of" in told
        assert "swapped" in told


def test_a_judges_address_with_a_password_never_reaches_a_run_directory(two: StudyConfig, tmp_path: Path) -> None:
    from cliffscope.study.runner import run_study

    for name in ("judge", "harmless_judge"):
        config = changed(two, **{name: "model:toy@http://me:hunter22@127.0.0.1:9/v1"})
        for work in (run_study, plan_study):
            with pytest.raises(DataError, match="would be recorded") as caught:
                work(config)
            assert "hunter22" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_a_column_and_tells_what_it_left_out(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("request,x\nhow do i fix the fence,1\nhow do i fix the fence,2\na,3,4\n" + "b,5\n")
    words = ("roll-out", "--model", model, "--prompts", tmp_path / "p.csv", "--out", tmp_path / "t.jsonl", "--harmful")
    assert "does not have any of the columns" in shell.fails(3, *words)
    result = shell(*words, "--column", "request", "--escape-control-tokens", "--max-thinking", 2, "--max-answer", 2)
    assert result.code == 0, result.err
    assert "left out 1: exact duplicate of p-1" in result.err
    assert "more cells than the 2 columns" in result.err
    assert {t.id for t in read_transcripts(tmp_path / "t.jsonl")} == {"p-1", "p-4"}
    assert all(is_escaped(t) for t in read_transcripts(tmp_path / "t.jsonl"))
