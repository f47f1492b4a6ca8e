"""By which methods can a head's part in suppressing refusal be measured?

| method | what is measured | kind |
|---|---|---|
| `zero` | the logit with `hook_z` set to zero | causal |
| `mean` | with `hook_z` set to its mean over a reference set | causal |
| `resample` | with `hook_z` of another transcript, drawn from donors with a seed | causal |
| `scale` | with `hook_z` multiplied by a factor | causal |
| `patch` | with `hook_z` of a donor, such as a refused transcript: what restores refusal | causal |
| `patch-reverse` | donors with `hook_z` of the transcripts: what takes refusal away | causal |
| `greedy` | zero ablation of heads chosen one after another, on top of those before | causal |
| `attribution` | zero ablation to first order, by one backward pass | estimate |
| `direct` | minus the head's share of the logit at the final position | exact share |
| `cliff` | the head's mean share over the thinking minus that at the final position | exact share |

All give an effect on the refusal logit at the final position, a number a transcript, positive where the head suppresses
refusal. Knows nothing of ranks and intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from scipy.special import expit

from cliffscope.errors import DataError, EditError
from cliffscope.heads.attribution import attribute_heads
from cliffscope.heads.branches import Branch, Change, Job
from cliffscope.heads.donors import DonorTokens, choose_donors, donor_change, mean_change
from cliffscope.heads.edits import EditKind, Scope
from cliffscope.heads.shares import decompose_logit
from cliffscope.heads.sweep import Sweep, sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.transcript import TokenizedTranscript

CAUSAL = ("zero", "mean", "resample", "scale", "patch", "patch-reverse", "greedy")
"""Methods that edit the model."""
METHODS = (*CAUSAL, "attribution", "direct", "cliff")
"""All methods."""
NEED_DONORS = ("mean", "resample", "patch", "patch-reverse")
HALF = 0.5
"""Default factor of `scale`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """A method with its settings."""

    name: str = "zero"
    """One of `METHODS`."""
    scope: Scope = Scope.CLOSING
    """Where heads are edited; shares are read at the final position, whatever the scope."""
    factor: float = HALF
    """Of `scale`."""
    donors: DonorTokens | None = None
    """Reference set, or donors."""
    seed: int = 0
    """Of the draw of donors."""

    def __post_init__(self) -> None:
        """Refuses unknown methods, missing donors, and a scope that means nothing."""
        if self.name not in METHODS:
            raise EditError(f"method={self.name!r}: expected one of {', '.join(METHODS)}.")
        if self.name in NEED_DONORS and self.donors is None:
            raise DataError(
                f"method={self.name!r} needs donors=...: transcripts whose heads give the values, such as harmless "
                "ones for 'mean' and 'resample', refused ones for 'patch'."
            )
        if self.name in ("direct", "cliff") and self.scope is not Scope.CLOSING:
            raise EditError(
                f"method={self.name!r} edits nothing and reads shares at the final position; scope={str(self.scope)!r} "
                "has no meaning for it. Leave the scope out."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Effects:
    """What every branch does to every transcript."""

    clean: Float32[np.ndarray, " n"]
    """[n] unedited logits, of the donors where these are edited."""
    effects: Float32[np.ndarray, "n branch"]
    """[n, branch] positive where the branch suppresses refusal."""
    sign: int
    """1 where the effect is what the edit adds to the logit, -1 where it is what the edit takes."""
    gap: tuple[float, float] | None
    """Clean logits (refused minus not) and scores that the method itself sets against each other, if it does."""
    path: str
    """How it was computed."""


def measure_effects(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Sequence[TokenizedTranscript],
    branches: Sequence[Branch],
    method: Method,
    *,
    progress: Callable[[int], None] | None = None,
) -> Effects:
    """The effect of every branch on every transcript, by any method but `greedy`.

    Args:
        model: the model.
        probe: whose logit is read.
        transcripts: tokens.
        branches: sets of heads, each taken on its own.
        method: how.
        progress: called with the number of transcripts done.

    Returns:
        The effects.

    Raises:
        EditError: donors that do not fit, or a head that the model lacks.
        UnsupportedModelError: the logit of this model is no sum of shares.
    """
    if method.name in ("direct", "cliff"):
        return _share_effects(model, probe, transcripts, branches, method)
    if method.name == "patch-reverse":
        return _reverse_effects(model, probe, transcripts, branches, method, progress=progress)
    change = _change(model, transcripts, method)
    if method.name == "attribution":
        job = Job(model=model, probe=probe, branches=tuple(branches), change=change, scope=method.scope)
        return _of_sweep(attribute_heads(job, transcripts, progress=progress))
    return _of_sweep(
        sweep_branches(model, probe, transcripts, branches, change=change, scope=method.scope, progress=progress)
    )


def _of_sweep(swept: Sweep) -> Effects:
    return Effects(clean=swept.clean, effects=swept.effects, sign=1, gap=None, path=swept.path)


def _change(model: LensModel, transcripts: Sequence[TokenizedTranscript], method: Method) -> Change:
    if method.name == "scale":
        return Change(kind=EditKind.SCALE, factor=method.factor)
    if method.name == "mean" and method.donors is not None:
        return mean_change(model, method.donors.pool, transcripts, method.scope)
    if method.name in ("resample", "patch") and method.donors is not None:
        chosen = choose_donors(method.donors, transcripts, method.scope, seed=method.seed)
        return donor_change(model, chosen, method.scope, EditKind(method.name))
    return Change()


def _reverse_effects(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Sequence[TokenizedTranscript],
    branches: Sequence[Branch],
    method: Method,
    *,
    progress: Callable[[int], None] | None,
) -> Effects:
    """The transcripts' `hook_z` put into their donors."""
    if method.donors is None:
        raise DataError("method='patch-reverse' needs donors=...")
    donors = choose_donors(method.donors, transcripts, method.scope, seed=method.seed)
    change = donor_change(model, transcripts, method.scope, EditKind.PATCH)
    swept = sweep_branches(model, probe, donors, branches, change=change, scope=method.scope, progress=progress)
    own = sweep_branches(model, probe, transcripts, [], scope=method.scope).clean
    gap = float(swept.clean.mean() - own.mean())
    gap_score = float(expit(swept.clean).mean() - expit(own).mean())
    return Effects(clean=swept.clean, effects=-swept.effects, sign=-1, gap=(gap, gap_score), path=swept.path)


def _share_effects(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Sequence[TokenizedTranscript],
    branches: Sequence[Branch],
    method: Method,
) -> Effects:
    shares = decompose_logit(model, probe, transcripts)
    own = -shares.heads if method.name == "direct" else shares.plateau_heads - shares.heads
    if np.isnan(own).any():
        raise DataError(
            "method='cliff' sets the final position against the thinking, and a transcript has none. Take 'direct'."
        )
    effects = [own[:, [h.layer for h in branch], [h.head for h in branch]].sum(1) for branch in branches]
    return Effects(
        clean=shares.logits,
        effects=np.stack(effects, axis=1).astype(np.float32),
        sign=1,
        gap=None,
        path="shares",
    )
