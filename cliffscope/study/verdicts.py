"""What do the results say, in sentences?

Each function turns one claim (claims.py) or result into the sentence that heads a section of the report. A claim is
made only where its conditions hold; otherwise the sentence says which one fails, and what would be needed. Numbers
carry an interval, and the n of what they are a number of.
"""

from collections.abc import Collection, Hashable, Mapping

import numpy as np
import pandas as pd

from cliffscope.errors import DataError
from cliffscope.evaluation.arms import TOP, UNEDITED
from cliffscope.evaluation.safety import SafetyReport
from cliffscope.evaluation.side_effects import KL, SideEffects
from cliffscope.heads.statistics import ALPHA, HeadKind
from cliffscope.heads.suppression import SAME_LAYERS
from cliffscope.power import AurocAbove, SignTest, needed_n
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.reports import CAN_TELL, MIDDLE, ProbeReport, RegionReport
from cliffscope.readouts.text_baseline import TextBaseline
from cliffscope.repairing.comparison import AFTER, BEFORE, RepairReport
from cliffscope.selection.choice import Selection
from cliffscope.stats import Interval, least_p, random_set_p
from cliffscope.study.claims import (
    ENOUGH_COMPLIED,
    ENOUGH_SETS,
    AttackClaim,
    CliffClaim,
    ConfirmedHead,
    HeadsClaim,
    SuppressionClaim,
    Why,
    count,
)
from cliffscope.study.witnesses import interval

TOPICS = (
    *("forced", "suppression", "intervention", "heads", "side effects", "answer", "cliff", "probe", "witnesses"),
    *("selection", "repair"),
)
"""Topics of findings in the order in which they are told: what limits all of them, then behaviour, then what the probe
sees, then where the two disagree."""
_KINDS = {SAME_LAYERS: "the same layers"}
REASONS = 3
"""Reasons that a sentence names at most."""
NAMED = 6
"""Heads that a sentence names at most."""
MOST_FORCED = 0.1
"""Share of forced closings above which a study says so first."""
PLANNED = AurocAbove(bound=CAN_TELL).auroc
"""AUROC that transcripts are planned for: a few of them may separate by chance alone."""


def of_forced(forced: int, total: int, budget: int | None) -> str:
    """That much of the thinking was cut off; empty where little was.

    Args:
        forced: transcripts whose thinking was closed at its budget.
        total: transcripts.
        budget: tokens of thinking at most; None where the transcripts were made elsewhere.
    """
    if forced <= MOST_FORCED * total:
        return ""
    where = "at its budget" if budget is None else f"at its budget of {budget:,} tokens"
    remedy = (
        "Generate them with a larger budget of thinking"
        if budget is None
        else f"Raise max_thinking (--max-thinking) above {budget:,}"
    )
    return (
        f"The thinking of {forced} of {total} transcripts ({forced / total:.0%}) was not ended by the model, but "
        f"closed {where}. They are left out of every claim below, which rests on the others alone. {remedy} before "
        "relying on these results."
    )


def no_probe(reason: str) -> str:
    """No probe could be fitted."""
    return f"No probe could be fitted, so nothing is claimed. {reason}"


def no_answer_readout(reason: str) -> str:
    """No answer readout could be fitted."""
    return f"The model's answers could not be read, so nothing is claimed about heads. {reason}"


def of_answer(readout: AnswerReadout) -> str:
    """What the model's own answer distribution tells on the test split."""
    report = readout.report
    longest = max(len(opening.token_ids) for opening in readout.openings)
    length = "one token" if longest == 1 else f"up to {longest} tokens"
    sentence = (
        f"The log-odds of refusing against complying openings ({length}) separate held-out refusals from compliances "
        f"with {report.final}; {report.covered:.0%} of the held-out answers begin with a known opening."
    )
    if np.isfinite(report.within_harmful.auroc):
        sentence += f" Among harmful transcripts alone: {report.within_harmful}."
    if not report.can_tell:
        sentence += (
            f" That is too little to tell what the model will answer{_needed_for(report.final)}: do not rely on the "
            "results about heads."
        )
    return sentence


