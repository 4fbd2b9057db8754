"""Electroluminescence images of solar cells (the PyPI package `elpv-dataset`) -> Scenario.

2,624 gray images of 300x300 pixels, cut out of 44 mono- and polycrystalline modules, each with the
defect probability that experts gave it: 0, 1/3, 2/3 or 1 (Buerhop-Lutz et al., EU PVSEC 2018).
"""

from effad_core.errors import DataError, not_installed

from .images import package_folder
from .scenario import Sample, Scenario, good_samples, hold_out, ranked_by_name

SOLAR_SCENARIOS = ("solar-mono", "solar-poly")
LICENCE = "CC BY-NC-SA 4.0"
TEST_FRACTION = 0.25  # of the normal images


def open_solar(
    name: str, *, include_graded: bool = False, validation_fraction: float = 0.1, seed: int = 0
) -> Scenario:
    """Open `solar-mono` or `solar-poly`.

    Normal is a defect probability of 0, anomalous 1. The test split, the same for every seed, is
    all anomalous cells and the quarter of the normal cells that comes first by the SHA-256 of the
    file name; the other normal cells are for training and validation.

    The package does not say which cells were cut out of the same module. The cells of a module
    resemble one another, so this split cannot keep modules apart, and scores on new modules may
    be lower than the scores measured here.

    Args:
        name: "solar-mono" or "solar-poly".
        include_graded: add the cells of probability 1/3 and 2/3 to the test split, as anomalous,
            with the types "graded-0.33" and "graded-0.67".
        validation_fraction: share of the training images to hold out for validation.
        seed: seed of that choice (see `hold_out`).

    Returns:
        The scenario, without masks.

    Raises:
        DataError: if the package is not installed or damaged, or the name is unknown.
    """
    if name not in SOLAR_SCENARIOS:
        raise DataError(f"{name} is no solar scenario: choose {' or '.join(SOLAR_SCENARIOS)}.")
    cells = _read_labels(cell_type=name.removeprefix("solar-"))
    normal = good_samples(path for path, probability in cells if probability == 0)
    by_name = ranked_by_name(normal, "test")
    test = set(by_name[: round(TEST_FRACTION * len(by_name))])
    train, validation = hold_out([s for s in normal if s not in test], validation_fraction, seed)
    types = {1.0: "defective"}
    if include_graded:
        types |= {0.33: "graded-0.33", 0.67: "graded-0.67"}
    anomalous = [
        Sample(path, 1, types[probability]) for path, probability in cells if probability in types
    ]
    return Scenario(
        name=name,
        train=train,
        validation=validation,
        test=(*(s for s in normal if s in test), *anomalous),
        source="solar cells of the package elpv-dataset",
        licence=LICENCE,
    )


def _read_labels(cell_type: str) -> list[tuple]:
    """(path, probability to two digits) of every cell of a type, by file name."""
    folder = package_folder("elpv_dataset")
    if folder is None:
        raise DataError(
            not_installed(f"The scenario solar-{cell_type}", "elpv-dataset", "course") + "."
        )
    labels = folder / "data" / "labels.csv"
    try:
        rows = [line.split() for line in labels.read_text("utf-8").splitlines() if line.strip()]
        return sorted(
            (labels.parent / path, round(float(probability), 2))
            for path, probability, kind in rows
            if kind == cell_type
        )
    except (OSError, ValueError):
        raise DataError(
            f"The labels {labels} cannot be read: run `pip install --force-reinstall elpv-dataset`."
        ) from None
