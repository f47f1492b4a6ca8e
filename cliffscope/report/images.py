"""Which figures of a run become images?

Every figure of the report, with the caption left to the paper that shows it. It measures and draws nothing itself.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import plotly.graph_objects as go

from cliffscope.errors import DataError
from cliffscope.figures.images import WIDTH, save_figures
from cliffscope.report.content import Part, Plot, Row, TokenView
from cliffscope.report.page import sections_of
from cliffscope.report.stored import read_run


def write_images(
    run_dir: str | Path, out: str | Path, *, formats: Sequence[str] = ("svg",), width: int = WIDTH
) -> list[Path]:
    """Writes every figure of a run's report as images.

    Args:
        run_dir: a run directory.
        out: folder of the images, such as cliff.svg, grid.svg and arms.svg.
        formats: svg, png, pdf, webp or jpeg.
        width: in pixels.

    Returns:
        The paths.

    Raises:
        DataError: the run has no figure, or a format is none of these.
        MissingExtraError: kaleido, or a Chrome for it, is not installed.
        StoreError: the directory holds no run, or a file cannot be written.
    """
    plots = [plot for section in sections_of(read_run(run_dir)) for part in section.parts for plot in _plots(part)]
    if not plots:
        raise DataError(f"{run_dir} holds no result that is drawn. Finish the study first.")
    figures = {
        Path(out) / f"{plot.id.removeprefix('figure-')}.{kind}": go.Figure(json.loads(plot.spec))
        for plot in plots
        for kind in formats
    }
    save_figures(figures, width=width)
    return list(figures)


def _plots(part: Part) -> Iterator[Plot]:
    if isinstance(part, Plot):
        yield part
    elif isinstance(part, Row):
        for one in part.parts:
            yield from _plots(one)
    elif isinstance(part, TokenView) and part.heat is not None:
        yield part.heat
