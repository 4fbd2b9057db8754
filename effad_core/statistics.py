"""Statistics over streams of tensors: channel mean and standard deviation, and exact quantiles.

The streams are too large to hold: 384 channels x 56 x 56 cells for every training image, and every
pixel of every validation map. Neither result depends on how the stream is cut into chunks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def channel_statistics(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over a stream of feature maps.

    Algorithm 1, lines 3-10 (mu, sigma of the teacher) and Algorithm 3, lines 2-12 (of Psi): all
    channels at once, and without holding the sequence X (see `ChannelMoments`): a mean far larger
    than the standard deviation costs no precision. The standard deviation is the population's
    (divided by n).

    Args:
        features: feature maps, each of shape (N, C, H, W) with the same C; N, H, W may vary.

    Returns:
        (mu, sigma), float32 tensors of shape (C,) on the CPU.

    Raises:
        ValueError: for an empty stream, NaN or infinite features, or a channel that never varies
            (it would be divided by zero); the message names the channels.

    Example:
        >>> channel_statistics([torch.tensor([[[[1.0, 3.0]]]])])
        (tensor([2.]), tensor([1.]))
    """
    moments = ChannelMoments()  # Algorithm 1, line 4; Algorithm 3, line 3
    for maps in features:
        moments.add(maps)
    if moments.count == 0:
        raise ValueError("no features to take statistics of: the stream was empty")
    mean, sigma = moments.mean, moments.deviation  # Algorithm 1, line 9; Algorithm 3, line 11
    if not (torch.isfinite(mean).all() and torch.isfinite(sigma).all()):
        raise ValueError("the features contain NaN or infinite values; check the network's weights")
    dead = torch.nonzero(never_varies(mean, sigma)).flatten().tolist()
    if dead:
        shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        raise ValueError(
            f"{len(dead)} of {len(sigma)} channels never vary over these images (channel {shown}); "
            "use images that are not all one colour, or another teacher"
        )
    return mean.float().cpu(), sigma.float().cpu()


class ChannelMoments:
    """Mean and standard deviation of each channel of the feature maps so far; refuses nothing.

    Instead of the sequence X of Algorithms 1 and 3 it holds running sums, by Chan's parallel update
    in float64: on the maps' device if that has float64, else on the CPU. NaN or infinite features
    leave their own channel without finite results, no other.

    Args:
        covariance: also keep the covariance of every two channels, C x C numbers.

    Attributes:
        count: cells seen so far, in all maps together.
        mean: of each channel, float64, shape (C,).
    """

    def __init__(self, covariance: bool = False):
        self.count, self.mean = 0, torch.zeros(())
        self._products = covariance
        self._squares = torch.zeros(())  # around the mean: (C,), or (C, C) with covariance

    def add(self, maps: Tensor) -> None:
        """Take in feature maps of shape (N, C, H, W)."""
        # Algorithm 1, lines 3 and 7; Algorithm 3, lines 2 and 9: take in the maps of all channels
        maps = maps.detach()
        if maps.device.type not in ("cpu", "cuda"):  # Apple's MPS, for one, has no float64
            maps = maps.cpu()
        values = maps.transpose(0, 1).flatten(start_dim=1).double()  # (C, N*H*W)
        n = values.shape[1]
        chunk_mean = values.mean(dim=1)
        delta = chunk_mean - self.mean
        weight = self.count * n / (self.count + n)
        centred = values - chunk_mean[:, None]
        if self._products:
            self._squares = self._squares + centred @ centred.T + torch.outer(delta, delta) * weight
        else:
            self._squares = self._squares + centred.square().sum(dim=1) + delta.square() * weight
        self.mean = self.mean + delta * (n / (self.count + n))
        self.count += n

    @property
    def deviation(self) -> Tensor:
        """The population's standard deviation (divided by n), float64, shape (C,)."""
        squares = self._squares.diagonal() if self._products else self._squares
        return (squares / self.count).sqrt()

    @property
    def covariance(self) -> Tensor:
        """The population's covariance, float64, shape (C, C).

        Raises:
            ValueError: if it was not asked for.
        """
        if not self._products:
            raise ValueError("no covariance was kept: build ChannelMoments(covariance=True)")
        return self._squares / self.count


def never_varies(mean: Tensor, deviation: Tensor) -> Tensor:
    """Which channels never vary, so that nothing may be divided by their standard deviation.

    Args:
        mean, deviation: of each channel, shape (C,).

    Returns:
        Booleans, shape (C,). False where a value is NaN.
    """
    # float32 values that only flicker in their last bit deviate by at most 6e-8 of their mean
    return deviation <= 1e-7 * mean.abs().clamp(min=1e-5)


class StreamQuantiles:
    """Exact quantiles over a stream whose length is known (Algorithm 1, lines 47 and 56-60).

    Equal to `numpy.quantile` (linear interpolation) of all elements at once, but holds only those
    at or above the lowest quantile asked for: a tenth of the stream for the 0.9-quantile.

    Args:
        total: number of elements that will come.
        quantiles: in [0, 1].

    Raises:
        ValueError: if total is not positive; in `add`, for NaN or infinite elements; in `result`,
            if another number of elements came.
    """

    def __init__(self, total: int, quantiles: Sequence[float]):
        if total < 1:
            raise ValueError("no elements to take quantiles of")
        self.total, self.quantiles, self._seen = total, tuple(quantiles), 0
        self._first = int(np.floor(min(quantiles) * (total - 1)))  # rank of the lowest one kept
        self._largest = np.empty(0, np.float32)

    def add(self, values: np.ndarray) -> None:
        """Take in an array of any shape."""
        values = np.asarray(values).ravel()
        if not np.isfinite(values).all():
            raise ValueError(
                "NaN or infinite values in an anomaly map; check the network's weights"
            )
        self._seen += values.size
        keep = self.total - self._first
        merged = np.concatenate([self._largest, values])
        if merged.size > keep:
            merged.partition(merged.size - keep)
            merged = merged[-keep:].copy()  # a view would keep the others alive
        self._largest = merged

    def result(self) -> list[float]:
        """The quantiles, in the order they were asked for."""
        if self._seen != self.total:
            raise ValueError(f"{self.total} elements were announced, {self._seen} came")
        ranked = np.sort(self._largest.astype(np.float64))
        positions = [q * (self.total - 1) - self._first for q in self.quantiles]
        return np.interp(positions, np.arange(ranked.size), ranked).tolist()
