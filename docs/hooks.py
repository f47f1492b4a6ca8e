"""What the documentation is built from beside its own pages.

1. The tutorials are the notebooks of examples/, with the outputs that tests leave in docs/tutorials/. Where the tests
   have not been run, or a notebook has changed since, it is shown without outputs.
2. The figure of the first page is that of `make picture`, alive: plotly.js is copied from the installation, so that the
   pages load nothing from elsewhere.
3. The reference has a page for each room of the package, written from its files: a new module needs no page of its own.
"""

import ast
import json
import logging
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from plotly.offline import get_plotlyjs

from cliffscope.figures import embed

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "cliffscope"
GROUND = "ground"
"""Page of the modules that lie in no room."""
EXAMPLES, TUTORIALS = DOCS.parent / "examples", DOCS / "tutorials"
PLOTLY = Path("assets") / "javascripts" / "plotly.min.js"
MARK = "<!-- figure: closings -->"
LIVE = """<div id="closings" style="height:{height}px"></div>
<noscript><img src="figures/closings.svg" alt="What would be answered, had the thinking ended earlier"></noscript>
<script type="application/json" id="closings-data">{data}</script>
<script src="{plotly}"></script>
<script>
  const figure = JSON.parse(document.getElementById("closings-data").textContent);
  Plotly.newPlot("closings", figure.data, figure.layout, {{displayModeBar: false, responsive: true}});
</script>
"""
log = logging.getLogger("mkdocs.hooks.tutorials")


def reference_pages() -> dict[str, str]:
    """Room to the Markdown of its reference page."""
    rooms = sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))
    pages = {room.name: _room_page(room, f"cliffscope.{room.name}") for room in rooms}
    loose = [p.stem for p in sorted(PACKAGE.glob("*.py")) if not p.stem.startswith("__")]
    return {**pages, GROUND: "\n".join(["# Ground", "", *(f"::: cliffscope.{name}" for name in loose), ""])}


def _room_page(room: Path, module: str) -> str:
    files = sorted(p for p in room.rglob("*.py") if p.stem != "__init__")
    names = [str(p.relative_to(room).with_suffix("")).replace("/", ".") for p in files]
    source = (room / "__init__.py").read_text(encoding="utf-8")
    opening = ast.get_docstring(ast.parse(source)) or room.name
    package = [f"::: {module}"] if "def " in source else []
    lines = [
        f"# {room.name}",
        "",
        opening.splitlines()[0],
        "",
        *package,
        *(f"::: {module}.{name}" for name in names),
        "",
    ]
    return "\n".join(lines)


def on_config(config: Any, **_kwargs: Any) -> Any:
    """Adds the reference pages to the navigation."""
    for entry in config["nav"]:
        if "Reference" in entry:
            entry["Reference"] += [{name: f"reference/{name}.md"} for name in reference_pages()]
    return config


def on_files(files: Any, config: Any, **_kwargs: Any) -> Any:
    """Adds the reference pages themselves."""
    for name, text in reference_pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


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


def on_page_markdown(markdown: str, **_kwargs: Any) -> str:
    """Puts the live figure where a page asks for it."""
    if MARK not in markdown:
        return markdown
    figure = json.loads((DOCS / "figures" / "closings.json").read_text(encoding="utf-8"))
    live = LIVE.format(height=figure["layout"]["height"], data=embed(figure), plotly=PLOTLY.as_posix())
    return markdown.replace(MARK, live)


def on_post_build(config: Any, **_kwargs: Any) -> None:
    """Copies plotly.js from the installation."""
    target = Path(config["site_dir"]) / PLOTLY
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(get_plotlyjs(), encoding="utf-8")
