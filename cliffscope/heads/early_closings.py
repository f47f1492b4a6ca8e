"""What would the model have answered, had it stopped thinking earlier?

For every thinking token the closing is put after it, and the readout is read at the closing's end: a curve over the
thinking of what the answer would be. Where a probe's trace says what the state at a token holds, this says what the
model would do with it. `packed_closings.py` says how it is computed, and what each number equals: a plain forward pass
of the transcript cut behind that token.

Tables and curves are made here from arrays; knows no architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int64
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, SpanError
from cliffscope.heads.edits import EditPlan, HeadEdit
from cliffscope.heads.packed_closings import early_closings, early_logits
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.readout import Readout
from cliffscope.readouts.trace import RefusalTraces, group_name
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.transcript import ClosingRule, Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "early closings"
BINS = 20
"""Points of the common axis: as many as the thinking of a short transcript has tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EarlyClosings(Plotted):
    """What the readout says behind early closings of every transcript."""

    transcripts: tuple[Transcript, ...]
    """[n] the transcripts."""
    tokens: tuple[TokenizedTranscript, ...]
    """[n] their tokens and spans."""
    positions: tuple[Int64[np.ndarray, " _"], ...]
    """[n] positions of the thinking tokens after which the closing was put, ascending; the last is the thinking's."""
    logits: tuple[Float32[np.ndarray, " _"], ...]
    """[n] the readout's logit behind each of these closings."""
    readout: str
    """Name of the readout."""
    can_tell: bool
    """Whether the readout tells refused from complied on held-out transcripts."""
    edit: HeadEdit | EditPlan | None
    """What was done to the model meanwhile."""
    path: str
    """How it was computed: `packed`, or `plain` with the reason."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Turns ids into the text of single tokens."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""

    @property
    def fractions(self) -> list[Float[np.ndarray, " _"]]:
        """[n] share of the thinking that is written at each position, in (0, 1]."""
        return [_fractions(row, at) for row, at in zip(self.tokens, self.positions, strict=True)]

    def scores(self) -> list[Float32[np.ndarray, " _"]]:
        """[n] sigmoid of the logits."""
        return [expit(values) for values in self.logits]

    def to_frame(self) -> pd.DataFrame:
        """One row a closing: id, position, fraction of the thinking, token before it, logit, score."""
        parts = [
            pd.DataFrame(
                {
                    "id": row.id,
                    "position": at,
                    "fraction": _fractions(row, at),
                    "token": [self._text(row, int(position)) for position in at],
                    "logit": values,
                    "score": expit(values),
                }
            )
            for row, at, values in zip(self.tokens, self.positions, self.logits, strict=True)
        ]
        return pd.concat(parts, ignore_index=True)

    def settled(self, *, level: float = 0.0) -> pd.DataFrame:
        """Where each answer is settled: the first token from which on the logit stays on the side where it ends.

        Args:
            level: logit that divides refusing from complying; 0 are even odds.

        Returns:
            One row a transcript: id, group, position, fraction, token, refuses (the side of the end), first and final
            logit, n (tokens of thinking). With `every` above 1, the first measured token.
        """
        rows = []
        for i, (row, at, values) in enumerate(zip(self.tokens, self.positions, self.logits, strict=True)):
            place = settled_from(values, level)
            rows.append(
                {
                    "id": row.id,
                    "group": group_name(self.transcripts[i]),
                    "position": int(at[place]),
                    "fraction": float(_fractions(row, at)[place]),
                    "token": self._text(row, int(at[place])),
                    "refuses": bool(values[-1] > level),
                    "first": float(values[0]),
                    "final": float(values[-1]),
                    "n": row.span(Span.THINKING).stop - row.span(Span.THINKING).start,
                }
            )
        return pd.DataFrame(rows)

    def mean_curve(self, *, bins: int = BINS, seed: int = 0) -> pd.DataFrame:
        """Mean score on a common axis, each transcript interpolated between its closings.

        Args:
            bins: points of the axis; the last is the end of the thinking.
            seed: of the bootstrap.

        Returns:
            fraction, mean, ci_low, ci_high, n; intervals are over transcripts, NaN with one.
        """
        return _mean_curve(self.fractions, self.scores(), bins, seed)

    def small_table(self) -> pd.DataFrame:
        """Where each answer is settled: id, group, fraction, token, first, final, n."""
        return self.settled()[["id", "group", "fraction", "token", "first", "final", "n"]]

    def plot(self, edited: "EarlyClosings | None" = None, probe: RefusalTraces | None = None) -> "Figure":
        """The mean curve over the thinking.

        Args:
            edited: early closings of the same transcripts with heads edited; a second curve.
            probe: traces of the same transcripts; the mean score at each token itself is a third curve.
        """
        from cliffscope.figures.early_closings import closing_curves

        curves = {f"{self.readout}, {'unedited' if self.edit is None else 'edited'}": self.mean_curve()}
        if edited is not None:
            curves[f"{edited.readout}, {'unedited' if edited.edit is None else 'edited'}"] = edited.mean_curve()
        if probe is not None:
            curves["probe at the token"] = self.probe_curve(probe)
        return closing_curves({name: _columns(curve) for name, curve in curves.items()})

    def __repr__(self) -> str:
        """One line: mean score at the first and the last closing, interval, where answers settle, n and path."""
        first, last = (np.array([score[place] for score in self.scores()]) for place in (0, -1))
        low, high = bootstrap_mean(last, seed=0)
        note = "" if self.can_tell else f", the {self.readout} readout cannot tell"
        return (
            f"EarlyClosings({self.readout} {first.mean():.2f} at the first token to {last.mean():.2f} "
            f"[{low:.2f}, {high:.2f}] at the last, settled at {self.settled()['fraction'].median():.0%} of the "
            f"thinking, n={len(self.tokens)}, {self.path}{note})"
        )

    def _text(self, row: TokenizedTranscript, position: int) -> str:
        return str(self.tokenizer.decode([int(row.token_ids[position])]))

    def probe_curve(self, traces: RefusalTraces) -> pd.DataFrame:
        """The probe's mean score at the thinking tokens of the same transcripts, as `mean_curve` has it.

        Args:
            traces: of these transcripts.

        Raises:
            DataError: none of these transcripts was traced.
        """
        ids = {row.id for row in self.tokens}
        shared = [(row, score) for row, score in zip(traces.tokens, traces.scores(), strict=True) if row.id in ids]
        if not shared:
            raise DataError("None of these transcripts is in the probe's traces. Trace the same transcripts.")
        spans = [row.span(Span.THINKING) for row, _ in shared]
        fractions = [_fractions(row, np.arange(s.start, s.stop)) for (row, _), s in zip(shared, spans, strict=True)]
        scores = [score[span] for (_, score), span in zip(shared, spans, strict=True)]
        return _mean_curve(fractions, scores, BINS, 0)


def trace_early_closings(
    model: LensModel,
    readout: Readout,
    transcripts: Transcripts,
    *,
    edit: HeadEdit | EditPlan | None = None,
    every: int = 1,
    progress: Callable[[int], None] | None = None,
) -> EarlyClosings:
    """Reads what the model would have answered, had the thinking ended after each of its tokens.

    Args:
        model: the model.
        readout: fitted on this model; the answer readout says what the model would do.
        transcripts: with thinking; those without are left out and counted.
        edit: done meanwhile, such as `cs.zero(heads, scope="closing")`, which acts on the closing of each copy alone. A
            wider scope acts on the thinking too, and costs a plain pass a position.
        every: close after the first token, each `every`-th on, and the last.
        progress: called with the number of transcripts done; starts again if the path has to be changed.

    Returns:
        The logits by position. Memory is the cache of one transcript, and one pack of closings.

    Raises:
        DataError: `every` is below 1.
        SpanError: not one transcript has thinking and can be read; the message holds the first reason.
        EditError: the edit does not fit the model.
        ProbeError: the readout does not fit the model.
        ResourceError: memory runs out even with one closing at a time.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts, _ = cs.organisms.study_prompts("planted-llama", n=80)
        >>> ts = cs.judge(cs.roll_out(model, prompts, max_thinking=128, max_answer=32))
        >>> answer = cs.fit_answer_readout(model, ts.where(outcome="refused"), ts.where(outcome="complied"))
        >>> closings = cs.trace_early_closings(model, answer, ts.where(outcome="refused")[:4])
        >>> closings.settled()["refuses"].tolist()
        [True, True, True, True]
    """
    readout.check_model(model)
    if edit is not None:
        edit.check(model)
    if every < 1:
        raise DataError(f"every={every}: expected the distance between two closings in tokens, 1 or more.")
    tokens, omitted = _with_thinking(model, transcripts)
    rule = ClosingRule.of(model.tokenizer, model.template)
    places = [early_closings(row, rule, every=every) for row in tokens]
    logits, path = early_logits(model, readout, tokens, places, edit=edit, progress=progress)
    finite = [bool(np.isfinite(values).all()) for values in logits]
    broken = [
        Omission(stage=STAGE, reason="logits are NaN or infinite", id=row.id)
        for row, ok in zip(tokens, finite, strict=True)
        if not ok
    ]
    rows = [i for i, ok in enumerate(finite) if ok]
    if not rows:
        raise SpanError(
            f"The logits of all {len(tokens)} transcripts are NaN or infinite. Load the model in another dtype, such "
            "as float32."
        )
    by_id = {t.id: t for t in transcripts}
    return EarlyClosings(
        transcripts=tuple(by_id[tokens[i].id] for i in rows),
        tokens=tuple(tokens[i] for i in rows),
        positions=tuple(np.array([place.position for place in places[i]], dtype=np.int64) for i in rows),
        logits=tuple(logits[i] for i in rows),
        readout=readout.name,
        can_tell=readout.report.can_tell,
        edit=edit,
        path=path,
        tokenizer=model.tokenizer,
        omitted=(*omitted, *broken),
    )


def settled_from(logits: Float32[np.ndarray, " position"], level: float = 0.0) -> int:
    """Index from which on the logits stay on the side of `level` where the last one is.

    Example:
        >>> settled_from(np.array([2.0, -1.0, 1.0, 3.0], dtype=np.float32))
        2
    """
    refuses = logits > level
    other = np.flatnonzero(refuses != refuses[-1])
    return int(other[-1]) + 1 if len(other) else 0


def _with_thinking(
    model: LensModel, transcripts: Transcripts
) -> tuple[list[TokenizedTranscript], tuple[Omission, ...]]:
    """Tokens of transcripts that think, and what was left out; raises SpanError where nothing is left."""
    every, omitted = model.tokenize_all(transcripts)
    tokens = [row for row in every if row.span(Span.THINKING).stop > row.span(Span.THINKING).start]
    names = {row.id for row in tokens}
    reason = "no thinking, so that there is no earlier token to close after"
    empty = [Omission(stage=STAGE, reason=reason, id=row.id) for row in every if row.id not in names]
    omitted = (*omitted, *empty)
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise SpanError(
            f"None of {len(transcripts)} transcripts can be closed early: {why}. Give transcripts with thinking."
        )
    return tokens, omitted


def _fractions(row: TokenizedTranscript, positions: Int64[np.ndarray, " _"]) -> Float[np.ndarray, " _"]:
    span = row.span(Span.THINKING)
    return np.asarray((positions - span.start + 1) / (span.stop - span.start))


def _mean_curve(
    fractions: Sequence[Float[np.ndarray, " _"]], scores: Sequence[Float32[np.ndarray, " _"]], bins: int, seed: int
) -> pd.DataFrame:
    axis = np.arange(1, bins + 1) / bins
    rows = np.stack([np.interp(axis, at, score) for at, score in zip(fractions, scores, strict=True)])
    low, high = bootstrap_mean(rows, seed=seed)
    return pd.DataFrame({"fraction": axis, "mean": rows.mean(0), "ci_low": low, "ci_high": high, "n": len(rows)})


def _columns(curve: pd.DataFrame) -> dict[str, Float[np.ndarray, " _"]]:
    return {name: curve[name].to_numpy(float) for name in ("fraction", "mean", "ci_low", "ci_high", "n")}
