"""What does the machine offer: how much memory is free, did it run out, how many threads help?

psutil reads the machine's memory, torch that of a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

_WORDS = ("out of memory", "allocate memory", "not enough memory")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a CUDA device, or for any other device in this machine's memory without swapping.

    A limit that a container sets below the machine's memory is not seen.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds: tensors on a CUDA device, or for any other device its resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, where torch raises a plain RuntimeError.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError())
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in _WORDS)


@contextmanager
def few_threads(*, small: bool) -> Iterator[None]:
    """Limits torch to one thread inside the context, if the model is small.

    Threads that share a small matrix mostly wait for each other, and most of all on a machine that is busy.

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
