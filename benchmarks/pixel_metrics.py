"""Pixel metrics: effad_core against an argsort of all pixels and against scikit-learn.

    python benchmarks/pixel_metrics.py

All compute what the row names on the same drawn maps, exactly, and must agree to 1e-6. The argsort
is AU-PRO as MVTec AD's evaluation defines it: all pixels in order of their scores, cumulative sums
of the false positives and of the shares of regions. Scikit-learn has the other two: AU-ROC up to
each limit and average precision. Each row is a process of its own, and its memory is what the
process's peak rises by above that of drawing the maps.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from effad_core.metrics import pixel_metrics

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_curve

LIMITS = (0.05, 0.3, 1.0)
TOLERANCE = 1e-6
Images = list[np.ndarray]


def draw(images: int, side: int) -> tuple[Images, Images]:
    """Smooth random fields; every second image has three discs, some barely above the field."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    maps, masks = [], []
    for index in range(images):
        coarse = rng.standard_normal((max(side // 16, 2),) * 2).astype(np.float32)
        field = ndimage.zoom(coarse, side / len(coarse), order=1)
        field += 0.1 * rng.standard_normal((side, side), dtype=np.float32)
        mask = np.zeros((side, side), dtype=bool)
        for _ in range(3 * (index % 2)):
            centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.02, 0.12)
            disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
            field[disc] += np.float32(rng.uniform(0.5, 3))
            mask |= disc
        maps.append(field)
        masks.append(mask)
    return maps, masks


def area(fpr: np.ndarray, values: np.ndarray, limit: float) -> float:
    """Trapezoids up to the limit, divided by it."""
    inside = fpr <= limit
    x = np.append(fpr[inside], limit)
    y = np.append(values[inside], np.interp(limit, fpr, values))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def argsort_aupro(maps: Images, masks: Images) -> dict[str, float]:
    """AU-PRO from one argsort of all pixels."""
    false, share, regions = [], [], 0
    for mask in masks:
        labels, found = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())
        false.append(labels.ravel() == 0)
        share.append(np.where(labels == 0, 0, 1 / sizes[labels]).ravel())
        regions += found
    scores = np.concatenate([scored.ravel() for scored in maps])
    order = np.argsort(-scores)
    fpr = np.cumsum(np.concatenate(false)[order], dtype=np.float64)
    pro = np.cumsum(np.concatenate(share)[order])
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    fpr = np.append(0, fpr[last_of_tie] / fpr[-1])
    pro = np.append(0, np.clip(pro[last_of_tie] / regions, 0, 1))
    return {f"aupro_{limit:g}": area(fpr, pro, limit) for limit in LIMITS}


def scikit_learn(maps: Images, masks: Images) -> dict[str, float]:
    """AU-ROC and average precision."""
    scores = np.concatenate([scored.ravel() for scored in maps])
    truth = np.concatenate([mask.ravel() for mask in masks])
    fpr, recall, _ = roc_curve(truth, scores)
    areas = {f"pixel_auroc_{limit:g}": area(fpr, recall, limit) for limit in LIMITS}
    return areas | {"pixel_auprc": float(average_precision_score(truth, scores))}


def effad_core(maps: Images, masks: Images) -> dict[str, float]:
    """All of them."""
    return pixel_metrics(maps, masks, LIMITS)


def peak_mebibytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def measure(method: Callable, images: int, side: int, rounds: int) -> tuple[dict, float, float]:
    """Metrics, median seconds and mebibytes of memory, in this process."""
    maps, masks = draw(images, side)
    before, seconds = peak_mebibytes(), []
    for _ in range(rounds):
        start = time.perf_counter()
        metrics = method(maps, masks)
        seconds.append(time.perf_counter() - start)
    return metrics, statistics.median(seconds), peak_mebibytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="of effad_core; the others take one")
    args = parser.parse_args()

    print(f"{args.images} maps of {args.side}x{args.side} float32, limits {LIMITS}")
    rows = {}
    for method in (effad_core, argsort_aupro, scikit_learn):
        rounds = args.rounds if method is effad_core else 1
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            row = process.submit(measure, method, args.images, args.side, rounds).result()
        metrics, seconds, memory = rows[method] = row
        print(f"{method.__name__:14} {seconds:8.2f} s  {memory:6.0f} MiB  {', '.join(metrics)}")

    ours, seconds, _ = rows.pop(effad_core)
    total = sum(row[1] for row in rows.values())
    print(f"argsort and scikit-learn together take {total / seconds:.1f} x as long as effad_core")
    theirs = {key: value for metrics, _, _ in rows.values() for key, value in metrics.items()}
    for key, value in ours.items():
        print(f"{key:18} {value:.9f}   differs by {abs(value - theirs[key]):.1e}")
    if not all(abs(value - theirs[key]) <= TOLERANCE for key, value in ours.items()):
        sys.exit(f"the metrics differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
