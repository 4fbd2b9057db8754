"""Looks at the files that a run will read, before its first step: seconds here save hours there."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from effad_core.errors import DataError

from PIL import ExifTags, Image

from .depth import is_deep
from .formats import formats_of
from .images import read_image
from .scenario import GOOD, Sample, Scenario

END_OF_JPEG = b"\xff\xd9"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def check_scenario(scenario: Scenario, *, both_kinds: bool = False) -> list[str]:
    """Look at all images and masks of a scenario.

    Args:
        scenario: of any dataset.
        both_kinds: refuse a scenario without normal or without anomalous test images, for a caller
            that has nothing to do without an AU-ROC.

    Returns:
        A sentence for each kind of metrics that cannot be measured, and why.

    Raises:
        DataError: if an image cannot be read, a mask is one that `Sample.load_defects` refuses, or
            the test images are of one kind where both are needed.
    """
    lacking = one_kind(scenario)
    if lacking and both_kinds:
        raise DataError(
            f"{lacking}, but AU-ROC compares images of both kinds: add images of good parts to "
            f"test/{GOOD} and anomalous ones to test/<kind>, or only train with `effad train`."
        )
    check_images((*scenario.train, *scenario.validation, *scenario.test))
    check_masks(scenario.test)
    if lacking:
        return [f"{lacking}: no image metrics and no pixel metrics are measured."]
    if not any(sample.mask_paths for sample in scenario.test):
        return [f"The scenario {scenario.name} has no masks: no pixel metrics are measured."]
    unmasked = without_masks(scenario.name, scenario.test)
    return [unmasked] if unmasked else []


def one_kind(scenario: Scenario) -> str:
    """What test images a scenario lacks for an AU-ROC, as the start of a sentence; or nothing."""
    labels = {sample.label for sample in scenario.test}
    if labels == {0, 1}:
        return ""
    kind = {0: "normal test images", 1: "anomalous test images"}
    lacking = kind[1 - labels.pop()] if labels else "test images"
    return f"The scenario {scenario.name} has no {lacking}"


def without_masks(name: str, samples: Iterable[Sample]) -> str:
    """Which groups of images have no pixel metrics, because only some anomalous images have masks.

    Args:
        name: of the scenario.
        samples: test images.

    Returns:
        A sentence; nothing if all anomalous images have masks, or none has.
    """
    anomalous = [sample for sample in samples if sample.label]
    lacking = Counter(sample.anomaly_type for sample in anomalous if not sample.mask_paths)
    if not 0 < lacking.total() < len(anomalous):
        return ""
    kinds = sorted({sample.anomaly_type for sample in anomalous} - lacking.keys())
    counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(lacking.items()))
    return (
        f"Some anomalous test images of {name} have no mask ({counts}): pixel metrics are measured "
        f"of {' and '.join(kinds) or 'no kind of anomaly'} alone, not of all images together."
    )


def check_images(samples: Iterable[Sample]) -> None:
    """Refuse samples whose image cannot be read, as far as `image_size` notices.

    Raises:
        DataError: for the first of them.
    """
    for sample in samples:
        image_size(sample.path, sample.load)


def check_masks(samples: Iterable[Sample]) -> None:
    """Refuse masks that cannot be used, by reading each of them.

    Raises:
        DataError: as `Sample.load_defects`.
    """
    for sample in samples:
        if sample.label and sample.mask_paths:
            sample.load_defects(image_size(sample.path, sample.load))


def image_size(path: Path, read: Callable[[], Image.Image] | None = None) -> tuple[int, int]:
    """Width and height of an upright image, without decoding it where that can be avoided.

    The header is read, and the end of the file is looked at: a PNG has checksums and a JPEG its
    mark there, which a file that was copied in part lacks. Any other file is decoded, and one of
    more than 8 bits, whose values may be refused.

    Args:
        path: as in `read_image`.
        read: reads the image; None takes `read_image`.

    Raises:
        DataError: as `read_image`.
    """
    read = read or partial(read_image, path)
    if not os.path.isfile(path):  # a pipe would wait for ever
        return read().size
    try:
        with warnings.catch_warnings():  # of Pillow, on odd metadata
            warnings.simplefilter("ignore")
            size, whole = _from_header(path)
    except Exception:  # what is wrong, `read` says
        whole = False
    return size if whole else read().size


def _from_header(path: Path) -> tuple[tuple[int, int], bool]:
    """The upright size, and whether the file is known to be whole; errors are Pillow's."""
    with Image.open(path, formats=formats_of(path)) as image:
        size, kind, whole = image.size, image.format, not is_deep(image)
        known = kind == "JPEG" or "exif" in image.info  # else a PNG would be decoded for it
        if known and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
            size = size[::-1]
        if kind == "PNG":
            image.verify()
        elif kind != "JPEG" or _last_bytes(path) != END_OF_JPEG:
            whole = False
    return size, whole


def _last_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-len(END_OF_JPEG), os.SEEK_END)
        return file.read()
