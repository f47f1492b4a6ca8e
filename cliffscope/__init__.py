"""CliffScope: where, and by which attention heads, a reasoning model loses its intention to refuse; how to restore it.

The public names are loaded when they are first used, so that the import is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cliffscope import organisms
    from cliffscope.alignment.export import export_edited
    from cliffscope.alignment.repair import Repaired, repair
    from cliffscope.alignment.scoring import PoolScores, score_pool
    from cliffscope.alignment.selection import Selection, select_by_cliff
    from cliffscope.config import StudyConfig
    from cliffscope.errors import CliffScopeError
    from cliffscope.figures.images import save_figure
    from cliffscope.heads.agreement import compare_rankings, split_half
    from cliffscope.heads.controls import control_sets
    from cliffscope.heads.donors import mean
    from cliffscope.heads.edits import HeadEdit, HeadRef, compose, edited_weights, scale, zero
    from cliffscope.heads.ranking import HeadRanking, rank_heads
    from cliffscope.heads.sources import trace_sources
    from cliffscope.models import LensModel, load_model
    from cliffscope.probing.probe import RefusalProbe, fit_probe
    from cliffscope.probing.trace import Cliffs, RefusalTraces, trace_refusal
    from cliffscope.report.page import write_comparison, write_report
    from cliffscope.safety.classifiers import ClassifierJudge
    from cliffscope.safety.dose import dose_response
    from cliffscope.safety.endpoints import Endpoint
    from cliffscope.safety.engines import ServerEngine
    from cliffscope.safety.evaluation import SafetyReport, compare_answers, evaluate_safety
    from cliffscope.safety.generation import roll_out
    from cliffscope.safety.judges import PhraseJudge, judge, judge_agreement
    from cliffscope.safety.rubric import ModelJudge
    from cliffscope.safety.side_effects import SideEffects, measure_side_effects
    from cliffscope.study import Study, open_study, run_study
    from cliffscope.transcripts.datasets import read_prompts, read_transcripts, write_transcripts
    from cliffscope.transcripts.records import Transcript, Transcripts

_HOMES = {
    "ClassifierJudge": "safety.classifiers",
    "CliffScopeError": "errors",
    "Cliffs": "probing.trace",
    "Endpoint": "safety.endpoints",
    "HeadEdit": "heads.edits",
    "HeadRanking": "heads.ranking",
    "HeadRef": "heads.edits",
    "LensModel": "models",
    "ModelJudge": "safety.rubric",
    "PhraseJudge": "safety.judges",
    "PoolScores": "alignment.scoring",
    "RefusalProbe": "probing.probe",
    "RefusalTraces": "probing.trace",
    "Repaired": "alignment.repair",
    "SafetyReport": "safety.evaluation",
    "Selection": "alignment.selection",
    "ServerEngine": "safety.engines",
    "SideEffects": "safety.side_effects",
    "Study": "study",
    "StudyConfig": "config",
    "Transcript": "transcripts.records",
    "Transcripts": "transcripts.records",
    "compare_answers": "safety.evaluation",
    "compare_rankings": "heads.agreement",
    "compose": "heads.edits",
    "control_sets": "heads.controls",
    "dose_response": "safety.dose",
    "edited_weights": "heads.edits",
    "evaluate_safety": "safety.evaluation",
    "export_edited": "alignment.export",
    "fit_probe": "probing.probe",
    "judge": "safety.judges",
    "judge_agreement": "safety.judges",
    "load_model": "models",
    "mean": "heads.donors",
    "measure_side_effects": "safety.side_effects",
    "open_study": "study",
    "organisms": "",
    "rank_heads": "heads.ranking",
    "read_prompts": "transcripts.datasets",
    "read_transcripts": "transcripts.datasets",
    "repair": "alignment.repair",
    "roll_out": "safety.generation",
    "run_study": "study",
    "save_figure": "figures.images",
    "scale": "heads.edits",
    "score_pool": "alignment.scoring",
    "select_by_cliff": "alignment.selection",
    "split_half": "heads.agreement",
    "trace_refusal": "probing.trace",
    "trace_sources": "heads.sources",
    "write_comparison": "report.page",
    "write_report": "report.page",
    "write_transcripts": "transcripts.datasets",
    "zero": "heads.edits",
}

__version__ = "0.1.0"
__all__ = [
    "ClassifierJudge",
    "CliffScopeError",
    "Cliffs",
    "Endpoint",
    "HeadEdit",
    "HeadRanking",
    "HeadRef",
    "LensModel",
    "ModelJudge",
    "PhraseJudge",
    "PoolScores",
    "RefusalProbe",
    "RefusalTraces",
    "Repaired",
    "SafetyReport",
    "Selection",
    "ServerEngine",
    "SideEffects",
    "Study",
    "StudyConfig",
    "Transcript",
    "Transcripts",
    "compare_answers",
    "compare_rankings",
    "compose",
    "control_sets",
    "dose_response",
    "edited_weights",
    "evaluate_safety",
    "export_edited",
    "fit_probe",
    "judge",
    "judge_agreement",
    "load_model",
    "mean",
    "measure_side_effects",
    "open_study",
    "organisms",
    "rank_heads",
    "read_prompts",
    "read_transcripts",
    "repair",
    "roll_out",
    "run_study",
    "save_figure",
    "scale",
    "score_pool",
    "select_by_cliff",
    "split_half",
    "trace_refusal",
    "trace_sources",
    "write_comparison",
    "write_report",
    "write_transcripts",
    "zero",
]


def __getattr__(name: str) -> object:
    """Imports a public name's module when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cliffscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    if not _HOMES[name]:
        return import_module(f"cliffscope.{name}")
    return getattr(import_module(f"cliffscope.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
