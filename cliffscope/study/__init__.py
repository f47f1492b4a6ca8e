"""Studies: the main path as stages, and the run directory they fill."""
