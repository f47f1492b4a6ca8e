"""Stage 2: what says whether an answer will refuse: the model's own answer distribution, and a probe."""

from cliffscope.errors import ProbeError, UnsupportedModelError
from cliffscope.readouts.answer import fit_answer_readout
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.readouts.files import saved_answer_readout
from cliffscope.readouts.probe import fit_probe
from cliffscope.study import verdicts
from cliffscope.study.artefacts import ANSWER, PROBE, PROBE_ARRAYS, PROBE_LAYERS
from cliffscope.study.saved_readouts import probe_files
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome


class ReadoutStage(Stage):
    """Fits both readouts on the fit split, chooses them on validate, reports them on test."""

    name = "readouts"
    version = 2
    needs = ("transcripts",)
    makes = (ANSWER, PROBE, PROBE_ARRAYS, PROBE_LAYERS)
    settings = ("positions", "contrast", "seed")

    def run(self, work: Workspace, key: str) -> StageOutputs:  # noqa: ARG002
        """Fits each, or says why it could not be fitted."""
        answer, probe = _fit_answer(work), _fit_probe(work)
        return StageOutputs(
            files={**answer.files, **probe.files},
            findings=(*answer.findings, *probe.findings),
            notes=(*answer.notes, *probe.notes),
            omitted=(*answer.omitted, *probe.omitted),
        )


def _fit_answer(work: Workspace) -> StageOutputs:
    refused = work.transcripts.where(outcome=Outcome.REFUSED)
    complied = work.transcripts.where(outcome=Outcome.COMPLIED)
    try:
        readout = fit_answer_readout(work.model, refused, complied, splits=work.splits, seed=work.config.seed)
    except (ProbeError, UnsupportedModelError) as error:
        return StageOutputs(
            findings=(Finding(topic="answer", sentence=verdicts.no_answer_readout(str(error))),),
            notes=(f"No answer readout: {error}",),
        )
    return StageOutputs(
        files={ANSWER: saved_answer_readout(readout)},
        findings=(Finding(topic="answer", sentence=verdicts.of_answer(readout)),),
        omitted=readout.omitted,
    )


def _fit_probe(work: Workspace) -> StageOutputs:
    config = work.config
    classes = contrast_classes(work.transcripts, config.contrast, thinks=work.model.template.thinks)
    try:
        probe = fit_probe(
            work.model,
            classes.refused,
            classes.complied,
            positions=config.positions,
            seed=config.seed,
            challenge=classes.challenge,
            splits=work.splits,
            progress=work.counter("readouts", len(work.transcripts)),
        )
    except ProbeError as error:
        return StageOutputs(
            findings=(Finding(topic="probe", sentence=verdicts.no_probe(str(error))),),
            notes=(f"No probe: {error}",),
        )
    return StageOutputs(
        files=probe_files(probe, classes.name),
        findings=(Finding(topic="probe", sentence=verdicts.of_probe(probe.report, classes.name)),),
        omitted=probe.omitted,
    )
