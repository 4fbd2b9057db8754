"""Statistics over streams of tensors: channel mean and deviation, and exact quantiles.

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
    channels at once, and without holding the sequence X.
    Chan's parallel update in float64, so a mean far larger than the deviation costs no precision.
    The deviation is the population's (divided by n).

    Args:
        features: feature maps, each of shape (N, C, H, W) with the same C; N, H, W may vary.

    Returns:
        (mu, sigma), float32 tensors of shape (C,) on the CPU.

    Raises:
        ValueError: for an empty stream, NaN or infinite features, or a channel that never varies
            (it would be divided by zero); the sentence names the channels.
    """
    # Algorithm 1, line 4; Algorithm 3, line 3: instead of an empty sequence X, three running sums
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for maps in features:
        # Algorithm 1, lines 3 and 7; Algorithm 3, lines 2 and 9: take in the maps of all channels
        values = maps.detach().transpose(0, 1).flatten(start_dim=1).double()  # (C, N*H*W)
        n = values.shape[1]
        chunk_mean = values.mean(dim=1)
        delta = chunk_mean - mean
        squares = (
            squares
            + (values - chunk_mean[:, None]).square().sum(dim=1)
            + delta.square() * (count * n / (count + n))
        )
        mean = mean + delta * (n / (count + n))
        count += n
    if count == 0:
        raise ValueError("no features to take statistics of: the stream was empty")
    if not (torch.isfinite(mean).all() and torch.isfinite(squares).all()):
        raise ValueError("the features contain NaN or infinite values; check the network's weights")
    sigma = (squares / count).sqrt()  # Algorithm 1, line 9; Algorithm 3, line 11
    # float32 values that only flicker in their last bit deviate by at most 6e-8 of their mean
    dead = torch.nonzero(sigma <= 1e-7 * mean.abs().clamp(min=1e-5)).flatten().tolist()
    if dead:
        shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        raise ValueError(
            f"{len(dead)} of {len(sigma)} channels never vary over these images (channel {shown}); "
            "use images that are not all one colour, or another teacher"
        )
    return mean.float().cpu(), sigma.float().cpu()


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
