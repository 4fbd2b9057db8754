"""A folder of images -> Scenario: your own, or a published dataset's. The rule in one place:

1. A file `scenario.toml` in the folder names the images (see `chosen`).
2. A folder with train/good is read as a scenario of MVTec AD, MVTec AD 2, MVTec LOCO or BTAD
   (see `mvtec`).
3. An object of VisA as downloaded is read by its table (see `visa`).
4. In any other folder the folders' names decide (see `verdicts`): good and bad parts, as in
   anomalib's Folder; or the names say nothing, then all images are good.

The names are those that `folder_names` understands: good, ok, OK, pass, gut, ...; train, training;
validation, val; test, test_public; ground_truth, masks, gt. What may show good or bad parts is
refused with what to do. What systems and NAS put into folders, and what has no place in a layout,
is left out and listed in `Scenario.ignored`. Masks are never trained on as images.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from effad_core.errors import DataError
from effad_core.storage.files import as_path

from .chosen import FILE, Paths, read_chosen, read_file
from .folder_names import ANOMALOUS, NORMAL, TEST, TRAIN, VALIDATION, meanings
from .images import missing
from .mvtec import children, folders_in, read_layout, require_folder, train_good
from .scenario import GOOD, Scenario, hold_out
from .verdicts import Found, read_by_names
from .visa import is_visa_object, open_visa, visa_objects

OWN_LICENCE = "licence unknown"


def open_folder(
    path: str | os.PathLike, *, validation_fraction: float = 0.1, seed: int = 0
) -> Scenario:
    """Open a folder in one of the layouts above; `train/good` alone, or good images, is enough.

    Args:
        path: the folder, one scenario (of MVTec AD: `.../bottle`; of VisA: `.../candle`).
        validation_fraction: share of the good images to hold out if there is no validation/good.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario, named after the folder. Where its folders' names decided, its source, which
        `Scenario.summary` prints, says which images were taken as good. `Scenario.ignored` lists
        what was left out.

    Raises:
        DataError: if the folder or a mask is missing, a folder is empty, it cannot be told whether
            images show good parts, images lie deeper than a layout has them, two of them share a
            mask, or scenario.toml, defects_config.json or VisA's table cannot be used.
    """
    path = as_path(path)
    _check_folder(path)
    if os.path.lexists(path / FILE):
        found = read_file(path)
    elif train_good(path):
        found = read_layout(path)
    elif is_visa_object(path):
        return open_visa(path, validation_fraction=validation_fraction, seed=seed)
    else:
        found = _read_plain(path)
    return _scenario(path.resolve().name, found, validation_fraction, seed)


def open_chosen(
    chosen: Mapping[str, Paths | None], *, validation_fraction: float = 0.1, seed: int = 0
) -> Scenario:
    """Open the folders and files that were named (see `read_chosen`).

    Args:
        chosen: by "normal", "anomalous", "normal_test" and "masks".
        validation_fraction, seed: as in `open_folder`.

    Raises:
        DataError: as `read_chosen`.
    """
    name, found = read_chosen(chosen)
    return _scenario(name, found, validation_fraction, seed)


def _scenario(name: str, found: Found, validation_fraction: float, seed: int) -> Scenario:
    train, validation = found.train, found.validation
    if not validation:
        train, validation = hold_out(train, validation_fraction, seed)
    return Scenario(name, train, validation, found.test, found.source, OWN_LICENCE, found.ignored)


def list_scenarios(root: str | os.PathLike) -> list[Path]:
    """The scenario folders of a dataset, in any of the layouts above.

    Args:
        root: the folder that holds them (of MVTec AD: the one that holds `bottle`), or the folder
            of one scenario.

    Returns:
        Paths that `open_folder` takes, sorted by name. Folders that are no scenario are left out.

    Raises:
        DataError: if there is none.
    """
    root = as_path(root)
    _check_folder(root)
    whole = Path(os.path.abspath(root))  # "." has no name
    if _is_scenario(root) or (is_visa_object(root) and whole.name in visa_objects(whole.parent)):
        return [root]
    if found := _scenarios(root):
        return found
    raise DataError(
        f"{root} holds no scenario: name a folder whose folders hold train/{GOOD} or {FILE}, or "
        "the VisA folder that holds split_csv."
    )


def is_plain_folder(path: str | os.PathLike) -> bool:
    """Whether a folder is none of a benchmark's, so that its folders' names decide."""
    path = as_path(path)
    layout = os.path.lexists(path / FILE) or train_good(path) or is_visa_object(path)
    return os.path.isdir(path) and not layout


def good_images(path: str | os.PathLike) -> list[Path]:
    """The images of good parts in a folder that is no benchmark's scenario, none held out.

    Raises:
        DataError: if there is none, the folder holds a scenario or several, or it cannot be told
            which images show good parts.
    """
    path = as_path(path)
    _check_folder(path)
    if not is_plain_folder(path):
        raise DataError(
            f"{path} is a whole scenario: name a folder of good images in it, for example "
            f"{path / TEST / GOOD}."
        )
    return [sample.path for sample in _read_plain(path).train]


def _read_plain(path: Path) -> Found:
    if scenarios := _scenarios(path):
        raise DataError(
            f"{path} holds several scenarios: name one of them, for example {scenarios[0]} "
            f"(found {', '.join(child.name for child in scenarios)})."
        )
    require_folder(path / TRAIN / GOOD)  # or a file is in its place, which is an error
    return read_by_names(path)


def _scenarios(root: Path) -> list[Path]:
    objects = visa_objects(root)
    return [
        child
        for child in children(root)
        if os.path.isdir(child) and (child.name in objects or _is_scenario(child))
    ]


def _is_scenario(path: Path) -> bool:
    """Whether a folder is a scenario as such: of a benchmark, of good and bad, or with a file."""
    if os.path.lexists(path / FILE) or train_good(path):
        return True
    inside = [meanings(child.name) for child in folders_in(path)]
    bad_beside_good = {NORMAL} in inside and {ANOMALOUS} in inside
    return bad_beside_good and not meanings(path.resolve().name) & {TRAIN, VALIDATION, TEST}


def _check_folder(path: Path) -> None:
    if not os.path.isdir(path):
        problem = missing(path) or "is a file, not a folder"
        raise DataError(
            f"The dataset folder {path} {problem}: name a folder that holds train/{GOOD}, or "
            "images of good parts alone."
        )
