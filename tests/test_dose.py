"""Doses: what is edited, what it is compared with, and that a dose is not measured twice."""

import numpy as np
import pytest
from conftest import random_probe, tokens_of
from scipy.special import expit

from cliffscope.errors import EditError
from cliffscope.evaluation import dose as module
from cliffscope.evaluation.dose import dose_response
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.sweep import sweep_branches
from cliffscope.judging.judges import Verdict
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Outcome, Transcripts


class _Compliant:
    """Takes every answer for compliance."""

    name = "compliant"

    def __call__(self, prompt: str, answer: str) -> Verdict:
        return Verdict(outcome=Outcome.COMPLIED, reason="always", score=None)


def test_a_dose_is_the_joint_edit_of_the_first_heads(llama: LensModel, refused: Transcripts) -> None:
    probe, seen = random_probe(llama, 5), []
    ranking = rank_heads(llama, probe, refused[:3])
    found = dose_response(
        llama, probe, ranking, refused[3:6], fractions=(0.001, 0.01, 0.03, 0.1), controls=4, progress=seen.append
    )
    table = found.to_frame()
    assert sorted(table["heads"].unique()) == [0, 1, 2, 6]
    assert seen == [1, 2, 3]
    rows = tokens_of(llama, refused[3:6])
    for count in (1, 2, 6):
        swept = sweep_branches(llama, probe, rows, [tuple(ranking.heads[i] for i in ranking.order[:count])])
        own = table[(table["heads"] == count) & (table["kind"] == "top")].set_index("quantity")["value"]
        assert own["logit"] == pytest.approx(swept.edited.mean(), abs=1e-4)
        assert own["score"] == pytest.approx(expit(swept.edited).mean(), abs=1e-4)
    random = table[(table["kind"] == "random") & (table["quantity"] == "score")]
    assert random.groupby("heads")["arm"].nunique().tolist() == [4, 4, 4]
    plain = table[table["kind"] == "unedited"]
    assert plain["quantity"].tolist() == ["logit", "score"]
    assert repr(found).startswith("DoseResponse(score")
    assert len(found.plot().data) >= 2


def test_rates_are_measured_under_each_dose_and_unedited_once(
    llama: LensModel, refused: Transcripts, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, calls = random_probe(llama, 5), []
    ranking = rank_heads(llama, probe, refused[:2])
    real = module.evaluate_safety

    def counted(*args: object, **options: object) -> object:
        calls.append(sorted(options["done"]))
        return real(*args, **options)

    monkeypatch.setattr(module, "evaluate_safety", counted)
    prompts = refused[2:4] + complied[:2]
    found = dose_response(
        llama,
        probe,
        ranking,
        refused[2:4],
        prompts=prompts,
        fractions=(0.02, 0.05),
        controls=2,
        max_thinking=4,
        max_answer=4,
        judge=_Compliant(),
    )
    table = found.to_frame()
    assert calls == [[], ["unedited"]]
    assert table[table["quantity"] == "asr"]["kind"].value_counts().to_dict() == {"random": 4, "top": 2, "unedited": 1}
    assert set(table[table["quantity"] == "asr"]["value"]) == {1.0}
    assert set(table[table["quantity"] == "over_refusal"]["value"]) == {0.0}
    assert len(found.plot().layout.annotations) >= 0


def test_a_fraction_outside_its_range_is_refused(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 5)
    with pytest.raises(EditError, match="fraction=0"):
        dose_response(llama, probe, rank_heads(llama, probe, refused[:2]), refused[:2], fractions=(0.0,))


def test_doses_are_the_same_with_the_same_seed(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 5)
    ranking = rank_heads(llama, probe, refused[:2])
    one, two = (
        dose_response(llama, probe, ranking, refused[:2], fractions=(0.03,), controls=3).to_frame() for _ in range(2)
    )
    np.testing.assert_array_equal(one["value"], two["value"])
