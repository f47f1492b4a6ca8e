"""Did the model refuse, comply, or not finish?

1. A transcript without an answer is unfinished, and a degenerate answer unjudged; no judge is asked about either.
2. A judge reads the prompt and the answer, never the thinking: thinking within an answer is split off, and an answer
   from which it cannot be told apart stays unjudged. The default is `PhraseJudge`: deterministic, offline, and checked
   against labelled answers. lookup.py finds other judges by name.
3. An answer that was cut at its budget is judged on what there is, and the reason says so.
4. An answer that the judge fails on stays unjudged, with an omission that gives the reason. No transcript is lost.
5. `judge_agreement` compares two judges, or a judge with human labels.

This file does not know how the answers were generated.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cliffscope.errors import CliffScopeError, DataError, JudgeError
from cliffscope.judging.degenerate import degeneration
from cliffscope.judging.lookup import find_judge
from cliffscope.judging.phrase_judge import OPENING_CHARACTERS, PhraseJudge
from cliffscope.judging.protocols import BatchJudge, GroupJudges, HarmJudge, Judge, Verdict
from cliffscope.stats import Interval, cohen_kappa
from cliffscope.text import is_unicode
from cliffscope.transcripts.records import CUT, Group, Omission, Outcome, Transcript, Transcripts
from cliffscope.transcripts.replies import SERVER_REFUSAL, Parts, part_answer, part_turn

__all__ = [
    "OPENING_CHARACTERS",
    "Agreement",
    "BatchJudge",
    "HarmJudge",
    "Judge",
    "PhraseJudge",
    "Verdict",
    "agreement",
    "judge",
    "judge_agreement",
]

logger = logging.getLogger(__name__)

CUT_NOTE = " (answer cut at its budget)"
"""Ends the reason of a verdict on an answer that may have gone on."""

_FAILURES = (CliffScopeError, ArithmeticError, LookupError, OSError, RuntimeError, ValueError)


def judge(transcripts: Transcripts, judge: Judge | str = "phrases") -> Transcripts:
    """Gives every transcript an outcome, replacing any that it has.

    Args:
        transcripts: with answers. The judge does not see the thinking.
        judge: reads the answers; a name or an object, see `find_judge`. The default needs no model and no network.

    Returns:
        The same transcripts in the same order, with `outcome` and `extra["verdict"]` (judge, reason, score, partial).
        Thinking within an answer that came as text is moved out of it. Transcripts whose thinking never closed, or
        whose answer is missing or blank, are unfinished. Degenerate answers (no words, one phrase over and over) are
        unjudged, whatever the judge: a guard would call them safe. Those that the judge fails on, and those from which
        thinking cannot be told apart, are unjudged and also listed in `omitted`, as are answers to harmless prompts if
        the judge classifies harm rather than refusal.

    Raises:
        DataError: there is no such judge.
        JudgeError: the judge returned something other than a `Verdict`.
        ServerError: the judge's server cannot be reached, and nothing was judged.

    Example:
        >>> from cliffscope.transcripts.records import Message
        >>> question = (Message(role="user", content="How do I bake bread?"),)
        >>> judge(Transcripts([Transcript(id="a", messages=question, answer="Mix flour and water.")]))[0].outcome.value
        'complied'
    """
    reader = find_judge(judge)
    transcripts = transcripts.map(_parted)
    verdicts: dict[str, Verdict | Omission] = {t.id: v for t in transcripts if (v := _unreadable(t)) is not None}
    for single, answered in _by_judge(reader, [t for t in transcripts if t.id not in verdicts]):
        verdicts |= _ask_all(single, answered)
    judged: list[Transcript] = []
    failures: list[Omission] = []
    for transcript in transcripts:
        verdict = verdicts[transcript.id]
        if isinstance(verdict, Omission):
            failures.append(verdict)
            verdict = Verdict(outcome=Outcome.UNJUDGED, score=None, reason=verdict.reason)
        judged.append(_with_verdict(transcript, verdict, _judge_of(reader, transcript).name))
    if failures:
        logger.warning("Judge %s left %d of %d answers unjudged.", reader.name, len(failures), len(judged))
    return Transcripts(judged, omitted=(*transcripts.omitted, *failures))


@dataclass(frozen=True, eq=False, kw_only=True)
class Agreement:
    """How far two judges agree on the same answers."""

    kappa: float
    """Cohen's kappa in [-1, 1], the agreement beyond chance; NaN if both judges use a single outcome."""
    interval: Interval
    """95% interval of kappa."""
    observed: float
    """Share of answers with the same outcome; NaN without answers."""
    n: int
    """Number of answers."""
    counts: Mapping[tuple[Outcome, Outcome], int]
    """Answers by (first judge's outcome, second judge's outcome)."""

    def __repr__(self) -> str:
        """One line: kappa, interval, n."""
        bounds = f"[{self.interval.low:.2f}, {self.interval.high:.2f}]"
        return f"Agreement(kappa {self.kappa:.2f} {bounds}, same {self.observed:.2f}, n={self.n})"


