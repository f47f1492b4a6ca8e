"""How do a model's refusals begin, and how its compliances?

1. The answers of both classes are token ids. Answers that share a beginning are followed token by token until the class
   is clear: a beginning that occurs in one class alone is an opening of that class, and one that occurs in both is
   followed further, up to a longest length.
2. At the longest length a beginning counts for a class if it has `PURE` of its uses there, the classes weighing alike.
   Judges err and sampled answers turn round, so that a beginning which is mostly one class's is not thrown away for a
   few answers.
3. The most frequent openings are taken until they cover a class.

No opening is the beginning of another, so that their probabilities add up. Token ids in, token ids out: this file knows
no model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, ProbeError
from cliffscope.readouts.labelled import COMPLIED, REFUSED
from cliffscope.transcripts.templates import encode

PURE = 0.75
"""Share of a beginning's uses, the classes weighing alike, from which it counts for one class although it occurs in
both."""
COVERS = 0.95
"""Share of a class's answers from which further, rarer openings are left out: each costs a row of the unembedding."""
MOST = 16
"""Openings of a class at the most."""

Ids = tuple[int, ...]
Answers = Mapping[str, Sequence[Ids]]
"""Token ids of answers by class, `refused` and `complied`."""
ByClass = Mapping[str, Sequence[Ids]]
"""Token ids of openings by class, the most frequent first."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How an answer begins."""

    token_ids: Ids
    """At least one token."""
    refuses: bool
    """Whether it begins refusals; else it begins compliances."""
    text: str
    """What the tokens say."""

    @property
    def kind(self) -> str:
        """Class of the answers that it begins: `refused` or `complied`."""
        return REFUSED if self.refuses else COMPLIED


def find_openings(answers: Answers, longest: int) -> ByClass:
    """Openings of a model's own answers, each as short as it can be.

    Args:
        answers: of both classes, at least one of each.
        longest: tokens of an opening at the most.

    Returns:
        Openings; a class has none where every beginning occurs as often in the other one.

    Example:
        >>> find_openings({"refused": [(1, 2), (1, 2)], "complied": [(1, 3), (4, 5)]}, longest=2)
        {'refused': ((1, 2),), 'complied': ((1, 3), (4,))}
    """
    by_class: dict[str, list[tuple[int, Ids]]] = {REFUSED: [], COMPLIED: []}
    todo: list[Ids] = [()]
    while todo:
        for prefix, counts in _extended(answers, todo.pop()).items():
            kind, purity = _majority(counts, answers)
            if purity == 1 or len(prefix) == longest and purity >= PURE:
                by_class[kind].append((counts[kind], prefix))
            elif len(prefix) < longest:
                todo.append(prefix)
    return {kind: _most_frequent(counted, len(answers[kind])) for kind, counted in by_class.items()}


def least_alike(answers: Answers, longest: int) -> ByClass:
    """Where no beginning is one class's: those that lean most to each side.

    Args:
        answers: of both classes.
        longest: tokens of an opening.

    Raises:
        ProbeError: all answers begin with the same tokens.
    """
    counts: dict[Ids, Counter[str]] = {}
    for kind, group in answers.items():
        for answer in group:
            if answer:
                counts.setdefault(answer[:longest], Counter())[kind] += 1
    # Of an answer that ends early and one that goes on, only the latter can be told by its tokens.
    leaves = [ids for ids in counts if not any(other != ids and other[: len(ids)] == ids for other in counts)]
    if len(leaves) < 2:
        raise ProbeError(
            f"All answers begin with the same {longest} tokens, so that their beginnings do not tell refusals from "
            "compliances. Allow longer openings (max_opening=...), give openings=..., or use a probe (cs.fit_probe)."
        )
    lean = {
        ids: counts[ids][REFUSED] / len(answers[REFUSED]) - counts[ids][COMPLIED] / len(answers[COMPLIED])
        for ids in leaves
    }
    order = sorted(leaves, key=lambda ids: (-lean[ids], ids))
    # Each side has at least the one that leans most towards it, even where all lean to the other.
    n_refused = min(max(1, sum(lean[ids] > 0 for ids in order)), len(order) - 1)
    n_complied = min(max(1, sum(lean[ids] < 0 for ids in order)), len(order) - n_refused)
    refused, complied = order[:n_refused], order[::-1][:n_complied]
    return {REFUSED: tuple(refused[:MOST]), COMPLIED: tuple(complied[:MOST])}


