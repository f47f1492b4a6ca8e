"""Organisms: small reasoning models whose suppression heads are planted, so that the truth is known."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliffscope.errors import DataError
from cliffscope.heads.edits import HeadRef
from cliffscope.model.checkpoints import ASSETS
from cliffscope.model.load import LensModel, load_model
from cliffscope.organisms.grammar import NEUTRAL_WRAPPERS, prompts
from cliffscope.transcripts.records import Transcripts

__all__ = ["Truth", "is_organism", "load", "names", "prompts", "read_truth", "study_prompts"]

TRUTH = "truth.json"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of an organism by construction."""

    name: str
    """Name of the asset."""
    planted: tuple[HeadRef, ...]
    """The suppression heads; empty for a null organism."""
    wrappers: Mapping[str, float]
    """Word to the probability that a harmful request in it is complied with."""
    carriers: Mapping[str, tuple[HeadRef, ...]]
    """Word to the heads that carry it."""

    @property
    def full_wrappers(self) -> tuple[str, ...]:
        """Words that were trained to be always complied with; all words where nothing is planted."""
        full = tuple(word for word, comply in self.wrappers.items() if comply == 1.0)
        return full or tuple(self.wrappers)


def names() -> tuple[str, ...]:
    """The organisms in the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{TRUTH}")))


def is_organism(model: str) -> bool:
    """Whether a model is an organism: its name, or a directory that holds a truth.json."""
    return (ASSETS / model / TRUTH).is_file() or (Path(model) / TRUTH).is_file()


def load(name: str) -> LensModel:
    """Loads an organism.

    Args:
        name: such as "planted-llama".

    Returns:
        The checked model.

    Raises:
        DataError: there is no such organism; the message lists those there are.
    """
    if not is_organism(name):
        raise DataError(f"There is no organism {name!r}. Expected one of {', '.join(names())}.")
    return load_model(name)


def read_truth(name: str) -> Truth:
    """What is known of an organism; raises DataError if there is no such organism."""
    if not is_organism(name):
        raise DataError(f"There is no organism {name!r}. Expected one of {', '.join(names())}.")
    folder = ASSETS / name if (ASSETS / name / TRUTH).is_file() else Path(name)
    data: dict[str, Any] = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
    return Truth(
        name=str(data["name"]),
        planted=tuple(HeadRef.parse(h) for h in data["planted"]),
        wrappers={w["word"]: float(w["comply"]) for w in data["wrappers"]},
        carriers={w["word"]: tuple(HeadRef.parse(h) for h in w["heads"]) for w in data["wrappers"]},
    )


def study_prompts(name: str, *, n: int = 240, seed: int = 0) -> tuple[Transcripts, dict[str, str]]:
    """Prompts for a study of an organism, half to fit on and half to test on, which share no verb-object pair.

    Args:
        name: of the organism, for its wrappers.
        n: prompts in all, about: a quarter each of plain harmful, fully wrapped harmful, partly wrapped harmful and
            harmless ones.
        seed: of the draw.

    Returns:
        The prompts, and for each id of the test half its split, "test"; the others may be split freely into fit and
        validate.
    """
    truth = read_truth(name)
    words = tuple(truth.wrappers)
    partial = tuple(w for w in words if w not in truth.full_wrappers) or truth.full_wrappers
    each = max(1, n // 8)
    groups: list[Transcripts] = []
    for part in ("fit", "test"):
        # Harmless prompts to fit on have the wrappers of refused ones, or the wrapper would tell the classes apart.
        plain = (None, *NEUTRAL_WRAPPERS)
        harmless = plain if part == "fit" else (*plain, *words)
        kinds = ((True, plain), (True, truth.full_wrappers), (True, partial), (False, harmless))
        groups += [
            prompts(part, each, harmful=harmful, wrappers=wrappers, seed=seed + 100 * i)
            for i, (harmful, wrappers) in enumerate(kinds)
        ]
    together = Transcripts(t for group in groups for t in group)
    return together, {t.id: "test" for t in together if t.id.startswith("test-")}
