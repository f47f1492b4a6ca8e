"""What else does an edit change?

1. KL divergence of the next-token distributions, unedited from edited, at every token that the unedited model wrote in
   transcripts (harmless ones, usually): 0 where the edit changes nothing. The transcripts' own tokens are fed, so that
   an edit acts on exactly the spans of its scope; one of the closing alone can change the answer alone, and only
   there it is measured.
2. Perplexity on given text, unedited and edited. A text has no spans: it needs an edit at all positions.
3. The same for random sets of as many heads, since any edit changes something.

Exact: every position, the whole vocabulary, plain forward passes; logits are held for as many positions at a time as
fit a fixed room. Knows edits, not how they were chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from cliffscope.errors import DataError, EditError
from cliffscope.evaluation.arms import Arm, MakeEdit, keeps_thinking, plan_arms, scope_of
from cliffscope.heads.editing import edited_everywhere, edited_hooks
from cliffscope.heads.edits import EditPlan, HeadEdit, Scope
from cliffscope.model.load import Batch, LensModel
from cliffscope.notebook import Plotted
from cliffscope.resampling import bootstrap_mean, bootstrap_ratio
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

KL, PERPLEXITY = "kl", "perplexity"
ROOM_BYTES = 256 * 2**20
"""Bytes of one array of logits; three such arrays are held."""
STAGE = "side_effects"
_COLUMNS = ["arm", "kind", "measure", "n", "value", "ci_low", "ci_high", "unit", "scope"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SideEffects(Plotted):
    """What an edit changes beside refusal."""

    frame: pd.DataFrame
    """arm, kind, measure (`kl`, `perplexity`), n, value, ci_low, ci_high, unit, scope (where the edit acts)."""
    omitted: tuple[Omission, ...]
    """Transcripts and texts that could not be used, and why."""

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def small_table(self) -> pd.DataFrame:
        """The table, arm by arm."""
        return self.frame[["arm", "measure", "n", "value", "ci_low", "ci_high", "unit"]]

    def plot(self) -> "Figure":
        """Every measure of the edit beside that of random sets."""
        from cliffscope.figures.measures import measure_panels

        measure = self.frame["measure"] + " (" + self.frame["unit"] + ")"
        arm = self.frame["arm"].where(self.frame["kind"] != "random", "random sets")
        return measure_panels(self.frame.assign(measure=measure, arm=arm), title="What else the edit changes")

    def value(self, measure: str, kind: str = "top") -> float:
        """Mean value of a measure over the arms of one kind; NaN if it was not measured."""
        rows = self.frame[(self.frame["measure"] == measure) & (self.frame["kind"] == kind)]
        return float(rows["value"].mean())

    def __repr__(self) -> str:
        """One line: each measure, edited and random."""
        measures = [
            f"{name} {self.value(name):.3g} (random {self.value(name, 'random'):.3g})"
            for name in self.frame["measure"].unique()
        ]
        return f"SideEffects({', '.join(measures)}, n={int(self.frame['n'].max()) if len(self.frame) else 0})"


def measure_side_effects(
    model: LensModel,
    edit: HeadEdit | EditPlan,
    *,
    transcripts: Transcripts = Transcripts(()),
    texts: Sequence[str] = (),
    controls: int = 5,
    control_edit: MakeEdit | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SideEffects:
    """Compares an edited model with the unedited one, token by token.

    Args:
        model: the model; every edit is undone.
        edit: of any scope. With scope `closing` the divergence is over the tokens of the answers, with any other over
            those of thinking, closing and answer.
        transcripts: that the unedited model wrote, for the divergence; harmless ones tell what normal use loses.
        texts: for the perplexity, under an edit of scope `all`; one longer than the context is cut into pieces that
            fit.
        controls: random head sets.
        control_edit: makes the same edit of other heads; None takes `edit.on`.
        seed: of sets and intervals.
        progress: called with the number of transcripts and texts done.

    Returns:
        KL in nats a token (mean over a transcript's tokens, then over transcripts, with bootstrap interval over
        transcripts) and perplexity (over all tokens, with bootstrap interval over texts).

    Raises:
        DataError: neither transcripts nor texts, or none of them can be used.
        EditError: as in `plan_arms`, texts under an edit of another scope than `all`, or values that do not fit the
            positions.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> written = cs.roll_out(model, cs.organisms.prompts("test", 4, harmful=False))
        >>> edit = cs.zero(cs.organisms.read_truth("planted-llama").planted)
        >>> cs.measure_side_effects(model, edit, transcripts=written, controls=2).value("kl") < 0.05
        True
    """
    if not len(transcripts) and not len(texts):
        raise DataError("Nothing was given to measure side effects on. Give transcripts=..., texts=..., or both.")
    arms = plan_arms(model, edit, controls=controls, control_edit=control_edit, seed=seed)
    if texts and keeps_thinking(edit):
        raise EditError(
            f"Texts have no {scope_of(edit)}, so that an edit of this scope changes nothing in them. Leave out texts, "
            "or give an edit of scope 'all'."
        )
    written, omitted = _written(model, transcripts, answers_alone=scope_of(edit) == str(Scope.CLOSING))
    read, owners, short = _read(model, texts)
    if not written and not read:
        raise DataError(f"Nothing is left to measure on: {(*omitted, *short)[0].reason}. Give other transcripts.")
    done = _Counter(progress)
    rows: list[tuple[object, ...]] = []
    if written:
        rows += _divergence_rows(model, arms, written, seed, done)
    if read:
        rows += _perplexity_rows(model, arms, read, owners, seed=seed, done=done)
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    return SideEffects(frame=frame, omitted=(*transcripts.omitted, *omitted, *short))


def divergence(
    model: LensModel, other: LensModel, transcripts: Transcripts
) -> tuple[Float[np.ndarray, " n"], tuple[Omission, ...]]:
    """KL divergence of one model's next-token distributions from another's, such as before and after training.

    Args:
        model: wrote the transcripts.
        other: with the same vocabulary.
        transcripts: with answers.

    Returns:
        [n] nats a token, one value a transcript that can be used, and why others cannot.
    """
    rows, omitted = _written(model, transcripts)
    sums = np.zeros(len(rows))
    for window in _windows(model, rows, _Counter(None)):
        plain = _log_shares(model, window, None)
        each = (plain.exp() * (plain - _log_shares(other, window, None).to(plain.device))).sum(-1)
        sums[window.rows] += window.total(each)
    return sums / np.array([len(row.ids) - row.first for row in rows]), omitted


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sequence:
    """Token ids, and from which position on they are predicted."""

    ids: list[int]
    first: int
    transcript: TokenizedTranscript | None = None
    """Whose tokens they are; None of a text."""


@dataclass(eq=False)
class _Counter:
    """Counts rows that are done."""

    progress: Callable[[int], None] | None
    count: int = 0

    def add(self, n: int) -> None:
        """Counts, and tells."""
        self.count += n
        if self.progress is not None:
            self.progress(self.count)


def _written(
    model: LensModel, transcripts: Transcripts, *, answers_alone: bool = False
) -> tuple[list[_Sequence], tuple[Omission, ...]]:
    """What the model wrote: everything behind the prompt, or the answers alone."""
    tokens, omitted = model.tokenize_all(transcripts, with_answer=True)
    last_before = Span.CLOSING if answers_alone else Span.PROMPT
    rows = [
        _Sequence(ids=[int(i) for i in t.token_ids], first=max(1, t.span(last_before).stop), transcript=t)
        for t in tokens
    ]
    empty = [row.transcript.id for row in rows if row.transcript is not None and row.first >= len(row.ids)]
    nothing = [Omission(stage=STAGE, reason="its answer has no token to measure on", id=name) for name in empty]
    return [row for row in rows if row.first < len(row.ids)], (*omitted, *nothing)


def _read(model: LensModel, texts: Sequence[str]) -> tuple[list[_Sequence], np.ndarray, tuple[Omission, ...]]:
    """Pieces of text as ids, the text that each is of, and texts too short to predict anything in."""
    pieces: list[_Sequence] = []
    owners: list[int] = []
    short = []
    context = model.shape.context
    for number, text in enumerate(texts):
        ids = [int(i) for i in model.tokenizer.encode(text)]
        if len(ids) < 2:
            short.append(Omission(stage=STAGE, reason="text of less than two tokens", id=f"text-{number + 1}"))
        cut = [ids[start : start + context] for start in range(0, len(ids), context)]
        pieces += [_Sequence(ids=piece, first=1) for piece in cut if len(piece) > 1]
        owners += [number for piece in cut if len(piece) > 1]
    return pieces, np.array(owners, dtype=int), tuple(short)


def _divergence_rows(
    model: LensModel, arms: Sequence[Arm], rows: list[_Sequence], seed: int, done: _Counter
) -> list[tuple[object, ...]]:
    sums = np.zeros((len(arms), len(rows)))
    for window in _windows(model, rows, done):
        plain = _log_shares(model, window, None)
        shares = plain.exp()
        for a, arm in enumerate(arms):
            if arm.edit is not None:
                each = (shares * (plain - _log_shares(model, window, arm.edit))).sum(-1)
                sums[a, window.rows] += window.total(each)
    lengths = np.array([len(row.ids) - row.first for row in rows])
    table: list[tuple[object, ...]] = []
    for arm, values in zip(arms, sums / lengths, strict=True):
        if arm.edit is not None:
            low, high = bootstrap_mean(values, seed=seed)
            value = (float(values.mean()), float(low), float(high))
            table.append((arm.name, arm.kind, KL, len(rows), *value, "nats a token", scope_of(arm.edit)))
    return table


def _perplexity_rows(
    model: LensModel, arms: Sequence[Arm], rows: list[_Sequence], owners: np.ndarray, *, seed: int, done: _Counter
) -> list[tuple[object, ...]]:
    sums = np.zeros((len(arms), len(rows)))
    for window in _windows(model, rows, done):
        for a, arm in enumerate(arms):
            logs = _log_shares(model, window, arm.edit)
            sums[a, window.rows] -= window.total(logs.gather(-1, window.targets[..., None])[..., 0])
    texts = np.unique(owners)
    lengths = np.array([len(row.ids) - 1 for row in rows], dtype=float)
    tokens = np.array([lengths[owners == text].sum() for text in texts])
    table: list[tuple[object, ...]] = []
    for arm, values in zip(arms, sums, strict=True):
        total = np.array([values[owners == text].sum() for text in texts])
        interval = bootstrap_ratio(total, tokens, seed=seed)
        value = np.exp([total.sum() / tokens.sum(), interval.low, interval.high]).tolist()
        table.append((arm.name, arm.kind, PERPLEXITY, len(texts), *value, "tokens", scope_of(arm.edit)))
    return table


@dataclass(frozen=True, eq=False, kw_only=True)
class _Window:
    """Some positions of some rows."""

    rows: np.ndarray
    """Which rows."""
    transcripts: tuple[TokenizedTranscript, ...]
    """What their tokens are; empty for texts."""
    batch: Batch
    """Their ids, padded."""
    where: Tensor
    """[position] the positions."""
    targets: Tensor
    """[row, position] the token that follows each."""
    counts: Tensor
    """[row, position] 1 where it is one of the row's predicted tokens, else 0."""

    def total(self, values: Float[Tensor, "row position"]) -> np.ndarray:
        """[row] sums over the positions that count."""
        return np.asarray((values * self.counts).sum(1).double().cpu().numpy())


