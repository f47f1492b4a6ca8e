"""Figures: what they say at three numbers and at thousands, and what hostile text can do in them."""

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from cliffscope.figures import (
    Arm,
    Band,
    arms,
    effect_pairs,
    head_grid,
    head_ranking,
    layer_heat,
    mean_trace,
    measure_panels,
    plateau_final,
    printable,
    probe_quality,
    random_sets,
    token_text,
    token_trace,
)
from cliffscope.figures.dose import Panel, agreement, dose_response
from cliffscope.figures.safety import MOST_POINTS
from cliffscope.figures.sources import source_bars
from cliffscope.figures.theme import DIVERGING, INK, TEMPLATE, label
from cliffscope.figures.tokens import LINE, MOST_SCORES

LABELS = ["prompt 1/2", "prompt 2/2", "thinking 1/2", "thinking 2/2", "\n", "</think>"]
SPANS = ["prompt", "prompt", "thinking", "thinking", "closing", "closing"]
HOSTILE = ["<script>", "\u202egnp", "a" * 10_000, " ", "\n", "%{x}", "\ufffd", "\u05d0"]


def band(*mean):
    mean = np.array(mean, dtype=float)
    return Band(mean=mean, low=mean - 0.1, high=mean + 0.1, n=np.full(len(mean), 7))


def grid(n_layers, n_heads):
    return np.random.default_rng(0).normal(size=(n_layers, n_heads))


def arm(kind, group, rate, name=""):
    return Arm(name=name or kind, kind=kind, group=group, rate=rate, low=rate - 0.1, high=rate + 0.1, n=50)


def texts(fig):
    return [note.text for note in fig.layout.annotations]


def test_mean_trace_marks_and_names_each_span():
    fig = mean_trace(LABELS, SPANS, {"harmful, complied": band(0.2, 0.2, 0.8, 0.8, 0.4, 0.1)})
    assert texts(fig) == ["prompt", "thinking", "closing"]
    assert [shape.x0 for shape in fig.layout.shapes if shape.type == "line"] == [1.5, 3.5]


def test_mean_trace_names_the_closing_tokens_on_the_axis():
    fig = mean_trace(LABELS, SPANS, {"harmless": band(0, 0, 0, 0, 0, 0)})
    assert list(fig.layout.xaxis.ticktext) == ["1/2", "2/2", "1/2", "2/2", "⏎", "&lt;/think&gt;"]


def test_mean_trace_says_n_in_title_and_legend():
    fig = mean_trace(LABELS, SPANS, {"harmful, refused": band(1, 1, 1, 1, 1, 1), "harmless": band(0, 0, 0, 0, 0, 0)})
    assert "n=14 transcripts" in fig.layout.title.text
    assert [trace.name for trace in fig.data if trace.name] == ["harmful, refused (n=7)", "harmless (n=7)"]


def test_mean_trace_without_interval_draws_no_band():
    lonely = Band(mean=np.zeros(6), low=np.full(6, np.nan), high=np.full(6, np.nan), n=np.ones(6, dtype=int))
    fig = mean_trace(LABELS, SPANS, {"edited": lonely})
    assert len(fig.data) == 1
    assert "interval n/a" in fig.data[0].customdata[0]


def test_groups_differ_in_more_than_colour():
    bands = {name: band(0, 0, 0, 0, 0, 0) for name in ("harmful, refused", "harmful, complied", "harmless", "new")}
    lines = [trace for trace in mean_trace(LABELS, SPANS, bands).data if trace.name]
    assert len({line.line.color for line in lines}) == len({line.marker.symbol for line in lines}) == 4


@pytest.mark.parametrize(
    "fig",
    [
        mean_trace([], [], {}),
        token_trace([], [], np.array([])),
        layer_heat([], [], np.zeros((0, 0))),
        probe_quality(["final"], [0], *[np.full((1, 1), np.nan)] * 3),
        head_grid(*[np.full((2, 2), np.nan)] * 3),
        head_ranking([], *[np.array([])] * 3),
        random_sets(np.nan, np.nan, np.nan, np.array([])),
        arms([]),
        arms([arm("unedited", "harmful", np.nan)]),
        plateau_final(np.array([np.nan]), np.array([0.5])),
    ],
)
def test_nothing_to_draw_says_why(fig):
    assert len(fig.data) == 0
    assert len(texts(fig)[0]) > 10


