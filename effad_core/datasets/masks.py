"""Which mask belongs to which image: masks beside their images, and masks in folders of their own.

0001.png beside 0001_mask.png, 0001_GT.png or mask_0001.png; masks/0001.png or masks/0001_mask.png
for bad/0001.png; masks/0001/0.png, 1.png and so on where one image has several.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from effad_core.errors import DataError

from .folder_names import MASK, companion, image_key, plain

Masks = dict[Path, tuple[Path, ...]]  # image -> its masks


def set_aside(files: Iterable[Path]) -> tuple[list[Path], Masks, list[Path]]:
    """Separate images from what was made of them and lies beside them.

    A file belongs to an image if its name says so (see `companion`) and that image is in the same
    folder. A file called "label_1.png" alone is an image like any other.

    Args:
        files: image files.

    Returns:
        The images, in the order given; the masks beside them; thumbnails, overlays and the like.

    Raises:
        DataError: if two images could be meant by one mask.
    """
    folders = defaultdict(lambda: defaultdict(list))
    files = list(files)
    for file in files:
        folders[file.parent][image_key(file.stem)].append(file)
    images, masks, made = [], defaultdict(list), []
    for file in files:
        owner, kind = companion(file.stem) or (None, None)
        owners = folders[file.parent].get(owner, [])
        if not owners:
            images.append(file)
        elif kind == MASK:
            masks[_only(owners, file)].append(file)
        else:
            made.append(file)
    return images, {image: tuple(found) for image, found in masks.items()}, made


def pair_masks(
    images: Mapping[Path, tuple[str, ...]], masks: Mapping[Path, tuple[str, ...]]
) -> tuple[Masks, list[Path]]:
    """Find the image of each mask by its name, and by the folders that both lie in.

    Args:
        images: of each image the names of its folders.
        masks: of each mask the names of its folders, without those that say "masks". Each must be
            among the folders of its image.

    Returns:
        The masks of each image that has one, and the masks without an image.

    Raises:
        DataError: if a mask fits two images, or an image has two masks outside of a folder for it.
    """
    by_key = defaultdict(list)
    for image in images:
        by_key[image_key(image.stem)].append(image)

    def fitting(key: str, folders: tuple[str, ...]) -> list[Path]:
        """The images of a name below these folders; those in no other folder go first."""
        needed = set(map(plain, folders))
        inside = {image: set(map(plain, images[image])) for image in by_key[key]}
        exact = [image for image, names in inside.items() if names == needed]
        return exact or [image for image, names in inside.items() if needed <= names]

    found, single, alone = defaultdict(list), {}, []
    for mask, folders in masks.items():
        owner, kind = companion(mask.stem) or (None, None)
        fits = fitting(owner if kind == MASK else image_key(mask.stem), folders)
        if fits:
            image = _only(fits, mask)
            if image in single:
                raise DataError(
                    f"{mask} and {single[image]} are masks of the same test image {image.stem}: "
                    f"keep one, or put both into a folder {mask.parent / image.stem}."
                )
            single[image] = mask
        elif folders and (fits := fitting(image_key(folders[-1]), folders[:-1])):
            image = _only(fits, mask)
        else:
            alone.append(mask)
            continue
        found[image].append(mask)
    return {image: tuple(paths) for image, paths in found.items()}, alone


def _only(images: list[Path], mask: Path) -> Path:
    if len(images) > 1:
        raise DataError(
            f"{images[0]} and {images[1]} would share a mask ({mask}): give them different names."
        )
    return images[0]


def require_masks(images: Iterable[Path], masks: Masks, kind: str) -> None:
    """All images of a kind of anomaly have masks, or none has.

    Raises:
        DataError: for the first image without a mask beside others that have one.
    """
    images = list(images)
    missing = [image for image in images if image not in masks]
    if missing and len(missing) < len(images):
        raise DataError(
            f"The test image {missing[0]} has no mask, but others of the kind {kind} have: add "
            "its mask, or remove theirs to evaluate without masks."
        )
