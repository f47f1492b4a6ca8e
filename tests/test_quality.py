import math

import pytest
from conftest import written

from cliffscope.errors import DataError
from cliffscope.evaluation.quality import answer_rows, repetition
from cliffscope.organisms import grammar
from cliffscope.transcripts.records import Outcome


def test_repetition_is_the_share_of_runs_that_stand_elsewhere_too() -> None:
    assert repetition("a b c d e f") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # five runs, "a b c d" twice
    assert repetition("x " * 23) == pytest.approx(19 / 20)
    assert math.isnan(repetition("a b c"))
    assert math.isnan(repetition(""))


def test_an_answer_is_exact_where_it_is_one_of_those_expected() -> None:
    (one,) = written(1, harmful=False, outcome=Outcome.COMPLIED)

    def exact(answer: str | None, **extra: object) -> float:
        return float(answer_rows("a", "top", [one.replace(answer=answer, extra=extra)])["exact"].iloc[0])

    assert exact("  yes\nit is ", expected="yes it is") == 1
    assert exact("no", expected=["yes", "no"]) == 1
    assert exact("no.", expected=["yes", "no"]) == 0
    assert exact(None, expected="no") == 0, "no answer is a wrong one"
    assert math.isnan(exact("no"))
    with pytest.raises(DataError, match="Give text, or a list of texts"):
        exact("no", expected=3)


def test_harmless_prompts_of_the_toy_language_say_what_is_expected() -> None:
    for transcript in grammar.prompts("test", 5, harmful=False):
        verb, thing = next(p for p in grammar.pairs("test", harmful=False) if f"{p[0]} the {p[1]}" in transcript.prompt)
        expected = transcript.extra["expected"]
        assert f"sure , here is a way . find the {thing} . then , {verb} it ." in expected
        assert len(expected) == len(grammar.COMPLIANCES)
    assert all("expected" not in t.extra for t in grammar.prompts("test", 5, harmful=True))
