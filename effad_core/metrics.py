"""Detection metrics: numpy in, floats out. Knows no network.

All of them look at the same sweep: a threshold falls through the scores, finds defects and raises
false alarms. Every distinct score is a threshold, and equal scores are one point of a curve.

* AU-ROC and AU-PRC of images and of pixels.
* AU-PRO: the mean share found of each connected region, over the false positive rate (Bergmann
  et al., "The MVTec Anomaly Detection Dataset", IJCV 2021).
* AU-sPRO: the same per annotated defect, whose share is full once its saturation area is found
  (Bergmann et al., "Beyond Dents and Scratches", MVTec LOCO AD, IJCV 2022).

Areas up to a limit of the false positive rate are divided by that limit: a perfect map has 1, a
constant one limit / 2. They are what Batzner et al., "EfficientAD", report in Tables 5-10, with
AU-sPRO for MVTec LOCO in the tables of AU-PRO.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of image anomaly scores (the paper's image-level metric).

    The probability that an anomalous image scores higher than a normal one; ties count half.

    Args:
        labels: shape (n,), 0 normal, 1 anomalous.
        scores: shape (n,), higher is more anomalous.

    Raises:
        ValueError: if the shapes differ, only one class is present, or a score is not finite.

    Example:
        >>> image_auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    sweep = _image_sweep(labels, scores)
    return _area(sweep, sweep.recall, 1.0)


def image_auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision of image anomaly scores: the step-wise area under precision-recall.

    Args, raises: as `image_auroc`.

    Example:
        >>> round(image_auprc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
        0.8333
    """
    return _average_precision(_image_sweep(labels, scores))


def aupro(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike | None], fpr_limit: float = 0.3
) -> float:
    """Area under the PRO curve up to a false positive rate, divided by that limit (MVTec AD).

    PRO is the mean over regions of the share of a region's pixels at or above the threshold. A
    region is an 8-connected component of one image's mask; small and large weigh the same. The
    curve is exact: it is linear between neighbouring thresholds and at the limit.

    Args:
        maps: one anomaly map per image, shape (H, W), higher is more anomalous. Shapes may differ
            from image to image. Any real dtype: scores are compared as they are, never rounded.
        masks: one mask per image, of its map's shape, non-zero where the defect is. None, and a
            mask of zeros, is a good image.
        fpr_limit: in (0, 1]; the false positive rate is over all defect-free pixels together.

    Raises:
        ValueError: if numbers, shapes or dtypes do not fit, a value is not finite, or there is no
            defect pixel or no defect-free one. The message names the image.
    """
    limit = _checked_limit(fpr_limit)
    sweep = _region_sweep(maps, masks)
    return _area(sweep, sweep.found, limit)


def pixel_auroc(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike | None], fpr_limit: float = 1.0
) -> float:
    """Area under the pixels' ROC curve up to a false positive rate, divided by that limit.

    Not rescaled any further (no McClish correction): a constant map has fpr_limit / 2.

    Args, raises: as `aupro`.
    """
    limit = _checked_limit(fpr_limit)
    sweep = _region_sweep(maps, masks)
    return _area(sweep, sweep.recall, limit)


def pixel_auprc(maps: Sequence[ArrayLike], masks: Sequence[ArrayLike | None]) -> float:
    """Average precision of all pixels together: the step-wise area under precision-recall.

    Args, raises: as `aupro`.
    """
    return _average_precision(_region_sweep(maps, masks))


def pixel_metrics(
    maps: Sequence[ArrayLike],
    masks: Sequence[ArrayLike | None],
    fpr_limits: Iterable[float] = (0.05, 0.3, 1.0),
) -> dict[str, float]:
    """`aupro` and `pixel_auroc` at each limit, and `pixel_auprc`, from one sort of the scores.

    Args:
        maps, masks: as in `aupro`.
        fpr_limits: each in (0, 1].

    Returns:
        `aupro_<limit>` for each limit, then `pixel_auroc_<limit>` for each, then `pixel_auprc`.
        A limit is written as `f"{limit:g}"`: `aupro_0.05`, `aupro_0.3`, `aupro_1`.

    Raises:
        ValueError: as `aupro`, and if two limits are written alike.
    """
    limits = _checked_limits(fpr_limits)
    sweep = _region_sweep(maps, masks)
    shares = {"aupro": sweep.found, "pixel_auroc": sweep.recall}
    areas = {
        f"{name}_{limit:g}": _area(sweep, share, limit)
        for name, share in shares.items()
        for limit in limits
    }
    return areas | {"pixel_auprc": _average_precision(sweep)}


