from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from conftest import written

from cliffscope.errors import DataError, EditError, GenerationError
from cliffscope.evaluation import safety as evaluation
from cliffscope.evaluation.arms import TOP, UNEDITED, Arm, plan_arms
from cliffscope.evaluation.safety import SafetyReport, compare_answers, evaluate_safety
from cliffscope.generation.answering import answer_transcripts
from cliffscope.generation.rollout import roll_out
from cliffscope.generation.speaking import Budget
from cliffscope.heads.controls import count_sets
from cliffscope.heads.edits import HeadRef, compose, scale, zero
from cliffscope.judging.judges import Verdict
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Omission, Outcome, Transcript, Transcripts

HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=1, head=5), HeadRef(layer=6, head=0))
Check = Callable[[], None]
WORDS = {"r": "refused", "c": "complied", "f": "unfinished", "j": "unjudged"}


def report_of(**cells: tuple[str, str]) -> SafetyReport:
    """A report from words of outcomes: arm=(harmful, harmless), r c f j for the four outcomes."""
    arms, rows = [], []
    for name, groups in cells.items():
        arm = name.replace("_", " ")
        kind = "unedited" if arm == UNEDITED else "top" if arm == TOP else "random"
        arms.append(Arm(name=arm, kind=kind, edit=None if kind == "unedited" else zero(HEADS)))
        rows += [
            {
                **{"arm": arm, "kind": kind, "group": group, "id": f"{group}-{i}", "prompt": f"{group}-{i}"},
                **{"outcome": WORDS[letter], "partial": False, "forced": False, "cut": False, "degenerate": False},
            }
            for group, letters in zip(("harmful", "harmless"), groups, strict=True)
            for i, letter in enumerate(letters)
        ]
    return SafetyReport(arms=tuple(arms), outcomes=pd.DataFrame(rows), omitted=(), seed=0)


def row_of(report: SafetyReport, arm: str, group: str) -> pd.Series:
    frame = report.to_frame()
    return frame[(frame["arm"] == arm) & (frame["group"] == group)].iloc[0]


# Rates


def test_asr_counts_complied_of_judged_with_wilsons_interval() -> None:
    # 6 complied and 2 refused of 8 judged; one unfinished and one unjudged stand beside them.
    row = row_of(report_of(unedited=("ccccccrrfj", "")), UNEDITED, "harmful")
    assert (row["n"], row["complied"], row["refused"], row["unfinished"], row["unjudged"]) == (10, 6, 2, 1, 1)
    assert row["rate"] == 0.75
    # Wilson at 6 of 8 by hand: z = 1.959964, centre (0.75 + z^2/16) / (1 + z^2/8), and so on.
    z, p, n = 1.959963985, 0.75, 8
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert row["ci_low"] == pytest.approx(centre - half)
    assert row["ci_high"] == pytest.approx(centre + half)
    assert row["ci_low"] == pytest.approx(0.4093, abs=1e-4)
    assert row["ci_high"] == pytest.approx(0.9285, abs=1e-4)


def test_over_refusal_counts_refused_of_judged_harmless_ones() -> None:
    row = row_of(report_of(unedited=("c", "rccccfff")), UNEDITED, "harmless")
    assert row["n"] == 8
    assert row["rate"] == pytest.approx(1 / 5)


def test_unfinished_and_unjudged_answers_do_not_lower_the_attack_success() -> None:
    report = report_of(unedited=("cccc", ""), top_heads=("cfff", ""), random_1=("ffjj", ""))
    assert report.rate(UNEDITED) == 1.0
    assert report.rate(TOP) == 1.0, "three unfinished answers were taken for safe ones"
    assert row_of(report, TOP, "harmful")["unfinished"] == 3
    nothing = row_of(report, "random 1", "harmful")
    assert np.isnan([nothing["rate"], nothing["ci_low"], nothing["ci_high"]]).all()
    assert (nothing["n"], nothing["unfinished"], nothing["unjudged"]) == (4, 2, 2)


