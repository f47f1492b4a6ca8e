"""How far is it? Bars on a terminal, log lines elsewhere.

Knows stages by name and counts, nothing of what is counted.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with stage, items done, items in all."""
log = logging.getLogger(__name__)


def log_to_standard_error() -> None:
    """Lets log lines of CliffScope through, and of other packages their errors alone."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cliffscope").setLevel(logging.INFO)
    for noisy in ("httpx", "transformers", "transformer_lens", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # Hugging Face's libraries, and the bars that they use, read these when they are imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Progress bars with rate and time left on a terminal; a log line a tenth elsewhere.

    Yields:
        What is to be called with stage, items done and items in all.
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

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            speed = next(task.speed for task in bars.tasks if task.id == tasks[stage])
            bars.update(tasks[stage], completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")

        yield progress


def _log_lines() -> Progress:
    started: dict[str, tuple[float, int]] = {}
    told: dict[str, int] = {}
    last: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        # The first call comes when something has been done already, so the rate counts from there; a stage that goes
        # over its items again starts anew.
        if done < last.get(stage, 0):
            started.pop(stage)
        last[stage] = done
        start, before = started.setdefault(stage, (time.perf_counter(), done))
        tenth = 10 * done // max(1, total)
        if told.get(stage) != tenth:
            told[stage] = tenth
            seconds = time.perf_counter() - start
            # Items come in batches: what is seen within a second is no speed.
            speed = (done - before) / seconds if seconds >= 1 else 0.0
            rate = f", {speed:.2f}/s, {(total - done) / speed:.0f} s left" if speed else ""
            log.info("%s: %d of %d%s", stage, done, total, rate)

    return progress


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""
