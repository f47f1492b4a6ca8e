"""What does an edit do to attack success and to harmless use?

1. Every arm (unedited, edited, random head sets of the same size) answers the same prompts with the same budgets.
   Under an edit of the closing, the thinking or the prompt, they all answer each transcript's own thinking, token for
   token, under the edit; under an edit at all positions, as a checkpoint would hold it, each arm thinks for itself.
2. One judge reads every answer.
3. ASR over harmful prompts, over-refusal over harmless ones, with intervals (outcomes.py).
4. Each arm is paired with the unedited one, prompt by prompt: difference with bootstrap interval, McNemar's p.
5. What answers are like beside that (length, repetition, exactness, refusals stated in the thinking) stands apart.

Knows edits and judges, not readouts: the edit is whatever it is given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.evaluation.arms import TOP, UNEDITED, Arm, MakeEdit, keeps_thinking, plan_arms, scope_of
from cliffscope.evaluation.outcomes import GROUPS, check_labels, count_outcomes, prompt_rates
from cliffscope.evaluation.quality import answer_rows
from cliffscope.generation.answering import STAGE, answer_arms
from cliffscope.generation.rollout import check_left, continue_roll_out, sample_prompts
from cliffscope.generation.speaking import Budget
from cliffscope.heads.editing import edited_everywhere
from cliffscope.heads.edits import EditPlan, HeadEdit
from cliffscope.judging.judges import judge as judge_answers
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.protocols import Judge
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.resampling import bootstrap_mean, paired_bootstrap_difference
from cliffscope.stats import mcnemar
from cliffscope.transcripts.records import Message, Omission, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

QUALITIES = ("partial", "thinking_refuses", "answer_tokens", "repetition", "exact")
"""What `SafetyReport.quality` measures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SafetyReport(Plotted):
    """Outcomes of every arm."""

    arms: tuple[Arm, ...]
    """The arms, unedited first."""
    outcomes: pd.DataFrame
    """One row an answer: the columns of `quality.answer_rows`."""
    omitted: tuple[Omission, ...]
    """Prompts that an arm could not answer or the judge not read, and why."""
    seed: int
    """Of the bootstrap."""

    @property
    def scope(self) -> str:
        """Where the tested edit acts, such as "closing"; "" where none was tested."""
        return next((scope_of(arm.edit) for arm in self.arms if arm.edit is not None), "")

    def to_frame(self) -> pd.DataFrame:
        """One row an arm and group.

        Columns: arm, kind, group, n, refused, complied, unfinished, unjudged, rate, ci_low, ci_high, partial, forced,
        cut, degenerate, scope. `rate` is the ASR for harmful prompts and over-refusal for harmless ones; NaN where
        nothing was judged. `partial` is how many of `n` refused in part, `forced` how many answer thinking that was
        closed at its budget and not by the model, `cut` how many reached the budget of the answer, and `degenerate` how
        many of `unjudged` are broken text. `scope` is where the arm's edit acts, "" where none does.
        """
        rows = [
            self._row(arm, group)
            for arm in self.arms
            for group in GROUPS
            if ((self.outcomes["arm"] == arm.name) & (self.outcomes["group"] == group)).any()
        ]
        return pd.DataFrame(rows)

    def pairs(self) -> pd.DataFrame:
        """Each edited arm against the unedited one, prompt by prompt.

        Columns: arm, group, n, unedited, edited, difference, ci_low, ci_high, discordant, mcnemar_p. n counts prompts
        that both arms answered and the judge could read, discordant those whose rate differs. McNemar's test is for
        one answer a prompt; NaN where there are several, or no prompt is discordant.
        """
        rows = [self._pair(arm, group) for arm in self.arms[1:] for group in GROUPS]
        return pd.DataFrame([row for row in rows if row is not None], columns=_PAIR_COLUMNS)

    def quality(self) -> pd.DataFrame:
        """What answers are like beside their outcome, one row an arm, group and measure.

        Columns: arm, kind, group, measure, n, value, ci_low, ci_high. Measures are means over answers: `partial` (share
        that refuse in part), `thinking_refuses` (share whose thinking states a refusal), `answer_tokens`, `repetition`
        (see `quality.repetition`) and `exact` (share that is exactly the expected answer). A measure that no answer
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

    def without_forced(self) -> "SafetyReport":
        """The report over prompts that no arm answered on thinking that was closed at its budget."""
        places = pd.MultiIndex.from_frame(self.outcomes[["group", "prompt"]])
        return replace(self, outcomes=self.outcomes[~places.isin(places[self.outcomes["forced"].astype(bool)])])

    def rate(self, arm: str, group: str = "harmful") -> float:
        """ASR (harmful) or over-refusal (harmless) of one arm."""
        frame = self.to_frame()
        rows = frame[(frame["arm"] == arm) & (frame["group"] == group)]
        return float(rows["rate"].iloc[0]) if len(rows) else float("nan")

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
        counts = count_outcomes(self._cell(arm.name, group), group, seed=self.seed)
        return {"arm": arm.name, "kind": arm.kind, "group": group, **counts, "scope": scope_of(arm.edit)}

    def _pair(self, arm: Arm, group: str) -> dict[str, object] | None:
        """Over prompts that both arms have a judged answer to: mean over each prompt's samples, then the difference."""
        rates, unedited = (prompt_rates(self._cell(name, group), group) for name in (arm.name, UNEDITED))
        both = rates.merge(unedited, left_index=True, right_index=True, suffixes=("", "_unedited"))
        if both.empty:
            return None
        edited, plain = both["mean"].to_numpy(float), both["mean_unedited"].to_numpy(float)
        interval = paired_bootstrap_difference(edited, plain, seed=self.seed)
        single = bool((both["size"] == 1).all() and (both["size_unedited"] == 1).all())
        return {
            "arm": arm.name,
            "group": group,
            "n": len(both),
            "unedited": float(plain.mean()),
            "edited": float(edited.mean()),
            "difference": float(edited.mean() - plain.mean()),
            "ci_low": interval.low,
            "ci_high": interval.high,
            "discordant": int((edited != plain).sum()),
            "mcnemar_p": mcnemar(edited > 0, plain > 0) if single else float("nan"),
        }

    def __repr__(self) -> str:
        """One line: ASR unedited, edited and random, the scope of the edit, and n."""
        n = len(self._cell(UNEDITED, "harmful"))
        top = f", {TOP} {self.rate(TOP):.2f}" if len(self.arms) > 1 else ""
        scope = f", scope {self.scope}" if self.scope else ""
        rates = f"ASR unedited {self.rate(UNEDITED):.2f}{top}, random {self.random_rate():.2f}"
        return f"SafetyReport({rates}{scope}, n={n})"


