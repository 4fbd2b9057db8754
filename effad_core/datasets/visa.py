"""VisA as it is downloaded: an object's folder, and the table `split_csv/1cls.csv` beside it.

<root>/split_csv/1cls.csv                 object,split,label,image,mask; paths start at <root>
<root>/<object>/Data/Images/Normal/*.JPG
<root>/<object>/Data/Images/Anomaly/*.JPG
<root>/<object>/Data/Masks/Anomaly/*.png  small non-zero values, not 255, are the defects
"""

import csv
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from effad_core.errors import DataError

from .scenario import GOOD, Sample, Scenario, hold_out

VISA = {  # object -> numbers of training images, normal and anomalous test images in the archive
    "candle": (900, 100, 100),
    "capsules": (542, 60, 100),
    "cashew": (450, 50, 100),
    "chewinggum": (453, 50, 100),
    "fryum": (450, 50, 100),
    "macaroni1": (900, 100, 100),
    "macaroni2": (900, 100, 100),
    "pcb1": (904, 100, 100),
    "pcb2": (901, 100, 100),
    "pcb3": (905, 101, 100),
    "pcb4": (904, 101, 100),
    "pipe_fryum": (450, 50, 100),
}
SPLIT_FILE = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")


def visa_objects(root: Path) -> set[str]:
    """Names of the objects in the split table of a VisA folder; empty if there is no table."""
    return {row["object"] for _, row in _rows(root)} if _has_table(root) else set()


def is_visa_object(path: Path) -> bool:
    """Whether a folder lies beside VisA's split table."""
    path = Path(os.path.abspath(path))
    return os.path.isdir(path) and path.name != "split_csv" and _has_table(path.parent)


def count_rows(path: Path) -> tuple[int, int, int]:
    """How many training images, normal and anomalous test images the table has of an object.

    Args:
        path: the object's folder.

    Raises:
        DataError: if the table is damaged.
    """
    rows = [row for _, row in _rows(path.parent) if row["object"] == path.name]
    test = [row["label"] for row in rows if row["split"] == "test"]
    normal = test.count("normal")
    return len(rows) - len(test), normal, len(test) - normal


def open_visa(path: Path, *, validation_fraction: float = 0.1, seed: int = 0) -> Scenario:
    """Open one object of VisA as downloaded; the split is the table's, for one-class training.

    Args:
        path: the object's folder, `.../VisA/candle`.
        validation_fraction: share of the training images to hold out for validation.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario; its anomalous images have the type "anomaly" and one mask each.

    Raises:
        DataError: if the table is damaged, does not name the object, or names a file that is
            missing or outside the VisA folder.
    """
    path = Path(os.path.abspath(path))
    root, name = path.parent, path.name
    rows = [(line, row) for line, row in _rows(root) if row["object"] == name]
    if not rows:
        raise DataError(
            f"{root / SPLIT_FILE} names no object {name}: open one of "
            f"{', '.join(sorted(visa_objects(root)))}, or put normal images into "
            f"{path / 'train' / GOOD}."
        )
    splits = {"train": [], "test": []}
    for line, row in rows:
        where = f"{root / SPLIT_FILE} line {line}"
        if row["split"] not in splits or row["label"] not in ("normal", "anomaly"):
            raise DataError(
                f"{where} has the split '{row['split']}' and the label '{row['label']}': write "
                "train or test, and normal or anomaly."
            )
        if (row["label"] == "anomaly") != bool(row["mask"]):
            raise DataError(f"{where}: name a mask for each anomaly and none for a normal image.")
        image = _file(root, row["image"], where)
        if row["label"] == "normal":
            splits[row["split"]].append(Sample(image, 0, GOOD))
        else:
            masks = (_file(root, row["mask"], where),)
            splits[row["split"]].append(Sample(image, 1, row["label"], masks))
    train, validation = hold_out(splits["train"], validation_fraction, seed)
    return Scenario(
        name=name,
        train=train,
        validation=validation,
        test=tuple(splits["test"]),
        source=f"{name} in the folder {root}, split by {SPLIT_FILE.as_posix()}",
        licence="CC BY 4.0" if name in VISA else "licence unknown",
    )


def _has_table(root: Path) -> bool:
    return os.path.isfile(root / SPLIT_FILE)


def _rows(root: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of the split table; a missing last column, the mask, reads as empty."""
    path = root / SPLIT_FILE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: its first line has to be "
                    f"{','.join(COLUMNS)}."
                )
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): unpack VisA again.") from None


def _file(root: Path, name: str, where: str) -> Path:
    """An existing file of the VisA folder, from its path in the table."""
    escapes = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    file = root / name
    if escapes or not name or "\\" in name or PureWindowsPath(name).drive:
        raise DataError(
            f"{where} names '{name}': write a path that starts at {root} and stays inside it."
        )
    if not os.path.isfile(file):
        raise DataError(f"{where} names {file}, which does not exist: unpack VisA again.")
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise DataError(f"{where} names {file}, a link that leads out of {root}: copy it there.")
    return file
