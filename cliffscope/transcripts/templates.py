"""How does this model's chat template open thinking, and how is thinking closed?

families.py holds the conventions. Every other module asks this one for token ids.

1. Render the generation prompt with the tokenizer's own chat template, as text.
2. Compare its end, and the template's source, with the known conventions, in their order.
3. Give opening and closing as text, and as ids that are encoded once and spliced between the other ids.

It goes by what the chat template renders and never by a model's name, and it knows nothing of transcripts.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import TemplateError
from cliffscope.transcripts.families import TEMPLATES, Template

__all__ = ["TEMPLATES", "Template"]

logger = logging.getLogger(__name__)

Turn = Mapping[str, str]

TAIL = 40
"""Characters of the generation prompt that are told."""
_PROBE_TURN: Turn = {"role": "user", "content": "Hello"}
_THINKING = re.compile(r"think|reason", re.IGNORECASE)


def resolve_template(template: str | Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template that was asked for, or the one that the tokenizer's chat template follows.

    Args:
        template: A key of `TEMPLATES`, a `.json` file, a `Template` of your own, or None to detect it.
        tokenizer: Only read when `template` is None.

    Returns:
        The convention to use.

    Raises:
        TemplateError: The name is not known, or nothing could be detected.
    """
    return detect_template(tokenizer) if template is None else find_template(template)


def find_template(template: str | Template) -> Template:
    """Return the template of a name.

    Args:
        template: A key of `TEMPLATES`, the path of a `.json` file with the fields of `Template`, or a `Template` of
            your own, which is returned as it is.

    Returns:
        The convention.

    Raises:
        TemplateError: The name is not known, or the file does not hold a template.
    """
    if isinstance(template, Template):
        return template
    if template.endswith(".json"):
        return _read_template(Path(template))
    if template not in TEMPLATES:
        raise TemplateError(
            f"No template is called {template!r}. Known: {', '.join(TEMPLATES)}. "
            "Pass one of these names, or a Template of your own."
        )
    return TEMPLATES[template]


def _read_template(path: Path) -> Template:
    """A template of the user's own, from JSON."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return Template(**{"name": path.stem, **given})
    except (OSError, ValueError, TypeError) as error:
        raise TemplateError(
            f"{path} holds no template: {error}. Expected a JSON object with think_open, think_close, opening and "
            "closing, and template_kwargs where the chat template has switches."
        ) from error


def split_reply(text: str, template: Template) -> tuple[str | None, str | None]:
    r"""Split generated text into thinking and answer, neither of them with tags.

    Where the prompt opens thinking, text without the closing tag is all thinking. Where the model opens it itself,
    text that does not begin with the opening tag is all answer.

    Args:
        text: What the model wrote after the generation prompt.
        template: The convention.

    Returns:
        (thinking, answer); thinking is None where there was none, answer None where thinking never closed.

    Example:
        >>> split_reply("Bread is harmless.\n</think>\n\nMix flour and water.", TEMPLATES["qwq"])
        ('Bread is harmless.', 'Mix flour and water.')
        >>> split_reply("Bread is", TEMPLATES["qwq"])
        ('Bread is', None)
    """
    if not template.thinks:
        return None, text
    tag, begun = template.think_open, text.lstrip()
    if begun.startswith(tag):
        text = begun.removeprefix(tag).removeprefix(template.opening.partition(tag)[2] or "\n")
    elif template.opening and template.think_close not in text:
        return None, text
    thinking, closed, answer = text.partition(template.think_close)
    before, _, after = template.closing.partition(template.think_close)
    if not closed:
        return thinking, None
    return thinking.removesuffix(before), answer.removeprefix(after).lstrip("\n")


def detect_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Find the convention from the rendered generation prompt and the chat template's source.

    A chat template that never mentions thinking is taken as one without thinking, since nothing in it can tell; where
    the model does think, pass `template="chatml-think"`.

    Args:
        tokenizer: With a chat template.

    Returns:
        One of `TEMPLATES`.

    Raises:
        TemplateError: The tokenizer has no chat template, or it follows no known convention.
    """
    source = _source(tokenizer)
    found = next((t for t in TEMPLATES.values() if t.prompt_end and _follows(tokenizer, source, t)), None)
    rendered = render_prompt(tokenizer, [_PROBE_TURN], {})
    if found is None and not _THINKING.search(source):
        found = TEMPLATES["plain"]
    if found is None:
        raise TemplateError(
            f"The chat template follows no known convention: its generation prompt ends in {rendered[-60:]!r}. "
            f"Pass template=NAME with one of {', '.join(TEMPLATES)}, a .json file with the fields of Template, or "
            "template=Template(name=..., think_open=..., think_close=..., opening=..., closing=...)."
        )
    tail = rendered if len(rendered) <= TAIL else f"…{rendered[-TAIL:]}"
    logger.info("template %s: the generation prompt ends in %r", found.name, tail)
    return found


