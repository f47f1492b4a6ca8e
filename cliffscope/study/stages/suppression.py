"""Stage 5: the first heads on test transcripts: confirmed one by one, and together against random sets."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float32

from cliffscope.heads.confirmation import Confirmation, confirm_heads
from cliffscope.heads.controls import SetControl, control_sets
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.ranking import top_count
from cliffscope.heads.statistics import ALPHA
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.study import verdicts
from cliffscope.study.artefacts import CONFIRMATION, HEADS, HEADS_FACTS, SELECTED_HEADS, SUPPRESSION
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split, Transcripts

MOST_CANDIDATES = 16
"""Significant heads that are confirmed one by one, each in a sweep of its own."""


class SuppressionStage(Stage):
    """Confirms significant heads, selects the first ones, and measures their joint effect where none was chosen."""

    name = "suppression"
    version = 3
    needs = ("transcripts", "readouts", "heads")
    makes = (CONFIRMATION, SELECTED_HEADS, SUPPRESSION)
    settings = ("readout", "method", "top_fraction", "controls", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Measures, or makes nothing where heads were not ranked."""
        ranking = work.table(HEADS)
        readout = work.readout
        if readout is None or ranking.empty:
            return StageOutputs()
        complied = work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED)
        candidates = head_refs(ranking[ranking["q"] <= ALPHA].sort_values("rank"))
        confirmation = confirm_heads(
            work.model,
            readout,
            complied,
            candidates[:MOST_CANDIDATES],
            refused=work.part(Split.TEST, harmful=True, outcome=Outcome.REFUSED),
            harmless=work.part(Split.TEST, harmful=False),
            method=work.config.method,
            seed=work.config.seed,
        )
        selected = select_heads(ranking, confirmation, work.config.top_fraction)
        control = control_sets(
            work.model,
            readout,
            complied,
            head_refs(selected),
            method=work.config.method,
            draws=work.config.controls,
            seed=work.config.seed,
        )
        facts = suppression_facts(
            control,
            fraction=work.config.top_fraction,
            confirmed=len(confirmation.confirmed),
            unedited=_unedited(work, readout, complied),
            refused=readout.refused_logit,
        )
        least = HEADS_FACTS.read(work.store.path).get("least_q")
        about_set = verdicts.of_suppression(control, facts, can_tell=readout.report.can_tell)
        about_heads = verdicts.of_heads(
            confirmation,
            n_ranked=int(ranking["n"].max()),
            n_significant=len(candidates),
            least_q=float(least) if isinstance(least, float | int) else 0.0,
            can_tell=readout.report.can_tell,
        )
        return StageOutputs(
            files={
                CONFIRMATION: confirmation.to_frame(),
                SELECTED_HEADS: selected[["layer", "head", "rank"]],
                SUPPRESSION: facts,
            },
            findings=(
                Finding(topic="suppression", sentence=about_set),
                Finding(topic="heads", sentence=about_heads),
            ),
            notes=_note_candidates(len(candidates)),
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


def suppression_facts(
    control: SetControl,
    *,
    fraction: float,
    confirmed: int,
    unedited: Float32[np.ndarray, " n"],
    refused: float,
) -> dict[str, object]:
    """The selected set against its random sets, as `suppression.json` holds it."""
    low, high = control.interval
    gap = refused - float(unedited.mean())
    return {
        "top_fraction": fraction,
        "selected": [str(head) for head in control.heads],
        "n": len(control.effects),
        "unedited": float(unedited.mean()),
        "refused": refused,
        "restored": control.effect / gap if gap > 0 else float("nan"),
        "effect": control.effect,
        "effect_low": low,
        "effect_high": high,
        "random_sets": control.random_effects.tolist(),
        "p": control.p,
        "p_by_kind": control.p_by_kind,
        "beats_random": bool(control.effect > control.random_effects.max() and confirmed),
    }


def head_refs(frame: pd.DataFrame) -> Sequence[HeadRef]:
    """Heads named by the columns layer and head."""
    return tuple(HeadRef(layer=int(a), head=int(b)) for a, b in zip(frame["layer"], frame["head"], strict=True))


def _unedited(work: Workspace, readout: Readout, transcripts: Transcripts) -> Float32[np.ndarray, " n"]:
    model = work.model
    tokens, _ = model.tokenize_all(transcripts)
    return read_final(model, readout, tokens)
