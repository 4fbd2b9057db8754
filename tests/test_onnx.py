"""The ONNX file, run by ONNX Runtime, against the detector's own predictions."""

import json
import re
import sys

from effad_core import EfficientAD, OperatingPoint, RunError
from effad_core.deployment.onnx import export

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def pixels(path, size):
    image = Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)[None]


@pytest.mark.parametrize("options", [{}, {"image_size": (256, 288), "padding": True}])
def test_onnx_runtime_agrees(narrow, drawn, tmp_path, options):
    detector = narrow(**options)
    detector.cell_means.uniform_(0.5, 2)
    detector.operating_point = OperatingPoint(0.7, "labels-f1", 9)
    path = tmp_path / "d.onnx"
    path.write_text("an old file")
    export(detector, path)
    assert [file.name for file in tmp_path.iterdir()] == ["d.onnx"]
    loaded = session(path)
    height, width = detector.image_size
    batch = np.concatenate([pixels(file, (width, height)) for file in drawn[:3]])
    together = loaded.run(None, {"image": batch})
    for index, file in enumerate(drawn[:3]):
        maps, scores = loaded.run(["map", "score"], {"image": batch[index : index + 1]})
        expected = detector.predict(file)
        assert maps.shape == (1, height, width) and maps.dtype == np.float32
        assert scores[0] == pytest.approx(expected.score, rel=1e-4)
        np.testing.assert_allclose(together[0][index], maps[0], rtol=1e-4, atol=1e-4)
        own = Image.fromarray(maps[0]).resize((280, 264), Image.Resampling.BILINEAR)
        assert np.corrcoef(np.ravel(own), expected.map.ravel())[0, 1] > 0.99
    about = loaded.get_modelmeta().custom_metadata_map
    assert json.loads(about["image_size"]) == [height, width]
    points = json.loads(about["operating_points"])
    assert OperatingPoint.from_dict(points["threshold"]) == detector.operating_point
    assert points.keys() == {"threshold"}


def test_real_networks(tmp_path):
    """Every layer at its full width."""
    detector = EfficientAD().load_teacher()
    detector.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
    export(detector, tmp_path / "d.onnx")
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    (m,), (score,) = session(tmp_path / "d.onnx").run(None, {"image": image})
    expected = detector.predict(image[0])
    np.testing.assert_allclose(m, expected.map, atol=1e-4 * np.ptp(expected.map))
    assert score == pytest.approx(expected.score, rel=1e-4)


def test_openvino_agrees(narrow, drawn, tmp_path):
    detector = narrow()
    export(detector, tmp_path / "d.onnx")
    # without the hint it computes in bfloat16 where the processor has it
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "d.onnx", "CPU", settings)
    batch = np.concatenate([pixels(file, detector.image_size[::-1]) for file in drawn[:3]])
    found = compiled(batch)
    m, score = session(tmp_path / "d.onnx").run(["map", "score"], {"image": batch})
    np.testing.assert_allclose(found["map"], m, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["score"], score, rtol=1e-4)


def test_what_cannot_be_exported(narrow, tmp_path, monkeypatch):
    detector = narrow()
    with pytest.raises(RunError, match=r"detector.pt must end with .onnx"):
        export(detector, tmp_path / "detector.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    sentence = 'needs the package onnxscript: run `pip install "effad-core[export]"`'
    with pytest.raises(RunError, match=re.escape(sentence)):
        export(detector, tmp_path / "d.onnx")
    monkeypatch.undo()
    detector.quantiles.fill_(np.nan)
    with pytest.raises(ValueError, match="no quantiles yet"):
        export(detector, tmp_path / "d.onnx")
    assert list(tmp_path.iterdir()) == []


def test_thresholds_of_another_number_format_are_not_exported(narrow, tmp_path):
    detector = narrow()
    detector.precision = "bfloat16"
    detector.threshold = 0.5
    with pytest.raises(ValueError, match=r"hold in bfloat16, .* computes in float32: set detector"):
        export(detector, tmp_path / "d.onnx")
    assert list(tmp_path.iterdir()) == []
    detector.threshold = None
    export(detector, tmp_path / "d.onnx")
