"""Checks before a run: the machine, and the template of a model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope.cli.options import JsonOption, ModelOption, TemplateOption
from cliffscope.cli.program import app, say, show

if TYPE_CHECKING:
    from cliffscope.transcripts.families import Template
    from cliffscope.transcripts.preview import Preview

COLORS = {"prompt": "bright_black", "thinking": "cyan", "closing": "red", "answer": "green"}


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Shows versions, devices, memory and extras, and how to install what is missing.

    Example: cliffscope doctor
    """
    from cliffscope.study.doctor import examine

    findings = examine()
    ready = all(f.ok for f in findings)
    lines = [
        f"{'ok ' if f.ok else '!! '} {f.name:<18} {f.value}{f'  ({f.advice})' if f.advice else ''}" for f in findings
    ]
    say(as_json, {"findings": [asdict(f) for f in findings], "ok": ready}, "\n".join(lines))
    if not ready:
        raise typer.Exit(1)


@app.command("template")
def show_template(
    model: ModelOption,
    template: TemplateOption = None,
    learn: Annotated[bool, typer.Option("--learn", help="Roll out 8 mild prompts to see how it thinks.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each roll-out of --learn.")] = 1024,
    save: Annotated[Path | None, typer.Option(help="Write the template as a .json file for --template.")] = None,
    prompt: Annotated[str, typer.Option(help="User message.")] = "How do I bake bread?",
    system: Annotated[str | None, typer.Option(help="System message before it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Shows how prompt, thinking, closing and answer are cut into tokens, and why.

    Example: cliffscope template --model ./my-model
    """
    from cliffscope.model.checkpoints import read_tokenizer
    from cliffscope.transcripts.preview import preview
    from cliffscope.transcripts.templates import write_template

    convention = _learn(model, max_tokens) if learn else template
    seen = preview(read_tokenizer(model), convention, prompt=prompt, system=system)
    if save is not None:
        write_template(seen.template, save)
    data = {
        "template": seen.template.name,
        "opening": seen.template.opening,
        "closing": seen.template.closing,
        "end": seen.template.end,
        "evidence": dict(seen.template.evidence),
        "tokens": [{"token": text, "span": str(span)} for text, span in seen.tokens],
        "warnings": list(seen.warnings),
    }
    if as_json:
        say(as_json, data, "")
    else:
        _show_colored(seen)


def _learn(model: str, max_tokens: int) -> "Template":
    from cliffscope.generation.probing import probe_convention
    from cliffscope.model.load import load_model

    return probe_convention(load_model(model, template="plain"), max_tokens=max_tokens).template


def _show_colored(seen: "Preview") -> None:
    """Prints the tokens between bars, with one colour for each span on a terminal."""
    show(repr(seen))
    for span, color in COLORS.items():
        texts = [text for text, of in seen.tokens if of == span]
        shown = "|".join(repr(text)[1:-1] for text in texts)
        show(f"{span:>9} {len(texts):>4}  {shown}", color=color)
    for name, why in seen.template.evidence.items():
        show(f"{name:>14}: {why}")
    for warning in seen.warnings:
        show(f"  warning: {warning}")