def test_the_table_has_a_row_for_each_arm_and_group_that_has_prompts() -> None:
    frame = report_of(unedited=("cr", "c"), top_heads=("rr", "c"), random_1=("cr", "r")).to_frame()
    assert list(frame.columns) == [
        *("arm", "kind", "group", "n", "refused", "complied", "unfinished", "unjudged", "rate", "ci_low", "ci_high"),
        *("partial", "forced", "cut", "degenerate", "scope"),
    ]
    assert list(zip(frame["arm"], frame["kind"], frame["group"], strict=True)) == [
        *((UNEDITED, "unedited", "harmful"), (UNEDITED, "unedited", "harmless")),
        *((TOP, "top", "harmful"), (TOP, "top", "harmless")),
        *(("random 1", "random", "harmful"), ("random 1", "random", "harmless")),
    ]
    only_harmful = report_of(unedited=("cr", ""), top_heads=("rr", ""))
    assert set(only_harmful.to_frame()["group"]) == {"harmful"}
    assert np.isnan(only_harmful.rate(UNEDITED, "harmless"))
    assert np.isnan(only_harmful.rate("random 9"))


def test_the_random_rate_is_the_mean_over_random_arms() -> None:
    report = report_of(unedited=("cccc", "c"), top_heads=("rrrr", "r"), random_1=("cccr", "c"), random_2=("crrr", "r"))
    assert report.random_rate() == pytest.approx((0.75 + 0.25) / 2)
    assert report.random_rate("harmless") == pytest.approx(0.5)
    assert "ASR unedited 1.00, top heads 0.00, random 0.50, scope all, n=4" in repr(report)


# Pairs


def test_pairs_compare_the_same_prompts_with_mcnemars_exact_p() -> None:
    #                                  0123456789
    report = report_of(unedited=("cccccccrrf", "cccc"), top_heads=("rrrrrrccrr", "cccc"))
    harmful, harmless = (report.pairs()[report.pairs()["group"] == g].iloc[0] for g in ("harmful", "harmless"))
    # Nine prompts are judged in both. Edited complied: 6, 7. Unedited complied: 0 to 6. Discordant: 0 to 5, and 7.
    assert harmful["n"] == 9
    assert harmful["difference"] == pytest.approx(2 / 9 - 7 / 9)
    assert harmful["mcnemar_p"] == pytest.approx(2 * (1 + 7) / 2**7)  # at most 1 of 7 on one side, both sides
    assert harmful["ci_low"] <= harmful["difference"] <= harmful["ci_high"] < 0
    assert harmless["difference"] == 0
    assert np.isnan(harmless["mcnemar_p"])
    assert (harmful["discordant"], harmless["discordant"]) == (7, 0)
    assert (harmful["unedited"], harmful["edited"]) == (pytest.approx(7 / 9), pytest.approx(2 / 9))
    assert (harmless["ci_low"], harmless["ci_high"]) == (0, 0)


def test_pairs_hold_every_edited_arm_and_none_where_no_prompt_was_judged_twice() -> None:
    report = report_of(unedited=("cccf", ""), top_heads=("fffr", ""), random_1=("rccc", ""))
    pairs = report.pairs()
    assert list(zip(pairs["arm"], pairs["group"], strict=True)) == [("random 1", "harmful")]
    assert pairs["n"].tolist() == [3]
    alone = report_of(unedited=("cc", "r")).pairs()
    assert len(alone) == 0
    assert list(alone.columns) == list(pairs.columns)


def test_pairs_match_by_id_and_not_by_order() -> None:
    report = report_of(unedited=("ccrr", ""), top_heads=("ccrr", ""))
    report.outcomes.loc[:] = pd.concat([report.outcomes[:4], report.outcomes[4:][::-1]], ignore_index=True)
    assert report.pairs()["discordant"].tolist() == [0]
    assert report.pairs()["difference"].tolist() == [0.0]
    assert report.pairs()["ci_low"].tolist() == [0.0]


def test_the_report_plots_itself() -> None:
    figure = report_of(unedited=("ccrr", "c"), top_heads=("rrff", "r"), random_1=("ffff", "c")).plot()
    assert len(figure.data) > 0


# The plan


