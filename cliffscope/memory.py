"""What does the machine give: how much memory is free, did it run out, how many threads are worth it?"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_WORDS = ("out of memory", "allocate memory", "not enough memory")


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a CUDA device, or in this machine's memory for any other."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds: tensors on a CUDA device, or all that is resident for any other."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, whose allocator raises a plain RuntimeError.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError())
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in _WORDS)


@contextmanager
def few_threads(*, small: bool) -> Iterator[None]:
    """One thread while many small steps are made, if the model is small.

    Threads that share a small matrix mostly wait for each other, and stand still where other work runs beside them.

    Args:
        small: whether the model is small and on the CPU.
    """
    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
