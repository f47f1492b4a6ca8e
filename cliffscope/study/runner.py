"""The main path: from a model and prompts to a report.

1. The configuration is checked, and the key of every stage is computed from files, without loading the model.
2. A stage whose recorded key is its key now, and whose files are there, is skipped. Every other stage runs again, and
   so does every stage that depends on it; the log says why.
3. Each stage's results are checked against the artefacts, written, and recorded in the manifest, in that order.

A run that is killed at any moment and started again ends with the same results.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from cliffscope import __version__
from cliffscope.errors import DataError, StoreError
from cliffscope.notebook import Shown
from cliffscope.progress import Progress, silent
from cliffscope.store import MANIFEST, RunStore, open_run
from cliffscope.study.artefact_kinds import Artefact, Place
from cliffscope.study.artefacts import REPORT
from cliffscope.study.config import StudyConfig
from cliffscope.study.keys import Digests, StageKey, stage_keys, what_changed
from cliffscope.study.manifest import Manifest, StageRecord, library_versions
from cliffscope.study.stages import STAGES, Stage, StageOutputs, Workspace

log = logging.getLogger(__name__)
KIND = {"kind": "study"}
"""What marks a run directory as a study's."""
NAMES = tuple(stage.name for stage in STAGES)
"""Stages in order."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Study(Shown):
    """A finished study: its directory and what it found."""

    path: Path
    """Run directory."""
    verdict: dict[str, str]
    """The findings in sentences, by topic."""

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT.file

    def small_table(self) -> pd.DataFrame:
        """What it found, topic by topic."""
        return pd.DataFrame(list(self.verdict.items()), columns=["topic", "finding"])

    def __repr__(self) -> str:
        """One line: directory and the first finding."""
        return f"Study({str(self.path)!r}: {next(iter(self.verdict.values()), 'no verdict')})"


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One stage of a plan."""

    stage: Stage
    """The stage."""
    key: StageKey
    """Of everything that its results depend on."""
    runs: bool
    """Whether it would run."""
    why: str
    """Why it runs, or why not."""


