from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, plain_residuals, random_probe, tokens_of

from cliffscope.errors import DataError, ProbeError, SpanError
from cliffscope.heads.donors import mean
from cliffscope.heads.edits import HeadEdit, HeadRef, zero
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts import activations
from cliffscope.readouts.cliff import PROMPT_BINS, THINKING_BINS, align_trace
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import RefusalTraces, group_name, trace_refusal
from cliffscope.transcripts.records import Message, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

LOGITS = [-9.0] * 6 + [0.0, 2.0, 2.0, 1.0, 3.0] + [2.0, -1.0, -3.0]


def sigmoid(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(values, dtype=float)))


def ask(name: str, thinking: str | None, **fields: object) -> Transcript:
    settings = {"harmful": True, "outcome": Outcome.COMPLIED, **fields}
    return Transcript(id=name, messages=(Message(role="user", content="how"),), thinking=thinking, **settings)


def handmade(
    model: LensModel, transcripts: Sequence[Transcript], logits: Sequence[Sequence[float]], **lows: float
) -> RefusalTraces:
    """Traces whose logits are written by hand."""
    return RefusalTraces(
        transcripts=tuple(transcripts),
        tokens=tuple(tokens_of(model, transcripts)),
        logits=tuple(np.array(values, dtype=np.float32) for values in logits),
        layer_logits={},
        probe=random_probe(model, 2, **lows),
        tokenizer=model.tokenizer,
        omitted=(),
    )


@pytest.fixture(scope="module")
def by_hand(llama: LensModel) -> RefusalTraces:
    """The prompt, from <|bos|> to the opened thinking, is 6 tokens, the thinking 5, the closing 3."""
    return handmade(llama, [ask("a", "the user wants to think")], [LOGITS])


def test_a_cliff_of_hand_made_logits(by_hand: RefusalTraces) -> None:
    (row,) = by_hand.cliffs().to_frame().to_dict("records")
    scores = sigmoid([0.0, 2.0, 2.0, 1.0, 3.0])
    assert by_hand.tokens[0].bounds == (6, 11, 14, 14)
    assert row["plateau_max"] == pytest.approx(scores.max(), abs=1e-6)
    assert row["plateau_mean"] == pytest.approx(scores.mean(), abs=1e-6)
    assert row["plateau_late"] == pytest.approx(scores[-2:].mean(), abs=1e-6)
    assert row["final"] == pytest.approx(sigmoid([-3.0])[0], abs=1e-6)
    assert row["cliff"] == pytest.approx(scores.mean() - sigmoid([-3.0])[0], abs=1e-6)
    assert row["drop_position"] == 12
    assert row["drop"] == pytest.approx(sigmoid([2.0])[0] - sigmoid([-1.0])[0], abs=1e-6)
    assert row["drop_token"] == by_hand.token_texts(by_hand.tokens[0])[12]
    assert (row["group"], row["harmful"], row["outcome"]) == ("harmful, complied", True, "complied")
    assert (row["valid"], row["reason"]) == (True, "")


def test_the_papers_plateau_is_the_maximum(by_hand: RefusalTraces) -> None:
    found = by_hand.cliffs(plateau="max")
    (row,) = found.to_frame().to_dict("records")
    assert row["cliff"] == pytest.approx(row["plateau_max"] - row["final"])
    assert repr(found) == f"Cliffs(mean {row['cliff']:.3f}, n=1 valid of 1, plateau=max)"


def test_the_table_of_cliffs_is_a_copy(by_hand: RefusalTraces) -> None:
    found = by_hand.cliffs()
    table = found.to_frame()
    table.loc[0, "final"] = 9.0
    assert found.to_frame()["final"][0] < 1


