"""The losses of Algorithms 1 and 3. Tensors in, scalars out; every mean runs over a batch as well.

Notebook 03 builds the hard feature loss and the penalty by hand, notebook 04 the other two.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def hard_feature_loss(distances: Tensor, quantile: float = 0.999) -> Tensor:
    """Mean of the largest squared student-teacher differences (Algorithm 1, lines 19-20).

    Exact for every size: the linearly interpolated quantile d_hard lies above exactly the
    `n - ceil(quantile * (n - 1))` largest of n elements, and elements equal to the smallest of
    them belong to the hard ones too. So no interpolation, no sampling and no size limit is needed.
    A NaN among the distances makes the loss NaN.

    Args:
        distances: D^ST, squared differences, shape (N, C, H, W), unitless.
        quantile: elements at or above this quantile of each image's distances count.

    Returns:
        L_hard, a scalar: the mean over images of each image's mean over its hard elements.

    Raises:
        ValueError: if quantile is not in [0, 1) or there are no elements.

    Example:
        >>> hard_feature_loss(torch.tensor([[[[1.0, 2.0], [3.0, 10.0]]]]), quantile=0.5)
        tensor(6.5000)
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be in [0, 1), not {quantile}")
    if distances.numel() == 0:
        raise ValueError(f"no distances to average: shape {tuple(distances.shape)}")
    flat = distances.flatten(start_dim=1)  # (N, C*H*W)
    rank = round(quantile * (flat.shape[1] - 1), 6)  # of d_hard; 0.07 * 100 is 7.000000000000001
    count = flat.shape[1] - math.ceil(rank)
    # Algorithm 1, line 19: d_hard, as the smallest element that is not below it
    d_hard = flat.detach().topk(count, sorted=True).values[:, -1:]  # (N, 1)
    # Algorithm 1, line 20: the mean of all elements at or above it
    hard = ~(flat < d_hard)  # a NaN is not below it, and stays
    per_image = torch.where(hard, flat, 0).sum(dim=1) / hard.sum(dim=1)
    return per_image.mean()


def pretraining_penalty(student_output: Tensor) -> Tensor:
    """Mean square of the student's first half on a pretraining image P (Algorithm 1, line 22).

    It keeps the student from learning to imitate the teacher beyond the training images.

    Args:
        student_output: S(P), the first half of its channels only, shape (N, C, H, W);
            C is 384 in the paper.

    Returns:
        A scalar: (C HW)^-1 times the summed squared Frobenius norms of the channels.

    Example:
        >>> pretraining_penalty(torch.tensor([[[[1.0, 3.0]]]]))
        tensor(5.)
    """
    return student_output.square().mean()


def mean_squared_difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of all elements of the squared difference of two feature maps.

    L_AE with A's output and the normalised teacher's (Algorithm 1, lines 37 and 39), L_STAE with
    the student's second half and A's output (lines 38 and 40), and L_dist with T's output and the
    normalised features of Psi (Algorithm 3, lines 24 and 25).

    Args:
        prediction: shape (N, C, H, W).
        target: the same shape.

    Raises:
        ValueError: if the shapes differ (a silent broadcast would give a wrong loss).

    Example:
        >>> mean_squared_difference(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
        tensor(1.)
    """
    if prediction.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(prediction.shape)} and {tuple(target.shape)}")
    return F.mse_loss(prediction, target)
