import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliffscope.errors import DataError, StoreError
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.messages import CHAT_COLUMNS
from cliffscope.transcripts.prompts import PROMPT_COLUMNS, read_prompts
from cliffscope.transcripts.transcript import Message, Outcome, Transcript, Transcripts

SHARED = Path(os.environ.get("CLIFFSCOPE_SHARED", Path(__file__).parents[2] / "shared")) / "data"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["a\u2028b\u0085\r\nc", "\x00"])
ids = st.none() | st.lists(st.integers(0, 200_000), max_size=5).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
turns = st.lists(st.tuples(st.sampled_from(["system", "assistant", "user"]), text), max_size=3)
fields = st.fixed_dictionaries(
    {
        "id": text,
        "turns": st.tuples(turns, text).map(lambda pair: [*pair[0], ("user", pair[1])]),
        "thinking": st.none() | text,
        "answer": st.none() | text,
        "thinking_ids": ids,
        "answer_ids": ids,
        "closed": st.booleans(),
        "harmful": st.none() | st.booleans(),
        "outcome": st.sampled_from(Outcome),
        "source": text,
        "extra": st.dictionaries(text.map(lambda key: f"x{key}"), json_values, max_size=3),
    }
)


def build(values: dict) -> Transcript:
    messages = tuple(Message(role=role, content=content) for role, content in values["turns"])
    return Transcript(messages=messages, **{name: value for name, value in values.items() if name != "turns"})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8"))
        return path

    return write_file


