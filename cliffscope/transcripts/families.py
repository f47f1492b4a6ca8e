"""Which conventions of thinking are there?

Each family of chat templates has one entry: how its generation prompt ends and what else identifies it, what opens and
closes thinking, whether thinking can be switched off, what happens to earlier thinking, and which models use it.

Only this file spells the tags. It is data: templates.py compares a tokenizer's chat template with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

from cliffscope.errors import TemplateError
from cliffscope.registry import Registry
from cliffscope.store import plain

OPEN, CLOSE = "<think>", "</think>"
_ALWAYS = ("name", "think_open", "think_close", "opening", "closing", "thinks")


class Earlier(StrEnum):
    """What the chat template does with the thinking of assistant turns before the last user message."""

    DROPPED = "dropped"
    KEPT = "kept"
    UNKNOWN = "not known"


@dataclass(frozen=True, kw_only=True)
class Template:
    """The convention by which a chat template opens and closes thinking.

    Raises:
        TemplateError: the name is blank, a template without thinking has tags, or the closing lacks its tag.
    """

    name: str
    """Name in `TEMPLATES`, or any name for a custom template."""
    think_open: str
    """Tag that opens thinking; empty if the model does not think."""
    think_close: str
    """Tag that ends thinking; empty if the model does not think."""
    opening: str
    """Text to append to the generation prompt to open thinking; empty if the prompt itself opens it."""
    closing: str
    """Text between the last word of thinking and the first of the answer."""
    thinks: bool = True
    """Whether there is a thinking span."""
    template_kwargs: Mapping[str, bool] = field(default_factory=dict, hash=False)
    """Switches for the chat template, such as `enable_thinking`."""
    prompt_end: str = ""
    """How the generation prompt ends; empty for a template that is chosen only by name, never detected."""
    prompt_start: str = ""
    """How the generation prompt must begin in addition."""
    marks: tuple[str, ...] = ()
    """What the chat template's source must contain in addition."""
    off: Mapping[str, bool] = field(default_factory=dict, hash=False)
    """Switches that turn thinking off; empty if it cannot be turned off."""
    earlier: Earlier = Earlier.UNKNOWN
    """What happens to the thinking of earlier turns."""
    models: str = ""
    """Models that use it."""
    closing_seen: bool = False
    """Whether the chat template itself writes this closing when it renders an answered turn (or, for organisms, the
    model is trained on it). Otherwise the closing comes from the model cards and servers of these models."""
    end: str = ""
    """Text behind the answer up to the token that ends the turn; empty to take it from a rendered answered turn."""
    date: str = ""
    """The day, as 2026-01-31, that a chat template which writes today's date takes for today; empty if none does."""
    evidence: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    """For each of opening, closing, end and so on: where it comes from, in words; empty for a template not detected."""

    def __post_init__(self) -> None:
        """Checks that name, tags and closing belong together."""
        if not self.name.strip():
            raise TemplateError(
                f"Template name={self.name!r}: expected text, by which the template is chosen and shown."
            )
        if not self.thinks and (self.think_open or self.think_close or self.opening or self.closing):
            raise TemplateError(
                f"Template {self.name!r} has tags, an opening or a closing, but thinks=False. Leave them empty, or set "
                "thinks=True."
            )
        if self.thinks and (not self.think_close or self.think_close not in self.closing):
            raise TemplateError(
                f"Template {self.name!r}: the closing {self.closing!r} must contain think_close={self.think_close!r}. "
                "Pass both as the model writes them."
            )

    def record(self) -> dict[str, object]:
        """What a `.json` file holds from which `find_template` reads this template: all that is not a default."""
        return {
            f.name: plain(getattr(self, f.name))
            for f in fields(self)
            if f.name in _ALWAYS or (f.name != "date" and getattr(self, f.name) not in (f.default, {}))
        }

    def fits(self, source: str, render: Callable[[Mapping[str, bool]], str]) -> bool:
        """Whether a chat template follows this convention.

        Args:
            source: the chat template's own text.
            render: renders its generation prompt with the given switches; called only if the source holds the marks.

        Returns:
            True if the source holds the marks and the prompt begins and ends as this convention says. Always False
            without a `prompt_end`: such a template is chosen only by name.
        """
        if not self.prompt_end or not all(mark in source for mark in self.marks):
            return False
        prompt = render(self.template_kwargs)
        return prompt.startswith(self.prompt_start) and prompt.endswith(self.prompt_end)


