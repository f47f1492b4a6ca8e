"""Which transcripts does a file hold?

CliffScope's JSONL holds one transcript a line, with an exact round trip. A line that is not a transcript is left out
with the reason, as long as such lines are few. Every error names the file, the line and the field. This file knows no
tokenizer and no model; prompts.py reads the tables of others.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cliffscope.errors import DataError
from cliffscope.store import RowLog, open_log
from cliffscope.transcripts.control_tokens import escaped
from cliffscope.transcripts.messages import parse_messages, refuse_field, shown
from cliffscope.transcripts.records import JsonValue, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.replies import part_turn
from cliffscope.transcripts.tables import BrokenRow, TableRow, read_json_lines
from cliffscope.writing import write_atomically

STAGE = "read_transcripts"

FIELDS = (
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
"""Fields of a transcript in a file; other keys are kept in `extra`."""
THINKING_FIELDS = ("reasoning_content", "reasoning")
"""Fields in which servers and other programs put the thinking apart from the answer."""


def read_transcripts(
    path: str | os.PathLike[str], *, strict: bool = False, escape_control_tokens: bool = False
) -> Transcripts:
    """Reads transcripts from JSONL, one object a line.

    Fields: id, prompt or messages, thinking, answer, thinking_ids, answer_ids, closed, harmful, outcome, source. Only
    the prompt is required; a missing id becomes "<file stem>-<line>". Other keys are kept in `extra`. Thinking may be
    in `reasoning_content` or `reasoning` as well, beside an answer without generated ids, or in tags within the answer,
    from which it is split.

    Args:
        path: a UTF-8 file.
        strict: raise at the first line that is not a transcript instead of leaving it out.
        escape_control_tokens: words such as `<|im_end|>` in messages stay text wherever the transcripts are tokenized;
            otherwise they become control tokens, as in transformers.

    Returns:
        The transcripts, in the order of the file. `.omitted` lists the lines that are not transcripts.

    Raises:
        DataError: the file cannot be read, or at least half of its lines are not transcripts. The message names path,
            line and field of the first.
    """
    path = Path(path)
    rows = [_parse_line(value, path, number) for number, value in read_json_lines(path)]
    check_broken(rows, path, strict=strict)
    readable = (row for row in rows if isinstance(row, Transcript))
    return Transcripts(
        map(escaped, readable) if escape_control_tokens else readable,
        omitted=(row for row in rows if isinstance(row, Omission)),
    )


def check_broken(rows: Sequence[Transcript | Omission], path: Path, *, strict: bool = False) -> None:
    """Raises DataError if at least half of the rows cannot be read, since the fault is then the file's.

    Args:
        rows: each a transcript, or the reason why it is not one.
        path: their file.
        strict: raise for a single one.
    """
    broken = [row for row in rows if isinstance(row, Omission)]
    if broken and (strict or 2 * len(broken) >= len(rows)):
        others = f" {len(broken)} of {len(rows)} rows of {path} cannot be read." if len(rows) > 1 else ""
        raise DataError(f"{broken[0].reason}{others}")


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


def _record(transcript: Transcript) -> dict[str, object]:
    """The transcript as JSON-ready fields. Raises DataError if an extra key has the name of a field."""
    clash = [key for key in transcript.extra if key in FIELDS]
    if clash:
        raise DataError(f"The extra keys {clash} of {transcript.id!r} are names of transcript fields. Rename them.")
    record: dict[str, object] = {"id": transcript.id}
    if len(transcript.messages) == 1 and transcript.messages[0].role == "user":
        record["prompt"] = transcript.messages[0].content
    else:
        record["messages"] = [{"role": m.role, "content": m.content} for m in transcript.messages]
    return record | {name: getattr(transcript, name) for name in FIELDS[3:]} | dict(transcript.extra)


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


def _parse_line(value: JsonValue | BrokenRow, path: Path, number: int) -> Transcript | Omission:
    try:
        if not isinstance(value, BrokenRow):
            return _apart(parse_record(value, path, number))
        reason = value.reason
    except DataError as error:
        reason = str(error)
    return Omission(stage=STAGE, reason=reason, id=f"{path.stem}-{number}")


def _apart(transcript: Transcript) -> Transcript:
    """The transcript with thinking that its file has elsewhere than in `thinking`; generated ids stay as they are."""
    if transcript.answer is None or transcript.answer_ids is not None:
        return transcript
    values = (transcript.extra.get(name) for name in THINKING_FIELDS)
    text = next((value for value in values if isinstance(value, str) and value.strip()), None)
    if text is not None and transcript.thinking is None:
        # Some servers fill both fields with the same text.
        rest = {k: v for k, v in transcript.extra.items() if k not in THINKING_FIELDS or v != text}
        transcript = transcript.replace(thinking=text.strip("\n"), extra=rest)
    return part_turn(transcript)


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
        raise DataError(f"{path}:{number}: expected a JSON object, got {shown(record)}.")
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
        extra={key: value for key, value in record.items() if key not in FIELDS},
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
            return parse_messages(self._record["messages"], f"{self._path}:{self._number}", "messages")
        prompt = self.text("prompt", None)
        return (Message(role="user", content=self._fail("prompt", "text") if prompt is None else prompt),)

    def _fail(self, name: str, expected: str) -> NoReturn:
        refuse_field(f"{self._path}:{self._number}", name, self._record.get(name), expected)
