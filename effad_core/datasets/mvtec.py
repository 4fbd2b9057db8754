"""A scenario with train/good: MVTec AD's layout and its kin, in any of the words understood.

<folder>/train/good/*.png                                    required, normal images
<folder>/validation/good/*.png                               optional (MVTec LOCO, MVTec AD 2)
<folder>/test/good/*.png, <folder>/test/<type>/*.png         optional
<folder>/ground_truth/<type>/<stem>_mask.png                 optional; MVTec AD
<folder>/ground_truth/<type>/<stem>/*.png                    the same; MVTec LOCO, one per defect
<folder>/ground_truth/<type>/<stem>.png                      the same; BTAD, VisA's split script
<folder>/test_public/ground_truth/bad/<stem>_mask.png        the same; MVTec AD 2
<folder>/test/<type>/<stem>_mask.png, <stem>_GT.png          the same, beside the images
<folder>/defects_config.json                                 optional; MVTec LOCO (see `loco`)

Two folders that mean the same are refused, but test/good and test/ok, whose images go together.
"""

import os
import unicodedata
from pathlib import Path

from effad_core.errors import DataError

from .folder_names import (
    ANOMALOUS,
    MASK,
    NORMAL,
    PRIVATE,
    TEST,
    TRAIN,
    UNCLEAR,
    VALIDATION,
    meanings,
    system_reason,
    without_mask_word,
)
from .ignored import below, ignored_files
from .images import SUFFIXES, find_images, list_images, missing, refuse_folder
from .loco import CONFIG, read_defect_kinds
from .masks import pair_masks, require_masks, set_aside
from .scenario import GOOD, Sample, good_samples
from .verdicts import MADE, SETTLE, Found, check_no_masks

SPLITS = (TRAIN, VALIDATION, TEST, "ground_truth")
NO_PLACE = f"no part of a layout with train/{GOOD}"


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, none if it cannot be opened."""
    try:
        with os.scandir(folder) as entries:
            found = [Path(folder, e.name) for e in entries if not system_reason(e.name)]
    except OSError:
        return []
    return sorted(child for child in found if os.path.isdir(child))


def train_good(path: Path) -> list[Path]:
    """The folders train/good, in any of the words for both."""
    trains = [child for child in folders_in(path) if meanings(child.name) == {TRAIN}]
    return [
        good for train in trains for good in folders_in(train) if meanings(good.name) == {NORMAL}
    ]


def children(folder: Path) -> list[Path]:
    """What lies in a folder, without what systems put there, sorted."""
    try:
        return sorted(child for child in folder.iterdir() if not system_reason(child.name))
    except OSError as error:
        refuse_folder(error)


def require_folder(path: Path) -> bool:
    """Whether there is a folder; anything else in its place is an error."""
    if os.path.lexists(path) and not os.path.isdir(path):
        problem = missing(path) or "is a file, not a folder"
        raise DataError(f"{path} {problem}: make it a folder, or remove it.")
    return os.path.isdir(path)


def read_layout(path: Path) -> Found:
    """Read a folder with train/good.

    Raises:
        DataError: if a folder or mask is missing or empty, a folder is there twice, images lie
            deeper than the layout has them or where it is not known whether they are good, or
            defects_config.json cannot be used.
    """
    for name in SPLITS:
        require_folder(path / name)
    roles = {}
    for child in folders_in(path):
        said = meanings(child.name)
        role = next((role for role in (TRAIN, VALIDATION, TEST, MASK) if said == {role}), None)
        if PRIVATE in said:
            role = PRIVATE
        elif role is None and said & {NORMAL, ANOMALOUS, UNCLEAR, TRAIN, VALIDATION, TEST, MASK}:
            role = _misplaced(path, child)
        if role != MASK or _find(child):  # a folder of labels may hold texts alone
            roles.setdefault(role, []).append(child)
    for role in (TRAIN, VALIDATION, TEST, MASK):
        if len(roles.get(role, ())) > 1:
            first, second = roles[role][:2]
            raise DataError(f"{first} and {second} both mean {role}: keep one of them.")
    train, ignored = _good_of(path, roles[TRAIN][0])
    validation, more = _good_of(path, *roles[VALIDATION]) if VALIDATION in roles else ((), ())
    test, rest = _test_samples(path, *roles.get(TEST, [path / TEST]), roles.get(MASK, []))
    reasons = {PRIVATE: "a test set whose ground truth is not public"}
    for role in (PRIVATE, None):
        outside = [image.parent for one in roles.get(role, ()) for image in _find(one)]
        ignored += below(path, outside, reasons.get(role, NO_PLACE))
    direct = [image.parent for image in find_images(path)]
    ignored += below(path, direct, NO_PLACE)
    return Found(
        train,
        validation,
        test,
        f"the folder {path}",
        (*ignored_files(path), *ignored, *more, *rest),
    )


def _find(folder: Path) -> list[Path]:
    return find_images(folder, recursive=True)


def _misplaced(path: Path, child: Path) -> None:
    """Refuse images beside train in a folder whose name says something that has no place there."""
    if _find(child):
        raise DataError(
            f"{child} lies beside {path / TRAIN}, where it is not known what it is for: move it "
            f"to {path / TEST}/<type> (or to {path / TRAIN / GOOD}), away, or use {SETTLE}."
        )


def _good_of(root: Path, split: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The samples of a split of good images alone, and lines on what else lies in it."""
    inside = folders_in(split)
    good = [child for child in inside if meanings(child.name) == {NORMAL}]
    if not good:
        list_images(split / GOOD)  # which is an error
    images, ignored = [], ()
    for folder in good or [split / GOOD]:
        found, _, left = _images(root, folder, "masks of good parts")
        images += found
        ignored += left
    for child in inside:
        if child in good or not (files := _find(child)):
            continue
        said = meanings(child.name)
        if not said & {ANOMALOUS, MASK} or UNCLEAR in said:
            raise DataError(
                f"{child} lies beside {good[0]} and does not say whether its parts are good: move "
                f"its images into {good[0]}, or away, or use {SETTLE}."
            )
        reason = "masks of good parts" if MASK in said else "bad parts, which are not trained on"
        ignored += below(root, [file.parent for file in files], reason)
    if direct := set_aside(find_images(split))[0]:
        raise DataError(f"{direct[0]} lies directly in {split.name}: move it into {good[0]}.")
    check_no_masks(images)
    return good_samples(images), ignored


