"""The three architectures of EfficientAD: the patch description network and the autoencoder.

`PatchDescriptionNetwork` is both teacher T (384 output channels in the paper) and student S (twice
as many); it is fully convolutional, and each of its output cells describes one 33x33 patch of the
image. `Autoencoder` is A: it squeezes the whole image through a 64-channel bottleneck. Notebook 01
builds them by hand.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

PATCH_SIZE = 33  # receptive field of a PDN output cell, in pixels (paper, Section 3.1)
STRIDE = 4  # pixels between the patches of neighbouring cells
MIN_IMAGE_SIZE = 256  # the autoencoder's 8x8 bottleneck convolution needs 256 pixels (Table 3)


class PatchDescriptionNetwork(nn.Sequential):
    """PDN-S (Table 1) or PDN-M (Table 2): four or six convolutions, two average poolings.

    Input: normalised images, shape (N, 3, H, W). Output: features, shape (N, out_channels, h, w),
    where `(h, w)` is `output_size((H, W))`: 64x64 with padding and 56x56 without for 256x256.

    Args:
        size: "small" (Table 1) or "medium" (Table 2).
        out_channels: in the paper 384 for a teacher, 768 for a student.
        padding: pad convolutions and poolings as the tables say; without it every cell sees only
            real pixels (the paper reports its results so).

    Raises:
        ValueError: if size is neither "small" nor "medium".
    """

    def __init__(self, size: str = "small", out_channels: int = 384, padding: bool = False):
        p = int(padding)
        if size == "small":
            layers = [
                nn.Conv2d(3, 128, kernel_size=4, padding=3 * p),  # Conv-1
                nn.ReLU(),
                nn.AvgPool2d(kernel_size=2, stride=2, padding=1 * p),  # AvgPool-1
                nn.Conv2d(128, 256, kernel_size=4, padding=3 * p),  # Conv-2
                nn.ReLU(),
                nn.AvgPool2d(kernel_size=2, stride=2, padding=1 * p),  # AvgPool-2
                nn.Conv2d(256, 256, kernel_size=3, padding=1 * p),  # Conv-3
                nn.ReLU(),
                nn.Conv2d(256, out_channels, kernel_size=4),  # Conv-4
            ]
        elif size == "medium":
            layers = [
                nn.Conv2d(3, 256, kernel_size=4, padding=3 * p),  # Conv-1
                nn.ReLU(),
                nn.AvgPool2d(kernel_size=2, stride=2, padding=1 * p),  # AvgPool-1
                nn.Conv2d(256, 512, kernel_size=4, padding=3 * p),  # Conv-2
                nn.ReLU(),
                nn.AvgPool2d(kernel_size=2, stride=2, padding=1 * p),  # AvgPool-2
                nn.Conv2d(512, 512, kernel_size=1),  # Conv-3
                nn.ReLU(),
                nn.Conv2d(512, 512, kernel_size=3, padding=1 * p),  # Conv-4
                nn.ReLU(),
                nn.Conv2d(512, out_channels, kernel_size=4),  # Conv-5
                nn.ReLU(),
                nn.Conv2d(out_channels, out_channels, kernel_size=1),  # Conv-6
            ]
        else:
            raise ValueError(f'size must be "small" or "medium", not {size!r}')
        super().__init__(*layers)
        self.size = size
        self.out_channels = out_channels
        self.padding = padding

    def output_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the output for an input of (H, W) pixels.

        Raises:
            ValueError: if the image is smaller than one patch.
        """
        height, width = (output_length(length, self.padding) for length in image_size)
        if min(height, width) < 1:
            raise ValueError(
                f"an image of {image_size[0]}x{image_size[1]} pixels is smaller than the "
                f"{PATCH_SIZE}x{PATCH_SIZE} patch of one output cell; use a larger one"
            )
        return height, width

    def trunk(self, images: Tensor) -> Tensor:
        """All layers but the last convolution, shape (N, C', h', w')."""
        for layer in list(self)[:-1]:
            images = layer(images)
        return images

    def head(self, trunk: Tensor, channels: slice = slice(None)) -> Tensor:
        """The last convolution, only the output channels asked for: (N, len(channels), h, w).

        A loss that reads half of the student's channels need not pay for the other half.
        """
        last = self[-1]
        return F.conv2d(trunk, last.weight[channels], last.bias[channels])


class Autoencoder(nn.Module):
    """The autoencoder A (Table 3): predicts the teacher's features from a 64-channel bottleneck.

    Input: normalised images, shape (N, 3, H, W), at least 256x256. Output: shape
    (N, out_channels, h, w), the output size of a PDN with the same padding. The intermediate
    sizes of Table 3 (3, 8, 15, 32, 63, 127) belong to 256 pixels and scale with the image.

    Args:
        out_channels: channels of the teacher, 384 in the paper.
        padding: whether the PDN whose output it must match is padded (64x64 or 56x56 at 256).

    Raises:
        ValueError: in `forward`, if an image side is shorter than 256 pixels.
    """

    def __init__(self, out_channels: int = 384, padding: bool = False):
        super().__init__()
        self.out_channels = out_channels
        self.padding = padding
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=4, stride=2, padding=1),  # EncConv-1
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=4, stride=2, padding=1),  # EncConv-2
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1),  # EncConv-3
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1),  # EncConv-4
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1),  # EncConv-5
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=8),  # EncConv-6, the bottleneck
        )
        self.decoder = nn.ModuleList(  # DecConv-1 ... DecConv-6, each after its Bilinear-n
            nn.Sequential(nn.Conv2d(64, 64, kernel_size=4, padding=2), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(6)
        )
        self.head = nn.Sequential(
            nn.Conv2d(64, 64, kernel_size=3, padding=1),  # DecConv-7, after Bilinear-7
            nn.ReLU(),
            nn.Conv2d(64, out_channels, kernel_size=3, padding=1),  # DecConv-8
        )

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"the autoencoder needs images of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} "
                f"pixels, not {height}x{width}; set a larger image_size"
            )
        features = self.encoder(images)
        sizes = zip(_decoder_lengths(height), _decoder_lengths(width), strict=True)
        for size, layer in zip(sizes, self.decoder, strict=True):  # Bilinear-1 ... Bilinear-6
            features = layer(F.interpolate(features, size=size, mode="bilinear"))
        size = tuple(output_length(length, self.padding) for length in (height, width))
        return self.head(F.interpolate(features, size=size, mode="bilinear"))  # Bilinear-7


def output_length(length: int, padding: bool) -> int:
    """Cells along an image side of `length` pixels, the same for PDN-S and PDN-M."""
    length = (length + 6 * padding - 3) // 2 + padding  # Conv-1, AvgPool-1
    length = (length + 6 * padding - 3) // 2 + padding  # Conv-2, AvgPool-2
    return length + 2 * padding - 5  # the 3x3 and the last 4x4 convolution


def _decoder_lengths(length: int) -> Iterator[int]:
    """Sizes of Bilinear-1 ... Bilinear-6 along one side; 3, 8, 15, 32, 63, 127 at 256 pixels."""
    return (length // divisor - odd for divisor, odd in
            ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1)))  # fmt: skip
