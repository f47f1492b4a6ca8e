"""Choosing examples and training on them: scoring a pool, selecting from it, repairing the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope.cli.options import (
    JsonOption,
    ModelOption,
    OutOption,
    ProbeOption,
    SeedOption,
    TemplateOption,
    TranscriptsOption,
    one_of,
)
from cliffscope.cli.program import app, read_probe, say, say_table
from cliffscope.progress import show_progress

if TYPE_CHECKING:
    from cliffscope.readouts.cliff import Plateau
    from cliffscope.repairing.formats import Format, LossOn
    from cliffscope.selection.scoring import PoolEngine
    from cliffscope.transcripts.records import Omission

CriterionOption = Annotated[
    str,
    typer.Option(help="cliff, misalignment, final, suppression, random, rule, length, judge, or package.module:name."),
]
PoolOption = Annotated[Path, typer.Option("--pool", help="JSONL or Parquet file of transcripts, or a folder of them.")]


@app.command("score-pool")
def score_pool(
    model: ModelOption,
    probe: ProbeOption,
    pool: PoolOption,
    out: OutOption,
    template: TemplateOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first broken row.")] = False,
    window: Annotated[int, typer.Option(min=1, help="Rows in a shard.")] = 1024,
    engine: Annotated[str, typer.Option(help="local, or ray for the nodes of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; RAY_ADDRESS by default.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="Number of Ray actors, each with a model; by default as many as fit.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPU cores of each actor.")] = 1.0,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of each actor; by default one if the cluster has any.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Scores every example in a pool of any size and writes shards. Rerun the command to resume.

    Example: cliffscope score-pool --model ./my-model --probe probe/ --pool pool.jsonl --out scores/
    """
    import cliffscope as cs
    from cliffscope.selection.distributed import RayEngine

    where: PoolEngine = one_of("engine", engine, "local", "ray")
    workers = RayEngine(actors=actors, cpus=cpus, gpus=gpus, address=address) if where == "ray" else where

    fitted = read_probe(probe)
    with show_progress() as progress:
        scores = cs.score_pool(
            cs.load_model(model, template=template),
            fitted,
            pool,
            out=out,
            window=window,
            strict=strict,
            engine=workers,
            progress=lambda done: progress("score-pool", done, done),
        )
    say_table(as_json, scores.to_frame(), f"{scores!r}, written to {out}", out, scores.omitted)


