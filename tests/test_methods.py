"""Each method measures what its table says, by TransformerLens' own hooks; what it cannot measure it refuses."""

import numpy as np
import pytest
import torch
from conftest import check_documented, random_probe, tokens_of

from cliffscope.errors import DataError, EditError
from cliffscope.evaluation.dose import dose_response
from cliffscope.heads.ablation import Mean, Scale
from cliffscope.heads.agreement import split_half
from cliffscope.heads.branches import Change
from cliffscope.heads.catalogue import METHODS
from cliffscope.heads.controls import control_sets
from cliffscope.heads.donors import DonorTokens
from cliffscope.heads.edits import EditKind, HeadRef, Scope
from cliffscope.heads.methods import EditMethod, Task
from cliffscope.heads.ranking import HeadRanking, rank_heads
from cliffscope.heads.shares import decompose_logit
from cliffscope.model.load import LensModel
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript


def bridge_logit(
    model: LensModel, probe: RefusalProbe, row: TokenizedTranscript, head: HeadRef | None, values: torch.Tensor | None
) -> float:
    """The refusal logit with one head's closing output set to values."""
    kept: list[torch.Tensor] = []
    where = Scope.CLOSING.positions(row)

    def put(z: torch.Tensor, hook: object) -> torch.Tensor:
        changed = z.clone()
        changed[0, where, head.head] = values
        return changed

    hooks = [(f"blocks.{head.layer}.attn.hook_z", put)] if head is not None else []
    hooks.append((f"blocks.{probe.layer}.hook_resid_post", lambda r, hook: kept.append(r[0, row.final])))
    with torch.no_grad():
        model.bridge.run_with_hooks(torch.from_numpy(row.token_ids)[None], return_type=None, fwd_hooks=hooks)
    return float(kept[0] @ torch.from_numpy(probe.weight)) + probe.bias


def closing_outputs(model: LensModel, row: TokenizedTranscript, head: HeadRef) -> torch.Tensor:
    name = f"blocks.{head.layer}.attn.hook_z"
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(torch.from_numpy(row.token_ids)[None], names_filter=[name])
    return cache[name][0, Scope.CLOSING.positions(row), head.head]


def effect_of(ranking: HeadRanking, head: HeadRef, transcript: int) -> float:
    return float(ranking.effects[transcript, ranking.heads.index(head)])


HEADS = [HeadRef(layer=0, head=1), HeadRef(layer=2, head=3)]


