"""From what the methods compute for each cell to anomaly maps."""

from collections.abc import Callable, Iterable, Sequence

from effad_core.statistics import channel_statistics

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

SIGMA = 4.0  # pixels: the smoothing of PatchCore's maps, which SimpleNet took over


def smoothed(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """Maps (N, 1, H, W) smoothed by a Gaussian, cut off at four standard deviations."""
    if sigma == 0:
        return maps
    side = 2 * int(4 * sigma + 0.5) + 1
    return gaussian_blur(maps, [side, side], [sigma, sigma])


def shown_and_judged(
    cells: Tensor, size: Sequence[int], sigma: float = SIGMA
) -> tuple[Tensor, Tensor]:
    """The map of scores of cells, and the map whose maximum is the highest of them.

    Args:
        cells: shape (N, 1, h, w).
        size: (H, W) of the maps.
        sigma: of the Gaussian that smooths the first one, in pixels.

    Returns:
        The cells resized bilinearly and smoothed, and resized to the nearest one.
    """
    shown = smoothed(F.interpolate(cells, size=size, mode="bilinear"), sigma)
    return shown, F.interpolate(cells, size=size, mode="nearest")


def scales_of(batches: Iterable[Tensor], raw_maps: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """Mean and standard deviation of each of several maps over all pixels of some images.

    Args:
        batches: uint8 images, each (N, 3, H, W).
        raw_maps: images -> maps, each (N, 1, H, W), before they are standardised.

    Returns:
        float32, shape (maps, 2).

    Raises:
        ValueError: if a map does not vary, so that nothing can be divided by its deviation.
    """
    found = channel_statistics(torch.cat(list(raw_maps(batch)), dim=1) for batch in batches)
    return torch.stack(found, dim=1)


def standardised(maps: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Maps less their means, divided by their deviations, shape (maps, N, 1, H, W).

    Args:
        maps: each (N, 1, H, W).
        scales: as `scales_of` gives them.
    """
    mean, deviation = scales.T[..., None, None, None, None]  # each (maps, 1, 1, 1, 1)
    return (torch.stack(list(maps)) - mean) / deviation
