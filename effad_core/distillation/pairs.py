"""Training batches for distillation (Algorithm 3): the teacher's images and Psi's features.

The lines cited here are those of Algorithm 3 in the supplement.
"""

from collections.abc import Iterator, Sequence

from effad_core.acceleration.precision import computing_in, resolve_precision
from effad_core.datasets.pretraining import Draws, PretrainingImages
from effad_core.datasets.transforms import normalise
from effad_core.distillation.extractors import FeatureExtractor
from effad_core.distillation.schedule import DistillationSchedule
from effad_core.errors import DataError
from effad_core.losses import mean_squared_difference
from effad_core.networks import output_length
from effad_core.statistics import channel_statistics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

HELD_OUT_BATCHES = 16
OUTPUT_BATCHES = 64  # for the mean and standard deviation of the teacher's output


class Pairs:
    """Batches as Algorithm 3 sees them: T's input, and Psi's normalised features as its target.

    Args:
        extractor: Psi.
        schedule: for sizes, scales, padding and precision.
        device: where the networks are.
        workers: processes that read and cut images; 0: this one.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        schedule: DistillationSchedule,
        device: torch.device,
        workers: int = 0,
    ):
        self.extractor, self.schedule = extractor, schedule
        self.device, self.workers = device, workers
        self.precision = resolve_precision(schedule.precision, device, "training")
        self.psi_size = extractor.input_size(schedule.size)
        self.cells = output_length(schedule.size, schedule.padding)
        extractor.to(device, memory_format=torch.channels_last)

    def images(
        self, source: PretrainingImages, key: tuple[int, ...], batches: Sequence[range]
    ) -> Iterator[Tensor]:
        """Images for Psi, uint8, (n, 3, psi_size, psi_size); lines 5-7 and 17-19.

        Args:
            source: the images.
            key: the same key gives the same draws.
            batches: the numbers of the draws in each batch.
        """
        schedule = self.schedule
        draws = Draws(source, key, self.psi_size, schedule.scales, schedule.gray_probability)
        try:
            yield from DataLoader(
                draws,
                batch_sampler=batches,
                num_workers=self.workers,
                multiprocessing_context="spawn" if self.workers else None,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # leaves torch's own generator alone
            )
        except DataError as error:  # a worker puts its stack before the message
            raise DataError(error.args[0].rstrip().rpartition("DataError: ")[2]) from None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Psi's features, float32, shape (n, C, h, w), of the cells that T has."""
        with computing_in(self.precision, self.device):
            maps = self.extractor(images.to(self.device))  # Algorithm 3, lines 8 and 21
        inner = slice(None) if self.schedule.padding else slice(4, 4 + self.cells)
        return maps.float()[..., inner, inner]

    def teacher_input(self, images: Tensor) -> Tensor:
        """The same images as T sees them: bilinear, at T's size, normalised (line 20)."""
        images = images.to(self.device).float() / 255
        # at half the size, a bilinear pixel is the mean of four
        small = normalise(F.avg_pool2d(images, self.psi_size // self.schedule.size))
        return small.contiguous(memory_format=torch.channels_last)

    def loss(self, network: nn.Module, images: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        """L_dist of a batch of images for Psi."""
        target = (self.features(images) - mu) / sigma  # Algorithm 3, line 22
        inputs = self.teacher_input(images)
        with computing_in(self.precision, self.device):
            output = network(inputs)  # Algorithm 3, line 23
        return mean_squared_difference(output.float(), target)  # Algorithm 3, lines 24-28

    def statistics(self, source: PretrainingImages, seed: int) -> tuple[Tensor, Tensor]:
        """mu^Psi and sigma^Psi, shape (C, 1, 1) (lines 2-12)."""
        batches = _batches(self.schedule.statistics_images, self.schedule.batch_size)
        maps = map(self.features, self.images(source, (seed, 0), batches))
        mu, sigma = channel_statistics(maps)
        return mu[:, None, None].to(self.device), sigma[:, None, None].to(self.device)

    @torch.no_grad()
    def held_out_loss(
        self, network: nn.Module, held_out: PretrainingImages, mu: Tensor, sigma: Tensor
    ) -> float:
        """L_dist on the same draws of the held-out images each time."""
        size = self.schedule.batch_size
        batches = _batches(HELD_OUT_BATCHES * size, size)
        losses = [
            self.loss(network, images, mu, sigma).item()
            for images in self.images(held_out, (0, 2), batches)
        ]
        return float(np.mean(losses))

    @torch.no_grad()
    def output_statistics(
        self, network: nn.Module, source: PretrainingImages, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of T's output on images that it learnt from, shape (C,)."""
        size = self.schedule.batch_size
        batches = _batches(min(OUTPUT_BATCHES * size, self.schedule.statistics_images), size)
        return channel_statistics(
            network(self.teacher_input(images))
            for images in self.images(source, (seed, 0), batches)
        )


def _batches(count: int, size: int) -> list[range]:
    """The numbers 0 ... count - 1 in batches; the last one may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
