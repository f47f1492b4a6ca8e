"""How well do the words alone say whether an answer will refuse?

1. The text of a transcript is its messages and its thinking; nothing of the answer, which no probe sees either.
2. Words and pairs of neighbouring words of the fit split are weighed by TF-IDF; a word is a run of letters and digits,
   so that languages without spaces have few of them.
3. A logistic regression separates refused from complied transcripts of the fit split, both classes weighing the same.
4. The regularisation is the one of the highest AUROC on the validate split; of equals, the strongest.
5. The test split is reported, overall and among harmful transcripts alone.

A probe whose AUROC is no higher than this one has shown nothing that the text does not say. Knows no model, no tokens
and no probe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from cliffscope.errors import ProbeError
from cliffscope.notebook import Shown
from cliffscope.readouts.labelled import CHALLENGE, COMPLIED, REFUSED, split_by_prompt
from cliffscope.readouts.reports import RegionReport, quality_table, region_report
from cliffscope.stats import auroc
from cliffscope.transcripts.records import Split, Transcript, Transcripts

WORD = r"(?u)\b\w+\b"
"""What counts as a word; scikit-learn's own pattern leaves out words of one letter."""
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse regularisations that are tried: TF-IDF vectors have length one, so that weights must be large."""
FEWEST = {Split.FIT: 2, Split.VALIDATE: 1, Split.TEST: 1}
"""Transcripts a class that each split needs at the least."""
TERMS = 10
"""Terms of each class that a result shows."""
EVERYWHERE, WITHIN_HARMFUL = "prompt and thinking", "prompt and thinking, harmful only"


@dataclass(frozen=True, eq=False, kw_only=True)
class TextBaseline(Shown):
    """What a classifier of words tells on held-out transcripts."""

    overall: RegionReport
    """Refused against complied."""
    within_harmful: RegionReport
    """The same among harmful transcripts alone."""
    strength: float
    """Inverse regularisation that was chosen on the validate split."""
    n_terms: int
    """Words and pairs of words of the fit split."""
    terms: pd.DataFrame
    """term, weight: the strongest for refusal (positive) and for compliance (negative), by weight."""

    def to_frame(self) -> pd.DataFrame:
        """One row a comparison: region, auroc, ci_low, ci_high, n_refused, n_complied, can_tell."""
        return quality_table((self.overall, self.within_harmful))

    def small_table(self) -> pd.DataFrame:
        """The same as `to_frame`."""
        return self.to_frame()

    def __repr__(self) -> str:
        """One line: AUROC with interval and n, overall and among harmful transcripts."""
        return f"TextBaseline({self.overall}; harmful only {self.within_harmful.auroc:.3f}; {self.n_terms:,} terms)"


def text_baseline(
    refused: Transcripts,
    complied: Transcripts,
    *,
    challenge: Transcripts | None = None,
    splits: Mapping[str, str] | None = None,
    seed: int = 0,
) -> TextBaseline:
    """Fits a classifier of words on the transcripts of a probe, and reports it on the same test split.

    Args:
        refused: transcripts that end in a refusal.
        complied: transcripts that end in an answer.
        challenge: harmful transcripts that were complied with; they are compared on the test split and not fitted on.
        splits: transcript id to "fit", "validate" or "test"; None splits by prompt, as `fit_probe` does.
        seed: of the split.

    Returns:
        The held-out report. It is the number to hold a probe's AUROC against.

    Raises:
        ProbeError: a transcript is in no split, a split holds too few of a class, or there are no words.

    Example:
        >>> from cliffscope.transcripts.records import Message
        >>> def asking(word: str) -> Transcripts:
        ...     prompts = {f"{word} {i}": (Message(role="user", content=f"please {word} {i}"),) for i in range(40)}
        ...     return Transcripts(Transcript(id=name, messages=messages) for name, messages in prompts.items())
        >>> text_baseline(asking("stop"), asking("go")).overall.auroc
        1.0
    """
    groups = {REFUSED: refused, COMPLIED: complied, CHALLENGE: challenge or Transcripts(())}
    parts = _parts(groups, split_by_prompt(groups, seed=seed) if splits is None else splits)
    fits = [_fit(parts[Split.FIT], strength) for strength in STRENGTHS]
    best = max(range(len(fits)), key=lambda i: (_auroc(fits[i], parts[Split.VALIDATE]), -i))
    held_out = parts[Split.TEST]
    logits = {kind: _logits(fits[best], rows) for kind, rows in held_out.items()}
    harmful = {kind: np.array([t.harmful is True for t in rows], dtype=bool) for kind, rows in held_out.items()}
    complied_too = [logits[kind][harmful[kind]] for kind in (COMPLIED, CHALLENGE)]
    return TextBaseline(
        overall=region_report(EVERYWHERE, logits[REFUSED], logits[COMPLIED]),
        within_harmful=region_report(WITHIN_HARMFUL, logits[REFUSED][harmful[REFUSED]], np.concatenate(complied_too)),
        strength=STRENGTHS[best],
        n_terms=len(fits[best]["words"].vocabulary_),
        terms=_strongest(fits[best]),
    )


_Part = Mapping[str, list[Transcript]]
"""Transcripts of a split by class."""


def _parts(groups: Mapping[str, Transcripts], splits: Mapping[str, str]) -> dict[Split, _Part]:
    parts: dict[Split, dict[str, list[Transcript]]] = {split: {kind: [] for kind in groups} for split in Split}
    for kind, group in groups.items():
        for transcript in group:
            split = splits.get(transcript.id)
            if split not in list(Split):
                raise ProbeError(
                    f"splits puts {transcript.id!r} into {split!r}. Expected 'fit', 'validate' or 'test' for every "
                    "transcript."
                )
            parts[Split(split)][kind].append(transcript)
    for split, part in parts.items():
        for kind in (REFUSED, COMPLIED):
            if len(part[kind]) < FEWEST[split]:
                raise ProbeError(
                    f"The {split} split holds {len(part[kind])} {kind} transcripts; a text baseline needs at least "
                    f"{FEWEST[split]}. Give more prompts of which some are refused and some are complied with."
                )
    return dict(parts)


def _text(transcript: Transcript) -> str:
    return "\n".join([*(message.content for message in transcript.messages), transcript.thinking or ""])


def _fit(part: _Part, strength: float) -> Pipeline:
    rows = [*part[REFUSED], *part[COMPLIED]]
    labels = np.repeat([True, False], [len(part[REFUSED]), len(part[COMPLIED])])
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=WORD)
    classifier = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    try:
        return Pipeline([("words", words), ("classifier", classifier)]).fit([_text(t) for t in rows], labels)
    except ValueError as error:
        raise ProbeError(
            f"The {len(rows)} transcripts of the fit split hold no words to compare ({error}). Give transcripts with "
            "prompts or thinking."
        ) from error


def _logits(fit: Pipeline, rows: Sequence[Transcript]) -> Float[np.ndarray, " n"]:
    if not rows:
        return np.zeros(0)
    return np.asarray(fit.decision_function([_text(t) for t in rows]), dtype=np.float64)


def _auroc(fit: Pipeline, part: _Part) -> float:
    return auroc(_logits(fit, part[REFUSED]), _logits(fit, part[COMPLIED]))


def _strongest(fit: Pipeline) -> pd.DataFrame:
    weights = fit["classifier"].coef_[0]
    frame = pd.DataFrame({"term": fit["words"].get_feature_names_out(), "weight": weights.astype(np.float64)})
    ordered = frame.sort_values(["weight", "term"], ascending=[False, True], kind="stable")
    return pd.concat([ordered.head(TERMS), ordered.tail(min(TERMS, max(0, len(ordered) - TERMS)))], ignore_index=True)