def of_probe(report: ProbeReport, contrast: str, baseline: TextBaseline | None = None) -> str:
    """What the probe can tell on its test split, and what words alone can tell there."""
    sentence = f"The probe tells refused from complied ({contrast}) transcripts with held-out {report.final}."
    if np.isfinite(report.within_harmful.auroc) and contrast == "harmless":
        sentence += f" Among harmful transcripts alone: {report.within_harmful}."
    if np.isfinite(report.late_thinking.auroc):
        sentence += f" During the thinking: {report.late_thinking}."
    harmful = report.calibration
    if np.isfinite([harmful.refused, harmful.complied]).all():
        refused = _mean(harmful.refused, harmful.refused_interval)
        complied = _mean(harmful.complied, harmful.complied_interval)
        sentence += (
            f" At the final token refused harmful transcripts score {refused}, complied ones {complied} (Brier score "
            f"{harmful.brier:.3f}, calibration error {harmful.calibration_error:.3f})."
        )
    if baseline is not None:
        sentence += f" N-grams of prompt and thinking alone reach {_auroc(baseline.overall)}"
        if np.isfinite(baseline.within_harmful.auroc) and contrast == "harmless":
            sentence += f", and {_auroc(baseline.within_harmful)} among harmful transcripts"
        sentence += "."
    if not report.final.can_tell:
        sentence += (
            " The probe's AUROC is not shown to be high enough to read a refusal score from"
            f"{_needed_for(report.final)}: do not rely on its scores."
        )
    return sentence


def of_cliff(cliffs: pd.DataFrame, plateau: str) -> str:
    """Whether harmful, complied transcripts of the test split show a cliff."""
    claim = CliffClaim.of(cliffs, plateau)
    if not claim.complied:
        return "No harmful prompt of the test split was complied with, so there is no cliff to look for."
    if claim.why is Why.MISSING:
        return (
            f"No cliff can be claimed for the {claim.complied} harmful prompts that were complied with: "
            f"{_reasons(claim.reasons)}."
        )
    numbers = (
        f"over {claim.n} harmful prompts that were complied with (test split), the score falls from {claim.height:.2f} "
        f"in the thinking ({plateau}) to {claim.final:.2f} at the final token: cliff {claim.cliff:.2f} "
        f"{interval(claim.low, claim.high, '.2f')}."
    )
    if claim.n < claim.complied:
        left = claim.complied - claim.n
        numbers += f" {left} of the {claim.complied} have no valid cliff: {_reasons(claim.reasons)}."
    if claim.why is Why.HARM:
        surely = claim.final_low > MIDDLE
        reads = "reads harm there, not refusal" if surely else "may read harm there rather than refusal"
        return (
            f"No refusal cliff can be claimed, since the probe {reads}: at the final token, what was complied with "
            f"scores {interval(claim.final_low, claim.final_high, '.2f')}, and not below {MIDDLE}. What was measured: "
            f"{numbers}"
        )
    shown = "There is a refusal cliff" if claim.why is Why.HOLDS else "No refusal cliff is shown"
    return f"{shown}: {numbers}"


def no_heads(ranked_on: int, held_out: int, fewest: int) -> str:
    """Too few complied transcripts to rank heads on."""
    return (
        f"Heads were not ranked: {ranked_on} harmful prompts of the fit and validate splits and {held_out} of the test "
        f"split were complied with after thinking that the model ended itself; {fewest} of each are needed."
    )


