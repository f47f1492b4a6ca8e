import copy
import functools
import os
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import check_documented
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cliffscope import registry
from cliffscope.errors import TemplateError, UnclearTemplateError
from cliffscope.transcripts.families import Earlier
from cliffscope.transcripts.templates import (
    TEMPLATES,
    Template,
    closing_ids,
    detect_template,
    encode,
    find_template,
    generation_prompt,
    opening_ids,
    resolve_template,
    stop_sequences,
    turn_end,
)

SHARED = Path(os.environ.get("CLIFFSCOPE_SHARED", Path(__file__).parents[2] / "shared")) / "data"
USER = [{"role": "user", "content": "Hello"}]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
ORGANISM = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

DETECTED = [
    ("xinference__deepseek-r1-distill-qwen", "r1-distill"),
    ("xinference__deepseek-r1-distill-llama", "r1-distill"),
    ("xinference__deepseek-r1", "r1-distill"),
    ("llamacpp__llama-cpp-deepseek-r1", "r1-distill"),
    ("llamacpp__deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "r1-distill"),
    ("llamacpp__deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "r1-distill"),
    ("xinference__skywork-or1-preview", "r1-distill"),
    ("gguf__DeepSeek-R1-Distill-Qwen-7B", "r1-distill-old"),
    ("xinference__skywork-or1", "r1-distill-old"),
    ("xinference__deepseek-r1-0528-qwen3", "r1-distill-old"),
    ("llamacpp__deepseek-ai-DeepSeek-V3.1", "deepseek-v3.1"),
    ("xinference__QwQ-32B", "qwq"),
    ("llamacpp__Qwen-QwQ-32B", "qwq"),
    ("llamacpp__Qwen-Qwen3-0.6B", "qwen3"),
    ("trl__qwen3", "qwen3"),
    ("ortext__qwen3", "qwen3"),
    ("xinference__qwen3", "qwen3"),
    ("xinference__Qwen3-Thinking", "qwen3-thinking"),
    ("xinference__Qwen3-Next-Thinking", "qwen3-thinking"),
    ("llamacpp__Qwen3.5-4B", "qwen3-thinking"),
    ("trl__qwen3_5_think", "qwen3-thinking"),
    ("ortext__qwen2.5", "chatml"),
    ("gguf__Qwen2.5-Coder-0.5B-Instruct", "chatml"),
    ("gguf__SmolLM2-135M-Instruct", "chatml"),
    ("xinference__vibethinker", "chatml"),
    ("openinstruct__olmo_thinker_no_think_7b", "chatml"),
    ("openinstruct__olmo_thinker_no_think_sft_tokenization", "chatml"),
    ("ortext__smollm3", "smollm3"),
    ("llamacpp__HuggingFaceTB-SmolLM3-3B", "smollm3"),
    ("llamacpp__NVIDIA-Nemotron-Nano-v2", "nemotron-nano-v2"),
    ("llamacpp__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron-3"),
    ("trl__nemotron_3_nano", "nemotron-3"),
    ("openinstruct__olmo_thinker", "olmo-3"),
    ("openinstruct__olmo_thinker_remove_intermediate_thinking", "olmo-3"),
    ("phi-4-reasoning__RECONSTRUCTED", "phi-4"),
    ("ortext__phi-4-mini-reasoning", "phi-4-mini"),
    ("magistral__unsloth-Magistral-Small-2509", "magistral"),
    ("llamacpp__mistralai-Ministral-3-14B-Reasoning-2512", "magistral"),
    ("llamacpp__openai-gpt-oss-120b", "harmony"),
    ("ortext__gpt-oss", "harmony"),
    ("trl__gptoss", "harmony"),
    ("xinference__gpt-oss", "harmony"),
]
NAMES = dict(DETECTED)
# Renders reasoning, but nothing says that the model writes any: as it stands, a model that thinks may have it, too.
ASKED = {"xinference__Qwen3-Instruct"}
# Vocabularies in which the models of a template would find their tags; those without thinking have none.
VOCABULARIES = {
    **dict.fromkeys(("r1-distill", "r1-distill-old", "deepseek-v3.1"), "deepseek_r1_distill_qwen_from_gguf"),
    "harmony": "lenml_gptoss",
    "chatml": "smollm2_from_gguf",
}
THINKING = [pair for pair in DETECTED if pair[1] != "chatml"]
# Copies of other hands: these do with earlier thinking, or with an answered turn, as the original does not.
EDITED = {"openinstruct__olmo_thinker_remove_intermediate_thinking", "ortext__gpt-oss"}
UNKNOWN = [
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}[reasoning]",
    CHATML.replace("assistant\n", "assistant\n<thinking>\n"),
]


def build_word_tokenizer(
    chat_template: str, words: str = "", *, tags: tuple[str, ...] = ("<think>", "</think>")
) -> PreTrainedTokenizerFast:
    """One token a word, newlines of their own, decoding by joining; tags are added tokens."""
    marks = ["<pad>", "<unk>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"]
    plain = [*("\n", "\n\n", "user", "assistant", "system"), *dict.fromkeys(w for w in words.split(" ") if w)]
    plain += [f" {word}" for word in plain[2:]]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*marks, *tags, *plain])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n| ?[A-Za-z0-9']+| ?[^\sA-Za-z0-9]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", unk_token="<unk>", pad_token="<pad>", chat_template=chat_template
    )


