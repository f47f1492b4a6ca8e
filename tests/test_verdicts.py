import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import fixed_report, random_probe, written

from cliffscope.evaluation.arms import TOP, UNEDITED, Arm
from cliffscope.evaluation.safety import SafetyReport
from cliffscope.heads.confirmation import Confirmation
from cliffscope.heads.controls import SetControl
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.statistics import HeadKind
from cliffscope.model.load import LensModel
from cliffscope.readouts.reports import ProbeReport, calibration_of, region_report
from cliffscope.readouts.text_baseline import TextBaseline
from cliffscope.readouts.trace import Cliffs
from cliffscope.selection.choice import Selection, select_from_cliffs
from cliffscope.study import verdicts
from cliffscope.transcripts.records import Outcome, Transcripts

EMPTY = np.zeros(0)


def says_nan(text: str) -> bool:
    return re.search(r"\bnan\b", text, re.IGNORECASE) is not None


# Probe


@pytest.fixture(scope="module")
def report(llama: LensModel) -> ProbeReport:
    """A probe that can tell everywhere."""
    return random_probe(llama, 3).report


def test_without_a_probe_nothing_is_claimed() -> None:
    told = verdicts.no_probe("The fit split holds 0 refused transcripts.")
    assert told.startswith("No probe could be fitted, so nothing is claimed.")
    assert "0 refused" in told


def test_a_probe_that_can_tell_is_told_with_auroc_interval_and_n(report: ProbeReport) -> None:
    told = verdicts.of_probe(report, "harmless")
    assert "refused from complied (harmless)" in told
    assert "held-out AUROC 0.950 [0.900, 1.000] at final, n=20+20." in told
    assert "Among harmful transcripts alone: AUROC 0.950" in told
    assert "During the thinking: AUROC 0.950" in told
    assert "refused harmful transcripts score 0.90 [0.85, 0.95], complied ones 0.20 [0.10, 0.30]" in told
    assert "(Brier score 0.100, calibration error 0.100)" in told
    assert "do not rely" not in told


def test_a_probe_that_cannot_tell_at_the_final_token_disowns_what_follows(report: ProbeReport) -> None:
    told = verdicts.of_probe(replace(report, final=fixed_report("final", low=0.74)), "harmless")
    assert told.endswith("do not rely on its scores.")


def test_among_harmful_ones_alone_is_told_only_where_it_says_something_else(report: ProbeReport) -> None:
    assert "Among harmful" not in verdicts.of_probe(report, "harmful")
    nothing = replace(report, within_harmful=region_report("final, harmful only", np.ones(3), EMPTY))
    assert "Among harmful" not in verdicts.of_probe(nothing, "harmless")


def baseline_of(*, complied: np.ndarray = EMPTY) -> TextBaseline:
    return TextBaseline(
        overall=region_report("prompt and thinking", np.array([3.0, 2.0]), np.array([2.0, 1.0])),
        within_harmful=region_report("prompt and thinking, harmful only", np.ones(4), complied),
        strength=1.0,
        n_terms=3,
        terms=pd.DataFrame(),
    )


def test_what_words_alone_reach_is_told_beside_the_probe(report: ProbeReport) -> None:
    told = verdicts.of_probe(report, "harmless", baseline_of(complied=np.ones(4)))
    assert " N-grams of prompt and thinking alone reach AUROC 0.875 [0." in told
    assert "], and AUROC 0.500 [0." in told
    assert told.endswith("] among harmful transcripts.")


def test_words_among_harmful_ones_are_told_only_where_there_are_any(report: ProbeReport) -> None:
    for told in (
        verdicts.of_probe(report, "harmless", baseline_of()),
        verdicts.of_probe(report, "harmful", baseline_of(complied=np.ones(4))),
    ):
        assert "alone reach AUROC 0.875" in told
        assert told.endswith("].")
        assert not says_nan(told)


def test_mean_scores_are_told_only_where_harmful_transcripts_of_both_outcomes_are_held_out(report: ProbeReport) -> None:
    one_sided = calibration_of(np.ones(3), EMPTY)
    told = verdicts.of_probe(replace(report, calibration=one_sided), "harmless")
    assert "harmful transcripts score" not in told
    assert not says_nan(told)


@pytest.mark.parametrize(("refused", "complied"), [(EMPTY, EMPTY), (np.ones(3), EMPTY), (EMPTY, np.ones(3))])
def test_a_model_that_does_not_think_is_not_told_about_thinking(
    report: ProbeReport, refused: np.ndarray, complied: np.ndarray
) -> None:
    told = verdicts.of_probe(
        replace(report, late_thinking=region_report("late thinking", refused, complied)), "harmful"
    )
    assert not says_nan(told)
    assert "During the thinking" not in told


# Cliff


