from importlib.metadata import version

import pytest
import torch

from cliffscope.study import doctor
from cliffscope.study.doctor import Finding, examine


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {f.what: f for f in findings}


def test_versions_are_those_that_are_installed() -> None:
    found = by_name(examine())
    assert found["torch"].found == version("torch")
    assert found["transformer-lens"].found == version("transformer-lens")
    assert found["python"].ok


def test_a_package_that_is_not_there_is_a_fault_and_an_extra_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "EXTRAS", {"odd": (("no_such_module",), "odd things")})
    found = by_name(examine())
    assert not found["no-such-package"].ok
    assert found["no-such-package"].advice == "pip install no-such-package"
    assert found["extra odd"].ok
    assert "odd things" in found["extra odd"].advice


def test_too_little_memory_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1 << 20)
    memory = by_name(examine())["memory"]
    assert (memory.ok, memory.found) == (False, "0.0 GiB free")
    assert "smaller model" in memory.advice


def test_a_gpu_is_named_with_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 80 << 30)
    assert by_name(examine())["device"].found == "GPU 0, GPU 1, 80.0 GiB free on the first"
