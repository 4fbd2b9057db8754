"""Random crops of large images at their own resolution, to train a detector with tiles."""

from collections.abc import Sequence

from effad_core.datasets import ResizedImages, Sample
from effad_core.errors import DataError
from effad_core.region import Region, cells_of

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .cutting import Tiles

TRIES = 10_000  # places that are drawn until one shows some of the region


class Crops(ResizedImages):
    """Crops from anywhere in the images, as large as a tile. Each image is read once.

    Args:
        samples: of a scenario's split.
        size: (height, width) of a crop in pixels, the detector's image_size.
        tiles: how the detector cuts images.
        count: crops, as many from each image as from another, or one more.
        seed: of the places.
        region: the part of the image that is inspected; every crop shows some of it.
        padding: whether the detector's PDN is padded.

    Raises:
        DataError: for an image that cannot be read, or is smaller than a tile.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: tuple[int, int],
        tiles: Tiles,
        count: int,
        seed: int = 0,
        region: Region | None = None,
        padding: bool = False,
    ) -> None:
        super().__init__(samples, size)
        self._crops: list[Image.Image] = []
        self._insides: list[np.ndarray] = []  # of each crop the cells in the region
        shares = np.bincount(np.arange(count) % len(self.samples), minlength=len(self.samples))
        progress = tqdm(self.samples, desc="cutting tiles", leave=False)
        for index, (sample, share) in enumerate(zip(progress, shares.tolist(), strict=True)):
            rng = np.random.default_rng((seed, index))
            image = tiles.resized(sample.load(), size, sample.path)
            pixels = None if region is None else region.at((image.height, image.width))
            for _ in range(share):
                top, left, inside = self._place(image, pixels, padding, rng)
                self._crops.append(image.crop((left, top, left + size[1], top + size[0])))
                if inside is not None:
                    self._insides.append(inside)

    def _place(
        self,
        image: Image.Image,
        pixels: np.ndarray | None,
        padding: bool,
        rng: np.random.Generator,
    ) -> tuple[int, int, np.ndarray | None]:
        """Where a crop begins, and which of its cells lie in the region."""
        height, width = self.size
        for _ in range(TRIES):
            top = int(rng.integers(image.height - height + 1))
            left = int(rng.integers(image.width - width + 1))
            if pixels is None:
                return top, left, None
            inside = cells_of(pixels[top : top + height, left : left + width], padding)
            if inside.any():
                return top, left, inside
        raise DataError("the region is so small that random crops miss it: use no tiles")

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> Image.Image:
        return self._crops[index]

    def region_cells(self, index: int) -> np.ndarray | None:
        """The cells of a crop that lie in the region, boolean (h, w); None without a region."""
        return self._insides[index] if self._insides else None
