"""How far results move between seeds, thread counts and precisions, and by rounding alone.

    python benchmarks/spread.py
    python benchmarks/spread.py --checks
    python benchmarks/spread.py --detector build/runs/RUN/detector.safetensors

Trains short schedules on a part of a scenario, one change at a time, and compares each with the
first; then computes the first one's maps in other ways. Finished trainings are taken up again.
With --checks it executes the notebooks instead and says which share of its tolerance each of their
comparisons uses. With --detector it scores all test images of the scenario in each precision and
compares the AU-ROCs. tests/README.md holds what was printed, and what the tolerances follow from.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from effad_core import EfficientAD, Schedule, evaluate, open_pretraining, open_scenario, train
from effad_core.datasets import ResizedImages, Scenario, evenly
from effad_core.deployment.onnx import export
from effad_core.deployment.prepared import prepare
from effad_core.evaluation.scores import MAPS, Evaluation
from effad_core.metrics import pixel_metrics

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from torch import Tensor

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "build" / "runs" / "spread"
TRAININGS = {  # name: seed, threads, precision; the first one is the reference
    "reference": (0, 1, "float32"),
    "the same again": (0, 1, "float32"),
    "2 threads": (0, 2, "float32"),
    "float32-winograd": (0, 1, "float32-winograd"),
    "bfloat16": (0, 1, "bfloat16"),
    "seed 1": (1, 1, "float32"),
    "seed 2": (2, 1, "float32"),
}
# Runs in a notebook's kernel before its first cell: writes down every comparison with a tolerance.
RECORDER = """
import functools, json, linecache, sys
import numpy, torch

def recorded(function, a, b, rtol=1e-5, atol=1e-8):
    caller = sys._getframe(1)
    if caller.f_globals.get("__name__") == "__main__":
        x, y = (torch.as_tensor(value).detach().double() for value in (a, b))
        used = ((x - y).abs() / (atol + rtol * y.abs())).max().item()
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno).strip()
        with open(RECORD, "a") as file:
            file.write(json.dumps([line, rtol, atol, used]) + "\\n")
    return function(a, b, rtol=rtol, atol=atol)

for module, name in ((numpy, "allclose"), (numpy, "isclose"), (torch, "allclose")):
    setattr(module, name, functools.partial(recorded, getattr(module, name)))
"""


def trained(name: str, part: Scenario, schedule: Schedule) -> EfficientAD:
    """The detector of one of `TRAININGS`."""
    seed, threads, precision = TRAININGS[name]
    torch.set_num_threads(threads)
    detector = EfficientAD().load_teacher()
    schedule = replace(schedule, precision=precision)
    sizes = f"{schedule.autoencoder_iterations}-{schedule.iterations}-{len(part.train)}"
    folder = RUNS / f"{part.name}-{sizes}" / name.replace(" ", "-")
    train(detector, part, schedule, open_pretraining(), folder, seed=seed)
    torch.set_num_threads(1)
    return detector


def moved(found: np.ndarray, expected: np.ndarray) -> str:
    """Typical (root mean square) and largest difference, as shares of the range expected."""
    if np.array_equal(found, expected):
        return f"{'bit for bit':>20}"
    difference = np.abs(found.astype(np.float64) - expected) / np.ptp(expected)
    return f"{np.sqrt(np.mean(difference**2)):>10.1e}{difference.max():>10.1e}"


def training_table(part: Scenario, schedule: Schedule) -> EfficientAD:
    """Print how trainings differ; returns the reference."""
    print(f"{'training':<18}{'combined':>9}{'S-T':>7}{'AE':>7}", end="")
    print(f"{'q_a^ST':>9}{'q_b^ST':>9}{'q_a^AE':>9}{'q_b^AE':>9}{'map: typical':>13}{'largest':>8}")
    first: tuple[EfficientAD, Evaluation] | None = None
    for name in TRAININGS:
        detector = trained(name, part, schedule)
        scored = evaluate(detector, part, "float32", keep_maps=True)
        first = first or (detector, scored)
        areas = scored.auroc()
        line = f"{name:<18}{areas[MAPS[0]]:>9.3f}" + "".join(f"{areas[m]:>7.3f}" for m in MAPS[1:])
        line += "".join(f"{q:>9.5f}" for q in detector.quantiles.tolist())
        print(line, moved(np.stack(scored.maps), np.stack(first[1].maps)), flush=True)
    return first[0]


def ways(detector: EfficientAD) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways to compute a detector's combined map, (N, H, W); the first one is the reference."""

    def threads(count: int, images: Tensor) -> Tensor:
        torch.set_num_threads(count)
        maps = detector.combined_maps(images)[:, 0]
        torch.set_num_threads(1)
        return maps

    yield "float32", lambda x: detector.combined_maps(x)[:, 0]
    yield "the same again", lambda x: detector.combined_maps(x)[:, 0]
    yield "2 threads", lambda x: threads(2, x)
    yield "one by one", lambda x: torch.cat([detector.combined_maps(i[None])[:, 0] for i in x])
    for precision in ("float32-winograd", "bfloat16"):
        yield precision, lambda x, p=precision: computed_in(p, detector).combined_maps(x)[:, 0]
    for precision in ("float32", "float32-winograd", "bfloat16"):
        prepared = prepare(detector, precision=precision)
        yield f"prepared, {precision}", lambda x, p=prepared: p.combined_maps(x)[:, 0]
    yield "ONNX", lambda x: through_onnx(detector, x)


