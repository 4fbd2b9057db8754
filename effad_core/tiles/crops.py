"""Random crops of large images at their own resolution, to train a detector with tiles."""

from collections.abc import Sequence

from effad_core.datasets import ResizedImages, Sample

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .cutting import Tiles


class Crops(ResizedImages):
    """Crops from anywhere in the images, as large as a tile. Each image is read once.

    Args:
        samples: of a scenario's split.
        size: (height, width) of a crop in pixels, the detector's image_size.
        tiles: how the detector cuts images.
        count: crops, as many from each image as from another, or one more.
        seed: of the places.

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
    ) -> None:
        super().__init__(samples, size)
        self._crops: list[Image.Image] = []
        shares = np.bincount(np.arange(count) % len(self.samples), minlength=len(self.samples))
        progress = tqdm(self.samples, desc="cutting tiles", leave=False)
        for index, (sample, share) in enumerate(zip(progress, shares.tolist(), strict=True)):
            rng = np.random.default_rng((seed, index))
            image = tiles.resized(sample.load(), size, sample.path)
            for _ in range(share):
                top = int(rng.integers(image.height - size[0] + 1))
                left = int(rng.integers(image.width - size[1] + 1))
                box = (left, top, left + size[1], top + size[0])
                self._crops.append(image.crop(box))

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> Image.Image:
        return self._crops[index]
