"""Whatever measures refusal takes any readout: linear or not, of one position or of several."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import answer_readout, plain_residuals, random_probe, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cliffscope.errors import DataError, ProbeError
from cliffscope.heads.attribution import attribute_heads
from cliffscope.heads.branches import Change, Job
from cliffscope.heads.controls import control_sets
from cliffscope.heads.edits import EditKind, HeadRef, Scope, zero
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.shares import decompose_logit
from cliffscope.heads.sources import trace_sources
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.readouts import activations
from cliffscope.readouts import readout as readouts
from cliffscope.readouts.continuations import ROOT, Continuations
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.readouts.trace import trace_refusal
from cliffscope.selection.scoring import score_pool
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=1, head=0), HeadRef(layer=2, head=3)]
sequences = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8)


class Curved(Readout):
    """A user's own readout: neither linear nor of one position."""

    name = "curved"
    refused_logit = 2.0
    fingerprint = template = ""
    report = SimpleNamespace(can_tell=True)

    def __init__(self, layer: int, tree: Continuations | None = None) -> None:
        self.layer, self.tree = layer, tree or Continuations()

    @property
    def continuations(self) -> Continuations:
        return self.tree

    def logits(self, model: LensModel, residuals: Tensor) -> Tensor:
        weights = torch.arange(1.0, 1 + residuals.shape[-2])
        return torch.tanh(residuals.float()).square().mean(-1) @ weights * 10


def curved_by_hand(model: LensModel, row: TokenizedTranscript, curved: Curved) -> float:
    """From transformers' own hidden states, one pass a node."""
    ids = row.token_ids[: row.final + 1].tolist()
    paths = [[curved.tree.tokens[i] for i in np.flatnonzero(seen)] for seen in curved.tree.ancestors]
    states = [plain_residuals(model, [*ids, *path])[curved.layer, -1] for path in ([], *paths)]
    return sum(10 * (1 + i) * float((np.tanh(state) ** 2).mean()) for i, state in enumerate(states))


TREE = Continuations.of([(9, 11), (9, 12, 13), (20,)])


@pytest.mark.parametrize("tree", [Continuations(), TREE], ids=["one position", "several"])
def test_a_readout_of_ones_own_reads_the_plain_models_states(
    model: LensModel, refused: Transcripts, tree: Continuations
) -> None:
    curved, rows = Curved(2, tree), tokens_of(model, refused[:3])
    expected = [curved_by_hand(model, row, curved) for row in rows]
    np.testing.assert_allclose(read_final(model, curved, rows), expected, rtol=1e-5)


@pytest.mark.parametrize("tree", [Continuations(), TREE], ids=["one position", "several"])
@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.THINKING, Scope.ALL])
def test_every_path_reads_a_readout_of_ones_own_alike(
    model: LensModel, refused: Transcripts, tree: Continuations, scope: Scope
) -> None:
    curved, rows = Curved(2, tree), tokens_of(model, refused[:2])
    branches = [*((head,) for head in HEADS), tuple(HEADS)]
    swept = sweep_branches(model, curved, rows, branches, scope=scope)
    assert swept.path == ("packed" if scope is Scope.CLOSING else "batched")
    for branch, column in zip(branches, swept.edited.T, strict=True):
        expected = read_final(model, curved, rows, edit=zero(branch, scope=scope))
        np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(swept.effects).max() > 1e-2


def test_a_readout_of_ones_own_ranks_heads_and_controls_sets(llama: LensModel, refused: Transcripts) -> None:
    curved = Curved(5, TREE)
    ranking = rank_heads(llama, curved, refused[:3], harmless=refused[3:5])
    assert (ranking.readout, ranking.readout_layer, ranking.can_tell) == ("curved", 5, True)
    assert not ranking.effects[:, 48:].any()
    assert (np.abs(ranking.effects[:, :48]).max(0) > 0).all()
    assert ranking.gap == pytest.approx(2.0 - read_final(llama, curved, tokens_of(llama, refused[:3])).mean(), abs=1e-4)
    control = control_sets(llama, curved, refused[:3], HEADS[:2], draws=2)
    edited = read_final(llama, curved, tokens_of(llama, refused[:3]), edit=zero(HEADS[:2], scope="closing"))
    np.testing.assert_allclose(
        control.effects, edited - read_final(llama, curved, tokens_of(llama, refused[:3])), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.ALL])
