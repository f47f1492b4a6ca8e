"""Which transcripts can be swept, and are the logits numbers?"""

from collections.abc import Sequence

import numpy as np

from cliffscope.errors import DataError
from cliffscope.heads.edits import Scope
from cliffscope.heads.methods import Effects, Method
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize_all


def usable_tokens(
    model: LensModel, transcripts: Transcripts, method: Method
) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    """Tokens of the transcripts that a method can measure, and what is left out.

    Args:
        model: the model.
        transcripts: any.
        method: edits outside the closing, and the shares of `cliff`, need a token in their span.

    Returns:
        Tokens, and omissions with their reasons.

    Raises:
        DataError: nothing is left.
    """
    found, omitted = tokenize_all(transcripts, model.tokenizer, model.template, max_length=model.shape.context)
    scope = Scope.THINKING if method.name == "cliff" else method.scope
    filled = [scope.positions(t).stop > scope.positions(t).start for t in found]
    tokens = [t for t, ok in zip(found, filled, strict=True) if ok]
    empty = [t for t, ok in zip(found, filled, strict=True) if not ok]
    omitted = (*omitted, *(Omission(stage="heads", reason=f"no token in scope {scope}", id=t.id) for t in empty))
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
