"""Several methods' maps of the same images side by side, as in the paper's Figures 1 to 3.

    effad gallery solar-mono=RUN solar-mono=OTHER_RUN tray=RUN tray=OTHER_RUN --output methods.png

No image is picked by hand: it is the median one of its anomaly type by the scores of the method
that is named first. No colour scale comes from test images.
"""

from collections.abc import Mapping, Sequence

from effad_core.evaluation.examples import CALM, Limits, Scored, Survey, median_examples
from effad_core.evaluation.pictures import Picture
from effad_core.figures import map_panel

import numpy as np

Compared = Mapping[str, Survey]  # of one scenario, by method; the first one has test images


def comparison_limits(scenarios: Sequence[Compared]) -> Limits:
    """One colour scale for each method, the same in all scenarios, from validation images alone.

    It begins at the lowest of the scenarios' usual values, the median over validation images of the
    map's median. In its lower half lie the maxima of 95 % of the validation images of every
    scenario, as in `colour_limits`.

    Args:
        scenarios: each with the same methods.
    """
    limits = {}
    for method in scenarios[0]:
        surveys = [compared[method] for compared in scenarios]
        lowest = min(float(np.median([s.level for s in one.validation])) for one in surveys)
        calm = max(
            float(np.quantile([s.peaks["combined"] for s in one.validation], CALM))
            for one in surveys
        )
        limits[method] = (lowest, lowest + 2 * max(calm - lowest, 1e-6))
    return limits


def comparison_picture(scenarios: Sequence[Compared]) -> Picture:
    """Image, ground truth and a column a method: the median image of each anomaly type.

    Args:
        scenarios: each with the same methods, in the order of the columns.

    Raises:
        ValueError: for no scenarios, other methods in one than in another, or no test images.
    """
    if not scenarios or any(list(one) != list(scenarios[0]) for one in scenarios):
        raise ValueError("each scenario needs a detector of each method, in the same order")
    methods, limits = list(scenarios[0]), comparison_limits(scenarios)
    panel, labels = [], []
    for compared in scenarios:
        first = next(iter(compared.values()))
        for scored in median_examples(first.test, lambda s: s.sample.anomaly_type):
            panel.append(_row(first.name, scored, compared))
            labels.append(panel[-1]["title"].replace("\n", ", "))
    if not panel:
        raise ValueError("there is no test image to show in any of the scenarios")
    title = f"The median test image of each anomaly type, by {methods[0]}"
    figure = map_panel(panel, methods, limits, title, truth=True)
    alt = f"{title}. Columns: image, ground truth, the maps of {', '.join(methods)}. "
    alt += f"Rows from the top: {'; '.join(labels)}."
    return Picture("methods", figure, title, alt)


def _row(name: str, scored: Scored, compared: Compared) -> dict:
    """An image, its mask, and each method's map of it."""
    image = np.asarray(scored.sample.load())
    normal = np.zeros(image.shape[:2], bool)
    return {
        "title": f"{name}\n{scored.kind}",
        "image": image,
        "mask": scored.sample.load_mask() if scored.sample.label else normal,
        "maps": {
            method: one.detector.predict(scored.sample.path).map for method, one in compared.items()
        },
    }
