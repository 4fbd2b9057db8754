"""One image beside its anomaly map, on a colour scale that is the same for all images."""

import math

from effad_core.figures import image_grid, map_panel
from effad_core.figures.style import ANOMALOUS, BLACK, SKY

import numpy as np
from matplotlib.contour import ContourSet
from numpy.typing import ArrayLike
from skimage.measure import block_reduce

from .markup import picture
from .plots import MovingPlot

SIDE, BELOW = 4.6, 0.75  # inches: a panel's width and largest height; title and colour bar
FINEST = 600  # cells along a map's longer side, for the contour
COLUMN = "anomaly map"


class ImagePanels:
    """An image and its map: the figure is drawn once, the contour at the pixel threshold moves.

    Args:
        name: of the image, for the alternative text.
        image: uint8, shape (H, W, 3).
        scored: its map, shape (H, W), or None.
        mask: the ground truth, boolean (H, W), or None.
        limits: the map's values at the two ends of the colour scale.
    """

    def __init__(
        self,
        name: str,
        image: np.ndarray,
        scored: ArrayLike | None,
        mask: np.ndarray | None,
        limits: tuple[float, float],
    ):
        self._name, self._limits, self._shape = name, limits, image.shape[:2]
        self._masked = mask is not None and bool(np.any(mask))
        self._map = None if scored is None else np.asarray(scored)
        height = min(SIDE * image.shape[0] / image.shape[1], SIDE)
        if self._map is None:
            figure = image_grid([image])
            figure.set_size_inches(SIDE, height)
        else:
            row = {"title": "", "image": image, "maps": {COLUMN: self._map}, "mask": mask}
            figure = map_panel([row], [COLUMN], {COLUMN: limits})
            figure.set_size_inches(2 * SIDE, height + BELOW)
            truth = "; solid: the ground truth" if self._masked else ""
            figure.axes[0].set_title(f"dashed: above the pixel threshold{truth}", fontsize=10.5)
        self._axes = figure.axes[0]
        self._axes.autoscale(False)
        if self._map is None and self._masked:
            self._contour(np.asarray(mask, dtype=np.float32), 0.5, ANOMALOUS, "solid")
        self._plot = MovingPlot(figure)

    def html(self, pixel_threshold: float | None) -> str:
        """The picture; with a map, a contour where it crosses the pixel threshold."""
        alt = f"{self._name}{', with the ground truth outlined' * self._masked}."
        if self._map is None:
            return picture(self._plot.pixels(), alt, kind="JPEG")
        share, (low, high) = np.mean(self._map > pixel_threshold), self._limits
        alt += (
            f" Beside it the anomaly map, highest value {self._map.max():.4g}, colours from "
            f"{low:.4g} to {high:.4g}: {share:.2%} of the pixels are above the pixel threshold "
            f"{pixel_threshold:.4g}."
        )
        contour = self._contour(self._map, pixel_threshold, SKY, (0, (3, 2))) if share else []
        pixels = self._plot.pixels(*contour)
        for lines in contour:
            lines.remove()
        return picture(pixels, alt, kind="JPEG")

    def _contour(
        self, values: np.ndarray, level: float, colour: str, dash: object
    ) -> list[ContourSet]:
        """Lines in a colour over wider black ones, legible on dark and on light."""
        block = math.ceil(max(values.shape) / FINEST)
        cells = block_reduce(values, block, np.max, cval=-np.inf) if block > 1 else values
        places = [
            block * (np.arange(-1, count + 1) + 0.5) * side / length - 0.5
            for count, side, length in zip(cells.shape, self._shape, values.shape, strict=True)
        ]
        cells = np.pad(cells, 1, mode="edge")  # lines run to the border of the image
        look = (
            ("solid", {"colors": BLACK, "linewidths": 3.0}),
            (dash, {"colors": colour, "linewidths": 1.6}),
        )
        return [
            self._axes.contour(*places[::-1], cells, [level], linestyles=[style], **line)
            for style, line in look
        ]
