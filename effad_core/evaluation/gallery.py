"""Pictures of anomaly maps: the median image of every kind, and the failures.

    effad gallery solar-mono=RUN tray=RUN --output docs/gallery.png
    effad gallery solar-mono=RUN solar-mono=OTHER --output methods.png

The second one compares methods (see `comparison`). Which images are shown, and on which colour
scale, follows from the rules in `examples`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.datasets import open_scenario
from effad_core.deployment.prepared import prepare
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.evaluation.comparison import comparison_picture
from effad_core.evaluation.examples import (
    METHODS,
    Limits,
    Scored,
    Survey,
    choose_failures,
    colour_limits,
    maps_of,
    median_examples,
    ranked,
    survey,
)
from effad_core.evaluation.methods import load_detector
from effad_core.evaluation.pictures import Picture, save
from effad_core.figures import map_panel
from effad_core.prediction import Predictor
from effad_core.storage.files import as_path, check_file, write_text

import numpy as np
from tqdm.auto import tqdm

ROWS = 8  # of one figure


Rows = Sequence[tuple[Survey, Scored]]


def scenario_pictures(surveyed: Survey, limits: Limits) -> list[Picture]:
    """The median image of every kind of defect, each figure with the median normal image on top.

    A figure shows one anomaly type, and there are several where it has many kinds. Without test
    images there is one of validation images: those with the lowest, median and highest score.
    """
    if not surveyed.test:
        order = ranked(surveyed.validation)
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
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = ["# Anomaly maps", *(f"* {one.name}: {one.point}" for one in surveys)]
    for picture in tqdm(pictures, desc="writing", leave=False):
        save(picture, folder / f"{picture.name}.png")
        sections += [f"## {picture.title}", f"![{picture.alt}](<{picture.name}.png>)"]
    write_text(folder / "gallery.md", "\n\n".join(sections) + "\n")
    return pictures


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
        maps = maps_of(one.detector.predict(scored.sample.path))
        panel.append({"title": f"{named}\n{verdict}", "image": image, "mask": mask, "maps": maps})
    columns = {name: limits[name] for name in METHODS}
    figure = map_panel(panel, [*METHODS], columns, title, truth=True)
    alt = f"{title}. Columns: image, ground truth, {', '.join(METHODS)} map. "
    alt += f"Rows from the top, with verdict and score: {'; '.join(labels)}."
    return Picture(name, figure, title, alt)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="effad gallery",
        description="One picture: of each scenario the median test image of each anomaly type. "
        "Name a scenario several times, with detectors of different methods, to compare them.",
        epilog="example: effad gallery solar-mono=RUN tray=RUN --output gallery.png",
    )
    parser.add_argument(
        "detectors",
        nargs="+",
        metavar="SCENARIO=DETECTOR",
        help="a scenario's name or folder, and a detector's file or the folder of its run",
    )
    parser.add_argument("--output", type=as_path, required=True, help="the PNG to write")
    parser.add_argument("--device", help=DEVICE_HELP)
    options = parser.parse_args(arguments)
    with command_errors("nothing was written"):
        check_file(options.output, "--output")
        named = [_named(pair, options.device) for pair in options.detectors]
        sources = [source for source, *_ in named]
        if len(set(sources)) < len(sources) or any(len(d.map_names) == 1 for *_, d in named):
            surveys, picture = _compared(named)
        else:
            surveys = [_survey(source, detector) for source, _, detector in named]
            picture = overview_picture(surveys, colour_limits(surveys))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        save(picture, options.output)
    for one in surveys:
        print(f"{one.name}: {one.point}")
    print(f"{options.output}: {picture.alt}")


def _compared(named: Sequence[tuple[str, str, Predictor]]) -> tuple[list[Survey], Picture]:
    """The first method's surveys, and the picture of all methods."""
    scenarios: dict[str, dict[str, Survey]] = {}
    for source, method, detector in named:
        compared = scenarios.setdefault(source, {})
        if method in compared:
            raise ValueError(f"{source} has two detectors of {method}: name one of them")
        compared[method] = _survey(source, detector, tested=not compared)
    picture = comparison_picture(list(scenarios.values()))
    return [next(iter(compared.values())) for compared in scenarios.values()], picture


def _named(pair: str, device: str | None) -> tuple[str, str, Predictor]:
    """The scenario, the name of the method, and the detector."""
    source, _, path = pair.partition("=")
    if not source or not path:
        raise ValueError(f"'{pair}' is not of the form SCENARIO=DETECTOR")
    method, detector = load_detector(path, device)
    if isinstance(detector, EfficientAD):
        detector = prepare(detector, device)
    return source, method, detector


def _survey(source: str, detector: Predictor, tested: bool = True) -> Survey:
    """Its scores; the verdicts are those of `effad predict`."""
    scenario = open_scenario(source)
    found = survey(detector, scenario if tested else replace(scenario, test=()))
    point = detector.operating_point
    return found if point is None else replace(found, point=point)
