"""The command line: parse, one library call, print.

A command a function of the library, with the same names and defaults. `--json` prints one JSON object for machines;
otherwise a person gets a line or a table, with progress bars on a terminal and plain log lines elsewhere; what was left
out is told on standard error. Exit codes: 0 done, 2 usage, 3 bad input, 4 unsupported model, 5 run directory, 6 missing
extra, 130 interrupted.
"""

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope.errors import CliffScopeError
from cliffscope.options import (
    JsonOption,
    ModelOption,
    OutOption,
    ProbeOption,
    SeedOption,
    TemplateOption,
    TranscriptsOption,
    given_options,
    one_of,
)
from cliffscope.progress import log_to_standard_error, show_progress

if TYPE_CHECKING:
    import pandas as pd

    from cliffscope.config import StudyConfig
    from cliffscope.probing.cliff import Plateau
    from cliffscope.probing.contrast import Contrast
    from cliffscope.probing.probe import Positions, RefusalProbe
    from cliffscope.transcripts.records import Omission

INTERRUPTED = 130
app = typer.Typer(
    name="cliffscope",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Shows where, and by which attention heads, a reasoning model's intention to refuse is lost, and restores it.",
)
organisms_app = typer.Typer(no_args_is_help=True, help="Small models whose suppression heads are known.")
app.add_typer(organisms_app, name="organisms")


