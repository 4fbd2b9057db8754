"""Image and mask files: each is read as 8-bit RGB, or refused with a message that names it."""

import importlib.util
import os
from pathlib import Path

from effad_core.datasets.decoding import Decoded, decode, is_deep_file, missing, upright
from effad_core.datasets.depth import WHITE, Depth, depth_of, to_8_bit
from effad_core.datasets.folder_names import system_reason
from effad_core.datasets.formats import SUFFIXES, lossy_format
from effad_core.errors import DataError
from effad_core.storage.files import as_path

import numpy as np
from PIL import Image

ImageLike = str | os.PathLike | Image.Image | np.ndarray


def read_image(path: str | os.PathLike, full_scale: int | None = None) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB.

    Transparent images (RGBA, LA, palette with transparency) are composited over white. Of 16-bit
    images (also stored as 32-bit integers) one value, `full_scale`, becomes 255 whatever the image
    holds: brightness stays comparable between images (see `depth`). Floating-point gray has to lie
    in 0..1 and is multiplied by 255. The EXIF rotation is applied, colour profiles are not; of an
    animation, or of several pages, the first is taken.

    A PNG's checksums are compared. No other format but compressed TIFF has any: there, damage that
    leaves the file decodable goes unnoticed.

    Args:
        path: a PNG, JPEG, TIFF, BMP, WebP, GIF, PGM or PPM file, JPEG 2000, AVIF, or another one
            that Pillow reads as a picture, of at most `2 * Image.MAX_IMAGE_PIXELS` pixels
            (Pillow's limit, 178,956,970 unless you set it); larger ones are not decoded.
        full_scale: the white of 16-bit images, 4095 for a camera of 12 bits; None takes what the
            file's tags say, or else 65535.

    Returns:
        The image in mode RGB, upright, decoded, its file closed.

    Raises:
        DataError: if the file is missing, empty, truncated, too large, not an image or no file
            at all (a pipe, a device), or if its values have no fixed place in 0..255.
    """
    return _to_rgb(decode(path), path, full_scale)


def _to_rgb(decoded: Decoded, name: str | os.PathLike, full_scale: int | None) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, by the rules of `read_image`; errors say `name`."""
    image = decoded.image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bit(decoded.values(), name, decoded.depth, full_scale))
    elif decoded.low is not None:
        image = _deep_colour(decoded.values(), image.mode, name, decoded.depth, full_scale)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info.clear()  # or its EXIF rotation would be applied once more
    return image


def _deep_colour(
    values: np.ndarray, mode: str, name: object, depth: Depth, full_scale: int | None
) -> Image.Image:
    """16-bit values of shape (H, W, 3 or 4) as an 8-bit image; alpha is 16-bit if it looks so."""
    if mode != "RGBA":
        return Image.fromarray(to_8_bit(values, name, depth, full_scale), mode)
    colours = to_8_bit(values[..., :3], name, depth, full_scale)
    alpha, white = values[..., 3:], depth.white or full_scale or depth.tagged
    alpha = to_8_bit(alpha, name, Depth(white if white and alpha.max() <= white else WHITE))
    return Image.fromarray(np.dstack([colours, alpha]), mode)


