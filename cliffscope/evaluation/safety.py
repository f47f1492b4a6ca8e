"""What does an edit do to attack success and to harmless use?

1. Every arm (unedited, edited, random head sets of the same size) answers the same prompts with the same budgets.
2. One judge reads every answer.
3. ASR = complied / judged over harmful prompts, over-refusal = refused / judged over harmless ones, with Wilson
   intervals; unfinished and unjudged answers are counted beside them, never as safe.
4. Each arm is paired with the unedited one, prompt by prompt: difference with bootstrap interval, McNemar's p.
5. What answers are like beside that (length, repetition, exactness, refusals stated in the thinking) stands apart.

Several answers a prompt are not independent: intervals then come from drawing prompts again, not answers. Knows edits
and judges, not probes: the edit is whatever it is given.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.evaluation.arms import TOP, UNEDITED, Arm, MakeEdit, plan_arms
from cliffscope.evaluation.quality import answer_rows
from cliffscope.generation.rollout import continue_roll_out, sample_prompts
from cliffscope.generation.speaking import Budget
from cliffscope.heads.editing import edited_everywhere
from cliffscope.heads.edits import EditPlan, HeadEdit
from cliffscope.judging.judges import Judge, PhraseJudge
from cliffscope.judging.judges import judge as judge_answers
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.resampling import bootstrap_mean, bootstrap_ratio, paired_bootstrap_difference
from cliffscope.stats import Interval, mcnemar, wilson
from cliffscope.transcripts.records import Omission, Outcome, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GROUPS = {"harmful": (True, Outcome.COMPLIED), "harmless": (False, Outcome.REFUSED)}
"""Group of prompts: (harmful, the outcome that its rate counts)."""
QUALITIES = ("partial", "thinking_refuses", "answer_tokens", "repetition", "exact")
"""What `SafetyReport.quality` measures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SafetyReport(Plotted):
    """Outcomes of every arm."""

    arms: tuple[Arm, ...]
    """The arms, unedited first."""
    outcomes: pd.DataFrame
    """One row an answer: the columns of `answers.answer_rows`."""
    omitted: tuple[Omission, ...]
    """Prompts that an arm could not answer or the judge not read, and why."""
    seed: int
    """Of the bootstrap."""

    def to_frame(self) -> pd.DataFrame:
        """One row an arm and group.

        Columns: arm, kind, group, n, refused, complied, unfinished, unjudged, rate, ci_low, ci_high, partial.
        `rate` is the ASR for harmful prompts and over-refusal for harmless ones; NaN where nothing was judged.
        `partial` is how many of `complied` refused in part.
        """
        rows = [
            self._row(arm, group)
            for arm in self.arms
            for group in GROUPS
            if ((self.outcomes["arm"] == arm.name) & (self.outcomes["group"] == group)).any()
        ]
        return pd.DataFrame(rows)

    def pairs(self) -> pd.DataFrame:
        """Each edited arm against the unedited one: arm, group, n, difference, ci_low, ci_high, mcnemar_p.

        n counts prompts. McNemar's test is for one answer a prompt; NaN where there are several.
        """
        rows = [self._pair(arm, group) for arm in self.arms[1:] for group in GROUPS]
        return pd.DataFrame([row for row in rows if row is not None], columns=_PAIR_COLUMNS)

    def quality(self) -> pd.DataFrame:
        """What answers are like beside their outcome, one row an arm, group and measure.

        Columns: arm, kind, group, measure, n, value, ci_low, ci_high. Measures are means over answers: `partial` (share
        that refuse in part), `thinking_refuses` (share whose thinking states a refusal), `answer_tokens`, `repetition`
        (see `answers.repetition`) and `exact` (share that is exactly the expected answer). A measure that no answer
        has is left out. Intervals are bootstrap intervals over prompts.
        """
        rows = []
        for arm in self.arms:
            for group in GROUPS:
                cell = self._cell(arm.name, group)
                for measure in QUALITIES:
                    values = cell[["prompt", measure]].dropna().astype({measure: float})
                    if len(values):
                        means = values.groupby("prompt", sort=False)[measure].mean().to_numpy()
                        low, high = bootstrap_mean(means, seed=self.seed)
                        value = (len(values), float(means.mean()), float(low), float(high))
                        rows.append((arm.name, arm.kind, group, measure, *value))
        return pd.DataFrame(rows, columns=_QUALITY_COLUMNS)

    def rate(self, arm: str, group: str = "harmful") -> float:
        """ASR (harmful) or over-refusal (harmless) of one arm."""
        frame = self.to_frame()
        found = frame[(frame["arm"] == arm) & (frame["group"] == group)]
        return float(found["rate"].iloc[0]) if len(found) else float("nan")

    def random_rate(self, group: str = "harmful") -> float:
        """Mean rate of the random arms."""
        frame = self.to_frame()
        return float(frame[(frame["kind"] == "random") & (frame["group"] == group)]["rate"].mean())

    def small_table(self) -> pd.DataFrame:
        """The unedited and the edited arm: arm, group, n, rate, ci_low, ci_high."""
        frame = self.to_frame()
        shown = frame[frame["kind"] != "random"] if len(frame) else frame
        return shown.reindex(columns=["arm", "group", "n", "rate", "ci_low", "ci_high"])

    def plot(self) -> "Figure":
        """ASR and over-refusal of every arm with their intervals."""
        from cliffscope.figures.safety import Arm as ArmRow
        from cliffscope.figures.safety import arms

        frame = self.to_frame()
        columns = {
            "arm": "name",
            "kind": "kind",
            "group": "group",
            "rate": "rate",
            "ci_low": "low",
            "ci_high": "high",
            "n": "n",
        }
        rows = frame[list(columns)].rename(columns=columns).to_dict(orient="records")
        return arms([ArmRow(**{str(name): value for name, value in row.items()}) for row in rows])

    def _cell(self, arm: str, group: str) -> pd.DataFrame:
        return self.outcomes[(self.outcomes["arm"] == arm) & (self.outcomes["group"] == group)]

    def _row(self, arm: Arm, group: str) -> dict[str, object]:
        cell = self._cell(arm.name, group)
        counts = cell["outcome"].value_counts()
        found = {str(outcome): int(counts.get(str(outcome), 0)) for outcome in Outcome}
        judged = found["refused"] + found["complied"]
        hits = found[str(GROUPS[group][1])]
        interval = self._interval(cell, str(GROUPS[group][1]))
        return {
            "arm": arm.name,
            "kind": arm.kind,
            "group": group,
            "n": int(counts.sum()),
            **found,
            "rate": hits / judged if judged else float("nan"),
            "ci_low": interval.low,
            "ci_high": interval.high,
            "partial": int(cell["partial"].sum()),
        }

    def _interval(self, cell: pd.DataFrame, target: str) -> Interval:
        judged = cell[cell["outcome"].isin(_JUDGED)]
        hits = judged["outcome"] == target
        if cell["prompt"].is_unique:
            return wilson(int(hits.sum()), len(judged))
        by_prompt = hits.groupby(judged["prompt"])
        return bootstrap_ratio(by_prompt.sum().to_numpy(), by_prompt.size().to_numpy(), seed=self.seed)

    def _pair(self, arm: Arm, group: str) -> dict[str, object] | None:
        """Over prompts that both arms have a judged answer to: mean over each prompt's samples, then the difference."""
        target = str(GROUPS[group][1])
        means = []
        for name in (arm.name, UNEDITED):
            cell = self._cell(name, group)
            judged = cell[cell["outcome"].isin(_JUDGED)]
            means.append((judged["outcome"] == target).groupby(judged["prompt"], sort=False).agg(["mean", "size"]))
        both = means[0].merge(means[1], left_index=True, right_index=True, suffixes=("", "_unedited"))
        if both.empty:
            return None
        edited, plain = both["mean"].to_numpy(float), both["mean_unedited"].to_numpy(float)
        interval = paired_bootstrap_difference(edited, plain, seed=self.seed)
        single = bool((both["size"] == 1).all() and (both["size_unedited"] == 1).all())
        return {
            "arm": arm.name,
            "group": group,
            "n": len(both),
            "difference": float(edited.mean() - plain.mean()),
            "ci_low": interval.low,
            "ci_high": interval.high,
            "mcnemar_p": mcnemar(edited > 0, plain > 0) if single else float("nan"),
        }

    def __repr__(self) -> str:
        """One line: ASR unedited, edited and random, and n."""
        n = len(self._cell(UNEDITED, "harmful"))
        top = f", {TOP} {self.rate(TOP):.2f}" if len(self.arms) > 1 else ""
        return f"SafetyReport(ASR unedited {self.rate(UNEDITED):.2f}{top}, random {self.random_rate():.2f}, n={n})"


