"""Stage 5: every head's effect on refusal, on the fit and validate splits."""

from cliffscope.heads.ranking import rank_heads
from cliffscope.readouts.probe import FEWEST
from cliffscope.study import verdicts
from cliffscope.study.artefacts import HEADS, HEADS_FACTS
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split


class HeadStage(Stage):
    """Ranks all heads on harmful transcripts that were complied with."""

    name = "heads"
    version = 4
    needs = ("transcripts", "readouts")
    makes = (HEADS, HEADS_FACTS)
    settings = ("readout", "method", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Ranks, or says that too few transcripts were complied with."""
        if work.readout is None:
            return StageOutputs()
        seen = (Split.FIT, Split.VALIDATE)
        suppressed = work.part(*seen, harmful=True, outcome=Outcome.COMPLIED, forced=False)
        held_out = work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED, forced=False)
        if len(suppressed) < FEWEST or len(held_out) < FEWEST:
            sentence = verdicts.no_heads(len(suppressed), len(held_out), FEWEST)
            return StageOutputs(findings=(Finding(topic="heads", sentence=sentence),), notes=(sentence,))
        ranking = rank_heads(
            work.model,
            work.readout,
            suppressed,
            method=work.config.method,
            harmless=work.part(*seen, harmful=False, forced=False),
            refused=work.part(*seen, harmful=True, outcome=Outcome.REFUSED, forced=False),
            seed=work.config.seed,
            progress=work.counter(self.name, len(suppressed)),
        )
        return StageOutputs(
            files={
                HEADS: ranking.to_frame(),
                HEADS_FACTS: {
                    "method": ranking.method,
                    "scope": str(ranking.scope),
                    "path": ranking.path,
                    "n": len(ranking.clean),
                    "readout": ranking.readout,
                    "can_tell": ranking.can_tell,
                    "gap": ranking.gap,
                    "measured": ranking.measured,
                    "least_q": ranking.least_q,
                    "significant": [str(head) for head in ranking.significant()],
                },
            },
            omitted=ranking.omitted,
        )
