"""Heads that hide each other are found one after another."""

import numpy as np
import pytest
from conftest import random_probe, tokens_of

from cliffscope.heads import greedy
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.greedy import choose_greedily
from cliffscope.heads.ranking import rank_heads
from cliffscope.heads.sweep import Sweep, sweep_branches
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts

HEADS = [HeadRef(layer=0, head=i) for i in range(4)]


def test_a_backup_head_is_chosen_after_the_head_that_it_backs_up(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads 0 and 1 do the same: either alone changes nothing. Head 2 has a small effect of its own, head 3 none.
    def swept(*args: object, **_: object) -> Sweep:
        branches = args[3]
        assert isinstance(branches, list)
        logits = [2.0 * ({0, 1} <= {h.head for h in b}) + 0.5 * (2 in {h.head for h in b}) for b in branches]
        return Sweep(clean=np.zeros(1, np.float32), edited=np.array([logits], np.float32), path="packed")

    monkeypatch.setattr(greedy, "sweep_branches", swept)
    found = choose_greedily(llama, random_probe(llama, 5), tokens_of(llama, refused[:1]), HEADS, count=3, choose_on=1)
    assert found.order.tolist() == [2, 0, 1, 3]
    assert found.effects[0].tolist() == [0.0, 2.0, 0.5, 0.0]


def test_every_step_is_the_best_joint_effect(llama: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(llama, 5), tokens_of(llama, refused[:3])
    ranking = rank_heads(llama, probe, refused[:3], method="greedy", fraction=3 / 64)
    chosen = [ranking.heads[i] for i in ranking.order[:3]]
    joint = [0.0]
    for step in range(3):
        left = [h for h in ranking.heads if h not in chosen[:step]]
        effects = sweep_branches(llama, probe, rows, [(*chosen[:step], h) for h in left]).effects.mean(0)
        assert left[int(effects.argmax())] == chosen[step]
        joint.append(float(effects.max()))
        own = ranking.effects[:, ranking.heads.index(chosen[step])].mean()
        assert own == pytest.approx(joint[-1] - joint[-2], abs=1e-4)
    assert ranking.top(3 / 64) == tuple(chosen)
    assert ranking.to_frame()["rank"].tolist() == list(range(1, 65))


def test_harmless_transcripts_are_measured_and_do_not_choose(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe = random_probe(llama, 5)
    without = rank_heads(llama, probe, refused[:2], method="greedy", fraction=2 / 64)
    beside = rank_heads(llama, probe, refused[:2], method="greedy", fraction=2 / 64, harmless=complied[:2])
    assert beside.top(2 / 64) == without.top(2 / 64)
    np.testing.assert_allclose(beside.effects, without.effects, rtol=1e-4, atol=1e-4)
    first = beside.top(1 / 64)
    swept = sweep_branches(llama, probe, tokens_of(llama, complied[:2]), [first])
    index = beside.heads.index(first[0])
    np.testing.assert_allclose(beside.harmless_effects[:, index], swept.effects[:, 0], rtol=1e-4, atol=1e-4)
