"""How does the refusal score run through each transcript?

1. Transcripts are tokenized up to the final position; what cannot be is left out with its reason.
2. One pass of the blocks gives the probe's logit at every token (of every layer, on request).
3. `cliffs()` measures plateau, final, cliff and drop, and says of each whether the probe can tell at those positions.

A cliff is valid only where the transcript has thinking and the probe's held-out AUROC, both over late thinking and at
the final token, has its lower bound at `CAN_TELL` or above.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import SpanError
from cliffscope.models import LensModel
from cliffscope.probing.activations import project_layer, project_residuals
from cliffscope.probing.cliff import PROMPT_BINS, THINKING_BINS, Cliff, Plateau, align_trace, measure_cliff
from cliffscope.probing.probe import RefusalProbe
from cliffscope.probing.regions import late_thinking
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import Omission, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript, tokenize_all

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "trace"
MOST_CLOSING = 8
"""Closing tokens on the common axis at most; they are counted from the end."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cliffs:
    """Plateau, final and cliff of every traced transcript."""

    frame: pd.DataFrame
    """One row a transcript: id, group, harmful, outcome, plateau_max, plateau_mean, plateau_late, final, cliff,
    drop_position, drop, drop_token, valid, reason."""
    plateau: Plateau
    """Which plateau `cliff` is measured from."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def __repr__(self) -> str:
        """One line: mean of the valid cliffs, n and plateau."""
        valid = self.frame[self.frame["valid"]]
        mean = f"{valid['cliff'].mean():.3f}" if len(valid) else "none valid"
        return f"Cliffs(mean {mean}, n={len(valid)} valid of {len(self.frame)}, plateau={self.plateau})"


@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalTraces:
    """Refusal logits of every token of every transcript."""

    transcripts: tuple[Transcript, ...]
    """The traced transcripts."""
    tokens: tuple[TokenizedTranscript, ...]
    """Their tokens and spans."""
    logits: tuple[Float32[np.ndarray, " _"], ...]
    """[pos] each: the probe's logits."""
    layer_logits: Mapping[str, Float32[np.ndarray, "layer _"]]
    """[layer, pos] by id, for the transcripts whose layers were asked for."""
    probe: RefusalProbe
    """The probe."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Turns ids into the text of single tokens."""
    omitted: tuple[Omission, ...]
    """Transcripts left out, and why."""

    def scores(self) -> list[Float32[np.ndarray, " _"]]:
        """Sigmoid of the logits, [pos] each."""
        return [expit(values) for values in self.logits]

    def to_frame(self) -> pd.DataFrame:
        """One row a token: id, position, span, token, logit, score."""
        parts = [
            pd.DataFrame(
                {
                    "id": row.id,
                    "position": np.arange(row.n_pos),
                    "span": [str(s) for s in row.labels()],
                    "token": self.token_texts(row),
                    "logit": values,
                    "score": expit(values),
                }
            )
            for row, values in zip(self.tokens, self.logits, strict=True)
        ]
        columns = ["id", "position", "span", "token", "logit", "score"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def token_texts(self, row: TokenizedTranscript) -> list[str]:
        """The text of each token on its own."""
        return [str(self.tokenizer.decode([int(i)])) for i in row.token_ids]

    def cliffs(self, *, plateau: Plateau = "mean") -> Cliffs:
        """Measures every transcript.

        Args:
            plateau: "mean" over the thinking, or "max", the paper's. The mean is the default: the maximum over many
                tokens rises with their number, so that it shows a cliff even where the score is level.

        Returns:
            One row a transcript; `valid` says whether the probe can tell there, `reason` why not.
        """
        rows = [self._cliff_row(i, plateau) for i in range(len(self.tokens))]
        return Cliffs(frame=pd.DataFrame(rows, columns=_CLIFF_COLUMNS), plateau=plateau)

    def aligned(self, groups: Mapping[str, Sequence[str]], *, seed: int = 0) -> pd.DataFrame:
        """Mean traces on a common axis.

        Args:
            groups: name to ids.
            seed: of the bootstrap.

        Returns:
            group, bin, label, span, mean, ci_low, ci_high, n; intervals are over transcripts.
        """
        columns = ["group", "bin", "label", "span", "mean", "ci_low", "ci_high", "n"]
        if not self.tokens:
            return pd.DataFrame(columns=columns)
        width = min(MOST_CLOSING, max((_length(t, Span.CLOSING) for t in self.tokens), default=1))
        index = {row.id: i for i, row in enumerate(self.tokens)}
        axis = self._axis(width)
        parts = []
        for name, ids in groups.items():
            rows = [self._align(index[i], width) for i in ids if i in index]
            if rows:
                parts.append(axis.assign(group=name, **_band(np.stack(rows), seed)))
        return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)

    def plot(self) -> "Figure":
        """Mean trace of the transcripts by group (harmful or harmless, and outcome), aligned on spans."""
        from cliffscope.figures.theme import empty_figure
        from cliffscope.figures.trace import Band, mean_trace

        groups: dict[str, list[str]] = {}
        for transcript in self.transcripts:
            groups.setdefault(group_name(transcript), []).append(transcript.id)
        if not self.tokens:
            return empty_figure("Refusal score", "no transcript was traced")
        table = self.aligned(groups)
        first = table[table["group"] == table["group"].iloc[0]]
        curves = {
            str(name): Band(
                mean=part["mean"].to_numpy(),
                low=part["ci_low"].to_numpy(),
                high=part["ci_high"].to_numpy(),
                n=part["n"].to_numpy(),
            )
            for name, part in table.groupby("group", sort=False)
        }
        return mean_trace(first["label"].tolist(), first["span"].tolist(), curves)

    def __repr__(self) -> str:
        """One line: n, layer, how many were left out."""
        return f"RefusalTraces(n={len(self.tokens)}, layer {self.probe.layer}, left out {len(self.omitted)})"

    def _cliff_row(self, i: int, plateau: Plateau) -> dict[str, object]:
        row, transcript = self.tokens[i], self.transcripts[i]
        found = cliff_of(row, self.logits[i])
        reason = why_invalid(found, self.probe)
        height = found.plateau_max if plateau == "max" else found.plateau_mean
        drop_token = self.token_texts(row)[found.drop_position] if found.drop_position >= 0 else ""
        return {
            "id": row.id,
            "group": group_name(transcript),
            "harmful": transcript.harmful,
            "outcome": str(transcript.outcome),
            "plateau_max": found.plateau_max,
            "plateau_mean": found.plateau_mean,
            "plateau_late": found.plateau_late,
            "final": found.final,
            "cliff": height - found.final,
            "drop_position": found.drop_position,
            "drop": found.drop,
            "drop_token": drop_token,
            "valid": not reason,
            "reason": reason,
        }

    def _align(self, i: int, width: int) -> np.ndarray:
        row = self.tokens[i]
        return align_trace(
            expit(self.logits[i]).astype(np.float64),
            prompt=row.span(Span.PROMPT),
            thinking=row.span(Span.THINKING),
            closing=row.span(Span.CLOSING),
            closing_width=width,
        )

    def _axis(self, width: int) -> pd.DataFrame:
        labels = [f"prompt {i + 1}/{PROMPT_BINS}" for i in range(PROMPT_BINS)]
        labels += [f"thinking {i + 1}/{THINKING_BINS}" for i in range(THINKING_BINS)]
        longest = max(self.tokens, key=lambda t: _length(t, Span.CLOSING))
        labels += self.token_texts(longest)[longest.span(Span.CLOSING)][-width:]
        spans = [Span.PROMPT] * PROMPT_BINS + [Span.THINKING] * THINKING_BINS + [Span.CLOSING] * width
        return pd.DataFrame({"bin": range(len(labels)), "label": labels, "span": [str(s) for s in spans]})


