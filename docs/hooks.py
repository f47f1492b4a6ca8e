"""What the documentation is built from beside its own pages.

1. The tutorials are the notebooks of examples/, with the outputs that tests leave in docs/tutorials/. Where the tests
   have not been run, or a notebook has changed since, it is shown without outputs.
2. The figure of the first page is that of `make picture`, alive: plotly.js is copied from the installation, so that the
   pages load nothing from elsewhere.
"""

import json
import logging
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from cliffscope.figures import embed

DOCS = Path(__file__).parent
EXAMPLES, TUTORIALS = DOCS.parent / "examples", DOCS / "tutorials"
PLOTLY = Path("assets") / "javascripts" / "plotly.min.js"
MARK = "<!-- figure: cliff -->"
LIVE = """<div id="cliff" style="height:{height}px"></div>
<noscript><img src="figures/cliff.svg" alt="Mean refusal score by position and group"></noscript>
<script type="application/json" id="cliff-data">{data}</script>
<script src="{plotly}"></script>
<script>
  const figure = JSON.parse(document.getElementById("cliff-data").textContent);
  Plotly.newPlot("cliff", figure.data, figure.layout, {{displayModeBar: false, responsive: true}});
</script>
"""
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


def on_page_markdown(markdown: str, **_kwargs: Any) -> str:
    """Puts the live figure where a page asks for it."""
    if MARK not in markdown:
        return markdown
    figure = json.loads((DOCS / "figures" / "cliff.json").read_text(encoding="utf-8"))
    live = LIVE.format(height=figure["layout"]["height"], data=embed(figure), plotly=PLOTLY.as_posix())
    return markdown.replace(MARK, live)


def on_post_build(config: Any, **_kwargs: Any) -> None:
    """Copies plotly.js from the installation."""
    target = Path(config["site_dir"]) / PLOTLY
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(get_plotlyjs(), encoding="utf-8")