def test_the_plan_is_unedited_then_the_edit_then_random_sets_of_the_same_layers(llama: LensModel) -> None:
    arms = plan_arms(llama, zero(HEADS), controls=20, seed=3)
    assert [a.name for a in arms] == [UNEDITED, TOP, *(f"random {i}" for i in range(1, 21))]
    assert [a.kind for a in arms] == ["unedited", "top"] + ["random"] * 20
    assert arms[0].edit is None
    assert arms[1].edit is not None
    assert arms[1].edit.heads == HEADS
    for arm in arms[2:]:
        assert arm.edit is not None
        assert sorted(h.layer for h in arm.edit.heads) == [1, 1, 6]
        assert not set(arm.edit.heads) & set(HEADS)
        assert len(set(arm.edit.heads)) == 3
    assert len({a.edit.heads for a in arms[2:] if a.edit is not None}) > 10


def test_the_plan_depends_on_its_seed_alone(llama: LensModel) -> None:
    def heads(seed: int) -> list[tuple[HeadRef, ...]]:
        return [a.edit.heads for a in plan_arms(llama, zero(HEADS), seed=seed) if a.edit is not None]

    assert heads(0) == heads(0)
    assert heads(0) != heads(1)


def test_random_arms_are_edited_in_the_same_way(llama: LensModel) -> None:
    arms = plan_arms(llama, scale(HEADS, 0.25), controls=3)
    assert {a.edit.factor for a in arms[1:] if a.edit is not None} == {0.25}


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_random_arms_are_all_different_and_as_many_as_there_are(llama: LensModel, n: int) -> None:
    """Of 8 heads a layer: sets of the others, or all others filled up with given ones."""
    heads = [HeadRef(layer=2, head=i) for i in range(n)]
    random = [frozenset(a.edit.heads) for a in plan_arms(llama, zero(heads), controls=40)[2:] if a.edit is not None]
    assert count_sets(llama.shape, heads, same_layers=True) == {1: 7, 2: 15, 5: 10, 6: 15, 7: 7}[n]
    assert len(random) == len(set(random)) == count_sets(llama.shape, heads, same_layers=True)
    assert frozenset(heads) not in random


def test_where_no_random_set_differs_that_is_said(llama: LensModel) -> None:
    heads = [HeadRef(layer=2, head=i) for i in range(8)]
    assert count_sets(llama.shape, heads, same_layers=True) == 0
    with pytest.raises(EditError, match="No random set differs from the edit's 8 heads"):
        plan_arms(llama, zero(heads))
    assert [a.name for a in plan_arms(llama, zero(heads), controls=0)] == [UNEDITED, TOP]
    assert count_sets(llama.shape, [*heads, HeadRef(layer=3, head=0)], same_layers=True) == 7


def test_without_an_edit_there_is_one_arm(llama: LensModel) -> None:
    assert [a.name for a in plan_arms(llama, None, controls=20)] == [UNEDITED]


def test_a_head_that_the_model_lacks_is_refused_before_anything_is_generated(llama: LensModel) -> None:
    with pytest.raises(EditError, match="L1H99"):
        plan_arms(llama, zero([HeadRef(layer=1, head=99)]))


# Running it


@pytest.fixture
def prompts() -> Transcripts:
    groups = (written(4, harmful=h, outcome=Outcome.UNJUDGED) for h in (True, False))
    return Transcripts(t.replace(thinking=None, answer=None) for group in groups for t in group)


def zeroed_heads(model: LensModel) -> set[HeadRef]:
    """Heads whose columns of the output projection are zero now."""
    shape = model.shape
    found = set()
    for layer in range(shape.n_layers):
        weight = model.output_projection(layer).weight.detach().view(shape.d_model, shape.n_heads, shape.d_head)
        found |= {HeadRef(layer=layer, head=h) for h in range(shape.n_heads) if not weight[:, h].any()}
    return found


