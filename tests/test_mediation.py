"""Whose thinking, whose answer: cells against a slow loop, effects by hand, an organism whose truth is known."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import written
from slow_generation import Change, slow_answer, slow_roll_out
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import cliffscope as cs
from cliffscope.errors import DataError, EditError
from cliffscope.evaluation.mediation import CELLS, EDITED, UNEDITED, Mediation, measure_mediation
from cliffscope.heads.edits import HeadRef, compose, scale, zero
from cliffscope.model.checkpoints import ASSETS
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts

HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=3, head=0))
BUDGET = {"max_thinking": 9, "max_answer": 6}
WORDS = {"r": "refused", "c": "complied", "f": "unfinished", "j": "unjudged"}


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    both = written(7, harmful=True, outcome=Outcome.UNJUDGED) + written(5, harmful=False, outcome=Outcome.UNJUDGED)
    return both.map(lambda t: t.replace(thinking=None, answer=None))


def slow_cells(
    model: LensModel, transcript: Transcript, changes: Sequence[Change]
) -> Mapping[tuple[str, str], list[int] | None]:
    """The four answers to one prompt by the slow loop; None where the thinking never closed."""
    answers: dict[tuple[str, str], list[int] | None] = {}
    for whose, while_thinking in ((UNEDITED, ()), (EDITED, changes)):
        slow = slow_roll_out(model, transcript, while_thinking, **BUDGET)
        before, spans = slow.seen[: len(slow.spans)], slow.spans
        for answerer, while_answering in ((UNEDITED, ()), (EDITED, changes)):
            answers[whose, answerer] = (
                None if slow.answer is None else slow_answer(model, before, spans, while_answering, max_answer=6)
            )
    return answers


@pytest.mark.parametrize("scope", ["all", "thinking", "prompt"])
def test_the_four_cells_are_those_of_a_plain_loop(talker: LensModel, prompts: Transcripts, scope: str) -> None:
    changes = [Change(layer=ref.layer, head=ref.head, scope=scope, factor=-1.5) for ref in HEADS]
    crossed = measure_mediation(talker, prompts, scale(HEADS, -1.5, scope=scope), **BUDGET)
    checked = 0
    for i, prompt in enumerate(prompts):
        expected = slow_cells(talker, prompt, changes)
        measured = {cell: transcripts[i] for cell, transcripts in crossed.cells.items()}
        if any((t.thinking or "").startswith("<think>") for t in measured.values()):
            continue
        for cell, answer in expected.items():
            assert measured[cell].id == prompt.id
            assert measured[cell].answer_ids == (None if answer is None else tuple(answer)), cell
            assert (measured[cell].outcome is Outcome.UNFINISHED) >= (answer is None)
        checked += 1
    assert checked > 6
    assert crossed.scope == scope
    texts = {cell: tuple(t.answer_ids for t in transcripts) for cell, transcripts in crossed.cells.items()}
    assert len(set(texts.values())) == 4, "two cells are the same"


def test_draws_are_the_same_in_every_cell(llama: LensModel, prompts: Transcripts) -> None:
    crossed = measure_mediation(llama, prompts, scale(HEADS, 1.0), **BUDGET, temperature=1.0, seed=3)
    first, *others = crossed.cells.values()
    assert all([t.answer_ids for t in other] == [t.answer_ids for t in first] for other in others)
    rolled = cs.roll_out(llama, prompts, **BUDGET, temperature=1.0, seed=3)
    by_id = {t.id: t.answer_ids for t in rolled}
    assert all(t.answer_ids == by_id[t.id] for t in first)


def test_thinking_that_never_closes_is_unfinished_whoever_would_have_answered(
    llama: LensModel, prompts: Transcripts
) -> None:
    crossed = measure_mediation(llama, prompts, zero(HEADS), max_thinking=2, max_answer=3, force_closing=False)
    frame = crossed.to_frame()
    for whose in (UNEDITED, EDITED):
        rows = frame[frame["thinking"] == whose]
        assert rows.groupby("group")["unfinished"].nunique().eq(1).all()
        assert rows["unfinished"].gt(0).all()
        assert rows.groupby("group")["n"].first().to_dict() == {"harmful": 7, "harmless": 5}
    assert frame["forced"].eq(0).all()
    assert measure_mediation(llama, prompts, zero(HEADS), **BUDGET).to_frame()["forced"].sum() > 0


def test_what_does_not_fit_the_context_is_an_omission(llama: LensModel, prompts: Transcripts) -> None:
    long = prompts[0].replace(id="long", messages=(Message(role="user", content="how do i " * 300),))
    crossed = measure_mediation(llama, Transcripts([long, *prompts[:2]]), zero(HEADS), **BUDGET)
    assert [o.id for o in crossed.omitted if o.stage != "judge"] == ["long"]
    assert crossed.to_frame()["n"].eq(2).all()


def test_the_model_is_as_it_was(
    llama: LensModel, prompts: Transcripts, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    check = unchanged(llama)
    measure_mediation(llama, prompts[:2], zero(HEADS), **BUDGET)
    check()


# Rates and effects


def crossed_of(*words: str, samples: int = 1) -> Mediation:
    """A result from one word of outcomes a cell, r c f j for the four, on harmful prompts."""
    rows = [
        {
            **{"thinking": thinking, "answer": answer, "group": "harmful", "id": str(i), "outcome": WORDS[letter]},
            **{"prompt": str(i // samples), "partial": False, "forced": i == 0},
            **{"cut": False, "degenerate": False},
        }
        for (thinking, answer), word in zip(CELLS, words, strict=True)
        for i, letter in enumerate(word)
    ]
    return Mediation(cells={}, outcomes=pd.DataFrame(rows), scope="all", omitted=(), seed=0)


def test_effects_are_differences_of_cells_over_prompts_judged_in_all_four() -> None:
    #                     01234567
    crossed = crossed_of("ccccccrc", "rrccccrf", "cccrccrc", "rrrrrcrc")
    effects = crossed.effects().set_index("effect")
    # Prompt 7 has no answer of the unedited thinking under the edit; seven are compared.
    assert effects["n"].eq(7).all()
    assert effects["difference"].to_dict() == pytest.approx(
        {"answer": 4 / 7 - 6 / 7, "thinking": 5 / 7 - 6 / 7, "total": 1 / 7 - 6 / 7, "interaction": -2 / 7}
    )
    shares = effects["difference"]
    assert shares["total"] == pytest.approx(shares["answer"] + shares["thinking"] + shares["interaction"])
    assert (effects["ci_low"] <= effects["difference"]).all()
    assert (effects["difference"] <= effects["ci_high"]).all()
    assert effects.loc["answer", "ci_high"] <= 0
    # McNemar's exact p by hand. answer: prompts 0 and 1 of seven change, both one way: 2 x 1/4. thinking: prompt 3
    # one way. total: prompts 0 to 4 one way and 6 not: 2 x 1/32.
    assert effects["mcnemar_p"].to_dict() == pytest.approx(
        {"answer": 0.5, "thinking": 1.0, "total": 2 / 2**5, "interaction": float("nan")}, nan_ok=True
    )
    assert crossed.rate(UNEDITED, EDITED) == 4 / 7
    assert crossed.rate(EDITED, EDITED) == 2 / 8
    assert "unedited 0.88, answer edited 0.57, thinking edited 0.75, both 0.25, scope all, n=8" in repr(crossed)


def test_an_effect_that_every_prompt_has_has_no_width_and_none_is_zero() -> None:
    effects = crossed_of("cccc", "rrrr", "cccc", "rrrr").effects().set_index("effect")
    assert effects.loc["answer", ["difference", "ci_low", "ci_high"]].tolist() == [-1, -1, -1]
    assert effects.loc["thinking", ["difference", "ci_low", "ci_high"]].tolist() == [0, 0, 0]
    assert effects.loc["interaction", "difference"] == 0


def test_cells_have_wilsons_interval_and_count_what_is_no_answer() -> None:
    row = crossed_of("ccccccrrfj", "rr", "rr", "rr").to_frame().iloc[0]
    assert (row["n"], row["complied"], row["refused"], row["unfinished"], row["unjudged"]) == (10, 6, 2, 1, 1)
    assert row["rate"] == 0.75
    # Wilson's interval at 6 of 8, as in the tests of the safety report.
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(0.4093, abs=1e-4), pytest.approx(0.9285, abs=1e-4))
    assert row["forced"] == 1


def test_samples_of_a_prompt_count_as_one() -> None:
    crossed = crossed_of("ccrr" * 4, "rrrr" * 4, "ccrr" * 4, "rrrr" * 4, samples=2)
    effects = crossed.effects().set_index("effect")
    assert effects["n"].eq(8).all()
    assert effects.loc["answer", "difference"] == -0.5
    assert effects["mcnemar_p"].isna().all()
    low, high = crossed.to_frame().loc[0, ["ci_low", "ci_high"]]
    assert high - low > 0.5, "16 answers were taken for 16 prompts"


def test_without_a_prompt_that_all_cells_judged_there_is_no_effect() -> None:
    crossed = crossed_of("cc", "ff", "cc", "rr")
    assert len(crossed.effects()) == 0
    assert list(crossed.effects().columns) == ["effect", "group", "n", "difference", "ci_low", "ci_high", "mcnemar_p"]
    assert np.isnan(crossed.rate(UNEDITED, EDITED))
    assert np.isnan(crossed.rate(UNEDITED, EDITED, "harmless"))


def test_the_four_cells_are_drawn() -> None:
    figure = crossed_of("cccr", "rrrr", "cccc", "rrrr").plot()
    assert len(figure.data) == 4
    assert list(figure.layout.yaxis.ticktext) == [f"{thinking}, then {answer}" for thinking, answer in CELLS]
    assert "whose answer" in figure.layout.title.text


# What cannot be mediated


def test_an_edit_that_leaves_the_thinking_alone_is_refused(llama: LensModel, prompts: Transcripts) -> None:
    with pytest.raises(EditError, match="edit of the closing leaves the thinking as it is"):
        measure_mediation(llama, prompts, zero(HEADS, scope="closing"))
    plan = compose(zero(HEADS[:1], scope="closing"), zero(HEADS[1:], scope="thinking"))
    assert measure_mediation(llama, prompts[:2], plan, **BUDGET).scope == "closing, thinking"


def test_a_model_that_does_not_think_is_refused(chatml_model: LensModel, prompts: Transcripts) -> None:
    with pytest.raises(DataError, match="does not think"):
        measure_mediation(chatml_model, prompts, zero(HEADS))


def test_prompts_without_a_label_and_heads_that_are_not_there_are_refused(
    llama: LensModel, prompts: Transcripts
) -> None:
    with pytest.raises(DataError, match="12 of 12 prompts have no harmful label"):
        measure_mediation(llama, prompts.map(lambda t: t.replace(harmful=None)), zero(HEADS))
    with pytest.raises(EditError, match="L99H0"):
        measure_mediation(llama, prompts, zero([HeadRef(layer=99, head=0)]))


# An organism


def answers_by_hand(
    thinker: PreTrainedModel, answerer: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> str:
    """One model's thinking, cut at its tag and answered by another, by transformers' own `generate`."""
    tag = tokenizer.convert_tokens_to_ids("</think>")
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    greedy = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def generated(model: PreTrainedModel, seen: list[int], end: int, most: int) -> list[int]:
        fed = torch.tensor([seen])
        mask = torch.ones_like(fed)
        return model.generate(fed, attention_mask=mask, eos_token_id=end, max_new_tokens=most, **greedy)[0].tolist()

    thought = generated(thinker, ids, tag, 128)
    assert thought[-1] == tag, "the thinking never closed"
    text = tokenizer.decode(thought[:-1]).rstrip("\n") + "\n</think>\n\n"
    seen = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = generated(answerer, seen, tokenizer.eos_token_id, 32)[len(seen) :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_the_cells_of_an_organism_are_those_of_transformers_generate() -> None:
    folder, truth = ASSETS / "planted-llama", cs.organisms.read_truth("planted-llama")
    plain, edited = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    size = plain.config.hidden_size // plain.config.num_attention_heads
    with torch.no_grad():
        for ref in truth.planted:
            columns = slice(ref.head * size, (ref.head + 1) * size)
            edited.model.layers[ref.layer].self_attn.o_proj.weight[:, columns] = 0
    networks, tokenizer = {UNEDITED: plain, EDITED: edited}, AutoTokenizer.from_pretrained(folder)
    prompts = cs.organisms.prompts("test", 4, harmful=True, wrappers=truth.full_wrappers)
    prompts = prompts + cs.organisms.prompts("test", 2, harmful=False)
    crossed = cs.measure_mediation(
        cs.load_model("planted-llama"), prompts, cs.zero(truth.planted), max_thinking=128, max_answer=32
    )
    for (thinking, answer), cell in crossed.cells.items():
        by_hand = [answers_by_hand(networks[thinking], networks[answer], tokenizer, t.prompt) for t in prompts]
        assert [t.answer for t in cell] == by_hand
        refused = [text.startswith("sorry") for text in by_hand[:4]]
        assert crossed.rate(thinking, answer) == 1 - sum(refused) / 4


def test_heads_planted_at_the_closing_act_through_the_answer_and_not_through_the_thinking() -> None:
    model, truth = cs.load_model("planted-llama"), cs.organisms.read_truth("planted-llama")
    prompts = cs.organisms.prompts("test", 12, harmful=True, wrappers=truth.full_wrappers)
    prompts = prompts + cs.organisms.prompts("test", 6, harmful=False)
    crossed = cs.measure_mediation(model, prompts, cs.zero(truth.planted), max_thinking=128, max_answer=32)
    effects = crossed.effects().set_index(["group", "effect"])["difference"]
    assert crossed.rate(UNEDITED, UNEDITED) == 1.0
    assert effects["harmful", "answer"] == -1.0
    assert effects["harmful", "total"] == -1.0
    assert abs(effects["harmful", "thinking"]) < 0.1
    assert effects["harmless"].abs().max() == 0
