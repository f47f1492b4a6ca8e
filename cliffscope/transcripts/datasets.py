"""Which transcripts and prompts does a file hold?

1. `read_transcripts` and `write_transcripts`: CliffScope's JSONL, one transcript a line, with an exact round trip.
2. `read_prompts`: published prompt sets as CSV, TSV, JSON, JSONL, plain text or Parquet. The prompt column is found by
   its name, and rows that are left out are counted.

Every error names the file, the line and the field. This file knows no tokenizer and no model.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cliffscope.errors import DataError
from cliffscope.store import RowLog, open_log
from cliffscope.transcripts.records import JsonValue, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.tables import TableRow, parse_json, read_rows, read_text
from cliffscope.writing import write_atomically

PROMPT_COLUMNS = (
    "prompt",
    "goal",
    "Goal",
    "forbidden_prompt",
    "Behavior",
    "instruction",
    "question",
    "text",
    "turns",
    "messages",
)
_FIELDS = (
    "id",
    "prompt",
    "messages",
    "thinking",
    "answer",
    "thinking_ids",
    "answer_ids",
    "closed",
    "harmful",
    "outcome",
    "source",
)


def read_transcripts(path: str | os.PathLike[str]) -> Transcripts:
    """Reads transcripts from JSONL, one object a line.

    Fields: id, prompt or messages, thinking, answer, thinking_ids, answer_ids, closed, harmful, outcome, source. Only
    the prompt is required; a missing id becomes "<file stem>-<line>". Other keys are kept in `extra`.

    Args:
        path: a UTF-8 file.

    Returns:
        The transcripts, in the order of the file.

    Raises:
        DataError: the file cannot be read, or a line is not a transcript. The message names path, line and field.
    """
    path = Path(path)
    # Only "\n" ends a line: JSON strings may hold the other characters at which splitlines() splits.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return Transcripts(_parse_line(line, path, number) for number, line in lines if line.strip())


def write_transcripts(transcripts: Iterable[Transcript], path: str | os.PathLike[str]) -> None:
    """Writes transcripts as JSONL that `read_transcripts` reads back unchanged.

    The file is either complete or absent: it is written to a temporary file and then moved into place.

    Args:
        transcripts: the transcripts, in order.
        path: file to write; its folder must exist.

    Raises:
        DataError: a transcript cannot be written as JSON, or the folder does not exist.
        StoreError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    text = "".join([_format_line(transcript) for transcript in transcripts])
    if not path.parent.is_dir():
        raise DataError(f"Cannot write {path}: the folder {path.parent} does not exist. Create it first.")
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


@dataclass(frozen=True, eq=False, kw_only=True)
class TranscriptLog:
    """An append-only file of transcripts; `open_transcript_log` opens one."""

    transcripts: Transcripts
    """Transcripts that the file held when it was opened."""
    rows: RowLog
    """The file, to which more are appended."""

    def append(self, transcripts: Iterable[Transcript]) -> None:
        """Appends transcripts, which survive a crash once this returns. Raises StoreError if they cannot be written."""
        for transcript in transcripts:
            self.rows.append(transcript.id, {"transcript": _record(transcript)})

    def close(self) -> None:
        """Closes the file."""
        self.rows.close()


@contextmanager
def open_transcript_log(path: str | os.PathLike[str], config: Mapping[str, object]) -> Iterator[TranscriptLog]:
    """Opens an append-only file of transcripts, from which an interrupted run resumes.

    Args:
        path: the file, which is created if it does not exist.
        config: JSON-ready; must equal the one that the file was created with.

    Yields:
        The log.

    Raises:
        StoreError: as in `store.open_log`.
        DataError: a line is not a transcript.
    """
    file = Path(path)
    with open_log(file, config) as rows:
        records = enumerate(rows.rows.values(), start=2)
        transcripts = Transcripts(parse_record(row.get("transcript"), file, n) for n, row in records)
        yield TranscriptLog(transcripts=transcripts, rows=rows)


