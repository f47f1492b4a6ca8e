"""What will the model answer, by its own next-token distribution?

1. Openings are how the model's own refusals and compliances of the fit split begin (openings.py). Their length is one
   token where first tokens separate the answers of the validate split; else the smallest whose log-odds do so as well,
   within one standard error of the AUROC, as those of the best length up to four.
2. The logit is the log-odds of the two sets of openings at the final position,

       logit = log sum over refusing openings of P(opening) - log sum over complying openings of P(opening),

   through the model's own final norm, output embedding, scaling and soft-capping (model/unembedding.py). Log
   probabilities of openings of several tokens are sums over their tokens, each read behind the tokens before it.
3. Where all openings are one token, their common normaliser cancels, and nothing but their rows of the output embedding
   is multiplied.
4. On the test split the readout is compared with judged outcomes, overall and among harmful transcripts.

The readout is what the model does and not what a classifier makes of its states: it cannot be fitted to the wrong
thing, but it knows only the openings that it was given. Knows nothing of edits or heads.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cliffscope.errors import ProbeError
from cliffscope.model.load import LensModel
from cliffscope.model.unembedding import check_unembedding, check_weights, log_normaliser, next_logits, vocabulary_size
from cliffscope.notebook import Plotted
from cliffscope.readouts.continuations import Continuations
from cliffscope.readouts.labelled import COMPLIED, REFUSED, Labelled, LabelledRow, split_by_prompt
from cliffscope.readouts.openings import (
    PURE,
    Answers,
    ByClass,
    Ids,
    Opening,
    describe,
    find_openings,
    least_alike,
    opening_of,
    read_openings,
    separation,
)
from cliffscope.readouts.readout import Readout, gather_nodes
from cliffscope.readouts.regions import FINAL
from cliffscope.readouts.reports import CAN_TELL, AnswerReport, region_report
from cliffscope.transcripts.records import Omission, Transcripts
from cliffscope.transcripts.transcript import Span, TokenizedTranscript

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_OPENING = 4
"""Tokens of an opening at the most: "I'm sorry, but" and "I can't help" are told from "I'd be happy" and "I can show"
by then, and each token costs a position a branch in a sweep."""
SEPARATES = 0.9
"""Share of the validate answers that begin with an opening of their class from which first tokens are enough."""
COVERED = 0.8
"""Share of the answers that should begin with an opening, so that the log-odds are about what the model does."""
STANDARD_ERROR = 0.05
"""Most that one standard error of the validate AUROC counts for when the length is chosen; a few transcripts would
otherwise excuse any difference."""

Steps = Bool[np.ndarray, "opening step"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerReadout(Readout, Plotted):
    """Log-odds of refusing against complying openings in the model's next-token distribution."""

    name = "answer"
    openings: tuple[Opening, ...]
    """How answers begin, refusals first."""
    layer: int
    """The last layer."""
    vocabulary: int
    """Token ids that have a logit."""
    refused_logit: float
    """Mean logit of held-out refused transcripts."""
    fingerprint: str
    """Of the model whose answers the openings are from."""
    template: str
    """Template that it was fitted with."""
    report: AnswerReport
    """What it can tell, on held-out transcripts."""
    omitted: tuple[Omission, ...] = field(default=())
    """Transcripts that were left out, and why."""
    note: str = ""
    """That it is used on another model than the one it was fitted on; "" where it is not."""

    @cached_property
    def _tree(self) -> Continuations:
        return Continuations.of(opening.token_ids[:-1] for opening in self.openings)

    @cached_property
    def _tokens(self) -> list[int]:
        """Every token whose logit is read."""
        return sorted({token for opening in self.openings for token in opening.token_ids})

    @cached_property
    def _steps(self) -> tuple[Int64[np.ndarray, "opening step"], Int64[np.ndarray, "opening step"], Steps]:
        """Where each token of each opening is read: node and column of the logits, and whether there is one."""
        longest = max(len(opening.token_ids) for opening in self.openings)
        nodes, columns = (np.zeros((len(self.openings), longest), np.int64) for _ in range(2))
        there = np.zeros((len(self.openings), longest), bool)
        for place, opening in enumerate(self.openings):
            for step, token in enumerate(opening.token_ids):
                nodes[place, step] = self._tree.node(opening.token_ids[:step]) + 1
                columns[place, step] = self._tokens.index(token)
                there[place, step] = True
        return nodes, columns, there

    @property
    def continuations(self) -> Continuations:
        """The openings less their last tokens; none where all are one token."""
        return self._tree

    def logits(self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]) -> Float[Tensor, "*batch"]:
        """Log-odds of refusing against complying openings; see `Readout.logits`."""
        logs = self._opening_logs(model, residuals)
        refuses = torch.tensor([opening.refuses for opening in self.openings], device=logs.device)
        return logs[..., refuses].logsumexp(-1) - logs[..., ~refuses].logsumexp(-1)

    def log_probabilities(
        self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]
    ) -> Float[Tensor, "*batch opening"]:
        """Log probability that the answer begins with each opening; arguments as of `Readout.logits`."""
        return self._opening_logs(model, residuals) - log_normaliser(model, residuals[..., 0, :])[..., None]

    def _opening_logs(
        self, model: LensModel, residuals: Float[Tensor, "*batch node d_model"]
    ) -> Float[Tensor, "*batch opening"]:
        """Log probabilities of the openings, short of the normaliser at the final position, which all of them share."""
        logs = next_logits(model, residuals, self._tokens)
        if len(self._tree):
            behind = log_normaliser(model, residuals[..., 1:, :])
            logs = logs - torch.cat([torch.zeros_like(behind[..., :1]), behind], -1)[..., None]
        nodes, columns, there = (torch.from_numpy(steps).to(logs.device) for steps in self._steps)
        return (logs[..., nodes, columns] * there).sum(-1)

    def check_sizes(self, model: LensModel) -> None:
        """Raises ProbeError if the model has other layers, another vocabulary or tokenizer.

        Raises UnsupportedModelError if its final norm or output embedding is quantised or offloaded.
        """
        super().check_sizes(model)
        check_weights(model)
        texts = [str(model.tokenizer.decode(list(opening.token_ids))) for opening in self.openings]
        odd = [opening.text for opening, text in zip(self.openings, texts, strict=True) if opening.text != text]
        if self.layer != model.shape.n_layers - 1 or self.vocabulary != vocabulary_size(model) or odd:
            why = (
                f"its tokens write {odd[0]!r} in another way"
                if odd
                else (f"it has {model.shape.n_layers} layers and {vocabulary_size(model):,} tokens")
            )
            raise ProbeError(
                f"The answer readout was fitted on a model of {self.layer + 1} layers and {self.vocabulary:,} tokens. "
                f"{model.name!r} is another one: {why}. Fit a readout on this model."
            )

    def to_frame(self) -> pd.DataFrame:
        """The openings with their counts, as the report has them."""
        return self.report.to_frame()

    def small_table(self) -> pd.DataFrame:
        """Held-out AUROC overall and among harmful transcripts."""
        return self.report.small_table()

    def plot(self) -> "Figure":
        """How often held-out refusals and compliances begin with each opening."""
        return self.report.plot()

    def __repr__(self) -> str:
        """One line: openings, held-out AUROC."""
        longest = max(len(opening.token_ids) for opening in self.openings)
        length = "1 token" if longest == 1 else f"up to {longest} tokens"
        return f"AnswerReadout({len(self.openings)} openings of {length}, held-out {self.report.final})"