def main() -> None:
    """Runs the command line; errors of CliffScope are printed in one line and become exit codes."""
    log_to_standard_error()
    try:
        app()
    except CliffScopeError as error:
        typer.echo(f"cliffscope: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer takes the interrupt and ends with this code.
        if end.code == INTERRUPTED:
            typer.echo("cliffscope: interrupted; run the same command again to go on where it stopped.", err=True)
        raise


@app.command()
def demo(out: OutOption = Path("runs/demo"), seed: SeedOption = 0, as_json: JsonOption = False) -> None:
    """Studies the organism planted-llama, whose suppression heads are known.

    Example: cliffscope demo --out runs/demo
    """
    from cliffscope.config import StudyConfig

    config = StudyConfig(
        model="planted-llama", out=str(out), max_thinking=128, max_answer=32, temperature=1.0, seed=seed
    )
    _run_study(config, as_json=as_json)


@app.command()
def study(
    model: ModelOption,
    out: OutOption,
    harmful: Annotated[
        Path | None, typer.Option(help="File of harmful prompts (csv, json, jsonl, txt, parquet).")
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="File of harmless prompts.")] = None,
    transcripts: Annotated[Path | None, typer.Option(help="JSONL of transcripts instead of prompts.")] = None,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each file at most.")] = None,
    max_thinking: Annotated[int, typer.Option(min=1, help="Tokens of thinking at most.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Tokens of answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    positions: Annotated[str, typer.Option(help="Probe positions: balanced or final.")] = "balanced",
    contrast: Annotated[str, typer.Option(help="Complied class of the probe: auto, harmless or harmful.")] = "auto",
    plateau: Annotated[str, typer.Option(help="mean or max.")] = "mean",
    top_fraction: Annotated[float, typer.Option(help="Share of heads that is edited.")] = 0.03,
    controls: Annotated[int, typer.Option(min=1, help="Random sets of heads.")] = 20,
    select_fraction: Annotated[float, typer.Option(help="Share of the pool that is selected.")] = 0.017,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows generated together at most.")] = 64,
    device: Annotated[str | None, typer.Option(help="Torch device.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Studies a model from prompts to report; run again, it goes on where it stopped.

    Example: cliffscope study --model ./my-model --harmful harmful.csv --harmless harmless.jsonl --out runs/mine
    """
    from cliffscope.config import StudyConfig

    config = StudyConfig(
        model=model,
        out=str(out),
        harmful=str(harmful) if harmful else None,
        harmless=str(harmless) if harmless else None,
        transcripts=str(transcripts) if transcripts else None,
        template=template,
        system=system,
        limit=limit,
        max_thinking=max_thinking,
        max_answer=max_answer,
        temperature=temperature,
        positions=one_of("positions", positions, "balanced", "final"),
        contrast=one_of("contrast", contrast, "auto", "harmless", "harmful"),
        plateau=one_of("plateau", plateau, "mean", "max"),
        top_fraction=top_fraction,
        controls=controls,
        select_fraction=select_fraction,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    _run_study(config, as_json=as_json)


@app.command("roll-out")
def roll_out(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="File of prompts.")],
    out: OutOption,
    harmful: Annotated[bool | None, typer.Option("--harmful/--harmless", help="Label of all prompts.")] = None,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts at most.")] = None,
    max_thinking: Annotated[int, typer.Option(min=1, help="Tokens of thinking at most.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Tokens of answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Generates thinking and answer for each prompt, into JSONL.

    Example: cliffscope roll-out --model ./my-model --prompts harmful.csv --harmful --out transcripts.jsonl
    """
    import cliffscope as cs
    from cliffscope.safety.generation import check_left

    asked = cs.read_prompts(prompts, harmful=harmful, limit=limit, seed=seed)
    lens = cs.load_model(model, template=template)
    with show_progress() as progress:
        found = cs.roll_out(
            lens,
            asked,
            max_thinking=max_thinking,
            max_answer=max_answer,
            temperature=temperature,
            system=system,
            seed=seed,
            progress=lambda done: progress("roll-out", done, len(asked)),
        )
    check_left(found)
    cs.write_transcripts(found, out)
    _say(as_json, {"out": str(out), "transcripts": len(found)}, repr(found), found.omitted)


@app.command()
def judge(transcripts: TranscriptsOption, out: OutOption, as_json: JsonOption = False) -> None:
    """Judges the answers of transcripts by phrases, into JSONL.

    Example: cliffscope judge --transcripts transcripts.jsonl --out judged.jsonl
    """
    import cliffscope as cs

    found = cs.judge(cs.read_transcripts(transcripts))
    cs.write_transcripts(found, out)
    counts = {str(k): int(v) for k, v in found.to_frame()["outcome"].value_counts().items()}
    _say(as_json, {"out": str(out), **counts}, repr(found), found.omitted)


@app.command("fit-probe")
def fit_probe(
    context: typer.Context,
    model: ModelOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    positions: Annotated[str, typer.Option(help="balanced or final.")] = "balanced",
    contrast: Annotated[str, typer.Option(help="Complied class: auto, harmless or harmful.")] = "auto",
    layer: Annotated[int | None, typer.Option(help="Layer; chosen on the validate split if not given.")] = None,
    template: TemplateOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fits a refusal probe on judged transcripts, into a directory.

    Example: cliffscope fit-probe --model ./my-model --transcripts judged.jsonl --out probe/
    """
    import cliffscope as cs
    from cliffscope.probing.contrast import contrast_classes
    from cliffscope.probing.files import save_probe
    from cliffscope.store import open_run

    where: Positions = one_of("positions", positions, "balanced", "final")
    which: Contrast = one_of("contrast", contrast, "auto", "harmless", "harmful")
    judged = cs.read_transcripts(transcripts)
    with open_run(out, given_options(context)) as store, store.stage("fit-probe"):
        lens = cs.load_model(model, template=template)
        classes = contrast_classes(judged, which, thinks=lens.template.thinks)
        probe = cs.fit_probe(
            lens,
            classes.refused,
            classes.complied,
            challenge=classes.challenge,
            layer="best" if layer is None else layer,
            positions=where,
            seed=seed,
        )
        save_probe(store, probe)
        report = store.read_json("probe.json")
    data = {"out": str(out), "layer": probe.layer, "report": report["report"]}
    _say(as_json, data, repr(probe), probe.omitted)


@app.command()
def trace(
    context: typer.Context,
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    template: TemplateOption = None,
    plateau: Annotated[str, typer.Option(help="mean or max.")] = "mean",
    as_json: JsonOption = False,
) -> None:
    """Traces the refusal score through transcripts: traces.parquet and cliffs.parquet in a directory.

    Example: cliffscope trace --model ./my-model --probe probe/ --transcripts judged.jsonl --out traces/
    """
    import cliffscope as cs
    from cliffscope.store import open_run

    height: Plateau = one_of("plateau", plateau, "mean", "max")
    fitted, given = _load_probe(probe), cs.read_transcripts(transcripts)
    with open_run(out, given_options(context)) as store, store.stage("trace"):
        traces = cs.trace_refusal(cs.load_model(model, template=template), fitted, given)
        cliffs = traces.cliffs(plateau=height)
        store.write_frame("traces.parquet", traces.to_frame())
        store.write_frame("cliffs.parquet", cliffs.to_frame())
    _say_table(as_json, cliffs.to_frame(), f"{cliffs!r}, written to {out}", out, traces.omitted)


@app.command("rank-heads")
def rank_heads(
    context: typer.Context,
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    template: TemplateOption = None,
    method: Annotated[str, typer.Option(help="zero, or another method of the guide to heads.")] = "zero",
    scope: Annotated[str, typer.Option(help="closing, thinking, prompt or all.")] = "closing",
    factor: Annotated[float, typer.Option(help="What `scale` multiplies by.")] = 0.5,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Ranks every head by its part in suppressing refusal, on harmful transcripts that were complied with.

    Example: cliffscope rank-heads --model ./my-model --probe probe/ --transcripts judged.jsonl --out heads/
    """
    import cliffscope as cs
    from cliffscope.heads.methods import METHODS
    from cliffscope.store import open_run

    how, where = one_of("method", method, *METHODS), one_of("scope", scope, "closing", "thinking", "prompt", "all")
    fitted, judged = _load_probe(probe), cs.read_transcripts(transcripts)
    suppressed = judged.where(harmful=True, outcome="complied")
    with open_run(out, given_options(context)) as store, store.stage("rank-heads"), show_progress() as progress:
        ranking = cs.rank_heads(
            cs.load_model(model, template=template),
            fitted,
            suppressed,
            method=how,
            scope=where,
            harmless=judged.where(harmful=False),
            refused=judged.where(harmful=True, outcome="refused"),
            factor=factor,
            seed=seed,
            progress=lambda done: progress("rank-heads", done, len(suppressed)),
        )
        store.write_frame("heads.parquet", ranking.to_frame())
    _say_table(as_json, ranking.to_frame(), f"{ranking!r}, written to {out}", out, ranking.omitted)


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts with `harmful` set.")],
    out: OutOption,
    heads: Annotated[str, typer.Option(help="Heads to zero, such as L12H5,L14H0; none measures the model alone.")] = "",
    controls: Annotated[int, typer.Option(min=0, help="Random sets of heads.")] = 20,
    max_thinking: Annotated[int, typer.Option(min=1, help="Tokens of thinking at most.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Tokens of answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measures ASR and over-refusal unedited, with heads zeroed, and with random sets zeroed.

    Example: cliffscope evaluate --model ./my-model --prompts prompts.jsonl --heads L12H5,L14H0 --out safety/
    """
    import cliffscope as cs
    from cliffscope.store import open_run

    refs = [cs.HeadRef.parse(text.strip()) for text in heads.split(",") if text.strip()]
    edit, asked = cs.zero(refs) if refs else None, cs.read_transcripts(prompts)
    with open_run(out, given_options(context)) as store, store.stage("evaluate"):
        report = cs.evaluate_safety(
            cs.load_model(model, template=template),
            asked,
            edit=edit,
            controls=controls,
            max_thinking=max_thinking,
            max_answer=max_answer,
            temperature=temperature,
            system=system,
            seed=seed,
        )
        store.write_frame("safety.parquet", report.to_frame())
        store.write_frame("safety_pairs.parquet", report.pairs())
    _say_table(as_json, report.to_frame(), f"{report!r}, written to {out}", out, report.omitted)


@app.command()
def select(
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    fraction: Annotated[float, typer.Option(help="Share of the pool, in (0, 1].")] = 0.017,
    template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Selects the harmful, complied transcripts with the largest cliff, into JSONL.

    Example: cliffscope select --model ./my-model --probe probe/ --transcripts pool.jsonl --out chosen.jsonl
    """
    import cliffscope as cs
    from cliffscope.alignment.selection import check_fraction

    pool, fitted = cs.read_transcripts(transcripts), _load_probe(probe)
    check_fraction(fraction)
    selection = cs.select_by_cliff(cs.load_model(model, template=template), fitted, pool, fraction=fraction)
    chosen = [t.id for t in selection.chosen]
    if chosen:
        selection.to_jsonl(out)
    text = repr(selection) if chosen else f"{selection!r}: nothing was chosen and no file written."
    data = {"out": str(out) if chosen else None, "chosen": chosen, "pool": len(pool)}
    _say(as_json, data, text, selection.omitted)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory.")], as_json: JsonOption = False) -> None:
    """Writes the HTML report of a run directory again.

    Example: cliffscope report runs/demo
    """
    from cliffscope.report.page import write_report

    page = write_report(run)
    _say(as_json, {"report": str(page)}, f"Report: {page}")


@organisms_app.command("list")
def organisms_list(as_json: JsonOption = False) -> None:
    """Lists the organisms in the package with their planted heads."""
    from cliffscope import organisms

    found = {name: [str(h) for h in organisms.read_truth(name).planted] for name in organisms.names()}
    _say(as_json, found, "\n".join(f"{name}: {', '.join(heads) or 'nothing planted'}" for name, heads in found.items()))


@organisms_app.command("grow")
def organisms_grow(
    name: Annotated[str, typer.Argument(help="planted-llama, planted-qwen3 or null-llama.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Grows an organism anew, as a Hugging Face directory with truth.json; takes some minutes.

    Example: cliffscope organisms grow planted-llama --out grown/planted-llama
    """
    from cliffscope.organisms.asset import write_organism

    with show_progress() as progress:
        truth = write_organism(name, out, report=lambda phase, step, steps: progress(phase, step, steps))
    _say(as_json, truth, json.dumps(truth["measured"], indent=1))


def _run_study(config: "StudyConfig", *, as_json: bool) -> None:
    from cliffscope.study import run_study

    started = time.perf_counter()
    command = "cliffscope " + shlex.join(sys.argv[1:])
    with show_progress() as progress:
        found = run_study(config, command=command, progress=progress)
    seconds = time.perf_counter() - started
    data = {"report": str(found.report), "seconds": round(seconds, 1), "verdict": found.verdict}
    text = "\n\n".join(found.verdict.values())
    _say(as_json, data, f"{text}\n\nReport: {found.report} ({seconds:.0f} s)")


def _load_probe(path: Path) -> "RefusalProbe":
    from cliffscope.probing.files import load_probe
    from cliffscope.store import RunStore

    return load_probe(RunStore(path=path))


def _say(as_json: bool, data: Mapping[str, object], text: str, omitted: "tuple[Omission, ...] | None" = None) -> None:
    """Prints the result, and to standard error what was left out and why."""
    for kind, n in Counter(omission.kind for omission in omitted or ()).items():
        typer.echo(f"left out {n}: {kind}", err=True)
    left_out = {} if omitted is None else {"omitted": len(omitted)}
    typer.echo(json.dumps({**data, **left_out}, ensure_ascii=False) if as_json else text)


def _say_table(as_json: bool, frame: "pd.DataFrame", text: str, out: Path, omitted: "tuple[Omission, ...]") -> None:
    rows = json.loads(frame.to_json(orient="records")) if as_json else []
    table = frame.head(10).to_string(index=False)
    _say(as_json, {"out": str(out), "rows": rows}, f"{table}\n{text}", omitted)
