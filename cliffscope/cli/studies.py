"""Complete studies, from a model and prompts to a report."""

import shlex
import sys
import time
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
    UrlOption,
    judge_choice,
    one_of,
)
from cliffscope.cli.program import app, say
from cliffscope.progress import show_progress

if TYPE_CHECKING:
    from cliffscope.study.config import StudyConfig


@app.command()
def demo(out: OutOption = Path("runs/demo"), seed: SeedOption = 0, as_json: JsonOption = False) -> None:
    """Studies the organism planted-llama, whose suppression heads are known.

    Example: cliffscope demo --out runs/demo
    """
    from cliffscope.study.config import StudyConfig

    config = StudyConfig(
        model="planted-llama", out=str(out), max_thinking=128, max_answer=32, temperature=1.0, seed=seed
    )
    _run_study(config, until=None, only=None, as_json=as_json)


@app.command()
def study(
    model: ModelOption,
    out: OutOption,
    harmful: Annotated[
        Path | None, typer.Option(help="File of harmful prompts (csv, json, jsonl, txt, parquet).")
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="File of harmless prompts.")] = None,
    transcripts: Annotated[Path | None, typer.Option(help="JSONL file of transcripts, instead of prompts.")] = None,
    column: ColumnOption = None,
    harmless_column: Annotated[
        str | None, typer.Option(help="Column of the harmless prompts, if it has another name.")
    ] = None,
    escape_control_tokens: EscapeOption = False,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts from each file.")] = None,
    max_thinking: Annotated[int, typer.Option(min=1, help="Maximum tokens of thinking.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Maximum tokens of answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    judge: JudgeOption = "phrases",
    classifier: ClassifierOption = None,
    url: UrlOption = None,
    harmless_judge: Annotated[
        str | None,
        typer.Option(help="Judge of answers to harmless prompts, if another; as --judge."),
    ] = None,
    positions: Annotated[str, typer.Option(help="Probe positions: balanced or final.")] = "balanced",
    contrast: Annotated[str, typer.Option(help="Complied class of the probe: auto, harmless or harmful.")] = "auto",
    plateau: Annotated[str, typer.Option(help="Plateau: mean or max.")] = "mean",
    readout: Annotated[
        str, typer.Option(help="What heads are measured by: answer, probe or package.module:name.")
    ] = "answer",
    method: Annotated[str, typer.Option(help="How heads are measured; a name or package.module:name.")] = "zero",
    top_fraction: Annotated[float, typer.Option(help="Share of all heads to edit.")] = 0.03,
    controls: Annotated[int, typer.Option(min=1, help="Number of size-matched random head sets of each kind.")] = 20,
    criterion: Annotated[
        str, typer.Option(help="What examples are ranked by; a name or package.module:name.")
    ] = "cliff",
    select_fraction: Annotated[float, typer.Option(help="Share of the pool to select.")] = 0.017,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair the model on the selection and measure again.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of prompts in a batch.")] = 64,
    device: Annotated[str | None, typer.Option(help="Torch device.")] = None,
    until: Annotated[str | None, typer.Option(help="Last stage to run, such as heads.")] = None,
    only: Annotated[str | None, typer.Option(help="The one stage to run, such as report.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print which stages would run, and why.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time and memory.")] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Studies a model from prompts to report. Rerun the command to resume.

    A rerun with other settings, files or model runs only the stages that depend on what changed.

    Example: cliffscope study --model ./my-model --harmful harmful.csv --harmless harmless.jsonl --out runs/mine
    """
    from cliffscope.study.config import StudyConfig

    config = StudyConfig(
        model=model,
        out=str(out),
        harmful=str(harmful) if harmful else None,
        harmless=str(harmless) if harmless else None,
        transcripts=str(transcripts) if transcripts else None,
        column=column,
        harmless_column=harmless_column,
        escape_control_tokens=escape_control_tokens,
        template=template,
        system=system,
        limit=limit,
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        judge=judge_choice(judge, classifier, url),
        harmless_judge=harmless_judge,
        positions=one_of("positions", positions, "balanced", "final"),
        contrast=one_of("contrast", contrast, "auto", "harmless", "harmful"),
        plateau=one_of("plateau", plateau, "mean", "max"),
        readout=readout,
        method=method,
        top_fraction=top_fraction,
        controls=controls,
        criterion=criterion,
        select_fraction=select_fraction,
        repair=repair,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    if plan:
        _plan(config, until=until, only=only, as_json=as_json)
    elif dry_run:
        _estimate(config, as_json=as_json)
    else:
        _run_study(config, until=until, only=only, as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    other: Annotated[Path | None, typer.Argument(help="Second run directory, to compare with.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="HTML file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rewrites the HTML report of a run directory, or writes a page that compares two runs.

    Example: cliffscope report runs/demo

    Example: cliffscope report runs/base runs/repaired --out comparison.html
    """
    from cliffscope.report.page import write_comparison, write_report

    target = out or Path("comparison.html")
    page = write_report(run, out) if other is None else write_comparison([run, other], target)
    say(as_json, {"report": str(page)}, f"Report: {page}")


@app.command()
def figures(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: OutOption,
    formats: Annotated[
        list[str], typer.Option("--format", help="svg, png, pdf, webp, jpeg, html or json; may be repeated.")
    ] = ["svg"],
    only: Annotated[list[str] | None, typer.Option(help="Name of a figure, such as cliff; may be repeated.")] = None,
    width: Annotated[int, typer.Option(min=100, help="Width in pixels.")] = 900,
    as_json: JsonOption = False,
) -> None:
    """Writes the figures of a report as images.

    Example: cliffscope figures runs/demo --out figures --format svg --format png
    """
    from cliffscope.report.images import write_images

    written = write_images(run, out, formats=formats, only=only or (), width=width)
    say(as_json, {"out": str(out), "files": [p.name for p in written]}, f"{len(written)} images in {out}")


def _estimate(config: "StudyConfig", *, as_json: bool) -> None:
    from cliffscope.study.preflight import estimate_study

    estimate = estimate_study(config)
    stages = estimate.stages.round({"seconds": 1})
    data = {
        "seconds": round(estimate.seconds, 1),
        "peak_bytes": estimate.peak_bytes,
        "free_bytes": estimate.free_bytes,
        "stages": stages.to_dict(orient="records"),
        "advice": list(estimate.advice),
    }
    say(as_json, data, "\n".join([stages.to_string(index=False), repr(estimate), *estimate.advice]))


def _plan(config: "StudyConfig", *, until: str | None, only: str | None, as_json: bool) -> None:
    from cliffscope.study.runner import plan_study

    steps = plan_study(config, until=until, only=only)
    say(as_json, {"stages": steps.to_dict(orient="records")}, steps.to_string(index=False))


def _run_study(config: "StudyConfig", *, until: str | None, only: str | None, as_json: bool) -> None:
    from cliffscope.study.runner import run_study

    started = time.perf_counter()
    command = "cliffscope " + shlex.join(sys.argv[1:])
    with show_progress() as progress:
        result = run_study(config, until=until, only=only, command=command, progress=progress)
    seconds = time.perf_counter() - started
    report = str(result.report) if result.report.is_file() else None
    data = {"report": report, "seconds": round(seconds, 1), "verdict": result.verdict}
    text = "\n\n".join(result.verdict.values())
    place = f"Report: {report}" if report else f"Run directory: {result.path}"
    say(as_json, data, f"{text}\n\n{place} ({seconds:.0f} s)")
