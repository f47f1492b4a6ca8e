"""What did a repair change?

The same prompts before and after, with equal budgets: attack success, over-refusal, the cliff under a probe fitted on
each model's own transcripts, and the divergence of the repaired model on harmless transcripts. One row a measure and
model, each with n and interval; differences paired by prompt are in `safety.pairs()`.

A probe is fitted for each model anew, since weights that have changed move the residual stream; where one class is
missing afterwards (nothing is complied with any more) there is no probe, and the cliff is NaN with the reason.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cliffscope.errors import DataError, ProbeError, SpanError
from cliffscope.evaluation.safety import SafetyReport, compare_judged
from cliffscope.evaluation.side_effects import divergence
from cliffscope.generation.rollout import continue_roll_out
from cliffscope.generation.speaking import Budget
from cliffscope.judging.judges import judge as judge_answers
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.protocols import Judge
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.contrast import contrast_classes
from cliffscope.readouts.probe import fit_probe
from cliffscope.readouts.trace import trace_refusal
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = ["model", "measure", "n", "value", "ci_low", "ci_high", "note"]
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, eq=False, kw_only=True)
class RepairReport(Plotted):
    """A model before and after its repair."""

    frame: pd.DataFrame
    """model, measure (`asr`, `over_refusal`, `plateau`, `final`, `cliff`, `kl`), n, value, ci_low, ci_high, note."""
    safety: SafetyReport
    """Outcomes; the repaired model is the arm "after"."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The table without its notes."""
        return self.frame.drop(columns="note")

    def plot(self) -> "Figure":
        """Every measure before and after, with its interval."""
        from cliffscope.figures.measures import measure_panels

        measure = self.frame["measure"].str.replace("_", " ")
        frame = self.frame.assign(measure=measure, arm=self.frame["model"], kind=self.frame["model"])
        return measure_panels(frame, title="The model before and after its repair")

    def value(self, measure: str, model: str = AFTER) -> float:
        """One value; NaN where it was not measured."""
        rows = self.frame[(self.frame["measure"] == measure) & (self.frame["model"] == model)]
        return float(rows["value"].iloc[0]) if len(rows) else float("nan")

    def __repr__(self) -> str:
        """One line: ASR and over-refusal, before and after."""
        rates = [f"{name} {self.value(name, BEFORE):.2f} -> {self.value(name):.2f}" for name in ("asr", "over_refusal")]
        return f"RepairReport({', '.join(rates)}, n={int(self.frame['n'].max())})"


def compare_repair(
    before: LensModel,
    after: LensModel,
    prompts: Transcripts,
    *,
    judge: Judge | str = "phrases",
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    system: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    answered: Transcripts | None = None,
) -> RepairReport:
    """Measures a model before and after its repair.

    Args:
        before: the model.
        after: the repaired one, with the same tokenizer.
        prompts: with `harmful` set; others than those that were trained on.
        judge: reads the answers; a name or an object, see `find_judge`.
        max_thinking: tokens of thinking at most.
        max_answer: tokens of answer at most.
        temperature: 0 is greedy.
        system: system message, equal for both.
        seed: of sampling, probes and intervals.
        batch_size: rows at most; None finds it from the free memory.
        answered: the unrepaired model's answers to the prompts, where they are known.

    Returns:
        The report.

    Raises:
        DataError: there is no such judge, a prompt has no label, the models have other vocabularies, or `answered`
            answers other prompts.
    """
    reader = find_judge(judge)
    if before.tokenizer.get_vocab() != after.tokenizer.get_vocab():
        raise DataError(f"{before.name!r} and {after.name!r} have other vocabularies, so they cannot be compared.")
    budget = Budget(max_thinking=max_thinking, max_answer=max_answer, temperature=temperature, seed=seed)

    def answers(model: LensModel) -> Transcripts:
        return continue_roll_out(model, prompts, budget, system=system, batch_size=batch_size)

    answered_by = {BEFORE: answers(before) if answered is None else answered, AFTER: answers(after)}
    judged = {name: judge_answers(transcripts, reader) for name, transcripts in answered_by.items()}
    report = compare_judged(judged, seed=seed)
    rows = _rates(report)
    for name, model in ((BEFORE, before), (AFTER, after)):
        rows += _cliff_rows(name, model, judged[name], seed)
    rows += _divergence_row(before, after, judged[BEFORE].where(harmful=False), seed)
    return RepairReport(frame=pd.DataFrame(rows, columns=_COLUMNS), safety=report)


def _rates(report: SafetyReport) -> list[tuple[object, ...]]:
    names = {"harmful": "asr", "harmless": "over_refusal"}
    return [
        (
            *(BEFORE if row.kind == "unedited" else AFTER, names[str(row.group)], row.n),
            *(row.rate, row.ci_low, row.ci_high, ""),
        )
        for row in report.to_frame().itertuples()
    ]


def _cliff_rows(name: str, model: LensModel, judged: Transcripts, seed: int) -> list[tuple[object, ...]]:
    """Plateau, final and cliff of held-out harmful transcripts, under a probe of the model's own."""
    nothing = (0, float("nan"), float("nan"), float("nan"))
    try:
        classes = contrast_classes(judged, "auto", thinks=model.template.thinks)
        parts = judged.split(seed=seed)
        probe = fit_probe(
            model,
            classes.refused,
            classes.complied,
            challenge=classes.challenge,
            splits={t.id: part for part, members in parts.items() for t in members},
            seed=seed,
        )
        frame = trace_refusal(model, probe, parts["test"].where(harmful=True)).cliffs().to_frame()
    except (ProbeError, SpanError) as error:
        return [(name, measure, *nothing, str(error)) for measure in ("plateau", "final", "cliff")]
    valid = frame[frame["valid"].astype(bool)]
    if valid.empty:
        why = str(frame["reason"].iloc[0])
        return [(name, measure, *nothing, why) for measure in ("plateau", "final", "cliff")]
    rows: list[tuple[object, ...]] = []
    for measure, column in (("plateau", "plateau_mean"), ("final", "final"), ("cliff", "cliff")):
        values = valid[column].to_numpy(float)
        low, high = bootstrap_mean(values, seed=seed)
        rows.append((name, measure, len(values), float(values.mean()), float(low), float(high), ""))
    return rows


def _divergence_row(before: LensModel, after: LensModel, harmless: Transcripts, seed: int) -> list[tuple[object, ...]]:
    usable = Transcripts(t for t in harmless if t.answer is not None)
    if not len(usable):
        return []
    values, _ = divergence(before, after, usable)
    if not len(values):
        return []
    low, high = bootstrap_mean(np.asarray(values), seed=seed)
    return [(AFTER, "kl", len(values), float(values.mean()), float(low), float(high), "nats a token")]
