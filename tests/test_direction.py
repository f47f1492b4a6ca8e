import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SEVERAL, SINGLE, answer_readout, log_odds_of, plain_residuals, random_probe, tokens_of, written
from torch import Tensor

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.readouts import activations
from cliffscope.readouts import readout as readout_module
from cliffscope.readouts.direction import DirectionCheck, check_direction
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

LAYER = 2
FEW = 3


@pytest.fixture(scope="module")
def asked() -> Transcripts:
    return written(FEW, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")


def hand_hooked(model: LensModel, layer: int, place: slice, step: np.ndarray) -> Callable[[list[int]], Tensor]:
    """Plain transformers with one forward hook: the vector is added after a layer at a run of positions."""

    def logits_of(ids: list[int]) -> Tensor:
        def hook(_module: object, _inputs: object, output: object) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            assert isinstance(hidden, Tensor)
            changed = hidden.clone()
            changed[:, place] = changed[:, place] + torch.from_numpy(step).float()
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = model.hf.model.layers[layer].register_forward_hook(hook)
        try:
            with torch.no_grad():
                return model.hf(input_ids=torch.tensor([list(ids)])).logits[0]
        finally:
            handle.remove()

    return logits_of


def typical_norm(model: LensModel, rows: Sequence[TokenizedTranscript], span: Span) -> float:
    norms = [np.linalg.norm(plain_residuals(model, r.token_ids.tolist())[LAYER, r.span(span)], axis=-1) for r in rows]
    return float(np.median([np.median(n) for n in norms]))


@pytest.mark.parametrize("where", ["closing", "thinking"])
@pytest.mark.parametrize("openings", [SINGLE, SEVERAL], ids=["one token", "several"])
def test_the_changes_are_those_of_plain_transformers_with_a_hook_written_by_hand(
    model: LensModel, asked: Transcripts, where: str, openings: dict[str, list[tuple[int, ...]]]
) -> None:
    probe, readout = random_probe(model, LAYER), answer_readout(model, openings)
    found = check_direction(model, probe, readout, asked, where=where, strength=0.7, draws=2, seed=5)
    rows = tokens_of(model, asked)
    norm = typical_norm(model, rows, Span(where))
    assert found.norm == pytest.approx(norm, rel=1e-5)
    drawn = np.random.default_rng(5).standard_normal((2, len(probe.weight)))
    directions = [probe.weight, -probe.weight, *drawn]
    for direction, changes in zip(directions, [found.added, found.subtracted, *found.random], strict=True):
        step = 0.7 * norm * direction / np.linalg.norm(direction)
        for row, change, before in zip(rows, changes, found.unchanged, strict=True):
            ids = row.token_ids[: row.final + 1].tolist()
            plain = log_odds_of(hand_hooked(model, LAYER, slice(0, 0), step), ids, openings)
            moved = log_odds_of(hand_hooked(model, LAYER, row.span(Span(where)), step), ids, openings)
            assert before == pytest.approx(plain, abs=1e-3)
            assert change == pytest.approx(moved - plain, abs=2e-3)
    assert np.abs(found.added).max() > 0.01


def test_a_probe_read_at_its_own_layer_moves_by_the_length_of_the_step(llama: LensModel, asked: Transcripts) -> None:
    probe = random_probe(llama, LAYER)
    found = check_direction(llama, probe, probe, asked, strength=0.25, draws=3, seed=1)
    length = 0.25 * found.norm * np.linalg.norm(probe.weight)
    np.testing.assert_allclose(found.added, length, rtol=1e-3)
    np.testing.assert_allclose(found.subtracted, -length, rtol=1e-3)
    assert (np.abs(found.random.mean(1)) < length).all()
    assert found.added_p == found.subtracted_p == 0.25


def test_p_counts_random_directions_that_move_the_readout_as_far_to_the_same_side() -> None:
    found = DirectionCheck(
        added=np.array([1.0, 3.0], np.float32),
        subtracted=np.array([-1.0, 0.0], np.float32),
        random=np.array([[2.0, 2.0], [0.0, 0.0], [-1.0, -1.0]], np.float32),
        unchanged=np.zeros(2, np.float32),
        where="closing",
        layer=LAYER,
        norm=1.0,
        strength=0.5,
        readout="answer",
        can_tell=True,
        seed=0,
    )
    assert (found.added_p, found.subtracted_p) == (2 / 4, 2 / 4)
    frame = found.to_frame()
    assert frame["direction"].tolist() == ["added", "subtracted", "random 1", "random 2", "random 3"]
    assert frame["effect"].tolist() == [2.0, -0.5, 2.0, 0.0, -1.0]
    assert (frame["ci_low"][0], frame["ci_high"][0]) == (1.0, 3.0)
    assert frame["p"][2:].isna().all()
    assert repr(found).startswith(
        "DirectionCheck(closing, answer: added +2.00 [+1.00, +3.00] p=0.500, subtracted -0.50"
    )
    figure = found.plot()
    assert [trace.x[0] for trace in figure.data[1:]] == [2.0, -0.5]
    assert list(figure.data[0].x) == [2.0, 0.0, -1.0]


def test_a_transcript_alone_is_changed_as_in_a_batch_of_others_of_another_length(
    llama: LensModel, asked: Transcripts
) -> None:
    probe, readout = random_probe(llama, LAYER), answer_readout(llama)
    together = check_direction(llama, probe, readout, asked, draws=1)
    # The length of the step is that of the batch; one transcript's own differs by a factor.
    for i, transcript in enumerate(asked):
        only = Transcripts([transcript])
        norm = check_direction(llama, probe, readout, only, draws=1).norm
        alone = check_direction(llama, probe, readout, only, draws=1, strength=0.5 * together.norm / norm)
        np.testing.assert_allclose(alone.added[0], together.added[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["closing", "thinking"])
def test_a_long_transcript_in_chunks_is_changed_as_in_one_pass(
    llama: LensModel, asked: Transcripts, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    probe, readout = random_probe(llama, LAYER), answer_readout(llama)
    one = asked[:1]
    whole = check_direction(llama, probe, readout, one, where=where, draws=1)
    for module in (activations, readout_module):
        monkeypatch.setattr(module, "LONG", 8)
    monkeypatch.setattr(activations, "CHUNK", 5)
    chunked = check_direction(llama, probe, readout, one, where=where, draws=1)
    assert chunked.norm == pytest.approx(whole.norm, rel=1e-5)
    np.testing.assert_allclose(chunked.added, whole.added, atol=1e-3)
    np.testing.assert_allclose(chunked.random, whole.random, atol=1e-3)


def test_nothing_is_left_behind_even_after_an_error(
    llama: LensModel, asked: Transcripts, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    check = unchanged(llama)
    check_direction(llama, random_probe(llama, LAYER), answer_readout(llama), asked, draws=1)
    check()

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_direction(llama, random_probe(llama, LAYER), answer_readout(llama), asked, draws=1, progress=stop)
    check()


def test_transcripts_without_thinking_are_left_out_with_a_reason(llama: LensModel, asked: Transcripts) -> None:
    empty = asked[0].replace(id="empty", thinking="")
    probe, readout = random_probe(llama, LAYER), answer_readout(llama)
    found = check_direction(llama, probe, readout, Transcripts([empty, *asked]), where="thinking", draws=1)
    assert len(found.added) == FEW
    assert [o.id for o in found.omitted] == ["empty"]
    with pytest.raises(ProbeError, match="None of 1 transcripts can be changed at the thinking"):
        check_direction(llama, probe, readout, Transcripts([empty]), where="thinking", draws=1)


def test_a_readout_below_the_probe_is_refused_since_it_cannot_move(llama: LensModel, asked: Transcripts) -> None:
    with pytest.raises(ProbeError, match="reads layer 1, but the probe's direction is that of layer 2"):
        check_direction(llama, random_probe(llama, LAYER), random_probe(llama, 1), asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"where": "prompt"}, "where='prompt'"), ({"strength": 0.0}, "strength=0.0"), ({"draws": 0}, "draws=0")],
)
def test_arguments_out_of_range_are_refused(
    llama: LensModel, asked: Transcripts, change: dict[str, object], message: str
) -> None:
    # As a user calls it: in the tests, types of arguments are checked before the function is.
    with pytest.raises(ProbeError, match=message):
        inspect.unwrap(check_direction)(llama, random_probe(llama, LAYER), answer_readout(llama), asked, **change)


def test_what_cannot_tell_is_said(llama: LensModel, asked: Transcripts) -> None:
    probe = random_probe(llama, LAYER)
    weak = replace(probe, report=random_probe(llama, LAYER, final_low=0.6).report)
    assert check_direction(llama, probe, probe, asked, draws=1).can_tell
    assert not check_direction(llama, probe, weak, asked, draws=1).can_tell
