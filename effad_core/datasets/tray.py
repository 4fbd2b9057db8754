"""A drawn parts tray with logical and structural anomalies, in MVTec LOCO's layout.

An inspection camera looks down on a tray. A normal tray obeys five rules:

    top left      three brass nuts
    top right     three steel washers
    middle        one cable between two connectors of the same colour, blue or orange
    bottom left   two long screws
    bottom right  two short screws

Logical anomalies break one rule with things that all occur in normal images; only their combination
is wrong, so nothing that looks at 33x33 patches can see it. Ground truth, and the area in pixels
that is enough to find (the saturation threshold of `defects_config.json`, as in MVTec LOCO):

    missing       a nut, washer, screw, or the cable: its compartment; the area of the part
    surplus       one more nut, washer or screw: all of its kind; the area of one
    swapped       nuts with washers, long with short screws: a mask per compartment, of the parts
                  that are there and those that should be; the area of the smaller parts
    mismatched    connectors of two colours: both; the area of one
    wrong length  long screws for short ones or the reverse: the screws that are there and those
                  that should be; the area by which they differ

Structural anomalies (see `damage`) are masked pixel by pixel, and every pixel counts.

    <folder>/train/good, validation/good, test/good, test/logical_anomalies, .../000.png
    <folder>/ground_truth/<type>/<stem>/000.png    one defect each, its value from the config
    <folder>/defects_config.json
    <folder>/tray.json                             written last: what was drawn, by which version
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from effad_core.errors import DataError
from effad_core.storage import files
from effad_core.storage.files import as_path
from effad_core.storage.shipped import drawn_data
from parts_tray.scene import SPLITS, defects_config, draw

import numpy as np
from PIL import Image

VERSION = 1  # of the drawing code: raise it whenever an image changes
CONFIG, STAMP = "defects_config.json", "tray.json"
DRAWING = "effad_core parts tray"
COUNTS = {"train": 200, "validation": 40, "test": 120}
FOLDERS = {  # split of the drawing -> folder of its images
    "train": "train/good",
    "validation": "validation/good",
    "good": "test/good",
    "logical_anomalies": "test/logical_anomalies",
    "structural_anomalies": "test/structural_anomalies",
}


def tray_folder(root: str | os.PathLike | None = None) -> Path:
    """The folder of the parts tray, drawn now if it is not there yet.

    If another process is drawing it just now, this one waits for it.

    Args:
        root: the folder to put it into; the repository's `data` by default.

    Returns:
        `<root>/tray`.

    Raises:
        DataError: as `write_tray`.
    """
    folder = (drawn_data() if root is None else as_path(root)) / "tray"
    if not _is_current(folder):
        with _drawing(folder):
            if not _is_current(folder):
                _replace(folder, 0, COUNTS["train"], COUNTS["validation"], COUNTS["test"])
    return folder


def write_tray(
    folder: str | os.PathLike,
    seed: int = 0,
    train: int = COUNTS["train"],
    validation: int = COUNTS["validation"],
    test: int = COUNTS["test"],
    workers: int | None = None,
) -> None:
    """Draw the parts tray; an earlier drawing in `folder` is replaced once the new one is complete.

    Args:
        folder: where; it may not exist yet, be empty, or hold an earlier drawing.
        seed: every image depends on the seed, its split and its number, and on nothing else.
        train: number of training images.
        validation: number of validation images.
        test: number of test images, a third of each kind: normal, logical, structural.
        workers: number of threads; as many as processors by default.

    Raises:
        DataError: if something else is in `folder` or it cannot be written.
    """
    folder = as_path(folder).absolute()
    with _drawing(folder):
        _replace(folder, seed, train, validation, test, workers)


@contextmanager
def _drawing(folder: Path) -> Iterator[None]:
    """Lock `folder` while the block draws into it; raise DataError if it cannot be written."""
    try:
        _check_target(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(folder.with_name(f".{folder.name}.lock"), wait=math.inf):
            yield
    except OSError as error:
        raise DataError(
            f"The parts tray cannot be written to {folder}: {files.reason(error)}, or name another "
            "folder."
        ) from error


def _replace(
    folder: Path, seed: int, train: int, validation: int, test: int, workers: int | None = None
) -> None:
    """Draw beside `folder`, then move it there. A killed drawing is removed by the next one."""
    third = test // 3
    numbers = train, validation, test - 2 * third, third, third
    counts = dict(zip(SPLITS, numbers, strict=True))
    staging = folder.with_name(f".{folder.name}.drawing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write(staging / "new", seed, counts, workers or os.cpu_count() or 1)
        files.sync_all(staging)
        if folder.exists():
            folder.rename(staging / "old")
        (staging / "new").rename(folder)
        files.sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path, seed: int, counts: dict[str, int], workers: int) -> None:
    values = {entry["defect_name"]: entry["pixel_value"] for entry in defects_config()}
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    for split, _ in jobs:
        (folder / FOLDERS[split]).mkdir(parents=True, exist_ok=True)

    def write(job: tuple[str, int]) -> tuple[str, list[str]]:
        split, index = job
        drawing = draw(seed, split, index)
        path = folder / FOLDERS[split] / f"{index:03}.png"
        Image.fromarray(drawing.image).save(path, compress_level=3)  # 4 times faster than 6
        name = drawing.defect.replace(" ", "_")
        if name:
            truth = folder / "ground_truth" / split / path.stem
            truth.mkdir(parents=True)
            for number, mask in enumerate(drawing.masks):
                Image.fromarray(np.uint8(mask) * np.uint8(values[name])).save(
                    truth / f"{number:03}.png"
                )
        return path.relative_to(folder).as_posix(), [name] if name else []

    with ThreadPoolExecutor(workers) as pool:
        images = dict(pool.map(write, jobs))
    (folder / CONFIG).write_text(json.dumps(defects_config(), indent=2), "utf-8")
    stamp = {"drawing": DRAWING, "version": VERSION, "seed": seed, "counts": counts}
    (folder / STAMP).write_text(json.dumps(stamp | {"images": images}, indent=1), "utf-8")


def _check_target(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder for the parts tray.")
    if any(folder.iterdir()) and _read_stamp(folder) is None:
        raise DataError(
            f"{folder} holds something else than a drawn parts tray: name an empty or a new folder."
        )


def _is_current(folder: Path) -> bool:
    stamp = _read_stamp(folder)
    return stamp is not None and stamp.get("version") == VERSION


def _read_stamp(folder: Path) -> dict | None:
    """The stamp of a complete drawing, of any version; None if there is none."""
    try:
        stamp = json.loads((folder / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("drawing") == DRAWING else None
