"""Stage 6: the first heads on test transcripts: confirmed one by one, and together against random sets."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cliffscope.heads.confirmation import Confirmation, confirm_heads
from cliffscope.heads.controls import count_sets
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.ranking import top_count
from cliffscope.heads.statistics import ALPHA
from cliffscope.heads.suppression import Suppression, measure_suppression
from cliffscope.readouts.readout import Readout
from cliffscope.study import verdicts
from cliffscope.study.artefacts import (
    CONFIRMATION,
    HEADS,
    HEADS_FACTS,
    SELECTED_HEADS,
    SUPPRESSED,
    SUPPRESSION,
)
from cliffscope.study.claims import HeadsClaim, SuppressionClaim
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split, Transcripts

MOST_CANDIDATES = 16
"""Significant heads that are confirmed one by one, each in a sweep of its own."""


class SuppressionStage(Stage):
    """Confirms significant heads, selects the first ones, and measures their joint effect where none was chosen."""

    name = "suppression"
    version = 4
    needs = ("transcripts", "readouts", "heads")
    makes = (CONFIRMATION, SELECTED_HEADS, SUPPRESSION, SUPPRESSED)
    settings = ("readout", "method", "top_fraction", "controls", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Measures, or makes nothing where heads were not ranked."""
        ranking = work.table(HEADS)
        readout = work.readout
        if readout is None or ranking.empty:
            return StageOutputs()
        candidates = head_refs(ranking[ranking["q"] <= ALPHA].sort_values("rank"))
        confirmation = _confirm(work, readout, candidates[:MOST_CANDIDATES])
        selected = select_heads(ranking, confirmation, work.config.top_fraction)
        measured, others = _measure(work, readout, head_refs(selected))
        facts = suppression_facts(measured, fraction=work.config.top_fraction)
        table = confirmation.to_frame()
        claim = HeadsClaim.of(table, HEADS_FACTS.read(work.store.path), n_test=len(confirmation.effects))
        return StageOutputs(
            files={
                CONFIRMATION: table,
                SELECTED_HEADS: selected[["layer", "head", "rank"]],
                SUPPRESSION: facts,
                SUPPRESSED: pd.concat([part.to_frame() for part in (measured, *others)], ignore_index=True),
            },
            findings=(
                Finding(topic="suppression", sentence=verdicts.of_suppression(SuppressionClaim.of(facts))),
                Finding(topic="heads", sentence=verdicts.of_heads(claim)),
            ),
            notes=_note_candidates(len(candidates)),
            omitted=measured.omitted,
        )


def _note_candidates(n_significant: int) -> tuple[str, ...]:
    """Says so where not all significant heads were confirmed."""
    if n_significant <= MOST_CANDIDATES:
        return ()
    return (f"{n_significant} heads were significant; the first {MOST_CANDIDATES} were confirmed one by one.",)


def select_heads(ranking: pd.DataFrame, confirmation: Confirmation, fraction: float) -> pd.DataFrame:
    """The first heads by rank, and every confirmed one behind them, best first."""
    confirmed = {(head.layer, head.head) for head in confirmation.confirmed}
    places = list(zip(ranking["layer"], ranking["head"], strict=True))
    first = ranking["rank"] <= top_count(fraction, len(ranking))
    return ranking[first | pd.Series([place in confirmed for place in places], index=ranking.index)].sort_values("rank")


def suppression_facts(measured: Suppression, *, fraction: float) -> dict[str, object]:
    """The selected set against its random sets, as `suppression.json` holds it."""
    low, high = measured.interval
    sets = {kind: effects for kind, effects in measured.random_effects.items() if len(effects)}
    p = {kind: measured.p[kind] for kind in sets}
    facts: Mapping[str, object] = {
        "readout": measured.readout,
        "can_tell": measured.can_tell,
        "top_fraction": fraction,
        "selected": [str(head) for head in measured.edit.heads],
        "n": measured.n,
        "unedited": float(measured.unedited.mean()),
        "refused": measured.refused_logit,
        "restored": measured.restored,
        "effect": measured.effect,
        "effect_low": low,
        "effect_high": high,
        "random_sets": [float(effect) for effects in sets.values() for effect in effects],
        "p": max(p.values(), default=float("nan")),
        "p_by_kind": p,
        "sets_by_kind": {kind: len(effects) for kind, effects in sets.items()},
    }
    return {**facts, "why": str(SuppressionClaim.of(facts).why)}


def head_refs(frame: pd.DataFrame) -> Sequence[HeadRef]:
    """Heads named by the columns layer and head."""
    return tuple(HeadRef(layer=int(a), head=int(b)) for a, b in zip(frame["layer"], frame["head"], strict=True))


def _confirm(work: Workspace, readout: Readout, candidates: Sequence[HeadRef]) -> Confirmation:
    return confirm_heads(
        work.model,
        readout,
        _complied(work),
        candidates,
        refused=work.part(Split.TEST, harmful=True, outcome=Outcome.REFUSED, forced=False),
        harmless=work.part(Split.TEST, harmful=False, forced=False),
        method=work.config.method,
        seed=work.config.seed,
    )


def _measure(work: Workspace, readout: Readout, heads: Sequence[HeadRef]) -> tuple[Suppression, list[Suppression]]:
    """The selected heads zeroed, as the arms zero them: on complied transcripts with random sets, and on the others."""
    edit = zero(heads, scope="closing")
    differ = count_sets(work.model.shape, heads, same_layers=False, last=readout.layer)
    measured = measure_suppression(
        work.model,
        readout,
        _complied(work),
        edit,
        controls=work.config.controls if differ else 0,
        seed=work.config.seed,
    )
    rest = (
        work.part(Split.TEST, harmful=True, outcome=Outcome.REFUSED, forced=False),
        work.part(Split.TEST, harmful=False, forced=False),
    )
    others = [measure_suppression(work.model, readout, group, edit, controls=0) for group in rest if len(group)]
    return measured, others


def _complied(work: Workspace) -> Transcripts:
    return work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED, forced=False)
