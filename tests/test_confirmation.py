"""Candidates are measured again, one by one and on top of each other, against plain hooked passes."""

import numpy as np
import pytest
from conftest import random_probe, written

import cliffscope as cs
from cliffscope.heads.confirmation import confirm_heads
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.heads.statistics import ALPHA, decisive_p
from cliffscope.model.load import LensModel
from cliffscope.readouts.readout import read_final
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import tokenize_all

HEADS = (HeadRef(layer=1, head=2), HeadRef(layer=3, head=0), HeadRef(layer=4, head=5))


@pytest.fixture(scope="module")
def transcripts() -> Transcripts:
    return written(6, harmful=True, outcome=Outcome.COMPLIED)


def test_effects_alone_and_added_are_those_of_plain_passes(llama: LensModel, transcripts: Transcripts) -> None:
    probe = random_probe(llama, 5)
    result = confirm_heads(llama, probe, transcripts, HEADS)
    tokens, _ = tokenize_all(transcripts, llama.tokenizer, llama.template, max_length=llama.shape.context)
    clean = read_final(llama, probe, tokens)
    base, kept = clean, list[HeadRef]()
    for i, head in enumerate(HEADS):
        alone = read_final(llama, probe, tokens, edit=zero([head], scope="closing"))
        np.testing.assert_allclose(result.effects[:, i], alone - clean, atol=2e-3)
        joint = read_final(llama, probe, tokens, edit=zero([*kept, head], scope="closing"))
        np.testing.assert_allclose(result.added[:, i], joint - base, atol=4e-3)
        expected = np.minimum(1.0, len(HEADS) * decisive_p(base, (joint - base)[:, None])[0])
        assert result.p[i] == pytest.approx(expected, nan_ok=True)
        if expected <= ALPHA:
            kept, base = [*kept, head], joint
    assert list(result.confirmed) == kept


def test_the_table_names_every_candidate_and_its_kind(llama: LensModel, transcripts: Transcripts) -> None:
    others = written(5, harmful=False, outcome=Outcome.COMPLIED)
    result = confirm_heads(llama, random_probe(llama, 5), transcripts, HEADS, refused=others, harmless=others)
    table = result.to_frame()
    assert table["head"].tolist() == [2, 0, 5]
    assert set(table["kind"]) <= {"selective", "broad"}
    assert table["n"].tolist() == [6, 6, 6]
    assert "of 3 candidates, n=6" in repr(result)


def test_no_candidates_are_no_error(llama: LensModel, transcripts: Transcripts) -> None:
    result = confirm_heads(llama, random_probe(llama, 5), transcripts, ())
    assert result.confirmed == ()
    assert result.to_frame().empty


def test_a_readout_of_another_model_is_refused(models: dict[str, LensModel], transcripts: Transcripts) -> None:
    with pytest.raises(cs.CliffScopeError):
        confirm_heads(models["qwen2"], random_probe(models["llama"], 7), transcripts, HEADS)
