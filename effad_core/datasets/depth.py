"""Images of more than 8 bits: which of their values is white, and how they become 8-bit.

A camera of 10, 12 or 14 bits writes its values into 16-bit files, most often as they are: its white
is 1023, 4095 or 16383, not 65535. Few files say so. One rule holds for all images of a scenario:

1. A file whose header says which value is white has that white: PGM and PPM, JPEG 2000, a TIFF of
   12 bits a sample.
2. All other 16-bit files of a scenario have one white, which its training images decide (see
   `full_scale`) and the detector keeps.
3. Without a scenario, a file's tags decide (sBIT of a PNG, MaxSampleValue of a TIFF), else 65535.
"""

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from effad_core.errors import DataError

import numpy as np
from PIL import Image

WHITE = 65535
BITS = (8, 10, 12, 14, 16)  # of cameras
FEW = 64  # gray levels
MOST_ABOVE = 0.1  # share of an image's pixels that may be brighter than white
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 281, 341  # tags of a TIFF
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True)
class Depth:
    """What a file says of its white.

    Attributes:
        white: the value that is white, whatever other files say; None if that is open.
        tagged: the white by a tag that not every program writes well; None without one.
    """

    white: int | None = None
    tagged: int | None = None


def is_deep(image: Image.Image) -> bool:
    """Whether an image, opened but not decoded, holds whole numbers of more than 8 bits."""
    return image.mode.startswith("I") or bool(low_byte_tiles(image))


def depth_of(image: Image.Image, path: Path | None) -> Depth:
    """What a file says of its white.

    Args:
        image: opened, but not decoded.
        path: the file; None if there is none.
    """
    if image.format == "PPM":  # Pillow scales to 65535 whatever has another maximum
        raw = bool(image.tile) and (image.tile[0][0] == "raw" or image.tile[0][3][-1] == WHITE)
        return Depth() if raw else Depth(white=WHITE)
    if image.format == "JPEG2000" and path is not None:  # the same
        return Depth(white=WHITE) if _jpeg2000_bits(path) < 16 else Depth()
    if image.format == "TIFF":
        bits = _first(image.tag_v2.get(BITS_PER_SAMPLE, 1))
        if 8 < bits < 16:
            return Depth(white=2**bits - 1)
        highest = (image.tag_v2.get(t) for t in (MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE))
        highest = max((_first(value) for value in highest if value is not None), default=0)
        return Depth(tagged=_full(highest)) if 0 < highest < WHITE else Depth()
    if image.format == "PNG" and path is not None:
        bits = _significant_bits(path)
        return Depth(tagged=2**bits - 1) if 8 <= bits < 16 else Depth()
    return Depth()


def low_byte_tiles(image: Image.Image) -> list:
    """How to decode a 16-bit colour image, opened but not decoded, to the lower byte of each value.

    Pillow keeps the upper byte. Asked for the other order of bytes, it keeps the lower one.

    Returns:
        To be set as `image.tile`; empty for an image of another kind.
    """
    tiles = []
    for name, extents, offset, arguments in image.tile if hasattr(image, "tile") else ():
        many = isinstance(arguments, tuple)
        found = re.fullmatch(
            r"((?:RGB|RGBA|RGBX|CMYK);16)([BLN])", str(arguments[0] if many else arguments)
        )
        if not found:
            return []
        other = found[1] + OTHER_ORDER[found[2]]
        tiles.append((name, extents, offset, (other, *arguments[1:]) if many else other))
    return [_like(image.tile[0], tile) for tile in tiles]