@pytest.mark.parametrize(
    ("lows", "region"),
    [
        ({"late_low": 0.74}, "late thinking"),
        ({"final_low": 0.2}, "final"),
        ({"late_low": float("nan")}, "late thinking"),
    ],
)
def test_a_cliff_is_not_valid_where_the_probe_cannot_tell(
    llama: LensModel, lows: dict[str, float], region: str
) -> None:
    traces = handmade(llama, [ask("a", "the user wants to think")], [[0.0] * 14], **lows)
    (row,) = traces.cliffs().to_frame().to_dict("records")
    assert not row["valid"]
    assert f"cannot tell at {region}" in row["reason"]
    assert repr(traces.cliffs()) == "Cliffs(mean none valid, n=0 valid of 1, plateau=mean)"


def test_without_thinking_there_is_no_plateau_and_no_valid_cliff(llama: LensModel) -> None:
    traces = handmade(llama, [ask("a", "")], [[0.0] * 6 + [3.0, 2.0, -3.0]])
    (row,) = traces.cliffs().to_frame().to_dict("records")
    assert not row["valid"]
    assert row["reason"] == "no thinking, so no plateau"
    assert np.isnan([row["plateau_max"], row["plateau_mean"], row["plateau_late"], row["cliff"]]).all()
    assert row["final"] == pytest.approx(sigmoid([-3.0])[0], abs=1e-6)


def test_a_score_that_rises_has_no_drop_token(llama: LensModel) -> None:
    traces = handmade(llama, [ask("a", "the user wants to think")], [np.arange(14.0)])
    (row,) = traces.cliffs().to_frame().to_dict("records")
    assert (row["drop_position"], row["drop_token"], row["drop"]) == (-1, "", 0.0)


def test_aligned_traces_are_means_over_a_group_bin_by_bin(llama: LensModel) -> None:
    rng = np.random.default_rng(0)
    texts = ["the user wants to think", "this is a good idea . so what should i do ? let me think", "it is", ""]
    group = [ask(f"t{i}", text) for i, text in enumerate(texts)]
    logits = [rng.normal(size=t.n_pos) for t in tokens_of(llama, group)]
    traces = handmade(llama, group, logits)
    table = traces.aligned({"all": [t.id for t in group], "one": ["t1"], "none": [], "unknown": ["t9"]}, seed=3)
    rows = [
        align_trace(
            sigmoid(values.astype(np.float32)),
            prompt=row.span(Span.PROMPT),
            thinking=row.span(Span.THINKING),
            closing=row.span(Span.CLOSING),
            closing_width=3,
        )
        for row, values in zip(traces.tokens, logits, strict=True)
    ]
    both = table[table["group"] == "all"]
    assert table.columns.tolist() == ["group", "bin", "label", "span", "mean", "ci_low", "ci_high", "n"]
    assert list(table["group"].unique()) == ["all", "one"]
    np.testing.assert_allclose(both["mean"], np.nanmean(rows, axis=0), atol=1e-6)
    np.testing.assert_array_equal(both["n"], np.isfinite(rows).sum(0))
    assert both["n"].tolist() == [4] * PROMPT_BINS + [3] * THINKING_BINS + [4] * 3
    assert (both["ci_low"] <= both["mean"]).all()
    assert (both["mean"] <= both["ci_high"]).all()
    assert both["span"].tolist() == ["prompt"] * PROMPT_BINS + ["thinking"] * THINKING_BINS + ["closing"] * 3
    assert both["label"].tolist()[-3:] == ["\n", "</think>", "\n\n"]
    alone = table[table["group"] == "one"]
    np.testing.assert_allclose(alone["mean"], rows[1], atol=1e-6)
    assert alone["ci_low"].isna().all()


def test_a_group_without_thinking_has_nan_thinking_bins(llama: LensModel) -> None:
    traces = handmade(llama, [ask("a", ""), ask("b", "")], [np.ones(9), np.zeros(9)])
    table = traces.aligned({"none": ["a", "b"]})
    thinking = table[table["span"] == "thinking"]
    assert thinking["mean"].isna().all()
    assert (thinking["n"] == 0).all()
    assert table[table["span"] == "closing"]["mean"].notna().all()


