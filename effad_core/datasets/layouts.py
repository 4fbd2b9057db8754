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
from pathlib import Path

from .images import SUFFIXES, DataError, list_images
from .loco import CONFIG, read_defect_kinds
from .scenario import GOOD, Sample, Scenario, good_samples, hold_out
from .visa import VISA, is_visa_object, open_visa, visa_objects

SPLITS = ("train", "validation", "test", "ground_truth")
VERDICTS = (  # words in a folder's name beside which other images are to be expected
    *(GOOD, "ok", "normal", "bad", "ng", "nok", "abnormal", "anomaly", "anomalies", "anomalous"),
    *("defect", "defects", "defective", "faulty", "mask", "masks"),
)
DATASETS = {  # name -> its scenarios
    "mvtec-ad": (
        *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
        *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
    ),
    "mvtec-loco": ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
    "visa": VISA,
}


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
            train/good nor in a folder of good images alone, or defects_config.json or VisA's table
            cannot be used.
    """
    path = Path(path).expanduser()
    if not _has_train_good(path) and is_visa_object(path):
        return open_visa(path, validation_fraction=validation_fraction, seed=seed)
    if not _has_train_good(path):
        return _open_good_images(path, validation_fraction, seed)
    train = good_samples(list_images(path / "train" / GOOD))
    if (path / "validation").is_dir():
        validation = good_samples(list_images(path / "validation" / GOOD))
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
    root = Path(root).expanduser()
    _check_folder(root)
    if _has_train_good(root) or (is_visa_object(root) and root.name in visa_objects(root.parent)):
        return [root]
    if found := _scenarios(root):
        return found
    raise DataError(
        f"{root} holds no scenario: name a folder whose folders hold train/{GOOD}, or the VisA "
        "folder that holds split_csv."
    )


def dataset_name(root: str | os.PathLike) -> str:
    """Which dataset a folder of scenarios is, judged by the names of the scenarios in it.

    Args:
        root: as in `list_scenarios`; it need not hold all scenarios of its dataset.

    Returns:
        "mvtec-ad", "mvtec-loco" or "visa" if all scenarios are of that dataset (and, of MVTec
        LOCO, bring validation images), else the folder's own name.

    Raises:
        DataError: as `list_scenarios`.
    """
    scenarios = list_scenarios(root)
    for name, members in DATASETS.items():
        if {path.name for path in scenarios} <= set(members) and (
            name != "mvtec-loco" or all((path / "validation").is_dir() for path in scenarios)
        ):
            return name
    return Path(root).expanduser().resolve().name


def _scenarios(root: Path) -> list[Path]:
    objects = visa_objects(root)
    return sorted(
        child
        for child in root.iterdir()
        if not child.name.startswith(".")
        and child.is_dir()
        and (_has_train_good(child) or child.name in objects)
    )


def _has_train_good(path: Path) -> bool:
    return (path / "train" / GOOD).is_dir()


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"The dataset folder {path} {problem}: name a folder that holds train/{GOOD}, or "
            "images of good parts alone."
        )


def _open_good_images(path: Path, validation_fraction: float, seed: int) -> Scenario:
    """A folder without layout: all images in it and below it are of good parts."""
    _check_folder(path)
    if scenarios := _scenarios(path):
        raise DataError(
            f"{path} holds several scenarios: name one of them, for example {scenarios[0]} "
            f"(found {', '.join(child.name for child in scenarios)})."
        )
    good = path / "train" / GOOD
    try:
        images = list_images(path, recursive=True)
    except DataError:
        raise DataError(
            f"{path} has no train/{GOOD} and holds no image: create {good} and put images of good "
            "parts into it."
        ) from None
    parents = {image.relative_to(path).parent for image in images}
    folders = sorted({name for parent in parents for name in parent.parts})
    folders += [name for name in SPLITS if (path / name).is_dir() and name not in folders]
    for name in folders:
        if name.lower() in SPLITS:
            raise DataError(
                f"{path} holds images and a folder {name}, but no train/{GOOD}: put the images of "
                f"good parts into {good}, or name a folder that holds nothing else."
            )
        if set(re.findall(r"[^\W\d_]+", name.lower())) & set(VERDICTS):
            raise DataError(
                f"{path} holds images in a folder {name}, so that not all of them may show good "
                f"parts: name the folder of the good ones, or put these into {good}."
            )
    train, validation = hold_out(good_samples(images), validation_fraction, seed)
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
    kinds = read_defect_kinds(path / CONFIG) if (path / CONFIG).exists() else ()
    samples = []
    for name in types:
        images = list_images(path / "test" / name)
        if name == GOOD:
            samples += good_samples(images)
        elif name in truth:
            masks = _masks_by_stem(path / "ground_truth" / name)
            for image in images:
                if image.stem not in masks:
                    folder = path / "ground_truth" / name
                    raise DataError(
                        f"The test image {image} has no mask: add "
                        f"{folder / f'{image.stem}_mask.png'}, or remove {folder} to evaluate "
                        "without masks."
                    )
                samples.append(Sample(image, 1, name, masks[image.stem], kinds))
        else:
            samples += [Sample(image, 1, name) for image in images]
    return tuple(samples)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in test or ground_truth; images that lie beside them are an error."""
    if not folder.is_dir():
        return []
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    for child in children:
        if child.suffix.lower() in SUFFIXES and not child.is_dir():
            raise DataError(
                f"{child} lies directly in {folder.name}: move it into {folder}/<type>, where "
                f"<type> is {GOOD} or the kind of anomaly."
            )
    return [child.name for child in children if child.is_dir()]


def _masks_by_stem(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Mask files of ground_truth/<type> by the stem of their test image, in any of the layouts."""
    masks = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            masks[child.name] = tuple(list_images(child))
        elif child.suffix.lower() in SUFFIXES and not child.name.startswith("."):
            masks[child.stem.removesuffix("_mask")] = (child,)
    return masks
