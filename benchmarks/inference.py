"""Seconds per image: a prepared detector against a plain implementation of Algorithm 2.

    python benchmarks/inference.py [--size small medium]

The plain one follows the pseudocode: float32, torch's default memory layout, each network on its
own. ONNX Runtime, OpenVINO and anomalib's EfficientAd take part where they are installed (anomalib
in an environment of its own, from which this file runs with PYTHONPATH=.). All take turns in one
process on the same random images. The limit is what direct convolutions in the same format can
reach: the FLOPs of the networks over the rate at which the largest layer of the PDN runs here,
measured beside them; Winograd's way needs fewer multiplications and may pass it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
import turns
from torch import Tensor

from effad_core import EfficientAD
from effad_core.costs import count
from effad_core.costs.regression import EfficientAD as Networks
from effad_core.datasets import normalise
from effad_core.files import RunError
from effad_core.timing import untrained_detector


def plain(detector: EfficientAD) -> Callable[[Tensor], object]:
    """Algorithm 2, word by word."""

    def run(images: Tensor) -> Tensor:
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


def onnx_runtime(path: Path) -> dict[str, Callable[[Tensor], object]]:
    try:
        import onnxruntime
    except ImportError:
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return {"ONNX Runtime, float32": lambda images: session.run(None, {"image": pixels(images)})}


def openvino(path: Path, halves: bool) -> dict[str, Callable[[Tensor], object]]:
    try:
        from openvino import Core
    except ImportError:
        return {}
    models = {}
    for name, hint in {"float32": "f32", **({"bfloat16": "bf16"} if halves else {})}.items():
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = Core().compile_model(path, "CPU", settings)
        models[f"OpenVINO, {name}"] = lambda images, model=model: model(pixels(images))
    return models


def pixels(images: Tensor) -> np.ndarray:
    """As the exported file takes them, shape (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def exported(detector: EfficientAD, halves: bool) -> dict[str, Callable[[Tensor], object]]:
    """The same detector in the two runtimes, where they are installed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        try:
            detector.export(path)
        except RunError as error:
            print(f"without ONNX Runtime and OpenVINO: {error}")
            return {}
        return onnx_runtime(path) | openvino(path, halves)


def anomalib(size: str) -> dict[str, Callable[[Tensor], object]]:
    """anomalib's model, from its teacher's input to its map."""
    model = turns.anomalib_model(size)
    if model is None:
        return {}
    model.eval()
    return {"anomalib, float32": lambda images: model(images.float() / 255)}


def ways(size: str) -> dict[str, Callable[[], object]]:
    """By name; each predicts the same image."""
    torch.manual_seed(0)
    detector = untrained_detector(size)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    halves = bool(capabilities.get("avx512_bf16"))
    precisions = ("float32", "float32-winograd", *(("bfloat16",) if halves else ()))
    found = {
        "plain, float32": plain(detector),
        **{f"prepared, {p}": detector.prepare(precision=p).combined_maps for p in precisions},
        **exported(detector, halves),
        **anomalib(size),
    }
    image = torch.randint(256, (1, 3, 256, 256), dtype=torch.uint8)
    return {name: torch.inference_mode()(partial(way, image)) for name, way in found.items()}


def main() -> None:
    args = turns.arguments(__doc__)
    for size in args.size:
        flops = count(lambda size=size: Networks(size), 256)[1]
        taking_part = ways(size)
        turns.compare(size, taking_part, dict.fromkeys(taking_part, flops), args.rounds)


if __name__ == "__main__":
    main()
