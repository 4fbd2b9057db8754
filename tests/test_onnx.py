"""The ONNX file, run by ONNX Runtime, against the detector's own predictions."""

import json
import re
import sys

from effad_core import EfficientAD, OperatingPoint, RunError
from effad_core.deployment.onnx import export
from effad_core.deployment.resizing import PillowResize

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image, ImageFilter


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))[None]


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
    batch = np.concatenate([pixels(file) for file in drawn[:3]])
    together = loaded.run(None, {"image": batch})
    for index, file in enumerate(drawn[:3]):
        maps, scores = loaded.run(["map", "score"], {"image": batch[index : index + 1]})
        expected = detector.predict(file)
        assert maps.shape == (1, 264, 280) and maps.dtype == np.float32
        assert scores[0] == pytest.approx(expected.score, rel=5e-3)  # resizing rounds differently
        np.testing.assert_allclose(together[0][index], maps[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(maps[0], expected.map, atol=0.01 * np.ptp(expected.map))
    about = loaded.get_modelmeta().custom_metadata_map
    assert json.loads(about["image_size"]) == list(detector.image_size)
    points = json.loads(about["operating_points"])
    assert OperatingPoint.from_dict(points["threshold"]) == detector.operating_point
    assert points.keys() == {"threshold"}
    assert json.loads(about["threshold"]) == detector.threshold == 0.7
    assert json.loads(about["pixel_threshold"]) is None


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
    batch = np.concatenate([pixels(file) for file in drawn[:3]])
    found = compiled(batch)
    m, score = session(tmp_path / "d.onnx").run(["map", "score"], {"image": batch})
    np.testing.assert_allclose(found["map"], m, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["score"], score, rtol=1e-4)


@pytest.mark.parametrize(
    "height, width", [(256, 256), (257, 300), (300, 257), (1500, 1500), (90, 101), (481, 2003)]
)
def test_it_resizes_as_pillow_does(height, width):
    """Other bilinear filters are off by far more, where an image becomes smaller."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    expected = np.asarray(image.resize((320, 256), Image.Resampling.BILINEAR), np.float32)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    found = PillowResize((256, 320))(planes)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1  # which filter comes first differs between versions
    assert np.abs(found - expected).mean() < 0.3
    sampled = torch.nn.functional.interpolate(planes, (256, 320), mode="bilinear")[0]
    if height > 256 and width > 320:
        assert np.abs(sampled.permute(1, 2, 0).numpy() - expected).mean() > 10


def test_images_of_any_size_as_they_are(tmp_path):
    """`../shared/cases/13`: the caller need not know how to resize."""
    torch.manual_seed(0)
    detector = EfficientAD().load_teacher()
    detector.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
    export(detector, tmp_path / "d.onnx")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "d.onnx", "CPU", settings)
    loaded, rng = session(tmp_path / "d.onnx"), np.random.default_rng(0)
    # of images that are taller than wide, Pillow 13 filters the columns first, older ones do not
    sizes = {(257, 301): 0.02, (1000, 1499): 0.02, (40, 50): 1e-3, (301, 257): 0.1}
    for (height, width), near in sizes.items():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        image = np.asarray(image.filter(ImageFilter.GaussianBlur(2)))
        expected = detector.predict(image)
        scale = float(np.ptp(expected.map))
        for found in (loaded.run(None, {"image": image[None]}), compiled(image[None]).values()):
            (m,), (score,) = found
            assert m.shape == (height, width)
            assert score == pytest.approx(expected.score, abs=near * scale)
            np.testing.assert_allclose(m, expected.map, atol=near * scale)


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
