"""Which tokens does the model see, and to which span does each belong?

1. The prompt's ids are the chat template's own, with exactly one BOS and with thinking opened exactly once.
2. The thinking's ids are those that were generated, or the text encoded on its own.
3. The closing's ids are encoded once and spliced, so that no boundary falls inside a token; where the model closed its
   thinking in another way, they are those that it saw.
4. The answer's ids follow, where they are asked for.

For a template without thinking the thinking span is empty and the closing is the tail of the prompt after the last
user content. A whole assistant turn is never rendered, since most chat templates delete its thinking.

The tags themselves are in templates.py; the transcripts and their collection are in records.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, SpanError, TemplateError
from cliffscope.transcripts.records import JsonValue, Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.templates import Template, closing_ids, encode, generation_prompt, opening_ids

__all__ = [
    "CLOSING_IDS",
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
    """Token ids of one transcript and the span that each belongs to."""

    id: str
    """Id of the transcript."""
    token_ids: Int64[np.ndarray, " pos"]
    """[pos] What the model sees."""
    bounds: tuple[int, int, int, int]
    """Positions where prompt, thinking, closing and answer stop; the last is the number of positions."""

    def __post_init__(self) -> None:
        """Check that the spans cover every token once."""
        if list(self.bounds) != sorted(self.bounds) or self.bounds[0] < 0 or self.bounds[-1] != len(self.token_ids):
            raise SpanError(
                f"Bounds {self.bounds} of {self.id!r} must not decrease and must end at {len(self.token_ids)} tokens."
            )

    @property
    def n_pos(self) -> int:
        """Number of positions."""
        return len(self.token_ids)

    @property
    def final(self) -> int:
        """The last closing position: the one from which the answer's first token is predicted."""
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
        """One line: how many positions each span has."""
        counts = ", ".join(f"{s} {self.span(s).stop - self.span(s).start}" for s in Span)
        return f"TokenizedTranscript({self.id!r}: {counts})"


def tokenize(
    transcript: Transcript,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    with_answer: bool = False,
    max_length: int | None = None,
) -> TokenizedTranscript:
    """Turn a transcript into token ids whose spans cover every token once.

    Newlines at the edges of thinking and answer that repeat the template's own are left to the template when text is
    encoded. Generated ids are kept exactly as long as they decode to the text.

    Args:
        transcript: With thinking, if the template has it; empty thinking gives an empty span.
        tokenizer: The model's own, with its chat template.
        template: From `resolve_template`.
        with_answer: Append the answer. Off by default, since every measurement ends at the final position.
        max_length: Most tokens the model may see; None for no limit. Nothing is ever truncated.

    Returns:
        Ids and bounds.

    Raises:
        TemplateError: The chat template fails, or writes BOS twice.
        SpanError: A span that is needed is missing.
        DataError: The text holds the closing tag, or is longer than `max_length`.
    """
    prompt, tail = _prompt_ids(transcript, tokenizer, template)
    if max_length is not None and len(prompt) > max_length:
        raise DataError(
            f"The prompt of {transcript.id!r} has {len(prompt)} tokens, more than max_length={max_length}. "
            "Drop it or raise max_length: nothing is truncated."
        )
    if template.thinks:
        thinking, closing = _thinking_and_closing(transcript, tokenizer, template)
    else:
        _refuse_thinking(transcript, template)
        thinking, closing = [], prompt[len(prompt) - tail :]
        prompt = prompt[: len(prompt) - tail]
    answer = _answer_ids(transcript, tokenizer, template) if with_answer else []
    stops = np.cumsum([len(prompt), len(thinking), len(closing), len(answer)]).tolist()
    if max_length is not None and stops[3] > max_length:
        raise DataError(
            f"{transcript.id!r} has {stops[3]} tokens, of them {len(thinking)} thinking, more than "
            f"max_length={max_length}. Drop it or raise max_length: nothing is truncated."
        )
    return TokenizedTranscript(
        id=transcript.id,
        token_ids=np.asarray([*prompt, *thinking, *closing, *answer], dtype=np.int64),
        bounds=(stops[0], stops[1], stops[2], stops[3]),
    )


def tokenize_all(
    transcripts: Iterable[Transcript],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    with_answer: bool = False,
    max_length: int | None = None,
) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    """Tokenize many transcripts, and say which could not be and why.

    Args:
        transcripts: In any order.
        tokenizer: The model's own.
        template: From `resolve_template`.
        with_answer: See `tokenize`.
        max_length: See `tokenize`.

    Returns:
        The tokenized transcripts in order, and one omission for each that is missing.

    Raises:
        TemplateError: The chat template fails; that is a fault of the set-up and not of one transcript.
    """
    done: list[TokenizedTranscript] = []
    omitted: list[Omission] = []
    for transcript in transcripts:
        try:
            done.append(tokenize(transcript, tokenizer, template, with_answer=with_answer, max_length=max_length))
        except (DataError, SpanError) as error:
            omitted.append(Omission(stage="tokenize", reason=str(error), id=transcript.id))
    return done, tuple(omitted)