def auspro(maps: Sequence[ArrayLike], defects: Sequence, fpr_limit: float = 0.05) -> float:
    """Area under the sPRO curve up to a false positive rate, divided by that limit (MVTec LOCO).

    sPRO is the mean over defects of min(TP / s, 1): TP pixels of the defect are at or above the
    threshold, and its saturation area s is what has to be found of it.

    Args:
        maps: as in `aupro`.
        defects: per image a list of (mask, s), one for each annotated defect: a mask as in
            `aupro`, here never split into components, and s in pixels, above 0 and at most the
            mask's area. Defects may overlap. None, and an empty list, is a good image.
        fpr_limit: in (0, 1]; the false positive rate is over the pixels outside every defect.

    Raises:
        ValueError: as `aupro`, and for a defect without pixels or with an s out of its range. The
            message names image and defect.
    """
    limit = _checked_limit(fpr_limit)
    sweep = _defect_sweep(maps, defects)
    return _area(sweep, sweep.found, limit)


def defect_metrics(
    maps: Sequence[ArrayLike], defects: Sequence, fpr_limits: Iterable[float] = (0.05, 0.3)
) -> dict[str, float]:
    """`auspro` at each limit, from one sort of the scores.

    Args:
        maps, defects: as in `auspro`.
        fpr_limits: each in (0, 1].

    Returns:
        `auspro_<limit>` for each limit, written as in `pixel_metrics`.

    Raises:
        ValueError: as `auspro`, and if two limits are written alike.
    """
    limits = _checked_limits(fpr_limits)
    sweep = _defect_sweep(maps, defects)
    return {f"auspro_{limit:g}": _area(sweep, sweep.found, limit) for limit in limits}


def pro_curve(
    maps: Sequence[ArrayLike], masks: Sequence[ArrayLike | None]
) -> tuple[np.ndarray, np.ndarray]:
    """The exact PRO curve, whose area is `aupro`.

    Args, raises: as `aupro`.

    Returns:
        False positive rate and PRO at the curve's corners, float64, both of shape (n,), from
        (0, 0) to (1, 1); straight lines between the corners are the curve.
    """
    return _corners(_region_sweep(maps, masks))