def run_study(
    config: StudyConfig,
    *,
    until: str | None = None,
    only: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Study:
    """Runs a study, or resumes one: only stages that depend on something that changed run again.

    Args:
        config: what to do.
        until: last stage to run, such as "heads"; None runs to the report.
        only: the one stage to run, on what earlier stages left; None runs all.
        command: command line to rerun it, for the report; None writes the Python call.
        progress: called with stage, items done and items in all.

    Returns:
        The study; its report is written unless `until` or `only` name an earlier stage.

    Raises:
        StoreError: the directory is in use, is no study, or was written by another version.
        DataError: prompts cannot be read, or a stage does not exist or lacks what it needs.
        UnsupportedModelError: the model fails a check.
    """
    config.check()
    _check_names(until, only)
    with open_run(config.out, KIND) as store:
        manifest = Manifest(store=store)
        digests = _recorded_digests(store)
        steps = _plan(config, manifest, digests, until=until, only=only)
        _check_needs(steps, config, manifest, only)
        if only is None:
            _forget_outdated(manifest, steps)
        work = Workspace(
            config=config,
            store=store,
            progress=progress or silent,
            keys={step.stage.name: step.key.key for step in steps},
        )
        if any(step.runs for step in steps):
            store.update(
                {
                    "config": KIND,
                    "settings": {name: value for name, value in asdict(config).items() if name != "out"},
                    "command": command or f"cliffscope.run_study({config!r})",
                    "cliffscope": __version__,
                    "inputs": digests.entries,
                }
            )
        for step in steps:
            if step.runs:
                log.info("stage %s: %s", step.stage.name, step.why)
                _run(step, work, manifest)
        return open_study(store.path)


def plan_study(config: StudyConfig, *, until: str | None = None, only: str | None = None) -> pd.DataFrame:
    """What `run_study` would do, and why; no model is loaded and nothing is written.

    Args:
        config: of the study.
        until: as in `run_study`.
        only: as in `run_study`.

    Returns:
        stage, action ("run" or "skip"), why.

    Raises:
        DataError: the configuration contradicts itself, or a stage does not exist.
    """
    config.check()
    _check_names(until, only)
    store = RunStore(path=Path(config.out))
    exists = store.has(MANIFEST)
    manifest = Manifest(store=store) if exists else None
    digests = _recorded_digests(store) if exists else Digests()
    steps = _plan(config, manifest, digests, until=until, only=only)
    rows = [(step.stage.name, "run" if step.runs else "skip", step.why) for step in steps]
    return pd.DataFrame(rows, columns=["stage", "action", "why"])


def open_study(path: str | Path) -> Study:
    """Opens a study for reading.

    Args:
        path: its run directory.

    Returns:
        The study.

    Raises:
        StoreError: there is no run.
    """
    verdict = RunStore(path=Path(path)).manifest.get("verdict")
    return Study(
        path=Path(path), verdict={str(k): str(v) for k, v in verdict.items()} if isinstance(verdict, dict) else {}
    )


def _check_names(until: str | None, only: str | None) -> None:
    if until is not None and only is not None:
        raise DataError(f"Both until={until!r} and only={only!r} were given. Pass one of them.")
    for option, name in (("until", until), ("only", only)):
        if name is not None and name not in NAMES:
            raise DataError(f"{option}={name!r}: expected a stage: {', '.join(NAMES)}.")


def _recorded_digests(store: RunStore) -> Digests:
    recorded = store.manifest.get("inputs")
    return Digests(entries=dict(recorded) if isinstance(recorded, dict) else {})


def _plan(
    config: StudyConfig, manifest: Manifest | None, digests: Digests, *, until: str | None, only: str | None
) -> list[Step]:
    keys = stage_keys(config, STAGES, digests)
    steps: list[Step] = []
    for stage in STAGES:
        if only is not None and stage.name != only:
            runs, why = False, f"only {only} was asked for"
        elif until is not None and NAMES.index(stage.name) > NAMES.index(until):
            runs, why = False, f"after {until}"
        elif not stage.requested(config):
            runs, why = False, "not asked for"
        else:
            runs, why = _decide(stage, keys[stage.name], manifest)
        steps.append(Step(stage=stage, key=keys[stage.name], runs=runs, why=why))
    return steps


def _decide(stage: Stage, now: StageKey, manifest: Manifest | None) -> tuple[bool, str]:
    """Whether a requested stage runs, and why."""
    before = None if manifest is None else manifest.key_of(stage.name)
    if manifest is None or before is None:
        begun = manifest is not None and manifest.begun.get(stage.name) == now.key
        return True, "was interrupted" if begun else "has not run"
    if before != now.key:
        parts = manifest.records[stage.name].get("parts")
        return True, what_changed(parts if isinstance(parts, dict) else {}, now.parts)
    lost = [a.file for a in _recorded_files(stage, manifest) if not a.paths(manifest.store.path)]
    return (True, f"{lost[0]} is missing") if lost else (False, "up to date")


def _recorded_files(stage: Stage, manifest: Manifest) -> list[Artefact]:
    written = manifest.records[stage.name].get("files")
    names = set(written) if isinstance(written, list) else set()
    return [artefact for artefact in stage.makes if artefact.file in names]


def _check_needs(steps: Sequence[Step], config: StudyConfig, manifest: Manifest, only: str | None) -> None:
    """Raises DataError where the one stage that was asked for stands on results that are not there."""
    by_name = {step.stage.name: step for step in steps}
    for name in by_name[only].stage.needs if only is not None else ():
        step = by_name[name]
        if step.stage.requested(config) and manifest.key_of(name) != step.key.key:
            raise DataError(
                f"only={only!r}: stage {name} is not up to date with these settings. Run the study without it first."
            )


def _forget_outdated(manifest: Manifest, steps: Sequence[Step]) -> None:
    """Removes records of stages that stand on other inputs, so that nobody reads them with the new ones."""
    outdated = [s for s in steps if manifest.key_of(s.stage.name) not in (None, s.key.key)]
    if not outdated:
        return
    for step in outdated:
        if not step.runs:
            log.warning("results of stage %s belong to other settings or inputs and are removed", step.stage.name)
            _remove_files(step.stage, manifest.store, places=False)
    manifest.forget([step.stage.name for step in outdated], NAMES)


def _run(step: Step, work: Workspace, manifest: Manifest) -> None:
    stage, started = step.stage, time.perf_counter()
    resumes = step.key.key in (manifest.begun.get(stage.name), manifest.key_of(stage.name))
    _remove_files(stage, work.store, places=not resumes)
    manifest.begin(stage.name, step.key.key)
    outputs = stage.run(work)
    _write(stage, outputs, work.store)
    record = StageRecord(
        key=step.key.key,
        parts=step.key.parts,
        seconds=time.perf_counter() - started,
        versions=library_versions(),
        findings={finding.topic: finding.sentence for finding in outputs.findings},
        notes=outputs.notes,
        facts=outputs.facts,
        files=[artefact.file for artefact in outputs.files],
    )
    manifest.finish(stage.name, record, outputs.omitted, NAMES)
    for artefact in stage.makes:
        if isinstance(artefact, Place) and artefact.transient:
            _remove(artefact, work.store.path)


def _write(stage: Stage, outputs: StageOutputs, store: RunStore) -> None:
    for artefact, value in outputs.files.items():
        if artefact not in stage.makes:
            raise StoreError(f"Stage {stage.name} returned {artefact.file}, which it does not say it makes.")
        artefact.write(store, value)


def _remove_files(stage: Stage, store: RunStore, *, places: bool) -> None:
    """Removes what an earlier run of a stage left; `places` too where that run had another key."""
    for artefact in stage.makes:
        if places or not isinstance(artefact, Place):
            _remove(artefact, store.path)


def _remove(artefact: Artefact, folder: Path) -> None:
    for path in artefact.paths(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
