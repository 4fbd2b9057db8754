"""Pillow's bilinear filter as a part of a network, so that an exported detector resizes by itself.

Other libraries' bilinear filters sample: from a large image they take a few pixels and drop the
rest. Pillow's takes the mean over all pixels that an output pixel stands for, weighted by a
triangle. It filters rows first, rounds to 8 bits, then filters columns, and rounds again. Each pass
is a product with a matrix, which every runtime computes alike.
"""

import torch
from torch import Tensor, nn


class PillowResize(nn.Module):
    """Resize images to one size as `datasets.resize` does, within one step of 255.

    One pixel in a thousand is off by a step: Pillow computes in fixed-point numbers. Of an image
    whose height shrinks by more than twice what its width does, one in four is: Pillow 13 filters
    its columns first, older versions do not.

    Args:
        size: (height, width) in pixels.

    Example:
        >>> PillowResize((256, 256))(torch.zeros(1, 3, 480, 641)).shape
        torch.Size([1, 3, 256, 256])
    """

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize.

        Args:
            images: float32, whole numbers 0..255, shape (N, 3, H, W).

        Returns:
            The same, shape (N, 3, height, width).
        """
        height, width = self.size
        images = _rounded(images @ _weights(images.shape[3], width).T)
        return _rounded(_weights(images.shape[2], height) @ images)


def _weights(length: int, new: int) -> Tensor:
    """What each pixel of a side counts in each new one, shape (new, length); rows sum to 1."""
    pixels = torch.arange(length, dtype=torch.float32) + 0.5
    scale = (pixels[-1:] + 0.5) / new  # length / new, as a tensor: the length is not known here
    centres = (torch.arange(new, dtype=torch.float32)[:, None] + 0.5) * scale
    weights = torch.relu(1 - torch.abs(pixels - centres) / scale.clamp(min=1.0))
    return weights / weights.sum(dim=1, keepdim=True)


def _rounded(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5)
