"""A detector as one ONNX file, for machines without PyTorch.

    export(EfficientAD.load("detector.safetensors"), "detector.onnx")

Input "image": uint8, (N, H, W, 3), RGB, resized to the detector's size with Pillow's bilinear
filter, as `predict` does. Outputs: "map", float32, (N, H, W), the combined map at that size, and
"score", float32, (N,), its maximum. N is free. The thresholds, H and W are in the file's metadata.
Notebook 10 ends with a predictor of ten lines that needs onnxruntime, numpy and pillow.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from effad_core.acceleration.precision import number_format
from effad_core.deployment.prepared import InferenceGraph
from effad_core.detector import POINTS, EfficientAD
from effad_core.errors import RunError, not_installed

import torch
from torch import Tensor, nn

OPSET = 18


class ExportedGraph(nn.Module):
    """uint8 images (N, H, W, 3) -> the combined map (N, H, W) and its maximum (N,)."""

    def __init__(self, detector: EfficientAD):
        super().__init__()
        self.detector = InferenceGraph(detector)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        m = self.detector(image.permute(0, 3, 1, 2))[:, 0]
        return m, m.flatten(1).amax(dim=1)


def export(detector: EfficientAD, path: str | os.PathLike) -> None:
    """Write the file; an old one is replaced at the end.

    Args:
        detector: trained; it stays as it is.
        path: ends with ".onnx".

    Raises:
        RunError: if the package onnx or onnxscript is missing, or the path does not end so.
        ValueError: if the detector has no quantiles, or a number is not finite; or if it has
            thresholds that were not found in float32, in which the file computes.

    Example:
        >>> export(detector, folder / "detector.onnx")
        >>> (folder / "detector.onnx").is_file()
        True
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise RunError(f"{path} must end with .onnx")
    points = {name: getattr(detector, attribute) for name, attribute in POINTS.items()}
    described = {name: point.to_dict() for name, point in points.items() if point is not None}
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
    example = torch.zeros(2, *detector.image_size, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        module,
        (example,),
        input_names=["image"],
        output_names=["map", "score"],
        dynamic_shapes={"image": {0: torch.export.Dim.DYNAMIC}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        program.save(part, external_data=False)
        model = onnx.load(part)
        onnx.helper.set_model_props(
            model,
            {
                "image_size": json.dumps(detector.image_size),
                "operating_points": json.dumps(described),
            },
        )
        onnx.checker.check_model(model)
        onnx.save(model, part)
        os.replace(part, path)
