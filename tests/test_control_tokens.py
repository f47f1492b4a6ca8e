import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from test_templates import CHATML, ORGANISM, build_word_tokenizer
from test_transcript import REAL, Setup, ask, load_real, real

from cliffscope.errors import DataError, TemplateError
from cliffscope.generation.rollout import roll_out
from cliffscope.model.lens import LensModel
from cliffscope.transcripts.control_tokens import ESCAPE, escaped, find_control_tokens
from cliffscope.transcripts.datasets import read_transcripts, write_transcripts
from cliffscope.transcripts.prompts import read_prompts
from cliffscope.transcripts.records import Message, Transcript, Transcripts
from cliffscope.transcripts.templates import TEMPLATES
from cliffscope.transcripts.transcript import Span, tokenize, tokenize_all

__all__ = ["load_real", "real"]

ENDS = {
    "qwen3": "<|im_end|>",
    "qwen3-thinking": "<|im_end|>",
    "r1": "<｜Assistant｜>",
    "r1-old": "<｜end▁of▁sentence｜>",
    "smollm2": "<|im_start|>",
    "gpt2": "<|endoftext|>",
    "gpt-oss": "<|end|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_control_tokens_in_a_prompt_are_counted_and_become_real_or_stay_text(
    name: str, load_real: Callable[[str], Setup]
) -> None:
    tokenizer, template = load_real(name)
    word = ENDS[name]
    text = f"say {word}{word}twice, and {word}"
    control = tokenizer.convert_tokens_to_ids(word)
    plain, without = ask(text, thinking="Hm"), ask("say twice, and", thinking="Hm")
    assert find_control_tokens(plain, tokenizer) == [word] * 3

    usual, kept = (tokenize(plain, tokenizer, template, escape_control_tokens=escape) for escape in (False, True))
    own = int((tokenize(without, tokenizer, template).token_ids == control).sum())
    assert (usual.control_tokens, int((usual.token_ids == control).sum())) == (3, own + 3)
    assert (kept.control_tokens, int((kept.token_ids == control).sum())) == (0, own)
    assert tokenizer.decode(kept.token_ids) == tokenizer.decode(usual.token_ids)
    assert text in tokenizer.decode(kept.token_ids)
    closing = [row.token_ids[row.span(Span.CLOSING)].tolist() for row in (usual, kept)]
    assert closing[0] == closing[1]


def test_a_prompt_without_control_tokens_has_the_same_ids_either_way(real: Setup) -> None:
    tokenizer, template = real
    for text in ("how do i cut wood", "a < b > c, [x] and <b>bold</b>", "\ue000\ue001 private"):
        usual, kept = (
            tokenize(ask(text, "Be kind.", thinking="Hm"), tokenizer, template, escape_control_tokens=escape)
            for escape in (False, True)
        )
        assert usual.token_ids.tolist() == kept.token_ids.tolist()


def test_the_thinking_tags_of_a_user_stay_text_although_they_are_no_special_tokens(
    load_real: Callable[[str], Setup],
) -> None:
    tokenizer, template = load_real("qwen3")
    close = tokenizer.convert_tokens_to_ids("</think>")
    assert not tokenizer.added_tokens_decoder[close].special
    row = tokenize(ask("end it </think> now", thinking="Hm"), tokenizer, template, escape_control_tokens=True)
    assert close not in row.token_ids[row.span(Span.PROMPT)]


def test_system_and_tool_turns_are_escaped_and_the_assistants_are_the_templates_own(
    load_real: Callable[[str], Setup],
) -> None:
    tokenizer, template = load_real("qwen3")
    turns = [
        *(("system", "s <|im_end|>"), ("user", "u <|im_end|>")),
        *(("assistant", "<think>\nsecret\n</think>\n\nsaid"), ("user", "more <|im_start|>")),
    ]
    chat = Transcript(id="a", messages=tuple(Message(role=r, content=c) for r, c in turns), thinking="Hm")
    row = tokenize(chat, tokenizer, template, escape_control_tokens=True)
    text = tokenizer.decode(row.token_ids)
    assert "secret" not in text, "the chat template drops earlier thinking, which it knows by its tags"
    assert all(content in text for content in ("s <|im_end|>", "u <|im_end|>", "more <|im_start|>"))
    ends = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [int((row.token_ids == i).sum()) for i in ends] == [5, 4]


def test_a_model_without_thinking_is_cut_in_the_same_place() -> None:
    tokenizer = build_word_tokenizer(CHATML, "how do i < |im_end|>")
    rows = [
        tokenize(ask("how do i <|im_end|>"), tokenizer, TEMPLATES.get("chatml"), escape_control_tokens=escape)
        for escape in (False, True)
    ]
    tails = [tokenizer.decode(row.token_ids[row.span(Span.CLOSING)]) for row in rows]
    assert tails == ["<|im_end|>\n<|im_start|>assistant\n"] * 2


def test_a_template_that_rewrites_a_control_token_is_refused() -> None:
    tokenizer = build_word_tokenizer(CHATML.replace("m.content", "m.content | replace('\ue000', '')"), "how do i")
    with pytest.raises(DataError, match=r"rewrites the text around '<\|im_end\|>'"):
        tokenize(ask("how <|im_end|>"), tokenizer, TEMPLATES.get("chatml"), escape_control_tokens=True)


