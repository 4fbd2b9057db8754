"""Folders or files that the user names: good parts, bad parts, good ones to test on, masks.

In a call, `open_scenario(normal="ok", anomalous=["scratch", "dent"])`; as options of a command,
`--normal ok --anomalous scratch dent`; or as a file `scenario.toml` in the folder of a scenario:

normal = "ok"                          # paths start at the folder of this file
anomalous = ["scratch", "dent"]        # optional, as are the next two
normal_test = "more/ok"
masks = "masks"
"""

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from effad_core.errors import DataError
from effad_core.storage.files import as_path

from .folder_names import ANOMALOUS, MASK, NORMAL, UNKNOWN, meanings
from .ignored import below, ignored_files
from .images import SUFFIXES, find_images, list_images, missing
from .masks import pair_masks, require_masks, set_aside
from .scenario import GOOD, Sample, good_samples
from .verdicts import MADE, Found

KEYS = ("normal", "anomalous", "normal_test", "masks")
FILE = "scenario.toml"

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def read_chosen(chosen: Mapping[str, Paths | None]) -> tuple[str, Found]:
    """Read the images of the folders and files that were named.

    Args:
        chosen: by name of `KEYS` a folder (with the folders below it), an image file, or several
            of them. `normal` is needed.

    Returns:
        A name for the scenario, that of the folder which holds them all, and what was found.

    Raises:
        DataError: if there is no normal image, a path does not exist, a folder holds no image, or
            the name of a folder below a named one contradicts it.
    """
    items = {key: _items(key, chosen.get(key)) for key in KEYS}
    if not items["normal"]:
        raise DataError("there is no folder of normal images: name one as normal.")
    named_masks = _masks(items["masks"])
    ignored, folders, images, masks = (), {}, {}, {}
    for key in KEYS[:3]:
        images[key] = []
        for item in items[key]:
            verdict = ANOMALOUS if key == "anomalous" else NORMAL
            apart = [other for some in items.values() for other in some if other != item]
            files, left, beside = _images(item, verdict, named_masks, apart)
            if key == "anomalous":
                masks |= beside
            else:
                spare = [mask.parent for some in beside.values() for mask in some]
                left += below(item, spare, "masks of good parts", "mask")
            images[key] += files
            ignored += left
            top = Path(os.path.abspath(item if item.is_dir() else item.parent))
            folders |= {
                file: (top.name, *Path(os.path.abspath(file)).relative_to(top).parts[:-1])
                for file in files
            }
    paired, alone = pair_masks(
        {image: folders[image] for image in images["anomalous"]}, named_masks
    )
    if both := next((image for image in paired if image in masks), None):
        raise DataError(f"{both} has a mask beside it and another among the masks: keep one.")
    masks |= paired
    if alone and not paired:
        raise DataError(
            f"{alone[0]} and the other masks fit no anomalous image: call each like its image."
        )
    if alone:
        ignored += (f"{len(alone)} masks: no anomalous image has these",)
    test, kinds = good_samples(images["normal_test"]), {}
    for image in images["anomalous"]:
        kinds.setdefault(_kind(folders[image]), []).append(image)
    for kind, found in sorted(kinds.items()):
        require_masks(found, masks, kind)
        test += tuple(Sample(image, 1, kind, masks.get(image, ())) for image in found)
    places = [item.parent if item.is_file() else item for some in items.values() for item in some]
    root = os.path.commonpath([os.path.abspath(place) for place in places])
    source = "; ".join(
        f"{key}: {', '.join(map(str, some[:5]))}{' and more' if len(some) > 5 else ''}"
        for key, some in items.items()
        if some
    )
    train = good_samples(images["normal"])
    return Path(root).name or "images", Found(
        train, (), test, source, tuple(dict.fromkeys(ignored))
    )


