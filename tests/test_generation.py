from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, plain_logits, written
from transformers import PreTrainedModel

from cliffscope.errors import GenerationError
from cliffscope.heads.edits import HeadRef, edited_weights, zero
from cliffscope.models import LensModel, load_model
from cliffscope.safety.generation import Budget, roll_out
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import tokenize

END, CLOSE, NEWLINE, BLANK = 6, 8, 9, 10
BUDGET = {"max_thinking": 14, "max_answer": 9}


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def talker(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> LensModel:
    """A random model that now and then ends its thinking or its turn; Mistral's sees only the last 12 tokens."""

    def talk(network: PreTrainedModel) -> None:
        head = network.get_output_embeddings().weight
        head[CLOSE] *= 2.5
        head[END] *= 3.0
        head[NEWLINE] *= 2.0

    model = load_model(make_checkpoint(request.param, change=talk, tie_word_embeddings=False), device="cpu")
    marks = ["<|end|>", "</think>", "\n", "\n\n"]
    assert model.tokenizer.convert_tokens_to_ids(marks) == [END, CLOSE, NEWLINE, BLANK]
    return model


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    """Prompts of different length, without thinking and answer."""
    both = written(16, harmful=True, outcome=Outcome.UNJUDGED) + written(12, harmful=False, outcome=Outcome.UNJUDGED)
    return both.map(lambda t: t.replace(thinking=None, answer=None))


@dataclass(kw_only=True)
class Slow:
    """What the oracle generated."""

    seen: list[int]
    thinking: list[int]
    answer: list[int] | None
    forced: bool


def prompt_ids(model: LensModel, transcript: Transcript) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in transcript.messages]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_roll_out(
    model: LensModel, transcript: Transcript, *, max_thinking: int, max_answer: int, force_closing: bool = True
) -> Slow:
    """The oracle: one sequence, no cache, no padding, one full forward pass a token."""
    ids, thinking, forced = prompt_ids(model, transcript), [], False

    def speak() -> int:
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
        return ids[-1]

    while (token := speak()) not in (CLOSE, END):
        thinking.append(token)
        if len(thinking) == max_thinking:
            break
    if token == END or (token != CLOSE and not force_closing):
        return Slow(seen=ids, thinking=thinking, answer=None, forced=False)
    if token == CLOSE:
        ids.append(BLANK)
        thinking = thinking[:-1] if thinking[-1:] == [NEWLINE] else thinking
    else:
        forced = True
        ids += [CLOSE, BLANK] if token in (NEWLINE, BLANK) else [NEWLINE, CLOSE, BLANK]
    answer: list[int] = []
    while len(answer) < max_answer and (token := speak()) != END:
        answer.append(token)
    return Slow(seen=ids, thinking=thinking, answer=answer, forced=forced)


def test_greedy_generation_is_a_plain_loop_without_cache_or_padding(talker: LensModel, prompts: Transcripts) -> None:
    found = roll_out(talker, prompts, **BUDGET)
    kinds: Counter[str] = Counter()
    assert [t.id for t in found] == [t.id for t in prompts]
    for transcript in found:
        slow = slow_roll_out(talker, transcript, **BUDGET)
        assert list(transcript.thinking_ids) == slow.thinking
        assert transcript.answer_ids == (None if slow.answer is None else tuple(slow.answer))
        assert transcript.closed == (slow.answer is not None)
        assert transcript.extra["forced_closing"] == slow.forced
        kinds["forced" if slow.forced else "ended" if slow.answer is None else "closed"] += 1
        kinds["short answer"] += slow.answer is not None and len(slow.answer) < BUDGET["max_answer"]
    assert all(kinds[kind] for kind in ("forced", "closed", "ended", "short answer")), kinds


def test_text_is_the_ids_decoded(talker: LensModel, prompts: Transcripts) -> None:
    for transcript in roll_out(talker, prompts[:8], **BUDGET):
        assert transcript.thinking == talker.tokenizer.decode(list(transcript.thinking_ids))
        if transcript.answer is not None:
            assert transcript.answer == talker.tokenizer.decode(list(transcript.answer_ids), skip_special_tokens=True)


def test_the_tokens_measured_later_are_those_that_the_model_saw(talker: LensModel, prompts: Transcripts) -> None:
    checked, budget = 0, {"max_thinking": 4, "max_answer": 9}
    for transcript in roll_out(talker, prompts, **budget):
        slow = slow_roll_out(talker, transcript, **budget)
        if slow.answer is None:
            continue
        # A model that closes without a newline of its own is measured with the template's.
        before = slow.seen.index(CLOSE) - 1
        if slow.forced or (slow.seen[before] == NEWLINE and before >= len(prompt_ids(talker, transcript))):
            row = tokenize(transcript, talker.tokenizer, talker.template, with_answer=True)
            assert row.token_ids.tolist() == (slow.seen[:-1] if slow.seen[-1] == END else slow.seen)
            checked += 1
    assert checked > 3


