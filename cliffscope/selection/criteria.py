"""By what, and in which order, are examples chosen?

1. A criterion gives every candidate a value; the larger, the sooner it is chosen. Ties are broken by id.
2. `cliff` (plateau - final), `misalignment` (the paper's, with the maximum as plateau) and `final` (the lowest score at
   the end first) need a trace that the probe can read.
3. `random`, `rule` (the thinking states a refusal), `length` (the longest thinking) and `judge` (the least likely
   refusal by a judge's score) are baselines, which any new choice has to beat.
4. Of prompts that are the same but for case and spaces, the first in rank is kept. On request, sources take turns.

Tables in, tables out; knows no model.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pandas as pd

from cliffscope.errors import DataError

Criterion = Literal["cliff", "misalignment", "final", "random", "rule", "length", "judge"]
TRACED = ("cliff", "misalignment", "final")
"""Criteria that need a valid cliff."""
COLUMNS = (
    *("id", "source", "prompt_key", "n_thinking", "thinking_refuses", "judge_refusal"),
    *("plateau_max", "plateau_mean", "final", "valid", "reason"),
)
"""Columns of candidates that `choose` reads."""


def check_choice(fraction: float | None, number: int | None, criterion: str) -> None:
    """Raises DataError unless a share or a number is asked for, of a known criterion."""
    if criterion not in _VALUES:
        raise DataError(f"criterion={criterion!r}: expected one of {', '.join(_VALUES)}.")
    if number is not None and number < 1:
        raise DataError(f"number={number}: expected at least 1 example.")
    if number is None and fraction is not None:
        check_fraction(fraction)


def check_fraction(fraction: float) -> None:
    """Raises DataError unless a fraction is a share of the pool."""
    if not 0 < fraction <= 1:
        raise DataError(f"fraction={fraction}: expected a share of the pool in (0, 1], such as 0.017.")


def choose(
    candidates: pd.DataFrame,
    *,
    wanted: int,
    criterion: Criterion = "cliff",
    plateau: str = "mean",
    deduplicate: bool = True,
    balance: bool = False,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ranks candidates and marks the first ones.

    Args:
        candidates: `COLUMNS`, one row a candidate.
        wanted: examples to choose, fewer where there are not as many.
        criterion: see the top of the file.
        plateau: "mean" or "max", of the criterion `cliff`.
        deduplicate: keep the first of equal prompts.
        balance: let sources take turns instead of going by rank alone.
        seed: of `random`; the same id gets the same place whatever else is in the pool.

    Returns:
        The ranked candidates with the columns plateau, cliff, value, rank, chosen; and those left out, with `reason`.
    """
    table = candidates.reset_index(drop=True)
    height = table["plateau_max" if plateau == "max" else "plateau_mean"].astype(float)
    table = table.assign(plateau=height, cliff=height - table["final"].astype(float))
    table["value"] = _VALUES[criterion](table, seed)
    usable = table["valid"].astype(bool) if criterion in TRACED else pd.Series(True, index=table.index)
    unknown = usable & table["value"].isna()
    reasons = table["reason"].where(~usable, f"no value of the criterion {criterion!r}")
    out = ~usable | unknown
    left_out = [table[out].assign(reason=reasons[out].to_numpy())]
    ranked = table[usable & ~unknown].sort_values(["value", "id"], ascending=[False, True], ignore_index=True)
    if deduplicate:
        again = ranked.duplicated("prompt_key")
        first = ranked.drop_duplicates("prompt_key").set_index("prompt_key")["id"]
        same = ranked[again]
        left_out.append(same.assign(reason=[f"same prompt as {first[key]}" for key in same["prompt_key"]]))
        ranked = ranked[~again].reset_index(drop=True)
    order = ranked.groupby("source", sort=False).cumcount() if balance else pd.Series(0, index=ranked.index)
    places = np.lexsort((np.arange(len(ranked)), order.to_numpy()))[:wanted]
    chosen = np.zeros(len(ranked), dtype=bool)
    chosen[places] = True
    return ranked.assign(rank=range(1, len(ranked) + 1), chosen=chosen), pd.concat(left_out, ignore_index=True)


def prompt_key(text: str) -> str:
    """Hash of a prompt that does not see case and spaces.

    Example:
        >>> prompt_key("How  do I?") == prompt_key("how do i?")
        True
    """
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _random(table: pd.DataFrame, seed: int) -> pd.Series:
    digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8] for name in table["id"]]
    return pd.Series([int.from_bytes(d, "big") / 2**64 for d in digests], index=table.index, dtype=float)


_VALUES: Mapping[str, Callable[[pd.DataFrame, int], pd.Series]] = {
    "cliff": lambda table, _: table["cliff"].astype(float),
    "misalignment": lambda table, _: table["plateau_max"].astype(float) - table["final"].astype(float),
    "final": lambda table, _: -table["final"].astype(float),
    "random": _random,
    "rule": lambda table, _: table["thinking_refuses"].astype(float),
    "length": lambda table, _: table["n_thinking"].astype(float),
    "judge": lambda table, _: -table["judge_refusal"].astype(float),
}
