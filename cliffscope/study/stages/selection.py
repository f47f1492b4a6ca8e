"""Stage 12: the training examples with the largest cliff."""

from cliffscope.readouts.trace import Cliffs
from cliffscope.selection.choice import select_from_cliffs
from cliffscope.study import verdicts
from cliffscope.study.artefacts import CLIFFS, SELECTED, SELECTION
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split


class SelectionStage(Stage):
    """Ranks complied harmful transcripts of the fit and validate splits and selects the first ones."""

    name = "selection"
    version = 1
    needs = ("transcripts", "readouts", "traces")
    makes = (SELECTION, SELECTED)
    settings = ("criterion", "plateau", "select_fraction", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Selects; the test split is never part of the pool, since what is repaired is measured on it."""
        if work.probe is None:
            return StageOutputs()
        config = work.config
        selection = select_from_cliffs(
            Cliffs(frame=work.table(CLIFFS), plateau=config.plateau),
            work.part(Split.FIT, Split.VALIDATE, harmful=True, outcome=Outcome.COMPLIED),
            criterion=config.criterion,
            fraction=config.select_fraction,
            seed=config.seed,
        )
        return StageOutputs(
            files={SELECTION: selection.to_frame(), SELECTED: selection.selected},
            findings=(Finding(topic="selection", sentence=verdicts.of_selection(selection)),),
            omitted=selection.omitted,
        )
