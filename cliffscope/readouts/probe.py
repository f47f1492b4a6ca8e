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
from jaxtyping import Float32
from sklearn.linear_model import LogisticRegression

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import gather_residuals, project_residuals
from cliffscope.readouts.regions import FINAL, LATE_THINKING, balanced_positions, region_names, regions
from cliffscope.readouts.reports import ProbeReport, RegionReport, cells_of, one_sided_warning, region_report
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript, tokenize_all

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Positions = Literal["final", "balanced"]
THINKING_POSITIONS = 16
"""Thinking positions a transcript in a balanced fit: more adds memory, and neighbours say nearly the same."""
STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisations of the standardised logistic regression that are tried."""
SHUFFLES = 10
"""Shuffled-label probes of the control."""
FEWEST = 4
"""Transcripts a class that the fit and the test split need at the least."""
FEWEST_TO_CHOOSE = 2
"""The same for the validate split, which only chooses."""

Residuals = Float32[np.ndarray, "n d_model"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalProbe(Plotted):
    """A linear refusal probe: score = sigmoid(residual . weight + bias)."""

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
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""

    def check_model(self, model: LensModel) -> None:
        """Raises ProbeError if the probe's width or layer does not fit the model."""
        shape = model.shape
        if self.weight.shape != (shape.d_model,) or not 0 <= self.layer < shape.n_layers:
            raise ProbeError(
                f"The probe reads layer {self.layer} of width {self.weight.shape[0]}, but {model.name!r} has "
                f"{shape.n_layers} layers of width {shape.d_model}. Fit a probe on this model."
            )

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
    labelled = _Labelled.build(
        model, refused, complied, challenge, splits or _split(refused, complied, challenge, seed)
    )
    sample = _sample(labelled, positions, seed, shuffle_labels=shuffle_labels)
    residuals = _gather(model, sample, progress)
    fits = [_choose_layer(model, labelled, fit, layer) for fit in _fit_layers(sample, residuals)]
    best = min(fits, key=lambda fit: fit.loss)
    chosen, weights, biases = best.layer, best.weights, best.biases
    scored = _score(model, labelled.part("test"), weights, biases, progress)
    shuffled = _shuffled_control(model, labelled, sample, residuals, best, seed=seed)
    report = _report(scored, chosen, shuffled, labelled)
    return RefusalProbe(
        layer=chosen,
        weight=weights[chosen],
        bias=float(biases[chosen]),
        layer_weights=weights,
        layer_biases=biases,
        positions=positions,
        strength=best.strength,
        refused_logit=float(_region_values(scored, "refused", FINAL, chosen).mean()),
        fingerprint=model.fingerprint,
        report=report,
        omitted=labelled.omitted,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fit:
    """Probes of every layer under one regularisation."""

    strength: float
    weights: Float32[np.ndarray, "layer d_model"]
    biases: Float32[np.ndarray, " layer"]
    layer: int = -1
    """The layer chosen, -1 before."""
    loss: float = float("inf")
    """Validation log loss at that layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scored:
    """A held-out transcript and its logits at every layer."""

    tokens: TokenizedTranscript
    kind: str
    logits: Float32[np.ndarray, "layer pos"]

    def region(self, name: str, layer: int) -> float | None:
        """Mean logit over a region, None where the transcript has no such region."""
        positions = regions(self.tokens).get(name)
        return None if positions is None else float(self.logits[layer, positions].mean())


@dataclass(frozen=True, eq=False, kw_only=True)
class _Labelled:
    """Tokenized transcripts by split, each `refused`, `complied` or `challenge`."""

    rows: Mapping[str, list[tuple[TokenizedTranscript, str]]]
    transcripts: Mapping[str, Transcript]
    omitted: tuple[Omission, ...]

    @classmethod
    def build(
        cls,
        model: LensModel,
        refused: Transcripts,
        complied: Transcripts,
        challenge: Transcripts | None,
        splits: Mapping[str, str],
    ) -> "_Labelled":
        """Tokenizes and sorts; raises ProbeError where a split lacks a class."""
        rows: dict[str, list[tuple[TokenizedTranscript, str]]] = {"fit": [], "validate": [], "test": []}
        omitted: list[Omission] = []
        known: dict[str, Transcript] = {}
        extra = challenge or Transcripts(())
        for kind, group in (("refused", refused), ("complied", complied), ("challenge", extra)):
            tokens, left_out = tokenize_all(group, model.tokenizer, model.template, max_length=model.shape.context)
            omitted += left_out
            known |= {t.id: t for t in group}
            unknown = [row.id for row in tokens if splits.get(row.id) not in rows]
            if unknown:
                raise ProbeError(
                    f"splits puts {unknown[0]!r} into {splits.get(unknown[0])!r}. Expected 'fit', 'validate' or 'test' "
                    "for every transcript."
                )
            for row in tokens:
                # The challenge is not fitted on, so that all of it but the test part can help to choose.
                split = "validate" if kind == "challenge" and splits[row.id] == "fit" else splits[row.id]
                rows[split].append((row, kind))
        for split, found in rows.items():
            for kind in ("refused", "complied"):
                n = sum(k == kind for _, k in found)
                least = FEWEST_TO_CHOOSE if split == "validate" else FEWEST
                if n < least:
                    raise ProbeError(
                        f"The {split} split holds {n} {kind} transcripts ({len(refused)} refused and {len(complied)} "
                        f"complied were given); at least {least} of each are needed. Give more prompts of which some "
                        "are refused and some are complied with."
                    )
        return cls(rows=rows, transcripts=known, omitted=tuple(omitted))

    def part(self, split: str) -> list[tuple[TokenizedTranscript, str]]:
        """The rows of one split."""
        return self.rows[split]


def _split(refused: Transcripts, complied: Transcripts, challenge: Transcripts | None, seed: int) -> dict[str, str]:
    known = {t.id: t for group in (refused, complied, challenge or ()) for t in group}
    parts = Transcripts(known.values()).split(seed=seed)
    return {t.id: name for name, part in parts.items() for t in part}


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sample:
    """Positions of the fit split, with label and weight for each."""

    rows: list[TokenizedTranscript]
    refused: np.ndarray
    positions: list[np.ndarray]
    n_thinking: list[int]

    def labels_and_weights(self, refused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label and weight a position: both classes, thinking and closing, and all transcripts of a class alike."""
        labels, weights = [], []
        for i, (positions, thinking) in enumerate(zip(self.positions, self.n_thinking, strict=True)):
            closing = len(positions) - thinking
            halves = 0.5 if thinking and closing else 1.0
            share = 1.0 / (refused == refused[i]).sum()
            labels += [refused[i]] * len(positions)
            for part in (thinking, closing):
                weights += [share * halves / part] * part if part else []
        found = np.asarray(weights)
        return np.asarray(labels, dtype=bool), found / found.mean()


def _sample(labelled: _Labelled, positions: str, seed: int, *, shuffle_labels: bool) -> _Sample:
    rng = np.random.default_rng(seed)
    rows = labelled.part("fit")
    tokens = [t for t, _ in rows]
    if positions == "final":
        chosen = [np.array([t.final], dtype=np.int64) for t in tokens]
        n_thinking = [0] * len(tokens)
    elif positions == "balanced":
        chosen = [balanced_positions(t, THINKING_POSITIONS, rng) for t in tokens]
        n_thinking = [int((p < t.bounds[1]).sum()) for p, t in zip(chosen, tokens, strict=True)]
    else:
        raise ProbeError(f"positions={positions!r}: expected 'final' or 'balanced'.")
    refused = np.array([kind == "refused" for _, kind in rows])
    if shuffle_labels:
        refused = rng.permutation(refused)
    return _Sample(rows=tokens, refused=refused, positions=chosen, n_thinking=n_thinking)


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
    residuals: Float32[np.ndarray, "layer n d_model"], labels: np.ndarray, weights: np.ndarray, strength: float
) -> _Fit:
    found = [_logistic(layer, labels, weights, strength) for layer in residuals]
    biases = np.array([bias for _, bias in found], dtype=np.float32)
    return _Fit(strength=strength, weights=np.stack([weight for weight, _ in found]), biases=biases)


