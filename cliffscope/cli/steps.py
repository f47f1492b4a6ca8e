"""The steps of a study one by one: transcripts, probe, traces, heads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope.cli.options import (
    ColumnOption,
    EscapeOption,
    JsonOption,
    ModelOption,
    OutOption,
    ProbeOption,
    SeedOption,
    TemplateOption,
    TranscriptsOption,
    one_of,
    options_of,
)
from cliffscope.cli.program import app, read_probe, say, say_table
from cliffscope.progress import show_progress

if TYPE_CHECKING:
    from cliffscope.readouts.cliff import Plateau
    from cliffscope.readouts.contrast import Contrast
    from cliffscope.readouts.probe import Positions


@app.command("roll-out")
def roll_out(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="File of prompts.")],
    out: OutOption,
    harmful: Annotated[bool | None, typer.Option("--harmful/--harmless", help="Label of all prompts.")] = None,
    column: ColumnOption = None,
    escape_control_tokens: EscapeOption = False,
    template: TemplateOption = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.")] = None,
    max_thinking: Annotated[int, typer.Option(min=1, help="Maximum tokens of thinking.")] = 1024,
    max_answer: Annotated[int, typer.Option(min=1, help="Maximum tokens of answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Generates thinking and answer for each prompt and writes them as JSONL.

    Example: cliffscope roll-out --model ./my-model --prompts harmful.csv --harmful --out transcripts.jsonl
    """
    import cliffscope as cs
    from cliffscope.generation.rollout import check_left

    questions = cs.read_prompts(
        prompts,
        harmful=harmful,
        column=column,
        limit=limit,
        seed=seed,
        escape_control_tokens=escape_control_tokens,
    )
    lens = cs.load_model(model, template=template)
    with show_progress() as progress:
        rolled_out = cs.roll_out(
            lens,
            questions,
            max_thinking=max_thinking,
            max_answer=max_answer,
            temperature=temperature,
            system=system,
            seed=seed,
            progress=lambda done: progress("roll-out", done, len(questions)),
        )
    check_left(rolled_out)
    cs.write_transcripts(rolled_out, out)
    say(as_json, {"out": str(out), "transcripts": len(rolled_out)}, repr(rolled_out), rolled_out.omitted)


@app.command("fit-probe")
def fit_probe(
    context: typer.Context,
    model: ModelOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    positions: Annotated[str, typer.Option(help="Probe positions: balanced or final.")] = "balanced",
    contrast: Annotated[str, typer.Option(help="Complied class of the probe: auto, harmless or harmful.")] = "auto",
    layer: Annotated[int | None, typer.Option(help="Layer; chosen on the validate split by default.")] = None,
    template: TemplateOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fits a refusal probe on judged transcripts and writes it to a directory.

    Example: cliffscope fit-probe --model ./my-model --transcripts judged.jsonl --out probe/
    """
    import cliffscope as cs
    from cliffscope.readouts.contrast import contrast_classes
    from cliffscope.store import open_run
    from cliffscope.study.artefacts import PROBE
    from cliffscope.study.saved_readouts import save_probe

    where: Positions = one_of("positions", positions, "balanced", "final")
    which: Contrast = one_of("contrast", contrast, "auto", "harmless", "harmful")
    judged = cs.read_transcripts(transcripts)
    with open_run(out, options_of(context)) as store, store.stage("fit-probe"):
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
        save_probe(store, probe, classes.name)
        report = PROBE.read(store.path)
    data = {"out": str(out), "layer": probe.layer, "report": report["report"]}
    say(as_json, data, repr(probe), (*judged.omitted, *probe.omitted))


@app.command()
def trace(
    context: typer.Context,
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    template: TemplateOption = None,
    plateau: Annotated[str, typer.Option(help="Plateau: mean or max.")] = "mean",
    as_json: JsonOption = False,
) -> None:
    """Traces the refusal score through transcripts, into traces.parquet and cliffs.parquet of a directory.

    Example: cliffscope trace --model ./my-model --probe probe/ --transcripts judged.jsonl --out traces/
    """
    import cliffscope as cs
    from cliffscope.store import open_run
    from cliffscope.study.artefacts import CLIFFS, TRACES

    height: Plateau = one_of("plateau", plateau, "mean", "max")
    fitted, judged = read_probe(probe), cs.read_transcripts(transcripts)
    with open_run(out, options_of(context)) as store, store.stage("trace"):
        traces = cs.trace_refusal(cs.load_model(model, template=template), fitted, judged)
        cliffs = traces.cliffs(plateau=height)
        TRACES.write(store, traces.to_frame())
        CLIFFS.write(store, cliffs.to_frame())
    say_table(as_json, cliffs.to_frame(), f"{cliffs!r}, written to {out}", out, (*judged.omitted, *traces.omitted))


@app.command("rank-heads")
def rank_heads(
    context: typer.Context,
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    template: TemplateOption = None,
    method: Annotated[str, typer.Option(help="zero, or another method of the guide to heads.")] = "zero",
    scope: Annotated[str, typer.Option(help="Positions of the edit: closing, thinking, prompt or all.")] = "closing",
    factor: Annotated[float | None, typer.Option(help="Factor of the method scale; 0.5 by default.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Ranks every head by how much it suppresses refusal, on harmful transcripts that complied.

    Example: cliffscope rank-heads --model ./my-model --probe probe/ --transcripts judged.jsonl --out heads/
    """
    import cliffscope as cs
    from cliffscope.heads.tasks import choose_method
    from cliffscope.store import open_run
    from cliffscope.study.artefacts import HEADS

    how, where = choose_method(method, factor), one_of("scope", scope, "closing", "thinking", "prompt", "all")
    fitted, judged = read_probe(probe), cs.read_transcripts(transcripts)
    suppressed = judged.where(harmful=True, outcome="complied")
    with open_run(out, options_of(context)) as store, store.stage("rank-heads"), show_progress() as progress:
        ranking = cs.rank_heads(
            cs.load_model(model, template=template),
            fitted,
            suppressed,
            method=how,
            scope=where,
            harmless=judged.where(harmful=False),
            refused=judged.where(harmful=True, outcome="refused"),
            seed=seed,
            progress=lambda done: progress("rank-heads", done, len(suppressed)),
        )
        HEADS.write(store, ranking.to_frame())
    say_table(as_json, ranking.to_frame(), f"{ranking!r}, written to {out}", out, (*judged.omitted, *ranking.omitted))