def spro_curve(maps: Sequence[ArrayLike], defects: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The exact sPRO curve, whose area is `auspro`.

    Args, raises: as `auspro`. Returns: as `pro_curve`.
    """
    return _corners(_defect_sweep(maps, defects))


@dataclass(frozen=True)
class _Sweep:
    """A threshold that falls through the k distinct scores of defect pixels.

    Between two of them only false alarms grow, so a curve is level there, and the many scores of
    defect-free pixels need sorting but no points of their own. At such a score the false alarms
    of the same score come with it, so the curve rises from just above the score to the score.

    Attributes:
        false_alarms: defect-free pixels at or above each score, shape (k,).
        hits: defect pixels at or above each score, shape (k,).
        found: the same as a share of the defect pixels' weight, shape (k,).
        fpr: false positive rate of a curve's points, shape (2k + 2,): 0, above the first score,
            at it, above the second, at it, ..., 1.
    """

    false_alarms: np.ndarray
    hits: np.ndarray
    found: np.ndarray
    fpr: np.ndarray

    @classmethod
    def over(cls, good: np.ndarray, defect: np.ndarray, weights: np.ndarray) -> "_Sweep":
        """Of the scores of defect-free pixels, sorted in place, and of weighted defect pixels."""
        good.sort()
        order = np.argsort(defect)[::-1]
        defect, found = defect[order], np.cumsum(weights[order])
        last_of_tie = np.append(defect[1:] != defect[:-1], True)
        distinct, found = defect[last_of_tie], found[last_of_tie]
        del order, defect  # as large as all defect pixels; the curve below needs the room
        above = len(good) - np.searchsorted(good, distinct, side="right")
        at = len(good) - np.searchsorted(good, distinct, side="left")
        fpr = np.zeros(2 * len(distinct) + 2)
        fpr[1:-1:2], fpr[2:-1:2], fpr[-1] = above, at, len(good)
        fpr /= len(good)
        found /= found[-1]
        return cls(false_alarms=at, hits=np.flatnonzero(last_of_tie) + 1, found=found, fpr=fpr)

    @property
    def recall(self) -> np.ndarray:
        """Share of the defect pixels at or above each score, shape (k,)."""
        return self.hits / self.hits[-1]

    def curve(self, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of a curve; above a score its share is still the previous score's."""
        return self.fpr, np.repeat(np.append(0.0, share), 2)


def _area(sweep: _Sweep, share: np.ndarray, limit: float) -> float:
    """Trapezoids up to the limit, where the curve is interpolated, divided by the limit."""
    fpr, values = sweep.curve(share)
    last = np.searchsorted(fpr, limit, side="right") - 1  # the last point within the limit
    at_limit = np.interp(limit, fpr[last : last + 2], values[last : last + 2])
    doubled = (limit - fpr[last]) * (at_limit + values[last])
    for start in range(0, last, 2**20):  # in blocks: few temporary values at a time
        x, y = (a[start : min(start + 2**20, last) + 1] for a in (fpr, values))
        doubled += np.sum(np.diff(x) * (y[1:] + y[:-1]))
    return float(doubled / 2 / limit)


def _average_precision(sweep: _Sweep) -> float:
    precision = sweep.hits / (sweep.hits + sweep.false_alarms)
    return float(np.sum(np.diff(sweep.hits, prepend=0) * precision) / sweep.hits[-1])


def _corners(sweep: _Sweep) -> tuple[np.ndarray, np.ndarray]:
    """The curve without repeated points and without points inside a level or vertical line."""
    fpr, values = sweep.curve(sweep.found)
    moves = np.append(True, (np.diff(fpr) != 0) | (np.diff(values) != 0))
    fpr, values = fpr[moves], values[moves]
    keep = np.full(len(fpr), True)
    for still in (np.diff(fpr) == 0, np.diff(values) == 0):
        keep[1:-1] &= ~(still[1:] & still[:-1])
    return fpr[keep], values[keep]


def _image_sweep(labels: ArrayLike, scores: ArrayLike) -> _Sweep:
    labels, scores = np.asarray(labels), checked_numbers(scores, "the scores")
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be of one length")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous)")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise ValueError("both normal and anomalous images are needed, the labels have one class")
    return _Sweep.over(scores[~labels], scores[labels], np.ones(labels.sum()))


def _region_sweep(maps: Sequence[ArrayLike], masks: Sequence[ArrayLike | None]) -> _Sweep:
    """Each region weighs 1, shared equally by its pixels."""
    maps, masks = _checked_maps(maps, masks, "masks")
    scores, weights = [], []
    for i, (scored, mask) in enumerate(zip(maps, masks, strict=True)):
        masks[i] = mask = _checked_mask(mask, scored, f"the mask of image {i}")
        if mask is not None:
            regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
            region = regions[mask]
            scores.append(scored[mask])
            weights.append(1 / np.bincount(region)[region])
    return _pooled_sweep(maps, masks, scores, weights)


