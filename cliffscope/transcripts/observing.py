"""What do a tokenizer and its chat template show of the way a model thinks?

1. The generation prompt is rendered with and without each switch of the chat template that changes it.
2. An answered turn is rendered, plain and with reasoning in every form that the chat template may take: fields of the
   message, blocks of content, tags within the content.
3. Tag pairs that speak of thinking are collected from the vocabulary and from the chat template's source.

Draws no conclusions; conventions.py does.
"""

import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cliffscope.transcripts.rendering import (
    Source,
    Turn,
    chat_source,
    read_source,
    render_chat,
    try_render,
)
from cliffscope.transcripts.tags import TAG, TagPair, pairs_of, tags_in, thinking_pairs

ASKED, REASONED, ANSWERED, AGAIN = "Zaskedz", "Zreasonedz", "Zansweredz", "Zagainz"
"""Contents whose places in a rendering are looked up."""
FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""Fields of a message in which chat templates usually expect its reasoning."""
_MOST_FIELDS = 12
_SWITCH = re.compile(r"think|thought|reason", re.IGNORECASE)
_NO_SWITCH = re.compile(
    r"budget|effort|level|mode|format|style|option|max|min|num|length|language|tag|token|text|content|start|begin|end_"
    r"|_end|string|prompt|tools|keep|preserve|past|history|clear|strip|remove|drop|trunc",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"(?:^|_)(?:no|non|not|disable|disabled|skip|without|hide|off)(?:_|$)", re.IGNORECASE)
USER: Turn = {"role": "user", "content": ASKED}


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How an answered turn with reasoning is rendered, behind the user's content."""

    form: str
    """In which form the reasoning was passed, in words."""
    before: str
    """Text between the user's content and the reasoning."""
    closing: str
    """Text between the reasoning and the answer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Observations:
    """What is seen of a model before it is run."""

    source: Source
    """Of the chat template."""
    switches_on: Mapping[str, bool]
    """Values of the switches under which the model thinks, where they make a difference."""
    switches_off: Mapping[str, bool]
    """The other values."""
    prompt: str
    """The generation prompt."""
    head: str
    """The generation prompt behind the user's content, thinking on."""
    shut: str | None
    """The same with thinking off; None without a switch."""
    plain: str | None
    """Text between the user's content and the answer where a turn without reasoning is rendered; None if it is not."""
    after: tuple[str, str]
    """Texts behind the answer: where it ends the conversation, and where another message follows."""
    renderings: tuple[Rendering, ...]
    """Of an answered turn with reasoning, in every form that shows it."""
    drops_earlier: bool | None
    """Whether reasoning of an earlier turn vanishes; None where it is never shown."""
    vocabulary_pairs: tuple[TagPair, ...]
    """Pairs about thinking among the added tokens."""
    source_pairs: tuple[TagPair, ...]
    """Pairs about thinking in the chat template's source."""
    prompt_pairs: tuple[TagPair, ...]
    """Pairs about thinking in the generation prompt up to the user's content, as in instructions to the model."""

    @property
    def pairs(self) -> tuple[TagPair, ...]:
        """All pairs, each once, those of the chat template first."""
        around = (
            pair
            for r in self.renderings
            for tag in tags_in(r.before)[-1:]
            if r.before.rstrip().endswith(tag)
            for pair in pairs_of((tag, *tags_in(r.closing)[:1]))
        )
        return tuple(dict.fromkeys((*self.source_pairs, *self.prompt_pairs, *around, *self.vocabulary_pairs)))


def observe(tokenizer: PreTrainedTokenizerBase) -> Observations:
    """Renders and reads all that a tokenizer and its chat template show.

    Args:
        tokenizer: with a chat template.

    Returns:
        The observations.

    Raises:
        TemplateError: there is no chat template, or it cannot render a single user message.
    """
    source = read_source(chat_source(tokenizer))
    pairs = thinking_pairs("".join(source.texts))
    on, off = _switches(tokenizer, source, pairs)
    prompt = render_chat(tokenizer, [USER], on, generation=True)
    shut = try_render(tokenizer, [USER], off, generation=True) if off else None
    plain = _behind(try_render(tokenizer, _answered({"content": ANSWERED}), on, generation=False))
    forms = list(_forms(source, pairs))
    return Observations(
        source=source,
        switches_on=on,
        switches_off=off,
        prompt=prompt,
        head=_behind(prompt) or "",
        shut=_behind(shut),
        plain=plain.partition(ANSWERED)[0] if plain and ANSWERED in plain else None,
        after=answer_ends(tokenizer, on),
        renderings=tuple(_renderings(tokenizer, forms, on)),
        drops_earlier=_drops_earlier(tokenizer, forms, on),
        vocabulary_pairs=tuple(p for p in pairs_of(map(str, tokenizer.get_added_vocab())) if p.thinking),
        source_pairs=pairs,
        prompt_pairs=thinking_pairs(prompt.rpartition(ASKED)[0]),
    )


