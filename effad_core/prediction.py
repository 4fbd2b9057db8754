"""From images to verdicts: the last lines of Algorithm 2, for whatever computes the maps."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from effad_core.datasets.images import ImageLike, open_image
from effad_core.datasets.transforms import resize, to_tensor
from effad_core.thresholds import OperatingPoint

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image. Maps are float32, (H, W), at the image's own size.

    Attributes:
        map: the combined anomaly map M, the mean of the two below.
        score: the anomaly score, the maximum of M before it is resized to the image's size.
        st_map: the normalised student-teacher map.
        ae_map: the normalised autoencoder map.
        threshold: the detector's for scores; None if it has none.
        pixel_threshold: the detector's for maps; None if it has none.
    """

    map: np.ndarray
    score: float
    st_map: np.ndarray
    ae_map: np.ndarray
    threshold: float | None = None
    pixel_threshold: float | None = None

    @property
    def is_anomalous(self) -> bool:
        """Whether the score is above the threshold.

        Raises:
            ValueError: if the detector had no threshold: none at all would read as "normal".
        """
        return self.score > _set(self.threshold, "threshold")

    @property
    def anomalous_pixels(self) -> np.ndarray:
        """Where the map is above the pixel threshold: boolean, (H, W).

        Raises:
            ValueError: if the detector had no pixel threshold.
        """
        return self.map > _set(self.pixel_threshold, "pixel_threshold")


def _set(threshold: float | None, name: str) -> float:
    if threshold is None:
        raise ValueError(
            f"the detector has no {name}: find one with effad_core.fit_thresholds, or set "
            f"detector.{name} to a number"
        )
    return threshold


def _by_hand(value: float | None) -> OperatingPoint | None:
    """ValueError for what is no finite number: an `OperatingPoint` has an attribute of its own."""
    if isinstance(value, OperatingPoint):
        raise ValueError("a threshold is a number: set operating_point to an OperatingPoint")
    return None if value is None else OperatingPoint(value, "manual", 0)


def finite_scores(maps: Tensor, names: Sequence[str]) -> Tensor:
    """The maximum of each map (Algorithm 2, line 11), which must be finite.

    A NaN or infinite pixel reaches the maximum of the combined map. It comes from damaged weights,
    or from a half precision that overflows.

    Args:
        maps: combined, student-teacher and autoencoder map, shape (N, 3, H, W).
        names: of the N images, for the sentence.

    Returns:
        shape (N, 3).

    Raises:
        ValueError: naming the first image whose map is not finite.
    """
    scores = maps.flatten(2).amax(dim=2)
    finite = torch.isfinite(scores).all(dim=1).tolist()
    if not all(finite):
        raise ValueError(
            f"the anomaly map of {names[finite.index(False)]} contains NaN or infinite values: "
            "the detector's weights are damaged, or its numbers overflow in half precision "
            '(use "float32" then)'
        )
    return scores


def image_name(image: ImageLike, index: int) -> str:
    """What to call an image in a sentence: its path, or its place."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {index}"


class Predictor(ABC):
    """Base class of everything with `predict`.

    Attributes:
        image_size: (H, W) in pixels, to which images are resized.
        operating_point, pixel_operating_point: the thresholds of scores and of pixels with what is
            known of them, or None.
    """

    image_size: tuple[int, int]
    operating_point: OperatingPoint | None
    pixel_operating_point: OperatingPoint | None

    @property
    def threshold(self) -> float | None:
        """A score above it is anomalous; None if there is none.

        Set a number to choose it by hand: `operating_point` then says so. None takes it away.
        """
        return self.operating_point and self.operating_point.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self.operating_point = _by_hand(value)

    @property
    def pixel_threshold(self) -> float | None:
        """A pixel of a map above it is anomalous; as `threshold`."""
        return self.pixel_operating_point and self.pixel_operating_point.threshold

    @pixel_threshold.setter
    def pixel_threshold(self, value: float | None) -> None:
        self.pixel_operating_point = _by_hand(value)

    @abstractmethod
    def use_device(self, device: str | torch.device | None = None) -> None:
        """Compute there from now on.

        Args:
            device: None takes the GPU where there is one, and stays on one (see `choose_device`).

        Raises:
            ValueError: if this machine does not have it, or the predictor is bound to another.
        """

    @abstractmethod
    def combined_maps(self, images: Tensor, precision: str | None = None) -> Tensor:
        """Combined, student-teacher and autoencoder map, (N, 3, H, W), of uint8 (N, 3, H, W)."""

    def predict(
        self,
        image: ImageLike | Sequence[ImageLike],
        precision: str | None = None,
        batch_size: int = 8,
    ) -> Prediction | list[Prediction]:
        """Anomaly map and score of an image, or of each image of a sequence (Algorithm 2).

        Args:
            image: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a sequence of these;
                an array (N, H, W, 3) is a sequence.
            precision: one of `resolve_precision`'s; None takes the predictor's own, in which its
                thresholds were found.
            batch_size: images that go through the networks at once.

        Returns:
            A `Prediction`, or a list of them in the order of the sequence.

        Raises:
            DataError: for an unreadable file or an array of another type or shape.
            ValueError: if the detector has no quantiles, or the map of an image, which is named, is
                not finite.
        """
        many = isinstance(image, Sequence) and not isinstance(image, str)
        if not many and not (isinstance(image, np.ndarray) and image.ndim == 4):
            return self.predict([image], precision)[0]
        limits = (self.threshold, self.pixel_threshold)
        predictions = []
        for start in range(0, len(image), batch_size):
            part = image[start : start + batch_size]
            opened = [open_image(item) for item in part]
            batch = torch.stack([to_tensor(resize(item, self.image_size)) for item in opened])
            maps = self.combined_maps(batch, precision)
            names = [image_name(image, start + index) for index, image in enumerate(part)]
            scores = finite_scores(maps, names)[:, 0]
            for index, item in enumerate(opened):
                size = (item.height, item.width)
                own = F.interpolate(maps[index : index + 1], size=size, mode="bilinear")[0]
                combined, st_map, ae_map = own.cpu().numpy()
                predictions.append(  # Algorithm 2, line 12
                    Prediction(combined, scores[index].item(), st_map, ae_map, *limits)
                )
        return predictions
