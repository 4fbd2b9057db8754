"""FastFlow: the likelihood of each cell's features under a normalising flow in two dimensions.

Yu, Zheng, Wang, Li, Wu, Zhao, Wu: FastFlow: Unsupervised Anomaly Detection and Localization via 2D
Normalizing Flows, 2021. Steps as FrEIA's AllInOneBlock, which the public code
(https://github.com/gathierry/FastFlow) is built of.

EfficientAD's authors measured WideResNet-50-2 at 256x256 after 200 steps, with no choice of the
best epoch on test images. Assumed: the public code's optimiser (Adam, 1e-3, weight decay 1e-5) and
its batches of 32.
"""

import math
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import ClassVar

from baselines.layers import Layers
from baselines.method import Frozen, Method, Phase, Profile, Schedule
from effad_core.datasets import ResizedImages
from effad_core.distillation.backbones import LITE0

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLAMP = 2.0  # bound of a coupling's log scale
STEPS = 8  # of each layer's flow; their kernels are 3 and 1 in turn


class FlowStep(nn.Module):
    """One invertible step: half of the channels scales and shifts the other, then all are mixed.

    Args:
        channels: an even number.
        kernel_size: of both convolutions.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        half = channels // 2
        self.subnet = nn.Sequential(
            nn.Conv2d(half, half, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(half, channels, kernel_size, padding="same"),
        )
        start = 2 * math.log(math.exp(5.0) - 1)  # a scale of 1, see `scale`
        self.raw_scale = nn.Parameter(torch.full((1, channels, 1, 1), start))
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        order = torch.eye(channels)[torch.randperm(channels)]  # a fixed permutation
        self.mixing = nn.Parameter(order[..., None, None].clone(), requires_grad=False)
        # kept beside it, as FrEIA does: `inverse` reads it
        self.unmixing = nn.Parameter(order.T[..., None, None].clone(), requires_grad=False)

    @property
    def scale(self) -> Tensor:
        """Of each channel, above 0."""
        return 0.1 * F.softplus(self.raw_scale, beta=0.5)

    def _coupling(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift of the other half."""
        log_scale, shift = (0.1 * self.subnet(kept)).chunk(2, dim=1)
        return CLAMP * torch.tanh(log_scale), shift

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The step's output, (N, C, h, w), and the log of its Jacobian's determinant, (N,)."""
        kept, changed = features.chunk(2, dim=1)
        log_scale, shift = self._coupling(kept)
        coupled = torch.cat([kept, changed * log_scale.exp() + shift], dim=1)
        output = F.conv2d(coupled * self.scale + self.offset, self.mixing)
        cells = features.shape[2] * features.shape[3]
        return output, log_scale.sum(dim=(1, 2, 3)) + cells * self.scale.log().sum()

    def inverse(self, output: Tensor) -> Tensor:
        """The features that give this output."""
        coupled = (F.conv2d(output, self.unmixing) - self.offset) / self.scale
        kept, changed = coupled.chunk(2, dim=1)
        log_scale, shift = self._coupling(kept)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], dim=1)


class Flow(nn.Module):
    """A LayerNorm over a layer's features, then `STEPS` steps.

    Args:
        shape: (C, h, w) of the layer.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.norm = nn.LayerNorm(list(shape))
        kernels = islice(cycle((3, 1)), STEPS)
        self.steps = nn.ModuleList(FlowStep(shape[0], size) for size in kernels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """z, (N, C, h, w), and the log of the determinant of the steps' Jacobian, (N,)."""
        z, log_determinant = self.norm(features), 0.0
        for step in self.steps:
            z, own = step(z)
            log_determinant = log_determinant + own
        return z, log_determinant


def negative_log_likelihood(z: Tensor, log_determinant: Tensor) -> Tensor:
    """Mean over images, without the constant of the standard normal distribution."""
    return (0.5 * z.square().sum(dim=(1, 2, 3)) - log_determinant).mean()


class FastFlow(Method):
    """A flow for each of three layers of a pretrained network, trained by maximum likelihood.

    Args:
        network, read, weights, pretrained: as in `Layers`.
        image_size: images are resized to this before they enter.

    Example:
        >>> fastflow = FastFlow().fit(scenario, "smoke")
        >>> fastflow.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "FastFlow"
    PROFILES: ClassVar = {
        "smoke": Profile({}, Schedule((2,), 4)),
        "quick": Profile({}, Schedule((60,), 16)),
        "laptop": Profile({}, Schedule((200,), 32)),
        "paper": Profile(
            {"network": "wide-resnet-50", "read": ("layer1", "layer2", "layer3")},
            Schedule((200,), 32),
        ),
    }

    def __init__(
        self,
        network: str = LITE0,
        read: Sequence[str] = ("block1", "block2", "block4"),
        image_size: int | Sequence[int] = 256,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        super().__init__(image_size, {"network": network, "read": tuple(read)})
        self.layers = Layers(network, read, weights, pretrained)
        strides = (4, 8, 16)
        self.shapes = [
            (channels, *(-(-side // stride) for side in self.image_size))
            for channels, stride in zip(self.layers.channels, strides, strict=True)
        ]
        self.initialise()

    def initialise(self) -> None:
        self.flows = nn.ModuleList(Flow(shape) for shape in self.shapes)

    def trained(self) -> dict[str, nn.Module]:
        return {"flows": self.flows}

    def phases(self, images: ResizedImages) -> list[Phase]:
        features = Frozen(images, self.layers, self.device)
        parameters = [p for p in self.flows.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-5)

        def loss(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            outputs = [flow(f) for flow, f in zip(self.flows, features[chosen], strict=True)]
            return {"NLL": sum(negative_log_likelihood(*output) for output in outputs)}

        return [Phase(optimizer, loss)]

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """1 - exp(-mean(z^2) / 2) of each cell: 0 where it is likeliest; the mean of the layers."""
        maps = []
        for flow, features in zip(self.flows, self.layers(images), strict=True):
            z, _ = flow(features)
            likelihood = torch.exp(-0.5 * z.square().mean(dim=1, keepdim=True))
            maps.append(F.interpolate(1 - likelihood, size=self.image_size, mode="bilinear"))
        shown = torch.stack(maps).mean(dim=0)
        return shown, shown
