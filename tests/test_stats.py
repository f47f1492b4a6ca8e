import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from cliffscope.errors import DataError, ShapeError
from cliffscope.resampling import bootstrap_mean, paired_bootstrap_difference, sign_flip_p
from cliffscope.stats import (
    Interval,
    auroc,
    auroc_interval,
    benjamini_hochberg,
    brier,
    cohen_kappa,
    expected_calibration_error,
    mcnemar,
    random_set_p,
    tpr_at_fpr,
    wilson,
)

EMPTY = np.array([])
SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30).map(np.array)


def labelled(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[np.ones(len(positive)), np.zeros(len(negative))], np.r_[positive, negative]


def coverage(truth: float, intervals: list[Interval]) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


@given(SCORES, SCORES)
@settings(max_examples=50, deadline=None)
def test_auroc_equals_sklearn_and_the_count_of_won_pairs(positive: np.ndarray, negative: np.ndarray) -> None:
    pairs = np.sign(positive[:, None] - negative)
    assert auroc(positive, negative) == pytest.approx((pairs.mean() + 1) / 2)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(*labelled(positive, negative)))


@given(SCORES, SCORES)
@settings(max_examples=50, deadline=None)
def test_auroc_of_swapped_classes_is_the_complement_and_monotone_maps_change_nothing(
    positive: np.ndarray, negative: np.ndarray
) -> None:
    assert auroc(negative, positive) == pytest.approx(1 - auroc(positive, negative))
    assert auroc(np.exp(positive), np.exp(negative)) == auroc(positive, negative)


def test_auroc_is_undefined_without_a_class_or_with_a_nan_score() -> None:
    assert np.isnan(auroc(EMPTY, np.ones(3)))
    assert np.isnan(auroc(np.ones(3), EMPTY))
    assert np.isnan(auroc(np.array([1.0, np.nan]), np.ones(2)))
    assert np.isnan(auroc_interval(EMPTY, np.ones(3)).low)


@given(SCORES, SCORES)
@settings(max_examples=50, deadline=None)
def test_auroc_interval_lies_in_the_unit_interval_around_the_estimate(
    positive: np.ndarray, negative: np.ndarray
) -> None:
    interval = auroc_interval(positive, negative)
    assert 0 <= interval.low <= auroc(positive, negative) + 1e-9
    assert auroc(positive, negative) - 1e-9 <= interval.high <= 1


@given(SCORES, SCORES)
@settings(max_examples=25, deadline=None)
def test_auroc_interval_of_swapped_classes_is_mirrored(positive: np.ndarray, negative: np.ndarray) -> None:
    one, other = auroc_interval(positive, negative), auroc_interval(negative, positive)
    assert one.low == pytest.approx(1 - other.high, abs=1e-6)


def test_a_perfect_auroc_of_few_transcripts_keeps_a_wide_interval() -> None:
    few = auroc_interval(np.ones(5), np.zeros(5))
    many = auroc_interval(np.ones(200), np.zeros(200))
    assert few.high == many.high == 1
    assert few.low < 0.75
    assert many.low > 0.97