def computed_in(precision: str, detector: EfficientAD) -> EfficientAD:
    """A copy that computes in another precision."""
    other = copy.deepcopy(detector)
    other.precision = precision
    return other


def through_onnx(detector: EfficientAD, images: Tensor) -> Tensor:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export(detector, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        maps, _ = session.run(None, {"image": images.permute(0, 2, 3, 1).numpy()})
    return torch.from_numpy(maps)


def rounding_table(detector: EfficientAD, part: Scenario) -> None:
    """Print how the maps of one detector differ by the way they are computed."""
    images = torch.cat([*ResizedImages(part.test[::4], detector.image_size).batches(8)])
    print(f"\n{'one detector':<28}{'map: typical':>13}{'largest':>8}{'score':>10}")
    expected = None
    for name, way in ways(detector):
        maps = way(images).float().numpy()
        expected = maps if expected is None else expected
        scores, known = (m.reshape(len(m), -1).max(axis=1) for m in (maps, expected))
        print(
            f"{name:<28} {moved(maps, expected)}{np.abs(scores - known).max():>10.1e}", flush=True
        )


def precision_table(detector: EfficientAD, scenario: Scenario) -> None:
    """Print the image AU-ROC of a trained detector in each precision, as it is and prepared."""
    print(f"{len(scenario.test)} test images")
    print(f"{'image AU-ROC':<30}{'combined':>9}{'S-T':>9}{'AE':>9}{'largest difference':>20}")
    formats = ("float32", "float32-winograd", "bfloat16")
    ways = {p: computed_in(p, detector) for p in formats}
    ways |= {f"prepared, {p}": prepare(detector, precision=p) for p in (*formats, "float16")}
    first = None
    for name, way in ways.items():
        areas = evaluate(way, scenario, keep_maps=False).auroc()
        first = first or areas
        moves = max(abs(areas[m] - first[m]) for m in MAPS)
        columns = "".join(f"{areas[m]:>9.4f}" for m in MAPS)
        print(f"{name:<30}{columns}{moves:>20.4f}", flush=True)


def metrics_line() -> None:
    """Print how pixel metrics change with the order of the images."""
    rng = np.random.default_rng(0)
    maps = [*rng.normal(size=(8, 64, 64)).astype(np.float32)]
    masks = [m + rng.normal(size=m.shape) > 2 for m in maps]
    one, other = pixel_metrics(maps, masks), pixel_metrics(maps[::-1], masks[::-1])
    largest = max(abs(one[name] - other[name]) for name in one)
    print(f"\npixel metrics, images in another order: largest difference {largest:.1e}")


def checks(only: str) -> None:
    """Execute the notebooks; print each comparison's tolerance and how much of it is used."""
    print(f"{'comparison':<76}{'rtol':>8}{'atol':>8}{'used':>9}")
    for path in sorted((ROOT / "notebooks").glob(f"0{only}*_*.ipynb")):
        used: dict[tuple, float] = {}
        for line, rtol, atol, share in comparisons(path):
            key = (line, rtol, atol)
            used[key] = max(share, used.get(key, 0.0))
        for (line, rtol, atol), share in used.items():
            shown = f"{path.stem[:2]} {line}"[:74]
            print(f"{shown:<76}{rtol:>8.0e}{atol:>8.0e}{share:>9.1e}", flush=True)


def comparisons(path: Path) -> list[list]:
    """Of a notebook that is executed here: line, rtol, atol and the share of them that was used."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        record.touch()
        source = f"RECORD = {str(record)!r}\n{RECORDER}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(source))
        place = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, kernel_name="python3", resources=place).execute()
        return [json.loads(line) for line in record.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="solar-mono")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--autoencoder-iterations", type=int, default=24)
    parser.add_argument("--images", type=int, default=32, help="to train on")
    parser.add_argument("--test-images", type=int, default=16)
    parser.add_argument(
        "--checks", nargs="?", const="", metavar="5", help="the notebooks' comparisons alone"
    )
    parser.add_argument("--detector", metavar="FILE", help="compare its AU-ROC in each precision")
    args = parser.parse_args()
    if args.checks is not None:
        checks(args.checks)
        return
    data = open_scenario(args.scenario)
    if args.detector:
        precision_table(EfficientAD.load(args.detector), data)
        return
    kinds = [[s for s in data.test if s.label == label] for label in (0, 1)]
    part = replace(
        data,
        train=evenly(data.train, args.images),
        validation=evenly(data.validation, 8),
        test=tuple(s for kind in kinds for s in evenly(kind, args.test_images // 2)),
    )
    steps = {"iterations": args.iterations, "autoencoder_iterations": args.autoencoder_iterations}
    reference = training_table(part, Schedule.quick(**steps))
    rounding_table(reference, part)
    metrics_line()


if __name__ == "__main__":
    main()
