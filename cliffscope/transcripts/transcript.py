"""Which tokens does the model see, and to which span does each belong?

1. The prompt's ids come from the chat template, with exactly one BOS and with thinking opened exactly once. Control
   tokens in its messages become real ones, as in transformers, and are counted, unless they are to stay text.
2. The thinking's ids are those that were generated, or the text encoded on its own.
3. The closing's ids are encoded once and spliced, so that no boundary falls inside a token; where the model closed its
   thinking in another way, they are those that it saw.
4. The answer's ids follow, where they are asked for.

For a template without thinking, the thinking span is empty and the closing is the tail of the prompt after the last
user content. A complete assistant turn is never rendered, since most chat templates delete its thinking.

The tags are in families.py; transcripts and their collection are in records.py.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import TypeVar

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, SpanError, TemplateError
from cliffscope.transcripts.control_tokens import Escaping, find_control_tokens, is_escaped
from cliffscope.transcripts.records import JsonValue, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import Template, closing_ids, encode, generation_prompt, opening_ids

__all__ = [
    "CLOSING_IDS",
    "ClosingRule",
    "JsonValue",
    "Message",
    "Omission",
    "Outcome",
    "Span",
    "TokenizedTranscript",
    "Transcript",
    "Transcripts",
    "spliced_thinking",
    "tokenize",
    "tokenize_all",
]

Made = TypeVar("Made")
_log = logging.getLogger(__name__)
CLOSING_IDS = "closing_ids"
"""Key in a transcript's `extra`: ids of its closing as the model saw them, where the template's would be others, as
behind thinking that was closed without a newline."""
# Two contents that share no ending, so that what two prompts have in common after them is the template's.
_SENTINELS = ("zero 0", "eight 8")


class Span(StrEnum):
    """A run of token positions of one kind."""

    PROMPT = "prompt"
    THINKING = "thinking"
    CLOSING = "closing"
    ANSWER = "answer"


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenizedTranscript:
    """Token ids of one transcript, and the span of each."""

    id: str
    """Id of the transcript."""
    token_ids: Int64[np.ndarray, " pos"]
    """[pos] Ids that the model sees."""
    bounds: tuple[int, int, int, int]
    """Positions at which prompt, thinking, closing and answer end; the last is the number of positions."""
    control_tokens: int = 0
    """Number of words in the messages that became control tokens."""

    def __post_init__(self) -> None:
        """Checks that the spans cover every token once."""
        if list(self.bounds) != sorted(self.bounds) or self.bounds[0] < 0 or self.bounds[-1] != len(self.token_ids):
            raise SpanError(
                f"bounds={self.bounds} of {self.id!r}: expected positions that do not decrease and end at "
                f"{len(self.token_ids)}, the number of tokens."
            )

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return len(self.token_ids)

    @property
    def final(self) -> int:
        """The last closing position, from which the answer's first token is predicted."""
        closing = self.span(Span.CLOSING)
        if closing.start == closing.stop:
            raise SpanError(
                f"Span 'closing' of {self.id!r} is empty in {self.n_pos} tokens. Pass the template that the model was "
                "trained with, or drop this transcript."
            )
        return int(closing.stop) - 1

    def span(self, span: Span) -> slice:
        """Positions of one span, as a slice that may be empty."""
        i = list(Span).index(Span(span))
        return slice(self.bounds[i - 1] if i else 0, self.bounds[i])

    def labels(self) -> list[Span]:
        """The span of each position."""
        return [span for span in Span for _ in range(self.span(span).stop - self.span(span).start)]

    def __repr__(self) -> str:
        """One line: the number of positions in each span."""
        counts = ", ".join(f"{s} {self.span(s).stop - self.span(s).start}" for s in Span)
        return f"TokenizedTranscript({self.id!r}: {counts})"


