from collections import Counter

import numpy as np
import pytest
import torch
from conftest import plain_logits, written
from slow_generation import BLANK, CLOSE, END, NEWLINE, prompt_ids, slow_roll_out

from cliffscope.errors import DataError, GenerationError
from cliffscope.generation import batches, rollout
from cliffscope.generation.batches import MOST_ROWS, find_batch_size
from cliffscope.generation.cache import growing_cache, select_rows
from cliffscope.generation.rollout import roll_out
from cliffscope.generation.speaking import Budget
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Message, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import CLOSING_IDS, TokenizedTranscript, tokenize

BUDGET = {"max_thinking": 14, "max_answer": 9}


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    """Prompts of different length, without thinking and answer."""
    both = written(16, harmful=True, outcome=Outcome.UNJUDGED) + written(12, harmful=False, outcome=Outcome.UNJUDGED)
    return both.map(lambda t: t.replace(thinking=None, answer=None))


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
        cut = slow.answer is not None and len(slow.answer) == BUDGET["max_answer"]
        assert transcript.extra["cut_answer"] == cut
        kinds["cut"] += cut
        kinds["forced" if slow.forced else "ended" if slow.answer is None else "closed"] += 1
        kinds["short answer"] += slow.answer is not None and len(slow.answer) < BUDGET["max_answer"]
    assert all(kinds[kind] for kind in ("forced", "closed", "ended", "short answer", "cut")), kinds


def test_text_is_the_ids_decoded(talker: LensModel, prompts: Transcripts) -> None:
    for transcript in roll_out(talker, prompts[:8], **BUDGET):
        assert transcript.thinking == talker.tokenizer.decode(list(transcript.thinking_ids))
        if transcript.answer is not None:
            assert transcript.answer == talker.tokenizer.decode(list(transcript.answer_ids), skip_special_tokens=True)


def test_the_tokens_measured_later_are_those_that_the_model_saw(talker: LensModel, prompts: Transcripts) -> None:
    kinds, budget = Counter[str](), {"max_thinking": 4, "max_answer": 9}
    for transcript in roll_out(talker, prompts, **budget):
        slow = slow_roll_out(talker, transcript, **budget)
        if slow.answer is None:
            continue
        row = tokenize(transcript, talker.tokenizer, talker.template, with_answer=True)
        assert row.token_ids.tolist() == slow.seen
        # A model that closes without a newline has a closing that is not the template's.
        before = slow.seen.index(CLOSE) - 1
        newline = slow.seen[before] == NEWLINE and before >= len(prompt_ids(talker, transcript))
        bare = not newline and not (slow.forced and slow.seen[before] == BLANK)
        assert (CLOSING_IDS in transcript.extra) is bare
        kinds["forced" if slow.forced else "bare" if bare else "with a newline"] += 1
    assert kinds["forced"] > 3
    assert kinds["bare"]


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


# Batches


def test_padded_batches_are_transformers_generate_token_for_token(llama: LensModel, prompts: Transcripts) -> None:
    """generate itself on the left-padded batch, its thinking alone, since it cannot close thinking by row."""
    rows = [prompt_ids(llama, t) for t in prompts[:6]]
    batch = llama.to_batch(rows, left=True)
    with torch.no_grad():
        made = llama.hf.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=14, do_sample=False, eos_token_id=[END, CLOSE]
        )[:, batch.ids.shape[1] :].tolist()
    for transcript, ids in zip(roll_out(llama, prompts[:6], **BUDGET), made, strict=True):
        stop = next((i for i, token in enumerate(ids) if token in (END, CLOSE)), len(ids))
        ids = ids[:stop]
        newline = stop < 14 and made and ids[-1:] == [NEWLINE]
        assert list(transcript.thinking_ids) == (ids[:-1] if newline else ids)


