"""What restores refusal, and what takes it away, when heads are given what they write in another transcript?

`patch` puts a donor's `hook_z`, such as a refused transcript's, into the transcripts; `patch-reverse` puts that of the
transcripts into their donors. Both set refused transcripts against suppressed ones head by head.
"""

from collections.abc import Sequence

from scipy.special import expit

from cliffscope.heads.branches import Branch, Change
from cliffscope.heads.donors import donor_change
from cliffscope.heads.edits import EditKind
from cliffscope.heads.methods import DonorNeed, EditMethod, Effects, Method, Progress, Task
from cliffscope.heads.sweep import sweep_branches


class Patch(EditMethod):
    """Patching from donors."""

    name = "patch"
    summary = "with `hook_z` of a donor, such as a refused transcript: what restores refusal"
    needs = DonorNeed.REFUSED

    def change(self, task: Task) -> Change:
        """What heads write in the donors."""
        return donor_change(task.model, task.drawn_donors(), task.scope, EditKind.PATCH)


class PatchReverse(Method):
    """Patching into donors."""

    name = "patch-reverse"
    summary = "donors with `hook_z` of the transcripts: what takes refusal away"
    needs = DonorNeed.REFUSED

    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """What the donors' logit loses; the gap is that between donors and transcripts. See `Method.measure`."""
        model, readout, scope = task.model, task.readout, task.scope
        change = donor_change(model, task.transcripts, scope, EditKind.PATCH)
        swept = sweep_branches(
            model, readout, task.drawn_donors(), branches, change=change, scope=scope, progress=progress
        )
        suppressed = sweep_branches(model, readout, task.transcripts, [], scope=scope).clean
        gap = float(swept.clean.mean() - suppressed.mean())
        gap_score = float(expit(swept.clean).mean() - expit(suppressed).mean())
        return Effects(clean=swept.clean, effects=-swept.effects, path=swept.path, sign=-1, gap=(gap, gap_score))
