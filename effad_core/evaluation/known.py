"""Maps that are known: of each image they are computed once, and kept beside the detector's run.

Several notebooks look at the same detector's maps of the same images. Half a second an image on a
CPU adds up, so the first notebook that needs a map writes it down. With the evidence come the maps
of the images that the notebooks look at.
"""

import os
from hashlib import blake2b

from effad_core.acceleration.precision import number_format
from effad_core.detector import EfficientAD
from effad_core.prediction import Predictor
from effad_core.storage.files import as_path
from effad_core.storage.weights import fingerprint, header_of, read_tensors, write_tensors
from effad_core.thresholds import OperatingPoint

import torch
from torch import Tensor

CELLS = "cells.safetensors"  # in the folder of a run
KIND, OWNER = "cells", "detector"  # in the header of that file


class KnownMaps(Predictor):
    """A detector that looks its maps up where they are known, and keeps those that it computes.

    What is kept are the cells (see `EfficientAD.cells`). An image is recognised by its pixels at
    the detector's size. What another detector left in the folder is not used.

    Args:
        detector: trained; its weights stay as they are. Quantiles and thresholds may change later.
        folder: of its run, where `cells.safetensors` is or will be.
        dtype: of what is kept; the evidence has float16, in half the space.

    Attributes:
        detector: the one that computes.
        looked_up, computed: how many images were known, and how many were not.

    Raises:
        ValueError: for a detector with tiles, whose maps have no cells of one size.
        RunError: if the file in the folder is damaged.

    Example:
        >>> known = KnownMaps(detector, folder)
        >>> first, again = evaluate(known, scenario), evaluate(known, scenario)
        >>> print(known)
        maps of 4 images looked up, of 4 computed here
    """

    def __init__(
        self,
        detector: EfficientAD,
        folder: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
    ):
        if detector.tiles is not None:
            raise ValueError("maps are kept of detectors without tiles alone")
        self.detector, self.path = detector, as_path(folder) / CELLS
        self.image_size, self.full_scale = detector.image_size, detector.full_scale
        self.region = detector.region
        self.looked_up, self.computed, self.dtype = 0, 0, dtype
        self._forget()
        self.take(folder)

    def __str__(self) -> str:
        return f"maps of {self.looked_up} images looked up, of {self.computed} computed here"

    @property
    def operating_point(self) -> OperatingPoint | None:
        return self.detector.operating_point

    @operating_point.setter
    def operating_point(self, point: OperatingPoint | None) -> None:
        self.detector.operating_point = point

    @property
    def pixel_operating_point(self) -> OperatingPoint | None:
        return self.detector.pixel_operating_point

    @pixel_operating_point.setter
    def pixel_operating_point(self, point: OperatingPoint | None) -> None:
        self.detector.pixel_operating_point = point

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.detector.use_device(device)

    def combined_maps(self, images: Tensor) -> Tensor:
        return self.detector.combine(*self.anomaly_maps(images))

    def anomaly_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `EfficientAD.anomaly_maps`."""
        return self.detector.place(self.cells(images))

    def cells(self, images: Tensor) -> Tensor:
        """As `EfficientAD.cells`, float32, rounded to `dtype`."""
        if number_format(self.detector.precision) != self._numbers:
            self._forget()  # they were computed in another one
        names = [
            blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images.cpu()
        ]
        new = [index for index, name in enumerate(names) if name not in self._kept]
        if new:
            found = self.detector.cells(images[new]).to(self.dtype).cpu()
            self._kept.update(zip((names[index] for index in new), found, strict=True))
            self._write()
        self.computed += len(new)
        self.looked_up += len(names) - len(new)
        return torch.stack([self._kept[name] for name in names]).float().to(self.detector.device)

    def take(self, folder: str | os.PathLike) -> None:
        """Keep the maps in another folder too, if they are of this detector.

        Raises:
            RunError: if the file there is damaged.
        """
        path = as_path(folder) / CELLS
        if not holds(path, self.detector):
            return
        tensors, _ = read_tensors(path, KIND)
        names = (row.numpy().tobytes() for row in tensors["images"])
        found = dict(zip(names, tensors["cells"].to(self.dtype), strict=True))
        new = found.keys() - self._kept.keys()
        self._kept = found | self._kept
        if new and path != self.path:
            self._write()

    def _forget(self) -> None:
        self._owner, self._numbers = owner(self.detector), number_format(self.detector.precision)
        self._kept: dict[bytes, Tensor] = {}

    def _write(self) -> None:
        images = torch.tensor([[*name] for name in self._kept], dtype=torch.uint8)
        tensors = {"images": images, "cells": torch.stack([*self._kept.values()])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"kind": KIND, OWNER: self._owner})


def owner(detector: EfficientAD) -> str:
    """What the cells of a detector depend on: its networks, mu, sigma and number format."""
    after = ("cell_means", "quantiles")  # what is done with the cells afterwards
    state = {name: t for name, t in detector.state_dict().items() if name not in after}
    numbers = number_format(detector.precision)
    return f"{fingerprint(state)} {detector.padding} {detector.image_size} {numbers}"


def holds(path: str | os.PathLike, detector: EfficientAD) -> bool:
    """Whether a file holds cells of this detector.

    Raises:
        RunError: if the file is damaged.
    """
    return as_path(path).is_file() and header_of(path).get(OWNER) == owner(detector)
