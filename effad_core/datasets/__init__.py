"""Datasets: images, scenarios and pretraining images."""

import os
from dataclasses import replace

from effad_core.errors import DataError

from .images import list_images, read_image, read_mask
from .layouts import list_scenarios, open_folder
from .pretraining import Draws, PretrainingImages, open_pretraining
from .published import DATASETS, dataset_name
from .resized import ResizedImages
from .scenario import DefectKind, Sample, Scenario, evenly, hold_out
from .solar import SOLAR_SCENARIOS, open_solar
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augment,
    draw_augmentation,
    normalise,
    resize,
    to_tensor,
)

SCENARIOS = (*SOLAR_SCENARIOS, "tray")  # what opens by name

__all__ = [
    "DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SCENARIOS",
    "SOLAR_SCENARIOS",
    "DataError",
    "DefectKind",
    "Draws",
    "PretrainingImages",
    "ResizedImages",
    "Sample",
    "Scenario",
    "augment",
    "dataset_name",
    "draw_augmentation",
    "evenly",
    "hold_out",
    "list_images",
    "list_scenarios",
    "normalise",
    "open_folder",
    "open_pretraining",
    "open_scenario",
    "open_solar",
    "read_image",
    "read_mask",
    "resize",
    "to_tensor",
]


def open_scenario(
    source: str | os.PathLike,
    *,
    include_graded: bool = False,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Scenario:
    """Open a scenario by name, or a folder of images.

    A name wins over a folder of that name in the current directory: "./tray" opens the folder.

    Args:
        source: "solar-mono", "solar-poly", "tray" (drawn once, into data/tray), or the path of a
            folder: one with train/good, an object of VisA, or images of good parts alone, in it
            and in folders below it (see `layouts`).
        include_graded: solar scenarios only: test on cells of uncertain defects too.
        validation_fraction: share of the training images to hold out for validation, where the
            scenario does not bring validation images.
        seed: seed of that choice.

    Returns:
        The scenario.

    Raises:
        DataError: if the name or folder does not exist or cannot be used.

    Example:
        >>> scenario = open_scenario("tray")
        >>> len(scenario.train), len(scenario.validation), len(scenario.test)
        (200, 40, 120)
    """
    options = {"validation_fraction": validation_fraction, "seed": seed}
    if source in SOLAR_SCENARIOS:
        return open_solar(source, include_graded=include_graded, **options)
    if source != "tray" and not os.path.exists(os.path.expanduser(source)):
        raise DataError(
            f"'{source}' is neither a scenario ({', '.join(SCENARIOS)}) nor an existing "
            "folder: choose one of these names or the path of a folder that holds train/good."
        )
    if include_graded:
        raise DataError(
            f"include_graded has no meaning for {source}: leave it out, only "
            f"{' and '.join(SOLAR_SCENARIOS)} have graded cells."
        )
    if source != "tray":
        return open_folder(source, **options)
    from .tray import tray_folder  # draws: not for those who only read images

    return replace(
        open_folder(tray_folder(), **options),
        name="tray",
        source="a parts tray drawn by effad_core",
        licence="Apache-2.0 (drawn by this project)",
    )