def fit_answer_readout(
    model: LensModel,
    refused: Transcripts,
    complied: Transcripts,
    *,
    splits: Mapping[str, str] | None = None,
    openings: Mapping[str, Sequence[str | Sequence[int]]] | None = None,
    max_opening: int = MAX_OPENING,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> AnswerReadout:
    """Takes openings from a model's own answers, and reports what they tell on held-out transcripts.

    Args:
        model: the model.
        refused: transcripts that end in a refusal, with their answers.
        complied: transcripts that end in an answer; the harmful ones among them tell refusal from harmfulness.
        splits: transcript id to "fit", "validate" or "test"; None splits by prompt.
        openings: texts or token ids by class, {"refused": ["I'm sorry"], "complied": ["Sure"]}, instead of the model's
            own.
        max_opening: tokens of an opening at the most.
        seed: of the split.
        progress: called with the number of held-out transcripts read.

    Returns:
        The readout with its held-out report. `report.can_tell` says whether it may be believed.

    Raises:
        ProbeError: a class is missing from a split, all answers begin alike, or logits are not finite.
        DataError: `openings` lacks a class, or holds one without tokens or one that begins with another.
        UnsupportedModelError: the model does something else behind its last block than norm and unembed, or its output
            embedding is quantised or offloaded.

    Example:
        >>> import cliffscope as cs
        >>> model = cs.load_model("planted-llama")
        >>> prompts, _ = cs.organisms.study_prompts("planted-llama", n=80)
        >>> ts = cs.judge(cs.roll_out(model, prompts, max_thinking=128, max_answer=32))
        >>> answer = cs.fit_answer_readout(model, ts.where(outcome="refused"), ts.where(outcome="complied"))
        >>> answer.report.can_tell
        True
    """
    if max_opening < 1:
        raise ProbeError(f"max_opening={max_opening}: an opening has at least one token. Give 1 or more.")
    groups = {REFUSED: refused, COMPLIED: complied}
    fewest = {"fit": int(openings is None), "validate": int(openings is None), "test": 1}
    labelled = Labelled.build(
        model, groups, splits or split_by_prompt(groups, seed=seed), fewest=fewest, with_answer=True
    )
    first = labelled.part("test")[0][0]
    check_unembedding(model, first.token_ids[: first.final + 1].tolist())
    by_class, separated = _choose(model, labelled, openings, max_opening)
    draft = _without_report(model, by_class, labelled.omitted)
    test = labelled.part("test")
    logits, mass = _read(model, draft, [tokens for tokens, _ in test], progress)
    refuses = np.array([kind == REFUSED for _, kind in test])
    return replace(
        draft,
        report=_report(draft, labelled, separated, logits, mass),
        refused_logit=float(logits[refuses].mean()),
    )


def _choose(
    model: LensModel,
    labelled: Labelled,
    openings: Mapping[str, Sequence[str | Sequence[int]]] | None,
    longest: int,
) -> tuple[ByClass, float]:
    """Openings by class, and the share of the validate answers that begin with one of their own class."""
    fit, validate = (_answers(labelled.part(split)) for split in ("fit", "validate"))
    if openings is not None:
        by_class = read_openings(openings, model.tokenizer, vocabulary_size(model))
        return by_class, separation(by_class, validate)
    by_length = [find_openings(fit, length) for length in range(1, longest + 1)]
    candidates = [by_class for by_class in by_length if all(by_class.values())]
    if not candidates:
        by_class = least_alike(fit, longest)
    elif separation(candidates[0], validate) >= SEPARATES:
        by_class = candidates[0]
    else:
        by_class = _shortest(model, labelled, candidates)
    return by_class, separation(by_class, validate)


def _shortest(model: LensModel, labelled: Labelled, candidates: Sequence[ByClass]) -> ByClass:
    """The first candidate whose log-odds separate the validate split as well as those of the best."""
    rows = labelled.part("validate")
    answers = [answer for group in _answers(rows).values() for answer in group]
    shares = [_covered(by_class, answers) for by_class in candidates]
    least = min(COVERED, max(shares))
    enough = [by_class for by_class, share in zip(candidates, shares, strict=True) if share >= least]
    refuses = np.array([kind == REFUSED for _, kind in rows])
    reports = []
    for by_class in enough:
        logits, _ = _read(model, _without_report(model, by_class, ()), [tokens for tokens, _ in rows], None)
        reports.append(region_report(FINAL, logits[refuses], logits[~refuses]))
    best = max(reports, key=lambda report: report.auroc)
    error = min((best.auroc - best.interval.low) / 1.96, STANDARD_ERROR)
    return next(by_class for by_class, r in zip(enough, reports, strict=True) if r.auroc >= best.auroc - error)


def _covered(by_class: ByClass, answers: Sequence[Ids]) -> float:
    """Share of answers that begin with one of the openings."""
    every = [*by_class[REFUSED], *by_class[COMPLIED]]
    return sum(opening_of(answer, every) is not None for answer in answers) / len(answers)


def _answers(rows: Sequence[LabelledRow]) -> Answers:
    """Token ids of the answers by class."""
    answers: dict[str, list[Ids]] = {REFUSED: [], COMPLIED: []}
    for tokens, kind in rows:
        answers[kind].append(tuple(tokens.token_ids[tokens.span(Span.ANSWER)].tolist()))
    return answers


def _without_report(model: LensModel, by_class: ByClass, omitted: tuple[Omission, ...]) -> AnswerReadout:
    """The readout before it has been compared with anything."""
    nothing = region_report(FINAL, np.zeros(0), np.zeros(0))
    unknown = dict.fromkeys(("separation", "covered", "mass"), float("nan"))
    return AnswerReadout(
        openings=describe(by_class, model.tokenizer),
        layer=model.shape.n_layers - 1,
        vocabulary=vocabulary_size(model),
        refused_logit=float("nan"),
        fingerprint=model.fingerprint,
        template=model.template.name,
        report=AnswerReport(final=nothing, within_harmful=nothing, openings=pd.DataFrame(), warnings=(), **unknown),
        omitted=omitted,
    )


def _read(
    model: LensModel,
    readout: AnswerReadout,
    transcripts: Sequence[TokenizedTranscript],
    progress: Callable[[int], None] | None,
) -> tuple[Float32[np.ndarray, " transcript"], Float32[np.ndarray, " transcript"]]:
    """Log-odds, and the probability of any opening; raises ProbeError where they are not finite."""
    logits, mass = (np.zeros(len(transcripts), np.float32) for _ in range(2))
    for batch, residuals in gather_nodes(model, readout, transcripts, progress=progress):
        with torch.inference_mode():
            logits[batch] = readout.logits(model, residuals).cpu().numpy()
            mass[batch] = readout.log_probabilities(model, residuals).logsumexp(-1).exp().cpu().numpy()
    if not np.isfinite(logits).all():
        bad = transcripts[int(np.flatnonzero(~np.isfinite(logits))[0])]
        raise ProbeError(
            f"The log-odds of transcript {bad.id!r} are not finite. Load the model in another dtype, such as float32."
        )
    return logits, mass


def _report(
    readout: AnswerReadout,
    labelled: Labelled,
    separated: float,
    logits: Float32[np.ndarray, " transcript"],
    mass: Float32[np.ndarray, " transcript"],
) -> AnswerReport:
    test = labelled.part("test")
    refuses = np.array([kind == REFUSED for _, kind in test])
    harmful = np.array([labelled.transcripts[tokens.id].harmful is True for tokens, _ in test])
    final = region_report(FINAL, logits[refuses], logits[~refuses])
    table = _table(readout, _answers(labelled.part("fit")), _answers(test))
    covered = float(table[["test_refused", "test_complied"]].to_numpy().sum() / len(test))
    return AnswerReport(
        final=final,
        within_harmful=region_report("final, harmful only", logits[refuses & harmful], logits[~refuses & harmful]),
        openings=table,
        separation=separated,
        covered=covered,
        mass=float(mass.mean()),
        warnings=_warnings(separated, covered, can_tell=final.can_tell),
    )


def _table(readout: AnswerReadout, fit: Answers, test: Answers) -> pd.DataFrame:
    """One row an opening, with the answers of the fit and the test split that begin with it."""
    every = [opening.token_ids for opening in readout.openings]
    counts = {
        f"{name}_{kind}": Counter(opening_of(answer, every) for answer in answers[kind])
        for name, answers in (("fit", fit), ("test", test))
        for kind in (REFUSED, COMPLIED)
    }
    return pd.DataFrame(
        {
            "class": [opening.kind for opening in readout.openings],
            "opening": [opening.text for opening in readout.openings],
            "tokens": [len(opening.token_ids) for opening in readout.openings],
            "token_ids": [list(opening.token_ids) for opening in readout.openings],
            **{name: [count[ids] for ids in every] for name, count in counts.items()},
        }
    )


def _warnings(separated: float, covered: float, *, can_tell: bool) -> tuple[str, ...]:
    warnings = []
    if separated < PURE:
        warnings.append(
            f"Only {separated:.0%} of the validate answers begin with an opening of their own class: refusals and "
            "compliances of this model cannot be told apart by how they begin. Allow longer openings, or use a probe."
        )
    if covered < COVERED:
        warnings.append(
            f"Only {covered:.0%} of the held-out answers begin with one of the openings, so that the log-odds leave "
            "out much of what the model does."
        )
    if not can_tell:
        warnings.append(
            "The readout cannot tell refused from complied held-out transcripts: the lower bound of its AUROC is "
            f"below {CAN_TELL}."
        )
    return tuple(warnings)
