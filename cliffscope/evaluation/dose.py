"""How many heads must be edited, and do random heads do the same?

1. The first 0.5, 1, 2, 3, 5 and 10% of a ranking are edited together; doses of the same number of heads are one.
2. At the closing, the refusal logit and score of transcripts that the ranking has not seen, beside random sets of as
   many heads in the same layers.
3. On request, by generation with the heads zeroed everywhere: ASR and over-refusal on prompts, beside random sets.

Source: arXiv 2510.06036, section 4, which edits 1, 3 and 10%; intervals and controls are added here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import expit

from cliffscope.errors import DataError
from cliffscope.evaluation.arms import TOP
from cliffscope.evaluation.safety import SafetyReport, evaluate_safety
from cliffscope.heads.controls import random_sets
from cliffscope.heads.edits import zero
from cliffscope.heads.methods import Method
from cliffscope.heads.ranking import HeadRanking, top_count
from cliffscope.heads.tasks import check_finite, choose_method, prepare_task
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.protocols import Judge
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.readout import Readout
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FRACTIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""Shares of all heads; 1, 3 and 10% are the paper's."""
_COLUMNS = ["fraction", "heads", "arm", "kind", "quantity", "value", "ci_low", "ci_high", "n"]


@dataclass(frozen=True, eq=False, kw_only=True)
class DoseResponse(Plotted):
    """What editing more and more heads does."""

    frame: pd.DataFrame
    """fraction, heads, arm, kind (`unedited`, `top`, `random`), quantity (`logit`, `score`, `asr`, `over_refusal`),
    value, ci_low, ci_high, n."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The chosen heads at every dose."""
        frame = self.to_frame()
        return frame[frame["kind"] == "top"].drop(columns="kind")

    def plot(self) -> "Figure":
        """Score and rates against the number of heads, chosen ones beside random sets."""
        from cliffscope.figures.dose import Panel, dose_response

        counts = sorted(int(n) for n in self.frame["heads"].unique() if n)
        panels = []
        for quantity, name in (("score", "refusal score"), ("asr", "ASR"), ("over_refusal", "over-refusal")):
            rows = self.frame[self.frame["quantity"] == quantity]
            if len(rows):
                top = rows[rows["kind"] == "top"].set_index("heads").reindex(counts)
                random = [rows[(rows["kind"] == "random") & (rows["heads"] == n)]["value"].to_numpy() for n in counts]
                widest = max(len(values) for values in random)
                padded = [np.pad(v.astype(float), (0, widest - len(v)), constant_values=np.nan) for v in random]
                panels.append(
                    Panel(
                        name=name,
                        top=top["value"].to_numpy(),
                        low=top["ci_low"].to_numpy(),
                        high=top["ci_high"].to_numpy(),
                        random=np.stack(padded),
                        unedited=float(rows[rows["kind"] == "unedited"]["value"].iloc[0]),
                    )
                )
        return dose_response(counts, panels, n=int(self.frame["n"].max()) if len(self.frame) else 0)

    def __repr__(self) -> str:
        """One line: score, and ASR if it was measured, at nothing and at the largest dose."""
        parts = []
        for quantity in ("score", "asr"):
            rows = self.frame[(self.frame["quantity"] == quantity) & (self.frame["kind"] != "random")]
            if len(rows):
                first, last = rows.iloc[0], rows.iloc[-1]
                parts.append(f"{quantity} {first['value']:.2f} -> {last['value']:.2f} with {last['heads']} heads")
        return f"DoseResponse({', '.join(parts)}, n={int(self.frame['n'].max())})"


