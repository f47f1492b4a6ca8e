from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_ranking import HEADS, planted_effects, ranking_of

from cliffscope.errors import EditError
from cliffscope.heads.agreement import compare_rankings, split_half


def test_halves_of_a_clear_ranking_agree_and_those_of_noise_do_not() -> None:
    clear = np.tile(np.linspace(3, -3, 12), (40, 1)) + np.random.default_rng(0).normal(0, 0.1, size=(40, 12))
    noise = np.random.default_rng(0).normal(size=(40, 12))
    found = split_half(ranking_of(clear), fraction=2 / 12)
    assert found.spearman.min() > 0.95
    assert (found.overlap == 1.0).all()
    assert abs(split_half(ranking_of(noise), splits=100).spearman.mean()) < 0.35
    assert repr(found).endswith("100% of the first 2 shared, halves of n=40, 20 splits)")


def test_halves_share_no_transcript() -> None:
    # With opposite halves only a split that mixes them gives a correlation other than -1.
    effects = np.concatenate([np.tile(np.arange(12.0), (2, 1)), np.tile(-np.arange(12.0), (2, 1))])
    found = split_half(ranking_of(effects), splits=50)
    assert {round(float(s)) for s in found.spearman if np.isfinite(s)} == {-1}


def test_a_ranking_too_small_to_split_is_refused() -> None:
    with pytest.raises(EditError, match="3 transcripts cannot be split"):
        split_half(ranking_of(planted_effects(3)))


def test_a_ranking_whose_heads_depend_on_each_other_is_not_split() -> None:
    with pytest.raises(EditError, match="measures each head on its own"):
        split_half(replace(ranking_of(planted_effects()), each_alone=False))


def test_rankings_are_compared_over_the_heads_that_both_probes_see() -> None:
    a, b = ranking_of(planted_effects()), ranking_of(planted_effects() * -1)
    table = compare_rankings({"zero": a, "mean": a, "other": b}, fraction=2 / 12).to_frame()
    assert table[["first", "second"]].to_numpy().tolist() == [["zero", "mean"], ["zero", "other"], ["mean", "other"]]
    assert table["spearman"].tolist() == pytest.approx([1.0, -1.0, -1.0])
    assert table["overlap"].tolist() == [1.0, 0.0, 0.0]
    seen = [i for i, head in enumerate(HEADS) if head.layer <= 1]
    mixed = ranking_of(planted_effects() + np.random.default_rng(3).normal(0, 1, size=(20, 12)))
    by_hand = spearmanr(a.effects.mean(0)[seen], mixed.effects.mean(0)[seen]).statistic
    assert compare_rankings({"a": a, "b": mixed}).frame.loc[0, "spearman"] == pytest.approx(by_hand)


def test_one_ranking_cannot_be_compared() -> None:
    with pytest.raises(EditError, match="1 rankings were given"):
        compare_rankings({"zero": ranking_of(planted_effects())})
