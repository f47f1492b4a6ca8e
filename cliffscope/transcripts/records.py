"""What is a transcript, and what is a collection of them?

A transcript is one prompt, its thinking, its answer if there is one, and its labels. A collection is immutable, has
unique ids, records what was left out and why, and can be split so that no prompt is in two splits.

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
from cliffscope.text import is_unicode

# None, bool, int, float, str, or lists and dicts of these; run-time type checkers do not support recursive aliases.
JsonValue: TypeAlias = object
FORCED = "forced_closing"
"""Key in `extra`: whether the thinking was closed at its budget, and not by the model."""
CUT = "cut_answer"
"""Key in `extra`: whether the answer reached its budget before it ended."""


class Outcome(StrEnum):
    """How a transcript ended."""

    REFUSED = "refused"
    COMPLIED = "complied"
    UNFINISHED = "unfinished"
    UNJUDGED = "unjudged"


class Group(StrEnum):
    """What kind of prompt a transcript answers."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"
    UNLABELLED = "unlabelled"

    @classmethod
    def of(cls, harmful: bool | None) -> "Group":
        """The group of a `harmful` label.

        Example:
            >>> Group.of(None).value
            'unlabelled'
        """
        return {True: cls.HARMFUL, False: cls.HARMLESS, None: cls.UNLABELLED}[harmful]


class Split(StrEnum):
    """A part of a collection of transcripts; no prompt is in two of them."""

    FIT = "fit"
    VALIDATE = "validate"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Role of the speaker: system, user or assistant."""
    content: str
    """Text of the turn."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One prompt, its thinking, its answer and its labels. In a bare prompt, thinking and answer are None.

    Control characters and NUL are allowed in every text.

    Raises:
        DataError: a text holds half of a surrogate pair, which no tokenizer and no file accepts.
    """

    id: str
    """Unique within a collection."""
    messages: tuple[Message, ...]
    """The conversation that the model answers, with at least one user message."""
    thinking: str | None = None
    """Text between the tags, without the tags; None if none was generated."""
    answer: str | None = None
    """Text after the closing; None if none was generated."""
    thinking_ids: tuple[int, ...] | None = None
    """Token ids of the thinking exactly as generated, between the tags."""
    answer_ids: tuple[int, ...] | None = None
    """Token ids of the answer exactly as generated, from the first after the closing."""
    closed: bool = True
    """Whether the thinking ended so that an answer could start; if not, the outcome is unfinished. Thinking that was
    closed at the budget counts as closed and sets `extra["forced_closing"]`."""
    harmful: bool | None = None
    """Whether the request is harmful; None if it is unlabelled."""
    outcome: Outcome = Outcome.UNJUDGED
    """How it ended."""
    source: str = ""
    """Where the prompt comes from."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """Other keys of the file, unchanged."""

    def __post_init__(self) -> None:
        """Rejects text that could be neither tokenized nor written."""
        texts = {"id": self.id, "thinking": self.thinking, "answer": self.answer, "source": self.source}
        texts |= {f"messages[{i}]": f"{message.role}{message.content}" for i, message in enumerate(self.messages)}
        for name, text in texts.items():
            if text is not None and not is_unicode(text):
                raise DataError(
                    f"Field {name!r} of transcript {self.id!r} holds half of a surrogate pair. Replace it with valid "
                    "Unicode, such as text.encode('utf-8', 'replace').decode()."
                )

    @property
    def prompt(self) -> str:
        """Content of the last user message."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.content
        raise DataError(f"Transcript {self.id!r} has no user message among {len(self.messages)} messages. Add one.")

    @property
    def group(self) -> Group:
        """Whether the prompt is harmful, harmless or unlabelled."""
        return Group.of(self.harmful)

    replace = replace
    """Returns a copy with the given fields changed."""


@dataclass(frozen=True, kw_only=True)
class Omission:
    """One item that was left out, and why."""

    stage: str
    """Step that left it out, such as `read_prompts`."""
    reason: str
    """Reason, in words for the report."""
    id: str
    """Id of the transcript or row that was left out."""

    def __post_init__(self) -> None:
        """Shows what no file could hold as escapes: a reason may quote any text."""
        for name in ("reason", "id"):
            text = getattr(self, name)
            if not is_unicode(text):
                object.__setattr__(self, name, text.encode("utf-8", "backslashreplace").decode())

    @property
    def kind(self) -> str:
        """The reason without the transcript's id, so that equal reasons can be counted together."""
        return self.reason.replace(repr(self.id), "this transcript")


