"""What people see: the pages in Debian's chromium, driven by Playwright, with the network watched."""

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_run

from cliffscope.figures import token_text
from cliffscope.report import write_report
from cliffscope.report.page import write_comparison

CHROMIUM = shutil.which("chromium")
pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium; make test installs it where it may"),
    # Playwright's driver closes its pipes when the interpreter ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@dataclass
class Watched:
    """A page and all that it did beside showing itself."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def check_quiet(self) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("data:", "blob:"))] == []


Open = Callable[..., Watched]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    contexts = []

    def open_file(path: Path, *, drawn: bool = True, **options: object) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        watched = Watched(page=context.new_page())
        page = watched.page
        page.on(
            "console", lambda m: watched.complaints.append(m.text) if m.type in ("error", "warning", "trace") else None
        )
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        page.on("request", lambda request: watched.requests.append(request.url))
        page.goto(path.as_uri())
        assert watched.requests.pop(0) == path.as_uri()
        if drawn:
            page.wait_for_selector("html[data-drawn=yes]", timeout=30_000)
        return watched

    yield open_file
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, report: Path) -> Path:
    other = write_run(tmp_path_factory.mktemp("other"), n=30)
    return write_comparison([report.parent, other], tmp_path_factory.mktemp("pages") / "comparison.html")


def test_a_comparison_draws_its_figures_and_asks_nobody_for_anything(comparison: Path, open_page: Open) -> None:
    seen = open_page(comparison)
    assert seen.page.locator(".js-plotly-plot").count() == seen.page.locator(".plot").count() == 3
    assert seen.page.evaluate("window.bad") is None
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 1280
    seen.check_quiet()


def test_the_report_draws_every_figure_and_asks_nobody_for_anything(report: Path, open_page: Open) -> None:
    seen = open_page(report)
    plots = seen.page.locator(".plot")
    assert seen.page.locator(".js-plotly-plot").count() == plots.count() == 18
    assert seen.page.locator(".circuits span").count() > 20
    seen.check_quiet()


def test_hostile_text_runs_nothing_in_a_browser(report: Path, open_page: Open) -> None:
    seen = open_page(report)
    for details in seen.page.locator("details.transcript").all():
        details.evaluate("d => d.open = true")
    assert seen.page.evaluate("window.bad") is None
    assert seen.page.locator("img").count() == 0
    seen.check_quiet()


def test_pointing_at_a_figure_tells_the_number_with_its_interval(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    grid = page.locator("#figure-grid")
    grid.scroll_into_view_if_needed()
    box = grid.locator(".nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("document.querySelector('#figure-grid .hoverlayer').textContent.length > 10")
    told = grid.locator(".hoverlayer").text_content() or ""
    assert re.search(r"L\d+H\d+effect [−-]?\d\.\d{3} \[[−-]?\d\.\d{3}, [−-]?\d\.\d{3}\]; harmless", told), told


def test_the_layer_control_recolours_the_tokens_and_says_the_layer(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    details = page.locator("details.transcript").filter(has=page.locator("input[data-layers]")).first
    details.evaluate("d => d.open = true")
    control, tokens = details.locator("input[data-layers]"), details.locator(".tokens i")
    before = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).getPropertyValue('--s'))")
    control.focus()
    control.press("Home")
    after = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).getPropertyValue('--s'))")
    assert details.locator("output").text_content() == "0"
    assert np.mean([a != b for a, b in zip(before, after, strict=True)]) > 0.5
    control.press("End")
    assert details.locator("output").text_content() == "7"


def test_tables_sort_by_keyboard_and_filter(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    table = page.locator("#heads .table", has_text="effect (logit)").last
    effect = table.locator("th", has_text="effect (logit)")
    column = effect.evaluate("head => head.cellIndex")
    for key, order in (("Enter", "descending"), ("Space", "ascending")):
        effect.locator("button").focus()
        page.keyboard.press(key)
        assert effect.get_attribute("aria-sort") == order
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_text_contents()
        values = [float(text.replace("−", "-")) for text in cells]
        assert values == sorted(values, reverse=order == "descending")
    table.locator("input[type=search]").fill("L4H3")
    assert table.locator("tbody tr:visible").count() == 1


def test_the_first_tab_offers_to_skip_to_the_evidence(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    page.keyboard.press("Tab")
    focused = page.evaluate("[document.activeElement.className, document.activeElement.getBoundingClientRect().left]")
    assert focused[0] == "skip"
    assert focused[1] >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_axe_finds_no_serious_fault(name: str, scheme: str, open_page: Open, request: pytest.FixtureRequest) -> None:
    # axe is put into the page as a script, which the page's own policy forbids.
    page = open_page(request.getfixturevalue(name), bypass_csp=True, color_scheme=scheme).page
    for details in page.locator("details").all():
        details.evaluate("d => d.open = true")
    found = Axe().run(page).response["violations"]
    serious = [
        f"{v['id']}: {n['html'][:160]}" for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]
    ]
    assert serious == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(report: Path, open_page: Open, width: int) -> None:
    page = open_page(report, viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_paper_gets_every_table_whole_and_no_controls(report: Path, open_page: Open) -> None:
    page = open_page(report).page
    page.emulate_media(media="print")
    assert not page.locator("nav").first.is_visible()
    assert not page.locator(".filter").first.is_visible()
    cut = page.locator(".scroll").evaluate_all("all => all.filter(e => e.scrollHeight > e.clientHeight + 1).length")
    assert cut == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_large_report_can_be_used_while_its_figures_appear(tmp_path: Path, open_page: Open) -> None:
    page = open_page(write_report(write_run(tmp_path / "run", n=200, n_layers=30, n_heads=16, length=200))).page
    timing = page.evaluate("performance.timing.domInteractive - performance.timing.navigationStart")
    # The bar is 2 s on a quiet machine (benchmarks/report.py); two busy cores get room.
    assert timing < 8000


def test_the_slider_of_a_token_figure_changes_the_layer(tmp_path: Path, open_page: Open) -> None:
    score = np.linspace(0, 1, 3)[:, None] * np.ones(12)
    figure = token_text([f" w{i}" for i in range(12)], ["thinking"] * 10 + ["closing"] * 2, score, probe_layer=2)
    target = tmp_path / "figure.html"
    figure.write_html(target, include_plotlyjs=True, div_id="figure")
    seen = open_page(target, drawn=False)
    shade = "document.getElementById('figure').data[0].hovertext[0]"
    seen.page.wait_for_function("document.querySelector('#figure .slider-grip-rect')")
    assert seen.page.evaluate(shade) == "1.000"
    box = seen.page.locator(".slider-rail-touch-rect").bounding_box()
    assert box is not None
    seen.page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    seen.page.wait_for_function(f"{shade} === '0.000'")
    assert "layer 0" in (seen.page.locator(".slider-group").text_content() or "")
    seen.check_quiet()


def test_the_live_figure_of_the_documentation_draws_from_its_own_files(tmp_path: Path, open_page: Open) -> None:
    spec = importlib.util.spec_from_file_location("hooks", Path(__file__).parents[1] / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    hooks.on_post_build({"site_dir": str(tmp_path)})
    page = tmp_path / "index.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{hooks.on_page_markdown(hooks.MARK)}", encoding="utf-8")
    seen = open_page(page, drawn=False)
    seen.page.wait_for_selector("#closings .main-svg")
    assert "selected heads zeroed" in (seen.page.locator("#closings .legend").text_content() or "")
    assert seen.complaints == []
    assert seen.requests == [(tmp_path / hooks.PLOTLY).as_uri()]


NOTEBOOK = """
import numpy as np
import pandas as pd
from cliffscope.figures import token_text
from cliffscope.heads.agreement import RankingAgreement

