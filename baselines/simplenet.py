"""SimpleNet: a small network that tells features of patches from the same with noise added.

Liu, Zhou, Xu, Wang: SimpleNet: A Simple Network for Image Anomaly Detection and Localization, CVPR
2023. Settings as in the authors' code (https://github.com/DonaldRR/SimpleNet).

EfficientAD's authors measured the defaults of that code, but its choice of the best epoch on test
images, which is replaced by a fixed length: 40 times 4 passes over the training images. Assumed:
256x256 pixels, which fits their count of FLOPs (the code crops 288 from 329).

The noise has to fit the backbone. The authors' 0.015 is for WideResNet-50. The features of
EfficientNet-Lite0 have a standard deviation of 3 to 5, and 0.015 is lost in that: after 600 steps
the loss is still 1.0, the loss of a discriminator that always says 0. With `LITE0_NOISE` it learns.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from baselines.layers import PatchFeatures
from baselines.maps import shown_and_judged
from baselines.method import Frozen, Method, Phase, Profile, Schedule, checked_positive
from effad_core.datasets import ResizedImages
from effad_core.distillation.backbones import LITE0, open_network

import torch
from torch import Tensor, nn

NOISE = 0.015  # standard deviation of what is added to projected features of WideResNet-50
LITE0_NOISE = 2.0  # the same for EfficientNet-Lite0; chosen on tray, tried on the solar cells
MARGIN = (
    0.5  # a score above it for normal features, below its negative for noisy ones, costs nothing
)
LOWEST_RATE = 0.4  # of the discriminator's learning rate, at the end of half a cosine


class SimpleNet(Method):
    """Patch features, a linear projection, and a discriminator of each cell.

    Args:
        network, read, pooled, weights, pretrained: as in `PatchFeatures`.
        image_size: images are resized to this before they enter.
        hidden: channels between the discriminator's two layers.
        noise: standard deviation of what is added to projected features; None takes the
            authors' 0.015, or 2 for EfficientNet-Lite0.

    Example:
        >>> simplenet = SimpleNet().fit(scenario, "smoke")
        >>> simplenet.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "SimpleNet"
    PROFILES: ClassVar = {
        "smoke": Profile({}, Schedule((2,), 4)),
        "quick": Profile({}, Schedule((240,), 2)),
        "laptop": Profile({}, Schedule((2400,), 2)),
        "paper": Profile(
            {"network": "wide-resnet-50", "read": ("layer2", "layer3"), "pooled": 1536},
            Schedule((160,), 8, epochs=True),
        ),
    }

    def __init__(
        self,
        network: str = LITE0,
        read: Sequence[str] = ("block2", "block4"),
        image_size: int | Sequence[int] = 256,
        pooled: int | None = None,
        hidden: int = 1024,
        noise: float | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        if noise is None:
            noise = LITE0_NOISE if network == LITE0 else NOISE
        noise = checked_positive("noise", noise)
        arguments = {"network": network, "read": tuple(read), "pooled": pooled}
        arguments |= {"hidden": hidden, "noise": noise}
        super().__init__(image_size, arguments)
        self.features = PatchFeatures(network, read, pooled, None, weights, pretrained)
        self.hidden, self.noise = hidden, noise
        self.initialise()

    def initialise(self) -> None:
        channels = self.features.channels
        self.projection = nn.Conv2d(channels, channels, 1)  # a linear layer at each cell
        self.discriminator = nn.Sequential(
            nn.Conv2d(channels, self.hidden, 1),
            nn.BatchNorm2d(self.hidden),
            nn.LeakyReLU(0.2),
            nn.Conv2d(self.hidden, 1, 1, bias=False),
        )
        for layer in (self.projection, self.discriminator[0], self.discriminator[-1]):
            nn.init.xavier_normal_(layer.weight)

    def trained(self) -> dict[str, nn.Module]:
        return {"projection": self.projection, "discriminator": self.discriminator}

    def phases(self, images: ResizedImages) -> list[Phase]:
        features = Frozen(images, lambda batch: [self.features(batch)], self.device)
        optimizer = torch.optim.AdamW([
            {"params": self.projection.parameters(), "lr": 1e-4, "weight_decay": 1e-2},
            {"params": self.discriminator.parameters(), "lr": 2e-4, "weight_decay": 1e-5},
        ])  # fmt: skip

        def loss(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            normal = self.projection(features[chosen][0])
            noisy = normal + self.noise * torch.randn_like(normal)
            scores = self.discriminator(torch.cat([normal, noisy]))
            of_normal, of_noisy = scores.chunk(2)
            return {
                "normal": (MARGIN - of_normal).clamp(min=0).mean(),
                "noisy": (MARGIN + of_noisy).clamp(min=0).mean(),
            }

        return [Phase(optimizer, loss, rate=_half_cosine)]

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = -self.discriminator(self.projection(self.features(images)))
        return shown_and_judged(cells, self.image_size)

    def counted(self) -> nn.Module:
        """With the layers of WideResNet-50 that the code runs and nobody reads."""
        whole = self.features.layers.network == "wide-resnet-50"
        return _WithUnread(self) if whole else super().counted()


def _half_cosine(done: float) -> float:
    return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


class _WithUnread(nn.Module):
    def __init__(self, simplenet: SimpleNet):
        super().__init__()
        self.simplenet = simplenet
        whole = open_network(simplenet.features.layers.network, pretrained=False)
        self.unread = nn.Sequential(whole.layer4, whole.avgpool, nn.Flatten(), whole.fc)

    def forward(self, images: Tensor) -> Tensor:
        features = self.simplenet.features
        layers = features.layers(images)
        self.unread(layers[-1])
        return self.simplenet.discriminator(self.simplenet.projection(features.of_layers(layers)))