def to_8_bit(
    values: np.ndarray, name: object, depth: Depth | None = None, full_scale: int | None = None
) -> np.ndarray:
    """Scale 16-bit integers, or floats in 0..1, of any shape, to uint8 by a fixed factor.

    Args:
        values: of an image.
        name: of the image, for messages.
        depth: what its file says.
        full_scale: the white of the scenario; None if there is none.

    Raises:
        DataError: for values that have no place in 0..255, or if more than a tenth of them are
            above white.
    """
    if values.dtype.kind == "f":
        _check_range(values, 1, "floating-point", name)
        scaled = values.astype(np.float64)
        scaled *= 255  # in place: these are 8 bytes a pixel
        return np.rint(scaled, out=scaled).astype(np.uint8)
    _check_range(values, WHITE, "integer", name)
    depth, highest = depth or Depth(), int(values.max())
    tagged = depth.tagged if highest <= (depth.tagged or 0) else None
    white = depth.white or full_scale or tagged or WHITE
    table = np.rint(np.minimum(np.arange(WHITE + 1), white) * (255 / white)).astype(np.uint8)
    if highest > white:
        _tell_of_brighter_values(values, white, highest, name)
    elif white == WHITE and not (depth.white or full_scale):
        before, after = levels_kept(levels_of(values), white)
        if is_poor(before, after):
            warnings.warn(
                f"{name} keeps {after} of its {before} gray levels, because its values reach "
                f"{highest} and 65535 is taken as white: for a 12-bit camera set full_scale to "
                "4095 (a detector that is trained on such images has it set)",
                stacklevel=4,
            )
    return table[values]


def levels_of(values: np.ndarray) -> np.ndarray:
    """Which of the values 0..65535 occur: boolean, shape (65536,)."""
    present = np.zeros(WHITE + 1, bool)
    present[values.ravel()] = True
    return present


def levels_kept(present: np.ndarray, white: int) -> tuple[int, int]:
    """Number of distinct values before and after they become 8-bit."""
    found = np.minimum(np.flatnonzero(present), white)
    return int(present.sum()), len(np.unique(np.rint(found * (255 / white))))


def is_poor(before: int, after: int) -> bool:
    """Whether scaling left few gray levels of many."""
    return after < FEW and before > 2 * after


def _check_range(values: np.ndarray, highest: int, kind: str, name: object) -> None:
    if not (values.min() >= 0 and values.max() <= highest):  # a NaN fails both comparisons
        raise DataError(
            f"{name} has {kind} values outside 0..{highest} (or NaN): scale them to "
            f"0..{highest}, or save an 8-bit image."
        )


def _tell_of_brighter_values(values: np.ndarray, white: int, highest: int, name: object) -> None:
    """Refuse an image of another camera; warn of an overexposed one, whose spots become white."""
    share = np.count_nonzero(values > white) / values.size
    if share > MOST_ABOVE:
        raise DataError(
            f"{name} has values up to {highest} and {share:.0%} of them are above {white}, the "
            "white of the images that were trained on: save it with as many bits as those have, "
            "or train on images like it."
        )
    warnings.warn(
        f"{name} has values up to {highest}; what is above {white}, the white of the images that "
        "were trained on, is taken as white",
        stacklevel=5,
    )


def _full(highest: int) -> int:
    """The highest number of as many bits."""
    return 2 ** max(int(highest).bit_length(), 8) - 1


def _first(value: object) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _like(tile: tuple, parts: tuple) -> tuple:
    return tile._make(parts) if hasattr(tile, "_make") else parts  # a plain tuple before Pillow 11


def _significant_bits(path: Path) -> int:
    """The largest number of a PNG's chunk sBIT: how many bits of each sample the camera gave; 0
    without that chunk."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            content = file.read(int.from_bytes(head[:4], "big"))
            if head[4:] == b"sBIT":
                return max(content, default=0)
            file.seek(4, 1)  # the checksum
    return 0


def _jpeg2000_bits(path: Path) -> int:
    """Bits a sample of the first component, from the marker SIZ."""
    with path.open("rb") as file:
        content = file.read(2**16)
    place = content.find(b"\xff\x4f\xff\x51") + 2 + 40
    return (content[place] & 0x7F) + 1 if 42 <= place < len(content) else 16
