"""Pictures of a verdict: an image under its anomaly map, and boxes around what is anomalous."""

from effad_core.figures import ANOMALOUS, MAP_COLOURS
from effad_core.prediction import Prediction

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.ndimage import find_objects, label, maximum_filter, minimum_filter

OPACITY = 0.55  # at the end of the colour scale
UNKNOWN_SCALE = 0.3  # that end without a pixel threshold above 0: three times q_b


def scale_of(pixel_threshold: float | None) -> float:
    """The end of the colour scale: twice the pixel threshold, so that its upper half is above."""
    known = pixel_threshold is not None and pixel_threshold > 0
    return 2 * pixel_threshold if known else UNKNOWN_SCALE


def overlay(
    image: Image.Image, anomaly_map: np.ndarray, scale: float, threshold: float | None = None
) -> Image.Image:
    """An image under its anomaly map.

    Args:
        image: RGB.
        anomaly_map: shape (height, width).
        scale: the value at the upper end of the colours; the lower end is 0, and transparent.
        threshold: contoured; None draws no contour.

    Returns:
        RGB, of the same size.
    """
    levels = np.uint8(np.clip(anomaly_map * (255 / scale), 0, 255))
    colours = np.uint8(255 * colormaps[MAP_COLOURS](np.arange(256))[:, :3])
    opacity = Image.fromarray(np.uint8(OPACITY * levels))
    shown = Image.composite(Image.fromarray(colours[levels]), image, opacity)
    marked = anomaly_map > (np.inf if threshold is None else threshold)
    if not marked.any():
        return shown
    pixels = np.array(shown)
    reach = 3 + 2 * (max(image.size) // 600)  # a line that can be seen in a large image too
    pixels[maximum_filter(marked, reach) & ~marked] = 255
    inside = minimum_filter(marked, reach, mode="constant", cval=False)
    pixels[marked & ~inside] = np.uint8(255 * np.array(to_rgb(ANOMALOUS)))
    return Image.fromarray(pixels)


def bounding_boxes(prediction: Prediction) -> list[dict[str, float]]:
    """Rectangles around what is above the pixel threshold, one for each group of touching pixels.

    Args:
        prediction: of a detector with a pixel threshold.

    Returns:
        For each group x and y of its upper left pixel, counted from 0, width and height in pixels,
        and the map's peak in it; the highest peak first.

    Raises:
        ValueError: if there was no pixel threshold.
    """
    groups, _ = label(prediction.anomalous_pixels, np.ones((3, 3)))  # corners touch too
    found, m = [], prediction.map
    for number, (rows, columns) in enumerate(find_objects(groups), start=1):
        inside = groups[rows, columns] == number
        found.append(
            {
                "x": columns.start,
                "y": rows.start,
                "width": columns.stop - columns.start,
                "height": rows.stop - rows.start,
                "peak": float(m[rows, columns][inside].max()),
            }
        )
    return sorted(found, key=lambda box: -box["peak"])