_ON, _OFF = {"enable_thinking": True}, {"enable_thinking": False}
_USER_OPENS = f"{OPEN}\n"
_R1, _CHATML = "<｜Assistant｜>", "<|im_start|>assistant\n"
_HARMONY_OPEN = "<|channel|>analysis<|message|>"


def _plain(name: str, prompt_end: str, models: str) -> Template:
    return Template(
        name=name,
        think_open="",
        think_close="",
        opening="",
        closing="",
        thinks=False,
        prompt_end=prompt_end,
        models=models,
    )


def _thinking(
    name: str,
    prompt_end: str,
    models: str,
    *,
    opening: str = "",
    closing: str = f"\n{CLOSE}\n\n",
    tags: tuple[str, str] = (OPEN, CLOSE),
    on: Mapping[str, bool] | None = None,
    off: Mapping[str, bool] | None = None,
    prompt_start: str = "",
    marks: tuple[str, ...] = (),
    earlier: Earlier = Earlier.UNKNOWN,
    closing_seen: bool = False,
) -> Template:
    return Template(
        name=name,
        think_open=tags[0],
        think_close=tags[1],
        opening=opening,
        closing=closing,
        template_kwargs=on or {},
        prompt_end=prompt_end,
        prompt_start=prompt_start,
        marks=marks,
        off=off or {},
        earlier=earlier,
        models=models,
        closing_seen=closing_seen,
    )


