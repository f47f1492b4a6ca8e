"""Which few examples of a safety pool matter most?

1. Harmful transcripts that were complied with are traced; those known to be harmless, refused or unfinished are counted
   and left out, those without a label are taken as the pool's owner gave them.
2. They are ranked by cliff = plateau - final; ties are broken by id.
3. The first fraction is chosen. Transcripts whose cliff is not valid (no thinking, or a probe that cannot tell there)
   are counted and never chosen.

Source: Cliff-as-a-Judge, arXiv 2510.06036, section 5 (top 1.7%).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cliffscope.errors import DataError
from cliffscope.models import LensModel
from cliffscope.probing.cliff import Plateau
from cliffscope.probing.probe import RefusalProbe
from cliffscope.probing.trace import Cliffs, trace_refusal
from cliffscope.transcripts.datasets import write_transcripts
from cliffscope.transcripts.records import Omission, Outcome, Transcript, Transcripts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """The chosen examples of a pool."""

    chosen: Transcripts
    """The chosen transcripts, largest cliff first."""
    frame: pd.DataFrame
    """id, prompt, thinking, answer, plateau, final, cliff, rank, chosen: every valid transcript of the pool."""
    pool: int
    """Transcripts that could be chosen from."""
    omitted: tuple[Omission, ...]
    """Transcripts that could not be chosen, and why."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table, largest cliff first."""
        return self.frame.copy()

    def to_jsonl(self, path: str | Path) -> None:
        """Writes the chosen transcripts as JSONL."""
        write_transcripts(self.chosen, path)

    def plot(self) -> "Figure":
        """Plateau against final, the chosen ones marked."""
        from cliffscope.figures.safety import plateau_final

        return plateau_final(
            self.frame["plateau"].to_numpy(), self.frame["final"].to_numpy(), self.frame["chosen"].to_numpy(dtype=bool)
        )

    def __repr__(self) -> str:
        """One line: how many of how many."""
        return f"Selection({len(self.chosen)} of {self.pool}, left out {len(self.omitted)})"


def select_by_cliff(
    model: LensModel,
    probe: RefusalProbe,
    pool: Transcripts,
    *,
    fraction: float = 0.017,
    plateau: Plateau = "mean",
) -> Selection:
    """Chooses the transcripts with the largest cliff.

    Args:
        model: the model.
        probe: fitted on this model.
        pool: transcripts with thinking. Those known to be harmless or not complied with are left out.
        fraction: of the others, in (0, 1]; rounded, at least one. The default is the paper's 1.7%.
        plateau: "mean" or "max", the paper's.

    Returns:
        The selection.

    Raises:
        DataError: a fraction outside (0, 1], or a pool in which nothing is harmful and complied with.
        ProbeError: the probe does not fit the model.
        SpanError: nothing in the pool can be traced.
    """
    check_fraction(fraction)
    left_out = {t.id: why for t in pool if (why := _reason_to_omit(t)) is not None}
    wanted = Transcripts(t for t in pool if t.id not in left_out)
    if not len(wanted):
        raise DataError(
            f"None of the {len(pool)} transcripts of the pool is harmful and complied with. Give such ones, judged."
        )
    traces = trace_refusal(model, probe, wanted)
    omitted = [Omission(stage="select", reason=why, id=name) for name, why in left_out.items()]
    return select_from_cliffs(
        traces.cliffs(plateau=plateau), wanted, fraction=fraction, omitted=(*omitted, *traces.omitted)
    )


def select_from_cliffs(
    cliffs: Cliffs, pool: Transcripts, *, fraction: float = 0.017, omitted: tuple[Omission, ...] = ()
) -> Selection:
    """Chooses from cliffs that have been measured already; see `select_by_cliff`."""
    check_fraction(fraction)
    known = {t.id: t for t in pool}
    frame = cliffs.frame[cliffs.frame["id"].isin(known)]
    invalid = frame[~frame["valid"].astype(bool)]
    valid = frame[frame["valid"].astype(bool)].sort_values(["cliff", "id"], ascending=[False, True], ignore_index=True)
    height = "plateau_max" if cliffs.plateau == "max" else "plateau_mean"
    wanted = max(1, round(fraction * len(known)))
    table = pd.DataFrame(
        {
            "id": valid["id"],
            "prompt": [known[i].prompt for i in valid["id"]],
            "thinking": [known[i].thinking for i in valid["id"]],
            "answer": [known[i].answer for i in valid["id"]],
            "plateau": valid[height],
            "final": valid["final"],
            "cliff": valid["cliff"],
            "rank": range(1, len(valid) + 1),
            "chosen": [i < wanted for i in range(len(valid))],
        }
    )
    left_out = [
        Omission(stage="select", reason=str(reason), id=str(i))
        for i, reason in zip(invalid["id"], invalid["reason"], strict=True)
    ]
    chosen = [known[i] for i in table["id"][table["chosen"].astype(bool)]]
    return Selection(chosen=Transcripts(chosen), frame=table, pool=len(known), omitted=(*omitted, *left_out))


def check_fraction(fraction: float) -> None:
    """Raises DataError unless a fraction is a share of the pool."""
    if not 0 < fraction <= 1:
        raise DataError(f"fraction={fraction}: expected a share of the pool in (0, 1], such as 0.017.")


def _reason_to_omit(transcript: Transcript) -> str | None:
    if transcript.harmful is False:
        return "harmless"
    return None if transcript.outcome in (Outcome.COMPLIED, Outcome.UNJUDGED) else str(transcript.outcome)