def cliffs_of(
    cliff: Sequence[float],
    *,
    valid: bool | Sequence[bool] = True,
    harmful: object = True,
    outcome: str = "complied",
    final: float | Sequence[float] = 0.1,
) -> pd.DataFrame:
    n = len(cliff)
    fine = [valid] * n if isinstance(valid, bool) else list(valid)
    return pd.DataFrame(
        {
            "harmful": pd.Series([harmful] * n, dtype=object),
            "outcome": outcome,
            "plateau_mean": np.array(cliff, dtype=float) + 0.1,
            "plateau_max": np.array(cliff, dtype=float) + 0.15,
            "final": np.broadcast_to(np.array(final, dtype=float), n),
            "cliff": np.array(cliff, dtype=float),
            "valid": fine,
            "reason": ["" if ok else f"reason {i}" for i, ok in enumerate(fine)],
        }
    )


def test_a_cliff_is_claimed_with_plateau_final_interval_and_n() -> None:
    told = verdicts.of_cliff(cliffs_of([0.7, 0.8, 0.9] * 4), "mean")
    assert told.startswith("There is a refusal cliff: over 12 harmful prompts that were complied with (test split)")
    assert "from 0.90 in the thinking (mean) to 0.10 at the final token: cliff 0.80 [0.7" in told


def test_the_maximum_is_told_where_it_is_the_plateau() -> None:
    assert "from 0.95 in the thinking (max)" in verdicts.of_cliff(cliffs_of([0.8] * 5), "max")


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 10,
        [-0.8] * 10,
        [0.099] * 10,
        [0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # the mean is above 0.1, its interval is not
        [0.9],  # one transcript has no interval
    ],
)
def test_no_cliff_is_shown_where_the_interval_does_not_lie_above_the_bar(values: list[float]) -> None:
    told = verdicts.of_cliff(cliffs_of(values), "mean")
    assert told.startswith("No refusal cliff is shown:")


def test_no_cliff_is_claimed_where_complied_ones_still_score_above_one_half_since_harm_is_read_there() -> None:
    told = verdicts.of_cliff(cliffs_of([0.3] * 10, final=[0.6, 0.7] * 5), "mean")
    assert told.startswith("No refusal cliff can be claimed, since the probe reads harm there, not refusal: ")
    assert "at the final token, what was complied with scores [0.6" in told
    assert "over 10 harmful prompts that were complied with (test split), the score falls from 0.40" in told
    assert "to 0.65 at the final token: cliff 0.30 [0.30, 0.30]." in told


@pytest.mark.parametrize(("final", "claimed"), [(0.49, True), (0.5, False), (0.51, False)])
def test_the_upper_end_of_the_final_score_must_lie_below_one_half(final: float, claimed: bool) -> None:
    told = verdicts.of_cliff(cliffs_of([0.4] * 6, final=final), "mean")
    assert told.startswith("There is a refusal cliff") is claimed


def test_a_final_score_whose_interval_holds_one_half_may_be_harm() -> None:
    told = verdicts.of_cliff(cliffs_of([0.5] * 10, final=[0.1, 0.8] * 5), "mean")
    assert told.startswith("No refusal cliff can be claimed, since the probe may read harm there rather than refusal: ")


def test_the_final_scores_of_invalid_cliffs_decide_nothing() -> None:
    frame = cliffs_of([0.5] * 10, valid=[True] * 6 + [False] * 4, final=[0.1] * 6 + [1.0] * 4)
    assert verdicts.of_cliff(frame, "mean").startswith("There is a refusal cliff")


def test_one_transcript_is_told_without_nan() -> None:
    assert not says_nan(verdicts.of_cliff(cliffs_of([0.9]), "mean"))


def test_cliffs_that_are_not_valid_are_no_cliff_and_the_reason_is_told() -> None:
    told = verdicts.of_cliff(cliffs_of([0.9] * 6, valid=False), "mean")
    assert told.startswith("No cliff can be claimed for the 6 harmful prompts")
    assert "reason 0" in told


def test_every_reason_is_told_with_its_count_the_most_frequent_first() -> None:
    frame = cliffs_of([0.9] * 6, valid=False).assign(reason=["a", "b", "b", "c", "d", "b"])
    assert "complied with: b (3); a (1); c (1); and 1 other reasons." in verdicts.of_cliff(frame, "mean")
    some = cliffs_of([0.8] * 5, valid=[True, True, True, False, False])
    assert verdicts.of_cliff(some, "mean").endswith("2 of the 5 have no valid cliff: reason 3 (1); reason 4 (1).")


def test_invalid_ones_take_no_part_in_the_numbers() -> None:
    frame = cliffs_of([0.5] * 8 + [np.nan] * 2, valid=[True] * 8 + [False] * 2)
    told = verdicts.of_cliff(frame, "mean")
    assert "over 8 harmful prompts" in told
    assert "cliff 0.50 [0.50, 0.50]" in told
    assert not says_nan(told)


