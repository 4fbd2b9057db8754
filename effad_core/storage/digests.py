"""Digests of files: 16 digits for what a file holds, kept for as long as the file stays as it is.

A run is recognised by the content of its images, not by their names. Reading thousands of images at
each call would take too long, so the digests are kept in a cache, one file for each folder of
images, in `~/.cache/effad_core/digests` (or in `digests` below the folder that the environment
variable EFFAD_CACHE names). Whoever deletes or damages the cache loses nothing but time.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from effad_core.errors import DataError, RunError, printable
from effad_core.storage.files import write_text

from tqdm.auto import tqdm

Inventory = Sequence[tuple[str, str]]  # (name, digest) of each image, in order
RACY = 2 * 10**9  # nanoseconds; FAT, the coarsest of the file systems, counts in steps of 2 seconds


def digest(content: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a text.

    Example:
        >>> digest("EfficientAD")
        '5b000f4d9341b3cf'
    """
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def inventory(paths: Iterable[str | os.PathLike]) -> list[tuple[str, str]]:
    """Name and digest of each file.

    Args:
        paths: files.

    Returns:
        For each path its name below the folder that all of them share, and 16 hexadecimal digits
        of the SHA-256 of the file's bytes.

    Raises:
        DataError: if a file is missing, cannot be read, or is no regular file.
    """
    names, root = names_below(paths)
    cache = _cache_file(root)
    known = _read(cache)
    found, lasting = {}, {}
    for name in tqdm(names, "reading images to recognise them", delay=2, leave=False):
        if name not in found:
            entry = _entry(root + name, known.get(name))
            found[name] = entry[-1]
            if entry[0] is not None:
                lasting[name] = entry
    if not lasting.items() <= known.items():
        others = known.keys() - found.keys()
        lasting |= {name: known[name] for name in others if os.path.exists(root + name)}
        _write(cache, lasting)
    return [(name, found[name]) for name in names]


def names_below(paths: Iterable[str | os.PathLike]) -> tuple[list[str], str]:
    """The files' names below the folder that all of them share, and that folder.

    Args:
        paths: files.

    Returns:
        Names, with slashes on every system, and the folder, which ends with a separator: folder +
        name opens the file. The folder is empty where the files share none, on several drives of
        Windows.
    """
    whole = [os.path.abspath(path) for path in paths]
    try:
        root = os.path.join(os.path.commonpath({os.path.dirname(path) for path in whole}), "")
    except ValueError:  # no paths, or several drives
        root = ""
    return [path[len(root) :].replace(os.sep, "/") for path in whole], root


def combined(images: Inventory) -> str:
    """One digest of the images' contents and their order; their names do not count."""
    return digest("\n".join(content for _, content in images))


def difference(before: Mapping[str, Inventory], now: Mapping[str, Inventory]) -> str:
    """What differs between two sets of images, in words.

    Args:
        before, now: the images of each split, by the split's name.

    Returns:
        For example "3 of 120 training and validation images have other content, the first is
        007.png".
    """
    old, new = ({name: d for split in s.values() for name, d in split} for s in (before, now))
    all_new = f"of {len(new)} {' and '.join(now)} images"
    parts = (
        (
            [name for name in new if name in old and old[name] != new[name]],
            f"{all_new} has other content",
            f"{all_new} have other content",
        ),
        ([name for name in new if name not in old], "image was added", "images were added"),
        ([name for name in old if name not in new], "image is missing", "images are missing"),
    )
    found = [
        f"{len(names)} {one if len(names) == 1 else several}, the first is {printable(names[0])}"
        for names, one, several in parts
        if names
    ]
    return "; ".join(found) or "the same images in another order, or held out in another way"


def _entry(path: str, known: Sequence | None) -> tuple:
    """What `_stamp` says of a file, and the digest of its content.

    Of a file that was changed in the last two seconds the stamp is None, so that its entry is not
    kept: if it is changed again before the clock of the file system goes on, its times stay the
    same, and nothing tells the two contents apart. (Git calls such entries racily clean.)
    """
    try:
        status = os.stat(path)
        if known is not None and known[:-1] == _stamp(status):
            return known
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            raise OSError(0, "it is no regular file")
        started = time.time_ns()
        with open(path, "rb") as file:
            before = _stamp(os.fstat(file.fileno()))
            content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            after = _stamp(os.fstat(file.fileno()))
    except OSError as error:
        raise DataError(
            f"The image {path} cannot be opened ({error.strerror}): check the path and its "
            "permissions."
        ) from None
    lasts = before == after and max(after[1], after[2]) + RACY < started
    return (*(after if lasts else (None,)), content)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells a changed file from the one before: size, two times, number on the disk.

    A program may set the first time back after it changed the file, as `cp -p` does; the second
    time is the system's own.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _cache_file(root: str) -> Path | None:
    """Of a folder of images; None if the system does not say where this user's home is."""
    folder = os.environ.get("EFFAD_CACHE")
    if not folder:
        above = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        folder = os.path.join(above, "effad_core")
    folder = os.path.expanduser(folder)
    if folder.startswith("~"):
        return None
    return Path(os.path.abspath(folder), "digests", f"{digest(root)}.json")


def _read(cache: Path | None) -> dict[str, tuple]:
    """What a cache's file holds; nothing if it is missing or damaged."""
    with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        checksum, _, text = cache.read_text(encoding="utf-8").partition("\n")
        if checksum == digest(text):
            return {name: tuple(entry) for name, entry in json.loads(text).items()}
    return {}


def _write(cache: Path | None, entries: Mapping[str, tuple]) -> None:
    """Write a cache's file; without it, the next call reads the images again."""
    if cache is not None:
        text = json.dumps(entries)
        with suppress(OSError, RunError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, f"{digest(text)}\n{text}")
