"""Stage 1: prompts become judged transcripts, split by prompt."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import pandas as pd

from cliffscope.evaluation.arms import UNEDITED
from cliffscope.generation.rollout import check_left, roll_out
from cliffscope.judging.judges import judge
from cliffscope.model.load import LensModel
from cliffscope.readouts.contrast import check_contrast
from cliffscope.study.answers import ArmAnswers
from cliffscope.study.artefacts import ARM_LOGS, TRANSCRIPT_TABLE, TRANSCRIPTS
from cliffscope.study.config import read_inputs
from cliffscope.study.stages.base import Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split, Transcripts
from cliffscope.transcripts.replies import part_answer
from cliffscope.transcripts.transcript import foreign_boundaries


class TranscriptStage(Stage):
    """Reads prompts, generates thinking and answers (or reads transcripts), judges the answers, splits by prompt."""

    name = "transcripts"
    version = 2
    needs = ()
    makes = (TRANSCRIPTS, TRANSCRIPT_TABLE, ARM_LOGS)
    settings = ("limit", "system", "max_thinking", "max_answer", "temperature", "judge", "harmless_judge", "seed")
    files = ("harmful", "harmless", "transcripts")

    def run(self, work: Workspace, key: str) -> StageOutputs:
        """Generates or reads, judges, splits."""
        config, reader, model = work.config, work.judge, work.model
        inputs = read_inputs(config)
        transcripts = inputs.transcripts
        if config.transcripts is None:
            check_contrast(transcripts, config.contrast, thinks=model.template.thinks)
            with work.answers(key) as answers:
                transcripts = judge(_roll_out(work, transcripts, answers), reader)
        elif all(t.outcome is Outcome.UNJUDGED for t in transcripts):
            transcripts = judge(transcripts, reader)
        splits = _splits(transcripts, inputs.splits, config.seed)
        return StageOutputs(
            files={TRANSCRIPTS: transcripts, TRANSCRIPT_TABLE: transcript_table(transcripts, splits)},
            omitted=transcripts.omitted,
            notes=(*_thinking_notes(transcripts, model), *_boundary_notes(transcripts, model)),
            facts={
                "model": _model_facts(model),
                "convention": {**model.template.record(), "date": model.template.date},
                "counts": count_outcomes(transcripts),
                "text_boundaries": len(foreign_boundaries(transcripts, model.tokenizer, model.template)),
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
        )
    )


def count_outcomes(transcripts: Transcripts) -> dict[str, object]:
    """Transcripts by outcome, and by group and outcome."""
    outcomes = Counter(t.outcome for t in transcripts)
    cells = Counter((str(t.group), str(t.outcome)) for t in transcripts)
    return {
        "transcripts": len(transcripts),
        **{str(outcome): outcomes[outcome] for outcome in Outcome},
        "by": [{"group": group, "outcome": outcome, "n": n} for (group, outcome), n in sorted(cells.items())],
    }


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


def _boundary_notes(transcripts: Transcripts, model: LensModel) -> list[str]:
    """How many transcripts came as text whose tokens no generation would have."""
    n = len(foreign_boundaries(transcripts, model.tokenizer, model.template))
    if not n:
        return []
    return [
        f"{n} of {len(transcripts)} transcripts came as text in which a token spans the end of the thinking: the "
        "tokens measured there are not those of any generation. Generate them here to measure generated tokens."
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