@dataclass(frozen=True, eq=False, kw_only=True)
class ClosingRule:
    """How thinking is closed after any of its tokens, which may carry the newline with which the closing begins."""

    tokenizer: PreTrainedTokenizerBase
    """Says whether a token ends in a newline."""
    whole: tuple[int, ...]
    """Ids of the closing."""
    bare: tuple[int, ...]
    """Ids of the closing without its first newline; the same where it begins with none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: Template) -> "ClosingRule":
        """The rule of a template that thinks."""
        whole, bare = (closing_ids(tokenizer, template, after_newline=after) for after in (False, True))
        return cls(tokenizer=tokenizer, whole=tuple(whole), bare=tuple(bare))

    def after(self, thinking: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How thinking of these token ids is closed.

        Args:
            thinking: ids up to the last token of the thinking.

        Returns:
            How many of them stay thinking, and the ids of the closing that follow these.
        """
        newline = self.whole[: len(self.whole) - len(self.bare)]
        if newline and tuple(thinking[-len(newline) :]) == newline and self.whole[len(newline) :] == self.bare:
            # The model wrote the closing's own newline as a token of its own: the same ids, counted as closing.
            return len(thinking) - len(newline), self.whole
        after_newline = self.whole != self.bare and _decode(tuple(thinking[-1:]), self.tokenizer).endswith("\n")
        return len(thinking), self.bare if after_newline else self.whole


def tokenize(
    transcript: Transcript,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    with_answer: bool = False,
    max_length: int | None = None,
    escape_control_tokens: bool | None = None,
) -> TokenizedTranscript:
    """Turns a transcript into token ids whose spans cover every token once.

    When text is encoded, newlines at the edges of thinking and answer that the template writes as well are left to the
    template. Generated ids are used unchanged if they decode to the text.

    Args:
        transcript: with thinking, if the template has it; empty thinking gives an empty span.
        tokenizer: the model's tokenizer, with its chat template.
        template: from `resolve_template`.
        with_answer: append the answer. Off by default, since every measurement ends at the final position.
        max_length: maximum number of tokens; None sets no limit. Nothing is ever truncated.
        escape_control_tokens: keep control tokens in messages other than the assistant's as text; None does as the
            transcript's `extra` says, and otherwise as transformers does, which makes them real.

    Returns:
        Ids and bounds.

    Raises:
        TemplateError: the chat template refuses or drops a message, or BOS would stand twice. The message names the
            transcript.
        SpanError: a required span is missing.
        DataError: the text contains the closing tag, or is longer than `max_length`.
    """
    escape = is_escaped(transcript) if escape_control_tokens is None else escape_control_tokens
    tokens = tokenize_before_answer(transcript, tokenizer, template, escape_control_tokens=escape)
    if with_answer:
        tokens = append_answer(tokens, transcript, tokenizer, template)
    check_length(tokens, max_length)
    return tokens


def tokenize_before_answer(
    transcript: Transcript,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    escape_control_tokens: bool,
) -> TokenizedTranscript:
    """Prompt, thinking and closing of a transcript of any length; arguments and errors as of `tokenize`."""
    escape = escape_control_tokens
    try:
        prompt, tail = _prompt_ids(transcript, tokenizer, template, escape=escape)
    except TemplateError as error:
        raise TemplateError(f"{transcript.id!r}: {error}") from error
    if template.thinks:
        thinking, closing = _thinking_and_closing(transcript, tokenizer, template)
    else:
        _check_no_thinking(transcript, template)
        thinking, closing = [], prompt[len(prompt) - tail :]
        prompt = prompt[: len(prompt) - tail]
    stops = np.cumsum([len(prompt), len(thinking), len(closing)]).tolist()
    return TokenizedTranscript(
        id=transcript.id,
        token_ids=np.asarray([*prompt, *thinking, *closing], dtype=np.int64),
        bounds=(stops[0], stops[1], stops[2], stops[2]),
        control_tokens=0 if escape else len(find_control_tokens(transcript, tokenizer)),
    )


def append_answer(
    tokens: TokenizedTranscript, transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template
) -> TokenizedTranscript:
    """The tokens of a transcript with its answer behind them; raises SpanError if there is none."""
    answer = np.asarray(_answer_ids(transcript, tokenizer, template), dtype=np.int64)
    return TokenizedTranscript(
        id=tokens.id,
        token_ids=np.concatenate([tokens.token_ids, answer]),
        bounds=(*tokens.bounds[:3], tokens.n_pos + len(answer)),
        control_tokens=tokens.control_tokens,
    )


