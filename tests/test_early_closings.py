"""Early closings are what plain forward passes of cut transcripts say."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import (
    SEVERAL,
    SINGLE,
    MakeCheckpoint,
    answer_readout,
    log_odds_of,
    plain_logits,
    plain_residuals,
    random_probe,
    tokens_of,
    words_tokenizer,
)
from test_suppression import edited_log_odds

from cliffscope.errors import DataError, EditError, ProbeError, ResourceError, SpanError
from cliffscope.heads import packed, packed_closings
from cliffscope.heads.early_closings import EarlyClosings, settled_from, trace_early_closings
from cliffscope.heads.edits import EditKind, HeadEdit, HeadRef, Scope, compose, scale, zero
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.readout import read_final
from cliffscope.readouts.trace import trace_refusal
from cliffscope.transcripts.records import Transcript, Transcripts
from cliffscope.transcripts.templates import closing_ids
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize

HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=2, head=3), HeadRef(layer=2, head=0)]


@pytest.fixture(scope="module")
def mistral(make_checkpoint: MakeCheckpoint) -> LensModel:
    """Every layer sees the nearest 12 positions alone."""
    return load_model(make_checkpoint("mistral"), device="cpu")


@pytest.fixture(scope="module")
def mixed(make_checkpoint: MakeCheckpoint) -> LensModel:
    """Some layers see the nearest 9 positions alone, the others everything."""
    changes = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}
    return load_model(make_checkpoint("qwen3", **changes), device="cpu")


@pytest.fixture(params=["llama", "qwen3", "mistral", "mixed"])
def any_model(request: pytest.FixtureRequest, models: dict[str, LensModel]) -> LensModel:
    return models[request.param] if request.param in models else request.getfixturevalue(request.param)


def cut(model: LensModel, row: TokenizedTranscript, position: int) -> list[int]:
    """Ids of the transcript whose thinking ends at a position, by the template alone."""
    return [*row.token_ids[: position + 1].tolist(), *closing_ids(model.tokenizer, model.template)]


def assert_equal(logits: Sequence[float], expected: Sequence[float]) -> None:
    scale = np.maximum(1, np.abs(expected))
    np.testing.assert_allclose(np.asarray(logits) / scale, np.asarray(expected) / scale, rtol=0, atol=1e-4)


def test_some_layers_of_the_mixed_model_slide(mixed: LensModel) -> None:
    assert set(mixed.hf.config.layer_types) == {packed.FULL, packed.SLIDING}


@pytest.mark.parametrize("openings", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_every_position_is_a_plain_forward_pass_of_the_cut_transcript(
    any_model: LensModel, refused: Transcripts, openings: dict[str, list[tuple[int, ...]]]
) -> None:
    traced = trace_early_closings(any_model, answer_readout(any_model, openings), refused[:2])
    assert traced.path == "packed"
    for row, at, logits in zip(tokens_of(any_model, refused[:2]), traced.positions, traced.logits, strict=True):
        span = row.span(Span.THINKING)
        assert at.tolist() == list(range(span.start, span.stop))
        assert len(at) > 20
        expected = [log_odds_of(lambda ids: plain_logits(any_model, ids), cut(any_model, row, p), openings) for p in at]
        assert np.ptp(expected) > 0.1
        assert_equal(logits, expected)


@pytest.mark.parametrize("openings", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_an_edit_acts_on_the_closing_of_every_copy_alone(
    any_model: LensModel, refused: Transcripts, openings: dict[str, list[tuple[int, ...]]]
) -> None:
    answer, edit = answer_readout(any_model, openings), scale(HEADS, -0.5, scope="closing")
    traced = trace_early_closings(any_model, answer, refused[:1], edit=edit)
    unedited = trace_early_closings(any_model, answer, refused[:1])
    row, width = tokens_of(any_model, refused[:1])[0], len(closing_ids(any_model.tokenizer, any_model.template))
    expected = [
        edited_log_odds(any_model, cut(any_model, row, p), slice(p + 1, p + 1 + width), HEADS, -0.5, openings)
        for p in traced.positions[0]
    ]
    assert traced.path == "packed"
    assert_equal(traced.logits[0], expected)
    assert np.abs(traced.logits[0] - unedited.logits[0]).min() > 1e-4


def test_values_and_plans_are_packed_as_they_are_read_plainly(llama: LensModel, refused: Transcripts) -> None:
    answer, rng = answer_readout(llama, SEVERAL), np.random.default_rng(0)
    width = len(closing_ids(llama.tokenizer, llama.template))
    for positions in (1, width):
        values = rng.normal(size=(2, positions, llama.shape.d_head)).astype(np.float32)
        patch = HeadEdit(heads=tuple(HEADS[:2]), kind=EditKind.PATCH, values=values, scope=Scope.CLOSING)
        plan = compose(patch, zero(HEADS[2:], scope="closing"))
        traced = trace_early_closings(llama, answer, refused[:1], edit=plan, every=5)
        row = tokens_of(llama, refused[:1])[0]
        rows = [place_cut(llama, refused[0], row, p) for p in traced.positions[0]]
        assert traced.path == "packed"
        assert_equal(traced.logits[0], read_final(llama, answer, rows, edit=plan))


def place_cut(model: LensModel, whole: Transcript, row: TokenizedTranscript, position: int) -> TokenizedTranscript:
    """The cut transcript as the package tokenizes it."""
    ids = tuple(row.token_ids[row.bounds[0] : position + 1].tolist())
    thinking = str(model.tokenizer.decode(list(ids)))
    return tokenize(whole.replace(thinking=thinking, thinking_ids=ids), model.tokenizer, model.template)


def test_a_probe_of_a_middle_layer_reads_its_own_layer(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 3)
    traced = trace_early_closings(llama, probe, refused[:1], every=4)
    row = tokens_of(llama, refused[:1])[0]
    states = [plain_residuals(llama, cut(llama, row, p))[3, -1] for p in traced.positions[0]]
    assert_equal(traced.logits[0], np.stack(states) @ probe.weight + probe.bias)
    assert traced.readout == probe.name


@pytest.mark.parametrize("tokens", [1, 7, 23, 10_000])
def test_packs_of_any_size_say_the_same(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    answer = answer_readout(llama, SEVERAL)
    expected = trace_early_closings(llama, answer, refused[:2])
    monkeypatch.setattr(packed, "PACK_TOKENS", tokens)
    traced = trace_early_closings(llama, answer, refused[:2])
    assert traced.path == "packed"
    for logits, others in zip(traced.logits, expected.logits, strict=True):
        assert_equal(logits, others)


def test_every_kth_position_and_the_last(llama: LensModel, refused: Transcripts) -> None:
    answer = answer_readout(llama)
    full, some = (trace_early_closings(llama, answer, refused[:1], every=every) for every in (1, 7))
    span = full.tokens[0].span(Span.THINKING)
    assert some.positions[0].tolist() == sorted({*range(span.start, span.stop, 7), span.stop - 1})
    assert_equal(some.logits[0], full.logits[0][some.positions[0] - span.start])
    far = trace_early_closings(llama, answer, refused[:1], every=10_000)
    assert far.positions[0].tolist() == [span.start, span.stop - 1]


def test_the_last_position_is_the_transcript_itself(any_model: LensModel, refused: Transcripts) -> None:
    answer = answer_readout(any_model, SEVERAL)
    traced = trace_early_closings(any_model, answer, refused[:4], every=9)
    ends = [logits[-1] for logits in traced.logits]
    assert_equal(ends, read_final(any_model, answer, tokens_of(any_model, refused[:4])))


def test_thinking_of_one_token_has_one_position(llama: LensModel, refused: Transcripts) -> None:
    short = Transcripts([refused[0].replace(thinking="sorry", thinking_ids=None)])
    traced = trace_early_closings(llama, answer_readout(llama), short)
    assert [len(at) for at in traced.positions] == [1]
    assert_equal(traced.logits[0], read_final(llama, answer_readout(llama), tokens_of(llama, short)))
    assert traced.to_frame()["fraction"].tolist() == [1.0]
    assert traced.mean_curve()["ci_low"].isna().all()


def test_transcripts_without_thinking_are_left_out_and_counted(
    llama: LensModel, chatml_model: LensModel, refused: Transcripts
) -> None:
    empty, missing = refused[0].replace(id="empty", thinking=""), refused[1].replace(id="missing", thinking=None)
    traced = trace_early_closings(llama, answer_readout(llama), Transcripts([empty, missing, refused[2]]), every=8)
    assert [row.id for row in traced.tokens] == [refused[2].id]
    reasons = {o.id: o.reason for o in traced.omitted}
    assert "no thinking" in reasons["empty"]
    assert "missing" in reasons["missing"]
    with pytest.raises(SpanError, match="no thinking"):
        trace_early_closings(llama, answer_readout(llama), Transcripts([empty]))
    bare = Transcripts(t.replace(thinking=None) for t in refused[:2])
    with pytest.raises(SpanError, match="no thinking"):
        trace_early_closings(chatml_model, random_probe(chatml_model, 2), bare)


def test_wrong_settings_are_refused(llama: LensModel, models: dict[str, LensModel], refused: Transcripts) -> None:
    with pytest.raises(DataError, match="every=0"):
        trace_early_closings(llama, answer_readout(llama), refused[:1], every=0)
    with pytest.raises(ProbeError, match="layers"):
        trace_early_closings(models["qwen3"], answer_readout(llama), refused[:1])
    edit = zero([HeadRef(layer=70, head=0)], scope="closing")
    with pytest.raises(EditError, match="no head"):
        trace_early_closings(llama, answer_readout(llama), refused[:1], edit=edit)


def test_a_wider_scope_takes_plain_passes(llama: LensModel, refused: Transcripts) -> None:
    answer, edit = answer_readout(llama), zero(HEADS, scope="all")
    traced = trace_early_closings(llama, answer, refused[:1], edit=edit, every=9)
    row = tokens_of(llama, refused[:1])[0]
    expected = [
        edited_log_odds(llama, cut(llama, row, p), slice(None), HEADS, 0.0, SINGLE) for p in traced.positions[0]
    ]
    assert traced.path == "plain (scope all)"
    assert_equal(traced.logits[0], expected)


@pytest.mark.parametrize("broken", ["mask", "prefix", "error"])
def test_a_model_that_cannot_be_packed_takes_plain_passes(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    answer, real = answer_readout(llama, SEVERAL), packed.branch_masks
    expected = trace_early_closings(llama, answer, refused[:2], every=3)

    def spoil(model: object, layout: object, starts: object, like: object) -> object:
        if broken == "error":
            raise ValueError
        if broken == "prefix":
            return real(model, layout, layout.whole(len(starts)), like)
        return real(model, layout, starts, like) * 0

    monkeypatch.setattr(packed_closings, "branch_masks", spoil)
    done: list[int] = []
    traced = trace_early_closings(llama, answer, refused[:2], every=3, progress=done.append)
    assert traced.path.startswith("plain (packed: ")
    assert done == [1, 2]
    for logits, others in zip(traced.logits, expected.logits, strict=True):
        assert_equal(logits, others)


def test_packs_are_halved_where_memory_runs_out(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, real = answer_readout(llama), packed_closings._run_pack
    expected = trace_early_closings(llama, answer, refused[:1])

    def short(job: object, window: object, places: Sequence[object], edit: object) -> np.ndarray:
        if len(places) > most:
            raise RuntimeError("out of memory")
        return real(job, window, places, edit)

    monkeypatch.setattr(packed_closings, "_run_pack", short)
    most = 6
    traced = trace_early_closings(llama, answer, refused[:1])
    assert traced.path.startswith("packed (halved ")
    assert_equal(traced.logits[0], expected.logits[0])
    most = 0
    with pytest.raises(ResourceError, match="one closing"):
        trace_early_closings(llama, answer, refused[:1])


def test_logits_do_not_depend_on_the_company_and_leave_the_model_alone(
    llama: LensModel, refused: Transcripts, unchanged: object
) -> None:
    answer, check = answer_readout(llama), unchanged(llama)
    together = trace_early_closings(llama, answer, refused[:3], edit=zero(HEADS, scope="closing"), every=4)
    alone = trace_early_closings(llama, answer, refused[2:3], edit=zero(HEADS, scope="closing"), every=4)
    np.testing.assert_array_equal(together.logits[2], alone.logits[0])
    check()


def test_a_transcript_whose_logits_are_no_numbers_is_left_out(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*args: object, **options: object) -> tuple[list[np.ndarray], str]:
        logits, path = packed_closings.early_logits(*args, **options)
        logits[0][2] = np.nan
        return logits, path

    monkeypatch.setattr("cliffscope.heads.early_closings.early_logits", spoil)
    traced = trace_early_closings(llama, answer_readout(llama), refused[:2], every=9)
    assert [row.id for row in traced.tokens] == [refused[1].id]
    assert [(o.id, o.stage) for o in traced.omitted] == [(refused[0].id, "early closings")]


def test_the_answer_is_settled_where_the_sign_no_longer_changes() -> None:
    cases = {(1, 1, 1): 0, (-1, 1, 1): 1, (1, -1, 1): 2, (-2, 3, -1, -1): 2, (5,): 0, (-1, -1, 0.5): 2}
    for logits, place in cases.items():
        assert settled_from(np.array(logits, np.float32)) == place
    assert settled_from(np.array([0.5, 2.0, 3.0], np.float32), 1.0) == 1


def by_hand(llama: LensModel, refused: Transcripts, logits: Sequence[Sequence[float]]) -> EarlyClosings:
    """Closings after every token of four-token thinkings, with these logits."""
    ts = Transcripts(t.replace(thinking="sorry sorry sorry sorry", thinking_ids=None) for t in refused[: len(logits)])
    rows = tokens_of(llama, ts)
    return EarlyClosings(
        transcripts=tuple(ts),
        tokens=tuple(rows),
        positions=tuple(np.arange(row.bounds[0], row.bounds[1], dtype=np.int64) for row in rows),
        logits=tuple(np.array(values, np.float32) for values in logits),
        readout="answer",
        can_tell=True,
        edit=None,
        path="packed",
        tokenizer=llama.tokenizer,
    )


def test_frame_settled_and_mean_curve_are_those_of_hand_computation(llama: LensModel, refused: Transcripts) -> None:
    traced = by_hand(llama, refused, [[2, -1, 3, 4], [1, 1, -1, -2]])
    frame = traced.to_frame()
    assert list(frame.columns) == ["id", "position", "fraction", "token", "logit", "score"]
    assert frame["fraction"].tolist() == [0.25, 0.5, 0.75, 1.0] * 2
    assert frame["token"].str.strip().tolist() == ["sorry"] * 8
    settled = traced.settled()
    assert settled["fraction"].tolist() == [0.75, 0.75]
    assert settled["refuses"].tolist() == [True, False]
    assert settled[["first", "final", "n"]].to_numpy().tolist() == [[2, 4, 4], [1, -2, 4]]
    curve = traced.mean_curve(bins=8)
    sigmoid = 1 / (1 + np.exp(-np.array([[2, -1, 3, 4], [1, 1, -1, -2]], float)))
    # Before the first closing its own value stands; between two, the line between them.
    assert curve["mean"][0] == pytest.approx(sigmoid[:, 0].mean())
    assert curve["mean"][1::2].tolist() == pytest.approx(sigmoid.mean(0).tolist())
    assert curve["mean"][4] == pytest.approx(sigmoid[:, 1:3].mean())
    assert (curve["ci_low"] <= curve["mean"]).all()
    assert (curve["n"] == 2).all()


def test_it_shows_itself_in_a_line_a_table_and_one_figure(llama: LensModel, refused: Transcripts) -> None:
    answer, probe = answer_readout(llama), random_probe(llama, 3)
    plain = trace_early_closings(llama, answer, refused[:3], every=6)
    edited = trace_early_closings(llama, answer, refused[:3], edit=zero(HEADS, scope="closing"), every=6)
    assert "n=3, packed)" in repr(plain)
    assert len(plain.small_table()) == 3
    figure = plain.plot(edited=edited, probe=trace_refusal(llama, probe, refused[:4]))
    assert [trace.name for trace in figure.data if trace.name] == [
        "answer, unedited",
        "answer, edited",
        "probe at the token",
    ]
    assert "n=3" in figure.layout.title.text
    with pytest.raises(DataError, match="same transcripts"):
        plain.plot(probe=trace_refusal(llama, probe, refused[5:7]))


@pytest.fixture(scope="module")
def newlines(llama: LensModel) -> LensModel:
    """A model with a token that ends in a newline, beside the newline itself."""
    tokenizer = words_tokenizer()
    tokenizer.add_tokens([".\n"])
    return replace(llama, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "end", [(), (".\n",), ("\n",), ("\n", "\n")], ids=["word", "merged", "newline", "two newlines"]
)
def test_thinking_that_ends_in_a_newline_is_closed_as_the_tokenizer_has_it(
    newlines: LensModel, refused: Transcripts, end: tuple[str, ...]
) -> None:
    tokenizer, template = newlines.tokenizer, newlines.template
    texts = ["sorry", ".\n", "sure", "\n", "i", "\n", "\n", " can", " help", *end]
    ids = tuple(tokenizer.convert_tokens_to_ids(text) for text in texts)
    assert tokenizer.unk_token_id not in ids
    thought = refused[0].replace(thinking=tokenizer.decode(list(ids)), thinking_ids=ids)
    answer, edit = answer_readout(newlines, SEVERAL), zero(HEADS, scope="closing")
    unedited, edited = (trace_early_closings(newlines, answer, Transcripts([thought]), edit=e) for e in (None, edit))
    assert unedited.path == edited.path == "packed"
    row = unedited.tokens[0]
    cuts = [place_cut(newlines, thought, row, p) for p in unedited.positions[0][:-1]] + [row]
    for position, part, *logits in zip(unedited.positions[0], cuts, unedited.logits[0], edited.logits[0], strict=True):
        expected_ids = [
            *row.token_ids[: position + 1].tolist(),
            *closing_ids(tokenizer, template, after_newline=tokenizer.decode(row.token_ids[position]).endswith("\n")),
        ]
        if part is not row:
            assert part.token_ids.tolist() == expected_ids
        for heads, logit in zip(([], HEADS), logits, strict=True):
            expected = edited_log_odds(newlines, part.token_ids.tolist(), part.span(Span.CLOSING), heads, 0.0, SEVERAL)
            assert_equal([logit], [expected])
