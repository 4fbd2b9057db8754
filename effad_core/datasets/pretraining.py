"""The images that stand in for ImageNet, and the stream of batches drawn from them."""

import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from effad_core.errors import DataError
from effad_core.storage import files
from effad_core.storage.digests import combined, digest, inventory, names_below
from effad_core.storage.files import as_path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .checks import image_size
from .images import list_images, package_folder, read_image
from .transforms import resize, to_tensor

# (package, folder in it, files): photographs under terms that allow any use with attribution.
PHOTOGRAPHS = (
    (
        "skimage",
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg rocket.jpg",
    ),
    ("sklearn", "datasets/images", "china.jpg flower.jpg"),
)
IMAGENETTE = "imagenette2-320"  # the folder that its archive holds
MOST_CHECKED = 50_000  # images that are looked at before the first draw: seconds, not minutes
MANY = 1000  # more images than this are recognised by their names and sizes
FEW = 100  # with fewer images than this, random crops replace whole images
MOST_DRAWS = 100  # of images that cannot be read, one after another


class PretrainingImages:
    """A set of images in the role of ImageNet.

    Decoded images stay in memory until a budget is used up; the rest are read when drawn. Every
    draw takes its randomness from the generator passed in and keeps no other state. Instead of an
    image that cannot be read, the generator draws another one, with a warning.

    Args:
        paths: the image files.
        source: what they are, for logs and reports.
        licence: under which terms.
        cache_megabytes: memory for decoded images.
    """

    def __init__(
        self, paths: Sequence[Path], source: str, licence: str, cache_megabytes: float = 1024
    ) -> None:
        if not paths:
            raise DataError(f"There are no pretraining images in {source}: name a folder of some.")
        self.paths, self.source, self.licence = tuple(paths), source, licence
        self._cache: dict[int, Image.Image] = {}
        self._cache_left = cache_megabytes * 2**20  # bytes
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict:
        """What a worker process gets: not the decoded images, and no memory for its own."""
        return self.__dict__ | {"_cache": {}, "_cache_left": 0}

    def describe(self) -> str:
        """One line: how many images, from where, under which licence."""
        return f"Pretraining images: {len(self)} from {self.source} ({self.licence})"

    def identity(self) -> str:
        """16 hexadecimal digits by which a run recognises these images.

        They stand for the content of up to 1000 images. Of more images, of which a training draws
        only some, reading all could take longer than the training; they stand for names and sizes.

        Raises:
            DataError: if an image is missing or cannot be opened.
        """
        if len(self) <= MANY:
            return combined(inventory(self.paths))
        names, root = names_below(self.paths)
        try:
            sizes = [os.path.getsize(root + name) for name in names]
        except OSError as error:
            raise DataError(
                f"The pretraining image {error.filename} cannot be opened ({error.strerror}): "
                "check the path and its permissions."
            ) from None
        return digest(repr([*zip(names, sizes, strict=True)]))

    def read(self, index: int) -> Image.Image:
        """Image `index` as 8-bit RGB, from memory if it was read before (do not write into it)."""
        image = self._cache.get(index)
        if image is None:
            image = read_image(self.paths[index])
            size = 4 * image.width * image.height  # Pillow stores an RGB pixel in 4 bytes
            if size <= self._cache_left:
                self._cache[index] = image
                self._cache_left -= size
        return image

    def _draw(self, rng: np.random.Generator) -> Image.Image:
        """A random image that can be read (Algorithm 1, line 21; Algorithm 3, lines 5 and 17)."""
        for _ in range(MOST_DRAWS):
            index = int(rng.integers(len(self)))
            try:
                return self.read(index)
            except DataError as error:
                failed = error
            if index not in self._unreadable:
                self._unreadable.add(index)
                count = len(self._unreadable)
                if count == len(self):
                    break
                if str(count).strip("0") == "1":  # the first, the tenth, the hundredth ...
                    _warn(count, len(self), self.source, failed)
        raise failed

    def hold_out(
        self, count: int, seed: int = 0
    ) -> tuple["PretrainingImages", "PretrainingImages"]:
        """Split off `count` random images that are never trained on.

        Returns:
            The others and the held-out ones.

        Raises:
            DataError: if no image would be left to train on.
        """
        if not 0 < count < len(self):
            raise DataError(
                f"{count} of {len(self)} pretraining images cannot be held out: name a folder of "
                "more images, or hold out fewer."
            )
        order = np.random.default_rng(seed).permutation(len(self))
        return tuple(
            PretrainingImages(
                [self.paths[index] for index in sorted(part)], self.source, self.licence, megabytes
            )
            for part, megabytes in ((order[count:], self._cache_left / 2**20), (order[:count], 256))
        )

    def whole_images(
        self,
        rng: np.random.Generator,
        n: int,
        size: int | tuple[int, int] = 256,
        gray_probability: float = 0.0,
    ) -> Tensor:
        """Random images for the pretraining penalty and for distillation.

        Algorithm 1, line 21, and Algorithm 3, lines 5-7 and 17-19.

        An image is resized as a whole, as in the paper. A set of fewer than 100 images would show
        the student the same few inputs again and again, so from such a set random squares are
        drawn, 0.3 to 1 times as wide as the image's short side, half of them mirrored.

        Args:
            rng: the iteration's random generator.
            n: number of images.
            size: side of the batch's images, or (height, width), in pixels.
            gray_probability: how often an image is turned gray (Algorithm 3, lines 6 and 18).

        Returns:
            uint8 tensor of shape (n, 3, H, W).
        """
        batch = []
        for _ in range(n):
            image = self._draw(rng)
            if len(self) < FEW:
                side = rng.uniform(0.3, 1.0) * min(image.size)
                image = _random_square(rng, image, round(side), size)
            else:
                image = resize(image, size)  # Algorithm 3, lines 7 and 19
            batch.append(to_tensor(_maybe_gray(rng, image, gray_probability)))
        return torch.stack(batch)

    def crops(
        self,
        rng: np.random.Generator,
        n: int,
        size: int = 128,
        scale: tuple[float, float] = (0.4, 1.0),
        gray_probability: float = 0.1,
    ) -> Tensor:
        """Random crops for distilling a teacher, many small ones instead of few whole images.

        What a 33x33 receptive field learns from is the variety of patches. Each crop comes from a
        random image, at a magnification drawn log-uniformly from `scale` (an ImageNet photograph
        resized as a whole to 256 pixels is shown at about 0.6; crops wider than the image's short
        side are cut to it and so magnified more), mirrored with probability 1/2.

        Args:
            rng: the iteration's random generator.
            n: number of crops.
            size: side of a crop, in pixels.
            scale: lowest and highest magnification, crop pixels per image pixel.
            gray_probability: how often a crop is turned gray (Algorithm 3, line 18).

        Returns:
            uint8 tensor of shape (n, 3, size, size).

        Raises:
            ValueError: if the scale is not 0 < lowest <= highest.
        """
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale {scale} is not (lowest, highest) with 0 < lowest <= highest")
        batch = []
        for _ in range(n):
            image = self._draw(rng)
            side = size / np.exp(rng.uniform(*np.log(scale)))
            crop = _random_square(rng, image, round(side), size)
            batch.append(to_tensor(_maybe_gray(rng, crop, gray_probability)))
        return torch.stack(batch)