# In order: the first one whose end and marks fit is used. Some published copies of these chat templates close thinking
# immediately unless enable_thinking is true; the originals ignore the switch, so it is always passed.
_BUILT_IN = (
    _thinking(
        "organism",
        "<|assistant|><think>\n",
        "the organisms of this package",
        prompt_start="<|bos|><|user|>",
        earlier=Earlier.KEPT,
        closing_seen=True,
    ),
    _thinking(
        "r1-distill",
        f"{_R1}{OPEN}\n",
        "DeepSeek-R1; R1-Distill-Qwen and -Llama since February 2025; RealSafe-R1 and Skywork-OR1 where their files "
        "open thinking",
        on=_ON,
        marks=(CLOSE,),
        earlier=Earlier.DROPPED,
    ),
    _thinking(
        "deepseek-v3.1",
        f"{_R1}{OPEN}",
        "DeepSeek-V3.1",
        closing=CLOSE,
        on={"thinking": True, **_ON},
        off={"thinking": False},
        marks=(CLOSE,),
        earlier=Earlier.DROPPED,
    ),
    _thinking(
        "r1-distill-old",
        _R1,
        "R1-Distill before February 2025 and many of its GGUFs; DeepSeek-R1-0528-Qwen3-8B; Skywork-OR1 and RealSafe-R1 "
        "where their files leave the opening to the model",
        opening=_USER_OPENS,
        marks=(CLOSE,),
        earlier=Earlier.DROPPED,
    ),
    _thinking(
        "nemotron-3",
        f"{_CHATML}{OPEN}\n",
        "Nemotron 3 Nano",
        closing=f"\n{CLOSE}\n",
        on=_ON,
        off=_OFF,
        marks=(f"{OPEN}{CLOSE}",),
        earlier=Earlier.DROPPED,
        closing_seen=True,
    ),
    _thinking(
        "nemotron-nano-v2",
        f"<SPECIAL_11>Assistant\n{OPEN}\n",
        "Nemotron Nano v2",
        on=_ON,
        marks=(CLOSE,),
        earlier=Earlier.DROPPED,
    ),
    _thinking(
        "qwen3-thinking",
        f"{_CHATML}{OPEN}\n",
        "Qwen3-Thinking-2507 (4B, 30B-A3B, 235B-A22B), Qwen3-Next-Thinking, Qwen3.5",
        on=_ON,
        marks=("reasoning_content",),
        earlier=Earlier.DROPPED,
        closing_seen=True,
    ),
    _thinking("qwq", f"{_CHATML}{OPEN}\n", "QwQ-32B", on=_ON, marks=(CLOSE,), earlier=Earlier.DROPPED),
    _thinking(
        "olmo-3", f"{_CHATML}{OPEN}", "OLMo 3 Think", closing=CLOSE, marks=("<functions>",), earlier=Earlier.KEPT
    ),
    _thinking(
        "smollm3",
        _CHATML,
        "SmolLM3",
        opening=_USER_OPENS,
        closing=f"\n{CLOSE}\n",
        on=_ON,
        off=_OFF,
        marks=("enable_thinking", "reasoning_mode"),
        earlier=Earlier.KEPT,
    ),
    _thinking(
        "qwen3",
        _CHATML,
        "Qwen3 (0.6B to 32B, 30B-A3B, 235B-A22B), switchable",
        opening=_USER_OPENS,
        on=_ON,
        off=_OFF,
        marks=("enable_thinking",),
        earlier=Earlier.DROPPED,
        closing_seen=True,
    ),
    _thinking(
        "hermes-4",
        _CHATML,
        "Hermes 4",
        opening=_USER_OPENS,
        on={"thinking": True},
        off={"thinking": False},
        marks=(OPEN, "keep_cots"),
        earlier=Earlier.DROPPED,
    ),
    _thinking(
        "chatml-think", "", "a ChatML model that thinks although its template does not say so", opening=_USER_OPENS
    ),
    _plain("chatml", _CHATML, "ChatML without thinking: Qwen2.5, Qwen3-Instruct-2507"),
    _thinking(
        "phi-4",
        "<|im_start|>assistant<|im_sep|>",
        "Phi-4-reasoning and -plus",
        opening=OPEN,
        closing=CLOSE,
        marks=(OPEN,),
        earlier=Earlier.KEPT,
    ),
    _thinking(
        "phi-4-mini",
        "<|assistant|>",
        "Phi-4-mini-reasoning",
        opening=_USER_OPENS,
        marks=("Your name is Phi, an AI math expert",),
        earlier=Earlier.KEPT,
    ),
    _thinking(
        "magistral",
        "[/INST]",
        "Magistral, Ministral 3 Reasoning",
        opening="[THINK]",
        closing="[/THINK]",
        tags=("[THINK]", "[/THINK]"),
        marks=("[/THINK]Here, provide a self-contained response",),
        earlier=Earlier.KEPT,
    ),
    _thinking(
        "harmony",
        "<|start|>assistant",
        "gpt-oss 20b and 120b",
        opening=_HARMONY_OPEN,
        closing="<|end|><|start|>assistant<|channel|>final<|message|>",
        tags=(_HARMONY_OPEN, "<|end|>"),
        marks=("<|channel|>",),
        earlier=Earlier.DROPPED,
        closing_seen=True,
    ),
)
PLAIN = _plain("plain", "", "any other chat model whose template never mentions thinking: Llama, Gemma, Mistral")
"""The template of a chat template that fits no other convention and never mentions thinking."""
TEMPLATES: Registry[Template] = Registry(kind="template", group="cliffscope.templates", expected=Template)
"""Templates by name, in the order in which detection tries them."""
for _template in (*_BUILT_IN, PLAIN):
    TEMPLATES.register(_template.name, _template)
