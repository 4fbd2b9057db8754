"""Distributions, curves and bars of numbers."""

import textwrap
from collections.abc import Collection, Mapping

from effad_core.metrics import image_auroc
from effad_core.thresholds import roc_curve

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from .style import (
    ANOMALOUS,
    BLACK,
    GRAY,
    NORMAL,
    PALETTE,
    drawn_in_style,
    finite,
    group_colours,
    new_figure,
)


@drawn_in_style
def score_histogram(
    groups: Mapping[str, np.ndarray],
    title: str,
    threshold: float | None = None,
    xlabel: str = "anomaly score",
) -> Figure:
    """Scores of groups of images on the same bins; heights are shares of each group.

    Args:
        groups: scores by name; "normal" is blue and "anomalous" vermillion.
        title: says what to see.
        threshold: drawn as a dashed line.
        xlabel: what the scores are.

    Raises:
        ValueError: for no groups, an empty one, or scores that are not finite.
    """
    if not groups:
        raise ValueError("there are no scores to show")
    groups = {name: finite(scores, f"the scores of {name!r}") for name, scores in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate([*groups.values()]), bins=40)
    figure, axes = new_figure(width=7.2)
    ax = axes[0, 0]
    for name, colour in group_colours([*groups]).items():
        scores = groups[name]
        shares = np.full(scores.size, 1 / scores.size)
        label = f"{name} ({scores.size} images)"
        ax.hist(scores, edges, weights=shares, color=colour, alpha=0.35)
        ax.hist(scores, edges, weights=shares, color=colour, histtype="step", lw=1.8, label=label)
    if threshold is not None:
        ax.axvline(threshold, color=BLACK, ls="--", lw=1.4, label=f"threshold {threshold:.3g}")
    ax.set(title=title, xlabel=xlabel, ylabel="share of the group")
    ax.legend()
    return figure


@drawn_in_style
def map_distributions(
    values: Mapping[str, np.ndarray],
    lines: Mapping[str, Mapping[str, float]] | None = None,
    log: bool = True,
    title: str = "",
    xlabel: str = "value of a map's pixel",
    share_x: bool = True,
) -> Figure:
    """Histograms of map values side by side, on the same axes, with vertical lines.

    Args:
        values: 1-D values by map name.
        lines: by map name {label: position}, for example its quantiles.
        log: logarithmic shares of pixels, so that the tail can be seen.
        title: says what to see.
        xlabel: what the values are.
        share_x: the same range of values for all; False lets each have its own.

    Raises:
        ValueError: for no values, values that are not finite, or lines of an unknown map.
    """
    if not values:
        raise ValueError("there are no map values to show")
    lines = lines or {}
    for name in lines:
        if name not in values:
            raise ValueError(f"there are lines for {name!r}, but values of {', '.join(values)}")
    values = {name: finite(v, f"the values of {name!r}") for name, v in values.items()}
    figure, axes = new_figure(1, len(values), sharex=share_x, sharey=True)
    together = np.concatenate([*values.values()])
    for (name, v), ax, colour in zip(values.items(), axes[0], PALETTE * len(values), strict=False):
        edges = np.histogram_bin_edges(together if share_x else v, bins=60)
        shares = np.full(v.size, 1 / v.size)
        ax.hist(v, edges, weights=shares, color=colour, alpha=0.8, log=log)
        styles = ("--", ":", "-.", "-") * len(lines.get(name, ()))
        for (label, x), dash in zip(lines.get(name, {}).items(), styles, strict=False):
            ax.axvline(x, color=BLACK, ls=dash, lw=1.6, label=f"{label} = {x:.3g}")
        ax.set(title=name, xlabel=xlabel)
        if name in lines:
            ax.legend()
    axes[0, 0].set_ylabel("share of pixels" + ", logarithmic" * log)
    figure.suptitle(title)
    return figure