class Draws(Dataset):
    """Draws for distillation, numbered from 0: a number's image is the same in every process.

    Args:
        images: where they are drawn from.
        key: other numbers here give other draws.
        size: side of an image, in pixels.
        scale: None draws whole images, else crops of these magnifications.
        gray_probability: how often an image is turned gray (Algorithm 3, lines 6 and 18).
    """

    def __init__(
        self,
        images: PretrainingImages,
        key: Sequence[int],
        size: int,
        scale: tuple[float, float] | None = None,
        gray_probability: float = 0.1,
    ) -> None:
        self.images, self.key, self.size = images, tuple(key), size
        self.scale, self.gray_probability = scale, gray_probability

    def __getitem__(self, number: int) -> Tensor:
        """uint8 tensor of shape (3, size, size)."""
        rng = np.random.default_rng((*self.key, number))
        if self.scale is None:
            return self.images.whole_images(rng, 1, self.size, self.gray_probability)[0]
        return self.images.crops(rng, 1, self.size, self.scale, self.gray_probability)[0]


def open_pretraining(
    source: str | os.PathLike | None = None,
    root: str | os.PathLike | None = None,
    cache_megabytes: float = 1024,
) -> PretrainingImages:
    """Open the images that stand in for ImageNet.

    Args:
        source: a folder of images, searched with its subfolders (ImageNet's layout); or
            "imagenette", which torchvision downloads once (ten ImageNet classes, 340 MB); or
            "photographs" or None: a dozen photographs that scikit-image and scikit-learn ship.
        root: where Imagenette is, or is downloaded to; the folder `data` by default.
        cache_megabytes: memory for decoded images.

    Returns:
        The images. Those of a folder that cannot be read are left out, and a warning counts them;
        of more than 50,000 images, this happens when they are drawn.

    Raises:
        DataError: if the folder is missing or empty, none of its images can be read, or Imagenette
            cannot be downloaded.

    Example:
        >>> len(open_pretraining())  # the photographs that come with scikit-image and scikit-learn
        12
    """
    if source is None or source == "photographs":
        return PretrainingImages(
            _photographs(),
            "the photographs shipped with scikit-image and scikit-learn",
            "CC0 or public domain; china.jpg and flower.jpg CC BY 2.0",
            cache_megabytes,
        )
    if source == "imagenette":
        return PretrainingImages(
            _readable(_imagenette(as_path(root or "data")), "Imagenette"),
            "Imagenette, ten classes of ImageNet",
            "Apache-2.0 for the selection, ImageNet's terms of access for the images",
            cache_megabytes,
        )
    folder = as_path(source)
    if not folder.is_dir():
        raise DataError(
            f"The pretraining images {source} are no folder: name an existing folder of images, "
            "or choose 'imagenette' or 'photographs'."
        )
    return PretrainingImages(
        _readable(list_images(folder, recursive=True), f"the folder {source}"),
        f"the folder {Path(os.path.abspath(folder)).name}",
        "licence unknown",
        cache_megabytes,
    )


