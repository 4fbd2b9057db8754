"""The INT8 model: near the detector it came from, with thresholds of its own."""

import re
import sys

from effad_core import OperatingPoint, RunError, open_scenario
from effad_core.deployment import exporting
from effad_core.deployment.int8 import OpenVinoDetector, export_int8
from effad_core.deployment.onnx import export
from effad_core.evaluation.evidence import open_evidence

import numpy as np
import openvino
import pytest


@pytest.fixture(scope="module")
def solar():
    return open_scenario("solar-mono")


@pytest.fixture(scope="module")
def written(solar, tmp_path_factory):
    """The shipped detector of the solar cells, and its INT8 model."""
    detector = open_evidence("solar-mono").detector("cpu")
    detector.operating_point = OperatingPoint(0.4, "labels-f1", 9)
    path = tmp_path_factory.mktemp("int8") / "new" / "part.xml"
    found = export_int8(detector, solar.train[:8], solar.validation[:4], path, 0.5, "average")
    return detector, found, path


def test_its_maps_are_nearly_the_detectors(written, solar):
    detector, found, _ = written
    for sample in (*solar.test[:3], *solar.test[-3:]):
        exact, rounded = detector.predict(sample.path), found.predict(sample.path)
        near = 0.1 * float(np.ptp(exact.map))
        assert rounded.map.shape == exact.map.shape == exact.size
        assert rounded.score == pytest.approx(exact.score, abs=near)
        assert rounded.score != exact.score
        assert np.quantile(np.abs(rounded.map - exact.map), 0.99) < near
    assert detector.threshold == 0.4  # it stays as it was


def test_only_the_inner_convolutions_compute_in_8_bits(written):
    _, _, path = written
    model = openvino.Core().read_model(path)
    quantised = [
        list(node.shape)
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
    ]
    # PDN-S: two of the four convolutions of teacher and student
    assert sorted(quantised) == [[256, 128, 4, 4]] * 2 + [[256, 256, 3, 3]] * 2


def test_its_thresholds_are_its_own_and_saved(written, solar):
    _, found, path = written
    loaded = OpenVinoDetector(path)
    assert loaded.operating_point == found.operating_point
    assert loaded.pixel_operating_point == found.pixel_operating_point
    assert loaded.operating_point.kind == "fpr-average" and loaded.operating_point.images == 4
    scores = [loaded.predict(sample.path).score for sample in solar.validation[:4]]
    assert np.isclose(scores, loaded.threshold, rtol=1e-5).any()  # one by one, not as a batch
    assert loaded.image_size == (256, 256) and loaded.full_scale is None
    with pytest.raises(ValueError, match="computes on the CPU here, not on cuda"):
        loaded.use_device("cuda")


def test_an_onnx_file_has_predict_too(written, solar, tmp_path):
    detector, _, _ = written
    export(detector, tmp_path / "d.onnx")
    loaded = OpenVinoDetector(tmp_path / "d.onnx")
    assert loaded.operating_point == detector.operating_point
    exact, found = detector.predict(solar.test[0].path), loaded.predict(solar.test[0].path)
    np.testing.assert_allclose(found.map, exact.map, atol=1e-3 * float(np.ptp(exact.map)))


def test_the_command(written, drawn, tmp_path, capsys):
    detector, _, _ = written
    detector.save(tmp_path / "d.safetensors")
    folder = tmp_path / "part/train/good"
    folder.mkdir(parents=True)
    for path in drawn:
        (folder / path.name).write_bytes(path.read_bytes())
    command = [str(tmp_path / "d.safetensors"), str(tmp_path / "i.xml"), "--int8"]
    exporting.main([*command, str(tmp_path / "part"), "--guarantee", "average"])
    said = capsys.readouterr().out
    point = OpenVinoDetector(tmp_path / "i.xml").operating_point
    assert f"images: {point}\n" in said and point.images == 1
    assert "trained on none of the 1 validation images of part" in said
    for wrong, words in (
        (command[:2], "a .xml file holds an INT8 model: give --int8"),
        ([command[0], "d.onnx", "--rate", "0.1"], "--rate and --guarantee belong to --int8"),
    ):
        with pytest.raises(SystemExit):
            exporting.main(wrong)
        assert words in capsys.readouterr().err


def test_what_cannot_be_made_or_read(written, solar, tmp_path, monkeypatch, refusal):
    detector, _, path = written
    with pytest.raises(RunError, match="part.onnx must end with .xml"):
        export_int8(
            detector, solar.train[:2], solar.validation[:2], tmp_path / "part.onnx", 0.5, "average"
        )
    with pytest.raises(RunError, match="there is no model"):
        OpenVinoDetector(tmp_path / "absent.xml")
    foreign = tmp_path / "foreign.xml"
    model = openvino.Core().read_model(path)
    model.set_rt_info("not JSON", ["framework", "image_size"])
    openvino.save_model(model, foreign)
    (tmp_path / "damaged.xml").write_text("<net")
    for other in (foreign, tmp_path / "damaged.xml"):
        with pytest.raises(RunError, match=f"{other.name} is no model of effad"):
            OpenVinoDetector(other)
    monkeypatch.setitem(sys.modules, "nncf", None)
    sentence = 'an INT8 model needs the package nncf: run `pip install "effad-core[export]"`'
    with pytest.raises(RunError, match=re.escape(sentence)):
        export_int8(
            detector, solar.train[:2], solar.validation[:2], tmp_path / "p.xml", 0.5, "average"
        )
    assert not (tmp_path / "p.xml").exists()
