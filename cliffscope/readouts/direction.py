"""Does the model use the probe's direction, or does it merely lie there to be read?

1. The step is the probe's unit vector times a multiple of the residual's typical norm: the median, over transcripts,
   of the median norm at the positions that are changed, at the probe's layer.
2. The step is added to the residual after that layer (`hook_resid_post`) at every closing position, or at every
   thinking position, and subtracted in another pass. Everything after it is recomputed.
3. A readout is read at the final position, changed minus unchanged, transcript by transcript.
4. Random directions of the same norm, drawn evenly over the sphere, go through the same passes. p is the share of
   directions, the probe's included, that move the readout at least as far to the same side.

Read it on a readout that is not the probe itself, such as the answer readout: at its own layer a probe moves by
construction. Knows no heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import length_batches, run_decoder
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import Interval, random_set_p
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Where = Literal["closing", "thinking"]
STRENGTH = 0.5
"""Default length of the step in typical norms: clearly felt, and still within reach of the residuals' own spread."""
STAGE = "check_direction"


@dataclass(frozen=True, eq=False, kw_only=True)
class DirectionCheck(Plotted):
    """How far a step along the probe's direction moves a readout, against random directions."""

    added: Float32[np.ndarray, " transcript"]
    """[transcript] change of the readout's logit with the step added."""
    subtracted: Float32[np.ndarray, " transcript"]
    """[transcript] the same with the step subtracted."""
    random: Float32[np.ndarray, "draw transcript"]
    """[draw, transcript] the same with each random step added."""
    unchanged: Float32[np.ndarray, " transcript"]
    """[transcript] the readout's logit in the unchanged model."""
    where: Where
    """Span whose positions were changed."""
    layer: int
    """Layer after which the step was added."""
    norm: float
    """Typical norm of the residual there."""
    strength: float
    """Length of the step in typical norms."""
    readout: str
    """Name of what was read."""
    can_tell: bool
    """Whether the readout's own report says that it can tell."""
    seed: int
    """Of the random directions and the bootstrap."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""

    @property
    def added_interval(self) -> Interval:
        """95% bootstrap interval of the mean change with the step added, over transcripts."""
        return _interval(self.added, self.seed)

    @property
    def subtracted_interval(self) -> Interval:
        """95% bootstrap interval of the mean change with the step subtracted, over transcripts."""
        return _interval(self.subtracted, self.seed)

    @property
    def added_p(self) -> float:
        """Share of directions that raise the readout at least as far, the probe's own included."""
        return random_set_p(float(self.added.mean()), self.random.mean(1))

    @property
    def subtracted_p(self) -> float:
        """Share of directions that lower the readout at least as far, the probe's own included."""
        return random_set_p(-float(self.subtracted.mean()), -self.random.mean(1))

    def to_frame(self) -> pd.DataFrame:
        """One row a direction: direction, effect (logit), ci_low, ci_high, p (NaN for random ones), n."""
        steps = [("added", self.added, self.added_p), ("subtracted", self.subtracted, self.subtracted_p)]
        steps += [(f"random {i + 1}", effects, float("nan")) for i, effects in enumerate(self.random)]
        rows = []
        for name, effects, p in steps:
            interval = _interval(effects, self.seed)
            rows.append((name, float(effects.mean()), interval.low, interval.high, p, len(effects)))
        return pd.DataFrame(rows, columns=["direction", "effect", "ci_low", "ci_high", "p", "n"])

    def small_table(self) -> pd.DataFrame:
        """The probe's direction, added and subtracted."""
        return self.to_frame().head(2)

    def plot(self) -> "Figure":
        """Both steps beside the random ones."""
        from cliffscope.figures.directions import direction_effects

        means = (float(self.added.mean()), float(self.subtracted.mean()))
        bounds = [(i.low, i.high) for i in (self.added_interval, self.subtracted_interval)]
        return direction_effects(
            means,
            bounds,
            self.random.mean(1).astype(np.float64),
            title=f"The probe's direction at the {self.where} (n={len(self.added)}, {self.strength:g} norms)",
            unit=f"change of the {self.readout} readout (logits)",
        )

    def __repr__(self) -> str:
        """One line: both effects with intervals and p, random directions, n."""
        plus, minus = self.added_interval, self.subtracted_interval
        return (
            f"DirectionCheck({self.where}, {self.readout}: added {self.added.mean():+.2f} [{plus.low:+.2f}, "
            f"{plus.high:+.2f}] p={self.added_p:.3f}, subtracted {self.subtracted.mean():+.2f} [{minus.low:+.2f}, "
            f"{minus.high:+.2f}] p={self.subtracted_p:.3f}, random {self.random.mean():+.2f}, n={len(self.added)})"
        )


