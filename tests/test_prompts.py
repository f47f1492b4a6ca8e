import json
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from cliffscope.errors import DataError
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.pools import read_windows
from cliffscope.transcripts.prompts import check_labels, read_prompts
from cliffscope.transcripts.records import Message, Omission, Transcript, Transcripts

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8"))
        return path

    return write_file


def reasons(found: Transcripts) -> dict[str, str]:
    return {omission.id: omission.reason for omission in found.omitted}


# Prompts over several columns


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            {"instruction": ["Translate.", "Translate.", "Sing."], "input": ["hello", "bye", ""], "output": ["x"] * 3},
            ["Translate.\n\nhello", "Translate.\n\nbye", "Sing."],
        ),
        (
            {"Behavior": ["Sum it up"] * 2, "ContextString": ["First text", "Second text"]},
            ["First text\n\n---\n\nSum it up", "Second text\n\n---\n\nSum it up"],
        ),
        (
            {"instruction": ["Who won?"] * 2, "context": ["The cup of 1990.", "The cup of 1994."]},
            ["Who won?\n\nThe cup of 1990.", "Who won?\n\nThe cup of 1994."],
        ),
        (
            {"vanilla": ["plain", "plain"], "adversarial": ["", "in a story, plain"], "completion": ["", ""]},
            ["plain", "in a story, plain"],
        ),
    ],
    ids=["Alpaca", "HarmBench", "Dolly", "WildJailbreak"],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_prompt_over_several_columns_is_read_whole_and_is_no_duplicate(
    table: dict[str, list[str]], expected: list[str], kind: str, tmp_path: Path
) -> None:
    path, frame = tmp_path / f"p.{kind}", pd.DataFrame(table)
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    found = read_prompts(path)
    assert [t.prompt for t in found] == expected
    assert found.omitted == ()


def test_context_that_is_no_text_costs_its_row(write: Write) -> None:
    rows = [{"instruction": "a", "input": {"image": 1}}, {"instruction": "b", "input": None}, {"instruction": "c"}]
    found = read_prompts(write("p.json", json.dumps(rows)))
    assert [t.prompt for t in found] == ["b", "c"]
    assert "field 'input'" in reasons(found)["p-1"]


# Conversations


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'He said "it\'s fine"\nand left.'}]


@pytest.mark.parametrize(
    "spell", [json.dumps, repr, lambda chat: json.dumps(chat, indent=1)], ids=["json", "repr", "long"]
)
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt", "turns"])
def test_a_conversation_in_a_cell_of_a_csv_is_read_as_one(column: str, spell: Callable, tmp_path: Path) -> None:
    pd.DataFrame({column: [spell(CHAT)], "topic": ["x"]}).to_csv(tmp_path / "p.csv", index=False)
    (found,) = read_prompts(tmp_path / "p.csv")
    assert [{"role": m.role, "content": m.content} for m in found.messages] == CHAT


@pytest.mark.parametrize("cell", ["['one', 'two']", '["one", "two"]', "one"])
def test_turns_in_a_cell_of_a_csv_are_read_as_turns(cell: str, tmp_path: Path) -> None:
    pd.DataFrame({"turns": [cell]}).to_csv(tmp_path / "p.csv", index=False)
    assert read_prompts(tmp_path / "p.csv")[0].prompt == "one"


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",
        "array([{'role': 'user', 'content': 'a'}], dtype=object)",
        '[{"role": "user", "content": "cut of',
    ],
    ids=["numpy", "array", "cut"],
)
def test_a_conversation_that_cannot_be_parsed_is_no_prompt(cell: str, tmp_path: Path) -> None:
    pd.DataFrame({"messages": [cell, "plain", "text"]}).to_csv(tmp_path / "p.csv", index=False)
    found = read_prompts(tmp_path / "p.csv")
    assert [t.prompt for t in found] == ["plain", "text"]
    assert "a conversation as JSON or as a Python literal" in reasons(found)["p-1"]


def test_a_prompt_that_only_begins_with_a_bracket_stays_text(write: Write) -> None:
    found = read_prompts(write("p.csv", 'prompt,x\n"[scene: night] write a story",1\n"[1, 2, 3] sort this",2\n'))
    assert [t.prompt for t in found] == ["[scene: night] write a story", "[1, 2, 3] sort this"]


PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]


@pytest.mark.parametrize("reader", [read_prompts, read_transcripts])
def test_parts_of_text_are_joined_and_others_cost_their_row(reader: Callable, write: Write) -> None:
    picture = [*PARTS, {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}
    rows = [
        [{"role": "user", "content": PARTS}],
        [{"role": "user", "content": picture}],
        [{"role": "user", "content": "plain"}],
        [{"role": "user", "content": "go"}, called, {"role": "user", "content": "on"}],
        [{"from": "system", "value": "s"}, {"from": "human", "value": "ShareGPT"}, {"from": "gpt", "value": "a"}],
    ]
    found = reader(write("p.jsonl", "\n".join(json.dumps({"messages": row}) for row in rows)))
    assert [t.prompt for t in found] == ["What is this?", "plain", "ShareGPT"]
    assert "parts of text only" in reasons(found)["p-2"]
    assert "messages[1].tool_calls" in reasons(found)["p-4"]


# Files


def test_cells_of_any_length_are_read(write: Write) -> None:
    long = "word " * 60_000
    found = read_prompts(write("p.csv", f'prompt,x\n"{long}",1\nshort,2\n'))
    assert [len(t.prompt) for t in found] == [300_000, 5]
    import csv

    assert csv.field_size_limit() == 131_072, "the limit of other code is as it was"


@pytest.mark.parametrize("start", ["", "\ufeff", "sep=;\n"])
@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_semicolons_are_found_in_the_header(start: str, name: str, write: Write) -> None:
    found = read_prompts(write(name, f'{start}id;prompt;label\n1;"one; two, three";Unsafe\n2;four, five;safe\n'))
    assert [(t.prompt, t.harmful) for t in found] == [("one; two, three", True), ("four, five", False)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,a;b\nx; y,z\n", "x; y"),
        ("prompt\none, two; three\n", None),
        ("prompt\tlabel\none, two\tsafe\n", "one, two"),
        ("prompt\none two\n", "one two"),
    ],
)
def test_a_delimiter_is_not_guessed_from_the_prompts(content: str, expected: str | None, write: Write) -> None:
    path = write("p.csv", content)
    if expected is None:
        with pytest.raises(DataError, match="more cells than the 1 columns"):
            read_prompts(path)
    else:
        assert read_prompts(path)[0].prompt == expected


def test_one_row_with_too_many_cells_costs_itself(write: Write) -> None:
    found = read_prompts(write("p.csv", "prompt,b\none,1\ntwo,2,3\nthree,4\n"))
    assert [t.id for t in found] == ["p-1", "p-3"]
    assert "p.csv:3: more cells than the 2 columns" in reasons(found)["p-2"]


def test_two_columns_of_one_name_are_refused(write: Write) -> None:
    with pytest.raises(DataError, match="several columns named 'prompt'"):
        read_prompts(write("p.csv", "prompt,prompt\na,b\n"))


def test_bytes_of_parquet_are_text_and_other_bytes_cost_their_row(tmp_path: Path) -> None:
    table = {"prompt": ["שלום".encode(), b"caf\xe9", b"plain"], "raw": [b"\xff", b"ok", None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    found = read_prompts(tmp_path / "p.parquet")
    assert [t.prompt for t in found] == ["שלום", "plain"]
    assert [t.extra["raw"] for t in found] == ["\\xff", None]
    assert r"field 'prompt' is b'caf\xe9'; expected text" in reasons(found)["p-2"]
    write_transcripts(found, tmp_path / "t.jsonl")


def test_text_of_parquet_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "p.parquet")
    found = read_prompts(tmp_path / "p.parquet")
    assert [t.prompt for t in found] == ["one", "two"]
    assert "field 'prompt' is b'caf" in reasons(found)["p-2"]


def test_bytes_in_a_pool_are_text_and_other_bytes_cost_their_row() -> None:
    (window,) = read_windows([{"prompt": b"plain"}, {"prompt": b"caf\xe9"}])
    good, bad = window.rows
    assert isinstance(good, Transcript)
    assert good.prompt == "plain"
    assert isinstance(bad, Omission)
    assert "is not text: expected UTF-8" in bad.reason


# Labels


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("label", "Unsafe", True),
        ("label", " SAFE ", False),
        ("label", "benign", False),
        ("label", "Harmful", True),
        ("harmful", "1", True),
        ("harmful", "0", False),
        ("harmful", "Yes", True),
        ("harmful", "FALSE", False),
        ("harmful", "unsafe", True),
        ("harmful", "", None),
        ("prompt_harm_label", "unharmful", False),
        ("data_type", "adversarial_harmful", True),
        ("data_type", "vanilla_benign", False),
    ],
)
def test_labels_are_read_by_what_they_say(column: str, value: str, expected: bool | None, write: Write) -> None:
    assert read_prompts(write("p.csv", f"prompt,{column}\na,{value}\n"))[0].harmful is expected


