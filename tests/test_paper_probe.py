import numpy as np
import pytest
import torch
from conftest import tokens_of, written
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cliffscope.errors import ProbeError
from cliffscope.heads.ranking import rank_heads
from cliffscope.model.load import LensModel
from cliffscope.readouts.logistic import STRENGTHS
from cliffscope.readouts.paper_probe import PaperProbe, fit_paper_probe
from cliffscope.readouts.readout import read_final
from cliffscope.transcripts.records import Outcome, Transcripts
from cliffscope.transcripts.transcript import Span

SPLITS = ["fit"] * 10 + ["validate"] * 6 + ["test"] * 8


def splits_of(*groups: Transcripts) -> dict[str, str]:
    return {t.id: SPLITS[i] for group in groups for i, t in enumerate(group)}


def last_hidden(model: LensModel, transcripts: Transcripts) -> np.ndarray:
    """The last of transformers' own hidden states, which comes behind the final norm."""
    states = []
    for row in tokens_of(model, transcripts):
        ids = torch.tensor([row.token_ids[: row.final + 1].tolist()])
        with torch.no_grad():
            states.append(model.hf(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy())
    return np.stack(states).astype(float)


def fitted(model: LensModel, refused: Transcripts, complied: Transcripts) -> PaperProbe:
    return fit_paper_probe(model, refused, complied, splits=splits_of(refused, complied))


def test_it_is_a_sklearn_pipeline_on_transformers_own_last_hidden_state(
    model: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    found = fitted(model, refused, complied)
    states = [last_hidden(model, group) for group in (refused, complied)]

    def part(place: slice) -> tuple[np.ndarray, np.ndarray]:
        rows = [s[place] for s in states]
        return np.concatenate(rows), np.repeat([1, 0], [len(r) for r in rows])

    pipelines = {
        c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(*part(slice(10)))
        for c in STRENGTHS
    }
    held, labels = part(slice(10, 16))
    losses = {c: np.mean(np.logaddexp(0, -(2 * labels - 1) * p.decision_function(held))) for c, p in pipelines.items()}
    assert found.strength == min(losses, key=lambda c: losses[c])
    test, truth = part(slice(16, 24))
    expected = pipelines[found.strength].decision_function(test)
    np.testing.assert_allclose(test @ found.weight + found.bias, expected, rtol=1e-3, atol=1e-2)
    assert found.report.final.auroc == pytest.approx(roc_auc_score(truth, expected))
    assert found.refused_logit == pytest.approx(expected[:8].mean(), abs=1e-2)
    assert found.layer == model.shape.n_layers - 1


def test_as_a_readout_it_reads_the_residual_through_the_final_norm(
    model: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    found = fitted(model, refused, complied)
    logits = read_final(model, found, tokens_of(model, refused[16:]))
    expected = last_hidden(model, refused[16:]) @ found.weight + found.bias
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_heads_can_be_ranked_on_it(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    found = fitted(llama, refused, complied)
    asked = written(4, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    ranking = rank_heads(llama, found, asked, method="zero", scope="closing")
    first = ranking.heads[0]

    def zeroed(_module: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = inputs[0].clone()
        d_head = z.shape[-1] // llama.shape.n_heads
        z[:, closing, first.head * d_head : (first.head + 1) * d_head] = 0
        return (z, *inputs[1:])

    for i, row in enumerate(tokens_of(llama, asked)):
        closing = row.span(Span.CLOSING)
        before = last_hidden(llama, asked[i : i + 1])[0]
        handle = llama.hf.model.layers[first.layer].self_attn.o_proj.register_forward_pre_hook(zeroed)
        try:
            after = last_hidden(llama, asked[i : i + 1])[0]
        finally:
            handle.remove()
        assert ranking.effects[i, 0] == pytest.approx((after - before) @ found.weight, abs=1e-2, rel=1e-3)


def test_the_challenge_is_reported_and_not_fitted_on(
    llama: LensModel, refused: Transcripts, complied: Transcripts
) -> None:
    challenge = written(24, harmful=True, outcome=Outcome.COMPLIED, wrapper="story")
    splits = splits_of(refused, complied, challenge)
    found = fit_paper_probe(llama, refused, complied, challenge=challenge, splits=splits)
    plain = fit_paper_probe(llama, refused, complied, splits=splits)
    np.testing.assert_array_equal(found.weight, plain.weight)
    assert found.report.final.n_complied == 8
    assert found.report.within_harmful.n_complied == 8
    logits = last_hidden(llama, challenge[16:]) @ found.weight + found.bias
    assert found.report.calibration.complied == pytest.approx((1 / (1 + np.exp(-logits))).mean(), abs=1e-3)
    assert np.isnan(plain.report.within_harmful.auroc)


def test_another_model_is_refused(models: dict[str, LensModel], refused: Transcripts, complied: Transcripts) -> None:
    found = fitted(models["llama"], refused, complied)
    with pytest.raises(ProbeError, match="layer 7 of width 32, the last one of its model.*4 layers"):
        found.check_model(models["qwen3"])


def test_too_few_are_refused(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    with pytest.raises(ProbeError, match="fit split holds 3 complied transcripts"):
        fit_paper_probe(llama, refused, complied[:3], splits=dict.fromkeys([t.id for t in refused + complied], "fit"))


def test_it_says_what_it_is(llama: LensModel, refused: Transcripts, complied: Transcripts) -> None:
    found = fitted(llama, refused, complied)
    assert repr(found).startswith("PaperProbe(behind the final norm, held-out AUROC ")
    assert found.small_table()["region"].tolist() == ["final", "final, harmful only"]
    assert found.report.can_tell is found.report.final.can_tell
