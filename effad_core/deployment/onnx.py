"""A detector as one ONNX file, for machines without PyTorch.

    export(EfficientAD.load("detector.safetensors"), "detector.onnx")

Input "image": uint8, (N, H, W, 3), RGB, of any size; N, H and W are free. It is resized inside as
`predict` does (see `resizing`). Outputs: "map", float32, (N, H, W), the combined map at the images'
own size, and "score", float32, (N,), its maximum before it was resized to that. In the file's
metadata are the thresholds; the networks' own image_size; and full_scale: the value of 16-bit
images that becomes 255, for example 4095, or null for 8 bits. Notebook 10 ends with a predictor of
ten lines that needs onnxruntime, numpy and pillow.
"""

import errno
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from effad_core.acceleration.precision import number_format
from effad_core.deployment.prepared import InferenceGraph
from effad_core.deployment.resizing import PillowResize
from effad_core.detector import EfficientAD, points_of
from effad_core.errors import RunError, not_installed
from effad_core.prediction import Predictor
from effad_core.storage.files import as_path, reason

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPSET = 18


class ExportedGraph(nn.Module):
    """uint8 images (N, H, W, 3) of any size -> the combined map (N, H, W) and the score (N,)."""

    def __init__(self, detector: EfficientAD):
        super().__init__()
        self.resize = PillowResize(detector.image_size)
        self.detector = InferenceGraph(detector)
        inside = None if detector.region is None else detector.region.at(detector.image_size)
        self.register_buffer("inside", None if inside is None else torch.from_numpy(inside))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[1:3]
        m = self.detector(self.resize(image.permute(0, 3, 1, 2).float()))[:, :1]
        if self.inside is not None:  # as `Predictor.inspected`
            lowest = torch.where(self.inside, m, torch.inf).amin(dim=(2, 3), keepdim=True)
            m = torch.where(self.inside, m, lowest)
        score = m.flatten(1).amax(dim=1)  # Algorithm 2, line 11
        own = F.interpolate(m, size=(height, width), mode="bilinear")  # Algorithm 2, line 12
        return own[:, 0], score


def export(detector: EfficientAD, path: str | os.PathLike) -> None:
    """Write the file; an old one is replaced at the end.

    Args:
        detector: trained; it stays as it is.
        path: ends with ".onnx"; its folder is made if it is missing.

    Raises:
        RunError: if the package onnx or onnxscript is missing, the path does not end so, or nothing
            can be written there.
        ValueError: if the detector has no quantiles, or a number is not finite; if it has
            thresholds that were not found in float32, in which the file computes; or if it has
            tiles: what puts their maps together is no part of the file.

    Example:
        >>> export(detector, folder / "detector.onnx")
        >>> (folder / "detector.onnx").is_file()
        True
    """
    path = as_path(path)
    if path.suffix != ".onnx":
        raise RunError(f"{path} must end with .onnx")
    if detector.tiles is not None:
        raise ValueError(
            "a detector with tiles cannot be exported: an ONNX file computes one tile, and what "
            "puts their maps together would be missing; use effad predict"
        )
    described = points_of(detector)
    if described and number_format(detector.precision) != "float32":
        raise ValueError(
            f"the thresholds hold in {detector.precision}, and an ONNX file computes in float32: "
            'set detector.precision = "float32" and find them anew with fit_thresholds (or: effad '
            "threshold DETECTOR GOOD_IMAGES --precision float32), then export"
        )
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ModuleNotFoundError as error:
        raise RunError(not_installed("the export to ONNX", error.name, "export")) from None
    module = ExportedGraph(detector).eval()
    example = torch.zeros(2, 300, 310, 3, dtype=torch.uint8)  # any size but the networks'
    free = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            with redirect_stdout(sys.stderr):  # what the exporter says is no output of ours
                program = torch.onnx.export(
                    module,
                    (example,),
                    input_names=["image"],
                    output_names=["map", "score"],
                    dynamic_shapes={"image": free},
                    opset_version=OPSET,
                    dynamo=True,
                    verbose=False,
                )
            program.save(part, external_data=False)
            model = onnx.load(part)
            _forget_the_machine(model)
            onnx.helper.set_model_props(model, metadata(detector))
            onnx.checker.check_model(model)
            onnx.save(model, part)
            os.replace(part, path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {reason(error)}, or choose another path"
        ) from None


def metadata(predictor: Predictor) -> dict[str, str]:
    """What an exported file says of a detector: texts in JSON, see the module's beginning."""
    facts = {
        "image_size": predictor.image_size,
        "full_scale": predictor.full_scale,
        "operating_points": points_of(predictor),
        "threshold": predictor.threshold,
        "pixel_threshold": predictor.pixel_threshold,
    }
    return {name: json.dumps(value) for name, value in facts.items()}


def _forget_the_machine(message: Any) -> None:
    """Remove what torch notes of each node: the lines of code that made it, with their paths."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if hasattr(value, "__len__") else [value]:
                _forget_the_machine(part)
