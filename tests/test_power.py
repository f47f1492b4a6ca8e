"""How many transcripts a claim needs, against the tests and intervals that the claims are made with."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cliffscope.errors import DataError
from cliffscope.heads.statistics import decisive_p, decisive_q, least_q
from cliffscope.power import AurocAbove, BeatsRandomSets, Claim, RatesDiffer, SignTest, needed_n
from cliffscope.stats import auroc, auroc_bounds, auroc_interval, mcnemar, random_set_p

CLAIMS: list[Claim] = [
    *(AurocAbove(auroc=a, bound=b) for a in (1.0, 0.95, 0.85) for b in (0.5, 0.75)),
    *(SignTest(heads=h, share=s) for h in (1, 64, 2560) for s in (1.0, 0.8)),
    *(RatesDiffer(before=a, after=b) for a, b in ((1.0, 0.0), (0.5, 0.1), (0.2, 0.3))),
    *(BeatsRandomSets(alpha=a) for a in (0.05, 0.01)),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_claim_is_possible_with_the_needed_n_and_with_no_smaller_one(claim: Claim) -> None:
    n = needed_n(claim)
    assert claim.possible(n)
    assert not any(claim.possible(fewer) for fewer in range(1, n))


def test_7_and_7_are_too_few_and_12_and_12_are_enough_to_tell() -> None:
    assert needed_n(AurocAbove()) == 12
    assert needed_n(AurocAbove(auroc=1.0)) == 8
    assert auroc_interval(np.ones(7), np.zeros(7)).low < 0.75 <= auroc_interval(np.ones(8), np.zeros(8)).low


def test_the_bounds_of_an_auroc_are_those_of_scores_that_have_it() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (7, 7), (20, 5), (40, 200)):
        positive, negative = rng.normal(1, 1, n), rng.normal(0, 1, m)
        assert auroc_bounds(auroc(positive, negative), n, m) == auroc_interval(positive, negative)


@pytest.mark.parametrize("heads", [1, 8, 64, 2560])
def test_a_head_that_turns_every_answer_is_significant_from_the_needed_n_on(heads: int) -> None:
    n = needed_n(SignTest(heads=heads))
    for count, significant in ((n, True), (n - 1, False)):
        effects = np.zeros((count, heads))
        effects[:, 0] = 2.0
        q = decisive_q(decisive_p(np.full(count, -1.0), effects))
        assert bool(q[0] <= 0.05) is significant
        assert q[0] == pytest.approx(least_q(count, heads))


def test_a_head_that_turns_four_of_five_answers_needs_the_n_of_the_binomial_test() -> None:
    n = needed_n(SignTest(share=0.8))
    tail = scipy_stats.binomtest(int(0.8 * n), n, 0.5, alternative="greater").pvalue
    assert tail <= 0.05
    assert n > needed_n(SignTest())


def test_rates_differ_from_six_turned_prompts_on() -> None:
    turned, kept = np.ones(6, dtype=bool), np.zeros(6, dtype=bool)
    assert mcnemar(turned, kept) <= 0.05 < mcnemar(turned[:5], kept[:5])
    assert needed_n(RatesDiffer(before=1.0, after=0.0)) == 6
    assert needed_n(RatesDiffer(before=0.5, after=0.0)) == 12
    assert needed_n(RatesDiffer(before=0.3, after=0.2)) == 60


def test_nineteen_random_sets_are_needed_and_three_never_do() -> None:
    assert needed_n(BeatsRandomSets()) == 19
    assert random_set_p(9.0, np.zeros(19)) <= 0.05 < random_set_p(9.0, np.zeros(18))
    assert random_set_p(9.0, np.zeros(3)) == 0.25


@pytest.mark.parametrize(
    "claim", [AurocAbove(auroc=0.7), RatesDiffer(before=0.5, after=0.5), SignTest(share=0.5)], ids=str
)
def test_what_no_number_shows_is_an_error(claim: Claim) -> None:
    with pytest.raises(DataError, match=r"no n is enough\. Claim less"):
        needed_n(claim)


def test_a_claim_of_ones_own_needs_nothing_but_possible() -> None:
    class AtLeast:
        def possible(self, n: int) -> bool:
            return n >= 37

    assert needed_n(AtLeast()) == 37
