"""Several products in one detector: one training, and for each product numbers of its own.

    effad train path/to/part_a path/to/part_b path/to/part_c

The networks learn all products together. The means of the cells, the quantiles and the thresholds
are then found for each product alone; otherwise the product that is hardest to predict would set
those of all. Each product has a file, which `effad predict` takes. Unlike products are better off
with a training each: docs/measurements.md has the numbers.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

from effad_core.datasets import ResizedImages, Scenario
from effad_core.datasets.full_scale import KnownScale
from effad_core.detector import EfficientAD
from effad_core.errors import DataError
from effad_core.schedule import Schedule
from effad_core.training import find_map_numbers, open_training_images


def together(scenarios: Sequence[Scenario]) -> Scenario:
    """One scenario of the training and validation images of several.

    Args:
        scenarios: two or more, with names of their own.

    Returns:
        It has no test images: those are judged product by product.

    Raises:
        DataError: if two have one name, or an image is in two splits.

    Example:
        >>> whole = together([scenario, replace(scenario, name="again")])
        >>> whole.name, len(whole.train) == 2 * len(scenario.train)
        ('tray+again', True)
    """
    names = [scenario.name for scenario in scenarios]
    alike = [name.casefold() for name in names]  # some systems' folders
    if twice := [name for name in names if alike.count(name.casefold()) > 1]:
        raise DataError(f"two products are called {twice[0]}: give their folders other names")
    return Scenario(
        "+".join(names),
        tuple(sample for scenario in scenarios for sample in scenario.train),
        tuple(sample for scenario in scenarios for sample in scenario.validation),
        (),
        "; ".join(dict.fromkeys(scenario.source for scenario in scenarios)),
        "; ".join(dict.fromkeys(scenario.licence for scenario in scenarios)),
    )


def for_product(detector: EfficientAD, scenario: Scenario, schedule: Schedule) -> EfficientAD:
    """A copy of a detector with the means of cells and the quantiles of one product.

    Args:
        detector: trained on several products (see `together`); it stays as it is.
        scenario: the product.
        schedule: of the training; it says whether cells are divided by their means.

    Returns:
        It has no thresholds: `fit_thresholds` finds them.

    Raises:
        DataError, ValueError: as `train`.
    """
    own, white = copy.deepcopy(detector), KnownScale(detector.full_scale)
    train, validation = (  # as the detector reads images, whose white is that of all products
        [replace(sample, full_scale=white) for sample in samples]
        for samples in (scenario.train, scenario.validation)
    )
    own.cell_means.fill_(1)
    training_images = open_training_images(own, train, schedule, 0)
    validation_images = ResizedImages(validation, own.image_size)
    find_map_numbers(own, training_images, validation_images, schedule.divide_cells)
    own.card["product"] = scenario.name
    return own
