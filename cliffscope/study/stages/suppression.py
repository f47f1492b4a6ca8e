"""Stage 5: the first heads on test transcripts: confirmed one by one, and together against random sets."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float32

from cliffscope.errors import EditError
from cliffscope.heads.confirmation import Confirmation, confirm_heads
from cliffscope.heads.controls import SetControl, control_sets
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.methods import DonorNeed
from cliffscope.heads.ranking import top_count
from cliffscope.heads.statistics import ALPHA
from cliffscope.heads.usable import choose_method
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.study import verdicts
from cliffscope.study.artefacts import CONFIRMATION, HEADS, HEADS_FACTS, SELECTED_HEADS, SUPPRESSION
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split, Transcripts
from cliffscope.transcripts.transcript import tokenize_all

MOST_CANDIDATES = 16
"""Significant heads that are confirmed one by one, each in a sweep of its own."""


class SuppressionStage(Stage):
    """Confirms significant heads, selects the first ones, and measures their joint effect where none was chosen."""

    name = "suppression"
    version = 3
    needs = ("transcripts", "readouts", "heads")
    makes = (CONFIRMATION, SELECTED_HEADS, SUPPRESSION)
    settings = ("readout", "method", "top_fraction", "controls", "seed")

    def check(self, work: Workspace) -> None:
        """Raises EditError where the first heads are all there are: no other set could be compared with them."""
        fraction, n_heads = work.config.top_fraction, len(work.model.shape.places)
        if top_count(fraction, n_heads) == n_heads:
            raise EditError(
                f"top_fraction={fraction} edits {n_heads} of {n_heads} heads of {work.config.model!r}: no other set is "
                "left to compare them with. Give a smaller share, or until='traces' where there is no smaller one."
            )

    def run(self, work: Workspace, key: str) -> StageOutputs:  # noqa: ARG002
        """Measures, or makes nothing where heads were not ranked."""
        ranking = work.table(HEADS)
        readout = work.readout
        if readout is None or ranking.empty:
            return StageOutputs()
        complied = work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED)
        candidates = head_refs(ranking[ranking["q"] <= ALPHA].sort_values("rank"))
        donors = _donors(work)
        confirmation = confirm_heads(
            work.model,
            readout,
            complied,
            candidates[:MOST_CANDIDATES],
            refused=work.part(Split.TEST, harmful=True, outcome=Outcome.REFUSED),
            harmless=work.part(Split.TEST, harmful=False),
            method=work.config.method,
            donors=donors,
            seed=work.config.seed,
        )
        selected = select_heads(ranking, confirmation, work.config.top_fraction)
        control = control_sets(
            work.model,
            readout,
            complied,
            head_refs(selected),
            method=work.config.method,
            donors=donors,
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
        notes = (
            (f"{len(candidates)} heads were significant; the first {MOST_CANDIDATES} were confirmed one by one.",)
            if len(candidates) > MOST_CANDIDATES
            else ()
        )
        return StageOutputs(
            files={
                CONFIRMATION: confirmation.to_frame(),
                SELECTED_HEADS: selected[["layer", "head", "rank"]],
                SUPPRESSION: facts,
            },
            findings=(
                Finding(
                    topic="suppression",
                    sentence=verdicts.of_suppression(control, facts, can_tell=readout.report.can_tell),
                ),
                Finding(
                    topic="heads",
                    sentence=verdicts.of_heads(
                        confirmation,
                        n_ranked=int(ranking["n"].max()),
                        n_significant=len(candidates),
                        least_q=float(least) if isinstance(least, float | int) else 0.0,
                        can_tell=readout.report.can_tell,
                    ),
                ),
            ),
            notes=notes,
        )


def select_heads(ranking: pd.DataFrame, confirmation: Confirmation, fraction: float) -> pd.DataFrame:
    """The first heads by rank, best first, and every confirmed one behind them unless nothing were left beside them."""
    confirmed = {(head.layer, head.head) for head in confirmation.confirmed}
    places = list(zip(ranking["layer"], ranking["head"], strict=True))
    first = ranking["rank"] <= top_count(fraction, len(ranking))
    both = first | pd.Series([place in confirmed for place in places], index=ranking.index)
    return ranking[first if both.all() else both].sort_values("rank")


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


def _donors(work: Workspace) -> Transcripts | None:
    """Transcripts that the method takes values from, those that heads were ranked with; None where it takes none."""
    need = choose_method(work.config.method).needs
    if need is DonorNeed.HARMLESS:
        return work.part(Split.FIT, Split.VALIDATE, harmful=False)
    if need is DonorNeed.REFUSED:
        return work.part(Split.FIT, Split.VALIDATE, harmful=True, outcome=Outcome.REFUSED)
    return None


def _unedited(work: Workspace, readout: Readout, transcripts: Transcripts) -> Float32[np.ndarray, " n"]:
    model = work.model
    tokens, _ = tokenize_all(transcripts, model.tokenizer, model.template, max_length=model.shape.context)
    return read_final(model, readout, tokens)
