"""How does a figure get into a paper, or onto another page?

Figures are drawn for pages that may be light or dark, with greys that read on both. An image is for paper: its text is
dark, its ground white or none, its size that of a column. plotly's kaleido draws it, in a Chrome or chromium that must
be there. A page of its own (`.html`, which loads nothing) and plotly's JSON need neither.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import plotly.graph_objects as go

from cliffscope.errors import DataError, MissingExtraError, StoreError
from cliffscope.figures import theme
from cliffscope.writing import check_writable, write_atomically

IMAGES = ("svg", "png", "pdf", "webp", "jpeg")
FORMATS = (*IMAGES, "html", "json")
WIDTH = 900
"""Pixels: legible at the width of a page of text."""


def save_figure(
    figure: go.Figure, path: str | Path, *, width: int = WIDTH, scale: float = 2.0, transparent: bool = False
) -> Path:
    """Writes a figure as an image, a page or JSON; the figure itself stays as it is.

    Args:
        figure: any figure of CliffScope, or another of plotly's.
        path: where to write; its suffix is the format: .svg, .png, .pdf, .webp, .jpeg, .html or .json.
        width: in pixels; the height is the figure's own.
        scale: device pixels a pixel, for formats that have pixels.
        transparent: no ground, and the greys that read on light and dark pages alike.

    Returns:
        The path.

    Raises:
        DataError: the suffix is none of these.
        MissingExtraError: kaleido, or a Chrome for it, is not installed.
        StoreError: the file cannot be written.
    """
    target = Path(path)
    save_figures({target: figure}, width=width, scale=scale, transparent=transparent)
    return target


def save_figures(
    figures: Mapping[Path, go.Figure], *, width: int = WIDTH, scale: float = 2.0, transparent: bool = False
) -> None:
    """Writes several figures with one start of the browser; arguments and errors as of `save_figure`."""
    for target in figures:
        if _kind(target) not in FORMATS:
            raise DataError(f"{target.name}: expected a file name that ends in one of .{', .'.join(FORMATS)}.")
    drawn = {t: _on_paper(f, transparent=transparent) for t, f in figures.items() if _kind(t) in IMAGES}
    try:
        for target in figures:
            target.parent.mkdir(parents=True, exist_ok=True)
            check_writable(target)
        # The browser writes elsewhere first: an image is whole or not there.
        with tempfile.TemporaryDirectory() as folder:
            images = {Path(folder) / f"{i}.{_kind(t)}": figure for i, (t, figure) in enumerate(drawn.items())}
            if images:
                _draw(images, width=width, scale=scale)
            contents = dict(zip(drawn, images, strict=True))
            for target, figure in figures.items():
                write_atomically(target, partial(_write, figure, _kind(target), contents.get(target)))
    except OSError as error:
        raise StoreError(f"An image cannot be written: {error}. Choose a different path.") from error


def _write(figure: go.Figure, kind: str, drawn: Path | None, path: Path) -> None:
    """Writes a figure to a path, whose name does not say what kind it is."""
    if drawn is not None:
        shutil.copyfile(drawn, path)
    elif kind == "json":
        path.write_text(figure.to_json(), encoding="utf-8")
    else:
        path.write_text(figure.to_html(include_plotlyjs=True, include_mathjax=False), encoding="utf-8")


def _draw(figures: Mapping[Path, go.Figure], *, width: int, scale: float) -> None:
    try:
        # plotly's own messages do not name the extra.
        from choreographer.errors import ChromeNotFoundError
        from plotly.io import write_images
    except ImportError as error:
        raise MissingExtraError("Writing images needs kaleido: pip install 'cliffscope[figures]'.") from error
    # It tells of messages cut off as its browser closes, which is after the images were written.
    driver = logging.getLogger("choreographer")
    level = driver.level
    driver.setLevel(logging.CRITICAL)
    try:
        write_images(
            fig=list(figures.values()),
            file=list(figures),
            format=[_kind(target) for target in figures],
            width=width,
            height=[figure.layout.height for figure in figures.values()],
            # Vectors have no pixels: scaled, they would only open larger.
            scale=[1.0 if _kind(target) in ("svg", "pdf") else scale for target in figures],
        )
    except ChromeNotFoundError as error:
        raise MissingExtraError(
            "Writing images needs Chrome or chromium. Install one, or run kaleido_get_chrome."
        ) from error
    finally:
        driver.setLevel(level)


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def _on_paper(figure: go.Figure, *, transparent: bool) -> go.Figure:
    shown = go.Figure(figure)
    if not transparent:
        shown.update_layout(font_color=theme.TEXT, paper_bgcolor="white", plot_bgcolor="white")
    return shown