@drawn_in_style
def curves(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    xlabel: str,
    ylabel: str,
    title: str,
    log: bool = False,
    errors: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Lines, for example the terms of a loss over the iterations; NaN values are left out.

    Args:
        series: (x, y) by name; names are written in a legend if there are two or more.
        xlabel, ylabel: what the axes are.
        title: says what to see.
        log: logarithmic y.
        errors: by name, of as many values as its y; drawn to both sides, for example the standard
            deviation over seeds.

    Raises:
        ValueError: for no series, x, y or errors of different lengths, or errors of unknown names.
    """
    if not series:
        raise ValueError("there are no curves to show")
    errors = {name: np.asarray(e, dtype=np.float64) for name, e in (errors or {}).items()}
    if unknown := errors.keys() - series.keys():
        raise ValueError(f"there are errors of {sorted(unknown)}, which have no curve")
    figure, axes = new_figure(width=7.2)
    ax = axes[0, 0]
    for name, (x, y) in series.items():
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"{name!r} has x of shape {x.shape} and y of shape {y.shape}")
        known = np.isfinite(x) & np.isfinite(y)
        mark = "o" if known.sum() < 12 else ""
        band = errors.get(name, np.zeros_like(y))
        if band.shape != y.shape:
            raise ValueError(f"{name!r} has {y.size} values and {band.size} errors")
        line = ax.plot(x[known], y[known], marker=mark, markersize=4, label=name)[0]
        if name in errors:
            colour = line.get_color()
            ax.errorbar(x[known], y[known], band[known], fmt="none", ecolor=colour, capsize=3)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.set_yscale("log")
    ax.grid(axis="y")
    if len(series) > 1:
        ax.legend()
    return figure


@drawn_in_style
def roc_curves(labels: np.ndarray, scores: Mapping[str, np.ndarray], title: str) -> Figure:
    """ROC curves with the area under each in the legend.

    Args:
        labels: 0 normal, 1 anomalous, shape (n,).
        scores: by name, shape (n,).
        title: says what to see.

    Raises:
        ValueError: for no scores, and as `metrics.image_auroc`.
    """
    if not scores:
        raise ValueError("there are no scores to show")
    labels = np.asarray(labels)
    figure, axes = new_figure(height=4.4, width=4.8)
    ax = axes[0, 0]
    for name, values in scores.items():
        area = image_auroc(labels, values)
        ax.plot(*roc_curve(labels, values)[:2], label=f"{name}: {area:.3f}")
    ax.plot([0, 1], [0, 1], color=GRAY, ls=":", lw=1.2, label="chance: 0.500")
    ax.set(title=title, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    ax.legend(title="area under the curve", loc="lower right")
    return figure


@drawn_in_style
def bars(
    values: Mapping[str, float],
    title: str,
    xlabel: str,
    errors: Mapping[str, float] | None = None,
    baseline: float | None = None,
    digits: int = 3,
    log: bool = False,
) -> Figure:
    """Horizontal bars from top to bottom, each with its number written at its end.

    Args:
        values: by name.
        title: says what to see.
        xlabel: what the values are.
        errors: by name, drawn to both sides and written after a ±.
        baseline: drawn as a dashed line, for example 0.5 for chance.
        digits: written after the decimal point; whole numbers are written with separators.
        log: logarithmic axis, for positive values.

    Raises:
        ValueError: for no values, or errors of unknown names.
    """
    if not values:
        raise ValueError("there are no values to show")
    errors = errors or {}
    if unknown := errors.keys() - values.keys():
        raise ValueError(f"there are errors of {sorted(unknown)}, which have no value")
    names = [textwrap.fill(name, 34) for name in values]
    lengths = finite([*values.values()], "the values")
    figure, axes = new_figure(height=0.9 + 0.42 * len(values), width=7.2)
    ax = axes[0, 0]
    sizes = [errors.get(name, 0.0) for name in values]
    drawn = ax.barh(range(len(names)), lengths, color=NORMAL, height=0.65)
    if errors:
        ax.errorbar(lengths, range(len(names)), xerr=sizes, fmt="none", ecolor=BLACK, capsize=3)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # legible over the baseline
    for (name, value), bar in zip(values.items(), drawn, strict=True):
        text = f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.{digits}f}"
        text += f" ± {errors[name]:.{digits}f}" if name in errors else ""
        end = max(value, 0) + errors.get(name, 0.0)
        middle = bar.get_y() + bar.get_height() / 2
        ax.annotate(
            text, (end, middle), (4, 0), textcoords="offset points", va="center", bbox=white
        )
    if baseline is not None:
        ax.axvline(baseline, color=BLACK, ls="--", lw=1.4)
    if log:
        ax.set_xscale("log")
    elif lengths.max() >= 1000:
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.locator_params(axis="x", nbins=6)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.margins(x=0.18)
    if lengths.min() >= 0 and not log:
        ax.set_xlim(left=0)
    ax.set(title=title, xlabel=xlabel)
    return figure


@drawn_in_style
def labelled_points(
    points: Mapping[str, tuple[float, float]],
    xlabel: str,
    ylabel: str,
    title: str,
    marked: Collection[str] = (),
) -> Figure:
    """Named points, for example accuracy against latency; x is logarithmic.

    Args:
        points: (x, y) by name, x above 0.
        xlabel, ylabel: what the axes are.
        title: says what to see.
        marked: names whose points are drawn in another colour.

    Raises:
        ValueError: for no points, values that are not finite, or an x that is not above 0.
    """
    values = finite([pair for pair in points.values()], "the points").reshape(-1, 2)
    if values[:, 0].min() <= 0:
        raise ValueError("x is logarithmic: each must be above 0")
    figure, axes = new_figure(height=4.6, width=7.2)
    ax = axes[0, 0]
    for number, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1][1])):
        ax.scatter(x, y, color=ANOMALOUS if name in marked else NORMAL, s=36, zorder=2)
        above = 6 if number % 2 else -6  # neighbours in height do not cover one another
        ax.annotate(name, (x, y), (7, above), textcoords="offset points", va="center", fontsize=9)
    ax.set_xscale("log")
    for axis_formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        axis_formatter(StrMethodFormatter("{x:g}"))
    ax.margins(x=0.22, y=0.1)
    ax.grid(axis="both")
    ax.set_axisbelow(True)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure
