"""What can a probe tell, and what are its classes made of?

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

from cliffscope.notebook import Plotted
from cliffscope.stats import Interval, auroc, auroc_interval, brier, expected_calibration_error, tpr_at_fpr
from cliffscope.transcripts.records import Transcript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CAN_TELL = 0.75
"""Lower bound of the held-out AUROC from which a probe is said to be able to tell at a region."""


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


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeReport(Plotted):
    """What a probe can tell on its test split."""

    final: RegionReport
    """At the final token."""
    late_thinking: RegionReport
    """Over the last two fifths of the thinking; empty for a model without thinking."""
    within_harmful: RegionReport
    """At the final token, among harmful transcripts alone: refusal rather than harmfulness."""
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
