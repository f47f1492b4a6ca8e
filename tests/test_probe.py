from collections import Counter

import numpy as np
import pytest
from conftest import MakeCheckpoint, plain_residuals, random_probe, tokens_of, written
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

from cliffscope.errors import OtherModelError, ProbeError
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts import probe as probe_module
from cliffscope.readouts.logistic import fit_logistic
from cliffscope.readouts.probe import RefusalProbe, fit_probe
from cliffscope.readouts.regions import balanced_positions, regions
from cliffscope.readouts.reports import (
    CAN_TELL,
    RegionReport,
    calibration_of,
    cells_of,
    one_sided_warning,
    region_report,
)
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

Split = dict[str, str]
LAYER = 2


@pytest.fixture(scope="module")
def splits(refused: Transcripts, complied: Transcripts) -> Split:
    """Ten of each class to fit, six to validate, eight to test."""
    names = ["fit"] * 10 + ["validate"] * 6 + ["test"] * 8
    return {t.id: name for group in (refused, complied) for t, name in zip(group, names, strict=True)}


@pytest.fixture(scope="module")
def final_probe(llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split) -> RefusalProbe:
    return fit_probe(llama, refused, complied, layer=LAYER, positions="final", splits=splits)


@pytest.fixture(scope="module")
def balanced_probe(llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split) -> RefusalProbe:
    return fit_probe(llama, refused, complied, layer=LAYER, positions="balanced", splits=splits)


def final_states(model: LensModel, rows: list[TokenizedTranscript], layer: int) -> np.ndarray:
    return np.stack([plain_residuals(model, row.token_ids.tolist())[layer, row.final] for row in rows]).astype(float)


def part(group: Transcripts, splits: Split, name: str) -> Transcripts:
    return group.where(ids={t.id for t in group if splits[t.id] == name})


def test_the_folded_probe_is_the_decision_function_of_a_sklearn_pipeline(
    llama: LensModel, final_probe: RefusalProbe, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    def states(name: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        groups = [tokens_of(llama, part(g, splits, name)) for g in (refused, complied)]
        labels = np.repeat([True, False], [len(g) for g in groups])
        return final_states(llama, [*groups[0], *groups[1]], layer), labels

    for layer in (0, LAYER, 7):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=final_probe.strength, max_iter=2000))
        pipeline.fit(*states("fit", layer))
        held, _ = states("test", layer)
        found = held @ final_probe.layer_weights[layer] + final_probe.layer_biases[layer]
        np.testing.assert_allclose(found, pipeline.decision_function(held), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(final_probe.weight, final_probe.layer_weights[LAYER])
    assert final_probe.bias == pytest.approx(float(final_probe.layer_biases[LAYER]))


def test_the_balanced_probe_is_a_weighted_sklearn_pipeline(
    llama: LensModel, balanced_probe: RefusalProbe, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    rng = np.random.default_rng(0)
    states, labels, weights = [], [], []
    for group, label in ((refused, True), (complied, False)):
        for row in tokens_of(llama, part(group, splits, "fit")):
            positions = balanced_positions(row, probe_module.THINKING_POSITIONS, rng)
            thinking = int((positions < row.bounds[1]).sum())
            states.append(plain_residuals(llama, row.token_ids.tolist())[LAYER, positions].astype(float))
            labels += [label] * len(positions)
            weights += [0.5 / thinking] * thinking + [0.5 / (len(positions) - thinking)] * (len(positions) - thinking)
    weight = np.array(weights) / np.mean(weights)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=balanced_probe.strength, max_iter=2000))
    fitted = {"standardscaler__sample_weight": weight, "logisticregression__sample_weight": weight}
    pipeline.fit(np.concatenate(states), labels, **fitted)
    held = np.concatenate(states)[::7]
    found = held @ balanced_probe.weight + balanced_probe.bias
    np.testing.assert_allclose(found, pipeline.decision_function(held), rtol=1e-3, atol=1e-3)