def read_file(folder: Path) -> Found:
    """Read the folders that `scenario.toml` names.

    Args:
        folder: holds the file.

    Raises:
        DataError: if the file cannot be read, has a key that is not understood or a value that is
            no path, and as `read_chosen`.
    """
    path = folder / FILE
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as TOML ({error}): write lines such as normal = {GOOD!r}."
        ) from None
    for key, value in content.items():
        if key not in KEYS:
            near = get_close_matches(key, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(KEYS)}."
            raise DataError(f"{path} has a key {key!r}: {hint}")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, str) and one for one in values):
            raise DataError(f"{path} has a {key} that is no path: write {key} = {GOOD!r}.")
        content[key] = [folder / as_path(one) for one in values]
    if "normal" not in content:
        raise DataError(f"{path} names no normal images: add a line such as normal = {GOOD!r}.")
    try:
        return read_chosen(content)[1]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options `--normal`, `--anomalous`, `--normal-test` and `--masks`."""
    group = parser.add_argument_group("instead of one folder, folders or files by what they hold")
    for key, what in zip(
        KEYS,
        (
            "good parts to train on",
            "bad parts to test on",
            "good parts to test on",
            "masks of the bad parts, called like their images",
        ),
        strict=True,
    ):
        option = f"--{key.replace('_', '-')}"
        group.add_argument(option, nargs="+", action="extend", metavar="PATH", help=what)


def given(args: argparse.Namespace) -> dict[str, list[str]]:
    """Which of these options were given, as keywords of `open_scenario`."""
    return {key: getattr(args, key) for key in KEYS if getattr(args, key)}


def _items(key: str, paths: Paths | None) -> list[Path]:
    if paths is None:
        return []
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    items = [as_path(path) for path in several]
    for item in items:
        if problem := missing(item):
            raise DataError(f"{item}, named as {key}, {problem}: name an existing folder or file.")
        if not item.is_dir() and item.suffix.lower() not in SUFFIXES:
            raise DataError(f"{item}, named as {key}, is neither a folder nor an image file.")
    return items


def _images(
    item: Path, verdict: str, named_masks: Mapping, apart: Sequence[Path]
) -> tuple[list[Path], tuple[str, ...], dict]:
    """Images of a folder or file, lines on what was left out of it, and the masks beside them.

    Other folders and files that were named, `apart`, are no part of a folder that they lie in.
    """
    if not item.is_dir():
        return [item], (), {}
    opposite = ANOMALOUS if verdict == NORMAL else NORMAL
    kept, masks = [], []
    whole = os.path.abspath(item)
    inside = [other for other in map(os.path.abspath, apart) if Path(other).is_relative_to(whole)]
    for file in list_images(item, recursive=True):
        if any(Path(os.path.abspath(file)).is_relative_to(other) for other in inside):
            continue
        names = file.relative_to(item).parts[:-1]
        said = frozenset().union(*map(meanings, names))
        if MASK in said or file in named_masks:
            masks += () if file in named_masks else (file.parent,)
            continue
        if opposite in said:
            raise DataError(
                f"{file.parent} lies in {item}, which was named as {verdict}, but is called "
                f"otherwise: name the folders of {verdict} images one by one."
            )
        kept.append(file)
    images, beside, made = set_aside(kept)
    left = (
        *ignored_files(item),
        *below(item, masks, "the folder's name says masks; name it as masks to use it"),
        *below(item, [file.parent for file in made], MADE),
    )
    if not images:
        raise DataError(f"The folder {item} holds masks alone, no image of a {verdict} part.")
    return images, left, beside


def _masks(items: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Each mask with the names of the folders that it lies in, below the one that was named."""
    masks = {}
    for item in items:
        files = find_images(item, recursive=True) if item.is_dir() else [item]
        if not files:
            raise DataError(f"The folder {item}, named as masks, holds no image.")
        for file in files:
            parts = file.relative_to(item).parts[:-1] if item.is_dir() else ()
            masks[file] = tuple(name for name in parts if MASK not in meanings(name))
    return masks


def _kind(folders: tuple[str, ...]) -> str:
    """The last folder that says something, else the one that was named; "good" is for good ones."""
    telling = [name for name in folders if meanings(name) & {ANOMALOUS, UNKNOWN}] or [folders[0]]
    return ANOMALOUS if telling[-1] in ("", GOOD) else telling[-1]
