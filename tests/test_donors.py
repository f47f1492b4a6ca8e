"""What heads write elsewhere, computed again from transformers' own modules, one transcript at a time."""

import numpy as np
import pytest
import torch
from conftest import tokens_of
from torch import Tensor

from cliffscope.errors import DataError, EditError
from cliffscope.heads.donors import DonorTokens, choose_donors, donor_change, gather_outputs, mean, mean_change
from cliffscope.heads.edits import EditKind, HeadRef, Scope
from cliffscope.model.load import LensModel
from cliffscope.transcripts.records import Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript


def plain_outputs(model: LensModel, row: TokenizedTranscript) -> Tensor:
    """[layer, pos, head, d_head] by TransformerLens' own cache."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.shape.n_layers)]
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(
            torch.from_numpy(row.token_ids[: row.final + 1])[None], names_filter=lambda name: name in names
        )
    return torch.stack([cache[name][0] for name in names])


@pytest.mark.parametrize("scope", list(Scope))
def test_outputs_are_hook_z_over_the_scope(model: LensModel, refused: Transcripts, scope: Scope) -> None:
    rows = tokens_of(model, refused[:3])
    for row, found in zip(rows, gather_outputs(model, rows, scope), strict=True):
        torch.testing.assert_close(found, plain_outputs(model, row)[:, scope.positions(row)], rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_closing_is_taken_position_by_position(model: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(model, refused[:4])
    change = mean_change(model, rows[:3], rows[3:], Scope.CLOSING)
    by_hand = torch.stack([plain_outputs(model, row)[:, Scope.CLOSING.positions(row)] for row in rows[:3]]).mean(0)
    torch.testing.assert_close(change.of(0), by_hand, rtol=1e-4, atol=1e-5)
    assert change.kind is EditKind.MEAN


def test_the_mean_of_a_span_counts_every_transcript_alike(model: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(model, refused[:4])
    change = mean_change(model, rows[:3], rows[3:], Scope.THINKING)
    own = [plain_outputs(model, row)[:, Scope.THINKING.positions(row)].mean(1, keepdim=True) for row in rows[:3]]
    torch.testing.assert_close(change.of(0), torch.stack(own).mean(0), rtol=1e-4, atol=1e-5)
    assert len({row.bounds[1] - row.bounds[0] for row in rows}) > 1


def test_a_mean_edit_holds_the_means_of_its_heads(llama: LensModel, refused: Transcripts) -> None:
    heads = [HeadRef(layer=3, head=1), HeadRef(layer=5, head=7)]
    everywhere, closing = (mean(llama, heads, refused[:3], scope=scope) for scope in ("all", "closing"))
    own = [plain_outputs(llama, row).mean(1) for row in tokens_of(llama, refused[:3])]
    by_hand = torch.stack(own).mean(0)[[3, 5], [1, 7]]
    np.testing.assert_allclose(everywhere.values[:, 0], by_hand.numpy(), rtol=1e-4, atol=1e-5)
    row = tokens_of(llama, refused[:1])[0]
    assert closing.values.shape == (2, row.bounds[2] - row.bounds[1], llama.shape.d_head)


def test_a_closing_longer_than_the_references_is_refused(llama: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(llama, refused[:2])
    start, stop = rows[1].bounds[1] - 1, rows[1].bounds[2]
    longer = TokenizedTranscript(id="longer", token_ids=rows[1].token_ids, bounds=(start, start, stop, stop))
    with pytest.raises(EditError, match=r"closing of 'longer' has \d tokens"):
        mean_change(llama, rows[:1], [longer], Scope.CLOSING)


def test_donors_are_drawn_with_the_seed_and_are_never_oneself(llama: LensModel, refused: Transcripts) -> None:
    rows = tokens_of(llama, refused[:6])
    pool = DonorTokens.read(llama, refused[:6])
    drawn = [[t.id for t in choose_donors(pool, rows, Scope.CLOSING, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(donor != row.id for donor, row in zip(drawn[0], rows, strict=True))
    assert pool.name == "6 transcripts (harmful, refused 6)"


def test_matched_donors_give_to_their_own(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    rows = tokens_of(llama, refused[:2])
    donors = DonorTokens.read(llama, {refused[0].id: complied[1], refused[1].id: complied[0]})
    chosen = choose_donors(donors, rows, Scope.CLOSING)
    assert [t.id for t in chosen] == [complied[1].id, complied[0].id]
    change = donor_change(llama, chosen, Scope.CLOSING, EditKind.PATCH)
    expected = plain_outputs(llama, chosen[1])[:, Scope.CLOSING.positions(chosen[1])]
    torch.testing.assert_close(change.of(1), expected, rtol=1e-4, atol=1e-5)
    assert donors.name.startswith("matched: 2 transcripts (harmless, complied 2)")


def test_donors_that_do_not_fit_are_refused_with_what_to_do(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    rows = tokens_of(llama, refused[:1])
    width = rows[0].bounds[1] - rows[0].bounds[0]
    others = [t for t in complied if tokens_of(llama, [t])[0].bounds[1] - tokens_of(llama, [t])[0].bounds[0] != width]
    with pytest.raises(EditError, match="No donor of .* use scope='closing'"):
        choose_donors(DonorTokens.read(llama, Transcripts(others[:3])), rows, Scope.THINKING)
    with pytest.raises(EditError, match="its donor is none"):
        choose_donors(DonorTokens.read(llama, {"other": complied[0]}), rows, Scope.CLOSING)
    with pytest.raises(EditError, match="its donor is .* with"):
        choose_donors(DonorTokens.read(llama, {refused[0].id: others[0]}), rows, Scope.THINKING)
    with pytest.raises(DataError, match="1 of 2 donors cannot be used"):
        DonorTokens.read(llama, Transcripts([complied[0], complied[1].replace(thinking=None)]))
    with pytest.raises(DataError, match="none was given"):
        DonorTokens.read(llama, Transcripts())