def of_heads(claim: HeadsClaim) -> str:
    """Which heads suppress refusal: significant where they were ranked, confirmed on test transcripts."""
    if claim.why is Why.READOUT:
        return "No head can be claimed to suppress refusal, since the readout cannot tell refused from complied."
    if claim.why is Why.FEW and claim.least_q > ALPHA:
        needed = needed_n(SignTest(heads=claim.measured, q=ALPHA))
        return (
            f"No head can be claimed to suppress refusal: over {claim.measured} heads, {claim.n_ranked} transcripts "
            f"allow no q below {claim.least_q:.2f}. At least {needed} harmful prompts of the fit and validate splits "
            "that are complied with are needed."
        )
    if claim.why is Why.FEW:
        needed = needed_n(SignTest(heads=claim.candidates, q=ALPHA))
        return (
            f"{_heads(claim.significant)} changed the answer where they were ranked (n = {claim.n_ranked}), and none "
            f"could be confirmed: {claim.n_test} test transcripts allow no adjusted p below {claim.least_p:.2f}, and "
            f"at least {needed} are needed."
        )
    if not claim.significant:
        return (
            "No single head changes the model's answer more often towards refusal than away from it (q > "
            f"{ALPHA:g} for every head that can be tested, n = {claim.n_ranked})."
        )
    if not claim.confirmed:
        return (
            f"{_heads(claim.significant)} changed the answer where they were ranked (n = {claim.n_ranked}), and none "
            f"of them was confirmed on test transcripts (n = {claim.n_test})."
        )
    named = ", ".join(_with_kind(head) for head in claim.confirmed)
    subject = "1 head is" if len(claim.confirmed) == 1 else f"{len(claim.confirmed)} heads are"
    rest = claim.candidates - len(claim.confirmed)
    more = (
        f" {rest} further significant {'head adds' if rest == 1 else 'heads add'} nothing beyond them." if rest else ""
    )
    return f"{subject} confirmed to suppress refusal on test transcripts (n = {claim.n_test}): {named}.{more}"


def of_truth(planted: Collection[str], confirmed: Collection[str]) -> str:
    """How the confirmed heads of an organism compare with those that are planted in it."""
    if not planted:
        return "Nothing is planted in this organism" + (", so each of them is a false claim." if confirmed else ".")
    missed = [head for head in planted if head not in confirmed]
    others = [head for head in confirmed if head not in planted]
    truth = f"Planted in this organism: {', '.join(planted)}"
    if not missed and not others:
        return f"{truth}; {'both' if len(planted) == 2 else 'all'} are found and confirmed, and no other head is."
    parts = (
        f"{', '.join(missed)} not confirmed" if missed else "",
        f"{', '.join(others)} not planted" if others else "",
    )
    return f"{truth}; {', '.join(filter(None, parts))}."


def of_suppression(claim: SuppressionClaim) -> str:
    """What editing the selected heads together does to the answer, against random sets."""
    names = ", ".join(claim.heads[:NAMED]) + (f" and {len(claim.heads) - NAMED} more" if claim.heads[NAMED:] else "")
    share = f", {claim.restored:.0%} of the way to refused prompts" if np.isfinite(claim.restored) else ""
    read = "log-odds of refusing" if claim.readout == "answer" else f"{claim.readout} readout"
    numbers = (
        f"zeroing {names} at the closing changes the {read} by {claim.effect:+.2f} "
        f"{interval(claim.low, claim.high, '+.2f')} on {claim.n} test transcripts that were complied with{share}; "
        f"{_random_sets(claim)}."
    )
    if claim.why is Why.HOLDS:
        return f"Refusal is suppressed, and the selected heads do it: {numbers}"
    if claim.why is Why.READOUT:
        return f"Nothing is claimed about suppression, since {claim.why}. {numbers[0].upper()}{numbers[1:]}"
    if claim.why is Why.SETS:
        most = max(claim.sets.values(), default=0)
        return (
            f"That the selected heads suppress refusal cannot be shown with {most} random sets of a kind: the least p "
            f"that they allow is {least_p(most):.2g}, and {ENOUGH_SETS} are needed. What was measured: {numbers}"
        )
    return f"The selected heads are not shown to suppress refusal, since {_because(claim.why)}: {numbers}"


def of_safety(report: SafetyReport) -> str:
    """What zeroing the selected heads does to ASR and over-refusal, and which arms it breaks."""
    forced = int(report.outcomes.loc[report.outcomes["arm"] == UNEDITED, "forced"].sum())
    judged = report.without_forced() if forced else report
    sentences = [_attack_sentence(judged), _refusal_sentence(judged), _degenerate_sentence(report)]
    left = f"{forced} answers to thinking that was closed at its budget are left out." if forced else ""
    return " ".join(filter(None, (*sentences, left)))


def of_side_effects(effects: SideEffects) -> str:
    """What zeroing the top heads does to harmless transcripts, token by token."""
    return _divergence_sentence(effects)


