"""Answers on given thinking, under edits of any scope, against a loop without cache, batch and padding."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import written
from slow_generation import (
    BLANK,
    CLOSE,
    CLOSING,
    NEWLINE,
    PROMPT,
    THINKING,
    Change,
    prompt_ids,
    slow_answer,
    slow_roll_out,
)

import cliffscope as cs
from cliffscope.errors import DataError, EditError, GenerationError
from cliffscope.generation import answering, batches, decoding
from cliffscope.generation.answering import answer_arms, answer_transcripts
from cliffscope.generation.batches import HALVED, MOST_ROWS
from cliffscope.generation.rollout import roll_out
from cliffscope.generation.speaking import Budget
from cliffscope.heads.editing import edited_weights
from cliffscope.heads.edits import EditKind, EditPlan, HeadEdit, HeadRef, Scope, compose, scale, zero
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import CLOSING_IDS, Span, tokenize

BUDGET = {"max_thinking": 14, "max_answer": 9}
HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=3, head=0), HeadRef(layer=1, head=1))
SCOPES = ("closing", "thinking", "prompt", "all")
Edit = HeadEdit | EditPlan


def changes_of(edit: Edit | None) -> list[Change]:
    """The oracle's words for an edit."""
    return [
        Change(
            layer=ref.layer,
            head=ref.head,
            scope=str(part.scope),
            factor=part.factor,
            value=None
            if part.values is None
            else torch.tensor(part.values[i][0 if part.values.shape[1] == 1 else ...]),
        )
        for part in (() if edit is None else edit.edits)
        for i, ref in enumerate(part.heads)
    ]


def made_values(model: LensModel, positions: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.5, (len(HEADS), positions, model.shape.d_head)).astype(np.float32)


def edit_of(model: LensModel, kind: str, scope: str) -> Edit:
    if kind == "zero":
        return zero(HEADS, scope=scope)
    if kind == "scale":
        return scale(HEADS, -1.5, scope=Scope.parse(scope))
    if kind == "mean":
        return HeadEdit(heads=HEADS, kind=EditKind.MEAN, values=made_values(model, 1), scope=Scope.parse(scope))
    return compose(zero(HEADS[:1], scope=scope), scale(HEADS[1:], 2.5, scope="prompt"))


def before_answer(model: LensModel, transcript: Transcript) -> tuple[list[int], list[str]]:
    """What the oracle feeds before the answer, spelled here: prompt, thinking, and the closing that the model saw."""
    prompt, thinking = prompt_ids(model, transcript), list(transcript.thinking_ids)
    closing = [NEWLINE, CLOSE, BLANK]
    if CLOSING_IDS in transcript.extra:
        closing = [CLOSE, BLANK]
    elif thinking[-1:] == [NEWLINE]:
        thinking = thinking[:-1]
    elif thinking[-1:] == [BLANK]:
        closing = [CLOSE, BLANK]
    spans = [PROMPT] * len(prompt) + [THINKING] * len(thinking) + [CLOSING] * len(closing)
    return [*prompt, *thinking, *closing], spans


def slow_answers(model: LensModel, transcripts: Transcripts, edits: Sequence[Edit | None]) -> list[list[int]]:
    return [
        slow_answer(model, *before_answer(model, t), changes_of(edit), max_answer=BUDGET["max_answer"])
        for t, edit in zip(transcripts, edits, strict=True)
    ]


def answers(transcripts: Transcripts) -> list[list[int]]:
    return [list(t.answer_ids) for t in transcripts]


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    both = written(14, harmful=True, outcome=Outcome.UNJUDGED) + written(10, harmful=False, outcome=Outcome.UNJUDGED)
    return both.map(lambda t: t.replace(thinking=None, answer=None))


@pytest.fixture(scope="module")
def thoughts(talker: LensModel, prompts: Transcripts) -> Transcripts:
    """Thinking that closed, by itself or at a short budget, each with the roll-out's own answer."""
    parts = (roll_out(talker, prompts[i::2], max_thinking=n, max_answer=9) for i, n in enumerate((14, 4)))
    closed = [t for part in zip(*parts, strict=True) for t in part if t.closed and not t.thinking.startswith("<think>")]
    assert {t.extra["forced_closing"] for t in closed} == {True, False}
    return Transcripts(closed)