def test_the_token_table_has_one_row_a_token(llama: LensModel) -> None:
    group = [ask("a", "the user wants to think"), ask("b", "it is")]
    logits = [np.linspace(-80, 80, t.n_pos) for t in tokens_of(llama, group)]
    traces = handmade(llama, group, logits)
    table = traces.to_frame()
    assert table.columns.tolist() == ["id", "position", "span", "token", "logit", "score"]
    for name, row, values in zip("ab", traces.tokens, logits, strict=True):
        part = table[table["id"] == name]
        assert part["position"].tolist() == list(range(row.n_pos))
        assert part["span"].tolist() == [str(s) for s in row.labels()]
        assert "".join(part["token"]) == llama.tokenizer.decode(row.token_ids.tolist())
        np.testing.assert_allclose(part["logit"], values, rtol=1e-6)
        np.testing.assert_allclose(part["score"], sigmoid(values), atol=1e-6)
    assert [scores.tolist() for scores in traces.scores()] == [
        table[table["id"] == name]["score"].tolist() for name in "ab"
    ]


def test_no_traces_give_empty_tables(llama: LensModel) -> None:
    traces = handmade(llama, [], [])
    assert traces.to_frame().empty
    assert traces.cliffs().to_frame().empty
    assert traces.aligned({"all": []}).empty


def test_traces_are_the_probe_on_the_hidden_states(model: LensModel, refused: Transcripts) -> None:
    probe, group = random_probe(model, 2), refused[:5]
    traces = trace_refusal(model, probe, group)
    assert [row.id for row in traces.tokens] == [t.id for t in group]
    assert traces.transcripts == tuple(group)
    for row, logits in zip(traces.tokens, traces.logits, strict=True):
        residuals = plain_residuals(model, row.token_ids.tolist())
        np.testing.assert_allclose(logits, residuals[2] @ probe.weight + probe.bias, rtol=1e-4, atol=1e-4)
        assert row.n_pos == row.final + 1
    assert repr(traces) == "RefusalTraces(n=5, layer 2, left out 0)"


def test_a_trace_is_the_same_alone_and_in_company(model: LensModel, refused: Transcripts) -> None:
    probe = random_probe(model, 2)
    together = trace_refusal(model, probe, refused[:5])
    for i, transcript in enumerate(refused[:5]):
        alone = trace_refusal(model, probe, Transcripts([transcript]))
        np.testing.assert_allclose(together.logits[i], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_layers_are_kept_for_the_transcripts_that_were_asked_for(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 2)
    traces = trace_refusal(llama, probe, refused[:4], layers_of=[refused[2].id, "unknown"])
    assert list(traces.layer_logits) == [refused[2].id]
    kept = traces.layer_logits[refused[2].id]
    residuals = plain_residuals(llama, traces.tokens[2].token_ids.tolist())
    expected = np.einsum("lpd,ld->lp", residuals, probe.layer_weights) + probe.layer_biases[:, None]
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept[2], traces.logits[2], rtol=1e-4, atol=1e-4)


def test_transcripts_that_cannot_be_traced_are_counted_with_their_reason(
    llama: LensModel, refused: Transcripts
) -> None:
    long = refused[1].replace(thinking=" ".join(["think"] * 300))
    tagged = refused[2].replace(thinking="it is </think> wrong")
    bare = refused[3].replace(thinking=None)
    traces = trace_refusal(llama, random_probe(llama, 2), Transcripts([refused[0], long, tagged, bare]))
    assert [row.id for row in traces.tokens] == [refused[0].id]
    reasons = {omission.id: omission.reason for omission in traces.omitted}
    assert set(reasons) == {long.id, tagged.id, bare.id}
    assert "max_length=256" in reasons[long.id]
    assert "closing tag" in reasons[tagged.id]
    assert "thinking is None" in reasons[bare.id]


