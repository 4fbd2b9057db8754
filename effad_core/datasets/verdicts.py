"""A folder without the layout of a benchmark: its folders' names say what is in them, or nothing.

<folder>/good/*.png, <folder>/bad/*.png      good and bad parts, in any of the words understood
<folder>/normal, abnormal, normal_test, mask       anomalib's Folder with its four names
<folder>/train_good, test_good, test_scratch       splits and verdicts in one name
<folder>/camera1/*.png, <folder>/*.png             names that say nothing: all images are good

A mask beside an image without verdict says which it is: good if the mask is black. Where some
folders' names say something, every image needs a verdict; what cannot be told is refused.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    UNKNOWN,
    VALIDATION,
    companion,
    meanings,
    plain,
    unknown_words,
    without_mask_word,
)
from .ignored import below, ignored_files
from .images import find_images, read_mask_values
from .masks import Masks, pair_masks, require_masks, set_aside
from .scenario import GOOD, Sample, good_samples

SPLITS = (TRAIN, VALIDATION, TEST)
SETTLE = "`effad train --normal FOLDER --anomalous FOLDER` (in Python open_scenario(normal=...))"
PAIRS = ("01", "pf", "ox", "gb", "gn", "na", "tf", "yn", "+-")  # of folders, which may be verdicts
Folders = Mapping[Path, tuple[str, ...]]  # file -> the names of its folders below the root
Said = Mapping[Path, frozenset[str]]  # file -> what these names say
MADE = "thumbnails or overlays of the images beside them"


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        train: normal samples; to hold out from where there are no validation samples.
        validation: normal samples.
        test: samples to evaluate.
        source: the folder, and what was taken for what.
        ignored: as in `Scenario`.
    """

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]
    source: str
    ignored: tuple[str, ...]


def read_by_names(root: Path) -> Found:
    """Read a folder by the names of the folders in it.

    Args:
        root: an existing folder. Its own name says nothing.

    Raises:
        DataError: if it holds no image of a good part, or it cannot be told which images are good.
    """
    files = find_images(root, recursive=True)
    if not files:
        raise DataError(
            f"{root} has no train/{GOOD} and holds no image: create {root / 'train' / GOOD} and "
            "put images of good parts into it."
        )
    folders = {file: file.relative_to(root).parent.parts for file in files}
    said = {file: frozenset().union(*map(meanings, folders[file])) for file in files}
    images, beside, made = set_aside(file for file in files if MASK not in said[file])
    ignored = (*ignored_files(root), *below(root, [path.parent for path in made], MADE))
    empty = [
        child.name
        for child in sorted(root.iterdir())
        if len(meanings(child.name)) == 1 and meanings(child.name) <= {*SPLITS} and child.is_dir()
    ]
    if empty and not any(said[image] & {NORMAL, ANOMALOUS} or image in beside for image in images):
        raise _no_train_good(root, empty[0])
    if not beside and all(names <= {UNKNOWN} for names in said.values()):
        _check_that_names_say_nothing(root, images)
        check_no_masks(images, said_to_be_good=False)
        return Found(good_samples(images), (), (), _all_good(root, images), ignored)
    found = _sorted_by_verdict(root, images, folders, said, beside)
    return replace(found, ignored=ignored + found.ignored)


