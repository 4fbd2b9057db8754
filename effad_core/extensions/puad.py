"""PUAD: an anomaly score that also sees what no single place of an image shows.

Sugawara, Imamura: PUAD: Frustratingly Simple Method for Robust Anomaly Detection, ICIP 2024
(https://arxiv.org/abs/2402.15143). An extension: not in EfficientAD's paper, and nothing here uses
it unless you ask for it.

A screw too many is not unusual where it lies; the image as a whole is. So PUAD takes the mean of
the student's output over the whole image, one number a channel, and measures its Mahalanobis
distance from those of the training images. The anomaly score is this distance plus EfficientAD's
own score, each standardised by its mean and standard deviation over the validation images. Maps
stay EfficientAD's.
"""

import os
from collections.abc import Iterable

from effad_core.acceleration.precision import computing_in
from effad_core.datasets import ResizedImages, Scenario
from effad_core.datasets.transforms import normalise
from effad_core.detector import EfficientAD, points_of, set_points
from effad_core.errors import RunError
from effad_core.prediction import Predictor
from effad_core.statistics import ChannelMoments
from effad_core.storage.files import as_path, one_line
from effad_core.storage.weights import fingerprint, load_weights, read_tensors, write_tensors

import torch
from torch import Tensor, nn

BATCH = 8  # images that go through the student at once
RIDGE = 1e-4  # of the mean variance, added to each: training images may be fewer than channels


class NormalImages(nn.Module):
    """What PUAD knows of normal images.

    Args:
        channels: C, of the features.

    Attributes:
        mean: of the training images' features, shape (C,); NaN, as all here, until it is found.
        whitening: W, shape (C, C): the Mahalanobis distance of features x is the norm of
            W (x - mean).
        standards: mean and standard deviation of the detector's scores, then of the distances, over
            the validation images, shape (4,).
    """

    mean: Tensor
    whitening: Tensor
    standards: Tensor

    def __init__(self, channels: int):
        super().__init__()
        shapes = {"mean": (channels,), "whitening": (channels, channels), "standards": (4,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, torch.nan))

    def distances(self, features: Tensor) -> Tensor:
        """Mahalanobis distances, shape (N,), of features, shape (N, C)."""
        return ((features - self.mean) @ self.whitening.T).norm(dim=1)

    def find_distribution(self, batches: Iterable[Tensor]) -> None:
        """Set mean and whitening from features of training images, each (N, C).

        Raises:
            ValueError: if they do not differ.
        """
        moments = ChannelMoments(covariance=True)
        for features in batches:
            moments.add(features[..., None, None])
        covariance = moments.covariance
        ridge = RIDGE * covariance.diagonal().mean()
        if not ridge > 0:
            raise ValueError("the student's output is the same for all training images")
        covariance = covariance + ridge * torch.eye(len(covariance)).to(covariance)
        self.mean.copy_(moments.mean)
        # covariance = L L^T, so W = L^-1 gives |W d|^2 = d^T covariance^-1 d
        self.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))


