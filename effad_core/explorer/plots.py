"""Histogram, ROC and precision-recall curve; each is drawn once, then only its mark moves."""

from effad_core.figures.style import (
    ANOMALOUS,
    BLACK,
    GRAY,
    NORMAL,
    ORANGE,
    drawn_in_style,
    new_figure,
)
from effad_core.metrics import image_auprc, image_auroc
from effad_core.thresholds import Confusion, precision_recall_curve, roc_curve

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .choices import Choices, span
from .markup import picture

DENSITY = 1.3  # pixels of a plot per pixel of the page: sharper on dense screens


class MovingPlot:
    """A figure that is drawn once; whatever moves in it is drawn on top of that.

    Args:
        figure: its animated artists are left out, and nothing else in it may change.
    """

    def __init__(self, figure: Figure):
        self._figure, self._canvas = figure, FigureCanvasAgg(figure)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def pixels(self, *moving: Artist) -> np.ndarray:
        """With the artists given drawn on top: uint8, shape (H, W, 3)."""
        self._canvas.restore_region(self._background)
        for artist in moving:
            self._figure.draw_artist(artist)
        return np.asarray(self._canvas.buffer_rgba())[..., :3]


class ScorePlots:
    """The three plots of an evaluation's scores, as <img> elements with alternative texts."""

    def __init__(self, choices: Choices):
        self._choices, labels, scores = choices, choices.labels, choices.scores
        figure = _histogram(choices)
        ax = figure.axes[0]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        moving = {"animated": True, "in_layout": False}  # 0 may lie far outside of the axes
        self._line = ax.axvline(0, color=BLACK, lw=1.6, clip_on=False, **moving)
        self._number = ax.text(
            0, 0.97, "", transform=ax.get_xaxis_transform(), va="top", bbox=white, **moving
        )
        self._histogram = MovingPlot(figure)
        if choices.both:
            self._auroc, self._auprc = image_auroc(labels, scores), image_auprc(labels, scores)
            roc, pr = _roc(labels, scores, self._auroc), _pr(labels, scores, self._auprc)
            self._roc_mark, self._pr_mark = _mark(roc.axes[0]), _mark(pr.axes[0])
            self._roc, self._pr = MovingPlot(roc), MovingPlot(pr)

    def html(self, threshold: float, found: Confusion) -> str:
        """The plots with the threshold marked."""
        choices = self._choices
        low, high = self._line.axes.get_xlim()
        shown = min(max(threshold, low), high)  # at the edge, if it lies beyond
        self._line.set_xdata([shown, shown])
        self._number.set(
            x=shown, text=f" {threshold:.4g} ", ha="left" if shown < (low + high) / 2 else "right"
        )
        text = (
            f"Histogram of the scores of {choices.normal} normal and {choices.anomalous} anomalous "
            f"images. Above the threshold {threshold:.4g} are {found.fp} normal and {found.tp} "
            "anomalous ones."
        )
        marked = self._histogram.pixels(self._line, self._number)
        parts = [picture(marked, text, DENSITY)]
        if not choices.both:
            missing = "anomalous" if choices.normal else "normal"
            parts.append(f"<p>No {missing} images: no ROC and no precision-recall curve.</p>")
            return "".join(parts)
        self._roc_mark.set_data([found.fpr], [found.recall])
        text = (
            f"ROC curve, area {self._auroc:.3f}. At the threshold {threshold:.4g} the false "
            f"positive rate is {found.fpr:.3f} and the recall {found.recall:.3f}."
        )
        parts.append(picture(self._roc.pixels(self._roc_mark), text, DENSITY))
        precision = found.precision if found.tp + found.fp else 1.0  # as the curve has it
        self._pr_mark.set_data([found.recall], [precision])
        text = (
            f"Precision-recall curve, average precision {self._auprc:.3f}. At the threshold "
            f"{threshold:.4g} the recall is {found.recall:.3f} and the precision {precision:.3f}."
        )
        parts.append(picture(self._pr.pixels(self._pr_mark), text, DENSITY))
        return "".join(parts)


@drawn_in_style
def _histogram(choices: Choices) -> Figure:
    figure, ax = _plot("How far do the scores overlap?", "anomaly score", "share of the group")
    low, high = span(choices.scores, choices.normal_scores)
    edges = np.linspace(low, high, 41)
    groups = [  # told apart by dash and hatch too
        ("normal", choices.scores[choices.labels == 0], NORMAL, "-", ""),
        ("anomalous", choices.scores[choices.labels == 1], ANOMALOUS, "--", "////"),
    ]
    if not choices.own:
        groups.append(("validation", choices.normal_scores, BLACK, ":", None))
    for name, scores, colour, dash, hatch in groups:
        if not len(scores):
            continue
        bars = {"x": scores, "bins": edges, "weights": np.full(len(scores), 1 / len(scores))}
        if hatch is not None:
            fill = {"fc": colour, "ec": colour, "lw": 0, "alpha": 0.3, "hatch": hatch}
            ax.hist(**bars, histtype="stepfilled", **fill)
        label = f"{name} ({len(scores)})"
        ax.hist(**bars, color=colour, histtype="step", ls=dash, lw=1.5, label=label)
    ax.set(xlim=(low, high), ylim=(0, 1.15 * ax.get_ylim()[1]))
    ax.legend(loc="best")
    return figure


@drawn_in_style
def _roc(labels: np.ndarray, scores: np.ndarray, area: float) -> Figure:
    figure, ax = _plot(f"ROC curve, area {area:.3f}", "false positive rate", "recall")
    ax.plot([0, 1], [0, 1], color=GRAY, ls=":", lw=1.2)
    ax.plot(*roc_curve(labels, scores)[:2], color=NORMAL)
    return figure


@drawn_in_style
def _pr(labels: np.ndarray, scores: np.ndarray, area: float) -> Figure:
    figure, ax = _plot(f"Precision–recall, average {area:.3f}", "recall", "precision")
    ax.axhline(np.mean(labels), color=GRAY, ls=":", lw=1.2)
    precision, recall, _ = precision_recall_curve(labels, scores)
    ax.plot(recall, precision, color=NORMAL)
    return figure


def _plot(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = new_figure(height=2.7, width=3.15, dpi=100 * DENSITY)
    axes[0, 0].set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes[0, 0]


def _mark(ax: Axes) -> Artist:
    """A point that moves."""
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    look = {"ms": 9, "mfc": ORANGE, "mec": BLACK, "mew": 1.6}
    return ax.plot([0], [0], "o", animated=True, clip_on=False, **look)[0]
