"""Convolutions with a quarter of the multiplications: Winograd's minimal filtering, for a CPU.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). The image is cut
into overlapping tiles of 6x6 pixels. A tile and the kernel are transformed to 36 numbers each per
channel, these are multiplied (36 matrix products over the channels), and the result is transformed
back to 3x3 outputs of a 4x4 kernel, or to 4x4 outputs of a 3x3 kernel: 36 multiplications instead
of 144. The result is that of the convolution but for rounding. In float32 the rounding error is two
to three times that of adding the products one by one, a few millionths of the outputs' size (torch
adds in blocks and stays below). `python benchmarks/winograd.py` measures it, and the gain.

`convolution` has the signature of `torch.conv2d` and takes this way where it pays.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 6  # pixels along a side of a tile
POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # and infinity: where the polynomials are evaluated
STRIP = 160  # tiles that are transformed at once: their 36 numbers per channel stay in the cache
FEWEST_PRODUCTS, FEWEST_CELLS = 128 * 128, 24 * 24  # below, the transforms cost what they save


def convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`: by `conv2d` below where that is expected to be faster, else torch's own."""
    margin = _one(padding)
    plain = (_one(stride), _one(dilation), groups) == (1, 1, 1) and isinstance(margin, int)
    if plain and pays(images, weight, margin):
        return conv2d(images, weight, bias, margin)
    return torch.conv2d(images, weight, bias, stride, padding, dilation, groups)


def _one(sides: int | str | Sequence[int]) -> int | None:
    """The number that holds for both sides; None if they differ, or for padding by name."""
    if isinstance(sides, int):
        return sides
    return sides[0] if not isinstance(sides, str) and len(set(sides)) == 1 else None


