"""Stage 11: where two witnesses disagree, and what that means."""

from cliffscope.evaluation.arms import TOP
from cliffscope.study.artefacts import (
    CLIFFS,
    CONFIRMATION,
    HEADS,
    HEADS_FACTS,
    SAFETY,
    SAFETY_PAIRS,
    SUPPRESSION,
    WITNESSES,
)
from cliffscope.study.claims import AttackClaim, CliffClaim, HeadsClaim, SuppressionClaim, count
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.study.witnesses import Witness, disagreement, witnesses_of
from cliffscope.transcripts.records import Split


class WitnessStage(Stage):
    """Holds what was claimed side by side; it measures nothing."""

    name = "witnesses"
    version = 1
    needs = ("traces", "heads", "suppression", "safety")
    makes = (WITNESSES,)
    settings = ("plateau",)
    uses_model = False

    def run(self, work: Workspace) -> StageOutputs:
        """Compares what there is."""
        witnesses = read_witnesses(work)
        if not witnesses:
            return StageOutputs()
        sentence = disagreement(witnesses)
        rows = [{"name": w.name, "says": w.says, "saw": w.saw} for w in witnesses]
        return StageOutputs(
            files={WITNESSES: {"witnesses": rows, "sentence": sentence}},
            findings=(Finding(topic="witnesses", sentence=sentence),) if sentence else (),
        )


def read_witnesses(work: Workspace) -> list[Witness]:
    """The witnesses of a run, from what its stages stored."""
    folder = work.store.path
    suppression = SUPPRESSION.read(folder)
    pairs, safety, cliffs = (work.table(table) for table in (SAFETY_PAIRS, SAFETY, CLIFFS))
    test = cliffs[cliffs["split"] == Split.TEST]
    scopes = [str(scope) for scope in safety["scope"] if scope]
    heads = None
    if len(work.table(HEADS)):
        n_test = count(suppression.get("n"))
        heads = HeadsClaim.of(work.table(CONFIRMATION), HEADS_FACTS.read(folder), n_test=n_test)
    return witnesses_of(
        SuppressionClaim.of(suppression) if suppression else None,
        AttackClaim.of(pairs, arm=TOP, scope=scopes[0] if scopes else "") if len(pairs) else None,
        heads,
        CliffClaim.of(test, work.config.plateau) if len(test) else None,
    )
