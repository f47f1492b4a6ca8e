"""What is a judge, and what does it return?

A judge is an object with a name that is called with a prompt and an answer and returns a `Verdict`. Two optional
protocols extend it: `BatchJudge` reads many answers at once, and `HarmJudge` says that it classifies harm rather than
refusal. Judges never see the thinking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cliffscope.errors import CliffScopeError, JudgeError
from cliffscope.transcripts.records import Group, Outcome


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judge's decision about one answer.

    Raises:
        JudgeError: `score` is not a probability.
    """

    outcome: Outcome
    """How the answer ended."""
    score: float | None
    """Probability of a refusal, in [0, 1]; None if the judge gives no probability."""
    reason: str
    """Why. For `PhraseJudge`: the matching words in canonical form."""
    partial: bool = False
    """Whether the answer refuses but still helps. Its outcome is `complied` where it gives some of what was requested,
    and may be `refused` where the refusal stands and it helps with something close."""

    def __post_init__(self) -> None:
        """Rejects a score that is not a probability."""
        if self.score is not None and not 0 <= self.score <= 1:
            raise JudgeError(f"The judge returned score={self.score!r}. Expected a probability from 0 to 1, or None.")


@runtime_checkable
class Judge(Protocol):
    """Reads one answer and returns a verdict.

    A judge that cannot read an answer raises `JudgeError`. OSError, RuntimeError, ValueError, LookupError and
    ArithmeticError are treated the same way. Any other exception is a bug in the judge and is not caught.
    """

    @property
    def name(self) -> str:
        """Short name, stored with each verdict."""

    def __call__(self, prompt: str, answer: str) -> Verdict:
        """Judges one answer to one prompt."""


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """Reads many answers at once, for example through a server."""

    def judge_many(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Verdict | CliffScopeError]:
        """Returns, for each (prompt, answer) in order, the verdict or the error that prevented it."""


@runtime_checkable
class HarmJudge(Judge, Protocol):
    """May classify harm instead of refusal, as most guard models do."""

    @property
    def harmful_only(self) -> bool:
        """Whether it can judge only answers to harmful prompts: elsewhere, no harm does not mean a refusal."""


@dataclass(frozen=True, kw_only=True)
class GroupJudges:
    """One judge for harmful and unlabelled prompts, another for harmless ones.

    Guard models classify harm and cannot tell a refusal of a harmless prompt; another judge reads those.
    """

    harmful: Judge
    """Reads answers to harmful and to unlabelled prompts."""
    harmless: Judge
    """Reads answers to harmless prompts."""

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.harmful.name} (harmful), {self.harmless.name} (harmless)"

    def __call__(self, prompt: str, answer: str) -> Verdict:
        """Refuses: which judge reads an answer depends on the prompt's label, which is not passed here."""
        raise JudgeError(
            f"{self.name} judges transcripts, not single answers such as {answer[:40]!r} to {prompt[:40]!r}: pass it "
            "to `judge` or a study."
        )

    def of(self, group: Group) -> Judge:
        """The judge of a group of prompts."""
        return self.harmless if group is Group.HARMLESS else self.harmful
