"""The one style of the figures: colours told apart with any colour vision, sizes, fonts."""

from collections.abc import Callable, Sequence
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
NORMAL, ANOMALOUS = "#0072B2", "#D55E00"  # blue, vermillion
GREEN, ORANGE, SKY, PURPLE, BLACK, GRAY = (
    "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#767676",
)  # fmt: skip
PALETTE = (NORMAL, ANOMALOUS, GREEN, ORANGE, SKY, PURPLE, BLACK)
MAP_COLOURS = "inferno"  # perceptually uniform: twice the value looks twice as bright
SIGNED_COLOURS = "PuOr"  # for values around zero, also told apart with any colour vision
WIDTH = 9.6  # inches, of every figure that spans the page

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "figure.titlesize": 12,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": True,  # white: a line that crosses it would strike its text out
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.8,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "image.cmap": MAP_COLOURS,
}


def use_style() -> None:
    """Give a notebook's own plots the style of the figures below."""
    plt.rcParams.update(STYLE)


class DescribedFigure(Figure):
    """A figure that tells a notebook its alternative text, for readers who cannot see it."""

    @property
    def alternative_text(self) -> str:
        """The title over all axes, else the titles of the axes, else the figure's label."""
        titles = [self.get_suptitle()], [ax.get_title() for ax in self.axes], [self.get_label()]
        found = ("; ".join(filter(None, texts)) for texts in titles)
        return " ".join(next(filter(None, found), "").replace("$", "").split())

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return {}, {"image/png": {"alt": self.alternative_text}}  # Jupyter draws the image itself


def drawn_in_style(draw: Callable[..., DescribedFigure]) -> Callable[..., DescribedFigure]:
    """Draw in the style above; the docstring's first line is the label of the figure."""

    @wraps(draw)
    def styled(*args, **kwargs) -> DescribedFigure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        figure.set_label((draw.__doc__ or "").partition("\n")[0])
        return figure

    return styled


def new_figure(
    rows: int = 1, columns: int = 1, height: float = 3.2, width: float = WIDTH, **options
) -> tuple[DescribedFigure, np.ndarray]:
    """A figure and its axes, shape (rows, columns); closed, or pyplot would show it once more."""
    size = {"figsize": (width, height), "FigureClass": DescribedFigure}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **size, **options)
    plt.close(figure)
    return figure, axes


def group_colours(names: Sequence[str]) -> dict[str, str]:
    """Blue for "normal" and "good", vermillion for "anomalous", the palette's others in order."""
    fixed = {"normal": NORMAL, "good": NORMAL, "anomalous": ANOMALOUS}
    taken = {fixed[name] for name in names if name in fixed}
    others = iter([colour for colour in PALETTE * len(names) if colour not in taken])
    return {name: fixed.get(name) or next(others) for name in names}


def finite(values, what: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{what} must be finite numbers, not none, NaN or infinity")
    return values
