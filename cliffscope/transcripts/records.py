"""What is a transcript, and what is a collection of them?

A transcript is one prompt, its thinking, its answer if there is one, and labels. A collection is immutable, has unique
ids, carries what was left out on the way and why, and can be split so that no prompt is on two sides.

This file knows no tokenizer and no file format.
"""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import EllipsisType
from typing import TypeAlias, overload

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.notebook import Shown

# None, bool, int, float, str, or lists and dicts of these; run-time type checkers cannot follow a recursive alias.
JsonValue: TypeAlias = object
FORCED = "forced_closing"
"""Key in `extra`: whether the thinking was closed at its budget, and not by the model."""


class Split(StrEnum):
    """What a transcript may be used for: fitting, choosing, or measuring what is claimed."""

    FIT = "fit"
    VALIDATE = "validate"
    TEST = "test"


class Group(StrEnum):
    """What a request asks for."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"
    UNLABELLED = "unlabelled"

    @classmethod
    def of(cls, harmful: bool | None) -> "Group":
        """The group of a `harmful` label."""
        return {True: cls.HARMFUL, False: cls.HARMLESS, None: cls.UNLABELLED}[harmful]


class Outcome(StrEnum):
    """How a transcript ended."""

    REFUSED = "refused"
    COMPLIED = "complied"
    UNFINISHED = "unfinished"
    UNJUDGED = "unjudged"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: system, user or assistant."""
    content: str
    """What is said."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One prompt, its thinking, its answer and its labels; a prompt is one whose thinking and answer are None."""

    id: str
    """Unique within a collection."""
    messages: tuple[Message, ...]
    """The conversation that the model answers, at least one of them the user's."""
    thinking: str | None = None
    """Text between the tags, without them; None where none was generated."""
    answer: str | None = None
    """Text after the closing; None where none was generated."""
    thinking_ids: tuple[int, ...] | None = None
    """Token ids of the thinking exactly as generated, between the tags."""
    answer_ids: tuple[int, ...] | None = None
    """Token ids of the answer exactly as generated, from the first after the closing."""
    closed: bool = True
    """Whether the thinking ended and an answer could begin; False makes the outcome unfinished. A closing that was
    forced at the budget counts as closed, and `extra["forced_closing"]` says so."""
    harmful: bool | None = None
    """Whether the request is harmful; None where nobody said."""
    outcome: Outcome = Outcome.UNJUDGED
    """How it ended."""
    source: str = ""
    """Where the prompt comes from."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """Keys of the file that CliffScope does not know, kept as they were."""

    @property
    def prompt(self) -> str:
        """Content of the last user message."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.content
        raise DataError(f"Transcript {self.id!r} has no user message among {len(self.messages)}. Give it one.")

    @property
    def group(self) -> Group:
        """What the request asks for, from the label `harmful`."""
        return Group.of(self.harmful)

    replace = replace
    """Return a copy with some fields changed, given by name."""


@dataclass(frozen=True, kw_only=True)
class Omission:
    """One thing that was left out, and why."""

    stage: str
    """The step that left it out, such as `read_prompts`."""
    reason: str
    """Why, in words for the report."""
    id: str
    """Id of the transcript or row."""

    @property
    def kind(self) -> str:
        """The reason without the transcript's own id, so that equal reasons can be counted together."""
        return self.reason.replace(repr(self.id), "this transcript")


