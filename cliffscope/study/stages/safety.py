"""Stage 9: attack success and over-refusal unedited, with the selected heads zeroed, and with random sets zeroed."""

from cliffscope.evaluation.arms import UNEDITED, arm_names
from cliffscope.evaluation.safety import SafetyReport, evaluate_safety
from cliffscope.heads.controls import count_sets
from cliffscope.heads.edits import HeadEdit, zero
from cliffscope.study import verdicts
from cliffscope.study.artefacts import (
    ARM_ANSWERS,
    ARM_LOGS,
    ARM_OMISSIONS,
    SAFETY,
    SAFETY_PAIRS,
    SAFETY_QUALITY,
)
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.study.stages.suppression import head_refs
from cliffscope.transcripts.records import Split, Transcripts

MOST_CUT = 0.1
"""Share of answers cut at their budget above which the study says so."""


class SafetyStage(Stage):
    """Generates and judges every arm's answers to the thinking of labelled test transcripts."""

    name = "safety"
    version = 4
    needs = ("transcripts", "suppression")
    makes = (SAFETY, SAFETY_PAIRS, SAFETY_QUALITY, ARM_ANSWERS, ARM_LOGS, ARM_OMISSIONS)
    settings = ("judge", "harmless_judge", "controls", "system", "max_thinking", "max_answer", "temperature", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Evaluates, or makes nothing where no head was selected or no thinking closed."""
        selected = head_refs(work.selected_heads())
        transcripts = Transcripts(t for t in work.part(Split.TEST) if t.harmful is not None)
        if not selected:
            return StageOutputs()
        if not any(t.closed for t in transcripts):
            reason = f"none of {len(transcripts)} labelled test transcripts has thinking that closed"
            return StageOutputs(notes=(f"Safety was not measured: {reason}.",))
        requested = work.config.controls
        controls = min(requested, count_sets(work.model.shape, selected, same_layers=True))
        notes = (
            (
                f"Safety was measured with {controls} random sets, not {requested}: the layers of the selected heads "
                "have no more different ones.",
            )
            if controls < requested
            else ()
        )
        report = _compare_arms(work, transcripts, zero(selected, scope="closing"), controls)
        return StageOutputs(
            files={
                SAFETY: report.to_frame(),
                SAFETY_PAIRS: report.without_forced().pairs(),
                SAFETY_QUALITY: report.quality(),
            },
            findings=(Finding(topic="intervention", sentence=verdicts.of_safety(report)),),
            notes=(*notes, *_cut_note(report, work.config.max_answer)),
            omitted=report.omitted,
        )


def _cut_note(report: SafetyReport, max_answer: int) -> tuple[str, ...]:
    """Says so where many answers reached their budget: a late refusal or its reversal may be what was cut off."""
    table = report.to_frame()
    cut, n = int(table["cut"].sum()), int(table["n"].sum())
    if cut <= MOST_CUT * n:
        return ()
    return (
        f"{cut} of {n} answers of all arms reached their budget of {max_answer} tokens before they ended, and were "
        "judged on what there is. Raise max_answer to see whether their outcomes hold.",
    )


def _compare_arms(work: Workspace, transcripts: Transcripts, edit: HeadEdit, controls: int) -> SafetyReport:
    config, names = work.config, arm_names(controls)
    total = len(names) * len(transcripts)
    with work.answers("safety") as answers:
        done = answers.finished_arms(names)
        if config.transcripts is None and not config.temperature:
            # Greedy answers on the same thinking are these; sampled ones are drawn anew: arms share their draws.
            done[UNEDITED] = transcripts
        begun = answers.begun_arms(name for name in names if name not in done)
        n_done = sum(len(answered) for answered in (*done.values(), *begun.values()))

        def keep_batch(name: str, batch: Transcripts) -> None:
            nonlocal n_done
            answers.keep_batch(name, batch)
            n_done += len(batch)
            work.progress("safety", n_done, total)

        return evaluate_safety(
            work.model,
            transcripts,
            edit=edit,
            controls=controls,
            judge=work.judge,
            max_answer=config.max_answer,
            temperature=config.temperature,
            seed=config.seed,
            batch_size=config.batch_size,
            done=done,
            begun=begun,
            on_arm=answers.keep,
            on_batch=keep_batch,
        )