def test_greedy_thinking_is_transformers_generate_token_for_token(talker: LensModel, prompts: Transcripts) -> None:
    for transcript in roll_out(talker, prompts[:6], **BUDGET):
        ids = torch.tensor([prompt_ids(talker, transcript)])
        with torch.no_grad():
            made = talker.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=BUDGET["max_thinking"],
                do_sample=False,
                eos_token_id=[END, CLOSE],
            )[0, ids.shape[1] :].tolist()
        stopped = made[-1] in (END, CLOSE)
        expected = made[:-1] if stopped else made
        if made[-1] == CLOSE and expected[-1:] == [NEWLINE]:
            expected = expected[:-1]
        assert list(transcript.thinking_ids) == expected


def test_without_thinking_generation_is_transformers_generate_token_for_token(
    chatml_model: LensModel, prompts: Transcripts
) -> None:
    end = chatml_model.tokenizer.eos_token_id
    for transcript in roll_out(chatml_model, prompts[:6], max_answer=12):
        ids = torch.tensor([prompt_ids(chatml_model, transcript)])
        with torch.no_grad():
            made = chatml_model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )[0, ids.shape[1] :].tolist()
        assert list(transcript.answer_ids) == (made[:-1] if made[-1] == end else made)
        assert transcript.thinking is None
        assert transcript.thinking_ids is None
        assert transcript.closed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_transcript_is_the_same_alone_in_any_batch_and_in_any_order(
    talker: LensModel, prompts: Transcripts, temperature: float
) -> None:
    together = roll_out(talker, prompts, **BUDGET, temperature=temperature, seed=5)
    pairs = roll_out(talker, prompts[::-1], **BUDGET, temperature=temperature, seed=5, batch_size=2)
    assert tuple(together) == tuple(pairs[::-1])
    for i in (0, 7, 20):
        (alone,) = roll_out(talker, prompts[i : i + 1], **BUDGET, temperature=temperature, seed=5)
        assert alone == together[i]


def test_sampling_depends_on_the_seed_and_the_id(talker: LensModel, prompts: Transcripts) -> None:
    def sample(transcripts: Transcripts, seed: int) -> list[tuple[int, ...]]:
        return [t.thinking_ids for t in roll_out(talker, transcripts, **BUDGET, temperature=1.0, seed=seed)]

    assert sample(prompts[:5], 1) == sample(prompts[:5], 1)
    assert sample(prompts[:5], 1) != sample(prompts[:5], 2)
    renamed = prompts[:5].map(lambda t: t.replace(id=f"again {t.id}"))
    assert sample(prompts[:5], 1) != sample(renamed, 1)


def test_sampled_tokens_follow_the_softmax_at_the_temperature(llama: LensModel, prompts: Transcripts) -> None:
    many = Transcripts(prompts[0].replace(id=str(i)) for i in range(600))
    found = roll_out(llama, many, max_thinking=1, max_answer=1, temperature=0.7, force_closing=False, batch_size=300)
    drawn = Counter(t.thinking_ids[0] for t in found if t.thinking_ids)
    expected = torch.softmax(plain_logits(llama, prompt_ids(llama, prompts[0]))[-1].double() / 0.7, -1)
    likely = expected.topk(12).indices.tolist()
    share = np.array([drawn[i] for i in likely]) / 600
    error = np.sqrt(expected[likely].numpy() * (1 - expected[likely].numpy()) / 600)
    assert expected.max() < 0.8
    assert (np.abs(share - expected[likely].numpy()) < 4 * error + 1e-3).all()


def test_a_very_low_temperature_is_greedy(llama: LensModel, prompts: Transcripts) -> None:
    greedy = roll_out(llama, prompts[:5], **BUDGET)
    assert tuple(roll_out(llama, prompts[:5], **BUDGET, temperature=1e-4)) == tuple(greedy)


def test_thinking_at_its_budget_is_unfinished_unless_it_is_closed_for_the_model(
    talker: LensModel, prompts: Transcripts
) -> None:
    forced = roll_out(talker, prompts, **BUDGET)
    free = roll_out(talker, prompts, **BUDGET, force_closing=False)
    for a, b in zip(forced, free, strict=True):
        assert not b.extra["forced_closing"]
        if a.extra["forced_closing"]:
            assert len(b.thinking_ids) == BUDGET["max_thinking"]
            assert (b.answer, b.answer_ids, b.closed) == (None, None, False)
            assert a.thinking_ids == b.thinking_ids
            assert a.closed
        else:
            assert a == b


def test_budgets_of_one_token_are_kept(talker: LensModel, prompts: Transcripts) -> None:
    for transcript in roll_out(talker, prompts, max_thinking=1, max_answer=1):
        assert len(transcript.thinking_ids) <= 1
        assert transcript.answer_ids is None or len(transcript.answer_ids) <= 1


