"""How does a readout become JSON, arrays and a table, and the other way round?

Of a probe, the JSON holds what it was fitted on and its report, the arrays the directions and biases of all layers, the
table the held-out quality by layer and region. An answer readout is JSON alone. Reading gives the same readout back.
Knows no file names.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32

from cliffscope.errors import ProbeError
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.openings import Opening
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.reports import AnswerReport, Calibration, ProbeReport, RegionReport
from cliffscope.readouts.text_baseline import TextBaseline
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
        "note": probe.note,
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
            "calibration_harmful_final": asdict(report.calibration),
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
            calibration=_calibration(regions["calibration_harmful_final"]),
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
            template=str(data["template"]),
            note=str(data.get("note", "")),
            report=report,
            omitted=tuple(Omission(**omission) for omission in data.get("omitted", ())),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ProbeError(f"{place} is no probe of CliffScope: {error!r}. Fit one with cliffscope fit-probe.") from error


def saved_answer_readout(readout: AnswerReadout) -> dict[str, object]:
    """An answer readout as a JSON-ready document."""
    report = readout.report
    return {
        "layer": readout.layer,
        "vocabulary": readout.vocabulary,
        "fingerprint": readout.fingerprint,
        "template": readout.template,
        "note": readout.note,
        "refused_logit": readout.refused_logit,
        "openings": [asdict(opening) for opening in readout.openings],
        "omitted": [asdict(omission) for omission in readout.omitted],
        "report": {
            "final": _region_json(report.final),
            "within_harmful_final": _region_json(report.within_harmful),
            "openings": report.openings.to_dict("records"),
            "separation": report.separation,
            "covered": report.covered,
            "mass": report.mass,
            "warnings": list(report.warnings),
        },
    }


def saved_text_baseline(baseline: TextBaseline) -> dict[str, object]:
    """A text baseline as a JSON-ready document."""
    return {
        "overall": _region_json(baseline.overall),
        "within_harmful": _region_json(baseline.within_harmful),
        "strength": baseline.strength,
        "n_terms": baseline.n_terms,
        "terms": baseline.terms.to_dict("records"),
    }


def answer_readout_from_saved(data: Mapping[str, Any], *, place: Path) -> AnswerReadout:
    """The answer readout that was stored.

    Args:
        data: the document.
        place: where it comes from, for the message.

    Raises:
        ProbeError: a field is missing or of another type.
    """
    try:
        report = data["report"]
        return AnswerReadout(
            openings=tuple(
                Opening(
                    token_ids=tuple(int(i) for i in opening["token_ids"]),
                    refuses=bool(opening["refuses"]),
                    text=str(opening["text"]),
                )
                for opening in data["openings"]
            ),
            layer=int(data["layer"]),
            vocabulary=int(data["vocabulary"]),
            refused_logit=float(data["refused_logit"]),
            fingerprint=str(data["fingerprint"]),
            template=str(data["template"]),
            note=str(data.get("note", "")),
            report=AnswerReport(
                final=_region(report["final"]),
                within_harmful=_region(report["within_harmful_final"]),
                openings=pd.DataFrame(report["openings"]),
                separation=_number(report["separation"]),
                covered=_number(report["covered"]),
                mass=_number(report["mass"]),
                warnings=tuple(report["warnings"]),
            ),
            omitted=tuple(Omission(**omission) for omission in data.get("omitted", ())),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ProbeError(
            f"{place} is no answer readout of CliffScope: {error!r}. Fit one with cs.fit_answer_readout."
        ) from error


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


def _calibration(data: Mapping[str, Any]) -> Calibration:
    numbers = {name: _number(data[name]) for name in ("brier", "calibration_error", "refused", "complied")}
    intervals = {
        name: Interval(low=_number(data[name]["low"]), high=_number(data[name]["high"]))
        for name in ("refused_interval", "complied_interval")
    }
    return Calibration(
        brier=numbers["brier"],
        calibration_error=numbers["calibration_error"],
        refused=numbers["refused"],
        refused_interval=intervals["refused_interval"],
        complied=numbers["complied"],
        complied_interval=intervals["complied_interval"],
        n_refused=int(data["n_refused"]),
        n_complied=int(data["n_complied"]),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _class_counts(cells: Mapping[str, int]) -> dict[str, int]:
    return {kind: sum(n for cell, n in cells.items() if cell.startswith(kind)) for kind in ("refused", "complied")}