def answer_ends(tokenizer: PreTrainedTokenizerBase, switches: Mapping[str, bool]) -> tuple[str, str]:
    """What the chat template writes behind an answer.

    Args:
        tokenizer: with a chat template.
        switches: of the chat template.

    Returns:
        The text behind an answer that ends the conversation, and that between an answer and the next user's content;
        "" where the chat template does not render it.
    """
    turns = _answered({"content": ANSWERED})
    prompts = [try_render(tokenizer, [USER], switches, generation=generation) for generation in (False, True)]
    texts = [try_render(tokenizer, [*turns, *more], switches, generation=False) for more in ([], [_again()])]
    last, earlier = (text.rpartition(ANSWERED)[2].partition(AGAIN)[0] if text else "" for text in texts)
    if prompts[0] == prompts[1]:
        # A chat template that always writes a generation prompt writes one behind an answer, too: only an earlier turn
        # shows how one ends, if another tag follows there, which begins the user's turn.
        last = earlier if len(tags_in(earlier)) > 1 else ""
    return last, earlier


def has_closed(text: str, pairs: Sequence[TagPair]) -> bool:
    """Whether a prompt has closed thinking, so that nothing but tags, such as that of an answer, follows."""
    ends = (text.rpartition(pair.closing) for pair in pairs)
    return any(tag and not TAG.sub("", after).strip() for _, tag, after in ends)


def common_start(a: str, b: str) -> str:
    """The longest text with which both begin."""
    return os.path.commonprefix([a, b])


def _switches(
    tokenizer: PreTrainedTokenizerBase, source: Source, pairs: Sequence[TagPair]
) -> tuple[dict[str, bool], dict[str, bool]]:
    """Switches of thinking that change the generation prompt: as they are on, and as they are off."""
    on: dict[str, bool] = {}
    for name in sorted(source.variables):
        if not _SWITCH.search(name) or _NO_SWITCH.search(name):
            continue
        prompts = {v: try_render(tokenizer, [USER], {**on, name: v}, generation=True) for v in (True, False)}
        left = try_render(tokenizer, [USER], on, generation=True)
        if None in prompts.values() or (prompts[True] == prompts[False] == left):
            continue
        value_on = not _NEGATED.search(name)
        openness = {value: _openness(prompts[value] or "", pairs) for value in prompts}
        if openness[True] != openness[False]:
            value_on = openness[True] > openness[False]
        on[name] = value_on
    return on, {name: not value for name, value in on.items()}


def _openness(prompt: str, pairs: Sequence[TagPair]) -> int:
    """2 for a prompt that ends within thinking, 0 for one that has closed it, else 1."""
    if has_closed(_behind(prompt) or "", pairs):
        return 0
    return 2 if any(prompt.rstrip().endswith(pair.opening) for pair in pairs) else 1


def _answered(fields: Turn) -> list[Turn]:
    return [USER, {"role": "assistant", **fields}]


def _again() -> Turn:
    return {"role": "user", "content": AGAIN}


def _forms(source: Source, pairs: Sequence[TagPair]) -> Iterator[tuple[str, Turn]]:
    """Messages with reasoning and answer, in every form that a chat template may take."""
    read = [name for name in source.fields if _SWITCH.search(name) and re.fullmatch(r"\w+", name)]
    names = list(dict.fromkeys((*(n for n in FIELDS if n in read), *read, *FIELDS)))[:_MOST_FIELDS]
    for name in names:
        yield f"the field {name}", {"content": ANSWERED, name: REASONED}
    for name in names:
        for key in dict.fromkeys((name, "text")):
            block = {"type": name, key: REASONED}
            yield f"a content block {name}", {"content": [block, {"type": "text", "text": ANSWERED}]}
    for pair in pairs:
        # Without newlines, so that those that are rendered are the chat template's own.
        content = f"{pair.opening}{REASONED}{pair.closing}{ANSWERED}"
        yield f"tags in the content, which it spells anew ({pair.closing})", {"content": content}


def _renderings(
    tokenizer: PreTrainedTokenizerBase, forms: Sequence[tuple[str, Turn]], on: Mapping[str, bool]
) -> Iterator[Rendering]:
    for form, message in forms:
        tail = _behind(try_render(tokenizer, _answered(message), on, generation=False))
        if not tail or tail.count(REASONED) != 1 or ANSWERED not in tail.partition(REASONED)[2]:
            continue
        before, _, rest = tail.partition(REASONED)
        closing = rest.partition(ANSWERED)[0]
        content = message["content"]
        verbatim = isinstance(content, str) and REASONED in content and content in tail
        listed = "'type'" in tail or '"type"' in tail
        if closing.strip() and not verbatim and not listed:
            yield Rendering(form=form, before=before, closing=closing)


def _drops_earlier(
    tokenizer: PreTrainedTokenizerBase, forms: Sequence[tuple[str, Turn]], on: Mapping[str, bool]
) -> bool | None:
    """Whether no form of reasoning survives in an earlier turn; None without any form that could."""
    shown = []
    for _, message in forms:
        content = message["content"]
        if not isinstance(content, str):
            continue
        text = try_render(tokenizer, [*_answered(message), _again()], on, generation=True)
        alone = try_render(tokenizer, _answered(message), on, generation=False)
        # A field that is never rendered says nothing; tags in the content are what the model itself would have written.
        if text and ANSWERED in text and (REASONED in content or REASONED in (alone or "")):
            shown.append(REASONED in text)
    return None if not shown else not any(shown)


def _behind(text: str | None) -> str | None:
    """What follows the user's content; None where that is not rendered."""
    return None if text is None or ASKED not in text else text.rpartition(ASKED)[2]
