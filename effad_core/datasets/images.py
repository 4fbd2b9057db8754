"""Image and mask files: each is read as 8-bit RGB, or refused with a message that names it."""

import importlib.util
import os
import warnings
from pathlib import Path

from effad_core.datasets.folder_names import system_reason
from effad_core.errors import DataError

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

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

ImageLike = str | os.PathLike | Image.Image | np.ndarray


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB.

    Transparent images (RGBA, LA, palette with transparency) are composited over white. 16-bit
    gray (also stored as 32-bit integers) is divided by 257, so 0..65535 becomes 0..255 whatever
    the image holds: brightness stays comparable between images. Floating-point gray has to lie
    in 0..1 and is multiplied by 255. 16-bit colour keeps its upper 8 bits. The EXIF rotation is
    applied, colour profiles are not; of an animation, or of several pages, the first is taken.

    A PNG's checksums are compared. No other format but compressed TIFF has any: there, damage that
    leaves the file decodable goes unnoticed.

    Args:
        path: a PNG, JPEG, BMP, TIFF, WebP, GIF or PPM file of at most `2 * Image.MAX_IMAGE_PIXELS`
            pixels (Pillow's limit, 178,956,970 unless you set it); larger ones are not decoded.

    Returns:
        The image in mode RGB, upright, decoded, its file closed.

    Raises:
        DataError: if the file is missing, empty, truncated, too large, not an image or no file
            at all (a pipe, a device), or if its values have no fixed place in 0..255.
    """
    return to_rgb(_decode(path), path)


def to_rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, by the rules of `read_image`; errors say `name`."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), name)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_mask(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """Read a ground-truth mask: a pixel of any colour but black is a defect, alpha is ignored.

    Args:
        path: an image file as in `read_image`.
        size: (width, height) of the image that the mask belongs to, in pixels.

    Returns:
        Boolean array of shape (height, width), True on defects.

    Raises:
        DataError: if the file cannot be read, has another size, or is a JPEG, whose compression
            leaves traces beside a defect that would count as one.
    """
    return (_mask_pixels(path, size) != 0).any(axis=2)


def read_mask_values(
    path: str | os.PathLike, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read a ground-truth mask whose pixel values mean something, as MVTec LOCO's do.

    Args:
        path, size: as in `read_mask`; without a size, any size will do.

    Returns:
        The mask, as `read_mask` returns it, and the distinct values of its pixels that are not
        black, ascending: a gray mask of one defect has one.

    Raises:
        DataError: as `read_mask`.
    """
    values = _mask_pixels(path, size)
    mask = (values != 0).any(axis=2)
    return mask, tuple(np.unique(values[mask]).tolist())


def list_images(folder: str | os.PathLike, recursive: bool = False) -> list[Path]:
    """List the images of a folder, sorted by name.

    Hidden files and what systems and NAS put there (see `folder_names.SYSTEM`) are left out.

    Args:
        folder: the folder.
        recursive: list the folders below it as well, links to folders included.

    Returns:
        Paths with a suffix of `SUFFIXES` in any case, sorted by their path inside the folder.

    Raises:
        DataError: if the folder is missing, or holds no image or a folder that cannot be opened.
    """
    paths = find_images(folder, recursive)
    if not paths:
        raise DataError(
            f"The folder {folder} holds no image: put files with the suffix "
            f"{', '.join(sorted(SUFFIXES))} into it."
        )
    return paths


def find_images(folder: str | os.PathLike, recursive: bool = False) -> list[Path]:
    """As `list_images`, but a folder without images is no error."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = missing(folder) or "is a file, not a folder"
        raise DataError(f"The image folder {folder} {problem}: name an existing folder of images.")
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        visited = os.path.realpath(parent) in seen  # a link that leads back up
        seen.add(os.path.realpath(parent))
        descend = recursive and not visited
        folders[:] = sorted(f for f in folders if not system_reason(f)) if descend else []
        if not visited:
            paths += [
                Path(parent, name)
                for name in names
                if not system_reason(name) and os.path.splitext(name)[1].lower() in SUFFIXES
            ]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def missing(path: Path) -> str | None:
    """What keeps a path from being opened, in words; None if there is something at it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:  # no permission, a name too long or with a null byte
        return f"cannot be opened ({getattr(error, 'strerror', error)})"
    return None


def refuse_folder(error: OSError) -> None:
    """The error message for a folder that the system does not list."""
    raise DataError(
        f"The folder {error.filename} cannot be opened ({error.strerror}): change its permissions, "
        "or move it away."
    ) from None


def _decode(path: str | os.PathLike) -> Image.Image:
    """The first frame of an image file, upright, in the file's own mode, the file closed."""
    path = Path(path)
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


def _first_frame(path: Path) -> Image.Image:
    """Decode; errors are Pillow's. Its `exif_transpose` fails where it cannot write EXIF anew."""
    with Image.open(path, formats=FORMATS) as image:
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding does not compare
    with Image.open(path, formats=FORMATS) as image:
        if image.format == "TIFF":
            _check_tiles(image)
        image.load()
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        upright = image.copy() if turn is None else image.transpose(turn)
        upright.format = image.format
    return upright


def _check_tiles(image: Image.Image) -> None:
    """Hold a TIFF's tiles, which are decoded whole, to the limit that Pillow holds images to."""
    width, height = (image.tag_v2.get(tag, 0) for tag in TILE)
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"its tiles have {width}x{height} pixels")


