"""How does this model's chat template open thinking, and how is thinking closed?

1. The generation prompt is rendered as text with the tokenizer's own chat template.
2. Its end, and the chat template's source, are compared with the known conventions of families.py, in their order.
3. Opening and closing are encoded once, so that they can be spliced between the other ids.

Detection relies on what the chat template renders, never on the model's name. Every other module gets token ids from
this one. This file knows nothing of transcripts.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, TemplateError
from cliffscope.transcripts.families import PLAIN, TEMPLATES, Template

__all__ = ["TEMPLATES", "Template"]

logger = logging.getLogger(__name__)

Turn = Mapping[str, str]

TAIL = 40
"""Characters of the generation prompt in the log."""
_PROBE_TURN: Turn = {"role": "user", "content": "Hello"}
_THINKING = re.compile(r"think|reason", re.IGNORECASE)


def resolve_template(template: str | Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the chosen template, or the one that the tokenizer's chat template follows.

    Args:
        template: a choice as in `find_template`, or None to detect it.
        tokenizer: read only if `template` is None.

    Returns:
        The template.

    Raises:
        TemplateError: there is no such template, or none could be detected.
    """
    return detect_template(tokenizer) if template is None else find_template(template)


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
        return Template(**{"name": path.stem, **fields})
    except (OSError, ValueError, TypeError) as error:
        raise TemplateError(
            f"{path} holds no template: {error}. Expected a JSON object with think_open, think_close, opening and "
            "closing, and with template_kwargs if the chat template has switches."
        ) from error


def split_reply(text: str, template: Template) -> tuple[str | None, str | None]:
    r"""Splits generated text into thinking and answer, both without tags.

    If the prompt opens thinking, text without the closing tag is all thinking. If the model opens it, text that does
    not start with the opening tag is all answer.

    Args:
        text: the text that the model wrote after the generation prompt.
        template: the template of the model.

    Returns:
        (thinking, answer). Thinking is None if there was none; answer is None if the thinking never closed.

    Example:
        >>> split_reply("Bread is harmless.\n</think>\n\nMix flour and water.", TEMPLATES.get("qwq"))
        ('Bread is harmless.', 'Mix flour and water.')
        >>> split_reply("Bread is", TEMPLATES.get("qwq"))
        ('Bread is', None)
    """
    if not template.thinks:
        return None, text
    tag, stripped = template.think_open, text.lstrip()
    if stripped.startswith(tag):
        text = stripped.removeprefix(tag).removeprefix(template.opening.partition(tag)[2] or "\n")
    elif template.opening and template.think_close not in text:
        return None, text
    thinking, closed, answer = text.partition(template.think_close)
    before, _, after = template.closing.partition(template.think_close)
    if not closed:
        return thinking, None
    return thinking.removesuffix(before), answer.removeprefix(after).lstrip("\n")


def detect_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Detects the convention from the rendered generation prompt and the chat template's source.

    The first of `TEMPLATES` that fits is taken: the built-in ones in their order, then those of installed packages. A
    chat template that never mentions thinking counts as one without thinking, since it holds no sign of any. If the
    model thinks nevertheless, pass `template="chatml-think"`.

    Args:
        tokenizer: with a chat template.

    Returns:
        The template.

    Raises:
        TemplateError: the tokenizer has no chat template, or it follows no known convention.
    """
    source = _source(tokenizer)

    def render(switches: Mapping[str, bool]) -> str:
        return render_prompt(tokenizer, [_PROBE_TURN], switches)

    # One after the other: templates of installed packages are imported only if no built-in one fits.
    detected = next((t for t in map(TEMPLATES.get, TEMPLATES.names()) if t.fits(source, render)), None)
    rendered = render({})
    if detected is None and not _THINKING.search(source):
        detected = PLAIN
    if detected is None:
        raise TemplateError(
            f"The chat template follows no known convention: its generation prompt ends in {rendered[-60:]!r}. "
            f"Pass template=NAME with one of {', '.join(TEMPLATES.names())}, package.module:name, a .json file with "
            "the fields of Template, or "
            "template=Template(name=..., think_open=..., think_close=..., opening=..., closing=...)."
        )
    tail = rendered if len(rendered) <= TAIL else f"…{rendered[-TAIL:]}"
    logger.info("Template %s: the generation prompt ends in %r.", detected.name, tail)
    return detected


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
    rendered = render_prompt(tokenizer, messages, template.template_kwargs)
    lost = _lost_turns(tokenizer, messages, template, rendered)
    if lost and lost[-1] is [turn for turn in messages if turn["role"] == "user"][-1]:
        raise TemplateError(
            "The chat template does not render the last user message. Use the model's own chat template."
        )
    if lost:
        raise TemplateError(
            f"The chat template drops the {lost[0]['role']} message {lost[0]['content'][:60]!r}, so the model would "
            "never see it. Put it into the user's message, or omit it."
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
    if len(messages) == 1 and messages[0]["content"].strip() in rendered:
        return []
    spoken = [(f"q{i}turnq", turn) for i, turn in enumerate(messages) if turn["content"].strip()]
    marked = [{**turn, "content": f"q{i}turnq" if turn["content"].strip() else ""} for i, turn in enumerate(messages)]
    try:
        text = render_prompt(tokenizer, marked, template.template_kwargs)
    except TemplateError:
        # Some templates accept certain texts only.
        return [turn for _, turn in spoken if turn["role"] != "assistant" and turn["content"].strip() not in rendered]
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
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template_kwargs: Mapping[str, bool]
) -> str:
    """Renders the generation prompt as text, exactly as the tokenizer's chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: turns with `role` and `content`.
        template_kwargs: switches for the chat template.

    Returns:
        The text.

    Raises:
        TemplateError: there is no chat template, or it rejects these messages.
    """
    _source(tokenizer)
    turns = [dict(turn) for turn in messages]
    # The typed signature lacks the chat template's own keyword arguments.
    render: Callable[..., object] = tokenizer.apply_chat_template
    try:
        rendered = render(turns, tokenize=False, add_generation_prompt=True, **dict(template_kwargs))
    except (JinjaError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        roles = ", ".join(turn.get("role", "?") for turn in turns)
        raise TemplateError(
            f"The chat template cannot render messages with the roles {roles}: {error}. Expected roles that the model "
            "supports (some have no system role). Change the messages or the template."
        ) from error
    return str(rendered)


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or not source.strip():
        raise TemplateError(
            "The tokenizer has no chat template, so no prompt can be rendered. Set tokenizer.chat_template to the "
            "model's own Jinja text."
        )
    return source
