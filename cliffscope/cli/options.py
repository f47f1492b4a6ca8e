"""Which options do several commands share, and which values may an option take?"""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cliffscope.errors import DataError

Choice = TypeVar("Choice", bound=str)
ModelOption = Annotated[
    str, typer.Option("--model", help="Local directory, .gguf file, hub name, organism, or smollm2.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help="How the model thinks: a name, a .json file or package.module:name; detected by default."),
]
OutOption = Annotated[Path, typer.Option("--out", help="File or directory to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all random numbers.")]
TranscriptsOption = Annotated[Path, typer.Option("--transcripts", help="JSONL file of transcripts.")]
ProbeOption = Annotated[Path, typer.Option("--probe", help="Directory written by fit-probe or study.")]


ColumnOption = Annotated[
    str | None, typer.Option("--column", help="Column of the prompts; the usual names by default.")
]
EscapeOption = Annotated[
    bool,
    typer.Option("--escape-control-tokens", help="Keep control tokens that occur in prompts, such as tags, as text."),
]
JudgeOption = Annotated[
    str,
    typer.Option("--judge", help="phrases, classifier:FORMAT@PATH, model:MODEL@URL, or package.module:name."),
]
ClassifierOption = Annotated[
    str | None, typer.Option("--classifier", help="Directory or hub name of a guard; --judge then names its format.")
]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="OpenAI-compatible server; --judge then names the judging model.")
]


def judge_choice(judge: str, classifier: str | None, url: str | None) -> str:
    """The judge that the options `--judge`, `--classifier` and `--url` mean together, as `find_judge` takes it.

    Raises:
        DataError: both `--classifier` and `--url` were given.
    """
    if classifier is not None and url is not None:
        raise DataError("Both --classifier and --url were given. Pass one of them.")
    if classifier is not None:
        return f"classifier:{judge}@{classifier}"
    return judge if url is None else f"model:{judge}@{url}"


def one_of(name: str, value: str, *choices: Choice) -> Choice:
    """Checks an option with a fixed set of values.

    Args:
        name: name of the option, without dashes.
        value: value on the command line.
        choices: values that it may take.

    Returns:
        The value.

    Raises:
        typer.BadParameter: the value is not among the choices.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise typer.BadParameter(f"{value!r}: expected one of {', '.join(choices)}.", param_hint=f"--{name}")


def options_of(context: typer.Context) -> dict[str, object]:
    """The command and its options, except where and how it reports results."""
    options = {name: value for name, value in context.params.items() if name not in ("out", "as_json")}
    return {"command": context.info_name, **options}
