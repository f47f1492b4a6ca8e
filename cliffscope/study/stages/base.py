"""What is a stage of a study?

A stage declares what it needs, what it makes, and which settings it depends on. Its `run` takes what earlier stages
left and returns its results; it writes nothing itself, apart from places that are filled row by row while it runs
(answers of arms, a repaired checkpoint). The runner checks, writes and records what it returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pandas as pd

from cliffscope.errors import ProbeError
from cliffscope.judging.protocols import Judge
from cliffscope.model.load import LensModel, load_model
from cliffscope.progress import Progress
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.catalogue import fit_readout
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.readout import Readout
from cliffscope.store import RunStore
from cliffscope.study.answers import ArmAnswers, open_answers
from cliffscope.study.artefact_kinds import Artefact, Place, Table
from cliffscope.study.artefacts import ANSWER, PROBE, SELECTED_HEADS, TRANSCRIPT_TABLE, TRANSCRIPTS
from cliffscope.study.config import StudyConfig
from cliffscope.study.saved_readouts import load_answer_readout, load_probe
from cliffscope.transcripts.records import FORCED, Omission, Outcome, Split, Transcripts

CUT_OFF = "its thinking was closed at its budget, and not by the model"
"""Why a transcript takes part in no claim."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence that heads a section of the report."""

    topic: str
    """What it is about, such as "cliff"."""
    sentence: str
    """What was found, with n and interval, or which condition failed."""


DATE = "date"
"""Entry of the manifest: the day that a chat template which writes today's date takes for today in this run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StageOutputs:
    """What a stage hands to the runner."""

    files: Mapping[Artefact, object] = field(default_factory=dict)
    """Values by artefact, among those that the stage says it makes."""
    findings: tuple[Finding, ...] = ()
    """Sentences."""
    notes: tuple[str, ...] = ()
    """What could not be done, and why."""
    omitted: tuple[Omission, ...] = ()
    """What was left out, and why."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Entries of the manifest, JSON-ready."""


@dataclass(eq=False, kw_only=True)
class Workspace:
    """What stages read: the configuration, the model, and what earlier stages left on disk; each is read once."""

    config: StudyConfig
    """Of the study."""
    store: RunStore
    """The run directory; stages read through the properties and `table`."""
    progress: Progress
    """Called with stage, items done and items in all."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Key of each stage by its name."""

    @cached_property
    def model(self) -> LensModel:
        """The model, loaded when it is first needed, on the day that the run has recorded as its own."""
        model = load_model(self.config.model, template=self.config.template, device=self.config.device)
        pinned = self.store.manifest.get(DATE)
        if not model.template.date:
            return model
        if isinstance(pinned, str):
            return replace(model, template=replace(model.template, date=pinned))
        self.store.update({DATE: model.template.date})
        return model

    @cached_property
    def judge(self) -> Judge:
        """What reads the answers."""
        return self.config.find_judge()

    @cached_property
    def transcripts(self) -> Transcripts:
        """All judged transcripts."""
        return TRANSCRIPTS.read(self.store.path)

    @cached_property
    def splits(self) -> dict[str, str]:
        """Transcript id to split."""
        frame = self.table(TRANSCRIPT_TABLE)
        return {str(i): str(s) for i, s in zip(frame["id"], frame["split"], strict=True)}

    @cached_property
    def probe(self) -> RefusalProbe | None:
        """The probe; None if none could be fitted."""
        return load_probe(self.store) if self.has(PROBE) else None

    @cached_property
    def answer(self) -> AnswerReadout | None:
        """The answer readout; None if none could be fitted."""
        return load_answer_readout(self.store) if self.has(ANSWER) else None

    @cached_property
    def readout(self) -> Readout | None:
        """What heads are measured by; None where it could not be fitted."""
        if self.config.readout in ("answer", "probe"):
            return self.answer if self.config.readout == "answer" else self.probe
        refused, complied = (self.transcripts.where(outcome=o) for o in (Outcome.REFUSED, Outcome.COMPLIED))
        try:
            return fit_readout(
                self.config.readout, self.model, refused, complied, splits=self.splits, seed=self.config.seed
            )
        except ProbeError:
            return None

    def has(self, artefact: Artefact) -> bool:
        """Whether an earlier stage made it."""
        return bool(artefact.paths(self.store.path))

    def table(self, table: Table) -> pd.DataFrame:
        """A table of an earlier stage; empty where it made none."""
        return table.read(self.store.path)

    def selected_heads(self) -> pd.DataFrame:
        """The heads that are edited, best first."""
        return self.table(SELECTED_HEADS).sort_values("rank", ignore_index=True)

    @property
    def closed(self) -> Transcripts:
        """Transcripts whose thinking the model ended itself: no claim rests on the others."""
        return Transcripts(t for t in self.transcripts if not t.extra.get(FORCED))

    @property
    def left_open(self) -> tuple[Omission, ...]:
        """The others."""
        return tuple(Omission(stage="claims", reason=CUT_OFF, id=t.id) for t in self.transcripts if t.extra.get(FORCED))

    def part(
        self,
        *splits: Split,
        harmful: bool | None = None,
        outcome: Outcome | None = None,
        forced: bool = True,
    ) -> Transcripts:
        """Transcripts of some splits, by label and outcome; without those of a forced closing unless `forced`."""
        return Transcripts(
            t
            for t in (self.transcripts if forced else self.closed)
            if self.splits[t.id] in splits
            and (harmful is None or t.harmful is harmful)
            and (outcome is None or t.outcome == outcome)
        )

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """A progress callback of one stage."""
        return lambda done: self.progress(stage, done, total)

    def answers(self, stage: str) -> AbstractContextManager[ArmAnswers]:
        """Answers of a stage's arms, which survive a crash; those of another key are refused."""
        return open_answers(self.store, self.keys[stage])

    def folder(self, place: Place) -> Path:
        """Where a place that another library fills lies."""
        return self.store.path / place.file


class Stage(ABC):
    """One step of a study."""

    name: ClassVar[str]
    """Its name in the manifest and on the command line."""
    version: ClassVar[int]
    """Of its code; raised by hand whenever the same inputs would give other results."""
    needs: ClassVar[tuple[str, ...]]
    """Stages whose results it reads."""
    makes: ClassVar[tuple[Artefact, ...]]
    """Artefacts that it may make."""
    settings: ClassVar[tuple[str, ...]]
    """Fields of `StudyConfig` that its results depend on."""
    files: ClassVar[tuple[str, ...]] = ()
    """Fields of `StudyConfig` that name input files, which count by content."""
    switch: ClassVar[str | None] = None
    """Field of `StudyConfig` that requests the stage; None for a stage that always runs."""
    uses_model: ClassVar[bool] = True
    """Whether its results depend on the model itself."""

    def requested(self, config: StudyConfig) -> bool:
        """Whether the configuration requests it."""
        return self.switch is None or bool(getattr(config, self.switch))

    def check(self, work: Workspace) -> None:  # noqa: B027 - most stages have nothing to check
        """Raises an error where the stage cannot work with this model, before any stage that runs has begun."""

    @abstractmethod
    def run(self, work: Workspace) -> StageOutputs:
        """Does the work.

        Args:
            work: what earlier stages left.

        Returns:
            The results.
        """
