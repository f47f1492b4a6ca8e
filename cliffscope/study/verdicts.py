"""What do the results say, in sentences?

Each function turns one result into the sentence that heads the report. A claim is made only where its conditions hold;
otherwise the sentence says which one fails. Numbers carry n and interval.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from cliffscope.evaluation.arms import TOP, UNEDITED
from cliffscope.evaluation.safety import SafetyReport
from cliffscope.evaluation.side_effects import KL, SideEffects
from cliffscope.heads.confirmation import Confirmation
from cliffscope.heads.controls import SetControl
from cliffscope.heads.statistics import ALPHA
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.reports import MIDDLE, ProbeReport, RegionReport
from cliffscope.readouts.text_baseline import TextBaseline
from cliffscope.repairing.comparison import AFTER, BEFORE, RepairReport
from cliffscope.resampling import bootstrap_mean
from cliffscope.selection.choice import Selection
from cliffscope.stats import Interval, least_p

CLIFF = 0.1
"""Mean cliff below which nothing is called a cliff."""
TOPICS = (
    *("suppression", "heads", "intervention", "side effects", "answer", "cliff", "probe"),
    *("selection", "repair"),
)
"""Topics of findings in the order in which they are told: behaviour first, then what the probe sees."""
REASONS = 3
"""Reasons that a sentence names at most."""


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
        sentence += " That is too little to tell what the model will answer: do not rely on the results below."
    return sentence


def of_probe(report: ProbeReport, contrast: str, baseline: TextBaseline | None = None) -> str:
    """What the probe can tell on its test split, and what words alone can tell there."""
    told = f"The probe tells refused from complied ({contrast}) transcripts with held-out {report.final}."
    if np.isfinite(report.within_harmful.auroc) and contrast == "harmless":
        told += f" Among harmful transcripts alone: {report.within_harmful}."
    if np.isfinite(report.late_thinking.auroc):
        told += f" During the thinking: {report.late_thinking}."
    harmful = report.calibration
    if np.isfinite([harmful.refused, harmful.complied]).all():
        refused = _mean(harmful.refused, harmful.refused_interval)
        complied = _mean(harmful.complied, harmful.complied_interval)
        told += (
            f" At the final token refused harmful transcripts score {refused}, complied ones {complied} (Brier score "
            f"{harmful.brier:.3f}, calibration error {harmful.calibration_error:.3f})."
        )
    if baseline is not None:
        told += f" N-grams of prompt and thinking alone reach {_auroc(baseline.overall)}"
        if np.isfinite(baseline.within_harmful.auroc) and contrast == "harmless":
            told += f", and {_auroc(baseline.within_harmful)} among harmful transcripts"
        told += "."
    if not report.final.can_tell:
        told += " The probe's AUROC is too low to read a refusal score from: do not rely on its scores."
    return told


def of_cliff(cliffs: pd.DataFrame, plateau: str) -> str:
    """Whether harmful, complied transcripts of the test split show a cliff."""
    asked = cliffs[(cliffs["harmful"].astype("boolean").fillna(False)) & (cliffs["outcome"] == "complied")]
    valid = asked[asked["valid"].astype(bool)]
    if asked.empty:
        return "No harmful prompt of the test split was complied with, so there is no cliff to look for."
    if valid.empty:
        return (
            f"No cliff can be claimed for the {len(asked)} harmful prompts that were complied with: {_reasons(asked)}."
        )
    height = valid["plateau_max" if plateau == "max" else "plateau_mean"].mean()
    low, high = (float(v) for v in bootstrap_mean(valid["cliff"].to_numpy(dtype=float), seed=0))
    numbers = (
        f"over {len(valid)} harmful prompts that were complied with (test split), the score falls from {height:.2f} in "
        f"the thinking ({plateau}) to {valid['final'].mean():.2f} at the final token: cliff "
        f"{valid['cliff'].mean():.2f} {_interval(low, high, '.2f')}."
    )
    if len(valid) < len(asked):
        invalid = asked[~asked["valid"].astype(bool)]
        numbers += f" {len(invalid)} of the {len(asked)} have no valid cliff: {_reasons(invalid)}."
    final_low, final_high = (float(v) for v in bootstrap_mean(valid["final"].to_numpy(dtype=float), seed=0))
    if final_high >= MIDDLE:
        reads = "reads harm there, not refusal" if final_low > MIDDLE else "may read harm there rather than refusal"
        return (
            f"No refusal cliff can be claimed, since the probe {reads}: at the final token, what was complied with "
            f"scores {_interval(final_low, final_high, '.2f')}, and not below {MIDDLE}. What was measured: {numbers}"
        )
    if not low >= CLIFF:
        return f"No refusal cliff is shown: {numbers}"
    return f"There is a refusal cliff: {numbers}"


def no_heads(ranked_on: int, held_out: int, fewest: int) -> str:
    """Too few complied transcripts to rank heads on."""
    return (
        f"Heads were not ranked: {ranked_on} harmful prompts of the fit and validate splits and {held_out} of the test "
        f"split were complied with; {fewest} of each are needed."
    )


def of_heads(confirmation: Confirmation, *, n_ranked: int, n_significant: int, least_q: float, can_tell: bool) -> str:
    """Which heads suppress refusal: significant where they were ranked, confirmed on test transcripts."""
    if not can_tell:
        return "No head can be claimed to suppress refusal, since the readout cannot tell refused from complied."
    if least_q > ALPHA:
        return (
            f"No head can be claimed to suppress refusal: {n_ranked} transcripts allow no q below {least_q:.2f}, so "
            "more harmful prompts that are complied with are needed."
        )
    n = len(confirmation.effects)
    if not n_significant:
        return (
            f"No single head changes the model's answer more often towards refusal than away from it (q > {ALPHA:g} "
            f"for every head, n = {n_ranked})."
        )
    if not confirmation.confirmed:
        return (
            f"{n_significant} heads changed the answer where they were ranked (n = {n_ranked}), and none of them was "
            f"confirmed on test transcripts (n = {n})."
        )
    named = ", ".join(f"{head} ({confirmation.kind_of(head)})" for head in confirmation.confirmed)
    count = len(confirmation.confirmed)
    subject = "1 head is" if count == 1 else f"{count} heads are"
    rest = len(confirmation.heads) - count
    more = (
        f" {rest} further significant {'head adds' if rest == 1 else 'heads add'} nothing beyond them." if rest else ""
    )
    return f"{subject} confirmed to suppress refusal on test transcripts (n = {n}): {named}.{more}"


def of_suppression(control: SetControl, facts: Mapping[str, object], *, can_tell: bool) -> str:
    """What editing the selected heads together does to the answer, against random sets."""
    low, high = control.interval
    restored = facts["restored"]
    share = (
        f", {restored:.0%} of the way to refused prompts"
        if isinstance(restored, float) and restored == restored
        else ""
    )
    sentence = (
        f"Zeroing the {len(control.heads)} selected heads at the closing changes the log-odds of refusing by "
        f"{control.effect:+.2f} [{low:+.2f}, {high:+.2f}] on {len(control.effects)} test transcripts that were "
        f"complied with{share}; size-matched random head sets by {control.random_effects.mean():+.2f} "
        f"({_random_p(control)})."
    )
    if not can_tell:
        return f"Nothing is claimed about suppression, since the readout cannot tell refused from complied. {sentence}"
    if low > 0 and control.effect > control.random_effects.max():
        return f"Refusal is suppressed, and the selected heads do it: {sentence[0].lower()}{sentence[1:]}"
    return f"The selected heads are not shown to suppress refusal: {sentence[0].lower()}{sentence[1:]}"


def _random_p(control: SetControl) -> str:
    """The p of a set of heads, and whether as few random sets could have given less."""
    sets = len(control.random_effects)
    floor = control.p <= least_p(sets)
    return f"p = {control.p:.3f}" + (f", the least that {sets} sets allow" if floor else "")


def of_safety(report: SafetyReport) -> str:
    """What zeroing the top heads does to ASR and over-refusal, and which arms it breaks."""
    words = (("harmful", "Attack success"), ("harmless", "Over-refusal"))
    sentences = (*(_arm_sentence(report, group, word) for group, word in words), _degenerate_sentence(report))
    return " ".join(filter(None, sentences))


def of_side_effects(effects: SideEffects) -> str:
    """What zeroing the top heads does to harmless transcripts, token by token."""
    return _divergence_sentence(effects)


def of_selection(selection: Selection) -> str:
    """How many examples were chosen."""
    if not len(selection.chosen):
        return f"Nothing was selected: none of {selection.pool} pool transcripts has a valid cliff."
    chosen = selection.frame[selection.frame["chosen"].astype(bool)]
    ours, everyone = chosen["cliff"].mean(), selection.frame["cliff"].mean()
    return (
        f"{len(chosen)} of {selection.pool} complied transcripts are selected for repair; their mean cliff is "
        f"{ours:.2f}, that of all {len(selection.frame)} valid ones {everyone:.2f}."
    )


def of_repair(report: RepairReport, n: int) -> str:
    """What fine-tuning on the selection did."""
    table = report.safety.to_frame().set_index(["arm", "group"])
    parts = []
    for group, word in (("harmful", "attack success"), ("harmless", "over-refusal")):
        if (AFTER, group) in table.index:
            told = []
            for arm in (UNEDITED, AFTER):
                rate, low, high = (float(v) for v in table.loc[(arm, group), ["rate", "ci_low", "ci_high"]].to_numpy())
                told.append(f"{_rate(rate)} {_interval(low, high, '.2f')}")
            count = int(table["n"].loc[(AFTER, group)])
            parts.append(f"{word} goes from {told[0]} to {told[1]} (n = {count})")
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
    beside = f"; random sets {random.mean():.2g} on average" if len(random) else ""
    return (
        f"On harmless transcripts the edited model's next-token distribution diverges by {top['value']:.2g} "
        f"{_interval(top['ci_low'], top['ci_high'], '.2g')} nats a token (n = {top['n']}){beside}."
    )


def _arm_sentence(report: SafetyReport, group: str, word: str) -> str:
    frame = report.to_frame()
    rows = frame[frame["group"] == group].set_index("arm")
    if UNEDITED not in rows.index:
        return ""

    def told(arm: str) -> str:
        rate, low, high = (float(v) for v in rows.loc[arm, ["rate", "ci_low", "ci_high"]].to_numpy())
        return f"{_rate(rate)} {_interval(low, high, '.2f')}"

    n = int(rows["n"].loc[UNEDITED])
    if TOP not in rows.index:
        return f"{word} is {told(UNEDITED)} (n = {n})."
    count = len(next(arm.edit.heads for arm in report.arms if arm.name == TOP and arm.edit is not None))
    sets = int((frame["kind"] == "random").sum() // max(1, frame["group"].nunique()))
    edited = f"{word} is {told(UNEDITED)} unedited, {told(TOP)} with the first {count} heads zeroed"
    if not sets:
        return f"{edited} (n = {n}); no random set was run beside them."
    return f"{edited} and {_rate(report.random_rate(group))} on average over {sets} random sets (n = {n})."


def _degenerate_sentence(report: SafetyReport) -> str:
    """How many answers of each kind of arm are broken text; nothing where none is."""
    words = {"unedited": "unedited", "top": "with the first heads zeroed", "random": "over all random sets"}
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
    return f"AUROC {report.auroc:.3f} {_interval(report.interval.low, report.interval.high, '.3f')}"


def _mean(value: float, interval: Interval) -> str:
    return f"{value:.2f} {_interval(interval.low, interval.high, '.2f')}"


def _interval(low: float, high: float, digits: str) -> str:
    return f"[{low:{digits}}, {high:{digits}}]" if np.isfinite([low, high]).all() else "(too few for an interval)"


def _reasons(invalid: pd.DataFrame) -> str:
    """Each reason with its count, the most frequent first."""
    found = invalid["reason"].value_counts(sort=False).sort_values(ascending=False, kind="stable")
    told = "; ".join(f"{reason} ({n})" for reason, n in found.head(REASONS).items())
    return told + (f"; and {len(found) - REASONS} other reasons" if len(found) > REASONS else "")