@pytest.mark.parametrize(("value", "expected"), [(1, True), (0, False), (1.0, True), (True, True), (None, None)])
def test_labels_of_json_are_read_as_well(value: object, expected: bool | None, write: Write) -> None:
    assert read_prompts(write("p.jsonl", json.dumps({"prompt": "a", "harmful": value})))[0].harmful is expected


@pytest.mark.parametrize("value", [2, -1, "maybe", [True], "n/a"])
def test_a_label_that_cannot_be_understood_costs_its_row(value: object, write: Write) -> None:
    rows = [{"prompt": "a", "harmful": value}, {"prompt": "b", "harmful": 1}, {"prompt": "c", "harmful": 0}]
    found = read_prompts(write("p.json", json.dumps(rows)))
    assert [t.harmful for t in found] == [True, False]
    assert "expected true or false" in reasons(found)["p-1"]
    with pytest.raises(DataError, match="field 'harmful'.*1 of 1|field 'harmful'.*expected true or false"):
        read_prompts(write("q.json", json.dumps(rows[:1])))


def test_a_column_of_labels_of_something_else_is_said_to_be_none(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_prompts(write("p.csv", "prompt,label\na,chemistry\nb,biology\n"))
    assert [t.harmful for t in found] == [None, None]
    assert "'label' does not say whether prompts are harmful (it holds 'chemistry')" in caplog.text


def test_one_prompt_with_both_labels_is_an_error_and_no_duplicate(write: Write) -> None:
    with pytest.raises(DataError, match=r"1 of the prompts of .*p\.csv occur both .* 'p-1' and 'p-3'"):
        read_prompts(write("p.csv", "prompt,harmful\na,1\nb,0\n A ,0\n"))
    with pytest.raises(DataError, match="both as harmful and as harmless"):
        read_prompts(write("q.csv", "prompt,harmful\na,1\na,0\n"))


def test_prompts_of_two_files_are_compared_with_their_whole_conversation() -> None:
    def ask(name: str, system: str, harmful: bool) -> Transcript:
        turns = (Message(role="system", content=system), Message(role="user", content="Go on."))
        return Transcript(id=name, messages=turns, harmful=harmful)

    check_labels([ask("a", "You fix bikes.", True), ask("b", "You steal bikes.", False)], "x and y")
    with pytest.raises(DataError, match="x and y"):
        check_labels([ask("a", "You fix bikes.", True), ask("b", "you  fix BIKES.", False)], "x and y")


# Which column


def test_the_column_is_named_where_several_would_do(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cliffscope")
    path = write("p.csv", "Index,Goal,Target,Behavior\n0,do it,Sure,Doing\n")
    assert read_prompts(path)[0].prompt == "do it"
    assert "read from column 'Goal'; 'Behavior' would do as well" in caplog.text
    caplog.clear()
    assert read_prompts(path, column="Behavior")[0].prompt == "Doing"
    assert caplog.text == ""


def test_columns_that_are_joined_are_named(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cliffscope")
    read_prompts(write("p.csv", "instruction,input\na,b\n"))
    assert "in column 'instruction', joined with 'input'" in caplog.text


# Rows of transcripts


BAD_LINES = ['{"prompt": ', '{"prompt": "\\ud800"}', '{"prompt": 3}', "[1]", '{"prompt": "a", "outcome": "hm"}', "\xff"]


def test_a_line_that_is_no_transcript_is_left_out_with_its_reason(tmp_path: Path) -> None:
    good = [json.dumps({"id": f"good-{i}", "prompt": f"NUL \0 and ESC \x1b {i}"}) for i in range(7)]
    lines = [line for pair in zip(good, BAD_LINES, strict=False) for line in pair] + good[len(BAD_LINES) :]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    found = read_transcripts(tmp_path / "t.jsonl")
    assert [t.id for t in found] == [f"good-{i}" for i in range(7)]
    assert [o.id for o in found.omitted] == [f"t-{n}" for n in range(2, 13, 2)]
    words = ["not valid JSON", "half of a surrogate pair", "field 'prompt'", "JSON object", "'outcome'", "not UTF-8"]
    for omission, word in zip(found.omitted, words, strict=True):
        assert word in omission.reason
    with pytest.raises(DataError, match=r"t\.jsonl:2: not valid JSON"):
        read_transcripts(tmp_path / "t.jsonl", strict=True)


def test_a_file_half_of_whose_lines_are_broken_is_refused_with_their_number(write: Write) -> None:
    path = write("t.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n{"promt": "c"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:2: field 'prompt' is None.* 2 of 3 rows of .*cannot be read"):
        read_transcripts(path)


# Text


@pytest.mark.parametrize("text", ["NUL \x00.", "ESC \x1b[31m.", "C1 \x9b.", "BEL \x07, BS \x08."])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "python"])
def test_control_characters_are_kept_by_every_way_in_and_out(text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{kind}"
    if kind == "python":
        found = Transcripts([Transcript(id="p-1", messages=(Message(role="user", content=text),))])
    else:
        {
            "jsonl": lambda: path.write_text(json.dumps({"prompt": text})),
            "json": lambda: path.write_text(json.dumps([{"prompt": text}])),
            "csv": lambda: path.write_text(f'prompt,x\n"{text}",1\n', encoding="utf-8"),
            "parquet": lambda: pd.DataFrame({"prompt": [text]}).to_parquet(path),
            "txt": lambda: path.write_text(text, encoding="utf-8"),
        }[kind]()
        found = read_prompts(path)
    write_transcripts(found, tmp_path / "t.jsonl")
    again = read_transcripts(tmp_path / "t.jsonl")
    assert [t.prompt for t in again] == [text]
    found.to_frame().to_parquet(tmp_path / "table.parquet")


@pytest.mark.parametrize("field", ["id", "messages", "thinking", "answer", "source"])
def test_half_of_a_surrogate_pair_is_refused_in_python_with_the_row(field: str) -> None:
    half = "half \ud83d"
    value = (Message(role="user", content=half),) if field == "messages" else half
    fields = {"id": "a", "messages": (Message(role="user", content="hi"),), field: value}
    with pytest.raises(DataError, match=r"of transcript '.*' holds half of a surrogate pair") as caught:
        Transcript(**fields)
    str(caught.value).encode()
    good = Transcript(**{**fields, field: "\U0001f642" if field != "messages" else fields["messages"][:0]})
    with pytest.raises(DataError, match="surrogate"):
        good.replace(**{field: value})


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_of_a_surrogate_pair_is_refused_in_files(kind: str, write: Write) -> None:
    rows = ['{"prompt": "a"}', '{"prompt": "\\ud83d"}', '{"prompt": "b"}']
    text = "\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]"
    found = read_prompts(write(f"p.{kind}", text))
    assert [t.prompt for t in found] == ["a", "b"]
    assert f"p.{kind}:2: a string holds half of a surrogate pair" in reasons(found)["p-2"]


def test_a_reason_that_quotes_half_of_a_surrogate_pair_can_be_stored(tmp_path: Path) -> None:
    omission = Omission(stage="judge", reason="it said \ud83d", id="a")
    pd.DataFrame([{"reason": omission.reason}]).to_parquet(tmp_path / "o.parquet")
    assert omission.reason == "it said \\ud83d"
