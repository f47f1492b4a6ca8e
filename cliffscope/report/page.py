"""How do the stored results of a run become one page that opens with the network cut?

1. Read the run directory (`stored.py`).
2. Build the sections in the order of the argument: what the model does, then what the probe sees (`behaviour.py`,
   `outcomes.py`, `evidence.py`, `tokens.py`).
3. Render `page.html.j2` with autoescape, every value made printable. Figures are JSON in inert script elements;
   plotly.js is inlined once.
4. Forbid everything else by a content security policy: no request, and no script but the two whose hashes it names.
5. Write the page at once, so that a killed run leaves the old page or the new one.

Text from models and data is untrusted: it is made printable and capped where it is read, and escaped by the template.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cliffscope.errors import DataError, StoreError
from cliffscope.figures import printable
from cliffscope.figures.circuits import circuits_script
from cliffscope.report.behaviour import closings_section, suppression_section, witnesses_section
from cliffscope.report.comparison import NamedRun, comparison_sections, comparison_tiles
from cliffscope.report.content import Circuits, Section
from cliffscope.report.evidence import cliff_section, heads_section
from cliffscope.report.outcomes import (
    omitted_section,
    pretty,
    repair_section,
    run_section,
    safety_section,
    selection_section,
    tiles,
)
from cliffscope.report.readouts import answer_section, probe_section
from cliffscope.report.stored import StoredRun, read_run
from cliffscope.report.tokens import tokens_section
from cliffscope.store import write_atomically
from cliffscope.study.artefacts import REPORT

LONGEST = 20_000
"""Most characters of any one text on the page."""
LONGEST_VERDICT = 1500
"""Most characters of a finding."""
VERDICTS = {
    "forced": "run",
    "suppression": "suppression",
    "intervention": "intervention",
    "heads": "heads",
    "side effects": "intervention",
    "answer": "answer",
    "cliff": "cliff",
    "probe": "probe",
    "witnesses": "witnesses",
    "selection": "selection",
    "repair": "repair",
}
"""Topics of findings in the order of the page, and the id of the section that argues each."""


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Writes the report of a run as one self-contained HTML file.

    Args:
        run_dir: A run directory: manifest.json and whichever tables its stages left.
        path: Where to write; by default report.html in the run directory.

    Returns:
        The path of the page. It loads nothing from anywhere, and holds about 6 MB, most of it scripts.

    Raises:
        StoreError: The directory holds no manifest.json, or the page cannot be written.
        DataError: A file of the run is there and cannot be read.
    """
    return _write(render(read_run(run_dir)), Path(path) if path is not None else Path(run_dir) / REPORT.file)


def write_comparison(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Writes a page that compares two runs.

    Args:
        run_dirs: two run directories.
        path: where to write.

    Returns:
        The path of the page.

    Raises:
        DataError: the number of directories is not two, or a file of a run cannot be read.
        StoreError: a directory holds no run, or the page cannot be written.
    """
    if len(run_dirs) != 2:
        raise DataError(f"{len(run_dirs)} run directories were passed; a comparison takes exactly two.")
    short = [Path(folder).resolve().name for folder in run_dirs]
    full = [str(folder) for folder in run_dirs]
    names = [printable(name, limit=60) for name in (short if len(set(short)) > 1 else full)]
    runs = [
        NamedRun(name=f"{letter}: {name}", run=read_run(folder))
        for letter, name, folder in zip("AB", names, run_dirs, strict=True)
    ]
    page = _page(
        comparison_sections(runs),
        dict(
            title=" and ".join(names),
            kicker="comparison of two runs",
            heading=[("How do ", names[0]), (" and ", names[1]), (" differ?", "")],
            version=_version(runs[-1].run),
            verdicts=[],
            leading=1,
            tiles=comparison_tiles(runs),
            method=None,
            reproduce=[{**_reproduce(one.run), "name": one.name} for one in runs],
        ),
    )
    return _write(page, Path(path))


def _write(page: str, target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}. Choose a different path.") from error
    # Bytes, because a changed newline would break the hashes of the security policy.
    write_atomically(target, lambda partial: partial.write_bytes(page.encode("utf-8")))
    return target


def render(run: StoredRun) -> str:
    """The page of a stored run as HTML."""
    model = printable(str(run.section("model").get("name") or "this model"), limit=120)
    return _page(
        sections_of(run),
        dict(
            title=model,
            kicker="refusal cliff report",
            heading=[("Does ", model), (" lose its refusal between thinking and answer?", "")],
            version=_version(run),
            verdicts=_verdicts(run),
            leading=2 if run.finding("forced") else 1,
            tiles=tiles(run),
            method=_method(run),
            reproduce=[{**_reproduce(run), "name": ""}],
        ),
    )


def _version(run: StoredRun) -> str:
    return printable(str(run.manifest.get("cliffscope") or "unknown"), limit=40)


def _page(sections: list[Section], values: Mapping[str, object]) -> str:
    environment = Environment(
        loader=PackageLoader("cliffscope.report", ""),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    # Counted here and not by the style: what is closed on screen keeps its number.
    environment.globals["figure_number"] = count(1).__next__
    # Ours first: tables and controls work while the browser is still reading the megabytes of plotly.js.
    scripts = [_asset("page.js"), get_plotlyjs()]
    if any(isinstance(part, Circuits) for section in sections for part in section.parts):
        scripts.append(circuits_script())
    hashes = [_hash(script) for script in scripts]
    return environment.get_template("page.html.j2").render(
        sections=sections, style=_asset("page.css"), scripts=scripts, hashes=hashes, **values
    )


def sections_of(run: StoredRun) -> list[Section]:
    """The sections of a run's page, in the order of the argument."""
    builders = (
        run_section,
        suppression_section,
        safety_section,
        heads_section,
        closings_section,
        answer_section,
        cliff_section,
        tokens_section,
        probe_section,
        witnesses_section,
        selection_section,
        # A repair runs on request only; once requested, the page reports it even if it failed.
        *((repair_section,) if run.settings.get("repair") or len(run.tables["repair"]) else ()),
        omitted_section,
    )
    return [build(run) for build in builders]


def _verdicts(run: StoredRun) -> list[tuple[str, str]]:
    verdicts = run.section("verdict")
    return [
        (section, printable(str(verdicts[topic]), limit=LONGEST_VERDICT))
        for topic, section in VERDICTS.items()
        if verdicts.get(topic)
    ]


def _method(run: StoredRun) -> dict[str, str]:
    facts = {
        "layer": run.probe.get("layer"),
        "positions": run.probe.get("positions"),
        "method": run.heads.get("method"),
        "scope": run.heads.get("scope"),
        "top_fraction": run.suppression.get("top_fraction"),
        "path": run.heads.get("path"),
    }
    return {name: printable(str(value), limit=60) if value is not None else "" for name, value in facts.items()}


def _reproduce(run: StoredRun) -> dict[str, object]:
    config = run.settings
    return {
        "command": printable(str(run.manifest.get("command") or "not recorded"), limit=2000, keep_newlines=True),
        "config": printable(pretty(config), limit=LONGEST, keep_newlines=True) if config else "",
        "versions": [(printable(k, limit=40), printable(str(v), limit=60)) for k, v in run.versions.items()],
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
