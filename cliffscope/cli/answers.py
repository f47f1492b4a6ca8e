"""What answers are worth: judging them, comparing edited and unedited ones, and keeping an edited model."""

from pathlib import Path
from typing import Annotated

import typer

from cliffscope.cli.app import app, say, say_table
from cliffscope.cli.options import (
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    TemplateOption,
    TranscriptsOption,
    given_options,
)


@app.command()
def judge(transcripts: TranscriptsOption, out: OutOption, as_json: JsonOption = False) -> None:
    """Judges the answers of transcripts by phrases, into JSONL.

    Example: cliffscope judge --transcripts transcripts.jsonl --out judged.jsonl
    """
    import cliffscope as cs

    found = cs.judge(cs.read_transcripts(transcripts))
    cs.write_transcripts(found, out)
    counts = {str(k): int(v) for k, v in found.to_frame()["outcome"].value_counts().items()}
    say(as_json, {"out": str(out), **counts}, repr(found), found.omitted)


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
    say_table(as_json, report.to_frame(), f"{report!r}, written to {out}", out, report.omitted)