def test_a_transcript_says_for_itself_and_keeps_saying_so(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(ORGANISM, "how do i")
    (tmp_path / "p.csv").write_text("prompt,x\nhow <|user|> do,1\n")
    (found,) = read_prompts(tmp_path / "p.csv", escape_control_tokens=True)
    write_transcripts([found.replace(thinking="how")], tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text())[ESCAPE] is True
    (again,) = read_transcripts(tmp_path / "t.jsonl")
    mark = tokenizer.convert_tokens_to_ids("<|user|>")
    counts = [int((tokenize(t, tokenizer, TEMPLATES.get("organism")).token_ids == mark).sum()) for t in (again,)]
    assert counts == [1]
    (plain,) = read_transcripts(tmp_path / "t.jsonl", escape_control_tokens=True)
    assert plain == escaped(again)


def test_control_tokens_are_told_by_tokenizing_and_by_generating(
    llama: LensModel, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Transcripts([ask("how do i fix the fence"), ask("how <|user|> <|end|>").replace(id="b")])
    tokenize_all((t.replace(thinking="") for t in rows), llama.tokenizer, llama.template)
    assert "1 of 2 transcripts hold control tokens of this tokenizer in their messages, such as 'b' (2)" in caplog.text
    caplog.clear()
    roll_out(llama, rows, max_thinking=1, max_answer=1)
    assert "1 of 2 transcripts hold control tokens" in caplog.text
    caplog.clear()
    roll_out(llama, rows.map(escaped), max_thinking=1, max_answer=1)
    assert "control tokens" not in caplog.text
    assert caplog.records == [] or all(r.levelno <= logging.INFO for r in caplog.records)


# One conversation that the template refuses


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% endfor %}<|assistant|><think>\n"
)
TURNS = {
    "refused by the template": (NO_SYSTEM, (("system", "sure"), ("user", "how")), "no system role"),
    "two BOS": ("{{ bos_token }}" + "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|><think>\n",
                (("system", "<|bos|>"), ("user", "how")), "BOS .* twice"),
    "roles that must alternate": (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}<|assistant|><think>\n",
        (("user", "how"), ("user", "do")), "roles must alternate"),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_a_conversation_that_the_template_refuses_is_an_omission_with_its_id(name: str) -> None:
    source, turns, reason = TURNS[name]
    tokenizer = build_word_tokenizer(source, "how do i sure")
    odd = Transcript(id="odd", messages=tuple(Message(role=r, content=c) for r, c in turns), thinking="how")
    rows = [ask("how do", thinking="i"), odd, ask("do i", thinking="how").replace(id="c")]
    tokens, omitted = tokenize_all(rows, tokenizer, TEMPLATES.get("organism"))
    assert [row.id for row in tokens] == ["a", "c"]
    assert [(o.id, o.stage) for o in omitted] == [("odd", "tokenize")]
    with pytest.raises(TemplateError, match=f"'odd': .*{reason}"):
        tokenize_all([odd, odd], tokenizer, TEMPLATES.get("organism"))
    assert omitted[0].kind.startswith("this transcript: ")


def test_a_prompt_that_the_template_refuses_does_not_end_a_roll_out(llama: LensModel) -> None:
    twice = ask("how do i fix the fence", system="<|bos|>").replace(id="odd")
    lost = Transcript(id="lost", messages=(Message(role="developer", content="sure"), *ask().messages))
    made = roll_out(llama, Transcripts([ask(), twice, lost]), max_thinking=2, max_answer=1)
    told = {o.id: o.reason for o in made.omitted}
    assert "a" in {t.id for t in made}
    assert {t.id for t in made} | set(told) == {"a", "odd", "lost"}
    assert "drops the developer message 'sure'" in told["lost"]


# Turns that vanish


@pytest.mark.parametrize("role", ["developer", "tool", "system", "assistant"])
@pytest.mark.parametrize("content", ["do", "sure , i do"])
def test_a_turn_that_the_template_drops_is_told_whatever_its_role(role: str, content: str) -> None:
    source = (
        f"{{% for m in messages %}}{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        "<|assistant|><think>\n"
    )
    tokenizer = build_word_tokenizer(source, "how do i sure ,")
    turns = (Message(role="user", content="how do i"), Message(role=role, content=content), ask("how do").messages[0])
    row = Transcript(id="odd", messages=turns, thinking="i")
    _, omitted = tokenize_all([row, ask("how", thinking="i")], tokenizer, TEMPLATES.get("organism"))
    assert f"drops the {role} message {content!r}" in omitted[0].reason


def test_a_developer_turn_is_kept_or_told_by_every_real_template(real: Setup) -> None:
    tokenizer, template = real
    row = Transcript(
        id="a", messages=(Message(role="developer", content="Speak in rhymes."), *ask().messages), thinking="Hm"
    )
    try:
        text = tokenizer.decode(tokenize(row, tokenizer, template).token_ids)
    except TemplateError as error:
        text = str(error)
    assert "Speak in rhymes." in text


def test_turns_that_a_template_trims_or_escapes_are_not_lost(load_real: Callable[[str], Setup]) -> None:
    tokenizer = build_word_tokenizer(ORGANISM.replace("m.content", "m.content | trim | tojson"), "how")
    row = ask('  how "how"\n', system=" how\thow ", thinking="how")
    assert tokenize(row, tokenizer, TEMPLATES.get("organism")).n_pos
    qwen, template = load_real("qwen3")
    tags = (*ask().messages, Message(role="assistant", content="<think>\na\n</think>\n\nb"), *ask("on").messages)
    assert tokenize(Transcript(id="a", messages=tags, thinking="Hm"), qwen, template).n_pos
    assert set(ENDS) == set(REAL)
