"""Datasets: images, scenarios and pretraining images."""

import os
from dataclasses import replace

from effad_core.errors import DataError

from .chosen import KEYS, Paths
from .images import list_images, read_image, read_mask
from .layouts import list_scenarios, open_chosen, open_folder
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
    source: str | os.PathLike | None = None,
    *,
    normal: Paths | None = None,
    anomalous: Paths | None = None,
    normal_test: Paths | None = None,
    masks: Paths | None = None,
    include_graded: bool = False,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Scenario:
    """Open a scenario by name, a folder of images, or folders and files that you name.

    A name wins over a folder of that name in the current directory: "./tray" opens the folder.

    Args:
        source: "solar-mono", "solar-poly", "tray" (drawn once, into data/tray), or the path of a
            folder: one with train/good, one with folders of good and bad parts, an object of
            VisA, one with a file scenario.toml, or images of good parts alone, in it and in
            folders below it (see `layouts`).
        normal: instead of a source, good parts to train on: a folder, with those below it, an
            image file, or several of them.
        anomalous: with `normal`, bad parts to test on. Each folder's name is a kind of anomaly.
        normal_test: with `normal`, good parts to test on.
        masks: with `anomalous`, masks, called like their images (0001.png or 0001_mask.png).
        include_graded: solar scenarios only: test on cells of uncertain defects too.
        validation_fraction: share of the training images to hold out for validation, where the
            scenario does not bring validation images.
        seed: seed of that choice.

    Returns:
        The scenario.

    Raises:
        DataError: if the name or folder does not exist or cannot be used, or it cannot be told
            which of its images show good parts.

    Example:
        >>> scenario = open_scenario("tray")
        >>> len(scenario.train), len(scenario.validation), len(scenario.test)
        (200, 40, 120)
    """
    chosen = dict(zip(KEYS, (normal, anomalous, normal_test, masks), strict=True))
    if any(paths is not None for paths in chosen.values()) == (source is not None):
        raise DataError(
            "open_scenario needs either a source or normal images: give one of them, for example "
            "open_scenario(normal='parts/ok', anomalous='parts/scratch')."
        )
    options = {"validation_fraction": validation_fraction, "seed": seed}
    if source is None and not include_graded:
        return open_chosen(chosen, **options)
    if source in SOLAR_SCENARIOS:
        return open_solar(source, include_graded=include_graded, **options)
    if source not in ("tray", None) and not os.path.exists(os.path.expanduser(source)):
        raise DataError(
            f"'{source}' is neither a scenario ({', '.join(SCENARIOS)}) nor an existing "
            "folder: choose one of these names or the path of a folder that holds train/good."
        )
    if include_graded:
        raise DataError(
            f"include_graded has no meaning for {source or 'folders'}: leave it out, only "
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
