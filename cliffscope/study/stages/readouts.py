"""Stage 2: the refusal probe, with its held-out report."""

from cliffscope.errors import ProbeError
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.readouts.probe import fit_probe
from cliffscope.study import verdicts
from cliffscope.study.artefacts import PROBE, PROBE_ARRAYS, PROBE_LAYERS
from cliffscope.study.saved_readouts import probe_files
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace


class ReadoutStage(Stage):
    """Fits the probe on the fit split, chooses it on validate, reports it on test."""

    name = "readouts"
    version = 1
    needs = ("transcripts",)
    makes = (PROBE, PROBE_ARRAYS, PROBE_LAYERS)
    settings = ("positions", "contrast", "seed")

    def run(self, work: Workspace, key: str) -> StageOutputs:  # noqa: ARG002
        """Fits, or says why nothing could be fitted."""
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
                progress=work.counter(self.name, len(work.transcripts)),
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