# Against the slow loop


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["zero", "scale", "mean", "plan"])
def test_answers_under_an_edit_are_those_of_a_loop_that_edits_exactly_the_scope(
    talker: LensModel, thoughts: Transcripts, kind: str, scope: str
) -> None:
    some, edit = thoughts[:8], edit_of(talker, kind, scope)
    edited = answer_transcripts(talker, some, edit=edit, max_answer=BUDGET["max_answer"])
    assert answers(edited) == slow_answers(talker, some, [edit] * len(some))
    assert [t.thinking_ids for t in edited] == [t.thinking_ids for t in some]
    assert answers(edited) != answers(some), "the edit changes no answer, so that nothing was tested"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_a_roll_out_under_an_edit_is_that_of_a_loop_that_edits_exactly_the_scope(
    talker: LensModel, prompts: Transcripts, kind: str, scope: str
) -> None:
    edit, kinds = edit_of(talker, kind, scope), Counter[str]()
    edited, plain = (roll_out(talker, prompts[:12], **BUDGET, edit=each) for each in (edit, None))
    for transcript in edited:
        slow = slow_roll_out(talker, transcript, changes_of(edit), **BUDGET)
        assert list(transcript.thinking_ids) == slow.thinking
        assert transcript.answer_ids == (None if slow.answer is None else tuple(slow.answer))
        assert transcript.extra["forced_closing"] == slow.forced
        if slow.answer is not None and not transcript.thinking.startswith("<think>"):
            row = tokenize(transcript, talker.tokenizer, talker.template, with_answer=True)
            assert row.token_ids.tolist() == slow.seen
        kinds["forced" if slow.forced else "ended" if slow.answer is None else "closed"] += 1
    assert kinds["closed"], kinds
    assert [t.thinking_ids for t in edited] == [t.thinking_ids for t in plain] if scope == "closing" else True
    assert tuple(edited) != tuple(plain)


def test_values_by_position_are_put_one_after_another(talker: LensModel, thoughts: Transcripts) -> None:
    whole = Transcripts(t for t in thoughts if before_answer(talker, t)[1].count(CLOSING) == 3)[:6]
    edit = HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=made_values(talker, 3), scope=Scope.CLOSING)
    edited = answer_transcripts(talker, whole, edit=edit, max_answer=BUDGET["max_answer"])
    assert answers(edited) == slow_answers(talker, whole, [edit] * len(whole))
    turned = HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=edit.values[:, ::-1], scope=Scope.CLOSING)
    assert answers(answer_transcripts(talker, whole, edit=turned, max_answer=9)) != answers(edited)


@pytest.mark.parametrize("scope", ["prompt", "thinking"])
def test_each_transcript_may_have_an_edit_of_its_own(talker: LensModel, thoughts: Transcripts, scope: str) -> None:
    """Values as long as each transcript's own span, and every third transcript without an edit."""
    some, edits = thoughts[:7], list[Edit | None]()
    for i, transcript in enumerate(some):
        width = before_answer(talker, transcript)[1].count(scope)
        values = made_values(talker, width, seed=i)
        edited = i % 3 and width
        edits.append(
            HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=values, scope=Scope.parse(scope)) if edited else None
        )
    edited = answer_transcripts(talker, some, edit=edits, max_answer=BUDGET["max_answer"])
    assert answers(edited) == slow_answers(talker, some, edits)
    assert tuple(edited) == tuple(
        answer_transcripts(talker, some[i : i + 1], edit=[edits[i]], max_answer=9)[0] for i in range(len(some))
    )


