"""Which options do several commands share, and which words may an option be?"""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cliffscope.errors import DataError

Word = TypeVar("Word", bound=str)
ModelOption = Annotated[
    str, typer.Option("--model", help="Local directory, .gguf file, hub name, organism, or smollm2.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help="How the model thinks: a name, a .json file or package.module:name; detected by default."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SeedOption = Annotated[int, typer.Option(help="Of everything drawn.")]
TranscriptsOption = Annotated[Path, typer.Option("--transcripts", help="JSONL of transcripts.")]
ProbeOption = Annotated[Path, typer.Option("--probe", help="Directory that fit-probe or study wrote.")]


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


def one_of(name: str, value: str, *words: Word) -> Word:
    """Checks an option that is one of some words.

    Args:
        name: of the option, without dashes.
        value: what was given.
        words: what it may be.

    Returns:
        The word.

    Raises:
        typer.BadParameter: it is none of them.
    """
    for word in words:
        if value == word:
            return word
    raise typer.BadParameter(f"{value!r}: expected one of {', '.join(words)}.", param_hint=f"--{name}")


def given_options(context: typer.Context) -> dict[str, object]:
    """The command and its options, but for where and how it tells its results."""
    options = {name: value for name, value in context.params.items() if name not in ("out", "as_json")}
    return {"command": context.info_name, **options}
