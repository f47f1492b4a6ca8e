"""What is measured is what was generated, whatever the tags and wherever tokens lie across them."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from test_conventions import build_byte_tokenizer
from transformers import PreTrainedTokenizerFast

from cliffscope.generation.rollout import _closing_note
from cliffscope.generation.speaking import Budget, Decoded, Row, Speaker
from cliffscope.model.load import LensModel
from cliffscope.transcripts.boundaries import foreign_boundaries
from cliffscope.transcripts.records import Message, Transcript
from cliffscope.transcripts.templates import Template, encode, turn_end
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGS = [
    ("<think>", "</think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("Steps:", "[END]"),
]


def template_of(tags: tuple[str, str]) -> Template:
    return Template(name="t", think_open=tags[0], think_close=tags[1], opening=tags[0], closing=f"\n{tags[1]}\n\n")


def model_of(tokenizer: PreTrainedTokenizerFast, template: Template) -> LensModel:
    hf = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id))
    return cast(LensModel, SimpleNamespace(tokenizer=tokenizer, template=template, hf=hf))


def speak(model: LensModel, ids: list[int]) -> Decoded:
    speaker = Speaker(model, Budget(max_thinking=500, max_answer=500))
    prompt = TokenizedTranscript(id="a", token_ids=np.array([0]), bounds=(1, 1, 1, 1))
    row: Row = speaker.start(0, prompt)
    ids = list(ids)
    while not row.ended and (ids or row.waiting):
        fed = row.waiting[0] if row.waiting else ids.pop(0)
        speaker.advance(row, fed)
    return row.finished()


def transcript_of(model: LensModel, decoded: Decoded) -> Transcript:
    decode = model.tokenizer.decode
    return Transcript(
        id="a",
        messages=(Message(role="user", content="Hi"),),
        thinking=str(decode(list(decoded.thinking))),
        thinking_ids=decoded.thinking,
        answer=str(decode(list(decoded.answer))),
        answer_ids=decoded.answer,
        extra=dict(_closing_note(model, decoded)),
    )


@pytest.mark.parametrize("tags", TAGS)
def test_tags_of_any_number_of_tokens_close_thinking(tags: tuple[str, str]) -> None:
    tokenizer, template = build_byte_tokenizer(CHAT, "<|end|>"), template_of(tags)
    model = model_of(tokenizer, template)
    written = [*encode(tokenizer, f"So it is.\n{tags[1]}"), *encode(tokenizer, "Mix flour.<|end|>")]
    decoded = speak(model, written)
    assert tokenizer.decode(decoded.thinking) == "So it is."
    assert tokenizer.decode(decoded.closing) == template.closing
    assert tokenizer.decode(decoded.answer) == "Mix flour."
    row = tokenize(transcript_of(model, decoded), tokenizer, template, with_answer=True)
    assert row.token_ids[row.span(Span.THINKING)].tolist() == list(decoded.thinking)


def test_a_token_across_the_end_of_thinking_is_measured_as_generated_and_counted_as_text() -> None:
    tokenizer, template = build_byte_tokenizer(CHAT, "<|end|>"), template_of(("<think>", "</think>"))
    tokenizer.add_tokens([".</", "think>"])
    model = model_of(tokenizer, template)
    written = encode(tokenizer, "So it is.</think>")
    assert tokenizer.convert_tokens_to_ids(".</") in written
    decoded = speak(model, [*written, *encode(tokenizer, "Mix.<|end|>")])
    measured = transcript_of(model, decoded)
    row = tokenize(measured, tokenizer, template, with_answer=True)
    assert row.token_ids[row.bounds[0] :].tolist() == [*decoded.thinking, *decoded.closing, *decoded.answer]
    assert [*decoded.thinking, *decoded.closing][: len(written)] == written
    assert foreign_boundaries([measured], tokenizer, template) == ()
    bare = Template(name="t", think_open="<think>", think_close="</think>", opening="<think>", closing="</think>")
    texts = [
        Transcript(id=f"t{i}", messages=measured.messages, thinking=text, answer="Mix.")
        for i, text in enumerate(("So it is.", "So it is"))
    ]
    assert foreign_boundaries(texts, tokenizer, bare) == ("t0",)


def test_a_turn_ends_where_the_chat_template_ends_it_and_not_at_the_eos_token_alone() -> None:
    tokenizer, template = build_byte_tokenizer(CHAT, "<|end|>"), template_of(("<think>", "</think>"))
    assert tokenizer.eos_token == "<eos>"
    model = model_of(tokenizer, template)
    thought = encode(tokenizer, "So.\n</think>")
    for end in ("<|end|>", "<eos>"):
        assert tokenizer.decode(speak(model, [*thought, *encode(tokenizer, f"Mix.{end} More")]).answer) == "Mix."
    assert tokenizer.decode(turn_end(tokenizer, template)) == "<|end|>"
    ended = speak(model, encode(tokenizer, "So it<|end|> goes on"))
    assert (tokenizer.decode(ended.thinking), ended.closed) == ("So it", False)


def test_an_end_of_several_tokens_ends_a_turn() -> None:
    tokenizer, template = build_byte_tokenizer(CHAT), template_of(("<think>", "</think>"))
    assert len(encode(tokenizer, "<|end|>")) == 7
    written = [*encode(tokenizer, "So.\n</think>"), *encode(tokenizer, "Mix.<|end|> More")]
    assert tokenizer.decode(speak(model_of(tokenizer, template), written).answer) == "Mix."


def test_a_token_that_closes_thinking_does_not_end_the_turn() -> None:
    tokenizer = build_byte_tokenizer(CHAT, "<|end|>", "<|final|>")
    template = Template(
        name="t", think_open="<|analysis|>", think_close="<|end|>", opening="", closing="<|end|><|final|>"
    )
    decoded = speak(model_of(tokenizer, template), encode(tokenizer, "So.<|end|>Mix.<|end|>More"))
    assert (tokenizer.decode(decoded.thinking), tokenizer.decode(decoded.answer)) == ("So.", "Mix.")