def _prompt_ids(
    transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[int], int]:
    """Ids up to where thinking begins, and how many of the last ones follow the user's content."""
    if not any(message.role == "user" for message in transcript.messages):
        raise DataError(f"Transcript {transcript.id!r} has no user message, so there is no prompt. Give it one.")
    rendered = _render(transcript.messages, tokenizer, template)
    ids = encode(tokenizer, rendered)
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
            f"The rendered prompt begins with BOS ({tokenizer.bos_token!r}) twice. "
            "Remove it from the messages or from the chat template: a model expects it once."
        )
    adds_bos = tokenizer.encode("a")[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def _tail_length(transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template, ids: list[int]) -> int:
    """Number of last ids that the template writes after the last user content, whatever that is."""
    last = max(i for i, message in enumerate(transcript.messages) if message.role == "user")
    shortest = len(ids)
    for sentinel in _SENTINELS:
        messages = list(transcript.messages)
        messages[last] = Message(role="user", content=sentinel)
        rendered = _render(messages, tokenizer, template)
        text_tail = rendered.rpartition(sentinel)[2]
        if text_tail == rendered:
            raise TemplateError("The chat template does not render the last user message. Use the model's own.")
        other = encode(tokenizer, rendered)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(ids), reversed(other), strict=False))
        # A word-level vocabulary knows both contents as <unk>, so the ids alone cannot tell where they end.
        shortest = min(shortest, sum(1 for _ in same), len(encode(tokenizer, text_tail)))
    return shortest


def _thinking_and_closing(
    transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[list[int], list[int]]:
    text = transcript.thinking
    if text is None:
        raise SpanError(
            f"Span 'thinking' of {transcript.id!r} is missing: thinking is None and template {template.name!r} thinks. "
            "Generate it with roll_out, or pass template='chatml' to measure a model without thinking."
        )
    _refuse_tags(transcript.id, text, template)
    closing = closing_ids(tokenizer, template)
    given = transcript.thinking_ids
    if given is None or not _decodes_to(given, text, tokenizer):
        return encode(tokenizer, _strip_newlines(text, template)), closing
    seen = transcript.extra.get(CLOSING_IDS)
    if seen is not None:
        return list(given), _seen_closing(transcript.id, seen, tokenizer, template)
    return spliced_thinking(given, tokenizer, template)


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
    closing = closing_ids(tokenizer, template)
    if not template.closing.startswith("\n"):
        return list(thinking_ids), closing
    bare = closing_ids(tokenizer, template, after_newline=True)
    newline = closing[: len(closing) - len(bare)]
    if newline and list(thinking_ids[-len(newline) :]) == newline and closing[len(newline) :] == bare:
        # The model wrote the closing's own newline as a token of its own: the same ids, counted as closing.
        return list(thinking_ids[: -len(newline)]), closing
    return list(thinking_ids), bare if _decode(thinking_ids[-1:], tokenizer).endswith("\n") else closing


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


def _refuse_tags(transcript_id: str, text: str, template: Template) -> None:
    if template.think_close in text:
        raise DataError(
            f"The thinking of {transcript_id!r} contains the closing tag as text ({template.think_close!r}). "
            "Expected only what stands between the tags: cut it there, or drop this transcript."
        )
    if text.lstrip().startswith(template.think_open):
        raise DataError(
            f"The thinking of {transcript_id!r} begins with the opening tag ({template.think_open!r}), which the "
            "template writes itself. Remove it from the text."
        )


def _refuse_thinking(transcript: Transcript, template: Template) -> None:
    if transcript.thinking and transcript.thinking.strip():
        raise DataError(
            f"{transcript.id!r} has thinking, but template {template.name!r} has no place for it. "
            "Pass a template that thinks, such as template='chatml-think', or clear the thinking."
        )


def _answer_ids(transcript: Transcript, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    text, given = transcript.answer, transcript.answer_ids
    if text is None:
        raise SpanError(
            f"Span 'answer' of {transcript.id!r} is missing: answer is None. Generate it, or pass with_answer=False."
        )
    if given is None or not _decodes_to(given, text, tokenizer):
        return encode(tokenizer, text.lstrip("\n") if template.closing.endswith("\n") else text)
    return list(given)


def _strip_newlines(text: str, template: Template) -> str:
    if template.closing.startswith("\n"):
        text = text.strip("\n")
    return text


def _decodes_to(ids: tuple[int, ...], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids say the same as the text, up to space at the edges and an end-of-turn token."""
    wanted = text.strip()
    return any(_decode(ids, tokenizer, skip_special=skip).strip() == wanted for skip in (False, True))


def _decode(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, *, skip_special: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))