def test_classes_of_different_size_weigh_the_same(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    fewer = complied.where(ids={t.id for i, t in enumerate(complied) if i >= 6})
    found = fit_probe(llama, refused, fewer, layer=LAYER, positions="final", splits=splits)
    rows = [tokens_of(llama, part(g, splits, "fit")) for g in (refused, fewer)]
    states = final_states(llama, [*rows[0], *rows[1]], LAYER)
    labels = np.repeat([True, False], [len(rows[0]), len(rows[1])])
    weight = np.where(labels, 1 / len(rows[0]), 1 / len(rows[1])) * len(labels) / 2
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=found.strength, max_iter=2000))
    fitted = {"standardscaler__sample_weight": weight, "logisticregression__sample_weight": weight}
    pipeline.fit(states, labels, **fitted)
    assert (len(rows[0]), len(rows[1])) == (10, 4)
    np.testing.assert_allclose(states @ found.weight + found.bias, pipeline.decision_function(states), atol=1e-3)


def test_every_transcript_of_a_class_weighs_the_same_with_and_without_thinking() -> None:
    positions = [np.arange(n, dtype=np.int64) for n in (9, 3, 5, 7)]
    sample = probe_module._Sample(
        rows=[], refused=np.array([True, True, False, True]), positions=positions, n_thinking=[6, 0, 4, 7]
    )
    labels, weights = sample.labels_and_weights(sample.refused)
    parts = np.split(weights, np.cumsum([9, 3, 5]))
    totals = [part.sum() / weights.sum() for part in parts]
    assert labels.tolist() == [True] * 12 + [False] * 5 + [True] * 7
    assert totals == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6])
    assert parts[0][:6].sum() == pytest.approx(parts[0][6:].sum())
    assert weights.mean() == pytest.approx(1.0)


def test_a_planted_direction_is_recovered_from_synthetic_residuals() -> None:
    rng = np.random.default_rng(0)
    planted = rng.normal(size=24)
    planted /= np.linalg.norm(planted)
    labels = np.arange(2000) % 2 == 0
    noise = rng.normal(size=(2000, 24)) + 5.0
    residuals = (noise + np.where(labels, 1.5, -1.5)[:, None] * planted).astype(np.float32)
    weight, bias = fit_logistic(residuals, labels, np.ones(2000), 0.01)
    assert weight @ planted / np.linalg.norm(weight) > 0.98
    logits = residuals @ weight + bias
    assert (logits[labels] > 0).mean() > 0.9
    assert (logits[~labels] < 0).mean() > 0.9


def test_dimensions_that_never_vary_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    residuals = rng.normal(size=(60, 5)).astype(np.float32)
    residuals[:, 2] = 300.0
    labels = residuals[:, 0] > 0
    weight, bias = fit_logistic(residuals, labels, np.ones(60), 0.01)
    logits = residuals @ weight + bias
    assert np.isfinite(weight).all()
    assert roc_auc_score(labels, logits) > 0.95
    assert abs(np.median(logits)) < 2