_CLIFF_COLUMNS = [
    *("id", "group", "harmful", "outcome", "plateau_max", "plateau_mean", "plateau_late", "final", "cliff"),
    *("drop_position", "drop", "drop_token", "valid", "reason"),
]


def trace_refusal(
    model: LensModel,
    probe: RefusalProbe,
    transcripts: Transcripts,
    *,
    layers_of: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> RefusalTraces:
    """Traces the refusal score through each transcript, up to the final position.

    Args:
        model: the model, edited or not.
        probe: fitted on this model.
        transcripts: with thinking, if the model thinks.
        layers_of: ids of transcripts of which every layer's trace is kept.
        progress: called with the number of transcripts done.

    Returns:
        The traces. Memory is 4 bytes a token, and a layer where layers are kept.

    Raises:
        ProbeError: the probe does not fit the model.
        SpanError: not one transcript could be traced; the message holds the first reason.
    """
    probe.check_model(model)
    tokens, omitted = tokenize_all(transcripts, model.tokenizer, model.template, max_length=model.shape.context)
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise SpanError(f"None of {len(transcripts)} transcripts can be traced: {why}. Give transcripts with thinking.")
    wanted = set(layers_of)
    deep = [t for t in tokens if t.id in wanted]
    every = project_residuals(model, deep, probe.layer_weights, probe.layer_biases) if deep else []
    read: dict[int, Float32[np.ndarray, " _"]] = {}
    for row, values in project_layer(model, tokens, probe.layer, probe.weight, probe.bias):
        read[row] = values
        if progress is not None:
            progress(len(read))
    logits = [read[row] for row in range(len(tokens))]
    finite = [bool(np.isfinite(values).all()) for values in logits]
    broken = [
        Omission(stage=STAGE, reason="residuals are NaN or infinite", id=t.id)
        for t, ok in zip(tokens, finite, strict=True)
        if not ok
    ]
    known = {t.id: t for t in transcripts}
    kept = [i for i, ok in enumerate(finite) if ok]
    return RefusalTraces(
        transcripts=tuple(known[tokens[i].id] for i in kept),
        tokens=tuple(tokens[i] for i in kept),
        logits=tuple(logits[i] for i in kept),
        layer_logits={t.id: values for t, values in zip(deep, every, strict=True)},
        probe=probe,
        tokenizer=model.tokenizer,
        omitted=(*omitted, *broken),
    )


def group_name(transcript: Transcript) -> str:
    """Harmfulness and outcome in words: "harmful, complied"."""
    words = {True: "harmful", False: "harmless", None: "unlabelled"}
    return f"{words[transcript.harmful]}, {transcript.outcome}"


def cliff_of(tokens: TokenizedTranscript, logits: Float32[np.ndarray, " _"]) -> Cliff:
    """The cliff of one transcript, from the probe's logits at its tokens."""
    late = late_thinking(tokens)
    return measure_cliff(
        expit(logits).astype(np.float64),
        thinking=tokens.span(Span.THINKING),
        late=slice(int(late[0]), int(late[-1]) + 1) if len(late) else slice(0, 0),
        final=tokens.final,
    )


def why_invalid(cliff: Cliff, probe: RefusalProbe) -> str:
    """Why a cliff may not be believed; empty where it may."""
    if np.isnan(cliff.plateau_mean):
        return "no thinking, so no plateau"
    for report in (probe.report.late_thinking, probe.report.final):
        if not report.can_tell:
            return f"the probe cannot tell at {report.region}: {report}"
    return ""


def _band(rows: Float[np.ndarray, "n bin"], seed: int) -> dict[str, np.ndarray]:
    counts = np.isfinite(rows).sum(0)
    bands = [bootstrap_mean(column[np.isfinite(column)], seed=seed) for column in rows.T]
    means = np.array(
        [column[np.isfinite(column)].mean() if n else np.nan for column, n in zip(rows.T, counts, strict=True)]
    )
    return {
        "mean": means,
        "ci_low": np.array([float(low) for low, _ in bands]),
        "ci_high": np.array([float(high) for _, high in bands]),
        "n": counts,
    }


def _length(row: TokenizedTranscript, span: Span) -> int:
    found = row.span(span)
    return int(found.stop - found.start)
