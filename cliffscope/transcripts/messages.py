"""Which turns does a conversation of another program hold?

1. A turn is `{"role", "content"}` (OpenAI, Hugging Face) or `{"from", "value"}` (ShareGPT).
2. Content is text, or a list of parts, whose texts are joined as chat templates join them.
3. A conversation in a cell of a CSV is JSON or what Python prints for it.

What the model could not be shown as text (images, calls of tools) is refused, never dropped. Knows no tokenizer.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import NoReturn

from cliffscope.errors import DataError
from cliffscope.transcripts.records import JsonValue, Message

CHAT_COLUMNS = ("turns", "messages", "conversations", "conversation")
"""Columns that hold conversations."""
EXPECTED = 'a list of {"role": text, "content": text} with at least one user message'

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# What begins like this was a conversation before it became text, and is never a prompt itself.
_CONVERSATION = re.compile(r"\s*(?:array\(\s*)?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


def parse_messages(value: JsonValue, place: str, field: str) -> tuple[Message, ...]:
    """Reads a conversation.

    Args:
        value: a list of turns.
        place: file and row, for the message.
        field: name of the field or column, for the message.

    Returns:
        The turns, with at least one user message.

    Raises:
        DataError: the value is no conversation, or a turn holds something other than text.
    """
    if not isinstance(value, list):
        refuse_field(place, field, value, EXPECTED)
    messages = tuple(_parse_turn(item, place, f"{field}[{i}]", value) for i, item in enumerate(value))
    if not any(message.role == "user" for message in messages):
        refuse_field(place, field, value, EXPECTED)
    return messages


def parse_cell(text: str, column: str, place: str) -> JsonValue:
    """What a text cell held before it was written as text.

    Args:
        text: the cell.
        column: its column.
        place: file and row, for the message.

    Returns:
        A list of turns, if the text is one as JSON or as Python prints it; otherwise the text itself.

    Raises:
        DataError: the text begins as a conversation does, and cannot be parsed.
    """
    begins = _CONVERSATION.match(text) is not None
    if not begins and not (column in CHAT_COLUMNS and text.lstrip().startswith("[")):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    if begins:
        refuse_field(place, column, text, "a conversation as JSON or as a Python literal, or plain text")
    return text


def refuse_field(place: str, field: str, value: JsonValue, expected: str) -> NoReturn:
    """Raises DataError that names file, row and field."""
    raise DataError(f"{place}: field {field!r} is {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """A value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_turn(item: JsonValue, place: str, field: str, whole: JsonValue) -> Message:
    if not isinstance(item, Mapping):
        refuse_field(place, field.partition("[")[0], whole, EXPECTED)
    for name in _CALLS:
        if item.get(name):
            refuse_field(place, f"{field}.{name}", item[name], "none: calls of tools cannot be shown as text")
    role, content = item.get("role"), item.get("content")
    if "role" not in item and "from" in item:
        role, content = item.get("from"), item.get("value")
        role = _ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list):
        content = "".join(_text_of(part, place, f"{field}.content") for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        refuse_field(place, field.partition("[")[0], whole, EXPECTED)
    return Message(role=role, content=content)


def _text_of(part: JsonValue, place: str, field: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        refuse_field(place, field, part, 'parts of text only, such as {"type": "text", "text": text}')
    return text