def _windows(model: LensModel, rows: list[_Sequence], done: _Counter) -> Iterator[_Window]:
    """Rows of like length together, as many positions at once as there is room for."""
    room = max(1, ROOM_BYTES // (4 * len(model.tokenizer)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while order:
        part = [order.pop(0)]
        while order and (len(part) + 1) * len(rows[order[0]].ids) <= room:
            part.append(order.pop(0))
        batch = model.to_batch([rows[i].ids for i in part])
        first, length = (
            torch.tensor([[n] for n in counts], device=model.device)
            for counts in ([rows[i].first for i in part], [len(rows[i].ids) for i in part])
        )
        end, step = batch.ids.shape[1] - 1, max(1, room // len(part))
        for start in range(int(first.min()) - 1, end, step):
            where = torch.arange(start, min(start + step, end), device=model.device)
            counts = (where + 1 >= first) & (where + 1 < length)
            yield _Window(
                rows=np.array(part),
                transcripts=tuple(t for t in (rows[i].transcript for i in part) if t is not None),
                batch=batch,
                where=where,
                targets=batch.ids[:, where + 1],
                counts=counts.float(),
            )
        done.add(len(part))


def _log_shares(
    model: LensModel, window: _Window, edit: HeadEdit | EditPlan | None
) -> Float[Tensor, "row position vocabulary"]:
    """Log probabilities of the next token at the window's positions."""
    with _edited(model, edit, window.transcripts), torch.inference_mode():
        output = model.hf(
            input_ids=window.batch.ids,
            attention_mask=window.batch.mask,
            position_ids=window.batch.positions,
            use_cache=False,
            logits_to_keep=window.where,
        )
        return torch.log_softmax(output.logits.float(), -1)


def _edited(
    model: LensModel, edit: HeadEdit | EditPlan | None, transcripts: Sequence[TokenizedTranscript]
) -> AbstractContextManager[None]:
    if edit is None:
        return nullcontext()
    return edited_hooks(model, edit, transcripts) if keeps_thinking(edit) else edited_everywhere(model, edit)