def _score(
    model: LensModel,
    rows: Sequence[tuple[TokenizedTranscript, str]],
    weights: Float32[np.ndarray, "layer d_model"],
    biases: Float32[np.ndarray, " layer"],
    progress: Callable[[int], None] | None = None,
) -> list[_Scored]:
    logits = project_residuals(model, [t for t, _ in rows], weights, biases, progress=progress)
    return [_Scored(tokens=t, kind=kind, logits=values) for (t, kind), values in zip(rows, logits, strict=True)]


def _choose_layer(model: LensModel, labelled: _Labelled, fit: _Fit, layer: int | Literal["best"]) -> _Fit:
    scored = _score(model, labelled.part("validate"), fit.weights, fit.biases)
    chosen = _best_layer(scored, labelled) if layer == "best" else layer
    return replace(fit, layer=chosen, loss=_log_loss(scored, chosen))


def _log_loss(scored: Sequence[_Scored], layer: int) -> float:
    """Log loss of the mean logits at the final token and over late thinking, all classes and regions alike.

    The challenge counts at the final token alone, where its outcome is settled: a probe that calls it refused there is
    reading harmfulness.
    """
    signs = {"refused": -1.0, "complied": 1.0, "challenge": 1.0}
    losses = []
    for region, kinds in ((FINAL, ("refused", "complied", "challenge")), (LATE_THINKING, ("refused", "complied"))):
        for kind in kinds:
            values = _region_values(scored, kind, region, layer)
            enough = len(values) >= (FEWEST if kind == "challenge" else 1)
            losses += [float(np.logaddexp(0.0, signs[kind] * values).mean())] if enough else []
    return float(np.mean(losses))


