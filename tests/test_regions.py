import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliffscope.errors import SpanError
from cliffscope.readouts.regions import balanced_positions, late_thinking, region_names, regions
from cliffscope.transcripts.transcript import TokenizedTranscript

FIFTHS = ["thinking 0-20%", "thinking 20-40%", "thinking 40-60%", "thinking 60-80%", "thinking 80-100%"]


def spans(prompt: int, thinking: int, closing: int, answer: int = 0) -> TokenizedTranscript:
    stops = np.cumsum([prompt, thinking, closing, answer]).tolist()
    return TokenizedTranscript(id="a", token_ids=np.arange(stops[3], dtype=np.int64), bounds=tuple(stops))


sizes = st.builds(spans, st.integers(1, 30), st.integers(0, 80), st.integers(1, 9), st.integers(0, 9))


def test_regions_of_a_transcript_counted_by_hand() -> None:
    found = {name: positions.tolist() for name, positions in regions(spans(2, 7, 3, 4)).items()}
    assert found == {
        "prompt": [0, 1],
        "thinking 0-20%": [2, 3],
        "thinking 20-40%": [4, 5],
        "thinking 40-60%": [6],
        "thinking 60-80%": [7],
        "thinking 80-100%": [8],
        "late thinking": [6, 7, 8],
        "closing -2": [9],
        "closing -1": [10],
        "final": [11],
    }


def test_regions_come_in_order_of_position() -> None:
    names = list(regions(spans(3, 20, 3)))
    assert names == ["prompt", *FIFTHS, "late thinking", "closing -2", "closing -1", "final"]


def test_a_transcript_without_thinking_has_no_thinking_regions() -> None:
    assert list(regions(spans(3, 0, 2))) == ["prompt", "closing -1", "final"]


def test_a_transcript_without_closing_is_refused() -> None:
    with pytest.raises(SpanError, match="closing"):
        regions(spans(3, 4, 0))


@pytest.mark.parametrize(("thinking", "late"), [(1, [2]), (2, [3]), (5, [5, 6]), (10, [8, 9, 10, 11])])
def test_late_thinking_is_the_last_two_fifths_rounded_up(thinking: int, late: list[int]) -> None:
    assert late_thinking(spans(2, thinking, 3)).tolist() == late


@given(sizes)
def test_fifths_and_closing_cover_their_spans_once_and_never_touch_the_answer(row: TokenizedTranscript) -> None:
    found = regions(row)
    once = [p for name, positions in found.items() if name != "late thinking" for p in positions.tolist()]
    assert once == list(range(row.final + 1))
    assert set(late_thinking(row)) <= set(range(row.bounds[0], row.bounds[1]))


@given(sizes, st.integers(1, 40), st.integers(0, 5))
def test_balanced_positions_are_stratified_thinking_and_the_whole_closing(
    row: TokenizedTranscript, most: int, seed: int
) -> None:
    found = balanced_positions(row, most, np.random.default_rng(seed))
    thinking, closing = found[found < row.bounds[1]], found[found >= row.bounds[1]]
    length = row.bounds[1] - row.bounds[0]
    assert closing.tolist() == list(range(row.bounds[1], row.bounds[2]))
    assert len(thinking) == min(most, length)
    assert found.tolist() == sorted(set(found.tolist()))
    assert all(row.bounds[0] <= p for p in thinking)
    if len(thinking):
        assert np.max(np.diff([row.bounds[0] - 1, *thinking, row.bounds[1]])) <= 2 * -(-length // len(thinking))


def test_balanced_positions_depend_on_the_generator_alone() -> None:
    row = spans(4, 60, 3)
    same = [balanced_positions(row, 8, np.random.default_rng(3)).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != balanced_positions(row, 8, np.random.default_rng(4)).tolist()


def test_region_names_hold_every_region_of_every_transcript() -> None:
    rows = [spans(3, 2, 4), spans(3, 20, 2), spans(3, 0, 6)]
    names = region_names(rows)
    assert set(names) == {name for row in rows for name in regions(row)}
    assert region_names([]) == []