def pays(images: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether `conv2d` is expected to be faster than torch's convolution."""
    outputs, channels, *kernel = weight.shape
    cells = [side + 2 * padding - kernel[0] + 1 for side in images.shape[2:]]
    return (
        images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and kernel in ([3, 3], [4, 4])
        and channels * outputs >= FEWEST_PRODUCTS
        and cells[0] * cells[1] >= FEWEST_CELLS
    )


def conv2d(images: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """The convolution of stride 1, differentiable.

    Args:
        images: shape (N, C, H, W), float32 or float64, on a CPU.
        weight: shape (O, C, r, r) with r 3 or 4.
        bias: shape (O,).
        padding: zeros around the image, in pixels, less than r.

    Returns:
        shape (N, O, H + 2 * padding - r + 1, W + 2 * padding - r + 1), channels last in memory.

    Raises:
        ValueError: for another kernel, or an image smaller than it.
    """
    r = weight.shape[-1]
    if weight.shape[2:] not in ((3, 3), (4, 4)) or not 0 <= padding < r:
        raise ValueError(f"only 3x3 and 4x4 kernels and smaller paddings, not {weight.shape}")
    if min(images.shape[2:]) + 2 * padding < r:
        raise ValueError(f"an image of {tuple(images.shape[2:])} is smaller than the kernel")
    outputs = _Convolution.apply(images, weight, padding)
    return outputs if bias is None else outputs + bias[:, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding = padding
        return filtered(images, transformed(weight), weight.shape[-1], padding)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        images, weight = ctx.saved_tensors
        r, for_images, for_weight = weight.shape[-1], None, None
        if ctx.needs_input_grad[0]:  # the convolution with the turned kernel
            turned = transformed(weight.flip(2, 3).transpose(0, 1))
            for_images = filtered(gradient, turned, r, r - 1 - ctx.padding)
        if ctx.needs_input_grad[1]:
            for_weight = _weight_gradient(images, gradient, r, ctx.padding)
        return for_images, for_weight, None


class FilteredConvolution(nn.Module):
    """A convolution of stride 1 for inference, its kernel transformed beforehand."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.kernel_size, self.padding = layer.kernel_size[0], layer.padding[0]
        self.register_buffer("kernel", transformed(layer.weight).contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return filtered(images, self.kernel, self.kernel_size, self.padding).add_(
            self.bias[:, None, None]
        )


def filter_convolutions(network: nn.Module, images: Tensor) -> None:
    """Replace the convolutions for which `conv2d` pays by `FilteredConvolution`s. In place.

    Args:
        network: for inference on a CPU.
        images: an example of its input.
    """
    large = []

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if _one(layer.stride) == 1 and pays(inputs[0], layer.weight, layer.padding[0]):
            large.append(layer)

    convolutions = [layer for layer in network.modules() if type(layer) is nn.Conv2d]
    hooks = [layer.register_forward_hook(note) for layer in convolutions]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in large:
                setattr(parent, name, FilteredConvolution(child))


@cache
def matrices(r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The transforms of the kernel, of a tile, and back, for kernels of r x r (Toom and Cook).

    Convolving is multiplying polynomials, and a product of polynomials is known from its values at
    as many points as it has coefficients. Each matrix is the one-dimensional transform along both
    sides at once: its Kronecker product with itself.

    Returns:
        shapes (36, r * r), (36, 36) and (m * m, 36), where m = 7 - r.
    """

    def values(count: int) -> np.ndarray:
        """Of the powers 0 ... count - 1 at all points; at infinity only the highest counts."""
        return np.vstack([np.vander(POINTS, count, increasing=True), np.eye(count)[-1]])

    scale = [np.prod([p - q for q in POINTS if q != p]) for p in POINTS] + [1.0]
    kernel = values(r) / np.array(scale)[:, None]
    tile = np.linalg.inv(values(TILE)).T * np.array(scale)[:, None]
    back = values(TILE + 1 - r).T
    return tuple(torch.tensor(np.kron(one, one), dtype=dtype) for one in (kernel, tile, back))


def transformed(weight: Tensor) -> Tensor:
    """A kernel (O, C, r, r) as the 36 matrices (36, C, O) by which tiles are multiplied."""
    kernel, _, _ = matrices(weight.shape[-1], weight.dtype)
    flat = weight.permute(2, 3, 0, 1).reshape(kernel.shape[1], -1)
    return (kernel @ flat).view(TILE**2, weight.shape[0], weight.shape[1]).transpose(1, 2)


def filtered(images: Tensor, kernel: Tensor, r: int, padding: int) -> Tensor:
    """The convolution of images (N, C, H, W) with a kernel that `transformed` made."""
    _, _, back = matrices(r, images.dtype)
    height, width = (side + 2 * padding - r + 1 for side in images.shape[2:])
    m, outputs = TILE + 1 - r, kernel.shape[2]
    rows, columns = -(-height // m), -(-width // m)  # tiles; the last may reach over the edge
    result = images.new_empty(len(images), rows, m, columns, m, outputs)
    for image, target in zip(images.permute(0, 2, 3, 1), result, strict=True):
        for start, tiles in _strips(image, r, padding, rows, columns):
            products = torch.bmm(tiles, kernel)  # (36, tiles, O)
            values = (back @ products.flatten(1)).view(m, m, -1, columns, outputs)
            target[start : start + values.shape[2]] = values.permute(2, 0, 3, 1, 4)
    result = result.view(len(images), rows * m, columns * m, outputs)
    return result[:, :height, :width].permute(0, 3, 1, 2)


def _weight_gradient(images: Tensor, gradient: Tensor, r: int, padding: int) -> Tensor:
    """The gradient of the kernel (O, C, r, r), by the transposed transforms."""
    kernel, _, back = matrices(r, images.dtype)
    height, width = gradient.shape[2:]
    m, channels, outputs = TILE + 1 - r, images.shape[1], gradient.shape[1]
    rows, columns = -(-height // m), -(-width // m)
    total = images.new_zeros(TILE**2, channels, outputs)
    for image, slope in zip(images.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), strict=True):
        for start, tiles in _strips(image, r, padding, rows, columns):
            count = tiles.shape[1] // columns
            part = slope[start * m : (start + count) * m]
            missing = (0, 0, 0, columns * m - width, 0, count * m - part.shape[0])
            blocks = F.pad(part, missing).view(count, m, columns, m, outputs)
            blocks = blocks.permute(1, 3, 0, 2, 4).reshape(m * m, -1)
            slopes = (back.T @ blocks).view(TILE**2, -1, outputs)
            total.baddbmm_(tiles.transpose(1, 2), slopes)
    flat = kernel.T @ total.flatten(1)
    return flat.view(r, r, channels, outputs).permute(3, 2, 0, 1)


def _strips(
    image: Tensor, r: int, padding: int, rows: int, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """The transformed tiles of an image (H, W, C), strip by strip.

    Yields:
        The number of the strip's first row of tiles, and its tiles (36, tiles, C).
    """
    _, tile, _ = matrices(r, image.dtype)
    _, width, channels = image.shape
    m = TILE + 1 - r
    count = max(1, STRIP // columns)
    right = (columns - 1) * m + TILE - padding - width  # pixels missing at the right
    for start in range(0, rows, count):
        count = min(count, rows - start)
        top = start * m - padding
        bottom = top + (count - 1) * m + TILE
        part = image[max(top, 0) : bottom]
        above = max(-top, 0)
        below = bottom - top - above - part.shape[0]
        part = F.pad(part, (0, 0, padding, right, above, below))
        across, along, one = part.stride()
        shape = (TILE, TILE, count, columns, channels)
        tiles = part.as_strided(shape, (across, along, m * across, m * along, one))
        yield start, (tile @ tiles.reshape(TILE**2, -1)).view(TILE**2, -1, channels)
