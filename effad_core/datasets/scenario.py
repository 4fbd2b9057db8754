"""Scenario: the train, validation and test samples of one category, whatever dataset they are from.

Every dataset becomes a `Scenario` once; nothing that trains or evaluates asks where it came from.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from effad_core.errors import DataError, printable

import numpy as np
from PIL import Image

from .full_scale import FullScale, KnownScale
from .images import read_image, read_mask, read_mask_values

GOOD = "good"
T = TypeVar("T")


@dataclass(frozen=True)
class DefectKind:
    """A kind of defect, and how much of it has to be found before more counts for nothing.

    A missing screw is found as soon as a screw's worth of the empty area is marked. MVTec LOCO
    says so for each kind, in its `defects_config.json`; the saturated PRO is built on it.

    Attributes:
        name: for example "missing_top_label".
        pixel_value: value of its pixels in the ground-truth masks, 1..255.
        saturation_threshold: a share of the defect's area in (0, 1], or a number of pixels.
        relative: whether it is a share.
    """

    name: str
    pixel_value: int
    saturation_threshold: float
    relative: bool

    def saturation_area(self, defect_area: int) -> float:
        """Pixels to find of a defect of this kind until it counts as found.

        A relative area is rounded down to whole pixels (at least one), as in MVTec's evaluation.
        """
        if self.relative:
            return float(max(1, int(self.saturation_threshold * defect_area)))
        return float(min(self.saturation_threshold, defect_area))


@dataclass(frozen=True)
class Sample:
    """One image of a scenario.

    Attributes:
        path: the image file.
        label: 0 normal, 1 anomalous.
        anomaly_type: "good" for normal images, else the kind of anomaly.
        mask_paths: ground-truth masks; their union is the anomalous region.
        defect_kinds: all kinds of defects of the scenario, where it says (MVTec LOCO): then each
            mask is one defect, and the value of its pixels says of which kind.
        full_scale: the scenario's white of 16-bit images; None for a sample without scenario.
    """

    path: Path
    label: int
    anomaly_type: str
    mask_paths: tuple[Path, ...] = ()
    defect_kinds: tuple[DefectKind, ...] = ()
    full_scale: FullScale | KnownScale | None = field(default=None, compare=False, repr=False)

    def load(self) -> Image.Image:
        """Read the image as 8-bit RGB (see `read_image`)."""
        return read_image(self.path, self.full_scale and self.full_scale.value)

    def load_mask(self) -> np.ndarray | None:
        """Read the ground truth.

        Returns:
            Boolean array of shape (H, W), the union of the masks, at the image's own size; None
            for a normal image or when there is no ground truth.

        Raises:
            DataError: if a mask cannot be read or has another size than the image.
        """
        if self.label == 0 or not self.mask_paths:
            return None
        size = self.load().size
        return np.logical_or.reduce([read_mask(path, size) for path in self.mask_paths])

    def load_defects(self, size: tuple[int, int] | None = None) -> list[tuple[np.ndarray, float]]:
        """Read the ground truth defect by defect, as the saturated PRO needs it.

        Args:
            size: (width, height) of the image, for a caller that knows it; None reads the image.

        Returns:
            For each mask file a boolean array of shape (H, W) and its saturation area in pixels:
            without `defect_kinds` the mask's own area, which makes the saturated PRO the PRO
            (over files, not over connected components). An empty list for a normal image.

        Raises:
            DataError: as `load_mask`; if an anomalous image has no mask; if a mask is black, or
                its pixels do not have one value that `defect_kinds` knows.
        """
        if self.label == 0:
            return []
        if not self.mask_paths:
            raise DataError(
                f"{self.path} is anomalous but has no mask: add masks to ground_truth, or leave "
                "pixel metrics out."
            )
        size = size or self.load().size
        defects = []
        for path in self.mask_paths:
            mask, values = read_mask_values(path, size)
            kind, area = self._kind(path, values), int(mask.sum())
            defects.append((mask, kind.saturation_area(area) if kind else float(area)))
        return defects

    def defect_names(self) -> tuple[str, ...]:
        """The kind of defect of each mask file, "" where the scenario does not say.

        Raises:
            DataError: as `load_defects`, for the masks.
        """
        if self.label == 0 or not self.defect_kinds:
            return ("",) * len(self.mask_paths) if self.label else ()
        kinds = (self._kind(path, read_mask_values(path)[1]) for path in self.mask_paths)
        return tuple(kind.name for kind in kinds)

    def _kind(self, path: Path, values: tuple[float, ...]) -> DefectKind | None:
        """The kind of defect that a mask with these values shows; None without `defect_kinds`."""
        if not values:
            alone = len(self.mask_paths) == 1  # an anomalous image may not lose its only mask
            what = f"both it and its image {self.path}" if alone else "it"
            raise DataError(
                f"The mask {path} is all black: mark the defect in it, or remove {what}."
            )
        if not self.defect_kinds:
            return None
        if len(values) > 1:
            raise DataError(
                f"The mask {path} holds the values {', '.join(map(str, values))}: save one mask "
                "for each defect, with a single value beside 0."
            )
        kinds = {kind.pixel_value: kind for kind in self.defect_kinds}
        if values[0] not in kinds:
            raise DataError(
                f"The mask {path} has the value {values[0]}, which defects_config.json does not "
                f"list: use one of {', '.join(map(str, sorted(kinds)))}, or add it there."
            )
        return kinds[values[0]]


@dataclass(frozen=True)
class Scenario:
    """One category, the paper's word for it: its three splits, where they are from, the licence.

    Attributes:
        name: short name, for titles and file names.
        train: normal images that the networks are trained on.
        validation: normal images, not trained on, for the quantiles of the map normalisation.
        test: normal and anomalous images, used for nothing but the evaluation; may be empty.
        source: where the images come from.
        licence: under which terms.
        ignored: what lies in the folder and was left out, a line for each reason.

    Raises:
        DataError: if there is no training image, an anomalous image among the training or
            validation images, or one file in two splits.
    """

    name: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    source: str
    licence: str
    ignored: tuple[str, ...] = ()

    def __repr__(self) -> str:  # not hundreds of paths
        splits = f"{len(self.train)} training, {len(self.validation)} validation"
        return f"<Scenario {self.name}: {splits}, {len(self.test)} test images>"

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError(
                f"The scenario {self.name} has no training image: add normal images to train/good."
            )
        for sample in (*self.train, *self.validation):
            if sample.label != 0:
                raise DataError(
                    f"{sample.path} is anomalous but in the training or validation split of "
                    f"{self.name}: move it to the test split, EfficientAD learns normal images."
                )
        split_of = {}
        for split, samples in self._splits():
            for sample in samples:
                file = os.path.realpath(sample.path)
                if split_of.setdefault(file, split) != split:
                    raise DataError(
                        f"{sample.path} is in the {split_of[file]} and in the {split} split of "
                        f"{self.name}: keep it in one of them, or the evaluation is worthless."
                    )
        shared = FullScale((sample.path for sample in self.train), self.name)
        for split, samples in self._splits():
            object.__setattr__(self, split, tuple(replace(s, full_scale=shared) for s in samples))

    @property
    def full_scale(self) -> int | None:
        """The white of all 16-bit images, found on the training images; None if none has 16."""
        return self.train[0].full_scale.value

    def _splits(self) -> tuple[tuple[str, tuple[Sample, ...]], ...]:
        return ("train", self.train), ("validation", self.validation), ("test", self.test)

    def test_part(self, count: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """A part of the test images: at most `count`, half of them normal, evenly spaced; 0: all.

        Returns:
            The normal ones and the anomalous ones; either may be empty.

        Example:
            >>> normal, anomalous = scenario.test_part(64)
        """
        normal, anomalous = ([s for s in self.test if s.label == label] for label in (0, 1))
        half = count and max(1, count // 2)
        return evenly(normal, half), evenly(anomalous, half)

    def summary(self) -> str:
        """A text table: images and those with masks, per split and anomaly type; what was left out.

        Whatever lies in the folder and is not used has a line below the table, with the reason.
        """
        lines = [
            f"{self.name}: {self.source} ({self.licence})",
            f"{'split':<12}{'type':<28}{'images':>8}{'masked':>8}",
        ]
        for split, samples in self._splits():
            masked = Counter(s.anomaly_type for s in samples if s.mask_paths)
            for kind, count in sorted(Counter(s.anomaly_type for s in samples).items()):
                lines.append(f"{split:<12}{kind:<28}{count:>8}{masked[kind]:>8}")
        lines += [printable(f"left out: {reason}") for reason in self.ignored]
        return "\n".join(lines)


def good_samples(paths: Iterable[Path]) -> tuple[Sample, ...]:
    """Samples of normal images."""
    return tuple(Sample(path, 0, GOOD) for path in paths)


def ranked_by_name(samples: Iterable[Sample], salt: str) -> list[Sample]:
    """Order samples by the SHA-256 of "salt:file name": random, yet the same on every machine.

    Files of one name in several folders follow one another, by the SHA-256 of their folders' names.
    """

    def digest(name: str) -> bytes:
        name = unicodedata.normalize("NFC", name)  # macOS may store names decomposed
        return hashlib.sha256(f"{salt}:{name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(samples, key=lambda sample: [*map(digest, reversed(sample.path.parts))])


def evenly(samples: Sequence[T], count: int) -> tuple[T, ...]:
    """At most `count` of the samples, evenly spaced, the first and the last among them; 0: all."""
    count = min(count or len(samples), len(samples))
    return tuple(samples[round(index)] for index in np.linspace(0, len(samples) - 1, count))


def hold_out(
    samples: Sequence[Sample], fraction: float = 0.1, seed: int = 0
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Hold validation images out of the training images.

    The choice depends on the file names and the seed alone: not on the order of the samples, the
    machine, or the folder they lie in. Images of one name in several folders, which may be views of
    one part, are held out together as far as the fraction allows: at most one name is in both.

    Args:
        samples: the normal images to train on.
        fraction: share to hold out, between 0 and 1; at least one image is held out and one kept.
        seed: another seed holds out other images.

    Returns:
        The samples to train on and the samples to validate on, each in the order given.

    Raises:
        DataError: if there are fewer than two samples or the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"The validation fraction {fraction} is not between 0 and 1: choose for example 0.1."
        )
    if len(samples) < 2:
        where = f" in {samples[0].path.parent}" if samples else ""
        raise DataError(
            f"Found {len(samples)} training image(s){where}, but at least 2 images are needed, "
            "because one is held out for the quantiles: add images or a validation/good folder."
        )
    count = min(max(1, round(fraction * len(samples))), len(samples) - 1)
    held = {id(sample) for sample in ranked_by_name(samples, str(seed))[:count]}
    train = tuple(sample for sample in samples if id(sample) not in held)
    return train, tuple(sample for sample in samples if id(sample) in held)
