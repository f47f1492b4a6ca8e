"""How much memory does a call take at its peak, above what the process held before?

A thread reads the process's resident memory through psutil every `STEP_SECONDS`. A peak that is shorter than a step may
be missed. Works on every system that psutil knows.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from cliffscope.memory import held_bytes

Result = TypeVar("Result")
STEP_SECONDS = 0.002
"""Time between two readings; a reading takes about 0.02 ms."""


def peak_above_now(call: Callable[[], Result]) -> tuple[int, Result]:
    """Runs a call.

    Args:
        call: takes nothing.

    Returns:
        Bytes of resident memory at the peak above those before the call, and what the call returned.
    """
    cpu, finished = torch.device("cpu"), threading.Event()
    before = held_bytes(cpu)
    peaks = [before]

    def watch() -> None:
        while not finished.wait(STEP_SECONDS):
            peaks[0] = max(peaks[0], held_bytes(cpu))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = call()
    finally:
        finished.set()
        watcher.join()
    return max(peaks[0], held_bytes(cpu)) - before, result