@pytest.mark.parametrize(("shift", "n", "m"), [(0.0, 20, 20), (1.0, 15, 40), (2.0, 25, 25)])
def test_auroc_interval_covers_the_truth_about_as_often_as_it_says(shift: float, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    truth = float(scipy_stats.norm.cdf(shift / np.sqrt(2)))
    intervals = [auroc_interval(rng.normal(shift, 1, n), rng.normal(0, 1, m)) for _ in range(600)]
    assert 0.92 <= coverage(truth, intervals) <= 0.99


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
@settings(max_examples=50, deadline=None)
def test_tpr_at_fpr_is_the_best_of_all_thresholds(positive: np.ndarray, negative: np.ndarray, fpr: float) -> None:
    thresholds = [np.inf, *positive, *negative]
    rates = [(np.mean(positive >= t), np.mean(negative >= t)) for t in thresholds]
    assert tpr_at_fpr(positive, negative, fpr) == pytest.approx(max(tpr for tpr, rate in rates if rate <= fpr + 1e-9))


def test_infinite_scores_are_the_largest_and_the_smallest() -> None:
    positive, negative = np.array([np.inf, 1.0, -np.inf]), np.array([0.0, -np.inf])
    assert auroc(positive, negative) == pytest.approx((2 + 2 + 0.5) / 6)
    assert tpr_at_fpr(positive, negative, fpr=0.0) == pytest.approx(2 / 3)


def test_tpr_at_fpr_lets_no_negative_pass_when_there_are_too_few() -> None:
    assert tpr_at_fpr(np.array([0.9, 0.5]), np.array([0.5, 0.1]), fpr=0.01) == 0.5
    assert np.isnan(tpr_at_fpr(EMPTY, np.ones(2)))
    assert np.isnan(tpr_at_fpr(np.ones(2), np.array([np.nan])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_brier_is_the_mean_squared_distance_and_accepts_booleans(dtype: type) -> None:
    rng = np.random.default_rng(1)
    score, label = rng.random(50).astype(dtype), rng.random(50) < 0.4
    expected = np.mean((score.astype(np.float64) - label) ** 2)
    assert brier(score, label) == pytest.approx(expected, abs=1e-12)
    assert brier(score, label.astype(float)) == pytest.approx(expected, abs=1e-12)


def test_brier_exists_where_all_labels_are_equal() -> None:
    assert brier(np.array([0.5, 0.5]), np.array([True, True])) == 0.25
    assert brier(np.array([0.25]), np.array([False])) == 0.0625


def test_brier_is_undefined_without_rows_or_with_a_nan_score_and_refuses_other_lengths() -> None:
    assert np.isnan(brier(EMPTY, EMPTY))
    assert np.isnan(brier(np.array([0.5, np.nan]), np.array([True, False])))
    with pytest.raises(ShapeError, match="same rows"):
        brier(np.ones(2), np.ones(3))


def test_calibration_error_equals_the_weighted_gap_of_sklearns_bins() -> None:
    rng = np.random.default_rng(2)
    score, label = rng.random(500), rng.random(500) < 0.3
    share, mean = calibration_curve(label, score, n_bins=10)
    counts = np.histogram(score, bins=10, range=(0, 1))[0]
    assert expected_calibration_error(score, label) == pytest.approx(np.sum(counts * np.abs(share - mean)) / 500)


def test_calibration_error_puts_the_ends_of_the_range_into_bins() -> None:
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([True, False])) == 1
    assert np.isnan(expected_calibration_error(EMPTY, EMPTY))


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
@settings(max_examples=50, deadline=None)
def test_wilson_equals_its_closed_form_and_holds_the_share(counts: tuple[int, int], level: float) -> None:
    successes, n = counts
    share, z = successes / n, float(scipy_stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    interval = wilson(successes, n, level=level)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0 <= interval.low <= share <= interval.high <= 1


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_examples(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_wilson_limits_reach_the_ends_exactly_and_do_not_collapse_there(n: int) -> None:
    nothing, everything = wilson(0, n), wilson(n, n)
    assert nothing.low == 0
    assert everything.high == 1
    z = float(scipy_stats.norm.ppf(0.975))
    assert nothing.high == pytest.approx(z**2 / (n + z**2), abs=1e-12)
    assert everything.low == pytest.approx(n / (n + z**2), abs=1e-12)


def test_wilson_is_undefined_without_trials_and_refuses_impossible_counts() -> None:
    assert np.isnan(wilson(0, 0).low)
    with pytest.raises(DataError, match="5 successes of 3"):
        wilson(5, 3)
    with pytest.raises(DataError, match="Confidence level"):
        wilson(1, 3, level=95.0)


def test_bootstrap_mean_matches_a_plain_loop() -> None:
    values = np.random.default_rng(3).normal(size=(30, 2))
    low, high = bootstrap_mean(values, seed=7, draws=500)
    rows = np.random.default_rng(7).integers(0, 30, size=(500, 30))
    means = np.array([values[r].mean(axis=0) for r in rows])
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0))


def test_bootstrap_mean_of_a_column_does_not_depend_on_its_neighbours() -> None:
    values = np.random.default_rng(4).normal(size=(40, 700))  # more columns than one block holds
    low, high = bootstrap_mean(values, seed=0)
    alone = bootstrap_mean(values[:, 650], seed=0)
    np.testing.assert_allclose([low[650], high[650]], alone, rtol=1e-12)


def test_bootstrap_mean_keeps_trailing_shape_and_leaves_out_missing_values() -> None:
    values = np.full((6, 2, 3), 1.0)
    values[:3, 0, 0] = np.nan
    values[1:, 1, 1] = np.nan
    low, high = bootstrap_mean(values, seed=0, draws=200)
    assert low.shape == high.shape == (2, 3)
    assert np.isnan(low[1, 1])
    assert np.isnan(high[1, 1])
    assert low[0, 0] == high[0, 0] == 1


def test_bootstrap_mean_is_undefined_for_fewer_than_two_rows() -> None:
    for n in (0, 1):
        low, high = bootstrap_mean(np.ones((n, 4)), seed=0)
        assert np.isnan(low).all()
        assert np.isnan(high).all()


def test_bootstrap_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    low, high = bootstrap_mean(np.random.default_rng(5).normal(1, 2, size=(40, 500)), seed=1, draws=1000)
    assert 0.90 <= np.mean((low <= 1) & (high >= 1)) <= 0.98


def test_paired_difference_is_narrower_than_unpaired_noise_and_signed() -> None:
    rng = np.random.default_rng(6)
    prompt = rng.normal(0, 10, 50)
    interval = paired_bootstrap_difference(prompt + 1 + rng.normal(0, 0.1, 50), prompt, seed=0)
    assert 0.9 < interval.low < 1 < interval.high < 1.1
    swapped = paired_bootstrap_difference(np.array([False, False]), np.array([True, True]), seed=0)
    assert (swapped.low, swapped.high) == (-1, -1)
    with pytest.raises(ShapeError, match="same rows"):
        paired_bootstrap_difference(np.ones(2), np.ones(3), seed=0)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_sign_flip_p_equals_scipys_exact_permutation_test(alternative: str) -> None:
    values = np.random.default_rng(7).normal(0.5, 1, size=(9, 3))
    for column in range(3):
        expected = scipy_stats.permutation_test(
            (values[:, column],), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf
        )
        p = sign_flip_p(values, seed=0, alternative=alternative)
        assert p[column] == pytest.approx(expected.pvalue)


def test_sign_flip_p_counts_ties_in_spite_of_rounding() -> None:
    assert sign_flip_p(np.array([0.1, 0.2, 0.3, 0.6]), seed=0) == pytest.approx(1 / 16)
    assert sign_flip_p(np.array([0.1, 0.2, -0.3]), seed=0) == pytest.approx(5 / 8)


def test_sign_flip_p_is_bounded_by_its_draws_and_undefined_without_values() -> None:
    values = np.column_stack([np.ones(30), np.full(30, np.nan), np.zeros(30)])
    p = sign_flip_p(values, seed=0, draws=99)
    assert p[0] == 0.01
    assert np.isnan(p[1])
    assert p[2] == 1
    assert np.isnan(sign_flip_p(np.empty((0, 2)), seed=0)).all()


def test_sign_flip_p_is_uniform_under_the_null() -> None:
    p = sign_flip_p(np.random.default_rng(8).normal(size=(25, 800)), seed=0, draws=1000)
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.001
    assert 0.03 <= np.mean(p <= 0.05) <= 0.07


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=20).map(np.array))
@settings(max_examples=50, deadline=None)
def test_benjamini_hochberg_equals_its_definition_and_passes_nan_through(p: np.ndarray) -> None:
    q, tested = benjamini_hochberg(p), p[~np.isnan(p)]
    m = len(tested)
    for value, adjusted in zip(p, q, strict=True):
        if np.isnan(value):
            assert np.isnan(adjusted)
            continue
        larger = [min(1.0, other * m / np.sum(tested <= other)) for other in tested if other >= value]
        assert adjusted == pytest.approx(min(larger))


