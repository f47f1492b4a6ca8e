"""Which few examples of a safety pool matter most?

1. Candidates are harmful transcripts that complied. Transcripts labelled harmless, refused or unfinished are left out
   and counted; unlabelled ones count as candidates, since the pool's owner supplied them for training.
2. A criterion ranks them, by default the cliff (criteria.py), and the first fraction is chosen.
3. A criterion that needs a trace never chooses a transcript without a valid cliff (no thinking, or a probe that cannot
   tell there); these are counted.

A pool that fits into memory goes through `select_by_cliff`. A larger one is scored first (scoring.py), and
`select_from_pool` reads it once more for the chosen rows alone.

Source: Cliff-as-a-Judge, arXiv 2510.06036, section 5 (top 1.7%).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.heads.suppression import Suppression
from cliffscope.judging.thinking import states_refusal
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.cliff import Plateau
from cliffscope.readouts.probe import RefusalProbe
from cliffscope.readouts.trace import Cliffs, trace_refusal
from cliffscope.selection.criteria import CRITERIA, Criterion, check_size, choose, prompt_key
from cliffscope.selection.rows import UNCLOSED, judge_refusal
from cliffscope.selection.scoring import PoolScores
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.pools import PoolSource, read_windows
from cliffscope.transcripts.records import Group, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SELECT_STAGE = "select"
_DEFAULT = "cliff"


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(Plotted):
    """The chosen examples of a pool."""

    selected: Transcripts
    """The selected transcripts, in the order of rank."""
    frame: pd.DataFrame
    """id, prompt, thinking, answer, plateau, final, cliff, rank, chosen: every ranked transcript of the pool. A pool
    that is read from files has texts for the chosen ones only."""
    pool: int
    """Number of candidates."""
    omitted: tuple[Omission, ...]
    """Transcripts that could not be chosen, and why."""
    criterion: str = _DEFAULT
    """Name of the criterion that ranks them."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, in the order of rank."""
        return self.frame.copy()

    def to_jsonl(self, path: str | Path) -> None:
        """Writes the chosen transcripts as JSONL."""
        write_transcripts(self.selected, path)

    def small_table(self) -> pd.DataFrame:
        """The ranked transcripts, first ranks first: rank, id, plateau, final, cliff, prompt."""
        return self.frame[["rank", "id", "plateau", "final", "cliff", "prompt"]].sort_values("rank")

    def plot(self) -> "Figure":
        """Plots plateau against final, with the chosen transcripts marked."""
        from cliffscope.figures.safety import plateau_final

        return plateau_final(
            self.frame["plateau"].to_numpy(float),
            self.frame["final"].to_numpy(float),
            self.frame["chosen"].to_numpy(dtype=bool),
        )

    def __repr__(self) -> str:
        """One line: how many of how many."""
        by = "" if self.criterion == _DEFAULT else f" by {self.criterion}"
        return f"Selection({len(self.selected)} of {self.pool}{by}, left out {len(self.omitted)})"