@functools.cache
def load_once(path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(path)


def shared_tokenizer(folder: str, template_file: str) -> PreTrainedTokenizerFast:
    path, template = SHARED / "tokenizers" / folder, SHARED / "templates" / f"{template_file}.jinja"
    if not path.is_dir() or not template.is_file():
        pytest.skip(f"the shared test data are absent: {path} or {template}; set CLIFFSCOPE_SHARED")
    tokenizer = copy.copy(load_once(path))
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def test_every_published_chat_template_is_tried() -> None:
    folder = SHARED / "templates"
    if not folder.is_dir():
        pytest.skip(f"the shared test data are absent: {folder}; set CLIFFSCOPE_SHARED")
    assert {p.stem for p in folder.glob("*.jinja")} == {*NAMES, *ASKED}


@pytest.mark.parametrize(("file", "name"), DETECTED)
def test_a_published_chat_template_is_detected(file: str, name: str) -> None:
    template, family = detect_template(shared_tokenizer(vocabulary(name), file)), TEMPLATES.get(name)
    for field in ("name", "think_open", "think_close", "opening", "closing", "thinks"):
        assert getattr(template, field) == getattr(family, field)
    assert ("closing" if template.thinks else "thinks") in template.evidence


@pytest.mark.parametrize("file", sorted(ASKED))
def test_a_published_chat_template_that_shows_too_little_is_asked_about(file: str) -> None:
    with pytest.raises(UnclearTemplateError, match="nothing says that the model writes any") as error:
        detect_template(shared_tokenizer("lenml_qwen3", file))
    assert error.value.answer["closing"] == "\n</think>\n\n"


@pytest.mark.parametrize("file", [file for file, name in DETECTED if name == "chatml"])
def test_a_silent_chat_template_over_a_vocabulary_with_tags_is_asked_about(file: str) -> None:
    with pytest.raises(UnclearTemplateError, match=r"the vocabulary has <think> and </think>.*template='plain'"):
        detect_template(shared_tokenizer("lenml_qwen3", file))


ENDS = {
    **dict.fromkeys(("r1-distill", "r1-distill-old", "deepseek-v3.1"), "<｜end▁of▁sentence｜>"),
    "nemotron-nano-v2": "\n<SPECIAL_12>",
    "phi-4-mini": "<|end|>",
    "harmony": "<|return|>",
}


@pytest.mark.parametrize(("file", "name"), DETECTED)
def test_a_turn_of_a_published_chat_template_ends_as_it_renders_it(file: str, name: str) -> None:
    tokenizer = shared_tokenizer(vocabulary(name), file)
    tokenizer.eos_token, expected = "<|im_end|>", ENDS.get(name, "<|im_end|>")
    expected = "<|end|>" if file == "ortext__gpt-oss" else expected
    template = detect_template(tokenizer)
    assert template.end == expected
    assert tokenizer.decode(turn_end(tokenizer, template)) == expected
    stops = [tokenizer.decode(ids) for ids in stop_sequences(tokenizer, template)]
    assert stops == [*dict.fromkeys([expected.strip(), *(["<|im_end|>"] if stops[1:] else [])])]


def vocabulary(name: str) -> str:
    return VOCABULARIES.get(name, "lenml_qwen3")


@pytest.mark.parametrize(("file", "name"), THINKING)
def test_thinking_is_opened_exactly_once_for_every_published_template(file: str, name: str) -> None:
    tokenizer = shared_tokenizer("lenml_qwen3", file)
    template = TEMPLATES.get(name)
    rendered = generation_prompt(tokenizer, USER, template)
    spliced = tokenizer.decode(opening_ids(tokenizer, template, rendered))
    end = (rendered + spliced)[rendered.rindex("Hello") :]
    assert end.count(template.think_open) == 1
    assert end.rstrip().endswith(template.think_open)


def rendered_text(file: str, turns: list[dict[str, str]], **switches: bool) -> str:
    tokenizer = shared_tokenizer("lenml_qwen3", file)
    return tokenizer.apply_chat_template(turns, tokenize=False, **switches)


@pytest.mark.parametrize("source", UNKNOWN)
def test_an_unknown_chat_template_is_refused_with_the_way_out(source: str) -> None:
    with pytest.raises(TemplateError, match=r"no known convention.*template=NAME.*\.json.*Template\(name="):
        detect_template(build_word_tokenizer(source))


@pytest.mark.parametrize(
    ("file", "name"), [p for p in THINKING if TEMPLATES.get(p[1]).closing_seen and p[0] not in EDITED]
)
def test_a_closing_that_is_said_to_be_seen_is_what_a_rendered_answer_holds(file: str, name: str) -> None:
    turn = {"role": "assistant", "content": "ANSWER", "reasoning_content": "THOUGHT", "thinking": "THOUGHT"}
    rendered = rendered_text(file, [*USER, turn])
    assert f"THOUGHT{TEMPLATES.get(name).closing}ANSWER" in rendered


@pytest.mark.parametrize(("file", "name"), [pair for pair in THINKING if TEMPLATES.get(pair[1]).off])
def test_a_switch_that_is_said_to_turn_thinking_off_does(file: str, name: str) -> None:
    template = TEMPLATES.get(name)
    prompt = rendered_text(file, USER, add_generation_prompt=True, **template.off)
    assert not prompt.endswith(template.prompt_end)
    assert prompt.rstrip().endswith(template.think_close)


@pytest.mark.parametrize(("file", "name"), [pair for pair in THINKING if pair[0] not in EDITED])
def test_earlier_thinking_is_kept_or_dropped_as_is_said(file: str, name: str) -> None:
    template = TEMPLATES.get(name)
    said = f"{template.think_open}\nTHOUGHT{template.closing}ANSWER"
    # gpt-oss has a field of its own for thinking; all others are given it as the model wrote it.
    told = {"content": "ANSWER", "thinking": "THOUGHT"} if name == "harmony" else {"content": said}
    turns = [*USER, {"role": "assistant", **told}, {"role": "user", "content": "More"}]
    rendered = rendered_text(file, turns, add_generation_prompt=True, **template.template_kwargs)
    assert ("THOUGHT" in rendered) == (template.earlier is Earlier.KEPT)
    assert "ANSWER" in rendered


HERMES = (
    "{% if thinking is defined and thinking %}<|im_start|>system\nThink inside <think> </think> tags.<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if keep_cots is defined and keep_cots %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_convention_of_hermes_4_is_detected_from_what_its_card_describes() -> None:
    template = detect_template(build_word_tokenizer(HERMES))
    assert template.name == "hermes-4"
    assert "tags" in generation_prompt(build_word_tokenizer(HERMES), USER, template)


LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def test_a_chat_template_of_another_kind_that_never_mentions_thinking_is_plain() -> None:
    assert detect_template(build_word_tokenizer(LLAMA, tags=())).name == "plain"


def test_a_template_of_the_users_own_is_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"think_open": "<t>", "think_close": "</t>", "opening": "<t>", "closing": "</t>\\n"}')
    own = resolve_template(str(path), build_word_tokenizer(CHATML))
    assert own == Template(name="mine", think_open="<t>", think_close="</t>", opening="<t>", closing="</t>\n")
    for broken in ("[]", "{", '{"think_open": "<t>"}', '{"tag": 1}'):
        path.write_text(broken)
        with pytest.raises(TemplateError, match="holds no template"):
            resolve_template(str(path), build_word_tokenizer(CHATML))
    with pytest.raises(TemplateError, match="holds no template"):
        resolve_template(str(tmp_path / "none.json"), build_word_tokenizer(CHATML))


THEIRS = Template(
    name="theirs", think_open="<t>", think_close="</t>", opening="", closing="</t>\n", prompt_end="[GO]<t>"
)
THEIR_CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}[GO]<t>{# reasoning #}"


def test_a_template_of_a_module_or_an_installed_package_is_found_and_the_latter_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = build_word_tokenizer(THEIR_CHAT)
    assert resolve_template(f"{__name__}:THEIRS", tokenizer) is THEIRS
    with pytest.raises(TemplateError, match="follows no known convention"):
        detect_template(tokenizer)

    def points(group: str) -> list[EntryPoint]:
        assert group == "cliffscope.templates"
        return [EntryPoint("theirs", f"{__name__}:THEIRS", group), EntryPoint("broken", "no_such_module:x", group)]

    monkeypatch.setattr(registry, "entry_points", points)
    assert find_template("theirs") is THEIRS
    assert detect_template(tokenizer) == THEIRS
    assert detect_template(build_word_tokenizer(CHATML, tags=())).name == "chatml", "a built-in one comes first"
    with pytest.raises(TemplateError, match="no_such_module"):
        find_template("broken")
    with pytest.raises(TemplateError, match="not a template"):
        find_template(f"{__name__}:THEIR_CHAT")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "expected text"),
        ({"thinks": False}, "thinks=False"),
        ({"closing": "\n"}, "must contain think_close"),
    ],
)
def test_a_template_whose_fields_contradict_each_other_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        replace(THEIRS, **changes)