def _readable(paths: Sequence[Path], source: str) -> list[Path]:
    """The images that can be read; a warning counts the others."""
    found, errors = [], []
    for path in paths if len(paths) <= MOST_CHECKED else ():
        try:
            image_size(path)
            found.append(path)
        except DataError as error:
            errors.append(error)
    if errors and not found:
        raise DataError(f"None of the {len(paths)} images of {source} can be read: {errors[0]}")
    if errors:
        _warn(len(errors), len(paths), source, errors[0])
    return found or list(paths)


def _warn(count: int, total: int, source: str, error: DataError) -> None:
    warnings.warn(
        f"{count} of {total} pretraining images of {source} cannot be read and are left out. One "
        f"of them: {error}",
        stacklevel=3,
    )


def _maybe_gray(rng: np.random.Generator, image: Image.Image, probability: float) -> Image.Image:
    """The image, turned gray with the given probability (Algorithm 3, lines 6 and 18)."""
    return image.convert("L").convert("RGB") if rng.random() < probability else image


def _random_square(
    rng: np.random.Generator, image: Image.Image, side: int, size: int | tuple[int, int]
) -> Image.Image:
    """A random square of `side` pixels, or the short side if that is less, resized to `size`."""
    height, width = (size, size) if isinstance(size, int) else size
    side = min(max(side, 1), *image.size)
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    box = (left, top, left + side, top + side)
    square = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square


def _photographs() -> list[Path]:
    """Those of the photographs that lie on disk; nothing is downloaded."""
    paths = []
    for package, folder, names in PHOTOGRAPHS:
        if parent := package_folder(package):
            paths += [parent / folder / name for name in names.split()]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(
            "No photographs of scikit-image or scikit-learn found: run "
            "`pip install scikit-image scikit-learn`, or name a folder of images."
        )
    return paths


def _imagenette(root: Path) -> list[Path]:
    """Training images of Imagenette at 320 pixels, downloaded by torchvision unless they exist."""
    folder = root / IMAGENETTE
    try:
        root.mkdir(parents=True, exist_ok=True)
        with files.locked(root / f".{IMAGENETTE}.lock", wait=math.inf):
            if not folder.exists():
                _download(folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Imagenette could not be downloaded to {root} ({error}): connect to the internet, "
            f"or unpack imagenette2-320.tgz into {root}, or choose 'photographs'."
        ) from None
    return list_images(folder / "train", recursive=True)


def _download(folder: Path) -> None:
    """Unpack Imagenette beside `folder`, then move it there: torchvision takes half of it for all.

    An archive that lies there is used if it is whole (torchvision compares its checksum).
    """
    from torchvision.datasets import Imagenette

    archive = folder.with_name(f"{folder.name}.tgz")
    staging = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(staging / folder.name, ignore_errors=True)  # of a killed process
    staging.mkdir(exist_ok=True)
    if archive.exists():
        archive.replace(staging / archive.name)
    try:
        Imagenette(staging, split="train", size="320px", download=True)
        files.sync_all(staging / folder.name)
        (staging / folder.name).rename(folder)
    finally:
        if (staging / archive.name).exists():
            (staging / archive.name).replace(archive)
        shutil.rmtree(staging, ignore_errors=True)
