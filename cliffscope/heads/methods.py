"""What is a method of measuring a head's part in suppressing refusal?

A method is an object. It says what it is called, what it needs and whether it edits the model, and it measures: for
every transcript and every set of heads an effect on the readout's logit, positive where the set suppresses refusal.
Nothing outside a method asks for its name. The package's own are in catalogue.py; one of your own is a subclass:

    class Flip(EditMethod):
        name = "flip"
        summary = "the logit with the sign of `hook_z` turned"

        def change(self, task):
            return Change(kind=self.name, factor=-1.0)

`rank_heads(..., method=Flip())` takes it, as does an entry point of the group `cliffscope.methods`. Knows nothing of
ranks and intervals.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from jaxtyping import Float32, Int64

from cliffscope.errors import DataError, EditError
from cliffscope.heads.branches import Branch, Change
from cliffscope.heads.donors import DonorTokens, choose_donors
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.sweep import Sweep, sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import Readout
from cliffscope.transcripts.transcript import TokenizedTranscript

Progress = Callable[[int], None]


class DonorNeed(StrEnum):
    """Whether a method takes values from other transcripts, and from which ones where none are given."""

    NONE = ""
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What a method measures."""

    model: LensModel
    """The model."""
    readout: Readout
    """Whose logit is read."""
    transcripts: Sequence[TokenizedTranscript]
    """Tokens; answers are ignored."""
    scope: Scope = Scope.CLOSING
    """Where heads are edited."""
    donors: DonorTokens | None = None
    """Reference set or donors, where the method needs them."""
    seed: int = 0
    """Of whatever is drawn."""

    def drawn_donors(self) -> list[TokenizedTranscript]:
        """The donor of each transcript; raises EditError where one has none that fits."""
        return choose_donors(self.donor_tokens(), self.transcripts, self.scope, seed=self.seed)

    def donor_tokens(self) -> DonorTokens:
        """The donors; raises DataError where there are none."""
        if self.donors is None:
            raise DataError("The method takes values from other transcripts, and the task has no donors.")
        return self.donors


@dataclass(frozen=True, eq=False, kw_only=True)
class Effects:
    """What every branch does to every transcript."""

    clean: Float32[np.ndarray, " n"]
    """[n] unedited logits, of the donors where these are edited."""
    effects: Float32[np.ndarray, "n branch"]
    """[n, branch] positive where the branch suppresses refusal."""
    path: str
    """How it was computed."""
    sign: int = 1
    """1 where the effect is what the edit adds to the logit, -1 where it is what the edit takes."""
    gap: tuple[float, float] | None = None
    """Clean logits (refused minus not) and scores that the method itself sets against each other, if it does."""

    @classmethod
    def of_sweep(cls, sweep: Sweep) -> "Effects":
        """Of a sweep: what each branch adds to the logit."""
        return cls(clean=sweep.clean, effects=sweep.effects, path=sweep.path)


@dataclass(frozen=True, eq=False, kw_only=True)
class RankedEffects:
    """The effects of single heads, and the heads in order."""

    effects: Effects
    """On the transcripts of the task; a branch is a head."""
    controls: Effects | None
    """On the control transcripts; None without any."""
    order: Int64[np.ndarray, " head"]
    """[head] indices, best first."""


class Method(ABC):
    """How a head's part in suppressing refusal is measured."""

    name: str
    """On the command line, in tables and figures."""
    summary: str
    """What is measured, in a line; the tables of the documentation are made of it."""
    causal: bool = True
    """Whether the model is edited; else the effect is an estimate or a share."""
    needs: DonorNeed = DonorNeed.NONE
    """Whether it takes values from other transcripts."""
    each_alone: bool = True
    """Whether a head's effect depends on that head alone, so that halves of the transcripts can be compared."""

    @property
    def dose(self) -> float:
        """Share of a head's output that it takes away."""
        return 1.0

    def check(self, scope: Scope, donors: DonorTokens | None) -> None:
        """Raises DataError or EditError where the method cannot run with these settings."""
        del scope
        if self.needs and donors is None:
            raise DataError(
                f"method={self.name!r} needs donors=...: transcripts whose heads give the values, such as "
                f"{self.needs} ones."
            )
        if not self.needs and donors is not None:
            raise DataError(f"method={self.name!r} takes no values from other transcripts. Leave donors out.")

    def span(self, scope: Scope) -> Scope:
        """The span in which a transcript needs a token to be measured, for a scope of edits."""
        return scope

    def with_factor(self, factor: float) -> "Method":
        """The same method with another factor; raises EditError where it has none."""
        raise EditError(f"method={self.name!r} takes no factor={factor}. Leave it out, or take method='scale'.")

    @abstractmethod
    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """The effect of every branch on every transcript.

        Args:
            task: what is measured.
            branches: sets of heads, each taken on its own.
            progress: called with the number of transcripts done.

        Returns:
            The effects.

        Raises:
            EditError: donors that do not fit, or a head that the model lacks.
            ProbeError: the method needs a linear readout and this one is not.
            UnsupportedModelError: the method does not hold on this architecture.
        """

    def rank(
        self,
        task: Task,
        controls: Sequence[TokenizedTranscript],
        heads: Sequence[HeadRef],
        *,
        count: int,
        progress: Progress | None = None,
    ) -> RankedEffects:
        """Measures single heads and puts them in order.

        Args:
            task: what is measured; its transcripts decide the order.
            controls: transcripts that are measured too and do not decide.
            heads: candidates.
            count: how many are wanted at the top; a method that measures each head alone ranks all.
            progress: called with the number of transcripts or heads done.

        Returns:
            The effects, by default of each head on its own, the largest mean first.
        """
        del count
        branches = [(head,) for head in heads]
        effects = self.measure(task, branches, progress=progress)
        return RankedEffects(
            effects=effects,
            controls=self.measure(replace(task, transcripts=controls), branches) if controls else None,
            order=np.argsort(-effects.effects.mean(0), kind="stable").astype(np.int64),
        )


class EditMethod(Method):
    """A method that edits heads and reads what the logit becomes."""

    @abstractmethod
    def change(self, task: Task) -> Change:
        """What is done to the heads: `hook_z <- factor x hook_z + values`."""

    def measure(self, task: Task, branches: Sequence[Branch], *, progress: Progress | None = None) -> Effects:
        """The readout's logit with every branch edited, minus the unedited one; see `Method.measure`."""
        change = self.change(task)
        sweep = sweep_branches(
            task.model, task.readout, task.transcripts, branches, change=change, scope=task.scope, progress=progress
        )
        return Effects.of_sweep(sweep)
