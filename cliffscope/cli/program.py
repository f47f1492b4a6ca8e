"""What do all commands share: the program, its exit codes, and the output of results?

1. An error of CliffScope is printed on one line and becomes an exit code.
2. `--json` prints one JSON object for machines; otherwise a person gets a line or a table.
3. Progress goes to standard error, as bars on a terminal and as log lines elsewhere. So does what was left out, with
   the reasons.
4. All of it goes through `show`, which shows control characters of ids, names and texts as escapes.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliffscope import __version__
from cliffscope.errors import CliffScopeError
from cliffscope.progress import log_to_standard_error
from cliffscope.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from cliffscope.readouts.probe import RefusalProbe
    from cliffscope.transcripts.records import Omission

INTERRUPTED = 130
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*(?:\.\w+)*")
app = typer.Typer(
    name="cliffscope",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Finds where, and by which attention heads, a reasoning model's refusal is suppressed, and restores it.",
)


def _show_version(requested: bool) -> None:
    if requested:
        show(f"cliffscope {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself, which stand before the command."""
    # Typer has called `_show_version` by now.
    del version


def main() -> None:
    """Runs the command line. Errors of CliffScope are printed on one line and become exit codes."""
    log_to_standard_error()
    _make_importable(sys.argv[1:])
    try:
        app()
    except CliffScopeError as error:
        show(f"cliffscope: {error}", err=True, one_line=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer catches the interrupt and exits with this code.
        if end.code == INTERRUPTED:
            show("cliffscope: interrupted. Rerun the command to resume.", err=True)
        raise


def _make_importable(words: Sequence[str]) -> None:
    """Lets `package.module:name` name a module of the working directory.

    An installed program does not search the working directory. It is appended only if a word has this form, so that no
    command imports code from a directory that it merely runs in.
    """
    here = str(Path.cwd())
    if here not in sys.path and any(_MODULE_NAME.fullmatch(word.partition("=")[2] or word) for word in words):
        sys.path.append(here)


def read_probe(path: Path) -> "RefusalProbe":
    """Loads the probe of a directory that fit-probe or study wrote."""
    from cliffscope.store import RunStore
    from cliffscope.study.saved_readouts import load_probe

    return load_probe(RunStore(path=path))


def show(text: str, *, err: bool = False, color: str | None = None, one_line: bool = False) -> None:
    """Prints text; nothing else in the package prints.

    Args:
        text: may hold text of models, data and servers, whose control characters are shown as escapes.
        err: print to standard error.
        color: color of the text on a terminal.
        one_line: show line breaks as escapes too.
    """
    shown = visible(text, one_line=one_line)
    typer.echo(shown if color is None else typer.style(shown, fg=color), err=err)


def say(as_json: bool, data: Mapping[str, object], text: str, omitted: "tuple[Omission, ...] | None" = None) -> None:
    """Prints the result, and on standard error what was left out and why."""
    for kind, n in Counter(omission.kind for omission in omitted or ()).items():
        show(f"left out {n}: {kind}", err=True, one_line=True)
    left_out = {} if omitted is None else {"omitted": len(omitted)}
    show(json.dumps({**data, **left_out}, ensure_ascii=False) if as_json else text)


def say_table(as_json: bool, frame: "pd.DataFrame", text: str, out: Path, omitted: "tuple[Omission, ...]") -> None:
    """Prints the first rows of a table, or all of them as JSON."""
    rows = json.loads(frame.to_json(orient="records")) if as_json else []
    table = frame.head(10).to_string(index=False)
    say(as_json, {"out": str(out), "rows": rows}, f"{table}\n{text}", omitted)