def test_benjamini_hochberg_keeps_the_shape_of_a_head_grid() -> None:
    assert benjamini_hochberg(np.full((3, 4), 0.5)).tolist() == np.full((3, 4), 0.5).tolist()


def test_mcnemar_sums_the_binomial_tail_of_the_discordant_pairs() -> None:
    a = np.array([True] * 8 + [False] * 2 + [True] * 50)
    b = np.array([False] * 8 + [True] * 2 + [True] * 50)
    assert mcnemar(a, b) == pytest.approx(2 * (45 + 10 + 1) / 1024)  # at most 2 of 10, both tails
    assert mcnemar(a, b) == mcnemar(b, a)
    assert np.isnan(mcnemar(a, a)), "without a discordant pair there is nothing to test"
    with pytest.raises(ShapeError, match="same rows"):
        mcnemar(a, b[:-1])


def test_random_set_p_counts_the_observed_set_and_ties() -> None:
    assert random_set_p(5.0, np.arange(5.0)) == pytest.approx(1 / 6)
    assert random_set_p(4.0, np.arange(5.0)) == pytest.approx(2 / 6)
    assert np.isnan(random_set_p(1.0, EMPTY))
    assert np.isnan(random_set_p(np.nan, np.ones(3)))


def test_kappa_and_its_limits_equal_their_definition() -> None:
    rng = np.random.default_rng(9)
    a = rng.integers(0, 3, 80)
    b = np.where(rng.random(80) < 0.6, a, rng.integers(0, 3, 80))
    table = np.zeros((4, 4), dtype=np.int64)  # neither judge uses the fourth class
    np.add.at(table, (a, b), 1)
    kappa, interval = cohen_kappa(table)
    same, chance = np.mean(a == b), sum(np.mean(a == c) * np.mean(b == c) for c in range(3))
    limits = wilson(int(np.sum(a == b)), 80)
    expected = [(share - chance) / (1 - chance) for share in (same, limits.low, limits.high)]
    assert [kappa, interval.low, interval.high] == pytest.approx(expected, abs=1e-12)
    assert interval.low < kappa < interval.high