def test_layer_heat_outlines_the_probe_layer():
    fig = layer_heat(["a"] * 6, SPANS, np.zeros((4, 6)), probe_layer=2)
    frame = next(shape for shape in fig.layout.shapes if shape.type == "rect")
    assert (frame.y0, frame.y1, frame.line.color) == (1.5, 2.5, INK)


@pytest.mark.parametrize("n_pos", [1, 60, 3000])
def test_token_axis_stays_legible_at_any_length(n_pos):
    fig = token_trace(["x"] * n_pos, ["thinking"] * n_pos, np.zeros(n_pos))
    assert 1 <= len(fig.layout.xaxis.tickvals) <= 64


def test_hostile_tokens_are_escaped_wherever_they_stand():
    n_pos = len(HOSTILE)
    for fig in (
        token_trace(HOSTILE, ["thinking"] * n_pos, np.zeros(n_pos)),
        layer_heat(HOSTILE, ["closing"] * n_pos, np.zeros((2, n_pos))),
        mean_trace(HOSTILE, ["closing"] * n_pos, {"<b>": band(*[0] * n_pos)}),
        plateau_final(np.zeros(n_pos), np.zeros(n_pos), names=HOSTILE, groups=HOSTILE),
        arms([arm("unedited", "harmful", 0.5, name) for name in HOSTILE]),
    ):
        text = fig.to_json()
        assert "<script>" not in text
        assert "\u202e" not in text
        assert "a" * 200 not in text


def test_printable_shows_what_hides():
    assert printable(" \t\n\u2066\x00", keep_spaces=False) == "␣⇥⏎\\u2066\\u0000"
    assert printable("ab\n", keep_newlines=True) == "ab\n"
    assert printable("\ud800") == "\\ud800"
    assert printable("\U000e0041") == "\\U000e0041"
    assert printable("a" * 100, limit=10) == "a" * 10 + "… (100 characters)"


