"""Imports go down the list only, and the public names are the documented ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cliffscope

PACKAGE = Path(cliffscope.__file__).parent
LAYERS = [
    "cli",
    "study.doctor",
    "study.preflight",
    "study",
    "report",
    "study.answers",
    "study.saved_readouts",
    "study.artefacts",
    "study.artefact_kinds",
    "organisms",
    "repairing",
    "selection",
    "evaluation",
    "judging",
    "heads",
    "readouts",
    "generation",
    "model",
    "transcripts",
    "store",
    "registry",
    "progress",
    "memory",
    "power",
    "resampling",
    "stats",
    "notebook",
    "figures",
    "writing",
    "text",
    "errors",
]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or not p.name.startswith("__"))
PUBLIC = [
    "AnswerReadout",
    "ClassifierJudge",
    "CliffScopeError",
    "Cliffs",
    "Criterion",
    "DirectionCheck",
    "EarlyClosings",
    "Endpoint",
    "HeadEdit",
    "HeadRanking",
    "HeadRef",
    "LayerMeans",
    "LensModel",
    "Mediation",
    "ModelJudge",
    "Outcome",
    "PaperProbe",
    "PhraseJudge",
    "PoolScores",
    "ProbeTransfer",
    "RefusalProbe",
    "RefusalTraces",
    "Repaired",
    "SafetyReport",
    "Selection",
    "ServerEngine",
    "SideEffects",
    "Study",
    "StudyConfig",
    "Suppression",
    "Template",
    "TextBaseline",
    "Transcript",
    "Transcripts",
    "Verdict",
    "answer_transcripts",
    "check_direction",
    "compare_answers",
    "compare_rankings",
    "compose",
    "confirm_heads",
    "control_sets",
    "dose_response",
    "edited_weights",
    "evaluate_safety",
    "export_edited",
    "fit_answer_readout",
    "fit_paper_probe",
    "fit_probe",
    "judge",
    "judge_agreement",
    "layer_means",
    "load_model",
    "mean",
    "measure_mediation",
    "measure_side_effects",
    "measure_suppression",
    "needed_n",
    "open_study",
    "organisms",
    "probe_convention",
    "probe_transfer",
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
    "select_from_suppression",
    "split_half",
    "text_baseline",
    "trace_early_closings",
    "trace_refusal",
    "trace_sources",
    "write_comparison",
    "write_report",
    "write_transcripts",
    "zero",
]


def layer_of(module: str) -> str:
    """The layer of a module: its room, or itself where files of a room lie on layers of their own."""
    _, *parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LAYERS else parts[0]


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cliffscope."):
            modules |= {layer_of(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "cliffscope":
            # The version stands in the package itself, below every layer.
            modules |= {alias.name for alias in node.names} - {"__version__"}
    return modules


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_list_only(path):
    home = layer_of(".".join(("cliffscope", *path.relative_to(PACKAGE).with_suffix("").parts)))
    if home == "cli":
        return
    upward = {name for name in imported(path) if name != home and LAYERS.index(name) <= LAYERS.index(home)}
    assert not upward


def test_every_module_has_a_layer():
    homes = {layer_of(".".join(("cliffscope", *p.relative_to(PACKAGE).with_suffix("").parts))) for p in MODULES}
    assert homes == set(LAYERS)


def test_the_public_names_are_pinned_and_all_resolve():
    assert sorted(cliffscope.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(cliffscope, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="load_modle"):
        _ = cliffscope.load_modle


def test_only_the_families_spell_the_tags():
    spelling = {p.name for p in MODULES if "</think>" in re.sub(r"(?m)^ *>>>.*", "", p.read_text(encoding="utf-8"))}
    assert spelling <= {"families.py"}


SLOW = (
    "torch",
    "transformers",
    "transformer_lens",
    "pandas",
    "numpy",
    "scipy",
    "sklearn",
    "pyarrow",
    "plotly",
    "psutil",
)
"""Libraries whose import takes a tenth of a second or more, or that bring one of these."""


@pytest.mark.parametrize(
    "code",
    [
        "import cliffscope",
        "import cliffscope\nfrom cliffscope import cli",
        "import sys\nfrom cliffscope import cli\nsys.argv = ['cliffscope', '--help']\ntry:\n    cli.main()\n"
        "except SystemExit:\n    pass",
    ],
    ids=["package", "command line", "help"],
)
def test_the_import_and_the_help_load_no_library_that_takes_long(code: str):
    tell = f"\nimport sys\nprint('loaded', *sorted(set({SLOW!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + tell], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded"]


def test_a_library_that_takes_long_would_be_noticed():
    tell = f"import cliffscope.stats, sys\nprint('loaded', *sorted(set({SLOW!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", tell], check=True, capture_output=True, text=True)
    assert {"numpy", "scipy"} <= set(done.stdout.splitlines()[-1].split())
