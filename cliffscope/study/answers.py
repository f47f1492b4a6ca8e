"""How does a killed generation resume where it stopped?

1. Each finished batch of an arm goes to the arm's log (`arm-NAME.log`), flushed before the next one begins.
2. A finished arm is judged and written whole (`arm-NAME.jsonl`), its omissions in `arms.json`; its log is removed.
3. A rerun reads both: finished arms are not run again, interrupted ones resume after their last batch.

A batch that was interrupted is generated again, with the same batch-mates and draws. Knows files and transcripts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cliffscope.store import LOG, RunStore
from cliffscope.study.artefacts import ARM_ANSWERS, ARM_OMISSIONS
from cliffscope.transcripts.datasets import TranscriptLog, open_transcript_log, read_transcripts, write_transcripts
from cliffscope.transcripts.records import Omission, Transcripts


@dataclass(eq=False, kw_only=True)
class ArmAnswers:
    """Answers of the arms of one run; `open_answers` makes it."""

    store: RunStore
    """The run directory."""
    settings: object
    """What the answers depend on, JSON-ready; a log of other settings is refused."""
    stack: ExitStack
    """Closes the logs."""
    logs: dict[str, TranscriptLog] = field(default_factory=dict)
    """Open logs by arm."""
    filled: set[str] = field(default_factory=set)
    """Arms whose logs hold rows."""

    def finished(self, name: str) -> Transcripts | None:
        """The judged answers of an arm, with its omissions; None if it is not finished."""
        if not self.store.has(arm_file(name)):
            return None
        rows = self._omissions().get(name, [])
        omitted = [Omission(**row) for row in rows] if isinstance(rows, list) else []
        return Transcripts(read_transcripts(self.store.path / arm_file(name), strict=True), omitted=omitted)

    def finished_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """Those arms that are finished."""
        return {name: answers for name in names if (answers := self.finished(name)) is not None}

    def begun_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """What the logs of the unfinished arms hold."""
        return {name: self.begun(name) for name in names if not self.store.has(arm_file(name))}

    def begun(self, name: str) -> Transcripts:
        """The answers in an arm's log."""
        if name not in self.logs and not _log_path(self.store, name).is_file():
            return Transcripts()
        rows = self._log(name).transcripts
        if rows:
            self.filled.add(name)
        return rows

    def keep_batch(self, name: str, answers: Transcripts) -> None:
        """Adds a finished batch to an arm's log; on return it survives a crash."""
        self._log(name).append(answers)
        self.filled.add(name)

    def keep(self, name: str, answers: Transcripts) -> None:
        """Writes a finished arm and removes its log."""
        # Omissions first: an arm whose file is there is not run again.
        rows = {**self._omissions(), name: [asdict(omission) for omission in answers.omitted]}
        self.store.write_json(ARM_OMISSIONS.file, rows)
        write_transcripts(answers, self.store.path / arm_file(name))
        self.drop_log(name)

    def drop_log(self, name: str) -> None:
        """Removes an arm's log, once its answers are stored elsewhere."""
        log = self.logs.pop(name, None)
        if log is not None:
            log.close()
        _log_path(self.store, name).unlink(missing_ok=True)

    def _log(self, name: str) -> TranscriptLog:
        if name not in self.logs:
            self.logs[name] = self.stack.enter_context(
                open_transcript_log(_log_path(self.store, name), {"arm": name, "settings": self.settings})
            )
        return self.logs[name]

    def _omissions(self) -> Mapping[str, object]:
        return self.store.read_json(ARM_OMISSIONS.file) if self.store.has(ARM_OMISSIONS.file) else {}


@contextmanager
def open_answers(store: RunStore, settings: object) -> Iterator[ArmAnswers]:
    """Opens the answers of a run directory; its logs are closed when the context is left.

    Args:
        store: the open run directory.
        settings: what the answers depend on, JSON-ready.

    Yields:
        The answers stored there.
    """
    with ExitStack() as stack:
        answers = ArmAnswers(store=store, settings=settings, stack=stack)
        try:
            yield answers
        finally:
            for name in set(answers.logs) - answers.filled:
                answers.drop_log(name)


def arm_file(name: str) -> str:
    """Name of an arm's file."""
    return ARM_ANSWERS.file.replace("*", name.replace(" ", "-"))


def _log_path(store: RunStore, name: str) -> Path:
    return (store.path / arm_file(name)).with_suffix(LOG)