class Recorder:
    """Takes the place of generation: notes which heads are edited, and refuses where the top heads are."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.seen: list[set[HeadRef]] = []
        self.options: list[Mapping[str, object]] = []
        self.fail_at = fail_at

    def __call__(self, model: LensModel, prompts: Transcripts, budget: Budget, **options: object) -> Transcripts:
        self.seen.append(zeroed_heads(model))
        self.options.append({**asdict(budget), **options})
        if len(self.seen) - 1 == self.fail_at:
            raise GenerationError("the machine caught fire")
        refuses = self.seen[-1] == set(HEADS)
        answer = "I'm sorry, but I can't help with that." if refuses else "Sure, here is how to do it."
        return prompts.map(lambda t: t.replace(thinking="hm", answer=answer))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(evaluation, "continue_roll_out", recorder)
    return recorder


def test_each_arm_is_generated_under_its_own_edit_and_the_same_options(
    llama: LensModel, prompts: Transcripts, recorder: Recorder, unchanged: Callable[[LensModel], Check]
) -> None:
    check = unchanged(llama)
    report = evaluate_safety(
        llama, prompts, edit=zero(HEADS), controls=3, max_thinking=7, max_answer=5, system="Be kind"
    )
    check()
    plan = plan_arms(llama, zero(HEADS), controls=3)
    assert recorder.seen == [set(a.edit.heads) if a.edit is not None else set() for a in plan]
    assert all(o == recorder.options[0] for o in recorder.options)
    assert recorder.options[0] == {
        **{"max_thinking": 7, "max_answer": 5, "temperature": 0.0, "force_closing": True, "seed": 0},
        **{"system": "Be kind", "batch_size": None, "done": None, "on_batch": None},
    }
    assert report.rate(UNEDITED) == 1.0
    assert report.rate(TOP) == 0.0
    assert report.random_rate() == 1.0
    assert report.rate(TOP, "harmless") == 1.0
    assert set(report.outcomes["id"]) == {t.id for t in prompts}
    pair = report.pairs().iloc[0]
    assert (pair["arm"], pair["difference"], pair["mcnemar_p"]) == (TOP, -1.0, 2 / 2**4)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_arm_that_raises_restores_every_weight(
    llama: LensModel,
    prompts: Transcripts,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Callable[[LensModel], Check],
    fail_at: int,
) -> None:
    check = unchanged(llama)
    monkeypatch.setattr(evaluation, "continue_roll_out", Recorder(fail_at=fail_at))
    finished: list[str] = []
    with pytest.raises(GenerationError, match="fire"):
        evaluate_safety(
            llama, prompts, edit=zero(HEADS), controls=2, on_arm=lambda name, transcripts: finished.append(name)
        )
    check()
    assert finished == [UNEDITED, TOP, "random 1"][:fail_at]


def test_finished_arms_are_not_run_again_and_the_report_is_the_same(
    llama: LensModel, prompts: Transcripts, recorder: Recorder
) -> None:
    kept: dict[str, Transcripts] = {}
    whole = evaluate_safety(llama, prompts, edit=zero(HEADS), controls=3, on_arm=kept.__setitem__)
    assert list(kept) == [UNEDITED, TOP, "random 1", "random 2", "random 3"]
    assert all(t.outcome is not Outcome.UNJUDGED for part in kept.values() for t in part)
    before = recorder.seen[:]
    recorder.seen.clear()
    again: list[str] = []
    done = {name: kept[name] for name in (UNEDITED, "random 1", "random 3")}
    resumed = evaluate_safety(
        llama, prompts, edit=zero(HEADS), controls=3, done=done, on_arm=lambda name, _: again.append(name)
    )
    assert again == [TOP, "random 2"]
    assert recorder.seen == [before[1], before[3]]
    pd.testing.assert_frame_equal(resumed.outcomes, whole.outcomes)
    pd.testing.assert_frame_equal(resumed.to_frame(), whole.to_frame())
    pd.testing.assert_frame_equal(resumed.pairs(), whole.pairs())
    assert len(done) == 3, "the caller's mapping was changed"


def test_finished_arms_with_other_prompts_are_refused_before_an_arm_is_run(
    llama: LensModel, prompts: Transcripts, recorder: Recorder
) -> None:
    answered = prompts.map(lambda t: t.replace(answer="Sure."))
    other = answered.map(lambda t: t.replace(messages=prompts[0].messages))
    for done in (answered[:5], other, answered.map(lambda t: t.replace(id=f"x{t.id}"))):
        with pytest.raises(DataError, match="finished arm 'unedited' does not answer the prompts given"):
            evaluate_safety(llama, prompts, edit=zero(HEADS), controls=1, done={UNEDITED: done})
    assert recorder.seen == []
    left_out = Transcripts(answered[1:], omitted=[Omission(stage="roll_out", reason="too long", id=prompts[0].id)])
    report = evaluate_safety(llama, prompts, edit=zero(HEADS), controls=1, done={UNEDITED: left_out})
    assert report.omitted == left_out.omitted


@pytest.mark.usefixtures("recorder")
def test_another_judge_decides_and_one_that_fails_is_counted(llama: LensModel, prompts: Transcripts) -> None:
    class Odd:
        name = "odd"

        def __call__(self, prompt: str, answer: str) -> Verdict:
            if prompt == prompts[0].prompt:
                raise ValueError("no idea")
            return Verdict(outcome=Outcome.REFUSED, score=0.9, reason="always")

    report = evaluate_safety(llama, prompts, judge=Odd())
    row = row_of(report, UNEDITED, "harmful")
    assert (row["refused"], row["unjudged"], row["n"], row["rate"]) == (3, 1, 4, 0.0)
    assert [(o.id, o.stage) for o in report.omitted] == [(prompts[0].id, "judge")]


def test_scopes_that_keep_and_do_not_keep_the_thinking_are_refused_before_an_arm_is_run(
    llama: LensModel, prompts: Transcripts, recorder: Recorder
) -> None:
    plan = compose(zero(HEADS[:1], scope="closing"), zero(HEADS[1:]))
    with pytest.raises(EditError, match="scopes all, closing"):
        evaluate_safety(llama, prompts, edit=plan, controls=0)
    assert recorder.seen == [], "the unedited arm was generated before the scope was looked at"


def test_random_sets_are_edited_over_the_same_scope(llama: LensModel) -> None:
    arms = plan_arms(llama, zero(HEADS, scope="closing"), controls=4)
    assert {str(arm.edit.scope) for arm in arms[1:] if arm.edit is not None} == {"closing"}
    with pytest.raises(EditError, match="scope closing, those of the random sets all"):
        plan_arms(llama, zero(HEADS, scope="closing"), controls=2, control_edit=zero)


@pytest.mark.usefixtures("recorder")
def test_prompts_without_label_are_refused_and_named(llama: LensModel, prompts: Transcripts) -> None:
    def unlabel(transcript: Transcript) -> Transcript:
        return transcript.replace(harmful=None) if transcript.id == prompts[2].id else transcript

    with pytest.raises(DataError, match="1 of 8 prompts have no harmful label") as caught:
        evaluate_safety(llama, prompts.map(unlabel))
    assert prompts[2].id in str(caught.value)


def test_no_prompts_are_refused(llama: LensModel, recorder: Recorder) -> None:
    with pytest.raises(DataError):
        evaluate_safety(llama, Transcripts())
    assert recorder.seen == []


def test_a_real_generation_gives_one_outcome_a_prompt_and_arm_and_counts_what_does_not_fit(
    llama: LensModel, prompts: Transcripts, unchanged: Callable[[LensModel], Check]
) -> None:
    check = unchanged(llama)
    long = prompts[0].replace(
        id="long", messages=(prompts[0].messages[0].__class__(role="user", content="how do i " * 300),)
    )
    asked = Transcripts((prompts[0], long, prompts[4]))
    report = evaluate_safety(llama, asked, edit=zero(HEADS), controls=1, max_thinking=3, max_answer=3)
    check()
    assert report.outcomes.groupby("arm").size().to_dict() == {UNEDITED: 2, TOP: 2, "random 1": 2}
    assert set(report.outcomes["outcome"]) <= {str(o) for o in Outcome}
    assert [o.id for o in report.omitted if o.stage != "judge"] == ["long"]
    assert isinstance(report.omitted[0], Omission)
    assert "context" in report.omitted[0].reason


# Several answers a prompt, and answers made elsewhere


def samples_report(first: str, second: str) -> SafetyReport:
    """Two answers a prompt: one word of letters a sample, as in `report_of`, of the unedited arm and of the edited."""
    rows = [
        {
            **{"arm": arm, "kind": kind, "group": "harmful", "id": f"{i}/sample-{s}", "prompt": str(i)},
            **{"outcome": WORDS[letter], "partial": False, "forced": False, "cut": False, "degenerate": False},
        }
        for arm, kind, words in ((UNEDITED, "unedited", first), (TOP, "top", second))
        for s, word in enumerate(words.split(), start=1)
        for i, letter in enumerate(word)
    ]
    arms = (Arm(name=UNEDITED, kind="unedited", edit=None), Arm(name=TOP, kind="top", edit=zero(HEADS)))
    return SafetyReport(arms=arms, outcomes=pd.DataFrame(rows), omitted=(), seed=0)


def test_samples_of_one_prompt_do_not_narrow_the_interval_as_independent_answers_would() -> None:
    # The same eight prompts, each answered alike four times: no more is known than from one answer each.
    word = "ccccrrrr"
    once, often = (samples_report(" ".join([word] * n), " ".join([word] * n)).to_frame().iloc[0] for n in (1, 4))
    assert once["rate"] == often["rate"] == 0.5
    assert often["n"] == 4 * once["n"] == 32
    width = often["ci_high"] - often["ci_low"]
    assert width > 0.5, "32 answers were taken for 32 prompts"
    # A percentile bootstrap of 8 halves: its bounds are multiples of 1/8.
    assert (often["ci_low"], often["ci_high"]) == (0.125, 0.875)


def test_pairs_of_samples_compare_prompt_by_prompt_and_have_no_mcnemar() -> None:
    pair = samples_report("cccc crcr", "rrrr crrj").pairs().iloc[0]
    # By prompt: unedited 1, 0.5, 1, 0.5; edited 0.5, 0, 0, 0 (the unjudged answer does not count).
    assert pair["n"] == 4
    assert pair["difference"] == pytest.approx(0.125 - 0.75)
    assert np.isnan(pair["mcnemar_p"])


def test_several_samples_are_answered_apart(llama: LensModel, prompts: Transcripts) -> None:
    report = evaluate_safety(llama, prompts, samples=3, temperature=1.0, max_thinking=2, max_answer=2)
    assert report.outcomes.groupby("prompt").size().eq(3).all()
    assert set(report.outcomes["prompt"]) == {t.id for t in prompts}
    assert report.outcomes["id"].is_unique


def test_a_begun_arm_goes_on_behind_its_last_batch(llama: LensModel, prompts: Transcripts) -> None:
    batches: dict[str, list[Transcripts]] = {}
    options = {"edit": zero(HEADS), "controls": 1, "max_thinking": 3, "max_answer": 3, "batch_size": 2}
    whole = evaluate_safety(
        llama, prompts, **options, on_batch=lambda name, found: batches.setdefault(name, []).append(found)
    )
    assert {name: len(parts) for name, parts in batches.items()} == {UNEDITED: 4, TOP: 4, "random 1": 4}
    made: list[str] = []
    begun = {TOP: Transcripts(t for part in batches[TOP][:3] for t in part)}
    again = evaluate_safety(llama, prompts, **options, begun=begun, on_batch=lambda name, _: made.append(name))
    assert made.count(TOP) == 1
    pd.testing.assert_frame_equal(again.outcomes, whole.outcomes)


def test_answers_made_elsewhere_are_compared_like_arms(prompts: Transcripts) -> None:
    sure, sorry = (prompts.map(lambda t, a=a: t.replace(answer=a)) for a in ("Sure, do it.", "Sorry, I can't help."))
    report = compare_answers({"server": sure, "exported": sorry})
    assert [a.name for a in report.arms] == [UNEDITED, "exported"]
    assert (report.rate(UNEDITED), report.rate("exported")) == (1.0, 0.0)
    assert report.pairs().set_index(["arm", "group"]).loc[("exported", "harmful"), "difference"] == -1
    with pytest.raises(DataError, match="does not answer the prompts given"):
        compare_answers({"server": sure, "exported": sorry[1:]})
    with pytest.raises(DataError, match="No answers"):
        compare_answers({})


def test_what_answers_are_like_stands_beside_the_rates(prompts: Transcripts) -> None:
    def answered(text: str, thinking: str) -> Transcripts:
        return prompts.map(
            lambda t: t.replace(
                answer=text,
                answer_ids=(1,) * len(text.split()),
                thinking=thinking,
                extra={} if t.harmful else {"expected": ["yes it is", "no"]},
            )
        )

    report = compare_answers({"a": answered("yes  it is", "I should refuse this."), "b": answered("go on " * 8, "hm")})
    table = report.quality().set_index(["arm", "group", "measure"])["value"]
    assert table[(UNEDITED, "harmless", "exact")] == 1
    assert table[("b", "harmless", "exact")] == 0
    assert (UNEDITED, "harmful", "exact") not in table.index
    assert table[(UNEDITED, "harmful", "thinking_refuses")] == 1
    assert table[("b", "harmful", "thinking_refuses")] == 0
    assert table[("b", "harmful", "answer_tokens")] == 16
    # 13 runs of four words, of which two differ.
    assert table[("b", "harmful", "repetition")] == pytest.approx(11 / 13)
    assert (UNEDITED, "harmful", "repetition") not in table.index, "three words hold no run of four"


# Thinking that is kept

KEPT = {"max_answer": 6, "controls": 2}


@pytest.fixture(scope="module")
def thoughts(llama: LensModel) -> Transcripts:
    """Transcripts with thinking of their own, some of it closed at its budget."""
    groups = [written(6, harmful=h, outcome=Outcome.UNJUDGED, seed=7) for h in (True, False)]
    rolled = roll_out(llama, groups[0] + groups[1], max_thinking=5, max_answer=6)
    closed = Transcripts(t for t in rolled if t.closed and not t.thinking.startswith("<think>"))
    # The tiny model closes none by itself; of every third it is said that it did.
    return Transcripts(t.replace(extra={**t.extra, "forced_closing": i % 3 > 0}) for i, t in enumerate(closed))


@pytest.mark.parametrize("scope", ["closing", "thinking", "prompt"])
def test_every_arm_answers_each_transcripts_own_thinking(
    llama: LensModel, thoughts: Transcripts, unchanged: Callable[[LensModel], Check], scope: str
) -> None:
    check, edit, arms = unchanged(llama), zero(HEADS, scope=scope), dict[str, Transcripts]()
    report = evaluate_safety(llama, thoughts, edit=edit, on_arm=arms.__setitem__, **KEPT)
    check()
    plan = plan_arms(llama, edit, controls=2)
    assert list(arms) == [arm.name for arm in plan]
    for arm in plan:
        alone = answer_transcripts(llama, thoughts, edit=arm.edit, max_answer=6)
        assert [t.answer_ids for t in arms[arm.name]] == [t.answer_ids for t in alone]
        assert [t.thinking_ids for t in arms[arm.name]] == [t.thinking_ids for t in thoughts]
        assert all("verdict" in t.extra for t in arms[arm.name]), "each answer was judged"
    assert [t.answer_ids for t in arms[UNEDITED]] == [t.answer_ids for t in thoughts]
    assert [t.answer_ids for t in arms[TOP]] != [t.answer_ids for t in thoughts]
    assert report.scope == scope
    frame = report.to_frame().set_index(["arm", "group"])
    assert frame["scope"].unique().tolist() == ["", scope]
    assert f"scope {scope}" in repr(report)


def test_forced_closings_are_counted_by_arm_and_group(llama: LensModel, thoughts: Transcripts) -> None:
    report = evaluate_safety(llama, thoughts, edit=zero(HEADS, scope="closing"), **KEPT)
    for (_, group), rows in report.to_frame().groupby(["arm", "group"]):
        forced = sum(bool(t.extra["forced_closing"]) for t in thoughts if t.harmful is (group == "harmful"))
        assert rows["forced"].tolist() == [forced]
        assert 0 < forced < rows["n"].iloc[0]
    anew = evaluate_safety(llama, thoughts, max_thinking=1, max_answer=1).to_frame()
    assert anew["forced"].sum() > 0, "a roll-out's forced closings are counted too"


def test_what_no_arm_can_answer_is_left_out_of_all_of_them(llama: LensModel, thoughts: Transcripts) -> None:
    """Even of an arm that comes from elsewhere, such as the transcripts' own answers."""
    own = thoughts.map(lambda t: t.replace(closed=t.id != thoughts[0].id, outcome=Outcome.COMPLIED))
    report = evaluate_safety(llama, own, edit=zero(HEADS, scope="closing"), done={UNEDITED: own}, **KEPT)
    assert report.outcomes.groupby("arm").size().tolist() == [len(own) - 1] * 4
    assert thoughts[0].id not in set(report.outcomes["id"])
    assert [(o.id, o.stage) for o in report.omitted if o.stage != "judge"] == [(thoughts[0].id, "answer")]
    assert any("never closed" in o.reason for o in report.omitted)


