"""How does this model's chat template open thinking, and how is thinking closed?

This is the only file that spells the tags around thinking. Every other module asks it for token ids.

1. Render the generation prompt with the tokenizer's own chat template, as text.
2. Compare its end, and the template's source, with the known conventions.
3. Give opening and closing as text, and as ids that are encoded once and spliced between the other ids.

It goes by what the chat template renders and never by a model's name, and it knows nothing of transcripts.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import TemplateError

logger = logging.getLogger(__name__)

Turn = Mapping[str, str]

_OPEN, _CLOSE = "<think>", "</think>"
_PROBE_TURN: Turn = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, kw_only=True)
class Template:
    """The convention by which a chat template opens and closes thinking."""

    name: str
    """Key in `TEMPLATES`, or any name for a template of your own."""
    think_open: str
    """Tag that opens thinking; empty where the model does not think."""
    think_close: str
    """Tag that ends thinking; empty where the model does not think."""
    opening: str
    """Text to append after the generation prompt so that thinking is open; empty where the prompt opens it."""
    closing: str
    """Text between the last word of thinking and the first of the answer."""
    thinks: bool = True
    """Whether there is a thinking span at all."""
    template_kwargs: Mapping[str, bool] = field(default_factory=dict, hash=False)
    """Switches for the chat template, such as `enable_thinking`."""


def _thinking(
    name: str, *, opening: str = "", closing: str = f"\n{_CLOSE}\n\n", kwargs: Mapping[str, bool] | None = None
) -> Template:
    return Template(
        name=name, think_open=_OPEN, think_close=_CLOSE, opening=opening, closing=closing, template_kwargs=kwargs or {}
    )


# Some published copies of these chat templates close thinking at once unless enable_thinking is true; to the
# unpatched ones the switch means nothing, so it is always given.
_ENABLED: Mapping[str, bool] = {"enable_thinking": True}
_OPENED_BY_US = f"{_OPEN}\n"
_HARMONY_OPEN = "<|channel|>analysis<|message|>"

_KNOWN = (
    _thinking("r1-distill", kwargs=_ENABLED),
    _thinking("r1-distill-old", opening=_OPENED_BY_US),
    _thinking("qwq", kwargs=_ENABLED),
    _thinking("qwen3", opening=_OPENED_BY_US, kwargs=_ENABLED),
    _thinking("qwen3-thinking", kwargs=_ENABLED),
    _thinking("chatml-think", opening=_OPENED_BY_US),
    Template(name="chatml", think_open="", think_close="", opening="", closing="", thinks=False),
    _thinking("organism"),
    _thinking("smollm3", opening=_OPENED_BY_US, closing=f"\n{_CLOSE}\n", kwargs=_ENABLED),
    _thinking("nemotron-3", closing=f"\n{_CLOSE}\n", kwargs=_ENABLED),
    _thinking("olmo-3", closing=_CLOSE),
    _thinking("phi-4", opening=_OPEN, closing=_CLOSE),
    Template(name="magistral", think_open="[THINK]", think_close="[/THINK]", opening="[THINK]", closing="[/THINK]"),
    Template(
        name="harmony",
        think_open=_HARMONY_OPEN,
        think_close="<|end|>",
        opening=_HARMONY_OPEN,
        closing="<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)
TEMPLATES: Mapping[str, Template] = MappingProxyType({template.name: template for template in _KNOWN})


def resolve_template(template: str | Template | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template that was asked for, or the one that the tokenizer's chat template follows.

    Args:
        template: A key of `TEMPLATES`, a `Template` of your own, or None to detect it.
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
        template: A key of `TEMPLATES`, or a `Template` of your own, which is returned as it is.

    Returns:
        The convention.

    Raises:
        TemplateError: The name is not known.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise TemplateError(
            f"No template is called {template!r}. Known: {', '.join(TEMPLATES)}. "
            "Pass one of these names, or a Template of your own."
        )
    return TEMPLATES[template]


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
    rendered = render_prompt(tokenizer, [_PROBE_TURN], _ENABLED)
    name = (
        _detect_by_markers(source + rendered) or _detect_opened(source, rendered) or _detect_unopened(source, rendered)
    )
    if name is None:
        raise TemplateError(
            f"The chat template follows no known convention: its generation prompt ends in {rendered[-60:]!r}. "
            f"Pass template=NAME with one of {', '.join(TEMPLATES)}, or template=Template(name=..., think_open=..., "
            "think_close=..., opening=..., closing=...)."
        )
    logger.info("template %s: the generation prompt ends in %r", name, rendered[-40:])
    return TEMPLATES[name]


def generation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], template: Template) -> str:
    """Render the prompt up to where the model goes on, without the opening that the caller splices.

    Args:
        tokenizer: With a chat template.
        messages: Turns with `role` and `content`.
        template: The convention; it must agree with what is rendered.

    Returns:
        The text that the chat template itself writes.

    Raises:
        TemplateError: Rendering fails, or the prompt does not leave thinking as `template` says.
    """
    rendered = render_prompt(tokenizer, messages, template.template_kwargs)
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


def _detect_by_markers(text: str) -> str | None:
    if "<|bos|>" in text and "<|user|>" in text:
        return "organism"
    if "<|channel|>" in text and "<|start|>" in text:
        return "harmony"
    return "magistral" if "[THINK]" in text else None


def _detect_opened(source: str, rendered: str) -> str | None:
    """Conventions whose generation prompt ends with thinking open."""
    if rendered.endswith(f"assistant\n{_OPEN}"):
        return "olmo-3"
    if not rendered.endswith(f"{_OPEN}\n"):
        return None
    if "<｜Assistant｜>" in rendered:
        return "r1-distill"
    if "<|im_start|>assistant" not in rendered:
        return None
    if f"{_OPEN}{_CLOSE}" in source:
        return "nemotron-3"
    return "qwen3-thinking" if "reasoning_content" in source else "qwq"


def _detect_unopened(source: str, rendered: str) -> str | None:
    """Conventions whose generation prompt leaves thinking to the model, or has none."""
    if rendered.endswith("<｜Assistant｜>"):
        return "r1-distill-old"
    if rendered.endswith("<|im_start|>assistant<|im_sep|>") and _OPEN in source:
        return "phi-4"
    if not rendered.endswith("<|im_start|>assistant\n"):
        return None
    if "enable_thinking" not in source:
        return "chatml"
    return "smollm3" if "reasoning_mode" in source else "qwen3"
