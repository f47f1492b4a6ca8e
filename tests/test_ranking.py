from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import plain_residuals, random_probe, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from cliffscope.errors import DataError, EditError, ProbeError
from cliffscope.heads.controls import SetControl, control_sets, random_set
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.ranking import HeadRanking, rank_heads, top_count
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel, ModelShape
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.records import Transcripts

COLUMNS = [
    *("layer", "head", "kv_group", "effect", "effect_score", "ci_low", "ci_high", "p", "q", "untested"),
    *("decisive", "kind", "effect_harmless", "effect_refused", "n", "rank", "readout", "method", "scope"),
]
SHAPE = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, context=256)
HEADS = tuple(HeadRef(layer=layer, head=head) for layer in range(3) for head in range(4))
L0H2, L1H3 = HEADS[2], HEADS[7]


def ranking_of(
    effects: np.ndarray, *, gap: float = 4.0, harmless: np.ndarray | None = None, refused: np.ndarray | None = None
) -> HeadRanking:
    """A ranking of 3 x 4 heads whose effects are given, with the probe at layer 1."""
    return HeadRanking(
        heads=HEADS,
        effects=effects.astype(np.float32),
        clean=np.linspace(-2, 0, len(effects)).astype(np.float32),
        harmless_effects=np.zeros((0, 12), np.float32) if harmless is None else harmless.astype(np.float32),
        refused_effects=np.zeros((0, 12), np.float32) if refused is None else refused.astype(np.float32),
        order=np.argsort(-effects.mean(0), kind="stable"),
        dose=1.0,
        sign=1,
        donors="",
        can_tell=True,
        gap=gap,
        gap_score=0.8 if gap > 0 else 0.0,
        shape=SHAPE,
        readout="probe",
        method="zero",
        each_alone=True,
        scope=Scope.CLOSING,
        path="packed",
        readout_layer=1,
        seed=0,
        omitted=(),
    )


def names_in(table: pd.DataFrame) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]


def planted_effects(n: int = 20) -> np.ndarray:
    """Small noise, two suppressors, one head that helps refusal, and nothing above the probe's layer."""
    effects = np.random.default_rng(0).normal(0, 0.02, size=(n, 12))
    effects[:, 2] += 3.0
    effects[:, 7] += 1.5
    effects[:, 0] -= 1.0
    effects[:, 8:] = 0.0
    return effects


