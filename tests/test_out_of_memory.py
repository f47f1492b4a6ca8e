"""Where memory runs out, traces and pools go on with smaller batches; the memory here is a number of tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_probe, tokens_of, written
from torch import nn

from cliffscope.errors import ResourceError
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe, fit_probe
from cliffscope.readouts.readout import read_final
from cliffscope.readouts.trace import NO_MEMORY, trace_refusal
from cliffscope.selection.scoring import score_pool
from cliffscope.transcripts.records import Outcome, Transcripts

TRANSCRIPTS = written(12, harmful=True, outcome=Outcome.COMPLIED)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


@contextmanager
def memory_for(model: LensModel, tokens: int, error: Exception = CUDA) -> Iterator[list[int]]:
    """Room for so many tokens at once; yields how many tokens each pass that failed had."""
    failed: list[int] = []

    def refuse(_module: nn.Module, _inputs: tuple, options: dict) -> None:
        n = options["input_ids"].numel()
        if n > tokens:
            failed.append(n)
            raise error

    handle = model.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield failed
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def probe(llama: LensModel) -> RefusalProbe:
    return random_probe(llama, 4)


@pytest.fixture(scope="module")
def longest(llama: LensModel) -> int:
    return max(row.n_pos for row in tokens_of(llama, TRANSCRIPTS))


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
def test_a_trace_goes_on_in_halves_and_is_the_same(
    llama: LensModel,
    probe: RefusalProbe,
    longest: int,
    error: Exception,
    unchanged: Callable[[LensModel], Callable[[], None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = trace_refusal(llama, probe, TRANSCRIPTS, layers_of=[TRANSCRIPTS[0].id, TRANSCRIPTS[1].id])
    check = unchanged(llama)
    with memory_for(llama, 3 * longest, error) as failed:
        halved = trace_refusal(llama, probe, TRANSCRIPTS, layers_of=[TRANSCRIPTS[0].id, TRANSCRIPTS[1].id])
    check()
    assert failed, "memory never ran out"
    assert [t.id for t in halved.transcripts] == [t.id for t in whole.transcripts]
    for a, b in zip(halved.logits, whole.logits, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert halved.layer_logits.keys() == whole.layer_logits.keys()
    assert halved.omitted == whole.omitted == ()
    assert "Memory ran out with 12 transcripts at once" in caplog.text


def test_scores_of_a_pool_go_on_in_halves_and_are_the_same(llama: LensModel, probe: RefusalProbe, longest: int) -> None:
    whole = score_pool(llama, probe, TRANSCRIPTS).to_frame()
    with memory_for(llama, 2 * longest) as failed:
        halved = score_pool(llama, probe, TRANSCRIPTS).to_frame()
    assert failed
    pd.testing.assert_frame_equal(halved, whole, atol=1e-5, rtol=0)


def test_a_size_that_was_too_large_is_not_tried_again(llama: LensModel, probe: RefusalProbe, longest: int) -> None:
    with memory_for(llama, longest) as failed:
        score_pool(llama, probe, Transcripts(TRANSCRIPTS[0].replace(id=f"{i}") for i in range(40)), batch_tokens=480)
    assert 1 <= len(failed) <= 4, "a batch of some ten rows fits after four halvings"


def test_fits_and_final_readouts_go_on_too(llama: LensModel, probe: RefusalProbe, longest: int) -> None:
    rows = tokens_of(llama, TRANSCRIPTS)
    whole = read_final(llama, probe, rows)
    with memory_for(llama, 3 * longest) as failed:
        np.testing.assert_allclose(read_final(llama, probe, rows), whole, atol=1e-4)
    assert failed
    refused, complied = (
        written(20, harmful=h, outcome=o) for h, o in ((True, Outcome.REFUSED), (False, Outcome.COMPLIED))
    )
    splits = {t.id: ["fit", "fit", "validate", "test"][i % 4] for g in (refused, complied) for i, t in enumerate(g)}
    plain = fit_probe(llama, refused, complied, layer=3, splits=splits)
    with memory_for(llama, 4 * longest) as failed:
        again = fit_probe(llama, refused, complied, layer=3, splits=splits)
    assert failed
    np.testing.assert_allclose(again.weight, plain.weight, atol=1e-4)


@pytest.fixture(scope="module")
def one_too_long(llama: LensModel) -> tuple[Transcripts, int]:
    """Transcripts of which the third is longer than there is memory for, and the tokens that there is memory for."""
    long = TRANSCRIPTS[2].replace(thinking=(TRANSCRIPTS[2].thinking or "") * 3, thinking_ids=None)
    rest = [t for i, t in enumerate(TRANSCRIPTS) if i != 2]
    rows = tokens_of(llama, rest)
    return Transcripts([*rest[:2], long, *rest[2:]]), max(row.n_pos for row in rows)


def test_a_transcript_that_does_not_fit_alone_is_left_out_with_its_reason(
    llama: LensModel, probe: RefusalProbe, one_too_long: tuple[Transcripts, int], tmp_path: Path
) -> None:
    transcripts, room = one_too_long
    with memory_for(llama, room):
        traces = trace_refusal(llama, probe, transcripts)
        frame = score_pool(llama, probe, transcripts, out=tmp_path / "scores").to_frame()
    assert [(o.id, o.reason) for o in traces.omitted] == [(transcripts[2].id, NO_MEMORY)]
    assert len(traces.transcripts) == 11
    assert frame["reason"].tolist() == ["", "", NO_MEMORY, *[""] * 9]
    assert frame["valid"].tolist() == [True, True, False, *[True] * 9]
    again = score_pool(llama, probe, transcripts, out=tmp_path / "scores")
    assert again.frame["valid"].all(), "what does not fit one machine may fit another"
    assert score_pool(llama, probe, transcripts, out=tmp_path / "scores").resumed == 12


def test_memory_for_nothing_is_a_typed_error(llama: LensModel, probe: RefusalProbe) -> None:
    with memory_for(llama, 3):
        with pytest.raises(ResourceError, match="none of 12 transcripts"):
            trace_refusal(llama, probe, TRANSCRIPTS)
        with pytest.raises(ResourceError, match="one transcript of"):
            read_final(llama, probe, tokens_of(llama, TRANSCRIPTS))
        assert set(score_pool(llama, probe, TRANSCRIPTS).frame["reason"]) == {NO_MEMORY}
    assert ResourceError.exit_code == 7


def test_another_error_is_not_taken_for_it(llama: LensModel, probe: RefusalProbe) -> None:
    with (
        memory_for(llama, 3, RuntimeError("index out of range")),
        pytest.raises(RuntimeError, match="index out of range"),
    ):
        trace_refusal(llama, probe, TRANSCRIPTS)