def _foreign(path: Path) -> str:
    """The error message for a file that is no image, with the remedy for the two usual kinds."""
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS, not the image: run `git lfs pull` to get it."
    if start.startswith((b"<!doctype html", b"<html")):
        return f"{path} is a web page, not an image: download the image again."
    return (
        f"{path} cannot be read as an image (its content is none of {', '.join(FORMATS)}, or an "
        "unusual kind): save it again as PNG, or remove it."
    )


def _mask_pixels(path: str | os.PathLike, size: tuple[int, int] | None) -> np.ndarray:
    """Gray or colour values of a mask without its alpha, shape (H, W, 1 or 3)."""
    mask = _decode(path)
    if size is not None and mask.size != tuple(size):
        raise DataError(
            f"The mask {path} has {mask.width}x{mask.height} pixels but its image has "
            f"{size[0]}x{size[1]}: save the mask at the size of its image."
        )
    if mask.format in ("JPEG", "MPO"):
        raise DataError(
            f"The mask {path} is a JPEG, whose compression blurs it: save the mask as PNG, from "
            "its source."
        )
    mask.info.pop("transparency", None)
    if mask.mode == "1":
        mask = mask.convert("L")
    elif mask.mode in ("P", "PA", "CMYK", "LAB", "YCbCr"):  # black is not 0 there
        mask = mask.convert("RGB")
    values = np.asarray(mask)
    if mask.mode in ("LA", "La", "RGBA", "RGBa"):
        values = values[..., :-1]
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise DataError(f"The mask {path} has NaN among its values: save it as an 8-bit PNG.")
    return values.reshape(mask.height, mask.width, -1)


def _to_8_bit(values: np.ndarray, name: object) -> np.ndarray:
    """Scale 16-bit integers or floats in 0..1, shape (H, W), to uint8 by a fixed factor."""
    is_float = values.dtype.kind == "f"
    highest = 1 if is_float else 65535
    if not (values.min() >= 0 and values.max() <= highest):  # a NaN fails both comparisons
        raise DataError(
            f"{name} has {'floating-point' if is_float else 'integer'} values outside "
            f"0..{highest} (or NaN): scale them to 0..{highest}, or save an 8-bit image."
        )
    scaled = values.astype(np.float64)
    scaled *= 255 / highest  # in place: these are 8 bytes a pixel
    return np.rint(scaled, out=scaled).astype(np.uint8)


def open_image(item: ImageLike) -> Image.Image:
    """Any accepted kind of image as RGB."""
    if isinstance(item, str | os.PathLike):
        return read_image(item)
    if isinstance(item, Image.Image):
        try:
            item.load()  # may be of a file that is damaged
        except Exception as error:  # as in `_decode`
            raise DataError(f"the image given cannot be decoded ({error})") from None
        if 0 in item.size:
            raise DataError("the image given has no pixels")
        return to_rgb(item, "the image given")
    if isinstance(item, np.ndarray):
        fits = item.ndim == 2 or (item.ndim == 3 and item.shape[2] == 3)
        if item.dtype != np.uint8 or not fits or item.size == 0:
            raise DataError(
                f"an image array must be uint8 of shape (H, W, 3) or (H, W), not {item.dtype} of "
                f"shape {item.shape}"
            )
        return Image.fromarray(item).convert("RGB")
    raise DataError(f"an image is a path, a PIL image or a uint8 array, not {type(item).__name__}")
