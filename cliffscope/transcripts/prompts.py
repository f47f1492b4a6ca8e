"""Which prompts does a table of another data set hold?

1. The prompt column is found by its name. Columns that hold another part of the prompt (Alpaca's `input`, HarmBench's
   `ContextString`) are joined to it; WildJailbreak's `vanilla` stands in where `adversarial` is blank.
2. A column of conversations is read up to the last user turn, of `turns` the first one.
3. Labels of harm are read by what they say; a label that cannot be understood is refused.
4. Empty prompts, exact duplicates and rows that cannot be read are left out, each with its reason.

Every error names file, row and field. Knows no tokenizer.
"""

import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from cliffscope.errors import DataError
from cliffscope.transcripts.control_tokens import escaped
from cliffscope.transcripts.datasets import FIELDS, check_broken
from cliffscope.transcripts.messages import CHAT_COLUMNS, parse_cell, parse_messages, refuse_field
from cliffscope.transcripts.records import JsonValue, Message, Omission, Transcript, Transcripts, normalise_prompt
from cliffscope.transcripts.tables import BrokenRow, TableRow, read_rows

STAGE = "read_prompts"
PROMPT_COLUMNS = (
    "prompt",
    "goal",
    "Goal",
    "forbidden_prompt",
    "adversarial",
    "vanilla",
    "Behavior",
    "instruction",
    "question",
    "text",
    *CHAT_COLUMNS,
)
"""Names of prompt columns; of several in one file, the first here is taken."""
CONTEXTS: Mapping[str, Mapping[str, str]] = {
    "Behavior": {"ContextString": "{context}\n\n---\n\n{prompt}"},
    "instruction": {"input": "{prompt}\n\n{context}", "context": "{prompt}\n\n{context}"},
    "question": {"context": "{context}\n\n{prompt}"},
}
"""By prompt column, the columns that hold another part of the prompt, and how the data set joins them."""
STAND_INS = {"adversarial": "vanilla"}
"""By prompt column, the one that is read where it is blank."""
LABEL_COLUMNS = ("label", "prompt_harm_label", "data_type")
"""Columns that may say in words whether a prompt is harmful: XSTest's, WildGuardMix's, WildJailbreak's."""

_WORDS = {"harmful": True, "unsafe": True, "harmless": False, "safe": False, "benign": False, "unharmful": False}
_FLAGS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}
_NO_LABEL = ("", "none", "null", "nan")
_log = logging.getLogger(__name__)


