"""How much refusal comes back, transcript by transcript, when a set of heads is edited?

1. The readout's logit at the final position is read unedited and with the edit at the closing, for each transcript.
   Their difference is the transcript's suppression: what a cliff only shows, this measures by intervention.
2. Random sets of as many heads are edited in the same way: within the same layers (what matters may be the layer), and
   over all layers. They are drawn among heads that the readout sees, and hold none of the edited ones while others are
   left.
3. All sets go through one sweep where the edit can be made of other heads; an edit that holds values of its own heads,
   or a plan, is read by plain passes and has no random sets.

The transcripts should be ones that the heads were not chosen on. Knows nothing of how the heads were found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Bool, Float32
from scipy.special import expit

from cliffscope.errors import DataError, EditError
from cliffscope.heads.ablation import Zero
from cliffscope.heads.branches import Branch, Change
from cliffscope.heads.controls import count_sets, random_sets
from cliffscope.heads.edits import EditPlan, HeadEdit, HeadRef, Scope
from cliffscope.heads.sweep import sweep_branches
from cliffscope.heads.tasks import usable_tokens
from cliffscope.model.load import LensModel, ModelShape
from cliffscope.notebook import Plotted
from cliffscope.readouts.readout import Readout, read_final
from cliffscope.readouts.trace import group_name
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import random_set_p
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "suppression"
SAME_LAYERS, ALL_LAYERS = "same layers", "all layers"
"""Kinds of random sets: drawn within the layers of the edited heads, and over all layers that the readout sees."""
_COLUMNS = [
    *("id", "group", "unedited", "edited", "suppression", "unedited_p", "edited_p", "suppression_p"),
    *("random_mean", "random_mean_p"),
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Suppression(Plotted):
    """The readout of every transcript unedited, edited, and under random sets."""

    ids: tuple[str, ...]
    """[n] ids of the transcripts."""
    groups: tuple[str, ...]
    """[n] harmfulness and outcome of each, such as "harmful, complied"."""
    edit: HeadEdit | EditPlan
    """What was done, and where."""
    unedited: Float32[np.ndarray, " n"]
    """[n] logits of the unedited model."""
    edited: Float32[np.ndarray, " n"]
    """[n] logits with the edit."""
    random_same_layers: Float32[np.ndarray, "draw n"]
    """[draw, n] logits with random sets edited that were drawn within the same layers."""
    random_all_layers: Float32[np.ndarray, "draw_all n"]
    """[draw_all, n] the same for random sets drawn over all layers that the readout sees."""
    readout: str
    """Name of the readout."""
    refused_logit: float
    """Mean logit of held-out refused transcripts, which restored refusal is measured against."""
    can_tell: bool
    """Whether the readout tells refused from complied on held-out transcripts."""
    seed: int
    """Of the random sets and of the bootstrap."""
    path: str
    """How the logits were computed."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""

    @property
    def n(self) -> int:
        """Number of transcripts."""
        return len(self.ids)

    @property
    def effects(self) -> Float32[np.ndarray, " n"]:
        """[n] suppression of each transcript, logit: edited minus unedited."""
        return np.asarray(self.edited - self.unedited)

    @property
    def effect(self) -> float:
        """Mean suppression, logit."""
        return float(self.effects.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the mean suppression over transcripts; NaN with one transcript."""
        low, high = bootstrap_mean(self.effects, seed=self.seed)
        return float(low), float(high)

    @property
    def random_effects(self) -> Mapping[str, Float32[np.ndarray, " draw"]]:
        """[draw] mean effect of every random set, by kind of set; logit."""
        kinds = {SAME_LAYERS: self.random_same_layers, ALL_LAYERS: self.random_all_layers}
        return {kind: np.asarray((logits - self.unedited).mean(1)) for kind, logits in kinds.items()}

    @property
    def p(self) -> Mapping[str, float]:
        """Share of the sets that reach the effect, by kind of random set, the edited set counted in; NaN with none."""
        return {kind: random_set_p(self.effect, effects) for kind, effects in self.random_effects.items()}

    @property
    def restored(self) -> float:
        """Share of the gap to refused transcripts that the edit closes; NaN where there is no gap."""
        gap = self.refused_logit - float(self.unedited.mean())
        return self.effect / gap if gap > 0 else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """One row a transcript.

        id, group, unedited, edited, suppression and random_mean (logits), and the same with `_p` as probabilities: the
        sigmoid, which of log-odds is the probability of refusing among the openings that are read.
        """
        random = np.concatenate([self.random_same_layers, self.random_all_layers])
        missing = np.full(self.n, np.nan, np.float32)
        frame = pd.DataFrame(
            {
                "id": list(self.ids),
                "group": list(self.groups),
                "unedited": self.unedited,
                "edited": self.edited,
                "suppression": self.effects,
                "unedited_p": expit(self.unedited),
                "edited_p": expit(self.edited),
                "random_mean": random.mean(0) if len(random) else missing,
                "random_mean_p": expit(random).mean(0) if len(random) else missing,
            }
        )
        return frame.assign(suppression_p=frame["edited_p"] - frame["unedited_p"])[_COLUMNS]

    def small_table(self) -> pd.DataFrame:
        """Means by group of transcripts: group, n, unedited, edited, suppression, ci_low, ci_high, random_mean."""
        rows = []
        for name, part in self.to_frame().groupby("group", sort=False):
            low, high = bootstrap_mean(part["suppression"].to_numpy(float), seed=self.seed)
            means = part[["unedited", "edited", "suppression", "random_mean"]].mean().astype(float)
            rows.append((name, len(part), *means.iloc[:3], float(low), float(high), means.iloc[3]))
        columns = ["group", "n", "unedited", "edited", "suppression", "ci_low", "ci_high", "random_mean"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self) -> "Figure":
        """Each transcript's probability of refusal with the edit, and with random sets, against the unedited one."""
        from cliffscope.figures.suppression import paired_points

        frame = self.to_frame()
        return paired_points(
            *(frame[name].to_numpy(float) for name in ("unedited_p", "edited_p", "random_mean_p")),
            names=self.ids,
            title=f"Refusal with {len(self.edit.heads)} heads edited, scope {_scopes(self.edit)}",
        )

    def __repr__(self) -> str:
        """One line: effect, interval, restored share, p by kind of random set, and n."""
        low, high = self.interval
        p = ", ".join(f"p={value:.3f} ({kind})" for kind, value in self.p.items() if not np.isnan(value))
        note = "" if self.can_tell else f", the {self.readout} readout cannot tell"
        return (
            f"Suppression({len(self.edit.heads)} heads: {self.effect:+.2f} [{low:+.2f}, {high:+.2f}] logits, "
            f"{self.restored:.0%} restored, {p or 'no random sets'}, n={self.n}{note})"
        )


def measure_suppression(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    edit: HeadEdit | EditPlan,
    *,
    controls: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Suppression:
    """Measures what an edit of heads gives back, transcript by transcript, beside random sets.

    Args:
        model: the model.
        readout: fitted on this model; the answer readout says what the model does.
        transcripts: ones that the heads were not chosen on, with thinking if the model thinks.
        edit: such as `cs.zero(heads, scope="closing")`; with scope "all" the heads are edited at every position.
        controls: random sets of each kind, all different; fewer where there are not as many, 0 for none.
        seed: of the random sets and the bootstrap.
        progress: called with the number of transcripts done; starts again if a sweep changes its path.

    Returns:
        The readout unedited, edited and under random sets. Memory is one pack or batch of the sweep.

    Raises:
        EditError: a scope other than "closing" and "all", heads that the model lacks or that the readout does not see,
            an edit that cannot be made of other heads with `controls` above 0, or no random set that differs.
        DataError: no transcript can be used, or `controls` is negative.
        ProbeError: the readout does not fit the model.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts, _ = cs.organisms.study_prompts("planted-llama", n=80)
        >>> ts = cs.judge(cs.roll_out(model, prompts, max_thinking=128, max_answer=32))
        >>> answer = cs.fit_answer_readout(model, ts.where(outcome="refused"), ts.where(outcome="complied"))
        >>> heads = cs.organisms.read_truth("planted-llama").planted
        >>> complied = ts.where(harmful=True, outcome="complied")
        >>> cs.measure_suppression(model, answer, complied, cs.zero(heads, scope="closing")).effect > 1
        True
    """
    readout.check_model(model)
    _check_edit(model, readout, edit)
    if controls < 0:
        raise DataError(f"controls={controls}: expected the number of random sets of each kind, 0 or more.")
    if controls and (isinstance(edit, EditPlan) or edit.values is not None):
        raise EditError(
            f"{edit!r} cannot be made of other heads, as random sets need. Give one edit without values, such as "
            "cs.zero(heads, scope='closing'), or controls=0."
        )
    tokens, omitted = usable_tokens(model, transcripts, Zero(), edit.edits[0].scope)
    within, over = _draw(model.shape, readout, edit.heads, controls, seed)
    logits, path = _read(model, readout, tokens, edit, sets=[*within, *over], progress=progress)
    finite = np.isfinite(logits).all(0)
    bad = [Omission(stage=STAGE, reason="logits are NaN or infinite", id=tokens[i].id) for i in np.flatnonzero(~finite)]
    if not finite.any():
        raise DataError(
            f"The logits of all {len(tokens)} transcripts are NaN or infinite. Load the model in another dtype, such "
            "as float32."
        )
    return _result(
        Suppression(
            ids=tuple(t.id for t in tokens),
            groups=_groups(transcripts, tokens),
            edit=edit,
            unedited=logits[0],
            edited=logits[1],
            random_same_layers=logits[2 : 2 + len(within)],
            random_all_layers=logits[2 + len(within) :],
            readout=readout.name,
            refused_logit=readout.refused_logit,
            can_tell=readout.report.can_tell,
            seed=seed,
            path=path,
            omitted=(*omitted, *bad),
        ),
        finite,
    )


def _check_edit(model: LensModel, readout: Readout, edit: HeadEdit | EditPlan) -> None:
    """Raises EditError unless the edit fits the model, acts at the closing or everywhere, and can be seen."""
    edit.check(model)
    for one in edit.edits:
        if one.scope not in (Scope.CLOSING, Scope.ALL):
            raise EditError(
                f"The edit has scope {str(one.scope)!r}; suppression is what an edit gives back at the closing. Make "
                "it with scope='closing', or with scope='all'."
            )
    if not any(ref.layer <= readout.layer for ref in edit.heads):
        raise EditError(
            f"None of the edit's {len(edit.heads)} heads is at or below layer {readout.layer}, which the "
            f"{readout.name} readout reads, so that it cannot see the edit. Give heads of these layers."
        )


def _draw(
    shape: ModelShape, readout: Readout, heads: Sequence[HeadRef], controls: int, seed: int
) -> tuple[list[Branch], list[Branch]]:
    """Random sets within the same layers and over all, among heads that the readout sees.

    They match the edited heads that the readout sees: the others do nothing, and random ones in their place would.
    """
    if not controls:
        return [], []
    seen = readout.layer + 1
    layers = None if shape.attention is None else tuple(layer for layer in shape.attention if layer < seen)
    visible = replace(shape, n_layers=seen, attention=layers)
    tested = [ref for ref in heads if ref.layer < seen]
    if not count_sets(visible, tested, same_layers=False):
        raise EditError(
            f"No random set differs from the {len(tested)} heads, which are all that the readout sees. Give fewer, or "
            "controls=0."
        )
    rng = np.random.default_rng(seed)
    within, over = (random_sets(visible, tested, controls, rng, same_layers=same) for same in (True, False))
    return within, over


def _read(
    model: LensModel,
    readout: Readout,
    tokens: Sequence[TokenizedTranscript],
    edit: HeadEdit | EditPlan,
    *,
    sets: Sequence[Branch],
    progress: Callable[[int], None] | None,
) -> tuple[Float32[np.ndarray, "row n"], str]:
    """[row, n] logits: unedited, edited, then of each random set; and the path that they were computed on."""
    if isinstance(edit, HeadEdit) and edit.values is None:
        change = Change(kind=edit.kind, factor=edit.factor, preserve_norm=edit.preserve_norm)
        branches = [edit.heads, *sets]
        swept = sweep_branches(model, readout, tokens, branches, change=change, scope=edit.scope, progress=progress)
        return np.concatenate([swept.clean[None], rearrange(swept.edited, "n branch -> branch n")]), swept.path
    unedited = read_final(model, readout, tokens)
    return np.stack([unedited, read_final(model, readout, tokens, edit=edit, progress=progress)]), "plain"


def _groups(transcripts: Transcripts, tokens: Sequence[TokenizedTranscript]) -> tuple[str, ...]:
    by_id = {t.id: t for t in transcripts}
    return tuple(group_name(by_id[t.id]) for t in tokens)


def _result(every: Suppression, finite: Bool[np.ndarray, " n"]) -> Suppression:
    """The same for the transcripts whose logits are finite."""
    if finite.all():
        return every
    keep = np.flatnonzero(finite).tolist()
    return replace(
        every,
        ids=tuple(every.ids[i] for i in keep),
        groups=tuple(every.groups[i] for i in keep),
        unedited=every.unedited[keep],
        edited=every.edited[keep],
        random_same_layers=every.random_same_layers[:, keep],
        random_all_layers=every.random_all_layers[:, keep],
    )


def _scopes(edit: HeadEdit | EditPlan) -> str:
    return " and ".join(sorted({str(one.scope) for one in edit.edits}))
