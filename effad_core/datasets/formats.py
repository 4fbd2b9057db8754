"""Which of Pillow's formats are pictures, and which files lose detail when they are saved."""

from pathlib import Path

import numpy as np
from PIL import Image

# Pillow knows these, but they are vector graphics (whose interpreter would be started), films,
# tables of measurements, or formats that it can write only.
NO_PICTURES = {
    *("BUFR", "EPS", "FLI", "FPX", "GRIB", "HDF5", "IPTC", "MCIDAS", "MIC", "MPEG", "PALM"),
    *("PDF", "WMF", "XVTHUMB"),
}
WITHOUT_SIGNATURE = {"TGA": (".tga", ".icb", ".vda", ".vst"), "PCD": (".pcd",)}
LOSSY = ("JPEG", "MPO", "AVIF", "DDS", "FTEX", "BLP", "ICNS", "PCD")
LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
MOST_VALUES = 16  # of a mask in JPEG 2000: compression with loss gives many more

Image.init()
FORMATS = tuple(sorted(set(Image.OPEN) - NO_PICTURES - WITHOUT_SIGNATURE.keys()))
SUFFIXES = frozenset(
    suffix
    for suffix, format in Image.registered_extensions().items()
    if format in Image.OPEN and format not in NO_PICTURES
) | {".mpo"}  # which Pillow opens as a JPEG


def formats_of(path: Path) -> tuple[str, ...]:
    """The formats that a file may have, which its content decides.

    Nearly any bytes pass for one of the formats without a signature, so that these count only where
    the file's name says so.
    """
    suffix = path.suffix.lower()
    return FORMATS + tuple(f for f, suffixes in WITHOUT_SIGNATURE.items() if suffix in suffixes)


def lossy_format(path: Path, image: Image.Image) -> str | None:
    """The format in which a file lost detail as it was saved, with its article; None if it did not.

    Args:
        path: the file.
        image: the same, decoded, with its `format` and `info`.
    """
    if image.format in LOSSY:
        name = "JPEG" if image.format == "MPO" else image.format
        return f"an {name}" if name[0] in "AI" else f"a {name}"
    if image.format == "TIFF":
        compression = image.info.get("compression")
        return "a TIFF with JPEG or WebP inside" if compression in LOSSY_IN_TIFF else None
    if image.format == "WEBP":
        return None if _is_lossless_webp(path.read_bytes()) else "a WebP with loss"
    if image.format == "JPEG2000":
        # a lossless transform may still be cut short, which leaves a fringe of values
        whole = _is_reversible(path.read_bytes()) and len(np.unique(image)) <= MOST_VALUES
        return None if whole else "a JPEG 2000 with loss"
    return None


def _is_lossless_webp(content: bytes) -> bool:
    """Whether the first picture of a WebP file is in a chunk VP8L and not in one called VP8."""
    place = 12  # behind "RIFF", the length, "WEBP"
    while place + 8 <= len(content):
        name = content[place : place + 4]
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        if name == b"ANMF":  # a frame: 16 bytes, then chunks of its own
            place += 8 + 16
            continue
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
    return False


def _is_reversible(content: bytes) -> bool:
    """Whether JPEG 2000 is transformed without rounding, by the last byte of its marker COD."""
    place = content.find(b"\xff\x4f\xff\x51") + 2  # behind the start of the codestream
    while place >= 2 and place + 14 <= len(content) and content[place] == 0xFF:
        if content[place + 1] == 0x52:
            return content[place + 13] == 1
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return False
