"""Stage 13, on request: the model fine-tuned on the selection, measured before and after."""

from cliffscope.model.load import load_model
from cliffscope.repairing.comparison import compare_repair
from cliffscope.repairing.finetune import repair
from cliffscope.repairing.formats import own_refusal
from cliffscope.study import verdicts
from cliffscope.study.artefacts import REPAIR, REPAIRED, SELECTED
from cliffscope.study.stages.base import Finding, Stage, StageOutputs, Workspace
from cliffscope.transcripts.records import Outcome, Split, Transcripts


class RepairStage(Stage):
    """Fine-tunes on the selection and answers the test prompts again."""

    name = "repair"
    version = 1
    needs = ("transcripts", "selection")
    makes = (REPAIR, REPAIRED)
    switch = "repair"
    settings = ("judge", "harmless_judge", "system", "max_thinking", "max_answer", "temperature", "seed")

    def run(self, work: Workspace) -> StageOutputs:
        """Repairs and measures, or says that there is nothing to train on."""
        config = work.config
        selected = SELECTED.read(work.store.path) if work.has(SELECTED) else Transcripts()
        if not len(selected):
            return StageOutputs(notes=("The model was not repaired: nothing was selected to train on.",))
        folder = work.folder(REPAIRED)
        if not folder.exists():
            # The model learns how it itself refuses.
            answer = own_refusal(work.part(Split.FIT, Split.VALIDATE, harmful=True, outcome=Outcome.REFUSED))
            harmless = work.part(Split.FIT, Split.VALIDATE, harmful=False, outcome=Outcome.COMPLIED)
            repair(work.model, selected, folder, harmless=harmless, answer=answer, seed=config.seed)
        prompts = Transcripts(t for t in work.part(Split.TEST) if t.harmful is not None)
        report = compare_repair(
            work.model,
            load_model(str(folder), template=config.template, device=config.device),
            prompts,
            judge=work.judge,
            max_thinking=config.max_thinking,
            max_answer=config.max_answer,
            temperature=config.temperature,
            system=config.system,
            seed=config.seed,
            batch_size=config.batch_size,
            answered=prompts if config.transcripts is None else None,
        )
        return StageOutputs(
            files={REPAIR: report.to_frame()},
            findings=(Finding(topic="repair", sentence=verdicts.of_repair(report, len(selected))),),
        )