def read_prompts(
    path: str | os.PathLike[str],
    *,
    harmful: bool | None = None,
    column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Transcripts:
    """Reads prompts from a table or a text file.

    Ids are "<file stem>-<row number>", counted from 1, and do not depend on what is left out or sampled. Other columns
    are kept in `extra`, renamed to "column_<name>" if a transcript has a field of that name. In a conversation, the
    turns after the last user turn are not part of the prompt.

    Args:
        path: .csv, .tsv, .json, .jsonl, .parquet, or .txt with one prompt a line.
        harmful: label for every prompt; None reads a true/false column `harmful`, or XSTest's column `label` (`safe` or
            `unsafe`), if there is one.
        column: column of the prompt; None looks for the usual names.
        limit: number of prompts to sample, in file order; None keeps all.
        seed: seed of the sample.

    Returns:
        Prompts as transcripts without thinking and answer. `.omitted` lists empty prompts and exact duplicates.

    Raises:
        DataError: the file cannot be read, lacks the column, or holds no prompt.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected at least 1. Omit it to read every prompt.")
    rows = read_rows(path)
    column = _find_column(rows, path, column)
    prompts: list[Transcript] = []
    omitted: list[Omission] = []
    seen: dict[tuple[Message, ...], str] = {}
    for number, row in enumerate(rows, start=1):
        prompt = _prompt_of(row, column, harmful, path, number)
        reason = _reason_to_omit(prompt, seen)
        if reason is None:
            prompts.append(prompt)
            seen[prompt.messages] = prompt.id
        else:
            omitted.append(Omission(stage="read_prompts", reason=reason, id=prompt.id))
    if not prompts:
        raise DataError(
            f"{path} holds no prompt: all {len(rows)} rows are empty in column {column!r}. Choose a different column."
        )
    if limit is not None and limit < len(prompts):
        sample = sorted(random.Random(seed).sample(range(len(prompts)), limit))
        prompts = [prompts[i] for i in sample]
    return Transcripts(prompts, omitted=omitted)


def _find_column(rows: list[TableRow], path: Path, column: str | None) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if column is not None and column in columns:
        return column
    usual = [name for name in PROMPT_COLUMNS if name in columns]
    if column is None and usual:
        return usual[0]
    expected = f"the column {column!r}" if column is not None else f"any of the columns {', '.join(PROMPT_COLUMNS)}"
    raise DataError(
        f"{path} does not have {expected}. It has: {', '.join(columns)}. Rename the column with the prompts to "
        "'prompt', or pass read_prompts(column=...)."
    )


def _prompt_of(row: TableRow, column: str, harmful: bool | None, path: Path, number: int) -> Transcript:
    messages = _messages_of(row.get(column), path, number, column)
    if harmful is None:
        harmful = _harmful_of(row.get("harmful"), row.get("label"))
    source = row.get("source")
    return Transcript(
        id=f"{path.stem}-{number}",
        messages=messages,
        harmful=harmful,
        source=source if isinstance(source, str) and source else path.stem,
        extra={
            f"column_{key}" if key in _FIELDS else key: value
            for key, value in row.items()
            if key not in (column, "harmful", "source")
        },
    )


def _harmful_of(value: JsonValue, label: JsonValue) -> bool | None:
    """A boolean, also as CSV text, or XSTest's label; any other value is no label."""
    if value is None and isinstance(label, str):
        return {"unsafe": True, "safe": False}.get(label)
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _messages_of(value: JsonValue, path: Path, number: int, column: str) -> tuple[Message, ...]:
    """A prompt as text, as turns (the first one counts), or as messages up to the last user message."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        messages = _parse_messages(value, path, number, column)
        last = max(i for i, message in enumerate(messages) if message.role == "user")
        return messages[: last + 1]
    if isinstance(value, list) and value:
        value = value[0] if isinstance(value[0], str) else str(value[0])
    if value is None or value == []:
        value = ""
    if not isinstance(value, str):
        _fail(path, number, column, value, "text")
    return (Message(role="user", content=value),)


def _reason_to_omit(prompt: Transcript, seen: Mapping[tuple[Message, ...], str]) -> str | None:
    if not prompt.prompt.strip():
        return "empty prompt"
    if prompt.messages in seen:
        return f"exact duplicate of {seen[prompt.messages]}"
    return None


def _record(transcript: Transcript) -> dict[str, object]:
    """The transcript as JSON-ready fields. Raises DataError if an extra key has the name of a field."""
    clash = [key for key in transcript.extra if key in _FIELDS]
    if clash:
        raise DataError(f"The extra keys {clash} of {transcript.id!r} are names of transcript fields. Rename them.")
    record: dict[str, object] = {"id": transcript.id}
    if len(transcript.messages) == 1 and transcript.messages[0].role == "user":
        record["prompt"] = transcript.messages[0].content
    else:
        record["messages"] = [{"role": m.role, "content": m.content} for m in transcript.messages]
    return record | {name: getattr(transcript, name) for name in _FIELDS[3:]} | dict(transcript.extra)


def _format_line(transcript: Transcript) -> str:
    record = _record(transcript)
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{transcript.id!r} cannot be written as JSON: {error}. Use plain values and valid Unicode only."
        ) from error
    return line + "\n"


def _parse_line(line: str, path: Path, number: int) -> Transcript:
    return parse_record(parse_json(line, f"{path}:{number}"), path, number)


def parse_record(record: object, path: Path, number: int) -> Transcript:
    """Builds a transcript from its JSON fields.

    Args:
        record: the JSON object.
        path: its file, for ids and messages.
        number: its line or row.

    Returns:
        The transcript.

    Raises:
        DataError: the object is not a transcript. The message names path, line and field.
    """
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, got {_shown(record)}.")
    reader = _Fields(record, path, number)
    return Transcript(
        id=reader.text("id", f"{path.stem}-{number}") or "",
        messages=reader.messages(),
        thinking=reader.text("thinking", None),
        answer=reader.text("answer", None),
        thinking_ids=reader.ids("thinking_ids"),
        answer_ids=reader.ids("answer_ids"),
        closed=reader.flag("closed", True) is not False,
        harmful=reader.flag("harmful", None),
        outcome=reader.outcome(),
        source=reader.text("source", "") or "",
        extra={key: value for key, value in record.items() if key not in _FIELDS},
    )


class _Fields:
    """The fields of one line, each checked when it is read."""

    def __init__(self, record: TableRow, path: Path, number: int) -> None:
        self._record, self._path, self._number = record, path, number

    def text(self, name: str, default: str | None) -> str | None:
        value = self._record.get(name)
        if value is None:
            return default
        return value if isinstance(value, str) else self._fail(name, "text")

    def flag(self, name: str, default: bool | None) -> bool | None:
        value = self._record.get(name)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._fail(name, "true, false or null")

    def ids(self, name: str) -> tuple[int, ...] | None:
        value = self._record.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self._fail(name, "a list of token ids")
        ids = tuple(item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
        return ids if len(ids) == len(value) else self._fail(name, "a list of token ids")

    def outcome(self) -> Outcome:
        value = self.text("outcome", Outcome.UNJUDGED)
        return Outcome(value) if value in set(Outcome) else self._fail("outcome", f"one of {', '.join(Outcome)}")

    def messages(self) -> tuple[Message, ...]:
        if self._record.get("messages") is not None:
            if self._record.get("prompt") is not None:
                raise DataError(
                    f"{self._path}:{self._number}: 'prompt' and 'messages' exclude each other. Keep one of them."
                )
            return _parse_messages(self._record["messages"], self._path, self._number, "messages")
        prompt = self.text("prompt", None)
        return (Message(role="user", content=self._fail("prompt", "text") if prompt is None else prompt),)

    def _fail(self, name: str, expected: str) -> NoReturn:
        _fail(self._path, self._number, name, self._record.get(name), expected)


def _parse_messages(value: JsonValue, path: Path, number: int, field: str) -> tuple[Message, ...]:
    expected = 'a list of {"role": text, "content": text} with at least one user message'
    messages: list[Message] = []
    for item in value if isinstance(value, list) else ():
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            _fail(path, number, field, value, expected)
        messages.append(Message(role=role, content=content))
    if not any(message.role == "user" for message in messages):
        _fail(path, number, field, value, expected)
    return tuple(messages)


def _fail(path: Path, number: int, field: str, value: JsonValue, expected: str) -> NoReturn:
    raise DataError(f"{path}:{number}: field {field!r} is {_shown(value)}; expected {expected}.")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
