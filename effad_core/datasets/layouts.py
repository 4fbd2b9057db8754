"""A folder of images -> Scenario: your own, MVTec AD, MVTec LOCO, VisA.

<folder>/train/good/*.png                                    required, normal images
<folder>/validation/good/*.png                               optional (MVTec LOCO brings it)
<folder>/test/good/*.png, <folder>/test/<type>/*.png         optional
<folder>/ground_truth/<type>/<stem>_mask.png                 optional; MVTec AD
<folder>/ground_truth/<type>/<stem>/*.png                    the same; MVTec LOCO, one per defect
<folder>/ground_truth/<type>/<stem>.png                      the same; VisA after its split script
<folder>/defects_config.json                                 optional; MVTec LOCO (see `loco`)

VisA as it is downloaded has no such folders but a table (see `visa`); it opens the same way.
"""

import os
from pathlib import Path

from .images import SUFFIXES, DataError, list_images
from .loco import CONFIG, read_defect_kinds
from .scenario import GOOD, Sample, Scenario, good_samples, hold_out
from .visa import VISA, is_visa_object, open_visa, visa_objects

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
    """Open a folder in one of the layouts above; `train/good` alone is enough.

    Args:
        path: the folder, one scenario (of MVTec AD: `.../bottle`; of VisA: `.../candle`).
        validation_fraction: share of train/good to hold out if there is no validation/good.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario, named after the folder.

    Raises:
        DataError: if the folder, its train/good or a mask is missing, a folder is empty, or
            defects_config.json or VisA's table cannot be used.
    """
    path = Path(path).expanduser()
    if not _has_train_good(path) and is_visa_object(path):
        return open_visa(path, validation_fraction=validation_fraction, seed=seed)
    _check_train_good(path)
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
            f"The dataset folder {path} {problem}: name a folder that holds train/{GOOD}."
        )


def _check_train_good(path: Path) -> None:
    _check_folder(path)
    if _has_train_good(path):
        return
    if scenarios := _scenarios(path):
        raise DataError(
            f"{path} holds several scenarios: name one of them, for example {scenarios[0]} "
            f"(found {', '.join(child.name for child in scenarios)})."
        )
    inside = [child for child in path.iterdir() if not child.name.startswith(".")]
    if any(child.suffix.lower() in SUFFIXES for child in inside):
        raise DataError(
            f"{path} holds images but no train/{GOOD}: put the normal ones into "
            f"{path / 'train' / GOOD}."
        )
    raise DataError(
        f"{path} has no train/{GOOD}: create {path / 'train' / GOOD} and put normal images into it."
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