def check_length(tokens: TokenizedTranscript, max_length: int | None) -> None:
    """Raises DataError for a transcript of more than `max_length` tokens; None sets no limit."""
    if max_length is None or tokens.n_pos <= max_length:
        return
    n_thinking = tokens.bounds[1] - tokens.bounds[0]
    if tokens.bounds[0] > max_length:
        raise DataError(
            f"The prompt of {tokens.id!r} has {tokens.bounds[0]} tokens, more than max_length={max_length}. Nothing is "
            "truncated: drop the transcript, or raise max_length."
        )
    raise DataError(
        f"{tokens.id!r} has {tokens.n_pos} tokens ({n_thinking} of thinking), more than max_length={max_length}. "
        "Nothing is truncated: drop the transcript, or raise max_length."
    )


def tokenize_all(
    transcripts: Iterable[Transcript],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    with_answer: bool = False,
    max_length: int | None = None,
) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    """Tokenizes many transcripts, and reports which ones could not be tokenized.

    Args:
        transcripts: in any order.
        tokenizer: the model's tokenizer.
        template: from `resolve_template`.
        with_answer: see `tokenize`.
        max_length: see `tokenize`.

    Returns:
        The tokenized transcripts in order, and one omission for each that is missing.

    Raises:
        TemplateError: the chat template fails for every transcript, which is a fault of the set-up.
    """
    tokenized, omitted = make_each(
        transcripts,
        lambda t: tokenize(t, tokenizer, template, with_answer=with_answer, max_length=max_length),
        stage="tokenize",
    )
    tell_control_tokens(tokenized)
    return tokenized, omitted


def make_each(
    transcripts: Iterable[Transcript], make: Callable[[Transcript], Made], *, stage: str
) -> tuple[list[Made], tuple[Omission, ...]]:
    """Makes something of each transcript, so that one that cannot be tokenized does not end the work on the others.

    Args:
        transcripts: in any order.
        make: raises DataError, SpanError or TemplateError for a transcript of which nothing can be made.
        stage: step, for the omissions.

    Returns:
        What was made, in order, and one omission for each transcript of which nothing was.

    Raises:
        TemplateError: the chat template fails for every transcript, which is a fault of the set-up.
    """
    results: list[Made] = []
    omitted: list[Omission] = []
    of_template: list[TemplateError] = []
    for transcript in transcripts:
        try:
            results.append(make(transcript))
        except (DataError, SpanError, TemplateError) as error:
            omitted.append(Omission(stage=stage, reason=str(error), id=transcript.id))
            if isinstance(error, TemplateError):
                of_template.append(error)
    if of_template and len(of_template) == len(omitted) and not results:
        raise of_template[0]
    return results, tuple(omitted)


def tell_control_tokens(tokenized: Sequence[TokenizedTranscript]) -> None:
    """Warns if words of messages became control tokens."""
    changed = [row for row in tokenized if row.control_tokens]
    if changed:
        _log.warning(
            "%d of %d transcripts hold control tokens of this tokenizer in their messages, such as %r (%d), which the "
            "model reads as real ones. Read them with escape_control_tokens=True to keep them text.",
            len(changed),
            len(tokenized),
            changed[0].id,
            changed[0].control_tokens,
        )


def _prompt_ids(
    transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template, *, escape: bool
) -> tuple[list[int], int]:
    """Ids up to the start of thinking, and how many of them follow the user's content."""
    if not any(message.role == "user" for message in transcript.messages):
        raise DataError(f"Transcript {transcript.id!r} has no user message, so there is no prompt. Add one.")
    escaping = Escaping(transcript.messages, tokenizer) if escape else None
    rendered = _render(transcript.messages if escaping is None else escaping.messages, tokenizer, template)
    ids = encode(tokenizer, rendered) if escaping is None else escaping.encode(rendered)
    tail = 0 if template.thinks else _tail_length(transcript, tokenizer, template, ids)
    return [*_with_one_bos(ids, tokenizer), *opening_ids(tokenizer, template, rendered)], tail


def _render(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    return generation_prompt(tokenizer, [{"role": m.role, "content": m.content} for m in messages], template)


def _with_one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if ids[:2] == [bos, bos]:
        raise TemplateError(
            f"The rendered prompt starts with BOS ({tokenizer.bos_token!r}) twice, but a model expects it once. Remove "
            "it from the messages or from the chat template, or read the transcript with escape_control_tokens=True."
        )
    adds_bos = tokenizer.encode("a")[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def _tail_length(transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template, ids: list[int]) -> int:
    """Number of ids that the template writes after the last user content, whatever the content is."""
    last = max(i for i, message in enumerate(transcript.messages) if message.role == "user")
    shortest = len(ids)
    for sentinel in _SENTINELS:
        messages = list(transcript.messages)
        messages[last] = Message(role="user", content=sentinel)
        rendered = _render(messages, tokenizer, template)
        text_tail = rendered.rpartition(sentinel)[2]
        if text_tail == rendered:
            raise TemplateError(
                "The chat template does not render the last user message. Use the model's own chat template."
            )
        other = encode(tokenizer, rendered)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(ids), reversed(other), strict=False))
        # A word-level vocabulary encodes both contents as <unk>, so the ids alone do not show where they end.
        shortest = min(shortest, sum(1 for _ in same), len(encode(tokenizer, text_tail)))
    return shortest


