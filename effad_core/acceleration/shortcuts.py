"""Dropout and a mean squared difference that take a CPU less time than torch's own.

Dropout: on many processors torch draws its random numbers one by one in a single thread; on the
autoencoder's largest layer that takes as long as the convolution before it. Here one number of
torch's generator seeds a generator of numpy's, and each of its 64-bit numbers decides on four
elements. `computing_in` (in `precision`) takes this one outside of plain float32.

Mean squared difference: the feature maps of a batch are too large for the cache, and torch goes
through them several times, widened to float32. Here it is one image after the other, and forwards
already leaves the gradient.
"""

import numpy as np
import torch
from torch import Tensor

LEVELS = 2**16  # the probability is rounded to a multiple of 1 / LEVELS: 0.2 becomes 0.200003


def dropout(
    features: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Set each element to 0 with probability p and divide the others by 1 - p.

    Args:
        features: on a CPU, of any shape.
        p: probability, at least 0 and less than 1.
        training: without it the features come back as they are.
        inplace: accepted, for torch's signature has it; the result is a new tensor.

    Returns:
        The same shape, type and order in memory, differentiable. torch's generator decides which
        elements are dropped: the same seed drops the same ones.
    """
    if not training or p == 0:
        return features
    seed = int(torch.randint(2**63 - 1, ()))
    count = features.numel()
    drawn = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    kept = torch.from_numpy(drawn >= round(p * LEVELS))
    factors = torch.empty_like(features, requires_grad=False)  # channels last, if features are
    flat = factors.as_strided((count,), (1,))
    flat.copy_(kept).div_(1 - p)
    return features * factors


def mean_squared_difference_to(prediction: Tensor, target: Tensor) -> Tensor:
    """`effad_core.losses.mean_squared_difference` for a target without a gradient.

    Args:
        prediction: shape (N, C, H, W), of any floating-point format.
        target: the same shape, in the same or another format.

    Returns:
        A scalar, float32, computed in float32. The gradient is rounded to the prediction's format.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(prediction.shape)} and {tuple(target.shape)}")
    return _MeanSquaredDifference.apply(prediction, target)


class _MeanSquaredDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor) -> Tensor:
        gradient = torch.empty_like(prediction)
        total = torch.zeros((), device=prediction.device)
        for own, other, slope in zip(prediction, target, gradient, strict=True):
            difference = own.to(torch.float32, copy=True).sub_(other)
            total += torch.linalg.vector_norm(difference).square()
            slope.copy_(difference.mul_(2 / prediction.numel()))
        ctx.save_for_backward(gradient)
        return total / prediction.numel()

    @staticmethod
    def backward(ctx, outer: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None
