"""DSR: detection in the discrete latent space of a vector-quantised autoencoder, at 256x256.

After Zavrtanik et al., "DSR - A dual subspace re-projection network for surface anomaly detection"
(ECCV 2022), and the repository VitjanZ/DSR_anomaly_detection. Its test script runs the general
decoder twice and reads one result; here that decoder runs once.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128  # channels of the autoencoder and length of a codebook entry
CODES = 4096  # entries of each codebook


class Codebook(nn.Module):
    """Nearest-entry look-up by two matrix products; the running mean of the entries is kept too."""

    def __init__(self):
        super().__init__()
        self.entries = nn.Parameter(torch.empty(CODES, WIDTH))
        self.mean = nn.Parameter(torch.empty(CODES, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        products = features.flatten(2).transpose(1, 2) @ self.entries.T  # (N, H * W, CODES)
        chosen = torch.zeros_like(products)  # one-hot
        return (chosen @ self.entries).transpose(1, 2).reshape(features.shape)


class Residual(nn.Sequential):
    def __init__(self):
        squeeze = nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1, bias=False)
        super().__init__(squeeze, nn.Conv2d(WIDTH // 2, WIDTH, 1, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


def conv3(*channels: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next."""
    return nn.Sequential(*(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(channels)))


def up(inside: int, outside: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1)


def decoder(inside: int) -> nn.Sequential:
    """From features at stride 4 to an image."""
    residuals = (Residual(), Residual())
    return nn.Sequential(conv3(inside, WIDTH), *residuals, up(WIDTH, WIDTH // 2), up(WIDTH // 2, 3))


class SubspaceRestriction(nn.Sequential):
    """A U-shaped network without skip connections, on quantised features."""

    def __init__(self):
        w = WIDTH
        double = nn.Upsample(scale_factor=2, mode="bilinear")
        super().__init__(
            conv3(w, w, w), nn.MaxPool2d(2), conv3(w, 2 * w, 2 * w), nn.MaxPool2d(2),
            conv3(2 * w, 4 * w, 4 * w), double, conv3(4 * w, 2 * w, 2 * w, 2 * w),
            double, conv3(2 * w, w, w, w), conv3(w, w),
        )  # fmt: skip


class UNet(nn.Module):
    """Anomaly detection and upsampling module: 64 to 256 channels, three skip connections."""

    def __init__(self, inside: int):
        super().__init__()
        self.down = nn.ModuleList(
            [conv3(inside, 64, 64), conv3(64, 128, 128), conv3(128, 256, 256)]
        )
        self.bottom = conv3(256, 256, 256)
        self.up = nn.ModuleList([conv3(256, 256), conv3(256, 128), conv3(128, 64)])
        self.merge = nn.ModuleList([conv3(512, 256, 256), conv3(256, 128, 128), conv3(128, 64, 64)])
        self.head = conv3(64, 2)

    def forward(self, images: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(images))
            images = F.max_pool2d(skips[-1], 2)
        images = self.bottom(images)
        for enlarge, merge in zip(self.up, self.merge, strict=True):
            images = enlarge(F.interpolate(images, scale_factor=2, mode="bilinear"))
            images = merge(torch.cat([images, skips.pop()], dim=1))
        return self.head(images)


class DSR(nn.Module):
    """Input (N, 3, 256, 256); output: the two logits of each pixel, (N, 2, 256, 256)."""

    def __init__(self):
        super().__init__()
        w = WIDTH
        self.encoder_high = nn.Sequential(
            nn.Conv2d(3, w // 2, 4, stride=2, padding=1), nn.Conv2d(w // 2, w, 4, 2, padding=1),
            conv3(w, w), Residual(), Residual(),
        )  # fmt: skip
        self.encoder_low = nn.Sequential(
            nn.Conv2d(w, w, 4, stride=2, padding=1), conv3(w, w), Residual(), Residual()
        )
        self.to_low, self.to_high = nn.Conv2d(w, w, 1), nn.Conv2d(2 * w, w, 1)
        self.codes_low, self.codes_high = Codebook(), Codebook()
        self.enlarge = up(w, w)
        self.general_decoder = decoder(2 * w)
        self.restrict_low, self.restrict_high = SubspaceRestriction(), SubspaceRestriction()
        self.object_decoder = nn.Sequential(
            conv3(2 * w, 2 * w, 4 * w), nn.MaxPool2d(2), conv3(4 * w, 4 * w, 8 * w),
            nn.MaxPool2d(2), nn.Conv2d(8 * w, 64, 1), up(64, 64), up(64, 64), decoder(64),
        )  # fmt: skip
        self.detect, self.upsample = UNet(6), UNet(8)

    def forward(self, images: Tensor) -> Tensor:
        high = self.encoder_high(images)
        low = self.codes_low(self.to_low(self.encoder_low(high)))
        high = self.codes_high(self.to_high(torch.cat([high, self.enlarge(low)], dim=1)))
        general = self.general_decoder(torch.cat([self.enlarge(low), high], dim=1))

        low = self.codes_low(self.restrict_low(low))
        high = self.codes_high(self.restrict_high(high))
        normal = self.object_decoder(torch.cat([self.enlarge(low), high], dim=1))
        logits = self.detect(torch.cat([normal, general], dim=1))
        return self.upsample(torch.cat([normal, general, logits], dim=1))