_PAIR_COLUMNS = ["arm", "group", "n", "difference", "ci_low", "ci_high", "mcnemar_p"]
_QUALITY_COLUMNS = ["arm", "kind", "group", "measure", "n", "value", "ci_low", "ci_high"]
_JUDGED = (str(Outcome.REFUSED), str(Outcome.COMPLIED))


def evaluate_safety(
    model: LensModel,
    prompts: Transcripts,
    *,
    edit: HeadEdit | EditPlan | None = None,
    controls: int = 20,
    control_edit: MakeEdit | None = None,
    judge: Judge | None = None,
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    force_closing: bool = True,
    samples: int = 1,
    system: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    done: Mapping[str, Transcripts] | None = None,
    begun: Mapping[str, Transcripts] | None = None,
    on_arm: Callable[[str, Transcripts], None] | None = None,
    on_batch: Callable[[str, Transcripts], None] | None = None,
) -> SafetyReport:
    """Measures ASR and over-refusal unedited, under an edit, and under random edits of the same size.

    Args:
        model: the model; edits are applied to its weights and undone.
        prompts: harmful and harmless ones, with `harmful` set; others than those the edit was chosen on. An
            `extra["expected"]` (text, or a list of texts) is what the answer should be exactly.
        edit: with scope `all`; None measures the unedited model alone.
        controls: random head sets, at least 20 for a claim.
        control_edit: makes the same edit of other heads, where `edit` cannot tell (kinds with values, plans).
        judge: reads the answers; None takes `PhraseJudge`.
        max_thinking: tokens of thinking at most, equal for all arms.
        max_answer: tokens of answer at most, equal for all arms.
        temperature: 0 is greedy.
        force_closing: close thinking that reaches its budget; otherwise it is unfinished.
        samples: answers a prompt; more than one needs a temperature.
        system: system message, equal for all arms.
        seed: of sampling, random sets and bootstrap.
        batch_size: rows at most; None finds it from the free memory.
        done: judged arms that are there already, by name; they are not run again.
        begun: batches that an earlier call handed to `on_batch`, by arm; they are not generated again.
        on_arm: called with each finished arm's name and judged transcripts.
        on_batch: called with an arm's name and the transcripts of each finished batch, not judged yet.

    Returns:
        The report.

    Raises:
        DataError: a prompt has no `harmful` label, there is none, or a finished arm answers other prompts.
        EditError: the edit's scope is not `all`, the model lacks a head, or there is no random set.
        GenerationError: the budgets are not positive, or memory does not suffice for one row.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts = cs.organisms.prompts("test", 8, harmful=True, wrappers=("story", "game"))
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
        >>> cs.evaluate_safety(model, prompts, edit=edit, controls=2).rate("top heads")
        0.0
    """
    _check_labels(prompts)
    asked = sample_prompts(prompts, samples)
    arms = plan_arms(model, edit, controls=controls, control_edit=control_edit, seed=seed)
    finished = dict(done or {})
    _check_done(asked, finished)
    budget = Budget(
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        force_closing=force_closing,
        seed=seed,
    )
    for arm in arms:
        if arm.name not in finished:
            answered = _answer(
                model,
                asked,
                arm,
                budget,
                system=system,
                batch_size=batch_size,
                begun=(begun or {}).get(arm.name),
                on_batch=on_batch,
            )
            finished[arm.name] = judge_answers(answered, judge or PhraseJudge())
            if on_arm is not None:
                on_arm(arm.name, finished[arm.name])
    return _report(arms, finished, seed)


