"""ThresholdExplorer: the time of an update, against plots that are drawn anew each time.

    python benchmarks/explorer.py

Each update moves the threshold of the same drawn evaluation and makes everything that the page is
then sent: both tables, sentences, and the histogram, the ROC and the precision-recall curve as
pictures. The plain way draws the same three plots with `effad_core.figures` and makes its tables of
the same counts. What the browser needs to show them is in neither.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from effad_core import figures
from effad_core.explorer import ThresholdExplorer
from effad_core.explorer.markup import readout
from effad_core.thresholds import confusion, precision_recall_curve

import numpy as np
from PIL import Image

SIDE = 256  # of the images and their maps


class Drawn(SimpleNamespace):
    """A sample whose image is noise."""

    def load(self) -> Image.Image:
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    def load_mask(self) -> None:
        return None


def draw(images: int) -> SimpleNamespace:
    """An evaluation of as many normal as anomalous images."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 2
    maps = [rng.gamma(2, 0.03, (SIDE, SIDE)).astype(np.float32) + 0.3 * label for label in labels]
    return SimpleNamespace(
        labels=labels,
        scores={"combined": np.array([m.max() for m in maps])},
        maps=maps,
        samples=[Drawn(path=Path(f"{i}.png"), anomaly_type="drawn") for i in range(images)],
    )


def plainly(evaluation: SimpleNamespace, threshold: float) -> None:
    """Draw the three plots and write the tables."""
    labels, scores = evaluation.labels, evaluation.scores["combined"]
    groups = {"normal": scores[labels == 0], "anomalous": scores[labels == 1]}
    precision, recall, _ = precision_recall_curve(labels, scores)
    for figure in (
        figures.score_histogram(groups, "Scores", threshold),
        figures.roc_curves(labels, {"combined": scores}, "ROC curve"),
        figures.curves({"combined": (recall, precision)}, "recall", "precision", "Precision"),
    ):
        figure.savefig(io.BytesIO(), format="png")
    readout(confusion(labels, scores, threshold))


def milliseconds(update: Callable[[float], None], values: np.ndarray) -> np.ndarray:
    """Of each update, after one that is not counted."""
    update(float(values[0]))
    taken = []
    for value in values[1:]:
        start = time.perf_counter()
        update(float(value))
        taken.append(1000 * (time.perf_counter() - start))
    return np.array(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=200)
    args = parser.parse_args()

    evaluation = draw(args.images)
    explorer = ThresholdExplorer(evaluation)
    low, high = np.quantile(evaluation.scores["combined"], [0.02, 0.98])
    values = np.random.default_rng(1).uniform(low, high, args.updates + 1)
    plain = milliseconds(lambda value: plainly(evaluation, value), values[:31])
    print(f"{args.images} images with maps of {SIDE}x{SIDE}, {args.updates} updates")
    print(f"{'update of':<28}{'median':>10}{'p99':>10}   plain way / this one")
    for name, update in (
        ("the image threshold", lambda value: setattr(explorer, "threshold", value)),
        ("the pixel threshold", lambda value: setattr(explorer, "pixel_threshold", value)),
        ("the image", lambda value: setattr(explorer, "index", int(1e6 * value) % args.images)),
    ):
        taken = milliseconds(update, values)
        ratio = f"{np.median(plain) / np.median(taken):.1f}" if "image threshold" in name else ""
        middle, slow = np.quantile(taken, [0.5, 0.99])
        print(f"{name:<28}{middle:>7.1f} ms{slow:>7.1f} ms   {ratio}".rstrip())
    print(f"{'the plots, drawn anew':<28}{np.median(plain):>7.1f} ms")


if __name__ == "__main__":
    main()
