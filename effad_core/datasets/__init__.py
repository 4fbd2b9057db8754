"""Datasets: images, scenarios and pretraining images."""

import os
from pathlib import Path

from .images import DataError, list_images, read_image, read_mask
from .layouts import open_folder
from .pretraining import PretrainingImages, open_pretraining
from .resized import ResizedImages
from .scenario import Sample, Scenario, hold_out
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

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOLAR_SCENARIOS",
    "DataError",
    "PretrainingImages",
    "ResizedImages",
    "Sample",
    "Scenario",
    "augment",
    "draw_augmentation",
    "hold_out",
    "list_images",
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

    Args:
        source: "solar-mono", "solar-poly", or the path of a folder (see `layouts`).
        include_graded: solar scenarios only: test on cells of uncertain defects too.
        validation_fraction: share of the training images to hold out for validation.
        seed: seed of that choice.

    Returns:
        The scenario.

    Raises:
        DataError: if the name or folder does not exist or cannot be used.
    """
    if source in SOLAR_SCENARIOS:
        return open_solar(
            source,
            include_graded=include_graded,
            validation_fraction=validation_fraction,
            seed=seed,
        )
    if not Path(source).expanduser().exists():
        raise DataError(
            f"'{source}' is neither a scenario ({', '.join(SOLAR_SCENARIOS)}) nor an existing "
            "folder: choose one of these names or the path of a folder that holds train/good."
        )
    if include_graded:
        raise DataError(
            f"include_graded has no meaning for the folder {source}: leave it out, only "
            f"{' and '.join(SOLAR_SCENARIOS)} have graded cells."
        )
    return open_folder(source, validation_fraction=validation_fraction, seed=seed)
