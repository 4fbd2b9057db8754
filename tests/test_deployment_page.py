"""The program in C++ of docs/deployment.md compiles and gives Python's scores."""

import re
import shutil
import subprocess
from pathlib import Path

from effad_core import EfficientAD, OperatingPoint, export

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

PAGE = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
OPENVINO = Path(openvino.__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The page's program, compiled by the page's command."""
    folder = tmp_path_factory.mktemp("cpp")
    (code,) = re.findall(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"^g\+\+ .*$", PAGE, re.MULTILINE)
    if not shutil.which("g++") or not Path("/usr/include/stb/stb_image.h").exists():
        pytest.skip("this machine has no C++ compiler, or no stb_image.h (Debian: libstb-dev)")
    (folder / "verdict.cpp").write_text(code, encoding="utf-8")
    subprocess.run(f"OV='{OPENVINO}'; {command}", shell=True, check=True, cwd=folder)
    return folder / "verdict"


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = EfficientAD().load_teacher()
    made.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
    return made


def judge(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    scores = [float(found) for found in re.findall(r"score ([-\d.e]+)", done.stdout)]
    return done.returncode, scores, done.stdout + done.stderr


def test_the_program_gives_pythons_scores(program, detector, drawn, tmp_path):
    rng = np.random.default_rng(0)
    wide = tmp_path / "wide.png"
    Image.fromarray(rng.integers(0, 256, (301, 700, 3), np.uint8)).save(wide)
    paths = [*drawn[:3], wide]
    expected = [found.score for found in detector.predict(paths)]
    detector.operating_point = None
    export(detector, tmp_path / "d.onnx")
    code, scores, said = judge(program, tmp_path / "d.onnx", *paths)
    assert code == 0 and "threshold" not in said
    assert scores == pytest.approx(expected, rel=5e-3)  # resizing rounds differently
    middle = float(np.sort(expected)[1:3].mean())
    detector.operating_point = OperatingPoint(middle, "labels-f1", 9)
    export(detector, tmp_path / "d.onnx")
    code, _, said = judge(program, tmp_path / "d.onnx", *paths)
    assert code == 3
    for path, score in zip(paths, expected, strict=True):
        verdict = "anomalous" if score > middle else "normal"
        assert re.search(rf"{re.escape(str(path))}: score .*, threshold .*, {verdict}\n", said)
    code, scores, _ = judge(program, tmp_path / "d.onnx", paths[int(np.argmin(expected))])
    assert code == 0 and len(scores) == 1


def test_what_it_cannot_do_it_says(program, detector, drawn, tmp_path):
    export(detector, tmp_path / "d.onnx")
    (tmp_path / "no.png").write_text("no image")
    for arguments, code, words in (
        ((), 2, "usage: verdict MODEL IMAGE"),
        ((tmp_path / "d.onnx", tmp_path / "no.png"), 1, "no.png cannot be read"),
        ((tmp_path / "absent.onnx", drawn[0]), 1, "absent.onnx"),
    ):
        found, _, said = judge(program, *arguments)
        assert found == code and words in said
