"""A gallery of anomaly maps: which images are shown, and on which colour scale, follows from rules.

    python -m effad_core.gallery solar-mono=RUN tray=RUN --output docs/gallery.png

No image is picked by hand and no scale by test images. Notebook 09 explains the rules.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from effad_core.datasets import DataError, Sample, Scenario, evenly, open_scenario
from effad_core.detector import EfficientAD
from effad_core.figures import map_panel
from effad_core.prediction import Prediction, Predictor
from effad_core.runs import RunError, write_text
from effad_core.thresholds import OperatingPoint, lowest_rate, threshold_for_fpr
from effad_core.training import DETECTOR

METHODS = {  # title of a map's column -> where a prediction has it
    "student–teacher": "st_map",
    "autoencoder": "ae_map",
    "combined": "map",
}
RATE = 0.05  # false positive rate of the operating point
BORDER = 16 / 256  # width of the border band, in sides of the image
CALM = 0.95  # share of validation images that stay in the lower half of the colour scale
ROWS = 8  # of one figure

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
    """

    sample: Sample
    kind: str
    score: float
    peaks: Mapping[str, float]
    at_border: bool | None


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


@dataclass(frozen=True)
class Picture:
    """A figure, the stem of its file, its title, and in `alt` what it shows, in words."""

    name: str
    figure: Figure
    title: str
    alt: str


Rows = Sequence[tuple[Survey, Scored]]