def read_prompts(
    path: str | os.PathLike[str],
    *,
    harmful: bool | None = None,
    column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    escape_control_tokens: bool = False,
) -> Transcripts:
    """Reads prompts from a table or a text file.

    Ids are "<file stem>-<row number>", counted from 1, and do not depend on what is left out or sampled. Other columns
    are kept in `extra`, renamed to "column_<name>" if a transcript has a field of that name. In a conversation, the
    turns after the last user turn are not part of the prompt.

    Args:
        path: .csv, .tsv, .json, .jsonl, .parquet, or .txt with one prompt a line. The delimiter of a .csv is found in
            its header.
        harmful: label for every prompt; None reads a column `harmful` (true or false, 1 or 0, or a word), or a column
            of `LABEL_COLUMNS` that says `safe`, `unsafe`, `benign`, `harmless` or `harmful` in any case.
        column: column of the prompt; None looks for the names of `PROMPT_COLUMNS`. Columns of `CONTEXTS` are joined to
            it in both cases.
        limit: number of prompts to sample, in file order; None keeps all.
        seed: seed of the sample.
        escape_control_tokens: words such as `<|im_end|>` in prompts stay text wherever they are tokenized; otherwise
            they become control tokens, as in transformers.

    Returns:
        Prompts as transcripts without thinking and answer. `.omitted` lists empty prompts, exact duplicates and rows
        that cannot be read.

    Raises:
        DataError: the file cannot be read, lacks the column, holds no prompt, holds one prompt as harmful and as
            harmless, or at least half of its rows cannot be read.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected at least 1. Omit it to read every prompt.")
    rows = read_rows(path)
    table = [row for row in rows if not isinstance(row, BrokenRow)]
    if not table:
        check_broken(
            [_parse_row(row, "", (), harmful, path=path, number=i) for i, row in enumerate(rows, start=1)], path
        )
    column = _find_column(table, path, column)
    labels = _label_columns(table, path) if harmful is None else ()
    parsed = [
        _parse_row(row, column, labels, harmful, path=path, number=number) for number, row in enumerate(rows, start=1)
    ]
    check_broken(parsed, path)
    prompts, omitted = _without_blank_or_repeated(parsed)
    if not prompts:
        raise DataError(
            f"{path} holds no prompt: all {len(rows)} rows are empty in column {column!r}. Choose a different column."
        )
    check_labels(prompts, str(path))
    sample = sample_prompts(prompts, limit, seed)
    return Transcripts(map(escaped, sample) if escape_control_tokens else sample, omitted=omitted)


def sample_prompts(prompts: Sequence[Transcript], limit: int | None, seed: int) -> list[Transcript]:
    """At most `limit` of the prompts, drawn with the seed, in their order; all of them without a limit."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def check_labels(prompts: Sequence[Transcript], where: str) -> None:
    """Raises DataError if a prompt is labelled as harmful and as harmless.

    Prompts are compared as splits compare them, without case, width and spacing.

    Args:
        prompts: of one file or of several.
        where: the file or files, for the message.
    """
    sides: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for prompt in prompts:
        if prompt.harmful is not None:
            sides[prompt.harmful].setdefault(_words_of(prompt), prompt.id)
    both = [words for words in sides[True] if words in sides[False]]
    if both:
        harmful, harmless = sides[True][both[0]], sides[False][both[0]]
        raise DataError(
            f"{len(both)} of the prompts of {where} occur both as harmful and as harmless, the first as "
            f"{harmful!r} and {harmless!r}. Remove one of the two."
        )


def _words_of(prompt: Transcript) -> str:
    return "\0".join(f"{message.role}\0{normalise_prompt(message.content)}" for message in prompt.messages)


def _find_column(table: Sequence[TableRow], path: Path, column: str | None) -> str:
    columns = list(dict.fromkeys(name for row in table for name in row))
    if column is not None and column in columns:
        return column
    usual = [name for name in PROMPT_COLUMNS if name in columns]
    if column is None and usual:
        _tell_choice(usual, columns, path)
        return usual[0]
    expected = f"the column {column!r}" if column is not None else f"any of the columns {', '.join(PROMPT_COLUMNS)}"
    raise DataError(
        f"{path} does not have {expected}. It has: {', '.join(columns)}. Rename the column with the prompts to "
        "'prompt', or pass read_prompts(column=...) or --column."
    )


def _tell_choice(usual: Sequence[str], columns: Sequence[str], path: Path) -> None:
    """Says which column is read where that is not plain."""
    joined = [name for name in CONTEXTS.get(usual[0], {}) if name in columns]
    others = [name for name in usual[1:] if name != STAND_INS.get(usual[0])]
    if joined:
        _log.info("%s: the prompts are in column %r, joined with %s.", path, usual[0], ", ".join(map(repr, joined)))
    if others:
        _log.info(
            "%s: the prompts are read from column %r; %s would do as well. Pass column=... (--column) to choose.",
            path,
            usual[0],
            ", ".join(map(repr, others)),
        )


def _label_columns(table: Sequence[TableRow], path: Path) -> tuple[str, ...]:
    """Columns with words for harm; others of these names are about something else, which is said."""
    labels: list[str] = []
    for name in LABEL_COLUMNS:
        values = [row[name] for row in table if not _is_blank(row.get(name))]
        if any(_harm_word(value) is not None for value in values):
            labels.append(name)
        elif values:
            _log.warning(
                "%s: column %r does not say whether prompts are harmful (it holds %r), so it is not read as a label. "
                "Pass harmful=..., or add a column `harmful`.",
                path,
                name,
                values[0],
            )
    return tuple(labels)