@app.command()
def select(
    model: ModelOption,
    probe: ProbeOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    fraction: Annotated[float, typer.Option(help="Share of the pool to select, in (0, 1].")] = 0.017,
    number: Annotated[int | None, typer.Option(min=1, help="Number of examples, instead of a share.")] = None,
    criterion: CriterionOption = "cliff",
    plateau: Annotated[str, typer.Option(help="Plateau: mean or max.")] = "mean",
    deduplicate: Annotated[bool, typer.Option(help="Keep only the first in rank of equal prompts.")] = True,
    balance: Annotated[bool, typer.Option(help="Let the sources of the transcripts take turns.")] = False,
    scores: Annotated[
        Path | None, typer.Option(help="Directory of score-pool, for a pool that does not fit into memory.")
    ] = None,
    template: TemplateOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Selects the harmful transcripts with the largest cliff, or by another criterion, and writes them as JSONL.

    Example: cliffscope select --model ./my-model --probe probe/ --transcripts pool.jsonl --out chosen.jsonl
    """
    import cliffscope as cs
    from cliffscope.selection.choice import select_from_pool
    from cliffscope.selection.criteria import CRITERIA, check_size

    height: Plateau = one_of("plateau", plateau, "mean", "max")
    check_size(fraction, number)
    rule = CRITERIA.get(criterion)
    unread: tuple[Omission, ...] = ()
    if scores is None:
        pool, fitted = cs.read_transcripts(transcripts), read_probe(probe)
        size, unread = len(pool), pool.omitted
        selection = cs.select_by_cliff(
            cs.load_model(model, template=template),
            fitted,
            pool,
            fraction=fraction,
            number=number,
            criterion=rule,
            plateau=height,
            deduplicate=deduplicate,
            balance=balance,
            seed=seed,
        )
    else:
        scored = cs.score_pool(cs.load_model(model, template=template), read_probe(probe), transcripts, out=scores)
        size = len(scored.frame)
        selection = select_from_pool(
            scored,
            transcripts,
            fraction=fraction,
            number=number,
            criterion=rule,
            plateau=height,
            deduplicate=deduplicate,
            balance=balance,
            seed=seed,
        )
    ids = [t.id for t in selection.selected]
    if ids:
        selection.to_jsonl(out)
    text = repr(selection) if ids else f"{selection!r}: nothing was selected, so no file was written."
    data = {"out": str(out) if ids else None, "chosen": ids, "pool": size}
    say(as_json, data, text, (*unread, *selection.omitted))


@app.command("export-examples")
def export_examples(
    model: ModelOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    format: Annotated[
        str, typer.Option("--format", help="chat, prompt-completion, alpaca or sharegpt.")
    ] = "prompt-completion",
    answer: Annotated[str | None, typer.Option(help="Safe answer; by default the transcripts' own answers.")] = None,
    template: TemplateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes transcripts with their thinking as training data for TRL or LLaMA-Factory.

    Example: cliffscope export-examples --model ./my-model --transcripts chosen.jsonl --answer "I can't." --out x.jsonl
    """
    import cliffscope as cs
    from cliffscope.repairing.formats import with_safe_answer, write_examples

    form: Format = one_of("format", format, "chat", "prompt-completion", "alpaca", "sharegpt")
    examples = cs.read_transcripts(transcripts)
    unread = examples.omitted
    lens = cs.load_model(model, template=template)
    if answer is not None:
        examples = with_safe_answer(examples, answer)
    write_examples(examples, out, format=form, tokenizer=lens.tokenizer, template=lens.template)
    data = {"out": str(out), "examples": len(examples)}
    say(as_json, data, f"{len(examples)} examples, written to {out}", unread)


@app.command()
def repair(
    model: ModelOption,
    transcripts: TranscriptsOption,
    out: OutOption,
    harmless: Annotated[Path | None, typer.Option(help="JSONL file of harmless transcripts to mix in.")] = None,
    harmless_share: Annotated[float, typer.Option(help="Share of harmless examples.")] = 0.5,
    answer: Annotated[str, typer.Option(help="Safe answer.")] = "I'm sorry, but I can't help with that.",
    loss_on: Annotated[
        str, typer.Option(help="Tokens with a loss: answer, or closing to include the closing.")
    ] = "answer",
    lora_rank: Annotated[
        int | None, typer.Option(min=0, help="Rank of the LoRA adapter; 0 trains all weights.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many evaluations on a held-out tenth without improvement."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Directory of training checkpoints, from which a rerun resumes.")
    ] = None,
    template: TemplateOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fine-tunes the model on selected transcripts with a safe answer and writes a checkpoint.

    Example: cliffscope repair --model ./my-model --transcripts chosen.jsonl --harmless harmless.jsonl --out repaired/
    """
    import cliffscope as cs

    where: LossOn = one_of("loss-on", loss_on, "answer", "closing")
    selected = cs.read_transcripts(transcripts)
    mixed = cs.Transcripts() if harmless is None else cs.read_transcripts(harmless)
    repaired = cs.repair(
        cs.load_model(model, template=template),
        selected,
        out,
        harmless=mixed,
        harmless_share=harmless_share,
        answer=answer,
        loss_on=where,
        lora_rank=lora_rank,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
        work=work,
    )
    last = float(repaired.losses["loss"].iloc[-1])
    data = {"out": str(repaired.path), "harmful": repaired.n_harmful, "harmless": repaired.n_harmless, "loss": last}
    say(as_json, data, f"{repaired!r}, last loss {last:.4g}", (*selected.omitted, *mixed.omitted))
