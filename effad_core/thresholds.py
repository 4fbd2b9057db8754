"""Operating points: which anomaly score is high enough to call an image, or a pixel, anomalous.

One convention throughout: an image is anomalous if its score > threshold; a score equal to the
threshold is normal. With it the statements about new images are exact for scores without ties,
and with ties they err on the safe side.

* From normal images alone, with a stated false positive rate: `threshold_for_fpr`.
* From labelled images: `max_f1`, `for_recall`, `for_cost`; `sweep` and two curves of it.
* From maps of normal images: `pixel_threshold` per image, `pixel_threshold_for_fpr` per pixel.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

from effad_core.metrics import checked_numbers

import numpy as np
import scipy  # loads scipy.stats when it is first used: 0.3 s
from numpy.typing import ArrayLike

_KINDS = {  # what each kind says; it knows the numbers named here, and no others
    "fpr-confident": "at most {rate} of normal images are called anomalous ({confidence} "
    "confidence, {images} normal images; {expected_fpr} on average, bound {upper_fpr})",
    "fpr-average": "on average at most {rate} of normal images are called anomalous ({images} "
    "normal images; {expected_fpr} on average, bound {upper_fpr} at {confidence} confidence)",
    "pixel-fpr": "{expected_fpr} of the pixels of {images} normal images lie above, {rate} may "
    "({confidence} interval, bootstrap over images: {lower_fpr} to {upper_fpr})",
    "labels-f1": "the highest F1 on {images} labelled images",
    "labels-recall": "finds at least {rate} of the anomalous ones of {images} labelled images",
    "labels-cost": "the lowest cost on {images} labelled images",
    "manual": "chosen by hand, looking at {images} images; no rate is stated",
}
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and what is known of it; `str` says it in a sentence. The unknown is None.

    From labels no bound is known: the threshold was chosen by looking at them. A value out of its
    range, and one that the kind needs or does not know, raises ValueError.
    """

    threshold: float  # finite; a score above it is anomalous
    kind: str  # how it was chosen: from normal images, their pixels, labelled images, or by hand
    images: int  # behind it
    rate: float | None = None  # asked for: the highest FPR; of "labels-recall" the recall
    confidence: float | None = None  # of upper_fpr; of "pixel-fpr", of lower_fpr to upper_fpr
    expected_fpr: float | None = None  # mean over sets of images; of pixels, the share above
    upper_fpr: float | None = None  # upper bound of the true false positive rate
    lower_fpr: float | None = None

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise ValueError(f"the kind must be one of {', '.join(_KINDS)}, not {self.kind!r}")
        share = partial(_share, ends=(0, 1))
        count = partial(_count, ends=(0,)) if self.kind == "manual" else _count  # by hand: of none
        for name in [name for name in vars(self) if name != "kind"]:
            value, known = getattr(self, name), f"{{{name}}}" in "{threshold}" + _KINDS[self.kind]
            if known == (value is None):
                raise ValueError(f"{self.kind} {'needs' if known else 'does not know'} {name}")
            if known:  # kept as a number of Python's own, which JSON can hold
                check = {"threshold": _number, "images": count}.get(name, share)
                object.__setattr__(self, name, check(value, name))

    def __str__(self) -> str:
        said = {name: value for name, value in self.to_dict().items() if name != "kind"}
        for name in said.keys() - {"threshold", "images"}:
            said[name] = f"{100 * said[name]:.4g} %"
        return f"threshold {self.threshold:.4g}: {_KINDS[self.kind].format(**said)}"

    def to_dict(self) -> dict[str, float | int | str]:
        """What the point knows, JSON-able."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping) -> "OperatingPoint":
        """The point that `to_dict` described; ValueError for anything else."""
        names = cls.__dataclass_fields__
        if not isinstance(content, Mapping) or not names.keys() >= content.keys():
            raise ValueError(f"an operating point is described by other entries than {content!r}")
        return cls(**{name: content.get(name) for name in names})


def threshold_for_fpr(
    normal_scores: ArrayLike, rate: float, confidence: float = 0.95, guarantee: str = "confident"
) -> OperatingPoint:
    """A threshold that keeps a false positive rate, whatever the distribution of the scores.

    It is the k-th largest of n scores. If they and new ones are independent draws of one
    distribution, the true false positive rate at it follows Beta(k, n - k + 1), or is lower where
    scores tie (Wilks, "Determination of sample sizes for setting tolerance limits", 1941).

    Args:
        normal_scores: shape (n,), of images that no network was trained on: training images score
            too low. Validation images, whose maps set the quantiles, are slightly optimistic.
        rate, confidence: in (0, 1); the confidence is upper_fpr's, and "confident"'s own.
        guarantee: "confident" takes the largest k with P(FPR <= rate) >= confidence: that share of
            all sets of n normal images gives a threshold that keeps the rate (a tolerance limit).
            "average" takes the largest k with k / (n + 1) <= rate, the ceil((1 - rate)(n + 1))-th
            smallest score (split conformal prediction): the mean over such sets keeps the rate,
            one threshold often does not, and upper_fpr says how far off it may be.

    Raises:
        ValueError: if an argument is out of range, a score is not finite, or the images are too
            few: the message says how many are needed, and the lowest rate that n support.

    Example:
        >>> threshold_for_fpr([0.1, 0.2, 0.3, 0.4], 0.25, guarantee="average").threshold
        0.4
    """
    scores = _numbers(normal_scores, "the scores")
    needed, n = images_needed(rate, confidence, guarantee), len(scores)
    if n < needed:
        lowest = 1.0005 * lowest_rate(n, confidence, guarantee)  # four digits, rounded up
        how = "on average" if guarantee == "average" else f"at a confidence of {confidence:g}"
        needs = f"needs {needed} normal images, the {n} given support {lowest:.4g} at the lowest"
        raise ValueError(f"a false positive rate of {rate:g} {how} {needs}")
    if guarantee == "average":
        k = min(max(1, math.floor(_eased(rate) * (n + 1))), n)
    else:  # the bound grows with k: as many k as keep it within the rate, and enough images do at 1
        ranks, bound = range(2, n + 1), _eased(rate)
        k = 1 + bisect_right(ranks, bound, key=lambda k: _beta(confidence, k, n - k + 1))
    threshold, upper = np.partition(scores, n - k)[n - k], _beta(confidence, k, n - k + 1)
    return OperatingPoint(threshold, f"fpr-{guarantee}", n, rate, confidence, k / (n + 1), upper)


def images_needed(rate: float, confidence: float = 0.95, guarantee: str = "confident") -> int:
    """The fewest normal images with which `threshold_for_fpr` keeps a rate; same arguments.

    Example:
        >>> images_needed(0.05), images_needed(0.05, guarantee="average")
        (59, 19)
    """
    lowest_rate(1, confidence, guarantee)  # refuses what it does not know
    rate = max(_eased(_share(rate, "the rate")), 1e-300)  # its inverse stays finite
    if guarantee == "average":
        return max(1, math.ceil(1 / rate - 1))  # 1 / (n + 1) <= rate
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-rate)))  # (1 - rate)^n


def lowest_rate(n: int, confidence: float = 0.95, guarantee: str = "confident") -> float:
    """The lowest rate that `threshold_for_fpr` keeps with n normal images; same arguments."""
    n, confidence = _count(n, "the number of images"), _share(confidence, "the confidence")
    if guarantee not in ("confident", "average"):
        raise ValueError(f'the guarantee must be "confident" or "average", not {guarantee!r}')
    return 1 / (n + 1) if guarantee == "average" else -math.expm1(math.log1p(-confidence) / n)


@dataclass(frozen=True)
class Confusion:
    """Numbers of images by verdict and truth. A share of no images at all is NaN."""

    tp: int
    fp: int
    tn: int
    fn: int

    images = property(lambda self: self.tp + self.fp + self.tn + self.fn)
    fpr = property(lambda self: _ratio(self.fp, self.fp + self.tn))
    recall = property(lambda self: _ratio(self.tp, self.tp + self.fn))
    precision = property(lambda self: _ratio(self.tp, self.tp + self.fp))
    f1 = property(lambda self: _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn))
    accuracy = property(lambda self: _ratio(self.tp + self.tn, self.images))

    def intervals(self, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
        """Two-sided Clopper-Pearson intervals of "fpr" and "recall", for images not chosen by."""
        tail = (1 - _share(confidence, "the confidence")) / 2
        found = {}
        for name, hits, misses in (("fpr", self.fp, self.tn), ("recall", self.tp, self.fn)):
            low = _beta(tail, hits, misses + 1) if hits else 0.0
            high = _beta(1 - tail, hits + 1, misses) if misses else 1.0
            found[name] = (low, high) if hits + misses else (math.nan, math.nan)
        return found


def confusion(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Confusion:
    """Count the verdicts at a threshold; images of one class alone will do.

    Args:
        labels: shape (n,), 0 normal, 1 anomalous.
        scores: shape (n,), higher is more anomalous, compared as they are.

    Raises:
        ValueError: if shapes or labels do not fit, or a number is not finite.
    """
    labels, scores = _labelled(labels, scores)
    called = scores.astype(np.float64) > _number(threshold, "the threshold")
    split = (called & labels, called & ~labels, ~called & ~labels, ~called & labels)
    return Confusion(*(int(part.sum()) for part in split))


def sweep(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """Every way in which a threshold can split labelled images, from the highest to the lowest.

    Args: as `confusion`. Raises: as `confusion`, and if only one class is present.

    Returns:
        thresholds, float64, exact in the scores' dtype: the highest score (nothing is anomalous),
        the midpoints between neighbours, the next number below the lowest (everything is); tp and
        fp, the anomalous and normal images above each. Shape (k + 1,) for k distinct scores.
    """
    labels, scores = _labelled(labels, scores)
    if labels.all() or not labels.any():
        raise ValueError("both normal and anomalous images are needed, the labels have one class")
    rising, place = np.unique(scores, return_inverse=True)
    high, low = rising[:0:-1], rising[-2::-1]  # neighbours, from the highest pair to the lowest
    middle = high / 2 + low / 2
    middle = np.where((low <= middle) & (middle < high), middle, low)  # it may round to the higher
    lowest = np.nextafter(rising[:1], rising.dtype.type(-np.inf))
    counts = (np.bincount(place[kind], minlength=len(rising)) for kind in (labels, ~labels))
    tp, fp = (np.append(0, np.cumsum(count[::-1])) for count in counts)
    return np.concatenate([rising[-1:], middle, lowest]).astype(np.float64), tp, fp


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """False positive rate, recall and threshold along a `sweep`, each of shape (k + 1,)."""
    thresholds, tp, fp = sweep(labels, scores)
    return fp / fp[-1], tp / tp[-1], thresholds


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """Precision (1 where nothing is called anomalous), recall and threshold along a `sweep`."""
    thresholds, tp, fp = sweep(labels, scores)
    return np.append(1.0, tp[1:] / (tp + fp)[1:]), tp / tp[-1], thresholds


def max_f1(labels: ArrayLike, scores: ArrayLike) -> OperatingPoint:
    """The threshold of a `sweep` with the highest F1; of several the highest."""
    thresholds, tp, fp = sweep(labels, scores)
    best = np.argmax(2 * tp / (tp[-1] + tp + fp))
    return OperatingPoint(thresholds[best], "labels-f1", len(labels))


def for_recall(labels: ArrayLike, scores: ArrayLike, recall: float) -> OperatingPoint:
    """The highest threshold of a `sweep` that reaches a recall in (0, 1]."""
    thresholds, tp, _ = sweep(labels, scores)
    recall = _share(recall, "the recall", ends=(1,))
    best = np.argmax(tp >= max(1, recall * tp[-1] * (1 - 1e-9)))
    return OperatingPoint(thresholds[best], "labels-recall", len(labels), rate=recall)


def for_cost(
    labels: ArrayLike,
    scores: ArrayLike,
    cost_false_positive: float,
    cost_false_negative: float,
    prevalence: float | None = None,
) -> OperatingPoint:
    """The threshold of a `sweep` with the lowest expected cost per image; of several the highest.

    The cost is (1 - prevalence) * cost_false_positive * FPR + prevalence * cost_false_negative *
    (1 - recall). Where one error dwarfs the other, nothing or everything is called anomalous.

    Args:
        labels, scores: as `confusion`.
        cost_false_positive, cost_false_negative: above 0, in one unit.
        prevalence: share of anomalous images in use, in (0, 1); None takes that of these labels.
    """
    thresholds, tp, fp = sweep(labels, scores)
    share = tp[-1] / len(labels) if prevalence is None else _share(prevalence, "the prevalence")
    miss, alarm = (_number(c, "a cost", 0) for c in (cost_false_negative, cost_false_positive))
    cost = (1 - share) * alarm * (fp / fp[-1]) + share * miss * ((tp[-1] - tp) / tp[-1])
    best = np.argmax(cost <= cost.min() * (1 + 1e-12))
    return OperatingPoint(thresholds[best], "labels-cost", len(labels))


def pixel_threshold(
    maps: Sequence[ArrayLike], rate: float, confidence: float = 0.95, guarantee: str = "confident"
) -> OperatingPoint:
    """A threshold above which no more than a rate of normal images shows any pixel.

    Pixels of one image depend on one another, so a statement about new images must count images:
    this is `threshold_for_fpr` of the maps' maxima. A detector's score is the maximum before the
    map is resized, and bilinear resizing never raises it: the threshold of the scores holds for
    maps of any size.

    Args, raises: as `threshold_for_fpr`; maps of normal images, shape (H, W) each, of any sizes.
    """
    return threshold_for_fpr([m.max() for m in _read(maps)], rate, confidence, guarantee)


def pixel_threshold_for_fpr(
    maps: Sequence[ArrayLike], pixel_rate: float, confidence: float = 0.95, seed: int = 0
) -> OperatingPoint:
    """The lowest pixel of normal maps with at most a rate of all their pixels above it.

    It is the pooled (1 - pixel_rate)-quantile, without interpolation: a statement on average over
    these pixels. No confidence bound follows from their number, for pixels of one image are
    dependent. lower_fpr and upper_fpr are the percentile bootstrap's interval of the pixel false
    positive rate at this threshold, over images drawn anew; few images make it too narrow.

    Args:
        maps: shape (H, W) each, at least 2; read three times, and only their top stays in memory.
        pixel_rate, confidence: in (0, 1); the rate is at least one pixel of all.
        seed: of the 2000 resamples.
    """
    rate, confidence = _share(pixel_rate, "the rate"), _share(confidence, "the confidence")
    sizes = np.array([m.size for m in _read(maps)])
    n, total = len(sizes), int(sizes.sum())
    keep = min(math.floor(_eased(rate) * total) + 1, total)
    if n < 2 or keep < 2:
        raise ValueError(f"{n} maps of {total} pixels are too few for a rate of {rate:g}")
    largest = np.full(keep, -np.inf)
    for m in _read(maps):
        more = m[m > largest[0]]  # after the partition the first is the lowest of them
        largest = np.partition(np.append(largest, more), more.size)[more.size :]
    above = np.array([np.count_nonzero(m > largest[0]) for m in _read(maps)])
    draw = np.random.default_rng(seed).integers
    shares = [above[i].sum() / sizes[i].sum() for i in (draw(n, size=n) for _ in range(2000))]
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    share = above.sum() / total
    return OperatingPoint(largest[0], "pixel-fpr", n, rate, confidence, share, high, low)


def _beta(share: float, a: int, b: int) -> float:
    """The quantile of Beta(a, b) below which a share of it lies."""
    return float(scipy.stats.beta.ppf(share, a, b))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _eased(rate: float) -> float:
    """A rate of 0.29 allows 29 of 100 images, although 0.29 * 100 < 29; still below 1."""
    return rate * (1 + 1e-9 * (1 - rate))


def _number(value, name: str, low=-1e308, high=1e308, ends=(), kind: type = float):
    """A number of Python's own strictly between low and high, or one of the ends."""
    fits = isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    # numpy's own numbers become Python's first: a float32 cannot be compared with 1e308
    number = value.item() if isinstance(value, np.generic) else value
    if not fits or not (low < number < high or number in ends):
        raise ValueError(f"{name} must be {kind.__name__}, {low} to {high}, not {value!r}")
    return kind(number)


_share = partial(_number, low=0, high=1)
_count = partial(_number, low=0, kind=int)


def _numbers(values: ArrayLike, name: str, ndim: int = 1) -> np.ndarray:
    """As floats: float16 and float32 as they are, everything else as float64."""
    array = checked_numbers(values, name)
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} dimension(s) and a value, not {array.shape}")
    return array if array.dtype.char in "ef" else array.astype(np.float64)


def _labelled(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = _numbers(labels, "the labels"), _numbers(scores, "the scores")
    if labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1 and as many as the {len(scores)} scores")
    return labels.astype(bool), scores


def _read(maps: Sequence[ArrayLike]) -> Iterator[np.ndarray]:
    """Maps one at a time, as float64."""
    if not isinstance(maps, Sequence | np.ndarray) or not len(maps):
        raise ValueError("maps must be a sequence of at least one, they are read more than once")
    for index, scored in enumerate(maps):
        yield _numbers(scored, f"the map of image {index}", ndim=2).astype(np.float64)
