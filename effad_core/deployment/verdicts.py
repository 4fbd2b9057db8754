"""The files of an inspection: a row of a table and pictures for each image, as verdicts come."""

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from effad_core.deployment.overlays import bounding_boxes, overlay, scale_of
from effad_core.errors import DataError, printable
from effad_core.prediction import Prediction, Predictor
from effad_core.storage.files import write_text
from effad_core.thresholds import OperatingPoint

import numpy as np
from PIL import Image

PREDICTIONS, STREAM, BOXES = "predictions.csv", "stream.csv", "boxes.json"
OVERLAYS, MASKS, MAPS = FOLDERS = "overlays", "masks", "maps"
SUFFIX_OF = {OVERLAYS: ".png", MASKS: ".png", MAPS: ".tiff"}
COLUMNS = (
    *("image", "score", "threshold", "is_anomalous", "width", "height"),
    *("anomalous_area", "peak_x", "peak_y", "unit_score", "error"),
)
STREAM_COLUMNS = ("time", *COLUMNS)
VERDICTS = {True: "anomalous", False: "normal", None: "unjudged"}
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
    """Writes a table, and what else is asked for, as verdicts come.

    `inspect_images` says what the files hold. Of a stream, the table is called stream.csv, has the
    time of each verdict as its first column, and is never begun anew: rows are added to it, and
    pictures are written of anomalous images alone.

    Args:
        folder: receives the files; created if it does not exist.
        pixel_threshold: the detector's, or None.
        pictures: what to write beside the table: names among "overlays", "masks", "maps", "boxes".
        stream: whether this is a stream.

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
        stream: bool = False,
    ):
        if pixel_threshold is None and pictures & {"masks", "boxes"}:
            raise ValueError(
                "the detector has no pixel threshold, so there are no masks and no boxes: find one "
                "with effad threshold, or set detector.pixel_threshold"
            )
        self.folder, self.pictures, self.stream = folder, pictures, stream
        self.table = folder / (STREAM if stream else PREDICTIONS)
        self._columns = STREAM_COLUMNS if stream else COLUMNS
        self.scale = scale_of(pixel_threshold)
        self.counts, self.errors = Counter(), []
        self._boxes = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the table while the block runs; at its end, however it ends, write the boxes.

        Raises:
            DataError: if the system refuses, or the folder's table is of another program.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = _has_rows(self.table, self._columns)
            if not self.stream:
                _delete_pictures(self.folder)
            goes_on = self.stream and begun
            mode = "a" if goes_on else "w"
            self._file = self.table.open(mode, newline="", encoding="utf-8")
        except OSError as error:
            raise self._not_written(error) from None
        if self.stream and (self.folder / BOXES).is_file():
            self._boxes = _read_boxes(self.folder / BOXES)
        with self._file:
            self._writer = csv.DictWriter(self._file, self._columns)
            if not goes_on:
                self._write(dict(zip(self._columns, self._columns, strict=True)))
            try:
                yield
            finally:
                if "boxes" in self.pictures:
                    write_text(self.folder / BOXES, json.dumps(self._boxes, indent=1) + "\n")

    def add(self, name: Path, image: Image.Image | Exception, prediction: Prediction | None) -> str:
        """Write one image's row and pictures.

        Args:
            name: what the table calls it, a relative path.
            image, prediction: as `Predictor.stream` yields them.

        Returns:
            Its verdict, a key of `counts`.

        Raises:
            DataError: if the row cannot be written.
        """
        row = {"image": table_cell(name.as_posix())}
        if self.stream:
            row["time"] = datetime.now().astimezone().isoformat(timespec="milliseconds")
            self._forget(name, row["image"])
        if prediction is None:
            verdict = "unreadable"
            row["error"] = table_cell(printable(str(image)))
        else:
            row |= _numbers(prediction)
            verdict = VERDICTS[row.get("is_anomalous")]
            if verdict == "anomalous" or not self.stream:
                row["error"] = self._draw(name, image, prediction)
                if "boxes" in self.pictures:
                    self._boxes[row["image"]] = bounding_boxes(prediction)
        if row.get("error"):
            self.errors.append(row["error"])
        self.counts[verdict] += 1
        self._write(row)
        return verdict

    def _write(self, row: dict) -> None:
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from None

    def _not_written(self, error: OSError) -> DataError:
        return DataError(
            f"{error.filename or self.table} cannot be written ({error.strerror or error}): make "
            "room there, or choose another output folder."
        )

    def _forget(self, name: Path, cell: str) -> None:
        """Remove what was drawn of an earlier image of this name."""
        self._boxes.pop(cell, None)
        for kind in FOLDERS:
            with suppress(OSError):
                (self.folder / f"{kind}/{name}{SUFFIX_OF[kind]}").unlink()

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
            drawn[OVERLAYS] = shown
        if "masks" in self.pictures:
            mask = Image.fromarray(np.uint8(255 * prediction.anomalous_pixels))
            drawn[MASKS] = mask
        if "maps" in self.pictures:
            drawn[MAPS] = Image.fromarray(prediction.map)
        errors = [
            _save(picture, self.folder / f"{kind}/{name}{SUFFIX_OF[kind]}")
            for kind, picture in drawn.items()
        ]
        return next(filter(None, errors), "")


def refuse_inside(folder: Path, images: Path) -> None:
    """Raise DataError if the output folder and the folder of images lie in each other's way."""
    inside, watched = folder.resolve(), images.resolve()
    if inside.is_relative_to(watched):
        raise DataError(
            f"The output folder {folder} lies inside the images' folder {images}, so that its "
            "overlays would be inspected the next time: choose another one."
        )
    refuse_among(folder, [images])


