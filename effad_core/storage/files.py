"""Atomic writes, and locks that survive a killed process.

A file is written beside its place under a hidden name, forced onto the disk, and moved there. A
lock belongs to the process that holds it: the system frees it when the process ends, killed or not.
"""

import errno
import glob
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from effad_core.errors import RunError

from filelock import FileLock, Timeout

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}  # of a disk that has none


def as_path(path: str | os.PathLike) -> Path:
    """A path as the user gives it; "~" is the home folder."""
    return Path(os.path.expanduser(path))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then move it there: `path` is never half-written.

    Raises:
        OSError: if it cannot be written; `path` is then what it was, and nothing lies beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then move it there; missing folders are made.

    Raises:
        RunError: if it cannot be written; `path` is then what it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, write)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {reason(error)}, and the same command goes on from "
            "what it held before, which is kept"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        RunError: if it cannot be written.
    """
    write_file(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def check_folder(folder: str | os.PathLike, choice: str) -> None:
    """Refuse a folder into which nothing can be written, before anything is computed for it.

    Args:
        folder: need not exist yet; nothing is created.
        choice: the argument or option that names another, for the error message.

    Raises:
        RunError: if the system does not let a file be made there.
    """
    _check(as_path(folder), as_path(folder), choice)


def check_file(path: str | os.PathLike, choice: str) -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Args:
        path: a file that is to be replaced, or made with the folder it lies in.
        choice: as in `check_folder`.

    Raises:
        RunError: if it is a folder, or the system does not let a file be made there.
    """
    path = as_path(path)
    if path.is_dir():
        raise RunError(f"{path} is a folder, not a file: choose another {choice}")
    _check(path, path.parent, choice)


def _check(path: Path, folder: Path, choice: str) -> None:
    """Make a temporary file in `folder`, or in the first folder above it that exists."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {reason(error)}, or choose another {choice}"
        ) from None


def one_line(error: object) -> str:
    """What an error says, on one line and at most 200 characters long: it may quote the file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def remove_parts(folder: Path, name: str | None = None) -> None:
    """Remove what `replace` was writing into `folder` in processes that were killed.

    Args:
        folder: exists.
        name: of the file that was written; None: of any.
    """
    for part in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.part"):
        number = part.name.split(".")[-2]
        if number.isdecimal() and not _lives(int(number)):
            with suppress(OSError):  # Windows keeps what a living process has open
                part.unlink()


def _lives(process: int) -> bool:
    if os.name == "nt":  # Windows cannot be asked like this
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk, so that a power cut keeps it."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return
    with suppress(OSError):  # not every system can do this with folders
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sync_all(folder: Path) -> None:
    """Force every file below `folder` onto the disk."""
    if hasattr(os, "sync"):  # all disks at once: thousands of files one by one take minutes
        os.sync()
        return
    for path in folder.rglob("*"):
        sync(path)


def reason(error: OSError) -> str:
    """Why a file cannot be written, and what to do about it."""
    if error.errno in FULL:
        return "the disk is full; free some space"
    return f"{error.strerror or error}; check the folder and its permissions"


@contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """Hold the lock that the file `path` stands for while the block runs.

    The file may stay where it is afterwards. One that a killed process left holds nothing.

    Args:
        path: in a folder that exists.
        wait: at most so many seconds until whoever holds it frees it; `math.inf` waits forever.

    Raises:
        BlockingIOError: if another process, or another block of this one, holds it.
        OSError: if the file cannot be made.
    """
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=-1 if wait == math.inf else wait))
        except Timeout:
            raise BlockingIOError(errno.EAGAIN, "is locked", str(path)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the disk of {path.parent} has no locks: start nothing else there meanwhile",
                stacklevel=3,
            )
        yield