class PUAD(Predictor):
    """A trained detector whose anomaly score also counts how unusual the image is as a whole.

    It predicts as the detector does, with the same maps; `Prediction.score` is another, so its
    thresholds are its own. The student sees each image twice, which makes prediction slower.

    Args:
        detector: trained. It stays as it is; call `fit` again after you change it.

    Attributes:
        normal: what it knows of normal images.

    Raises:
        ValueError: if the detector has no quantiles, or has tiles: its student never sees an image
            as a whole then.

    Example:
        >>> from effad_core import PUAD, fit_thresholds
        >>> puad = PUAD(detector).fit(scenario)
        >>> point, _ = fit_thresholds(puad, scenario.validation, 0.5, guarantee="average")
        >>> puad.predict(scenario.test[0].path).threshold == point.threshold
        True
    """

    def __init__(self, detector: EfficientAD):
        detector.check_quantiles()
        if detector.tiles is not None:
            raise ValueError("PUAD needs the whole image at once: train a detector without tiles")
        self.detector = detector
        self.normal = NormalImages(detector.out_channels).to(detector.device)
        self.image_size, self.full_scale = detector.image_size, detector.full_scale
        self.operating_point = self.pixel_operating_point = None

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.detector.use_device(device)
        self.normal.to(self.detector.device)

    def fit(self, scenario: Scenario, device: str | torch.device | None = None) -> "PUAD":
        """Find the distribution of normal images; takes seconds, and trains nothing.

        Thresholds are taken away: they were of another score.

        Args:
            scenario: the detector's own; its training and validation images are used, never its
                test images.
            device: as in `use_device`.

        Returns:
            Itself.

        Raises:
            DataError: for an image that cannot be read.
            ValueError: if there are fewer than two training or validation images, or the images do
                not differ.
        """
        for name, samples in (("training", scenario.train), ("validation", scenario.validation)):
            if len(samples) < 2:
                raise ValueError(f"PUAD needs two {name} images at least, not {len(samples)}")
        self.use_device(device)
        self.operating_point = self.pixel_operating_point = None
        train = ResizedImages(scenario.train, self.image_size)
        self.normal.find_distribution(self.features(images) for images in train.batches(BATCH))
        rows = []
        for images in ResizedImages(scenario.validation, self.image_size).batches(BATCH):
            scores = self.detector.maps_and_scores(images)[1][:, 0]
            rows.append(torch.stack([scores, self.normal.distances(self.features(images))], dim=1))
        deviation, mean = torch.std_mean(torch.cat(rows), dim=0)
        if not (deviation > 0).all():
            raise ValueError("the validation images all have the same score: are they copies?")
        self.normal.standards.copy_(torch.stack([mean, deviation], dim=1).flatten())
        return self

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The student's output, its half that predicts the teacher, averaged over the cells.

        Args:
            images: uint8, shape (N, 3, H, W), at image_size.

        Returns:
            float32, shape (N, C).
        """
        student = self.detector.student
        with computing_in(self.detector.precision, self.detector.device):
            images = normalise(images.to(self.detector.device))
            trunk = student.trunk(images.contiguous(memory_format=torch.channels_last))
            output = student.head(trunk, slice(0, self.detector.out_channels))
        if self.detector.region is None:
            return output.float().mean(dim=(2, 3))
        inside = self.detector.region.cells(images.shape[2:], self.detector.padding)
        return output.float()[..., torch.from_numpy(inside)].mean(dim=2)

    def combined_maps(self, images: Tensor) -> Tensor:
        """The detector's maps."""
        return self.detector.combined_maps(images)

    def maps_and_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The detector's maps, and scores whose first column is PUAD's.

        Raises:
            ValueError: before `fit`.
        """
        self._check_fitted()
        maps, scores = self.detector.maps_and_scores(images)
        found = torch.stack([scores[:, 0], self.normal.distances(self.features(images))], dim=1)
        mean, deviation = self.normal.standards.view(2, 2).unbind(dim=1)
        both = ((found - mean) / deviation).sum(dim=1, keepdim=True)
        return maps, torch.cat([both, scores[:, 1:]], dim=1)

    def save(self, path: str | os.PathLike) -> None:
        """Write what `load` needs beside the detector's own file: statistics and thresholds.

        Raises:
            ValueError: before `fit`.
            RunError: if it cannot be written.
        """
        self._check_fitted()
        header = {"kind": "PUAD", "detector": self._detector_fingerprint()}
        header["operating_points"] = points_of(self)
        write_tensors(as_path(path), self.normal.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike, detector: EfficientAD) -> "PUAD":
        """Load what `save` wrote.

        Args:
            path: the file.
            detector: the one that it was fitted to.

        Raises:
            RunError: if the file is missing, damaged, or was fitted to another detector, or to this
                one in another precision.
            ValueError: if the detector has no quantiles.
        """
        path, loaded = as_path(path), cls(detector)
        tensors, header = read_tensors(path, "PUAD", detector=str, operating_points=dict)
        if header["detector"] != loaded._detector_fingerprint():
            raise RunError(
                f"{path} was fitted to another detector, or in another precision: give that one, "
                "or call PUAD(detector).fit(scenario)"
            )
        load_weights(loaded.normal, tensors, path)
        try:
            set_points(loaded, header["operating_points"])
        except ValueError as error:
            raise RunError(f"{path} has a damaged header: {one_line(error)}") from None
        return loaded

    def _check_fitted(self) -> None:
        if self.normal.standards.isnan().any():
            raise ValueError("PUAD knows no normal images yet: call fit(scenario) first")

    def _detector_fingerprint(self) -> str:
        return f"{fingerprint(self.detector.state_dict())} in {self.detector.precision}"
