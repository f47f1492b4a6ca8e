"""Conventions that no family has, each as a small chat template and tokenizer: detected exactly, or asked about."""

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cliffscope.errors import DataError, UnclearTemplateError
from cliffscope.transcripts.templates import (
    detect_template,
    find_template,
    generation_prompt,
    resolve_template,
    write_template,
)

ROLES = ("<|user|>", "<|assistant|>", "<|end|>")


def build_byte_tokenizer(chat_template: str, *added: str) -> PreTrainedTokenizerFast:
    """One token a byte, so that tags which are not added have as many tokens as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<eos>", *added)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", chat_template=chat_template)


@dataclass(frozen=True, kw_only=True)
class Style:
    """A convention, and the chat template that a model of it would come with."""

    opening: str
    closing: str
    think_open: str
    think_close: str
    user: str = "<|user|>"
    assistant: str = "<|assistant|>"
    end: str = "<|end|>"
    prompt_opens: bool = False
    field: str = "reasoning_content"
    switch: str = ""
    system: str = ""
    added: tuple[str, ...] = ROLES

    @property
    def source(self) -> str:
        shown = f"{self.opening}{{{{ m.{self.field} }}}}{self.closing}"
        opened = self.opening if self.prompt_opens else ""
        shut = f"{self.opening}{self.closing}"
        if self.switch:
            opened = f"{{% if {self.switch} is defined and not {self.switch} %}}{shut}{{% else %}}{opened}{{% endif %}}"
        # Newlines at the end of a text are written by an expression, since Jinja drops them behind a block.
        return (
            f"{self.system}{{% for m in messages %}}{{% if m.role == 'user' %}}{self.user}{{{{ m.content }}}}{self.end}"
            f"{{% else %}}{self.assistant}{{% if m.{self.field} %}}{shown}{{% endif %}}{{{{ m.content }}}}{self.end}"
            f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{self.assistant}{opened}{{% endif %}}"
        ).replace("\n", "{{ '\\n' }}")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_byte_tokenizer(self.source, *self.added)


def tagged(think_open: str, think_close: str, *, lines: bool = True, wrapper: str = "", **rest: object) -> Style:
    line = "\n" if lines else ""
    after = f"{line}{line}{wrapper}{line if wrapper else ''}"
    return Style(
        opening=f"{think_open}{line}",
        closing=f"{line}{think_close}{after}",
        think_open=think_open,
        think_close=think_close,
        **rest,  # type: ignore[arg-type]
    )


TAGS = {
    "think": ("<think>", "</think>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "brackets": ("[THINK]", "[/THINK]"),
    "begin of thought": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "unheard of": ("<cogito>", "</cogito>"),
}
WRAPPERS = {"think": "<answer>", "reasoning": "<response>", "cohere": "<|START_RESPONSE|>", "unheard of": "<result>"}
ODD_ROLES = {"user": "@@human: ", "assistant": "\n@@machine:", "end": "<|stop|>", "added": ("<|stop|>",)}


def check(style: Style) -> None:
    template = detect_template(style.tokenizer())
    assert template.thinks
    assert template.think_open == style.think_open
    assert template.think_close == style.think_close
    assert template.opening == ("" if style.prompt_opens else style.opening)
    assert template.closing == style.closing
    assert template.end == style.end
    assert {"thinks", "opening", "closing", "end"} <= set(template.evidence)


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_a_convention_whose_prompt_opens_thinking_is_detected(tags: tuple[str, str], field: str, lines: bool) -> None:
    check(tagged(*tags, lines=lines, field=field, prompt_opens=True))
    check(tagged(*tags, lines=lines, field=field, prompt_opens=True, **ODD_ROLES))
    check(tagged(*tags, lines=lines, field=field, prompt_opens=True, added=(*ROLES, *tags)))


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_a_convention_whose_model_opens_thinking_is_detected_by_a_switch(tags: tuple[str, str], lines: bool) -> None:
    for switch in ("enable_thinking", "thinking", "reasoning"):
        check(tagged(*tags, lines=lines, switch=switch))
        check(tagged(*tags, lines=lines, switch=switch, **ODD_ROLES))
    assert detect_template(tagged(*tags, switch="thinking").tokenizer()).template_kwargs == {"thinking": True}


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_opening_tag_of_an_answers_wrapper_belongs_to_the_closing(name: str, lines: bool) -> None:
    check(tagged(*TAGS[name], lines=lines, wrapper=WRAPPERS[name], prompt_opens=True))
    check(tagged(*TAGS[name], lines=lines, wrapper=WRAPPERS[name], switch="enable_thinking"))


def test_a_model_that_may_open_thinking_itself_is_asked_about_unless_its_prompt_says_so() -> None:
    silent = tagged("<ponder>", "</ponder>")
    with pytest.raises(UnclearTemplateError, match="nothing says that the model writes any") as error:
        detect_template(silent.tokenizer())
    assert error.value.question.startswith("Does the model write thinking")
    assert (error.value.answer["opening"], error.value.answer["closing"]) == (silent.opening, silent.closing)
    check(tagged("<ponder>", "</ponder>", system="Think inside <ponder> and </ponder> first.\n"))


def test_channels_are_detected() -> None:
    gemma = Style(
        opening="<|channel>thought\n",
        closing="<channel|>",
        think_open="<|channel>thought",
        think_close="<channel|>",
        user="<|turn>user\n",
        assistant="<|turn>model\n",
        end="<turn|>",
        switch="enable_thinking",
        added=("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    )
    check(gemma)
    marks = ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>")
    harmony = Style(
        opening="<|channel|>analysis<|message|>",
        closing="<|end|><|start|>assistant<|channel|>final<|message|>",
        think_open="<|channel|>analysis<|message|>",
        think_close="<|end|>",
        user="<|start|>user<|message|>",
        assistant="<|start|>assistant",
        end="<|return|>",
        added=marks,
    )
    template = detect_template(harmony.tokenizer())
    assert (template.name, template.closing, template.end) == ("harmony", harmony.closing, "<|return|>")


def test_a_textual_convention_is_detected_where_it_is_rendered() -> None:
    apriel = Style(
        opening="Here are my reasoning steps:\n",
        closing="\n[BEGIN FINAL RESPONSE]\n",
        think_open="Here are my reasoning steps:",
        think_close="[BEGIN FINAL RESPONSE]",
        prompt_opens=True,
    )
    check(apriel)
    never = apriel.source.replace("m.reasoning_content", "m.nothing")
    with pytest.raises(UnclearTemplateError, match="newlines included") as error:
        detect_template(build_byte_tokenizer(never, *ROLES))
    assert error.value.answer["think_open"] == "Here are my reasoning steps:"


DATED = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_day_that_a_chat_template_writes_is_pinned() -> None:
    tokenizer, user = build_byte_tokenizer(DATED, *ROLES), [{"role": "user", "content": "Hi"}]
    template = resolve_template(None, tokenizer)
    assert template.date == date.today().isoformat()
    old = replace(template, date="2024-02-29")
    assert generation_prompt(tokenizer, user, old).startswith("Today is 29 February 2024.")
    assert resolve_template(old, tokenizer) is old
    assert resolve_template("plain", tokenizer).date == template.date
    assert resolve_template("plain", build_byte_tokenizer(DATED[DATED.index("{% for") :], *ROLES)).date == ""


def test_a_template_that_is_written_and_read_is_the_same(tmp_path: Path) -> None:
    for style in (tagged(*TAGS["seed"], switch="thinking"), tagged(*TAGS["kimi"], prompt_opens=True)):
        template = detect_template(style.tokenizer())
        write_template(template, tmp_path / "mine.json")
        assert find_template(str(tmp_path / "mine.json")) == template
    with pytest.raises(DataError, match=r"does not end in \.json"):
        write_template(template, tmp_path / "mine.txt")


def test_contradictory_renderings_are_asked_about() -> None:
    source = tagged("<think>", "</think>", prompt_opens=True).source
    other = "{% if m.thought %}<think>{{ '\\n' }}{{ m.thought }}</think>{% endif %}"
    both = source.replace("<|assistant|>{% if m.reason", f"<|assistant|>{other}{{% if m.reason")
    assert both != source
    with pytest.raises(UnclearTemplateError, match="contradict each other"):
        detect_template(build_byte_tokenizer(both, *ROLES))


def test_text_around_reasoning_in_the_source_counts_where_no_turn_renders_it() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% if m.tool %}"
        "{{ '<muse_thinking>' + m.tool + '</muse_thinking>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><muse_thinking>{% endif %}"
    )
    template = detect_template(build_byte_tokenizer(source, *ROLES))
    assert (template.opening, template.closing) == ("", "</muse_thinking>\n")
    assert template.evidence["closing"] == "the text that the chat template puts around reasoning"


FOREIGN = {
    "the organisms' roles alone": ("<|user|>", "<|assistant|><think>\n"),
    "DeepSeek's roles alone": ("<｜User｜>", "<｜Assistant｜><think>\n"),
    "Nemotron's roles alone": ("<SPECIAL_10>User\n", "<SPECIAL_11>Assistant\n<think>\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_prompt_that_merely_ends_as_a_known_one_is_asked_about(name: str) -> None:
    user, prompt = FOREIGN[name]
    source = (
        f"{{% for m in messages %}}{user}{{{{ m.content }}}}<|end|>{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    ).replace("\n", "{{ '\\n' }}")
    with pytest.raises(UnclearTemplateError, match="newlines included") as error:
        detect_template(build_byte_tokenizer(source, *ROLES))
    assert error.value.answer["think_open"] == "<think>"


def test_a_family_whose_tags_the_chat_template_never_has_is_not_taken() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</thought>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if enable_thinking %}{% endif %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    family = detect_template(build_byte_tokenizer(source.replace("thought", "think"), "<|im_end|>"))
    assert (family.name, family.evidence["closing"].partition(":")[0]) == ("qwen3", "family")
    with pytest.raises(UnclearTemplateError, match=r"it has </thought>, where </think> was expected"):
        detect_template(build_byte_tokenizer(source, "<|im_end|>"))


def test_a_known_template_with_other_newlines_in_its_source_is_asked_about() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>\n')[-1] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{{ '\n' }}{% endif %}"
    )
    assert detect_template(build_byte_tokenizer(source, "<|im_end|>")).name == "qwq"
    with pytest.raises(UnclearTemplateError, match="was expected"):
        detect_template(build_byte_tokenizer(source.replace("</think>\n'", "</think>\n\n\n'"), "<|im_end|>"))
