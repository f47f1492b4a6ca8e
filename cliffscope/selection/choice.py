"""Which few examples of a safety pool matter most?

1. Harmful transcripts that were complied with are candidates; those known to be harmless, refused or unfinished are
   counted and left out, those without a label are taken as the pool's owner gave them.
2. They are ranked by a criterion, the cliff by default (criteria.py), and the first fraction is chosen.
3. Transcripts whose cliff is not valid (no thinking, or a probe that cannot tell there) are counted and never chosen by
   it.

A pool that fits into memory goes through `select_by_cliff`; one that does not is scored first (scoring.py), and
`select_from_pool` reads it once more for the chosen rows alone.

Source: Cliff-as-a-Judge, arXiv 2510.06036, section 5 (top 1.7%).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.judging.thinking import states_refusal
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.cliff import Plateau
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import Cliffs, trace_refusal
from cliffscope.selection.criteria import Criterion, check_choice, choose, prompt_key
from cliffscope.selection.rows import UNCLOSED, judge_refusal
from cliffscope.selection.scoring import PoolScores
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.pools import PoolSource, read_windows
from cliffscope.transcripts.records import Omission, Outcome, Transcript, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "select"


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(Plotted):
    """The chosen examples of a pool."""

    chosen: Transcripts
    """The chosen transcripts, the first in rank first."""
    frame: pd.DataFrame
    """id, prompt, thinking, answer, plateau, final, cliff, rank, chosen: every ranked transcript of the pool; texts of
    the chosen ones alone where the pool is read from files."""
    pool: int
    """Transcripts that could be chosen from."""
    omitted: tuple[Omission, ...]
    """Transcripts that could not be chosen, and why."""
    criterion: Criterion = "cliff"
    """What they are ranked by."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, in the order of rank."""
        return self.frame.copy()

    def to_jsonl(self, path: str | Path) -> None:
        """Writes the chosen transcripts as JSONL."""
        write_transcripts(self.chosen, path)

    def small_table(self) -> pd.DataFrame:
        """The first of the chosen: rank, id, plateau, final, cliff, prompt."""
        return self.frame[["rank", "id", "plateau", "final", "cliff", "prompt"]].sort_values("rank")

    def plot(self) -> "Figure":
        """Plateau against final, the chosen ones marked."""
        from cliffscope.figures.safety import plateau_final

        return plateau_final(
            self.frame["plateau"].to_numpy(float),
            self.frame["final"].to_numpy(float),
            self.frame["chosen"].to_numpy(dtype=bool),
        )

    def __repr__(self) -> str:
        """One line: how many of how many."""
        by = "" if self.criterion == "cliff" else f" by {self.criterion}"
        return f"Selection({len(self.chosen)} of {self.pool}{by}, left out {len(self.omitted)})"


