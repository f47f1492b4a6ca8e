"""How does a probe become JSON, arrays and a table, and the other way round?

The JSON holds what the probe was fitted on and its report, the arrays the directions and biases of all layers, the
table the held-out quality by layer and region. Reading gives the same probe back. Knows no file names.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32

from cliffscope.errors import ProbeError
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.reports import ProbeReport, RegionReport
from cliffscope.stats import Interval
from cliffscope.transcripts.records import Group, Omission


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedProbe:
    """A probe in the form in which it is stored."""

    document: Mapping[str, object]
    """JSON-ready: layer, positions, fingerprint, strength, refused_logit, n_fit, cells, warnings, omitted, report."""
    arrays: Mapping[str, Float32[np.ndarray, "..."]]
    """`weights` [layer, d_model] and `biases` [layer]."""
    layers: pd.DataFrame
    """Held-out quality by layer and region."""


def saved_probe(probe: RefusalProbe) -> SavedProbe:
    """A probe in the form in which it is stored."""
    report = probe.report
    shuffled = np.asarray(report.shuffled)
    document = {
        "layer": probe.layer,
        "positions": probe.positions,
        "fingerprint": probe.fingerprint,
        "template": probe.template,
        "strength": probe.strength,
        "refused_logit": probe.refused_logit,
        "n_fit": _class_counts(report.cells),
        "cells": [
            {
                "class": cell.split(", ")[0],
                "harmful": {Group.HARMFUL: True, Group.HARMLESS: False}.get(Group(cell.split(", ")[1])),
                "n": n,
            }
            for cell, n in report.cells.items()
        ],
        "warnings": list(report.warnings),
        "omitted": [asdict(omission) for omission in probe.omitted],
        "report": {
            "final": _region_json(report.final),
            "late_thinking": _region_json(report.late_thinking),
            "within_harmful_final": _region_json(report.within_harmful),
            "shuffled_final": {
                "auroc": float(shuffled.mean()),
                "auroc_low": float(shuffled.min()),
                "auroc_high": float(shuffled.max()),
                "values": shuffled.tolist(),
            },
        },
    }
    arrays = {"weights": probe.layer_weights, "biases": probe.layer_biases}
    return SavedProbe(document=document, arrays=arrays, layers=report.by_region)


def probe_from_saved(
    data: Mapping[str, Any], arrays: Mapping[str, np.ndarray], layers: pd.DataFrame, *, place: Path
) -> RefusalProbe:
    """The probe that was stored.

    Args:
        data: the document.
        arrays: directions and biases.
        layers: the table.
        place: where they come from, for the message.

    Raises:
        ProbeError: a field is missing or of another type.
    """
    try:
        layer, regions = int(data["layer"]), data["report"]
        report = ProbeReport(
            final=_region(regions["final"]),
            late_thinking=_region(regions["late_thinking"]),
            within_harmful=_region(regions["within_harmful_final"]),
            shuffled=tuple(_number(value) for value in regions["shuffled_final"]["values"]),
            by_region=layers,
            cells={f"{c['class']}, {Group.of(c['harmful'])}": int(c["n"]) for c in data["cells"]},
            warnings=tuple(data["warnings"]),
        )
        return RefusalProbe(
            layer=layer,
            weight=arrays["weights"][layer],
            bias=float(arrays["biases"][layer]),
            layer_weights=arrays["weights"],
            layer_biases=arrays["biases"],
            positions=str(data["positions"]),
            strength=float(data["strength"]),
            refused_logit=float(data["refused_logit"]),
            fingerprint=str(data["fingerprint"]),
            template=str(data.get("template", "")),
            report=report,
            omitted=tuple(Omission(**omission) for omission in data.get("omitted", ())),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ProbeError(f"{place} is no probe of CliffScope: {error!r}. Fit one with cliffscope fit-probe.") from error


def _region_json(report: RegionReport) -> dict[str, object]:
    row = {k: v for k, v in asdict(report).items() if k != "interval"}
    return {
        **row,
        "auroc_low": report.interval.low,
        "auroc_high": report.interval.high,
        "ece": report.calibration_error,
    }


def _region(data: Mapping[str, Any]) -> RegionReport:
    return RegionReport(
        region=str(data["region"]),
        auroc=_number(data["auroc"]),
        interval=Interval(low=_number(data["auroc_low"]), high=_number(data["auroc_high"])),
        tpr_at_1_fpr=_number(data["tpr_at_1_fpr"]),
        brier=_number(data["brier"]),
        calibration_error=_number(data["calibration_error"]),
        n_refused=int(data["n_refused"]),
        n_complied=int(data["n_complied"]),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _class_counts(cells: Mapping[str, int]) -> dict[str, int]:
    return {kind: sum(n for cell, n in cells.items() if cell.startswith(kind)) for kind in ("refused", "complied")}