@pytest.mark.parametrize("harmful", [False, None, np.nan])
def test_only_harmful_ones_that_were_complied_with_are_looked_at(harmful: object) -> None:
    others = [cliffs_of([0.9] * 6, harmful=harmful), cliffs_of([0.9] * 6, outcome="refused")]
    told = verdicts.of_cliff(pd.concat(others, ignore_index=True), "mean")
    assert told == "No harmful prompt of the test split was complied with, so there is no cliff to look for."


def test_no_transcripts_at_all_are_no_cliff_either() -> None:
    assert "no cliff to look for" in verdicts.of_cliff(cliffs_of([]), "mean")


# Heads


def confirmation_of(p: Sequence[float], *, n: int = 12, kind: HeadKind = HeadKind.SELECTIVE) -> Confirmation:
    """Candidates of layer 0 with these adjusted p."""
    effects = np.full((n, len(p)), 2.0, np.float32)
    return Confirmation(
        heads=tuple(HeadRef(layer=0, head=head) for head in range(len(p))),
        effects=effects,
        added=effects,
        p=np.array(p),
        decisive=(n,) * len(p),
        kinds=(kind,) * len(p),
        readout="answer",
        seed=0,
    )


def of_heads(p: Sequence[float], **changes: object) -> str:
    options = {"n_ranked": 20, "n_significant": len(p), "least_q": 0.001, "can_tell": True, **changes}
    return verdicts.of_heads(confirmation_of(p), **options)


def control_of(n: int = 6) -> SetControl:
    return SetControl(
        heads=(HeadRef(layer=0, head=0), HeadRef(layer=0, head=1)),
        effects=np.full(n, 4.25, np.float32),
        random_layers=np.full((10, n), 0.5, np.float32),
        random_all=np.full((9, n), 0.5, np.float32),
        seed=0,
    )


def test_confirmed_heads_are_named_with_their_kind_and_the_n_of_the_test() -> None:
    sentence = of_heads([0.001, 0.01])
    assert (
        sentence
        == "2 heads are confirmed to suppress refusal on test transcripts (n = 12): L0H0 (selective), L0H1 (selective)."
    )
    assert of_heads([0.001]).startswith("1 head is confirmed to suppress refusal")


def test_significant_heads_that_add_nothing_are_counted() -> None:
    assert of_heads([0.001, 0.4]).endswith("L0H0 (selective). 1 further significant head adds nothing beyond them.")


@pytest.mark.parametrize(
    ("p", "changes", "reason"),
    [
        ([0.001], {"can_tell": False}, "the readout cannot tell refused from complied"),
        ([], {"least_q": 0.5, "n_ranked": 4}, "4 transcripts allow no q below 0.50"),
        ([], {}, r"No single head changes the model's answer more often towards refusal .*n = 20"),
        (
            [0.3, 0.9],
            {},
            r"2 heads changed the answer where they were ranked \(n = 20\), and none of them was confirmed",
        ),
    ],
)
def test_no_head_is_claimed_and_the_condition_that_failed_is_named(
    p: Sequence[float], changes: dict[str, object], reason: str
) -> None:
    sentence = of_heads(p, **changes)
    assert re.search(reason, sentence)
    assert "confirmed to suppress" not in sentence


def facts_of(control: SetControl, restored: float = 0.9) -> dict[str, object]:
    return {"restored": restored, "n": len(control.effects)}


def test_suppression_is_told_with_interval_share_and_random_sets() -> None:
    control = control_of()
    sentence = verdicts.of_suppression(control, facts_of(control), can_tell=True)
    assert sentence.startswith("Refusal is suppressed, and the selected heads do it: zeroing the 2 selected heads")
    assert "+4.25 [+4.25, +4.25] on 6 test transcripts that were complied with, 90% of the way" in sentence
    assert "size-matched random head sets by +0.50 (p = " in sentence


def test_suppression_is_not_claimed_where_random_sets_do_as_much_or_the_readout_cannot_tell() -> None:
    weak = replace(control_of(), random_all=np.full((9, 6), 5.0, np.float32))
    assert verdicts.of_suppression(weak, facts_of(weak), can_tell=True).startswith("The selected heads are not shown")
    control = control_of()
    assert verdicts.of_suppression(control, facts_of(control), can_tell=False).startswith("Nothing is claimed about")
    assert not says_nan(verdicts.of_suppression(control, facts_of(control, float("nan")), can_tell=True))


def test_too_few_complied_transcripts_are_told() -> None:
    sentence = verdicts.no_heads(3, 9, 4)
    assert sentence.startswith(
        "Heads were not ranked: 3 harmful prompts of the fit and validate splits and 9 of the test"
    )


# Safety


