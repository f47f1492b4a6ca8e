import os

import pytest
import torch

from cliffscope.memory import few_threads, free_bytes, held_bytes, is_out_of_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("no"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_lack_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert 0 < free_bytes(CPU) < 2**60


def test_free_memory_is_part_of_what_the_system_has() -> None:
    assert 0 < free_bytes(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_held_memory_grows_by_what_is_allocated() -> None:
    before = held_bytes(CPU)
    block = torch.ones(32 << 20)
    grown = held_bytes(CPU) - before
    assert 0.9 * block.nbytes < grown < 1.5 * block.nbytes


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1)
    assert free_bytes(torch.device("cuda")) == 3
    assert held_bytes(torch.device("cuda")) == 1


@pytest.mark.parametrize(("small", "inside"), [(True, 1), (False, 2)])
def test_threads_are_limited_for_small_models_and_come_back_after_an_error(small: bool, inside: int) -> None:
    def use() -> None:
        with few_threads(small=small):
            assert torch.get_num_threads() == inside
            raise ZeroDivisionError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            use()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