def test_the_test_split_is_reported_with_sklearns_auroc(
    llama: LensModel, final_probe: RefusalProbe, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    rows = [tokens_of(llama, part(g, splits, "test")) for g in (refused, complied)]
    labels = np.repeat([1, 0], 8)
    logits = final_states(llama, [*rows[0], *rows[1]], LAYER) @ final_probe.weight + final_probe.bias
    report = final_probe.report.final
    assert (report.n_refused, report.n_complied) == (8, 8)
    assert report.auroc == pytest.approx(roc_auc_score(labels, logits))
    assert report.brier == pytest.approx(np.mean((1 / (1 + np.exp(-logits)) - labels) ** 2), abs=1e-4)
    assert report.interval.low <= report.auroc <= report.interval.high


def test_every_layer_and_region_is_reported(
    llama: LensModel, balanced_probe: RefusalProbe, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    table = balanced_probe.report.by_region
    rows = [(t, k) for k, g in ((1, refused), (0, complied)) for t in tokens_of(llama, part(g, splits, "test"))]
    assert set(table["layer"]) == set(range(8))
    assert set(table["region"]) == {name for row, _ in rows for name in regions(row)}
    region, layer = "thinking 40-60%", 5
    values = [
        plain_residuals(llama, row.token_ids.tolist())[layer, regions(row)[region]].mean(0)
        @ balanced_probe.layer_weights[layer]
        for row, _ in rows
        if region in regions(row)
    ]
    labels = [kind for row, kind in rows if region in regions(row)]
    (found,) = table[(table["layer"] == layer) & (table["region"] == region)]["auroc"]
    assert found == pytest.approx(roc_auc_score(labels, values), abs=0.02)


def test_words_of_the_thinking_that_differ_are_told_apart(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    wrong = refused.map(lambda t: t.replace(thinking=" ".join(["hurt"] * 9)))
    fine = complied.map(lambda t: t.replace(thinking=" ".join(["kind"] * 9)))
    found = fit_probe(llama, wrong, fine, layer=0, splits=splits)
    assert found.report.late_thinking.auroc > 0.95
    assert found.report.late_thinking.interval.low > 0.5
    assert repr(found).startswith("RefusalProbe(layer 0, balanced positions, held-out AUROC ")


def test_the_refused_logit_is_the_mean_over_held_out_refused_transcripts(
    llama: LensModel, final_probe: RefusalProbe, refused: Transcripts, splits: Split
) -> None:
    held = refused.where(ids={t.id for t in refused if splits[t.id] == "test"})
    logits = final_states(llama, tokens_of(llama, held), LAYER) @ final_probe.weight + final_probe.bias
    assert final_probe.refused_logit == pytest.approx(logits.mean(), rel=1e-3, abs=1e-3)


def test_shuffled_labels_teach_nothing(llama: LensModel) -> None:
    same = written(40, harmful=True, outcome=Outcome.REFUSED), written(40, harmful=False, outcome=Outcome.COMPLIED)
    found = fit_probe(llama, *same, layer=7, positions="final")
    assert len(found.report.shuffled) == probe_module.SHUFFLES
    assert len(set(found.report.shuffled)) > 3
    assert abs(np.mean(found.report.shuffled) - 0.5) < 0.2


def test_the_same_call_gives_the_same_probe(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    a, b, other = (fit_probe(llama, refused, complied, layer=LAYER, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.layer_weights, b.layer_weights)
    assert a.report.shuffled == b.report.shuffled
    assert not np.array_equal(a.weight, other.weight)


def test_the_order_of_the_transcripts_hardly_matters(
    llama: LensModel, refused: Transcripts, complied: Transcripts, final_probe: RefusalProbe, splits: Split
) -> None:
    found = fit_probe(llama, refused[::-1], complied[::-1], layer=LAYER, positions="final", splits=splits)
    np.testing.assert_allclose(found.weight, final_probe.weight, rtol=0.05, atol=1e-3)
    assert found.report.final.auroc == pytest.approx(final_probe.report.final.auroc)


def test_a_prompt_in_both_classes_is_never_on_two_sides(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = refused.map(lambda t: t.replace(id=f"twin of {t.id}", outcome=Outcome.COMPLIED))
    seen: list[dict[str, str]] = []
    real = probe_module.split_by_prompt

    def keep(groups: dict[str, Transcripts], *, seed: int) -> dict[str, str]:
        seen.append(real(groups, seed=seed))
        return seen[-1]

    monkeypatch.setattr(probe_module, "split_by_prompt", keep)
    found = fit_probe(llama, refused, twins, layer=LAYER, positions="final")
    assert all(seen[0][t.id] == seen[0][f"twin of {t.id}"] for t in refused)
    assert found.report.final.auroc == pytest.approx(0.5)


def test_best_is_a_layer_whose_worst_auroc_on_the_validate_split_is_near_the_best(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    found = fit_probe(llama, refused, complied, splits=splits)
    rows = [(t, k) for k, g in ((1, refused), (0, complied)) for t in tokens_of(llama, part(g, splits, "validate"))]
    labels = [kind for _, kind in rows]
    residuals = [plain_residuals(llama, row.token_ids.tolist()) for row, _ in rows]

    def worst(layer: int) -> float:
        logits = [r[layer] @ found.layer_weights[layer] for r in residuals]
        at = [regions(row) for row, _ in rows]
        return min(
            float(roc_auc_score(labels, [x[a[name]].mean() for x, a in zip(logits, at, strict=True)]))
            for name in ("final", "late thinking")
        )

    scores = [worst(layer) for layer in range(8)]
    assert scores[found.layer] >= max(scores) - 0.021
    assert all(score < scores[found.layer] + 0.021 for score in scores[found.layer + 1 :])
    np.testing.assert_array_equal(found.weight, found.layer_weights[found.layer])


def test_a_harmful_challenge_is_held_out_and_counts_in_the_choice(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    challenge = written(20, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    plain = fit_probe(llama, refused, complied, layer=LAYER)
    found = fit_probe(llama, refused, complied, layer=LAYER, challenge=challenge)
    assert sum(n for cell, n in found.report.cells.items() if cell.startswith("complied")) == 12
    assert set(found.report.cells) == {"refused, harmful", "complied, harmless"}
    assert 4 <= found.report.within_harmful.n_complied < 20
    assert plain.report.within_harmful.n_complied == 0
    assert np.isnan(plain.report.within_harmful.auroc)


def test_all_of_the_challenge_but_its_test_part_helps_to_choose(
    llama: LensModel, refused: Transcripts, complied: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliffscope.readouts import probe as module

    chosen_on: list[Counter[str]] = []
    real = module._best_layer

    def watch(scored: list[module._Scored], labelled: module.Labelled) -> int:
        chosen_on.append(Counter(s.kind for s in scored))
        return real(scored, labelled)

    monkeypatch.setattr(module, "_best_layer", watch)
    challenge = written(20, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    splits = {t.id: ("fit", "fit", "validate", "test")[i % 4] for part in (refused, complied, challenge)
              for i, t in enumerate(part)}  # fmt: skip
    found = fit_probe(llama, refused, complied, challenge=challenge, splits=splits)
    assert chosen_on[0]["challenge"] == 15
    assert chosen_on[0]["refused"] == sum(splits[t.id] == "validate" for t in refused)
    assert found.report.within_harmful.n_complied == 5


def test_one_odd_challenge_transcript_chooses_nothing(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    plain = fit_probe(llama, refused, complied)
    odd = written(3, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    found = fit_probe(llama, refused, complied, challenge=odd)
    assert found.layer == plain.layer
    np.testing.assert_array_equal(found.layer_weights, plain.layer_weights)


def test_harmful_transcripts_among_the_complied_are_the_challenge_by_default(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    wrapped = written(24, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    found = fit_probe(llama, refused, complied + wrapped, layer=LAYER)
    assert found.report.within_harmful.n_refused == found.report.final.n_refused
    assert 0 < found.report.within_harmful.n_complied < found.report.final.n_complied
    assert found.report.cells["complied, harmful"] == 12
    assert found.report.warnings == ()


def test_one_sided_classes_are_warned_of(final_probe: RefusalProbe) -> None:
    assert final_probe.report.cells == {"complied, harmless": 10, "refused, harmful": 10}
    assert "refused class is all harmful, the complied class all harmless" in final_probe.report.warnings[0]


def test_cells_and_their_warning_by_hand() -> None:
    def one(name: str, harmful: bool | None) -> Transcript:
        return Transcript(id=name, messages=(Message(role="user", content=name),), harmful=harmful)

    known = {name: one(name, harmful) for name, harmful in (("a", True), ("b", False), ("c", None), ("d", True))}
    rows = [("a", "refused"), ("b", "complied"), ("c", "complied"), ("d", "challenge")]
    assert cells_of(known, rows) == {"complied, harmless": 1, "complied, unlabelled": 1, "refused, harmful": 1}
    assert one_sided_warning(Counter({"refused, harmful": 2, "complied, harmful": 1})) == ()
    assert one_sided_warning({}) == ()
    assert len(one_sided_warning({"refused, harmful": 2, "complied, harmless": 1})) == 1


def test_transcripts_that_cannot_be_tokenized_are_omitted_with_their_reason(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    bare = Transcripts([refused[0].replace(thinking=None), *refused[1:]])
    found = fit_probe(llama, bare, complied, layer=LAYER)
    assert [omission.id for omission in found.omitted] == [refused[0].id]
    assert "thinking is None" in found.omitted[0].reason


@pytest.mark.parametrize(("n_refused", "n_complied"), [(0, 24), (24, 0), (3, 24), (0, 0)])
def test_a_missing_class_is_refused_with_the_numbers(
    llama: LensModel, refused: Transcripts, complied: Transcripts, n_refused: int, n_complied: int
) -> None:
    with pytest.raises(ProbeError, match=rf"{n_refused} refused and {n_complied} complied were given"):
        fit_probe(llama, refused[:n_refused], complied[:n_complied])


@pytest.mark.parametrize("layer", [-1, 8, 99])
def test_a_layer_that_does_not_exist_is_refused(
    llama: LensModel, refused: Transcripts, complied: Transcripts, layer: int
) -> None:
    with pytest.raises(ProbeError, match=rf"layer={layer}: .* layers 0 to 7"):
        fit_probe(llama, refused, complied, layer=layer)


def test_splits_that_leave_a_transcript_out_are_refused(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    fewer = {key: name for key, name in splits.items() if key != refused[0].id}
    with pytest.raises(ProbeError, match="splits"):
        fit_probe(llama, refused, complied, splits=fewer)
    with pytest.raises(ProbeError, match="train"):
        fit_probe(llama, refused, complied, splits={**splits, refused[0].id: "train"})


def test_residuals_that_are_not_finite_are_refused(
    make_checkpoint: MakeCheckpoint, refused: Transcripts, complied: Transcripts
) -> None:
    model = load_model(make_checkpoint("llama"), device="cpu")
    model.blocks[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="layer 3 .*NaN"):
        fit_probe(model, refused, complied)


def test_progress_reaches_the_number_of_fitted_transcripts(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    seen: list[int] = []
    fit_probe(llama, refused, complied, layer=LAYER, splits=splits, progress=seen.append)
    assert seen[0] > 0
    assert max(seen) == 20


def test_a_probe_knows_the_model_it_was_fitted_on(
    models: dict[str, LensModel], final_probe: RefusalProbe, make_checkpoint: MakeCheckpoint
) -> None:
    def narrower(network: PreTrainedModel) -> None:
        network.get_decoder().norm.weight.mul_(0.5)

    assert final_probe.fingerprint == models["llama"].fingerprint
    final_probe.check_model(models["llama"])
    with pytest.raises(OtherModelError, match=f"{final_probe.fingerprint}, these {models['qwen3'].fingerprint}"):
        final_probe.check_model(models["qwen3"])
    with pytest.raises(ProbeError, match="layer 7 of width 32.*4 layers"):
        random_probe(models["llama"], 7).check_model(models["qwen3"])
    wide = load_model(make_checkpoint("llama", hidden_size=40, head_dim=8, change=narrower), device="cpu")
    with pytest.raises(ProbeError, match="width 32, but .* width 40"):
        final_probe.check_model(wide)


def report_of(refused: list[float], complied: list[float]) -> RegionReport:
    return region_report("somewhere", np.array(refused, dtype=float), np.array(complied, dtype=float))


def test_a_region_report_counted_by_hand() -> None:
    report = report_of([2.0, 1.0, -1.0], [0.0, -2.0])
    assert report.auroc == pytest.approx(5 / 6)
    assert (report.n_refused, report.n_complied) == (3, 2)
    assert not report.can_tell
    assert report.to_row()["auroc_low"] == report.interval.low
    assert "at somewhere, n=3+2" in repr(report)


@pytest.mark.parametrize("values", [([], [1.0]), ([1.0], []), ([], [])])
def test_an_empty_class_gives_nan_and_never_the_power_to_tell(
    values: tuple[list[float], list[float]],
) -> None:
    report = report_of(*values)
    assert np.isnan([report.auroc, report.brier, report.tpr_at_1_fpr, report.interval.low]).all()
    assert not report.can_tell


def test_many_well_separated_transcripts_give_the_power_to_tell() -> None:
    assert report_of([20.0 + i for i in range(30)], [float(i) for i in range(30)]).can_tell
    assert CAN_TELL == 0.75


def logit(score: float) -> float:
    return float(np.log(score / (1 - score)))


def test_calibration_counted_by_hand() -> None:
    found = calibration_of(np.array([logit(0.9), logit(0.7)]), np.array([logit(0.8), logit(0.4), logit(0.3)]))
    assert found.refused == pytest.approx(0.8)
    assert found.complied == pytest.approx(0.5)
    assert found.brier == pytest.approx((0.01 + 0.09 + 0.64 + 0.16 + 0.09) / 5)
    # Scores lie in a bin of their own each, so that the error is the mean distance from the label.
    assert found.calibration_error == pytest.approx((0.1 + 0.3 + 0.8 + 0.4 + 0.3) / 5)
    assert (found.refused_interval.low, found.refused_interval.high) == pytest.approx((0.7, 0.9))
    assert (found.complied_interval.low, found.complied_interval.high) == pytest.approx((0.3, 0.8))
    assert (found.n_refused, found.n_complied) == (2, 3)
    assert not found.complied_is_low


@pytest.mark.parametrize(("complied", "low"), [([-1.0] * 5, True), ([-1.0], False), ([], False), ([1.0] * 5, False)])
def test_complied_ones_are_low_only_where_an_interval_says_so(complied: list[float], low: bool) -> None:
    assert calibration_of(np.zeros(3), np.array(complied)).complied_is_low is low


def test_a_class_without_transcripts_has_no_mean_but_the_other_keeps_its_own() -> None:
    found = calibration_of(np.zeros(0), np.zeros(4))
    assert np.isnan([found.refused, found.refused_interval.low, found.refused_interval.high]).all()
    assert (found.complied, found.brier) == (0.5, 0.25)


def test_the_calibration_is_that_of_held_out_harmful_transcripts_at_the_final_token(
    llama: LensModel, refused: Transcripts, complied: Transcripts, splits: Split
) -> None:
    challenge = written(20, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    all_splits = {**splits, **{t.id: ("validate", "test")[i % 2] for i, t in enumerate(challenge)}}
    probe = fit_probe(llama, refused, complied, layer=LAYER, challenge=challenge, splits=all_splits)
    scores = {}
    for name, group in (("refused", refused), ("complied", challenge)):
        held = tokens_of(llama, part(group, all_splits, "test"))
        logits = final_states(llama, held, LAYER) @ probe.weight + probe.bias
        scores[name] = 1 / (1 + np.exp(-logits))
    found = probe.report.calibration
    assert found.refused == pytest.approx(scores["refused"].mean(), abs=1e-3)
    assert found.complied == pytest.approx(scores["complied"].mean(), abs=1e-3)
    squares = [*(scores["refused"] - 1) ** 2, *scores["complied"] ** 2]
    assert found.brier == pytest.approx(np.mean(squares), abs=1e-3)
    assert (found.n_refused, found.n_complied) == (8, 10)
    assert found.complied_interval.low <= found.complied <= found.complied_interval.high
