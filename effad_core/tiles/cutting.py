"""An image cut into overlapping tiles; the tiles' maps, put together again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

from effad_core.datasets.transforms import resize, to_tensor
from effad_core.errors import DataError
from effad_core.networks import PATCH_SIZE, STRIDE, output_length

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILES_AT_ONCE = 8  # that go through the networks
MARGIN = PATCH_SIZE - 1  # pixels of a tile's side beyond its cells, without padding: 16 at each end


@dataclass(frozen=True)
class Tiles:
    """How an image is cut into tiles.

    Args:
        size: side of a square tile, or (height, width), in pixels of the image. Each tile is
            resized to the detector's image_size: with the same number nothing is resized, with a
            larger one the image is made smaller first.
        overlap: pixels of the image that neighbouring tiles share, at least. Where they do, their
            maps are blended. None takes a quarter of the tile.

    Raises:
        ValueError: for what are no such numbers.

    Example:
        >>> Tiles(256, overlap=64).size
        (256, 256)
    """

    size: int | tuple[int, int]
    overlap: int | None = None

    def __post_init__(self) -> None:
        size = tuple(self.size) if isinstance(self.size, list | tuple) else (self.size,) * 2
        if len(size) != 2 or not all(_is_count(side) for side in size):
            raise ValueError(f"a tile's size must be pixels, or (height, width), not {self.size!r}")
        overlap = min(size) // 4 if self.overlap is None else self.overlap
        if not _is_count(overlap) or overlap > min(size) // 2:
            raise ValueError(
                f"the overlap of tiles must be 1 to {min(size) // 2} pixels (half a tile), not "
                f"{self.overlap!r}"
            )
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))
        object.__setattr__(self, "overlap", int(overlap))

    def check(self, image_size: tuple[int, int], padding: bool) -> None:
        """Raise ValueError if a detector cannot work with these tiles.

        Args:
            image_size, padding: the detector's.
        """
        if any(side % STRIDE for side in image_size):
            raise ValueError(
                f"with tiles, the sides of image_size must be multiples of {STRIDE}, not "
                f"{image_size[0]}x{image_size[1]}"
            )
        needed = 0 if padding else MARGIN
        if min(self._overlaps(image_size)) < needed:
            share = max(t / s for t, s in zip(self.size, image_size, strict=True))
            raise ValueError(
                f"tiles must overlap by at least {math.ceil(needed * share)} pixels, not "
                f"{self.overlap}: the outer {MARGIN // 2} pixels of a tile have no map of their own"
            )

    def _overlaps(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """In pixels of the resized tile, rounded up to whole cells."""
        return tuple(
            STRIDE * math.ceil(self.overlap * side / own / STRIDE)
            for side, own in zip(image_size, self.size, strict=True)
        )

    def check_image(self, size: tuple[int, int], name: object = "the image") -> None:
        """Raise DataError if an image of (width, height) is smaller than a tile."""
        height, width = self.size
        if size[1] < height or size[0] < width:
            raise DataError(
                f"{name} has {size[0]}x{size[1]} pixels (width x height), a tile {width}x{height}: "
                "take smaller tiles, or none"
            )

    def resized(
        self, image: Image.Image, image_size: tuple[int, int], name: object = "the image"
    ) -> Image.Image:
        """An image at the resolution at which a tile has `image_size` pixels.

        Args:
            image: RGB.
            image_size: the detector's.
            name: of the image, for the error message.

        Raises:
            DataError: if the image is smaller than a tile.
        """
        self.check_image(image.size, name)
        if self.size == image_size:
            return image
        return resize(image, self._resized_size(image.size, image_size))

    def _resized_size(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what `resized` gives for an image of (width, height)."""
        sides = zip(reversed(size), image_size, self.size, strict=True)
        return tuple(max(side, round(length * side / own)) for length, side, own in sides)

    def map_size(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the maps that `stitched` gives.

        Args:
            size: (width, height) of the image in pixels.
            image_size: the detector's.
        """
        return tuple(math.ceil(n / STRIDE) for n in self._resized_size(size, image_size))

    def stitched(
        self,
        image: Image.Image,
        image_size: tuple[int, int],
        padding: bool,
        cells: Callable[[Tensor], Tensor],
        name: object = "the image",
    ) -> tuple[Tensor, tuple[int, int]]:
        """The maps of an image, put together from the maps of its tiles.

        A tile's values count less towards its border: from one tile to the next the map changes
        gradually. Only a few tiles are in memory at once.

        Args:
            image: RGB, at its own size.
            image_size, padding: the detector's.
            cells: from uint8 tiles of image_size, shape (N, 3, h, w), to the cells of their maps,
                shape (N, maps, rows, columns).
            name: as in `resized`.

        Returns:
            The maps, float32, shape (maps, H / 4, W / 4) for an image that has H x W pixels once it
            is resized and its last row and column are repeated up to a multiple of four; and these
            pixels' (height, width) without the repeated ones.

        Raises:
            DataError: as `resized`.
        """
        image = self.resized(image, image_size, name)
        shown = (image.height, image.width)
        starts = [
            tile_starts(STRIDE * math.ceil(side / STRIDE), tile, overlap)
            for side, tile, overlap in zip(
                shown, image_size, self._overlaps(image_size), strict=True
            )
        ]
        counts = [output_length(tile, padding) for tile in image_size]  # cells of a tile
        weights = [
            _ramp(count, overlap // STRIDE)
            for count, overlap in zip(counts, self._overlaps(image_size), strict=True)
        ]
        weight = weights[0][:, None] * weights[1]
        grid = [s[-1] // STRIDE + count for s, count in zip(starts, counts, strict=True)]
        total, share = None, torch.zeros(grid)
        places = [(top, left) for top in starts[0] for left in starts[1]]
        for first in range(0, len(places), TILES_AT_ONCE):
            some = places[first : first + TILES_AT_ONCE]
            found = cells(torch.stack([_tile(image, *place, image_size) for place in some]))
            found = found.float().cpu()
            if total is None:
                total = torch.zeros(found.shape[1], *grid)
            for (top, left), tile in zip(some, found, strict=True):
                rows = slice(top // STRIDE, top // STRIDE + counts[0])
                columns = slice(left // STRIDE, left // STRIDE + counts[1])
                total[:, rows, columns] += weight * tile
                share[rows, columns] += weight
        total /= share
        border = 0 if padding else MARGIN // 2 // STRIDE  # outside the outermost whole patches
        return F.pad(total[None], (border,) * 4, mode="replicate")[0], shown


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side, in pixels: as few as there need to be, evenly spaced.

    Args:
        length, tile, overlap: multiples of four, of the side, of a tile, and what two neighbouring
            tiles share at least; length >= tile > overlap.

    Returns:
        Multiples of four, from 0 to length - tile.

    Example:
        >>> tile_starts(600, 256, 64)
        [0, 172, 344]
    """
    count = 1 + math.ceil((length - tile) / (tile - overlap))
    cells = (length - tile) // STRIDE
    return [STRIDE * (index * cells // max(1, count - 1)) for index in range(count)]


def _ramp(count: int, rise: int) -> Tensor:
    """Weights of cells along a side, shape (count,): they rise over `rise` cells at both ends."""
    inward = torch.arange(1, count + 1)
    return torch.minimum(inward, inward.flip(0)).clamp(max=max(1, rise)).float()


def _tile(image: Image.Image, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """A tile as uint8, shape (3, *size); beyond the image its last row and column are repeated."""
    bottom, right = min(top + size[0], image.height), min(left + size[1], image.width)
    tile = to_tensor(image.crop((left, top, right, bottom)))
    missing = (0, size[1] - tile.shape[2], 0, size[0] - tile.shape[1])
    return F.pad(tile[None].float(), missing, mode="replicate")[0].byte() if any(missing) else tile


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and number > 0
