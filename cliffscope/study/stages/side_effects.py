"""Stage 10: how far the edited model departs from the unedited one on harmless transcripts."""

from cliffscope.evaluation.side_effects import measure_side_effects
from cliffscope.heads.controls import count_sets
from cliffscope.heads.edits import zero
from cliffscope.study import verdicts
from cliffscope.study.artefacts import SIDE_EFFECTS
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.study.stages.suppression import head_refs
from cliffscope.transcripts.records import Split, Transcripts

MOST_TRANSCRIPTS = 40
"""Harmless test transcripts on which side effects are measured."""
MOST_CONTROLS = 5
"""Random sets that side effects are measured under: their divergence is a yardstick, not a claim."""


class SideEffectStage(Stage):
    """Measures the divergence of next-token distributions on harmless test transcripts that have an answer."""

    name = "side effects"
    version = 2
    needs = ("transcripts", "suppression")
    makes = (SIDE_EFFECTS,)
    settings = ("controls", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Measures, or makes nothing where no head was selected or no harmless transcript has an answer."""
        selected = head_refs(work.selected_heads())
        answered = Transcripts(t for t in work.part(Split.TEST, harmful=False) if t.answer is not None)
        if not selected or not answered:
            return StageOutputs()
        transcripts = answered[:MOST_TRANSCRIPTS]
        effects = measure_side_effects(
            work.model,
            zero(selected, scope="closing"),
            transcripts=transcripts,
            controls=min(work.config.controls, MOST_CONTROLS, count_sets(work.model.shape, selected, same_layers=True)),
            seed=work.config.seed,
            progress=work.counter(self.name, len(transcripts)),
        )
        return StageOutputs(
            files={SIDE_EFFECTS: effects.to_frame()},
            findings=(Finding(topic="side effects", sentence=verdicts.of_side_effects(effects)),),
            omitted=effects.omitted,
        )