def _images(
    root: Path, folder: Path, masks_are: str | None = None
) -> tuple[list[Path], dict[Path, tuple[Path, ...]], tuple[str, ...]]:
    """The images of a folder of a layout, their masks, and lines on what was left out.

    Masks lie beside the images or in a folder below that is called masks. Anything else below it
    is an error. With `masks_are` the masks are left out, for that reason.
    """
    files, inside = [], {}
    for image in _find(folder):
        if image.parent == folder:
            files.append(image)
        elif MASK in frozenset().union(*map(meanings, image.relative_to(folder).parts[:-1])):
            inside[image] = ()
        else:
            raise DataError(
                f"{image} lies in a folder below {folder}: move it up into {folder}, or away."
            )
    if not files:
        list_images(folder)  # which is an error
    images, masks, made = set_aside(files)
    ignored = below(root, [path.parent for path in made], MADE)
    if masks_are:
        spare = [mask.parent for some in (inside, *masks.values()) for mask in some]
        return images, {}, (*ignored, *below(root, spare, masks_are, "mask"))
    paired, alone = pair_masks(dict.fromkeys(images, ()), inside)
    if twice := next((image for image in paired if image in masks), None):
        raise DataError(f"{twice} has a mask beside it and one in a folder: keep one of them.")
    ignored += below(root, [mask.parent for mask in alone], "no image here has these", "mask")
    return images, masks | paired, ignored


def _test_samples(
    root: Path, test: Path, truths: list[Path]
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The samples of the folder of test images, and lines on what was left out."""
    types = _subfolders(test)
    truths = truths + [test / name for name in types if meanings(name) == {MASK}]
    types = [name for name in types if meanings(name) != {MASK}]
    if len(truths) > 1:
        raise DataError(f"{truths[0]} and {truths[1]} both hold masks: keep one of them.")
    truth = truths[0] if truths else root / "ground_truth"
    with_masks = [name for name in _subfolders(truth) if meanings(name) != {NORMAL}]
    for name in with_masks:
        if name not in types:
            raise DataError(
                f"{truth / name} has masks but there is no {test / name}: "
                "give both folders the same name."
            )
    kinds = read_defect_kinds(root / CONFIG) if os.path.lexists(root / CONFIG) else ()
    samples, ignored = [], ()
    for name in types:
        said = meanings(name)
        if UNCLEAR in said:
            raise DataError(
                f"{test / name} may be read as good or as a kind of anomaly: rename it {GOOD} if "
                "its parts are good, or else say what is wrong with them."
            )
        is_good = said == {NORMAL}
        reason = "masks of good parts" if is_good else "its masks are in " + truth.name
        spare = reason if is_good or name in with_masks else None
        images, masks, left = _images(root, test / name, spare)
        ignored += left
        if is_good:
            samples += good_samples(images)
            continue
        if name in with_masks:
            masks = _masks_of(images, truth / name)
        require_masks(images, masks, name)
        samples += [Sample(image, 1, name, masks.get(image, ()), kinds) for image in images]
    return tuple(samples), ignored


def _masks_of(images: list[Path], folder: Path) -> dict[Path, tuple[Path, ...]]:
    """The masks of all images of one kind of anomaly, from their folder in ground_truth."""
    masks, owners, found = _masks_by_stem(folder), {}, {}
    for image in images:
        stem = _composed(image.stem)
        if stem not in masks:
            raise DataError(
                f"The test image {image} has no mask: add {folder / f'{image.stem}_mask.png'}, or "
                f"remove {folder} to evaluate without masks."
            )
        if owners.setdefault(stem, image) != image:
            raise DataError(
                f"{owners[stem]} and {image} would share a mask: give them different names."
            )
        found[image] = masks[stem]
    return found


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in test or ground_truth; images that lie beside them are an error."""
    if not require_folder(folder):
        return []
    found = children(folder)
    for child in found:
        if problem := missing(child):
            raise DataError(f"{child} {problem}: repair it, or remove it.")
        if child.suffix.lower() in SUFFIXES and not os.path.isdir(child):
            raise DataError(
                f"{child} lies directly in {folder.name}: move it into {folder}/<type>, where "
                f"<type> is {GOOD} or the kind of anomaly."
            )
    return [child.name for child in found if os.path.isdir(child)]


def _masks_by_stem(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Mask files of ground_truth/<type> by the stem of their test image, in any of the layouts."""
    masks = {}
    for child in children(folder):
        if os.path.isdir(child):
            stem, found = child.name, tuple(list_images(child))
        elif child.suffix.lower() in SUFFIXES:
            stem, found = without_mask_word(child.stem), (child,)
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