class Transcripts(Shown, Sequence[Transcript]):
    """An ordered collection of transcripts with unique ids, and a record of what was left out.

    Args:
        transcripts: the transcripts, in order.
        omitted: what was left out of this collection, and why.

    Raises:
        DataError: two transcripts have the same id.

    Example:
        >>> ts = Transcripts([Transcript(id="a", messages=(Message(role="user", content="Hi"),), harmful=False)])
        >>> ts
        Transcripts(1: harmless, unjudged 1; omitted 0)
        >>> ts.where(harmful=True)
        Transcripts(0; omitted 0)
    """

    def __init__(self, transcripts: Iterable[Transcript] = (), *, omitted: Iterable[Omission] = ()) -> None:
        """Stores the transcripts and checks that their ids are unique."""
        self._items = tuple(transcripts)
        self._omitted = tuple(dict.fromkeys(omitted))
        repeated = [key for key, n in Counter(t.id for t in self._items).items() if n > 1]
        if repeated:
            raise DataError(
                f"{len(repeated)} id(s) occur more than once, such as {repeated[0]!r}. Ids must be unique: rename the "
                "transcripts of one file before you join them."
            )

    @property
    def omitted(self) -> tuple[Omission, ...]:
        """What was left out of this collection, and why."""
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
        """Iterates in order."""
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        """Equal if transcripts and omissions are equal."""
        if not isinstance(other, Transcripts):
            return NotImplemented
        return self._items == other._items and self._omitted == other._omitted

    def __hash__(self) -> int:
        """Hash of transcripts and omissions."""
        return hash((self._items, self._omitted))

    def __add__(self, other: "Transcripts") -> "Transcripts":
        """Joins two collections, one after the other."""
        return Transcripts((*self._items, *other._items), omitted=(*self._omitted, *other._omitted))

    def __repr__(self) -> str:
        """One line: counts by group and outcome."""
        counts = "; ".join(f"{group}, {outcome} {n}" for (group, outcome), n in self._cells())
        head = f"{len(self)}: {counts}" if counts else "0"
        return f"Transcripts({head}; omitted {len(self._omitted)})"

    def small_table(self) -> pd.DataFrame:
        """Counts by group and outcome: prompts, outcome, n."""
        rows = [(str(group), str(outcome), n) for (group, outcome), n in self._cells()]
        return pd.DataFrame(rows, columns=["prompts", "outcome", "n"])

    def _cells(self) -> list[tuple[tuple[Group, Outcome], int]]:
        """(group, outcome) and count, sorted."""
        return sorted(Counter((t.group, t.outcome) for t in self._items).items())

    def where(
        self,
        *,
        harmful: bool | None | EllipsisType = ...,
        outcome: Outcome | str | Collection[Outcome | str] | None = None,
        ids: Collection[str] | None = None,
    ) -> "Transcripts":
        """Returns the transcripts that meet every condition.

        Args:
            harmful: True, False, or None for unlabelled ones; omit it to keep all.
            outcome: one outcome or several.
            ids: ids to keep; ids that do not occur are ignored.

        Returns:
            A shorter collection, in the same order. Its `omitted` is empty, since nothing was lost.
        """
        outcomes = {Outcome(outcome)} if isinstance(outcome, str) else outcome and {Outcome(o) for o in outcome}
        id_set = None if ids is None else set(ids)
        return Transcripts(
            t
            for t in self._items
            if (harmful is ... or t.harmful is harmful)
            and (outcomes is None or t.outcome in outcomes)
            and (id_set is None or t.id in id_set)
        )

    def map(self, function: Callable[[Transcript], Transcript]) -> "Transcripts":
        """Applies a function to each transcript, and keeps the omissions."""
        return Transcripts((function(t) for t in self._items), omitted=self._omitted)

    def to_frame(self) -> pd.DataFrame:
        """One row for each transcript: id, harmful, outcome, source, prompt, thinking, answer, closed."""
        columns = ["id", "harmful", "outcome", "source", "prompt", "thinking", "answer", "closed"]
        rows = [
            (t.id, t.harmful, str(t.outcome), t.source, t.prompt, t.thinking, t.answer, t.closed) for t in self._items
        ]
        return pd.DataFrame(rows, columns=columns)

    def split(self, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3), seed: int = 0) -> dict[str, "Transcripts"]:
        """Splits into fit, validate and test so that no prompt is in two of them.

        Prompts are compared without case, width and spacing. Each (group, outcome) cell is divided by the same
        fractions. The split of a prompt depends on the seed and on the other prompts of its cell, never on the order of
        the collection.

        Args:
            fractions: shares of fit, validate and test, which must add up to 1.
            seed: a different seed gives a different split.

        Returns:
            One collection for each `Split`, in the original order.

        Raises:
            DataError: a fraction is negative, or the fractions do not add up to 1.
        """
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
            raise DataError(
                f"fractions={fractions}: expected shares of fit, validate and test that are not negative and add up to "
                "1."
            )
        split_of = _assign_splits(self._items, fractions, seed)
        return {
            name: Transcripts(t for t in self._items if split_of[normalise_prompt(t.prompt)] is name) for name in Split
        }


def normalise_prompt(prompt: str) -> str:
    r"""Brings a prompt into the form in which prompts are compared.

    Example:
        >>> normalise_prompt("  How do I\n kill a PROCESS? ")
        'how do i kill a process?'
    """
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _assign_splits(items: Sequence[Transcript], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """The split of each normalised prompt."""
    cells_of: dict[str, set[tuple[Group, Outcome]]] = defaultdict(set)
    for t in items:
        cells_of[normalise_prompt(t.prompt)].add((t.group, t.outcome))
    strata: dict[tuple[tuple[Group, Outcome], ...], list[str]] = defaultdict(list)
    for prompt, cells in cells_of.items():
        strata[tuple(sorted(cells))].append(prompt)
    split_of: dict[str, Split] = {}
    for prompts in strata.values():
        prompts.sort(key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())
        sizes = _apportion(len(prompts), fractions)
        splits = [split for split, size in zip(Split, sizes, strict=True) for _ in range(size)]
        split_of.update(zip(prompts, splits, strict=True))
    return split_of


def _apportion(n: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers that add up to n, by largest remainder; the earlier split wins ties."""
    exact = [n * fraction for fraction in fractions]
    sizes = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: n - sum(sizes)]:
        sizes[i] += 1
    return sizes