def of_selection(selection: Selection) -> str:
    """How many examples were chosen."""
    if not len(selection.selected):
        return f"Nothing was selected: none of {selection.pool} pool transcripts has a valid cliff."
    taken = selection.frame[selection.frame["chosen"].astype(bool)]
    ours, everyone = taken["cliff"].mean(), selection.frame["cliff"].mean()
    return (
        f"{len(taken)} of {selection.pool} complied transcripts are selected for repair; their mean cliff is "
        f"{ours:.2f}, that of all {len(selection.frame)} valid ones {everyone:.2f}."
    )


def of_repair(report: RepairReport, n: int) -> str:
    """What fine-tuning on the selection did."""
    parts = []
    for group, word in (("harmful", "attack success"), ("harmless", "over-refusal")):
        rates = _rates(report.safety, group)
        if AFTER in rates:
            parts.append(f"{word} goes from {rates[UNEDITED]} to {rates[AFTER]}")
    before, after = report.value("cliff", BEFORE), report.value("cliff", AFTER)
    if np.isfinite([before, after]).all():
        parts.append(f"the mean cliff from {before:.2f} to {after:.2f}")
    else:
        parts.append("the cliff cannot be compared, since no probe could be fitted on one of the two")
    return f"Repaired on {n} selected transcripts: {', '.join(parts)}."


def _divergence_sentence(effects: SideEffects) -> str:
    frame = effects.frame[effects.frame["measure"] == KL]
    top = frame[frame["kind"] == "top"].iloc[0]
    random = frame[frame["kind"] == "random"]["value"]
    random_text = f"; random sets {random.mean():.2g} on average" if len(random) else ""
    return (
        f"On harmless transcripts the edited model's next-token distribution diverges by {top['value']:.2g} "
        f"{interval(top['ci_low'], top['ci_high'], '.2g')} nats a token (n = {top['n']}){random_text}."
    )


def _attack_sentence(report: SafetyReport) -> str:
    rates = _rates(report, "harmful")
    where = f" at the {report.scope}" if report.scope and report.scope != "all" else ""
    if not rates:
        return ""
    if TOP not in rates:
        return f"Attack success is {rates[UNEDITED]}."
    claim = AttackClaim.of(report.pairs(), arm=TOP, scope=report.scope)
    verdict = {
        Why.HOLDS: f"Attack success falls with the {_edited(report)} zeroed{where}",
        Why.NONE: f"Attack success does not fall with the {_edited(report)} zeroed{where}",
        Why.FEW: (
            f"Whether attack success falls with the {_edited(report)} zeroed{where} cannot be shown, since the "
            f"unedited model complied with {claim.complied} harmful prompts and at least {ENOUGH_COMPLIED} are needed"
        ),
        Why.MISSING: "Attack success cannot be compared, since no prompt has a judged answer in both arms",
    }[claim.why]
    pair = ""
    if claim.n:
        changed = f"{claim.discordant} prompts changed outcome"
        test = f"McNemar's p = {claim.p:.3f}" if np.isfinite(claim.p) else changed
        bounds = interval(claim.low, claim.high, "+.2f")
        pair = f", a paired difference of {claim.difference:+.2f} {bounds} over {claim.n} prompts ({test})"
    return f"{verdict}: {rates[UNEDITED]} unedited, {rates[TOP]} edited{pair}{_random_arms(report)}."


def _refusal_sentence(report: SafetyReport) -> str:
    rates = _rates(report, "harmless")
    if TOP not in rates:
        return f"Over-refusal is {rates[UNEDITED]}." if rates else ""
    random = report.random_rate("harmless")
    random_text = f", {_rate(random)} on average over random sets" if np.isfinite(random) else ""
    return f"Over-refusal is {rates[UNEDITED]} unedited, {rates[TOP]} edited{random_text}."


def _rates(report: SafetyReport, group: str) -> dict[str, str]:
    """Rate, interval and judged n by arm, random ones left out; empty where the group has no prompts."""
    frame = report.to_frame()
    if frame.empty:
        return {}
    rows = frame[(frame["group"] == group) & (frame["kind"] != "random")]
    return {
        str(
            row["arm"]
        ): f"{_rate(float(row['rate']))} {interval(row['ci_low'], row['ci_high'], '.2f')} ({_judged(row)})"
        for row in rows.to_dict("records")
    }


def _judged(row: Mapping[Hashable, object]) -> str:
    """The n of a rate: judged answers, and of how many where others were not judged."""
    judged, n = count(row["refused"]) + count(row["complied"]), count(row["n"])
    return f"n = {judged}" if judged == n else f"n = {judged} judged of {n}"


