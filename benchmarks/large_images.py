"""A defect of 8x8 pixels in images of 24 megapixels: with tiles, and without.

    python -m benchmarks.large_images [--profile quick] [--folder build/large]

Draws woven cloth of 6000x4000 pixels: normal pieces, and pieces with one bright knot of 8x8 pixels
somewhere. Trains a detector on whole images and one on tiles, finds each one's threshold from
normal images alone at a stated rate, and counts what it calls anomalous of others. Prints that,
the seconds for an image and the largest memory of the process.
"""

import argparse
import re
import time
from pathlib import Path

from effad_core import EfficientAD, Schedule, Tiles, fit_thresholds, train
from effad_core.datasets import Sample, Scenario
from effad_core.evaluation.timing import machine

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

WIDTH, HEIGHT = 6000, 4000
PARTS = {"train": 8, "validation": 9, "normal": 5, "knot": 5}  # 9 keep 10 % on average
RATE = 0.1


def cloth(rng: np.random.Generator, knot: bool) -> Image.Image:
    """Threads that wander a little, light that falls off a little, noise; perhaps a knot."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    wander = 6 * np.sin(x / rng.uniform(500, 900) + rng.uniform(0, 6)).astype(np.float32)
    threads = np.sin((y + wander) * np.float32(0.45)) + np.sin((x - wander) * np.float32(0.38))
    light = rng.uniform(105, 125) + 12 * np.sin(x / 4000 + y / 3000 + rng.uniform(0, 6))
    cloth = light + 18 * threads + rng.normal(0, 5, y.shape).astype(np.float32)
    if knot:
        top, left = rng.integers(100, HEIGHT - 108), rng.integers(100, WIDTH - 108)
        cloth[top : top + 8, left : left + 8] = 180
    return Image.fromarray(np.uint8(np.clip(cloth, 0, 255)))


def drawn(folder: Path) -> dict[str, list[Sample]]:
    """The images of each part, drawn unless they are there."""
    samples = {}
    for number, (part, count) in enumerate(PARTS.items()):
        paths = [folder / part / f"{index}.png" for index in range(count)]
        for index, path in enumerate(tqdm(paths, desc=f"drawing {part}", leave=False)):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng((number, index))
                cloth(rng, part == "knot").save(path, compress_level=1)
        samples[part] = [Sample(path, int(part == "knot"), part) for path in paths]
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    args = parser.parse_args()
    parts = drawn(args.folder)
    normal, knots = parts["normal"], parts["knot"]
    scenario = Scenario(
        "cloth", tuple(parts["train"]), tuple(parts["validation"]), (), "drawn", "free"
    )
    for name, tiles in (("whole images", None), ("tiles of 256", Tiles(256, overlap=64))):
        detector = EfficientAD(tiles=tiles).load_teacher()
        start = time.perf_counter()
        run = args.folder / f"run-{args.profile}-{name.replace(' ', '-')}"
        train(detector, scenario, Schedule.named(args.profile), run_dir=run)
        trained = time.perf_counter() - start
        point, _ = fit_thresholds(detector, scenario.validation, RATE, guarantee="average")
        start = time.perf_counter()
        found = [p for _, p in detector.stream([s.path for s in (*normal, *knots)])]
        seconds = (time.perf_counter() - start) / len(found)
        called = [prediction.is_anomalous for prediction in found]
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        print(machine(detector.device), detector.precision, sep=", ")
        print(f"{name}: {point}")
        print(
            f"{name}: {sum(called[len(normal) :])} of {len(knots)} knots found, "
            f"{sum(called[: len(normal)])} of {len(normal)} normal images called anomalous; "
            f"{trained / 60:.1f} min of training and quantiles, {seconds:.1f} s an image"
            + (f", {int(peak[1]) / 2**20:.1f} GiB at most" if peak else ""),
            flush=True,
        )
        print("scores", *(f"{p.score:.2f}" for p in found))


if __name__ == "__main__":
    main()
