"""Stage 5: the first heads together, against random sets of the same size, on test transcripts."""

from collections.abc import Sequence

import pandas as pd

from cliffscope.heads.controls import SetControl, control_sets
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.ranking import top_count
from cliffscope.study import verdicts
from cliffscope.study.artefacts import HEADS, HEADS_FACTS, SELECTED_HEADS, SUPPRESSION
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split


class SuppressionStage(Stage):
    """Selects the first heads and measures their joint effect where they were not chosen."""

    name = "suppression"
    version = 2
    needs = ("transcripts", "readouts", "heads")
    makes = (SELECTED_HEADS, SUPPRESSION)
    settings = ("readout", "method", "top_fraction", "controls", "seed")

    def run(self, work: Workspace, key: str) -> StageOutputs:  # noqa: ARG002
        """Measures, or makes nothing where heads were not ranked."""
        ranking = work.table(HEADS)
        if work.readout is None or ranking.empty:
            return StageOutputs()
        config = work.config
        count = top_count(config.top_fraction, len(ranking))
        selected = ranking.nsmallest(count, "rank")
        control = control_sets(
            work.model,
            work.readout,
            work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED),
            head_refs(selected),
            method=config.method,
            draws=config.controls,
            seed=config.seed,
        )
        significant = HEADS_FACTS.read(work.store.path).get("significant")
        facts = suppression_facts(
            control, fraction=config.top_fraction, significant=isinstance(significant, list) and bool(significant)
        )
        return StageOutputs(
            files={SELECTED_HEADS: selected[["layer", "head", "rank"]], SUPPRESSION: facts},
            findings=(Finding(topic="suppression", sentence=verdicts.of_suppression(control, len(ranking))),),
        )


def suppression_facts(control: SetControl, *, fraction: float, significant: bool) -> dict[str, object]:
    """The selected set against its random sets, as `suppression.json` holds it."""
    low, high = control.interval
    return {
        "top_fraction": fraction,
        "selected": [str(head) for head in control.heads],
        "n": len(control.effects),
        "effect": control.effect,
        "effect_low": low,
        "effect_high": high,
        "random_sets": control.random_effects.tolist(),
        "p": control.p,
        "beats_random": bool(control.effect > control.random_effects.max() and significant),
    }


def head_refs(frame: pd.DataFrame) -> Sequence[HeadRef]:
    """Heads named by the columns layer and head."""
    return tuple(HeadRef(layer=int(a), head=int(b)) for a, b in zip(frame["layer"], frame["head"], strict=True))
