"""Methods whose networks regress the features of a pretrained network: S-T and GCAD.

S-T after Bergmann et al., "Uninformed students" (CVPR 2020), and the repositories
LuyaooChen/uninformed-students-pytorch and denguir/student-teacher-anomaly-detection; its dense
extraction after Bailer et al., "Fast dense feature extraction with CNNs that have pooling or
striding layers" (BMVC 2017). GCAD after Bergmann et al., "Beyond dents and scratches" (IJCV 2022),
whose regression networks are the U-Net of the repository jvanvugt/pytorch-unet.
"""

from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = None  # in the lists below; a convolution is (output channels, kernel size)
DESCRIPTORS = {  # patch size -> layers that turn one patch into 128 features
    17: ((128, 6), (256, 5), (256, 5), (128, 4)),
    33: ((128, 5), POOL, (256, 5), POOL, (256, 2), (128, 4)),
    65: ((128, 5), POOL, (128, 5), POOL, (128, 5), POOL, (256, 4), (128, 1)),
}


class MultiPool(nn.Module):
    """Max pooling at all four offsets of a 2x2 window, so that no position is lost.

    Input (N, C, H, W); output (4 N, C, H // 2, W // 2), one map an offset.
    """

    def forward(self, features: Tensor) -> Tensor:
        height, width = (length // 2 * 2 for length in features.shape[-2:])
        padded = F.pad(features, (0, 1, 0, 1))
        offsets = product(range(2), repeat=2)
        windows = [padded[..., y : y + height, x : x + width] for y, x in offsets]
        return F.max_pool2d(torch.cat(windows), 2)


class DenseDescriptor(nn.Sequential):
    """Features of the patch around every pixel, zeros beyond the border.

    Output for p poolings: (4^p N, 128, h, w), the maps of all offsets, each a little larger than
    H / 2^p times W / 2^p; what lies beyond the image is cropped when they are interleaved.

    Args:
        patch_size: 17, 33 or 65 pixels.
        border: zeros on both sides of the image together; None takes patch_size - 1.
    """

    def __init__(self, patch_size: int, border: int | None = None):
        layers, inside = [], 3
        for layer in DESCRIPTORS[patch_size]:
            if layer is POOL:
                layers.append(MultiPool())
            else:
                layers.append(nn.Conv2d(inside, *layer))
                inside = layer[0]
        super().__init__(*layers)
        self.border = patch_size - 1 if border is None else border

    def forward(self, images: Tensor) -> Tensor:
        before, after = (self.border + 1) // 2, self.border // 2
        return super().forward(F.pad(images, (before, after, before, after)))


class StudentTeacher(nn.Module):
    """A teacher and three students for each patch size. Input (N, 3, 256, 256).

    Args:
        border: as `DenseDescriptor`, for all patch sizes.
    """

    def __init__(self, border: int | None = None):
        super().__init__()
        self.networks = nn.ModuleList(
            DenseDescriptor(patch_size, border) for patch_size in DESCRIPTORS for _ in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return [network(images) for network in self.networks]


def double(inside: int, outside: int) -> nn.Sequential:
    """Two 3x3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
    )


class UNet(nn.Module):
    """64 channels at full size to 1024 at a sixteenth of it, and back with skip connections."""

    def __init__(self, outputs: int):
        super().__init__()
        widths = [64, 128, 256, 512, 1024]
        pairs = list(pairwise(widths))
        self.first = double(3, 64)
        self.down = nn.ModuleList(double(*pair) for pair in pairs)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs)
        )
        self.merge = nn.ModuleList(double(wide, narrow) for narrow, wide in reversed(pairs))
        self.head = nn.Conv2d(64, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        skips = []
        for block in self.down:
            skips.append(features)
            features = block(F.max_pool2d(features, 2))
        for enlarge, merge in zip(self.enlarge, self.merge, strict=True):
            features = merge(torch.cat([enlarge(features), skips.pop()], dim=1))
        return self.head(features)


class GCAD(nn.Module):
    """A local and a global branch, each an encoder and a U-Net. Input (N, 3, 256, 256).

    Args:
        patch_size: of the local encoder, 17 or 33.
        widths: channels of the global encoder, from a half to a thirty-second of the image size.
    """

    def __init__(self, patch_size: int = 33, widths: tuple[int, ...] = (32, 32, 64, 64, 64)):
        super().__init__()
        self.local_encoder, self.local_regression = DenseDescriptor(patch_size), UNet(128)
        down, up = pairwise((3, *widths)), pairwise((*reversed(widths), 10))
        self.global_encoder = nn.Sequential(
            *(nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in down),
            nn.Conv2d(widths[-1], 32, 8),  # the bottleneck, 32 numbers
            nn.ConvTranspose2d(32, widths[-1], 8),
            *(nn.ConvTranspose2d(*pair, 4, stride=2, padding=1) for pair in up),
        )
        self.global_regression = UNet(10)

    def forward(self, images: Tensor) -> list[Tensor]:
        encoders = (self.local_encoder, self.global_encoder)
        return [net(images) for net in (*encoders, self.local_regression, self.global_regression)]
