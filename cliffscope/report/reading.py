"""The part of the page that shows what the first heads read.

For each head whose sources were traced: the tokens that it writes against refusal on account of, as bars that add up,
and all tokens coloured by CircuitsVis. It measures nothing.
"""

import numpy as np
import pandas as pd

from cliffscope.figures import embed, printable
from cliffscope.figures.circuits import coloured_tokens
from cliffscope.figures.sources import source_bars
from cliffscope.figures.tokens import MOST_TOKENS
from cliffscope.report.content import Circuits, Part, Remark, plot
from cliffscope.report.stored import StoredRun


def reading_parts(run: StoredRun) -> list[Part]:
    """Bars and coloured tokens of every head whose sources the run holds."""
    frame = run.tables["head_sources"]
    parts: list[Part] = []
    for place, (head, rows) in enumerate(frame.groupby("head", sort=False)):
        final = rows[rows["query"] == rows["query"].max()].sort_values("position")
        share = pd.to_numeric(final["share"], errors="coerce").to_numpy(float)
        if not np.isfinite(share).any():
            continue
        parts += _of_head(str(head), final, share, place + 1)
    if parts:
        name = printable(str(frame["id"].iloc[0]), limit=60)
        parts.insert(
            0,
            Remark(
                text=f"What the heads read at the final token of {name}, the held-out transcript with the median "
                "cliff (n=1). Each head's direct share of the refusal logit is an exact sum over the tokens that "
                "it attends to."
            ),
        )
    return [*parts, *(Remark(text=note) for note in run.notes("reading"))]


def _of_head(head: str, final: pd.DataFrame, share: np.ndarray, place: int) -> list[Part]:
    texts = final["token"].fillna("").astype(str).to_list()
    attention = pd.to_numeric(final["attention"], errors="coerce").to_numpy(float)
    spans = final["span"].astype(str).to_list()
    title = f"What {head} reads at the final token (n=1 transcript, {len(texts):,} tokens)"
    bars = source_bars(texts, spans, attention, -share, title=title, most=16)
    note = (
        "Vermillion: against refusal. Blue: for refusal. Hover to see the attention. The bars sum to the head's total."
    )
    last = slice(max(0, len(texts) - MOST_TOKENS), None)
    cut = f" Only the last {MOST_TOKENS:,} tokens are shown." if len(texts) > MOST_TOKENS else ""
    props = coloured_tokens(texts[last], (-np.nan_to_num(share[last])).tolist())
    coloured = Circuits(
        id=f"circuits-{place}",
        title=f"The same values as text: tokens coloured by their contribution to {head}'s write against refusal",
        note=f"Vermillion: against refusal. Blue: for refusal. Hover over a token to see its value.{cut}",
        component="ColoredTokens",
        props=embed(props),
    )
    return [plot(f"sources-{place}", bars, note), coloured]
