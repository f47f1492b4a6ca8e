"""Stage 2: what says whether an answer will refuse: the model's own answer distribution, and a probe."""

from collections import Counter

from cliffscope.errors import ProbeError, UnsupportedModelError
from cliffscope.readouts.answer import fit_answer_readout
from cliffscope.readouts.contrast import Classes, contrast_classes
from cliffscope.readouts.files import saved_answer_readout, saved_text_baseline
from cliffscope.readouts.probe import RefusalProbe, fit_probe
from cliffscope.readouts.text_baseline import TextBaseline, text_baseline
from cliffscope.study import verdicts
from cliffscope.study.artefacts import ANSWER, PROBE, PROBE_ARRAYS, PROBE_LAYERS, TEXT_BASELINE
from cliffscope.study.saved_readouts import probe_files
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split


class ReadoutStage(Stage):
    """Fits both readouts on the fit split, chooses them on validate, reports them on test; without forced closings."""

    name = "readouts"
    version = 4
    needs = ("transcripts",)
    makes = (ANSWER, PROBE, PROBE_ARRAYS, PROBE_LAYERS, TEXT_BASELINE)
    settings = ("positions", "contrast", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Fits each, or says why it could not be fitted."""
        answer, probe = _fit_answer(work), _fit_probe(work)
        return StageOutputs(
            files={**answer.files, **probe.files},
            findings=(*answer.findings, *probe.findings),
            notes=(*answer.notes, *probe.notes),
            omitted=(*answer.omitted, *probe.omitted, *work.left_open),
        )


def _fit_answer(work: Workspace) -> StageOutputs:
    refused = work.closed.where(outcome=Outcome.REFUSED)
    complied = work.closed.where(outcome=Outcome.COMPLIED)
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
    classes = contrast_classes(work.closed, config.contrast, thinks=work.model.template.thinks)
    try:
        probe = fit_probe(
            work.model,
            classes.refused,
            classes.complied,
            positions=config.positions,
            seed=config.seed,
            challenge=classes.challenge,
            splits=work.splits,
            progress=work.counter("readouts", len(work.closed)),
        )
    except ProbeError as error:
        return StageOutputs(
            findings=(Finding(topic="probe", sentence=verdicts.no_probe(str(error))),),
            notes=(f"No probe: {error}",),
        )
    baseline, why = _fit_text(work, classes, probe)
    sentence = verdicts.of_probe(probe.report, classes.name, baseline)
    return StageOutputs(
        files={
            **probe_files(probe, classes.name, forced=_forced_by_split(work)),
            **({TEXT_BASELINE: saved_text_baseline(baseline)} if baseline is not None else {}),
        },
        findings=(Finding(topic="probe", sentence=sentence),),
        notes=why,
        omitted=probe.omitted,
    )


def _forced_by_split(work: Workspace) -> dict[str, int]:
    forced = Counter(work.splits[omission.id] for omission in work.left_open)
    return {str(split): forced[split] for split in Split}


def _fit_text(work: Workspace, classes: Classes, probe: RefusalProbe) -> tuple[TextBaseline | None, tuple[str, ...]]:
    """The words' AUROC on the transcripts of the probe, or a note why there is none."""
    left_out = {omission.id for omission in probe.omitted}
    read = {t.id for t in work.closed if t.id not in left_out}
    refused, complied = classes.refused.where(ids=read), classes.complied.where(ids=read)
    challenge = classes.challenge and classes.challenge.where(ids=read)
    try:
        return text_baseline(refused, complied, challenge=challenge, splits=work.splits, seed=work.config.seed), ()
    except ProbeError as error:
        return None, (f"No text baseline: {error}",)
