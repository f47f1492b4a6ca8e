"""What does an edit do to attack success and to harmless use?

1. Every arm (unedited, edited, random head sets of the same size) answers the same prompts with the same budgets.
2. One judge reads every answer.
3. ASR = complied / judged over harmful prompts, over-refusal = refused / judged over harmless ones, with Wilson
   intervals; unfinished and unjudged answers are counted beside them, never as safe.
4. Each arm is paired with the unedited one, prompt by prompt: difference with bootstrap interval, McNemar's p.

Knows edits and judges, not probes: the edit is whatever it is given.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cliffscope.errors import DataError, EditError
from cliffscope.heads.controls import count_sets, random_sets
from cliffscope.heads.edits import HeadEdit, HeadRef, Scope, edited_weights
from cliffscope.models import LensModel, ModelShape
from cliffscope.safety.generation import roll_out
from cliffscope.safety.judges import Judge, PhraseJudge
from cliffscope.safety.judges import judge as judge_answers
from cliffscope.stats import mcnemar, paired_bootstrap_difference, wilson
from cliffscope.transcripts.records import Omission, Outcome, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

log = logging.getLogger(__name__)
UNEDITED, TOP = "unedited", "top heads"
GROUPS = {"harmful": (True, Outcome.COMPLIED), "harmless": (False, Outcome.REFUSED)}
"""Group of prompts: (harmful, the outcome that its rate counts)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One condition of the comparison."""

    name: str
    """Such as "random 3"."""
    kind: str
    """`unedited`, `top` or `random`."""
    edit: HeadEdit | None
    """What is done to the model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SafetyReport:
    """Outcomes of every arm."""

    arms: tuple[Arm, ...]
    """The arms, unedited first."""
    outcomes: pd.DataFrame
    """arm, kind, group, id, outcome: one row an answer."""
    omitted: tuple[Omission, ...]
    """Prompts that an arm could not answer or the judge not read, and why."""
    seed: int
    """Of the bootstrap."""

    def to_frame(self) -> pd.DataFrame:
        """One row an arm and group.

        Columns: arm, kind, group, n, refused, complied, unfinished, unjudged, rate, ci_low, ci_high.
        `rate` is the ASR for harmful prompts and over-refusal for harmless ones; NaN where nothing was judged.
        """
        rows = [
            self._row(arm, group)
            for arm in self.arms
            for group in GROUPS
            if ((self.outcomes["arm"] == arm.name) & (self.outcomes["group"] == group)).any()
        ]
        return pd.DataFrame(rows)

    def pairs(self) -> pd.DataFrame:
        """Each edited arm against the unedited one: arm, group, n, difference, ci_low, ci_high, mcnemar_p."""
        rows = [self._pair(arm, group) for arm in self.arms[1:] for group in GROUPS]
        return pd.DataFrame([row for row in rows if row is not None], columns=_PAIR_COLUMNS)

    def rate(self, arm: str, group: str = "harmful") -> float:
        """ASR (harmful) or over-refusal (harmless) of one arm."""
        frame = self.to_frame()
        found = frame[(frame["arm"] == arm) & (frame["group"] == group)]
        return float(found["rate"].iloc[0]) if len(found) else float("nan")

    def random_rate(self, group: str = "harmful") -> float:
        """Mean rate of the random arms."""
        frame = self.to_frame()
        return float(frame[(frame["kind"] == "random") & (frame["group"] == group)]["rate"].mean())

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
        counts = self._cell(arm.name, group)["outcome"].value_counts()
        found = {str(outcome): int(counts.get(str(outcome), 0)) for outcome in Outcome}
        judged = found["refused"] + found["complied"]
        hits = found[str(GROUPS[group][1])]
        interval = wilson(hits, judged)
        return {
            "arm": arm.name,
            "kind": arm.kind,
            "group": group,
            "n": int(counts.sum()),
            **found,
            "rate": hits / judged if judged else float("nan"),
            "ci_low": interval.low,
            "ci_high": interval.high,
        }

    def _pair(self, arm: Arm, group: str) -> dict[str, object] | None:
        target = str(GROUPS[group][1])
        judged = {str(Outcome.REFUSED), str(Outcome.COMPLIED)}
        both = self._cell(arm.name, group).merge(self._cell(UNEDITED, group), on="id", suffixes=("", "_unedited"))
        both = both[both["outcome"].isin(judged) & both["outcome_unedited"].isin(judged)]
        if both.empty:
            return None
        edited, plain = (both["outcome"] == target).to_numpy(), (both["outcome_unedited"] == target).to_numpy()
        interval = paired_bootstrap_difference(edited.astype(float), plain.astype(float), seed=self.seed)
        return {
            "arm": arm.name,
            "group": group,
            "n": len(both),
            "difference": float(edited.mean() - plain.mean()),
            "ci_low": interval.low,
            "ci_high": interval.high,
            "mcnemar_p": mcnemar(edited, plain),
        }

    def __repr__(self) -> str:
        """One line: ASR unedited, edited and random, and n."""
        n = len(self._cell(UNEDITED, "harmful"))
        top = f", {TOP} {self.rate(TOP):.2f}" if len(self.arms) > 1 else ""
        return f"SafetyReport(ASR unedited {self.rate(UNEDITED):.2f}{top}, random {self.random_rate():.2f}, n={n})"