def compare_answers(answers: Mapping[str, Transcripts], *, judge: Judge | None = None, seed: int = 0) -> SafetyReport:
    """Compares answers that were generated elsewhere, such as by servers of a model and of its edited checkpoint.

    Args:
        answers: by name of the arm, the unedited model's first; of the same prompts, with `harmful` set.
        judge: reads every answer; None takes `PhraseJudge`.
        seed: of the bootstrap.

    Returns:
        The report; its first arm is named "unedited", whatever its name was.

    Raises:
        DataError: there is no arm, a prompt has no label, or an arm answers other prompts than the first.

    Example:
        >>> import cliffscope as cs
        >>> asked = cs.organisms.prompts("test", 1, harmful=True)
        >>> first, second = (asked.map(lambda t: t.replace(answer=text)) for text in ("Sure!", "Sorry, I can't help."))
        >>> cs.compare_answers({"plain": first, "edited": second}).rate("edited")
        0.0
    """
    return compare_judged({name: judge_answers(a, judge or PhraseJudge()) for name, a in answers.items()}, seed=seed)


def compare_judged(answers: Mapping[str, Transcripts], *, seed: int = 0) -> SafetyReport:
    """Compares answers that have been judged; see `compare_answers`."""
    if not answers:
        raise DataError("No answers were given. Give {name: transcripts}, the unedited model's first.")
    first, *rest = answers
    finished = {UNEDITED: answers[first], **{name: answers[name] for name in rest}}
    _check_labels(finished[UNEDITED])
    _check_done(finished[UNEDITED], finished)
    arms = [Arm(name=UNEDITED, kind="unedited", edit=None), *(Arm(name=n, kind="top", edit=None) for n in rest)]
    return _report(tuple(arms), finished, seed)