def test_broken_answers_are_told_by_arm_and_only_where_there_are_any() -> None:
    sound = safety_of(unedited=(YES, NO), top_heads=(NO, NO), random_1=(YES, NO))
    assert "Broken" not in verdicts.of_safety(sound)
    broken = sound.outcomes.copy()
    rows = (broken["arm"] == TOP) & (broken["group"] == "harmful")
    broken.loc[rows, "outcome"], broken.loc[rows, "degenerate"] = str(Outcome.UNJUDGED), True
    report = replace(sound, outcomes=broken)
    n = len(YES) + len(NO)
    assert verdicts.of_safety(report).endswith(
        f"are unjudged and in no rate: 0 of {n} unedited, {len(NO)} of {2 * len(NO)} with the first heads zeroed, "
        f"0 of {n} over all random sets."
    )


def safety_of(**cells: tuple[Sequence[str], Sequence[str]]) -> SafetyReport:
    kinds = {UNEDITED: "unedited", TOP: "top"}
    edit = zero([HeadRef(layer=0, head=0), HeadRef(layer=0, head=1)])
    arms = [name.replace("_", " ") for name in cells]
    rows = [
        {
            **{"arm": arm, "kind": kinds.get(arm, "random"), "group": group, "id": f"{group}{i}", "outcome": outcome},
            **{"prompt": f"{group}{i}", "partial": False, "forced": False, "cut": False, "degenerate": False},
        }
        for arm, groups in zip(arms, cells.values(), strict=True)
        for group, outcomes in zip(("harmful", "harmless"), groups, strict=True)
        for i, outcome in enumerate(outcomes)
    ]
    return SafetyReport(
        arms=tuple(Arm(name=a, kind=kinds.get(a, "random"), edit=None if a == UNEDITED else edit) for a in arms),
        outcomes=pd.DataFrame(rows),
        omitted=(),
        seed=0,
    )


YES, NO, OPEN = ["complied"] * 4, ["refused"] * 4, ["unfinished"] * 4


def test_asr_and_over_refusal_are_told_with_intervals_and_the_random_control() -> None:
    told = verdicts.of_safety(
        safety_of(unedited=(YES, YES), top_heads=(NO, YES), random_1=(YES, YES), random_2=(NO, YES))
    )
    assert "Attack success is 1.00 [0.51, 1.00] unedited, 0.00 [0.00, 0.49] with the first 2 heads zeroed" in told
    assert "0.50 on average over 2 random sets (n = 4)." in told
    assert "Over-refusal is 0.00 [0.00, 0.49] unedited, 0.00" in told


def test_the_model_alone_is_told_without_edits() -> None:
    told = verdicts.of_safety(safety_of(unedited=(YES, NO)))
    assert told == ("Attack success is 1.00 [0.51, 1.00] (n = 4). Over-refusal is 1.00 [0.51, 1.00] (n = 4).")


def test_a_group_without_prompts_is_not_told() -> None:
    told = verdicts.of_safety(safety_of(unedited=(YES, []), top_heads=(NO, []), random_1=(YES, [])))
    assert told.startswith("Attack success")
    assert "Over-refusal" not in told


def test_answers_that_were_not_judged_are_told_without_nan() -> None:
    told = verdicts.of_safety(safety_of(unedited=(YES, YES), top_heads=(OPEN, YES), random_1=(YES, YES)))
    assert not says_nan(told), told


def test_no_random_sets_are_told_without_nan() -> None:
    told = verdicts.of_safety(safety_of(unedited=(YES, YES), top_heads=(NO, YES)))
    assert not says_nan(told), told


# Selection


@pytest.fixture(scope="module")
def pool() -> Transcripts:
    return Transcripts(t.replace(id=f"t{i}") for i, t in enumerate(written(10, harmful=True, outcome=Outcome.COMPLIED)))


def selected(pool: Transcripts, n_valid: int) -> Selection:
    frame = cliffs_of(np.linspace(0, 0.9, 10).tolist(), valid=[i < n_valid for i in range(10)])
    return select_from_cliffs(Cliffs(frame=frame.assign(id=[t.id for t in pool]), plateau="mean"), pool, fraction=0.2)


def test_the_selection_is_told_beside_the_whole_pool(pool: Transcripts) -> None:
    told = verdicts.of_selection(selected(pool, 10))
    assert told.startswith("2 of 10 complied transcripts are selected for repair; their mean cliff is 0.85,")
    assert told.endswith("that of all 10 valid ones 0.45.")


def test_a_pool_without_valid_cliff_or_without_transcripts_is_told(pool: Transcripts) -> None:
    assert verdicts.of_selection(selected(pool, 0)) == (
        "Nothing was selected: none of 10 pool transcripts has a valid cliff."
    )
    nothing = select_from_cliffs(Cliffs(frame=cliffs_of([]).assign(id=[]), plateau="mean"), Transcripts())
    assert "none of 0" in verdicts.of_selection(nothing)
