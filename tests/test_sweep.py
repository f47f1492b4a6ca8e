import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, random_probe, tokens_of
from torch import Tensor

from cliffscope.errors import EditError, ProbeError, ResourceError
from cliffscope.heads import batched, packed, sweep
from cliffscope.heads.branches import Branch, Change, Job
from cliffscope.heads.edits import EditKind, HeadRef, Scope
from cliffscope.heads.sweep import sweep_branches
from cliffscope.model.load import LensModel, load_model
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.records import Message, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript


@pytest.fixture(autouse=True)
def nothing_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test compares with the plain path anew."""
    monkeypatch.setattr(sweep, "_PROVEN", WeakKeyDictionary())


TakeCopy = Callable[[LensModel], Callable[[], None]]


def every_head(model: LensModel) -> list[Branch]:
    return [
        (HeadRef(layer=layer, head=head),)
        for layer in range(model.shape.n_layers)
        for head in range(model.shape.n_heads)
    ]


def sets_of_heads(model: LensModel) -> list[Branch]:
    """Sets within a layer, across layers (the last ones above most probe layers), in no order, and of one head."""
    heads = [branch[0] for branch in every_head(model)]
    rng = np.random.default_rng(0)
    drawn = [tuple(heads[int(i)] for i in rng.permutation(len(heads))[:size]) for size in (2, 3, 5, len(heads))]
    return [*drawn, (heads[-1], heads[0]), tuple(heads[:2])]


def loop_logits(
    model: LensModel,
    probe: RefusalProbe,
    row: TokenizedTranscript,
    branches: Sequence[Branch],
    *,
    factor: float = 0.0,
    where: slice | None = None,
    values: Tensor | None = None,
) -> tuple[float, np.ndarray]:
    """The oracle: one `run_with_hooks` of the TransformerLens bridge a branch."""
    ids = torch.from_numpy(row.token_ids[: row.final + 1])[None]
    where = row.span(Span.CLOSING) if where is None else where
    weight = torch.from_numpy(probe.weight)

    def logit(branch: Branch) -> float:
        kept: list[Tensor] = []

        def read(residual: Tensor, hook: object) -> None:
            kept.append(residual[0, row.final])

        def editor(ref: HeadRef) -> Callable[..., Tensor]:
            def edit(z: Tensor, hook: object) -> Tensor:
                changed = z.clone()
                changed[:, where, ref.head] = changed[:, where, ref.head] * factor
                if values is not None:
                    changed[:, where, ref.head] = values[ref.layer, :, ref.head]
                return changed

            return edit

        hooks = [(f"blocks.{ref.layer}.attn.hook_z", editor(ref)) for ref in branch]
        hooks.append((f"blocks.{probe.layer}.hook_resid_post", read))
        with torch.no_grad():
            model.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
        return float(kept[0] @ weight) + probe.bias

    return logit(()), np.array([logit(branch) for branch in branches])


def assert_is_the_loop(
    model: LensModel, probe: RefusalProbe, rows: list[TokenizedTranscript], branches: list[Branch]
) -> None:
    found = sweep_branches(model, probe, rows, branches)
    assert found.path == "packed"
    for i, row in enumerate(rows):
        clean, expected = loop_logits(model, probe, row, branches)
        scale = max(1.0, abs(clean))
        np.testing.assert_allclose(found.clean[i], clean, rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose(found.edited[i], expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("from_the_last", [1, 2])
def test_the_packed_sweep_of_single_heads_is_the_loop_of_run_with_hooks(
    model: LensModel, refused: Transcripts, from_the_last: int
) -> None:
    probe = random_probe(model, model.shape.n_layers - from_the_last)
    assert_is_the_loop(model, probe, tokens_of(model, refused[:2]), every_head(model))


def test_the_packed_sweep_of_sets_is_the_loop_of_run_with_hooks(model: LensModel, refused: Transcripts) -> None:
    probe = random_probe(model, model.shape.n_layers - 2)
    assert_is_the_loop(model, probe, tokens_of(model, refused[2:4]), sets_of_heads(model))


def test_the_packed_sweep_is_the_loop_in_packs_of_any_size(
    model: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, rows = random_probe(model, model.shape.n_layers - 1), tokens_of(model, refused[:1])
    _, expected = loop_logits(model, probe, rows[0], branches := [*every_head(model), *sets_of_heads(model)])
    for tokens, layers in ((1, 6), (7, 1), (9, 2), (10_000, 100)):
        monkeypatch.setattr(packed, "PACK_TOKENS", tokens)
        monkeypatch.setattr(packed, "PACK_LAYERS", layers)
        found = sweep_branches(model, probe, rows, branches)
        assert found.path == "packed"
        np.testing.assert_allclose(found.edited[0], expected, rtol=1e-4, atol=1e-4)


def test_scaling_is_packed_too(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 2), tokens_of(model, refused[:1])
    branches = every_head(model)
    found = sweep_branches(model, probe, rows, branches, change=Change(kind=EditKind.SCALE, factor=-1.5))
    _, expected = loop_logits(model, probe, rows[0], branches, factor=-1.5)
    assert found.path == "packed"
    np.testing.assert_allclose(found.edited[0], expected, rtol=1e-4, atol=1e-4)


def test_editing_by_one_gives_the_clean_logit(model: LensModel, refused: Transcripts) -> None:
    probe, same = random_probe(model, 2), Change(kind=EditKind.SCALE, factor=1.0)
    found = sweep_branches(model, probe, tokens_of(model, refused[:2]), every_head(model), change=same)
    np.testing.assert_allclose(found.edited, found.clean[:, None] + np.zeros_like(found.edited), rtol=1e-4, atol=1e-4)


def test_heads_above_the_probes_layer_give_exactly_the_clean_logit(model: LensModel, refused: Transcripts) -> None:
    probe = random_probe(model, 1)
    found = sweep_branches(model, probe, tokens_of(model, refused[:2]), every_head(model))
    above = np.array([branch[0].layer > 1 for branch in every_head(model)])
    assert (found.edited[:, above] == found.clean[:, None]).all()
    assert (np.abs(found.edited[:, ~above] - found.clean[:, None]).max(0) > 1e-3).all()


def test_a_template_without_thinking_is_packed_too(chatml_model: LensModel, refused: Transcripts) -> None:
    asked = refused[:2].map(lambda t: t.replace(thinking=None))
    rows = tokens_of(chatml_model, asked)
    assert_is_the_loop(chatml_model, random_probe(chatml_model, 5), rows, every_head(chatml_model)[::3])


def test_empty_thinking_is_packed_too(llama: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(llama, refused[:1].map(lambda t: t.replace(thinking="")))
    assert_is_the_loop(llama, random_probe(llama, 5), rows, every_head(llama)[::3])


def test_answers_are_ignored(llama: LensModel, refused: Transcripts) -> None:
    (row,) = tokens_of(llama, refused[:1])
    stop = row.n_pos + 4
    longer = TokenizedTranscript(
        id="longer", token_ids=np.append(row.token_ids, [9, 10, 11, 12]), bounds=(*row.bounds[:3], stop)
    )
    probe, branches = random_probe(llama, 5), every_head(llama)
    found = sweep_branches(llama, probe, [row, longer], branches)
    np.testing.assert_array_equal(found.edited[0], found.edited[1])


def test_a_transcript_does_not_depend_on_its_neighbours(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 3), tokens_of(model, refused[:3])
    together = sweep_branches(model, probe, rows, every_head(model))
    for i, row in enumerate(rows):
        alone = sweep_branches(model, probe, [row], every_head(model))
        np.testing.assert_array_equal(together.edited[i], alone.edited[0])


@pytest.mark.parametrize("scope", [Scope.PROMPT, Scope.THINKING, Scope.ALL])
@pytest.mark.parametrize("chunk", [1, 60, 4096])
def test_the_batched_sweep_of_other_scopes_is_the_loop_of_run_with_hooks(
    model: LensModel, refused: Transcripts, scope: Scope, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(sweep, "CHUNK_TOKENS", chunk)
    probe, rows = random_probe(model, 2), tokens_of(model, refused[:3])
    branches = [*every_head(model)[::3], *sets_of_heads(model)]
    found = sweep_branches(model, probe, rows, branches, scope=scope)
    assert found.path == "batched"
    for i, row in enumerate(rows):
        clean, expected = loop_logits(model, probe, row, branches, where=scope.positions(row))
        scale = max(1.0, abs(clean))
        np.testing.assert_allclose(found.clean[i], clean, rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose(found.edited[i], expected, rtol=0, atol=1e-4 * scale)


def test_a_batched_transcript_does_not_depend_on_its_neighbours(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 3), tokens_of(model, refused[:3])
    together = sweep_branches(model, probe, rows, every_head(model), scope=Scope.ALL)
    for i, row in enumerate(rows):
        alone = sweep_branches(model, probe, [row], every_head(model), scope=Scope.ALL)
        np.testing.assert_allclose(together.edited[i], alone.edited[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", list(Scope))
def test_values_of_one_position_and_of_each_are_the_loop(model: LensModel, refused: Transcripts, scope: Scope) -> None:
    probe, rows, shape = random_probe(model, 3), tokens_of(model, refused[:2]), model.shape
    rng = torch.Generator().manual_seed(0)
    widths = [scope.positions(row).stop - scope.positions(row).start for row in rows]
    branches = [*every_head(model)[::4], *sets_of_heads(model)]
    for lengths in ([1, 1], widths):
        values = tuple(torch.randn(shape.n_layers, k, shape.n_heads, shape.d_head, generator=rng) for k in lengths)
        change = Change(kind=EditKind.PATCH, values=values)
        found = sweep_branches(model, probe, rows, branches, change=change, scope=scope)
        assert found.path == ("packed" if scope is Scope.CLOSING else "batched")
        for i, row in enumerate(rows):
            where = scope.positions(row)
            clean, expected = loop_logits(model, probe, row, branches, where=where, values=values[i])
            np.testing.assert_allclose(found.edited[i], expected, rtol=0, atol=1e-4 * max(1.0, abs(clean)))


def test_values_that_do_not_fit_are_refused_by_transcript(llama: LensModel, refused: Transcripts) -> None:
    rows, shape = tokens_of(llama, refused[:2]), llama.shape
    values = torch.zeros(shape.n_layers, 2, shape.n_heads, shape.d_head)
    for given, message in (((values,), "shape"), ((values, values, values), "3 transcripts were given for 2")):
        with pytest.raises(EditError, match=message):
            sweep_branches(
                llama, random_probe(llama, 2), rows, every_head(llama), change=Change(kind=EditKind.PATCH, values=given)
            )


def test_packing_that_fails_falls_back_to_batches_and_says_so(
    llama: LensModel,
    refused: Transcripts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unchanged: TakeCopy,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such mask")

    monkeypatch.setattr(packed, "_branch_mask", fail)
    probe, rows, check = random_probe(llama, 4), tokens_of(llama, refused[:2]), unchanged(llama)
    branches = every_head(llama)[::5]
    with caplog.at_level(logging.WARNING, logger="cliffscope"):
        found = sweep_branches(llama, probe, rows, branches)
    assert found.path == "batched (packed: fails (RuntimeError))"
    assert "no such mask" in caplog.text
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found.edited[i], loop_logits(llama, probe, row, branches)[1], rtol=1e-4, atol=1e-4)
    check()


def test_packing_that_is_wrong_falls_back_to_batches_and_says_so(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packed._branch_mask
    monkeypatch.setattr(packed, "_branch_mask", lambda *args: torch.zeros_like(real(*args)))
    probe, rows = random_probe(llama, 7), tokens_of(llama, refused[:2])
    branches = every_head(llama)[::5]
    found = sweep_branches(llama, probe, rows, branches)
    assert found.path.startswith("batched (packed: an unedited branch differs by")
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found.edited[i], loop_logits(llama, probe, row, branches)[1], rtol=1e-4, atol=1e-4)


def test_an_edit_that_a_fast_path_applies_wrongly_is_noticed(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_branch_edit", lambda *_: lambda z: None)
    monkeypatch.setattr(batched, "_row_edit", lambda *_: lambda z: None)
    probe, rows, branches = random_probe(llama, 5), tokens_of(llama, refused[:1]), every_head(llama)[::7]
    found = sweep_branches(llama, probe, rows, branches)
    assert found.path.startswith("plain (packed: differs from the plain path by")
    np.testing.assert_allclose(found.edited[0], loop_logits(llama, probe, rows[0], branches)[1], rtol=1e-4, atol=1e-4)


def test_a_model_is_compared_with_the_plain_path_once_a_kind(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Branch] = []
    real = sweep.plain_logit
    monkeypatch.setattr(sweep, "plain_logit", lambda *args: calls.append(args[3]) or real(*args))
    probe, rows, branches = random_probe(llama, 5), tokens_of(llama, refused[:2]), every_head(llama)
    for change, new in ((Change(), 2), (Change(), 0), (Change(kind=EditKind.SCALE, factor=0.5), 2)):
        calls.clear()
        sweep_branches(llama, probe, rows, branches, change=change)
        assert len(calls) == new
    assert calls == [branches[0], branches[40]]


def test_batches_that_enter_wrongly_fall_back_to_the_plain_path(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batched._run_rows
    monkeypatch.setattr(batched, "_run_rows", lambda *args: real(*args) + 1.0)
    probe, rows, branches = random_probe(llama, 5), tokens_of(llama, refused[:1]), every_head(llama)[::7]
    found = sweep_branches(llama, probe, rows, branches, scope=Scope.ALL)
    assert found.path.startswith("plain (batched: an unedited row differs by")


@pytest.mark.parametrize(("scope", "fails"), [(Scope.CLOSING, "_run_pack"), (Scope.ALL, "_run_rows")])
def test_out_of_memory_halves_the_pack_goes_on_and_says_so(
    llama: LensModel,
    refused: Transcripts,
    monkeypatch: pytest.MonkeyPatch,
    scope: Scope,
    fails: str,
    unchanged: TakeCopy,
) -> None:
    module = packed if scope is Scope.CLOSING else batched
    real, most = getattr(module, fails), 5

    def limited(*args: object) -> object:
        rows = args[2] if scope is Scope.CLOSING else args[3]
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    probe, rows, branches = random_probe(llama, 5), tokens_of(llama, refused[:2]), every_head(llama)
    expected, check = sweep_branches(llama, probe, rows, branches, scope=scope), unchanged(llama)
    monkeypatch.setattr(module, fails, limited)
    found = sweep_branches(llama, probe, rows, branches, scope=scope)
    assert "out of memory" in found.path
    assert found.path.startswith(expected.path)
    np.testing.assert_allclose(found.edited, expected.edited, rtol=1e-4, atol=1e-4)
    check()


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.ALL])
def test_memory_that_does_not_hold_one_branch_is_a_typed_error(
    llama: LensModel, refused: Transcripts, monkeypatch: pytest.MonkeyPatch, scope: Scope
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(packed, "_run_pack", fail)
    monkeypatch.setattr(batched, "_run_rows", fail)
    with pytest.raises(ResourceError, match="one (branch|row)"):
        sweep_branches(llama, random_probe(llama, 5), tokens_of(llama, refused[:1]), every_head(llama), scope=scope)


def test_a_window_of_attention_shorter_than_later_transcripts_is_still_exact(
    make_checkpoint: MakeCheckpoint, refused: Transcripts
) -> None:
    model = load_model(make_checkpoint("mistral"), device="cpu")
    short = refused[0].replace(thinking="", messages=(Message(role="user", content="how"),))
    rows = tokens_of(model, [short, refused[1]])
    assert rows[0].n_pos <= 12 < rows[1].n_pos
    probe, branches = random_probe(model, 3), every_head(model)
    found = sweep_branches(model, probe, rows, branches)
    for i, row in enumerate(rows):
        clean, expected = loop_logits(model, probe, row, branches)
        np.testing.assert_allclose(found.clean[i], clean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.edited[i], expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_unchanged_after_a_sweep(model: LensModel, refused: Transcripts, unchanged: TakeCopy) -> None:
    check = unchanged(model)
    sweep_branches(model, random_probe(model, 2), tokens_of(model, refused[:2]), every_head(model))
    check()


def test_the_model_is_unchanged_after_a_sweep_that_is_interrupted(
    model: LensModel, refused: Transcripts, unchanged: TakeCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = unchanged(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    probe, rows, branches = random_probe(model, 2), tokens_of(model, refused[:1]), every_head(model)
    for owner, name in ((packed, "_branch_mask"), (sweep, "_compare"), (Job, "logits")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(KeyboardInterrupt):
                sweep_branches(model, probe, rows, branches)
    check()


def test_progress_counts_transcripts(llama: LensModel, refused: Transcripts) -> None:
    seen: list[int] = []
    sweep_branches(
        llama, random_probe(llama, 2), tokens_of(llama, refused[:3]), every_head(llama)[:4], progress=seen.append
    )
    assert seen == [1, 2, 3]


def test_no_transcripts_give_an_empty_sweep(llama: LensModel) -> None:
    found = sweep_branches(llama, random_probe(llama, 2), [], every_head(llama))
    assert found.edited.shape == (0, 64)
    assert repr(found) == "Sweep(64 branches, n=0, packed)"


@pytest.mark.parametrize("scope", [Scope.CLOSING, Scope.ALL])
def test_an_empty_set_of_heads_gives_the_clean_logit(llama: LensModel, refused: Transcripts, scope: Scope) -> None:
    probe, rows = random_probe(llama, 2), tokens_of(llama, refused[:1])
    found = sweep_branches(llama, probe, rows, [(), *every_head(llama)], scope=scope)
    where = scope.positions(rows[0])
    clean, expected = loop_logits(llama, probe, rows[0], every_head(llama)[:1], where=where)
    assert found.edited[0, 0] == pytest.approx(clean, rel=1e-4)
    assert found.edited[0, 1] == pytest.approx(expected[0], rel=1e-4)
    assert found.edited[0, 1] != pytest.approx(clean, rel=1e-4), "the heads beside it are edited"


def test_an_unknown_head_is_refused(llama: LensModel, refused: Transcripts) -> None:
    with pytest.raises(EditError, match="no head L9H0"):
        sweep_branches(llama, random_probe(llama, 2), tokens_of(llama, refused[:1]), [(HeadRef(layer=9, head=0),)])


def test_a_probe_of_another_model_is_refused(models: dict[str, LensModel], refused: Transcripts) -> None:
    probe = random_probe(models["llama"], 7)
    with pytest.raises(ProbeError, match="layer 7"):
        sweep_branches(models["qwen3"], probe, tokens_of(models["qwen3"], refused[:1]), every_head(models["qwen3"]))