def refuse_among(folder: Path, images: Iterable[Path]) -> None:
    """Raise DataError if an image, or a folder of images, is one that the output would replace."""
    for kind in FOLDERS:
        old = os.path.realpath(folder / kind)
        for path in images:
            if Path(os.path.realpath(path)).is_relative_to(old):
                raise DataError(f"The image {path} lies among the output's {kind}: choose another.")


def judged_before(folder: Path) -> dict[str, float]:
    """Of a stream's table, when each image was judged last, in seconds since 1970; by its name."""
    table = folder / STREAM
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("time") and row.get("image")]
    found = {}
    for row in rows:
        with suppress(ValueError):  # a row that a power cut left unfinished
            found[row["image"]] = datetime.fromisoformat(row["time"]).timestamp()
    return found


def _has_rows(table: Path, columns: tuple[str, ...]) -> bool:
    """Whether a table of ours is there; DataError for something else in its place."""
    if not os.path.lexists(table):
        return False
    if not table.is_file():
        raise DataError(
            f"{table} is no file, so that no table can take its place: remove it, or choose "
            "another output folder."
        )
    with table.open("r+b") as file:  # or nothing may be deleted
        header = file.readline().strip()
    if header not in (b"", ",".join(columns).encode()):  # an interruption may leave it empty
        raise DataError(f"{table} is of another program: choose another output folder.")
    return header != b""


def _delete_pictures(folder: Path) -> None:
    """Delete what an earlier inspection left, and nothing else."""
    if not (folder / PREDICTIONS).exists():
        return
    for kind in FOLDERS:
        shutil.rmtree(folder / kind, ignore_errors=True)
    (folder / BOXES).unlink(missing_ok=True)


def _read_boxes(path: Path) -> dict[str, list]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"{path} is of another program: choose another output folder.") from None


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


def table_cell(text: str) -> str:
    """Text that a CSV in UTF-8 can hold and no spreadsheet takes for a formula."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"./{text}" if text.startswith(FORMULA) else text


def _save(image: Image.Image, path: Path) -> str:
    """Write a picture; return an error message if that fails, which must not stop the others."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"compress_level": 1} if path.suffix == ".png" else {}))
    except OSError as error:
        return table_cell(
            printable(f"the picture {path} cannot be written: {error.strerror or error}")
        )
    return ""