def test_the_growing_cache_holds_what_the_plain_one_does(talker: LensModel, prompts: Transcripts) -> None:
    from transformers import DynamicCache

    batch = talker.to_batch([prompt_ids(talker, t) for t in prompts[:5]], left=True)
    caches = [growing_cache(talker), DynamicCache(config=talker.hf.config)]
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    for step in range(90):
        with torch.no_grad():
            both = [
                talker.hf(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
                for cache in caches
            ]
        assert torch.equal(*both), step
        ids = both[0][:, -1:].argmax(-1)
        if step in (3, 70):
            keep = torch.tensor([0, 2, 3] if step == 3 else [1, 2])
            select_rows(caches[0], keep)
            caches[1].batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1


def test_the_batch_size_is_found_from_the_free_memory(llama: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 2 * 2 * 100 * 8 * 8 * 4 * 4  # twice keys and values of 100 positions in 8 layers of 8 heads of 4, in fp32
    row = cache + 3 * 4 * len(llama.tokenizer)
    for free, rows in ((1e15, MOST_ROWS), (2 * row * 37, 32), (2 * row * 2.5, 2), (2 * row, 1), (0, 1)):
        monkeypatch.setattr(batches, "free_bytes", lambda device, free=free: int(free))
        assert find_batch_size(llama, 100) == rows
    monkeypatch.undo()
    assert find_batch_size(llama, 100) == MOST_ROWS


class Cramped:
    """Memory for so many rows; more raise as torch does."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError, text: str = "out of memory") -> None:
        self.rows, self.error, self.text = rows, error, text
        self.decode, self.sizes = rollout.decode, list[int]()

    def __call__(
        self, model: LensModel, rows: list[TokenizedTranscript], budget: Budget, edits: list, **options: bool
    ) -> list:
        self.sizes.append(len(rows))
        if len(rows) > self.rows:
            self.decode(model, rows[:1], budget, edits[:1], **options)
            raise self.error(self.text)
        return self.decode(model, rows, budget, edits, **options)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20 GiB"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError, ""),
    ],
    ids=["cuda", "cpu", "python"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_memory_runs_out_the_batch_is_halved_and_that_is_said(
    llama: LensModel,
    prompts: Transcripts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
    text: str,
    temperature: float,
) -> None:
    whole = roll_out(llama, prompts, **BUDGET, temperature=temperature)
    cramped = Cramped(5, error, text)
    monkeypatch.setattr(rollout, "decode", cramped)
    parts: list[Transcripts] = []
    found = roll_out(llama, prompts, **BUDGET, temperature=temperature, batch_size=14, on_batch=parts.append)
    assert cramped.sizes == [14, 7, 3, 3, 3, 3, 2, 3, 3, 3, 3, 2]
    assert [len(part) for part in parts] == [3, 3, 3, 3, 2, 3, 3, 3, 3, 2]
    assert {t.extra["batch_halved_to"] for t in found} == {3}
    plain = found.map(lambda t: t.replace(extra={k: v for k, v in t.extra.items() if k != "batch_halved_to"}))
    assert tuple(plain) == tuple(whole)
    assert "Memory ran out with 14 rows; going on with 7" in caplog.text


def test_where_memory_does_not_suffice_for_one_row_that_is_an_error_and_other_errors_are_not_taken_for_it(
    llama: LensModel, prompts: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Transcripts] = []
    monkeypatch.setattr(rollout, "decode", Cramped(0))
    with pytest.raises(GenerationError, match="Memory does not suffice to generate"):
        roll_out(llama, prompts, **BUDGET, on_batch=kept.append)
    monkeypatch.undo()
    monkeypatch.setattr(rollout, "decode", Cramped(1, RuntimeError, "shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        roll_out(llama, prompts, **BUDGET)
    assert kept == []


# Resuming


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_batches_are_not_generated_again_and_the_result_is_the_same(
    talker: LensModel, prompts: Transcripts, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    options = {**BUDGET, "temperature": temperature, "batch_size": 5}
    parts: list[Transcripts] = []
    whole = roll_out(talker, prompts, **options, on_batch=parts.append)
    assert [len(part) for part in parts] == [5, 5, 5, 5, 5, 3]
    assert sorted(t.id for part in parts for t in part) == sorted(t.id for t in prompts)
    done = Transcripts(t for part in parts[1:4] for t in part)
    mates, decode = list[tuple[str, ...]](), rollout.decode

    def note(model: LensModel, rows: list[TokenizedTranscript], budget: Budget, edits: list, **options: bool) -> list:
        mates.append(tuple(row.id for row in rows))
        return decode(model, rows, budget, edits, **options)

    monkeypatch.setattr(rollout, "decode", note)
    counts: list[int] = []
    again = roll_out(talker, prompts, **options, done=done, progress=counts.append)
    assert again == whole
    assert mates == [tuple(t.id for t in part) for part in (parts[0], *parts[4:])], "batch-mates changed"
    assert counts == [20, 25, 28]
    mates.clear()
    assert roll_out(talker, prompts, **options, done=whole) == whole
    assert mates == []


def test_what_is_done_must_answer_the_same_prompts(llama: LensModel, prompts: Transcripts) -> None:
    done = roll_out(llama, prompts[:2], **BUDGET, system="help people")
    with pytest.raises(DataError, match="2 of 2 transcripts that are done already"):
        roll_out(llama, prompts, **BUDGET, done=done)
    assert roll_out(llama, prompts[:3], **BUDGET, done=done, system="help people")[:2] == done


# Samples


def test_each_prompt_is_answered_as_often_as_asked(llama: LensModel, prompts: Transcripts) -> None:
    found = roll_out(llama, prompts[:3], **BUDGET, temperature=1.0, samples=4)
    assert [t.id for t in found] == [f"{t.id}/sample-{i}" for t in prompts[:3] for i in range(1, 5)]
    assert [t.extra["sample_of"] for t in found] == [t.id for t in prompts[:3] for _ in range(4)]
    assert len({t.thinking_ids for t in found[:4]}) > 1
    assert tuple(roll_out(llama, prompts[:3], **BUDGET, temperature=1.0, samples=4, batch_size=2)) == tuple(found)


@pytest.mark.parametrize(("options", "word"), [({"samples": 2}, "all be the same"), ({"samples": 0}, "at least 1")])
def test_samples_need_a_temperature_and_a_number(
    llama: LensModel, prompts: Transcripts, options: dict[str, int], word: str
) -> None:
    with pytest.raises(GenerationError, match=word):
        roll_out(llama, prompts[:1], **BUDGET, **options)


# Bad input


def test_an_empty_prompt_is_omitted_with_its_reason(llama: LensModel, prompts: Transcripts) -> None:
    blank = Transcript(id="blank", messages=(Message(role="user", content=" \n"),))
    found = roll_out(llama, Transcripts([blank, prompts[0]]), **BUDGET)
    assert [(o.id, o.stage) for o in found.omitted] == [("blank", "roll_out")]
    assert "is empty" in found.omitted[0].reason


@pytest.mark.parametrize("text", ["how do i \x00 \x1b[31m \x07 bake", "a\u202eb\u0000\ufeff", "\x7f"], ids=ascii)
def test_control_characters_are_text_like_any_other(llama: LensModel, text: str) -> None:
    asked = Transcripts([Transcript(id="odd", messages=(Message(role="user", content=text),))])
    (found,) = roll_out(llama, asked, **BUDGET)
    assert found.prompt == text
    assert found.thinking_ids


def test_equal_budgets_compare_equal() -> None:
    assert Budget(max_thinking=3) == Budget(max_thinking=3)
    assert Budget() != Budget(seed=1)


def test_a_small_model_is_decoded_by_one_thread_and_the_number_is_restored(
    llama: LensModel, prompts: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), set[int]()
    handle = llama.blocks[0].register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        roll_out(llama, prompts[:2], **BUDGET)
        assert seen == {1}
        assert torch.get_num_threads() == 2
        seen.clear()
        monkeypatch.setattr("cliffscope.model.lens.SMALL", 0)
        monkeypatch.delitem(llama.__dict__, "small", raising=False)
        roll_out(llama, prompts[:2], **BUDGET)
        assert seen == {2}, "a large model was kept to one thread"
    finally:
        handle.remove()
        torch.set_num_threads(before)
        llama.__dict__.pop("small", None)
