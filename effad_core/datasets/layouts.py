"""A folder of images -> Scenario: your own, MVTec AD, MVTec LOCO, VisA.

<folder>/train/good/*.png                                    required, normal images
<folder>/validation/good/*.png                               optional (MVTec LOCO brings it)
<folder>/test/good/*.png, <folder>/test/<type>/*.png         optional
<folder>/ground_truth/<type>/<stem>_mask.png                 optional; MVTec AD
<folder>/ground_truth/<type>/<stem>/*.png                    the same; MVTec LOCO, one per defect
<folder>/ground_truth/<type>/<stem>.png                      the same; VisA after its split script
<folder>/defects_config.json                                 optional; MVTec LOCO (see `loco`)

VisA as it is downloaded has no such folders but a table (see `visa`); it opens the same way.

A folder without train/good that holds images, in it or in folders below it, opens as images of
good parts alone. If one of those folders is called test, good, bad or the like, not all of the
images may be good, which is an error.
"""

import os
import re
import unicodedata
from pathlib import Path

from effad_core.errors import DataError

from .images import SUFFIXES, find_images, list_images, missing, refuse_folder
from .loco import CONFIG, read_defect_kinds
from .scenario import GOOD, Sample, Scenario, good_samples, hold_out
from .visa import is_visa_object, open_visa, visa_objects

SPLITS = ("train", "validation", "test", "ground_truth")
NORMAL = (GOOD, "ok", "normal")
VERDICTS = (  # words in a folder's name beside which other images are to be expected
    *(*NORMAL, "bad", "ng", "nok", "abnormal", "anomaly", "anomalies", "anomalous"),
    *("defect", "defects", "defective", "faulty", "mask", "masks"),
)


def open_folder(
    path: str | os.PathLike, *, validation_fraction: float = 0.1, seed: int = 0
) -> Scenario:
    """Open a folder in one of the layouts above; `train/good` alone, or good images, is enough.

    Args:
        path: the folder, one scenario (of MVTec AD: `.../bottle`; of VisA: `.../candle`).
        validation_fraction: share of the good images to hold out if there is no validation/good.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario, named after the folder. Where all images were taken as good, its source, which
        `Scenario.summary` prints, says so, with their number and the folders that they are from.

    Raises:
        DataError: if the folder or a mask is missing, a folder is empty, images lie neither in
            train/good nor in a folder of good images alone, they lie deeper than a layout has them,
            two of them share a mask, or defects_config.json or VisA's table cannot be used.
    """
    path = Path(os.path.expanduser(path))
    if is_plain_folder(path):
        return _open_good_images(path, validation_fraction, seed)
    _check_folder(path)
    if not _has_train_good(path):
        return open_visa(path, validation_fraction=validation_fraction, seed=seed)
    train = good_samples(_images(path / "train" / GOOD))
    if _is_folder(path / "validation"):
        validation = good_samples(_images(path / "validation" / GOOD))
    else:
        train, validation = hold_out(train, validation_fraction, seed)
    return Scenario(
        name=path.resolve().name,
        train=train,
        validation=validation,
        test=_test_samples(path),
        source=f"the folder {path}",
        licence="the licence of the images in that folder",
    )


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
    root = Path(os.path.expanduser(root))
    _check_folder(root)
    whole = Path(os.path.abspath(root))  # "." has no name
    if _has_train_good(root) or (is_visa_object(root) and whole.name in visa_objects(whole.parent)):
        return [root]
    if found := _scenarios(root):
        return found
    raise DataError(
        f"{root} holds no scenario: name a folder whose folders hold train/{GOOD}, or the VisA "
        "folder that holds split_csv."
    )


def is_plain_folder(path: str | os.PathLike) -> bool:
    """Whether a folder has none of the layouts, so that all of its images are taken as good."""
    path = Path(os.path.expanduser(path))
    return os.path.isdir(path) and not _has_train_good(path) and not is_visa_object(path)


def _scenarios(root: Path) -> list[Path]:
    objects = visa_objects(root)
    return [
        child
        for child in _children(root)
        if os.path.isdir(child) and (_has_train_good(child) or child.name in objects)
    ]


def _has_train_good(path: Path) -> bool:
    return os.path.isdir(path / "train" / GOOD)


def _children(folder: Path) -> list[Path]:
    """What lies in a folder, without hidden files, sorted."""
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        refuse_folder(error)


def _is_folder(path: Path) -> bool:
    """Whether there is a folder; anything else in its place is an error."""
    if os.path.lexists(path) and not os.path.isdir(path):
        problem = missing(path) or "is a file, not a folder"
        raise DataError(f"{path} {problem}: make it a folder, or remove it.")
    return os.path.isdir(path)


def _images(folder: Path) -> list[Path]:
    """The images of a folder of a layout; one that lies deeper is an error."""
    for image in find_images(folder, recursive=True):
        if image.parent != folder:
            raise DataError(
                f"{image} lies in a folder below {folder}: move it up into {folder}, or away."
            )
    return list_images(folder)


def _check_folder(path: Path) -> None:
    if not os.path.isdir(path):
        problem = missing(path) or "is a file, not a folder"
        raise DataError(
            f"The dataset folder {path} {problem}: name a folder that holds train/{GOOD}, or "
            "images of good parts alone."
        )


