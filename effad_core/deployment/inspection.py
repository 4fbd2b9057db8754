"""Thresholds from held-out good images, then a verdict on any number of new ones: CSV and overlays.

    effad predict path/to/detector.safetensors path/to/images

Notebook 10 goes from a folder of good images to this command.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import Sample, list_images
from effad_core.datasets.images import skipped_files
from effad_core.deployment.overlays import bounding_boxes, overlay
from effad_core.detector import EfficientAD
from effad_core.errors import DataError, command_errors, printable
from effad_core.prediction import Prediction, Predictor
from effad_core.storage.files import as_path, write_text
from effad_core.thresholds import OperatingPoint, pixel_threshold, threshold_for_fpr

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

PREDICTIONS, BOXES = "predictions.csv", "boxes.json"
OVERLAYS, MASKS, MAPS = FOLDERS = "overlays", "masks", "maps"
COLUMNS = (
    *("image", "score", "threshold", "is_anomalous", "width", "height"),
    *("anomalous_area", "peak_x", "peak_y", "unit_score", "error"),
)
VERDICTS = {True: "anomalous", False: "normal", None: "unjudged"}
UNKNOWN_SCALE = 0.3  # end of the colour scale without a pixel threshold above 0: three times q_b
FORMULA = (*"=+-@\t\r\n", *"＝＋－＠")  # a cell that starts so, a spreadsheet may execute

Images = str | os.PathLike | Iterable[str | os.PathLike | Sample]


def fit_thresholds(
    detector: Predictor,
    samples: Sequence[Sample],
    rate: float,
    confidence: float = 0.95,
    guarantee: str = "confident",
    device: str | torch.device | None = None,
) -> tuple[OperatingPoint, OperatingPoint]:
    """Set a detector's two thresholds from good images, with a stated false positive rate.

    Args:
        detector: trained, as it is or prepared; gets `operating_point` and
            `pixel_operating_point`, both or, on an error, neither.
        samples: good images that no network was trained on, for example a scenario's validation
            images.
        rate, confidence, guarantee: as in `threshold_for_fpr`.
        device: where the detector computes, now and afterwards; None takes the GPU where there is
            one.

    Returns:
        The threshold of scores and that of maps; `str` of each says what it promises.

    Raises:
        DataError: for an image that cannot be read.
        ValueError: if a sample is anomalous, the detector has no quantiles, or the images are too
            few for the rate: the message says how many are needed, and the lowest rate possible.

    Example:
        >>> point, _ = fit_thresholds(detector, scenario.validation, 0.5, guarantee="average")
        >>> detector.threshold == point.threshold
        True
    """
    for sample in samples:
        if sample.label:
            raise ValueError(f"{sample.path} is anomalous: thresholds come from good images alone")
    if not samples:
        raise ValueError("there are no good images to find the thresholds from")
    threshold_for_fpr(np.zeros(len(samples)), rate, confidence, guarantee)  # refuses before scoring
    detector.use_device(device)
    scores, highest = [], []
    for _, prediction in detector.stream([sample.path for sample in samples]):
        scores.append(prediction.score)
        highest.append(prediction.map.max(keepdims=True))  # all that pixel_threshold looks at
    points = (
        threshold_for_fpr(scores, rate, confidence, guarantee),
        pixel_threshold(highest, rate, confidence, guarantee),
    )
    detector.operating_point, detector.pixel_operating_point = points
    return points


@dataclass(frozen=True)
class Inspection:
    """What `inspect_images` found; `str` says it in a few lines.

    Attributes:
        folder: where predictions.csv and the overlays are.
        anomalous, normal: numbers of images by verdict.
        unjudged: images with a score but no verdict, for the detector has no threshold.
        unreadable: images that could not be read.
        errors: all messages of the CSV's column error.
        operating_point, pixel_operating_point: the detector's.
        scale: end of the overlays' colour scale; None if there are none.
        skipped: the files of the folder of images that were not taken for images, each with the
            reason.
    """

    folder: Path
    anomalous: int
    normal: int
    unjudged: int
    unreadable: int
    errors: tuple[str, ...]
    operating_point: OperatingPoint | None
    pixel_operating_point: OperatingPoint | None
    scale: float | None
    skipped: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many were given."""
        return self.anomalous + self.normal + self.unjudged + self.unreadable

    def __str__(self) -> str:
        if self.operating_point is None:
            judged = f"{self.unjudged} scored"
            basis = "the detector has no threshold: no image was called anomalous or normal"
        else:
            judged = f"{self.anomalous} anomalous, {self.normal} normal"
            basis = str(self.operating_point)
        lines = [f"{self.images} images: {judged}, {self.unreadable} unreadable", basis]
        if self.pixel_operating_point is None:
            lines.append("the detector has no pixel threshold: no contours, no anomalous areas")
        lines += [f"error: {error}" for error in self.errors[:5]]
        if len(self.errors) > 5:
            lines.append(f"and {len(self.errors) - 5} more errors, all in the column error")
        if self.skipped:
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(printable(f"not taken as images: {', '.join(self.skipped[:3])}{more}"))
        if self.scale is not None:
            lines.append(f"colours of the overlays: 0 to {self.scale:.3g}, the same in every image")
        return "\n".join([*lines, printable(f"written to {self.folder}")])


