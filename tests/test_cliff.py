import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliffscope.readouts.cliff import PROMPT_BINS, THINKING_BINS, align_trace, measure_cliff

NONE = slice(0, 0)
score_lists = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def aligned(score: list[float], bounds: tuple[int, int, int], width: int = 3) -> list[float]:
    found = align_trace(
        np.array(score),
        prompt=slice(0, bounds[0]),
        thinking=slice(bounds[0], bounds[1]),
        closing=slice(bounds[1], bounds[2]),
        closing_width=width,
    )
    return found.tolist()


def test_a_cliff_measured_by_hand() -> None:
    score = np.array([0.0, 0.5, 0.9, 0.8, 0.6, 0.7, 0.3, 0.2])
    found = measure_cliff(score, thinking=slice(1, 6), late=slice(4, 6), final=7)
    assert found.plateau_max == 0.9
    assert found.plateau_mean == pytest.approx(0.7)
    assert found.plateau_late == pytest.approx(0.65)
    assert found.final == 0.2
    assert found.drop_position == 6
    assert found.drop == pytest.approx(0.4)


def test_a_fall_before_late_thinking_is_no_drop() -> None:
    score = np.array([0.9, 0.9, 0.1, 0.8, 0.7, 0.75, 0.7])
    found = measure_cliff(score, thinking=slice(1, 5), late=slice(3, 5), final=6)
    assert found.drop_position == 4
    assert found.drop == pytest.approx(0.1)


def test_a_score_that_only_rises_has_no_drop() -> None:
    found = measure_cliff(np.array([0.1, 0.2, 0.3, 0.4]), thinking=slice(1, 3), late=slice(2, 3), final=3)
    assert found.drop_position == -1
    assert found.drop == 0.0


def test_a_level_score_has_no_drop_and_no_cliff() -> None:
    found = measure_cliff(np.full(6, 0.5), thinking=slice(1, 4), late=slice(2, 4), final=5)
    assert (found.drop_position, found.drop) == (-1, 0.0)
    assert found.plateau_mean - found.final == 0.0


def test_without_thinking_the_plateaus_are_nan_and_the_drop_is_at_the_closing() -> None:
    found = measure_cliff(np.array([0.9, 0.8, 0.1]), thinking=slice(1, 1), late=NONE, final=2)
    assert np.isnan([found.plateau_max, found.plateau_mean, found.plateau_late]).all()
    assert (found.final, found.drop_position) == (0.1, 2)


def test_positions_after_the_final_one_are_ignored() -> None:
    score = np.array([0.5, 0.9, 0.8, 0.7, 0.0, 1.0])
    a = measure_cliff(score, thinking=slice(1, 3), late=slice(2, 3), final=3)
    b = measure_cliff(score[:4], thinking=slice(1, 3), late=slice(2, 3), final=3)
    assert a == b


@given(score_lists, score_lists, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_cliff_obeys_its_definitions(prompt: list[float], thinking: list[float], closing: list[float]) -> None:
    score = np.array([*prompt, *thinking, *closing])
    start, stop = len(prompt), len(prompt) + len(thinking)
    late = slice(stop - -(-len(thinking) * 2 // 5), stop)
    found = measure_cliff(score, thinking=slice(start, stop), late=late, final=len(score) - 1)
    assert found.plateau_max == max(thinking)
    assert found.plateau_mean <= found.plateau_max + 1e-12
    assert found.final == closing[-1]
    assert -1 <= found.plateau_max - found.final <= 1
    if found.drop_position >= 0:
        assert late.start <= found.drop_position < len(score)
        assert found.drop == score[found.drop_position - 1] - score[found.drop_position] > 0
    else:
        assert (np.diff(score[late.start - 1 :]) >= 0).all()


def test_spans_of_as_many_tokens_as_bins_are_kept_as_they_are() -> None:
    score = [*np.arange(PROMPT_BINS), *np.arange(100, 100 + THINKING_BINS), 7.0, 8.0, 9.0]
    assert aligned(score, (5, 15, 18)) == score


def test_longer_spans_are_averaged_bin_by_bin() -> None:
    score = [*np.repeat(np.arange(5.0), 3), *np.repeat(np.arange(10.0), 2), 1.0]
    assert aligned(score, (15, 35, 36), width=1) == [*range(5), *range(10), 1.0]


def test_a_short_span_repeats_its_nearest_token() -> None:
    found = aligned([0.0, 1.0, 0.4, 0.9], (2, 3, 4), width=1)
    assert found[0] == 0.0
    assert found[4] == 1.0
    assert found[PROMPT_BINS : PROMPT_BINS + THINKING_BINS] == [0.4] * THINKING_BINS
    assert found[-1] == 0.9


def test_closings_are_aligned_at_their_end() -> None:
    short = aligned([0.5, 0.5, 0.1, 0.2], (1, 2, 4), width=3)
    assert np.isnan(short[-3])
    assert short[-2:] == [0.1, 0.2]
    assert aligned([0.5, 0.5, 0.1, 0.2, 0.3, 0.4], (1, 2, 6), width=3)[-3:] == [0.2, 0.3, 0.4]


def test_empty_thinking_is_nan_in_every_bin() -> None:
    found = aligned([0.5, 0.1], (1, 1, 2), width=1)
    assert np.isnan(found[PROMPT_BINS:-1]).all()
    assert len(found) == PROMPT_BINS + THINKING_BINS + 1


@given(score_lists, score_lists, st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 8))
def test_aligned_values_stay_within_their_span(
    prompt: list[float], thinking: list[float], closing: list[float], width: int
) -> None:
    bounds = (len(prompt), len(prompt) + len(thinking), len(prompt) + len(thinking) + len(closing))
    found = np.array(aligned([*prompt, *thinking, *closing], bounds, width))
    bins = found[PROMPT_BINS : PROMPT_BINS + THINKING_BINS]
    assert len(found) == PROMPT_BINS + THINKING_BINS + width
    assert min(thinking) - 1e-9 <= bins.min() <= bins.max() <= max(thinking) + 1e-9
    assert found[-1] == closing[-1]
    assert np.isfinite(found).sum() == PROMPT_BINS + THINKING_BINS + min(width, len(closing))


@given(st.floats(0, 1), st.integers(1, 50), st.integers(1, 50))
def test_a_constant_trace_stays_constant(value: float, prompt: int, thinking: int) -> None:
    found = aligned([value] * (prompt + thinking + 3), (prompt, prompt + thinking, prompt + thinking + 3))
    np.testing.assert_allclose(found, value, rtol=1e-12)
