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
from effad_core.networks import STRIDE
from effad_core.region import Region
from effad_core.thresholds import OperatingPoint
from effad_core.tiles import Tiles

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAPS = ("combined", "student-teacher", "autoencoder")
BATCH_PIXELS = 2**24  # a batch is full with these, however few images they are
UNKNOWN = (math.nan, math.nan)  # the scores of the two maps that a predictor does not have


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image.

    `map`, `st_map` and `ae_map` are resized to the image when you ask for them, and not kept: a
    list of predictions of large images stays small.

    Attributes:
        maps: as the detector computed them, float32, shape (maps, h, w): the combined map, then,
            if it has them, the student-teacher and the autoencoder map.
        score: the anomaly score, the maximum of the combined map M before it is resized to the
            image's size.
        size: (height, width) of the image.
        threshold: the detector's for scores; None if it has none.
        pixel_threshold: the detector's for maps; None if it has none.
        st_score, ae_score: the maxima of the two other maps before they are resized; NaN if they
            are unknown.
        covered: (height, width) of the resized image whose map was put together from tiles, of one
            cell for four pixels; None without tiles.
    """

    maps: np.ndarray
    score: float
    size: tuple[int, int]
    threshold: float | None = None
    pixel_threshold: float | None = None
    st_score: float = math.nan
    ae_score: float = math.nan
    covered: tuple[int, int] | None = None

    @property
    def map(self) -> np.ndarray:
        """The combined anomaly map M, float32, (H, W), at the image's own size."""
        return self.map_at(self.size)

    @property
    def st_map(self) -> np.ndarray:
        """The normalised student-teacher map; NaN everywhere if the predictor has one map."""
        return self.map_at(self.size, 1)

    @property
    def ae_map(self) -> np.ndarray:
        """The normalised autoencoder map; NaN everywhere if the predictor has one map."""
        return self.map_at(self.size, 2)

    def map_at(self, size: tuple[int, int], index: int = 0) -> np.ndarray:
        """One of the maps at another size (Algorithm 2, line 12).

        Args:
            size: (height, width) in pixels.
            index: 0 combined, 1 student-teacher, 2 autoencoder.

        Returns:
            float32, of that shape, resized with bilinear interpolation.
        """
        if index >= len(self.maps):
            return np.broadcast_to(np.float32(np.nan), size)
        m = torch.from_numpy(self.maps[index])[None, None]
        if self.covered is not None:
            m = F.interpolate(m, scale_factor=STRIDE, mode="bilinear")
            m = m[..., : self.covered[0], : self.covered[1]]
        if m.shape[2:] != torch.Size(size):
            m = F.interpolate(m, size=size, mode="bilinear")
        return m[0, 0].contiguous().numpy()

    @property
    def is_anomalous(self) -> bool:
        """Whether the score is above the threshold.

        Raises:
            ValueError: if the detector had no threshold: none at all would read as "normal".
        """
        return self.score > _set(self.threshold, "threshold")

    @property
    def unit_score(self) -> float:
        """The score between 0 and 1, for tools that need one: 0.5 is the threshold.

        0.5 + 0.5 x / (1 + abs(x)), where x is the score's distance from the threshold in units of
        q_b - q_a, which is 0.1 on the normalised maps. A higher score has a higher unit score. It
        is no probability.

        Raises:
            ValueError: as `is_anomalous`.
        """
        x = (self.score - _set(self.threshold, "threshold")) / 0.1
        return 0.5 + 0.5 * x / (1 + abs(x))

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
        tiles: how it cuts large images; None resizes the whole image. With tiles it has `padding`,
            that of its networks, and `combined_cells`.
        region: the part of the image that counts; None inspects all of it.
    """

    map_names: tuple[str, ...] = MAPS
    image_size: tuple[int, int]
    full_scale: int | None = None
    tiles: Tiles | None = None
    region: Region | None = None
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
        return self.inspected(self.combined_maps(images))

    def inspected(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps that are nowhere higher outside the region than inside, and their maxima.

        Args:
            maps: shape (N, maps, h, w), of whole images.

        Returns:
            The maps, outside the region with their lowest value inside; the maxima, (N, maps).
        """
        if self.region is not None:
            inside = torch.from_numpy(self.region.at(maps.shape[2:])).to(maps.device)
            lowest = maps[..., inside].amin(dim=2)
            maps = torch.where(inside, maps, lowest[..., None, None])
        return maps, maps.flatten(2).amax(dim=2)

    @overload
    def predict(self, image: ImageLike, batch_size: int = ...) -> Prediction: ...

    @overload
    def predict(self, image: Sequence[ImageLike], batch_size: int = ...) -> list[Prediction]: ...

    def predict(self, image, batch_size=8):
        """Anomaly map and score of an image, or of each image of a sequence (Algorithm 2).

        Args:
            image: a path, a PIL image, an array, or a sequence of these. An array is uint8 or
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
                if self.tiles is not None:
                    self.tiles.check_image(opened.size, image_name(item, index))
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
            maps, found, covered = self._maps_of_batch(readable)
            check_finite(found, [name for name, _ in readable])
            scores = found.tolist()
        rows = iter(range(len(readable)))
        limits = (self.threshold, self.pixel_threshold)
        for _, image in batch:
            if not isinstance(image, Image.Image):
                yield image, None
                continue
            row = next(rows)
            score, *part_scores = scores[row] if len(scores[row]) == 3 else (*scores[row], *UNKNOWN)
            own = (image.height, image.width)
            parts = (*limits, *part_scores, covered[row])
            yield image, Prediction(maps[row], score, own, *parts)

    def _maps_of_batch(
        self, batch: Sequence[tuple[str, Image.Image]]
    ) -> tuple[list[np.ndarray], Tensor, list[tuple[int, int] | None]]:
        """Maps, each (maps, h, w); scores, (N, maps); and `Prediction.covered` of each image."""
        if self.tiles is None:
            pixels = [to_tensor(resize(image, self.image_size)) for _, image in batch]
            maps, scores = self.maps_and_scores(torch.stack(pixels))
            return list(maps.cpu().numpy()), scores, [None] * len(batch)
        stitched = [
            self.tiles.stitched(image, self.image_size, self.padding, self.combined_cells, name)
            for name, image in batch
        ]
        found = [self.inspected(maps[None]) for maps, _ in stitched]
        scores = torch.cat([scores for _, scores in found])
        return [maps[0].numpy() for maps, _ in found], scores, [shown for _, shown in stitched]