def _defect_sweep(maps: Sequence[ArrayLike], defects: Sequence) -> _Sweep:
    """Each defect weighs 1, shared by its s highest pixels: no other adds to min(TP / s, 1)."""
    maps, defects = _checked_maps(maps, defects, "lists of defects")
    unions, scores, weights = [], [], []
    for i, (scored, pairs) in enumerate(zip(maps, defects, strict=True)):
        union = None
        for j, pair in enumerate(() if pairs is None else pairs):
            name = f"defect {j} of image {i}"
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"{name} must be a pair of a mask and a saturation area")
            mask = _checked_mask(pair[0], scored, f"the mask of {name}")
            if mask is None:
                raise ValueError(f"the mask of {name} marks no pixel")
            area, s = int(mask.sum()), pair[1]
            if not (isinstance(s, Real) and 0 < s <= area):
                raise ValueError(
                    f"the saturation area of {name} must be above 0 and at most the defect's own "
                    f"{area} pixels, not {s!r}"
                )
            count = math.ceil(s)
            scores.append(np.sort(scored[mask])[::-1][:count])
            weights.append(np.clip(float(s) - np.arange(count), 0, 1) / float(s))
            union = mask if union is None else union | mask
        unions.append(union)
    return _pooled_sweep(maps, unions, scores, weights)


def _pooled_sweep(
    maps: list[np.ndarray],
    masks: list[np.ndarray | None],
    scores: list[np.ndarray],
    weights: list[np.ndarray],
) -> _Sweep:
    """All images together, in the one dtype that holds every map's scores.

    Args:
        maps, masks: shape (H, W) each; the pixels outside the mask are defect-free.
        scores, weights: of defect pixels, shape (n_i,) each.
    """
    if not scores:
        raise ValueError("no mask marks a defect pixel, so there is nothing to find")
    free = [
        m.size if mask is None else m.size - mask.sum() for m, mask in zip(maps, masks, strict=True)
    ]
    if not sum(free):
        raise ValueError("the masks leave no defect-free pixel, so no false positive rate exists")
    dtype = np.result_type(*{scored.dtype for scored in maps})
    good = np.empty(sum(free), dtype)
    ends = np.cumsum(free)
    for scored, mask, part in zip(maps, masks, np.split(good, ends[:-1]), strict=True):
        part[:] = scored.ravel() if mask is None else scored[~mask]
    return _Sweep.over(good, np.concatenate(scores, dtype=dtype), np.concatenate(weights))


def _checked_limit(limit: float) -> float:
    if not (isinstance(limit, Real) and 0 < limit <= 1):
        raise ValueError(f"a limit of the false positive rate must be in (0, 1], not {limit!r}")
    return float(limit)


def _checked_limits(limits: Iterable[float]) -> list[float]:
    """As floats that no two names of metrics share."""
    limits = [_checked_limit(limit) for limit in limits]
    if len({f"{limit:g}" for limit in limits}) != len(limits):
        raise ValueError(f"the limits {limits} must differ in their first six digits")
    return limits


def checked_numbers(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, it contains NaN or infinite values")
    return array


def _checked_maps(
    maps: Sequence[ArrayLike], truths: Sequence, what: str
) -> tuple[list[np.ndarray], list]:
    """Maps as arrays, and as many ground truths."""
    maps, truths = list(maps), list(truths)
    if not maps or len(maps) != len(truths):
        raise ValueError(f"one map per image is needed: {len(maps)} maps, {len(truths)} {what}")
    maps = [checked_numbers(scored, f"the map of image {i}") for i, scored in enumerate(maps)]
    dtype = np.result_type(*{scored.dtype for scored in maps})
    for i, scored in enumerate(maps):
        if scored.ndim != 2 or not scored.size:
            raise ValueError(f"the map of image {i} must be (H, W) with pixels, not {scored.shape}")
        if dtype.kind == "f" and scored.dtype.kind in "iu":
            largest = max(-int(scored.min()), int(scored.max()))
            if largest > 2 ** (np.finfo(dtype).nmant + 1):
                raise ValueError(
                    f"the map of image {i} has integers beyond what {dtype}, the dtype it shares "
                    "with the other maps, holds exactly"
                )
    return maps, truths


def _checked_mask(mask: ArrayLike | None, scored: np.ndarray, name: str) -> np.ndarray | None:
    """The mask as booleans, or None where it marks nothing."""
    if mask is None:
        return None
    mask = checked_numbers(mask, name)
    if mask.shape != scored.shape:
        raise ValueError(f"{name} has shape {mask.shape}, its map has {scored.shape}")
    mask = mask != 0
    return mask if mask.any() else None