def test_a_model_without_thinking_is_edited_at_the_tail_of_its_prompt(
    chatml_model: LensModel, prompts: Transcripts
) -> None:
    model, some = chatml_model, prompts[:5]
    for scope in ("closing", "prompt", "all"):
        edit = zero(HEADS, scope=Scope.parse(scope))
        edited = answer_transcripts(model, some, edit=edit, max_answer=6)
        assert answers(edited) == answers(roll_out(model, some, max_answer=6, edit=edit))
        for transcript in edited:
            row = tokenize(transcript, model.tokenizer, model.template)
            assert row.token_ids.tolist() == prompt_ids(model, transcript)
            width = row.span(Span.CLOSING).stop - row.span(Span.CLOSING).start
            spans = [PROMPT] * (row.n_pos - width) + [CLOSING] * width
            slow = slow_answer(model, row.token_ids.tolist(), spans, changes_of(edit), max_answer=6)
            assert list(transcript.answer_ids) == slow
            assert width > 0


# The same as a roll-out, alone as together


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_an_edit_answers_are_those_of_the_roll_out(
    talker: LensModel, prompts: Transcripts, temperature: float
) -> None:
    made = roll_out(talker, prompts, **BUDGET, temperature=temperature, seed=3)
    again = answer_transcripts(talker, made, max_answer=BUDGET["max_answer"], temperature=temperature, seed=3)
    assert tuple(again) == tuple(t for t in made if t.closed and not t.thinking.startswith("<think>"))
    assert len(again) > 12
    assert any(CLOSING_IDS in t.extra for t in made), "no thinking closed without a newline"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_roll_out_under_an_edit_is_its_thinking_answered_under_the_edit(
    talker: LensModel, prompts: Transcripts, scope: str
) -> None:
    """Whatever thinking ends with: a tag of the model's own, with or without a newline, or a budget after any token."""
    edit, ends = zero(HEADS, scope=scope), Counter[str]()

    def favour(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        """Newlines and the tag are said often, so that every ending comes."""
        often = [NEWLINE, CLOSE, BLANK]
        logits[..., often] += 0.95 * (logits.amax(-1, keepdim=True) - logits[..., often])
        return logits

    handle = talker.hf.get_output_embeddings().register_forward_hook(favour)
    try:
        for budget in (1, 2, 3, 5, 8):
            rolled = roll_out(talker, prompts, edit=edit, max_thinking=budget, max_answer=5, temperature=1.0)
            answered = answer_transcripts(talker, rolled, edit=edit, max_answer=5, temperature=1.0)
            closed = [t for t in rolled if t.closed and not t.thinking.startswith("<think>")]
            assert answers(answered) == [list(t.answer_ids) for t in closed]
            for t in closed:
                last = {NEWLINE: "newline", BLANK: "blank"}.get(t.thinking_ids[-1] if t.thinking_ids else -1, "word")
                ends[f"{'forced' if t.extra['forced_closing'] else 'closed'} after a {last}"] += 1
    finally:
        handle.remove()
    wanted = ["forced after a newline", "forced after a blank", "forced after a word", "closed after a word"]
    assert all(ends[end] for end in wanted), ends


def test_an_edit_of_all_is_the_edit_of_the_weights(talker: LensModel, thoughts: Transcripts) -> None:
    edit = zero(HEADS)
    with edited_weights(talker, edit):
        expected = answer_transcripts(talker, thoughts, max_answer=9)
        rolled = roll_out(talker, thoughts, **BUDGET)
    assert tuple(answer_transcripts(talker, thoughts, edit=edit, max_answer=9)) == tuple(expected)
    assert tuple(roll_out(talker, thoughts, **BUDGET, edit=edit)) == tuple(rolled)


def arms_of(model: LensModel) -> dict[str, Edit | None]:
    """Arms that read alike, and arms that do not."""
    return {
        "unedited": None,
        **{f"{kind} at {scope}": edit_of(model, kind, scope) for kind in ("zero", "mean") for scope in SCOPES},
        "plan": edit_of(model, "plan", "closing"),
        **{f"random {i}": zero([HeadRef(layer=i, head=j)], scope="closing") for i in range(2) for j in (0, 3)},
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_arms_together_are_each_arm_alone_in_any_batch(
    talker: LensModel, thoughts: Transcripts, temperature: float
) -> None:
    arms, some = arms_of(talker), thoughts[:6]
    options = {"max_answer": 9, "temperature": temperature, "seed": 2}
    alone = {name: answer_transcripts(talker, some, edit=edit, **options, batch_size=1) for name, edit in arms.items()}
    for batch_size in (1, 13, None):
        assert answer_arms(talker, some, arms, Budget(**options), batch_size=batch_size) == alone, batch_size
    assert len({tuple(map(tuple, answers(found))) for found in alone.values()}) > 4, "arms hardly differ"


def test_arms_draw_the_same_numbers(talker: LensModel, thoughts: Transcripts) -> None:
    """An edit that changes nothing leaves every draw, and a transcript's draws depend on its id."""
    options = {"max_answer": 9, "temperature": 1.3, "seed": 1}
    plain = answer_transcripts(talker, thoughts, **options)
    assert tuple(answer_transcripts(talker, thoughts, edit=scale(HEADS, 1.0, scope="closing"), **options)) == tuple(
        plain
    )
    assert answers(answer_transcripts(talker, thoughts, **{**options, "seed": 4})) != answers(plain)
    renamed = thoughts.map(lambda t: t.replace(id=f"x{t.id}"))
    assert answers(answer_transcripts(talker, renamed, **options)) != answers(plain)


@pytest.mark.parametrize(("batch_size", "n_chunks"), [(None, 1), (64, 2), (5, 14), (1, 14)])
def test_thinking_is_read_once_however_many_arms_answer_it(
    talker: LensModel, thoughts: Transcripts, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, n_chunks: int
) -> None:
    readings, parts = list[int](), list[int]()
    read, behind = answering.read, answering.answer_behind

    def counted_read(*args: object) -> decoding.Prefix:
        prefix = read(*args)
        readings.append(len(prefix.mask))
        return prefix

    def counted_behind(*args: object, **options: object) -> list:
        parts.append(len(args[2]))
        return behind(*args, **options)

    monkeypatch.setattr(answering, "read", counted_read)
    monkeypatch.setattr(answering, "answer_behind", counted_behind)
    heads = [HeadRef(layer=i, head=j) for i in range(4) for j in range(4)][:13]
    arms = {"unedited": None, **{str(h): zero([h], scope="closing") for h in heads}}
    some = thoughts[:1] if batch_size in (1, 5) else thoughts[:8]
    answer_arms(talker, some, arms, Budget(max_answer=2), batch_size=batch_size)
    assert sum(readings) == len(some)
    assert sum(parts) == len(some) * len(arms)
    limit = batch_size or answering.MOST_ANSWERS
    assert max(parts) + max(readings) <= max(limit, 2)
    assert len(parts) == {14: {5: 4, 1: 14}}.get(n_chunks, {}).get(batch_size, n_chunks)
    readings.clear()
    answer_arms(talker, some, {"a": zero(HEADS, scope="prompt"), "b": None, "c": zero(HEADS)}, Budget(max_answer=2))
    assert sum(readings) == 3 * len(some), "what edits act on while reading must be read under them"


# What cannot be answered


def test_what_cannot_be_answered_is_omitted_with_its_reason(talker: LensModel, thoughts: Transcripts) -> None:
    context = talker.shape.context
    odd = {
        "bare": thoughts[0].replace(thinking=None, thinking_ids=None),
        "open": thoughts[1].replace(closed=False, answer=None, answer_ids=None),
        "long": thoughts[2].replace(messages=(Message(role="user", content="how do i " * context),)),
        "blank": thoughts[3].replace(messages=(Message(role="user", content=" "),)),
        "tagged": thoughts[4].replace(thinking="a </think> b", thinking_ids=None),
    }
    given = Transcripts([*(t.replace(id=name) for name, t in odd.items()), thoughts[5]])
    found = answer_transcripts(talker, given, max_answer=3)
    assert [t.id for t in found] == [thoughts[5].id]
    reasons = {o.id: o.reason for o in found.omitted}
    assert set(reasons) == set(odd)
    assert {o.stage for o in found.omitted} == {"answer"}
    words = {"bare": "thinking is None", "open": "never closed", "long": "exceed the context of 256"}
    for name, word in {**words, "blank": "is empty", "tagged": "closing tag"}.items():
        assert word in reasons[name]


def test_a_transcript_that_just_fits_the_context_is_answered(talker: LensModel, thoughts: Transcripts) -> None:
    room = talker.shape.context - len(before_answer(talker, thoughts[0])[0])
    assert len(answer_transcripts(talker, thoughts[:1], max_answer=room)) == 1
    assert len(answer_transcripts(talker, thoughts[:1], max_answer=room + 1)) == 0


def test_a_forced_closing_is_answered_and_still_says_that_it_was_forced(
    talker: LensModel, thoughts: Transcripts
) -> None:
    found = answer_transcripts(talker, thoughts, edit=zero(HEADS, scope="closing"), max_answer=4)
    forced = [t.extra["forced_closing"] for t in thoughts]
    assert [t.extra["forced_closing"] for t in found] == forced
    assert any(forced)
    assert not all(forced)


def test_an_answer_that_reaches_its_budget_says_that_it_was_cut(talker: LensModel, thoughts: Transcripts) -> None:
    """Whatever was true of an earlier answer, and only where the model did not end it."""
    long, short = (answer_transcripts(talker, thoughts, max_answer=n) for n in (64, 2))
    assert [t.extra["cut_answer"] for t in long] == [len(t.answer_ids or ()) == 64 for t in long]
    again = answer_transcripts(talker, short, max_answer=64)
    assert [t.extra["cut_answer"] for t in again] == [t.extra["cut_answer"] for t in long]
    for cut, whole in zip(short, long, strict=True):
        assert cut.extra["cut_answer"] == (len(whole.answer_ids or ()) >= 2)


def test_what_was_said_of_another_answer_does_not_stay(talker: LensModel, thoughts: Transcripts) -> None:
    judged = cs.judge(thoughts[:3])
    for found in (answer_transcripts(talker, judged, max_answer=3), roll_out(talker, judged, **BUDGET)):
        assert all(t.outcome is Outcome.UNJUDGED and "verdict" not in t.extra for t in found)


def test_thinking_that_is_text_alone_is_encoded_and_closed_by_the_template(
    talker: LensModel, thoughts: Transcripts
) -> None:
    bare = thoughts[:4].map(lambda t: t.replace(thinking="they want to know how .", thinking_ids=None))
    edit = zero(HEADS, scope="closing")
    for transcript in answer_transcripts(talker, bare, edit=edit, max_answer=9):
        middle = talker.tokenizer("they want to know how .", add_special_tokens=False)["input_ids"]
        prompt = prompt_ids(talker, transcript)
        ids = [*prompt, *middle, NEWLINE, CLOSE, BLANK]
        spans = [PROMPT] * len(prompt) + [THINKING] * len(middle) + [CLOSING] * 3
        assert list(transcript.answer_ids) == slow_answer(talker, ids, spans, changes_of(edit), max_answer=9)


@pytest.mark.parametrize("seen", ["text", [CLOSE, 10**9], [NEWLINE], [CLOSE, None]])
def test_a_closing_that_is_none_is_refused(llama: LensModel, thoughts: Transcripts, seen: object) -> None:
    wrong = thoughts[0].replace(extra={CLOSING_IDS: seen})
    with pytest.raises(DataError, match="Remove the key to have the template's closing"):
        tokenize(wrong, llama.tokenizer, llama.template)


# Edits that do not fit


@pytest.mark.parametrize(
    ("scope", "positions", "word"),
    [("closing", 7, "has [23]"), ("thinking", 99, "has"), ("prompt", 2, "has"), ("all", 5, "still to be generated")],
)
def test_values_for_another_number_of_positions_are_refused(
    talker: LensModel, thoughts: Transcripts, scope: str, positions: int, word: str
) -> None:
    edit = HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=made_values(talker, positions), scope=Scope.parse(scope))
    with pytest.raises(EditError, match=f"Values for {positions} positions .*{word}"):
        answer_transcripts(talker, thoughts[:2], edit=edit)


@pytest.mark.parametrize("scope", ["thinking", "all"])
def test_values_by_position_over_text_that_is_not_there_yet_are_refused(
    talker: LensModel, prompts: Transcripts, scope: str
) -> None:
    edit = HeadEdit(heads=HEADS, kind=EditKind.PATCH, values=made_values(talker, 5), scope=Scope.parse(scope))
    with pytest.raises(EditError, match="still to be generated"):
        roll_out(talker, prompts[:2], **BUDGET, edit=edit)


def test_a_head_that_the_model_lacks_is_refused(talker: LensModel, thoughts: Transcripts) -> None:
    with pytest.raises(EditError, match="L99H0"):
        answer_transcripts(talker, thoughts[:1], edit=zero([HeadRef(layer=99, head=0)], scope="closing"))


def test_as_many_edits_as_transcripts_are_needed(talker: LensModel, thoughts: Transcripts) -> None:
    with pytest.raises(DataError, match="2 edits were given for 3 transcripts"):
        answer_transcripts(talker, thoughts[:3], edit=[None, None])
    with pytest.raises(GenerationError, match="max_answer=0"):
        answer_transcripts(talker, thoughts[:3], max_answer=0)
    with pytest.raises(GenerationError, match="batch_size=0"):
        answer_transcripts(talker, thoughts[:3], batch_size=0)


def test_no_transcripts_give_no_answers(talker: LensModel) -> None:
    assert len(answer_transcripts(talker, Transcripts())) == 0


# Hooks, memory, resuming


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_exception_in_any_pass_leaves_no_hook(
    talker: LensModel,
    thoughts: Transcripts,
    unchanged: Callable[[LensModel], Callable[[], None]],
    scope: str,
    fail_at: int,
) -> None:
    check, passes = unchanged(talker), list[int]()

    def fail(_module: object, _inputs: object, _output: object) -> None:
        passes.append(1)
        if len(passes) > fail_at:
            raise RuntimeError("the machine caught fire")

    handle = talker.blocks[2].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="fire"):
            answer_transcripts(talker, thoughts[:3], edit=zero(HEADS, scope=scope), max_answer=9)
        passes.clear()
        with pytest.raises(RuntimeError, match="fire"):
            roll_out(talker, thoughts[:3], edit=zero(HEADS, scope=scope), **BUDGET)
    finally:
        handle.remove()
    check()
    answer_transcripts(talker, thoughts[:3], edit=zero(HEADS, scope=scope), max_answer=9)
    check()


