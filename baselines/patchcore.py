"""PatchCore: how far each patch's features are from the nearest ones of normal images.

Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection,
CVPR 2022. As in the authors' code (https://github.com/amazon-science/patchcore-inspection), no
distance is weighted by neighbours. The anomaly score is the largest distance of a patch; the map
shows them smoothed.

EfficientAD's authors measured WideResNet-101 at 224x224 with a coreset of 1 %, and an ensemble of
three networks at 320x320. Assumed: 1024 numbers a patch, as in the code, and 384 in the ensemble;
no image is cropped. The code scales an ensemble's members by the test images' scores; here each
member's map is standardised by the validation images.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

from baselines.layers import PatchFeatures
from baselines.maps import SIGMA, scales_of, shown_and_judged, standardised
from baselines.method import Method, Profile
from effad_core.datasets import ResizedImages
from effad_core.distillation.backbones import LITE0
from effad_core.errors import RunError
from effad_core.statistics import never_varies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTED = 128  # values per patch by which the coreset is chosen
TYPICAL = 242  # training images of a scenario of MVTec AD, in the mean
BATCH = 8  # images that go through the features at once
LITE0_LAYERS = ("block3", "block4")  # both at stride 16; of all pairs they serve best
LITE0_PAIRS = (("block2", "block3"), LITE0_LAYERS, ("block4", "block5"))  # one network, three views


class PatchCore(Method):
    """A memory of normal patches, and the distance of a new image's patches from it.

    Args:
        network: of `baselines.layers.LAYERS`.
        read: names of its layers.
        image_size: images are resized to this before they enter; a side of a square, or
            (height, width), in pixels.
        pooled, channels: as in `PatchFeatures`.
        share: of the training patches that are kept in the memory.
        most_patches: if there are more training patches, so many are drawn at random, as many from
            each image, before the memory is chosen: a choice from millions takes hours.
        standardise: divide each channel by its standard deviation over the training patches, as
            the teacher's channels are in EfficientAD; one that never varies stays as it is.
        smoothing: standard deviation, in pixels, of the Gaussian that smooths the map; 0: none.
        weights, pretrained: as in `Layers`.
        features: a module of one's own instead of the network: uint8 images (N, 3, H, W) -> patch
            features (N, C, h, w). It cannot be saved.

    Raises:
        ValueError: for a share, smoothing or an image size out of range.

    Example:
        >>> patchcore = PatchCore(share=0.001).fit(scenario)
        >>> patchcore.memory.shape[1], patchcore.predict(scenario.train[0].path).map.shape
        (192, (264, 280))
    """

    NAME = "PatchCore"
    PROFILES: ClassVar = {
        "smoke": Profile({"share": 0.002}),
        "quick": Profile({"share": 0.01}),
        "laptop": Profile({"image_size": 512}),
        "paper": Profile({
            "network": "wide-resnet-101", "read": ("layer2", "layer3"), "image_size": 224,
            "pooled": 1024, "most_patches": 2**63,
        }),
    }  # fmt: skip

    def __init__(
        self,
        network: str = LITE0,
        read: Sequence[str] = LITE0_LAYERS,
        image_size: int | Sequence[int] = 256,
        pooled: int | None = None,
        channels: int | None = None,
        share: float = 0.01,
        most_patches: int = 100_000,
        standardise: bool = False,
        smoothing: float = SIGMA,
        weights: str | Path | None = None,
        pretrained: bool = True,
        features: nn.Module | None = None,
    ):
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {share}")
        arguments = {
            "network": network, "read": tuple(read), "pooled": pooled, "channels": channels,
            "share": share, "most_patches": most_patches, "standardise": standardise,
            "smoothing": smoothing,
        }  # fmt: skip
        super().__init__(image_size, arguments)
        if not 0 <= smoothing <= (min(self.image_size) - 1) / 4:  # it reaches so far
            raise ValueError(
                f"smoothing must be from 0 to a quarter of the image's side, not {smoothing}"
            )
        self.own_features = features is not None
        self.features = features or PatchFeatures(
            network, read, pooled, channels, weights, pretrained
        )
        self.share, self.most_patches = share, most_patches
        self.standardise, self.smoothing = standardise, smoothing
        self.register_buffer("memory", torch.empty(0, 0))
        self.register_buffer("deviation", torch.ones(1))

    def finish(self, images: ResizedImages, validation: ResizedImages, seed: int) -> None:
        """Fill the memory with a coreset of the training images' patches."""
        patches = torch.cat(list(self._training_patches(images, seed)))  # (patches, C)
        self.deviation = self.deviation.new_ones(1)
        if self.standardise:
            deviation, mean = torch.std_mean(patches, dim=0, correction=0)
            self.deviation = deviation.masked_fill(never_varies(mean, deviation), 1)
        patches /= self.deviation
        with torch.autocast(self.device.type, enabled=False):  # distances are in float32
            kept = coreset(patches, max(1, round(self.share * len(patches))), seed)
        self.memory = patches[kept]

    def _training_patches(self, images: ResizedImages, seed: int) -> Iterator[Tensor]:
        """Of each training image, shape (patches, C)."""
        generator = torch.Generator().manual_seed(seed)
        most = max(1, self.most_patches // len(images))
        for batch in images.batches(BATCH):
            for features in self._features(batch):
                patches = features.flatten(1).T
                kept = torch.randperm(len(patches), generator=generator)[:most]
                yield patches[kept.to(patches.device)]

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        return self.features(images.to(self.device)).float()

    @torch.inference_mode()
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
        memory, features_of_all = self.memory - centre, self._features(images)
        with torch.autocast(self.device.type, enabled=False):
            for features in features_of_all:  # one image: its distances are already many
                patches = features.flatten(1).T / self.deviation - centre
                nearest = memory[torch.cdist(patches, memory).argmin(dim=1)]
                # computed anew, for cdist takes the difference of large squares
                found.append((patches - nearest).norm(dim=1).view(features.shape[1:]))
        return torch.stack(found)

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return shown_and_judged(self.distances(images)[:, None], self.image_size, self.smoothing)

    def counted(self) -> nn.Module:
        """The features alone: the search for neighbours is not counted."""
        return self.features

    @classmethod
    def untrained(cls, profile: str = "paper", **changes) -> Self:
        """Its memory is as large as that of `TYPICAL` training images."""
        found = super().untrained(profile, **changes)
        found.fill_at_random()
        return found

    def fill_at_random(self) -> None:
        """A memory of arbitrary patches, to be timed."""
        images = torch.zeros(1, 3, *self.image_size, dtype=torch.uint8)
        channels, *grid = self._features(images).shape[1:]
        patches = min(TYPICAL * grid[0] * grid[1], self.most_patches)
        self.memory = torch.randn(round(self.share * patches), channels, device=self.device)

    def check_path(self, path: str | os.PathLike) -> None:
        if self.own_features:
            raise RunError(f"{path} cannot be written: features of your own have no name to load")

    def resized_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("memory", "deviation"):
            setattr(self, name, torch.empty(tensors[name].shape))


class PatchCoreEnsemble(Method):
    """Several PatchCores, whose maps are standardised on validation images and averaged.

    Args:
        members: arguments of each `PatchCore`, but image_size.
        image_size: of all of them.
        weights: a state dict on disk for each member, or None.
        pretrained: as in `Layers`.
    """

    NAME = "PatchCore Ens"
    NEEDS_VALIDATION = True
    PROFILES: ClassVar = {
        "smoke": Profile({"members": [{"read": pair, "share": 0.002} for pair in LITE0_PAIRS]}),
        "quick": Profile({"members": [{"read": pair} for pair in LITE0_PAIRS]}),
        "laptop": Profile({"members": [{"read": pair} for pair in LITE0_PAIRS], "image_size": 512}),
        "paper": Profile({
            "members": [
                {"network": network, "read": read, "pooled": 1024, "channels": 384,
                 "most_patches": 2**63}
                for network, read in (
                    ("wide-resnet-101", ("layer2", "layer3")),
                    ("resnext-101", ("layer2", "layer3")),
                    ("densenet-201", ("denseblock2", "denseblock3")),
                )
            ],
            "image_size": 320,
        }),
    }  # fmt: skip

    def __init__(
        self,
        members: Sequence[Mapping],
        image_size: int | Sequence[int] = 256,
        weights: Sequence[str | Path | None] | None = None,
        pretrained: bool = True,
    ):
        super().__init__(image_size, {"members": [dict(member) for member in members]})
        self.members = nn.ModuleList(
            PatchCore(**member, image_size=image_size, weights=path, pretrained=pretrained)
            for member, path in zip(members, weights or [None] * len(members), strict=True)
        )
        self.register_buffer("scales", torch.tensor([[0.0, 1.0]] * len(members)))

    def finish(self, images: ResizedImages, validation: ResizedImages, seed: int) -> None:
        for member in self.members:
            member.finish(images, validation, seed)
        self.scales.copy_(scales_of(validation.batches(BATCH), self._distances))

    def _distances(self, images: Tensor) -> list[Tensor]:
        """Of each member the distances at image_size, unsmoothed, (N, 1, H, W)."""
        return [
            F.interpolate(member.distances(images)[:, None], size=self.image_size, mode="bilinear")
            for member in self.members
        ]

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            shown_and_judged(member.distances(images)[:, None], self.image_size, member.smoothing)
            for member in self.members
        ]
        return tuple(
            standardised(maps, self.scales).mean(dim=0) for maps in zip(*found, strict=True)
        )

    def counted(self) -> nn.Module:
        return _Together(member.counted() for member in self.members)

    @classmethod
    def untrained(cls, profile: str = "paper", **changes) -> Self:
        found = super().untrained(profile, **changes)
        for member in found.members:
            member.fill_at_random()
        return found

    def resized_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        for number, member in enumerate(self.members):
            prefix = f"members.{number}."
            own = {name: tensors[f"{prefix}{name}"] for name in ("memory", "deviation")}
            member.resized_buffers(own)


class _Together(nn.ModuleList):
    """Modules that see the same images."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [module(images) for module in self]


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