def test_when_nothing_can_be_traced_the_first_reason_is_told(llama: LensModel, refused: Transcripts) -> None:
    with pytest.raises(SpanError, match=r"None of 1 transcripts can be traced: .*thinking is None"):
        trace_refusal(llama, random_probe(llama, 2), Transcripts([refused[0].replace(thinking=None)]))
    with pytest.raises(SpanError, match="none was given"):
        trace_refusal(llama, random_probe(llama, 2), Transcripts())


def test_residuals_that_are_not_finite_are_omitted(make_checkpoint: MakeCheckpoint, refused: Transcripts) -> None:
    model = load_model(make_checkpoint("llama"), device="cpu")
    word = model.tokenizer.convert_tokens_to_ids(" kite")
    model.hf.get_input_embeddings().weight.data[word] = float("nan")
    clean = ask("clean", "it is wrong")
    traces = trace_refusal(model, random_probe(model, 2), Transcripts([ask("broken", "ruin the kite"), clean]))
    assert [row.id for row in traces.tokens] == ["clean"]
    assert [(o.id, o.reason) for o in traces.omitted] == [("broken", "residuals are NaN or infinite")]


def test_answers_do_not_change_a_trace(llama: LensModel, refused: Transcripts) -> None:
    probe, one = random_probe(llama, 2), refused[0]
    with_answer = trace_refusal(llama, probe, Transcripts([one]))
    without = trace_refusal(llama, probe, Transcripts([one.replace(answer=None)]))
    np.testing.assert_array_equal(with_answer.logits[0], without.logits[0])


def test_a_model_that_does_not_think_gives_traces_without_valid_cliffs(
    chatml_model: LensModel, refused: Transcripts
) -> None:
    group = refused[:3].map(lambda t: t.replace(thinking=None))
    table = trace_refusal(chatml_model, random_probe(chatml_model, 2), group).cliffs().to_frame()
    assert len(table) == 3
    assert not table["valid"].any()
    assert table["final"].notna().all()


def test_a_probe_of_another_width_is_refused(llama: LensModel, refused: Transcripts) -> None:
    narrow = np.zeros((8, 9), dtype=np.float32)
    probe = replace(random_probe(llama, 2), weight=narrow[2], layer_weights=narrow)
    with pytest.raises(ProbeError, match="width 9"):
        trace_refusal(llama, probe, refused[:1])


def test_a_plot_has_a_curve_for_each_group(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    figure = trace_refusal(llama, random_probe(llama, 2), refused[:3] + complied[:3]).plot()
    names = {trace.name for trace in figure.data if trace.name}
    assert any("harmful, refused" in name for name in names)
    assert any("harmless, complied" in name for name in names)


@pytest.mark.parametrize(("harmful", "word"), [(True, "harmful"), (False, "harmless"), (None, "unlabelled")])
def test_a_group_is_named_in_words(harmful: bool | None, word: str) -> None:
    assert group_name(ask("a", "", harmful=harmful, outcome=Outcome.UNFINISHED)) == f"{word}, unfinished"


def bridge_trace(model: LensModel, row: TokenizedTranscript, edit: HeadEdit, probe: RefusalProbe) -> np.ndarray:
    """The probe's logits by TransformerLens alone, the heads set to zero at the edit's positions."""
    where = edit.scope.positions(row)

    def ablate(z: torch.Tensor, hook: object, *, head: int) -> torch.Tensor:
        z[:, where, head] = 0.0
        return z

    hooks = [(f"blocks.{ref.layer}.attn.hook_z", partial(ablate, head=ref.head)) for ref in edit.heads]
    name = f"blocks.{probe.layer}.hook_resid_post"
    ids = torch.tensor([row.token_ids.tolist()])
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        _, cache = model.bridge.run_with_cache(ids, names_filter=[name])
    return cache[name][0].numpy() @ probe.weight + probe.bias


@pytest.mark.parametrize("scope", ["closing", "thinking", "all"])
def test_an_edited_trace_is_the_probe_on_ablated_residuals(
    llama: LensModel, refused: Transcripts, scope: str, unchanged: Callable[[LensModel], Callable[[], None]]
) -> None:
    probe, edit = random_probe(llama, 5), zero([HeadRef(layer=1, head=2), HeadRef(layer=4, head=0)], scope=scope)
    check = unchanged(llama)
    found = trace_refusal(llama, probe, refused[:5], edit=edit, layers_of=[refused[0].id])
    check()
    plain = trace_refusal(llama, probe, refused[:5])
    for row, ours, without in zip(found.tokens, found.logits, plain.logits, strict=True):
        expected = bridge_trace(llama, row, edit, probe)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        before = edit.scope.positions(row).start
        np.testing.assert_allclose(ours[:before], without[:before], rtol=0, atol=1e-4 * np.abs(without).max())
        assert np.abs(ours - without).max() > 1e-2
    np.testing.assert_allclose(found.layer_logits[refused[0].id][5], found.logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 5, 64])
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_an_edited_trace_in_chunks_is_that_in_one_pass(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch, chunk: int, kind: str
) -> None:
    heads = [HeadRef(layer=1, head=2), HeadRef(layer=3, head=0)]
    # The mean has a value for each closing token, so that a chunk may begin among them.
    edit = zero(heads, scope="closing") if kind == "zero" else mean(llama, heads, refused[1:6], scope="closing")
    probe = random_probe(llama, 5)
    whole = trace_refusal(llama, probe, refused[:1], edit=edit).logits[0]
    plain = trace_refusal(llama, probe, refused[:1]).logits[0]
    monkeypatch.setattr(activations, "LONG", 8)
    monkeypatch.setattr(activations, "CHUNK", chunk)
    parts = trace_refusal(llama, probe, refused[:1], edit=edit).logits[0]
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    assert np.abs(whole - plain).max() > 1e-2


