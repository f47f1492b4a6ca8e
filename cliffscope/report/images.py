"""Which figures of a run become images?

Every plotly figure of the report, with the title that is its caption there. It measures and draws nothing itself.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import plotly.graph_objects as go

from cliffscope.errors import DataError
from cliffscope.figures.images import WIDTH, save_figures
from cliffscope.figures.theme import caption
from cliffscope.report.content import Part, Plot, Row, TokenView
from cliffscope.report.page import sections_of
from cliffscope.report.stored import read_run


def write_images(
    run_dir: str | Path,
    out: str | Path,
    *,
    formats: Sequence[str] = ("svg",),
    only: Sequence[str] = (),
    width: int = WIDTH,
) -> list[Path]:
    """Writes the figures of a run's report as images.

    Args:
        run_dir: a run directory.
        out: folder of the images, such as cliff.svg, grid.svg and arms.svg.
        formats: svg, png, pdf, webp, jpeg, html or json.
        only: names of the figures, such as "cliff"; empty writes all.
        width: in pixels.

    Returns:
        The paths.

    Raises:
        DataError: the run has no figure, none of a name in `only`, or a format is none of these.
        MissingExtraError: kaleido, or a Chrome for it, is not installed.
        StoreError: the directory holds no run, or a file cannot be written.
    """
    sections = sections_of(read_run(run_dir))
    plots = {p.id.removeprefix("figure-"): p for section in sections for part in section.parts for p in _plots(part)}
    if not plots:
        raise DataError(f"{run_dir} holds no results to draw. Finish the study first.")
    unknown = [name for name in only if name not in plots]
    if unknown:
        raise DataError(f"{run_dir} has no figure {', '.join(unknown)}; it has {', '.join(plots)}.")
    kinds = [kind.removeprefix(".") for kind in formats]
    figures = {Path(out) / f"{name}.{kind}": _titled(plots[name]) for name in (only or plots) for kind in kinds}
    save_figures(figures, width=width)
    return list(figures)


def _titled(plot: Plot) -> go.Figure:
    """The figure with the title, and its n, that stands in the caption on the page."""
    figure = go.Figure(json.loads(plot.spec))
    top = figure.layout.margin.t or 0
    figure.update_layout(title_text=caption(plot.title), margin_t=top + 24, height=plot.height + 24)
    return figure


def _plots(part: Part) -> Iterator[Plot]:
    if isinstance(part, Plot):
        yield part
    elif isinstance(part, Row):
        for one in part.parts:
            yield from _plots(one)
    elif isinstance(part, TokenView) and part.heat is not None:
        yield part.heat
