"""Image and mask files at the door: every file becomes 8-bit RGB, or one sentence that names it."""

import importlib.util
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

ImageLike = str | os.PathLike | Image.Image | np.ndarray


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the remedy in one sentence."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB.

    Transparent images (RGBA, LA, palette with transparency) are composited over white. 16-bit
    gray (also stored as 32-bit integers) is divided by 257, so 0..65535 becomes 0..255 whatever
    the image holds: brightness stays comparable between images. Floating-point gray has to lie
    in 0..1 and is multiplied by 255. The EXIF rotation is applied; of an animation the first
    frame is taken.

    Args:
        path: a PNG, JPEG, BMP, TIFF, WebP, GIF or PPM file.

    Returns:
        The image in mode RGB, upright, decoded, its file closed.

    Raises:
        DataError: if the file is missing, empty, truncated, too large or not an image, or if its
            values have no fixed place in 0..255.
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
        DataError: if the file cannot be read or has another size.
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
    """List the images of a folder, sorted by name; hidden files are ignored.

    Args:
        folder: the folder.
        recursive: list the folders below it as well, links to folders included.

    Returns:
        Paths with a suffix of `SUFFIXES` in any case, sorted by their path inside the folder.

    Raises:
        DataError: if the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"The image folder {folder} {problem}: name an existing folder of images.")
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited = os.path.realpath(parent) in seen  # a link that leads back up
        seen.add(os.path.realpath(parent))
        descend = recursive and not visited
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if descend else []
        if not visited:
            paths += [
                Path(parent, name)
                for name in names
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
            ]
    if not paths:
        raise DataError(
            f"The folder {folder} holds no image: put files with the suffix "
            f"{', '.join(sorted(SUFFIXES))} into it."
        )
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _decode(path: str | os.PathLike) -> Image.Image:
    """The first frame of an image file, upright, in the file's own mode, the file closed."""
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"The image {path} {problem}: check the path of the image file.")
    if path.stat().st_size == 0:
        raise DataError(f"The image {path} is empty (0 bytes): copy it again or remove it.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        reason = f"its content is none of {', '.join(FORMATS)}"
    except Exception as error:  # on damaged files, Pillow's decoders raise nearly every type
        reason = str(error) or type(error).__name__
    raise DataError(
        f"{path} cannot be read as an image ({reason}): save it again as PNG, or remove it."
    )


def _mask_pixels(path: str | os.PathLike, size: tuple[int, int] | None) -> np.ndarray:
    """Gray or colour values of a mask without its alpha, shape (H, W, 1 or 3)."""
    mask = _decode(path)
    if size is not None and mask.size != tuple(size):
        raise DataError(
            f"The mask {path} has {mask.width}x{mask.height} pixels but its image has "
            f"{size[0]}x{size[1]}: save the mask at the size of its image."
        )
    if mask.mode == "1":
        mask = mask.convert("L")
    elif mask.mode in ("P", "PA", "CMYK"):
        mask = mask.convert("RGB")
    values = np.asarray(mask)
    if mask.mode in ("LA", "La", "RGBA", "RGBa"):
        values = values[..., :-1]
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
    return np.rint(values.astype(np.float64) * (255 / highest)).astype(np.uint8)


def open_image(item: ImageLike) -> Image.Image:
    """Any accepted kind of image as RGB."""
    if isinstance(item, str | os.PathLike):
        return read_image(item)
    if isinstance(item, Image.Image):
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
