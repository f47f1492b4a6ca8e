"""Does the residual stream say whether the answer will refuse?

1. Transcripts are split by prompt into fit, validate and test.
2. Residuals of every layer are gathered at chosen positions of the fit split: the final token alone (the paper's
   choice), or balanced over the thinking and the closing.
3. At each layer a logistic regression separates refused from complied transcripts; thinking and closing weigh the same,
   and so do the two classes and all transcripts of a class. Standardisation is folded into weight and bias.
4. On the validate split a regularisation is chosen, by log loss (harmful transcripts that were complied with count as
   complied at the final token, which favours a probe whose score has fallen there), and a layer: the latest one within
   one standard error of the best, judged by the worst of its AUROCs at the final token, over late thinking, and among
   harmful transcripts alone. Late, since a probe sees only heads below it. Harmful transcripts that were complied with
   are not fitted on, so that those of the fit split help to choose.
5. On the test split everything is reported, region by region, one value a transcript, with a shuffled-label control.

Source: the refusal prober of arXiv 2510.06036, section 3, with outcomes as labels and balanced positions added: a probe
fitted at the final token alone need not mean anything during the thinking. Knows nothing of cliffs or heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import gather_residuals, project_residuals
from cliffscope.readouts.labelled import CHALLENGE, COMPLIED, REFUSED, Labelled, LabelledRow, split_by_prompt
from cliffscope.readouts.logistic import STRENGTHS, fit_logistic
from cliffscope.readouts.readout import Readout
from cliffscope.readouts.regions import FINAL, LATE_THINKING, balanced_positions, region_names, regions
from cliffscope.readouts.reports import (
    ProbeReport,
    RegionReport,
    calibration_of,
    cells_of,
    one_sided_warning,
    region_report,
)
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Positions = Literal["final", "balanced"]
THINKING_POSITIONS = 16
"""Thinking positions a transcript in a balanced fit: more adds memory, and neighbours say nearly the same."""
SHUFFLES = 10
"""Shuffled-label probes of the control."""
FEWEST = 4
"""Transcripts a class that the fit and the test split need at the least."""
FEWEST_TO_CHOOSE = 2
"""The same for the validate split, which only chooses."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalProbe(Readout, Plotted):
    """A linear refusal probe: score = sigmoid(residual . weight + bias)."""

    name = "probe"
    layer: int
    """Layer whose `hook_resid_post` it reads."""
    weight: Float32[np.ndarray, " d_model"]
    """[d_model], on the raw residual."""
    bias: float
    """Logit at a zero residual."""
    layer_weights: Float32[np.ndarray, "layer d_model"]
    """[layer, d_model], the probes of all layers."""
    layer_biases: Float32[np.ndarray, " layer"]
    """[layer], their biases."""
    positions: str
    """`final` or `balanced`."""
    strength: float
    """Inverse regularisation that was chosen on the validate split."""
    refused_logit: float
    """Mean logit at the final token of held-out refused transcripts."""
    fingerprint: str
    """Of the model that it was fitted on."""
    report: ProbeReport
    """What it can tell, on held-out transcripts."""
    template: str = ""
    """Template that it was fitted with; "" where that is not recorded."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""

    def logits(self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]) -> Float[Tensor, "*batch"]:
        """The residual at the final position times the weight, plus the bias, in fp32."""
        del model
        final = rearrange(residuals, "... 1 d_model -> ... d_model")
        return final.float() @ torch.from_numpy(self.weight).to(final.device) + self.bias

    def check_model(self, model: LensModel) -> None:
        """Raises ProbeError if the probe's width, layer or template does not fit the model."""
        shape = model.shape
        if self.weight.shape != (shape.d_model,) or not 0 <= self.layer < shape.n_layers:
            raise ProbeError(
                f"The probe reads layer {self.layer} of width {self.weight.shape[0]}, but {model.name!r} has "
                f"{shape.n_layers} layers of width {shape.d_model}. Fit a probe on this model."
            )
        super().check_model(model)

    def to_frame(self) -> pd.DataFrame:
        """Held-out quality, one row a layer and region, as the report has it."""
        return self.report.to_frame()

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC where claims rest on it."""
        return self.report.small_table()

    def plot(self) -> "Figure":
        """Held-out AUROC by layer and position; the probe's layer is outlined."""
        return self.report.plot(layer=self.layer)

    def __repr__(self) -> str:
        """One line: layer, positions, held-out AUROC."""
        final = self.report.final
        return f"RefusalProbe(layer {self.layer}, {self.positions} positions, held-out {final})"


