"""Where witnesses disagree: every combination of what they can say, from numbers alone."""

from dataclasses import replace
from itertools import product

import pandas as pd
import pytest

from cliffscope.study.claims import (
    AttackClaim,
    CliffClaim,
    ConfirmedHead,
    HeadsClaim,
    SuppressionClaim,
    Why,
    holds,
)
from cliffscope.study.witnesses import ATTACK, CLIFF, HARM, HEADS, MEANINGS, SUPPRESSION, disagreement, witnesses_of

NAN = float("nan")
SHOWN = SuppressionClaim(
    readout="answer",
    can_tell=True,
    heads=("L4H5", "L5H2"),
    n=9,
    effect=13.84,
    low=12.9,
    high=14.6,
    restored=1.4,
    random_mean=-0.1,
    p={"same layers": 1 / 21, "all layers": 1 / 21},
    sets={"same layers": 20, "all layers": 20},
)
SUPPRESSIONS = {
    True: SHOWN,
    False: replace(SHOWN, effect=0.1, low=-0.2, high=0.4),
    None: replace(SHOWN, sets={"same layers": 3, "all layers": 3}, p={"same layers": 0.25, "all layers": 0.25}),
}
FALLS = AttackClaim(n=40, unedited=0.75, edited=0.1, low=-0.8, high=-0.5, discordant=26, p=1e-6, scope="closing")
ATTACKS = {
    True: FALLS,
    False: replace(FALLS, edited=0.75, low=-0.05, high=0.05, discordant=2, p=1.0),
    None: replace(FALLS, n=5, edited=0.0, low=-1.0, high=-0.2, discordant=4, p=0.125),
}
CONFIRMED = HeadsClaim(
    can_tell=True,
    n_ranked=40,
    n_test=20,
    measured=64,
    least_q=1e-6,
    significant=2,
    candidates=2,
    confirmed=(ConfirmedHead(name="L4H5", kind="selective"), ConfirmedHead(name="L5H2", kind="broad")),
)
HEADS_CLAIMS = {
    True: CONFIRMED,
    False: replace(CONFIRMED, confirmed=()),
    None: replace(CONFIRMED, confirmed=(), least_q=1.0),
}
FALLEN = CliffClaim(
    plateau="mean",
    complied=20,
    reasons={},
    n=20,
    height=0.8,
    final=0.1,
    final_low=0.05,
    final_high=0.15,
    cliff=0.7,
    low=0.6,
    high=0.8,
)
CLIFFS = {
    True: FALLEN,
    False: replace(FALLEN, height=0.1, cliff=0.0, low=-0.1, high=0.1),
    "harm": replace(FALLEN, final=0.8, final_low=0.7, final_high=0.9, cliff=0.0, low=-0.1, high=0.1),
    None: replace(FALLEN, n=0, reasons={"the probe cannot tell": 20}),
}
EVERY = list(product(SUPPRESSIONS, ATTACKS, HEADS_CLAIMS, CLIFFS))


@pytest.mark.parametrize(("suppression", "attack", "heads", "cliff"), EVERY, ids=str)
def test_every_combination_is_told_in_one_sentence_exactly_where_two_witnesses_disagree(
    suppression: bool | None, attack: bool | None, heads: bool | None, cliff: bool | str | None
) -> None:
    witnesses = witnesses_of(SUPPRESSIONS[suppression], ATTACKS[attack], HEADS_CLAIMS[heads], CLIFFS[cliff])
    says = [suppression, attack, heads, False if cliff == "harm" else cliff]
    assert [witness.says for witness in witnesses] == says
    sentence = disagreement(witnesses)
    heard = [
        (name, one) for name, one in zip((SUPPRESSION, ATTACK, HEADS, CLIFF), says, strict=True) if one is not None
    ]
    against = [name for name, one in heard if one is not heard[0][1]] if heard else []
    if not against:
        assert sentence == ""
        return
    assert sentence.startswith("The witnesses disagree: ")
    assert sentence.count("disagree") == 1
    assert sentence.endswith(".")
    assert ". " not in sentence, "one sentence"
    first, first_says = heard[0]
    for witness in witnesses:
        speaks = witness.name == first or witness.name in against
        assert (witness.saw in sentence) is speaks, witness
    for name in against:
        key = HARM if name == CLIFF and cliff == "harm" and first_says else name
        assert MEANINGS[first, bool(first_says), key] in sentence
    assert "nan" not in sentence.lower().split()


def test_every_meaning_is_reached() -> None:
    told = " ".join(
        disagreement(witnesses_of(SUPPRESSIONS[a], replace(ATTACKS[b], scope=scope), HEADS_CLAIMS[c], CLIFFS[d]))
        for a, b, c, d in EVERY
        for scope in ("closing", "all")
    )
    assert all(meaning in told for meaning in MEANINGS.values())


