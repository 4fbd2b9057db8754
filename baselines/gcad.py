"""GCAD: what neighbours predict of a patch, and what the whole image's few numbers predict of it.

Bergmann, Batzner, Fauser, Sattlegger, Steger: Beyond Dents and Scratches: Logical Constraints in
Unsupervised Anomaly Detection and Localization, IJCV 2022. Its regression networks are the U-Net of
https://github.com/jvanvugt/pytorch-unet.

EfficientAD's authors measured the single member with patches of 33x33 pixels. Assumed: the widths
of the global encoder, which are those of EfficientAD's, mirrored; skip connections in it that fade
out over the first quarter of the training; Adam with 1e-4 and weight decay 1e-5, 500 epochs of
batches of one image; no gradient of the global regression reaches the encoder that it regresses.

With 1e-4, the few steps of the short profiles leave the networks where they began: they take 1e-3.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from baselines.descriptors import CHANNELS, DenseDescriptor, open_descriptors
from baselines.maps import scales_of, standardised
from baselines.method import Method, Phase, Profile, Schedule, checked_positive, pixels
from effad_core.datasets import ResizedImages
from effad_core.datasets.transforms import normalise
from effad_core.statistics import channel_statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_CHANNELS = 10  # of the global encoder's output
BOTTLENECK = 32  # numbers for the whole image
WIDTHS = (32, 32, 64, 64, 64)  # of the global encoder, from a half to a thirty-second of the image
FADED = 0.25  # share of the training after which the global encoder has no skip connections
SMALL = {"width": 0.25, "base": 16, "image_size": 128, "learning_rate": 1e-3}


def double(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """`base` channels at full size to 16 times as many at a sixteenth, and back with skips.

    Args:
        outputs: channels of the output.
        base: channels at full size; 64 in the paper.
    """

    def __init__(self, outputs: int, base: int = 64):
        super().__init__()
        pairs = list(pairwise(base * 2**level for level in range(5)))
        self.first = double(3, base)
        self.down = nn.ModuleList(double(*pair) for pair in pairs)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs)
        )
        self.merge = nn.ModuleList(double(wide, narrow) for narrow, wide in reversed(pairs))
        self.head = nn.Conv2d(base, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        features, skips = self.first(images), []
        for block in self.down:
            skips.append(features)
            features = block(F.max_pool2d(features, 2))
        for enlarge, merge in zip(self.enlarge, self.merge, strict=True):
            features = merge(torch.cat([enlarge(features), skips.pop()], dim=1))
        return self.head(features)


class GlobalEncoder(nn.Module):
    """The image through a bottleneck of 32 numbers, (N, 3, H, W) -> (N, 10, H, W).

    Args:
        image_size: (H, W), multiples of 32.
    """

    def __init__(self, image_size: Sequence[int]):
        super().__init__()
        if any(side % 32 for side in image_size):
            raise ValueError(f"image_size must be multiples of 32 for GCAD, not {image_size}")
        rest = [side // 32 for side in image_size]
        up = pairwise((*reversed(WIDTHS), GLOBAL_CHANNELS))
        self.down = nn.ModuleList(
            nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairwise((3, *WIDTHS))
        )
        self.narrow = nn.Conv2d(WIDTHS[-1], BOTTLENECK, rest)
        self.widen = nn.ConvTranspose2d(BOTTLENECK, WIDTHS[-1], rest)
        self.up = nn.ModuleList(nn.ConvTranspose2d(*pair, 4, stride=2, padding=1) for pair in up)

    def forward(self, images: Tensor, skip: float = 0.0) -> Tensor:
        """The output; `skip` is what the skip connections are multiplied by."""
        features, skips = images, []
        for layer in self.down:
            features = F.relu(layer(features))
            skips.append(features)
        features = F.relu(self.widen(self.narrow(features)))
        for number, layer in enumerate(self.up):
            if skip:
                features = features + skip * skips[-1 - number]
            features = layer(features)
            if number + 1 < len(self.up):
                features = F.relu(features)
        return features


class GCAD(Method):
    """A local and a global branch, each an encoder and a U-Net that regresses it.

    Args:
        patch_size: of the local encoder, 17 or 33.
        width: of the local encoder, as in `DenseDescriptor`.
        base: channels of the U-Nets at full size.
        image_size: images are resized to this before they enter.
        learning_rate: of Adam.
        weights: a file with the local encoder; None takes the shipped one, of width 0.25.
        pretrained: False leaves the local encoder's weights as they are drawn.

    Example:
        >>> gcad = GCAD.of_profile("smoke").fit(scenario, "smoke")
        >>> gcad.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "GCAD"
    NEEDS_VALIDATION = True
    PROFILES: ClassVar = {
        "smoke": Profile(SMALL | {"image_size": 64}, Schedule((2,), 1)),
        "quick": Profile(SMALL | {"image_size": 64}, Schedule((120,), 2)),
        "laptop": Profile(SMALL, Schedule((800,), 2)),
        "paper": Profile({"width": 1.0, "base": 64}, Schedule((500,), 1, epochs=True)),
    }

    def __init__(
        self,
        patch_size: int = 33,
        width: float = 0.25,
        base: int = 64,
        image_size: int | Sequence[int] = 256,
        learning_rate: float = 1e-4,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        arguments = {"patch_size": patch_size, "width": width, "base": base}
        learning_rate = checked_positive("learning_rate", learning_rate)
        super().__init__(image_size, arguments | {"learning_rate": learning_rate})
        self.base, self.learning_rate = base, learning_rate
        self.local_encoder = DenseDescriptor(patch_size, width).requires_grad_(False)
        if pretrained:
            self.local_encoder = open_descriptors([patch_size], width, weights)[patch_size]
        self.register_buffer("mean", torch.zeros(CHANNELS, 1, 1))  # of the local encoder's output
        self.register_buffer("deviation", torch.ones(CHANNELS, 1, 1))
        self.register_buffer("scales", torch.tensor([[0.0, 1.0]] * 2))
        self.initialise()

    def initialise(self) -> None:
        self.local_regression = UNet(CHANNELS, self.base)
        self.global_encoder = GlobalEncoder(self.image_size)
        self.global_regression = UNet(GLOBAL_CHANNELS, self.base)
        # in a list, which is no part of the module: only the training needs it
        self._decoder = [nn.Conv2d(GLOBAL_CHANNELS, CHANNELS, 1)]

    def trained(self) -> dict[str, nn.Module]:
        names = ("local_regression", "global_encoder", "global_regression")
        return {name: getattr(self, name) for name in names} | {"decoder": self._decoder[0]}

    def _local(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return (self.local_encoder(images) - self.mean) / self.deviation

    def find_statistics(self, images: ResizedImages, most: int = 64) -> None:
        """Mean and deviation of each number of the local encoder's output on training images."""
        with torch.no_grad():
            found = channel_statistics(
                self.local_encoder(normalise(batch.to(self.device)))
                for batch in images.batches(1, most)
            )
        for buffer, values in zip((self.mean, self.deviation), found, strict=True):
            buffer.copy_(values[:, None, None])

    def phases(self, images: ResizedImages) -> list[Phase]:
        decoder = self._decoder[0].to(self.device)
        parameters = [p for module in self.trained().values() for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=1e-5)
        done = 0.0

        def rate(share: float) -> float:
            nonlocal done
            done = share
            return 1.0

        def loss(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            batch = normalise(pixels(images, chosen, self.device))
            local = self._local(batch)
            encoded = self.global_encoder(batch, skip=max(0.0, 1 - done / FADED))
            regressed = self.global_regression(batch)
            return {
                "local": (self.local_regression(batch) - local).square().sum(dim=1).mean(),
                "knowledge": (decoder(encoded) - local).square().sum(dim=1).mean(),
                "global": (regressed - encoded.detach()).square().sum(dim=1).mean(),
            }

        return [Phase(optimizer, loss, begin=lambda: self.find_statistics(images), rate=rate)]

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """The squared distances of the local and of the global branch, each (N, 1, H, W)."""
        images = normalise(images.to(self.device))
        pairs = (
            (self._local(images), self.local_regression(images)),
            (self.global_encoder(images), self.global_regression(images)),
        )
        return [(a - b).square().sum(dim=1, keepdim=True) for a, b in pairs]

    def finish(self, images: ResizedImages, validation: ResizedImages, seed: int) -> None:
        self.scales.copy_(scales_of(validation.batches(1), self.raw_maps))

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps standardised, then added."""
        shown = standardised(self.raw_maps(images), self.scales).sum(dim=0)
        return shown, shown
