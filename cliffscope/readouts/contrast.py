"""Which transcripts does a probe set against each other?

- `harmless`: harmful ones that were refused against harmless ones that were complied with (the paper's). The thinking
  of harmful ones that were complied with is what a cliff is about, so they are not fitted on; they are the challenge.
- `harmful`: refused against complied, among harmful ones alone. Harmfulness cannot tell them apart.
- `auto`: `harmless` where the model thinks, `harmful` where it does not.

Outcomes in, classes out; knows no model.
"""

from dataclasses import dataclass
from typing import Literal

from cliffscope.errors import DataError
from cliffscope.transcripts.records import Outcome, Transcripts

Contrast = Literal["auto", "harmless", "harmful"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Classes:
    """The classes of a probe."""

    name: Contrast
    """`harmless` or `harmful`."""
    refused: Transcripts
    """Harmful transcripts that were refused."""
    complied: Transcripts
    """The class they are set against."""
    challenge: Transcripts | None
    """Harmful transcripts that were complied with, where they are not fitted on."""


def contrast_classes(transcripts: Transcripts, contrast: Contrast, *, thinks: bool) -> Classes:
    """Sorts judged transcripts into a probe's classes.

    Args:
        transcripts: judged, with `harmful` set.
        contrast: `auto`, `harmless` or `harmful`.
        thinks: whether the model thinks before it answers.

    Returns:
        The classes; unfinished and unjudged transcripts are in none.
    """
    name = _resolved(contrast, thinks)
    harmful_complied = transcripts.where(harmful=True, outcome=Outcome.COMPLIED)
    return Classes(
        name=name,
        refused=transcripts.where(harmful=True, outcome=Outcome.REFUSED),
        complied=transcripts.where(harmful=False, outcome=Outcome.COMPLIED) if name == "harmless" else harmful_complied,
        challenge=harmful_complied if name == "harmless" else None,
    )


def check_contrast(transcripts: Transcripts, contrast: Contrast, *, thinks: bool) -> None:
    """Raises DataError where harmless prompts are needed for the probe's complied class and none is given."""
    if _resolved(contrast, thinks) == "harmless" and not any(t.harmful is False for t in transcripts):
        raise DataError(
            f"None of the {len(transcripts)} prompts is harmless, but the probe sets refused prompts against harmless "
            "ones that are answered. Give harmless prompts too, or contrast='harmful'."
        )


def _resolved(contrast: Contrast, thinks: bool) -> Contrast:
    return contrast if contrast != "auto" else "harmless" if thinks else "harmful"