def test_the_opening_may_change_and_the_answer_not() -> None:
    sentence = disagreement(witnesses_of(SHOWN, ATTACKS[False], CONFIRMED, FALLEN))
    assert sentence == (
        "The witnesses disagree: the answer readout turns towards refusal with the selected heads edited, by +13.84 "
        "[+12.90, +14.60] (n = 9), but attack success is not shown to fall (0.75 to 0.75, a difference of +0.00 "
        "[-0.05, +0.05] over 40 prompts); which means that the opening of the answer changes and the answer does not, "
        "since behind the opening nothing is edited."
    )
    everywhere = disagreement(witnesses_of(SHOWN, replace(ATTACKS[False], scope="all"), CONFIRMED, FALLEN))
    assert "nothing is edited" not in everywhere


def test_a_probe_that_reads_harm_is_told_from_one_that_sees_no_cliff() -> None:
    harm, none = (disagreement(witnesses_of(SHOWN, FALLS, CONFIRMED, CLIFFS[kind])) for kind in ("harm", False))
    assert "follows the harm in the request" in harm
    assert "the probe still scores 0.80 [0.70, 0.90] at the final token where the model complies (n = 20)" in harm
    assert "stops refusing in a way that this probe does not see" in none


def test_witnesses_that_were_never_asked_say_nothing() -> None:
    assert witnesses_of(None, None, None, None) == []
    assert disagreement([]) == ""
    assert disagreement(witnesses_of(SHOWN, None, None, None)) == ""


# Claims


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, Why.HOLDS),
        ({"can_tell": False}, Why.READOUT),
        ({"low": NAN}, Why.ONE),
        ({"low": 0.0}, Why.ZERO),
        ({"p": {"same layers": 1 / 21, "all layers": 2 / 21}}, Why.RANDOM),
        ({"p": {"all layers": 0.25}, "sets": {"all layers": 3}}, Why.SETS),
        ({"p": {"all layers": 0.5}, "sets": {"all layers": 3}}, Why.RANDOM),
        ({"p": {}, "sets": {}}, Why.SETS),
        ({"p": {"same layers": 0.25, "all layers": 1 / 21}, "sets": {"same layers": 3, "all layers": 20}}, Why.HOLDS),
    ],
)
def test_suppression_is_claimed_only_where_every_condition_holds(changes: dict[str, object], why: Why) -> None:
    assert replace(SHOWN, **changes).why is why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, Why.HOLDS),
        ({"n": 0}, Why.MISSING),
        ({"p": 0.06}, Why.NONE),
        ({"edited": 0.8, "p": 0.01}, Why.NONE),  # it rises
        ({"p": NAN}, Why.HOLDS),  # several answers a prompt: the interval decides
        ({"p": NAN, "high": 0.0}, Why.NONE),
        ({"n": 7, "p": 0.0625}, Why.FEW),  # 5 of 7 complied: no outcome could show a fall
    ],
)
def test_a_fall_of_attack_success_is_claimed_only_where_every_condition_holds(
    changes: dict[str, object], why: Why
) -> None:
    assert replace(FALLS, **changes).why is why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, Why.HOLDS),
        ({"can_tell": False}, Why.READOUT),
        ({"confirmed": ()}, Why.NONE),
        ({"confirmed": (), "least_q": 0.06}, Why.FEW),
        ({"confirmed": (), "n_test": 5}, Why.FEW),  # 2 candidates x 1/32 > .05
        ({"confirmed": (), "n_test": 5, "significant": 0, "candidates": 0}, Why.NONE),
        ({"measured": 0}, Why.MISSING),
    ],
)
def test_heads_are_claimed_only_where_every_condition_holds(changes: dict[str, object], why: Why) -> None:
    assert replace(CONFIRMED, **changes).why is why


def test_what_was_not_tested_is_neither_so_nor_not_so() -> None:
    assert [holds(why) for why in (Why.HOLDS, Why.ZERO, Why.SETS, Why.FEW, Why.MISSING)] == [
        *(True, False, None, None, None)
    ]


def test_claims_are_read_from_what_a_run_stores() -> None:
    facts = {
        **{"readout": "answer", "can_tell": True, "selected": ["L4H5"], "n": 9, "effect": 2.0, "effect_low": 1.0},
        **{"effect_high": 3.0, "restored": None, "random_sets": [0.5, 1.5]},
        **{"p_by_kind": {"all layers": 1 / 3}, "sets_by_kind": {"all layers": 2}},
    }
    claim = SuppressionClaim.of(facts)
    assert (claim.n, claim.effect, claim.low, claim.random_mean, claim.why) == (9, 2.0, 1.0, 1.0, Why.SETS)
    assert SuppressionClaim.of({}).why is Why.READOUT
    pairs = pd.DataFrame(
        {
            **{
                "arm": ["random 1", "top heads"],
                "group": "harmful",
                "n": [9, 8],
                "unedited": 1.0,
                "edited": [1.0, 0.0],
            },
            **{"ci_low": -1.0, "ci_high": -1.0, "discordant": [0, 8], "mcnemar_p": [NAN, 0.008]},
        }
    )
    attack = AttackClaim.of(pairs, arm="top heads", scope="closing")
    assert (attack.n, attack.difference, attack.complied, attack.why) == (8, -1.0, 8, Why.HOLDS)
    assert AttackClaim.of(pairs, arm="none", scope="").why is Why.MISSING