def _follows(tokenizer: PreTrainedTokenizerBase, source: str, template: Template) -> bool:
    """Whether a chat template renders and holds what tells this family."""
    held = all(mark in source for mark in template.marks)
    return held and render_prompt(tokenizer, [_PROBE_TURN], template.template_kwargs).endswith(template.prompt_end)


def generation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template: Template) -> str:
    """Render the prompt up to where the model goes on, without the opening that the caller splices.

    Args:
        tokenizer: With a chat template.
        messages: Turns with `role` and `content`.
        template: The convention; it must agree with what is rendered.

    Returns:
        The text that the chat template itself writes.

    Raises:
        TemplateError: Rendering fails, the system message is left out, or the prompt does not leave thinking as
            `template` says.
    """
    rendered = render_prompt(tokenizer, messages, template.template_kwargs)
    lost = [
        turn["content"] for turn in messages if turn["role"] == "system" and turn["content"].strip() not in rendered
    ]
    if lost:
        raise TemplateError(
            f"The chat template leaves the system message {lost[0][:60]!r} out of the prompt. Put it before the user's "
            "message, or leave it out yourself: what the model never sees must not count as said."
        )
    if not template.thinks:
        return rendered
    end = rendered.rstrip()
    if end.endswith(template.think_close):
        raise TemplateError(
            f"The generation prompt closes thinking at once: it ends in {rendered[-60:]!r}. "
            "Use the model's original chat template, or pass template='chatml' to measure without thinking."
        )
    if not template.opening and not end.endswith(template.think_open):
        raise TemplateError(
            f"Template {template.name!r} expects a generation prompt that opens thinking, but it ends in "
            f"{rendered[-60:]!r}. Pass template=None to detect it, or one whose opening is not empty."
        )
    return rendered


def opening_ids(tokenizer: PreTrainedTokenizerBase, template: Template, rendered: str) -> list[int]:
    """Token ids to splice after the generation prompt so that thinking is open exactly once.

    Args:
        tokenizer: Encodes the opening.
        template: The convention.
        rendered: The generation prompt, from `generation_prompt`.

    Returns:
        Ids of the opening; none where the prompt has opened thinking already.
    """
    if not template.thinks or rendered.rstrip().endswith(template.think_open):
        return []
    return encode(tokenizer, template.opening)


def closing_ids(tokenizer: PreTrainedTokenizerBase, template: Template, *, after_newline: bool = False) -> list[int]:
    """Token ids of the closing, encoded once and on its own so that no text around it can change them.

    Args:
        tokenizer: Encodes the closing.
        template: The convention.
        after_newline: The thinking's last token carries the newline with which the closing begins, as `.` and a
            newline do in Qwen's vocabulary, so the closing goes without it.

    Returns:
        Ids; none for a template without thinking, whose closing is the tail of each prompt.
    """
    return encode(tokenizer, template.closing.removeprefix("\n") if after_newline else template.closing)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text without adding BOS or EOS: a chat template writes its own."""
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)] if text else []


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template_kwargs: Mapping[str, bool]
) -> str:
    """Render the generation prompt as text, exactly as the tokenizer's chat template writes it.

    Args:
        tokenizer: With a chat template.
        messages: Turns with `role` and `content`.
        template_kwargs: Switches for the chat template.

    Returns:
        The text.

    Raises:
        TemplateError: There is no chat template, or it refuses these messages.
    """
    _source(tokenizer)
    turns = [dict(turn) for turn in messages]
    # Switches of a chat template are free keyword arguments, which the typed signature does not know.
    render: Callable[..., object] = tokenizer.apply_chat_template
    try:
        rendered = render(turns, tokenize=False, add_generation_prompt=True, **dict(template_kwargs))
    except (JinjaError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        roles = ", ".join(turn.get("role", "?") for turn in turns)
        raise TemplateError(
            f"The chat template cannot render messages with the roles {roles}: {error}. "
            "Expected roles that the model knows (some know no system role); change the messages or the template."
        ) from error
    return str(rendered)


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or not source.strip():
        raise TemplateError(
            "The tokenizer has no chat template, so no prompt can be rendered. "
            "Set tokenizer.chat_template to the model's own jinja text."
        )
    return source