def _sorted_by_verdict(
    root: Path, images: Sequence[Path], folders: Folders, said: Said, beside: Masks
) -> Found:
    """Each image goes where its folders' names, or its mask, say.

    Args:
        root: the folder.
        images: without masks.
        folders, said: of each file, masks included, the names of its folders and what they say.
        beside: masks beside images.
    """
    masks = {
        file: tuple(name for name in names if MASK not in meanings(name))
        for file, names in folders.items()
        if MASK in said[file]
    }
    ignored = ()
    verdicts = {image: _verdict(root, image, folders[image], said[image]) for image in images}
    to_mask = {image: folders[image] for image in images if verdicts[image] != NORMAL}
    paired, alone = pair_masks(to_mask, masks)
    for image, paths in beside.items():
        if image in paired:
            raise DataError(
                f"{paths[0]} and {paired[image][0]} are masks of the same test image {image.stem}: "
                "keep one."
            )
    spare = [p for i, paths in beside.items() if verdicts[i] == NORMAL for p in paths]
    paired |= {i: paths for i, paths in beside.items() if verdicts[i] != NORMAL}
    for image in images:
        if verdicts[image] is None:
            if image not in paired:
                raise _undecided(root, image, folders, said)
            marked = any(read_mask_values(path)[1] for path in paired[image])
            verdicts[image] = ANOMALOUS if marked else NORMAL
            spare += () if marked else paired.pop(image)
    parts, left = {split: [] for split in SPLITS}, defaultdict(list)
    kinds = defaultdict(list)
    for image in images:
        splits = said[image] & {*SPLITS}
        if PRIVATE in said[image]:
            left["a test set whose ground truth is not public"].append(image.parent)
        elif verdicts[image] == ANOMALOUS:
            if splits & {TRAIN, VALIDATION}:
                left["bad parts, which are not trained on"].append(image.parent)
            else:
                kinds[_kind(folders[image])].append(image)
        elif len(splits) > 1:
            raise DataError(
                f"{image} lies in folders of two splits ({', '.join(sorted(splits))}): keep one."
            )
        else:
            parts[next(iter(splits), TRAIN)].append(image)
    if not parts[TRAIN]:
        raise DataError(
            f"{root} holds no images of good parts to train on, judged by its folders' names: put "
            f"some into {root / 'train' / GOOD}, or say which is which with {SETTLE}."
        )
    check_no_masks(parts[TRAIN])
    test = good_samples(parts[TEST])
    for kind, found in sorted(kinds.items()):
        require_masks(found, paired, kind)
        test += tuple(Sample(image, 1, kind, paired.get(image, ())) for image in found)
    for reason, places in left.items():
        ignored += below(root, places, reason)
    ignored += below(root, [mask.parent for mask in spare], "masks of good parts", "mask")
    ignored += below(root, [mask.parent for mask in alone], "no anomalous image has these", "mask")
    source = f"the folder {root}; good: {_names(root, parts[TRAIN])}"
    if kinds:
        source += f"; anomalous: {_names(root, [i for some in kinds.values() for i in some])}"
    return Found(good_samples(parts[TRAIN]), good_samples(parts[VALIDATION]), test, source, ignored)


def _verdict(root: Path, image: Path, folders: tuple[str, ...], said: frozenset[str]) -> str | None:
    """NORMAL, ANOMALOUS, or None where the names say neither."""
    unclear = next((name for name in folders if UNCLEAR in meanings(name)), None)
    if unclear or {NORMAL, ANOMALOUS} <= said:
        name = unclear or "/".join(folders)
        raise DataError(
            f"{root} holds images in a folder {name}, which may be read as good or as bad: say "
            f"which is which with {SETTLE}."
        )
    if said & {NORMAL, ANOMALOUS}:
        return NORMAL if NORMAL in said else ANOMALOUS
    return ANOMALOUS if PRIVATE in said else None  # a private test set has no verdict


def _kind(folders: tuple[str, ...]) -> str:
    """The kind of anomaly: the last folder that says something, "anomalous" without any."""
    telling = [name for name in folders if meanings(name) & {ANOMALOUS, UNKNOWN}]
    return telling[-1] if telling else ANOMALOUS


def _undecided(root: Path, image: Path, folders: Folders, said: Said) -> DataError:
    """The error message for an image of which neither a name nor a mask says what it is."""
    for name in folders[image]:
        if meanings(name) & {*SPLITS}:
            return _no_train_good(root, name)
    others = (
        name
        for file, names in folders.items()
        for name in names
        if said[file] and meanings(name) - {UNKNOWN}
    )
    telling = next(others, None)
    good = root / "train" / GOOD
    if telling is None:
        return DataError(
            f"{root} holds masks beside some of its images, but none of {image}: put the images of "
            f"good parts into {good}, or say which is which with {SETTLE}."
        )
    place = f"the folder {'/'.join(folders[image])}" if folders[image] else image.name
    return DataError(
        f"{root} holds images in a folder {telling}, so that not all of them may show good parts, "
        f"and {place} does not say: name the folder of the good ones, put these into {good}, or "
        f"use {SETTLE}."
    )


