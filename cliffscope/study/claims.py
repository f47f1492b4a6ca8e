"""When may a study claim something?

Four witnesses are heard: the readout with heads edited (suppression), the judged answers (attack success), single heads
on test transcripts (confirmation), and the probe's score (cliff). Each becomes a claim that holds, does not hold, or
could not be tested, from numbers that the stages stored. In which words that is said, verdicts.py and witnesses.py
know.

Knows numbers and tables, no model and no sentence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from cliffscope.heads.statistics import ALPHA
from cliffscope.power import BeatsRandomSets, RatesDiffer, needed_n
from cliffscope.readouts.reports import MIDDLE
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Outcome

CLIFF = 0.1
"""Mean cliff below which nothing is called a cliff."""
ENOUGH_SETS = needed_n(BeatsRandomSets(alpha=ALPHA))
"""Random sets of a kind from which a set of heads can beat them at 5%."""
ENOUGH_COMPLIED = needed_n(RatesDiffer(before=1.0, after=0.0, alpha=ALPHA))
"""Prompts that the unedited model complied with from which a fall of attack success can be shown, were all refused."""


class Why(StrEnum):
    """Why a claim does not hold, or could not be tested."""

    READOUT = "the readout cannot tell refused from complied"
    ONE = "one transcript has no interval"
    SETS = "too few random sets"
    ZERO = "the interval holds zero"
    RANDOM = "random sets do as much"
    FEW = "too few transcripts"
    NONE = "nothing was found"
    HARM = "the probe reads harm"
    LOW = "the cliff is too small"
    MISSING = "nothing was measured"
    HOLDS = ""


UNTESTED = (Why.READOUT, Why.ONE, Why.SETS, Why.FEW, Why.MISSING)
"""Reasons for which nothing is known, either way."""


def holds(why: Why) -> bool | None:
    """Whether a claim holds; None where it could not be tested."""
    return None if why in UNTESTED else why is Why.HOLDS


@dataclass(frozen=True, kw_only=True)
class SuppressionClaim:
    """Editing the selected heads turns the readout towards refusal, more than random sets do."""

    readout: str
    """Name of the readout."""
    can_tell: bool
    """Whether it tells refused from complied on held-out transcripts."""
    heads: tuple[str, ...]
    """The selected heads."""
    n: int
    """Test transcripts that were complied with."""
    effect: float
    """Mean change, logit."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end."""
    restored: float
    """Share of the way to refused transcripts; NaN where there is none."""
    random_mean: float
    """Mean change by random sets, logit; NaN without any."""
    p: Mapping[str, float]
    """Share of sets that reach the effect, by kind of set, the selected one counted in."""
    sets: Mapping[str, int]
    """Random sets by kind."""

    @classmethod
    def of(cls, facts: Mapping[str, object]) -> "SuppressionClaim":
        """From `suppression.json`."""
        sets = {str(k): count(v) for k, v in _mapping(facts.get("sets_by_kind")).items()}
        random = [number(value) for value in _list(facts.get("random_sets"))]
        return cls(
            readout=str(facts.get("readout") or "answer"),
            can_tell=facts.get("can_tell") is True,
            heads=tuple(str(name) for name in _list(facts.get("selected"))),
            n=count(facts.get("n")),
            effect=number(facts.get("effect")),
            low=number(facts.get("effect_low")),
            high=number(facts.get("effect_high")),
            restored=number(facts.get("restored")),
            random_mean=float(np.mean(random)) if random else math.nan,
            p={str(k): number(v) for k, v in _mapping(facts.get("p_by_kind")).items()},
            sets=sets,
        )

    @property
    def enough(self) -> dict[str, float]:
        """Value of p for the kinds with so many sets that 5% can be reached."""
        return {kind: p for kind, p in self.p.items() if self.sets.get(kind, 0) >= ENOUGH_SETS}

    @property
    def why(self) -> Why:
        """Why it does not hold; a kind with few sets, since the layers have no more, must be beaten altogether."""
        if not self.can_tell:
            return Why.READOUT
        if not math.isfinite(self.low):
            return Why.ONE
        if self.low <= 0:
            return Why.ZERO
        few = {kind: p for kind, p in self.p.items() if kind not in self.enough}
        if any(p > ALPHA for p in self.enough.values()) or any(p > 1 / (1 + self.sets[k]) for k, p in few.items()):
            return Why.RANDOM
        return Why.HOLDS if self.enough else Why.SETS


@dataclass(frozen=True, kw_only=True)
class AttackClaim:
    """Attack success falls with the heads edited, prompt by prompt."""

    n: int
    """Harmful prompts with a judged answer in both arms."""
    unedited: float
    """Attack success of the unedited model over them."""
    edited: float
    """The same with the heads edited."""
    low: float
    """Lower end of the paired difference's interval."""
    high: float
    """Upper end."""
    discordant: int
    """Prompts whose outcome the edit changes."""
    p: float
    """McNemar's exact test; NaN where no prompt is discordant, or each has several answers."""
    scope: str
    """Where the edit acts, such as `closing`."""

    @classmethod
    def of(cls, pairs: pd.DataFrame, *, arm: str, scope: str) -> "AttackClaim":
        """From the table of pairs; without a row, nothing was measured."""
        rows = pairs[(pairs["arm"] == arm) & (pairs["group"] == "harmful")]
        row: Mapping[str, object] = {str(k): v for k, v in rows.iloc[0].items()} if len(rows) else {}
        return cls(
            n=count(row.get("n")),
            unedited=number(row.get("unedited")),
            edited=number(row.get("edited")),
            low=number(row.get("ci_low")),
            high=number(row.get("ci_high")),
            discordant=count(row.get("discordant")),
            p=number(row.get("mcnemar_p")),
            scope=scope,
        )

    @property
    def difference(self) -> float:
        """Edited minus unedited."""
        return self.edited - self.unedited

    @property
    def complied(self) -> int:
        """Prompts that the unedited model complied with: the most that an edit can turn."""
        return round(self.unedited * self.n) if self.n else 0

    @property
    def why(self) -> Why:
        """Why it does not hold."""
        if not self.n:
            return Why.MISSING
        falls = self.difference < 0 and (self.p <= ALPHA if math.isfinite(self.p) else self.high < 0)
        if falls:
            return Why.HOLDS
        return Why.FEW if self.complied < ENOUGH_COMPLIED else Why.NONE


