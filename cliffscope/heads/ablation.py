"""What does a head do, measured by taking its output away or replacing it by what heads usually write?

`zero`, `norm-preserving` and `scale` need nothing else; `mean` takes a reference set, and `resample` another transcript
of a pool.
"""

from dataclasses import dataclass

from cliffscope.heads.branches import Change
from cliffscope.heads.donors import donor_change, mean_change
from cliffscope.heads.edits import EditKind
from cliffscope.heads.methods import DonorNeed, EditMethod, Task

HALF = 0.5
"""Default factor of `scale`: half of the head is left, so that the estimate stays near the model's usual states."""


class Zero(EditMethod):
    """Zero ablation."""

    name = "zero"
    summary = "the logit with `hook_z` set to zero"

    def change(self, task: Task) -> Change:
        """The same for every task."""
        del task
        return Change()


class Mean(EditMethod):
    """Mean ablation."""

    name = "mean"
    summary = (
        "with `hook_z` set to its mean over a reference set: position by position at the closing, else of the span"
    )
    needs = DonorNeed.HARMLESS

    def change(self, task: Task) -> Change:
        """The reference set's means."""
        return mean_change(task.model, task.donor_tokens().pool, task.transcripts, task.scope)


class Resample(EditMethod):
    """Resample ablation."""

    name = "resample"
    summary = "with `hook_z` of another transcript, drawn from donors with the seed"
    needs = DonorNeed.HARMLESS

    def change(self, task: Task) -> Change:
        """What heads write in the donors."""
        return donor_change(task.model, task.drawn_donors(), task.scope, EditKind.RESAMPLE)


@dataclass(frozen=True, kw_only=True)
class Scale(EditMethod):
    """Scaling."""

    factor: float = HALF
    """What `hook_z` is multiplied by."""

    name = "scale"
    summary = "with `hook_z` multiplied by `factor`"

    @property
    def dose(self) -> float:
        """Share of a head's output that is taken away."""
        return 1.0 - self.factor

    def with_factor(self, factor: float) -> "Scale":
        """Scaling by another factor."""
        return Scale(factor=factor)

    def change(self, task: Task) -> Change:
        """The same for every task."""
        del task
        return Change(kind=EditKind.SCALE, factor=self.factor)


class NormPreserving(EditMethod):
    """Zero ablation that leaves the layer its norm, as in the code of arXiv 2510.06036."""

    name = "norm-preserving"
    summary = (
        "as `zero`, the layer's other heads scaled, position by position, until `hook_z` of the layer has its old norm"
    )

    def change(self, task: Task) -> Change:
        """The same for every task."""
        del task
        return Change(kind=EditKind.NORM_PRESERVING, preserve_norm=True)
