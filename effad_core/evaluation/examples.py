"""Score a scenario once, and choose by rules which of its images are shown, and on which scale.

No image is picked by hand and no scale by test images. Notebook 09 explains the rules.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from effad_core.datasets import Sample, Scenario, evenly
from effad_core.prediction import Prediction, Predictor
from effad_core.thresholds import OperatingPoint, lowest_rate, threshold_for_fpr

import numpy as np
from tqdm.auto import tqdm

METHODS = {  # title of a map's column -> where a prediction has it
    "student-teacher": "st_map",
    "autoencoder": "ae_map",
    "combined": "map",
}
RATE = 0.05  # false positive rate of the operating point
BORDER = 16 / 256  # width of the border band, in sides of the image
CALM = 0.95  # share of validation images that stay in the lower half of the colour scale

Limits = dict[str, tuple[float, float]]  # of each method, as `map_panel` takes them


@dataclass(frozen=True)
class Scored:
    """What is kept of an image's prediction; its maps are not.

    Attributes:
        sample: the image.
        kind: of its defects, "good" for a normal image; see `kind_of`.
        score: the anomaly score.
        peaks: the maximum of each map of `METHODS`, at the image's own size.
        at_border: whether the combined map's maximum lies in the border band, away from any
            defect; None if nobody says where the defect is.
        level: the combined map's median.
    """

    sample: Sample
    kind: str
    score: float
    peaks: Mapping[str, float]
    at_border: bool | None
    level: float = 0.0


@dataclass(frozen=True)
class Survey:
    """A detector's scores on a scenario, and the operating point from its validation images."""

    name: str
    detector: Predictor
    validation: tuple[Scored, ...]
    test: tuple[Scored, ...]
    point: OperatingPoint

    def verdict(self, scored: Scored) -> str:
        """One of "passed", "false alarm", "found" and "missed", at the operating point."""
        if scored.score > self.point.threshold:
            return "found" if scored.sample.label else "false alarm"
        return "missed" if scored.sample.label else "passed"


def survey(
    detector: Predictor, scenario: Scenario, test_images: int = 0, rate: float = RATE
) -> Survey:
    """Score a scenario's validation and test images.

    The operating point keeps the false positive rate on average over sets of validation images. If
    they are too few for it, it keeps the lowest rate that they support, and says so.

    Args:
        detector: trained; `prepare` makes it faster.
        scenario: its test split may be empty.
        test_images: how many test images are scored at most, see `choose_tested`; 0: all.
        rate: in (0, 1).

    Raises:
        DataError: if an image or a mask cannot be read.
        ValueError: if there are no validation images, the detector has no quantiles, or a map
            contains NaN.
    """
    if not scenario.validation:
        raise ValueError(f"{scenario.name} has no validation images to set a threshold with")
    validation = _score(detector, scenario.validation, f"{scenario.name}, validation")
    test = _score(detector, choose_tested(scenario.test, test_images), f"{scenario.name}, test")
    rate = max(rate, lowest_rate(len(validation), guarantee="average"))
    point = threshold_for_fpr([s.score for s in validation], rate, guarantee="average")
    return Survey(scenario.name, detector, validation, test, point)


