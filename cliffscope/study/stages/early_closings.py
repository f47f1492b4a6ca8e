"""Stage 7: what the model would have answered, had it stopped thinking earlier, unedited and edited."""

import pandas as pd

from cliffscope.heads.early_closings import EarlyClosings, trace_early_closings
from cliffscope.heads.edits import zero
from cliffscope.readouts.trace import trace_refusal
from cliffscope.study.artefacts import EARLY_CURVES, SETTLED
from cliffscope.study.stages.base import Stage, StageOutputs, Workspace
from cliffscope.study.stages.suppression import head_refs
from cliffscope.transcripts.records import Outcome, Split, Transcripts

MOST_TRANSCRIPTS = 24
"""Transcripts of each outcome that are closed early."""
MOST_CLOSINGS = 64
"""Closings a transcript, about: more than a curve shows."""
TOKEN_LETTERS = 4
"""Letters of a token, about, by which the length of thinking is judged before it is tokenized."""


class EarlyClosingStage(Stage):
    """Closes harmful test transcripts early; complied ones with the selected heads zeroed too."""

    name = "early closings"
    version = 1
    needs = ("transcripts", "readouts", "suppression")
    makes = (EARLY_CURVES, SETTLED)
    settings = ("readout", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Traces, or makes nothing where no head was selected or the model does not think."""
        readout, selected = work.answer or work.readout, head_refs(work.selected_heads())
        if readout is None or not selected or not work.model.template.thinks:
            return StageOutputs()
        complied, refused = (_first(work, outcome) for outcome in (Outcome.COMPLIED, Outcome.REFUSED))
        if not len(complied):
            return StageOutputs()
        every = max(1, max(_length(t.thinking_ids, t.thinking) for t in complied + refused) // MOST_CLOSINGS)
        unedited = trace_early_closings(work.model, readout, complied, every=every)
        edited = trace_early_closings(work.model, readout, complied, edit=zero(selected, scope="closing"), every=every)
        curves = {
            "unedited": unedited.mean_curve(seed=work.config.seed),
            "edited": edited.mean_curve(seed=work.config.seed),
        }
        if work.probe is not None:
            curves["probe"] = unedited.probe_curve(trace_refusal(work.model, work.probe, complied))
        closings = [unedited]
        if len(refused):
            closings.append(trace_early_closings(work.model, readout, refused, every=every))
        return StageOutputs(
            files={
                EARLY_CURVES: pd.concat(
                    [curve.assign(curve=name) for name, curve in curves.items()], ignore_index=True
                ),
                SETTLED: pd.concat([one.settled() for one in closings], ignore_index=True),
            },
            notes=_notes(closings, every),
            omitted=tuple(o for one in closings for o in one.omitted),
        )


def _first(work: Workspace, outcome: Outcome) -> Transcripts:
    """Harmful test transcripts of an outcome that have thinking, as many as are closed early."""
    part = work.part(Split.TEST, harmful=True, outcome=outcome, forced=False)
    return Transcripts([t for t in part if t.thinking][:MOST_TRANSCRIPTS])


def _length(ids: tuple[int, ...] | None, text: str | None) -> int:
    return len(ids) if ids is not None else len(text or "") // TOKEN_LETTERS


def _notes(closings: list[EarlyClosings], every: int) -> tuple[str, ...]:
    notes = [f"Thinking was closed after every {every} tokens, not after each."] if every > 1 else []
    if not closings[0].path.startswith("packed"):
        notes.append(f"Early closings took plain passes: {closings[0].path}.")
    return tuple(notes)
