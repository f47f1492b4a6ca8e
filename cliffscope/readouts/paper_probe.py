"""What does the paper's own probe say?

1. The state is that of the last layer at the final position, after the model's final norm, in the model's own dtype.
2. A logistic regression separates refused from complied transcripts of the fit split; both classes weigh the same.
3. The regularisation is the one of the least log loss on the validate split.
4. The test split is reported.

It differs from `RefusalProbe` in three ways: it reads after the final norm and not the raw residual, so that its logit
is no sum of what heads write; it reads the last layer whatever other layers say; and it is fitted at the final position
alone, so that it says nothing about the thinking and has no plateau. It is here for comparison.

Source: the refusal prober of arXiv 2510.06036, section 3. Knows no heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.model.unembedding import final_norm
from cliffscope.notebook import Shown
from cliffscope.readouts.activations import gather_residuals
from cliffscope.readouts.labelled import CHALLENGE, COMPLIED, REFUSED, Labelled, LabelledRow, split_by_prompt
from cliffscope.readouts.logistic import STRENGTHS, fit_logistic
from cliffscope.readouts.readout import Readout
from cliffscope.readouts.regions import FINAL
from cliffscope.readouts.reports import Calibration, RegionReport, calibration_of, quality_table, region_report
from cliffscope.transcripts.records import Omission, Transcripts

FEWEST = {"fit": 4, "validate": 2, "test": 4}
"""Transcripts a class that each split needs, as of `fit_probe`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FinalReport(Shown):
    """What a readout that was fitted at the final position alone can tell on its test split."""

    final: RegionReport
    """Refused against complied."""
    within_harmful: RegionReport
    """The same among harmful transcripts alone."""
    calibration: Calibration
    """Scores against outcomes among harmful transcripts alone."""

    @property
    def can_tell(self) -> bool:
        """Whether it can tell at the final position."""
        return self.final.can_tell

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC overall and among harmful transcripts."""
        return quality_table((self.final, self.within_harmful))

    def __repr__(self) -> str:
        """One line: AUROC with interval, region and n."""
        return f"FinalReport({self.final})"


@dataclass(frozen=True, eq=False, kw_only=True)
class PaperProbe(Readout, Shown):
    """A linear probe behind the final norm: score = sigmoid(norm(residual) . weight + bias)."""

    name = "paper"
    layer: int
    """The last layer."""
    weight: Float32[np.ndarray, " d_model"]
    """[d_model], on the normed state."""
    bias: float
    """Logit at a normed state of zero."""
    strength: float
    """Inverse regularisation that was chosen on the validate split."""
    refused_logit: float
    """Mean logit of held-out refused transcripts."""
    fingerprint: str
    """Of the model that it was fitted on."""
    template: str
    """Template that it was fitted with."""
    report: FinalReport
    """What it can tell, on held-out transcripts."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""
    note: str = ""
    """That it is used on another model than the one it was fitted on; "" where it is not."""

    def logits(self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]) -> Float[Tensor, "*batch"]:
        """The normed residual at the final position times the weight, plus the bias, in fp32."""
        final = rearrange(residuals, "... 1 d_model -> ... d_model")
        normed = _normed(model, final)
        return normed @ torch.from_numpy(self.weight).to(normed.device) + self.bias

    def check_sizes(self, model: LensModel) -> None:
        """Raises ProbeError if the model has another width or number of layers."""
        shape = model.shape
        if self.weight.shape != (shape.d_model,) or self.layer != shape.n_layers - 1:
            raise ProbeError(
                f"The probe reads behind layer {self.layer} of width {self.weight.shape[0]}, the last one of its "
                f"model, but {model.name!r} has {shape.n_layers} layers of width {shape.d_model}. Fit one on it."
            )
        super().check_sizes(model)

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC overall and among harmful transcripts."""
        return self.report.small_table()

    def __repr__(self) -> str:
        """One line: held-out AUROC."""
        return f"PaperProbe(behind the final norm, held-out {self.report.final})"


def fit_paper_probe(
    model: LensModel,
    refused: Transcripts,
    complied: Transcripts,
    *,
    challenge: Transcripts | None = None,
    splits: Mapping[str, str] | None = None,
    seed: int = 0,
) -> PaperProbe:
    """Fits the paper's probe, to compare it with `fit_probe`'s.

    Args:
        model: the model.
        refused: transcripts that end in a refusal.
        complied: transcripts that end in an answer.
        challenge: harmful transcripts that were complied with; they are reported on and not fitted on.
        splits: transcript id to "fit", "validate" or "test"; None splits by prompt, as `fit_probe` does.
        seed: of the split.

    Returns:
        A readout: it can be read, ranked on and attributed to like any other, and traced over no thinking.

    Raises:
        ProbeError: a class is missing from a split, or states are not finite.
        UnsupportedModelError: the model has no final norm that is known.

    Source:
        arXiv 2510.06036, section 3.
    """
    groups = {REFUSED: refused, COMPLIED: complied, CHALLENGE: challenge or Transcripts(())}
    sides = split_by_prompt(groups, seed=seed) if splits is None else splits
    labelled = Labelled.build(model, groups, sides, fewest=FEWEST)
    parts = {split: _Part.read(model, labelled.part(split)) for split in FEWEST}
    fits = [(strength, *_fit(parts["fit"], strength)) for strength in STRENGTHS]
    strength, weight, bias = min(fits, key=lambda fit: _log_loss(parts["validate"], *fit[1:]))
    test = parts["test"]
    logits = test.states @ weight + bias
    refuses, complies = test.kinds == REFUSED, test.kinds == COMPLIED
    harmful = np.array([labelled.transcripts[t.id].harmful is True for t, _ in labelled.part("test")])
    among_harmful = logits[refuses & harmful], logits[~refuses & harmful]
    return PaperProbe(
        layer=model.shape.n_layers - 1,
        weight=weight,
        bias=bias,
        strength=strength,
        refused_logit=float(logits[refuses].mean()),
        fingerprint=model.fingerprint,
        template=model.template.name,
        report=FinalReport(
            final=region_report(FINAL, logits[refuses], logits[complies]),
            within_harmful=region_report("final, harmful only", *among_harmful),
            calibration=calibration_of(*among_harmful),
        ),
        omitted=labelled.omitted,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """Normed states of one split, with their classes."""

    states: Float32[np.ndarray, "n d_model"]
    """[n, d_model] behind the final norm, at the final position."""
    kinds: np.ndarray
    """[n] classes."""

    @classmethod
    def read(cls, model: LensModel, rows: Sequence[LabelledRow]) -> "_Part":
        """Reads one pass over the rows; raises ProbeError where states are not finite."""
        last = [np.array([t.final], dtype=np.int64) for t, _ in rows]
        residuals = [r[-1, 0] for r in gather_residuals(model, [t for t, _ in rows], last)]
        with torch.inference_mode():
            states = _normed(model, torch.from_numpy(np.stack(residuals))).cpu().numpy()
        if not np.isfinite(states).all():
            raise ProbeError(
                f"States behind the final norm of {model.name!r} hold NaN or infinity. Load the model in another "
                "dtype, such as float32 or bfloat16."
            )
        return cls(states=states, kinds=np.array([kind for _, kind in rows]))


def _normed(model: LensModel, residuals: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """fp32 states behind the model's final norm, which works in its own dtype."""
    norm = final_norm(model)
    place = next(norm.parameters(), residuals)
    normed: Tensor = norm(residuals.to(place.device, place.dtype))
    return normed.float()


def _fit(part: _Part, strength: float) -> tuple[Float32[np.ndarray, " d_model"], float]:
    fitted = part.kinds != CHALLENGE
    labels = part.kinds[fitted] == REFUSED
    share = np.where(labels, 1 / labels.sum(), 1 / (~labels).sum())
    return fit_logistic(part.states[fitted], labels, share / share.mean(), strength)


def _log_loss(part: _Part, weight: Float32[np.ndarray, " d_model"], bias: float) -> float:
    """Log loss of refused and complied transcripts, both classes weighing the same."""
    logits = (part.states @ weight + bias).astype(np.float64)
    signs = {REFUSED: -1.0, COMPLIED: 1.0}
    return float(np.mean([np.logaddexp(0.0, sign * logits[part.kinds == kind]).mean() for kind, sign in signs.items()]))
