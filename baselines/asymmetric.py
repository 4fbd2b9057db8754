"""AST: a student without invertible layers cannot follow a normalising flow off the normal images.

Rudolph, Wehrbein, Rosenhahn, Wandt: Asymmetric Student-Teacher Networks for Industrial Anomaly
Detection, WACV 2023. Networks and settings as in the authors' code
(https://github.com/marco-rudolph/AST).

EfficientAD's authors measured the defaults. Assumed: EfficientNet-B5's layer at stride 32 for
768x768 pixels; Adam with 2e-4, weight decay 1e-5 and epsilon 1e-8, batches of 8, 240 epochs each of
teacher and student; a teacher's width of 1024, with which its count of FLOPs fits theirs (the
code's default is 64); an image's score is the mean of its map, which comes nearest to the numbers
of the method's own paper. torchvision's EfficientNet-B5 has weights of a later training.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from baselines.layers import Layers
from baselines.method import Frozen, Method, Phase, Profile, Schedule
from effad_core.datasets import ResizedImages
from effad_core.distillation.backbones import LITE0

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 32  # pixels a cell
CONDITION = 32  # channels of the positional encoding
KERNELS = (3, 3, 3, 5)  # of the flow's couplings
CLAMP = 1.9  # bound of a log scale


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    """Sines and cosines of each cell's column, then of its row, shape (1, channels, h, w).

    Args:
        channels: a multiple of four: half of them are for the column; even ones are sines.
    """
    frequencies = torch.exp(torch.arange(0, channels // 2, 2) * (-math.log(1e4) / (channels // 2)))
    parts = []
    for positions, shape in ((torch.arange(width), (1, -1)), (torch.arange(height), (-1, 1))):
        angles = frequencies[:, None] * positions
        waves = torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)
        parts.append(waves.view(len(waves), *shape).expand(-1, height, width))
    return torch.cat(parts)[None].contiguous()


class Coupling(nn.Module):
    """Channels in a fixed random order; each half then scales and shifts the other.

    Args:
        channels: of the features, an even number.
        width: channels between the two convolutions of a subnet.
        kernel_size: of both.
    """

    def __init__(self, channels: int, width: int, kernel_size: int):
        super().__init__()
        self.register_buffer("order", torch.randperm(channels))
        self.subnets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels // 2 + CONDITION, width, kernel_size, padding="same"),
                nn.LeakyReLU(0.1),
                nn.Conv2d(width, channels, kernel_size, padding="same"),
            )
            for _ in range(2)
        )
        self.gain = nn.Parameter(torch.zeros(2))  # of the subnets: a new coupling changes nothing

    def _affine(self, index: int, half: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift that one half gives to the other."""
        output = self.gain[index] * self.subnets[index](torch.cat([half, position], dim=1))
        log_scale, shift = output.chunk(2, dim=1)
        return CLAMP * 0.636 * torch.atan(log_scale / CLAMP), shift

    def forward(self, features: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The output, (N, C, h, w), and the log of the Jacobian's determinant of each cell."""
        first, second = features[:, self.order].chunk(2, dim=1)
        log_determinant = 0.0
        for index in range(2):
            log_scale, shift = self._affine(index, second, position)
            first, second = second, first * log_scale.exp() + shift
            log_determinant = log_determinant + log_scale.sum(dim=1)
        return torch.cat([first, second], dim=1), log_determinant

    def inverse(self, output: Tensor, position: Tensor) -> Tensor:
        """The features that give this output."""
        first, second = output.chunk(2, dim=1)
        for index in (1, 0):
            log_scale, shift = self._affine(index, first, position)
            first, second = (second - shift) * (-log_scale).exp(), first
        return torch.cat([first, second], dim=1)[:, self.order.argsort()]


class Teacher(nn.ModuleList):
    """The flow: four couplings."""

    def __init__(self, channels: int, width: int):
        super().__init__(Coupling(channels, width, size) for size in KERNELS)

    def forward(self, features: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """z, (N, C, h, w), and each cell's log determinant, (N, h, w)."""
        log_determinant = 0.0
        for coupling in self:
            features, own = coupling(features, position)
            log_determinant = log_determinant + own
        return features, log_determinant


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with a batch norm and a leaky ReLU, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(*(
            layer
            for _ in range(2)
            for layer in (
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(),
            )
        ))  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class AST(Method):
    """A normalising flow as the teacher, a convolutional network as the student.

    Args:
        network, read, weights, pretrained: as in `Layers`; one layer, at stride 32.
        image_size: images are resized to this before they enter.
        teacher_width: channels inside the flow's subnets.
        student_width: channels of the student.

    Example:
        >>> ast = AST.of_profile("smoke").fit(scenario, "smoke")
        >>> ast.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "AST"
    PROFILES: ClassVar = {
        "smoke": Profile({"image_size": 256, "student_width": 32}, Schedule((2, 2), 4)),
        "quick": Profile({"image_size": 512}, Schedule((60, 60), 8)),
        "laptop": Profile({}, Schedule((300, 300), 8)),
        "paper": Profile(
            {"network": "efficientnet-b5", "read": ("block6",), "teacher_width": 1024,
             "student_width": 1024},
            Schedule((240, 240), 8, epochs=True),
        ),
    }  # fmt: skip

    def __init__(
        self,
        network: str = LITE0,
        read: Sequence[str] = ("block5",),
        image_size: int | Sequence[int] = 768,
        teacher_width: int = 64,
        student_width: int = 256,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        arguments = {
            "network": network, "read": tuple(read), "teacher_width": teacher_width,
            "student_width": student_width,
        }  # fmt: skip
        super().__init__(image_size, arguments)
        self.layers = Layers(network, read, weights, pretrained)
        self.widths = teacher_width, student_width
        cells = (-(-side // STRIDE) for side in self.image_size)
        self.register_buffer("position", positional_encoding(CONDITION, *cells))
        self.initialise()

    def initialise(self) -> None:
        (channels,), (teacher, student) = self.layers.channels, self.widths
        self.teacher = Teacher(channels, teacher)
        self.student = nn.Sequential(
            nn.Conv2d(channels + CONDITION, student, 3, padding=1),
            nn.LeakyReLU(),
            *(ResidualBlock(student) for _ in range(4)),
            nn.Conv2d(student, channels, 3, padding=1),
        )

    def trained(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "student": self.student}

    def phases(self, images: ResizedImages) -> list[Phase]:
        features = Frozen(images, self.layers, self.device)
        adam = [
            torch.optim.Adam(module.parameters(), lr=2e-4, weight_decay=1e-5)
            for module in (self.teacher, self.student)
        ]

        def likelihood(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            z, log_determinant = self.teacher(*self._with_position(features[chosen][0]))
            return {"NLL": (0.5 * z.square().sum(dim=1) - log_determinant).mean()}

        def distance(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            found, position = self._with_position(features[chosen][0])
            with torch.no_grad():
                z, _ = self.teacher(found, position)
            student = self.student(torch.cat([found, position], dim=1))
            return {"distance": (z - student).square().mean()}

        return [Phase(adam[0], likelihood), Phase(adam[1], distance)]

    def _with_position(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, self.position.expand(len(features), -1, -1, -1)

    def cells(self, images: Tensor) -> Tensor:
        """The mean squared difference of teacher and student in each cell, (N, 1, h, w)."""
        features, position = self._with_position(self.layers(images)[0])
        z, _ = self.teacher(features, position)
        student = self.student(torch.cat([features, position], dim=1))
        return (z - student).square().mean(dim=1, keepdim=True)

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.cells(images)
        shown = F.interpolate(cells, size=self.image_size, mode="bicubic")
        return shown, cells.mean(dim=(2, 3), keepdim=True).expand_as(shown)