def good_images(path: str | os.PathLike) -> list[Path]:
    """The images of a folder without layout, in it and below it, all of good parts.

    Raises:
        DataError: if there is none, the folder holds several scenarios, or a folder's name says
            that not all of the images may be good.
    """
    path = Path(os.path.expanduser(path))
    _check_folder(path)
    if scenarios := _scenarios(path):
        raise DataError(
            f"{path} holds several scenarios: name one of them, for example {scenarios[0]} "
            f"(found {', '.join(child.name for child in scenarios)})."
        )
    good = path / "train" / GOOD
    _is_folder(good)  # or a file is in its place, which is an error
    images = find_images(path, recursive=True)
    if not images:
        raise DataError(
            f"{path} has no train/{GOOD} and holds no image: create {good} and put images of good "
            "parts into it."
        )
    parents = {image.relative_to(path).parent for image in images}
    folders = sorted({name for parent in parents for name in parent.parts})
    folders += [name for name in SPLITS if os.path.isdir(path / name) and name not in folders]
    for name in folders:
        if name.lower() in SPLITS:
            raise DataError(
                f"{path} holds images and a folder {name}, but no train/{GOOD}: put the images of "
                f"good parts into {good}, or name a folder that holds nothing else."
            )
    for name in folders:
        if set(re.findall(r"[^\W\d_]+", name.lower())) & set(VERDICTS):
            raise DataError(
                f"{path} holds images in a folder {name}, so that not all of them may show good "
                f"parts: name the folder of the good ones, or put these into {good}."
            )
    return images


def _open_good_images(path: Path, validation_fraction: float, seed: int) -> Scenario:
    images = good_images(path)
    train, validation = hold_out(good_samples(images), validation_fraction, seed)
    parents = {image.relative_to(path).parent for image in images}
    below = sorted(parent.as_posix() for parent in parents if parent.parts)
    included = f" in it and in {', '.join(below[:5])}" if below else " in it"
    if len(below) > 5:
        included += f" and {len(below) - 5} more folders"
    return Scenario(
        name=path.resolve().name,
        train=train,
        validation=validation,
        test=(),
        source=f"the folder {path}; all {len(images)} images{included} are taken as good",
        licence="the licence of the images in that folder",
    )


def _test_samples(path: Path) -> tuple[Sample, ...]:
    types = _subfolders(path / "test")
    truth = [name for name in _subfolders(path / "ground_truth") if name != GOOD]
    for name in truth:
        if name not in types:
            raise DataError(
                f"{path / 'ground_truth' / name} has masks but there is no {path / 'test' / name}: "
                "give both folders the same name."
            )
    kinds = read_defect_kinds(path / CONFIG) if os.path.lexists(path / CONFIG) else ()
    samples = []
    for name in types:
        images = _images(path / "test" / name)
        if name == GOOD:
            samples += good_samples(images)
        elif name.strip().lower() in NORMAL:
            raise DataError(
                f"{path / 'test' / name} would be taken as a kind of anomaly: rename it {GOOD} if "
                "its parts are good, or else say what is wrong with them."
            )
        elif name in truth:
            folder = path / "ground_truth" / name
            masks, owners = _masks_by_stem(folder), {}
            for image in images:
                stem = _composed(image.stem)
                if stem not in masks:
                    raise DataError(
                        f"The test image {image} has no mask: add "
                        f"{folder / f'{image.stem}_mask.png'}, or remove {folder} to evaluate "
                        "without masks."
                    )
                if owners.setdefault(stem, image) != image:
                    raise DataError(
                        f"{owners[stem]} and {image} would share a mask: give them different names."
                    )
                samples.append(Sample(image, 1, name, masks[stem], kinds))
        else:
            samples += [Sample(image, 1, name) for image in images]
    return tuple(samples)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in test or ground_truth; images that lie beside them are an error."""
    if not _is_folder(folder):
        return []
    children = _children(folder)
    for child in children:
        if problem := missing(child):
            raise DataError(f"{child} {problem}: repair it, or remove it.")
        if child.suffix.lower() in SUFFIXES and not os.path.isdir(child):
            raise DataError(
                f"{child} lies directly in {folder.name}: move it into {folder}/<type>, where "
                f"<type> is {GOOD} or the kind of anomaly."
            )
    return [child.name for child in children if os.path.isdir(child)]


def _masks_by_stem(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Mask files of ground_truth/<type> by the stem of their test image, in any of the layouts."""
    masks = {}
    for child in _children(folder):
        if os.path.isdir(child):
            stem, found = child.name, tuple(list_images(child))
        elif child.suffix.lower() in SUFFIXES:
            stem, found = child.stem.removesuffix("_mask"), (child,)
        else:
            continue
        if masks.setdefault(_composed(stem), found) != found:
            raise DataError(
                f"{child} and {masks[_composed(stem)][0]} are masks of the same test image {stem}: "
                f"keep one, or put both into a folder {folder / stem}."
            )
    return masks


def _composed(name: str) -> str:
    """A name as Unicode composes it: macOS may store one of the two files decomposed."""
    return unicodedata.normalize("NFC", name)
