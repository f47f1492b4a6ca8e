"""What does a study in progress hold?

What earlier stages left on disk is read when it is needed, and only once; remarks, findings and omissions go into the
manifest. Knows no stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from cliffscope.model.load import LensModel, load_model
from cliffscope.progress import Progress
from cliffscope.readouts.files import load_probe
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.store import RunStore
from cliffscope.study.config import StudyConfig
from cliffscope.transcripts.datasets import read_transcripts
from cliffscope.transcripts.records import Omission, Outcome, Transcripts

EXAMPLES = 4
"""Transcripts of which every layer is traced for the report."""
TRANSCRIPTS, OMITTED = "transcripts.jsonl", "omitted.parquet"


@dataclass(eq=False, kw_only=True)
class Run:
    """A study in progress; what earlier stages left on disk is read when it is needed."""

    config: StudyConfig
    store: RunStore
    progress: Progress

    @cached_property
    def model(self) -> LensModel:
        """Loaded once."""
        return load_model(self.config.model, template=self.config.template, device=self.config.device)

    @cached_property
    def transcripts(self) -> Transcripts:
        """All judged transcripts."""
        return read_transcripts(self.store.path / TRANSCRIPTS)

    @cached_property
    def splits(self) -> dict[str, str]:
        """Transcript id to split."""
        frame = self.store.read_frame("transcripts.parquet")
        return {str(i): str(s) for i, s in zip(frame["id"], frame["split"], strict=True)}

    @cached_property
    def probe(self) -> RefusalProbe | None:
        """None if none could be fitted."""
        return load_probe(self.store) if self.store.has("probe.json") else None

    def part(self, *splits: str, harmful: bool | None = None, outcome: Outcome | None = None) -> Transcripts:
        """Transcripts of some splits."""
        return Transcripts(
            t
            for t in self.transcripts
            if self.splits[t.id] in splits
            and (harmful is None or t.harmful is harmful)
            and (outcome is None or t.outcome == outcome)
        )

    def examples(self) -> list[str]:
        """Ids of test transcripts that the report shows token by token: complied, refused, harmless."""
        found: list[str] = []
        kinds = ((True, Outcome.COMPLIED, EXAMPLES - 2), (True, Outcome.REFUSED, 1), (False, Outcome.COMPLIED, 1))
        for harmful, outcome, n in kinds:
            found += [t.id for t in self.part("test", harmful=harmful, outcome=outcome)[:n]]
        return found

    def note(self, text: str) -> None:
        """Adds a remark to the manifest."""
        notes = self.store.manifest.get("notes")
        known = notes if isinstance(notes, list) else []
        self.store.update(notes=known if text in known else [*known, text])

    def leave_out(self, omitted: tuple[Omission, ...]) -> None:
        """Adds omissions to the run's table and to the counts in the manifest."""
        rows = pd.DataFrame([(o.stage, o.kind, o.id) for o in omitted], columns=["stage", "reason", "id"])
        # What a killed first stage left may be of another configuration.
        before = self.store.read_frame(OMITTED) if self.store.finished("transcripts") else rows[:0]
        table = pd.concat([before, rows], ignore_index=True).drop_duplicates(ignore_index=True)
        self.store.write_frame(OMITTED, table)
        counts = [
            {"stage": stage, "reason": reason, "count": len(part), "ids": part["id"].head(5).tolist()}
            for (stage, reason), part in table.groupby(["stage", "reason"], sort=False)
        ]
        self.store.update(omitted=counts)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """A progress callback of one stage."""
        return lambda done: self.progress(stage, done, total)

    def add_verdict(self, topic: str, sentence: str) -> None:
        """Adds a finding to the manifest."""
        verdict = self.store.manifest.get("verdict")
        self.store.update(verdict={**(verdict if isinstance(verdict, dict) else {}), topic: sentence})


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