def read_mask(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """Read a ground-truth mask: a pixel of any colour but black is a defect, alpha is ignored.

    Args:
        path: an image file as in `read_image`.
        size: (width, height) of the image that the mask belongs to, in pixels.

    Returns:
        Boolean array of shape (height, width), True on defects.

    Raises:
        DataError: if the file cannot be read, has another size, or was compressed with loss
            (JPEG and AVIF, some WebP, JPEG 2000 and TIFF), which leaves traces beside a defect
            that would count as one.
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
            f"The folder {folder} holds no image{_others(folder, recursive)}: put PNG, TIFF or "
            "JPEG files into it, or others that Pillow reads."
        )
    return paths


def find_images(
    folder: str | os.PathLike, recursive: bool = False, strict: bool = True
) -> list[Path]:
    """As `list_images`, but a folder without images is no error; unless `strict`, none is."""
    folder = as_path(folder)
    if strict and not os.path.isdir(folder):
        problem = missing(folder) or "is a file, not a folder"
        raise DataError(f"The image folder {folder} {problem}: name an existing folder of images.")
    paths, seen, refuse = [], set(), refuse_folder if strict else None
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
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


def skipped_files(folder: str | os.PathLike, recursive: bool = False) -> dict[Path, str]:
    """The files of a folder that are not taken for images, each with the reason.

    Args:
        folder, recursive: as in `list_images`. What lies in hidden folders is not listed.

    Returns:
        By path, in the order of `list_images`.

    Raises:
        DataError: as `find_images`.
    """
    folder = as_path(folder)
    taken, skipped = set(find_images(folder, recursive)), {}
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [f for f in folders if recursive and not f.startswith(".")]
        for path in (Path(parent, name) for name in names):
            if path not in taken:
                skipped[path] = _why_skipped(path, folder)
    return dict(sorted(skipped.items(), key=lambda item: item[0].relative_to(folder).as_posix()))


def _why_skipped(path: Path, folder: Path) -> str:
    if reason := next(filter(None, map(system_reason, path.relative_to(folder).parts)), None):
        return reason
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return "left out"
    return f"{suffix} is no format of pictures that Pillow reads" if suffix else "no suffix"


def _others(folder: Path, recursive: bool) -> str:
    """How many files a folder without images holds, and why the first is none."""
    skipped = skipped_files(folder, recursive)
    if not skipped:
        return ""
    first, why = next(iter(skipped.items()))
    count = f"{len(skipped)} other file{'s' * (len(skipped) > 1)}"
    return f" but {count} ({first.relative_to(folder).as_posix()}: {why})"


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def refuse_folder(error: OSError) -> None:
    """The error message for a folder that the system does not list."""
    raise DataError(
        f"The folder {error.filename} cannot be opened ({error.strerror}): change its permissions, "
        "or move it away."
    ) from None


def _mask_pixels(path: str | os.PathLike, size: tuple[int, int] | None) -> np.ndarray:
    """Gray or colour values of a mask without its alpha, shape (H, W, 1 or 3)."""
    path = as_path(path)
    decoded = decode(path)
    mask = decoded.image
    if size is not None and mask.size != tuple(size):
        raise DataError(
            f"The mask {path} has {mask.width}x{mask.height} pixels but its image has "
            f"{size[0]}x{size[1]}: save the mask at the size of its image."
        )
    if lossy := lossy_format(path, mask):
        raise DataError(
            f"The mask {path} is {lossy}, whose compression blurs it: save the mask as PNG, from "
            "its source."
        )
    mask.info.pop("transparency", None)
    if mask.mode == "1":
        mask = mask.convert("L")
    elif mask.mode in ("P", "PA", "CMYK", "LAB", "YCbCr"):  # black is not 0 there
        mask = mask.convert("RGB")
    values = decoded.values() if decoded.low else np.asarray(mask)
    if mask.mode in ("LA", "La", "RGBA", "RGBa"):
        values = values[..., :-1]
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise DataError(f"The mask {path} has NaN among its values: save it as an 8-bit PNG.")
    return values.reshape(mask.height, mask.width, -1)


def open_image(item: ImageLike, full_scale: int | None = None) -> Image.Image:
    """Any accepted kind of image as RGB, as if it were read from its file.

    Args:
        item: a path; a PIL image, whose EXIF rotation is applied; or an array, uint8 or uint16, of
            shape (H, W), (H, W, 1), (H, W, 3) in the order RGB, or (H, W, 4) in the order RGBA.
        full_scale: as in `read_image`.

    Raises:
        DataError: for anything else, or what cannot be decoded.
    """
    if isinstance(item, str | os.PathLike):
        return read_image(item, full_scale)
    if isinstance(item, Image.Image):
        try:
            decoded = _given(item)  # may be of a file that is damaged
        except Exception as error:  # as in `decode`
            raise DataError(f"the image given cannot be decoded ({error})") from None
        if 0 in item.size:
            raise DataError("the image given has no pixels")
        return _to_rgb(decoded, "the image given", full_scale)
    if isinstance(item, np.ndarray):
        return _from_array(item, full_scale)
    raise DataError(
        f"an image is a path, a PIL image or a uint8 or uint16 array, not {type(item).__name__}"
    )


def _given(image: Image.Image) -> Decoded:
    """A PIL image, decoded; one of more than 8 bits with all that its file says, if it has one."""
    depth = depth_of(image, None)  # before the image is decoded, which forgets it
    own, file = Decoded(upright(image), depth=depth), Path(getattr(image, "filename", ""))
    if os.path.isfile(file) and is_deep_file(file):
        found = decode(file)
        if found.image.mode == own.image.mode and np.array_equal(found.image, own.image):
            return found  # it is that file's, and nobody has drawn on it
    return own


def _from_array(array: np.ndarray, full_scale: int | None) -> Image.Image:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype.kind != "u" or array.dtype.itemsize > 2 or not fits or array.size == 0:
        raise DataError(
            "an image array must be uint8 or uint16, of shape (H, W), (H, W, 1), (H, W, 3) in the "
            f"order RGB or (H, W, 4) in the order RGBA, not {array.dtype} of shape {array.shape}: "
            "convert it (an array of floats in 0..1, for example, by np.uint8(255 * array + 0.5))"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    name = "the array given"
    if array.dtype == np.uint8:
        image = Image.fromarray(array)
    elif array.ndim == 2:
        image = Image.fromarray(to_8_bit(array, name, None, full_scale))
    else:
        image = _deep_colour(array, ("RGB", "RGBA")[array.shape[2] - 3], name, Depth(), full_scale)
    return _to_rgb(Decoded(image), name, full_scale)
