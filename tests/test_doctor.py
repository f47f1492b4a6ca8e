import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import cliffscope
from cliffscope.study import doctor
from cliffscope.study.doctor import Finding, examine

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def test_versions_are_those_that_are_installed() -> None:
    findings = by_name(examine())
    assert findings["torch"].value == version("torch")
    assert findings["transformer-lens"].value == version("transformer-lens")
    for name in ("scipy", "scikit-learn", "filelock", "platformdirs", "psutil"):
        assert findings[name].value == version(name)
    assert findings["python"].ok
    assert findings["cliffscope"].value == cliffscope.__version__


def test_every_package_that_is_required_is_examined() -> None:
    assert sorted(doctor.PACKAGES) == sorted(Requirement(line).name for line in PROJECT["dependencies"])


def test_every_extra_for_users_is_examined_with_what_it_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"dev", "docs", "figures"}
    for name, (modules, _) in doctor.EXTRAS.items():
        packages = {Requirement(line).name.replace("-", "_") for line in extras[name]}
        assert set(modules) == packages, name


@pytest.mark.parametrize(
    ("system", "advice"),
    [("Linux", ""), ("Darwin", "Expected to work"), ("Windows", "Not tested"), ("Plan9", "Not tested")],
)
def test_the_system_is_named_with_how_well_it_is_tested(
    monkeypatch: pytest.MonkeyPatch, system: str, advice: str
) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    finding = by_name(examine())["system"]
    assert finding.ok
    assert finding.value.startswith(f"{system} ")
    assert finding.advice.startswith(advice)
    assert bool(finding.advice) == bool(advice)


def test_a_package_that_is_not_there_is_a_fault_and_an_extra_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "EXTRAS", {"odd": (("no_such_module",), "odd things")})
    findings = by_name(examine())
    assert not findings["no-such-package"].ok
    assert findings["no-such-package"].advice == "pip install no-such-package"
    assert findings["extra odd"].ok
    assert "odd things" in findings["extra odd"].advice


def test_too_little_memory_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1 << 20)
    memory = by_name(examine())["memory"]
    assert (memory.ok, memory.value) == (False, "0.0 GiB free")
    assert "smaller model" in memory.advice


def test_a_gpu_is_named_with_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 80 << 30)
    assert by_name(examine())["device"].value == "GPU 0, GPU 1, 80.0 GiB free on the first"
