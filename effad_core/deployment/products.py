"""Several products in one detector: one training, and for each product numbers of its own.

    effad train path/to/bolts path/to/nuts path/to/washers

The networks learn all products together. What is found on images afterwards, the means of the
cells, the quantiles and the thresholds, is found for each product alone, or the product that is
hardest to predict would set everyone's. Each product has a file, which `effad predict` takes.
"""

import copy
from collections.abc import Sequence

from effad_core.datasets import Scenario
from effad_core.detector import EfficientAD
from effad_core.errors import DataError
from effad_core.schedule import Schedule
from effad_core.training import find_map_numbers


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
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"two products are called {min(twice)}: give their folders names of their own"
        )
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
        It has no thresholds yet: `fit_thresholds` finds them.

    Raises:
        DataError, ValueError: as `train`.
    """
    own = copy.deepcopy(detector)
    own.cell_means.fill_(1)
    find_map_numbers(own, scenario, schedule)
    own.card["product"] = scenario.name
    return own
