"""Resize, tensors, and the augmentations of Algorithm 1, all on 8-bit images.

Images travel as uint8 tensors; the detector normalises inside, with the constants below.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize with Pillow's antialiased bilinear filter; the aspect ratio is not kept.

    Args:
        image: an RGB image.
        size: side of a square, or (height, width), in pixels.

    Returns:
        The image at that size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into a uint8 tensor of shape (3, H, W), values 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation, channel by channel.

    Args:
        images: shape (N, 3, H, W), uint8, or floating point in 0..1.

    Returns:
        float32 tensor of the same shape: what the networks take.
    """
    mean, std = _imagenet_statistics(images.device)
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    return (scaled - mean) / std


@cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, shape (3, 1, 1), copied once: each copy waits for a GPU."""
    with torch.inference_mode(False):  # so that they can take part in a training too
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(device)[..., None, None]
    return mean, std


def draw_augmentation(rng: np.random.Generator) -> tuple[int, float]:
    """Draw the augmentation of one iteration (Algorithm 1, lines 23 and 24).

    Args:
        rng: the iteration's random generator.

    Returns:
        The index i_aug, uniform in {1, 2, 3}, and the coefficient lambda, uniform in [0.8, 1.2).
    """
    index = int(rng.integers(1, 4))  # Algorithm 1, line 23
    coefficient = float(rng.uniform(0.8, 1.2))  # Algorithm 1, line 24
    return index, coefficient


def augment(image: Image.Image, index: int, coefficient: float) -> Image.Image:
    """Change brightness, contrast or saturation (Algorithm 1, lines 25-31).

    Pillow changes them, as torchvision does for PIL images; torchvision itself takes seconds to
    import.

    Args:
        image: an RGB image, already at the detector's size.
        index: i_aug: 1 brightness, 2 contrast, 3 saturation.
        coefficient: lambda; 1 leaves the image as it is.

    Returns:
        The augmented RGB image, same size.

    Raises:
        ValueError: if the index is not 1, 2 or 3.
    """
    if index == 1:  # Algorithm 1, line 25
        enhancer = ImageEnhance.Brightness(image)  # Algorithm 1, line 26
    elif index == 2:  # Algorithm 1, line 27
        enhancer = ImageEnhance.Contrast(image)  # Algorithm 1, line 28
    elif index == 3:  # Algorithm 1, line 29
        enhancer = ImageEnhance.Color(image)  # Algorithm 1, line 30: saturation
    else:
        raise ValueError(f"augmentation index {index} is not 1, 2 or 3")
    return enhancer.enhance(coefficient)  # Algorithm 1, line 31
