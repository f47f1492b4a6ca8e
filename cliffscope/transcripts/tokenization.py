"""What are the tokens of a model's transcripts, when each is tokenized once?

1. A transcript is known by what its tokens depend on: its id, messages, thinking and generated ids, and the chat
   template of the tokenizer. Labels do not count, so that a judged transcript is the same as before it was judged.
2. Tokens up to the answer are stored when they are first asked for. An answer is appended to them.
3. Beyond `MOST_TOKENS` the transcripts that have not been asked for the longest are dropped, and tokenized again.

Knows no model.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, SpanError, TemplateError
from cliffscope.transcripts.control_tokens import is_escaped
from cliffscope.transcripts.records import Omission, Transcript
from cliffscope.transcripts.templates import Template
from cliffscope.transcripts.transcript import (
    CLOSING_IDS,
    TokenizedTranscript,
    append_answer,
    check_length,
    make_each,
    tell_control_tokens,
    tokenize_before_answer,
)

_Failure = DataError | SpanError | TemplateError
MOST_TOKENS = 1 << 24
"""Tokens that are stored at most, in 8 bytes each: 128 MiB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenization:
    """Tokens of transcripts under one tokenizer and template, each tokenized once."""

    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer."""
    template: Template
    """How the model opens and closes thinking."""
    max_length: int
    """Maximum number of tokens of a transcript. Nothing is truncated."""
    most_tokens: int = MOST_TOKENS
    """Tokens that are stored at most."""
    _stored: OrderedDict[Hashable, TokenizedTranscript | _Failure] = field(default_factory=OrderedDict, repr=False)
    _size: list[int] = field(default_factory=lambda: [0], repr=False)

    def tokens(self, transcript: Transcript, *, with_answer: bool = False, limited: bool = True) -> TokenizedTranscript:
        """The tokens of one transcript; see `tokenize`.

        Args:
            transcript: with thinking, if the template has it.
            with_answer: append the answer.
            limited: refuse a transcript that is longer than `max_length`.

        Returns:
            Ids and bounds. All callers share them: do not write into them.

        Raises:
            TemplateError: the chat template fails.
            SpanError: a required span is missing.
            DataError: the text contains the closing tag, or is longer than `max_length`.
        """
        tokens = self._before_answer(transcript)
        if with_answer:
            tokens = append_answer(tokens, transcript, self.tokenizer, self.template)
        if limited:
            check_length(tokens, self.max_length)
        return tokens

    def all_tokens(
        self, transcripts: Iterable[Transcript], *, with_answer: bool = False
    ) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
        """The tokens of many transcripts, and which ones could not be tokenized; see `tokenize_all`."""
        tokenized, omitted = make_each(transcripts, lambda t: self.tokens(t, with_answer=with_answer), stage="tokenize")
        tell_control_tokens(tokenized)
        return tokenized, omitted

    def _before_answer(self, transcript: Transcript) -> TokenizedTranscript:
        key = self._key(transcript)
        if key in self._stored:
            self._stored.move_to_end(key)
        else:
            self._store(key, self._tokenized(transcript))
        outcome = self._stored[key]
        if isinstance(outcome, TokenizedTranscript):
            return outcome
        # A new exception, since a raised one gathers the frames of all who raise it.
        raise type(outcome)(*outcome.args)

    def _key(self, transcript: Transcript) -> Hashable:
        # The tokenizer's chat template is the one part of a tokenizer that users replace on a loaded model.
        return (
            *(self.tokenizer.chat_template, transcript.id, transcript.messages),
            *(transcript.thinking, transcript.thinking_ids, repr(transcript.extra.get(CLOSING_IDS))),
            is_escaped(transcript),
        )

    def _tokenized(self, transcript: Transcript) -> TokenizedTranscript | _Failure:
        try:
            return tokenize_before_answer(
                transcript, self.tokenizer, self.template, escape_control_tokens=is_escaped(transcript)
            )
        except (DataError, SpanError, TemplateError) as error:
            return error.with_traceback(None)

    def _store(self, key: Hashable, outcome: TokenizedTranscript | _Failure) -> None:
        self._stored[key] = outcome
        self._size[0] += _length(outcome)
        while self._size[0] > self.most_tokens and len(self._stored) > 1:
            _, dropped = self._stored.popitem(last=False)
            self._size[0] -= _length(dropped)


def _length(outcome: TokenizedTranscript | _Failure) -> int:
    # What cannot be tokenized counts too, so that many of them stay bounded.
    return outcome.n_pos if isinstance(outcome, TokenizedTranscript) else 1