def inspect_images(
    detector: EfficientAD,
    images: Images,
    folder: str | os.PathLike,
    overlays: bool = True,
    batch_size: int = 8,
    masks: bool = False,
    boxes: bool = False,
    maps: bool = False,
) -> Inspection:
    """Predict images and write one CSV row and one picture for each, as they come.

    `folder` receives predictions.csv with the columns

    - image: the path inside the folder given, or inside the deepest folder that holds all images of
      a sequence. One that would start like a spreadsheet's formula (=, +, -, @, also of full
      width, a tab, a line break) starts with "./"; bytes that are no UTF-8 are written as backslash
      escapes.
    - score, threshold, is_anomalous (score > threshold).
    - width, height: in pixels, after the EXIF rotation, as everything below.
    - anomalous_area: share of the pixels above the pixel threshold.
    - peak_x, peak_y: the pixel of the map's maximum, counted from 0 in the upper left corner.
    - unit_score: between 0 and 1, 0.5 at the threshold (see `Prediction.unit_score`).
    - error: why the image could not be read (then the other cells are empty), or its overlay not
      written.

    and overlays/<image>.png at the image's own size: the map on a colour scale that is the same
    for all images, from 0 to twice the pixel threshold (so that its upper half is what is above),
    more opaque where the map is higher, and a contour at the pixel threshold.

    On request also masks/<image>.png, 255 where the map is above the pixel threshold, else 0;
    boxes.json, which has for each image the rectangles around these pixels (`bounding_boxes`); and
    maps/<image>.tiff, the map itself in float32.

    A call starts over: it deletes what an earlier one has written. An interrupted call leaves the
    rows and overlays that it has written.

    Args:
        detector: trained. Without threshold or pixel threshold the columns that need it stay empty.
        images: a folder, with those below it, or one image; or paths and samples.
        folder: not inside the folder of images; created if it does not exist.
        overlays: whether to draw them.
        batch_size: images that go through the networks at once, fewer if they are large.
        masks, boxes: whether to write them; the detector needs a pixel threshold then.
        maps: whether to write them.

    Returns:
        Counts and errors; an unreadable image stops nothing.

    Raises:
        DataError: if the folder of images is missing or holds no image, `folder` lies in it, or the
            CSV cannot be written (of an earlier call, nothing is deleted then).
        ValueError: if there are no images, one is given twice, the detector has no quantiles, or
            its weights are damaged; or has no pixel threshold for masks or boxes.

    Example:
        >>> inspection = inspect_images(detector, scenario.test[:2], folder)
        >>> inspection.images, sorted(path.name for path in folder.iterdir())
        (2, ['overlays', 'predictions.csv'])
    """
    folder = as_path(folder)
    names, paths = _names_and_paths(images, folder)
    detector.check_quantiles()  # before anything is deleted
    limit = detector.pixel_operating_point
    if limit is None and (masks or boxes):
        raise ValueError(
            "the detector has no pixel threshold, so there are no masks and no boxes: find one "
            "with effad threshold, or set detector.pixel_threshold"
        )
    found = {}
    scale = 2 * limit.threshold if limit and limit.threshold > 0 else UNKNOWN_SCALE
    counts, errors = Counter(), []
    predictions = detector.stream(paths, batch_size, keep_going=True)
    with _table(folder) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        file.flush()
        for name, (image, prediction) in zip(
            names, tqdm(predictions, total=len(paths), desc="inspecting", leave=False), strict=True
        ):
            row = {"image": _cell(name.as_posix())}
            if prediction is None:
                counts["unreadable"] += 1
                row["error"] = _cell(printable(str(image)))
            else:
                row |= _numbers(prediction)
                counts[VERDICTS[row.get("is_anomalous")]] += 1
                if overlays:
                    shown = overlay(image, prediction.map, scale, prediction.pixel_threshold)
                    row["error"] = _save(shown, folder / OVERLAYS / f"{name}.png")
                if masks:
                    mask = Image.fromarray(np.uint8(255 * prediction.anomalous_pixels))
                    row["error"] = _save(mask, folder / MASKS / f"{name}.png") or row.get("error")
                if maps:
                    whole = Image.fromarray(prediction.map)
                    row["error"] = _save(whole, folder / MAPS / f"{name}.tiff") or row.get("error")
                if boxes:
                    found[row["image"]] = bounding_boxes(prediction)
            if row.get("error"):
                errors.append(row["error"])
            writer.writerow(row)
            file.flush()
    if boxes:
        write_text(folder / BOXES, json.dumps(found, indent=1) + "\n")
    numbers = (counts[name] for name in ("anomalous", "normal", "unjudged", "unreadable"))
    scale = scale if overlays else None
    points = detector.operating_point, limit
    return Inspection(folder, *numbers, tuple(errors), *points, scale, _skipped(images))


