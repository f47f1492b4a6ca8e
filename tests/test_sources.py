"""What a head reads: sums, and an independent computation of the pattern."""

import numpy as np
import pytest
import torch
from conftest import random_probe, tokens_of

from cliffscope.errors import EditError, SpanError, UnsupportedModelError
from cliffscope.figures.circuits import coloured_tokens
from cliffscope.heads.edits import HeadRef
from cliffscope.heads.shares import decompose_logit
from cliffscope.heads.sources import trace_all_sources, trace_sources
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts

HEAD = HeadRef(layer=2, head=3)


def test_shares_of_all_sources_sum_to_the_heads_share(model: LensModel, refused: Transcripts) -> None:
    probe = random_probe(model, 3)
    for head in (HEAD, HeadRef(layer=0, head=0), HeadRef(layer=3, head=1)):
        found = trace_sources(model, probe, refused[0], head)
        share = decompose_logit(model, probe, tokens_of(model, refused[:1])).heads[0, head.layer, head.head]
        assert found.shares[-1].sum() == pytest.approx(share, abs=1e-4)
        assert found.effect == pytest.approx(-share, abs=1e-4)
        assert found.kv_group == model.shape.kv_group(head.head)


def test_attention_is_transformers_own(model: LensModel, refused: Transcripts) -> None:
    found = trace_sources(model, random_probe(model, 3), refused[0], HEAD)
    kept: list[str] = [model.hf.config._attn_implementation]
    model.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            ids = torch.from_numpy(found.tokens.token_ids)[None]
            expected = model.hf(input_ids=ids, output_attentions=True).attentions[HEAD.layer][0, HEAD.head]
    finally:
        model.hf.set_attn_implementation(kept[0])
    first, stop = found.tokens.bounds[1], found.tokens.final + 1
    np.testing.assert_allclose(found.attention, expected[first:stop, :stop].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.attention.sum(1), 1.0, rtol=1e-5)


def test_the_table_has_one_row_a_closing_token_and_source(model: LensModel, refused: Transcripts) -> None:
    found = trace_sources(model, random_probe(model, 3), refused[0], HEAD)
    table = found.to_frame()
    assert table.columns.tolist() == ["query", "position", "token", "span", "attention", "share"]
    assert len(table) == found.shares.size
    last = table[table["query"] == found.tokens.final]
    assert "".join(last["token"]) == model.tokenizer.decode(found.tokens.token_ids.tolist())
    spans = found.by_span()
    assert spans["span"].tolist() == ["prompt", "thinking", "closing"]
    assert spans["attention"].sum() == pytest.approx(1.0, abs=1e-5)
    assert spans["share"].sum() == pytest.approx(-found.effect, abs=1e-4)


def test_the_bars_add_up_to_the_effect(model: LensModel, refused: Transcripts) -> None:
    found = trace_sources(model, random_probe(model, 3), refused[0], HEAD)
    (bars,) = found.plot(most=5).data
    assert len(bars.x) == 6
    assert sum(bars.x) == pytest.approx(found.effect, abs=1e-3)


def test_circuitsvis_shows_tokens_that_close_no_script_and_loads_nothing(
    llama: LensModel, refused: Transcripts
) -> None:
    found = trace_sources(llama, random_probe(llama, 3), refused[0], HEAD)
    for view in (found.attention_view(), found.token_view()):
        text, again = view._repr_html_(), str(view)
        assert text[:40] != again[:40], "shown twice it is two elements"
        assert text.count("</script") == 1
        assert "unpkg" not in text
        body = text[text.rindex("CircuitsVis.render(") :]
        assert r"\u2039/think\u003e" in body


def test_what_cannot_be_traced_is_refused(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpanError, match="above layer 1"):
        trace_sources(llama, random_probe(llama, 1), refused[0], HEAD)
    with pytest.raises(EditError, match="no head L9H0"):
        trace_sources(llama, random_probe(llama, 3), refused[0], HeadRef(layer=9, head=0))
    with pytest.raises(SpanError):
        trace_sources(llama, random_probe(llama, 3), refused[0].replace(thinking=None), HEAD)
    from cliffscope.heads import sources

    real = sources._read
    monkeypatch.setattr(sources, "_read", lambda *args: [(p * 0.9, v, z) for p, v, z in real(*args)])
    with pytest.raises(UnsupportedModelError, match="attention x values"):
        trace_sources(llama, random_probe(llama, 3), refused[0], HEAD)


def test_both_signs_of_coloured_tokens_share_one_scale() -> None:
    props = coloured_tokens([" a", "<b>", "&lt;"], [0.004, -1.2, 0.0])
    assert (props["minValue"], props["maxValue"]) == (-1.2, 1.2)
    assert props["values"] == [0.004, -1.2, 0.0]
    assert props["tokens"] == [" a", "‹b>", "＆lt;"]
    assert coloured_tokens([], [])["maxValue"] == 1.0


def test_several_heads_are_read_in_one_pass_as_each_alone(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, probe = [HEAD, HeadRef(layer=1, head=0), HeadRef(layer=3, head=7)], random_probe(llama, 3)
    alone = [trace_sources(llama, probe, refused[0], head) for head in heads]
    passes = []
    real = llama.bridge.run_with_hooks
    monkeypatch.setattr(llama.bridge, "run_with_hooks", lambda *a, **k: passes.append(1) or real(*a, **k))
    together = trace_all_sources(llama, probe, refused[0], heads)
    assert len(passes) == 1
    for one, other in zip(alone, together, strict=True):
        assert one.head == other.head
        np.testing.assert_allclose(other.shares, one.shares, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other.attention, one.attention, rtol=0, atol=1e-6)
