"""Images, the maps that belong to them, matrices, and patches on an image."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import (
    ANOMALOUS,
    BLACK,
    MAP_COLOURS,
    SIGNED_COLOURS,
    SKY,
    WIDTH,
    drawn_in_style,
    new_figure,
)

MASK_COLOURS = LinearSegmentedColormap.from_list("mask", ["#eeeeee", ANOMALOUS])


@drawn_in_style
def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    columns: int = 6,
    suptitle: str = "",
    colours: Sequence[str] | None = None,
) -> Figure:
    """Images in rows of `columns`, on one brightness scale (0..255).

    Args:
        images: uint8 arrays, (H, W, 3) or (H, W).
        titles: one for each image.
        columns: images in a row.
        suptitle: says what to see.
        colours: of a frame around each image, for example `NORMAL` or `ANOMALOUS`.

    Raises:
        ValueError: for no images, another dtype, or titles or colours of another number.
    """
    count = len(images)
    if count == 0:
        raise ValueError("there are no images to show")
    for name, values in (("titles", titles), ("colours", colours)):
        if values is not None and len(values) != count:
            raise ValueError(f"there are {count} images but {len(values)} {name}")
    columns = min(columns, count)
    rows = -(-count // columns)
    side = min(WIDTH / columns, 2.6)
    lines = max((title.count("\n") + 1 for title in titles), default=0) if titles else 0
    height = rows * (side + 0.17 * lines) + 0.45 * bool(suptitle)
    figure, axes = new_figure(rows, columns, height, width=columns * side)
    for index, ax in enumerate(axes.flat):
        if index >= count:
            ax.axis("off")
            continue
        _show_image(ax, images[index])
        if titles:
            ax.set_title(titles[index], fontsize=9)
        if colours:
            for spine in ax.spines.values():
                spine.set(visible=True, color=colours[index], linewidth=3)
    figure.suptitle(suptitle)
    return figure


@drawn_in_style
def map_panel(
    rows: Sequence[Mapping],
    columns: Sequence[str],
    limits: Mapping[str, tuple[float, float]],
    suptitle: str = "",
    truth: bool = False,
) -> Figure:
    """Images and the maps that belong to them; each column of maps has one fixed colour scale.

    Args:
        rows: of each image {"title": str, "image": uint8 (H, W, 3) or (H, W), "maps": {name:
            (H, W)}} and optionally "mask", boolean (H, W), outlined on the image.
        columns: names of the maps, from left to right.
        limits: of each column the values at the two ends of its colour scale, (lowest, highest).
        suptitle: says what to see.
        truth: show the mask in a column of its own, and leave the image as it is; a row without
            a mask says "no mask", one with an empty mask "no defect".

    Raises:
        ValueError: for no rows or columns, a map that a row lacks, or a column without limits.
    """
    if not rows or not columns:
        raise ValueError("a panel needs at least one row and one column of maps")
    for name in columns:
        if name not in limits:
            raise ValueError(f"the map {name!r} has no limits; there are {', '.join(limits)}")
        if not limits[name][0] < limits[name][1]:
            raise ValueError(f"the limits of {name!r} are {limits[name]}, not (lowest, highest)")
        for row in rows:
            if name not in row["maps"]:
                known = ", ".join(row["maps"])
                raise ValueError(f"the row {row['title']!r} has no map {name!r}, but {known}")
    first = 2 if truth else 1  # of the columns of maps
    side = min(WIDTH / (len(columns) + first), 2.3)
    height = len(rows) * side + 0.7 + 0.35 * bool(suptitle)
    figure, axes = new_figure(
        len(rows) + 1,  # the last one holds the colour bars
        len(columns) + first,
        height,
        width=(len(columns) + first) * side,
        height_ratios=[side] * len(rows) + [0.1],
    )
    for row, line in zip(rows, axes[:-1], strict=True):
        _show_image(line[0], row["image"])
        wrapped = (textwrap.fill(part, 22) for part in row["title"].splitlines())
        line[0].set_ylabel("\n".join(wrapped), fontsize=9)
        if truth:
            _show_mask(line[1], row.get("mask"), np.shape(row["image"])[:2])
        elif row.get("mask") is not None:
            _outline(line[0], row["mask"])
        for name, ax in zip(columns, line[first:], strict=True):
            low, high = limits[name]
            ax.imshow(row["maps"][name], cmap=MAP_COLOURS, vmin=low, vmax=high)
            _bare(ax)
    for name, column in zip(columns, axes.T[first:], strict=True):
        column[0].set_title(textwrap.fill(name, 22))
        scale = figure.colorbar(
            column[0].images[0], cax=column[-1], orientation="horizontal", extend="both"
        )
        scale.ax.tick_params(labelsize=8)
    for ax in axes[-1, :first]:
        ax.axis("off")
    if truth:
        axes[0, 0].set_title("image")
        axes[0, 1].set_title("ground truth")
    figure.suptitle(suptitle)
    return figure


@drawn_in_style
def matrix(
    values: np.ndarray,
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    label: str = "",
    symmetric: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A heat map with its colour bar, for example a gradient or a correlation.

    Args:
        values: shape (H, W).
        title: says what to see.
        xlabel, ylabel: what columns and rows are.
        label: what the values are, written at the colour bar.
        symmetric: values around zero: two hues, white in the middle.
        limits: of the colour scale; by default those of the values, symmetric if asked for.

    Raises:
        ValueError: if the values are no matrix.
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"a matrix has two axes, not the shape {values.shape}")
    if limits is None:
        largest = float(np.nanmax(np.abs(values)))
        limits = (-largest, largest) if symmetric else (np.nanmin(values), np.nanmax(values))
    figure, axes = new_figure(height=4.0, width=5.2)
    ax = axes[0, 0]
    colours = SIGNED_COLOURS if symmetric else MAP_COLOURS
    image = ax.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set(title=textwrap.fill(title, 60), xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=ax, label=label)
    return figure


@drawn_in_style
def matrices(
    values: Mapping[str, np.ndarray],
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    label: str = "",
) -> Figure:
    """Correlation matrices side by side, on one colour scale from -1 to 1.

    Args:
        values: by name, each of shape (H, W).
        title: says what to see.
        xlabel, ylabel: what columns and rows are.
        label: what the values are, written at the colour bar.

    Raises:
        ValueError: for no matrices, or values outside -1 ... 1.
    """
    if not values:
        raise ValueError("there are no matrices to show")
    for name, matrix in values.items():
        if not (np.abs(matrix) <= 1 + 1e-6).all():  # a NaN fails the comparison
            raise ValueError(f"{name!r} has values that are no correlations")
    side = WIDTH / len(values)
    figure, axes = new_figure(1, len(values), height=side + 0.5, width=WIDTH)
    for (name, matrix), ax in zip(values.items(), axes[0], strict=True):
        image = ax.imshow(matrix, cmap=SIGNED_COLOURS, vmin=-1, vmax=1)
        ax.set(title=name, xlabel=xlabel)
    axes[0, 0].set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=label, shrink=0.75)
    figure.suptitle(title)
    return figure


@drawn_in_style
def patches_on_image(
    image: np.ndarray, centres: np.ndarray, shown: Sequence[int], side: int, title: str
) -> Figure:
    """Where the cells of a feature map lie: the centres of all patches, the outlines of some.

    Args:
        image: uint8, (H, W, 3) or (H, W).
        centres: shape (n, 2), row and column of each patch's middle in pixels (a pixel's own
            middle is at whole numbers).
        shown: indices of the patches to outline.
        side: of a patch, in pixels.
        title: says what to see.
    """
    figure, axes = new_figure(height=5.2, width=5.2)
    ax = axes[0, 0]
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    ax.plot(centres[:, 1], centres[:, 0], ".", color=SKY, markersize=1.6)
    for index in shown:
        row, column = centres[index]
        corner = (column - side / 2, row - side / 2)
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=ANOMALOUS, linewidth=2))
        ax.plot(column, row, "o", color=ANOMALOUS, markersize=4)
    height, width = np.asarray(image).shape[:2]
    margin = 8
    ax.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), title=title)
    ax.set(xlabel="column, pixels", ylabel="row, pixels")
    return figure


def _show_image(ax: Axes, image: np.ndarray) -> None:
    image = np.asarray(image)
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)):
        raise ValueError(
            f"an image is uint8 of shape (H, W, 3) or (H, W), not {image.dtype} of {image.shape}"
        )
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _show_mask(ax: Axes, mask: np.ndarray | None, shape: tuple[int, int]) -> None:
    words = "no mask" if mask is None else "" if np.any(mask) else "no defect"
    shown = np.zeros(shape) if mask is None else np.asarray(mask, dtype=float)
    ax.imshow(shown, cmap=MASK_COLOURS, vmin=0, vmax=1)
    ax.text(0.5, 0.5, words, ha="center", va="center", color=BLACK, transform=ax.transAxes)
    _bare(ax)


def _outline(ax: Axes, mask: np.ndarray) -> None:
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        return
    limits = ax.get_xlim(), ax.get_ylim()
    rows, columns = (np.arange(-1, length + 1) for length in mask.shape)
    for width, colour in ((3.0, "white"), (1.5, ANOMALOUS)):  # legible on dark and on light
        ax.contour(columns, rows, np.pad(mask, 1), [0.5], colors=colour, linewidths=width)
    ax.set(xlim=limits[0], ylim=limits[1])
