"""Unpack the archive of a dataset that you have downloaded, without trusting it.

MVTec AD, MVTec LOCO and VisA need a download and your consent to their licences, so nothing here
downloads them. With the archive on disk:

    effad unpack mvtec_anomaly_detection.tar.xz data/mvtec_ad
"""

import argparse
import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm.auto import tqdm

from .images import DataError, printable
from .layouts import dataset_name, list_scenarios

# SHA-256 of the published archives by file name: anomalib's source lists them, and people who
# downloaded the archives from their publishers report the same.
PUBLISHED = {
    "mvtec_anomaly_detection.tar.xz": (
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
    ),
    "mvtec_loco_anomaly_detection.tar.xz": (
        "9e7c84dba550fd2e59d8e9e231c929c45ba737b6b6a6d3814100f54d63aae687"
    ),
    "VisA_20220922.tar": "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
}
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
OPENERS = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open}
CHUNK = 2**20
MAX_DEPTH, MAX_NAME = 64, 1000  # folders in a member's path, and its characters
LEAST, MOST = 2**30, 64 * 2**30  # bytes that an archive may hold, whatever its size
RATIO = 100  # of what it holds to its own size, between these two
DAMAGED = (
    *(EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error),
    *(gzip.BadGzipFile, NotImplementedError, ValueError, struct.error),
    *(OverflowError, IndexError, RecursionError, MemoryError),  # of headers that are forged
)


def unpack(
    archive: str | os.PathLike,
    folder: str | os.PathLike,
    sha256: str | None = None,
    *,
    max_bytes: int | None = None,
    max_members: int = 1_000_000,
) -> Path:
    """Unpack a .tar, .tar.gz, .tar.xz or .zip into a new folder: all of it, or nothing.

    Only files and folders below `folder` are written; nothing that exists is overwritten. Modes,
    owners and times are not restored, so no file can become setuid. The files are written to a
    hidden folder beside `folder`, which is renamed when the whole archive has been read.

    Args:
        archive: the archive; what kind it is, its content says, not its name.
        folder: what to create; it may exist if it is empty.
        sha256: checksum that the archive must have; by default the published one, for archives
            with a name in `PUBLISHED`.
        max_bytes: refuse archives that hold more; by default 100 times their own size, at least
            1 GiB and at most 64 GiB: images are compressed already.
        max_members: refuse archives of more files and folders.

    Returns:
        The folder.

    Raises:
        DataError: if the archive is missing, damaged, truncated, too large for these limits or
            the disk, has another checksum, or holds a link, a device, a sparse file, a path that
            leads out of the folder or one path twice; if the folder is not empty or cannot be
            written.
    """
    archive, folder = Path(archive).expanduser(), Path(folder).expanduser()
    if not archive.is_file():
        problem = "is a folder" if archive.is_dir() else "does not exist"
        raise DataError(f"The archive {archive} {problem}: name the file that you downloaded.")
    target = Path(os.path.realpath(folder))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(
            f"{folder} exists and is not an empty folder: name a new one, for example "
            f"{folder / archive.name.split('.')[0]}."
        )
    staging = target.with_name(f".{target.name}.unpacking")
    try:
        _check_sha256(archive, sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            staging.mkdir()
        except FileExistsError:
            raise DataError(
                f"{staging} exists, from another unpacking that is running or was killed: wait "
                "for it, or remove that folder."
            ) from None
        try:
            _write(archive, staging, max_bytes, max_members)
            if target.is_dir():
                target.rmdir()
            staging.rename(target)
        except BaseException:  # an interrupt, too, leaves nothing behind
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(
            f"{archive} cannot be unpacked into {folder} ({error}): check the disk and the "
            "permissions there."
        ) from None
    return folder


def _check_sha256(archive: Path, expected: str | None) -> None:
    published = expected is None
    expected = PUBLISHED.get(archive.name) if published else expected.strip().lower()
    if expected is None:
        return
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise DataError(f"'{expected}' is no SHA-256: write its 64 hexadecimal digits.")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        remedy = f", or pass the SHA-256 {found} if you trust this file" if published else ""
        raise DataError(
            f"{archive} has the SHA-256 {found}, not {expected} as {'published' * published}"
            f"{'given' * (not published)}: download it again{remedy}."
        )


def _write(archive: Path, staging: Path, max_bytes: int | None, max_members: int) -> None:
    """Check and write one member after the other; stop at the first that is not harmless."""
    packed, written = archive.stat().st_size, 0
    _check_space(archive, staging, packed)
    if max_bytes is None:
        max_bytes = min(max(LEAST, RATIO * packed), MOST)
    try:
        with archive.open("rb") as raw, _progress(archive) as progress:
            members = _zip_members if raw.read(4) in ZIP else _tar_members
            raw.seek(0)
            for number, (name, size, file) in enumerate(members(archive, raw, staging), 1):
                if number > max_members:
                    raise DataError(
                        f"{archive} holds more than {max_members} files and folders: raise "
                        "max_members if you trust it."
                    )
                path = staging / _checked_name(archive, name)
                if file is None:
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                if written + size > max_bytes:
                    raise DataError(
                        f"{archive} holds more than {max_bytes} bytes: raise max_bytes if you "
                        "trust it."
                    )
                _check_space(archive, staging, size)
                path.parent.mkdir(parents=True, exist_ok=True)
                with file, path.open("xb") as out:
                    shutil.copyfileobj(file, out, CHUNK)
                    written += out.tell()
                    if out.tell() != size:
                        raise EOFError(f"{out.tell()} bytes instead of {size}")
                progress.update(raw.tell() - progress.n)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DataError(
            f"{archive} holds {name!r} twice, or as a file and a folder: download it again."
        ) from None
    except DataError:
        raise
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's; an invalid argument is a place outside of the archive
        raise DataError(
            f"{archive} is truncated, damaged or no .tar, .tar.gz, .tar.xz or .zip archive "
            f"({' '.join(str(error).split())[:200]}): download it again."
        ) from None


def _tar_members(
    archive: Path, raw: BinaryIO, staging: Path
) -> Iterator[tuple[str, int, BinaryIO | None]]:
    """(name, size, content or None for a folder) of each member of a tar, read once, in order."""
    start = raw.read(6)
    raw.seek(0)
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
    source = _TarSource(opener(raw) if opener else raw)
    with tarfile.open(fileobj=source, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them all, however many there are
            if not member.isdir() and not member.isreg():
                kind = "link" if member.issym() or member.islnk() else "device"
                _refuse_kind(archive, member.name, kind)
            if member.issparse():  # its size is a claim that no byte stands behind
                _refuse_kind(archive, member.name, "sparse file")
            if member.size < 0:
                raise tarfile.ReadError(f"a file of {member.size} bytes")
            _checked_name(archive, member.name)
            if hasattr(tarfile, "data_filter"):  # Python's own check, after ours
                tarfile.data_filter(member, str(staging))
            yield member.name, member.size, None if member.isdir() else tar.extractfile(member)
        if source.last != bytes(tarfile.BLOCKSIZE):
            raise EOFError("the archive ends too early")
    for _ in range(64):  # the checksum of a compressed file comes after the padding
        if not source.read(CHUNK):
            return
    raise tarfile.ReadError("more data after the end")


def _zip_members(
    archive: Path, raw: BinaryIO, staging: Path
) -> Iterator[tuple[str, int, BinaryIO | None]]:
    """The same of a zip."""
    with zipfile.ZipFile(raw) as zipped:
        _check_space(archive, staging, sum(info.file_size for info in zipped.infolist()))
        for info in zipped.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                _refuse_kind(archive, info.filename, "link" if stat.S_ISLNK(kind) else "device")
            if info.flag_bits & 1:
                raise DataError(f"{archive} has a password: unpack it with another program.")
            name = info.orig_filename  # Python's filename stops at a zero byte
            yield name, info.file_size, None if name.endswith("/") else zipped.open(info)


class _TarSource:
    """The uncompressed bytes of a tar.

    Python's tarfile takes an archive that breaks off between two members, or a damaged header, for
    the end of the archive. A complete one ends with a block of zeros: hence `last`.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= CHUNK:  # a forged extended header, which would go to memory
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.file.read(size)
        return self.last


def _checked_name(archive: Path, name: str) -> PurePosixPath:
    """The path of a member inside the folder."""
    path = PurePosixPath(name)
    if len(path.parts) > MAX_DEPTH or len(name) > MAX_NAME or re.search(r"[\x01-\x1f\x7f]", name):
        raise DataError(
            f"{archive} holds {name[:60]!r}..., a path that is too long or has control characters: "
            "do not use this archive, nothing was unpacked."
        )
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise DataError(
            f"{archive} holds {name!r}, a path that can lead out of the folder: do not use this "
            "archive, nothing was unpacked."
        )
    return path


def _refuse_kind(archive: Path, name: str, kind: str) -> None:
    raise DataError(
        f"{archive} holds {name!r}, a {kind}, where only files and folders belong: do not use "
        "this archive, nothing was unpacked."
    )


def _check_space(archive: Path, staging: Path, needed: int) -> None:
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise DataError(
            f"{archive} needs {needed} more bytes in {staging.parent}, where {free} are free: "
            "name a folder on a larger disk."
        )


def _progress(archive: Path) -> tqdm:
    total = archive.stat().st_size
    return tqdm(total=total, unit="B", unit_scale=True, desc="unpacking", leave=False)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="effad unpack",
        description="Unpack the archive of a dataset that you have downloaded.",
        epilog="example: effad unpack mvtec_anomaly_detection.tar.xz data/mvtec_ad",
    )
    parser.add_argument("archive", help="a .tar, .tar.gz, .tar.xz or .zip")
    parser.add_argument("folder", help="what to create, for example data/mvtec_ad")
    parser.add_argument("--sha256", help="checksum that the archive must have")
    options = parser.parse_args(arguments)
    try:
        folder = unpack(options.archive, options.folder, options.sha256)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was unpacked.", file=sys.stderr)
        return 130
    print(printable(f"unpacked {options.archive} into {folder}"))
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        try:
            found = list_scenarios(root)
        except DataError:
            continue
        print(printable(f"{dataset_name(root)}: {', '.join(path.name for path in found)}"))
        print(printable(f'open one with open_scenario("{found[0].as_posix()}")'))
        return 0
    print("no scenario found in it: see data/README.md for the layouts")
    return 0
