"""By which criterion are training examples ranked, and in which order are they chosen?

1. A criterion is an object: it declares the columns that it reads and maps a table of candidates to one value a row.
   The larger the value, the earlier the example is chosen.
2. `cliff` (plateau minus final), `misalignment` (the paper's, with the maximum as plateau) and `final` (lowest final
   score first) need a trace on which the probe can tell.
3. `suppression` is the causal counterpart of the cliff, for candidates whose suppression was measured.
4. `random`, `rule` (the thinking states a refusal), `length` (longest thinking) and `judge` (lowest refusal
   probability) are baselines that any new criterion has to beat.
5. `choose` ranks the candidates, keeps the first of equal prompts, and lets sources take turns on request.

Tables in, tables out. This file knows no model and no text.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import pandas as pd

from cliffscope.errors import DataError
from cliffscope.registry import Registry

CANDIDATE_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "id": "id of the transcript",
        "source": "where its prompt comes from",
        "prompt_key": "hash of the prompt, ignoring case and spaces",
        "n_thinking": "length of the thinking, in tokens where the pool is tokenized",
        "thinking_refuses": "whether the thinking states a refusal",
        "judge_refusal": "refusal probability by the transcript's judge; NaN if the judge gives none",
        "plateau_mean": "mean score over the thinking",
        "plateau_max": "highest score over the thinking",
        "plateau": "the plateau that the caller chose, mean or maximum",
        "final": "score at the final position",
        "cliff": "`plateau` minus `final`",
        "suppression": "what an edit of heads at the closing adds to the readout's logit; only where it was measured",
        "draw": "random number in [0, 1) that depends on the seed and the id alone",
    }
)
"""What a criterion may read, by column."""
TRACE_COLUMNS = ("plateau_mean", "plateau_max", "plateau", "final", "cliff")
"""Columns that mean something only where the probe can tell."""
Values: TypeAlias = Callable[[pd.DataFrame], pd.Series | np.ndarray]


@dataclass(frozen=True, eq=False, kw_only=True)
class Criterion:
    """Ranks candidates for training.

    Raises:
        DataError: the name or summary is blank, a column is unknown, or a trace column is read without `needs_trace`.

    Example:
        >>> shortest = Criterion(
        ...     name="shortest",
        ...     summary="the shortest thinking",
        ...     columns=("n_thinking",),
        ...     values=lambda table: -table["n_thinking"],
        ... )
        >>> shortest.rank_values(pd.DataFrame({"n_thinking": [3, 1]})).tolist()
        [-3.0, -1.0]
    """

    name: str
    """Its name on the command line and in results."""
    summary: str
    """What it chooses first, as a phrase for documentation."""
    columns: tuple[str, ...]
    """Columns of `CANDIDATE_COLUMNS` that `values` reads; it sees no others."""
    values: Values
    """[candidate] Maps the table to one number a row: the larger, the earlier it is chosen; NaN if it has none."""
    needs_trace: bool = False
    """Whether it ranks only candidates whose cliff is valid, that is, on which the probe can tell."""

    def __post_init__(self) -> None:
        """Checks that the declaration is complete and honest."""
        if not self.name.strip() or not self.summary.strip():
            raise DataError(
                f"Criterion name={self.name!r}, summary={self.summary!r}: expected text for both. The name stands in "
                "results, the summary in documentation."
            )
        unknown = [column for column in self.columns if column not in CANDIDATE_COLUMNS]
        if unknown:
            raise DataError(
                f"Criterion {self.name!r} reads the column {unknown[0]!r}. Expected columns among "
                f"{', '.join(CANDIDATE_COLUMNS)}."
            )
        traced = [column for column in self.columns if column in TRACE_COLUMNS]
        if traced and not self.needs_trace:
            raise DataError(
                f"Criterion {self.name!r} reads {traced[0]!r}, which means nothing where the probe cannot tell. Set "
                "needs_trace=True."
            )

    def rank_values(self, candidates: pd.DataFrame) -> pd.Series:
        """Computes the value of every candidate.

        Args:
            candidates: one row a candidate, with at least `columns`.

        Returns:
            [candidate] values, in the order of the table.

        Raises:
            DataError: a column is missing or undeclared, or the result is not one number a row.
        """
        missing = [column for column in self.columns if column not in candidates]
        if missing:
            raise DataError(
                f"Criterion {self.name!r} needs the column {missing[0]!r}, which the table lacks: "
                f"{CANDIDATE_COLUMNS.get(missing[0], 'no column of candidates')}."
            )
        try:
            values = self.values(candidates[list(self.columns)].copy())
        except KeyError as error:
            raise DataError(
                f"Criterion {self.name!r} reads {error}, which is not among its columns ({', '.join(self.columns)}). "
                "Declare every column that `values` reads."
            ) from error
        if isinstance(values, pd.Series) and values.index.is_unique and len(values) == len(candidates):
            # A series may come back sorted.
            values = values.reindex(candidates.index)
        try:
            numbers = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise DataError(f"Criterion {self.name!r} gave values that are not numbers: {error}.") from error
        if numbers.shape != (len(candidates),):
            raise DataError(
                f"Criterion {self.name!r} gave values of shape {numbers.shape} for {len(candidates)} candidates. "
                "Expected one number a candidate."
            )
        return pd.Series(numbers, index=candidates.index)


CRITERIA: Registry[Criterion] = Registry(kind="criterion", group="cliffscope.criteria", expected=Criterion)
"""Criteria by name: the paper's first, then the baselines."""
for _criterion in (
    Criterion(
        name="cliff",
        summary="the largest plateau minus final; `plateau` is `mean` or `max`",
        columns=("cliff",),
        values=lambda table: table["cliff"],
        needs_trace=True,
    ),
    Criterion(
        name="misalignment",
        summary="the same with the maximum as plateau, as in the paper",
        columns=("plateau_max", "final"),
        values=lambda table: table["plateau_max"].astype(float) - table["final"].astype(float),
        needs_trace=True,
    ),
    Criterion(
        name="final",
        summary="the lowest score at the final position",
        columns=("final",),
        values=lambda table: -table["final"].astype(float),
        needs_trace=True,
    ),
    Criterion(
        name="suppression",
        summary="the largest suppression, where it was measured (`select_from_suppression`)",
        columns=("suppression",),
        values=lambda table: table["suppression"],
    ),
    Criterion(
        name="random",
        summary="any, by seed and id",
        columns=("draw",),
        values=lambda table: table["draw"],
    ),
    Criterion(
        name="rule",
        summary="those whose thinking states a refusal",
        columns=("thinking_refuses",),
        values=lambda table: table["thinking_refuses"],
    ),
    Criterion(
        name="length",
        summary="the longest thinking",
        columns=("n_thinking",),
        values=lambda table: table["n_thinking"],
    ),
    Criterion(
        name="judge",
        summary="the lowest refusal probability by the judge",
        columns=("judge_refusal",),
        values=lambda table: -table["judge_refusal"].astype(float),
    ),
):
    CRITERIA.register(_criterion.name, _criterion)


