"""Where do the witnesses disagree, and what does that mean?

1. Each claim (claims.py) says that it holds, that it does not, or nothing.
2. The first that says something, in the order suppression, attack success, heads, cliff, is what the others are held
   against: behaviour before the probe.
3. Each that says the opposite adds what it saw, and what the two together mean, to one sentence. Where nobody
   disagrees there is no sentence.

Knows claims, not where their numbers come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cliffscope.study.claims import AttackClaim, CliffClaim, HeadsClaim, SuppressionClaim, Why, holds

SUPPRESSION, ATTACK, HEADS, CLIFF = "suppression", "attack success", "heads", "cliff"
"""Names of the witnesses, in the order in which they are heard."""
HARM, EVERYWHERE = "harm", "attack success, edited everywhere"
"""Variants: no cliff is claimed, since the probe reads harm; answers under an edit that is not at the closing alone."""

_HARM = (
    "the probe's score at the final token follows the harm in the request at least as much as what the model does "
    "about it"
)
MEANINGS: Mapping[tuple[str, bool, str], str] = {
    (SUPPRESSION, True, ATTACK): (
        "the opening of the answer changes and the answer does not, since behind the opening nothing is edited"
    ),
    (SUPPRESSION, True, EVERYWHERE): "how the answer begins changes, and what is answered does not",
    (SUPPRESSION, False, ATTACK): (
        "answers change in another way than by the openings that are read, so that the answers themselves should be "
        "read before they are relied on"
    ),
    (SUPPRESSION, True, HEADS): "the heads act together, and none of them alone turns enough answers",
    (SUPPRESSION, False, HEADS): (
        "single heads turn answers, and the selected set as a whole does no more than chance or other sets would"
    ),
    (SUPPRESSION, True, CLIFF): "the model stops refusing in a way that this probe does not see",
    (SUPPRESSION, True, HARM): _HARM,
    (SUPPRESSION, False, CLIFF): (
        "the probe's score falls, and these heads are not what keeps the model from refusing: other parts may, or what "
        "the probe sees is not what the model acts on"
    ),
    (ATTACK, True, HEADS): "the heads change answers together, and none of them alone turns enough answers",
    (ATTACK, False, HEADS): "single heads turn how answers begin, and not what is answered",
    (ATTACK, True, CLIFF): "the answers change in a way that this probe does not see",
    (ATTACK, True, HARM): _HARM,
    (ATTACK, False, CLIFF): (
        "the probe's score falls where the model complies, and editing these heads does not bring the refusal back"
    ),
    (HEADS, True, CLIFF): "single heads turn answers in a way that this probe does not see",
    (HEADS, True, HARM): _HARM,
    (HEADS, False, CLIFF): (
        "the probe's score falls, and no single head is what keeps the model from refusing: several together may, or "
        "another part"
    ),
}
"""What it means that the first witness says so (True or False) and the second the opposite."""


@dataclass(frozen=True, kw_only=True)
class Witness:
    """What one witness says."""

    name: str
    """One of the names above."""
    says: bool | None
    """That heads suppress refusal, that they do not, or nothing."""
    saw: str
    """Clause with the numbers, such as "attack success falls by 0.40 [0.31, 0.50] (n = 40)"."""
    variant: str = ""
    """How it contradicts a witness that says yes, where that matters: `HARM` or `EVERYWHERE`."""


def witnesses_of(
    suppression: SuppressionClaim | None,
    attack: AttackClaim | None,
    heads: HeadsClaim | None,
    cliff: CliffClaim | None,
) -> list[Witness]:
    """The witnesses in the order in which they are heard; one that was never asked is left out.

    Args:
        suppression: of the selected heads; None where none was selected.
        attack: of the arms; None where none was evaluated.
        heads: None where heads were not ranked.
        cliff: None where nothing was traced.
    """
    heard = []
    if suppression is not None:
        heard.append(Witness(name=SUPPRESSION, says=holds(suppression.why), saw=_suppression(suppression)))
    if attack is not None:
        variant = "" if attack.scope == "closing" else EVERYWHERE
        heard.append(Witness(name=ATTACK, says=holds(attack.why), saw=_attack(attack), variant=variant))
    if heads is not None:
        heard.append(Witness(name=HEADS, says=holds(heads.why), saw=_heads(heads)))
    if cliff is not None:
        variant = HARM if cliff.why is Why.HARM else ""
        heard.append(Witness(name=CLIFF, says=holds(cliff.why), saw=_cliff(cliff), variant=variant))
    return heard


def disagreement(witnesses: Sequence[Witness]) -> str:
    """One sentence where two witnesses contradict each other; empty where none do.

    Args:
        witnesses: in the order in which they are heard.

    Example:
        >>> first = Witness(name=SUPPRESSION, says=True, saw="the readout turns")
        >>> disagreement([first, Witness(name=HEADS, says=True, saw="2 heads are confirmed")])
        ''
    """
    heard = [witness for witness in witnesses if witness.says is not None]
    against = [witness for witness in heard if witness.says is not heard[0].says]
    if not against:
        return ""
    first = heard[0]
    saw = ", and ".join(witness.saw for witness in against)
    means = ", and that ".join(_meaning(first, witness) for witness in against)
    return f"The witnesses disagree: {first.saw}, but {saw}; which means that {means}."


def _meaning(first: Witness, other: Witness) -> str:
    """What it means that the other says the opposite of the first."""
    says = first.says is True
    variant = (first.name, says, other.variant)
    return MEANINGS[variant if variant in MEANINGS else (first.name, says, other.name)]


def _suppression(claim: SuppressionClaim) -> str:
    numbers = f"by {claim.effect:+.2f} {interval(claim.low, claim.high, '+.2f')} (n = {claim.n})"
    turns = "turns" if holds(claim.why) else "is not shown to turn"
    beyond = " beyond random sets" if claim.why is Why.RANDOM else ""
    return f"the {claim.readout} readout {turns} towards refusal{beyond} with the selected heads edited, {numbers}"


def _attack(claim: AttackClaim) -> str:
    numbers = (
        f"{claim.unedited:.2f} to {claim.edited:.2f}, a difference of {claim.difference:+.2f} "
        f"{interval(claim.low, claim.high, '+.2f')} over {claim.n} prompts"
    )
    return f"attack success {'falls' if holds(claim.why) else 'is not shown to fall'} ({numbers})"


def _heads(claim: HeadsClaim) -> str:
    if not claim.confirmed:
        return f"no single head is confirmed (n = {claim.n_test})"
    names = ", ".join(head.name for head in claim.confirmed)
    count = len(claim.confirmed)
    return f"{count} {'head is' if count == 1 else 'heads are'} confirmed one by one ({names}; n = {claim.n_test})"


def _cliff(claim: CliffClaim) -> str:
    numbers = f"{claim.cliff:.2f} {interval(claim.low, claim.high, '.2f')} (n = {claim.n})"
    if claim.why is Why.HARM:
        return (
            f"the probe still scores {claim.final:.2f} {interval(claim.final_low, claim.final_high, '.2f')} at the "
            f"final token where the model complies (n = {claim.n}), so that no cliff is claimed"
        )
    return f"the probe shows a cliff of {numbers}" if holds(claim.why) else f"the probe shows no cliff, {numbers}"


def interval(low: float, high: float, digits: str) -> str:
    """Both ends, or that there are too few transcripts for them."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "(too few for an interval)"
    return f"[{low:{digits}}, {high:{digits}}]"