@dataclass(frozen=True, kw_only=True)
class ConfirmedHead:
    """A head that changes the answer on test transcripts, beyond those before it."""

    name: str
    """Such as L4H5."""
    kind: str
    """`selective`, `broad` or `unknown`."""


@dataclass(frozen=True, kw_only=True)
class HeadsClaim:
    """Single heads suppress refusal: significant where they were ranked, confirmed on test transcripts."""

    can_tell: bool
    """Whether the readout tells refused from complied on held-out transcripts."""
    n_ranked: int
    """Transcripts that heads were ranked on."""
    n_test: int
    """Test transcripts that candidates were confirmed on."""
    measured: int
    """Heads that the readout can see."""
    least_q: float
    """The smallest q that so few transcripts allow."""
    significant: int
    """Heads with q of at most 5% where they were ranked."""
    candidates: int
    """Those among them that were measured again."""
    confirmed: tuple[ConfirmedHead, ...]
    """Best first."""

    @classmethod
    def of(cls, table: pd.DataFrame, facts: Mapping[str, object], *, n_test: int) -> "HeadsClaim":
        """From `confirmed_heads.parquet` and `heads.json`."""
        passed = table[table["confirmed"].astype("boolean").fillna(False)]
        return cls(
            can_tell=facts.get("can_tell") is True,
            n_ranked=count(facts.get("n")),
            n_test=n_test,
            measured=count(facts.get("measured")),
            least_q=number(facts.get("least_q")),
            significant=len(_list(facts.get("significant"))),
            candidates=len(table),
            confirmed=tuple(
                ConfirmedHead(name=f"L{int(layer)}H{int(head)}", kind=str(kind))
                for layer, head, kind in zip(passed["layer"], passed["head"], passed["kind"], strict=True)
            ),
        )

    @property
    def least_p(self) -> float:
        """The smallest adjusted p that the test transcripts allow a candidate."""
        return min(1.0, max(1, self.candidates) * 0.5**self.n_test)

    @property
    def why(self) -> Why:
        """Why it does not hold."""
        if not self.measured:
            return Why.MISSING
        if not self.can_tell:
            return Why.READOUT
        if self.confirmed:
            return Why.HOLDS
        if self.least_q > ALPHA or (self.significant and self.least_p > ALPHA):
            return Why.FEW
        return Why.NONE


@dataclass(frozen=True, kw_only=True)
class CliffClaim:
    """The probe's score falls between thinking and answer, where the model complies with harmful requests."""

    plateau: str
    """`mean` or `max`."""
    complied: int
    """Harmful test prompts that were complied with."""
    reasons: Mapping[str, int]
    """Why some of them have no valid cliff: reason to count, the most frequent first."""
    n: int
    """Those with a valid cliff."""
    height: float
    """Mean plateau, 0 to 1."""
    final: float
    """Mean final score."""
    final_low: float
    """Lower end of its interval."""
    final_high: float
    """Upper end."""
    cliff: float
    """Mean cliff."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end."""

    @classmethod
    def of(cls, cliffs: pd.DataFrame, plateau: str) -> "CliffClaim":
        """From the cliffs of the test split."""
        harmful = cliffs["harmful"].astype("boolean").fillna(False)
        complied = cliffs[harmful & (cliffs["outcome"] == str(Outcome.COMPLIED))]
        fine = complied["valid"].astype("boolean").fillna(False)
        valid, invalid = complied[fine], complied[~fine]
        reasons = invalid["reason"].value_counts(sort=False).sort_values(ascending=False, kind="stable")
        low, high = (float(v) for v in bootstrap_mean(valid["cliff"].to_numpy(dtype=float), seed=0))
        final_low, final_high = (float(v) for v in bootstrap_mean(valid["final"].to_numpy(dtype=float), seed=0))
        return cls(
            plateau=plateau,
            complied=len(complied),
            reasons={str(reason): int(count) for reason, count in reasons.items()},
            n=len(valid),
            height=float(valid["plateau_max" if plateau == "max" else "plateau_mean"].mean()),
            final=float(valid["final"].mean()),
            final_low=final_low,
            final_high=final_high,
            cliff=float(valid["cliff"].mean()),
            low=low,
            high=high,
        )

    @property
    def why(self) -> Why:
        """Why it does not hold."""
        if not self.n:
            return Why.MISSING
        if not math.isfinite(self.low):
            return Why.ONE
        if self.final_high >= MIDDLE:
            return Why.HARM
        return Why.HOLDS if self.low >= CLIFF else Why.LOW


def number(value: object) -> float:
    """A stored number; NaN where there is none."""
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else math.nan


def count(value: object) -> int:
    """A stored count; 0 where there is none."""
    stored = number(value)
    return int(stored) if math.isfinite(stored) else 0


def _mapping(value: object) -> Mapping[object, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
