"""Stage 1: prompts become judged transcripts, split by prompt."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import pandas as pd
from scipy.stats import fisher_exact

from cliffscope.evaluation.arms import UNEDITED
from cliffscope.generation.rollout import check_left, roll_out
from cliffscope.judging.judges import judge
from cliffscope.model.load import LensModel
from cliffscope.readouts.contrast import check_contrast
from cliffscope.study import verdicts
from cliffscope.study.answers import ArmAnswers
from cliffscope.study.artefacts import ARM_LOGS, TRANSCRIPT_TABLE, TRANSCRIPTS
from cliffscope.study.config import read_inputs
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.boundaries import foreign_boundaries
from cliffscope.transcripts.control_tokens import find_control_tokens, is_escaped
from cliffscope.transcripts.records import FORCED, Outcome, Split, Transcripts
from cliffscope.transcripts.replies import part_answer

SWAPPED_P = 0.01
"""Below this p, harmless prompts are refused more often than harmful ones."""
log = logging.getLogger(__name__)


class TranscriptStage(Stage):
    """Reads prompts, generates thinking and answers (or reads transcripts), judges the answers, splits by prompt."""

    name = "transcripts"
    version = 3
    needs = ()
    makes = (TRANSCRIPTS, TRANSCRIPT_TABLE, ARM_LOGS)
    settings = (
        *("column", "harmless_column", "escape_control_tokens", "limit", "system", "max_thinking", "max_answer"),
        *("temperature", "judge", "harmless_judge", "seed"),
    )
    files = ("harmful", "harmless", "transcripts")

    def run(self, work: Workspace) -> StageOutputs:
        """Generates or reads, judges, splits."""
        config, reader, model = work.config, work.judge, work.model
        inputs = read_inputs(config)
        transcripts = inputs.transcripts
        if config.transcripts is None:
            check_contrast(transcripts, config.contrast, thinks=model.template.thinks)
            with work.answers(self.name) as answers:
                transcripts = judge(_roll_out(work, transcripts, answers), reader)
        elif all(t.outcome is Outcome.UNJUDGED for t in transcripts):
            transcripts = judge(transcripts, reader)
        splits = _splits(transcripts, inputs.splits, config.seed)
        forced = sum(bool(t.extra.get(FORCED)) for t in transcripts)
        budget = config.max_thinking if config.transcripts is None else None
        sentence = verdicts.of_forced(forced, len(transcripts), budget)
        foreign = len(foreign_boundaries(transcripts, model.tokenizer, model.template))
        return StageOutputs(
            files={TRANSCRIPTS: transcripts, TRANSCRIPT_TABLE: transcript_table(transcripts, splits)},
            findings=(Finding(topic="forced", sentence=sentence),) if sentence else (),
            notes=_notes(transcripts, model, foreign),
            omitted=transcripts.omitted,
            facts={
                "model": _model_facts(model),
                "convention": {**model.template.record(), "date": model.template.date},
                "counts": count_outcomes(transcripts),
                "text_boundaries": foreign,
            },
        )


def transcript_table(transcripts: Transcripts, splits: Mapping[str, Split]) -> pd.DataFrame:
    """One row per transcript with its split; n_pos counts generated tokens."""
    return (
        transcripts.to_frame()
        .drop(columns="closed")
        .assign(
            split=[str(splits[t.id]) for t in transcripts],
            n_pos=[len(t.thinking_ids or ()) + len(t.answer_ids or ()) for t in transcripts],
            forced=[bool(t.extra.get(FORCED)) for t in transcripts],
        )
    )


def count_outcomes(transcripts: Transcripts) -> dict[str, object]:
    """Transcripts by outcome, and by group and outcome; `forced` are those whose thinking was closed at its budget."""
    outcomes = Counter(t.outcome for t in transcripts)
    cells = Counter((str(t.group), str(t.outcome)) for t in transcripts)
    forced = Counter((str(t.group), str(t.outcome)) for t in transcripts if t.extra.get(FORCED))
    return {
        "transcripts": len(transcripts),
        **{str(outcome): outcomes[outcome] for outcome in Outcome},
        "forced": forced.total(),
        "by": [
            {"group": group, "outcome": outcome, "n": n, "forced": forced[group, outcome]}
            for (group, outcome), n in sorted(cells.items())
        ],
    }


def _notes(transcripts: Transcripts, model: LensModel, foreign: int) -> tuple[str, ...]:
    """What to look at before any number is believed; `foreign` transcripts end thinking as no generation does."""
    notes = [note for note in (suspect_swapped(transcripts),) if note is not None]
    changed = sum(1 for t in transcripts if not is_escaped(t) and find_control_tokens(t, model.tokenizer))
    if changed:
        notes.append(
            f"{changed} of {len(transcripts)} prompts hold control tokens of this tokenizer as text, which the model "
            "reads as real ones. escape_control_tokens=True (--escape-control-tokens) keeps them text."
        )
    notes += _thinking_notes(transcripts, model)
    if foreign:
        notes.append(
            f"{foreign} of {len(transcripts)} transcripts came as text in which a token spans the end of the thinking: "
            "the tokens measured there are not those of any generation. Generate them here to measure generated tokens."
        )
    for note in notes:
        log.warning(note)
    return tuple(notes)


def suspect_swapped(transcripts: Transcripts) -> str | None:
    """Says so if harmless prompts are refused more than harmful ones, as when the two files are swapped.

    Args:
        transcripts: judged, with labels of harm.

    Returns:
        The counts and what to check; None if the difference may be chance (Fisher's exact test, one-sided, .01).
    """
    counts = Counter((t.harmful, t.outcome) for t in transcripts)
    table = [[counts[side, outcome] for outcome in (Outcome.REFUSED, Outcome.COMPLIED)] for side in (False, True)]
    if fisher_exact(table, alternative="greater").pvalue >= SWAPPED_P:
        return None
    (harmless, harmless_complied), (harmful, harmful_complied) = table
    return (
        f"Check the files: {harmful} of {harmful + harmful_complied} harmful prompts were refused, and {harmless} of "
        f"{harmless + harmless_complied} harmless ones. Are the two swapped?"
    )


def _roll_out(work: Workspace, prompts: Transcripts, answers: ArmAnswers) -> Transcripts:
    config = work.config
    transcripts = roll_out(
        work.model,
        prompts,
        max_thinking=config.max_thinking,
        max_answer=config.max_answer,
        temperature=config.temperature,
        system=config.system,
        seed=config.seed,
        batch_size=config.batch_size,
        done=answers.begun(UNEDITED),
        on_batch=partial(answers.keep_batch, UNEDITED),
        progress=work.counter("transcripts", len(prompts)),
    )
    check_left(transcripts)
    return transcripts


def _splits(transcripts: Transcripts, fixed: Mapping[str, Split], seed: int) -> dict[str, Split]:
    """Split of each transcript: the one it was given, or a side of its prompt."""
    parts = transcripts.split(seed=seed)
    sides = {t.id: Split(name) for name, part in parts.items() for t in part}
    if not fixed:
        return sides
    # A fixed test half leaves nothing else to test on: what would be tested is fitted on.
    spare = {Split.TEST: Split.FIT}
    return {name: fixed.get(name, spare.get(side, side)) for name, side in sides.items()}


def _thinking_notes(transcripts: Transcripts, model: LensModel) -> list[str]:
    """What to do where the answers of a model without thinking hold some."""
    n = sum(bool(part_answer(t.answer or "").reason) for t in transcripts)
    if model.template.thinks or not n:
        return []
    return [
        f"{n} of {len(transcripts)} answers hold thinking, although template {model.template.name!r} has none; judges "
        "read the answers without it, but the closing is not where thinking ends. Run `cliffscope template --model "
        f"{model.name} --learn --save my.json`, then the study with --template my.json."
    ]


def _model_facts(model: LensModel) -> dict[str, object]:
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "template": model.template.name,
        **{name: value for name, value in asdict(model.shape).items() if name != "context"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
