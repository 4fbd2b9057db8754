"""Seconds per image: a prepared detector against a plain implementation of Algorithm 2.

    python benchmarks/inference.py [--size small medium]

The plain one follows the pseudocode: float32, torch's default memory layout, each network on its
own. ONNX Runtime, OpenVINO and anomalib's EfficientAd take part where they are installed (anomalib
in an environment of its own, from which this file runs with PYTHONPATH=.). All take turns on the
same random image, each in a process of its own. The limit is what direct convolutions in the same
format can reach: the FLOPs of the networks over the rate at which the largest layer of the PDN runs
here, measured beside them; Winograd's way needs fewer multiplications and may pass it.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from effad_core import EfficientAD
from effad_core.acceleration.precision import CANDIDATES, measure
from effad_core.datasets import normalise
from effad_core.deployment.onnx import export
from effad_core.deployment.prepared import prepare
from effad_core.evaluation.costs import count, efficientad
from effad_core.evaluation.timing import untrained_detector

import numpy as np
import torch
import torch.nn.functional as F
import turns
from torch import Tensor


def detector_and_image(size: str) -> tuple[EfficientAD, Tensor]:
    torch.manual_seed(0)
    detector = untrained_detector(size)
    return detector, torch.randint(256, (1, 3, 256, 256), dtype=torch.uint8)


def plain(size: str) -> Callable[[], object]:
    """Algorithm 2, word by word."""
    detector, images = detector_and_image(size)

    @torch.inference_mode()
    def run() -> Tensor:
        image = normalise(images)
        teacher = (detector.teacher(image) - detector.mu) / detector.sigma
        student, autoencoder = detector.student(image), detector.autoencoder(image)
        m_st = ((teacher - student[:, :384]) ** 2).mean(dim=1, keepdim=True)
        m_ae = ((autoencoder - student[:, 384:]) ** 2).mean(dim=1, keepdim=True)
        maps = [F.interpolate(m, (224, 224), mode="bilinear") for m in (m_st, m_ae)]
        m_st, m_ae = (F.pad(m, (16, 16, 16, 16), mode="replicate") for m in maps)
        qa_st, qb_st, qa_ae, qb_ae = detector.quantiles
        m_st = 0.1 * (m_st - qa_st) / (qb_st - qa_st)
        m_ae = 0.1 * (m_ae - qa_ae) / (qb_ae - qa_ae)
        return 0.5 * m_st + 0.5 * m_ae

    return run


def prepared(size: str, precision: str) -> Callable[[], object]:
    detector, images = detector_and_image(size)
    ready = prepare(detector, "cpu", precision)
    return lambda: ready.combined_maps(images)


def pixels(images: Tensor) -> np.ndarray:
    """As the exported file takes them, shape (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def onnx_runtime(size: str) -> Callable[[], object]:
    import onnxruntime

    detector, images = detector_and_image(size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export(detector, path)
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"image": pixels(images)})


def openvino(size: str, hint: str) -> Callable[[], object]:
    from openvino import Core

    detector, images = detector_and_image(size)
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export(detector, path)
        model = Core().compile_model(path, "CPU", settings)
    return lambda: model(pixels(images))


def anomalib(size: str) -> Callable[[], object]:
    """anomalib's model, from its teacher's input to its map."""
    model, images = turns.anomalib_model(size).eval(), detector_and_image(size)[1]
    return torch.inference_mode()(lambda: model(images.float() / 255))


def main() -> None:
    args = turns.arguments(__doc__)
    for size in args.size:
        measured = measure(turns.CPU, "inference", size)
        auto = measured.fastest(CANDIDATES["inference"])
        possible = [name for name in CANDIDATES["inference"] if name in measured.seconds]
        halves = measured.seconds.get("bfloat16", float("inf")) < measured.seconds["float32"]
        flops = count(partial(efficientad, size), 256)[1]
        built = {"plain, float32": (plain, size)}
        built |= {f"prepared, {name}": (prepared, size, name) for name in possible}
        if find_spec("onnxscript") and find_spec("onnxruntime"):
            built["ONNX Runtime, float32"] = (onnx_runtime, size)
        if find_spec("onnxscript") and find_spec("openvino"):
            built["OpenVINO, float32"] = (openvino, size, "f32")
            if halves:
                built["OpenVINO, bfloat16"] = (openvino, size, "bf16")
        if turns.anomalib_model(size) is not None:
            built["anomalib, float32"] = (anomalib, size)
        ways = {
            name: turns.Way(build, tuple(rest), flops, number_format(name))
            for name, (build, *rest) in built.items()
        }
        taken = turns.compare("One image through Algorithm 2", size, ways, args.rounds)
        taken = {name: taken[f"prepared, {name}"] for name in possible}
        turns.print_choice(measured.sentence(auto), taken[auto], taken)


def number_format(name: str) -> str:
    last = name.rpartition(", ")[2]
    return last if last in ("bfloat16", "float16") else "float32"


if __name__ == "__main__":
    main()
