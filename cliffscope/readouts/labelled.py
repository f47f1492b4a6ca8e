"""Which transcripts is a readout fitted on, chosen on and reported on?

Judged transcripts are tokenized and sorted by split (fit, validate, test: no prompt is in two) and by class. Knows no
readout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

REFUSED, COMPLIED, CHALLENGE = "refused", "complied", "challenge"
"""Classes; the challenge are harmful transcripts that were complied with and are not fitted on."""

LabelledRow = tuple[TokenizedTranscript, str]
"""A transcript and its class."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Labelled:
    """Tokenized transcripts by split, each with its class."""

    rows: Mapping[str, list[LabelledRow]]
    """By split: `fit`, `validate` and `test`."""
    transcripts: Mapping[str, Transcript]
    """By id."""
    omitted: tuple[Omission, ...]
    """Transcripts that could not be tokenized, and why."""

    @classmethod
    def build(
        cls,
        model: LensModel,
        groups: Mapping[str, Transcripts],
        splits: Mapping[str, str],
        *,
        fewest: Mapping[str, int],
        with_answer: bool = False,
    ) -> "Labelled":
        """Tokenizes and sorts.

        Args:
            model: whose tokenizer and template are used.
            groups: transcripts by class.
            splits: transcript id to `fit`, `validate` or `test`.
            fewest: transcripts that each split needs of the refused and of the complied class.
            with_answer: tokenize answers too; a transcript without one is then left out.

        Returns:
            The sorted transcripts. A challenge of the fit split counts to the validate split, since it is not fitted
            on.

        Raises:
            ProbeError: a transcript is in no split, or a split holds too few of a class.
        """
        rows: dict[str, list[LabelledRow]] = {"fit": [], "validate": [], "test": []}
        omitted: list[Omission] = []
        for kind, group in groups.items():
            tokens, left_out = model.tokenize_all(group, with_answer=with_answer)
            omitted += left_out
            unknown = [row.id for row in tokens if splits.get(row.id) not in rows]
            if unknown:
                raise ProbeError(
                    f"splits puts {unknown[0]!r} into {splits.get(unknown[0])!r}. Expected 'fit', 'validate' or 'test' "
                    "for every transcript."
                )
            for row in tokens:
                split = "validate" if kind == CHALLENGE and splits[row.id] == "fit" else splits[row.id]
                rows[split].append((row, kind))
        labelled = cls(
            rows=rows, transcripts={t.id: t for group in groups.values() for t in group}, omitted=tuple(omitted)
        )
        labelled._refuse_small(groups, fewest)
        return labelled

    def part(self, split: str) -> list[LabelledRow]:
        """The rows of one split."""
        return self.rows[split]

    def _refuse_small(self, groups: Mapping[str, Transcripts], fewest: Mapping[str, int]) -> None:
        for split, rows in self.rows.items():
            for kind in (REFUSED, COMPLIED):
                n = sum(k == kind for _, k in rows)
                if n < fewest[split]:
                    why = f" The first that was left out: {self.omitted[0].reason}" if self.omitted else ""
                    raise ProbeError(
                        f"The {split} split holds {n} {kind} transcripts ({len(groups[REFUSED])} refused and "
                        f"{len(groups[COMPLIED])} complied were given); at least {fewest[split]} of each are needed. "
                        f"Give more prompts of which some are refused and some are complied with.{why}"
                    )


def split_by_prompt(groups: Mapping[str, Transcripts], *, seed: int) -> dict[str, str]:
    """Transcript id to split, such that no prompt is in two splits."""
    every = {t.id: t for group in groups.values() for t in group}
    parts = Transcripts(every.values()).split(seed=seed)
    return {t.id: name for name, part in parts.items() for t in part}