def select_by_cliff(
    model: LensModel,
    probe: RefusalProbe,
    pool: Transcripts,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    criterion: Criterion = "cliff",
    plateau: Plateau = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> Selection:
    """Chooses the transcripts with the largest cliff, or by another criterion.

    Args:
        model: the model.
        probe: fitted on this model.
        pool: transcripts with thinking. Those known to be harmless or not complied with are left out.
        fraction: of the others, in (0, 1]; rounded, at least one. The default is the paper's 1.7%.
        number: of examples, instead of a fraction.
        criterion: `cliff`, `misalignment` (the paper's), `final`, or a baseline: `random`, `rule`, `length`, `judge`.
        plateau: "mean" or "max", the paper's; of `cliff`.
        deduplicate: of prompts equal but for case and spaces, keep the first in rank.
        balance: let the transcripts' sources take turns.
        seed: of `random`.

    Returns:
        The selection.

    Raises:
        DataError: a fraction outside (0, 1], an unknown criterion, or a pool in which nothing is harmful and complied
            with.
        ProbeError: the probe does not fit the model.
        SpanError: nothing in the pool can be traced.
    """
    check_choice(fraction, number, criterion)
    left_out = {t.id: why for t in pool if (why := _reason_to_omit(t.harmful, t.outcome, t.closed)) is not None}
    wanted = Transcripts(t for t in pool if t.id not in left_out)
    if not len(wanted):
        raise DataError(
            f"None of the {len(pool)} transcripts of the pool is harmful and complied with. Give such ones, judged."
        )
    traces = trace_refusal(model, probe, wanted)
    omitted = [Omission(stage=STAGE, reason=why, id=name) for name, why in left_out.items()]
    return select_from_cliffs(
        traces.cliffs(plateau=plateau),
        wanted,
        fraction=fraction,
        number=number,
        criterion=criterion,
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
        omitted=(*omitted, *traces.omitted),
    )


def select_from_cliffs(
    cliffs: Cliffs,
    pool: Transcripts,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    criterion: Criterion = "cliff",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
    omitted: tuple[Omission, ...] = (),
) -> Selection:
    """Chooses from cliffs that have been measured already; see `select_by_cliff`."""
    check_choice(fraction, number, criterion)
    known = {t.id: t for t in pool}
    frame = cliffs.frame[cliffs.frame["id"].isin(known)]
    texts = [known[i] for i in frame["id"]]
    candidates = frame.assign(
        source=[t.source for t in texts],
        prompt_key=[prompt_key(t.prompt) for t in texts],
        n_thinking=[len(t.thinking or "") for t in texts],
        thinking_refuses=[states_refusal(t.thinking or "") for t in texts],
        judge_refusal=[judge_refusal(t) for t in texts],
    )
    ranked, left_out = choose(
        candidates,
        wanted=number or max(1, round(fraction * len(known))),
        criterion=criterion,
        plateau=cliffs.plateau,
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
    )
    return _selection(ranked, left_out, known, pool=len(known), criterion=criterion, omitted=omitted)


def select_from_pool(
    scores: PoolScores,
    pool: PoolSource,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    criterion: Criterion = "cliff",
    plateau: Plateau = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> Selection:
    """Chooses from a pool that has been scored; see `select_by_cliff`.

    Args:
        scores: what `score_pool` gave.
        pool: what it was given; read once more, for the chosen rows alone.
        fraction: of the rows that are harmful and complied with, or without a label.
        number: of examples, instead of a fraction.
        criterion: what to rank by.
        plateau: of `cliff`.
        deduplicate: keep the first of equal prompts.
        balance: let sources take turns.
        seed: of `random`.

    Returns:
        The selection; its table holds the texts of the chosen rows.

    Raises:
        DataError: nothing in the pool is harmful and complied with, or the pool is not the one that was scored.
    """
    check_choice(fraction, number, criterion)
    table = scores.frame
    unread = table["outcome"] == ""
    why = [
        str(reason) if broken else _reason_to_omit(harmful, outcome, reason != UNCLOSED)
        for reason, broken, harmful, outcome in zip(
            table["reason"], unread, table["harmful"], table["outcome"], strict=True
        )
    ]
    out = pd.Series([w is not None for w in why], index=table.index)
    omitted = tuple(
        Omission(stage=STAGE, reason=str(w), id=str(i)) for i, w in zip(table["id"], why, strict=True) if w is not None
    )
    candidates = table[~out]
    if candidates.empty:
        raise DataError(f"None of the {len(table)} rows of the pool is harmful and complied with. Give such ones.")
    ranked, left_out = choose(
        candidates,
        wanted=number or max(1, round(fraction * len(candidates))),
        criterion=criterion,
        plateau=plateau,
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
    )
    known = _fetch(pool, ranked.loc[ranked["chosen"], ["row", "id"]])
    return _selection(ranked, left_out, known, pool=len(candidates), criterion=criterion, omitted=omitted)


def _fetch(pool: PoolSource, wanted: pd.DataFrame) -> dict[str, Transcript]:
    """The transcripts of some rows."""
    names = {int(row): str(name) for row, name in zip(wanted["row"], wanted["id"], strict=True)}
    found: dict[str, Transcript] = {}
    for window in read_windows(pool):
        for offset, row in enumerate(window.rows):
            name = names.get(window.start + offset)
            if name is not None and isinstance(row, Transcript) and row.id == name:
                found[name] = row
    missing = sorted(set(names.values()) - set(found))
    if missing:
        raise DataError(
            f"{len(missing)} chosen rows, such as {missing[0]!r}, are not where they were in the pool when it was "
            "scored. Give the same pool (an iterable that can be read again), or score it anew."
        )
    return found


def _selection(
    ranked: pd.DataFrame,
    left_out: pd.DataFrame,
    known: dict[str, Transcript],
    *,
    pool: int,
    criterion: Criterion,
    omitted: Iterable[Omission],
) -> Selection:
    texts = [known.get(i) for i in ranked["id"]]
    table = pd.DataFrame(
        {
            "id": ranked["id"],
            "prompt": [None if t is None else t.prompt for t in texts],
            "thinking": [None if t is None else t.thinking for t in texts],
            "answer": [None if t is None else t.answer for t in texts],
            **{name: ranked[name] for name in ("plateau", "final", "cliff", "rank", "chosen")},
        }
    )
    chosen = [known[i] for i in ranked["id"][ranked["chosen"].astype(bool)]]
    reasons = [
        Omission(stage=STAGE, reason=str(reason), id=str(i))
        for i, reason in zip(left_out["id"], left_out["reason"], strict=True)
    ]
    return Selection(
        chosen=Transcripts(chosen), frame=table, pool=pool, omitted=(*omitted, *reasons), criterion=criterion
    )


def _reason_to_omit(harmful: object, outcome: object, closed: bool = True) -> str | None:
    if harmful is False:
        return "harmless"
    if not closed:
        return UNCLOSED
    return None if outcome in (Outcome.COMPLIED, Outcome.UNJUDGED) else str(outcome)
