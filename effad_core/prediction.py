"""From images to verdicts: the last lines of Algorithm 2, for whatever computes the maps."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from effad_core.datasets.images import ImageLike, open_image
from effad_core.datasets.transforms import resize, to_tensor
from effad_core.errors import DataError
from effad_core.thresholds import OperatingPoint

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAPS = ("combined", "student-teacher", "autoencoder")
BATCH_PIXELS = 2**24  # a batch is full with these, however few images they are


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image. Maps are float32, (H, W), at the image's own size.

    Attributes:
        map: the combined anomaly map M, the mean of the two below.
        score: the anomaly score, the maximum of M before it is resized to the image's size.
        st_map: the normalised student-teacher map; NaN everywhere if the predictor has one map.
        ae_map: the normalised autoencoder map; the same.
        threshold: the detector's for scores; None if it has none.
        pixel_threshold: the detector's for maps; None if it has none.
        st_score, ae_score: the maxima of the two other maps before they are resized; NaN if they
            are unknown.
    """

    map: np.ndarray
    score: float
    st_map: np.ndarray
    ae_map: np.ndarray
    threshold: float | None = None
    pixel_threshold: float | None = None
    st_score: float = math.nan
    ae_score: float = math.nan

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


def check_finite(scores: Tensor, names: Sequence[str]) -> None:
    """Refuse scores that are not finite.

    A NaN or infinite pixel reaches the maximum of the combined map. It comes from damaged weights,
    or from a half precision that overflows.

    Args:
        scores: shape (N, maps).
        names: of the N images, for the error message.

    Raises:
        ValueError: naming the first image whose score is not finite.
    """
    finite = torch.isfinite(scores).all(dim=1).tolist()
    if not all(finite):
        raise ValueError(
            f"the anomaly map of {names[finite.index(False)]} contains NaN or infinite values: "
            "the detector's weights are damaged, or its numbers overflow in half precision "
            '(use "float32" then)'
        )


def image_name(image: ImageLike, index: int) -> str:
    """What to call an image in an error message: its path, or its place."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {index}"


class Predictor(ABC):
    """Base class of everything with `predict`.

    Attributes:
        map_names: of the maps that it computes: the combined one, or all three.
        image_size: (H, W) in pixels, to which images are resized.
        operating_point, pixel_operating_point: the thresholds of scores and of pixels with what is
            known of them, or None.
        full_scale: the white of 16-bit images, found on those trained on; None if they had 8 bits:
            then an image's own file says, or 65535 is white (see `datasets.depth`).
    """

    map_names: tuple[str, ...] = MAPS
    image_size: tuple[int, int]
    full_scale: int | None = None
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
    def combined_maps(self, images: Tensor) -> Tensor:
        """The maps of `map_names`, (N, maps, H, W), of uint8 images (N, 3, H, W)."""

    def maps_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `combined_maps`, and the maximum of each map, shape (N, maps): Algorithm 2, line 11.

        The first column is the anomaly score.
        """
        maps = self.combined_maps(images)
        return maps, maps.flatten(2).amax(dim=2)

    @overload
    def predict(self, image: ImageLike, batch_size: int = ...) -> Prediction: ...

    @overload
    def predict(self, image: Sequence[ImageLike], batch_size: int = ...) -> list[Prediction]: ...

    def predict(self, image, batch_size=8):
        """Anomaly map and score of an image, or of each image of a sequence (Algorithm 2).

        Args:
            image: a path, a PIL image, a an array, or a sequence of these. An array is uint8 or
                uint16, of shape (H, W), (H, W, 1), (H, W, 3) in the order RGB (OpenCV's order is
                BGR: give array[..., ::-1]) or (H, W, 4) in the order RGBA; with one dimension
                more, (N, ...), it is a sequence.
            batch_size: images that go through the networks at once.

        Returns:
            A `Prediction`, or a list of them in the order of the sequence. For very many images,
            `stream` keeps only a batch in memory.

        Raises:
            DataError: for an unreadable file or an array of another type or shape.
            ValueError: if the detector has no quantiles, or the map of an image, which is named, is
                not finite.

        Example:
            >>> prediction = detector.predict(scenario.test[0].path)
            >>> prediction.map.shape, type(prediction.score)
            ((480, 480), <class 'float'>)
        """
        many = isinstance(image, Sequence) and not isinstance(image, str)
        many = many or (isinstance(image, np.ndarray) and image.ndim == 4)
        found = [one for _, one in self.stream(image if many else [image], batch_size)]
        return found if many else found[0]

    def stream(
        self, images: Iterable[ImageLike], batch_size: int = 8, keep_going: bool = False
    ) -> Iterator[tuple[Image.Image, Prediction] | tuple[Exception, None]]:
        """The predictions of images, one batch of them in memory at a time.

        Args:
            images: as in `predict`.
            batch_size: images that go through the networks at once, fewer if they are large.
            keep_going: whether an image that cannot be read is passed over.

        Yields:
            Each image, RGB, with its prediction; one that cannot be read, if `keep_going`, as its
            error and None.

        Raises:
            DataError, ValueError: as `predict`.
        """
        batch, pixels = [], 0  # of (name, image or error)
        for index, item in enumerate(images):
            try:
                opened = open_image(item, self.full_scale)
                pixels += opened.width * opened.height
            except (DataError, OSError) as error:
                if not keep_going:
                    raise
                opened = error
            batch.append((image_name(item, index), opened))
            if len(batch) == batch_size or pixels >= BATCH_PIXELS:
                yield from self._predict_batch(batch)
                batch, pixels = [], 0
        yield from self._predict_batch(batch)

    def _predict_batch(
        self, batch: Sequence[tuple[str, Image.Image | Exception]]
    ) -> Iterator[tuple[Image.Image, Prediction] | tuple[Exception, None]]:
        readable = [(name, image) for name, image in batch if isinstance(image, Image.Image)]
        if readable:
            pixels = [to_tensor(resize(image, self.image_size)) for _, image in readable]
            maps, found = self.maps_and_scores(torch.stack(pixels))
            check_finite(found, [name for name, _ in readable])
            scores = found.tolist()
        rows = iter(range(len(readable)))
        for _, image in batch:
            if not isinstance(image, Image.Image):
                yield image, None
                continue
            row = next(rows)
            own = F.interpolate(  # Algorithm 2, line 12
                maps[row : row + 1], size=(image.height, image.width), mode="bilinear"
            )
            combined, *parts = own[0].cpu().numpy()
            score, *part_scores = scores[row]
            if not parts:
                parts = [np.broadcast_to(np.float32(np.nan), combined.shape)] * 2
            limits = (self.threshold, self.pixel_threshold)
            yield image, Prediction(combined, score, *parts, *limits, *part_scores)