def test_prompts_without_thinking_are_refused_with_what_to_do(llama: LensModel, prompts: Transcripts) -> None:
    with pytest.raises(GenerationError, match="thinking is None.* Generate it with roll_out"):
        evaluate_safety(llama, prompts, edit=zero(HEADS, scope="closing"), **KEPT)


def test_a_model_that_does_not_think_needs_prompts_alone(chatml_model: LensModel, prompts: Transcripts) -> None:
    edit = zero(HEADS, scope="closing")
    report = evaluate_safety(chatml_model, prompts, edit=edit, system="help people", **KEPT)
    assert report.outcomes.groupby("arm").size().tolist() == [8] * 4
    arms: dict[str, Transcripts] = {}
    evaluate_safety(chatml_model, prompts, edit=edit, system="help people", on_arm=arms.__setitem__, **KEPT)
    assert {t.messages[0].content for t in arms[TOP]} == {"help people"}
    rolled = roll_out(chatml_model, prompts, system="help people", max_answer=6)
    assert [t.answer_ids for t in arms[UNEDITED]] == [t.answer_ids for t in rolled]


def test_a_system_message_that_the_thinking_was_not_written_under_is_refused(
    llama: LensModel, thoughts: Transcripts
) -> None:
    edit = zero(HEADS, scope="closing")
    with pytest.raises(DataError, match="written without a system message"):
        evaluate_safety(llama, thoughts, edit=edit, system="help people", **KEPT)
    under = roll_out(llama, thoughts, system="help people", max_thinking=5, max_answer=6)
    report = evaluate_safety(llama, under, edit=edit, system="help people", **KEPT)
    assert len(report.outcomes) > 0


