"""The files of an inspection: a row of a table and pictures for each image, as verdicts come."""

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from effad_core.deployment.overlays import bounding_boxes, overlay
from effad_core.errors import DataError, printable
from effad_core.prediction import Prediction, Predictor
from effad_core.storage.files import write_text
from effad_core.thresholds import OperatingPoint

import numpy as np
from PIL import Image

PREDICTIONS, BOXES = "predictions.csv", "boxes.json"
OVERLAYS, MASKS, MAPS = FOLDERS = "overlays", "masks", "maps"
COLUMNS = (
    *("image", "score", "threshold", "is_anomalous", "width", "height"),
    *("anomalous_area", "peak_x", "peak_y", "unit_score", "error"),
)
VERDICTS = {True: "anomalous", False: "normal", None: "unjudged"}
UNKNOWN_SCALE = 0.3  # end of the colour scale without a pixel threshold above 0: three times q_b
FORMULA = (*"=+-@\t\r\n", *"＝＋－＠")  # a cell that starts so, a spreadsheet may execute


@dataclass(frozen=True)
class Inspection:
    """What an inspection found; `str` says it in a few lines.

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


class VerdictFiles:
    """Writes predictions.csv and what else is asked for; `inspect_images` says what they hold.

    Args:
        folder: receives them; created if it does not exist.
        pixel_threshold: the detector's, or None.
        pictures: what to write beside the table: names among "overlays", "masks", "maps", "boxes".
        anomalous_only: whether images that are not anomalous have a row but no picture.

    Attributes:
        counts: images by verdict: "anomalous", "normal", "unjudged", "unreadable".
        errors: all messages of the column error.
        scale: end of the overlays' colour scale.

    Raises:
        ValueError: if masks or boxes are asked for and there is no pixel threshold.
    """

    def __init__(
        self,
        folder: Path,
        pixel_threshold: float | None,
        pictures: set[str],
        anomalous_only: bool = False,
    ):
        if pixel_threshold is None and pictures & {"masks", "boxes"}:
            raise ValueError(
                "the detector has no pixel threshold, so there are no masks and no boxes: find one "
                "with effad threshold, or set detector.pixel_threshold"
            )
        self.folder, self.pictures, self.anomalous_only = folder, pictures, anomalous_only
        known = pixel_threshold is not None and pixel_threshold > 0
        self.scale = 2 * pixel_threshold if known else UNKNOWN_SCALE
        self.counts, self.errors = Counter(), []
        self._boxes = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Begin the table, deleting what an earlier inspection left; at the end write the boxes.

        Raises:
            DataError: if the system refuses, or the folder's table is of another program.
        """
        with _table(self.folder) as self._file:
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._writer.writeheader()
            self._file.flush()
            yield
        if "boxes" in self.pictures:
            write_text(self.folder / BOXES, json.dumps(self._boxes, indent=1) + "\n")

    def add(self, name: Path, image: Image.Image | Exception, prediction: Prediction | None) -> str:
        """Write one image's row and pictures.

        Args:
            name: what the table calls it, a relative path.
            image, prediction: as `Predictor.stream` yields them.

        Returns:
            Its verdict, a key of `counts`.
        """
        row = {"image": _cell(name.as_posix())}
        if prediction is None:
            verdict = "unreadable"
            row["error"] = _cell(printable(str(image)))
        else:
            row |= _numbers(prediction)
            verdict = VERDICTS[row.get("is_anomalous")]
            if verdict == "anomalous" or not self.anomalous_only:
                row["error"] = self._draw(name, image, prediction)
                if "boxes" in self.pictures:
                    self._boxes[row["image"]] = bounding_boxes(prediction)
        if row.get("error"):
            self.errors.append(row["error"])
        self.counts[verdict] += 1
        self._writer.writerow(row)
        self._file.flush()
        return verdict

    def inspection(self, detector: Predictor, skipped: tuple[str, ...] = ()) -> Inspection:
        """What was written so far.

        Args:
            detector: whose verdicts they are.
            skipped: as in `Inspection`.
        """
        counts = (self.counts[name] for name in ("anomalous", "normal", "unjudged", "unreadable"))
        points = detector.operating_point, detector.pixel_operating_point
        scale = self.scale if "overlays" in self.pictures else None
        return Inspection(self.folder, *counts, tuple(self.errors), *points, scale, skipped)

    def _draw(self, name: Path, image: Image.Image, prediction: Prediction) -> str:
        """Write the pictures; return the error message of the first that cannot be written."""
        drawn = {}
        if "overlays" in self.pictures:
            shown = overlay(image, prediction.map, self.scale, prediction.pixel_threshold)
            drawn[f"{OVERLAYS}/{name}.png"] = shown
        if "masks" in self.pictures:
            mask = Image.fromarray(np.uint8(255 * prediction.anomalous_pixels))
            drawn[f"{MASKS}/{name}.png"] = mask
        if "maps" in self.pictures:
            drawn[f"{MAPS}/{name}.tiff"] = Image.fromarray(prediction.map)
        errors = [_save(picture, self.folder / path) for path, picture in drawn.items()]
        return next(filter(None, errors), "")


def refuse_inside(folder: Path, images: Path) -> None:
    """Raise DataError if the output folder lies inside the folder of images."""
    if folder.resolve().is_relative_to(images.resolve()):
        raise DataError(
            f"The output folder {folder} lies inside the images' folder {images}, so that its "
            "overlays would be inspected the next time: choose another one."
        )


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
