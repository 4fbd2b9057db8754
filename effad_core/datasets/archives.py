"""Unpack the archive of a dataset that you have downloaded, without trusting it.

MVTec AD, MVTec LOCO and VisA need a download and your consent to their licences, so nothing here
downloads them. With the archive on disk:

    effad unpack mvtec_anomaly_detection.tar.xz data/mvtec_ad
"""

import argparse
import gzip
import hashlib
import lzma
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from effad_core.errors import DataError, command_errors, printable
from effad_core.storage.files import as_path, one_line

from tqdm.auto import tqdm

from .layouts import list_scenarios
from .published import dataset_name

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
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, gzip.BadGzipFile),
    *(EOFError, ValueError, struct.error, OverflowError, IndexError),
    *(RuntimeError, MemoryError),  # of a password, of headers that are forged
    *(FileExistsError, NotADirectoryError, IsADirectoryError),  # of a file that is a folder, too
)


def unpack(
    archive: str | os.PathLike, folder: str | os.PathLike, sha256: str | None = None
) -> Path:
    """Unpack a .tar, .tar.gz, .tar.xz or .zip into a new folder: all of it, or nothing.

    Python's own filter for data keeps every file below `folder`. The files are written to a hidden
    folder beside `folder`, which is renamed when the whole archive has been read.

    Args:
        archive: the archive; what kind it is, its content says, not its name.
        folder: what to create; it may exist if it is empty.
        sha256: checksum that the archive must have; by default the published one, for archives
            with a name in `PUBLISHED`.

    Returns:
        The folder.

    Raises:
        DataError: if the archive is missing, damaged, truncated, larger than the disk has room,
            has another checksum, or a tar holds a link, a device, a sparse file or a path that
            leads out of the folder; if the folder is not empty or cannot be written.
    """
    archive, folder = as_path(archive), as_path(folder)
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
            _write(archive, staging)
            if target.is_dir():
                target.rmdir()
            staging.rename(target)
        except BaseException:  # an interrupt, too, leaves nothing behind
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(
            f"{archive} cannot be unpacked into {folder} ({error}): check the archive, the disk "
            "and the permissions there."
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


def _write(archive: Path, staging: Path) -> None:
    """Write what the archive holds into the empty folder `staging`."""
    needed, free = archive.stat().st_size, shutil.disk_usage(staging).free
    if needed > free:  # images are compressed already: they take about as much as the archive
        raise DataError(
            f"{archive} needs {needed} more bytes in {staging.parent}, where {free} are free: "
            "name a folder on a larger disk."
        )
    with archive.open("rb") as file:
        zipped = file.read(4) in ZIP
    if not zipped and not hasattr(tarfile, "data_filter"):
        raise DataError(f"{archive} needs Python 3.11.4 or newer to be unpacked safely: update it.")
    try:
        with archive.open("rb") as file:
            if zipped:  # zipfile itself keeps all names inside, and makes no links
                zipfile.ZipFile(file).extractall(staging)
                return
            with tarfile.open(fileobj=file, tarinfo=_Header) as content:
                bar = tqdm(content, "unpacking", unit=" files", leave=False)
                content.extractall(staging, _plain(bar), filter="data")
                while content.fileobj.read(2**20):  # the checksum comes after the last file
                    pass
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive} is not safe to unpack ({one_line(error)}): do not use this archive, "
            "nothing was unpacked."
        ) from None
    except DAMAGED as error:
        raise DataError(
            f"{archive} is truncated, damaged, has a password or is no .tar, .tar.gz, .tar.xz or "
            f".zip archive ({one_line(error)}): download it again."
        ) from None


class _Header(tarfile.TarInfo):
    """A header of a tar; tarfile itself takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the end
                raise
            raise tarfile.ReadError(str(error)) from None


def _plain(members: Iterable[tarfile.TarInfo]) -> Iterator[tarfile.TarInfo]:
    """The same members; images need no links, which tarfile's filter takes if they stay inside."""
    for member in members:
        if member.size < 0:  # tarfile would come to the same member for ever
            raise tarfile.ReadError(f"a file of {member.size} bytes")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise tarfile.SpecialFileError(member)
        yield member


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="effad unpack",
        description="Unpack the archive of a dataset that you have downloaded.",
        epilog="example: effad unpack mvtec_anomaly_detection.tar.xz data/mvtec_ad",
    )
    parser.add_argument("archive", help="a .tar, .tar.gz, .tar.xz or .zip")
    parser.add_argument("folder", help="what to create, for example data/mvtec_ad")
    parser.add_argument("--sha256", help="checksum that the archive must have")
    options = parser.parse_args(arguments)
    with command_errors("nothing was unpacked"):
        folder = unpack(options.archive, options.folder, options.sha256)
    print(printable(f"unpacked {options.archive} into {folder}"))
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        try:
            found = list_scenarios(root)
        except DataError:
            continue
        print(printable(f"{dataset_name(root)}: {', '.join(path.name for path in found)}"))
        print(printable(f'open one with open_scenario("{found[0].as_posix()}")'))
        return
    print("no scenario found in it: see data/README.md for the layouts")