def _no_train_good(root: Path, name: str) -> DataError:
    return DataError(
        f"{root} holds images and a folder {name}, but no train/{GOOD}: put the images of good "
        f"parts into {root / 'train' / GOOD}, or name a folder that holds nothing else."
    )


def _check_that_names_say_nothing(root: Path, images: Sequence[Path]) -> None:
    """Refuse images of which not all may be good although no folder's name is understood."""
    below_of = defaultdict(set)
    for image in images:
        for folder in (image.parent, *image.parent.parents):
            if folder == root:
                break
            below_of[folder.parent].add(folder.name)
    for parent, names in sorted(below_of.items()):
        apart = {unknown_words(name) for name in names}
        direct = any(image.parent == parent for image in images)
        if direct:
            apart.add(())  # images beside the folders are a group of their own
        if len(apart) > 1 or {plain(name) for name in names} in map(set, PAIRS):
            shown = ", ".join(sorted(names)[:5])
            raise DataError(
                f"{parent} holds images {'beside' if direct else 'in'} the folders {shown}, whose "
                f"names do not say whether all show good parts: if they do, use `effad train "
                f"--normal {root}`, else {SETTLE}."
            )
    bad = [image for image in images if _says_bad(image.stem)]
    if bad and len(bad) < len(images):
        raise DataError(
            f"{bad[0]} is called like the image of a bad part: move good and bad parts into "
            f"folders {GOOD} and bad, or use {SETTLE}."
        )


def check_no_masks(images: Sequence[Path], said_to_be_good: bool = True) -> None:
    """Refuse images to train on that may be masks, judged by their files' names.

    What all of them are called ("gas_mask_01", "label_1") says nothing, unless each name ends like
    a mask's in a folder of which nothing else is known.

    Args:
        images: without masks that lie beside their images.
        said_to_be_good: whether their folders' names say so.

    Raises:
        DataError: if some are called like masks, or one differs from another in its suffix alone.
    """
    called = [image for image in images if (companion(image.stem) or ("", ""))[1] == MASK]
    ending = [image for image in called if without_mask_word(image.stem) != image.stem]
    if called and (len(called) < len(images) or (ending and not said_to_be_good)):
        raise DataError(
            f"{called[0]} is called like a mask, but there is no image beside it that it belongs "
            f"to: move it away, or say which images are good with {SETTLE}."
        )
    by_stem = {}
    for image in images:
        other = by_stem.setdefault(image.with_suffix(""), image)
        if other != image and not said_to_be_good:
            raise DataError(
                f"{other} and {image} differ in their suffix alone, so that one may be a mask or a "
                f"copy: keep one of them, or say which is which with {SETTLE}."
            )


def _says_bad(stem: str) -> bool:
    """Whether a file's name has a word for bad parts; "3bad9c" is no such word."""
    kept = " ".join(w for w in re.split(r"[\W_]+", stem) if not re.search(r"\d", w))
    return ANOMALOUS in meanings(kept)


def _all_good(root: Path, images: Sequence[Path]) -> str:
    parents = {image.relative_to(root).parent for image in images}
    folders = sorted(parent.as_posix() for parent in parents if parent.parts)
    included = f" in it and in {', '.join(folders[:5])}" if folders else " in it"
    if len(folders) > 5:
        included += f" and {len(folders) - 5} more folders"
    return f"the folder {root}; all {len(images)} images{included} are taken as good"


def _names(root: Path, images: Sequence[Path]) -> str:
    """The folders of images, at most five of them."""
    names = sorted({os.path.relpath(image.parent, root) for image in images})
    names = ["the folder itself" if name == "." else Path(name).as_posix() for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
