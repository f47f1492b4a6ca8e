"""Stage 3: does the probe carry over from one source of prompts to another?"""

from collections import Counter

from cliffscope.errors import ProbeError
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.readouts.transfer import probe_transfer
from cliffscope.study.artefacts import TRANSFER
from cliffscope.study.stages.base import Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Transcripts

MOST_SOURCES = 6
"""Sources that a probe is fitted on, those with the most transcripts first; each costs a fit of its own."""


class TransferStage(Stage):
    """Fits a probe on each source of prompts and tests it on every source."""

    name = "transfer"
    version = 1
    needs = ("transcripts", "readouts")
    makes = (TRANSFER,)
    settings = ("positions", "contrast", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Fits, or makes nothing where there is one source, or none holds enough of both classes."""
        if work.probe is None:
            return StageOutputs()
        sizes = Counter(t.source for t in work.closed if t.source)
        first = {source for source, _ in sizes.most_common(MOST_SOURCES)}
        if len(first) < 2:
            return StageOutputs()
        some = Transcripts(t for t in work.closed if t.source in first)
        classes = contrast_classes(some, work.config.contrast, thinks=work.model.template.thinks)
        try:
            transfer = probe_transfer(
                work.model,
                classes.refused,
                classes.complied,
                challenge=classes.challenge,
                positions=work.config.positions,
                splits=work.splits,
                seed=work.config.seed,
                progress=work.counter(self.name, len(first)),
            )
        except ProbeError as error:
            return StageOutputs(notes=(f"No probe was carried over between sources: {error}",))
        if len(transfer.probes) < 2:
            source = next(iter(transfer.probes))
            why = f"of {len(first)} sources of prompts only {source!r} holds enough refused and complied transcripts"
            return StageOutputs(notes=(f"No probe was carried over between sources: {why}.",))
        return StageOutputs(files={TRANSFER: transfer.to_frame()}, omitted=transfer.omitted)