def test_kappa_of_a_published_table() -> None:
    """Fleiss, Cohen and Everitt, Psychological Bulletin 72 (1969): 200 subjects, three classes, kappa 0.429."""
    shares = np.array([[0.53, 0.05, 0.02], [0.11, 0.14, 0.05], [0.01, 0.06, 0.03]])
    kappa, _ = cohen_kappa(np.rint(200 * shares).astype(np.int64))
    assert kappa == pytest.approx(0.429, abs=5e-4)


def test_kappa_of_perfect_agreement_on_few_items_is_not_certain() -> None:
    kappa, interval = cohen_kappa(np.diag([4, 4]))
    assert (kappa, interval.high) == (1, 1)
    assert interval.low < 0.5


def test_kappa_is_undefined_without_items_or_with_one_class() -> None:
    for table in (np.zeros((2, 2), dtype=np.int64), np.array([[9, 0], [0, 0]])):
        kappa, interval = cohen_kappa(table)
        assert np.isnan(kappa)
        assert np.isnan(interval.low)


def test_kappa_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(10)
    share = np.array([[0.45, 0.1], [0.05, 0.4]])
    truth, _ = cohen_kappa((share * 10**6).astype(np.int64))
    tables = [rng.multinomial(60, share.ravel()).reshape(2, 2) for _ in range(800)]
    assert 0.92 <= coverage(truth, [cohen_kappa(table)[1] for table in tables]) <= 0.99