_PAIR_COLUMNS = [
    *("arm", "group", "n", "unedited", "edited", "difference", "ci_low", "ci_high", "discordant", "mcnemar_p"),
]
_QUALITY_COLUMNS = ["arm", "kind", "group", "measure", "n", "value", "ci_low", "ci_high"]


def evaluate_safety(
    model: LensModel,
    prompts: Transcripts,
    *,
    edit: HeadEdit | EditPlan | None = None,
    controls: int = 20,
    control_edit: MakeEdit | None = None,
    judge: Judge | str = "phrases",
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
        model: the model; every edit is undone.
        prompts: harmful and harmless ones, with `harmful` set; others than those the edit was chosen on. Under an edit
            that is not at all positions they are transcripts, since their own thinking is answered; a model that does
            not think needs prompts alone. An `extra["expected"]` (text, or a list of texts) is what the answer should
            be exactly.
        edit: None measures the unedited model alone. With scope `closing`, `thinking` or `prompt` each transcript's
            thinking is kept, and only answers are generated, under the edit: what heads are ranked by is then what is
            evaluated. With scope `all` each arm generates thinking and answer under the edit, as an exported checkpoint
            would.
        controls: random head sets, at least 20 for a claim.
        control_edit: makes the same edit of other heads, where `edit` cannot tell (kinds with values, plans).
        judge: reads the answers; a name or an object, see `find_judge`.
        max_thinking: tokens of thinking at most, equal for all arms; where thinking is kept, it does not matter.
        max_answer: tokens of answer at most, equal for all arms.
        temperature: 0 is greedy.
        force_closing: close thinking that reaches its budget; otherwise it is unfinished.
        samples: answers a prompt; more than one needs a temperature.
        system: system message, equal for all arms; kept thinking must have been written under it.
        seed: of sampling, random sets and bootstrap.
        batch_size: rows at most, of all arms together where thinking is kept; None finds it from the free memory.
        done: judged arms that are there already, by name; they are not run again.
        begun: batches that an earlier call handed to `on_batch`, by arm; they are not generated again.
        on_arm: called with each finished arm's name and judged transcripts.
        on_batch: called with an arm's name and the transcripts of each finished batch, not judged yet.

    Returns:
        The report. Transcripts whose thinking is missing or never closed cannot be answered; they are omitted from
        every arm, each with its reason.

    Raises:
        DataError: there is no such judge, a prompt has no `harmful` label, there is none, or a finished arm answers
            other prompts.
        EditError: the edit mixes scope `all` with others, the model lacks a head, or there is no random set.
        GenerationError: the budgets are not positive, memory does not suffice for one row, or no transcript can be
            answered.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts = cs.organisms.prompts("test", 8, harmful=True, wrappers=("story", "game"))
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
        >>> cs.evaluate_safety(model, prompts, edit=edit, controls=2).rate("top heads")
        0.0
    """
    reader = find_judge(judge)
    check_labels(prompts)
    sampled = sample_prompts(prompts, samples)
    arms = plan_arms(model, edit, controls=controls, control_edit=control_edit, seed=seed)
    finished = dict(done or {})
    _check_done(sampled, finished, thinking=keeps_thinking(edit))
    budget = Budget(
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        force_closing=force_closing,
        seed=seed,
    )
    left = [arm for arm in arms if arm.name not in finished]
    answer = _answer_kept if keeps_thinking(edit) else _answer_anew
    answers = answer(
        model, sampled, left, budget, system=system, batch_size=batch_size, begun=begun or {}, hand=on_batch
    )
    for name, answered in answers:
        finished[name] = judge_answers(answered, reader)
        if on_arm is not None:
            on_arm(name, finished[name])
    if keeps_thinking(edit):
        finished = _all_answered(finished)
    return _report(arms, finished, seed)


def compare_answers(
    answers: Mapping[str, Transcripts], *, judge: Judge | str = "phrases", seed: int = 0
) -> SafetyReport:
    """Compares answers that were generated elsewhere, such as by servers of a model and of its edited checkpoint.

    Args:
        answers: by name of the arm, the unedited model's first; of the same prompts, with `harmful` set.
        judge: reads every answer; a name or an object, see `find_judge`.
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
    reader = find_judge(judge)
    return compare_judged({name: judge_answers(a, reader) for name, a in answers.items()}, seed=seed)


def compare_judged(answers: Mapping[str, Transcripts], *, seed: int = 0) -> SafetyReport:
    """Compares answers that have been judged; see `compare_answers`."""
    if not answers:
        raise DataError("No answers were given. Give {name: transcripts}, the unedited model's first.")
    first, *rest = answers
    finished = {UNEDITED: answers[first], **{name: answers[name] for name in rest}}
    check_labels(finished[UNEDITED])
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


def _check_done(prompts: Transcripts, done: Mapping[str, Transcripts], *, thinking: bool = False) -> None:
    """Raises DataError where a finished arm answers other prompts, or other thinking where that is kept."""
    content = {t.id: (t.prompt, t.thinking if thinking else None) for t in prompts}
    for name, answered in done.items():
        strange = [t.id for t in answered if content.get(t.id) != (t.prompt, t.thinking if thinking else None)]
        missing = set(content) - {t.id for t in answered} - {o.id for o in answered.omitted}
        if strange or missing:
            raise DataError(
                f"The finished arm {name!r} does not answer the prompts given: {len(strange)} of its own are not among "
                f"them {strange[:1]}, {len(missing)} of them are missing {sorted(missing)[:1]}. Run it again."
            )


Hand = Callable[[str, Transcripts], None]


def _answer_anew(
    model: LensModel,
    prompts: Transcripts,
    arms: Sequence[Arm],
    budget: Budget,
    *,
    system: str | None,
    batch_size: int | None,
    begun: Mapping[str, Transcripts],
    hand: Hand | None,
) -> Iterator[tuple[str, Transcripts]]:
    """Each arm in turn thinks and answers, with its edit in the weights."""
    for arm in arms:
        with nullcontext() if arm.edit is None else edited_everywhere(model, arm.edit):
            answered = continue_roll_out(
                model,
                prompts,
                budget,
                system=system,
                batch_size=batch_size,
                done=begun.get(arm.name),
                on_batch=None if hand is None else partial(hand, arm.name),
            )
        yield arm.name, answered


def _answer_kept(
    model: LensModel,
    prompts: Transcripts,
    arms: Sequence[Arm],
    budget: Budget,
    *,
    system: str | None,
    batch_size: int | None,
    begun: Mapping[str, Transcripts],
    hand: Hand | None,
) -> Iterator[tuple[str, Transcripts]]:
    """All arms answer each transcript's own thinking, which is read once."""
    edits = {arm.name: arm.edit for arm in arms}
    with_system = _with_system(prompts, system, thinks=model.template.thinks)
    answers = answer_arms(model, with_system, edits, budget, batch_size=batch_size, done=begun, on_batch=hand)
    for answered in answers.values():
        check_left(answered)
    yield from answers.items()


def _with_system(prompts: Transcripts, system: str | None, *, thinks: bool) -> Transcripts:
    bare = [t.id for t in prompts if t.messages[0].role != "system"] if system is not None else []
    if bare and thinks:
        raise DataError(
            f"system={system!r} was given, but {len(bare)} transcripts, such as {bare[0]!r}, have thinking that was "
            "written without a system message. Generate them with roll_out(system=...), or leave it out here."
        )
    if not bare or system is None:
        return prompts
    first = Message(role="system", content=system)
    return prompts.map(lambda t: t.replace(messages=(first, *t.messages)) if t.id in bare else t)


def _all_answered(finished: Mapping[str, Transcripts]) -> dict[str, Transcripts]:
    """What every arm could answer, so that arms that came from elsewhere are compared on the same transcripts."""
    omitted = {o.id for answered in finished.values() for o in answered.omitted if o.stage == STAGE}
    return {
        name: Transcripts((t for t in answered if t.id not in omitted), omitted=answered.omitted)
        for name, answered in finished.items()
    }
