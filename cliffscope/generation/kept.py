"""How does a killed generation go on where it stopped?

1. Each finished batch of an arm goes to the arm's log (`arm-NAME.log`), flushed before the next one begins.
2. A finished arm is judged and written whole (`arm-NAME.jsonl`), what it left out in `arms.json`; its log goes.
3. A run started again reads both: finished arms are not run again, begun ones go on behind their last batch.

A batch that was being generated is generated again, with the same batch-mates and draws. Knows files and transcripts.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cliffscope.store import LOG, RunStore
from cliffscope.transcripts.datasets import TranscriptLog, open_transcript_log, read_transcripts, write_transcripts
from cliffscope.transcripts.records import Omission, Transcripts

OMITTED = "arms.json"


@dataclass(eq=False, kw_only=True)
class KeptAnswers:
    """Answers of the arms of one run; `open_answers` makes it."""

    store: RunStore
    """The run directory."""
    stack: ExitStack
    """Closes the logs."""
    logs: dict[str, TranscriptLog] = field(default_factory=dict)
    """Open logs by arm."""
    used: set[str] = field(default_factory=set)
    """Arms whose logs hold something."""

    def finished(self, name: str) -> Transcripts | None:
        """The judged answers of an arm, with what it left out; None if it is not finished."""
        if not self.store.has(arm_file(name)):
            return None
        left_out = self._omitted().get(name, [])
        omitted = [Omission(**row) for row in left_out] if isinstance(left_out, list) else []
        return Transcripts(read_transcripts(self.store.path / arm_file(name)), omitted=omitted)

    def finished_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """Those arms that are finished."""
        return {name: found for name in names if (found := self.finished(name)) is not None}

    def begun_arms(self, names: Iterable[str]) -> dict[str, Transcripts]:
        """What is in the logs of those that are not."""
        return {name: self.begun(name) for name in names if not self.store.has(arm_file(name))}

    def begun(self, name: str) -> Transcripts:
        """The answers that are in an arm's log."""
        if name not in self.logs and not _log_path(self.store, name).is_file():
            return Transcripts()
        found = self._log(name).transcripts
        if found:
            self.used.add(name)
        return found

    def keep_batch(self, name: str, answers: Transcripts) -> None:
        """Adds a finished batch to an arm's log; on return it survives a crash."""
        self._log(name).append(answers)
        self.used.add(name)

    def keep(self, name: str, answers: Transcripts) -> None:
        """Writes a finished arm; its log goes."""
        # Omissions first: an arm whose file is there is not run again.
        rows = {**self._omitted(), name: [asdict(omission) for omission in answers.omitted]}
        self.store.write_json(OMITTED, rows)
        write_transcripts(answers, self.store.path / arm_file(name))
        self.drop_log(name)

    def drop_log(self, name: str) -> None:
        """Removes an arm's log, once its answers are kept elsewhere."""
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

    def _omitted(self) -> dict[str, object]:
        return self.store.read_json(OMITTED) if self.store.has(OMITTED) else {}


@contextmanager
def open_answers(store: RunStore) -> Iterator[KeptAnswers]:
    """Opens the answers of a run directory; its logs are closed when the context is left.

    Args:
        store: the open run directory.

    Yields:
        What is kept there.
    """
    with ExitStack() as stack:
        kept = KeptAnswers(store=store, stack=stack)
        try:
            yield kept
        finally:
            for name in set(kept.logs) - kept.used:
                kept.drop_log(name)


def arm_file(name: str) -> str:
    """Name of an arm's file."""
    return f"arm-{name.replace(' ', '-')}.jsonl"


def _log_path(store: RunStore, name: str) -> Path:
    return (store.path / arm_file(name)).with_suffix(LOG)