def agreement(a: Sequence[Outcome], b: Sequence[Outcome], *, level: float = 0.95) -> Agreement:
    """Compares two judges' outcomes of the same answers.

    Args:
        a: outcomes by the first judge, or human labels.
        b: outcomes by the second judge, in the same order. Every outcome counts, including `unjudged`: the judges
            differ on an answer that only one of them could read.
        level: confidence level of the interval.

    Returns:
        Kappa with its interval, and the table of counts.

    Raises:
        DataError: the two sequences differ in length.

    Source:
        Cohen, Educational and Psychological Measurement 20 (1960); interval as in `stats.cohen_kappa`.

    Example:
        >>> agreement([Outcome.REFUSED, Outcome.COMPLIED], [Outcome.REFUSED, Outcome.COMPLIED]).kappa
        1.0
    """
    if len(a) != len(b):
        raise DataError(
            f"The judges gave {len(a)} and {len(b)} outcomes. Expected one from each judge for every answer, in the "
            "same order."
        )
    counts = Counter((Outcome(x), Outcome(y)) for x, y in zip(a, b, strict=True))
    table = np.array([[counts[row, column] for column in Outcome] for row in Outcome])
    kappa, interval = cohen_kappa(table, level=level)
    observed = float(np.trace(table) / len(a)) if len(a) else float("nan")
    return Agreement(kappa=kappa, interval=interval, observed=observed, n=len(a), counts=dict(counts))


def judge_agreement(
    transcripts: Transcripts, first: Judge | str, second: Judge | str | None = None, *, level: float = 0.95
) -> Agreement:
    """Compares two judges, or a judge with labels, on the same answers.

    Transcripts without an answer are left out: no judge reads them, so two judges would trivially agree on them.

    Args:
        transcripts: with answers; to compare with labels, with outcomes.
        first: one judge; a name or an object, see `find_judge`.
        second: another judge; None compares with the outcomes of the transcripts, such as human labels.
        level: confidence level of the interval.

    Returns:
        Kappa with its interval, and the table of counts.

    Raises:
        DataError: there is no such judge, or `second` is None and a finished transcript has no label.
        JudgeError: a judge returned something other than a `Verdict`.
        ServerError: a judge's server cannot be reached.

    Example:
        >>> from cliffscope.transcripts.records import Message
        >>> question = (Message(role="user", content="How do I bake bread?"),)
        >>> labelled = Transcript(id="a", messages=question, answer="Mix flour.", outcome=Outcome.COMPLIED)
        >>> judge_agreement(Transcripts([labelled]), "phrases").observed
        1.0
    """
    readers = find_judge(first), None if second is None else find_judge(second)
    finished = Transcripts(t for t in transcripts if _unfinished(t) is None)
    other = finished if readers[1] is None else judge(finished, readers[1])
    unlabelled = [t.id for t in other if t.outcome not in (Outcome.REFUSED, Outcome.COMPLIED)]
    if second is None and unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(finished)} finished transcripts, such as {unlabelled[0]!r}, are labelled "
            "neither refused nor complied. Label them, drop them, or pass a second judge."
        )
    return agreement([t.outcome for t in judge(finished, readers[0])], [t.outcome for t in other], level=level)


def _by_judge(judge: Judge, transcripts: Sequence[Transcript]) -> list[tuple[Judge, list[Transcript]]]:
    """Each judge with the transcripts whose answers it reads."""
    if not isinstance(judge, GroupJudges):
        return [(judge, list(transcripts))]
    return [(judge.of(group), [t for t in transcripts if t.group is group]) for group in Group]


def _judge_of(judge: Judge, transcript: Transcript) -> Judge:
    """The judge that reads a transcript's answer."""
    return judge.of(transcript.group) if isinstance(judge, GroupJudges) else judge