def _skipped(images: Images) -> tuple[str, ...]:
    """What a folder of images holds beside them, by its path inside the folder, with the reason."""
    if not isinstance(images, str | os.PathLike) or not as_path(images).is_dir():
        return ()
    found = skipped_files(images, recursive=True)
    root = as_path(images)
    return tuple(f"{path.relative_to(root).as_posix()} ({why})" for path, why in found.items())


def _names_and_paths(images: Images, folder: Path) -> tuple[list[Path], list[Path]]:
    """Paths relative to the folder of images, and the paths; none may be among the output."""
    alone = isinstance(images, str | os.PathLike)
    root = as_path(images) if alone else None
    if alone and not root.is_file():
        paths = list_images(root, recursive=True)
        names = [path.relative_to(root) for path in paths]
        if folder.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"The output folder {folder} lies inside the images' folder {root}, so that its "
                "overlays would be inspected the next time: choose another one."
            )
    else:
        items = [root] if alone else images
        paths = [item.path if isinstance(item, Sample) else as_path(item) for item in items]
        if not paths:
            raise ValueError("there are no images to inspect: give at least one")
        whole = [Path(os.path.abspath(path)) for path in paths]
        if twice := [path for path, count in Counter(whole).items() if count > 1]:
            raise ValueError(f"{twice[0]} is given more than once: give each image once")
        root = os.path.commonpath([path.parent for path in whole])
        names = [path.relative_to(root) for path in whole]
    for kind in FOLDERS:
        old = os.path.realpath(folder / kind)
        for path in paths:
            if Path(os.path.realpath(path)).is_relative_to(old):
                raise DataError(f"The image {path} lies among the output's {kind}: choose another.")
    return names, paths


