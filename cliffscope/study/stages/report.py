"""Last stage: everything as one HTML page."""

from cliffscope.report.page import render
from cliffscope.report.stored import read_run
from cliffscope.study.artefacts import REPORT
from cliffscope.study.stages.base import Stage, StageOutputs, Workspace


class ReportStage(Stage):
    """Renders the report from the run directory alone."""

    name = "report"
    version = 2
    needs = (
        *("transcripts", "readouts", "transfer", "traces", "heads", "suppression", "early closings", "reading"),
        *("safety", "side effects", "witnesses", "selection", "repair"),
    )
    makes = (REPORT,)
    settings = ("repair",)
    uses_model = False

    def run(self, work: Workspace) -> StageOutputs:
        """Renders the page."""
        return StageOutputs(files={REPORT: render(read_run(work.store.path))})