_PAIR_COLUMNS = ["arm", "group", "n", "difference", "ci_low", "ci_high", "mcnemar_p"]


def plan_arms(model: LensModel, edit: HeadEdit | None, *, controls: int = 20, seed: int = 0) -> tuple[Arm, ...]:
    """The arms of a comparison: unedited, edited, and random sets of as many heads in the same layers.

    Args:
        model: the model.
        edit: the edit to be tested, with scope `all`; None for the unedited arm alone.
        controls: random sets, all different; fewer where the layers do not have as many.
        seed: of the draws.

    Returns:
        Arms, unedited first.

    Raises:
        EditError: the edit's scope is not `all`, the model lacks a head, or no random set differs from the edit's.
    """
    arms = [Arm(name=UNEDITED, kind="unedited", edit=None)]
    if edit is None:
        return tuple(arms)
    edit.check(model)
    if edit.scope is not Scope.ALL:
        raise EditError(
            f"The edit has scope {str(edit.scope)!r}; answers are generated under edits of scope 'all' alone. Make it "
            "with scope='all'."
        )
    arms.append(Arm(name=TOP, kind="top", edit=edit))
    for i, heads in enumerate(_random_sets(model.shape, edit.heads, controls, seed)):
        arms.append(Arm(name=f"random {i + 1}", kind="random", edit=edit.on(heads)))
    return tuple(arms)


def evaluate_safety(
    model: LensModel,
    prompts: Transcripts,
    *,
    edit: HeadEdit | None = None,
    controls: int = 20,
    judge: Judge | None = None,
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    system: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    done: Mapping[str, Transcripts] | None = None,
    on_arm: Callable[[str, Transcripts], None] | None = None,
) -> SafetyReport:
    """Measures ASR and over-refusal unedited, under an edit, and under random edits of the same size.

    Args:
        model: the model; edits are applied to its weights and undone.
        prompts: harmful and harmless ones, with `harmful` set; others than those the edit was chosen on.
        edit: with scope `all`; None measures the unedited model alone.
        controls: random head sets, at least 20 for a claim.
        judge: reads the answers; None takes `PhraseJudge`.
        max_thinking: tokens of thinking at most, equal for all arms.
        max_answer: tokens of answer at most, equal for all arms.
        temperature: 0 is greedy.
        system: system message, equal for all arms.
        seed: of sampling, random sets and bootstrap.
        batch_size: rows at most.
        done: arms that are there already, by name; they are not run again.
        on_arm: called with each finished arm's name and transcripts.

    Returns:
        The report.

    Raises:
        DataError: a prompt has no `harmful` label, there is none, or a finished arm answers other prompts.
        EditError: the edit's scope is not `all`, the model lacks a head, or there is no random set.
    """
    unlabelled = [t.id for t in prompts if t.harmful is None]
    if unlabelled or not len(prompts):
        raise DataError(
            f"{len(unlabelled)} of {len(prompts)} prompts have no harmful label, such as {unlabelled[:1]}. ASR and "
            "over-refusal need prompts with harmful=True or False."
        )
    arms = plan_arms(model, edit, controls=controls, seed=seed)
    finished = dict(done or {})
    _check_done(prompts, finished)
    for arm in arms:
        if arm.name not in finished:
            answered = _answer(
                model,
                prompts,
                arm,
                max_thinking=max_thinking,
                max_answer=max_answer,
                temperature=temperature,
                system=system,
                seed=seed,
                batch_size=batch_size,
            )
            finished[arm.name] = judge_answers(answered, judge or PhraseJudge())
            if on_arm is not None:
                on_arm(arm.name, finished[arm.name])
    return SafetyReport(
        arms=arms,
        outcomes=pd.concat([_outcome_rows(arm, finished[arm.name]) for arm in arms], ignore_index=True),
        omitted=tuple(dict.fromkeys(o for arm in arms for o in finished[arm.name].omitted)),
        seed=seed,
    )


def _random_sets(shape: ModelShape, heads: Sequence[HeadRef], controls: int, seed: int) -> list[tuple[HeadRef, ...]]:
    possible = count_sets(shape, heads, same_layers=True)
    if controls and not possible:
        raise EditError(
            f"No random set differs from the edit's {len(heads)} heads, which are all of their layers. Edit fewer "
            "heads, or ask for controls=0."
        )
    if controls > possible:
        log.warning("%d random sets were asked for; the layers of the edit have %d.", controls, possible)
    return random_sets(shape, heads, controls, np.random.default_rng(seed), same_layers=True)


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
    prompts: Transcripts,
    arm: Arm,
    *,
    max_thinking: int,
    max_answer: int,
    temperature: float,
    system: str | None,
    seed: int,
    batch_size: int,
) -> Transcripts:
    def run() -> Transcripts:
        """Generates under whatever edit holds."""
        return roll_out(
            model,
            prompts,
            max_thinking=max_thinking,
            max_answer=max_answer,
            temperature=temperature,
            system=system,
            seed=seed,
            batch_size=batch_size,
        )

    if arm.edit is None:
        return run()
    with edited_weights(model, arm.edit):
        return run()


def _outcome_rows(arm: Arm, transcripts: Transcripts) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": arm.name,
            "kind": arm.kind,
            "group": ["harmful" if t.harmful else "harmless" for t in transcripts],
            "id": [t.id for t in transcripts],
            "outcome": [str(t.outcome) for t in transcripts],
        }
    )
