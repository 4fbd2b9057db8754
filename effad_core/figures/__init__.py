"""Every plot that the notebooks show: numpy arrays in, matplotlib figures out; knows no torch.

Each function draws in one style, takes a title that says what to see, and returns a figure that
nobody else holds: as the last expression of a notebook's cell it is shown once.
"""

from .diagrams import pipeline_diagram
from .images import image_grid, map_panel, matrices, matrix, patches_on_image
from .plots import (
    bars,
    curves,
    labelled_points,
    map_distributions,
    roc_curves,
    score_histogram,
)
from .style import ANOMALOUS, MAP_COLOURS, NORMAL, PALETTE, use_style

__all__ = [
    "ANOMALOUS",
    "MAP_COLOURS",
    "NORMAL",
    "PALETTE",
    "bars",
    "curves",
    "image_grid",
    "labelled_points",
    "map_distributions",
    "map_panel",
    "matrices",
    "matrix",
    "patches_on_image",
    "pipeline_diagram",
    "roc_curves",
    "score_histogram",
    "use_style",
]
