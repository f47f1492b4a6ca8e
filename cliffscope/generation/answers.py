"""How does an interrupted generation resume?

1. Each finished batch of an arm is appended to the arm's log (`arm-NAME.log`) before the next one starts.
2. A finished arm is judged and written completely (`arm-NAME.jsonl`), with its omissions in `arms.json`. Its log is
   removed.
3. A resumed run reads both: finished arms are not run again, and unfinished ones continue after their last batch.

A batch that was interrupted is generated again, with the same batch-mates and random numbers. This file knows files and
transcripts only.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cliffscope.store import LOG, RunStore
from cliffscope.transcripts.datasets import TranscriptLog, open_transcript_log, read_transcripts, write_transcripts
from cliffscope.transcripts.records import Omission, Transcripts

OMISSIONS_FILE = "arms.json"


@dataclass(eq=False, kw_only=True)
class AnswerStore:
    """The answers of the arms of one run; `open_answers` opens it."""

    store: RunStore
    """The run directory."""
    stack: ExitStack
    """Closes the logs on exit."""
    logs: dict[str, TranscriptLog] = field(default_factory=dict)
    """Open logs, by arm."""
    used: set[str] = field(default_factory=set)
    """Arms whose logs hold transcripts."""

    def finished(self, name: str) -> Transcripts | None:
        """The judged answers of an arm with its omissions; None if the arm is not finished."""
        if not self.store.has(arm_file(name)):
            return None
        rows = self._omissions().get(name, [])
        omitted = [Omission(**row) for row in rows] if isinstance(rows, list) else []
        return Transcripts(read_transcripts(self.store.path / arm_file(name)), omitted=omitted)

    def finished_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """The judged answers of each arm that is finished."""
        return {name: answers for name in names if (answers := self.finished(name)) is not None}

    def begun_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """The logged answers of each arm that is not finished."""
        return {name: self.begun(name) for name in names if not self.store.has(arm_file(name))}

    def begun(self, name: str) -> Transcripts:
        """The answers in an arm's log."""
        if name not in self.logs and not _log_path(self.store, name).is_file():
            return Transcripts()
        logged = self._log(name).transcripts
        if logged:
            self.used.add(name)
        return logged

    def keep_batch(self, name: str, answers: Transcripts) -> None:
        """Appends a finished batch to an arm's log; it survives a crash once this returns."""
        self._log(name).append(answers)
        self.used.add(name)

    def keep(self, name: str, answers: Transcripts) -> None:
        """Writes a finished arm and removes its log."""
        # Omissions first: an arm whose file exists is not run again.
        rows = {**self._omissions(), name: [asdict(omission) for omission in answers.omitted]}
        self.store.write_json(OMISSIONS_FILE, rows)
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
                open_transcript_log(_log_path(self.store, name), {"arm": name, "config": self.store.config})
            )
        return self.logs[name]

    def _omissions(self) -> dict[str, object]:
        return self.store.read_json(OMISSIONS_FILE) if self.store.has(OMISSIONS_FILE) else {}


@contextmanager
def open_answers(store: RunStore) -> Iterator[AnswerStore]:
    """Opens the answers of a run directory, and closes the logs on exit.

    Args:
        store: the open run directory.

    Yields:
        The answers.
    """
    with ExitStack() as stack:
        answers = AnswerStore(store=store, stack=stack)
        try:
            yield answers
        finally:
            for name in set(answers.logs) - answers.used:
                answers.drop_log(name)


def arm_file(name: str) -> str:
    """File name of an arm's answers."""
    return f"arm-{name.replace(' ', '-')}.jsonl"


def _log_path(store: RunStore, name: str) -> Path:
    return (store.path / arm_file(name)).with_suffix(LOG)