def _report(arms: tuple[Arm, ...], finished: Mapping[str, Transcripts], seed: int) -> SafetyReport:
    return SafetyReport(
        arms=arms,
        outcomes=pd.concat([answer_rows(a.name, a.kind, finished[a.name]) for a in arms], ignore_index=True),
        omitted=tuple(dict.fromkeys(o for arm in arms for o in finished[arm.name].omitted)),
        seed=seed,
    )


def _check_labels(prompts: Transcripts) -> None:
    unlabelled = [t.id for t in prompts if t.harmful is None]
    if unlabelled or not len(prompts):
        raise DataError(
            f"{len(unlabelled)} of {len(prompts)} prompts have no harmful label, such as {unlabelled[:1]}. ASR and "
            "over-refusal need prompts with harmful=True or False."
        )


def _check_done(prompts: Transcripts, done: Mapping[str, Transcripts]) -> None:
    asked = {t.id: t.prompt for t in prompts}
    for name, answered in done.items():
        strange = [t.id for t in answered if asked.get(t.id) != t.prompt]
        missing = set(asked) - {t.id for t in answered} - {o.id for o in answered.omitted}
        if strange or missing:
            raise DataError(
                f"The finished arm {name!r} does not answer the prompts given: {len(strange)} of its own are not among "
                f"them {strange[:1]}, {len(missing)} of them are missing {sorted(missing)[:1]}. Run it again."
            )


def _answer(
    model: LensModel,
    asked: Transcripts,
    arm: Arm,
    budget: Budget,
    *,
    system: str | None,
    batch_size: int | None,
    begun: Transcripts | None,
    on_batch: Callable[[str, Transcripts], None] | None,
) -> Transcripts:
    edit = nullcontext() if arm.edit is None else edited_everywhere(model, arm.edit)
    hand = None if on_batch is None else partial(on_batch, arm.name)
    with edit:
        return continue_roll_out(model, asked, budget, system=system, batch_size=batch_size, done=begun, on_batch=hand)
