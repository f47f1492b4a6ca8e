"""How do the stored results of a run become one page that opens with the network cut?

1. Read the run directory (`stored.py`).
2. Build the sections in the order of the argument (`evidence.py`, `tokens.py`, `outcomes.py`).
3. Render `page.html.j2` with autoescape, every value made printable. Figures are JSON in inert script elements;
   plotly.js is inlined once.
4. Forbid everything else by a content security policy: no request, and no script but the two whose hashes it names.
5. Write the page at once, so that a killed run leaves the old page or the new one.

Text from models and data is untrusted: it is made printable and capped where it is read, and escaped by the template.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cliffscope.errors import StoreError
from cliffscope.figures import printable
from cliffscope.report.content import Section
from cliffscope.report.evidence import cliff_section, heads_section, probe_section
from cliffscope.report.outcomes import (
    omitted_section,
    pretty,
    repair_section,
    run_section,
    safety_section,
    selection_section,
    tiles,
)
from cliffscope.report.stored import StoredRun, read_run
from cliffscope.report.tokens import tokens_section
from cliffscope.store import write_atomically

LONGEST = 20_000
"""Most characters of any one text on the page."""
VERDICTS = ("cliff", "heads", "intervention", "selection", "repair", "probe")
"""Verdicts of the manifest in the order of the page; each bears the id of the section that argues it."""


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run as one self-contained HTML file.

    Args:
        run_dir: A run directory: manifest.json and whichever tables its stages left.
        path: Where to write; by default report.html in the run directory.

    Returns:
        The path of the page. It loads nothing from anywhere, and holds about 5 MB, most of it plotly.js.

    Raises:
        StoreError: The directory holds no manifest.json, or the page cannot be written.
        DataError: A file of the run is there and cannot be read.
    """
    page = render(read_run(run_dir))
    target = Path(path) if path is not None else Path(run_dir) / "report.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}. Give another path.") from error
    # Bytes, because a changed newline would break the hashes of the security policy.
    write_atomically(target, lambda partial: partial.write_bytes(page.encode("utf-8")))
    return target


def render(run: StoredRun) -> str:
    """The page of a stored run as HTML."""
    environment = Environment(
        loader=PackageLoader("cliffscope.report", ""),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    # Ours first: tables and controls work while the browser is still reading the megabytes of plotly.js.
    scripts = (_asset("page.js"), get_plotlyjs())
    return environment.get_template("page.html.j2").render(
        model=printable(str(run.section("model").get("name") or "this model"), limit=120),
        version=printable(str(run.manifest.get("cliffscope") or "unknown"), limit=40),
        verdicts=_verdicts(run),
        tiles=tiles(run),
        sections=_sections(run),
        method=_method(run),
        reproduce=_reproduce(run),
        style=_asset("page.css"),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
    )


def _sections(run: StoredRun) -> list[Section]:
    builders = (
        run_section,
        cliff_section,
        tokens_section,
        heads_section,
        safety_section,
        selection_section,
        # A repair is made on request alone, and is then told of even where it could not be made.
        *((repair_section,) if run.section("config").get("repair") or len(run.tables["repair"]) else ()),
        probe_section,
        omitted_section,
    )
    return [build(run) for build in builders]


def _verdicts(run: StoredRun) -> list[tuple[str, str]]:
    found = run.section("verdict")
    named = ((name, found.get(name)) for name in VERDICTS)
    return [(name, printable(str(text), limit=600)) for name, text in named if text]


def _method(run: StoredRun) -> dict[str, str]:
    facts = {
        "layer": run.probe.get("layer"),
        "positions": run.probe.get("positions"),
        "method": run.heads.get("method"),
        "scope": run.heads.get("scope"),
        "top_fraction": run.heads.get("top_fraction"),
        "path": run.heads.get("path"),
    }
    return {name: printable(str(value), limit=60) if value is not None else "" for name, value in facts.items()}


def _reproduce(run: StoredRun) -> dict[str, object]:
    config = run.section("config")
    return {
        "command": printable(str(run.manifest.get("command") or "not recorded"), limit=2000, keep_newlines=True),
        "config": printable(pretty(config), limit=LONGEST, keep_newlines=True) if config else "",
        "versions": [(printable(k, limit=40), printable(str(v), limit=60)) for k, v in run.section("versions").items()],
        "fingerprint": printable(str(run.section("model").get("fingerprint") or "not recorded"), limit=200),
        "seed": printable(str(config.get("seed", "not recorded")), limit=40),
        "schema": printable(str(run.manifest.get("schema", "unknown")), limit=20),
    }


def _finalize(value: object) -> object:
    # The last gate: nothing invisible reaches the page, whichever way it came; only our own assets are marked safe.
    return value if isinstance(value, Markup) or not isinstance(value, str) else _shown(value)


def _shown(text: str) -> str:
    return printable(text, limit=LONGEST, keep_newlines=True)


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
