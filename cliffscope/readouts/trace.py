"""How does the refusal score run through each transcript?

1. Transcripts are tokenized up to the final position; what cannot be is left out with its reason.
2. One pass of the blocks gives the probe's logit at every token (of every layer, on request).
3. `cliffs()` measures plateau, final, cliff and drop, and says of each whether the probe can tell at those positions.

A cliff is valid only where the transcript has thinking that the model ended itself, and the probe's held-out AUROC,
both over late thinking and at the final token, has its lower bound at `CAN_TELL` or above.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Shaped
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from cliffscope.errors import DataError, SpanError
from cliffscope.model.load import LensModel
from cliffscope.notebook import Plotted
from cliffscope.readouts.activations import Intervention, project_layer, project_residuals
from cliffscope.readouts.axis import align_row, axis_table, closing_width
from cliffscope.readouts.cliff import Cliff, Plateau, measure_cliff
from cliffscope.readouts.probe import RefusalProbe, linear_probe
from cliffscope.readouts.readout import Readout
from cliffscope.readouts.regions import late_thinking
from cliffscope.resampling import bootstrap_mean
from cliffscope.transcripts.records import FORCED, Omission, Transcript, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STAGE = "trace"
FORCED_REASON = "the thinking was closed at its budget"
"""Why a cliff is not valid: what was cut off may be what decides."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cliffs(Plotted):
    """Plateau, final and cliff of every traced transcript."""

    frame: pd.DataFrame
    """One row a transcript: id, group, harmful, outcome, plateau_max, plateau_mean, plateau_late, final, cliff,
    drop_position, drop, drop_token, valid, reason."""
    plateau: Plateau
    """Which plateau `cliff` is measured from."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """Means of the valid cliffs by group: group, n, plateau, final, cliff, ci_low, ci_high."""
        rows = []
        for name, part in self.frame[self.frame["valid"].astype(bool)].groupby("group", sort=False):
            low, high = bootstrap_mean(part["cliff"].to_numpy(float), seed=0)
            means = part[[f"plateau_{self.plateau}", "final", "cliff"]].mean().astype(float)
            rows.append((name, len(part), *means, float(low), float(high)))
        return pd.DataFrame(rows, columns=["group", "n", "plateau", "final", "cliff", "ci_low", "ci_high"])

    def plot(self) -> "Figure":
        """Plateau against final of every valid cliff, by group."""
        from cliffscope.figures.safety import plateau_final

        shown = self.frame[self.frame["valid"].astype(bool)]
        return plateau_final(
            shown[f"plateau_{self.plateau}"].to_numpy(float),
            shown["final"].to_numpy(float),
            groups=shown["group"].tolist(),
            names=shown["id"].tolist(),
        )

    def __repr__(self) -> str:
        """One line: mean of the valid cliffs, n and plateau."""
        valid = self.frame[self.frame["valid"]]
        mean = f"{valid['cliff'].mean():.3f}" if len(valid) else "none valid"
        return f"Cliffs(mean {mean}, n={len(valid)} valid of {len(self.frame)}, plateau={self.plateau})"


@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalTraces(Plotted):
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

    def aligned(
        self, groups: Mapping[str, Sequence[str]], *, closing: int | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """Mean traces on a common axis.

        Args:
            groups: name to ids.
            closing: closing tokens on the axis; None takes as many as these transcripts have, up to 8.
            seed: of the bootstrap.

        Returns:
            group, bin, label, span, mean, ci_low, ci_high, n; intervals are over transcripts.
        """
        width = closing or closing_width(self.tokens)
        index = {row.id: i for i, row in enumerate(self.tokens)}
        parts = []
        for name, ids in groups.items():
            rows = [align_row(self.tokens[index[i]], expit(self.logits[index[i]]), width) for i in ids if i in index]
            if rows:
                axis = axis_table(self.tokens, self.tokenizer, width)
                parts.append(axis.assign(group=name, **_band(np.stack(rows), seed)))
        return pd.concat(parts, ignore_index=True)[_MEAN_COLUMNS] if parts else pd.DataFrame(columns=_MEAN_COLUMNS)

    def small_table(self) -> pd.DataFrame:
        """Means of the cliffs by group, as `cliffs()` has them."""
        return self.cliffs().small_table()

    def plot(
        self,
        *,
        by: Callable[[Transcript], str] | None = None,
        further: "Mapping[str, RefusalTraces] | None" = None,
    ) -> "Figure":
        """Mean traces by group, aligned on spans.

        Args:
            by: names the group of a transcript; None takes harmfulness and outcome. Give
                `lambda t: t.source` for a curve a data set.
            further: other traces by name, such as those of the same transcripts with heads edited; a curve each.

        Raises:
            DataError: a name of `further` is that of a group.
        """
        from cliffscope.figures.trace import bands_of, mean_trace

        groups = _grouped(self.transcripts, by or group_name)
        double = sorted(set(groups) & set(further or {}))
        if double:
            raise DataError(f"further={double[0]!r}: a group has that name already. Give the traces another one.")
        width = max(closing_width(traces.tokens) for traces in (self, *(further or {}).values()))
        tables = [self.aligned(groups, closing=width)]
        for name, other in (further or {}).items():
            tables.append(other.aligned({name: [t.id for t in other.transcripts]}, closing=width))
        table = pd.concat([rows for rows in tables if len(rows)] or tables)
        return mean_trace(*bands_of(table), n=self._n_with(further or {}))

    def plot_tokens(self, transcript_id: str) -> "Figure":
        """One transcript as text, each token on a ground of its score; with a slider where its layers were kept.

        Args:
            transcript_id: of a traced transcript; `trace_refusal(layers_of=[...])` keeps its layers.

        Raises:
            DataError: no such transcript was traced.
        """
        from cliffscope.figures.tokens import token_text

        row, score = self._one(transcript_id)
        return token_text(
            self.token_texts(row),
            [str(span) for span in row.labels()],
            score,
            layers=None if len(score) > 1 else [self.probe.layer],
            probe_layer=self.probe.layer,
            title=f"Refusal score of {transcript_id}, token by token",
        )

    def plot_layers(self, transcript_id: str) -> "Figure":
        """One transcript, layer by token; the layers are there where `layers_of` named it.

        Args:
            transcript_id: of a traced transcript.

        Raises:
            DataError: no such transcript was traced, or its layers were not kept.
        """
        from cliffscope.figures.trace import layer_heat

        row, score = self._one(transcript_id)
        if transcript_id not in self.layer_logits:
            raise DataError(
                f"Only layer {self.probe.layer} of {transcript_id!r} was traced. Give its id to "
                "trace_refusal(layers_of=[...])."
            )
        labels = [str(span) for span in row.labels()]
        return layer_heat(self.token_texts(row), labels, score, probe_layer=self.probe.layer)

    def __repr__(self) -> str:
        """One line: n, layer, how many were left out."""
        return f"RefusalTraces(n={len(self.tokens)}, layer {self.probe.layer}, left out {len(self.omitted)})"

    def _n_with(self, further: "Mapping[str, RefusalTraces]") -> int:
        return len({t.id for traces in (self, *further.values()) for t in traces.transcripts})

    def _one(self, transcript_id: str) -> tuple[TokenizedTranscript, Float[np.ndarray, "layer _"]]:
        """A transcript's tokens, and its scores at every layer that was kept."""
        for row, logits in zip(self.tokens, self.logits, strict=True):
            if row.id == transcript_id:
                return row, expit(self.layer_logits.get(transcript_id, logits[None]))
        examples = ", ".join(repr(row.id) for row in self.tokens[:3])
        raise DataError(
            f"No transcript {transcript_id!r} was traced; there are {len(self.tokens)}, such as {examples}."
        )

    def _cliff_row(self, i: int, plateau: Plateau) -> dict[str, object]:
        row, transcript = self.tokens[i], self.transcripts[i]
        cliff = cliff_of(row, self.logits[i])
        reason = FORCED_REASON if transcript.extra.get(FORCED) else why_invalid(cliff, self.probe)
        height = cliff.plateau_max if plateau == "max" else cliff.plateau_mean
        drop_token = self.token_texts(row)[cliff.drop_position] if cliff.drop_position >= 0 else ""
        return {
            "id": row.id,
            "group": group_name(transcript),
            "harmful": transcript.harmful,
            "outcome": str(transcript.outcome),
            "plateau_max": cliff.plateau_max,
            "plateau_mean": cliff.plateau_mean,
            "plateau_late": cliff.plateau_late,
            "final": cliff.final,
            "cliff": height - cliff.final,
            "drop_position": cliff.drop_position,
            "drop": cliff.drop,
            "drop_token": drop_token,
            "valid": not reason,
            "reason": reason,
        }