def _thinking_and_closing(
    transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[int], list[int]]:
    text = transcript.thinking
    if text is None:
        raise SpanError(
            f"Span 'thinking' of {transcript.id!r} is missing: thinking is None, but template {template.name!r} "
            "thinks. Generate it with roll_out, or pass template='chatml' to measure a model without thinking."
        )
    _check_no_tags(transcript.id, text, template)
    rule, ids = ClosingRule.of(tokenizer, template), transcript.thinking_ids
    if ids is None or not decodes_to(ids, text, tokenizer):
        return encode(tokenizer, strip_newlines(text, template)), list(rule.whole)
    seen = transcript.extra.get(CLOSING_IDS)
    if seen is not None:
        return list(ids), _seen_closing(transcript.id, seen, tokenizer, template)
    return spliced_thinking(ids, tokenizer, template)


def spliced_thinking(
    thinking_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[int], list[int]]:
    """Generated thinking and the template's closing behind it.

    Args:
        thinking_ids: As generated.
        tokenizer: The model's own.
        template: From `resolve_template`; it thinks.

    Returns:
        Ids of thinking and closing. A newline that the template's closing begins with is not written twice.
    """
    keep, closing = ClosingRule.of(tokenizer, template).after(thinking_ids)
    return list(thinking_ids[:keep]), list(closing)


def _seen_closing(
    transcript_id: str, seen: JsonValue, tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[int]:
    ids = [i for i in seen if isinstance(i, int) and 0 <= i < len(tokenizer)] if isinstance(seen, list) else []
    if not isinstance(seen, list) or len(ids) < len(seen) or template.think_close not in _decode(tuple(ids), tokenizer):
        raise DataError(
            f"extra[{CLOSING_IDS!r}] of {transcript_id!r} is {seen!r}. Expected token ids of this tokenizer that hold "
            f"the closing tag of template {template.name!r}. Remove the key to have the template's closing."
        )
    return ids


def _check_no_tags(transcript_id: str, text: str, template: Template) -> None:
    if template.think_close in text:
        raise DataError(
            f"The thinking of {transcript_id!r} contains the closing tag as text ({template.think_close!r}). Expected "
            "only the text between the tags: cut it there, or drop this transcript."
        )
    if text.lstrip().startswith(template.think_open):
        raise DataError(
            f"The thinking of {transcript_id!r} starts with the opening tag ({template.think_open!r}), which the "
            "template writes itself. Remove it from the text."
        )


def _check_no_thinking(transcript: Transcript, template: Template) -> None:
    if transcript.thinking and transcript.thinking.strip():
        raise DataError(
            f"{transcript.id!r} has thinking, but template {template.name!r} has none. Pass a template that thinks, "
            "such as template='chatml-think', or clear the thinking."
        )


def _answer_ids(transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    text, ids = transcript.answer, transcript.answer_ids
    if text is None:
        raise SpanError(
            f"Span 'answer' of {transcript.id!r} is missing: answer is None. Generate it, or pass with_answer=False."
        )
    if ids is None or not decodes_to(ids, text, tokenizer):
        return encode(tokenizer, text.lstrip("\n") if template.closing.endswith("\n") else text)
    return list(ids)


def strip_newlines(text: str, template: Template) -> str:
    """Thinking without newlines at its ends, if the template's closing begins with one."""
    if template.closing.startswith("\n"):
        text = text.strip("\n")
    return text


def decodes_to(ids: tuple[int, ...], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids decode to the text, apart from space at the edges and an end-of-turn token."""
    stripped = text.strip()
    return any(_decode(ids, tokenizer, skip_special=skip).strip() == stripped for skip in (False, True))


def _decode(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, *, skip_special: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))