def test_a_closing_without_its_tag_is_refused() -> None:
    with pytest.raises(TemplateError, match="must contain think_close"):
        Template(name="odd", think_open="<t>", think_close="</t>", opening="", closing="\n")


def test_closing_ids_are_those_of_the_vocabulary() -> None:
    qwen = shared_tokenizer("lenml_qwen3", "llamacpp__Qwen-Qwen3-0.6B")
    assert closing_ids(qwen, TEMPLATES.get("qwen3")) == [198, 151668, 271]
    assert closing_ids(qwen, TEMPLATES.get("qwen3"), after_newline=True) == [151668, 271]
    r1 = shared_tokenizer("deepseek_r1_distill_qwen_from_gguf", "xinference__deepseek-r1-distill-qwen")
    assert closing_ids(r1, TEMPLATES.get("r1-distill")) == [198, 151649, 271]


def test_a_vocabulary_without_the_tag_spells_it_in_several_tokens() -> None:
    smollm = shared_tokenizer("smollm2_from_gguf", "gguf__SmolLM2-135M-Instruct")
    ids = closing_ids(smollm, TEMPLATES.get("chatml-think"))
    assert len(ids) == 5
    assert smollm.decode(ids) == TEMPLATES.get("chatml-think").closing


def test_a_template_that_closes_thinking_at_once_is_refused() -> None:
    tokenizer = shared_tokenizer("lenml_qwen3", "llamacpp__Qwen-QwQ-32B")
    off = Template(name="off", think_open="<think>", think_close="</think>", opening="", closing="\n</think>\n\n")
    with pytest.raises(TemplateError, match="closes thinking immediately"):
        generation_prompt(tokenizer, USER, off)
    assert generation_prompt(tokenizer, USER, TEMPLATES.get("qwq")).endswith("<think>\n")


