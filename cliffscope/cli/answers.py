"""Judging answers, evaluating an edit, and exporting an edited model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope.cli.options import (
    ClassifierOption,
    ColumnOption,
    EscapeOption,
    JsonOption,
    JudgeOption,
    ModelOption,
    OutOption,
    SeedOption,
    TemplateOption,
    TranscriptsOption,
    UrlOption,
    judge_choice,
    options_of,
)
from cliffscope.cli.program import app, say, say_table
from cliffscope.errors import DataError, EditError
from cliffscope.progress import show_progress

if TYPE_CHECKING:
    import cliffscope as cs
    from cliffscope.heads.edits import EditPlan

HeadsOption = Annotated[str, typer.Option("--heads", help="Heads to edit, such as L12H5,L14H0.")]
FactorOption = Annotated[float, typer.Option(help="Factor on the output of the heads; 0 zeroes them.")]
EditOption = Annotated[Path | None, typer.Option("--edit", help="JSON file of an edit, instead of --heads.")]


@app.command()
def judge(
    transcripts: TranscriptsOption,
    out: OutOption,
    judge: JudgeOption = "phrases",
    classifier: ClassifierOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judges the answers of transcripts and writes them as JSONL.

    Example: cliffscope judge --transcripts transcripts.jsonl --out judged.jsonl
    """
    import cliffscope as cs

    judged = cs.judge(cs.read_transcripts(transcripts), judge_choice(judge, classifier, url))
    cs.write_transcripts(judged, out)
    counts = {str(k): int(v) for k, v in judged.to_frame()["outcome"].value_counts().items()}
    say(as_json, {"out": str(out), **counts}, repr(judged), judged.omitted)


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="JSONL file with `harmful` set, or a file of prompts.")],
    out: OutOption,
    harmful: Annotated[
        bool | None,
        typer.Option(
            "--harmful/--harmless", help="Label of all prompts; by default the file's own labels, such as XSTest's."
        ),
    ] = None,
    column: ColumnOption = None,
    escape_control_tokens: EscapeOption = False,
    heads: HeadsOption = "",
    factor: FactorOption = 0.0,
    edit: EditOption = None,
    scope: Annotated[
        str, typer.Option(help="Where --heads are edited: closing, thinking or prompt (own thinking is kept), or all.")
    ] = "all",
    controls: Annotated[int, typer.Option(min=0, help="Number of size-matched random head sets.")] = 20,
    judge: JudgeOption = "phrases",
    classifier: ClassifierOption = None,
    url: UrlOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.")] = None,
    max_thinking: Annotated[int, typer.Option(min=1, help="Maximum tokens of thinking.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Maximum tokens of answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers for each prompt.")] = 1,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of prompts in a batch.")] = 64,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measures ASR and over-refusal of the unedited model, the edited model, and random head sets.

    Rerun the command to resume.

    Example: cliffscope evaluate --model ./my-model --prompts prompts.jsonl --heads L12H5,L14H0 --out safety/
    """
    import cliffscope as cs
    from cliffscope.evaluation.arms import UNEDITED, arm_names
    from cliffscope.judging.lookup import find_judge
    from cliffscope.store import open_run
    from cliffscope.study.answers import open_answers
    from cliffscope.study.artefacts import SAFETY, SAFETY_PAIRS, SAFETY_QUALITY

    change, reader = _edit(heads, factor, edit, scope), find_judge(judge_choice(judge, classifier, url))
    as_transcripts = prompts.suffix == ".jsonl" and limit is None and harmful is None and column is None
    questions = (
        cs.read_transcripts(prompts, escape_control_tokens=escape_control_tokens)
        if as_transcripts
        else cs.read_prompts(
            prompts,
            harmful=harmful,
            column=column,
            limit=limit,
            seed=seed,
            escape_control_tokens=escape_control_tokens,
        )
    )
    with (
        open_run(out, options_of(context)) as store,
        store.stage("evaluate"),
        open_answers(store, store.config) as answers,
        show_progress() as progress,
    ):
        lens = cs.load_model(model, template=template)
        names = arm_names(controls) if change else [UNEDITED]
        done = answers.finished_arms(names)
        finished = set(done)

        def keep(name: str, judged: "cs.Transcripts") -> None:
            answers.keep(name, judged)
            finished.add(name)
            progress("evaluate", len(finished), len(names))

        report = cs.evaluate_safety(
            lens,
            questions,
            edit=change,
            controls=controls,
            judge=reader,
            max_thinking=max_thinking,
            max_answer=max_answer,
            temperature=temperature,
            samples=samples,
            system=system,
            seed=seed,
            batch_size=batch_size,
            done=done,
            begun=answers.begun_arms(names),
            on_arm=keep,
            on_batch=answers.keep_batch,
        )
        for table, frame in (
            (SAFETY, report.to_frame()),
            (SAFETY_PAIRS, report.without_forced().pairs()),
            (SAFETY_QUALITY, report.quality()),
        ):
            table.write(store, frame)
    say_table(as_json, report.to_frame(), f"{report!r}, written to {out}", out, report.omitted)


@app.command()
def export(
    model: ModelOption,
    out: OutOption,
    heads: HeadsOption = "",
    factor: FactorOption = 0.0,
    edit: EditOption = None,
    why: Annotated[str, typer.Option(help="Text for the model card: how the edit was chosen.")] = "",
    measured: Annotated[
        Path | None, typer.Option(help="Run directory of study or evaluate, for the model card.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes the edited model as a checkpoint that plain transformers can load.

    Example: cliffscope export --model ./my-model --heads L12H5,L14H0 --measured safety/ --out edited/
    """
    import cliffscope as cs
    from cliffscope.store import RunStore
    from cliffscope.study.artefacts import SAFETY, SIDE_EFFECTS

    change = _edit(heads, factor, edit)
    if change is None:
        raise EditError("There is nothing to export without an edit. Pass --heads or --edit.")
    run = None if measured is None else RunStore(path=measured)
    if run is not None and not run.has(SAFETY.file):
        raise DataError(f"{measured} holds no {SAFETY.file}. Pass a run directory of study or evaluate.")
    folder = cs.export_edited(
        cs.load_model(model, template=template),
        change,
        out,
        why=why,
        safety=None if run is None else SAFETY.read(run.path),
        side_effects=SIDE_EFFECTS.read(run.path) if run and run.has(SIDE_EFFECTS.file) else None,
        overwrite=overwrite,
    )
    say(as_json, {"out": str(folder), "edit": repr(change)}, f"{change!r} of {model}, written to {folder}")


def _edit(heads: str, factor: float, path: Path | None, scope: str = "all") -> "cs.HeadEdit | EditPlan | None":
    """The edit that the options describe; None if they describe none."""
    import cliffscope as cs
    from cliffscope.heads.edits import EditPlan

    refs = [cs.HeadRef.parse(text.strip()) for text in heads.split(",") if text.strip()]
    if path is None:
        return None if not refs else cs.scale(refs, factor, scope=scope) if factor else cs.zero(refs, scope=scope)
    if refs:
        raise EditError("--heads and --edit exclude each other. Pass one of them.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EditError(
            f"No edit can be read from {path}: {error}. Expected JSON as HeadEdit.to_dict writes it."
        ) from error
    if not isinstance(data, dict):
        raise EditError(
            f"{path} holds a {type(data).__name__}, not an edit. Expected JSON as HeadEdit.to_dict writes it."
        )
    plan = EditPlan.from_dict(data)
    return plan.edits[0] if len(plan.edits) == 1 else plan
