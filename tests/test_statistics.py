"""The tests of heads, by hand, against SciPy and in simulation."""

import numpy as np
import pytest
from scipy import stats

from cliffscope.heads.statistics import HeadKind, decisive, decisive_p, decisive_q, exceeds_p, kinds_of, least_q


def test_decisive_transcripts_are_those_whose_answer_the_effect_could_turn() -> None:
    clean = np.array([-1.0, -1.0, -3.0, 2.0, 2.0])
    effects = np.array([[1.5], [-1.5], [2.0], [-2.5], [0.5]])
    trials, towards = decisive(clean, effects)
    assert trials.tolist() == [3]
    assert towards.tolist() == [1]


def test_p_is_the_exact_binomial_tail() -> None:
    rng = np.random.default_rng(0)
    clean, effects = rng.normal(-2, 1, 30), rng.normal(1, 3, (30, 5))
    trials, towards = decisive(clean, effects)
    expected = [
        stats.binomtest(int(k), int(n), 0.5, alternative="greater").pvalue for n, k in zip(trials, towards, strict=True)
    ]
    np.testing.assert_allclose(decisive_p(clean, effects), expected, rtol=1e-9)


def test_effects_that_turn_no_answer_are_not_tested_however_consistent_they_are() -> None:
    assert np.isnan(decisive_p(np.full(1000, -5.0), np.full((1000, 1), 0.3))).tolist() == [True]


def test_heads_that_are_not_tested_have_no_q_and_count_as_tests_all_the_same() -> None:
    p = np.array([0.01, np.nan, 0.04, np.nan])
    expected = stats.false_discovery_control([0.01, 1.0, 0.04, 1.0])
    np.testing.assert_allclose(decisive_q(p), [expected[0], np.nan, expected[2], np.nan])


def test_the_least_q_is_that_of_one_head_that_turns_every_answer() -> None:
    clean, effects = np.full(12, -1.0), np.zeros((12, 64))
    effects[:, 3] = 2.0
    q = decisive_q(decisive_p(clean, effects))
    assert np.nanmin(q) == pytest.approx(least_q(12, 64))
    assert least_q(3, 64) == 1.0


def test_more_here_than_elsewhere_is_welchs_test() -> None:
    rng = np.random.default_rng(1)
    here, there = rng.normal(1, 1, (20, 4)), rng.normal(0.5, 3, (9, 4))
    expected = stats.ttest_ind(here, there, equal_var=False, alternative="greater").pvalue
    np.testing.assert_allclose(exceeds_p(here, there), expected, rtol=1e-9)
    assert np.isnan(exceeds_p(here, there[:2])).all()


def test_constant_effects_are_compared_by_their_means() -> None:
    here = np.array([[1.0, 1.0]] * 5)
    assert exceeds_p(here, np.array([[0.0, 2.0]] * 4)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("refused", "harmless", "kind"),
    [(0.0, 0.0, "selective"), (2.0, 0.0, "broad"), (0.0, 2.0, "broad"), (2.0, 2.0, "broad")],
)
def test_a_selective_head_does_more_than_on_refused_and_more_than_on_harmless_ones(
    refused: float, harmless: float, kind: str
) -> None:
    rng = np.random.default_rng(2)
    groups = [mean + rng.normal(0, 0.5, (30, 1)) for mean in (2.0, refused, harmless)]
    assert kinds_of(*groups) == [HeadKind(kind)]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_with_too_few_others_the_kind_is_unknown(n: int) -> None:
    assert kinds_of(np.ones((9, 1)), np.zeros((n, 1)), np.zeros((9, 1))) == [HeadKind.UNKNOWN]


def test_where_nothing_has_an_effect_a_claim_is_made_in_at_most_5_of_100_simulations() -> None:
    rng, false = np.random.default_rng(3), 0
    for _ in range(200):
        clean = -np.abs(rng.normal(0.5, 0.25, 60))
        effects = rng.normal(0, 1, (60, 64)) * rng.gamma(1.0, 0.5, 64)
        false += bool((decisive_q(decisive_p(clean, effects)) <= 0.05).any())
    assert false <= 10