def test_finished_batches_are_handed_out_and_not_again(
    talker: LensModel, thoughts: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"unedited": None, "top": zero(HEADS, scope="closing"), "prompt": zero(HEADS, scope="prompt")}
    budget, parts = Budget(max_answer=5, temperature=1.0), dict[str, list[Transcripts]]()

    def keep(name: str, made: Transcripts) -> None:
        parts.setdefault(name, []).append(made)

    whole = answer_arms(talker, thoughts, arms, budget, batch_size=9, on_batch=keep)
    for name in arms:
        assert sorted(t.id for part in parts[name] for t in part) == sorted(t.id for t in thoughts)
    assert {len(part) for part in parts["top"][:-1]} == {3}
    mates, behind = list[set[str]](), answering.answer_behind

    def note(*args: object, **options: object) -> list:
        mates.append({row.id for _, row in args[2]})
        return behind(*args, **options)

    monkeypatch.setattr(answering, "answer_behind", note)
    # Killed after one arm of the second block was handed out, and before the other.
    done = {
        "unedited": Transcripts(t for part in parts["unedited"][:2] for t in part),
        "top": parts["top"][0],
        "prompt": whole["prompt"],
    }
    again, counts = dict[str, list[Transcripts]](), list[int]()
    resumed = answer_arms(
        talker,
        thoughts,
        arms,
        budget,
        batch_size=9,
        done=done,
        on_batch=lambda name, made: again.setdefault(name, []).append(made),
        progress=counts.append,
    )
    assert resumed == whole
    assert mates == [{t.id for t in part} for part in parts["top"][1:]], "batch-mates changed"
    assert {name: [t.id for part in made for t in part] for name, made in again.items()} == {
        "unedited": [t.id for part in parts["unedited"][2:] for t in part],
        "top": [t.id for part in parts["top"][1:] for t in part],
    }
    assert counts[-1] == 3 * len(thoughts)
    mates.clear()
    assert answer_arms(talker, thoughts, arms, budget, batch_size=9, done=whole) == whole
    assert mates == []


