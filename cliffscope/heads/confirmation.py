"""Which of the first heads are suppression heads, on transcripts that they were not chosen on?

1. Candidates are taken in the order of their ranking. Each is edited together with those confirmed before it, and its
   effect is what it adds to them: a head that only passes on what an earlier head writes, or does the same, adds
   nothing.
2. p: the exact sign test over the transcripts whose answer the added effect could turn (statistics.py); multiplied by
   the number of candidates (Bonferroni). Confirmed at 5%.
3. Each candidate is measured alone too, on complied, refused and harmless test transcripts: interval and kind
   (selective or broad).

Needs nothing but a readout and a method; knows no splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32

from cliffscope.heads.donors import Donors
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.methods import Effects, Method, Task
from cliffscope.heads.statistics import ALPHA, HeadKind, decisive, decisive_p, kinds_of
from cliffscope.heads.tasks import check_finite, choose_method, prepare_task, usable_tokens
from cliffscope.model.load import LensModel
from cliffscope.notebook import Shown
from cliffscope.readouts.readout import Readout
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Transcripts


@dataclass(frozen=True, eq=False, kw_only=True)
class Confirmation(Shown):
    """Candidate heads, measured again one by one."""

    heads: tuple[HeadRef, ...]
    """Candidates in the order of their ranking."""
    effects: Float32[np.ndarray, "n head"]
    """[n, head] of each alone, logit."""
    added: Float32[np.ndarray, "n head"]
    """[n, head] what each adds to the heads confirmed before it, logit."""
    p: Float[np.ndarray, " head"]
    """[head] of the added effects, adjusted for the number of candidates; NaN where they could turn no answer."""
    decisive: tuple[int, ...]
    """Transcripts whose answer the added effect could turn."""
    kinds: tuple[HeadKind, ...]
    """Selective, broad, or unknown where too few other transcripts were given."""
    readout: str
    """What was read."""
    seed: int
    """Of the intervals."""

    @property
    def confirmed(self) -> tuple[HeadRef, ...]:
        """Heads that change the answer beyond those before them, best first."""
        return tuple(head for head, p in zip(self.heads, self.p, strict=True) if p <= ALPHA)

    def kind_of(self, head: HeadRef) -> HeadKind:
        """The kind of one candidate."""
        return self.kinds[self.heads.index(head)]

    def to_frame(self) -> pd.DataFrame:
        """One row a candidate.

        Returns:
            layer, head, effect (alone, logit), ci_low, ci_high, added (beyond those confirmed before), decisive, p
            (adjusted), confirmed, kind, n.
        """
        low, high = bootstrap_mean(self.effects, seed=self.seed) if self.heads else (np.zeros(0), np.zeros(0))
        return pd.DataFrame(
            {
                "layer": [head.layer for head in self.heads],
                "head": [head.head for head in self.heads],
                "effect": self.effects.mean(0),
                "ci_low": low,
                "ci_high": high,
                "added": self.added.mean(0),
                "decisive": list(self.decisive),
                "p": self.p,
                "confirmed": self.p <= ALPHA,
                "kind": [str(kind) for kind in self.kinds],
                "n": len(self.effects),
            }
        )

    def small_table(self) -> pd.DataFrame:
        """The candidates: effect alone and added, p, confirmed, kind."""
        columns = ["layer", "head", "effect", "ci_low", "ci_high", "added", "p", "confirmed", "kind"]
        return self.to_frame()[columns]

    def __repr__(self) -> str:
        """One line: the confirmed heads, their kinds, and n."""
        named = ", ".join(f"{head} ({self.kind_of(head)})" for head in self.confirmed) or "none"
        return f"Confirmation({named}; {len(self.confirmed)} of {len(self.heads)} candidates, n={len(self.effects)})"


def confirm_heads(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    candidates: Sequence[HeadRef],
    *,
    refused: Transcripts | None = None,
    harmless: Transcripts | None = None,
    method: Method | str = "zero",
    scope: Scope | str = Scope.CLOSING,
    donors: Donors | None = None,
    seed: int = 0,
) -> Confirmation:
    """Measures candidate heads again, one by one, on transcripts that they were not chosen on.

    Args:
        model: the model.
        readout: fitted on this model.
        transcripts: harmful ones that were complied with, of the test split.
        candidates: heads in the order of their ranking, such as `HeadRanking.significant()`.
        refused: harmful ones that were refused, of the test split.
        harmless: harmless ones, of the test split.
        method: as in `rank_heads`; heads chosen by a joint method are measured by what it edits with.
        scope: as in `rank_heads`.
        donors: as in `rank_heads`.
        seed: of donors and intervals.

    Returns:
        What each candidate does alone and beyond those confirmed before it.

    Raises:
        DataError: no transcript can be used, or logits are not finite.
        ProbeError: the readout does not fit the model.
    """
    readout.check_model(model)
    how, where, heads = choose_method(method), Scope.parse(scope), tuple(candidates)
    task, _ = prepare_task(model, readout, transcripts, how, scope=where, donors=donors, seed=seed)
    alone = _measure_alone(task, how, heads)
    chain = _add_one_by_one(task, how, heads, alone)
    others = []
    for group in (refused, harmless):
        tokens = usable_tokens(model, group, how, where)[0] if group else []
        others.append(_measure_alone(replace(task, transcripts=tokens), how, heads).effects)
    return Confirmation(
        heads=heads,
        effects=alone.effects,
        added=chain.added,
        p=chain.p,
        decisive=chain.decisive,
        kinds=tuple(kinds_of(alone.effects, *others)),
        readout=readout.name,
        seed=seed,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Chain:
    """What each candidate adds to those confirmed before it."""

    added: Float32[np.ndarray, "n head"]
    p: Float[np.ndarray, " head"]
    decisive: tuple[int, ...]


def _add_one_by_one(task: Task, how: Method, heads: tuple[HeadRef, ...], alone: Effects) -> _Chain:
    passed: list[HeadRef] = []
    base = np.zeros(len(task.transcripts), np.float32)
    added, p, counts = np.zeros_like(alone.effects), np.ones(len(heads)), list[int]()
    for i, head in enumerate(heads):
        joint = how.measure(task, [(*passed, head)]).effects[:, 0] if passed else alone.effects[:, i]
        added[:, i] = joint - base
        state, column = alone.clean + alone.sign * base, added[:, i : i + 1]
        p[i] = np.minimum(1.0, len(heads) * decisive_p(state, column)[0])
        counts.append(int(decisive(state, column)[0][0]))
        if p[i] <= ALPHA:
            passed.append(head)
            base = joint
    return _Chain(added=added, p=p, decisive=tuple(counts))


def _measure_alone(task: Task, how: Method, heads: tuple[HeadRef, ...]) -> Effects:
    """The effect of each head on its own; of no transcripts, or no heads, an empty table."""
    n = len(task.transcripts)
    if not n or not heads:
        return Effects(clean=np.zeros(n, np.float32), effects=np.zeros((n, len(heads)), np.float32), path="none")
    effects = how.measure(task, [(head,) for head in heads])
    check_finite(task.transcripts, effects)
    return effects