def test_traces_beside_each_other_have_a_curve_each_and_count_transcripts_once(
    llama: LensModel, refused: Transcripts
) -> None:
    probe = random_probe(llama, 5)
    plain = trace_refusal(llama, probe, refused[:4])
    edited = trace_refusal(llama, probe, refused[:4], edit=zero([HeadRef(layer=1, head=2)]))
    fig = plain.plot(by=lambda t: f"id {t.id[-1]}", further={"edited": edited})
    names = [trace.name for trace in fig.data if trace.name]
    assert names == [*(f"id {i} (n=1)" for i in range(4)), "edited (n=4)"]
    assert "(n=4 transcripts)" in fig.layout.title.text
    with pytest.raises(DataError, match="a group has that name already"):
        plain.plot(further={"harmful, refused": edited})


def test_one_transcript_is_drawn_as_text_and_layer_by_layer(llama: LensModel, refused: Transcripts) -> None:
    name, other = refused[0].id, refused[1].id
    traces = trace_refusal(llama, random_probe(llama, 5), refused[:2], layers_of=[name])
    assert len(traces.plot_tokens(name).layout.sliders[0].steps) == llama.shape.n_layers
    assert not traces.plot_tokens(other).layout.sliders
    told = [float(text) for text in traces.plot_tokens(other).data[0].hovertext]
    np.testing.assert_allclose(told, traces.scores()[1], rtol=0, atol=1e-3)
    assert np.array(traces.plot_layers(name).data[0].z).shape == (llama.shape.n_layers, traces.tokens[0].n_pos)
    with pytest.raises(DataError, match="Only layer 5"):
        traces.plot_layers(other)
    with pytest.raises(DataError, match="No transcript 'x' was traced; there are 2, such as"):
        traces.plot_tokens("x")


def test_cliffs_are_summed_up_by_group_and_drawn(by_hand: RefusalTraces) -> None:
    cliffs = by_hand.cliffs()
    row = cliffs.small_table().iloc[0]
    valid = cliffs.frame[cliffs.frame["valid"]]
    assert row["n"] == len(valid)
    assert row["cliff"] == pytest.approx(valid["cliff"].mean())
    assert len(cliffs.plot().data) >= 2
