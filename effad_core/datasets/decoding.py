"""Image files, decoded and upright, in the mode that each file has; what cannot be is refused."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from effad_core.datasets.depth import (
    BITS_PER_SAMPLE,
    Depth,
    depth_of,
    is_deep,
    low_byte_tiles,
)
from effad_core.datasets.formats import formats_of
from effad_core.errors import DataError
from effad_core.storage.files import as_path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

TURNS = {  # EXIF orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TILE = (322, 323)  # the TIFF tags of a tile's width and height
PLANES = 284  # of how the channels lie: 2, one after the other


@dataclass(frozen=True)
class Decoded:
    """An image as its file has it, upright.

    Attributes:
        image: in the file's own mode; of 16-bit colour the upper bytes.
        low: of 16-bit colour the lower bytes, in the same mode; else None.
        depth: what the file says of its white.
    """

    image: Image.Image
    low: Image.Image | None = None
    depth: Depth = field(default_factory=Depth)

    def values(self) -> np.ndarray:
        """The file's numbers, shape (H, W) or (H, W, channels)."""
        values = np.asarray(self.image)
        return values if self.low is None else values * np.uint16(256) + np.asarray(self.low)


def decode(path: str | os.PathLike) -> Decoded:
    """The first frame of an image file; the file is closed."""
    path = as_path(path)
    _check_file(path)
    try:
        with warnings.catch_warnings():  # of Pillow: on odd metadata, and near its limit of pixels
            warnings.simplefilter("ignore")
            return _first_frame(path)
    except UnidentifiedImageError:
        raise DataError(_foreign(path)) from None
    except Image.DecompressionBombError as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{path} is too large ({reason}): crop it or scale it down.") from None
    except Exception as error:  # on damaged files, Pillow's decoders raise nearly every type
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            raise DataError(
                f"The image {path} cannot be opened ({error.strerror}): check its permissions."
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(
        f"{path} cannot be read as an image ({reason}): save it again as PNG, or remove it."
    )


def _check_file(path: Path) -> None:
    """Refuse what must not be opened: a pipe would wait for ever, a device have no end."""
    if not os.path.isfile(path):
        problem = missing(path) or ("is a folder" if path.is_dir() else "is no regular file")
        raise DataError(f"The image {path} {problem}: check the path of the image file.")
    if path.stat().st_size == 0:
        raise DataError(f"The image {path} is empty (0 bytes): copy it again or remove it.")


def _first_frame(path: Path) -> Decoded:
    """Decode; errors are Pillow's."""
    formats = formats_of(path)
    with Image.open(path, formats=formats) as image:
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding does not compare
    with Image.open(path, formats=formats) as image:
        if image.format == "TIFF":
            _check_tiles(image)
        tiles = low_byte_tiles(image)
        depth = depth_of(image, path) if is_deep(image) else Depth()
        upper = upright(image)
    if not tiles:
        return Decoded(upper, depth=depth)
    with Image.open(path, formats=formats) as image:
        image.tile = tiles
        return Decoded(upper, upright(image), depth)


def is_deep_file(path: Path) -> bool:
    """Whether a file holds whole numbers of more than 8 bits, by its header.

    Errors are Pillow's.
    """
    _check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=formats_of(path)) as image:
            return is_deep(image)


def upright(image: Image.Image) -> Image.Image:
    """A copy of an image with its EXIF rotation applied, decoded.

    Pillow's `exif_transpose` fails where it cannot write EXIF anew.
    """
    image.load()
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    turned = image.copy() if turn is None else image.transpose(turn)
    turned.format = image.format
    return turned


def _check_tiles(image: Image.Image) -> None:
    """Hold a TIFF's tiles, which are decoded whole, to the limit that Pillow holds images to; and
    refuse 16-bit colour in one plane a channel, which Pillow takes for 8-bit."""
    width, height = (image.tag_v2.get(tag, 0) for tag in TILE)
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"its tiles have {width}x{height} pixels")
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
    if len(bits) > 1 and max(bits) > 8 and image.tag_v2.get(PLANES) == 2:
        raise ValueError("16-bit colour in separate planes")


def _foreign(path: Path) -> str:
    """The error message for a file that is no image, with the remedy for the two usual kinds."""
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS, not the image: run `git lfs pull` to get it."
    if start.startswith((b"<!doctype html", b"<html")):
        return f"{path} is a web page, not an image: download the image again."
    return (
        f"{path} cannot be read as an image (its content is none of PNG, JPEG, TIFF and the other "
        "formats that Pillow reads, or an unusual kind): save it again as PNG, or remove it."
    )


def missing(path: Path) -> str | None:
    """What keeps a path from being opened, in words; None if there is something at it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:  # no permission, a name too long or with a null byte
        return f"cannot be opened ({getattr(error, 'strerror', error)})"
    return None