@contextmanager
def _table(folder: Path) -> Iterator[TextIO]:
    """Open predictions.csv, empty; raise DataError if the system refuses."""
    path = folder / PREDICTIONS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _start_over(folder)
        with path.open("w", newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be written ({error.strerror or error}): make room "
            "there, or choose another output folder."
        ) from None


def _start_over(folder: Path) -> None:
    """Delete what an earlier inspection left, and nothing else."""
    predictions = folder / PREDICTIONS
    if not os.path.lexists(predictions):
        return
    if not predictions.is_file():
        raise DataError(
            f"{predictions} is no file, so that no table can take its place: remove it, or choose "
            "another output folder."
        )
    with predictions.open("r+b") as file:  # or nothing may be deleted
        header = file.readline().strip()
    if header not in (b"", ",".join(COLUMNS).encode()):  # an interruption may leave it empty
        raise DataError(f"{predictions} is of another program: choose another output folder.")
    for kind in FOLDERS:
        shutil.rmtree(folder / kind, ignore_errors=True)
    (folder / BOXES).unlink(missing_ok=True)


def _numbers(prediction: Prediction) -> dict[str, float | int | bool]:
    """A prediction's cells; those that need a threshold only where there is one."""
    height, width = prediction.size
    y, x = divmod(int(prediction.map.argmax()), width)
    row = {"score": prediction.score, "width": width, "height": height, "peak_x": x, "peak_y": y}
    if prediction.threshold is not None:
        row |= {"threshold": prediction.threshold, "is_anomalous": prediction.is_anomalous}
        row["unit_score"] = prediction.unit_score
    if prediction.pixel_threshold is not None:
        row["anomalous_area"] = float(prediction.anomalous_pixels.mean())
    return row


def _cell(text: str) -> str:
    """Text that a CSV in UTF-8 can hold and no spreadsheet takes for a formula."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"./{text}" if text.startswith(FORMULA) else text


def _save(image: Image.Image, path: Path) -> str:
    """Write a picture; return an error message if that fails, which must not stop the others."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"compress_level": 1} if path.suffix == ".png" else {}))
    except OSError as error:
        return _cell(printable(f"the picture {path} cannot be written: {error.strerror or error}"))
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """`effad predict`; exits with 1 if an image has an error, 2 if nothing can be inspected, and on
    request with 3 if an image is anomalous."""
    parser = argparse.ArgumentParser(
        prog="effad predict",
        description="Judge images: predictions.csv and overlays.",
        epilog="example: effad predict detector.safetensors path/to/images --output verdicts",
    )
    parser.add_argument(
        "detector", type=as_path, help="a detector.safetensors, or its run's folder"
    )
    parser.add_argument("images", help="a folder of images, or one image")
    parser.add_argument(
        "--output",
        type=as_path,
        default=Path("build/inspection"),
        help="build/inspection without it; what an earlier call wrote there is replaced",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write the CSV alone")
    parser.add_argument("--masks", action="store_true", help="write the anomalous pixels as PNG")
    parser.add_argument("--boxes", action="store_true", help="write rectangles around them as JSON")
    parser.add_argument("--maps", action="store_true", help="write the anomaly maps, float32 TIFF")
    parser.add_argument(
        "--fail-on-anomaly",
        action="store_true",
        help="exit with 3 if any image is anomalous (with 1 if one cannot be read)",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    with command_errors(f"what was done is in {args.output}"):
        detector = EfficientAD.load(args.detector, args.device)
        if args.fail_on_anomaly and detector.threshold is None:
            raise ValueError("the detector has no threshold to fail by: find one, effad threshold")
        inspection = inspect_images(
            detector, args.images, args.output, not args.no_overlays,
            masks=args.masks, boxes=args.boxes, maps=args.maps,
        )  # fmt: skip
    print(inspection)
    if inspection.errors:
        sys.exit(1)
    sys.exit(3 if args.fail_on_anomaly and inspection.anomalous else 0)