def check_size(fraction: float | None, number: int | None) -> None:
    """Raises DataError unless a fraction in (0, 1] or a number of at least 1 is asked for."""
    if number is not None and number < 1:
        raise DataError(f"number={number}: expected at least 1 example.")
    if number is None and fraction is not None:
        check_fraction(fraction)


def check_fraction(fraction: float) -> None:
    """Raises DataError unless a fraction is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise DataError(f"fraction={fraction}: expected a share of the pool in (0, 1], such as 0.017.")


def choose(
    candidates: pd.DataFrame,
    *,
    number: int,
    criterion: Criterion | str = "cliff",
    plateau: str = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ranks candidates and marks the first ones as chosen.

    Args:
        candidates: one row a candidate: the columns of `CANDIDATE_COLUMNS` except plateau, cliff and draw, and `valid`
            with its `reason`; `suppression` only if the criterion reads it.
        number: examples to choose; fewer if there are not enough.
        criterion: what to rank by; a name or an object.
        plateau: "mean" or "max".
        deduplicate: keep only the first of equal prompts.
        balance: let sources take turns instead of going by rank alone.
        seed: of the column `draw`; an id has the same draw in every pool.

    Returns:
        The ranked candidates with the columns plateau, cliff, draw, value, rank and chosen; and those left out, with
        `reason`.

    Raises:
        DataError: there is no such criterion, or it cannot be computed from these columns.
    """
    rule = CRITERIA.get(criterion)
    table = candidates.reset_index(drop=True)
    height = table["plateau_max" if plateau == "max" else "plateau_mean"].astype(float)
    table = table.assign(plateau=height, cliff=height - table["final"].astype(float), draw=_draws(table["id"], seed))
    table["value"] = rule.rank_values(table)
    usable = table["valid"].astype(bool) if rule.needs_trace else pd.Series(True, index=table.index)
    rankable = usable & table["value"].notna()
    reasons = table["reason"].where(~usable, f"no value of the criterion {rule.name!r}")
    left_out = [table[~rankable].assign(reason=reasons[~rankable].to_numpy())]
    ranked = table[rankable].sort_values(["value", "id"], ascending=[False, True], ignore_index=True)
    if deduplicate:
        repeated = ranked.duplicated("prompt_key")
        first = ranked.drop_duplicates("prompt_key").set_index("prompt_key")["id"]
        duplicates = ranked[repeated]
        left_out.append(duplicates.assign(reason=[f"same prompt as {first[key]}" for key in duplicates["prompt_key"]]))
        ranked = ranked[~repeated].reset_index(drop=True)
    turn = ranked.groupby("source", sort=False).cumcount() if balance else pd.Series(0, index=ranked.index)
    places = np.lexsort((np.arange(len(ranked)), turn.to_numpy()))[:number]
    is_chosen = np.zeros(len(ranked), dtype=bool)
    is_chosen[places] = True
    return ranked.assign(rank=range(1, len(ranked) + 1), chosen=is_chosen), pd.concat(left_out, ignore_index=True)


def prompt_key(text: str) -> str:
    """Hash of a prompt that ignores case and spaces.

    Example:
        >>> prompt_key("How  do I?") == prompt_key("how do i?")
        True
    """
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _draws(ids: pd.Series, seed: int) -> pd.Series:
    digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8] for name in ids]
    return pd.Series([int.from_bytes(d, "big") / 2**64 for d in digests], index=ids.index, dtype=float)
