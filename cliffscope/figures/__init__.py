"""Arrays and labels in, plotly figures out: knows no result class and never shows or writes anything."""

from cliffscope.figures.dose import Panel, agreement, dose_response
from cliffscope.figures.early_closings import closing_curves
from cliffscope.figures.heads import effect_pairs, head_grid, head_ranking, random_sets
from cliffscope.figures.measures import measure_panels
from cliffscope.figures.openings import opening_bars
from cliffscope.figures.safety import Arm, arms, plateau_final
from cliffscope.figures.sources import source_bars
from cliffscope.figures.suppression import paired_points
from cliffscope.figures.theme import embed, printable
from cliffscope.figures.tokens import token_text
from cliffscope.figures.trace import (
    Band,
    bands_of,
    layer_heat,
    mean_trace,
    probe_quality,
    quality_grids,
    token_trace,
)
from cliffscope.figures.transfer import transfer_heat

__all__ = [
    "Arm",
    "Band",
    "Panel",
    "agreement",
    "arms",
    "bands_of",
    "closing_curves",
    "dose_response",
    "effect_pairs",
    "embed",
    "head_grid",
    "head_ranking",
    "layer_heat",
    "mean_trace",
    "measure_panels",
    "opening_bars",
    "paired_points",
    "plateau_final",
    "printable",
    "probe_quality",
    "quality_grids",
    "random_sets",
    "source_bars",
    "token_text",
    "token_trace",
    "transfer_heat",
]