_MEAN_COLUMNS = ["group", "bin", "label", "span", "mean", "ci_low", "ci_high", "n"]
_CLIFF_COLUMNS = [
    *("id", "group", "harmful", "outcome", "plateau_max", "plateau_mean", "plateau_late", "final", "cliff"),
    *("drop_position", "drop", "drop_token", "valid", "reason"),
]


def trace_refusal(
    model: LensModel,
    probe: Readout,
    transcripts: Transcripts,
    *,
    edit: Intervention | None = None,
    layers_of: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> RefusalTraces:
    """Traces the refusal score through each transcript, up to the final position.

    Args:
        model: the model.
        probe: a linear one, fitted on this model.
        transcripts: with thinking, if the model thinks.
        edit: done to the model meanwhile, such as `cs.zero(heads, scope="closing")`; the transcripts stay as they are.
        layers_of: ids of transcripts of which every layer's trace is kept.
        progress: called with the number of transcripts done.

    Returns:
        The traces. Memory is 4 bytes a token, and a layer where layers are kept.

    Raises:
        ProbeError: the probe does not fit the model, or the readout is no linear probe.
        SpanError: not one transcript could be traced; the message holds the first reason.
    """
    linear = linear_probe(probe, "A score at every token, thinking included, is what a probe reads.")
    linear.check_model(model)
    tokens, omitted = model.tokenize_all(transcripts)
    if not tokens:
        why = omitted[0].reason if omitted else "none was given"
        raise SpanError(f"None of {len(transcripts)} transcripts can be traced: {why}. Give transcripts with thinking.")
    deep_ids = set(layers_of)
    deep = [t for t in tokens if t.id in deep_ids]
    every = project_residuals(model, deep, linear.layer_weights, linear.layer_biases, edit=edit) if deep else []
    read: dict[int, Float32[np.ndarray, " _"]] = {}
    for row, values in project_layer(model, tokens, linear.layer, linear.weight, linear.bias, edit=edit):
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
    by_id = {t.id: t for t in transcripts}
    traced = [i for i, ok in enumerate(finite) if ok]
    return RefusalTraces(
        transcripts=tuple(by_id[tokens[i].id] for i in traced),
        tokens=tuple(tokens[i] for i in traced),
        logits=tuple(logits[i] for i in traced),
        layer_logits={t.id: values for t, values in zip(deep, every, strict=True)},
        probe=linear,
        tokenizer=model.tokenizer,
        omitted=(*omitted, *broken),
    )


def group_name(transcript: Transcript) -> str:
    """Harmfulness and outcome in words: "harmful, complied"."""
    words = {True: "harmful", False: "harmless", None: "unlabelled"}
    return f"{words[transcript.harmful]}, {transcript.outcome}"


def _grouped(transcripts: Sequence[Transcript], by: Callable[[Transcript], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for transcript in transcripts:
        groups.setdefault(str(by(transcript)), []).append(transcript.id)
    return groups


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


def _band(rows: Float[np.ndarray, "n bin"], seed: int) -> dict[str, Shaped[np.ndarray, " bin"]]:
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