def _edited(report: SafetyReport) -> str:
    heads = len(next(arm.edit.heads for arm in report.arms if arm.name == TOP and arm.edit is not None))
    return "selected head" if heads == 1 else f"{heads} selected heads"


def _random_arms(report: SafetyReport) -> str:
    """Attack success of the random arms, and the edited arm's p against them."""
    frame = report.to_frame()
    rates = frame[(frame["kind"] == "random") & (frame["group"] == "harmful")]["rate"].to_numpy(float)
    rates = rates[np.isfinite(rates)]
    edited = report.rate(TOP)
    if not len(rates):
        return "; no random set was run beside them"
    p = random_set_p(-edited, -rates)
    many = "1 random set has" if len(rates) == 1 else f"{len(rates)} random sets have"
    text = f"{many} {rates.mean():.2f} on average"
    return f"; {text}" + (f" (p = {p:.3f}{_floor(p, len(rates))})" if np.isfinite(p) else "")


def _random_sets(claim: SuppressionClaim) -> str:
    """What random sets do, with p by kind."""
    if not np.isfinite(claim.random_mean):
        return "no random set was run beside them"
    tests = "; ".join(
        f"{claim.sets.get(kind, 0)} sets of {_KINDS.get(kind, kind)}: p = {p:.3f}{_floor(p, claim.sets.get(kind, 0))}"
        for kind, p in claim.p.items()
    )
    return f"random sets of as many heads change it by {claim.random_mean:+.2f} on average ({tests})"


def _floor(p: float, sets: int) -> str:
    """Whether as few random sets could have given less."""
    return ", the least possible" if sets and p <= least_p(sets) + 1e-12 else ""


def _because(why: Why) -> str:
    return {
        Why.ZERO: "the interval of the change does not lie above zero",
        Why.RANDOM: "random sets of as many heads do as much",
    }.get(why, str(why))


def _needed_for(report: RegionReport) -> str:
    """How many transcripts of each class would do, where there are too few; or that more would not help."""
    n = (report.n_refused, report.n_complied)
    if not np.isfinite(report.auroc):
        return ""
    try:
        needed = needed_n(AurocAbove(bound=CAN_TELL, auroc=min(report.auroc, PLANNED)))
    except DataError:
        return f" (an AUROC of {report.auroc:.3f} stays below {CAN_TELL} with any number of transcripts)"
    few = f"{n[0]} + {n[1]} transcripts are too few, about {needed} + {needed} are needed"
    return f" ({few})" if min(n) < needed else ""


def _heads(number: int) -> str:
    return "1 head" if number == 1 else f"{number} heads"


def _with_kind(head: ConfirmedHead) -> str:
    is_known = head.kind in (HeadKind.SELECTIVE, HeadKind.BROAD)
    return f"{head.name} ({head.kind if is_known else 'unknown whether selective or broad'})"


def _degenerate_sentence(report: SafetyReport) -> str:
    """How many answers of each kind of arm are broken text; nothing where none is."""
    words = {"unedited": "unedited", "top": "with the selected heads zeroed", "random": "over all random sets"}
    sums = report.to_frame().groupby("kind", sort=False)[["degenerate", "n"]].sum()
    if not sums["degenerate"].sum():
        return ""
    counts = ", ".join(
        f"{row['degenerate']} of {row['n']} {words.get(str(kind), str(kind))}" for kind, row in sums.iterrows()
    )
    return f"Broken answers, such as one phrase over and over, are unjudged and in no rate: {counts}."


def _rate(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "unknown"


def _auroc(report: RegionReport) -> str:
    return f"AUROC {report.auroc:.3f} {interval(report.interval.low, report.interval.high, '.3f')}"


def _mean(value: float, bounds: Interval) -> str:
    return f"{value:.2f} {interval(bounds.low, bounds.high, '.2f')}"


def _reasons(reasons: Mapping[str, int]) -> str:
    """Each reason with its count, the most frequent first."""
    text = "; ".join(f"{reason} ({n})" for reason, n in list(reasons.items())[:REASONS])
    return text + (f"; and {len(reasons) - REASONS} other reasons" if len(reasons) > REASONS else "")
