import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import fixed_report, random_probe, written

from cliffscope.evaluation.arms import TOP, UNEDITED, Arm
from cliffscope.evaluation.safety import SafetyReport
from cliffscope.heads.controls import SetControl
from cliffscope.heads.edits import HeadRef, Scope, zero
from cliffscope.heads.ranking import HeadRanking
from cliffscope.model.load import LensModel
from cliffscope.readouts.reports import ProbeReport, region_report
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
    assert "nothing further should be believed" not in told


def test_a_probe_that_cannot_tell_at_the_final_token_disowns_what_follows(report: ProbeReport) -> None:
    told = verdicts.of_probe(replace(report, final=fixed_report("final", low=0.74)), "harmless")
    assert told.endswith("nothing further should be believed of it.")


def test_among_harmful_ones_alone_is_told_only_where_it_says_something_else(report: ProbeReport) -> None:
    assert "Among harmful" not in verdicts.of_probe(report, "harmful")
    nothing = replace(report, within_harmful=region_report("final, harmful only", np.ones(3), EMPTY))
    assert "Among harmful" not in verdicts.of_probe(nothing, "harmless")


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
    cliff: Sequence[float], *, valid: bool | Sequence[bool] = True, harmful: object = True, outcome: str = "complied"
) -> pd.DataFrame:
    n = len(cliff)
    fine = [valid] * n if isinstance(valid, bool) else list(valid)
    return pd.DataFrame(
        {
            "harmful": pd.Series([harmful] * n, dtype=object),
            "outcome": outcome,
            "plateau_mean": np.array(cliff, dtype=float) + 0.1,
            "plateau_max": np.array(cliff, dtype=float) + 0.15,
            "final": 0.1,
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


def ranking_of(model: LensModel, strong: int, *, n: int = 12) -> HeadRanking:
    """A ranking in which the first heads have an effect of 5 of a gap of 5, the others none."""
    effects = np.zeros((n, 64), np.float32)
    effects[:, :strong] = 5.0
    return HeadRanking(
        heads=tuple(HeadRef(layer=layer, head=h) for layer in range(8) for h in range(8)),
        effects=effects,
        clean=np.zeros(n, np.float32),
        harmless_effects=np.zeros((0, 64), np.float32),
        refused_effects=np.zeros((0, 64), np.float32),
        order=np.argsort(-effects.mean(0), kind="stable"),
        dose=1.0,
        sign=1,
        donors="",
        can_tell=True,
        gap=5.0,
        gap_score=0.8,
        shape=model.shape,
        method="zero",
        scope=Scope.CLOSING,
        path="packed",
        probe_layer=7,
        seed=0,
        omitted=(),
    )


def control_of(n: int = 6) -> SetControl:
    return SetControl(
        heads=(HeadRef(layer=0, head=0), HeadRef(layer=0, head=1)),
        effects=np.full(n, 4.25, np.float32),
        random_layers=np.full((10, n), 0.5, np.float32),
        random_all=np.full((9, n), 0.5, np.float32),
        seed=0,
    )


def test_no_head_is_claimed_with_a_probe_that_cannot_tell(llama: LensModel) -> None:
    told = verdicts.of_heads(ranking_of(llama, 2), control_of(), can_tell=False)
    assert told.startswith("No head can be claimed")
    assert "suppress refusal (q" not in told


def test_significant_heads_are_named_with_the_joint_effect_and_its_control(llama: LensModel) -> None:
    told = verdicts.of_heads(ranking_of(llama, 2), control_of())
    assert told.startswith("2 heads suppress refusal (q <= 0.05, n = 12): L0H0, L0H1.")
    assert "Zeroing the first 2 of 64 at the closing changes the refusal logit of 6 test transcripts by +4.25" in told
    assert "[+4.25, +4.25]" in told
    assert "random sets of the same size by +0.50 (p = 0.050, the least that 19 sets allow)" in told


def test_six_heads_are_named_at_most(llama: LensModel) -> None:
    told = verdicts.of_heads(ranking_of(llama, 8), control_of())
    assert told.startswith("8 heads suppress refusal")
    assert "L0H5 ...." in told or "L0H5 ..." in told
    assert "L0H6" not in told


def test_without_a_significant_head_none_is_named_but_the_joint_effect_is_told(llama: LensModel) -> None:
    told = verdicts.of_heads(ranking_of(llama, 0), control_of())
    assert told.startswith("No head's effect passes its controls (q <= 0.05, n = 12).")
    assert "+4.25" in told


def test_where_there_is_no_gap_to_restore_no_head_is_named(llama: LensModel) -> None:
    for ranking in (replace(ranking_of(llama, 2), gap=0.0), replace(ranking_of(llama, 2), gap_score=0.0)):
        assert verdicts.of_heads(ranking, control_of()).startswith("No head's effect passes")


def test_one_transcript_makes_no_head_significant_and_no_nan(llama: LensModel) -> None:
    told = verdicts.of_heads(ranking_of(llama, 2, n=1), control_of(1))
    assert told.startswith("No head's effect passes")
    assert not says_nan(told)


def test_too_few_complied_transcripts_are_told() -> None:
    assert "only 3 harmful prompts were complied with" in verdicts.no_heads(3)


def test_heads_are_read_from_a_table() -> None:
    frame = pd.DataFrame({"layer": [3, 0], "head": [1, 7], "effect": [2.0, 1.0]})
    assert verdicts.head_refs(frame) == (HeadRef(layer=3, head=1), HeadRef(layer=0, head=7))
    assert verdicts.head_refs(frame[:0]) == ()


# Safety


def safety_of(**cells: tuple[Sequence[str], Sequence[str]]) -> SafetyReport:
    kinds = {UNEDITED: "unedited", TOP: "top"}
    edit = zero([HeadRef(layer=0, head=0), HeadRef(layer=0, head=1)])
    arms = [name.replace("_", " ") for name in cells]
    rows = [
        {
            **{"arm": arm, "kind": kinds.get(arm, "random"), "group": group, "id": f"{group}{i}", "outcome": outcome},
            **{"prompt": f"{group}{i}", "partial": False, "forced": False},
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