def test_what_is_done_must_be_an_answer_to_the_same_thinking(talker: LensModel, thoughts: Transcripts) -> None:
    other = thoughts[:2].map(lambda t: t.replace(thinking="hm"))
    with pytest.raises(DataError, match="2 of 2 answers of arm 'top' that are done already"):
        answer_arms(talker, thoughts, {"top": None}, Budget(), done={"top": other})


@pytest.mark.parametrize("n_arms", [1, 4])
def test_where_memory_runs_out_the_batch_is_halved_and_that_is_said(
    talker: LensModel, thoughts: Transcripts, monkeypatch: pytest.MonkeyPatch, n_arms: int
) -> None:
    arms = {f"{i}": zero([HeadRef(layer=i, head=1)], scope="closing") for i in range(n_arms)}
    budget, behind, sizes = Budget(max_answer=4), answering.answer_behind, list[int]()
    whole = answer_arms(talker, thoughts, arms, budget)

    def cramped(*args: object, **options: object) -> list:
        sizes.append(len(args[2]))
        if len(args[2]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return behind(*args, **options)

    monkeypatch.setattr(answering, "answer_behind", cramped)
    found = answer_arms(talker, thoughts, arms, budget, batch_size=12)
    assert sizes[0] > 3
    assert max(sizes[-3:]) <= 3
    for name in arms:
        assert answers(found[name]) == answers(whole[name])
        assert {t.extra[HALVED] for t in found[name]} == {{1: 3, 4: 2}[n_arms]}
    monkeypatch.setattr(answering, "answer_behind", lambda *_, **__: cramped(0, 0, range(9)))
    with pytest.raises(GenerationError, match="Memory does not suffice to answer"):
        answer_arms(talker, thoughts, arms, budget)


def test_the_batch_that_is_found_is_larger_than_that_of_a_roll_out(
    llama: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "free_bytes", lambda _device: 10**15)
    assert batches.find_batch_size(llama, 100, most=answering.MOST_ANSWERS) == answering.MOST_ANSWERS > MOST_ROWS


def test_exactly_the_tokens_of_the_scope_are_changed_and_no_padding(llama: LensModel, thoughts: Transcripts) -> None:
    """What the output projection is given in the pass that reads, edited and not, in a batch of rows of all lengths."""
    some = Transcripts(sorted(thoughts, key=lambda t: len(t.thinking_ids))[:: max(1, len(thoughts) // 4)])
    masks, given, runs = list[torch.Tensor](), list[torch.Tensor](), list[int]()
    handles = [
        llama.decoder.register_forward_pre_hook(
            lambda _module, _args, options: masks.append(options["attention_mask"]), with_kwargs=True
        ),
        llama.output_projection(1).register_forward_hook(lambda _module, args, _output: given.append(args[0])),
    ]
    try:
        for edit in (None, zero(HEADS, scope="thinking")):
            runs.append(len(given))
            answer_transcripts(llama, some, edit=edit, max_answer=1)
    finally:
        for handle in handles:
            handle.remove()
    (plain, edited), mask = (given[start] for start in runs), masks[0]
    assert len(set(mask.sum(1).tolist())) > 1, "no row was padded"
    rows = sorted((before_answer(llama, t)[1] for t in some), key=lambda spans: -len(spans))
    size = llama.shape.d_head
    changed = (plain != edited).unflatten(-1, (-1, size)).any(-1)
    width = mask.shape[1]
    for i, spans in enumerate(rows):
        before = [span for span in spans if span != CLOSING]
        expected = [False] * (width - len(before)) + [span == THINKING for span in before]
        assert changed[i, :, 2].tolist() == changed[i, :, 1].tolist() == expected
    assert not changed[:, :, [0, *range(3, 8)]].any()