# --- scoring -------------------------------------------------------------------------------------


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

    The normal ones are evenly spaced. The anomalous ones are taken in turns from each kind, so that
    each is present before any is there twice.
    """
    if count == 0:
        return tuple(samples)
    normal = evenly([s for s in samples if s.label == 0], max(1, count // 2))
    turns, seen = [], Counter()
    for sample in (s for s in samples if s.label):
        kind = (sample.anomaly_type, kind_of(sample))
        turns.append((seen[kind], sample))
        seen[kind] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: within a turn in the order given
    return normal + tuple(sample for _, sample in turns[: max(1, count // 2)])


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


# --- rules ---------------------------------------------------------------------------------------


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
    return [_ranked(groups[key])[(len(groups[key]) - 1) // 2] for key in sorted(groups)]


def choose_failures(surveyed: Survey, count: int = 3) -> dict[str, list[Scored]]:
    """The worst test images of each kind of failure, at most `count`, the worst first.

    * "false alarms": normal images above the threshold, the highest scores first.
    * "misses": anomalous images not above it, the lowest scores first.
    * "borders": images whose maximum is `peak_at_border`, the highest scores first. Some are
      neither of the above: the verdict may be right, its place is not.
    """
    falling = _ranked(surveyed.test)[::-1]
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


# --- pictures ------------------------------------------------------------------------------------


def scenario_pictures(surveyed: Survey, limits: Limits) -> list[Picture]:
    """The median image of every kind of defect, each figure with the median normal image on top.

    A figure shows one anomaly type, and there are several where it has many kinds. Without test
    images there is one of validation images: those with the lowest, median and highest score.
    """
    if not surveyed.test:
        order = _ranked(surveyed.validation)
        shown = [order[i] for i in sorted({0, (len(order) - 1) // 2, len(order) - 1})]
        title = f"{surveyed.name}: validation images, from the lowest to the highest score"
        return [_picture(surveyed.name, title, [(surveyed, s) for s in shown], limits)]
    examples = median_examples(surveyed.test)
    normal = [s for s in examples if s.sample.label == 0]
    types = sorted({s.sample.anomaly_type for s in examples if s.sample.label})
    pages = [
        (kind, page)
        for kind in types
        for page in _pages([s for s in examples if s.sample.anomaly_type == kind], ROWS - 1)
    ]
    pictures = []
    for number, (kind, page) in enumerate(pages or [("good", [])], start=1):
        name = surveyed.name if len(pages) < 2 else f"{surveyed.name}-{number}"
        title = f"{surveyed.name}, {kind.replace('_', ' ')}: the median test image of each kind"
        title += f" (threshold {surveyed.point.threshold:.2f})"
        rows = [(surveyed, s) for s in (*normal, *page)]
        pictures.append(_picture(name, title, rows, limits))
    return pictures


def failure_pictures(surveys: Sequence[Survey], limits: Limits) -> list[Picture]:
    """One figure for each kind of failure that occurs, with up to three images of each scenario."""
    titles = {
        "false alarms": "False alarms: the highest-scoring normal test images",
        "misses": "Misses: the lowest-scoring anomalous test images",
        "borders": "Borders: the maximum is at the edge, and no defect is near",
    }
    count = max(1, min(3, ROWS // max(1, len(surveys))))
    chosen = [(one, choose_failures(one, count)) for one in surveys]
    pictures = []
    for name, title in titles.items():
        if rows := [(one, s) for one, failures in chosen for s in failures[name]]:
            stem = f"failures-{name.replace(' ', '-')}"
            pictures.append(_picture(stem, title, rows, limits, scenarios=True))
    return pictures


def overview_picture(surveys: Sequence[Survey], limits: Limits) -> Picture:
    """The median image of each anomaly type of some scenarios, in one figure.

    Raises:
        ValueError: if no scenario has test images.
    """
    rows = [
        (one, s)
        for one in surveys
        for s in median_examples(one.test, lambda s: s.sample.anomaly_type)
    ]
    if not rows:
        raise ValueError("there is no test image to show in any of the scenarios")
    title = "The median test image of each anomaly type"
    return _picture("gallery", title, rows, limits, scenarios=True)


def write_gallery(folder: str | os.PathLike, surveys: Sequence[Survey]) -> list[Picture]:
    """Write every picture of some scenarios as PNG, and `gallery.md`, which shows them all.

    Args:
        folder: is made if it is missing; files of the same names are replaced.
        surveys: of different scenarios.

    Returns:
        The pictures of the scenarios, then those of the failures; the file of each is its name
        with .png.

    Raises:
        ValueError: for no surveys, or two of one name.
    """
    names = [one.name for one in surveys]
    if len(set(names)) < len(names):
        raise ValueError(f"each scenario may appear once, not {', '.join(sorted(names))}")
    limits = colour_limits(surveys)
    pictures = [picture for one in surveys for picture in scenario_pictures(one, limits)]
    pictures += failure_pictures(surveys, limits)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = ["# Anomaly maps", *(f"* {one.name}: {one.point}" for one in surveys)]
    for picture in tqdm(pictures, desc="writing", leave=False):
        save(picture, folder / f"{picture.name}.png")
        sections += [f"## {picture.title}", f"![{picture.alt}](<{picture.name}.png>)"]
    write_text(folder / "gallery.md", "\n\n".join(sections) + "\n")
    return pictures


def save(picture: Picture, path: str | os.PathLike) -> None:
    """Write a picture as a small PNG, with its title and its alternative text in the file."""
    drawn, words = BytesIO(), PngInfo()
    picture.figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 1})
    words.add_text("Title", picture.title)
    words.add_text("Description", picture.alt)
    Image.open(drawn).convert("RGB").save(path, format="PNG", optimize=True, pnginfo=words)


def _score(detector: Predictor, samples: Sequence[Sample], what: str) -> tuple[Scored, ...]:
    found = []
    for start in tqdm(range(0, len(samples), 8), desc=what, leave=False):  # no more maps than 8
        part = samples[start : start + 8]
        for sample, prediction in zip(part, detector.predict([s.path for s in part]), strict=True):
            peaks = {name: float(m.max()) for name, m in _maps(prediction).items()}
            known = sample.label == 0 or bool(sample.mask_paths)
            border = peak_at_border(prediction.map, sample.load_mask()) if known else None
            found.append(Scored(sample, kind_of(sample), prediction.score, peaks, border))
    return tuple(found)


def _maps(prediction: Prediction) -> dict[str, np.ndarray]:
    return {name: getattr(prediction, attribute) for name, attribute in METHODS.items()}


def _ranked(scored: Iterable[Scored]) -> list[Scored]:
    """By score; equal scores by path, so that the order of the files does not matter."""
    return sorted(scored, key=lambda s: (s.score, str(s.sample.path)))


def _pages(rows: Sequence, most: int) -> list[list]:
    """Rows on as few pages as hold them, as evenly as possible."""
    parts = np.array_split(np.arange(len(rows)), max(1, -(-len(rows) // most)))
    return [[rows[index] for index in part] for part in parts if len(part)]


def _picture(name: str, title: str, rows: Rows, limits: Limits, scenarios: bool = False) -> Picture:
    """Draw rows, each with its kind, verdict and score, and if asked for with its scenario."""
    panel, labels = [], []
    for one, scored in rows:
        image = np.asarray(scored.sample.load())
        normal = np.zeros(image.shape[:2], bool)
        mask = scored.sample.load_mask() if scored.sample.label else normal
        named = f"{one.name}, {scored.kind}" if scenarios else scored.kind
        verdict = f"{one.verdict(scored)} at {scored.score:.2f}"
        labels.append(f"{named}, {verdict}")
        maps = _maps(one.detector.predict(scored.sample.path))
        panel.append({"title": f"{named}\n{verdict}", "image": image, "mask": mask, "maps": maps})
    columns = {name: limits[name] for name in METHODS}
    figure = map_panel(panel, [*METHODS], columns, title, truth=True)
    alt = f"{title}. Columns: image, ground truth, {', '.join(METHODS)} map. "
    alt += f"Rows from the top, with verdict and score: {'; '.join(labels)}."
    return Picture(name, figure, title, alt)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m effad_core.gallery",
        description="One picture: of each scenario the median test image of each anomaly type.",
    )
    parser.add_argument(
        "detectors",
        nargs="+",
        metavar="SCENARIO=DETECTOR",
        help="a scenario's name or folder, and a detector's file or the folder of its run",
    )
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args(arguments)
    try:
        surveys = [_survey_named(pair) for pair in options.detectors]
        picture = overview_picture(surveys, colour_limits(surveys))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(picture, options.output)
    except (DataError, RunError, ValueError, OSError) as error:
        sys.exit(str(error))
    for one in surveys:
        print(f"{one.name}: {one.point}")
    print(f"{options.output}: {picture.alt}")


def _survey_named(pair: str) -> Survey:
    source, _, path = pair.partition("=")
    if not source or not path:
        raise ValueError(f"'{pair}' is not of the form SCENARIO=DETECTOR")
    file = Path(path) / DETECTOR if Path(path).is_dir() else Path(path)
    return survey(EfficientAD.load(file).prepare(), open_scenario(source))


if __name__ == "__main__":
    main()
