import numpy as np
import pytest
from conftest import plain_residuals, random_probe, tokens_of
from scipy.special import expit

from cliffscope.errors import SpanError
from cliffscope.heads.edits import HeadRef, zero
from cliffscope.model.load import LensModel
from cliffscope.readouts import layer_means as module
from cliffscope.readouts.cliff import PROMPT_BINS, THINKING_BINS, align_trace
from cliffscope.readouts.layer_means import layer_means
from cliffscope.readouts.trace import trace_refusal
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import Span

LAYER = 3


def test_the_means_are_those_of_plain_transformers_states_aligned_one_by_one(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe, some = random_probe(llama, LAYER), refused[:5] + complied[:4]
    found = layer_means(llama, probe, some).to_frame()
    width = found["bin"].max() + 1 - PROMPT_BINS - THINKING_BINS
    for name, group in (("harmful, refused", refused[:5]), ("harmless, complied", complied[:4])):
        grids = []
        for row in tokens_of(llama, group):
            states = plain_residuals(llama, row.token_ids.tolist())
            logits = np.einsum("lpd,ld->lp", states, probe.layer_weights) + probe.layer_biases[:, None]
            spans = {str(s): row.span(s) for s in (Span.PROMPT, Span.THINKING, Span.CLOSING)}
            grids.append([align_trace(expit(x).astype(float), closing_width=int(width), **spans) for x in logits])
        part = found[found["group"] == name]
        cells = part.pivot(index="layer", columns="bin", values="mean").to_numpy()
        np.testing.assert_allclose(cells, np.nanmean(grids, axis=0), atol=1e-4)
        assert part["n"].max() == len(group)


def test_the_probes_layer_is_what_the_mean_traces_show_also_under_an_edit(
    llama: LensModel, refused: Transcripts
) -> None:
    probe, some = random_probe(llama, LAYER), refused[:6]
    for edit in (None, zero([HeadRef(layer=1, head=2)], scope="closing")):
        traces = trace_refusal(llama, probe, some, edit=edit)
        expected = traces.aligned({"all": [t.id for t in some]})
        found = layer_means(llama, probe, some, by=lambda _t: "all", edit=edit).to_frame().query("layer == @LAYER")
        np.testing.assert_allclose(found["mean"], expected["mean"], atol=1e-5)
        assert found["label"].tolist() == expected["label"].tolist()
        assert found["n"].tolist() == expected["n"].tolist()


def test_how_many_are_held_at_a_time_changes_nothing(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, done = random_probe(llama, LAYER), []
    whole = layer_means(llama, probe, refused[:5]).to_frame()
    monkeypatch.setattr(module, "AT_ONCE", 2)
    parts = layer_means(llama, probe, refused[:5], progress=done.append).to_frame()
    np.testing.assert_allclose(parts["mean"], whole["mean"], atol=1e-5)
    assert done == [2, 4, 5]


def test_a_bin_that_a_transcript_lacks_does_not_count(llama: LensModel, refused: Transcripts) -> None:
    silent = refused[0].replace(id="silent", thinking="")
    found = layer_means(llama, random_probe(llama, LAYER), Transcripts([silent, refused[1]])).to_frame()
    n = found[found["layer"] == 0].groupby("span")["n"].max()
    assert (n["thinking"], n["prompt"], n["closing"]) == (1, 2, 2)
    alone = layer_means(llama, random_probe(llama, LAYER), Transcripts([refused[1]])).to_frame()
    thinking = found["span"] == "thinking"
    np.testing.assert_allclose(found["mean"][thinking], alone["mean"][alone["span"] == "thinking"], atol=1e-5)


def test_it_shows_itself(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    found = layer_means(llama, random_probe(llama, LAYER), refused[:2] + complied[:3])
    assert repr(found) == "LayerMeans(harmful, refused n=2, harmless, complied n=3; 8 layers, left out 0)"
    assert found.small_table()["n"].tolist() == [2, 3]
    figure = found.plot()
    cells = found.frame[found.frame["group"] == "harmless, complied"].pivot(index="layer", columns="bin", values="mean")
    np.testing.assert_allclose(np.array(figure.data[1].z, dtype=float), cells.to_numpy(), atol=1e-3)
    assert "harmless, complied (n=3)" in [note.text for note in figure.layout.annotations]


def test_no_transcript_at_all_is_refused(llama: LensModel) -> None:
    with pytest.raises(SpanError, match="None of 0 transcripts"):
        layer_means(llama, random_probe(llama, LAYER), Transcripts(()))