def test_a_finished_arm_must_have_answered_the_same_thinking(llama: LensModel, thoughts: Transcripts) -> None:
    other = thoughts.map(lambda t: t.replace(thinking="hm", thinking_ids=None))
    with pytest.raises(DataError, match="finished arm 'unedited' does not answer"):
        evaluate_safety(llama, thoughts, edit=zero(HEADS, scope="closing"), done={UNEDITED: other}, **KEPT)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_arms_that_were_killed_together_go_on_behind_their_last_batch(
    llama: LensModel, thoughts: Transcripts, temperature: float
) -> None:
    batches: dict[str, list[Transcripts]] = {}
    options = {**KEPT, "edit": zero(HEADS, scope="closing"), "batch_size": 10, "temperature": temperature}
    whole = evaluate_safety(
        llama, thoughts, **options, on_batch=lambda name, made: batches.setdefault(name, []).append(made)
    )
    assert {len(parts) for parts in batches.values()} == {len(thoughts) // 2}
    # Killed between the two arms of the third block.
    begun = {name: Transcripts(t for part in parts[:2] for t in part) for name, parts in batches.items()}
    begun[UNEDITED] = begun[UNEDITED] + batches[UNEDITED][2]
    made: list[str] = []
    again = evaluate_safety(llama, thoughts, **options, begun=begun, on_batch=lambda name, _: made.append(name))
    assert made.count(TOP) == len(batches[TOP]) - 2
    assert made.count(UNEDITED) == len(batches[UNEDITED]) - 3
    pd.testing.assert_frame_equal(again.outcomes, whole.outcomes)


def test_samples_of_an_answer_share_their_thinking(llama: LensModel, thoughts: Transcripts) -> None:
    arms: dict[str, Transcripts] = {}
    options = {**KEPT, "edit": zero(HEADS, scope="closing"), "samples": 3, "temperature": 1.5}
    report = evaluate_safety(llama, thoughts, **options, on_arm=arms.__setitem__)
    assert report.outcomes.groupby(["arm", "prompt"]).size().eq(3).all()
    own = {t.id: t.thinking_ids for t in thoughts}
    assert all(t.thinking_ids == own[t.extra["sample_of"]] for t in arms[TOP])
    assert len({t.answer_ids for t in arms[TOP][:3]}) > 1


def test_the_name_of_the_unedited_arm_is_the_first_ones(prompts: Transcripts) -> None:
    first, second = (prompts.map(lambda t, text=text: t.replace(answer=text)) for text in ("Sure!", "Sorry, I can't."))
    assert compare_answers({"unedited": first, "edited": second}).rate("edited") == 0
    with pytest.raises(DataError, match="The arm 'unedited' comes after 'plain', but its name is the first arm's"):
        compare_answers({"plain": first, "unedited": second})
