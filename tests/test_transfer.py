import numpy as np
import pytest
from conftest import plain_residuals, tokens_of, written
from sklearn.metrics import roc_auc_score

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import fit_probe
from cliffscope.readouts.transfer import ProbeTransfer, probe_transfer
from cliffscope.transcripts.records import Outcome, Transcript, Transcripts

LAYER = 2
SPLITS = ["fit"] * 8 + ["validate"] * 4 + ["test"] * 6


def sourced(name: str, *, n: int = 18, seed: int = 0, word: str = "") -> tuple[Transcripts, Transcripts]:
    """Refused and complied transcripts of a source; `word` is all that the refused ones think, if it is given."""
    refused = written(n, harmful=True, outcome=Outcome.REFUSED, seed=seed)
    complied = written(n, harmful=False, outcome=Outcome.COMPLIED, seed=seed)

    def named(t: Transcript, thinking: str) -> Transcript:
        return t.replace(id=f"{name}-{t.id}", source=name, thinking=thinking or t.thinking)

    return refused.map(lambda t: named(t, f"{word} {word}".strip())), complied.map(lambda t: named(t, ""))


def splits_of(*groups: Transcripts) -> dict[str, str]:
    return {t.id: SPLITS[i] for group in groups for i, t in enumerate(group)}


@pytest.fixture(scope="module")
def two() -> tuple[Transcripts, Transcripts, dict[str, str]]:
    one, other = sourced("one", seed=1), sourced("other", seed=2, word="kind")
    return one[0] + other[0], one[1] + other[1], splits_of(*one, *other)


@pytest.fixture(scope="module")
def found(llama: LensModel, two: tuple[Transcripts, Transcripts, dict[str, str]]) -> ProbeTransfer:
    refused, complied, splits = two
    return probe_transfer(llama, refused, complied, layer=LAYER, splits=splits)


def test_every_cell_is_scikit_learns_auroc_of_a_probe_that_saw_the_other_source_alone(
    llama: LensModel, found: ProbeTransfer, two: tuple[Transcripts, Transcripts, dict[str, str]]
) -> None:
    refused, complied, splits = two

    def part(group: Transcripts, source: str, *names: str) -> Transcripts:
        return Transcripts(t for t in group if t.source == source and splits[t.id] in names)

    for fit_source in ("one", "other"):
        every = ("fit", "validate", "test")
        classes = [part(group, fit_source, *every) for group in (refused, complied)]
        probe = fit_probe(llama, *classes, layer=LAYER, splits=splits)
        np.testing.assert_array_equal(probe.weight, found.probes[fit_source].weight)
        for test_source in ("one", "other"):
            rows = [tokens_of(llama, part(group, test_source, "test")) for group in (refused, complied)]
            states = [plain_residuals(llama, r.token_ids.tolist())[LAYER, r.final] for r in [*rows[0], *rows[1]]]
            labels = [1] * 6 + [0] * 6
            cell = found.frame.query("fit_source == @fit_source and test_source == @test_source").iloc[0]
            assert cell["auroc"] == pytest.approx(roc_auc_score(labels, np.stack(states) @ probe.weight))
            assert (cell["n_refused"], cell["n_complied"]) == (6, 6)
            assert cell["ci_low"] <= cell["auroc"] <= cell["ci_high"]


def test_the_matrix_has_a_row_a_pair_and_shows_itself(found: ProbeTransfer) -> None:
    assert found.to_frame().columns.tolist() == [
        *("fit_source", "test_source", "auroc", "ci_low", "ci_high", "n_refused", "n_complied")
    ]
    assert len(found.frame) == 4
    assert found.frame["auroc"].nunique() > 1
    grid = np.array(found.plot().data[0].z, dtype=float)
    cell = found.frame.query("fit_source == 'one' and test_source == 'other'")["auroc"].iloc[0]
    assert grid[0, 1] == pytest.approx(cell, abs=1e-3)
    assert repr(found).startswith("ProbeTransfer(2 sources, AUROC ")
    assert found.small_table()["others"][0] == pytest.approx(cell)


def test_a_source_with_too_few_is_omitted_with_a_reason(
    llama: LensModel, two: tuple[Transcripts, Transcripts, dict[str, str]]
) -> None:
    refused, complied, splits = two
    few = sourced("few", n=6, seed=3)
    more = {**splits, **splits_of(*few)}
    result = probe_transfer(llama, refused + few[0], complied + few[1], layer=LAYER, splits=more)
    assert set(result.probes) == {"one", "other"}
    assert set(result.frame["test_source"]) == {"one", "other"}
    (omission,) = result.omitted
    assert omission.id == "few"
    assert "validate split holds 0 refused" in omission.reason


def test_by_names_the_sources(llama: LensModel, two: tuple[Transcripts, Transcripts, dict[str, str]]) -> None:
    refused, complied, splits = two
    result = probe_transfer(llama, refused, complied, by=lambda _t: "all", layer=LAYER, splits=splits)
    assert result.frame[["fit_source", "test_source"]].to_numpy().tolist() == [["all", "all"]]
    assert "nan" not in repr(result)
    assert result.frame["auroc"][0] == result.probes["all"].report.final.auroc


def test_without_a_source_that_holds_both_classes_the_first_reason_is_told(llama: LensModel) -> None:
    refused, complied = sourced("one")
    with pytest.raises(ProbeError, match="No probe could be fitted on any of 2 sources.*holds 0"):
        probe_transfer(llama, refused, complied, by=lambda t: str(t.outcome), layer=LAYER)
