"""What the documentation is built from beside its own pages.

The tutorials are the notebooks of examples/, with the outputs that the tests leave in docs/tutorials/. Where the tests
have not been run, or a notebook has changed since, it is shown without outputs.
"""

import json
import logging
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
TUTORIALS = Path(__file__).parent / "tutorials"
log = logging.getLogger("mkdocs.hooks.tutorials")


def on_pre_build(**_kwargs: Any) -> None:
    """Puts every notebook into docs/tutorials/."""
    TUTORIALS.mkdir(exist_ok=True)
    for notebook in sorted(EXAMPLES.glob("*.ipynb")):
        shown = TUTORIALS / notebook.name
        if not shown.is_file() or sources(shown) != sources(notebook):
            log.info("%s is shown without outputs: run tests/test_examples.py first.", notebook.name)
            shown.write_bytes(notebook.read_bytes())


def sources(notebook: Path) -> list[str]:
    """The cells' sources."""
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
