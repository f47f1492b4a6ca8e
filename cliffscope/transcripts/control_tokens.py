"""Which words of a prompt would the model read as control tokens, and how do they stay text?

A tokenizer turns `<|im_end|>` in a user's message into the token that ends the turn, as it does for the chat template's
own. Such a prompt is another conversation than the one it seems to be. By default ids are those of transformers, and
what was turned is counted. With `escape_control_tokens`, each such word is encoded in two pieces that the vocabulary
spells as text; the ids decode to the same text.

Messages of the assistant are left alone: their tags are the chat template's business.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from cliffscope.errors import DataError
from cliffscope.transcripts.records import Message, Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ESCAPE = "escape_control_tokens"
"""Key in a transcript's `extra`: whether control tokens in its messages stay text."""
_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)  # added tokens may also be words or runs of spaces, which control nothing
_PRIVATE = [chr(code) for code in range(0xE000, 0xE020)]


def find_control_tokens(transcript: Transcript, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Words of the messages that the tokenizer reads as control tokens, in order, but for those of the assistant."""
    pattern = _pattern(_control_tokens(tokenizer))
    return [match[0] for m in transcript.messages if m.role != "assistant" for match in pattern.finditer(m.content)]


def is_escaped(transcript: Transcript) -> bool:
    """Whether control tokens in its messages are to stay text."""
    return transcript.extra.get(ESCAPE) is True


def escaped(transcript: Transcript) -> Transcript:
    """The transcript, marked so that control tokens in its messages stay text wherever it is tokenized."""
    return transcript.replace(extra={**transcript.extra, ESCAPE: True})


class Escaping:
    """Encodes a rendered conversation whose control tokens are to stay text.

    1. Each control token of a message is replaced by a mark before the chat template renders it.
    2. The rendered text is cut at the marks, the parts are encoded, and each control token is encoded as text between.

    Args:
        messages: the conversation.
        tokenizer: the model's.
    """

    def __init__(self, messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Replaces the control tokens."""
        self._tokenizer = tokenizer
        self._pattern = _pattern(_control_tokens(tokenizer))
        self._words: list[str] = []
        text = "".join(message.content for message in messages)
        self._mark = next((mark for mark in _PRIVATE if mark not in text), "")
        if not self._mark:
            raise DataError("The messages use every private character that could mark control tokens. Remove one.")
        self.messages = tuple(
            m if m.role == "assistant" else Message(role=m.role, content=self._pattern.sub(self._replace, m.content))
            for m in messages
        )

    def encode(self, rendered: str) -> list[int]:
        """Ids of what the chat template made of `messages`.

        Raises:
            DataError: the chat template changed a mark, or the vocabulary cannot spell a control token as text.
        """
        parts = re.split(f"{self._mark}(\\d+){self._mark}", rendered)
        whole = {str(i) for i in range(len(self._words))} <= set(parts[1::2])
        if not whole or any(self._mark in part for part in parts[::2]):
            raise DataError(
                f"The chat template rewrites the text around {self._words[0]!r}, so that it cannot be kept as text. "
                "Pass escape_control_tokens=False, or drop this transcript."
            )
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += self._encode_word(self._words[int(part)]) if i % 2 else self._plain(part)
        return ids

    def _replace(self, match: re.Match[str]) -> str:
        self._words.append(match[0])
        return f"{self._mark}{len(self._words) - 1}{self._mark}"

    def _encode_word(self, word: str) -> list[int]:
        ids = [i for piece in self._pieces(word) for i in self._plain(piece)]
        # A vocabulary of words has one token for all that it cannot spell.
        control = {*_control_tokens(self._tokenizer)} - {self._tokenizer.unk_token}
        if control.intersection(self._tokenizer.convert_ids_to_tokens(ids)):
            raise DataError(
                f"The vocabulary cannot spell {word!r} as text. Pass escape_control_tokens=False, or drop this "
                "transcript."
            )
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """The text in pieces of which none is a control token."""
        match = self._pattern.search(text)
        if match is None:
            yield text
            return
        yield text[: match.start()]
        yield match[0][0]
        yield from self._pieces(text[match.start() + 1 :])

    def _plain(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)] if text else []


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Texts that the tokenizer reads as one token wherever they occur, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token.content) for token in added if token.special or _TAG.fullmatch(str(token.content))}
    return tuple(sorted((text for text in texts if len(text) > 1), key=lambda text: (-len(text), text)))


@lru_cache(maxsize=16)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
