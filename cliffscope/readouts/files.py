"""How is a readout stored on disk?

Of a probe, `probe.safetensors` holds the directions and biases of all layers, `probe.json` the rest and
`probe_layers.parquet` the held-out quality by layer and region. An answer readout is `answer.json`. Reading gives the
same readout back.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cliffscope.errors import ProbeError
from cliffscope.readouts.answer import AnswerReadout
from cliffscope.readouts.openings import Opening
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.reports import AnswerReport, ProbeReport, RegionReport
from cliffscope.stats import Interval
from cliffscope.transcripts.records import Omission

if TYPE_CHECKING:
    from cliffscope.store import RunStore

JSON, ARRAYS, TABLE = "probe.json", "probe.safetensors", "probe_layers.parquet"
ANSWER = "answer.json"


def save_probe(store: "RunStore", probe: RefusalProbe) -> None:
    """Writes a probe into a run directory."""
    report = probe.report
    store.write_arrays(ARRAYS, {"weights": probe.layer_weights, "biases": probe.layer_biases})
    store.write_frame(TABLE, report.by_region)
    shuffled = np.asarray(report.shuffled)
    store.write_json(
        JSON,
        {
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
                    "harmful": {"harmful": True, "harmless": False}.get(cell.split(", ")[1]),
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
        },
    )


def load_probe(store: "RunStore") -> RefusalProbe:
    """Reads a probe from a run directory; raises ProbeError where a field is missing."""
    data: dict[str, Any] = store.read_json(JSON)
    arrays = store.read_arrays(ARRAYS)
    try:
        layer, regions = int(data["layer"]), data["report"]
        report = ProbeReport(
            final=_region(regions["final"]),
            late_thinking=_region(regions["late_thinking"]),
            within_harmful=_region(regions["within_harmful_final"]),
            shuffled=tuple(_number(value) for value in regions["shuffled_final"]["values"]),
            by_region=store.read_frame(TABLE),
            cells={f"{c['class']}, {_word(c['harmful'])}": int(c["n"]) for c in data["cells"]},
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
        raise ProbeError(
            f"{store.path / JSON} is no probe of CliffScope: {error!r}. Fit one with cliffscope fit-probe."
        ) from error


def save_answer_readout(store: "RunStore", readout: AnswerReadout) -> None:
    """Writes an answer readout into a run directory."""
    report = readout.report
    store.write_json(
        ANSWER,
        {
            "layer": readout.layer,
            "vocabulary": readout.vocabulary,
            "fingerprint": readout.fingerprint,
            "template": readout.template,
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
        },
    )


def load_answer_readout(store: "RunStore") -> AnswerReadout:
    """Reads an answer readout from a run directory; raises ProbeError where a field is missing."""
    data: dict[str, Any] = store.read_json(ANSWER)
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
            f"{store.path / ANSWER} is no answer readout of CliffScope: {error!r}. Fit one with cs.fit_answer_readout."
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _word(harmful: bool | None) -> str:
    return {True: "harmful", False: "harmless", None: "unlabelled"}[harmful]


def _class_counts(cells: Mapping[str, int]) -> dict[str, int]:
    return {kind: sum(n for cell, n in cells.items() if cell.startswith(kind)) for kind in ("refused", "complied")}
