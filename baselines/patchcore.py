"""PatchCore: how far each patch's features are from the nearest ones of normal images.

Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection,
CVPR 2022. As in the authors' code (https://github.com/amazon-science/patchcore-inspection), no
distance is weighted by neighbours. The anomaly score is the maximum of the map at `image_size`.
"""

from collections.abc import Iterator

from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.precision import computing_in, resolve_precision
from effad_core.datasets import ResizedImages, Scenario
from effad_core.detector import checked_image_size
from effad_core.prediction import Predictor
from effad_core.statistics import never_varies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTED = 128  # values per patch by which the coreset is chosen
BATCH = 8  # images that go through the features at once


class PatchCore(nn.Module, Predictor):
    """A memory of normal patches, and the distance of a new image's patches from it.

    Args:
        features: images, uint8, shape (N, 3, H, W) -> patch features, shape (N, C, h, w); see
            `effad_core.open_extractor`.
        image_size: images are resized to this before they enter; a side of a square, or
            (height, width), in pixels.
        share: of the training patches that are kept in the memory.
        most_patches: if there are more training patches, so many are drawn at random, as many from
            each image, before the memory is chosen: a choice from millions takes hours.
        standardise: divide each channel by its standard deviation over the training patches, as
            the teacher's channels are in EfficientAD; one that never varies stays as it is.
        precision: of the features, as in `resolve_precision`; "auto" is settled by `fit`. Distances
            are always computed in float32.

    Raises:
        ValueError: for a share or an image size out of range.

    Example:
        >>> patchcore = PatchCore(open_extractor(), share=0.001).fit(scenario)
        >>> patchcore.memory.shape[1], patchcore.predict(scenario.train[0].path).map.shape
        (192, (264, 280))
    """

    map_names = ("combined",)

    def __init__(
        self,
        features: nn.Module,
        image_size: int | tuple[int, int] = 256,
        share: float = 0.01,
        most_patches: int = 100_000,
        standardise: bool = False,
        precision: str = "float32",
    ):
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {share}")
        self.features, self.image_size = features, checked_image_size(image_size)
        self.share, self.most_patches = share, most_patches
        self.standardise, self.precision = standardise, precision
        self.register_buffer("memory", torch.empty(0, 0))
        self.register_buffer("deviation", torch.ones(1))
        self.operating_point = self.pixel_operating_point = None

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.to(choose_device(device, now=self.device))

    def fit(
        self, scenario: Scenario, seed: int = 0, device: str | torch.device | None = None
    ) -> "PatchCore":
        """Fill the memory with a coreset of the training images' patches.

        Thresholds are taken away: they were of another memory.

        Args:
            scenario: only its training images are used.
            seed: of the random projection and the first patch.
            device: as in `use_device`.

        Returns:
            Itself.

        Raises:
            DataError: for an image that cannot be read.
            ValueError: for an unknown precision or device.
        """
        self.use_device(device)
        self.precision = resolve_precision(self.precision, self.device)
        self.full_scale = scenario.full_scale
        patches = torch.cat(list(self._training_patches(scenario, seed)))  # (patches, C)
        self.deviation = self.deviation.new_ones(1)
        if self.standardise:
            deviation, mean = torch.std_mean(patches, dim=0, correction=0)
            self.deviation = deviation.masked_fill(never_varies(mean, deviation), 1)
        patches /= self.deviation
        kept = coreset(patches, max(1, round(self.share * len(patches))), seed)
        self.memory = patches[kept]
        self.operating_point = self.pixel_operating_point = None
        return self

    def _training_patches(self, scenario: Scenario, seed: int) -> Iterator[Tensor]:
        """Of each training image, shape (patches, C)."""
        generator = torch.Generator().manual_seed(seed)
        most = max(1, self.most_patches // len(scenario.train))
        for images in ResizedImages(scenario.train, self.image_size).batches(BATCH):
            for features in self._features(images):
                patches = features.flatten(1).T
                kept = torch.randperm(len(patches), generator=generator)[:most]
                yield patches[kept.to(patches.device)]

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        with computing_in(self.precision, self.device):
            return self.features(images.to(self.device)).float()

    def distances(self, images: Tensor) -> Tensor:
        """Of each patch from the nearest one in the memory, shape (N, h, w).

        Args:
            images: uint8, shape (N, 3, H, W), at image_size.

        Raises:
            ValueError: if the memory is empty.
        """
        if self.memory.numel() == 0:
            raise ValueError("the memory is empty: call fit first")
        centre, found = self.memory.mean(dim=0), []  # shorter vectors, smaller rounding errors
        memory = self.memory - centre
        for features in self._features(images):  # one image: its distances are already many
            patches = features.flatten(1).T / self.deviation - centre
            nearest = memory[torch.cdist(patches, memory).argmin(dim=1)]
            # computed anew, for cdist takes the difference of large squares
            found.append((patches - nearest).norm(dim=1).view(features.shape[1:]))
        return torch.stack(found)

    def combined_maps(self, images: Tensor) -> Tensor:
        """The one map, shape (N, 1, H, W): the distances, resized bilinearly."""
        distances = self.distances(images)[:, None]
        return F.interpolate(distances, size=self.image_size, mode="bilinear")


def coreset(patches: Tensor, count: int, seed: int = 0) -> Tensor:
    """A greedy choice of patches, each the farthest from all that were chosen before it.

    Args:
        patches: shape (n, C).
        count: how many to choose, at most n.
        seed: of the random projection to `PROJECTED` values, in which distances are computed, and
            of the first patch.

    Returns:
        Their numbers, shape (count,).
    """
    generator = torch.Generator().manual_seed(seed)
    patches = patches - patches.mean(dim=0)  # the squares below are then small
    if patches.shape[1] > PROJECTED:
        projection = torch.randn(patches.shape[1], PROJECTED, generator=generator)
        patches = patches @ projection.to(patches.device) / PROJECTED**0.5
    squares = patches.square().sum(dim=1)
    chosen = [int(torch.randint(len(patches), (1,), generator=generator))]
    nearest = torch.full_like(squares, torch.inf)  # squared distance from those chosen
    while len(chosen) < count:
        last = chosen[-1]
        nearest = torch.minimum(nearest, squares + squares[last] - 2 * (patches @ patches[last]))
        nearest[last] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen, device=patches.device)
