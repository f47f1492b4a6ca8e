"""Which heads suppress refusal together?

Backup heads hide each other: zeroing one of two that do the same changes nothing. So heads are chosen one after
another, each by what zeroing it adds to zeroing those chosen before.

1. Every head is zeroed on its own; the one with the largest mean effect is chosen.
2. Every other head is zeroed together with the chosen ones; the one that adds most is chosen; and so on.
3. The effect of a chosen head is what it added when it was chosen, that of the others what they add in the last step.

Exact, at the cost of one sweep a chosen head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.transcript import TokenizedTranscript


@dataclass(frozen=True, eq=False, kw_only=True)
class GreedyChoice:
    """Heads in the order in which they were chosen."""

    order: Int64[np.ndarray, " head"]
    """[head] indices: the chosen ones in their order, then the others by what they add in the last step."""
    clean: Float32[np.ndarray, " n"]
    """[n] unedited logits."""
    effects: Float32[np.ndarray, "n head"]
    """[n, head] what each head adds."""
    path: str
    """How the sweeps were computed."""


def choose_greedily(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Sequence[TokenizedTranscript],
    heads: Sequence[HeadRef],
    *,
    count: int,
    choose_on: int,
    scope: Scope = Scope.CLOSING,
    progress: Callable[[int], None] | None = None,
) -> GreedyChoice:
    """Chooses heads one after another by their joint effect.

    Args:
        model: the model.
        probe: whose logit is read.
        transcripts: tokens; those after the first `choose_on` are measured and do not choose.
        heads: candidates.
        count: heads to choose, at most the number of candidates that the probe sees.
        choose_on: transcripts, from the first one, whose mean effect decides.
        scope: where heads are zeroed.
        progress: called with the number of heads chosen.

    Returns:
        The choice.
    """
    left = [i for i, ref in enumerate(heads) if ref.layer <= probe.layer]
    chosen: list[int] = []
    effects = np.zeros((len(transcripts), len(heads)), np.float32)
    clean = base = np.zeros(len(transcripts), np.float32)
    path = "packed"
    for step in range(min(count, len(left))):
        branches = [tuple(heads[j] for j in (*chosen, i)) for i in left]
        swept = sweep_branches(model, probe, transcripts, branches, scope=scope)
        if not step:
            clean = base = swept.clean
        effects[:, left] = swept.edited - base[:, None]
        best = int(effects[:choose_on, left].mean(0).argmax())
        base, path = swept.edited[:, best], swept.path
        chosen.append(left.pop(best))
        if progress is not None:
            progress(len(chosen))
    others = [i for i in range(len(heads)) if i not in chosen]
    others.sort(key=lambda i: -float(effects[:choose_on, i].mean()))
    return GreedyChoice(order=np.array([*chosen, *others], dtype=np.int64), clean=clean, effects=effects, path=path)
