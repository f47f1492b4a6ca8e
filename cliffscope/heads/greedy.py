"""Which heads suppress refusal together?

Backup heads hide each other: zeroing one of two that do the same changes nothing. So heads are chosen one after
another, each by what zeroing it adds to zeroing those chosen before.

1. Every head is zeroed on its own; the one with the largest mean effect is chosen.
2. Every other head is zeroed together with the chosen ones; the one that adds most is chosen; and so on.
3. The effect of a chosen head is what it added when it was chosen, that of the others what they add in the last step.

Exact, at the cost of one sweep a chosen head. A set of heads is measured as by `zero`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from cliffscope.heads.branches import Branch
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.methods import Effects, Method, Progress, RankedEffects, Task
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.transcript import TokenizedTranscript


class Greedy(Method):
    """Zero ablation of heads chosen one after another."""

    name = "greedy"
    summary = "zero ablation of heads chosen one after another, on top of those before: backup heads hide each other"
    each_alone = False

    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """Every branch zeroed; see `Method.measure`."""
        return Effects.of_sweep(
            sweep_branches(task.model, task.readout, task.transcripts, branches, scope=task.scope, progress=progress)
        )

    def rank(
        self,
        task: Task,
        controls: Sequence[TokenizedTranscript],
        heads: Sequence[HeadRef],
        *,
        count: int,
        progress: Progress | None = None,
    ) -> RankedEffects:
        """The first `count` heads are chosen greedily; `progress` counts them. See `Method.rank`."""
        n = len(task.transcripts)
        choice = choose_greedily(
            task.model,
            task.readout,
            [*task.transcripts, *controls],
            heads,
            count=count,
            choose_on=n,
            scope=task.scope,
            progress=progress,
        )
        parts = [
            Effects(clean=choice.clean[part], effects=choice.effects[part], path=choice.path)
            for part in (slice(0, n), slice(n, None))
        ]
        return RankedEffects(effects=parts[0], controls=parts[1] if controls else None, order=choice.order)


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
    readout: Readout,
    transcripts: Sequence[TokenizedTranscript],
    heads: Sequence[HeadRef],
    *,
    count: int,
    choose_on: int,
    scope: Scope = Scope.CLOSING,
    progress: Progress | None = None,
) -> GreedyChoice:
    """Chooses heads one after another by their joint effect.

    Args:
        model: the model.
        readout: whose logit is read.
        transcripts: tokens; those after the first `choose_on` are measured and do not choose.
        heads: candidates.
        count: heads to choose, at most the number of candidates that the readout sees.
        choose_on: transcripts, from the first one, whose mean effect decides.
        scope: where heads are zeroed.
        progress: called with the number of heads chosen.

    Returns:
        The choice.
    """
    left = [i for i, ref in enumerate(heads) if ref.layer <= readout.layer]
    selected: list[int] = []
    effects = np.zeros((len(transcripts), len(heads)), np.float32)
    clean = base = np.zeros(len(transcripts), np.float32)
    path = "packed"
    for step in range(min(count, len(left))):
        branches = [tuple(heads[j] for j in (*selected, i)) for i in left]
        swept = sweep_branches(model, readout, transcripts, branches, scope=scope)
        if not step:
            clean = base = swept.clean
        effects[:, left] = swept.edited - base[:, None]
        best = int(effects[:choose_on, left].mean(0).argmax())
        base, path = swept.edited[:, best], swept.path
        selected.append(left.pop(best))
        if progress is not None:
            progress(len(selected))
    others = [i for i in range(len(heads)) if i not in selected]
    others.sort(key=lambda i: -float(effects[:choose_on, i].mean()))
    return GreedyChoice(order=np.array([*selected, *others], dtype=np.int64), clean=clean, effects=effects, path=path)