def test_attribution_differentiates_any_readout(model: LensModel, refused: Transcripts, scope: Scope) -> None:
    curved, rows, step = Curved(2, TREE), tokens_of(model, refused[:2]), 1e-2
    branches = tuple((head,) for head in HEADS)
    job = Job(model=model, readout=curved, branches=branches, change=Change(), scope=scope)
    ends = [
        sweep_branches(
            model, curved, rows, branches, change=Change(kind=EditKind.SCALE, factor=1 + sign * step), scope=scope
        ).edited
        for sign in (-1, 1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(attribute_heads(job, rows).effects, slope, rtol=0.03, atol=0.02)
    assert np.abs(slope).max() > 0.1


def test_a_transcript_reads_alike_alone_in_a_batch_and_in_chunks(
    model: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    curved, rows = Curved(3, TREE), tokens_of(model, refused[:6])
    together = read_final(model, curved, rows)
    np.testing.assert_allclose(together, [read_final(model, curved, [row])[0] for row in rows], rtol=1e-5)
    for module in (activations, readouts):
        monkeypatch.setattr(module, "LONG", 7)
    monkeypatch.setattr(activations, "CHUNK", 7)
    np.testing.assert_allclose(read_final(model, curved, rows), together, rtol=1e-5)


def test_an_edit_above_the_readouts_layer_changes_nothing(llama: LensModel, refused: Transcripts) -> None:
    curved, rows = Curved(2), tokens_of(llama, refused[:2])
    edit = zero([HeadRef(layer=6, head=1)], scope="closing")
    np.testing.assert_array_equal(read_final(llama, curved, rows, edit=edit), read_final(llama, curved, rows))


def test_progress_counts_transcripts(llama: LensModel, refused: Transcripts) -> None:
    seen: list[int] = []
    read_final(llama, Curved(2), tokens_of(llama, refused[:5]), progress=seen.append)
    assert seen[-1] == 5


def test_a_readout_of_another_template_or_depth_is_refused(models: dict[str, LensModel]) -> None:
    probe = random_probe(models["llama"], 7)
    with pytest.raises(ProbeError, match="fitted with template 'qwq'.* loaded with 'organism'"):
        replace(probe, template="qwq").check_model(models["llama"])
    replace(probe, template="organism").check_model(models["llama"])
    with pytest.raises(ProbeError, match="curved readout reads layer 7, but .* has 4 layers"):
        Curved(7).check_model(models["qwen3"])


def test_whatever_needs_a_linear_probe_refuses_another_readout_and_says_why(
    llama: LensModel, refused: Transcripts
) -> None:
    rows = tokens_of(llama, refused[:2])
    for readout in (Curved(5), answer_readout(llama)):
        sums = f"linear in the residual.* The {readout.name} readout is no linear probe"
        for method in ("direct", "cliff"):
            with pytest.raises(ProbeError, match=sums):
                rank_heads(llama, readout, refused[:2], method=method)
        with pytest.raises(ProbeError, match=sums):
            decompose_logit(llama, readout, rows)
        with pytest.raises(ProbeError, match=sums):
            trace_sources(llama, readout, refused[0], HEADS[0])
        with pytest.raises(ProbeError, match=f"score at every token.* The {readout.name} readout"):
            trace_refusal(llama, readout, refused[:2])
        with pytest.raises(ProbeError, match=f"scores over the thinking.* The {readout.name} readout"):
            score_pool(llama, readout, refused[:2])  # type: ignore[arg-type]


def test_a_readout_that_cannot_tell_makes_nothing_significant(llama: LensModel, refused: Transcripts) -> None:
    curved = Curved(5)
    curved.report = SimpleNamespace(can_tell=False)
    assert rank_heads(llama, curved, refused[:4]).significant() == ()


@given(sequences)
def test_a_tree_of_continuations_holds_every_sequence_once(given_sequences: list[list[int]]) -> None:
    tree = Continuations.of(given_sequences)
    prefixes = {tuple(s[:stop]) for s in given_sequences for stop in range(1, len(s) + 1)}
    assert len(tree) == len(prefixes)
    for prefix in prefixes:
        node = tree.node(prefix)
        assert [tree.tokens[i] for i in np.flatnonzero(tree.ancestors[node])] == list(prefix)
        assert tree.depths[node] == len(prefix)
        path, behind = tree.places[node + 1]
        assert tree.paths[path][:behind] == prefix
    assert tree.places[0] == (0, 0)
    assert tree.node(()) == ROOT
    assert len(set(tree.paths)) == len(tree.paths)


def test_what_is_no_tree_is_refused() -> None:
    for tokens, parents in (((5,), ()), ((5, 6), (1, -1)), ((5,), (0,)), ((5,), (-2,))):
        with pytest.raises(DataError, match="expected the index of an earlier token"):
            Continuations(tokens=tokens, parents=parents)
    with pytest.raises(DataError, match="does not hold"):
        TREE.node((9, 9))