def check_direction(
    model: LensModel,
    probe: RefusalProbe,
    readout: Readout,
    transcripts: Transcripts,
    *,
    where: Where = "closing",
    strength: float = STRENGTH,
    draws: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DirectionCheck:
    """Adds the probe's direction to the residual, and sees whether the answer follows.

    Args:
        model: the model.
        probe: whose direction and layer are taken.
        readout: what is read at the final position; it must read the probe's layer or a later one.
        transcripts: held-out ones, with thinking where `where` is "thinking".
        where: positions that are changed: "closing" or "thinking".
        strength: length of the step in typical norms of the residual there, above 0.
        draws: random directions; 20 allow a p of 0.048 at the least.
        seed: of the random directions and the bootstrap.
        progress: called with the number of directions done, of 2 + `draws`.

    Returns:
        Changes of the readout. The time is that of 3 + `draws` passes, the memory that of one batch.

    Raises:
        ProbeError: probe and readout do not fit the model or each other, an argument is out of range, or no transcript
            has such positions.
    """
    _check(model, probe, readout, where=where, strength=strength, draws=draws)
    span = Span(where)
    tokens, omitted = model.tokenize_all(transcripts)
    width = {row.id: row.span(span).stop - row.span(span).start for row in tokens}
    rows = [row for row in tokens if width[row.id]]
    empty = [Omission(stage=STAGE, reason=f"no {where} to change", id=i) for i, n in width.items() if not n]
    if not rows:
        reason = (*omitted, *empty)[0].reason if omitted or empty else "none was given"
        raise ProbeError(f"None of {len(transcripts)} transcripts can be changed at the {where}: {reason}.")
    norm = _typical_norm(model, rows, probe.layer, span)
    unchanged = read_final(model, readout, rows)
    unit = probe.weight / np.linalg.norm(probe.weight)
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((draws, len(unit)))
    directions = [unit, -unit, *(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))]
    changes = []
    for i, direction in enumerate(directions):
        step = torch.from_numpy((direction * strength * norm).astype(np.float32))
        changes.append(
            read_final(model, readout, rows, edit=_Step(layer=probe.layer, span=span, step=step)) - unchanged
        )
        if progress is not None:
            progress(i + 1)
    return DirectionCheck(
        added=changes[0],
        subtracted=changes[1],
        random=np.stack(changes[2:]),
        unchanged=unchanged,
        where=where,
        layer=probe.layer,
        norm=norm,
        strength=strength,
        readout=readout.name,
        can_tell=readout.report.can_tell,
        seed=seed,
        omitted=(*omitted, *empty),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Step:
    """A vector that is added to the residual after a layer, at every position of a span."""

    layer: int
    """After which it is added."""
    span: Span
    """Where it is added."""
    step: Float[Tensor, " d_model"]
    """What is added."""

    @contextmanager
    def hooks(self, model: LensModel, rows: Sequence[TokenizedTranscript], *, start: int = 0) -> Iterator[None]:
        """Acts on passes over these rows, which begin at position `start` of them."""

        def add(_module: nn.Module, _inputs: object, output: object) -> object:
            hidden = (output[0] if isinstance(output, tuple) else cast(Tensor, output)).clone()
            step = self.step.to(hidden.device, hidden.dtype)
            for i, row in enumerate(rows):
                place = row.span(self.span)
                hidden[i, max(place.start - start, 0) : max(place.stop - start, 0)] += step
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        # What reads the residual of this layer must see the step.
        handle = model.blocks[self.layer].register_forward_hook(add, prepend=True)
        try:
            yield
        finally:
            handle.remove()


def _check(model: LensModel, probe: RefusalProbe, readout: Readout, *, where: str, strength: float, draws: int) -> None:
    probe.check_model(model)
    readout.check_model(model)
    if where not in ("closing", "thinking"):
        raise ProbeError(f"where={where!r}: expected 'closing' or 'thinking'.")
    if not (np.isfinite(strength) and strength > 0):
        raise ProbeError(f"strength={strength}: expected a finite number above 0. The step is subtracted too.")
    if draws < 1:
        raise ProbeError(f"draws={draws}: a p needs at least one random direction. Give 20 or more.")
    if readout.layer < probe.layer:
        raise ProbeError(
            f"The {readout.name} readout reads layer {readout.layer}, but the probe's direction is that of layer "
            f"{probe.layer}, which comes later and cannot change it. Give a readout of a later layer, such as the "
            "answer readout."
        )


def _typical_norm(model: LensModel, rows: Sequence[TokenizedTranscript], layer: int, span: Span) -> float:
    """Median over transcripts of the median norm of the residual over a span."""
    norms: dict[int, list[Tensor]] = {}
    for batch in length_batches([row.n_pos for row in rows]):

        def visit(index: int, hidden: Tensor, start: int, batch: list[int] = batch) -> None:
            for i, row in enumerate(batch if index == layer else []):
                place = rows[row].span(span)
                part = hidden[i, max(place.start - start, 0) : max(place.stop - start, 0)]
                norms.setdefault(row, []).append(part.float().norm(dim=-1).cpu())

        with model.only_blocks(0, layer):
            run_decoder(model, [rows[row] for row in batch], visit)
    return float(np.median([np.median(torch.cat(parts).numpy()) for parts in norms.values()]))


def _interval(effects: Float32[np.ndarray, " transcript"], seed: int) -> Interval:
    low, high = bootstrap_mean(effects, seed=seed)
    return Interval(low=float(low), high=float(high))
