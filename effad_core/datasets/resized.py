"""Images of a scenario at the detector's size, decoded once and kept as long as memory allows."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from .scenario import Sample, evenly
from .transforms import resize, to_tensor


class ResizedImages(Sequence[Image.Image]):
    """The samples' images as RGB at one size; the first ones read stay in memory.

    Args:
        samples: of a scenario's split.
        size: (height, width) in pixels.
        cache_megabytes: memory for images that were read.
    """

    def __init__(
        self, samples: Sequence[Sample], size: tuple[int, int], cache_megabytes: float = 1024
    ) -> None:
        self.samples, self.size = tuple(samples), size
        self._cache: dict[int, Image.Image] = {}
        self._capacity = int(cache_megabytes * 2**20 / (4 * size[0] * size[1]))  # 4 bytes a pixel

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._cache.get(index)
        if image is None:
            image = resize(self.samples[index].load(), self.size)
            if len(self._cache) < self._capacity:
                self._cache[index] = image
        return image

    def batches(self, batch_size: int, most: int = 0) -> Iterator[Tensor]:
        """Images in order as uint8 tensors of shape (n, 3, H, W), n <= batch_size.

        Args:
            batch_size: images at once.
            most: if there are more images, so many, evenly spaced; 0: all.
        """
        chosen = evenly(range(len(self)), most)
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            yield torch.stack([to_tensor(self[index]) for index in batch])