@given(st.lists(fields, min_size=1, max_size=4, unique_by=lambda values: values["id"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back_unchanged(tmp_path_factory: pytest.TempPathFactory, items: list[dict]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    transcripts = [build(values) for values in items]
    write_transcripts(transcripts, path)
    assert read_transcripts(path) == Transcripts(transcripts)


def test_a_file_is_complete_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = Transcript(id="a", messages=(Message(role="user", content="hi"),))
    write_transcripts([good], path)
    before = path.read_bytes()
    for extra in ({"weight": object()}, {"weight": float("nan")}, {"weight": "\ud800"}):
        with pytest.raises(DataError, match="'b' cannot be written as JSON"):
            write_transcripts([good, good.replace(id="b", extra=extra)], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_move_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"t\.jsonl cannot be written: Is a directory"):
        write_transcripts([Transcript(id="a", messages=(Message(role="user", content="hi"),))], tmp_path / "t.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_writing_needs_a_folder_and_extra_keys_of_their_own(tmp_path: Path) -> None:
    transcript = Transcript(id="a", messages=(Message(role="user", content="hi"),))
    with pytest.raises(DataError, match="does not exist"):
        write_transcripts([transcript], tmp_path / "absent" / "t.jsonl")
    with pytest.raises(DataError, match=r"extra keys \['outcome'\]"):
        write_transcripts([transcript.replace(extra={"outcome": 1})], tmp_path / "t.jsonl")


def test_unknown_keys_are_kept_and_a_missing_id_is_made(write: Callable[[str, str], Path]) -> None:
    path = write("t.jsonl", '\ufeff{"prompt": "hi", "topic": ["a"]}\n\n{"id": "b", "prompt": "", "harmful": true}\n')
    first, second = read_transcripts(path)
    assert first == Transcript(
        id="t-1", messages=(Message(role="user", content="hi"),), extra={"topic": ["a"]}, outcome=Outcome.UNJUDGED
    )
    assert (second.id, second.harmful, second.closed) == ("b", True, True)


THOUGHT, ANSWERED = "Bread is harmless.", "Mix flour and water."


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWERED}"},
        {"answer": f"{THOUGHT}\n</think>\n\n{ANSWERED}"},
        {"answer": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWERED}", "thinking": THOUGHT},
        {"answer": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWERED}", "reasoning_content": THOUGHT},
        {"answer": ANSWERED, "reasoning_content": f"\n{THOUGHT}\n", "reasoning": f"\n{THOUGHT}\n"},
        {"answer": ANSWERED, "reasoning": THOUGHT},
        {"answer": f"analysis{THOUGHT}assistantfinal{ANSWERED}"},
    ],
)
def test_thinking_is_read_from_wherever_another_program_puts_it(
    write: Callable[[str, str], Path], fields: dict[str, str], tmp_path: Path
) -> None:
    file = write("others.jsonl", json.dumps({"id": "a", "prompt": "How do I bake bread?", **fields}))
    (row,) = rows = read_transcripts(file)
    assert (row.thinking, row.answer) == (THOUGHT, ANSWERED)
    assert "reasoning" not in row.extra
    assert "reasoning_content" not in row.extra
    write_transcripts(rows, tmp_path / "again.jsonl")
    assert read_transcripts(tmp_path / "again.jsonl") == rows


def test_thinking_is_not_taken_from_an_answer_that_was_generated_or_from_a_prompt(
    write: Callable[[str, str], Path],
) -> None:
    tagged = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWERED}"
    lines = [
        {"id": "generated", "prompt": "a", "answer": tagged, "answer_ids": [1], "reasoning": THOUGHT},
        {"id": "prompt", "prompt": "b", "reasoning": THOUGHT},
        {"id": "open", "prompt": "c", "answer": f"<think>\n{THOUGHT}"},
    ]
    generated, prompt, cut = read_transcripts(write("t.jsonl", "\n".join(map(json.dumps, lines))))
    assert (generated.thinking, generated.answer, generated.extra) == (None, tagged, {"reasoning": THOUGHT})
    assert (prompt.thinking, prompt.extra) == (None, {"reasoning": THOUGHT})
    assert (cut.thinking, cut.answer) == (None, f"<think>\n{THOUGHT}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"t\.jsonl:2: expected a JSON object"),
        ("{", r"t\.jsonl:2: not valid JSON"),
        ('{"prompt": NaN}', r"t\.jsonl:2: NaN is not JSON"),
        ('{"prompt": "\\ud800"}', r"t\.jsonl:2: a string holds half of a surrogate pair"),
        ("{}", r"t\.jsonl:2: field 'prompt' is None; expected text"),
        ('{"prompt": 3}', r"t\.jsonl:2: field 'prompt' is 3; expected text"),
        ('{"prompt": "a", "messages": []}', r"t\.jsonl:2: 'prompt' and 'messages' exclude each other"),
        ('{"messages": []}', r"t\.jsonl:2: field 'messages' is \[\]; expected a list of"),
        ('{"messages": [{"role": "user"}]}', r"t\.jsonl:2: field 'messages'"),
        ('{"messages": [{"role": "system", "content": "x"}]}', r"at least one user message"),
        ('{"prompt": "a", "thinking": 1}', r"t\.jsonl:2: field 'thinking'"),
        ('{"prompt": "a", "thinking_ids": [1, true]}', r"t\.jsonl:2: field 'thinking_ids'"),
        ('{"prompt": "a", "answer_ids": "1"}', r"t\.jsonl:2: field 'answer_ids' is '1'; expected a list of token ids"),
        ('{"prompt": "a", "answer_ids": [-1]}', r"t\.jsonl:2: field 'answer_ids'"),
        ('{"prompt": "a", "harmful": "yes"}', r"t\.jsonl:2: field 'harmful' is 'yes'; expected true, false or null"),
        ('{"prompt": "a", "closed": 0}', r"t\.jsonl:2: field 'closed'"),
        ('{"prompt": "a", "outcome": "refuse"}', r"t\.jsonl:2: field 'outcome' is 'refuse'; expected one of refused,"),
    ],
)
def test_a_bad_line_is_named_with_its_field(write: Callable[[str, str], Path], line: str, message: str) -> None:
    path = write("t.jsonl", '{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_transcripts(path)


def test_repeated_ids_in_a_file_are_refused(write: Callable[[str, str], Path]) -> None:
    path = write("t.jsonl", '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n')
    with pytest.raises(DataError, match="such as 'a'"):
        read_transcripts(path)


@pytest.mark.parametrize("reader", [read_transcripts, read_prompts])
def test_a_missing_empty_or_foreign_file_is_a_data_error(reader: Callable, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        reader(path)
    path.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        reader(path)
    path.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(DataError, match="is not UTF-8: byte 15"):
        reader(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        reader(path)


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.json", "columns.json", "p.jsonl", "p.txt", "p.parquet"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    prompts = ['say "hi", twice', "שלום 👋", "third"]
    table = pd.DataFrame({"prompt": prompts, "topic": ["x", "y", "z"]})
    path = tmp_path / name
    write_table = {
        "p.csv": lambda: table.to_csv(path, index=False),
        "p.tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "p.json": lambda: path.write_text(json.dumps(table.to_dict("records")), encoding="utf-8"),
        "columns.json": lambda: path.write_text(json.dumps(table.to_dict("list")), encoding="utf-8"),
        "p.jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "p.txt": lambda: path.write_text("\r\n".join(prompts) + "\r\n", encoding="utf-8", newline=""),
        "p.parquet": lambda: table.to_parquet(path),
    }
    write_table[name]()
    found = read_prompts(path, harmful=True)
    assert [t.prompt for t in found] == prompts
    assert [t.id for t in found] == [f"{path.stem}-{i}" for i in (1, 2, 3)]
    assert all(t.harmful and t.source == path.stem and t.thinking is None for t in found)
    assert name == "p.txt" or found[1].extra == {"topic": "y"}
    assert found.omitted == ()


def test_a_prompt_over_several_lines_of_a_csv_is_one(write: Callable[[str, str], Path]) -> None:
    found = read_prompts(write("p.csv", 'goal,target\n"one\ntwo",x\nthree,y\n'))
    assert [t.prompt for t in found] == ["one\ntwo", "three"]


@pytest.mark.parametrize("column", [c for c in PROMPT_COLUMNS if c not in CHAT_COLUMNS])
def test_the_usual_columns_are_found(write: Callable[[str, str], Path], column: str) -> None:
    assert read_prompts(write("p.csv", f"other,{column}\nx,hi\n"))[0].prompt == "hi"


def test_turns_give_the_first_and_messages_all_up_to_the_last_user(write: Callable[[str, str], Path]) -> None:
    assert read_prompts(write("a.jsonl", '{"turns": ["one", "two"]}'))[0].prompt == "one"
    turns = [{"role": r, "content": r} for r in ("system", "user", "assistant")]
    (found,) = read_prompts(write("b.jsonl", json.dumps({"messages": turns})))
    assert [m.role for m in found.messages] == ["system", "user"]
    assert read_prompts(write("c.json", '["one", "two"]'))[1].prompt == "two"


def test_a_wrong_column_lists_those_there_are(write: Callable[[str, str], Path]) -> None:
    path = write("p.csv", "id,request\n1,hi\n")
    with pytest.raises(DataError, match=r"any of the columns prompt, .* It has: id, request\. .*column=\.\.\."):
        read_prompts(path)
    with pytest.raises(DataError, match="the column 'goal'. It has: id, request"):
        read_prompts(path, column="goal")
    (found,) = read_prompts(path, column="request")
    assert (found.prompt, found.extra) == ("hi", {"column_id": "1"})


def test_prompts_with_columns_named_as_fields_can_be_written(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    found = read_prompts(write("p.csv", "id,prompt,answer,source,harmful\n1,hi,sure,web,True\n"))
    write_transcripts(found, tmp_path / "t.jsonl")
    assert list(read_transcripts(tmp_path / "t.jsonl")) == list(found)
    assert (found[0].source, found[0].harmful, found[0].extra["column_answer"]) == ("web", True, "sure")


def test_empty_and_repeated_prompts_are_counted_and_ids_stay(write: Callable[[str, str], Path]) -> None:
    found = read_prompts(write("p.txt", "one\n\none\ntwo\n  \n"))
    assert [(t.id, t.prompt) for t in found] == [("p-1", "one"), ("p-4", "two")]
    assert [(o.id, o.stage, o.reason) for o in found.omitted] == [
        ("p-2", "read_prompts", "empty prompt"),
        ("p-3", "read_prompts", "exact duplicate of p-1"),
        ("p-5", "read_prompts", "empty prompt"),
    ]


def test_a_limit_is_a_seeded_sample_in_file_order(write: Callable[[str, str], Path]) -> None:
    path = write("p.txt", "\n".join(f"prompt {i}" for i in range(50)))
    some = read_prompts(path, limit=10, seed=1)
    numbers = [int(t.id.removeprefix("p-")) for t in some]
    assert numbers == sorted(numbers)
    assert len(numbers) == 10
    assert some == read_prompts(path, limit=10, seed=1)
    assert some != read_prompts(path, limit=10, seed=2)
    assert len(read_prompts(path, limit=99)) == 50
    with pytest.raises(DataError, match="limit=0"):
        read_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,b\none,two,three\n", r"p\.csv:2: more cells than the 2 columns"),
        ("p.csv", 'prompt\n"one', r"p\.csv:2: .*quoted"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.csv", 'prompt\n" "\n', "holds no prompt: all 1 rows are empty in column 'prompt'"),
        ("p.json", '{"prompt": ["a"], "b": []}', "lists of equal length"),
        ("p.json", "3", "expected a list of objects"),
        ("p.json", "[]", "has no rows"),
        ("p.jsonl", '{"prompt": {"a": 1}}', r"p\.jsonl:1: field 'prompt' is \{'a': 1\}; expected text"),
        ("p.parquet", "no parquet", "is not a Parquet file"),
        ("p.docx", "x", r"cannot read '\.docx'"),
    ],
)
def test_a_malformed_table_is_a_data_error(
    write: Callable[[str, str], Path], name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(write(name, content))


def test_parquet_values_that_json_lacks_are_kept_as_text_or_null(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["a"], "when": [pd.Timestamp("2025-01-02")], "weight": [float("nan")]})
    table.to_parquet(tmp_path / "p.parquet")
    (found,) = read_prompts(tmp_path / "p.parquet")
    assert found.extra == {"when": "2025-01-02 00:00:00", "weight": None}
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    ("file", "n", "n_omitted"),
    [
        ("advbench/harmful_behaviors.csv", 520, 0),
        ("jailbreakbench/harmful-behaviors.csv", 100, 0),
        ("strongreject/strongreject_dataset.csv", 313, 0),
        ("harmbench/harmbench_behaviors_text_all.csv", 400, 0),
        ("xstest/xstest_prompts.csv", 450, 0),
        ("benign/mt_bench_question.jsonl", 80, 0),
        ("benign/self_instruct_seed_tasks.jsonl", 175, 0),
        ("benign/dolly_1000.csv", 997, 3),
    ],
)
def test_published_prompt_sets_are_read_whole(file: str, n: int, n_omitted: int) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"the shared test data are absent: {path}; set CLIFFSCOPE_SHARED")
    found = read_prompts(path)
    assert (len(found), len(found.omitted)) == (n, n_omitted)


def test_xstests_labels_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "xstest.csv"
    path.write_text(
        "id,prompt,type,label\n1,How can I kill a process?,homonyms,safe\n2,How do I win a fight?,x,unsafe\n3,q,x,odd\n"
    )
    found = read_prompts(path)
    assert [t.harmful for t in found] == [False, True]
    assert [o.id for o in found.omitted] == ["xstest-3"]
    assert "field 'label' is 'odd'; expected one of harmful, unsafe" in found.omitted[0].reason
    assert [t.harmful for t in read_prompts(path, harmful=True)] == [True, True, True]
    path.write_text("prompt,harmful,label\na,true,safe\n")
    assert read_prompts(path)[0].harmful is True, "a column of our own goes first"


def test_the_whole_of_xstest_is_labelled() -> None:
    path = SHARED / "xstest" / "xstest_prompts.csv"
    if not path.is_file():
        pytest.skip(f"the shared test data are absent: {path}; set CLIFFSCOPE_SHARED")
    found = read_prompts(path)
    assert (len(found.where(harmful=False)), len(found.where(harmful=True))) == (250, 200)
