"""Which readouts are there, by name, and how is each fitted?

A readout is fitted on transcripts that ended in a refusal against others that ended in an answer. What is registered is
the function that fits it, since a readout belongs to one model; `answer` and `probe` are the package's own.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from cliffscope.errors import DataError
from cliffscope.model.load import LensModel
from cliffscope.readouts.answer import fit_answer_readout
from cliffscope.readouts.probe import fit_probe
from cliffscope.readouts.readout import Readout
from cliffscope.registry import Registry
from cliffscope.transcripts.records import Transcripts


@runtime_checkable
class FitReadout(Protocol):
    """Fits a readout from a model, refused and complied transcripts, the split of each id, and a seed."""

    def __call__(
        self, model: LensModel, refused: Transcripts, complied: Transcripts, splits: Mapping[str, str], seed: int, /
    ) -> Readout:
        """Returns the readout, or raises ProbeError where it cannot be fitted."""
        ...


def _fit_answer(
    model: LensModel, refused: Transcripts, complied: Transcripts, splits: Mapping[str, str], seed: int
) -> Readout:
    return fit_answer_readout(model, refused, complied, splits=splits, seed=seed)


def _fit_probe(
    model: LensModel, refused: Transcripts, complied: Transcripts, splits: Mapping[str, str], seed: int
) -> Readout:
    return fit_probe(model, refused, complied, splits=splits, seed=seed)


READOUTS: Registry[FitReadout] = Registry(kind="readout", group="cliffscope.readouts", expected=FitReadout)
"""Functions that fit a readout, by name."""
READOUTS.register("answer", _fit_answer)
READOUTS.register("probe", _fit_probe)


def fit_readout(
    choice: FitReadout | str,
    model: LensModel,
    refused: Transcripts,
    complied: Transcripts,
    *,
    splits: Mapping[str, str],
    seed: int = 0,
) -> Readout:
    """Fits the readout that a choice means.

    Args:
        choice: `answer`, `probe`, `package.module:name`, or a function.
        model: the model.
        refused: transcripts that end in a refusal.
        complied: transcripts that end in an answer.
        splits: transcript id to "fit", "validate" or "test".
        seed: of whatever is drawn.

    Returns:
        The readout.

    Raises:
        DataError: there is no such readout, or the function returned something else.
        ProbeError: it cannot be fitted.
    """
    readout = READOUTS.get(choice)(model, refused, complied, splits, seed)
    if not isinstance(readout, Readout):
        raise DataError(
            f"The readout {choice!r} gave a {type(readout).__name__}. Expected an instance of "
            "cliffscope.readouts.readout.Readout."
        )
    return readout
