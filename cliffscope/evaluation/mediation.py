"""Does an edit change the answer through the thinking that it makes, or in the answering itself?

1. Each prompt is thought about twice: by the unedited model, and under the edit.
2. Each thinking is answered twice: by the unedited model, which reads it unedited whoever wrote it, and under the edit,
   which then acts over its own scope on the very tokens that are read. Four cells.
3. One judge reads every answer; rates and intervals are those of the safety report (outcomes.py).
4. The cells are compared prompt by prompt, over prompts that all four have a judged answer to: what changes with the
   answer alone edited, with the thinking alone edited, with both, and what of the last is neither.

Draws are paired: thinking and answer are drawn by the seed and the id in every cell. The question is that of arXiv
2605.26772, which steers with the thinking fixed, removed and generated anew; these cells and effects are our own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from cliffscope.errors import DataError, EditError
from cliffscope.evaluation.arms import scope_of
from cliffscope.evaluation.outcomes import GROUPS, check_labels, count_outcomes, shared_rates
from cliffscope.evaluation.quality import answer_rows
from cliffscope.generation.answering import answer_arms
from cliffscope.generation.rollout import check_left, continue_roll_out, sample_prompts
from cliffscope.generation.row_edits import acts_before_closing
from cliffscope.generation.speaking import Budget
from cliffscope.heads.edits import EditPlan, HeadEdit
from cliffscope.judging.judges import judge as judge_answers
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.protocols import Judge
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.resampling import bootstrap_mean
from cliffscope.stats import mcnemar
from cliffscope.transcripts.records import Omission, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNEDITED, EDITED = "unedited", "edited"
CELLS = ((UNEDITED, UNEDITED), (UNEDITED, EDITED), (EDITED, UNEDITED), (EDITED, EDITED))
"""(whose thinking, whose answer) of each cell."""
EFFECTS: Mapping[str, tuple[int, int, int, int]] = {
    "answer": (-1, 1, 0, 0),
    "thinking": (-1, 0, 1, 0),
    "total": (-1, 0, 0, 1),
    "interaction": (1, -1, -1, 1),
}
"""Weights of the cells, in the order of `CELLS`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Mediation(Plotted):
    """Outcomes by whose thinking is answered and by whom."""

    cells: Mapping[tuple[str, str], Transcripts]
    """By (whose thinking, whose answer), each `unedited` or `edited`: judged transcripts."""
    outcomes: pd.DataFrame
    """One row an answer: thinking, answer (whose), and the columns of `quality.answer_rows`."""
    scope: str
    """Where the edit acts."""
    omitted: tuple[Omission, ...]
    """Prompts and transcripts that could not be used, and why."""
    seed: int
    """Of the bootstrap."""

    def to_frame(self) -> pd.DataFrame:
        """One row a cell and group.

        Columns: thinking, answer (whose), group, n, refused, complied, unfinished, unjudged, rate, ci_low, ci_high,
        partial, forced. `rate` is the ASR for harmful prompts and over-refusal for harmless ones, with Wilson's
        interval, or over prompts where they have several answers.
        """
        rows = []
        for group in GROUPS:
            for thinking, answer in CELLS:
                cell = self._cell(thinking, answer, group)
                if len(cell):
                    counts = count_outcomes(cell, group, seed=self.seed)
                    rows.append({"thinking": thinking, "answer": answer, "group": group, **counts})
        return pd.DataFrame(rows, columns=_CELL_COLUMNS)

    def effects(self) -> pd.DataFrame:
        """One row an effect and group: effect, group, n, difference, ci_low, ci_high, mcnemar_p.

        Differences of the group's rate, prompt by prompt, over the n prompts that all four cells have a judged answer
        to, with a bootstrap interval over prompts. Where all prompts change alike that interval has no width, and the
        cells' own intervals say how far n prompts can be trusted. McNemar's test compares two cells with one answer a
        prompt each; it is NaN for the interaction, and where prompts have several answers.

        - `answer`: the unedited thinking answered under the edit, minus answered unedited. What the edit does with the
          text of the thinking held fixed.
        - `thinking`: the edited thinking answered unedited, minus the unedited thinking answered unedited. What the
          edit does through the text alone.
        - `total`: edited thinking and edited answer, minus neither. What the edited model does.
        - `interaction`: total minus the other two. What the edit does to the answer more on its own thinking.
        """
        rows = []
        for group in GROUPS:
            cells = [self._cell(*cell, group) for cell in CELLS]
            rates = shared_rates(cells, group)
            if not rates.shape[1]:
                continue
            single = all(cell["prompt"].is_unique for cell in cells)
            for effect, weights in EFFECTS.items():
                each = np.asarray(weights, dtype=float) @ rates
                low, high = bootstrap_mean(each, seed=self.seed)
                p = _mcnemar(rates, weights) if single else float("nan")
                rows.append((effect, group, len(each), float(each.mean()), float(low), float(high), p))
        return pd.DataFrame(rows, columns=_EFFECT_COLUMNS)

    def rate(self, thinking: str, answer: str, group: str = "harmful") -> float:
        """ASR (harmful) or over-refusal (harmless) of one cell; NaN where it has no prompt."""
        cell = self._cell(thinking, answer, group)
        return float(str(count_outcomes(cell, group, seed=self.seed)["rate"])) if len(cell) else float("nan")

    def small_table(self) -> pd.DataFrame:
        """The cells: thinking, answer, group, n, rate, ci_low, ci_high."""
        return self.to_frame()[["thinking", "answer", "group", "n", "rate", "ci_low", "ci_high"]]

    def plot(self) -> "Figure":
        """ASR and over-refusal of the four cells with their intervals."""
        from cliffscope.figures.measures import measure_panels

        frame = self.to_frame()
        names = {"harmful": "ASR", "harmless": "over-refusal"}
        frame = frame.assign(
            measure=frame["group"].map(names),
            arm=frame["thinking"] + ", then " + frame["answer"],
            kind=frame["answer"].map({UNEDITED: "unedited", EDITED: "top"}),
            value=frame["rate"],
        )
        return measure_panels(frame, share=True, title=f"Whose thinking, whose answer (edit on {self.scope})")

    def _cell(self, thinking: str, answer: str, group: str) -> pd.DataFrame:
        frame = self.outcomes
        return frame[(frame["thinking"] == thinking) & (frame["answer"] == answer) & (frame["group"] == group)]

    def __repr__(self) -> str:
        """One line: ASR of the four cells, the scope and n."""
        names = ("unedited", "answer edited", "thinking edited", "both")
        rates = ", ".join(f"{name} {self.rate(*cell):.2f}" for name, cell in zip(names, CELLS, strict=True))
        n = len(self._cell(UNEDITED, UNEDITED, "harmful"))
        return f"Mediation(ASR {rates}, scope {self.scope}, n={n})"