def test_the_table_is_sorted_by_effect_with_one_row_a_head() -> None:
    table = ranking_of(planted_effects()).to_frame()
    assert table.columns.tolist() == COLUMNS
    assert table["rank"].tolist() == list(range(1, 13))
    assert table["effect"].is_monotonic_decreasing
    assert sorted(zip(table["layer"], table["head"], strict=True)) == [(h.layer, h.head) for h in HEADS]
    assert table.loc[0, ["layer", "head", "kv_group", "n"]].tolist() == [0, 2, 1, 20]
    assert table.loc[1, ["layer", "head", "kv_group"]].tolist() == [1, 3, 1]
    assert (table["kv_group"] == table["head"] // 2).all()
    assert (table["ci_low"] <= table["effect"]).all()
    assert (table["effect"] <= table["ci_high"]).all()


def test_effects_in_score_are_computed_transcript_by_transcript() -> None:
    ranking = ranking_of(planted_effects(3))
    table = ranking.to_frame().set_index(["layer", "head"])

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    for i, ref in enumerate(HEADS):
        pairs = zip(ranking.clean, ranking.effects[:, i], strict=True)
        by_hand = np.mean([sigmoid(clean + effect) - sigmoid(clean) for clean, effect in pairs])
        assert table.loc[(ref.layer, ref.head), "effect_score"] == pytest.approx(by_hand, abs=1e-6)
        assert table.loc[(ref.layer, ref.head), "effect"] == pytest.approx(ranking.effects[:, i].mean(), abs=1e-6)


def test_heads_that_turn_answers_are_significant_and_the_rest_are_not() -> None:
    ranking = ranking_of(planted_effects(), gap=8.0)
    assert ranking.significant() == (L0H2, L1H3)
    assert repr(ranking) == "HeadRanking(first L0H2: +3.00 logits, 12 heads, n=20, probe, zero, packed)"


def test_q_is_benjamini_hochberg_over_the_heads_that_the_readout_sees() -> None:
    table = ranking_of(planted_effects()).to_frame()
    seen = table["layer"] <= 1
    # A head that could turn no answer counts as a test whose p is 1, and has no q of its own.
    tested = seen & table["p"].notna()
    q = pd.Series(scipy_stats.false_discovery_control(table["p"][seen].fillna(1.0)), index=table.index[seen])
    np.testing.assert_allclose(table["q"][tested], q[tested[seen]], rtol=1e-9)
    assert table.loc[~tested, ["p", "q"]].isna().all(axis=None)


def test_a_head_without_p_says_why() -> None:
    table = ranking_of(planted_effects()).to_frame()
    nothing = table["p"].isna()
    assert (table["untested"] == "").equals(~nothing)
    assert set(table["untested"][table["layer"] > 1]) == {"above the layer that the readout reads"}
    assert set(table["untested"][nothing & (table["layer"] <= 1)]) <= {"could turn no answer"}
    assert (table["decisive"][table["untested"] == "could turn no answer"] == 0).all()
    blind = replace(ranking_of(planted_effects()), can_tell=False).to_frame()
    assert set(blind["untested"][blind["layer"] <= 1]) == {"the readout cannot tell refused from complied"}


def test_a_readout_that_cannot_tell_gives_no_p() -> None:
    ranking = replace(ranking_of(planted_effects()), can_tell=False)
    assert ranking.significant() == ()
    assert ranking.to_frame()["p"].isna().all()


def test_too_few_transcripts_say_which_q_they_allow() -> None:
    assert ranking_of(planted_effects(4)).least_q == pytest.approx(8 * 0.5**4)
    assert ranking_of(planted_effects(4)).significant() == ()


def test_kinds_are_told_from_refused_and_harmless_effects() -> None:
    zeros = np.random.default_rng(1).normal(0, 0.1, (15, 12))
    broad = planted_effects(15)
    selective = ranking_of(planted_effects(), harmless=zeros, refused=zeros).to_frame().set_index(["layer", "head"])
    assert selective.loc[(0, 2), "kind"] == "selective"
    everywhere = ranking_of(planted_effects(), harmless=broad, refused=broad).to_frame().set_index(["layer", "head"])
    assert everywhere.loc[(0, 2), "kind"] == "broad"
    assert ranking_of(planted_effects()).to_frame()["kind"].unique().tolist() == ["unknown"]


def test_an_effect_that_an_edit_takes_is_turned_round_in_score_too() -> None:
    table = replace(ranking_of(planted_effects(3)), sign=-1).to_frame().set_index(["layer", "head"])
    ranking = ranking_of(planted_effects(3))
    pairs = zip(ranking.clean, ranking.effects[:, 2], strict=True)
    by_hand = np.mean([1 / (1 + np.exp(-c)) - 1 / (1 + np.exp(e - c)) for c, e in pairs])
    assert table.loc[(0, 2), "effect_score"] == pytest.approx(by_hand, abs=1e-6)


def test_one_transcript_gives_effects_without_intervals() -> None:
    ranking = ranking_of(planted_effects(1))
    table = ranking.to_frame()
    assert table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert table["effect"].notna().all()
    assert ranking.significant() == ()
    assert ranking.top()[0] == L0H2


def test_harmless_effects_are_shown_beside_or_nan() -> None:
    harmless = np.tile(np.arange(12.0), (2, 1))
    table = ranking_of(planted_effects(), harmless=harmless).to_frame()
    assert table["effect_harmless"].tolist() == (table["layer"] * 4 + table["head"]).tolist()
    assert ranking_of(planted_effects()).to_frame()["effect_harmless"].isna().all()


@pytest.mark.parametrize(
    ("fraction", "n", "count"), [(0.03, 64, 2), (0.01, 64, 1), (1e-9, 64, 1), (1.0, 64, 64), (0.5, 9, 4)]
)
def test_a_fraction_of_the_heads_is_rounded_and_at_least_one(fraction: float, n: int, count: int) -> None:
    assert top_count(fraction, n) == count


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(EditError, match=r"\(0, 1\]"):
        top_count(fraction, 64)
    with pytest.raises(EditError, match="fraction"):
        ranking_of(planted_effects()).top(fraction)


def test_top_heads_come_best_first() -> None:
    ranking = ranking_of(planted_effects())
    assert ranking.top(2 / 12) == (L0H2, L1H3)
    assert len(set(ranking.top(1.0))) == 12
    assert ranking.top(1.0)[-1] == HEADS[0]


def test_ties_are_ranked_alike_by_the_table_and_by_top() -> None:
    ranking = ranking_of(np.zeros((4, 12)))
    table = ranking.to_frame()
    assert names_in(table) == [str(h) for h in ranking.top(1.0)]


def test_a_plot_can_be_drawn_with_one_and_with_many_transcripts() -> None:
    for n in (1, 20):
        assert "n=" in ranking_of(planted_effects(n)).plot().layout.title.text


@given(st.sets(st.sampled_from(HEADS), min_size=1), st.integers(0, 30), st.booleans())
def test_a_random_set_has_distinct_heads_as_many_as_the_set(chosen: set[HeadRef], seed: int, same: bool) -> None:
    heads = sorted(chosen)
    drawn = random_set(SHAPE, heads, np.random.default_rng(seed), same_layers=same)
    assert len(drawn) == len(set(drawn)) == len(heads)
    assert list(drawn) == sorted(drawn)
    assert set(drawn) <= set(HEADS)
    if same:
        assert [h.layer for h in drawn] == [h.layer for h in heads]
    if not same and len(heads) <= 6:
        assert not chosen & set(drawn)


def test_random_sets_avoid_the_given_heads_as_long_as_there_are_others() -> None:
    heads = HEADS[:2]
    for seed in range(20):
        drawn = random_set(SHAPE, heads, np.random.default_rng(seed), same_layers=True)
        assert drawn == (HEADS[2], HEADS[3])


def test_random_sets_reach_every_other_head_about_equally_often() -> None:
    rng = np.random.default_rng(0)
    draws = [random_set(SHAPE, [L0H2], rng, same_layers=False)[0] for _ in range(1100)]
    counts = np.array([draws.count(h) for h in HEADS if h != L0H2])
    assert L0H2 not in draws
    assert scipy_stats.chisquare(counts).pvalue > 0.001


@pytest.fixture(scope="module")
def probe(llama: LensModel) -> RefusalProbe:
    return random_probe(llama, 5)


def test_rank_heads_measures_every_head_at_the_closing(
    llama: LensModel, probe: RefusalProbe, refused: Transcripts, complied: Transcripts
) -> None:
    seen: list[int] = []
    ranking = rank_heads(llama, probe, refused[:4], harmless=complied[:2], progress=seen.append)
    rows = tokens_of(llama, refused[:4])
    swept = sweep_branches(llama, probe, rows, [(h,) for h in ranking.heads])
    clean = [plain_residuals(llama, r.token_ids.tolist())[5, r.final] @ probe.weight + probe.bias for r in rows]
    np.testing.assert_allclose(ranking.clean, clean, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ranking.effects, swept.edited - swept.clean[:, None])
    assert ranking.harmless_effects.shape == (2, 64)
    assert ranking.gap == pytest.approx(probe.refused_logit - np.mean(clean), abs=1e-4)
    assert (ranking.path, ranking.method, ranking.scope, ranking.readout_layer) == ("packed", "zero", "closing", 5)
    assert (ranking.readout, ranking.each_alone, ranking.can_tell) == ("probe", True, True)
    assert seen == [1, 2, 3, 4]
    assert [str(h) for h in ranking.heads[:9]] == [*(f"L0H{i}" for i in range(8)), "L1H0"]
    assert not ranking.effects[:, 48:].any()


def test_the_top_three_percent_of_64_heads_are_two(llama: LensModel, probe: RefusalProbe, refused: Transcripts) -> None:
    ranking = rank_heads(llama, probe, refused[:2])
    assert len(ranking.top()) == 2
    assert ranking.harmless_effects.shape == (0, 64)
    assert names_in(ranking.to_frame())[:2] == [str(h) for h in ranking.top()]


def test_grouped_heads_are_shown_with_their_group(models: dict[str, LensModel], refused: Transcripts) -> None:
    model = models["qwen3"]
    table = rank_heads(model, random_probe(model, 3), refused[:2]).to_frame()
    assert len(table) == 16
    assert table["kv_group"].tolist() == [model.shape.kv_group(h) for h in table["head"]]
    assert set(table["kv_group"]) == {0, 1}


def test_other_scopes_are_batched(models: dict[str, LensModel], refused: Transcripts) -> None:
    model = models["qwen3"]
    ranking = rank_heads(model, random_probe(model, 1), refused[:1], scope="thinking")
    assert ranking.path == "batched"


def test_transcripts_that_cannot_be_used_are_omitted_with_their_reason(
    llama: LensModel, probe: RefusalProbe, refused: Transcripts
) -> None:
    bare = refused[0].replace(thinking=None)
    ranking = rank_heads(llama, probe, Transcripts([bare, refused[1]]))
    assert [o.id for o in ranking.omitted] == [bare.id]
    assert len(ranking.clean) == 1
    with pytest.raises(DataError, match="None of 1 transcripts can be used: .*thinking is None"):
        rank_heads(llama, probe, Transcripts([bare]))
    with pytest.raises(DataError, match="none was given"):
        rank_heads(llama, probe, Transcripts())


def test_an_unknown_method_or_scope_is_refused(llama: LensModel, probe: RefusalProbe, refused: Transcripts) -> None:
    with pytest.raises(DataError, match="no method 'guess'.*zero"):
        rank_heads(llama, probe, refused[:1], method="guess")
    with pytest.raises(EditError, match="scope"):
        rank_heads(llama, probe, refused[:1], scope="answer")
    with pytest.raises(DataError, match="no method 'guess'.*zero"):
        control_sets(llama, probe, refused[:1], [L0H2], method="guess")


def test_a_probe_of_another_model_is_refused(models: dict[str, LensModel], refused: Transcripts) -> None:
    with pytest.raises(ProbeError):
        rank_heads(models["qwen2"], random_probe(models["llama"], 7), refused[:1])


def test_logits_that_are_not_finite_are_refused_by_transcript(
    llama: LensModel, probe: RefusalProbe, refused: Transcripts
) -> None:
    values = {**{name: getattr(probe, name) for name in RefusalProbe.__dataclass_fields__}, "bias": float("nan")}
    with pytest.raises(DataError, match=f"transcript '{refused[0].id}' is not finite"):
        rank_heads(llama, RefusalProbe(**values), refused[:2])


def test_control_sets_are_joint_effects_of_random_sets(
    llama: LensModel, probe: RefusalProbe, refused: Transcripts
) -> None:
    heads = [HeadRef(layer=1, head=2), HeadRef(layer=4, head=0)]
    control = control_sets(llama, probe, refused[:3], heads, draws=6, seed=4)
    again = control_sets(llama, probe, refused[:3], heads, draws=6, seed=4)
    swept = sweep_branches(llama, probe, tokens_of(llama, refused[:3]), [tuple(heads)])
    np.testing.assert_allclose(control.effects, swept.edited[:, 0] - swept.clean, rtol=1e-4, atol=1e-4)
    assert control.random_layers.shape == control.random_all.shape == (6, 3)
    np.testing.assert_array_equal(control.random_all, again.random_all)
    assert control.heads == tuple(heads)
    assert control.effect == pytest.approx(control.effects.mean())
    assert control.interval[0] <= control.effect <= control.interval[1]


def test_the_p_of_a_set_counts_the_set_itself() -> None:
    control = SetControl(
        heads=(L0H2,),
        effects=np.array([2.0, 4.0], np.float32),
        random_layers=np.array([[1.0, 1.0], [3.0, 3.0]], np.float32),
        random_all=np.array([[9.0, -1.0], [0.0, 0.0]], np.float32),
        seed=0,
    )
    assert control.effect == 3.0
    assert control.random_effects.tolist() == [1.0, 3.0, 4.0, 0.0]
    assert control.p_by_kind == {"same layers": pytest.approx(2 / 3), "all heads": pytest.approx(2 / 3)}
    assert control.p == pytest.approx(2 / 3)
    assert "n=2" in repr(control)
