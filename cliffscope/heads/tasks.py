"""What is measured: which method, which transcripts can it measure, and are the logits numbers?"""

from collections.abc import Sequence

import numpy as np

from cliffscope.errors import DataError
from cliffscope.heads.catalogue import METHODS
from cliffscope.heads.donors import Donors, DonorTokens
from cliffscope.heads.edits import Scope
from cliffscope.heads.methods import Effects, Method, Task
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript


def choose_method(method: Method | str, factor: float | None = None) -> Method:
    """The method that is meant.

    Args:
        method: an object, or what `METHODS` finds by text.
        factor: of a method that multiplies by one; None keeps the method's own.

    Raises:
        DataError: there is no such method.
        EditError: the method has no factor.
    """
    selected = METHODS.get(method)
    return selected if factor is None else selected.with_factor(factor)


def prepare_task(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    method: Method,
    *,
    scope: Scope,
    donors: Donors | None = None,
    seed: int = 0,
) -> tuple[Task, tuple[Omission, ...]]:
    """Tokenizes what a method measures, and checks its settings.

    Args:
        model: the model.
        readout: whose logit is read.
        transcripts: those that are measured.
        method: how.
        scope: where heads are edited.
        donors: transcripts that the method takes values from; None where it takes none.
        seed: of whatever is drawn.

    Returns:
        The task, and the transcripts that were left out, with reasons.

    Raises:
        DataError: no transcript can be used, or donors are missing, not needed or not usable.
        EditError: the scope means nothing to the method.
    """
    givers = None if donors is None else DonorTokens.read(model, donors)
    method.check(scope, givers)
    tokens, omitted = usable_tokens(model, transcripts, method, scope)
    return Task(model=model, readout=readout, transcripts=tokens, scope=scope, donors=givers, seed=seed), omitted


def usable_tokens(
    model: LensModel, transcripts: Transcripts, method: Method, scope: Scope
) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    """Tokens of the transcripts that a method can measure, and what is left out.

    Args:
        model: the model.
        transcripts: any.
        method: says in which span it needs a token.
        scope: where heads are edited.

    Returns:
        Tokens, and omissions with their reasons.

    Raises:
        DataError: nothing is left.
    """
    every, omitted = model.tokenize_all(transcripts)
    span = method.span(scope)
    filled = [span.positions(t).stop > span.positions(t).start for t in every]
    tokens = [t for t, ok in zip(every, filled, strict=True) if ok]
    empty = [t for t, ok in zip(every, filled, strict=True) if not ok]
    omitted = (*omitted, *(Omission(stage="heads", reason=f"no token in scope {span}", id=t.id) for t in empty))
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise DataError(f"None of {len(transcripts)} transcripts can be used: {why}")
    return tokens, omitted


def check_finite(tokens: Sequence[TokenizedTranscript], effects: Effects) -> None:
    """Raises DataError, naming the transcript, where a logit is NaN or infinite."""
    finite = np.isfinite(effects.clean) & np.isfinite(effects.effects).all(axis=1)
    if not finite.all():
        bad = tokens[int(np.flatnonzero(~finite)[0])]
        raise DataError(
            f"The refusal logit of transcript {bad.id!r} is not finite. Load the model in another dtype, such as "
            "float32."
        )
