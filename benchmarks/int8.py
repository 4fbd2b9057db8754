"""What an INT8 model keeps of a detector, and how much faster it is.

    python -m benchmarks.int8 [solar-mono tray ...]

Takes the shipped detectors of these scenarios. Test images are scored by OpenVINO in float32, in
INT8 as `export_int8` writes it, and in INT8 with everything quantised. Then all of them, the
prepared detector and OpenVINO in its own choice of number format take turns on one image.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from effad_core import open_scenario, prepare
from effad_core.deployment import int8
from effad_core.deployment.onnx import export
from effad_core.evaluation.evidence import open_evidence
from effad_core.evaluation.timing import machine
from effad_core.metrics import image_auroc

import numpy as np
import openvino
import torch

TURNS = 40
COUNT = 200  # test images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", default=["solar-mono", "tray"])
    args = parser.parse_args()
    print(machine(torch.device("cpu")))
    for name in args.scenarios:
        with TemporaryDirectory() as folder:
            compare(name, Path(folder))


def compare(name: str, folder: Path) -> None:
    scenario, detector = open_scenario(name), open_evidence(name).detector()
    detector.precision = "float32"
    detector.operating_point = detector.pixel_operating_point = None
    export(detector, folder / "float.onnx")
    parts = scenario.train, scenario.validation
    options = {"rate": 0.1, "guarantee": "average"}
    models = {"INT8": int8.export_int8(detector, *parts, folder / "int8.xml", **options)}
    with patch.object(int8, "_all_but_inner", return_value=[]):
        models["INT8, everything"] = int8.export_int8(
            detector, *parts, folder / "all.xml", **options
        )
    normal, anomalous = scenario.test_part(COUNT)
    paths = [sample.path for sample in (*normal, *anomalous)]
    labels = [0] * len(normal) + [1] * len(anomalous)
    exact = np.array([found.score for found in detector.predict(paths)])
    print(
        f"{name}, {len(paths)} test images, image AU-ROC: float32 {image_auroc(labels, exact):.4f}"
    )
    for kind, model in models.items():
        scores = np.array([found.score for found in model.predict(paths)])
        alarms = np.mean(scores[: len(normal)] > model.threshold)
        print(
            f"  {kind}: {image_auroc(labels, scores):.4f}, scores at most "
            f"{np.abs(scores - exact).max() / np.ptp(exact):.1%} of their range away; "
            f"{alarms:.1%} of the normal ones are called anomalous (asked for: 10 %)"
        )
    pixels = np.asarray(scenario.test[0].load().resize((256, 256)))[None]
    image = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
    core, file = openvino.Core(), folder / "float.onnx"
    runs = {"OpenVINO float32": core.compile_model(file, "CPU", int8.EXACT)}
    runs["OpenVINO, its own choice"] = core.compile_model(file, "CPU")
    runs["INT8"] = core.compile_model(folder / "int8.xml", "CPU", int8.EXACT)
    runs["INT8, everything"] = core.compile_model(folder / "all.xml", "CPU", int8.EXACT)
    calls = {kind: (lambda run=run: run(pixels)) for kind, run in runs.items()}
    ready = prepare(detector, "cpu", "auto")
    calls[f"prepared, {ready.precision}"] = lambda: ready.combined_maps(image)
    seconds = {kind: [] for kind in calls}
    for turn in range(TURNS + 5):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 5:
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: 1000 * float(np.median(found)) for kind, found in seconds.items()}
    for kind, median in medians.items():
        faster = medians["OpenVINO float32"] / median
        print(f"  {kind}: {median:.0f} ms an image, {faster:.2f} times as fast as float32")


if __name__ == "__main__":
    main()