def dose_response(
    model: LensModel,
    readout: Readout,
    ranking: HeadRanking,
    transcripts: Transcripts,
    *,
    method: Method | str = "zero",
    prompts: Transcripts | None = None,
    fractions: Sequence[float] = FRACTIONS,
    controls: int = 20,
    judge: Judge | str = "phrases",
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DoseResponse:
    """Edits more and more of a ranking's first heads, and random sets of as many.

    Args:
        model: the model.
        readout: fitted on this model.
        ranking: of other transcripts.
        transcripts: harmful ones that were complied with.
        method: by which the first heads are measured, as in `rank_heads`; one that needs no donors. Answers are
            generated with the heads zeroed.
        prompts: with `harmful` set; given, answers are generated under each dose and judged. Costs (1 + doses x (1 +
            controls)) roll-outs.
        fractions: of all heads, in (0, 1].
        controls: random sets a dose, in the same layers.
        judge: as in `evaluate_safety`.
        max_thinking: tokens of thinking at most.
        max_answer: tokens of answer at most.
        temperature: 0 is greedy.
        seed: of sets, sampling and intervals.
        progress: called with the number of doses done.

    Returns:
        One table.

    Raises:
        DataError: there is no such judge, or no transcript can be used.
        EditError: a fraction outside (0, 1].
    """
    reader = find_judge(judge)
    readout.check_model(model)
    how = choose_method(method)
    task, _ = prepare_task(model, readout, transcripts, how, scope=ranking.scope)
    counts = sorted({top_count(fraction, len(ranking.heads)): fraction for fraction in fractions}.items())
    if not counts:
        raise DataError("No fraction was given. Give shares of the heads in (0, 1], such as 0.03.")
    rows: list[tuple[object, ...]] = []
    unedited: Transcripts | None = None
    for done, (count, fraction) in enumerate(counts, start=1):
        heads = tuple(ranking.heads[i] for i in ranking.order[:count])
        sets = random_sets(model.shape, heads, controls, np.random.default_rng(seed), same_layers=True)
        measured = how.measure(task, [heads, *sets])
        check_finite(task.transcripts, measured)
        if not rows:
            rows += _logit_rows((0.0, 0, "unedited", "unedited"), measured.clean, seed)
        for i, name in enumerate([TOP, *(f"random {j + 1}" for j in range(len(sets)))]):
            kind = "random" if i else "top"
            edited = measured.clean + measured.sign * measured.effects[:, i]
            rows += _logit_rows((fraction, count, name, kind), edited, seed)
        if prompts is not None:
            answers_by_arm: dict[str, Transcripts] = {}
            report = evaluate_safety(
                model,
                prompts,
                edit=zero(heads),
                controls=len(sets),
                judge=reader,
                max_thinking=max_thinking,
                max_answer=max_answer,
                temperature=temperature,
                seed=seed,
                done={} if unedited is None else {"unedited": unedited},
                on_arm=answers_by_arm.__setitem__,
            )
            rows += _rate_rows(report, fraction, count, first=unedited is None)
            unedited = unedited if unedited is not None else answers_by_arm["unedited"]
        if progress is not None:
            progress(done)
    return DoseResponse(frame=pd.DataFrame(rows, columns=_COLUMNS))


def _logit_rows(place: tuple[float, int, str, str], logits: np.ndarray, seed: int) -> list[tuple[object, ...]]:
    """One row a quantity; place is fraction, heads, arm and kind."""
    rows: list[tuple[object, ...]] = []
    for quantity, values in (("logit", logits), ("score", expit(logits))):
        low, high = bootstrap_mean(values, seed=seed)
        rows.append((*place, quantity, float(values.mean()), float(low), float(high), len(values)))
    return rows


def _rate_rows(report: SafetyReport, fraction: float, count: int, *, first: bool) -> list[tuple[object, ...]]:
    names = {"harmful": "asr", "harmless": "over_refusal"}
    rows: list[tuple[object, ...]] = []
    for row in report.to_frame().itertuples():
        plain = row.kind == "unedited"
        if not plain or first:
            place = (0.0, 0) if plain else (fraction, count)
            rows.append((*place, row.arm, row.kind, names[str(row.group)], row.rate, row.ci_low, row.ci_high, row.n))
    return rows
