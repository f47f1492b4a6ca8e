"""Listing and growing organisms: small models whose suppression heads are known."""

import json
from typing import Annotated

import typer

from cliffscope.cli.options import JsonOption, OutOption
from cliffscope.cli.program import app, say
from cliffscope.progress import show_progress

organisms_app = typer.Typer(no_args_is_help=True, help="Small models whose suppression heads are known.")
app.add_typer(organisms_app, name="organisms")


@organisms_app.command("list")
def organisms_list(as_json: JsonOption = False) -> None:
    """Lists the organisms of the package with their planted heads."""
    from cliffscope import organisms

    planted = {name: [str(h) for h in organisms.read_truth(name).planted] for name in organisms.names()}
    lines = [f"{name}: {', '.join(heads) or 'nothing planted'}" for name, heads in planted.items()]
    say(as_json, planted, "\n".join(lines))


@organisms_app.command("grow")
def organisms_grow(
    name: Annotated[str, typer.Argument(help="planted-llama, planted-qwen3 or null-llama.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Grows an organism as a Hugging Face directory with truth.json. Takes a few minutes.

    Example: cliffscope organisms grow planted-llama --out grown/planted-llama
    """
    from cliffscope.organisms.asset import write_organism

    with show_progress() as progress:
        truth = write_organism(name, out, report=lambda phase, step, steps: progress(phase, step, steps))
    say(as_json, truth, json.dumps(truth["measured"], indent=1))
