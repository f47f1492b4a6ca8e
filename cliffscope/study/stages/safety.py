"""Stage 7: attack success and over-refusal unedited, with the selected heads zeroed, and with random sets zeroed."""

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

MOST_FORCED = 0.1
"""Share of forced closings above which the study says so first."""
MOST_CUT = 0.1
"""Share of answers cut at their budget above which the study says so."""


class SafetyStage(Stage):
    """Generates and judges the answers of every arm on labelled test prompts."""

    name = "safety"
    version = 2
    needs = ("transcripts", "suppression")
    makes = (SAFETY, SAFETY_PAIRS, SAFETY_QUALITY, ARM_ANSWERS, ARM_LOGS, ARM_OMISSIONS)
    settings = ("judge", "harmless_judge", "controls", "system", "max_thinking", "max_answer", "temperature", "seed")

    def run(self, work: Workspace, key: str) -> StageOutputs:
        """Evaluates, or makes nothing where no head was selected."""
        selected = head_refs(work.selected_heads())
        if not selected:
            return StageOutputs()
        wanted = work.config.controls
        controls = min(wanted, count_sets(work.model.shape, selected, same_layers=True))
        notes = (
            (
                f"Safety was measured with {controls} random sets, not {wanted}: the layers of the selected heads have "
                "no more different ones.",
            )
            if controls < wanted
            else ()
        )
        report = _compare_arms(work, key, zero(selected, scope="closing"), controls)
        return StageOutputs(
            files={SAFETY: report.to_frame(), SAFETY_PAIRS: report.pairs(), SAFETY_QUALITY: report.quality()},
            findings=(Finding(topic="intervention", sentence=verdicts.of_safety(report)),),
            notes=(*notes, *_forced_note(work), *_cut_note(report, work.config.max_answer)),
            omitted=report.omitted,
        )


def _forced_note(work: Workspace) -> tuple[str, ...]:
    """Says so where much of the thinking was closed at its budget: what is cut off may be what decides."""
    closed = [bool(t.extra.get("forced_closing")) for t in work.part(Split.TEST)]
    if sum(closed) <= MOST_FORCED * len(closed):
        return ()
    return (
        f"The thinking of {sum(closed)} of {len(closed)} test transcripts was closed at its budget of "
        f"{work.config.max_thinking} tokens. Raise max_thinking before relying on these results.",
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


def _compare_arms(work: Workspace, key: str, edit: HeadEdit, controls: int) -> SafetyReport:
    config, names = work.config, arm_names(controls)
    prompts = Transcripts(t for t in work.part(Split.TEST) if t.harmful is not None)
    with work.answers(key) as answers:
        done = answers.finished_arms(names)
        if config.transcripts is None and not config.temperature:
            # Greedy answers on the same thinking are these; sampled ones are drawn anew: arms share their draws.
            done[UNEDITED] = prompts
        finished = set(done)

        def keep(name: str, transcripts: Transcripts) -> None:
            answers.keep(name, transcripts)
            finished.add(name)
            work.progress("safety", len(finished), len(names))

        return evaluate_safety(
            work.model,
            prompts,
            edit=edit,
            controls=controls,
            judge=work.judge,
            max_thinking=config.max_thinking,
            max_answer=config.max_answer,
            temperature=config.temperature,
            system=config.system,
            seed=config.seed,
            batch_size=config.batch_size,
            done=done,
            begun=answers.begun_arms(name for name in names if name not in done),
            on_arm=keep,
            on_batch=answers.keep_batch,
        )
