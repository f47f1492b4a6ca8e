"""How does this model's chat template open thinking, and how is thinking closed?

1. What tokenizer and chat template show is observed (observing.py).
2. The convention is concluded from it, with those of families.py as priors, in their order (conventions.py).
3. Opening, closing and end of turn are encoded once, so that they can be spliced between the other ids.

Detection relies on what the chat template renders, never on the model's name. Every other module gets token ids from
this one. This file knows nothing of transcripts.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, TemplateError
from cliffscope.store import write_atomically
from cliffscope.transcripts.conventions import conclude
from cliffscope.transcripts.families import TEMPLATES, Template
from cliffscope.transcripts.observing import answer_ends, common_start, observe
from cliffscope.transcripts.rendering import Turn, chat_source, read_source, render_chat, today
from cliffscope.transcripts.tags import tags_in

__all__ = ["TEMPLATES", "Template"]

logger = logging.getLogger(__name__)

TAIL = 40
"""Characters of the generation prompt in the log."""
_PROBE_TURN: Turn = {"role": "user", "content": "Hello"}


def resolve_template(template: str | Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the chosen template, or the one that the tokenizer's chat template follows.

    Args:
        template: a choice as in `find_template`, or None to detect it.
        tokenizer: read only if `template` is None.

    Returns:
        The template. Where the chat template writes today's date, it is pinned to the current day in `date`, so that
        a run which lasts beyond midnight renders the same prompts.

    Raises:
        TemplateError: there is no such template, or none could be detected.
    """
    resolved = detect_template(tokenizer) if template is None else find_template(template)
    dated = (
        not resolved.date and isinstance(tokenizer.chat_template, str) and read_source(tokenizer.chat_template).dated
    )
    return replace(resolved, date=today()) if dated else resolved


def find_template(template: str | Template) -> Template:
    """Returns the template that a choice means.

    Args:
        template: a name of `TEMPLATES`, the name of an entry point of `cliffscope.templates`, `package.module:name`,
            the path of a `.json` file with the fields of `Template`, or a `Template`, which is returned as it is.

    Returns:
        The template.

    Raises:
        TemplateError: there is no such template, or the file does not hold one.
    """
    if isinstance(template, str) and template.endswith(".json"):
        return _read_template(Path(template))
    try:
        return TEMPLATES.get(template)
    except DataError as error:
        raise TemplateError(f"{error} A .json file with the fields of Template works as well.") from error


def _read_template(path: Path) -> Template:
    """The template of a JSON file; its name is the file's stem unless the file has one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Template(**{"name": path.stem, **fields, "marks": tuple(fields.get("marks", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TemplateError(
            f"{path} holds no template: {error}. Expected a JSON object with think_open, think_close, opening and "
            "closing, and with template_kwargs if the chat template has switches."
        ) from error


def write_template(template: Template, path: str | Path) -> None:
    """Writes a template as a `.json` file, from which `find_template` reads it.

    Args:
        template: any; its date is left out, since each run pins its own.
        path: ends in `.json`.

    Raises:
        DataError: the path has another ending.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise DataError(f"{path} does not end in .json, by which --template knows a file. Choose such a name.")
    text = json.dumps(template.record(), ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def detect_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Detects the convention from what the chat template renders, its source and the vocabulary.

    `TEMPLATES` are priors: the first that fits, the built-in ones in their order before those of installed packages,
    supplies what the chat template does not show, and is contradicted by what it does show. See conventions.py.

    Args:
        tokenizer: with a chat template.

    Returns:
        The template, with the evidence for each field.

    Raises:
        TemplateError: the tokenizer has no chat template.
        UnclearTemplateError: what it shows does not suffice, or contradicts itself.
    """
    source = chat_source(tokenizer)

    def render(switches: Mapping[str, bool]) -> str:
        return render_prompt(tokenizer, [_PROBE_TURN], switches)

    # One after the other: templates of installed packages are imported only if no built-in one fits.
    prior = next((t for t in map(TEMPLATES.get, TEMPLATES.names()) if t.fits(source, render)), None)
    seen = observe(tokenizer)
    detected = _with_end(conclude(seen, prior), tokenizer, seen.after)
    tail = seen.prompt if len(seen.prompt) <= TAIL else f"…{seen.prompt[-TAIL:]}"
    logger.info("Template %s: the generation prompt ends in %r.", detected.name, tail)
    return detected


def turn_end(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[int, ...]:
    """What follows an answer and ends its turn, as token ids, such as an answer is trained with.

    An answered turn is rendered with the chat template. A model's `eos_token` alone may be one that its chat template
    never writes.

    Args:
        tokenizer: the model's own.
        template: its template; an `end` that it has counts before what is rendered.

    Returns:
        The ids; those of the `eos_token` where no tag follows a rendered answer, and none without one.
    """
    end = template.end or _rendered_ends(tokenizer, template)[0]
    return tuple(encode(tokenizer, end or str(tokenizer.eos_token or "")))


def stop_sequences(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[tuple[int, ...], ...]:
    """Token ids at which generation of an answer stops.

    Args:
        tokenizer: the model's own.
        template: its template.

    Returns:
        One sequence for the tag that ends the last turn of a conversation, for the one that ends an earlier turn, and
        for the `eos_token`; mostly of one id each.
    """
    ends = (template.end, *_rendered_ends(tokenizer, template))
    texts = [_end_tag(tokenizer, end) or end.strip() for end in ends if end]
    texts += [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    return tuple(dict.fromkeys(ids for text in texts if (ids := tuple(encode(tokenizer, text)))))


def _rendered_ends(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        return "", ""
    return _up_to_tags(tokenizer, answer_ends(tokenizer, template.template_kwargs))


def _with_end(template: Template, tokenizer: PreTrainedTokenizerBase, after: tuple[str, str]) -> Template:
    """The template with its end of turn, and where that comes from."""
    end = _up_to_tags(tokenizer, after)[0]
    if template.end or not end:
        why = "the template's own" if template.end else "no tag is rendered behind an answer, so eos_token ends it"
        return replace(template, evidence={**template.evidence, "end": why})
    return replace(template, end=end, evidence={**template.evidence, "end": "a rendered answered turn"})


def _up_to_tags(tokenizer: PreTrainedTokenizerBase, after: tuple[str, str]) -> tuple[str, str]:
    """Texts behind an answer up to their first tag; where they have none, what is common to both."""
    common = "" if _end_tag(tokenizer, after[0]) else common_start(*after).rstrip()

    def cut(text: str) -> str:
        tag = _end_tag(tokenizer, text)
        return common or text[: text.index(tag) + len(tag)]

    return cut(after[0]), cut(after[1])


def _end_tag(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The first tag or special token of a text, apart from a tag that closes an answer's wrapper; "" if none."""
    special = [token for token in map(str, tokenizer.all_special_tokens) if token and token in text]
    tags = [tag for tag in tags_in(text) if not tag.startswith(("</", "[/"))]
    return min((*special, *tags), key=lambda tag: (text.index(tag), -len(tag)), default="")


def generation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template: Template) -> str:
    """Renders the prompt after which the model continues, without the opening that the caller splices.

    Args:
        tokenizer: with a chat template.
        messages: turns with `role` and `content`.
        template: the template; it must agree with what is rendered.

    Returns:
        The text that the chat template itself writes.

    Raises:
        TemplateError: rendering fails, the chat template drops a message, or the prompt does not open thinking as
            `template` says.
    """
    rendered = render_prompt(tokenizer, messages, template.template_kwargs, template.date)
    lost = _lost_turns(tokenizer, messages, template, rendered)
    if lost and lost[-1] is [turn for turn in messages if turn["role"] == "user"][-1]:
        raise TemplateError(
            "The chat template does not render the last user message. Use the model's own chat template."
        )
    if lost:
        raise TemplateError(
            f"The chat template drops the {lost[0]['role']} message {str(lost[0]['content'])[:60]!r}, so the model "
            "would never see it. Put it into the user's message, or omit it."
        )
    if not template.thinks:
        return rendered
    end = rendered.rstrip()
    if end.endswith(template.think_close):
        raise TemplateError(
            f"The generation prompt closes thinking immediately: it ends in {rendered[-60:]!r}. Use the model's "
            "original chat template, or pass template='chatml' to measure without thinking."
        )
    if not template.opening and not end.endswith(template.think_open):
        raise TemplateError(
            f"Template {template.name!r} expects a generation prompt that opens thinking, but it ends in "
            f"{rendered[-60:]!r}. Pass template=None to detect the template, or a template with an opening."
        )
    return rendered