def test_mean_ablation_is_the_loop(model: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    probe, (row,) = random_probe(model, 3), tokens_of(model, refused[:1])
    ranking = rank_heads(model, probe, refused[:1], method="mean", harmless=complied[:4])
    references = tokens_of(model, complied[:4])
    clean = bridge_logit(model, probe, row, None, None)
    for head in HEADS:
        values = torch.stack([closing_outputs(model, other, head) for other in references]).mean(0)
        expected = bridge_logit(model, probe, row, head, values) - clean
        assert effect_of(ranking, head, 0) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert ranking.donors == "4 transcripts (harmless, complied 4)"


def test_patching_puts_the_matched_donor_in_and_its_reverse_takes_it_out(
    model: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe = random_probe(model, 3)
    pairs = {complied[i].id: refused[i] for i in range(2)}
    rows, donors = tokens_of(model, complied[:2]), tokens_of(model, refused[:2])
    forward = rank_heads(model, probe, complied[:2], method="patch", donors=pairs)
    back = rank_heads(model, probe, complied[:2], method="patch-reverse", donors=pairs)
    for i, (row, donor) in enumerate(zip(rows, donors, strict=True)):
        clean = [bridge_logit(model, probe, one, None, None) for one in (row, donor)]
        np.testing.assert_allclose([forward.clean[i], back.clean[i]], clean, rtol=1e-4, atol=1e-3)
        for head in HEADS:
            into = bridge_logit(model, probe, row, head, closing_outputs(model, donor, head)) - clean[0]
            out = clean[1] - bridge_logit(model, probe, donor, head, closing_outputs(model, row, head))
            assert effect_of(forward, head, i) == pytest.approx(into, rel=1e-3, abs=1e-3)
            assert effect_of(back, head, i) == pytest.approx(out, rel=1e-3, abs=1e-3)
    assert (forward.sign, back.sign) == (1, -1)
    own, other = (bridge_logit(model, probe, one, None, None) for one in (rows[0], donors[0]))
    one = {complied[0].id: refused[0]}
    alone = rank_heads(model, probe, complied[:1], method="patch-reverse", donors=one)
    assert alone.gap == pytest.approx(other - own, rel=1e-3, abs=1e-3)


def test_resampling_takes_another_transcript_with_the_seed(model: LensModel, refused: Transcripts) -> None:
    probe, (row,) = random_probe(model, 3), tokens_of(model, refused[:1])
    first, again, other = (
        rank_heads(model, probe, refused[:1], method="resample", donors=refused[1:9], seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.effects, again.effects)
    assert (first.effects != other.effects).any()
    clean = bridge_logit(model, probe, row, None, None)
    possible = [
        bridge_logit(model, probe, row, HEADS[1], closing_outputs(model, donor, HEADS[1])) - clean
        for donor in tokens_of(model, refused[1:9])
    ]
    assert min(abs(effect_of(first, HEADS[1], 0) - p) for p in possible) < 1e-3


def test_scaling_is_the_loop(model: LensModel, refused: Transcripts) -> None:
    probe, (row,) = random_probe(model, 3), tokens_of(model, refused[:1])
    ranking = rank_heads(model, probe, refused[:1], method="scale", factor=-0.5)
    clean = bridge_logit(model, probe, row, None, None)
    for head in HEADS:
        expected = bridge_logit(model, probe, row, head, -0.5 * closing_outputs(model, row, head)) - clean
        assert effect_of(ranking, head, 0) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert ranking.dose == 1.5


def test_direct_and_cliff_are_shares(model: LensModel, refused: Transcripts) -> None:
    probe, rows = random_probe(model, 3), tokens_of(model, refused[:3])
    shares = decompose_logit(model, probe, rows)
    direct, cliff = (rank_heads(model, probe, refused[:3], method=name) for name in ("direct", "cliff"))
    final, plateau = shares.heads.reshape(3, -1), shares.plateau_heads.reshape(3, -1)
    np.testing.assert_allclose(direct.effects, -final, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cliff.effects, plateau - final, rtol=1e-4, atol=1e-4)


def test_controls_are_measured_by_the_same_method(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe = random_probe(llama, 5)
    ranking = rank_heads(llama, probe, complied[:2], method="mean", harmless=complied[2:5], refused=refused[:3])
    alone = rank_heads(llama, probe, refused[:3], method="mean", donors=complied[2:5])
    assert ranking.harmless_effects.shape == ranking.refused_effects.shape == (3, 64)
    np.testing.assert_allclose(ranking.refused_effects, alone.effects, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [name for name, _ in METHODS])
def test_every_method_gives_the_same_columns(
    llama: LensModel, refused: Transcripts, complied: Transcripts, method: str
) -> None:
    probe = random_probe(llama, 5)
    table = rank_heads(
        llama, probe, complied[:3], method=method, harmless=complied[3:5], refused=refused[:3]
    ).to_frame()
    assert len(table) == 64
    assert table["rank"].tolist() == list(range(1, 65))
    assert table[["effect", "effect_score", "ci_low", "ci_high"]].notna().all(axis=None)
    tested = table[["p", "q"]].notna().all(axis=1)
    assert tested.tolist() == (table["untested"] == "").tolist()
    assert not tested[table["layer"] > probe.layer].any()
    assert table[["effect_harmless", "effect_refused"]].notna().all(axis=None)
    assert set(table["method"]) == {method}


def test_a_set_can_be_controlled_by_any_method(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    probe = random_probe(llama, 5)
    zeroed, greedy = (control_sets(llama, probe, refused[:2], HEADS, method=m, draws=3) for m in ("zero", "greedy"))
    np.testing.assert_array_equal(zeroed.effects, greedy.effects)
    patched = control_sets(llama, probe, complied[:2], HEADS, method="patch", donors=refused[:3], draws=3)
    assert patched.random_all.shape == (3, 2)
    assert not np.allclose(patched.effects, zeroed.effects)


@pytest.mark.parametrize("method", ["mean", "resample", "patch", "patch-reverse"])
def test_methods_without_their_donors_are_refused(llama: LensModel, refused: Transcripts, method: str) -> None:
    with pytest.raises(DataError, match=f"method='{method}' needs donors"):
        rank_heads(llama, random_probe(llama, 5), refused[:2], method=method)
    with pytest.raises(DataError, match=f"method='{method}' needs donors"):
        control_sets(llama, random_probe(llama, 5), refused[:2], HEADS, method=method)


def test_settings_that_a_method_has_no_use_for_are_refused(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    probe = random_probe(llama, 5)
    with pytest.raises(DataError, match="method='zero' takes no values"):
        rank_heads(llama, probe, refused[:2], donors=complied[:2])
    with pytest.raises(EditError, match="method='zero' takes no factor"):
        rank_heads(llama, probe, refused[:2], factor=0.5)


@pytest.mark.parametrize("method", ["direct", "cliff"])
def test_a_scope_means_nothing_to_shares(llama: LensModel, refused: Transcripts, method: str) -> None:
    with pytest.raises(EditError, match="has no meaning"):
        rank_heads(llama, random_probe(llama, 5), refused[:2], method=method, scope="all")


def test_transcripts_without_a_token_in_the_scope_are_left_out(llama: LensModel, refused: Transcripts) -> None:
    empty = refused[0].replace(thinking="")
    for options in ({"method": "cliff"}, {"scope": "thinking"}):
        ranking = rank_heads(llama, random_probe(llama, 5), Transcripts([empty, refused[1]]), **options)
        assert [(o.id, o.reason) for o in ranking.omitted] == [(empty.id, "no token in scope thinking")]
        assert len(ranking.clean) == 1
    with pytest.raises(DataError, match="no token in scope thinking"):
        rank_heads(llama, random_probe(llama, 5), Transcripts([empty]), method="cliff")


def test_a_method_checks_itself(llama: LensModel, complied: Transcripts) -> None:
    donors = DonorTokens.read(llama, complied[:1])
    Mean().check(Scope.CLOSING, donors)
    with pytest.raises(DataError, match="needs donors"):
        Mean().check(Scope.CLOSING, None)
    with pytest.raises(DataError, match="no method 'remove'. Expected one of zero, mean"):
        METHODS.get("remove")


def test_every_method_says_what_it_is() -> None:
    assert [name for name, _ in METHODS] == [
        *("zero", "mean", "resample", "scale", "norm-preserving", "patch", "patch-reverse", "greedy"),
        *("attribution", "direct", "cliff"),
    ]
    for name, method in METHODS:
        assert method.name == name
        assert method.summary
    assert [name for name, method in METHODS if not method.causal] == ["attribution", "direct", "cliff"]
    assert [name for name, method in METHODS if method.needs] == ["mean", "resample", "patch", "patch-reverse"]
    assert [name for name, method in METHODS if not method.each_alone] == ["greedy"]
    assert Scale(factor=-0.5).dose == Scale().with_factor(-0.5).dose == 1.5


class Flip(EditMethod):
    """A user's own method."""

    name = "flip"
    summary = "the logit with the sign of `hook_z` turned"

    def change(self, task: Task) -> Change:
        return Change(kind=self.name, factor=-1.0)


flip = Flip()


@pytest.mark.parametrize("scope", ["closing", "all"])
def test_a_method_of_ones_own_is_measured_like_any_other(llama: LensModel, refused: Transcripts, scope: str) -> None:
    probe = random_probe(llama, 5)
    by_object, by_name = (
        rank_heads(llama, probe, refused[:4], method=m, scope=scope) for m in (Flip(), "test_methods:flip")
    )
    same = rank_heads(llama, probe, refused[:4], method="scale", factor=-1.0, scope=scope)
    np.testing.assert_allclose(by_object.effects, same.effects, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(by_object.effects, by_name.effects)
    assert np.abs(by_object.effects).max() > 0.3
    assert set(by_object.to_frame()["method"]) == {"flip"}
    assert by_object.path == ("packed" if scope == "closing" else "batched")
    assert len(split_half(by_object, splits=2).spearman) == 2


def test_a_method_of_ones_own_controls_sets_and_doses(llama: LensModel, refused: Transcripts) -> None:
    probe = random_probe(llama, 5)
    flipped, scaled = (
        control_sets(llama, probe, refused[:2], HEADS, method=method, draws=3)
        for method in (Flip(), Scale(factor=-1.0))
    )
    np.testing.assert_allclose(flipped.effects, scaled.effects, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(flipped.random_all, scaled.random_all, rtol=1e-4, atol=1e-4)
    ranking = rank_heads(llama, probe, refused[:2], method=Flip())
    doses = dose_response(llama, probe, ranking, refused[2:4], method=Flip(), fractions=(1 / 64,), controls=2)
    logits = doses.frame[doses.frame["quantity"] == "logit"].set_index("arm")["value"]
    joint = control_sets(llama, probe, refused[2:4], ranking.top(1 / 64), method="scale", factor=-1.0, draws=1)
    assert logits["top heads"] - logits["unedited"] == pytest.approx(joint.effect, abs=1e-3)


def test_the_edit_of_a_change_is_that_change(llama: LensModel) -> None:
    edit = Change(kind="flip", factor=-1.0).edit(tuple(HEADS), Scope.CLOSING, 0)
    assert (edit.kind, edit.factor, edit.values) == ("flip", -1.0, None)
    values = torch.randn(8, 2, 8, llama.shape.d_head)
    edit = Change(kind=EditKind.PATCH, values=(values,)).edit(tuple(HEADS), Scope.CLOSING, 0)
    assert edit.values is not None
    np.testing.assert_array_equal(edit.values[1], values[2, :, 3].numpy())


def test_the_documented_table_is_what_the_methods_say() -> None:
    rows = [
        f"| `{name}` | {method.summary} | {'causal' if method.causal else 'not causal'} | {donors_of(method.needs)} |"
        for name, method in METHODS
    ]
    table = "\n".join(["| method | what is measured | kind | values of |", "|---|---|---|---|", *rows])
    check_documented("methods", f"{table}\n", page_name="guide/heads.md")


def donors_of(need: str) -> str:
    return f"`{need}`, or `donors=`" if need else ""