def test_label_is_short_and_safe_for_html():
    assert label("<a href='x'>") == html.escape("<a␣href='x'>")
    assert len(label("x" * 50, limit=10)) == 10


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (128, 128)])
def test_head_grid_is_centred_and_outlines_the_selected(shape):
    effect = grid(*shape)
    selected = effect >= np.sort(effect.ravel())[-max(1, effect.size // 33)]
    fig = head_grid(effect, effect - 1, effect + 1, selected=selected, harmless=effect)
    heat, outline = fig.data
    assert heat.zmin == -heat.zmax
    assert heat.zmax == pytest.approx(np.abs(effect).max(), abs=1e-4)
    assert sum(x is None for x in outline.x) == selected.sum()
    assert len(fig.layout.shapes) == 1


def test_zero_effect_has_no_colour():
    assert [color for stop, color in DIVERGING if stop == 0.5] == ["rgba(0,114,178,0)", "rgba(213,94,0,0)"]


def test_a_head_that_was_not_measured_is_crossed_out():
    effect = np.array([[1.0, np.nan]])
    fig = head_grid(effect, effect, effect)
    assert (list(fig.data[-1].x), list(fig.data[-1].y)) == ([1], [0])


def test_grid_of_zeros_is_drawn():
    assert head_grid(*[np.zeros((2, 2))] * 3).data[0].zmax == 1.0


def test_head_ranking_puts_the_first_head_on_top():
    value = np.array([2.0, 1.0])
    fig = head_ranking(["L1H1", "L0H0"], value, value, value, selected=np.array([True, False]))
    assert list(fig.layout.yaxis.categoryarray) == ["L0H0", "L1H1"]
    assert [trace.name for trace in fig.data] == ["selected", "not selected"]


def test_undefined_interval_draws_no_bar_and_says_so():
    nan = np.array([np.nan])
    fig = head_ranking(["L0H0"], np.array([1.0]), nan, nan)
    assert list(fig.data[0].error_x.array) == [0.0]
    assert fig.data[0].customdata[0] == "(interval n/a)"


def test_random_arms_share_a_row_with_their_mean():
    rows = [arm("unedited", "harmful", 0.4), arm("top", "harmful", 0.1)]
    rows += [arm("random", "harmful", rate, f"random {i}") for i, rate in enumerate((0.3, 0.5))]
    fig = arms(rows)
    assert list(fig.layout.yaxis.ticktext) == ["unedited", "top", "random sets (2)"]
    assert "mean of 2 random sets" in " ".join(str(trace.hovertemplate) for trace in fig.data)
    assert "ASR, harmful prompts (n=50)" in texts(fig)


def test_plateau_final_draws_the_selection_last():
    fig = plateau_final(np.array([0.9, 0.5, 0.8]), np.array([0.1, 0.5, 0.7]), np.array([True, False, False]))
    assert [trace.name for trace in fig.data if trace.name] == ["not selected (n=2)", "selected (n=1)"]
    assert "(n=3)" in fig.layout.title.text


def test_many_transcripts_are_counted_in_cells():
    plateau = np.random.default_rng(0).uniform(size=40_000)
    fig = plateau_final(plateau, plateau**2, plateau > 0.99)
    assert len(fig.to_json()) < 300_000
    cells = next(trace for trace in fig.data if trace.type == "heatmap")
    assert np.asarray(cells.z).sum() == (plateau <= 0.99).sum() > MOST_POINTS


def test_probe_quality_is_blue_above_chance_and_clear_at_it():
    fig = probe_quality(["prompt", "final"], [3, 4], *[np.array([[0.5, 0.6], [0.7, np.nan]])] * 3, probe_layer=4)
    scale = fig.data[0].colorscale
    assert (scale[-1][1], scale[1][1]) == ("rgba(0,114,178,1)", "rgba(213,94,0,0)")
    assert (fig.layout.shapes[0].y0, fig.layout.shapes[0].y1) == (0.5, 1.5)


def test_theme_is_set_on_the_figure_and_not_globally():
    before = pio.templates.default
    fig = token_trace(["a"], ["prompt"], np.zeros(1))
    assert fig.layout.template == TEMPLATE
    assert pio.templates.default == before
    assert go.Figure().layout.template != TEMPLATE


def test_every_axis_names_its_unit():
    figures = [
        mean_trace(LABELS, SPANS, {"harmless": band(0, 0, 0, 0, 0, 0)}),
        token_trace(["a"], ["prompt"], np.zeros(1)),
        layer_heat(["a"], ["prompt"], np.zeros((1, 1))),
        head_grid(*[grid(2, 2)] * 3),
        plateau_final(np.zeros(1), np.zeros(1)),
    ]
    assert all(fig.layout.xaxis.title.text and fig.layout.yaxis.title.text for fig in figures)


def panel(**changes):
    values = {
        "name": "ASR",
        "top": np.array([0.8, 0.1]),
        "low": np.array([0.7, 0.0]),
        "high": np.array([0.9, 0.2]),
        "random": np.array([[0.85, 0.9], [0.8, np.nan]]),
        "unedited": 0.9,
    }
    return Panel(**{**values, **changes})


def test_doses_are_labelled_with_their_heads_and_keep_every_random_set():
    fig = dose_response([1, 8], [panel(), panel(name="refusal score")], n=31)
    assert list(fig.layout.xaxis.ticktext) == ["1", "8"]
    assert [axis.title.text for axis in (fig.layout.yaxis, fig.layout.yaxis2)] == ["ASR", "refusal score"]
    random = next(trace for trace in fig.data if trace.name == "random sets")
    assert sorted(random.y) == [0.8, 0.85, 0.9], "a set that was not run has no point"
    assert {round(x) for x in random.x} == {0, 1}
    top = next(trace for trace in fig.data if trace.name == "top heads")
    assert list(top.y) == [0.8, 0.1]
    assert "n=31" in fig.layout.title.text
    assert [shape.y0 for shape in fig.layout.shapes] == [0.9, 0.9], "the unedited level is drawn in each panel"


def test_a_quantity_that_was_not_measured_has_no_panel():
    nothing = np.full(2, np.nan)
    fig = dose_response([1, 8], [panel(), panel(name="over-refusal", top=nothing)], n=3)
    assert sum(trace.name == "top heads" for trace in fig.data) == 1
    assert texts(dose_response([1, 8], [panel(top=nothing)], n=3)) == ["No dose was measured."]


def test_agreement_is_symmetric_and_crosses_out_what_was_not_compared():
    fig = agreement(["zero", "patch"], np.array([[1.0, np.nan], [np.nan, 1.0]]))
    assert (fig.data[0].zmin, fig.data[0].zmax) == (-1, 1)
    assert texts(agreement(["zero"], np.ones((1, 1)))) == ["Fewer than two methods were compared."]


def test_source_bars_add_up_with_those_that_are_not_shown():
    against = np.array([0.5, -0.25, 0.1, 0.05, -0.02])
    fig = source_bars(["a", "<b>", "c", "d", "e"], ["prompt"] * 5, np.full(5, 0.2), against, most=2)
    bars = fig.data[0]
    assert list(bars.x) == pytest.approx([0.5, -0.25, 0.13])
    assert sum(bars.x) == pytest.approx(against.sum())
    assert bars.y[2] == "3 others"
    assert "<b>" not in bars.y[1]
    assert bars.marker.color[0] != bars.marker.color[1], "writing against refusal and for it look alike"
    assert texts(source_bars([], [], np.zeros(0), np.zeros(0))) == ["No source token was measured."]


def layer_scores(n_layers, n_pos):
    return np.random.default_rng(0).uniform(size=(n_layers, n_pos))


def test_token_text_writes_every_token_and_starts_a_line_with_each_span():
    tokens = ["<user>", " how", " do", "<think>", " I", " see", "\n", "</think>"]
    spans = ["prompt"] * 3 + ["thinking"] * 3 + ["closing"] * 2
    fig = token_text(tokens, spans, layer_scores(3, 8), probe_layer=1)
    bars, _ = fig.data
    assert [text.replace("␣", "") for text in bars.text] == [html.escape(t.strip()) or "⏎" for t in tokens]
    assert list(bars.y) == [0] * 3 + [1] * 3 + [2] * 2
    assert list(bars.base) == [0, 7, 11, 0, 8, 10, 0, 2]
    assert list(fig.layout.yaxis.ticktext) == ["prompt", "thinking", "closing"]
    assert "(8 tokens)" in fig.layout.title.text


def test_the_slider_of_token_text_begins_at_the_probes_layer():
    score = layer_scores(3, 4)
    fig = token_text(["a"] * 4, ["thinking"] * 4, score, layers=[4, 5, 6], probe_layer=5)
    (slider,) = fig.layout.sliders
    assert slider.active == 1
    assert [step.label for step in slider.steps] == ["4", "5", "6"]
    for shown, layer in ((fig.data[0].hovertext, 1), (slider.steps[2].args[0]["hovertext"][0], 2)):
        np.testing.assert_allclose([float(text) for text in shown], score[layer], atol=1e-3)
    reds = [int(color[1:3], 16) for color in slider.steps[2].args[0]["marker.color"][0]]
    assert list(np.argsort(reds)) == list(np.argsort(-score[2])), "the deeper the shade, the higher the score"


def test_lines_of_token_text_are_never_longer_than_the_page():
    fig = token_text([f" word{i}" for i in range(500)], ["thinking"] * 500, np.zeros(500))
    ends = np.array(fig.data[0].base) + np.array(fig.data[0].x)
    assert ends.max() <= LINE
    assert max(fig.data[0].y) > 40
    assert not fig.layout.sliders


def test_a_long_transcript_shows_its_end_and_says_so():
    fig = token_text(["x"] * 5000, ["thinking"] * 5000, layer_scores(100, 5000))
    shown = len(fig.data[0].x)
    assert shown == MOST_SCORES // 100
    assert f"5,000 tokens, the last {shown} shown" in fig.layout.title.text
    assert fig.data[0].customdata[-1].startswith("4999 ")


def test_measures_have_a_panel_each_and_an_arm_a_row():
    rows = [("kl (nats)", "top heads", "top", 0.2, 0.1, 0.3, 40), ("kl (nats)", "random sets", "random", 0.1, 0, 1, 40)]
    rows += [("kl (nats)", "random sets", "random", 0.15, 0, 1, 40), ("ppl", "top heads", "top", 9.0, 8, 10, 3)]
    frame = pd.DataFrame(rows, columns=["measure", "arm", "kind", "value", "ci_low", "ci_high", "n"])
    fig = measure_panels(frame)
    assert [axis.title.text for axis in (fig.layout.xaxis, fig.layout.xaxis2)] == ["kl (nats) (n=40)", "ppl (n=3)"]
    assert list(fig.layout.yaxis.ticktext) == ["top heads", "random sets"]
    assert sorted(len(trace.x) for trace in fig.data) == [1, 1, 2]
    assert fig.data[0].error_x.array[0] == pytest.approx(0.1)
    unknown = measure_panels(frame.assign(n=np.nan))
    assert unknown.layout.xaxis.title.text == "kl (nats) (n not stored)"


def test_effect_pairs_mark_what_both_runs_selected():
    first, second = np.array([1.0, 0.5, np.nan]), np.array([2.0, -0.5, 1.0])
    fig = effect_pairs(["L0H0", "L0H1", "L1H0"], first, second, np.array([2, 0, 1]), runs=("A", "B"))
    assert {trace.name: list(trace.text) for trace in fig.data} == {
        "selected in neither (1)": ["L0H1"],
        "selected in both (1)": ["L0H0"],
    }
    assert "(2 heads)" in fig.layout.title.text
    assert fig.layout.yaxis.title.text.endswith(", B")
    assert len(fig.layout.shapes) == 1
    apart = effect_pairs(["L0H0", "L0H1", "L1H0"], first, second, np.array([2, 0, 1]), same_scale=False)
    assert len(apart.layout.shapes) == 0


@pytest.mark.parametrize(
    "fig",
    [
        token_text([], [], np.zeros((2, 0))),
        measure_panels(pd.DataFrame(columns=["measure", "arm", "kind", "value", "ci_low", "ci_high", "n"])),
        effect_pairs(["L0H0"], np.array([np.nan]), np.array([1.0]), np.array([0])),
    ],
)
def test_nothing_to_draw_says_why_here_too(fig):
    assert len(fig.data) == 0
    assert len(texts(fig)[0]) > 10


def test_missing_scores_give_tokens_without_a_ground():
    fig = token_text(["a", "b"], ["closing"] * 2, np.array([np.nan, 0.5]))
    assert list(fig.data[0].marker.color) == ["#ffffff", "#a8cfe7"]
    assert list(fig.data[0].hovertext) == ["n/a", "0.500"]


@pytest.mark.parametrize(
    "text", ["\u05e9\u05dc\u05d5\u05dd", "\ufffd", "", "   ", "\u0000", "<b>", "\U0001f9d1\u200d\U0001f4bb"]
)
def test_odd_tokens_stay_visible_and_harmless(text):
    fig = token_text([text], ["thinking"], np.ones(1))
    assert fig.data[0].text[0]
    assert fig.data[0].x[0] >= 1
    for hidden in ("<b>", "\u0000", "\u200d"):
        assert hidden not in fig.data[0].text[0] + fig.data[0].customdata[0]


def many(n):
    """Every figure that takes one value a transcript, or tables that grow with them, at n transcripts."""
    rng = np.random.default_rng(0)
    plateau, final = rng.uniform(size=n), rng.uniform(size=n)
    groups = ["harmful, refused", "harmful, complied", "harmless"]
    bands = {name: band(*rng.uniform(size=24)) for name in groups}
    spans = ["prompt"] * 5 + ["thinking"] * 11 + ["closing"] * 8
    yield lambda: mean_trace([f"x {i}" for i in range(24)], spans, bands)
    yield lambda: plateau_final(plateau, final, plateau > 0.98, names=[f"id-{i}" for i in range(n)])
    yield lambda: plateau_final(plateau, final, groups=[groups[i % 3] for i in range(n)])
    yield lambda: head_grid(*[rng.normal(size=(128, 128))] * 3, harmless=rng.normal(size=(128, 128)))
    yield lambda: token_text([" w"] * n, ["thinking"] * n, rng.uniform(size=(30, n)))
    yield lambda: token_trace([" w"] * n, ["thinking"] * n, rng.uniform(size=n))
    yield lambda: layer_heat([" w"] * n, ["thinking"] * n, rng.uniform(size=(30, n)))
    yield lambda: probe_quality(["a", "b"], range(128), *[rng.uniform(size=(128, 2))] * 3)


def test_figures_of_3000_transcripts_stay_small():
    # What a browser draws and what takes time here go by the size; benchmarks/report.py prints the times.
    made = [len(make().to_json()) for make in many(3000)]
    assert len(made) > 5
    assert max(made) < 3_000_000


def test_the_legend_has_room_for_every_row_that_it_takes():
    few = mean_trace(LABELS, SPANS, {"harmless": band(0, 0, 0, 0, 0, 0)})
    names = [f"{run}: harmful, complied; top heads zeroed" for run in "ABCD"]
    many_named = mean_trace(LABELS, SPANS, {name: band(0, 0, 0, 0, 0, 0) for name in names})
    assert many_named.layout.margin.t >= few.layout.margin.t + 3 * 20
    title = few.layout.template.layout.title
    assert (title.yref, title.yanchor) == ("container", "top")
