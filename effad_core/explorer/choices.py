"""What can be chosen: operating points of one evaluation, and what is to be said of each."""

from collections.abc import Sequence

from effad_core import thresholds
from effad_core.thresholds import Confusion, OperatingPoint

import numpy as np
from numpy.typing import ArrayLike

CONFIDENT, AVERAGE, PIXELS = "confident", "average", "pixels"
Maps = Sequence[ArrayLike] | None


class Choices:
    """The images that are looked at, and the normal ones that false positive rates come from.

    Args:
        evaluation: has labels, scores["combined"] and maps, which may be None.
        validation: an evaluation, or an array of scores, of normal images that no network was
            trained on; None takes the evaluation's own normal images.

    Attributes:
        labels, scores, maps: of the evaluation, shape (n,), (n,), n of (H, W) or None.
        normal, anomalous: how many of its images are.
        normal_scores, normal_maps: of the images that rates come from; there may be none.
        own: whether these are the evaluation's.
        source: these images in words.

    Raises:
        ValueError: if there are no images, their numbers differ, a label is not 0 or 1, a score or
            a map is not finite, or a validation image is anomalous.
    """

    def __init__(self, evaluation, validation=None):
        self.labels, self.scores, self.maps = _read(evaluation, "evaluation")
        self.anomalous = int(np.sum(self.labels))
        self.normal = len(self.labels) - self.anomalous
        self.own = validation is None
        if self.own:
            chosen = np.flatnonzero(self.labels == 0)
            self.normal_scores = self.scores[chosen]
            self.normal_maps = None if self.maps is None else [self.maps[i] for i in chosen]
            self.source = f"the evaluation's own {counted(len(chosen), 'normal image')}"
        else:
            self.normal_scores, self.normal_maps = _normal(validation)
            self.source = counted(len(self.normal_scores), "validation image")

    @property
    def both(self) -> bool:
        """Whether there are normal and anomalous images: what a choice by labels needs."""
        return bool(self.normal and self.anomalous)

    def first(self) -> tuple[float, OperatingPoint]:
        """Where to begin: a rate of 0.05 on average, or the lowest that the images support.

        With confidence, few images leave no choice but the highest score, and one odd image would
        hide most defects.
        """
        if not len(self.normal_scores):
            return 0.05, self.by_hand(float(self.scores.min()))
        lowest = thresholds.lowest_rate(len(self.normal_scores), guarantee=AVERAGE)
        rate = max(0.05, float(np.ceil(1000 * lowest) / 1000))
        return rate, self.from_normal(rate, AVERAGE)

    def first_of_pixels(self, rate: float) -> OperatingPoint:
        """The same rate for the pixels of whole images."""
        if not len(self.normal_scores):
            return self.by_hand(float(self.scores.min()))
        return self.pixels_from_normal(rate, AVERAGE)

    def from_normal(self, rate: float, guarantee: str) -> OperatingPoint:
        """`threshold_for_fpr` of the normal images; ValueError if they are too few."""
        return thresholds.threshold_for_fpr(self.normal_scores, rate, guarantee=guarantee)

    def pixels_from_normal(self, rate: float, guarantee: str) -> OperatingPoint:
        """The same for pixels.

        Args:
            rate: of images that may show a pixel above the threshold; with PIXELS, of all pixels.
            guarantee: CONFIDENT, AVERAGE or PIXELS.

        Raises:
            ValueError: if the images are too few, or PIXELS has no maps to look at.
        """
        if self.normal_maps is None:
            if guarantee == PIXELS:
                raise ValueError(
                    "a rate of all pixels needs the validation maps: evaluate(..., keep_maps=True)"
                )
            return self.from_normal(rate, guarantee)  # it holds for maps of any size
        if guarantee == PIXELS:
            return thresholds.pixel_threshold_for_fpr(self.normal_maps, rate)
        return thresholds.pixel_threshold(self.normal_maps, rate, guarantee=guarantee)

    def by_hand(self, threshold: float) -> OperatingPoint:
        """A threshold that was chosen while looking at the evaluation's images."""
        return OperatingPoint(threshold, "manual", len(self.labels))

    def confusion(self, threshold: float) -> Confusion:
        return thresholds.confusion(self.labels, self.scores, threshold)

    def sentence(self, point: OperatingPoint, of_pixels: bool = False) -> str:
        """What the point says of itself, and what is to be said of it for these images."""
        said = f"Pixel {point}." if of_pixels else f"Image {point}."
        if point.kind == "manual":
            return said
        if of_pixels and point.kind.startswith("fpr"):
            said += " An image counts as soon as one of its pixels lies above."
        if point.kind.startswith("labels"):
            said += " Optimistic for these images: their labels chose it."
        elif self.own:
            said += f" It was chosen on {self.source}: the rate on them is no check of it."
        return said


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def span(*values: ArrayLike) -> tuple[float, float]:
    """A range a little wider than the values, never empty."""
    together = np.concatenate([np.ravel(v) for v in values])
    low, high = float(together.min()), float(together.max())
    margin = 0.02 * (high - low) or 0.02 * max(1.0, abs(high))
    return low - margin, high + margin


def _read(evaluation, name: str) -> tuple[np.ndarray, np.ndarray, Maps]:
    """Labels, scores and maps, which fit one another."""
    labels, maps = np.asarray(evaluation.labels), evaluation.maps
    scores = np.asarray(evaluation.scores["combined"])
    if not len(labels):
        raise ValueError(f"the {name} has no images: there is no threshold to explore")
    thresholds.confusion(labels, scores, 0.0)  # refuses what does not fit
    if maps is not None and len(maps) != len(labels):
        raise ValueError(f"the {name} has {len(labels)} images but {len(maps)} maps")
    for index, m in enumerate(maps or ()):
        if np.ndim(m) != 2 or not np.isfinite(m).all():
            raise ValueError(f"the map of image {index} of the {name} is no finite (H, W) array")
    return labels, scores, maps


def _normal(validation) -> tuple[np.ndarray, Maps]:
    """Scores and maps of normal images."""
    if not hasattr(validation, "scores"):
        scores = np.asarray(validation)
        if not scores.size:
            raise ValueError("the validation has no images: leave it out, or evaluate some")
        thresholds.confusion(np.zeros(scores.shape), scores, 0.0)  # refuses what are no scores
        return scores, None
    labels, scores, maps = _read(validation, "validation")
    if labels.any():
        raise ValueError(
            f"{int(labels.sum())} of the {len(labels)} validation images are anomalous: a false "
            "positive rate is stated from normal images alone"
        )
    return scores, maps