def _logistic(
    residuals: Residuals, labels: np.ndarray, weights: np.ndarray, strength: float
) -> tuple[np.ndarray, float]:
    """Weight and bias on the raw residual of a regularised logistic regression on the standardised one."""
    values = residuals.astype(np.float64)
    mean = np.average(values, axis=0, weights=weights)
    scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights)) + 1e-6
    model = LogisticRegression(C=strength, max_iter=2000).fit((values - mean) / scale, labels, sample_weight=weights)
    weight = model.coef_[0] / scale
    return weight.astype(np.float32), float(model.intercept_[0] - weight @ mean)


def _region_values(scored: Sequence[_Scored], kind: str, region: str, layer: int) -> np.ndarray:
    found = [s.region(region, layer) for s in scored if s.kind == kind]
    return np.array([value for value in found if value is not None])


def _best_layer(scored: Sequence[_Scored], labelled: _Labelled) -> int:
    """The latest layer within one standard error of the best worst-case AUROC."""
    worst = []
    for layer in range(scored[0].logits.shape[0]):
        found = [_compare(scored, region, layer) for region in (FINAL, LATE_THINKING)]
        within = _within_harmful(scored, layer, labelled)
        # One odd transcript must not choose the layer.
        found += [within] if min(within.n_refused, within.n_complied) >= FEWEST else []
        worst.append(min((r for r in found if np.isfinite(r.auroc)), key=lambda r: r.auroc))
    best = max(worst, key=lambda r: r.auroc)
    error = min((best.auroc - best.interval.low) / 1.96, 0.02) if np.isfinite(best.interval.low) else 0.0
    return max(i for i, r in enumerate(worst) if r.auroc >= best.auroc - error)


def _shuffled_control(
    model: LensModel,
    labelled: _Labelled,
    sample: _Sample,
    residuals: Float32[np.ndarray, "layer n d_model"],
    fit: _Fit,
    *,
    seed: int,
) -> list[float]:
    """Test AUROC at the final token of probes fitted on labels shuffled over transcripts."""
    test = [(t, kind) for t, kind in labelled.part("test") if kind != "challenge"]
    last = [np.array([t.final], dtype=np.int64) for t, _ in test]
    final = np.concatenate([r[fit.layer] for r in gather_residuals(model, [t for t, _ in test], last)])
    is_refused = np.array([kind == "refused" for _, kind in test])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SHUFFLES):
        labels, weights = sample.labels_and_weights(rng.permutation(sample.refused))
        weight, bias = _logistic(residuals[fit.layer], labels, weights, fit.strength)
        logits = final @ weight + bias
        found.append(region_report(FINAL, logits[is_refused], logits[~is_refused]).auroc)
    return found


def _report(scored: Sequence[_Scored], layer: int, shuffled: list[float], labelled: _Labelled) -> ProbeReport:
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
        shuffled=tuple(shuffled),
        by_region=table,
        cells=cells,
        warnings=one_sided_warning(cells),
    )


def _compare(scored: Sequence[_Scored], region: str, layer: int) -> RegionReport:
    """Refused against complied over a region."""
    refused, complied = (_region_values(scored, kind, region, layer) for kind in ("refused", "complied"))
    return region_report(region, refused, complied)


def _within_harmful(scored: Sequence[_Scored], layer: int, labelled: _Labelled) -> RegionReport:
    """Refused against complied at the final token, among harmful transcripts alone."""
    values: dict[bool, list[float]] = {True: [], False: []}
    for row in scored:
        if labelled.transcripts[row.tokens.id].harmful:
            values[row.kind == "refused"].append(float(row.logits[layer, row.tokens.final]))
    return region_report("final, harmful only", np.array(values[True]), np.array(values[False]))