def _parse_row(
    row: TableRow | BrokenRow, column: str, labels: Sequence[str], harmful: bool | None, *, path: Path, number: int
) -> Transcript | Omission:
    row_id, place = f"{path.stem}-{number}", f"{path}:{number}"
    if isinstance(row, BrokenRow):
        return Omission(stage=STAGE, reason=row.reason, id=row_id)
    try:
        messages = _messages_of(row, column, place)
        label = _harm_of(row, labels, place) if harmful is None else harmful
    except DataError as error:
        return Omission(stage=STAGE, reason=str(error), id=row_id)
    source = row.get("source")
    return Transcript(
        id=row_id,
        messages=messages,
        harmful=label,
        source=source if isinstance(source, str) and source else path.stem,
        extra={
            f"column_{key}" if key in FIELDS else key: _plain(value)
            for key, value in row.items()
            if key not in (column, "harmful", "source")
        },
    )


def _plain(value: JsonValue) -> JsonValue:
    """A cell that JSON can hold: bytes that are no text are shown with escapes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _messages_of(row: TableRow, column: str, place: str) -> tuple[Message, ...]:
    """A prompt as text with its context, as turns (the first one counts), or as messages up to the last user's."""
    value = row.get(column)
    if _is_blank(value) and column in STAND_INS:
        value = row.get(STAND_INS[column])
    if isinstance(value, str):
        value = parse_cell(value, column, place)
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        messages = parse_messages(value, place, column)
        last = max(i for i, message in enumerate(messages) if message.role == "user")
        return messages[: last + 1]
    if isinstance(value, list):
        value = value[0] if value else ""
    if value is None:
        value = ""
    if not isinstance(value, str):
        refuse_field(place, column, value, "text")
    return (Message(role="user", content=_with_context(value, row, column, place)),)


def _with_context(prompt: str, row: TableRow, column: str, place: str) -> str:
    for name, form in CONTEXTS.get(column, {}).items():
        context = row.get(name)
        if _is_blank(context) or not prompt.strip():
            continue
        if not isinstance(context, str):
            refuse_field(place, name, context, "text, since it is part of the prompt")
        prompt = form.format(prompt=prompt, context=context)
    return prompt


def _is_blank(value: JsonValue) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _harm_of(row: TableRow, labels: Sequence[str], place: str) -> bool | None:
    """The row's label of harm; None if it has none. Raises DataError if it has one that cannot be understood."""
    value = row.get("harmful")
    text = str(value).strip().lower()
    if text not in _NO_LABEL:
        flag = {**_FLAGS, **_WORDS}.get(text) if isinstance(value, bool | int | float | str) else None
        return flag if flag is not None else refuse_field(place, "harmful", value, "true or false")
    for name in labels:
        value = row.get(name)
        if not _is_blank(value):
            word = _harm_word(value)
            return word if word is not None else refuse_field(place, name, value, f"one of {', '.join(_WORDS)}")
    return None


def _harm_word(value: JsonValue) -> bool | None:
    """What a label says; WildJailbreak's say it behind an underscore."""
    return _WORDS.get(value.strip().lower().rpartition("_")[2]) if isinstance(value, str) else None


def _without_blank_or_repeated(parsed: Sequence[Transcript | Omission]) -> tuple[list[Transcript], list[Omission]]:
    prompts: list[Transcript] = []
    omitted: list[Omission] = []
    seen: dict[tuple[tuple[Message, ...], bool | None], str] = {}
    for row in parsed:
        if isinstance(row, Omission):
            omitted.append(row)
            continue
        # The label counts, so that a prompt with two labels is not taken for one that is merely repeated.
        first = seen.setdefault((row.messages, row.harmful), row.id)
        if not row.prompt.strip():
            omitted.append(Omission(stage=STAGE, reason="empty prompt", id=row.id))
        elif first != row.id:
            omitted.append(Omission(stage=STAGE, reason=f"exact duplicate of {first}", id=row.id))
        else:
            prompts.append(row)
    return prompts, omitted
