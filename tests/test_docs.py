"""The documentation says what the package does: snippets run, commands and modules are covered, words defined once."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import click
import pytest
import typer.main
from conftest import check_documented
from typer.core import TyperGroup

import cliffscope
from cliffscope.cli import app
from cliffscope.errors import MissingExtraError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COMMUNITY = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / ".github").rglob("*.md"))]
ASSET = Path(cliffscope.__file__).parent / "organisms" / "assets" / "planted-llama" / "model.safetensors"
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
WORDS = {
    *(
        "transcript",
        "span",
        "outcome",
        "residual",
        "probe",
        "trace",
        "plateau",
        "final",
        "cliff",
        "head",
        "effect",
        "edit",
    ),
    *("suppression heads", "organism", "asr", "over-refusal"),
    *("readout", "opening", "suppression", "early closing", "selective, broad"),
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line number and source of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] == "python"]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """The id that the pages give a heading."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def commands() -> list[str]:
    """Every command as it is typed, without its options."""
    found = []
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        found += [f"{name} {sub}" for sub in command.commands] if isinstance(command, TyperGroup) else [name]
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=name_of)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    if not ASSET.is_file():
        pytest.skip("the organism planted-llama has not been grown: its assets are not in the package")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, source in snippets(page):
        # Blank lines before the source make tracebacks name the line of the page.
        try:
            exec(compile("\n" * line + source, str(page), "exec"), namespace)
        except MissingExtraError as error:
            pytest.skip(str(error))
    assert "cs" in namespace


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=name_of)
def test_the_snippets_of_a_page_are_python(page):
    for line, source in snippets(page):
        assert compile("\n" * line + source, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_says_what_it_holds(page):
    assert {m[1] for m in FENCE.finditer(page.read_text(encoding="utf-8"))} <= {"python", "text"}


def test_every_command_has_its_section():
    assert sorted(h for h in headings(DOCS / "cli.md") if h.startswith("cliffscope ")) == sorted(
        f"cliffscope {name}" for name in commands()
    )


@pytest.mark.parametrize("name", commands())
def test_the_options_of_a_command_are_listed_as_the_program_has_them(name):
    group = typer.main.get_command(app)
    command = group
    for word in name.split():
        assert isinstance(command, TyperGroup)
        command = command.commands[word]
    rows = [option_row(param) for param in command.params if param.name != "help"]
    table = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) if rows else "No options."
    check_documented(name, f"{table}\n", page_name="cli.md")


def option_row(param):
    names = ", ".join(f"`{o}`" for o in (*param.opts, *param.secondary_opts)) if param.opts[0].startswith("-") else ""
    default = param.default() if callable(param.default) else param.default
    if isinstance(default, list | tuple):
        default = ", ".join(map(str, default))
    shown = "required" if param.required else "–" if default in (None, "") else "off" if default is False else default
    return f"| {names or f'`{param.name.upper()}`'} | {shown} | {param.help or ''} |"


def test_commands_in_text_blocks_exist():
    known = commands()
    for page in PAGES:
        for kind, source in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in source.splitlines() if kind == "text" else ():
                typed = re.match(r"cliffscope ([a-z].*)", line)
                assert typed is None or any(f"{typed[1]} ".startswith(f"{name} ") for name in known), (page, line)


def test_options_in_the_documentation_exist():
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    every: list[click.Command] = [group]
    every += [c for g in (group, *group.commands.values()) if isinstance(g, TyperGroup) for c in g.commands.values()]
    known = {name for c in every for p in c.params for name in (*p.opts, *p.secondary_opts)} | {
        "--help",
        "--install-completion",
    }
    sections = FENCE.findall((DOCS / "cli.md").read_text(encoding="utf-8"))
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose(DOCS / "cli.md") + "".join(s for _, s in sections)))
    assert written <= known


def test_each_word_of_the_glossary_is_defined_once():
    defined = [h.lower() for h in re.findall(r"^### (.+)$", prose(DOCS / "glossary.md"), re.MULTILINE)]
    assert len(defined) == len(set(defined))
    assert set(defined) >= WORDS
    elsewhere = {h.lower() for page in DOCS.rglob("*.md") if page.name != "glossary.md" for h in headings(page)[1:]}
    assert not WORDS & elsewhere


@pytest.mark.parametrize("page", [*PAGES, *COMMUNITY], ids=name_of)
def test_internal_links_resolve(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        linked = page.parent / file if file else page
        if "tutorials/" in file:
            linked = ROOT / "examples" / linked.name
        assert linked.is_file(), target
        assert not fragment or fragment in {anchor(h) for h in headings(linked)}, target


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_every_module_has_a_reference_page():
    package = Path(cliffscope.__file__).parent
    modules = {
        str(p.relative_to(package.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in package.rglob("*.py")
        if p.name != "__main__.py" and (p.name != "__init__.py" or "def " in p.read_text(encoding="utf-8"))
    }
    pytest.importorskip("mkdocs", reason="the reference pages are written while the documentation is built")
    spec = spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "\n".join(hooks.reference_pages().values())
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert shown == modules - {"cliffscope"}


def test_every_public_name_is_in_the_reference_and_shown_by_a_page():
    written = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`\]", written)) == set(cliffscope.__all__)


def test_no_page_names_a_path_of_a_machine():
    for page in [*PAGES, *COMMUNITY, ROOT / "CHANGELOG.md", ROOT / "mkdocs.yml"]:
        assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/", page.read_text(encoding="utf-8")), page
