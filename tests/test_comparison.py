import numpy as np
import pytest
from conftest import MakeCheckpoint, written

from cliffscope.errors import DataError
from cliffscope.judging.judges import Verdict
from cliffscope.model.load import LensModel, load_model
from cliffscope.repairing.comparison import AFTER, BEFORE, compare_repair
from cliffscope.repairing.formats import SAFE_ANSWER, own_refusal
from cliffscope.transcripts.records import Outcome, Transcripts

SMALL = {"max_thinking": 6, "max_answer": 4}


class ByLength:
    """Calls half of the answers refused, so that a random model has both classes."""

    name = "by length"
    asked = 0

    def __call__(self, prompt: str, answer: str) -> Verdict:
        self.asked += 1
        refused = sum(map(ord, prompt)) % 2 == 0
        return Verdict(outcome=Outcome.REFUSED if refused else Outcome.COMPLIED, score=None, reason="toy")


@pytest.fixture(scope="module")
def prompts() -> Transcripts:
    parts = (written(24, harmful=h, outcome=Outcome.UNJUDGED) for h in (True, False))
    return Transcripts(
        t.replace(thinking=None, answer=None, thinking_ids=None, answer_ids=None) for p in parts for t in p
    )


def test_a_model_is_equal_to_itself(llama: LensModel, prompts: Transcripts) -> None:
    reader = ByLength()
    found = compare_repair(llama, llama, prompts, judge=reader, **SMALL)
    assert reader.asked <= 2 * len(prompts), "an answer was judged twice"
    assert found.value("kl") == pytest.approx(0, abs=1e-7)
    for measure in ("asr", "over_refusal", "plateau", "final", "cliff"):
        np.testing.assert_equal(found.value(measure, BEFORE), found.value(measure, AFTER))
    frame = found.to_frame()
    assert frame[frame["measure"] == "asr"]["n"].tolist() == [24, 24]
    # A probe of a random model cannot tell, and then no cliff is given but the reason.
    cliff = frame[frame["measure"] == "cliff"]
    assert (cliff["value"].isna() == (cliff["note"] != "")).all()
    assert "asr" in repr(found)


def test_another_model_diverges_and_what_is_known_is_not_generated_again(
    llama: LensModel, prompts: Transcripts, make_checkpoint: MakeCheckpoint
) -> None:
    other = load_model(make_checkpoint("llama", change=lambda net: net.lm_head.weight.mul_(1.5)), device="cpu")
    known = prompts.map(lambda t: t.replace(thinking="hm", answer="sorry , i can not help with that ."))
    found = compare_repair(llama, other, prompts, answered=known, judge=ByLength(), **SMALL)
    assert found.value("kl") > 0
    assert set(found.safety.outcomes[found.safety.outcomes["arm"] == "unedited"]["repetition"].dropna()) == {0.0}
    with pytest.raises(DataError, match="does not answer the prompts given"):
        compare_repair(llama, other, prompts, answered=known[1:], judge=ByLength(), **SMALL)


def test_models_of_other_vocabularies_are_refused(
    llama: LensModel, chatml_model: LensModel, prompts: Transcripts
) -> None:
    with pytest.raises(DataError, match="other vocabularies"):
        compare_repair(llama, chatml_model, prompts, **SMALL)


def test_a_model_is_repaired_in_its_own_voice() -> None:
    refused = written(6, harmful=True, outcome=Outcome.REFUSED)
    said = [t.answer for t in refused]
    most = max(sorted(set(said)), key=said.count)
    assert own_refusal(refused) == most
    assert own_refusal(refused.map(lambda t: t.replace(answer=None, answer_ids=None))) == SAFE_ANSWER
