"""How large is a report, how soon can it be used, and what do figures cost?

1. A made-up run of 200 transcripts and 30 layers is written as a page; Debian's chromium opens it several times.
   Interactive: `domInteractive`, when tables and controls work. Drawn: every figure is there.
2. Every figure function makes its figure of 3,000 transcripts (or tokens, or a grid of 128 x 128 heads).

Prints JSON; times are medians in seconds, beside that of an empty page and of one plain plotly heat map in the same
process.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from playwright.sync_api import Browser, sync_playwright

from cliffscope.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import write_run  # noqa: E402
from test_figures import many  # noqa: E402

INTERACTIVE = "performance.timing.domInteractive - performance.timing.navigationStart"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(write_run(Path(folder) / "run", n=200, n_layers=30, n_heads=32, length=200))
        blank = Path(folder) / "blank.html"
        blank.write_text("<!doctype html><title>blank</title>")
        page_report = {"page_bytes": page.stat().st_size, **browse(page, blank, repeats)}
    plain = median(lambda: go.Figure(go.Heatmap(z=np.zeros((128, 128)).tolist())), repeats)
    figures = [round(median(make, repeats), 4) for make in many(3000)]
    print(
        json.dumps(
            {**page_report, "plain_heatmap": round(plain, 4), "figures": figures, "slowest_figure": max(figures)}
        )
    )


def browse(page: Path, blank: Path, repeats: int) -> dict[str, float]:
    """Medians of the page and of an empty one."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        times = [(*open_page(browser, page), open_page(browser, blank, drawn=False)[0]) for _ in range(repeats)]
        browser.close()
    names = ("interactive", "drawn", "blank_interactive")
    return {
        name: round(statistics.median(column), 3) for name, column in zip(names, zip(*times, strict=True), strict=True)
    }


def open_page(browser: Browser, path: Path, *, drawn: bool = True) -> tuple[float, float]:
    """Seconds until the page can be used, and until every figure is drawn."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    start = time.perf_counter()
    tab.goto(path.as_uri())
    if drawn:
        tab.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
    seconds = time.perf_counter() - start
    interactive = float(tab.evaluate(INTERACTIVE)) / 1000
    tab.close()
    return interactive, seconds


def median(make: Callable[[], go.Figure], repeats: int) -> float:
    """Seconds to make a figure and write it as JSON."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        make().to_json()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
