"""Stage 4: the refusal score of every token, and the cliff of every transcript."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit

from cliffscope.readouts.trace import RefusalTraces, trace_refusal
from cliffscope.study import verdicts
from cliffscope.study.artefacts import ALIGNED, CLIFFS, LAYER_TRACES, TRACES
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split

EXAMPLES = 4
"""Transcripts of which every layer is traced for the report."""
TOKEN_TRACES = 200
"""Transcripts of which every token is stored."""


class TraceStage(Stage):
    """Traces every transcript and measures the cliffs."""

    name = "traces"
    version = 3
    needs = ("transcripts", "readouts")
    makes = (CLIFFS, TRACES, LAYER_TRACES, ALIGNED)
    settings = ("plateau", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Traces, or makes nothing where there is no probe."""
        if work.probe is None:
            return StageOutputs()
        examples = choose_examples(work)
        traces = trace_refusal(
            work.model,
            work.probe,
            work.transcripts,
            layers_of=examples,
            progress=work.counter(self.name, len(work.transcripts)),
        )
        cliffs = traces.cliffs(plateau=work.config.plateau).to_frame()
        cliffs["split"] = [work.splits[name] for name in cliffs["id"]]
        tokens = traces.to_frame()
        stored = held_out_first(cliffs, examples)[:TOKEN_TRACES]
        test = cliffs[cliffs["split"] == Split.TEST]
        groups = {str(name): part["id"].tolist() for name, part in test.groupby("group")}
        return StageOutputs(
            files={
                CLIFFS: cliffs,
                TRACES: tokens[tokens["id"].isin(stored)],
                LAYER_TRACES: layer_table(traces),
                ALIGNED: traces.aligned(groups, seed=work.config.seed),
            },
            findings=(Finding(topic="cliff", sentence=verdicts.of_cliff(test, work.config.plateau)),),
            omitted=traces.omitted,
        )


def choose_examples(work: Workspace) -> list[str]:
    """Ids of test transcripts that the report shows token by token: complied, refused, harmless."""
    kinds = ((True, Outcome.COMPLIED, EXAMPLES - 2), (True, Outcome.REFUSED, 1), (False, Outcome.COMPLIED, 1))
    return [t.id for harmful, outcome, n in kinds for t in work.part(Split.TEST, harmful=harmful, outcome=outcome)[:n]]


def held_out_first(cliffs: pd.DataFrame, first: Sequence[str]) -> list[str]:
    """Ids in the order in which they are worth showing: `first`, then held-out ones, then those fitted on."""
    order = cliffs["id"][(cliffs["split"] != Split.TEST).argsort(kind="stable")].tolist()
    return [*first, *(name for name in order if name not in first)]


def layer_table(traces: RefusalTraces) -> pd.DataFrame:
    """id, position, layer and score of the transcripts whose layers were traced."""
    parts = [
        pd.DataFrame(
            {
                "id": name,
                "position": np.tile(np.arange(logits.shape[1]), logits.shape[0]),
                "layer": np.repeat(np.arange(logits.shape[0]), logits.shape[1]),
                "score": expit(logits).ravel(),
            }
        )
        for name, logits in traces.layer_logits.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=LAYER_TRACES.column_names)
