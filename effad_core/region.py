"""The part of the image that is inspected: a mask that a detector keeps.

Outside it, neither the hard feature loss nor quantiles, scores or thresholds look. A cell of a map
belongs to the region if the centre of its patch lies in it, so a patch may reach 16 pixels beyond.
"""

import base64
import binascii
import io
import os

from effad_core.datasets.images import read_mask_values
from effad_core.errors import DataError
from effad_core.networks import PATCH_SIZE, STRIDE, output_length

import numpy as np
from PIL import Image

LONGEST = 1024  # pixels of a kept mask's longer side
ASPECT = 0.02  # by how much the ratio of the sides of mask and image may differ


class Region:
    """What to inspect of an image, whatever its size.

    Args:
        mask: boolean, shape (H, W), True where to look.

    Attributes:
        mask: the same, made smaller if it has more than `LONGEST` rows or columns.

    Raises:
        ValueError: if it is no such array, or nothing is to be inspected.

    Example:
        >>> mask = np.zeros((100, 200), bool)
        >>> mask[:, 50:] = True
        >>> Region(mask).share
        0.75
    """

    def __init__(self, mask: np.ndarray):
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.ndim != 2:
            raise ValueError(f"a region is a boolean array (H, W), not {mask.dtype} {mask.shape}")
        if not mask.any():
            raise ValueError("the region is empty: nothing would be inspected")
        longest = max(mask.shape)
        if longest > LONGEST:
            sides = [max(1, round(side * LONGEST / longest)) for side in mask.shape]
            mask = _sampled(mask, tuple(sides))
        self.mask = mask

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Region":
        """From an image file: black is not inspected, every other colour is.

        Raises:
            DataError: if the file cannot be read, was compressed with loss, or is black all over.
        """
        mask, _ = read_mask_values(path)
        if not mask.any():
            raise DataError(f"The region {path} is black all over: paint white what to inspect.")
        return cls(mask)

    @property
    def share(self) -> float:
        """The inspected share of the image."""
        return float(self.mask.mean())

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The mask at another size, boolean, shape (height, width): nearest neighbours.

        Raises:
            ValueError: if nothing of it is left at that size.
        """
        found = _sampled(self.mask, size)
        if not found.any():
            raise ValueError(
                f"nothing is left of the region in a map of {size[0]}x{size[1]}: make it larger"
            )
        return found

    def cells(self, size: tuple[int, int], padding: bool) -> np.ndarray:
        """Which cells of a whole image's map belong to it: see `cells_of`."""
        return cells_of(self.at(size), padding)

    def check_image(self, size: tuple[int, int], name: object) -> None:
        """Refuse an image of another shape than the mask's.

        Args:
            size: (width, height) of the image.
            name: of the image, for the error message.

        Raises:
            DataError: if the ratios of their sides differ.
        """
        height, width = self.mask.shape
        if abs(size[0] / size[1] * height / width - 1) > ASPECT:
            raise DataError(
                f"the region was drawn for images with sides of {width}:{height}, {name} has "
                f"{size[0]}x{size[1]} pixels: draw it on an image of this camera"
            )

    def to_text(self) -> str:
        """The mask as text, for a file's header."""
        content = io.BytesIO()
        Image.fromarray(self.mask).save(content, format="PNG", optimize=True)
        return base64.b64encode(content.getvalue()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> "Region":
        """The region that `to_text` wrote; ValueError for anything else."""
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), "r", ["PNG"]) as png:
                return cls(np.asarray(png.convert("1")))
        except (OSError, TypeError, binascii.Error, SyntaxError) as error:
            raise ValueError(f"the region is damaged ({error})") from None


def cells_of(pixels: np.ndarray, padding: bool) -> np.ndarray:
    """Which cells have their centre in a region.

    Args:
        pixels: boolean, shape (H, W), of a whole image or a tile.
        padding: whether the PDN is padded.

    Returns:
        Boolean, shape (h, w).
    """
    centres = []
    for side in pixels.shape:
        count = output_length(side, padding)
        if padding:  # the cells span the whole image
            centres.append(((np.arange(count) + 0.5) * side / count).astype(int))
        else:
            centres.append(STRIDE * np.arange(count) + PATCH_SIZE // 2)
    return pixels[np.ix_(*centres)]


def _sampled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(side) + 0.5) * own / side).astype(int)
        for side, own in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]
