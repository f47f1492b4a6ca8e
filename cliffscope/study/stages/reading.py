"""Stage 8: the held-out transcripts once more with heads edited, and what the first heads read in them."""

from collections.abc import Mapping, Sequence

import pandas as pd

from cliffscope.errors import UnsupportedModelError
from cliffscope.evaluation.arms import plan_arms
from cliffscope.heads.controls import count_sets
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.sources import HeadSources, trace_all_sources
from cliffscope.readouts.trace import trace_refusal
from cliffscope.study.artefact_kinds import Artefact
from cliffscope.study.artefacts import ALIGNED, CLIFFS, EDITED_ALIGNED, EDITED_CLIFFS, HEAD_SOURCES
from cliffscope.study.stages.base import Stage, StageOutputs, Workspace
from cliffscope.study.stages.suppression import head_refs
from cliffscope.transcripts.records import Outcome, Split

SOURCE_HEADS = 3
"""Heads of which is traced what they read, in the held-out transcript of median cliff."""
SOURCE_TOKENS = 2048
"""A longer transcript is not taken for that: attention patterns of all layers grow with its square."""
EDITED = {"top": "harmful, complied; top heads zeroed", "random": "harmful, complied; random heads zeroed"}
"""Names of the edited arms' curves."""


class ReadingStage(Stage):
    """Traces complied harmful test transcripts under the edit and under one random set; traces what heads read."""

    name = "reading"
    version = 2
    needs = ("transcripts", "readouts", "traces", "suppression")
    makes = (EDITED_ALIGNED, EDITED_CLIFFS, HEAD_SOURCES)
    settings = ("plateau", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Traces, or makes nothing where no head was selected."""
        selected = head_refs(work.selected_heads())
        if work.probe is None or not selected:
            return StageOutputs()
        transcripts = work.part(Split.TEST, harmful=True, outcome=Outcome.COMPLIED, forced=False)
        bins = work.table(ALIGNED).drop_duplicates("bin")
        closing = int((bins["span"] == "closing").sum())
        controls = min(1, count_sets(work.model.shape, selected, same_layers=True))
        curves, cliffs, lengths = [], [], dict[str, int]()
        for arm in plan_arms(work.model, zero(selected), controls=controls, seed=work.config.seed)[1:]:
            traces = trace_refusal(work.model, work.probe, transcripts, edit=arm.edit)
            groups = {EDITED[arm.kind]: [t.id for t in transcripts]}
            curves.append(traces.aligned(groups, closing=closing, seed=work.config.seed))
            cliffs.append(traces.cliffs(plateau=work.config.plateau).to_frame().assign(group=EDITED[arm.kind]))
            lengths = {row.id: row.n_pos for row in traces.tokens}
        files: dict[Artefact, object] = {
            EDITED_ALIGNED: pd.concat(curves, ignore_index=True),
            EDITED_CLIFFS: pd.concat(cliffs, ignore_index=True),
        }
        sources, notes = _trace_sources(work, selected, lengths)
        if len(sources):
            files[HEAD_SOURCES] = sources
        return StageOutputs(files=files, notes=notes)


def source_table(sources: Sequence[HeadSources]) -> pd.DataFrame:
    """What heads read in one transcript, one row per head, closing token and source token."""
    parts = [s.to_frame().assign(id=s.tokens.id, head=str(s.head), kv_group=s.kv_group) for s in sources]
    return pd.concat(parts, ignore_index=True)[HEAD_SOURCES.column_names] if parts else pd.DataFrame()


def _trace_sources(
    work: Workspace, selected: Sequence[HeadRef], lengths: Mapping[str, int]
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The table of sources, and notes on what was left out of it."""
    short = [name for name, n_pos in lengths.items() if n_pos <= SOURCE_TOKENS]
    notes = (
        (f"What heads read: {len(short)} of {len(lengths)} transcripts have {SOURCE_TOKENS:,} tokens or fewer.",)
        if len(short) < len(lengths)
        else ()
    )
    cliffs = work.table(CLIFFS).set_index("id")["cliff"].reindex(short).dropna()
    if work.probe is None or cliffs.empty:
        return pd.DataFrame(), notes
    probe = work.probe
    median = work.transcripts.where(ids=[str((cliffs - cliffs.median()).abs().idxmin())])[0]
    heads = [head for head in selected if head.layer <= probe.layer][:SOURCE_HEADS]
    try:
        sources = trace_all_sources(work.model, probe, median, heads) if heads else []
    except UnsupportedModelError as error:
        return pd.DataFrame(), (*notes, f"What heads read was not traced: {error}")
    return source_table(sources), notes