def test_the_organism_template_is_detected_without_any_file() -> None:
    tokenizer = build_word_tokenizer(ORGANISM)
    assert detect_template(tokenizer).name == "organism"
    assert tokenizer.decode(closing_ids(tokenizer, TEMPLATES.get("organism"))) == "\n</think>\n\n"


def test_a_chat_template_that_never_mentions_thinking_is_one_without() -> None:
    template = detect_template(build_word_tokenizer(CHATML, tags=()))
    assert template.name == "chatml"
    assert not template.thinks
    assert closing_ids(build_word_tokenizer(CHATML), template) == []


def test_a_template_that_expects_an_open_tag_refuses_a_prompt_without_it() -> None:
    with pytest.raises(TemplateError, match="expects a generation prompt that opens thinking"):
        generation_prompt(build_word_tokenizer(CHATML), USER, TEMPLATES.get("qwen3-thinking"))


def test_the_opening_is_not_doubled_where_the_prompt_opened_thinking() -> None:
    tokenizer = build_word_tokenizer(CHATML + "{{ '<think>\n' }}")
    rendered = generation_prompt(tokenizer, USER, TEMPLATES.get("chatml-think"))
    assert opening_ids(tokenizer, TEMPLATES.get("chatml-think"), rendered) == []


def test_a_missing_chat_template_is_named() -> None:
    tokenizer = build_word_tokenizer(CHATML)
    tokenizer.chat_template = None
    for call in (
        lambda: detect_template(tokenizer),
        lambda: generation_prompt(tokenizer, USER, TEMPLATES.get("chatml")),
    ):
        with pytest.raises(TemplateError, match="no chat template"):
            call()


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no system role') }}", "{% for %}", "{{ messages[5].content }}"]
)
def test_a_chat_template_that_fails_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot render messages with the roles user"):
        generation_prompt(build_word_tokenizer(source), USER, TEMPLATES.get("chatml"))