def select_by_cliff(
    model: LensModel,
    probe: RefusalProbe,
    pool: Transcripts,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    criterion: Criterion | str = _DEFAULT,
    plateau: Plateau = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> Selection:
    """Chooses the transcripts with the largest cliff, or by another criterion.

    Args:
        model: the model.
        probe: fitted on this model.
        pool: transcripts with thinking. Those labelled harmless, refused or unfinished are left out.
        fraction: share of the candidates to choose, in (0, 1]; rounded, at least one. The default is the paper's 1.7%.
        number: examples to choose, instead of a fraction.
        criterion: what to rank by: `cliff`, `misalignment` (the paper's), `final`, one of the baselines `random`,
            `rule`, `length` and `judge`, `package.module:name`, or a `Criterion`.
        plateau: "mean", or "max" as in the paper; used by `cliff`.
        deduplicate: keep only the first in rank of prompts that differ only in case and spaces.
        balance: let the transcripts' sources take turns.
        seed: of `random`.

    Returns:
        The selection.

    Raises:
        DataError: the fraction is outside (0, 1], there is no such criterion, or the pool has no candidate.
        ProbeError: the probe does not fit the model.
        SpanError: nothing in the pool can be traced.
    """
    check_size(fraction, number)
    rule = CRITERIA.get(criterion)
    reasons = {t.id: why for t in pool if (why := _reason_to_omit(t.harmful, t.outcome, t.closed)) is not None}
    candidates = Transcripts(t for t in pool if t.id not in reasons)
    if not len(candidates):
        raise DataError(
            f"None of the {len(pool)} transcripts of the pool is a candidate: harmful, finished and complied. Judge "
            "the pool first, or pass transcripts that complied."
        )
    traces = trace_refusal(model, probe, candidates)
    omitted = [Omission(stage=SELECT_STAGE, reason=why, id=name) for name, why in reasons.items()]
    spans = {row.id: row.span(Span.THINKING) for row in traces.tokens}
    return _select(
        traces.cliffs(plateau=plateau).frame,
        candidates,
        {name: span.stop - span.start for name, span in spans.items()},
        plateau=plateau,
        fraction=fraction,
        number=number,
        criterion=rule,
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
    criterion: Criterion | str = _DEFAULT,
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
    omitted: tuple[Omission, ...] = (),
) -> Selection:
    """Chooses from cliffs that have already been measured; see `select_by_cliff`.

    The length of the thinking is its number of generated tokens, or of characters if a transcript lacks token ids.
    """
    check_size(fraction, number)
    return _select(
        cliffs.frame,
        pool,
        _lengths(pool),
        plateau=cliffs.plateau,
        fraction=fraction,
        number=number,
        criterion=CRITERIA.get(criterion),
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
        omitted=omitted,
    )


def select_from_suppression(
    measured: Suppression,
    pool: Transcripts,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    deduplicate: bool = True,
    balance: bool = False,
) -> Selection:
    """Chooses the transcripts to which an edit of heads gives most refusal back; see `select_by_cliff`.

    Args:
        measured: the result of `measure_suppression` on the pool.
        pool: transcripts; those labelled harmless, refused or unfinished, or not measured, are left out and counted.
        fraction: share of the candidates to choose, in (0, 1].
        number: examples to choose, instead of a fraction.
        deduplicate: keep only the first in rank of prompts that differ only in case and spaces.
        balance: let the transcripts' sources take turns.

    Returns:
        The selection; plateau, final and cliff are NaN, since no probe was read.

    Raises:
        DataError: the fraction is outside (0, 1], or no measured transcript of the pool is a candidate.
    """
    check_size(fraction, number)
    frame = measured.to_frame()[["id", "suppression"]]
    names = set(frame["id"])
    reasons = {t.id: _reason_to_omit(t.harmful, t.outcome, t.closed) for t in pool}
    reasons = {name: why or ("" if name in names else "suppression not measured") for name, why in reasons.items()}
    candidates = Transcripts(t for t in pool if not reasons[t.id])
    if not len(candidates):
        raise DataError(
            f"None of the {len(pool)} transcripts of the pool is a candidate: harmful, finished, complied, and "
            "measured. Measure the suppression of transcripts that complied."
        )
    unread = dict.fromkeys(("plateau_mean", "plateau_max", "final"), float("nan"))
    return _select(
        frame.assign(**unread, valid=False, reason="no probe was read"),
        candidates,
        _lengths(candidates),
        plateau="mean",
        fraction=fraction,
        number=number,
        criterion=CRITERIA.get("suppression"),
        deduplicate=deduplicate,
        balance=balance,
        seed=0,
        omitted=tuple(Omission(stage=SELECT_STAGE, reason=why, id=name) for name, why in reasons.items() if why),
    )


def select_from_pool(
    scores: PoolScores,
    pool: PoolSource,
    *,
    fraction: float = 0.017,
    number: int | None = None,
    criterion: Criterion | str = _DEFAULT,
    plateau: Plateau = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> Selection:
    """Chooses from a pool that has been scored; see `select_by_cliff`.

    Args:
        scores: the result of `score_pool`.
        pool: the pool that was scored; read once more, for the chosen rows alone.
        fraction: share of the candidates, that is, of rows that are harmful and complied, or unlabelled.
        number: examples to choose, instead of a fraction.
        criterion: what to rank by; a name or an object.
        plateau: "mean" or "max"; used by `cliff`.
        deduplicate: keep only the first of equal prompts.
        balance: let sources take turns.
        seed: of `random`.

    Returns:
        The selection. Its table holds texts for the chosen rows only.

    Raises:
        DataError: there is no such criterion, the pool has no candidate, or it is not the pool that was scored.
    """
    check_size(fraction, number)
    rule = CRITERIA.get(criterion)
    table = scores.frame
    unread = table["outcome"] == ""
    reasons = [
        str(reason) if broken else _reason_to_omit(harmful, outcome, reason != UNCLOSED)
        for reason, broken, harmful, outcome in zip(
            table["reason"], unread, table["harmful"], table["outcome"], strict=True
        )
    ]
    omitted = tuple(
        Omission(stage=SELECT_STAGE, reason=why, id=str(name))
        for name, why in zip(table["id"], reasons, strict=True)
        if why is not None
    )
    candidates = table[[why is None for why in reasons]]
    if candidates.empty:
        raise DataError(
            f"None of the {len(table)} rows of the pool is a candidate: harmful, finished and complied. Pass a pool of "
            "transcripts that complied."
        )
    ranked, left_out = choose(
        candidates,
        number=number or max(1, round(fraction * len(candidates))),
        criterion=rule,
        plateau=plateau,
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
    )
    transcripts = _fetch(pool, ranked.loc[ranked["chosen"], ["row", "id"]])
    return _selection(ranked, left_out, transcripts, pool=len(candidates), criterion=rule.name, omitted=omitted)


def _select(
    measured: pd.DataFrame,
    pool: Transcripts,
    n_thinking: Mapping[str, int],
    *,
    plateau: Plateau,
    fraction: float,
    number: int | None,
    criterion: Criterion,
    deduplicate: bool,
    balance: bool,
    seed: int,
    omitted: tuple[Omission, ...],
) -> Selection:
    by_id = {t.id: t for t in pool}
    frame = measured[measured["id"].isin(by_id)]
    transcripts = [by_id[i] for i in frame["id"]]
    candidates = frame.assign(
        source=[t.source for t in transcripts],
        prompt_key=[prompt_key(t.prompt) for t in transcripts],
        n_thinking=[n_thinking[t.id] for t in transcripts],
        thinking_refuses=[states_refusal(t.thinking or "") for t in transcripts],
        judge_refusal=[judge_refusal(t) for t in transcripts],
    )
    ranked, left_out = choose(
        candidates,
        number=number or max(1, round(fraction * len(by_id))),
        criterion=criterion,
        plateau=plateau,
        deduplicate=deduplicate,
        balance=balance,
        seed=seed,
    )
    return _selection(ranked, left_out, by_id, pool=len(by_id), criterion=criterion.name, omitted=omitted)


def _lengths(pool: Transcripts) -> dict[str, int]:
    """Length of each thinking, in one unit for the whole pool."""
    ids = {t.id: t.thinking_ids for t in pool}
    if all(tokens is not None for tokens in ids.values()):
        return {name: len(tokens or ()) for name, tokens in ids.items()}
    return {t.id: len(t.thinking or "") for t in pool}


def _fetch(pool: PoolSource, places: pd.DataFrame) -> dict[str, Transcript]:
    """The transcripts of some rows, by id."""
    names = {int(row): str(name) for row, name in zip(places["row"], places["id"], strict=True)}
    fetched: dict[str, Transcript] = {}
    for window in read_windows(pool):
        for offset, row in enumerate(window.rows):
            name = names.get(window.start + offset)
            if name is not None and isinstance(row, Transcript) and row.id == name:
                fetched[name] = row
    missing = sorted(set(names.values()) - set(fetched))
    if missing:
        raise DataError(
            f"{len(missing)} chosen rows, such as {missing[0]!r}, are not where they were when the pool was scored. "
            "Pass the same pool, as an iterable that can be read again, or score it again."
        )
    return fetched


def _selection(
    ranked: pd.DataFrame,
    left_out: pd.DataFrame,
    by_id: Mapping[str, Transcript],
    *,
    pool: int,
    criterion: str,
    omitted: Iterable[Omission],
) -> Selection:
    transcripts = [by_id.get(i) for i in ranked["id"]]
    table = pd.DataFrame(
        {
            "id": ranked["id"],
            "prompt": [None if t is None else t.prompt for t in transcripts],
            "thinking": [None if t is None else t.thinking for t in transcripts],
            "answer": [None if t is None else t.answer for t in transcripts],
            **{name: ranked[name] for name in ("plateau", "final", "cliff", "rank", "chosen")},
        }
    )
    reasons = [
        Omission(stage=SELECT_STAGE, reason=str(reason), id=str(i))
        for i, reason in zip(left_out["id"], left_out["reason"], strict=True)
    ]
    return Selection(
        selected=Transcripts(by_id[i] for i in ranked["id"][ranked["chosen"].astype(bool)]),
        frame=table,
        pool=pool,
        omitted=(*omitted, *reasons),
        criterion=criterion,
    )


def _reason_to_omit(harmful: object, outcome: object, closed: bool = True) -> str | None:
    """Why a transcript is not a candidate; None if it is one."""
    if harmful is False:
        return str(Group.HARMLESS)
    if not closed:
        return UNCLOSED
    return None if outcome in (Outcome.COMPLIED, Outcome.UNJUDGED) else str(outcome)
