"""A folder of images -> Scenario: your own, MVTec AD, MVTec LOCO, VisA after its split script.

<folder>/train/good/*.png                                    required, normal images
<folder>/validation/good/*.png                               optional (MVTec LOCO brings it)
<folder>/test/good/*.png, <folder>/test/<type>/*.png         optional
<folder>/ground_truth/<type>/<stem>_mask.png                 optional; MVTec AD
<folder>/ground_truth/<type>/<stem>/*.png                    the same; MVTec LOCO, united
<folder>/ground_truth/<type>/<stem>.png                      the same; VisA
"""

import os
from pathlib import Path

from .images import SUFFIXES, DataError, list_images
from .scenario import GOOD, Sample, Scenario, good_samples, hold_out


def open_folder(
    path: str | os.PathLike, *, validation_fraction: float = 0.1, seed: int = 0
) -> Scenario:
    """Open a folder in the layout above; `train/good` alone is enough.

    Args:
        path: the folder, one scenario (of MVTec AD: `.../bottle`).
        validation_fraction: share of train/good to hold out if there is no validation/good.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario, named after the folder.

    Raises:
        DataError: if the folder, its train/good or a mask is missing, or a folder is empty.
    """
    path = Path(path).expanduser()
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


def _check_train_good(path: Path) -> None:
    if not path.is_dir():
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"The dataset folder {path} {problem}: name a folder that holds train/{GOOD}."
        )
    if (path / "train" / GOOD).is_dir():
        return
    inside = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    scenarios = [child.name for child in inside if (child / "train" / GOOD).is_dir()]
    if scenarios:
        raise DataError(
            f"{path} holds several scenarios: name one of them, for example "
            f"{path / scenarios[0]} (found {', '.join(scenarios)})."
        )
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
                samples.append(Sample(image, 1, name, masks[image.stem]))
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
