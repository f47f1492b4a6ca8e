from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import fixed_report, random_probe

from cliffscope.errors import ProbeError, StoreError
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe, fit_probe
from cliffscope.readouts.reports import Calibration, ProbeReport, RegionReport, calibration_of, region_report
from cliffscope.stats import Interval
from cliffscope.store import RunStore, open_run
from cliffscope.study.artefacts import PROBE, PROBE_ARRAYS, PROBE_LAYERS
from cliffscope.study.saved_readouts import load_probe, save_probe
from cliffscope.transcripts.records import Transcripts

JSON, ARRAYS, TABLE = PROBE.file, PROBE_ARRAYS.file, PROBE_LAYERS.file
NAN = float("nan")
EMPTY_REGION = RegionReport(
    region="late thinking",
    auroc=NAN,
    interval=Interval(low=NAN, high=NAN),
    tpr_at_1_fpr=NAN,
    brier=NAN,
    calibration_error=NAN,
    n_refused=0,
    n_complied=0,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with open_run(tmp_path / "run", {}) as run:
        yield run


@pytest.fixture(scope="module")
def fitted(llama: LensModel, refused: Transcripts, complied: Transcripts) -> RefusalProbe:
    return fit_probe(llama, refused, complied, layer=3)


def table_of(*regions: str) -> pd.DataFrame:
    """Held-out quality of two layers, the second without values."""
    logits = np.array([1.0, 2.0, 0.5]), np.array([0.0, 1.5])
    reports = [(0, region_report(r, *logits)) for r in regions]
    reports += [(1, region_report(r, logits[0], np.array([]))) for r in regions]
    return pd.DataFrame([{"layer": layer, **report.to_row()} for layer, report in reports])


def probe_with(model: LensModel, **changes: object) -> RefusalProbe:
    """A random probe whose report has a table."""
    probe = random_probe(model, 4)
    report = ProbeReport(**{f.name: getattr(probe.report, f.name) for f in fields(ProbeReport)})
    return replace(probe, report=replace(report, **{"by_region": table_of("final", "late thinking"), **changes}))


def same_values(a: RegionReport | Calibration, b: RegionReport | Calibration) -> None:
    assert type(a) is type(b)
    for f in fields(a):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if isinstance(left, Interval):
            np.testing.assert_array_equal([left.low, left.high, left.level], [right.low, right.high, right.level])
        else:
            np.testing.assert_equal(left, right)
            assert type(left) is type(right)


def same_probe(a: RefusalProbe, b: RefusalProbe) -> None:
    for name in ("weight", "layer_weights", "layer_biases"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype == np.float32
    for name in ("layer", "bias", "positions", "fingerprint", "refused_logit"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("final", "late_thinking", "within_harmful", "calibration"):
        same_values(getattr(a.report, name), getattr(b.report, name))
    np.testing.assert_array_equal(np.array(a.report.shuffled, float), np.array(b.report.shuffled, float))
    assert all(isinstance(value, float) for value in b.report.shuffled)
    assert dict(a.report.cells) == dict(b.report.cells)
    assert a.report.warnings == b.report.warnings


def test_a_fitted_probe_is_read_back_with_the_same_arrays_and_report(store: RunStore, fitted: RefusalProbe) -> None:
    save_probe(store, fitted)
    found = load_probe(store)
    same_probe(fitted, found)
    assert repr(found) == repr(fitted)
    assert repr(found.report) == repr(fitted.report)


def test_the_table_by_layer_and_region_is_read_back_as_it_was(store: RunStore, fitted: RefusalProbe) -> None:
    save_probe(store, fitted)
    found = load_probe(store).report.by_region
    kept = fitted.report.by_region
    pd.testing.assert_frame_equal(found[kept.columns.tolist()], kept, check_dtype=False)


def test_saving_what_was_read_writes_the_same_files(store: RunStore, fitted: RefusalProbe) -> None:
    save_probe(store, fitted)
    before = {name: (store.path / name).read_bytes() for name in (JSON, ARRAYS)}
    save_probe(store, load_probe(store))
    assert {name: (store.path / name).read_bytes() for name in (JSON, ARRAYS)} == before


def test_nan_is_kept_as_nan(store: RunStore, llama: LensModel) -> None:
    probe = probe_with(
        llama,
        late_thinking=EMPTY_REGION,
        within_harmful=EMPTY_REGION,
        calibration=calibration_of(np.zeros(0), np.zeros(0)),
        shuffled=(0.5, NAN, 0.25),
    )
    save_probe(store, probe)
    found = load_probe(store)
    assert np.isnan(found.report.late_thinking.auroc)
    assert not found.report.late_thinking.can_tell
    assert np.isnan([found.report.calibration.complied, found.report.calibration.complied_interval.high]).all()
    same_probe(probe, found)


def test_what_is_written_is_what_the_report_reads(store: RunStore, llama: LensModel) -> None:
    cells = {"complied, harmless": 38, "complied, unlabelled": 2, "refused, harmful": 40}
    save_probe(store, probe_with(llama, cells=cells, warnings=("Beware.",)))
    data = store.read_json(JSON)
    assert data["n_fit"] == {"refused": 40, "complied": 40}
    assert data["cells"] == [
        {"class": "complied", "harmful": False, "n": 38},
        {"class": "complied", "harmful": None, "n": 2},
        {"class": "refused", "harmful": True, "n": 40},
    ]
    assert data["warnings"] == ["Beware."]
    final = data["report"]["final"]
    assert (final["auroc"], final["auroc_low"], final["auroc_high"], final["n_refused"]) == (0.95, 0.9, 1.0, 20)
    assert dict(load_probe(store).report.cells) == cells
    assert set(store.read_arrays(ARRAYS)) == {"weights", "biases"}
    assert {"layer", "region", "auroc", "auroc_low", "auroc_high"} <= set(store.read_frame(TABLE).columns)


def test_the_probe_read_scores_as_the_probe_written(store: RunStore, fitted: RefusalProbe) -> None:
    save_probe(store, fitted)
    residuals = np.random.default_rng(0).normal(size=(5, len(fitted.weight))).astype(np.float32)
    found = load_probe(store)
    np.testing.assert_array_equal(residuals @ found.weight + found.bias, residuals @ fitted.weight + fitted.bias)


def without(name: str) -> Callable[[RunStore], None]:
    def change(store: RunStore) -> None:
        store.write_json(JSON, {k: v for k, v in store.read_json(JSON).items() if k != name})

    return change


def with_value(name: str, value: object) -> Callable[[RunStore], None]:
    return lambda store: store.write_json(JSON, {**store.read_json(JSON), name: value})


@pytest.mark.parametrize(
    "damage",
    [
        *(without(n) for n in ("layer", "report", "cells", "warnings", "positions", "fingerprint", "refused_logit")),
        with_value("layer", 99),
        with_value("layer", "three"),
        with_value("layer", None),
        with_value("report", {"final": {}}),
        with_value("report", []),
        with_value("cells", [{"class": "refused"}]),
        with_value("refused_logit", None),
        lambda store: store.write_arrays(ARRAYS, {"weights": np.zeros((8, 32), np.float32)}),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_a_probe_error(
    store: RunStore, llama: LensModel, damage: Callable[[RunStore], None]
) -> None:
    save_probe(store, probe_with(llama))
    damage(store)
    with pytest.raises(ProbeError, match=r"probe\.json is no probe of CliffScope.*fit-probe"):
        load_probe(store)


@pytest.mark.parametrize("name", [JSON, ARRAYS, TABLE])
@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_file_that_is_missing_or_damaged_is_a_store_error_that_names_it(
    store: RunStore, llama: LensModel, name: str, content: bytes | None
) -> None:
    save_probe(store, probe_with(llama))
    (store.path / name).unlink()
    if content is not None:
        (store.path / name).write_bytes(content)
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        load_probe(store)


def test_a_region_is_told_in_one_line() -> None:
    assert repr(fixed_report("final")) == "AUROC 0.950 [0.900, 1.000] at final, n=20+20"