def _parted(transcript: Transcript) -> Transcript:
    """The transcript with thinking moved out of its answer, unless it was generated here: generated ids are kept."""
    return transcript if transcript.answer_ids is not None else part_turn(transcript)


def _judged(transcript: Transcript) -> str:
    """What a judge reads."""
    return _parts(transcript).answer or ""


def _parts(transcript: Transcript) -> Parts:
    return part_answer(transcript.answer or "", thinking=transcript.thinking or "")


def _unfinished(transcript: Transcript) -> Verdict | None:
    """The verdict on a transcript without an answer; None if it has one."""
    reasons = (
        (not transcript.closed, "thinking never closed"),
        (transcript.answer is None, "no answer"),
        (not (transcript.answer or "").strip(), "blank answer"),
    )
    for unfinished, reason in reasons:
        if unfinished:
            return Verdict(outcome=Outcome.UNFINISHED, score=None, reason=reason)
    return None


def _unreadable(transcript: Transcript) -> Verdict | None:
    """The verdict on a transcript that no judge is asked about; None if one is."""
    unfinished = _unfinished(transcript)
    answer = _parts(transcript).answer
    # Thinking that cannot be told apart is a reason of its own.
    fault = None if unfinished is not None or answer is None else degeneration(answer)
    return unfinished if fault is None else Verdict(outcome=Outcome.UNJUDGED, score=None, reason=fault)


def _ask_all(judge: Judge, transcripts: Sequence[Transcript]) -> dict[str, Verdict | Omission]:
    """The judge's verdict by id, or why there is none."""
    results: dict[str, Verdict | Omission] = {}
    readable: list[Transcript] = []
    for transcript in transcripts:
        if (parts := _parts(transcript)).answer is None:
            results[transcript.id] = Omission(stage="judge", reason=parts.reason, id=transcript.id)
        elif SERVER_REFUSAL in transcript.extra:
            reason = "the server gave its refusal in a field of its own"
            results[transcript.id] = Verdict(outcome=Outcome.REFUSED, score=1.0, reason=reason)
        elif isinstance(judge, HarmJudge) and judge.harmful_only and transcript.harmful is False:
            reason = f"{judge.name} classifies harm, not refusal, so it cannot judge answers to harmless prompts"
            results[transcript.id] = Omission(stage="judge", reason=reason, id=transcript.id)
        else:
            readable.append(transcript)
    if isinstance(judge, BatchJudge):
        verdicts = judge.judge_many([(t.prompt, _judged(t)) for t in readable])
        if len(verdicts) != len(readable):
            raise JudgeError(
                f"Judge {judge.name!r} returned {len(verdicts)} verdicts for {len(readable)} answers. Expected one for "
                "each answer, in order."
            )
        return results | {t.id: _checked(judge, t, v) for t, v in zip(readable, verdicts, strict=True)}
    return results | {t.id: _ask(judge, t) for t in readable}


def _ask(judge: Judge, transcript: Transcript) -> Verdict | Omission:
    try:
        verdict: object = judge(transcript.prompt, _judged(transcript))
    except _FAILURES as error:
        verdict = error
    return _checked(judge, transcript, verdict)


def _checked(judge: Judge, transcript: Transcript, verdict: object) -> Verdict | Omission:
    """The verdict, or why there is none. Any other value is a bug in the judge."""
    if isinstance(verdict, _FAILURES):
        reason = f"{judge.name} failed: {type(verdict).__name__}: {verdict}"
        return Omission(stage="judge", reason=reason, id=transcript.id)
    if not isinstance(verdict, Verdict):
        raise JudgeError(
            f"Judge {judge.name!r} returned {type(verdict).__name__} for {transcript.id!r}: expected a Verdict. "
            "Return Verdict(outcome=..., score=..., reason=...)."
        )
    if not is_unicode(verdict.reason):
        reason = f"{judge.name} gave a reason that holds half of a surrogate pair, which no file accepts"
        return Omission(stage="judge", reason=reason, id=transcript.id)
    return verdict


def _with_verdict(transcript: Transcript, verdict: Verdict, name: str) -> Transcript:
    """The transcript with its outcome, and the verdict in `extra`."""
    record: dict[str, object] = {
        "judge": name,
        "reason": f"{verdict.reason}{CUT_NOTE}" if transcript.extra.get(CUT) else verdict.reason,
        "score": verdict.score,
        "partial": verdict.partial,
    }
    return transcript.replace(outcome=verdict.outcome, extra={**transcript.extra, "verdict": record})