def _lost_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template: Template, rendered: str
) -> list[Turn]:
    """Turns that the chat template leaves out.

    Short texts occur elsewhere in a prompt, and a template may trim or escape what it keeps. So each turn is replaced
    by a word that occurs nowhere else, and a turn is lost if its word is.
    """
    texts = [str(turn["content"]).strip() for turn in messages]
    if len(messages) == 1 and texts[0] in rendered:
        return []
    spoken = [(f"q{i}turnq", turn) for i, turn in enumerate(messages) if texts[i]]
    marked = [{**turn, "content": f"q{i}turnq" if texts[i] else ""} for i, turn in enumerate(messages)]
    try:
        text = render_prompt(tokenizer, marked, template.template_kwargs, template.date)
    except TemplateError:
        # Some templates accept certain texts only.
        return [
            turn
            for turn, content in zip(messages, texts, strict=True)
            if turn["role"] != "assistant" and content not in rendered
        ]
    return [turn for word, turn in spoken if word not in text]


def opening_ids(tokenizer: PreTrainedTokenizerBase, template: Template, rendered: str) -> list[int]:
    """Token ids to splice after the generation prompt so that thinking is opened exactly once.

    Args:
        tokenizer: encodes the opening.
        template: the template.
        rendered: the generation prompt, from `generation_prompt`.

    Returns:
        Ids of the opening; none if the prompt has already opened thinking.
    """
    if not template.thinks or rendered.rstrip().endswith(template.think_open):
        return []
    return encode(tokenizer, template.opening)


def closing_ids(tokenizer: PreTrainedTokenizerBase, template: Template, *, after_newline: bool = False) -> list[int]:
    """Token ids of the closing, encoded on its own so that the surrounding text cannot change them.

    Args:
        tokenizer: encodes the closing.
        template: the template.
        after_newline: the last token of the thinking already contains the newline that starts the closing, as `.` plus
            newline does in Qwen's vocabulary. The closing is then encoded without it.

    Returns:
        Ids; none for a template without thinking, whose closing is the tail of each prompt.
    """
    return encode(tokenizer, template.closing.removeprefix("\n") if after_newline else template.closing)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes text without adding BOS or EOS, which chat templates write themselves."""
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)] if text else []


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template_kwargs: Mapping[str, bool], date: str = ""
) -> str:
    """Renders the generation prompt as text, exactly as the tokenizer's chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: turns with `role` and `content`.
        template_kwargs: switches for the chat template.
        date: what the chat template takes for today, see `Template.date`.

    Returns:
        The text.

    Raises:
        TemplateError: there is no chat template, or it rejects these messages.
    """
    return render_chat(tokenizer, messages, template_kwargs, generation=True, date=date)
