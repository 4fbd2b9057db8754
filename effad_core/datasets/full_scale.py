"""The white of a scenario's 16-bit images: one for all of them, found on the training images."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from effad_core.datasets.decoding import decode, is_deep_file
from effad_core.datasets.depth import BITS, WHITE, is_poor, levels_kept, levels_of

import numpy as np


class FullScale:
    """The white of some images, found when it is first asked for: that may read all of them.

    Args:
        paths: the image files.
        name: of the scenario, for a warning.
    """

    def __init__(self, paths: Iterable[str | os.PathLike], name: str):
        self.paths, self.name = tuple(map(Path, paths)), name

    @cached_property
    def value(self) -> int | None:
        """As `find_full_scale`."""
        return find_full_scale(self.paths, self.name)


@dataclass(frozen=True)
class KnownScale:
    """The white of some images, where it is known already; None for images of 8 bits."""

    value: int | None


def find_full_scale(paths: Iterable[Path], name: str) -> int | None:
    """Which value is white in 16-bit images.

    It is what the files' tags say (sBIT, MaxSampleValue), the largest if they differ, unless an
    image has a value above it. Else it is the highest value of 8, 10, 12, 14 or 16 bits, the
    fewest that hold all values of all images. Files whose header says which value is white (see
    `depth`) and those that cannot be read are left out.

    Args:
        paths: the image files. Of 8-bit files no more than the header is read.
        name: of the scenario, for the warning where many gray levels become few.

    Returns:
        For example 4095; None if there is no 16-bit image.
    """
    present, tagged, brightest = np.zeros(WHITE + 1, bool), 0, (0, None)
    for path, levels, tag in filter(None, map(_range, paths)):
        present |= levels
        tagged = max(tagged, tag or 0)
        brightest = max(brightest, (int(np.flatnonzero(levels)[-1]), path))
    highest, path = brightest
    if path is None:
        return None
    white = tagged if highest <= tagged else next(2**bits - 1 for bits in BITS if highest < 2**bits)
    before, after = levels_kept(present, white)
    if is_poor(before, after):
        warnings.warn(
            f"the 16-bit training images of {name} keep {after} of {before} gray levels: "
            f"{white} is their white, of which nearly all values lie far below (the highest, "
            f"{highest}, is in {path}); leave out images with single bright spots, or brighten all "
            "images alike",
            stacklevel=2,
        )
    return white


def _range(path: Path) -> tuple[Path, np.ndarray, int | None] | None:
    """A file, which values occur in it, and its tag; None for a file that does not count."""
    try:
        if not is_deep_file(path):
            return None
        decoded = decode(path)
        if decoded.depth.white is not None:
            return None
        values = decoded.values()[..., :3] if decoded.low else decoded.values()
        if not (values.min() >= 0 and values.max() <= WHITE):
            return None
        return path, levels_of(values), decoded.depth.tagged
    except Exception:  # of damaged files, of nearly any type: whoever reads the image says so
        return None
