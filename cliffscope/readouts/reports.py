"""What can a readout tell, and what are its classes made of?

One `RegionReport` a region compares one value a transcript between refused and complied transcripts; `cells_of` counts
harmful and harmless transcripts in each class, since a class of harmful prompts against one of harmless prompts may
teach a probe harmfulness instead of refusal. Arrays and counts in, results out; knows no model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import expit

from cliffscope.notebook import Plotted
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import Interval, auroc, auroc_interval, brier, expected_calibration_error, tpr_at_fpr
from cliffscope.transcripts.records import Transcript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CAN_TELL = 0.75
"""Lower bound of the held-out AUROC from which a probe is said to be able to tell at a region."""
MIDDLE = 0.5
"""Score at which a probe finds refusal and compliance equally likely."""


@dataclass(frozen=True, kw_only=True)
class RegionReport:
    """Held-out quality at one region, one value a transcript."""

    region: str
    """Name of the region."""
    auroc: float
    """Refused against complied; NaN if a class is empty."""
    interval: Interval
    """95% interval of the AUROC."""
    tpr_at_1_fpr: float
    """Share of refused transcripts found at a false-positive rate of 1%."""
    brier: float
    """Mean squared error of the score."""
    calibration_error: float
    """Expected calibration error of the score, 10 bins."""
    n_refused: int
    """Refused transcripts."""
    n_complied: int
    """Complied transcripts."""

    @property
    def can_tell(self) -> bool:
        """Whether the interval's lower bound reaches `CAN_TELL`."""
        return bool(self.interval.low >= CAN_TELL)

    def to_row(self) -> dict[str, float | int | str]:
        """Flat columns for a table."""
        row = {k: v for k, v in asdict(self).items() if k != "interval"}
        return {**row, "auroc_low": self.interval.low, "auroc_high": self.interval.high}

    def __repr__(self) -> str:
        """One line: AUROC, interval, region, n a class."""
        bounds = f"[{self.interval.low:.3f}, {self.interval.high:.3f}]"
        return f"AUROC {self.auroc:.3f} {bounds} at {self.region}, n={self.n_refused}+{self.n_complied}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far scores in [0, 1] agree with outcomes, one score a harmful transcript at the final position.

    Brier score and calibration error exist where a single class does; an AUROC does not.
    """

    brier: float
    """Mean squared error of the score."""
    calibration_error: float
    """Expected calibration error of the score, 10 bins."""
    refused: float
    """Mean score of refused transcripts; NaN without any."""
    refused_interval: Interval
    """Its 95% bootstrap interval over transcripts."""
    complied: float
    """Mean score of complied transcripts; NaN without any."""
    complied_interval: Interval
    """Its 95% bootstrap interval over transcripts."""
    n_refused: int
    """Refused transcripts."""
    n_complied: int
    """Complied transcripts."""

    @property
    def complied_is_low(self) -> bool:
        """Whether complied transcripts score below `MIDDLE`, as they must for a cliff; False where nothing is known."""
        return bool(self.complied_interval.high < MIDDLE)

    def __repr__(self) -> str:
        """One line: mean scores with intervals, Brier score, n a class."""
        means = [
            f"{kind} {mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
            for kind, mean, interval in (
                ("refused", self.refused, self.refused_interval),
                ("complied", self.complied, self.complied_interval),
            )
        ]
        return f"Calibration({', '.join(means)}, Brier {self.brier:.3f}, n={self.n_refused}+{self.n_complied})"


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeReport(Plotted):
    """What a probe can tell on its test split."""

    final: RegionReport
    """At the final token."""
    late_thinking: RegionReport
    """Over the last two fifths of the thinking; empty for a model without thinking."""
    within_harmful: RegionReport
    """At the final token, among harmful transcripts alone: refusal rather than harmfulness."""
    calibration: Calibration
    """At the final token, among harmful transcripts alone: whether a score means what it says."""
    shuffled: tuple[float, ...]
    """AUROC at the final token of probes fitted on shuffled labels."""
    by_region: pd.DataFrame
    """layer, region and the fields of `RegionReport`, every layer and region."""
    cells: Mapping[str, int]
    """Fitted transcripts by class and harmfulness, such as "refused, harmful"."""
    warnings: tuple[str, ...]
    """What a reader should know before believing the probe."""

    @property
    def can_tell(self) -> bool:
        """Whether the probe can tell at the final position."""
        return self.final.can_tell

    def to_frame(self) -> pd.DataFrame:
        """Held-out quality, one row a layer and region: layer, region and the fields of `RegionReport`."""
        return self.by_region.copy()

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC where claims rest on it: region, auroc, ci_low, ci_high, n_refused, n_complied, can_tell."""
        return quality_table((self.final, self.late_thinking, self.within_harmful))

    def plot(self, *, layer: int | None = None) -> "Figure":
        """Held-out AUROC by layer and position.

        Args:
            layer: the layer to outline.
        """
        from cliffscope.figures.trace import probe_quality, quality_grids

        n = f"n={self.final.n_refused} refused, {self.final.n_complied} complied"
        title = f"Held-out AUROC by layer and position ({n})"
        return probe_quality(*quality_grids(self.by_region), probe_layer=layer, title=title)

    def __repr__(self) -> str:
        """One line: what it can tell at the end and late in the thinking."""
        return f"ProbeReport({self.final}; late thinking {self.late_thinking.auroc:.3f})"


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerReport(Plotted):
    """What an answer readout can tell on its test split."""

    final: RegionReport
    """Refused against complied, at the final position; the score is the sigmoid of the log-odds."""
    within_harmful: RegionReport
    """The same among harmful transcripts alone."""
    openings: pd.DataFrame
    """One row an opening: class, opening (text), tokens, token_ids, fit_refused, fit_complied, test_refused,
    test_complied (answers that begin with it)."""
    separation: float
    """Share of the validate answers that begin with an opening of their own class; NaN where openings were given."""
    covered: float
    """Share of the test answers that begin with one of the openings."""
    mass: float
    """Mean probability, on the test split, that the answer begins with one of the openings."""
    warnings: tuple[str, ...]
    """What a reader should know before believing the readout."""

    @property
    def can_tell(self) -> bool:
        """Whether the readout can tell at the final position."""
        return self.final.can_tell

    def to_frame(self) -> pd.DataFrame:
        """The table of openings."""
        return self.openings.copy()

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC overall and among harmful transcripts."""
        return quality_table((self.final, self.within_harmful))

    def plot(self) -> "Figure":
        """How often held-out refusals and compliances begin with each opening."""
        from cliffscope.figures.openings import opening_bars

        return opening_bars(
            self.openings["opening"].tolist(),
            self.openings["class"].tolist(),
            self.openings["test_refused"].to_numpy(float) / max(1, self.final.n_refused),
            self.openings["test_complied"].to_numpy(float) / max(1, self.final.n_complied),
            title=f"How held-out answers begin (n={self.final.n_refused} refused, {self.final.n_complied} complied)",
        )

    def __repr__(self) -> str:
        """One line: AUROC, and how many answers begin with an opening."""
        return f"AnswerReport({self.final}; {self.covered:.0%} of answers begin with an opening)"


def quality_table(reports: Sequence[RegionReport]) -> pd.DataFrame:
    """One row a report: region, auroc, ci_low, ci_high, n_refused, n_complied, can_tell."""
    rows = [
        (r.region, r.auroc, r.interval.low, r.interval.high, r.n_refused, r.n_complied, r.can_tell) for r in reports
    ]
    names = ["region", "auroc", "ci_low", "ci_high", "n_refused", "n_complied", "can_tell"]
    return pd.DataFrame(rows, columns=names)


def region_report(region: str, refused: Float[np.ndarray, " n"], complied: Float[np.ndarray, " m"]) -> RegionReport:
    """Compares one logit a transcript between the classes.

    Args:
        region: name of the region.
        refused: [n] logits of refused transcripts.
        complied: [m] logits of complied transcripts.

    Returns:
        The report; NaN where a class is empty.
    """
    empty = not len(refused) or not len(complied)
    scores = 1 / (1 + np.exp(-np.clip(np.concatenate([refused, complied]), -60, 60)))
    labels = np.concatenate([np.ones(len(refused)), np.zeros(len(complied))])
    nothing = float("nan")
    return RegionReport(
        region=region,
        auroc=nothing if empty else auroc(refused, complied),
        interval=Interval(low=nothing, high=nothing) if empty else auroc_interval(refused, complied),
        tpr_at_1_fpr=nothing if empty else tpr_at_fpr(refused, complied, 0.01),
        brier=nothing if empty else brier(scores, labels),
        calibration_error=nothing if empty else expected_calibration_error(scores, labels),
        n_refused=len(refused),
        n_complied=len(complied),
    )


def calibration_of(refused: Float[np.ndarray, " n"], complied: Float[np.ndarray, " m"]) -> Calibration:
    """Compares scores with outcomes.

    Args:
        refused: [n] logits of refused transcripts.
        complied: [m] logits of complied transcripts.

    Returns:
        The calibration; NaN where a class is empty, and NaN intervals with fewer than two transcripts.

    Example:
        >>> calibration_of(np.array([40.0, 40.0]), np.array([0.0, 0.0]))
        Calibration(refused 1.00 [1.00, 1.00], complied 0.50 [0.50, 0.50], Brier 0.125, n=2+2)
    """
    scores = [expit(logits.astype(np.float64)) for logits in (refused, complied)]
    both, labels = np.concatenate(scores), np.repeat([1.0, 0.0], [len(refused), len(complied)])
    means = [float(values.mean()) if len(values) else float("nan") for values in scores]
    intervals = [
        Interval(low=float(low), high=float(high)) for low, high in (bootstrap_mean(s, seed=0) for s in scores)
    ]
    return Calibration(
        brier=brier(both, labels),
        calibration_error=expected_calibration_error(both, labels),
        refused=means[0],
        refused_interval=intervals[0],
        complied=means[1],
        complied_interval=intervals[1],
        n_refused=len(refused),
        n_complied=len(complied),
    )


def cells_of(transcripts: Mapping[str, Transcript], rows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Counts fitted transcripts by class and harmfulness.

    Args:
        transcripts: by id.
        rows: (id, class).

    Returns:
        Such as {"refused, harmful": 40, "complied, harmless": 38}.
    """
    words = {True: "harmful", False: "harmless", None: "unlabelled"}
    counts = Counter(f"{kind}, {words[transcripts[i].harmful]}" for i, kind in rows if kind != "challenge")
    return dict(sorted(counts.items()))


def one_sided_warning(cells: Mapping[str, int]) -> tuple[str, ...]:
    """A warning where each class holds one kind of prompt only."""
    kinds = {name: {cell.split(", ")[1] for cell in cells if cell.startswith(name)} for name in ("refused", "complied")}
    if kinds["refused"] and kinds["complied"] and kinds["refused"].isdisjoint(kinds["complied"]):
        return (
            f"The refused class is all {'/'.join(kinds['refused'])}, the complied class all "
            f"{'/'.join(kinds['complied'])}: the probe may detect the kind of prompt. Its AUROC among harmful "
            "transcripts alone tells the two apart.",
        )
    return ()
