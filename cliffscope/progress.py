"""How far along is it? Bars on a terminal, log lines elsewhere.

Knows stages by name and counts, and nothing about what is counted.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cliffscope.text import visible

Progress = Callable[[str, int, int], None]
"""Called with the stage, the items done and the total."""
log = logging.getLogger(__name__)


class _VisibleFormatter(logging.Formatter):
    """Shows control characters of ids and names as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def log_to_standard_error() -> None:
    """Shows CliffScope's log lines, and only the errors of other packages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    logging.getLogger("cliffscope").setLevel(logging.INFO)
    for noisy in ("httpx", "transformers", "transformer_lens", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # Hugging Face's libraries, and the bars that they use, read these when they are imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Progress bars with rate and time left on a terminal; elsewhere a log line per tenth.

    Yields:
        The function to call with the stage, the items done and the total.
    """
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def update_bar(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            speed = next(task.speed for task in bars.tasks if task.id == tasks[stage])
            bars.update(tasks[stage], completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")

        yield update_bar


def _log_lines() -> Progress:
    started: dict[str, tuple[float, int]] = {}
    tenths: dict[str, int] = {}
    last: dict[str, int] = {}

    def log_tenth(stage: str, done: int, total: int) -> None:
        """Logs when another tenth of a stage is done."""
        # The first call may come after some items are done, so the rate counts from there; a stage that goes over its
        # items again starts afresh.
        if done < last.get(stage, 0):
            started.pop(stage)
        last[stage] = done
        start, before = started.setdefault(stage, (time.perf_counter(), done))
        tenth = 10 * done // max(1, total)
        if tenths.get(stage) != tenth:
            tenths[stage] = tenth
            seconds = time.perf_counter() - start
            # Items come in batches, so less than a second says nothing about the speed.
            speed = (done - before) / seconds if seconds >= 1 else 0.0
            rate = f", {speed:.2f}/s, {(total - done) / speed:.0f} s left" if speed else ""
            log.info("%s: %d of %d%s", stage, done, total, rate)

    return log_tenth


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
