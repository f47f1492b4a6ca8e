"""Which heads suppress refusal?

1. Every head up to the readout's layer is measured on its own in every transcript, by one of the methods of
   catalogue.py or by the user's own.
2. Effect of a head: the readout's logit at the final position, edited minus unedited, mean over transcripts, with a
   bootstrap interval over transcripts. Positive: the head suppresses refusal.
3. p: an exact sign test over the transcripts whose answer the head's effect could turn (statistics.py), so that effects
   count where they change what the model answers. q: Benjamini-Hochberg over the heads that the readout can see. Where
   the readout cannot tell at the final position, p and q are NaN: nothing is known.
4. Controls: the same heads on harmless and on refused transcripts, which say whether a head is selective or broad;
   random sets of heads (controls.py); confirmation on other transcripts (confirmation.py); other methods and halves of
   the transcripts (agreement.py).

Source: refusal suppression heads, arXiv 2510.06036, section 4; intervals, tests and controls are added here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float32, Int64
from scipy.special import expit

from cliffscope.errors import EditError
from cliffscope.heads.donors import Donors
from cliffscope.heads.edits import HeadRef, Scope
from cliffscope.heads.methods import Method
from cliffscope.heads.statistics import HeadKind, decisive, decisive_p, decisive_q, kinds_of, least_q
from cliffscope.heads.tasks import check_finite, choose_method, prepare_task, usable_tokens
from cliffscope.model.load import LensModel, ModelShape
from cliffscope.notebook import Plotted
from cliffscope.readouts.readout import Readout
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Omission, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FRACTION = 0.03
"""Share of all heads that the paper edits."""
UNSEEN = "above the layer that the readout reads"
"""Why a head has no p: its effect is zero by construction."""
UNSURE = "the readout cannot tell refused from complied"
"""Why no head has a p."""
IDLE = "could turn no answer"
"""Why a head has no p: no transcript is decisive."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRanking(Plotted):
    """Effects of all heads, each measured on its own."""

    heads: tuple[HeadRef, ...]
    """Every query head, layer by layer."""
    effects: Float32[np.ndarray, "n head"]
    """[n, head] on the readout's logit; exactly 0 above its layer, which it cannot see."""
    clean: Float32[np.ndarray, " n"]
    """[n] unedited logits."""
    harmless_effects: Float32[np.ndarray, "m head"]
    """[m, head] the same on harmless transcripts; m = 0 if none were given."""
    refused_effects: Float32[np.ndarray, "r head"]
    """[r, head] the same on harmful transcripts that were refused; r = 0 if none were given."""
    order: Int64[np.ndarray, " head"]
    """[head] indices, best first."""
    dose: float
    """Share of the head's output that the method takes away: 1 but for `scale`."""
    sign: int
    """1 where an effect is what the edit adds to the logit, -1 where it is what the edit takes (`patch-reverse`)."""
    gap: float
    """Mean logit at the final token of held-out refused transcripts, minus that of these: what is there to restore."""
    gap_score: float
    """The same gap in score."""
    shape: ModelShape
    """Of the model."""
    readout: str
    """What was read."""
    method: str
    """How heads were measured."""
    each_alone: bool
    """Whether a head's effect depends on that head alone."""
    scope: Scope
    """Where they were edited."""
    path: str
    """How it was computed, and why not faster."""
    donors: str
    """What values came from, "" where the method takes none."""
    readout_layer: int
    """Layer that was read."""
    can_tell: bool
    """Whether the readout can tell at the final position."""
    seed: int
    """Of donors, intervals and permutations."""
    omitted: tuple[Omission, ...]
    """Transcripts left out, and why."""

    def to_frame(self) -> pd.DataFrame:
        """One row a head, best first.

        Returns:
            layer, head, kv_group, effect (logit), effect_score, ci_low, ci_high (NaN with one transcript), p and q (NaN
            where nothing could be tested), untested (why not, or ""), decisive (transcripts whose answer the head's
            effect could turn), kind, effect_harmless, effect_refused, n, rank, readout, method, scope.
        """
        low, high = bootstrap_mean(self.effects, seed=self.seed)
        p, q = self._p_and_q()
        edited = expit(self.clean[:, None] + self.sign * self.effects)
        frame = pd.DataFrame(
            {
                "layer": [h.layer for h in self.heads],
                "head": [h.head for h in self.heads],
                "kv_group": [self.shape.kv_group(h.head) for h in self.heads],
                "effect": self.effects.mean(0),
                "effect_score": self.sign * (edited - expit(self.clean)[:, None]).mean(0),
                "ci_low": low,
                "ci_high": high,
                "p": p,
                "q": q,
                "untested": self._untested(p),
                "decisive": decisive(self.clean, self.effects)[0],
                "kind": [str(kind) for kind in self.kinds],
                "effect_harmless": _mean(self.harmless_effects),
                "effect_refused": _mean(self.refused_effects),
                "n": len(self.clean),
            }
        )
        frame["rank"] = np.argsort(self.order) + 1
        frame["readout"], frame["method"], frame["scope"] = self.readout, self.method, str(self.scope)
        return frame.sort_values("rank", ignore_index=True)

    def top(self, fraction: float = FRACTION) -> tuple[HeadRef, ...]:
        """The first heads.

        Args:
            fraction: of all query heads of the model, in (0, 1]; rounded, at least one head.

        Returns:
            Heads, best first. They need not be significant.
        """
        return tuple(self.heads[i] for i in self.order[: top_count(fraction, len(self.heads))])

    def significant(self, q: float = 0.05) -> tuple[HeadRef, ...]:
        """The heads that change the answer on their own: those whose q is at most `q`, best first.

        They were ranked and tested on the same transcripts; `confirm_heads` tests them on others.
        """
        frame = self.to_frame()
        passing = frame[frame["q"] <= q]
        return tuple(
            HeadRef(layer=int(layer), head=int(head))
            for layer, head in zip(passing["layer"], passing["head"], strict=True)
        )

    @property
    def least_q(self) -> float:
        """The smallest q that so few transcripts allow; above 0.05 no head can be significant."""
        return least_q(len(self.clean), self.measured)

    @property
    def measured(self) -> int:
        """Heads that the readout can see, each of which counts as a test."""
        return int(self._seen.sum())

    @property
    def kinds(self) -> list[HeadKind]:
        """[head] whether each acts on these transcripts more than on refused and on harmless ones."""
        return kinds_of(self.effects, self.refused_effects, self.harmless_effects)

    @property
    def _seen(self) -> Bool[np.ndarray, " head"]:
        """Which heads the readout can see."""
        return np.array([h.layer <= self.readout_layer for h in self.heads])

    def small_table(self) -> pd.DataFrame:
        """The first heads: head, effect, ci_low, ci_high, q, effect_harmless."""
        frame = self.to_frame().sort_values("rank")
        names = [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
        columns = ["effect", "ci_low", "ci_high", "q", "effect_harmless"]
        return frame[columns].assign(head=names)[["head", *columns]]

    def plot(self) -> "Figure":
        """Layer by head grid of the effects, significant heads outlined."""
        from cliffscope.figures.heads import head_grid

        low, high = bootstrap_mean(self.effects, seed=self.seed)
        selected = np.zeros((self.shape.n_layers, self.shape.n_heads), dtype=bool)
        for ref in self.significant():
            selected[ref.layer, ref.head] = True
        return head_grid(
            self._grid(self.effects.mean(0)),
            self._grid(np.asarray(low)),
            self._grid(np.asarray(high)),
            selected=selected,
            harmless=self._grid(_mean(self.harmless_effects)) if len(self.harmless_effects) else None,
            title=f"Effect of each head on refusal ({self.readout}, {self.method}, {self.scope}, n={len(self.clean)})",
        )

    def _grid(self, values: Float[np.ndarray, " head"]) -> Float[np.ndarray, "layer n_heads"]:
        """[layer, head]; NaN in layers that have no heads."""
        grid = np.full((self.shape.n_layers, self.shape.n_heads), np.nan)
        grid[[h.layer for h in self.heads], [h.head for h in self.heads]] = values
        return grid

    def _p_and_q(self) -> tuple[Float[np.ndarray, " head"], Float[np.ndarray, " head"]]:
        """[head] p and q; NaN where nothing could be tested."""
        p, q = np.full(len(self.heads), np.nan), np.full(len(self.heads), np.nan)
        if self.can_tell:
            p[self._seen] = decisive_p(self.clean, self.effects[:, self._seen])
            q[self._seen] = decisive_q(p[self._seen])
        return p, q

    def _untested(self, p: Float[np.ndarray, " head"]) -> list[str]:
        """[head] why a head has no p; empty where it has one."""
        idle = UNSURE if not self.can_tell else IDLE
        return [
            UNSEEN if not seen else idle if nothing else ""
            for seen, nothing in zip(self._seen, np.isnan(p), strict=True)
        ]

    def __repr__(self) -> str:
        """One line: the first head, its effect, n, method and path."""
        best = int(self.order[0])
        first = f"first {self.heads[best]}: {self.effects[:, best].mean():+.2f} logits"
        how = f"{self.readout}, {self.method}, {self.path}"
        return f"HeadRanking({first}, {len(self.heads)} heads, n={len(self.clean)}, {how})"


def rank_heads(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    *,
    method: Method | str = "zero",
    scope: Scope | str = Scope.CLOSING,
    harmless: Transcripts | None = None,
    refused: Transcripts | None = None,
    donors: Donors | None = None,
    factor: float | None = None,
    fraction: float = FRACTION,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HeadRanking:
    """Ranks every query head by its part in suppressing refusal.

    Args:
        model: the model.
        readout: what says whether the answer will refuse, fitted on this model and on other transcripts.
        transcripts: usually harmful ones that were complied with.
        method: `zero`, `mean`, `resample`, `scale`, `norm-preserving`, `patch`, `patch-reverse`, `greedy`,
            `attribution`, `direct` or `cliff`; one of an installed package, `package.module:name`, or an object of
            `cliffscope.heads.methods.Method`.
        scope: where heads are edited; `closing`, where the cliff is, is packed and fast.
        harmless: transcripts for the control of specificity.
        refused: harmful ones that were refused, for the control where nothing is suppressed.
        donors: transcripts that the method takes values from: a pool, or for each transcript's id its own donor. None
            takes `harmless` or `refused`, as the method says (`mean` and `resample` the first, `patch` the second).
        factor: of `scale`; None is 0.5.
        fraction: share of the heads that `greedy` chooses.
        seed: of donors, intervals and permutations.
        progress: called with the number of transcripts done, or of heads chosen by `greedy`.

    Returns:
        The ranking.

    Raises:
        EditError: an unknown scope, or donors that do not fit.
        DataError: an unknown method, no transcript can be used, donors are missing, or logits are not finite.
        ProbeError: the readout does not fit the model, or is not linear where the method needs it to be.
        UnsupportedModelError: shares are asked for and the model's blocks do more than add.

    Source:
        arXiv 2510.06036, section 4.
    """
    readout.check_model(model)
    how = choose_method(method, factor)
    givers = donors if donors is not None else {"harmless": harmless, "refused": refused}.get(how.needs)
    task, omitted = prepare_task(model, readout, transcripts, how, scope=Scope.parse(scope), donors=givers, seed=seed)
    heads = tuple(HeadRef(layer=layer, head=head) for layer, head in model.shape.places)
    groups = [usable_tokens(model, group, how, task.scope) if group else ([], ()) for group in (harmless, refused)]
    controls = [row for rows, _ in groups for row in rows]
    ranked = how.rank(task, controls, heads, count=top_count(fraction, len(heads)), progress=progress)
    effects, control_effects = ranked.effects, np.zeros((0, len(heads)), np.float32)
    check_finite(task.transcripts, effects)
    if ranked.controls is not None:
        check_finite(controls, ranked.controls)
        control_effects = ranked.controls.effects
    gap, gap_score = effects.gap if effects.gap is not None else _gap(readout, effects.clean)
    return HeadRanking(
        heads=heads,
        effects=effects.effects,
        clean=effects.clean,
        harmless_effects=control_effects[: len(groups[0][0])],
        refused_effects=control_effects[len(groups[0][0]) :],
        order=ranked.order,
        dose=how.dose,
        sign=effects.sign,
        gap=gap,
        gap_score=gap_score,
        shape=model.shape,
        readout=readout.name,
        method=how.name,
        each_alone=how.each_alone,
        scope=task.scope,
        path=effects.path,
        donors=task.donors.name if task.donors is not None else "",
        readout_layer=readout.layer,
        can_tell=readout.report.can_tell,
        seed=seed,
        omitted=(*omitted, *(o for _, left in groups for o in left)),
    )


def top_count(fraction: float, n_heads: int) -> int:
    """Heads in a fraction of all: rounded, at least one.

    Raises:
        EditError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise EditError(f"fraction={fraction}: expected a share of all query heads in (0, 1], such as 0.03.")
    return max(1, round(fraction * n_heads))


def _mean(effects: Float32[np.ndarray, "m head"]) -> Float[np.ndarray, " head"]:
    """Mean over transcripts; NaN without any."""
    return effects.mean(0) if len(effects) else np.full(effects.shape[1], np.nan)


def _gap(readout: Readout, clean: Float32[np.ndarray, " n"]) -> tuple[float, float]:
    """What is there to restore: the refused level minus these transcripts', in logits and in score."""
    return readout.refused_logit - float(clean.mean()), float(expit(readout.refused_logit) - expit(clean).mean())
