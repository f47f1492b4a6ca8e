"""What does the manifest of a study hold?

`manifest.json` has the settings, one record per finished stage (its key, seconds, library versions, findings, notes,
facts), digests of input files, and what reads well on top: findings, notes, omissions and facts of all stages. The
records are the truth; the rest is made from them whenever a stage ends. Knows files and JSON, no science.
"""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import pandas as pd

from cliffscope.store import RunStore
from cliffscope.study.artefacts import OMITTED
from cliffscope.study.verdicts import TOPICS
from cliffscope.transcripts.records import Omission

LIBRARIES = ("torch", "transformers", "transformer-lens", "numpy", "scikit-learn")
"""Libraries that numbers depend on."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A finished stage."""

    key: str
    """Of everything that its results depend on."""
    parts: Mapping[str, object]
    """What that is, by kind, so that a later run can say what changed."""
    seconds: float
    """Wall time."""
    versions: Mapping[str, str]
    """Libraries that it ran with."""
    findings: Mapping[str, str]
    """Topic to sentence."""
    notes: Sequence[str]
    """What could not be done, and why."""
    facts: Mapping[str, object]
    """Further entries, such as the model."""
    files: Sequence[str]
    """Names of the artefacts that it wrote."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifest:
    """The manifest of an open run directory."""

    store: RunStore
    """The directory."""

    @property
    def records(self) -> dict[str, dict[str, object]]:
        """Record of each finished stage, in the order in which they ended."""
        return _objects(self.store.manifest.get("stages"))

    def key_of(self, stage: str) -> str | None:
        """Key of a finished stage; None if it is not finished."""
        record = self.records.get(stage)
        return None if record is None else str(record.get("key"))

    @property
    def begun(self) -> dict[str, str]:
        """Key of each stage that was begun and may have left part of its answers."""
        begun = self.store.manifest.get("begun")
        return {str(k): str(v) for k, v in begun.items()} if isinstance(begun, dict) else {}

    def begin(self, stage: str, key: str) -> None:
        """Notes that a stage begins."""
        self.store.update({"begun": {**self.begun, stage: key}})

    def finish(self, stage: str, record: StageRecord, omitted: Sequence[Omission], order: Sequence[str]) -> None:
        """Adds a record; the stage's files must have been written.

        Args:
            stage: name.
            record: what is known of it.
            omitted: what it left out.
            order: names of all stages, in which findings and notes are listed.
        """
        self._write_omissions(stage, omitted)
        entry = {name: getattr(record, name) for name in StageRecord.__dataclass_fields__}
        self._write({**self.records, stage: {**entry, "seconds": round(record.seconds, 3)}}, order)

    def forget(self, stages: Sequence[str], order: Sequence[str]) -> None:
        """Removes records, since what they stand on has changed."""
        for stage in stages:
            self._write_omissions(stage, ())
        self._write({name: record for name, record in self.records.items() if name not in stages}, order)

    def _write(self, records: Mapping[str, Mapping[str, object]], order: Sequence[str]) -> None:
        ordered = {name: records[name] for name in order if name in records}
        table = OMITTED.read(self.store.path)
        counts = [
            {"stage": stage, "reason": reason, "count": len(part), "ids": part["id"].head(5).tolist()}
            for (stage, reason), part in table.groupby(["stage", "reason"], sort=False)
        ]
        facts = {name: value for record in ordered.values() for name, value in _objects_of(record, "facts").items()}
        findings = {topic: text for r in ordered.values() for topic, text in _objects_of(r, "findings").items()}
        self.store.update(
            {
                **facts,
                "stages": ordered,
                "begun": {name: key for name, key in self.begun.items() if name not in ordered},
                "verdict": dict(sorted(findings.items(), key=lambda item: TOPICS.index(item[0]))),
                "notes": [
                    {"stage": name, "text": text}
                    for name, record in ordered.items()
                    for text in _list_of(record, "notes")
                ],
                "omitted": counts,
            }
        )

    def _write_omissions(self, stage: str, omitted: Sequence[Omission]) -> None:
        before = OMITTED.read(self.store.path)
        rows = pd.DataFrame(
            [(stage, o.stage, o.kind, o.id) for o in omitted], columns=OMITTED.column_names, dtype=object
        )
        table = pd.concat([before[before["stage"] != stage], rows], ignore_index=True).drop_duplicates(
            ignore_index=True
        )
        OMITTED.write(self.store, table.astype(object))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _objects(value: object) -> dict[str, dict[str, object]]:
    return {str(k): v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _objects_of(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _list_of(record: Mapping[str, object], name: str) -> Sequence[object]:
    value = record.get(name)
    return value if isinstance(value, list | tuple) else ()
