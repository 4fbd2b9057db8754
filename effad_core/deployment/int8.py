"""A detector in 8-bit whole numbers, for OpenVINO on processors that multiply these faster.

    effad export path/to/detector.safetensors part.xml --int8 path/to/my_part

NNCF chooses for each channel which value becomes 127, by looking at training images. Only the inner
convolutions of teacher and student are quantised, which are most of the work. The first ones see
the image itself and the last ones are subtracted from each other: in 8 bits their errors are as
large as an anomaly (`python -m benchmarks.int8` shows it).
"""

import copy
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from effad_core.datasets import Sample, evenly, read_image
from effad_core.deployment.inspection import fit_thresholds
from effad_core.deployment.onnx import export, metadata
from effad_core.deployment.prepared import InferenceGraph
from effad_core.detector import EfficientAD, set_points
from effad_core.errors import RunError, not_installed
from effad_core.prediction import Predictor
from effad_core.storage.files import as_path, check_file, one_line

import numpy as np
import torch
from torch import Tensor, nn

CALIBRATION_IMAGES = 100
ABOUT = "framework"  # where OpenVINO keeps the metadata of an ONNX file
METADATA = ("image_size", "full_scale", "operating_points")
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # what is not 8 bits; bfloat16 on some without it


class OpenVinoDetector(Predictor):
    """An exported detector, run by OpenVINO; it has `predict` as every detector has.

    Args:
        path: a file that `export` or `export_int8` wrote.

    Raises:
        RunError: if OpenVINO is not installed, or the file is missing or another program's.
    """

    map_names = ("combined",)
    device = torch.device("cpu")

    def __init__(self, path: str | os.PathLike):
        path = as_path(path)
        if not path.is_file():
            raise RunError(f"there is no model {path}: make one with effad export")
        core = _openvino().Core()
        try:
            model = core.read_model(path)
            about = {name: model.get_rt_info([ABOUT, name]).astype(str) for name in METADATA}
            self.image_size = tuple(json.loads(about["image_size"]))
            self.full_scale = json.loads(about["full_scale"])
            self.operating_point = self.pixel_operating_point = None
            set_points(self, json.loads(about["operating_points"]))
        except (RuntimeError, ValueError, TypeError):
            raise RunError(f"{path} is no model of effad: make one with effad export") from None
        self._run = core.compile_model(model, "CPU", EXACT)

    def use_device(self, device: str | torch.device | None = None) -> None:
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"an exported model computes on the CPU here, not on {device}")

    def combined_maps(self, images: Tensor) -> Tensor:
        found = self._run(images.permute(0, 2, 3, 1).contiguous().numpy())  # it resizes nothing
        return torch.from_numpy(found["map"].copy())[:, None]


def export_int8(
    detector: EfficientAD,
    calibration: Sequence[Sample],
    validation: Sequence[Sample],
    path: str | os.PathLike,
    rate: float,
    guarantee: str = "confident",
) -> OpenVinoDetector:
    """Write an INT8 model, with thresholds that were found with it.

    Args:
        detector: trained; it stays as it is.
        calibration: training images; the ranges come from at most 100 of them.
        validation: good images that neither the training nor the calibration has seen: the
            thresholds come from them.
        path: ends with ".xml"; a .bin file comes beside it.
        rate, guarantee: as in `threshold_for_fpr`.

    Returns:
        The model that was written.

    Raises:
        RunError: if a package is missing, or the file cannot be written.
        ValueError: as `export` and `fit_thresholds`.
    """
    path = as_path(path)
    if path.suffix != ".xml":
        raise RunError(f"{path} must end with .xml")
    check_file(path, "path")
    os.environ.setdefault("NNCF_CI", "1")  # or NNCF reports to its makers that it was used
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise RunError(not_installed("an INT8 model", error.name, "export")) from None
    openvino = _openvino()
    plain = copy.deepcopy(detector)
    plain.operating_point = plain.pixel_operating_point = None  # of another number format
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # OpenVINO may hold its files
        export(plain, Path(folder, "detector.onnx"))
        model = openvino.Core().read_model(Path(folder, "detector.onnx"))
        chosen = evenly(calibration, CALIBRATION_IMAGES)
        white = detector.full_scale
        images = nncf.Dataset(chosen, lambda s: np.asarray(read_image(s.path, white))[None])
        ignored = nncf.IgnoredScope(names=_all_but_inner(detector, model), validate=False)
        nncf.set_log_level(logging.ERROR)
        with redirect_stdout(sys.stderr):  # its progress is no output of ours
            model = nncf.quantize(model, images, subset_size=len(chosen), ignored_scope=ignored)
        _save(openvino, model, metadata(plain), Path(folder, "model.xml"))
        found = OpenVinoDetector(Path(folder, "model.xml"))
        fit_thresholds(found, validation, rate, guarantee=guarantee, device="cpu")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
                _save(openvino, model, metadata(found), Path(beside, path.name))
                for written in (path.with_suffix(".bin"), path):
                    os.replace(Path(beside, written.name), written)
        except (OSError, RuntimeError) as error:
            raise RunError(f"{path} cannot be written: {one_line(error)}") from None
    return found


def _save(openvino: Any, model: Any, about: dict[str, str], path: Path) -> None:
    for name, value in about.items():
        model.set_rt_info(value, [ABOUT, name])
    openvino.save_model(model, path)


def _all_but_inner(detector: EfficientAD, model: Any) -> list[str]:
    """The names of all that stays float32: all but the inner convolutions of both PDNs."""
    graph = InferenceGraph(detector)
    inner = [
        layer.weight.numpy()
        for trunk in (graph.teacher, graph.student)
        for layer in trunk.rest
        if isinstance(layer, nn.Conv2d)
    ]
    names, found = [], 0
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Constant", "Parameter", "Result"):
            continue
        weight = node.input_value(1).get_node() if node.get_type_name() == "Convolution" else None
        if weight is not None and any(np.array_equal(weight.data, one) for one in inner):
            found += 1
        else:
            names.append(node.get_friendly_name())
    if found != len(inner):
        raise RunError(
            f"{found} of {len(inner)} convolutions were found in the ONNX file: install the "
            "versions of onnx and openvino that constraints.txt names"
        )
    return names


def _openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise RunError(not_installed("an INT8 model", error.name, "export")) from None
    return openvino