def choose_tested(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """At most `count` of the samples, half of them normal; 0: all.

    The kinds of anomalies share the other half by turns, so that each is present before any is
    there twice. The normal images, and those of each kind, are evenly spaced.
    """
    if count == 0:
        return tuple(samples)
    half = max(1, count // 2)
    kinds: dict[tuple[str, str], list[Sample]] = {}
    for sample in (s for s in samples if s.label):
        kinds.setdefault((sample.anomaly_type, kind_of(sample)), []).append(sample)
    turns = [(turn, kind) for kind, own in kinds.items() for turn in range(len(own))]
    turns.sort(key=lambda place: place[0])  # stable: within a turn in the order given
    shares = Counter(kind for _, kind in turns[:half])
    anomalous = (s for kind, share in shares.items() for s in evenly(kinds[kind], share))
    return (*evenly([s for s in samples if s.label == 0], half), *anomalous)


def kind_of(sample: Sample) -> str:
    """The names of the sample's defects where the scenario has them, else its anomaly type."""
    names = sorted({name for name in sample.defect_names() if name})
    return (" + ".join(names) or sample.anomaly_type).replace("_", " ")


def peak_at_border(m: np.ndarray, mask: np.ndarray | None = None) -> bool:
    """Whether a map's maximum lies in the outermost band, with no defect within a band's width.

    The band is 16 pixels wide at 256, and as much wider as the map is larger. A detector without
    padding has no cells there: the band repeats the outermost ones, so that their maxima count.

    Args:
        m: shape (H, W).
        mask: boolean, the defects; None: there is none.
    """
    rows, columns = (max(1, round(BORDER * side)) for side in m.shape)
    band = np.ones(m.shape, bool)
    band[rows:-rows, columns:-columns] = False
    peaks = np.argwhere(band & np.isclose(m, m.max(), rtol=1e-5, atol=1e-7))
    if not len(peaks):
        return False
    if mask is None:
        return True
    reach = np.array([rows, columns])
    top, left = np.maximum(peaks.min(axis=0) - reach, 0)
    bottom, right = peaks.max(axis=0) + reach + 1
    return not mask[top:bottom, left:right].any()


def median_examples(
    scored: Iterable[Scored], group: Callable[[Scored], object] | None = None
) -> list[Scored]:
    """Of each kind the image with the median score, normal ones first; of two the lower one.

    The median is what a user of this detector gets: half of the kind scores lower. The best image
    of each kind would show only that something can be found.

    Args:
        scored: images.
        group: what counts as one kind; by default the anomaly type and the kind of defect.
    """
    group = group or (lambda s: (s.sample.anomaly_type, s.kind))
    groups: dict[tuple, list[Scored]] = {}
    for one in scored:
        groups.setdefault((one.sample.label, group(one)), []).append(one)
    return [ranked(groups[key])[(len(groups[key]) - 1) // 2] for key in sorted(groups)]


def choose_failures(surveyed: Survey, count: int = 3) -> dict[str, list[Scored]]:
    """The worst test images of each kind of failure, at most `count`, the worst first.

    * "false alarms": normal images above the threshold, the highest scores first.
    * "misses": anomalous images not above it, the lowest scores first.
    * "borders": images whose maximum is `peak_at_border`, the highest scores first. Some are
      neither of the above: the verdict may be right, its place is not.
    """
    falling = ranked(surveyed.test)[::-1]
    found = {
        "false alarms": [s for s in falling if surveyed.verdict(s) == "false alarm"],
        "misses": [s for s in falling[::-1] if surveyed.verdict(s) == "missed"],
        "borders": [s for s in falling if s.at_border],
    }
    return {name: chosen[:count] for name, chosen in found.items()}


def colour_limits(surveys: Sequence[Survey]) -> Limits:
    """One colour scale for each method, the same in all scenarios, from validation images alone.

    It begins at 0, which is q_a. In its lower half lie the maxima of 95 % of the validation images
    of every scenario: of a normal image no more is to be expected, and what is brighter deserves a
    look. It does not end below 0.1, which is q_b.

    Raises:
        ValueError: if there are no surveys.
    """
    if not surveys:
        raise ValueError("colour limits need the validation images of at least one survey")
    limits = {}
    for name in METHODS:
        calm = [np.quantile([s.peaks[name] for s in one.validation], CALM) for one in surveys]
        limits[name] = (0.0, max(0.1, 2 * float(max(calm))))
    return limits


def maps_of(prediction: Prediction) -> dict[str, np.ndarray]:
    return {name: getattr(prediction, attribute) for name, attribute in METHODS.items()}


def ranked(scored: Iterable[Scored]) -> list[Scored]:
    """By score; equal scores by path, so that the order of the files does not matter."""
    return sorted(scored, key=lambda s: (s.score, str(s.sample.path)))


def _score(detector: Predictor, samples: Sequence[Sample], what: str) -> tuple[Scored, ...]:
    found = []
    predictions = detector.stream([sample.path for sample in samples])
    progress = tqdm(predictions, total=len(samples), desc=what, leave=False)
    for sample, (_, prediction) in zip(samples, progress, strict=True):
        peaks = {name: float(m.max()) for name, m in maps_of(prediction).items()}
        known = sample.label == 0 or bool(sample.mask_paths)
        border = peak_at_border(prediction.map, sample.load_mask()) if known else None
        level = float(np.median(prediction.map))
        found.append(Scored(sample, kind_of(sample), prediction.score, peaks, border, level))
    return tuple(found)
