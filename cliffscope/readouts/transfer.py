"""Does a probe that was fitted on some sources of prompts tell refusals of others?

1. All transcripts are split by prompt once, so that what is tested in one source was fitted on in none.
2. On the fit and validate split of each source a probe is fitted, with its own layer and regularisation.
3. Each probe is read at the final position of every source's test split.

A probe of refusal carries over; a probe of topic, phrasing or harmfulness does not. A source is whatever `by` says:
the data set, a wrapper, a language. Knows no heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.labelled import CHALLENGE, COMPLIED, REFUSED, Labelled, split_by_prompt
from cliffscope.readouts.probe import Positions, RefusalProbe, fit_probe
from cliffscope.readouts.readout import read_final
from cliffscope.readouts.regions import FINAL
from cliffscope.readouts.reports import region_report
from cliffscope.transcripts.records import Omission, Transcript, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "probe_transfer"
_COLUMNS = ["fit_source", "test_source", "auroc", "ci_low", "ci_high", "n_refused", "n_complied"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeTransfer(Plotted):
    """Held-out AUROC at the final position, source by source."""

    frame: pd.DataFrame
    """One row a pair: fit_source, test_source, auroc, ci_low, ci_high, n_refused, n_complied (of the test split)."""
    probes: Mapping[str, RefusalProbe]
    """The probe that was fitted on each source."""
    omitted: tuple[Omission, ...]
    """Sources that hold too few transcripts, and transcripts that could not be read; `id` is the source or the
    transcript."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """Mean AUROC of each source's probe on its own source and on the others: fit_source, same, others."""
        same = self.frame["fit_source"] == self.frame["test_source"]
        rows = [
            (name, self.frame["auroc"][mine & same].mean(), self.frame["auroc"][mine & ~same].mean())
            for name in self.probes
            for mine in [self.frame["fit_source"] == name]
        ]
        return pd.DataFrame(rows, columns=["fit_source", "same", "others"])

    def plot(self) -> "Figure":
        """The matrix as a heat map."""
        from cliffscope.figures.transfer import transfer_heat

        names = list(self.probes)
        grids = [
            self.frame.pivot(index="fit_source", columns="test_source", values=value)
            .reindex(index=names, columns=names)
            .to_numpy(float)
            for value in ("auroc", "ci_low", "ci_high")
        ]
        return transfer_heat(names, *grids, title=f"Probes fitted on one source, tested on another ({self._n()})")

    def _n(self) -> str:
        n = sorted((self.frame["n_refused"] + self.frame["n_complied"]).tolist())
        return f"n={n[0]}" if n[0] == n[-1] else f"n={n[0]} to {n[-1]}"

    def __repr__(self) -> str:
        """One line: sources, mean AUROC on the same and on other sources, n."""
        means = self.small_table()[["same", "others"]].mean()
        others = f", {means['others']:.3f} on others" if np.isfinite(means["others"]) else ""
        return (
            f"ProbeTransfer({len(self.probes)} sources, AUROC {means['same']:.3f} on the same{others}, {self._n()}; "
            f"omitted {len(self.omitted)})"
        )


def probe_transfer(
    model: LensModel,
    refused: Transcripts,
    complied: Transcripts,
    *,
    by: Callable[[Transcript], str] | None = None,
    challenge: Transcripts | None = None,
    layer: int | Literal["best"] = "best",
    positions: Positions = "balanced",
    splits: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ProbeTransfer:
    """Fits a probe on each source and tests it on every source.

    Args:
        model: the model.
        refused: transcripts that end in a refusal.
        complied: transcripts that end in an answer. Each source needs both classes.
        by: names the source of a transcript; None takes `Transcript.source`.
        challenge: as of `fit_probe`; each probe is given those of its source.
        layer: as of `fit_probe`; "best" chooses one a source.
        positions: as of `fit_probe`.
        splits: transcript id to "fit", "validate" or "test"; None splits by prompt over all sources.
        seed: of the split, the positions and the shuffles.
        progress: called with the number of sources done.

    Returns:
        The matrix over the sources that hold enough of both classes to fit, choose and test; the others are omitted.

    Raises:
        ProbeError: no source holds enough; the message holds the first reason.
    """
    source_of = by or (lambda transcript: transcript.source)
    groups = {REFUSED: refused, COMPLIED: complied, CHALLENGE: challenge or Transcripts(())}
    side = split_by_prompt(groups, seed=seed) if splits is None else splits
    names = {t.id: str(source_of(t)) for group in groups.values() for t in group}
    probes: dict[str, RefusalProbe] = {}
    omitted: list[Omission] = []
    sources = sorted({names[t.id] for group in (refused, complied) for t in group})
    for i, source in enumerate(sources):
        part = {kind: Transcripts(t for t in group if names[t.id] == source) for kind, group in groups.items()}
        try:
            probes[source] = fit_probe(
                model,
                part[REFUSED],
                part[COMPLIED],
                challenge=part[CHALLENGE],
                layer=layer,
                positions=positions,
                splits=side,
                seed=seed,
            )
        except ProbeError as error:
            omitted.append(Omission(stage=STAGE, reason=str(error), id=source))
        if progress is not None:
            progress(i + 1)
    if not probes:
        why = omitted[0].reason if omitted else "no transcript was given"
        raise ProbeError(f"No probe could be fitted on any of {len(sources)} sources: {why}")
    labelled = Labelled.build(model, groups, side, fewest=dict.fromkeys(("fit", "validate", "test"), 0))
    frame = _matrix(model, probes, labelled, names)
    return ProbeTransfer(frame=frame, probes=probes, omitted=(*omitted, *labelled.omitted))


def _matrix(
    model: LensModel, probes: Mapping[str, RefusalProbe], labelled: Labelled, names: Mapping[str, str]
) -> pd.DataFrame:
    """One row a pair of sources."""
    test = [(t, kind) for t, kind in labelled.part("test") if kind != CHALLENGE and names[t.id] in probes]
    refuses = np.array([kind == REFUSED for _, kind in test])
    source = np.array([names[t.id] for t, _ in test])
    rows = []
    for fit_source, probe in probes.items():
        logits = read_final(model, probe, [t for t, _ in test])
        for test_source in probes:
            there = source == test_source
            report = region_report(FINAL, logits[there & refuses], logits[there & ~refuses])
            bounds = (report.interval.low, report.interval.high)
            rows.append((fit_source, test_source, report.auroc, *bounds, report.n_refused, report.n_complied))
    return pd.DataFrame(rows, columns=_COLUMNS)
