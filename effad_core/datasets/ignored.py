"""What lies in a scenario's folder and is not used, in lines that say how much and why."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .folder_names import system_reason
from .images import SUFFIXES

CAMERA = frozenset({".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"})


def below(root: Path, folders: Iterable[Path], reason: str, what: str = "image") -> tuple[str, ...]:
    """A line for each folder: how many images it gave up, and why.

    Args:
        root: folders are named from here.
        folders: the folder of each image, so one as often as it has images.
        reason: why they are left out.
        what: "image" or another word for them.
    """
    lines = []
    for folder, number in sorted(Counter(folders).items()):
        name = folder.relative_to(root).as_posix()
        place = f"directly in {root.name or root}" if name == "." else f"in {name}"
        plural = what if number == 1 else f"{what}s"
        lines.append(f"{number} {plural} {place}: {reason}")
    return tuple(lines)


def ignored_files(root: Path) -> tuple[str, ...]:
    """What systems and NAS put below a folder, and images in formats that are not read.

    Args:
        root: the folder; links are followed as `find_images` does.

    Returns:
        Lines such as "12 files in @eaDir: thumbnails of a Synology NAS".
    """
    found, others, seen = Counter(), Counter(), set()
    formats = {*Image.registered_extensions(), ".gif", *CAMERA} - SUFFIXES
    for parent, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for name in folders:
            if reason := system_reason(name):
                files = [file for _, _, some in os.walk(Path(parent, name)) for file in some]
                found[f"in {name}", reason] += sum(map(_is_image, files))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if _is_image(name) and (reason := system_reason(name)):
                hidden = reason == "hidden"
                found["whose names begin with a dot" if hidden else "beside images", reason] += 1
            elif suffix in formats and not system_reason(name):
                others[suffix] += 1
        folders[:] = [name for name in folders if not system_reason(name)]
    lines = [
        f"{number} {'file' if number == 1 else 'files'} {place}: {reason}"
        for (place, reason), number in sorted(found.items())
        if number
    ]
    if others:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()))
        lines.append(f"{kinds}: formats that are not read in folders, save them as PNG")
    return tuple(lines)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