class Transcripts(Shown, Sequence[Transcript]):
    """Transcripts with unique ids, in order, and what was left out before they got here.

    Args:
        transcripts: In the order to keep.
        omitted: What was left out of this collection, and why.

    Raises:
        DataError: Two transcripts have the same id.

    Example:
        >>> ts = Transcripts([Transcript(id="a", messages=(Message(role="user", content="Hi"),), harmful=False)])
        >>> ts
        Transcripts(1: harmless, unjudged 1; omitted 0)
        >>> ts.where(harmful=True)
        Transcripts(0; omitted 0)
    """

    def __init__(self, transcripts: Iterable[Transcript] = (), *, omitted: Iterable[Omission] = ()) -> None:
        """Keep the transcripts and check that their ids are unique."""
        self._items = tuple(transcripts)
        self._omitted = tuple(dict.fromkeys(omitted))
        repeated = [key for key, n in Counter(t.id for t in self._items).items() if n > 1]
        if repeated:
            raise DataError(
                f"{len(repeated)} id(s) occur more than once, the first is {repeated[0]!r}. "
                "Ids must be unique: give each transcript its own, or rename those of one file before adding."
            )

    @property
    def omitted(self) -> tuple[Omission, ...]:
        """What was left out before this collection, and why."""
        return self._omitted

    def __len__(self) -> int:
        """Number of transcripts."""
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Transcript: ...
    @overload
    def __getitem__(self, index: slice) -> "Transcripts": ...
    def __getitem__(self, index: int | slice) -> "Transcript | Transcripts":
        """One transcript, or a shorter collection."""
        return Transcripts(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __iter__(self) -> Iterator[Transcript]:
        """Iterate in order."""
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        """Equal where the transcripts and the omissions are."""
        if not isinstance(other, Transcripts):
            return NotImplemented
        return self._items == other._items and self._omitted == other._omitted

    def __hash__(self) -> int:
        """Hash of what equality compares."""
        return hash((self._items, self._omitted))

    def __add__(self, other: "Transcripts") -> "Transcripts":
        """Both collections, one after the other."""
        return Transcripts((*self._items, *other._items), omitted=(*self._omitted, *other._omitted))

    def __repr__(self) -> str:
        """One line: counts by harmful and outcome."""
        cells = Counter((str(t.group), str(t.outcome)) for t in self._items)
        counts = "; ".join(f"{harmful}, {outcome} {n}" for (harmful, outcome), n in sorted(cells.items()))
        head = f"{len(self)}: {counts}" if counts else "0"
        return f"Transcripts({head}; omitted {len(self._omitted)})"

    def small_table(self) -> pd.DataFrame:
        """Counts by harmfulness and outcome."""
        cells = Counter((str(t.group), str(t.outcome)) for t in self._items)
        return pd.DataFrame([(*cell, n) for cell, n in sorted(cells.items())], columns=["prompts", "outcome", "n"])

    def where(
        self,
        *,
        harmful: bool | None | EllipsisType = ...,
        outcome: Outcome | str | Collection[Outcome | str] | None = None,
        ids: Collection[str] | None = None,
    ) -> "Transcripts":
        """Keep the transcripts that meet every condition given.

        Args:
            harmful: True, False, or None for those that nobody labelled; leave it out to keep all.
            outcome: One outcome or several.
            ids: Ids to keep; those that do not occur are no error.

        Returns:
            A shorter collection, in the same order. Its `omitted` is empty: nothing was lost, it was chosen.
        """
        outcomes = {Outcome(outcome)} if isinstance(outcome, str) else outcome and {Outcome(o) for o in outcome}
        wanted = None if ids is None else set(ids)
        return Transcripts(
            t
            for t in self._items
            if (harmful is ... or t.harmful is harmful)
            and (outcomes is None or t.outcome in outcomes)
            and (wanted is None or t.id in wanted)
        )

    def map(self, function: Callable[[Transcript], Transcript]) -> "Transcripts":
        """Apply a function to each transcript; what was omitted is kept."""
        return Transcripts((function(t) for t in self._items), omitted=self._omitted)

    def to_frame(self) -> pd.DataFrame:
        """One row a transcript: id, harmful, outcome, source, prompt, thinking, answer, closed."""
        columns = ["id", "harmful", "outcome", "source", "prompt", "thinking", "answer", "closed"]
        rows = [
            (t.id, t.harmful, str(t.outcome), t.source, t.prompt, t.thinking, t.answer, t.closed) for t in self._items
        ]
        return pd.DataFrame(rows, columns=columns)

    def split(self, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3), seed: int = 0) -> dict[str, "Transcripts"]:
        """Split into fit, validate and test so that no prompt is in two of them.

        Prompts are compared without regard to case, width and spacing. Each (harmful, outcome) cell is divided by the
        same fractions. Which side a prompt falls on depends on the seed and the other prompts of its cell, never on
        the order of the collection.

        Args:
            fractions: Shares of fit, validate and test; they add up to 1.
            seed: Another seed, another split.

        Returns:
            Collections under the keys fit, validate and test, each in the original order.

        Raises:
            DataError: The fractions are negative or do not add up to 1.
        """
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
            raise DataError(f"Split fractions {fractions} must not be negative and must add up to 1.")
        side = _assign_sides(self._items, fractions, seed)
        return {
            str(name): Transcripts(t for t in self._items if side[normalise_prompt(t.prompt)] == name) for name in Split
        }


def normalise_prompt(prompt: str) -> str:
    r"""Bring a prompt into the form in which two prompts count as the same.

    Example:
        >>> normalise_prompt("  How do I\n kill a PROCESS? ")
        'how do i kill a process?'
    """
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _assign_sides(items: Sequence[Transcript], fractions: Sequence[float], seed: int) -> dict[str, str]:
    cells_of: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for t in items:
        cells_of[normalise_prompt(t.prompt)].add((str(t.group), str(t.outcome)))
    strata: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for prompt, cells in cells_of.items():
        strata[tuple(sorted(cells))].append(prompt)
    side: dict[str, str] = {}
    for prompts in strata.values():
        prompts.sort(key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())
        sizes = _apportion(len(prompts), fractions)
        names = [name for name, size in zip(Split, sizes, strict=True) for _ in range(size)]
        side.update(zip(prompts, names, strict=True))
    return side


def _apportion(n: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers that add up to n, by largest remainder; the earlier split wins a tie."""
    exact = [n * fraction for fraction in fractions]
    sizes = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: n - sum(sizes)]:
        sizes[i] += 1
    return sizes