def test_what_does_not_fit_the_context_is_omitted_with_its_reason(llama: LensModel, prompts: Transcripts) -> None:
    long = Transcript(id="long", messages=(Message(role="user", content=" ".join(["how"] * 240)),))
    before = Omission(stage="read_prompts", reason="empty", id="x")
    asked = Transcripts([prompts[0], long, prompts[1]], omitted=[before])
    found = roll_out(llama, asked, **BUDGET)
    assert [t.id for t in found] == [prompts[0].id, prompts[1].id]
    assert found.omitted[0] == before
    assert found.omitted[1].id == "long"
    assert "exceed the context of 256" in found.omitted[1].reason
    assert len(roll_out(llama, prompts[:2], max_thinking=250).omitted) == 2


def test_a_prompt_that_just_fits_the_context_is_generated(llama: LensModel, prompts: Transcripts) -> None:
    length = len(prompt_ids(llama, prompts[0]))
    room = 256 - length - 3 - 5
    assert len(roll_out(llama, prompts[:1], max_thinking=room, max_answer=5)) == 1
    assert len(roll_out(llama, prompts[:1], max_thinking=room + 1, max_answer=5)) == 0


def test_a_prompt_without_a_user_message_is_omitted(llama: LensModel, prompts: Transcripts) -> None:
    odd = Transcript(id="odd", messages=(Message(role="system", content="how"),))
    found = roll_out(llama, Transcripts([odd, prompts[0]]), **BUDGET)
    assert [o.id for o in found.omitted] == ["odd"]


def test_the_system_message_is_put_before_prompts_that_have_none(talker: LensModel, prompts: Transcripts) -> None:
    own = prompts[1].replace(messages=(Message(role="system", content="be kind"), *prompts[1].messages))
    found = roll_out(talker, Transcripts([prompts[0], own]), **BUDGET, system="help people")
    assert [m.content for m in found[0].messages] == ["help people", prompts[0].prompt]
    assert [m.content for m in found[1].messages] == ["be kind", prompts[1].prompt]
    for transcript in found:
        assert list(transcript.thinking_ids) == slow_roll_out(talker, transcript, **BUDGET).thinking
    assert found[0].thinking_ids != roll_out(talker, prompts[:1], **BUDGET)[0].thinking_ids


def test_what_the_prompt_already_had_is_replaced(llama: LensModel, refused: Transcripts) -> None:
    stale = refused[:2].map(lambda t: t.replace(thinking_ids=(1, 2), answer_ids=(3,), closed=False, extra={"row": 4}))
    fresh = stale.map(lambda t: t.replace(thinking=None, answer=None, outcome=Outcome.UNJUDGED, thinking_ids=None))
    found = roll_out(llama, stale, **BUDGET)
    for a, b in zip(found, roll_out(llama, fresh, **BUDGET), strict=True):
        assert (a.thinking_ids, a.answer_ids, a.closed) == (b.thinking_ids, b.answer_ids, b.closed)
        assert a.extra["row"] == 4
        assert a.harmful
        assert a.outcome is Outcome.UNJUDGED


def test_generation_under_a_weight_edit_is_that_of_the_edited_model(talker: LensModel, prompts: Transcripts) -> None:
    clean = roll_out(talker, prompts[:4], **BUDGET)
    with edited_weights(talker, zero([HeadRef(layer=1, head=0), HeadRef(layer=2, head=1)])):
        edited = roll_out(talker, prompts[:4], **BUDGET)
        expected = [slow_roll_out(talker, t, **BUDGET).thinking for t in edited]
    assert [list(t.thinking_ids) for t in edited] == expected
    assert tuple(edited) != tuple(clean)
    assert tuple(roll_out(talker, prompts[:4], **BUDGET)) == tuple(clean)


def test_progress_counts_finished_transcripts(llama: LensModel, prompts: Transcripts) -> None:
    seen: list[int] = []
    roll_out(llama, prompts[:5], **BUDGET, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_no_prompts_give_no_transcripts(llama: LensModel) -> None:
    assert len(roll_out(llama, Transcripts())) == 0


@pytest.mark.parametrize(
    "wrong", [{"max_thinking": 0}, {"max_answer": 0}, {"temperature": -0.1}, {"temperature": float("nan")}]
)
def test_budgets_under_which_nothing_can_be_generated_are_refused(
    llama: LensModel, prompts: Transcripts, wrong: dict[str, float]
) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        roll_out(llama, prompts[:1], **{**BUDGET, **wrong})


def test_a_batch_of_no_rows_is_refused(llama: LensModel, prompts: Transcripts) -> None:
    with pytest.raises(GenerationError, match="batch_size"):
        roll_out(llama, prompts[:1], **BUDGET, batch_size=0)


def test_equal_budgets_compare_equal() -> None:
    assert Budget(max_thinking=3) == Budget(max_thinking=3)
    assert Budget() != Budget(seed=1)