def test_resolve_takes_a_name_a_template_or_nothing() -> None:
    tokenizer = build_word_tokenizer(ORGANISM)
    own = Template(name="own", think_open="<t>", think_close="</t>", opening="<t>", closing="</t>")
    assert resolve_template("qwen3", tokenizer) is TEMPLATES.get("qwen3")
    assert resolve_template(own, tokenizer) is own
    assert resolve_template(None, tokenizer).name == "organism"
    with pytest.raises(
        TemplateError, match=r"There is no template 'qwen9'\. Expected one of .*r1-distill.*package.module:name.*\.json"
    ):
        resolve_template("qwen9", tokenizer)


def test_no_text_encodes_to_no_ids() -> None:
    assert encode(build_word_tokenizer(CHATML), "") == []


def test_every_template_that_thinks_closes_with_its_own_tag() -> None:
    for name, template in TEMPLATES:
        assert template.name == name
        assert template.thinks == bool(template.think_close)
        assert template.think_close in template.closing
        assert template.opening.startswith(template.think_open) or not template.opening


def code(text: str) -> str:
    return f"`{text!r}`".replace("|", "\\|").replace("'", "") if text else ""


def test_the_documented_published_templates_are_detected_as_documented() -> None:
    lines = ["| file | result | opening | closing | end of turn | closing from |", "|---" * 6 + "|"]
    for file in sorted((*NAMES, *ASKED)):
        tokenizer = shared_tokenizer(vocabulary(NAMES.get(file, "qwen3")), file)
        try:
            t = detect_template(tokenizer)
        except UnclearTemplateError as error:
            lines.append(f"| {file} | asked: {error.question.partition('?')[0]}? | | | | |")
            continue
        place = t.evidence.get("closing", "").partition(":")[0]
        cells = (file, t.name, code(t.opening), code(t.closing), code(t.end), place)
        lines.append("| " + " | ".join(cells) + " |")
    check_documented("published templates", "\n".join(lines) + "\n")


def test_the_documented_templates_are_those_that_are_known() -> None:
    lines = [
        "| template | models | generation prompt ends in | closing | seen | earlier thinking | off |",
        "|---" * 7 + "|",
    ]
    for _, t in TEMPLATES:
        seen = {True: "yes", False: "no"}[t.closing_seen] if t.thinks else ""
        off = ", ".join(f"`{k}={v}`" for k, v in t.off.items())
        earlier = str(t.earlier) if t.thinks else ""
        cells = (t.name, t.models, code(t.prompt_end), code(t.closing), seen, earlier, off)
        lines.append("| " + " | ".join(cells) + " |")
    check_documented("templates", "\n".join(lines) + "\n")