_CELL_COLUMNS = [
    *("thinking", "answer", "group", "n", "refused", "complied", "unfinished", "unjudged"),
    *("rate", "ci_low", "ci_high", "partial", "forced"),
]
_EFFECT_COLUMNS = ["effect", "group", "n", "difference", "ci_low", "ci_high", "mcnemar_p"]


def measure_mediation(
    model: LensModel,
    prompts: Transcripts,
    edit: HeadEdit | EditPlan,
    *,
    judge: Judge | str = "phrases",
    max_thinking: int = 1024,
    max_answer: int = 128,
    temperature: float = 0.0,
    force_closing: bool = True,
    samples: int = 1,
    system: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Mediation:
    """Crosses whose thinking is answered with who answers it.

    What is edited where, for an edit over its own scope S:

    | thinking | answer | the thinking is generated | the answer is generated |
    |---|---|---|---|
    | unedited | unedited | without an edit | without an edit |
    | unedited | edited | without an edit | under the edit over S, while prompt, thinking and closing are read too |
    | edited | unedited | under the edit over S | without an edit, which goes for the edited thinking it reads too |
    | edited | edited | under the edit over S | under the edit over S, while all that stands before is read too |

    The tokens of the thinking are those that were generated, in all cells. Over scope `all` S is everything up to and
    including the answer; over `thinking` it is the tokens of the thinking, both as they are generated and as they are
    read, so that an answer is edited only through what it reads there; over `prompt` likewise.

    Args:
        model: the model; every edit is undone.
        prompts: harmful and harmless ones, with `harmful` set; thinking and answer they already have are replaced.
        edit: with scope `all`, `thinking` or `prompt`, or a plan of them: one that can change the thinking.
        judge: reads the answers; a name or an object, see `find_judge`.
        max_thinking: tokens of thinking at most, equal for all cells.
        max_answer: tokens of answer at most, equal for all cells.
        temperature: 0 is greedy.
        force_closing: close thinking that reaches its budget; otherwise it is unfinished, whoever would have answered.
        samples: times that each prompt is thought about and answered; more than one needs a temperature.
        system: system message, equal for all cells.
        seed: of sampling and bootstrap.
        batch_size: rows at most; None finds it from the free memory.

    Returns:
        The four cells. Thinking that never closed is `unfinished` in both of its cells.

    Raises:
        DataError: there is no such judge, the model does not think, or a prompt has no label.
        EditError: an edit of the closing, which leaves the thinking as it is, or one that does not fit the model.
        GenerationError: the budgets are not positive, or no prompt is left.

    Source:
        The question is that of arXiv 2605.26772; the definition of cells and effects is our own.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts = cs.organisms.prompts("test", 4, harmful=True, wrappers=("story", "game"))
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
        >>> crossed = cs.measure_mediation(model, prompts, edit, max_thinking=128, max_answer=32)
        >>> crossed.rate("edited", "unedited"), crossed.rate("unedited", "edited")
        (1.0, 0.0)
    """
    reader = find_judge(judge)
    _check(model, prompts, edit)
    sampled = sample_prompts(prompts, samples)
    budget = Budget(
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        force_closing=force_closing,
        seed=seed,
    )
    edits = {UNEDITED: None, EDITED: edit}
    cells: dict[tuple[str, str], Transcripts] = {}
    for whose, acting in edits.items():
        thought = continue_roll_out(
            model, sampled, budget, edit=acting, thinking_only=True, system=system, batch_size=batch_size
        )
        check_left(thought)
        closed = Transcripts((t for t in thought if t.closed), omitted=thought.omitted)
        answered = answer_arms(model, closed, edits, budget, batch_size=batch_size)
        for answerer, answers in answered.items():
            # In the prompts' order, those without an answer among them.
            by_id = {t.id: t for t in (*answers, *(t for t in thought if not t.closed))}
            together = Transcripts((by_id[t.id] for t in thought if t.id in by_id), omitted=answers.omitted)
            cells[whose, answerer] = judge_answers(together, reader)
    return _crossed(cells, scope=scope_of(edit), seed=seed)


def _check(model: LensModel, prompts: Transcripts, edit: HeadEdit | EditPlan) -> None:
    if not model.template.thinks:
        raise DataError(
            f"{model.name!r} is loaded with template {model.template.name!r}, which does not think, so that there is "
            "no thinking to mediate. Use evaluate_safety."
        )
    edit.check(model)
    if not acts_before_closing(edit):
        raise EditError(
            f"An edit of the {scope_of(edit)} leaves the thinking as it is, so that it has no effect through it. Use "
            "evaluate_safety, or an edit of scope 'all', 'thinking' or 'prompt'."
        )
    check_labels(prompts)


def _crossed(cells: Mapping[tuple[str, str], Transcripts], *, scope: str, seed: int) -> Mediation:
    tables = [
        answer_rows("", "", cells[cell]).drop(columns=["arm", "kind"]).assign(thinking=cell[0], answer=cell[1])
        for cell in CELLS
    ]
    return Mediation(
        cells=dict(cells),
        outcomes=pd.concat(tables, ignore_index=True),
        scope=scope,
        omitted=tuple(dict.fromkeys(o for cell in CELLS for o in cells[cell].omitted)),
        seed=seed,
    )


def _mcnemar(rates: Float[np.ndarray, "cell prompt"], weights: tuple[int, int, int, int]) -> float:
    """McNemar's p of an effect that compares two cells with one answer a prompt; NaN of one that compares more."""
    if sorted(weights) != [-1, 0, 0, 1]:
        return float("nan")
    return mcnemar(rates[weights.index(1)] > 0, rates[weights.index(-1)] > 0)