row = {"first": "zero <b>", "second": "mean", "spearman": 0.5, "overlap": 1.0, "count": 1, "n_first": 4, "n_second": 6}
RankingAgreement(frame=pd.DataFrame([row]))
===
token_text([" a", " b", "<script>window.bad = 1</script>"], ["thinking"] * 3, np.ones((2, 3)))
"""


def test_results_in_a_notebook_show_headline_table_and_figure(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbconvert, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbconvert", "nbclient"))
    monkeypatch.setenv("PLOTLY_RENDERER", "notebook")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in NOTEBOOK.split("===")]
    notebook = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name="python3").execute()
    # The exporter and plotly ask servers for MathJax and require.js, of which nothing here has need.
    quiet = {"mathjax_url": "", "require_js_url": "", "jquery_url": "", "widget_renderer_url": ""}
    page, _ = nbconvert.HTMLExporter(**quiet).from_notebook_node(notebook)
    target = tmp_path / "notebook.html"
    target.write_text(re.sub(r'<script src="[^"]*"[^>]*></script>', "", page), encoding="utf-8")
    seen = open_page(target, drawn=False)
    seen.page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2")
    assert "RankingAgreement(1 pairs, Spearman 0.50 to 0.50" in (seen.page.text_content("body") or "")
    assert seen.page.locator("table.cliffscope td").first.text_content() == "zero <b>"
    assert seen.page.evaluate("window.bad") is None
    seen.check_quiet()