def linear_probe(readout: Readout, why: str) -> RefusalProbe:
    """The readout as a linear probe.

    Args:
        readout: what was given.
        why: what needs a linear probe, in a sentence.

    Raises:
        ProbeError: the readout is none.
    """
    if not isinstance(readout, RefusalProbe):
        raise ProbeError(f"{why} The {readout.name} readout is no linear probe. Give a RefusalProbe (cs.fit_probe).")
    return readout


def fit_probe(
    model: LensModel,
    refused: Transcripts,
    complied: Transcripts,
    *,
    layer: int | Literal["best"] = "best",
    positions: Positions = "balanced",
    seed: int = 0,
    challenge: Transcripts | None = None,
    splits: Mapping[str, str] | None = None,
    shuffle_labels: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RefusalProbe:
    """Fits a refusal probe at every layer and chooses one.

    Args:
        model: the model.
        refused: transcripts that end in a refusal.
        complied: transcripts that end in an answer.
        layer: a layer index from 0, or "best" to choose on the validate split.
        positions: "balanced" over thinking and closing, or "final", the paper's. Balanced is the default because the
            final-token probe was measured to say nothing during the thinking.
        seed: of the split, the positions and the shuffles.
        challenge: harmful transcripts that were complied with and are not fitted on; the AUROC of refused against these
            tells refusal from harmfulness. None takes the harmful ones among `complied`.
        splits: transcript id to "fit", "validate" or "test"; None splits by prompt.
        shuffle_labels: fit on labels shuffled over the fit split, and report on true ones: a control for whatever is
            done with a probe, such as `rank_heads`.
        progress: called with the number of transcripts read.

    Returns:
        The probe with its held-out report.

    Raises:
        ProbeError: a class is missing from a split, the layer does not exist, or residuals are not finite.

    Source:
        arXiv 2510.06036, section 3.
    """
    if isinstance(layer, int) and not 0 <= layer < model.shape.n_layers:
        raise ProbeError(
            f"layer={layer}: {model.name!r} has layers 0 to {model.shape.n_layers - 1}. Give one, or 'best'."
        )
    groups = {REFUSED: refused, COMPLIED: complied, CHALLENGE: challenge or Transcripts(())}
    fewest = {"fit": FEWEST, "validate": FEWEST_TO_CHOOSE, "test": FEWEST}
    labelled = Labelled.build(model, groups, splits or split_by_prompt(groups, seed=seed), fewest=fewest)
    sample = _sample(labelled, positions, seed, shuffle_labels=shuffle_labels)
    residuals = _gather(model, sample, progress)
    fits = [_choose_layer(model, labelled, fit, layer) for fit in _fit_layers(sample, residuals)]
    best = min(fits, key=lambda fit: fit.loss)
    scored = _score(model, labelled.part("test"), best.weights, best.biases, progress)
    shuffled = _shuffled_control(model, labelled, sample, residuals, best, seed=seed)
    return RefusalProbe(
        layer=best.layer,
        weight=best.weights[best.layer],
        bias=float(best.biases[best.layer]),
        layer_weights=best.weights,
        layer_biases=best.biases,
        positions=positions,
        strength=best.strength,
        refused_logit=float(_region_values(scored, REFUSED, FINAL, best.layer).mean()),
        fingerprint=model.fingerprint,
        template=model.template.name,
        report=_report(scored, best.layer, shuffled, labelled),
        omitted=labelled.omitted,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fit:
    """Probes of every layer under one regularisation."""

    strength: float
    """Inverse regularisation."""
    weights: Float32[np.ndarray, "layer d_model"]
    """[layer, d_model] directions."""
    biases: Float32[np.ndarray, " layer"]
    """[layer] biases."""
    layer: int = -1
    """The selected layer, -1 before the selection."""
    loss: float = float("inf")
    """Validation log loss at that layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scored:
    """A held-out transcript and its logits at every layer."""

    tokens: TokenizedTranscript
    """Its tokens."""
    kind: str
    """Its class."""
    logits: Float32[np.ndarray, "layer pos"]
    """[layer, pos] of the probes of all layers."""

    def region(self, name: str, layer: int) -> float | None:
        """Mean logit over a region, None where the transcript has no such region."""
        positions = regions(self.tokens).get(name)
        return None if positions is None else float(self.logits[layer, positions].mean())


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sample:
    """Positions of the fit split, with label and weight for each."""

    rows: list[TokenizedTranscript]
    """Transcripts."""
    refused: Bool[np.ndarray, " transcript"]
    """[transcript] whether it was refused."""
    positions: list[Int64[np.ndarray, " _"]]
    """Sampled positions of each."""
    n_thinking: list[int]
    """How many of them are thinking; they come first."""

    def labels_and_weights(
        self, refused: Bool[np.ndarray, " transcript"]
    ) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Label and weight a position: both classes, thinking and closing, and all transcripts of a class alike."""
        labels: list[bool] = []
        weights: list[float] = []
        for i, (positions, thinking) in enumerate(zip(self.positions, self.n_thinking, strict=True)):
            closing = len(positions) - thinking
            halves = 0.5 if thinking and closing else 1.0
            share = 1.0 / (refused == refused[i]).sum()
            labels += [bool(refused[i])] * len(positions)
            for part in (thinking, closing):
                weights += [share * halves / part] * part if part else []
        return np.asarray(labels, dtype=bool), np.asarray(weights) / np.mean(weights)


def _sample(labelled: Labelled, positions: str, seed: int, *, shuffle_labels: bool) -> _Sample:
    rng = np.random.default_rng(seed)
    rows = labelled.part("fit")
    tokens = [t for t, _ in rows]
    if positions == "final":
        sampled = [np.array([t.final], dtype=np.int64) for t in tokens]
        n_thinking = [0] * len(tokens)
    elif positions == "balanced":
        sampled = [balanced_positions(t, THINKING_POSITIONS, rng) for t in tokens]
        n_thinking = [int((p < t.bounds[1]).sum()) for p, t in zip(sampled, tokens, strict=True)]
    else:
        raise ProbeError(f"positions={positions!r}: expected 'final' or 'balanced'.")
    refused = np.array([kind == REFUSED for _, kind in rows])
    if shuffle_labels:
        refused = rng.permutation(refused)
    return _Sample(rows=tokens, refused=refused, positions=sampled, n_thinking=n_thinking)


def _gather(
    model: LensModel, sample: _Sample, progress: Callable[[int], None] | None
) -> Float32[np.ndarray, "layer n d_model"]:
    """Residuals of the sample at every layer, positions of all transcripts after one another."""
    residuals = np.concatenate(gather_residuals(model, sample.rows, sample.positions, progress=progress), axis=1)
    if not np.isfinite(residuals).all():
        bad = int(np.argwhere(~np.isfinite(residuals))[0][0])
        raise ProbeError(
            f"Residuals of layer {bad} of {model.name!r} hold NaN or infinity. Load the model in another dtype, such "
            "as float32 or bfloat16."
        )
    return residuals


def _fit_layers(sample: _Sample, residuals: Float32[np.ndarray, "layer n d_model"]) -> list[_Fit]:
    labels, weights = sample.labels_and_weights(sample.refused)
    return [_fit(residuals, labels, weights, strength) for strength in STRENGTHS]


def _fit(
    residuals: Float32[np.ndarray, "layer n d_model"],
    labels: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    strength: float,
) -> _Fit:
    directions, biases = zip(*(fit_logistic(layer, labels, weights, strength) for layer in residuals), strict=True)
    return _Fit(strength=strength, weights=np.stack(directions), biases=np.array(biases, dtype=np.float32))


def _score(
    model: LensModel,
    rows: Sequence[LabelledRow],
    weights: Float32[np.ndarray, "layer d_model"],
    biases: Float32[np.ndarray, " layer"],
    progress: Callable[[int], None] | None = None,
) -> list[_Scored]:
    logits = project_residuals(model, [t for t, _ in rows], weights, biases, progress=progress)
    return [_Scored(tokens=t, kind=kind, logits=values) for (t, kind), values in zip(rows, logits, strict=True)]


def _choose_layer(model: LensModel, labelled: Labelled, fit: _Fit, layer: int | Literal["best"]) -> _Fit:
    scored = _score(model, labelled.part("validate"), fit.weights, fit.biases)
    selected = _best_layer(scored, labelled) if layer == "best" else layer
    return replace(fit, layer=selected, loss=_log_loss(scored, selected))


def _log_loss(scored: Sequence[_Scored], layer: int) -> float:
    """Log loss of the mean logits at the final token and over late thinking, all classes and regions alike.

    The challenge counts at the final token alone, where its outcome is settled: a probe that calls it refused there is
    reading harmfulness.
    """
    signs = {REFUSED: -1.0, COMPLIED: 1.0, CHALLENGE: 1.0}
    losses = []
    for region, kinds in ((FINAL, (REFUSED, COMPLIED, CHALLENGE)), (LATE_THINKING, (REFUSED, COMPLIED))):
        for kind in kinds:
            values = _region_values(scored, kind, region, layer)
            enough = len(values) >= (FEWEST if kind == CHALLENGE else 1)
            losses += [float(np.logaddexp(0.0, signs[kind] * values).mean())] if enough else []
    return float(np.mean(losses))


def _region_values(scored: Sequence[_Scored], kind: str, region: str, layer: int) -> Float[np.ndarray, " n"]:
    values = [s.region(region, layer) for s in scored if s.kind == kind]
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _best_layer(scored: Sequence[_Scored], labelled: Labelled) -> int:
    """The latest layer within one standard error of the best worst-case AUROC."""
    worst = []
    for layer in range(scored[0].logits.shape[0]):
        reports = [_compare(scored, region, layer) for region in (FINAL, LATE_THINKING)]
        within = _within_harmful(scored, layer, labelled)
        # One odd transcript must not choose the layer.
        reports += [within] if min(within.n_refused, within.n_complied) >= FEWEST else []
        worst.append(min((r for r in reports if np.isfinite(r.auroc)), key=lambda r: r.auroc))
    best = max(worst, key=lambda r: r.auroc)
    error = min((best.auroc - best.interval.low) / 1.96, 0.02) if np.isfinite(best.interval.low) else 0.0
    return max(i for i, r in enumerate(worst) if r.auroc >= best.auroc - error)


def _shuffled_control(
    model: LensModel,
    labelled: Labelled,
    sample: _Sample,
    residuals: Float32[np.ndarray, "layer n d_model"],
    fit: _Fit,
    *,
    seed: int,
) -> list[float]:
    """Test AUROC at the final token of probes fitted on labels shuffled over transcripts."""
    test = [(t, kind) for t, kind in labelled.part("test") if kind != CHALLENGE]
    last = [np.array([t.final], dtype=np.int64) for t, _ in test]
    final = np.concatenate([r[fit.layer] for r in gather_residuals(model, [t for t, _ in test], last)])
    is_refused = np.array([kind == REFUSED for _, kind in test])
    rng = np.random.default_rng(seed)
    aurocs = []
    for _ in range(SHUFFLES):
        labels, weights = sample.labels_and_weights(rng.permutation(sample.refused))
        weight, bias = fit_logistic(residuals[fit.layer], labels, weights, fit.strength)
        logits = final @ weight + bias
        aurocs.append(region_report(FINAL, logits[is_refused], logits[~is_refused]).auroc)
    return aurocs


def _report(scored: Sequence[_Scored], layer: int, shuffled: list[float], labelled: Labelled) -> ProbeReport:
    names = region_names([s.tokens for s in scored])
    n_layers = scored[0].logits.shape[0]
    table = pd.DataFrame(
        [{"layer": i, **_compare(scored, name, i).to_row()} for i in range(n_layers) for name in names]
    )
    cells = cells_of(labelled.transcripts, [(t.id, kind) for t, kind in labelled.part("fit")])
    return ProbeReport(
        final=_compare(scored, FINAL, layer),
        late_thinking=_compare(scored, LATE_THINKING, layer),
        within_harmful=_within_harmful(scored, layer, labelled),
        calibration=calibration_of(*_harmful_logits(scored, layer, labelled)),
        shuffled=tuple(shuffled),
        by_region=table,
        cells=cells,
        warnings=one_sided_warning(cells),
    )


def _compare(scored: Sequence[_Scored], region: str, layer: int) -> RegionReport:
    """Refused against complied over a region."""
    refused, complied = (_region_values(scored, kind, region, layer) for kind in (REFUSED, COMPLIED))
    return region_report(region, refused, complied)


def _within_harmful(scored: Sequence[_Scored], layer: int, labelled: Labelled) -> RegionReport:
    """Refused against complied at the final token, among harmful transcripts alone."""
    return region_report("final, harmful only", *_harmful_logits(scored, layer, labelled))


def _harmful_logits(
    scored: Sequence[_Scored], layer: int, labelled: Labelled
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Logits at the final token of refused and of complied harmful transcripts."""
    values: dict[bool, list[float]] = {True: [], False: []}
    for row in scored:
        if labelled.transcripts[row.tokens.id].harmful:
            values[row.kind == REFUSED].append(float(row.logits[layer, row.tokens.final]))
    return np.array(values[True]), np.array(values[False])
