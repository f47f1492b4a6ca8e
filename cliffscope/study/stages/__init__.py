"""Stages of a study, one file each, in the order in which they run."""

from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.study.stages.early_closings import EarlyClosingStage
from cliffscope.study.stages.heads import HeadStage
from cliffscope.study.stages.reading import ReadingStage
from cliffscope.study.stages.readouts import ReadoutStage
from cliffscope.study.stages.repair import RepairStage
from cliffscope.study.stages.report import ReportStage
from cliffscope.study.stages.safety import SafetyStage
from cliffscope.study.stages.selection import SelectionStage
from cliffscope.study.stages.side_effects import SideEffectStage
from cliffscope.study.stages.suppression import SuppressionStage
from cliffscope.study.stages.traces import TraceStage
from cliffscope.study.stages.transcripts import TranscriptStage
from cliffscope.study.stages.transfer import TransferStage
from cliffscope.study.stages.witnesses import WitnessStage

__all__ = ["STAGES", "Finding", "Stage", "StageOutputs", "Workspace"]

STAGES: tuple[Stage, ...] = (
    TranscriptStage(),
    ReadoutStage(),
    TransferStage(),
    TraceStage(),
    HeadStage(),
    SuppressionStage(),
    EarlyClosingStage(),
    ReadingStage(),
    SafetyStage(),
    SideEffectStage(),
    WitnessStage(),
    SelectionStage(),
    RepairStage(),
    ReportStage(),
)
"""Every stage, in order; what a stage needs comes before it."""