def separation(by_class: Mapping[str, Sequence[Ids]], answers: Answers) -> float:
    """Share of answers that begin with an opening of their own class, mean of the classes; NaN if one is empty."""
    shares = [
        sum(opening_of(answer, by_class[kind]) is not None for answer in answers[kind]) / len(answers[kind])
        if answers[kind]
        else float("nan")
        for kind in (REFUSED, COMPLIED)
    ]
    return sum(shares) / 2


def opening_of(answer: Ids, openings: Sequence[Ids]) -> Ids | None:
    """The opening that an answer begins with."""
    return next((ids for ids in openings if answer[: len(ids)] == ids), None)


def read_openings(
    openings: Mapping[str, Sequence[str | Sequence[int]]], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> ByClass:
    """Openings that a user gives, as token ids.

    Args:
        openings: texts or token ids by class: {"refused": ["I'm sorry", "I cannot"], "complied": ["Sure"]}.
        tokenizer: encodes texts, without special tokens.
        vocabulary: token ids that have a logit.

    Returns:
        Token ids by class.

    Raises:
        DataError: a class is missing, an opening has no token or an unknown one, or one is equal to another or begins
            with it.
    """
    if set(openings) != {REFUSED, COMPLIED} or not all(openings.values()):
        raise DataError(
            f"openings has {', '.join(map(repr, openings)) or 'nothing'}: expected at least one opening for each of "
            f"{REFUSED!r} and {COMPLIED!r}."
        )
    read = {kind: tuple(_ids(one, tokenizer, vocabulary) for one in openings[kind]) for kind in (REFUSED, COMPLIED)}
    _refuse_nested([(ids, kind) for kind, group in read.items() for ids in group], tokenizer)
    return read


def describe(by_class: Mapping[str, Sequence[Ids]], tokenizer: PreTrainedTokenizerBase) -> tuple[Opening, ...]:
    """Openings with their texts, refusals first."""
    return tuple(
        Opening(token_ids=ids, refuses=kind == REFUSED, text=str(tokenizer.decode(list(ids))))
        for kind in (REFUSED, COMPLIED)
        for ids in by_class[kind]
    )


def _extended(answers: Answers, prefix: Ids) -> dict[Ids, Counter[str]]:
    """How many answers of each class go on with which token after a beginning."""
    counts: dict[Ids, Counter[str]] = {}
    for kind, group in answers.items():
        for answer in group:
            if len(answer) > len(prefix) and answer[: len(prefix)] == prefix:
                counts.setdefault(answer[: len(prefix) + 1], Counter())[kind] += 1
    return counts


def _majority(counts: Counter[str], answers: Answers) -> tuple[str, float]:
    """The class in which a beginning is more frequent, and its share of the uses, the classes weighing alike."""
    rates = {kind: counts[kind] / len(answers[kind]) for kind in (REFUSED, COMPLIED)}
    kind = max(rates, key=lambda name: rates[name])
    return kind, rates[kind] / sum(rates.values())


def _most_frequent(counted: Sequence[tuple[int, Ids]], n: int) -> tuple[Ids, ...]:
    """Openings until they cover the class, the most frequent first."""
    openings: list[Ids] = []
    covered = 0
    for count, ids in sorted(counted, key=lambda pair: (-pair[0], pair[1])):
        if len(openings) == MOST or covered >= COVERS * n:
            break
        openings.append(ids)
        covered += count
    return tuple(openings)


def _ids(opening: str | Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Ids:
    ids = tuple(encode(tokenizer, opening)) if isinstance(opening, str) else tuple(int(i) for i in opening)
    if not ids:
        raise DataError(f"The opening {opening!r} has no token. Give at least one word, or leave it out.")
    unknown = [i for i in ids if not 0 <= i < vocabulary or i == tokenizer.unk_token_id]
    if unknown:
        raise DataError(
            f"The opening {opening!r} has token {unknown[0]}, which is unknown or outside the vocabulary of "
            f"{vocabulary}. Give words as this model writes them, or their token ids."
        )
    return ids


def _refuse_nested(openings: Sequence[tuple[Ids, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    for place, (ids, kind) in enumerate(openings):
        for other, other_kind in (*openings[:place], *openings[place + 1 :]):
            if other[: len(ids)] == ids:
                texts = [tokenizer.decode(list(each)) for each in (other, ids)]
                advice = "Give longer ones that differ." if kind != other_kind else "Leave the longer one out."
                relation = "is the same as" if other == ids else "begins with"
                raise DataError(
                    f"The {other_kind} opening {texts[0]!r} {relation} the {kind} opening {texts[1]!r}, so that their "
                    f"probabilities overlap. {advice}"
                )
