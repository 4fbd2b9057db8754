"""The command `effad`: its overview, its sub-commands, and the way from good images to verdicts."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

from effad_core import EfficientAD, cli
from effad_core.cli import COMMANDS, main
from effad_core.deployment import own_images
from effad_core.deployment.overlays import bounding_boxes
from effad_core.prediction import Prediction

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments):
    """Exit code, what was printed, and what was complained of."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_overview_names_every_command_and_fits_a_screen(capsys):
    for arguments in ((), ("--help",), ("help",)):
        code, text, _ = run(capsys, *arguments)
        assert code == 0 and len(text.splitlines()) <= 24
        assert all(len(line) <= 100 for line in text.splitlines())
        assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_own_name(capsys, name):
    code, text, _ = run(capsys, name, "--help")
    assert code == 0 and text.startswith(f"usage: effad {name} ")
    assert f"effad {name} " in text.partition("\n\n")[2]  # an example


def test_a_wrong_name_is_one_sentence(capsys):
    code, text, error = run(capsys, "trian")
    assert (code, text, error) == (2, "", "effad has no command 'trian': did you mean train?\n")
    assert "effad --help lists the commands" in run(capsys, "xyz")[2]


def test_ctrl_c_while_torch_is_loaded_is_one_sentence(capsys, monkeypatch):
    def pressed(name):
        assert name == "effad_core.evaluation.benchmark"
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", pressed)
    assert run(capsys, "benchmark", "tray") == (130, "", "\nInterrupted: nothing was begun.\n")


def test_it_is_installed_and_runs_as_a_module():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = scripts["scripts"]["effad"].partition(":")
    assert getattr(import_module(module), function) is main
    done = subprocess.run(
        [sys.executable, "-m", "effad_core", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"effad {cli.own_version()}\n" and scripts["version"] in done.stdout


def test_nothing_heavy_is_loaded_for_the_overview():
    code = "import sys; from effad_core.cli import main; main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.fixture
def small(narrow, monkeypatch):
    """`train` takes narrow networks, and always the same random teacher."""
    teacher = narrow(out_channels=384).teacher.state_dict()

    def load_teacher(self, path):
        self.teacher.load_state_dict(teacher)
        return self

    monkeypatch.setattr(EfficientAD, "load_teacher", load_teacher)


def copy(images, folder):
    folder.mkdir(parents=True)
    for path in images:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_from_a_folder_of_good_images_to_verdicts(small, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(drawn, tmp_path / "my part")
    code, text, error = run(capsys, "train", "my part", "--profile", "smoke", "--device", "cpu")
    assert code == 0, error
    file = Path("build/runs/my part-smoke-small-seed0/detector.safetensors")
    assert f"the detector: {file}" in text and "too few for a rate of 0.05" in text
    detector = EfficientAD.load(file)
    assert str(detector.operating_point) in text and str(detector.pixel_operating_point) in text
    assert "no AU-ROC: it needs normal and anomalous test images" in text

    detector.threshold = detector.pixel_threshold = -100.0  # everything is anomalous
    detector.save("all.safetensors")
    options = ("--output", "out", "--masks", "--boxes", "--no-overlays")
    assert run(capsys, "predict", "all.safetensors", "my part", *options)[0] == 0
    assert (
        run(capsys, "predict", "all.safetensors", "my part", *options, "--fail-on-anomaly")[0] == 3
    )
    assert len(list(Path("out/masks").iterdir())) == len(drawn)
    boxes = json.loads(Path("out/boxes.json").read_text())
    whole = boxes[drawn[0].name][0]
    assert (whole["x"], whole["y"], whole["width"], whole["height"]) == (0, 0, 280, 264)

    assert run(capsys, "threshold", "all.safetensors", "--value", "1e6")[0] == 0
    assert EfficientAD.load("all.safetensors").threshold == 1e6
    assert (
        run(capsys, "predict", "all.safetensors", "my part", *options, "--fail-on-anomaly")[0] == 0
    )
    arguments = (
        "threshold",
        "all.safetensors",
        "my part",
        "--rate",
        "0.2",
        "--output",
        "x.safetensors",
    )
    assert run(capsys, *arguments, "--guarantee", "average")[0] == 0
    assert EfficientAD.load("x.safetensors").operating_point.images == len(drawn)
    assert EfficientAD.load("all.safetensors").threshold == 1e6


def test_the_same_training_goes_on_and_measures_test_images(small, drawn, tmp_path, capsys):
    part = tmp_path / "part"
    copy(drawn[:5], part / "train" / "good")
    copy(drawn[5:6], part / "test" / "good")
    copy(drawn[6:], part / "test" / "spot")
    options = ("--profile", "smoke", "--device", "cpu", "--run-dir", tmp_path / "run")
    first = run(capsys, "train", part, *options)
    bytes_of = (tmp_path / "run" / "detector.safetensors").read_bytes()
    second = run(capsys, "train", part, *options)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "image AU-ROC on 3 test images: " in first[1]
    assert (tmp_path / "run" / "detector.safetensors").read_bytes() == bytes_of


def test_bad_parts_and_thumbnails_are_never_trained_on(small, drawn, tmp_path, capsys):
    """Folders whose names say which is which, and the same by options."""
    part = tmp_path / "part"
    copy(drawn[:5], part / "pass")
    copy(drawn[5:], part / "fail")
    copy(drawn[:2], part / "pass" / "@eaDir")
    options = ("--profile", "smoke", "--device", "cpu", "--run-dir", tmp_path / "run")
    code, text, error = run(capsys, "train", part, *options)
    assert code == 0, error
    assert "good: pass; anomalous: fail" in text and "trained on 4 good images, 1 held out" in text
    assert "left out: 2 files in @eaDir: thumbnails of a Synology NAS" in text
    named = ("--normal", part / "pass", "--anomalous", part / "fail")
    code, again, error = run(capsys, "train", *named, *options)
    assert code == 0, error
    assert "trained on 4 good images, 1 held out" in again and f"normal: {part / 'pass'}" in again
    assert run(capsys, "train", part, *named, *options)[0] == 2
    assert run(capsys, "train", *options)[0] == 2
    detector = tmp_path / "run" / "detector.safetensors"
    options = ("--rate", "0.4", "--guarantee", "average", "--output", tmp_path / "x.safetensors")
    assert run(capsys, "threshold", detector, part, *options)[0] == 0
    point = EfficientAD.load(tmp_path / "x.safetensors").operating_point
    assert point.images == 5  # those of pass
    (part / "pass").rename(part / "0")
    (part / "fail").rename(part / "1")
    for command in (("train", part), ("threshold", detector, part)):
        code, _, error = run(capsys, *command)
        assert code == 2 and "effad train --normal FOLDER --anomalous FOLDER" in error


def test_what_cannot_be_done_is_one_sentence(small, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = copy(drawn, tmp_path / "part")
    for arguments, message in (
        (("train", "absent"), "absent"),
        (("train", images, "--rate", "7"), "rate"),
        (("train", images, "--device", "cuda:9"), "no device cuda:9"),
        (("threshold", "absent.safetensors", "--value", "1"), "absent.safetensors does not exist"),
        (("export", "absent.safetensors", "x.onnx"), "absent.safetensors does not exist"),
        (("predict", "absent.safetensors", images), "absent.safetensors does not exist"),
    ):
        code, text, error = run(capsys, *arguments)
        assert code == 2 and message in error and len(error.splitlines()) == 1, arguments
        assert text == ""
    assert not Path("build").exists()
    assert run(capsys, "threshold", "x.safetensors")[0] == 2  # neither images nor a value


def test_what_would_end_a_training_late_is_said_before_it(small, drawn, tmp_path, capsys):
    part = tmp_path / "part"
    copy(drawn[:5], part / "train" / "good")
    copy(drawn[5:6], part / "test" / "good")
    copy(drawn[6:], part / "test" / "spot")
    (tmp_path / "file").touch()
    options = ("--profile", "smoke", "--device", "cpu", "--run-dir")
    code, text, error = run(capsys, "train", part, *options, tmp_path / "file" / "run")
    assert code == 2 and "choose another --run-dir" in error and "L_hard" not in text + error
    broken = part / "test" / "spot" / drawn[7].name
    os.truncate(broken, 1000)
    code, text, error = run(capsys, "train", part, *options, tmp_path / "run")
    assert code == 2 and error.startswith(f"{broken} cannot be read as an image")
    broken.unlink()
    assert run(capsys, "train", part, *options, tmp_path / "run")[0] == 0


def test_a_size_without_a_teacher_is_said_before_the_training(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("effad_core.detector.shipped", lambda name: tmp_path / name)
    copy(drawn, tmp_path / "part" / "train" / "good")
    for command in ("train", "benchmark"):
        code, _, error = run(capsys, command, "part", "--size", "medium", "--profile", "smoke")
        said = error if code == 2 else code  # a text that the system prints
        assert "there is no teacher" in said and "pdn_medium.safetensors" in said
    assert not Path("build").exists()


def test_a_threshold_with_nowhere_to_go_is_said_before_the_images_are_scored(
    narrow, drawn, tmp_path, capsys, monkeypatch
):
    narrow().save(tmp_path / "d.safetensors")
    monkeypatch.setattr("effad_core.deployment.thresholding.fit_thresholds", None)
    for output, message in (
        (tmp_path, f"{tmp_path} is a folder, not a file: choose another --output"),
        (drawn[0] / "new.safetensors", "cannot be written: Not a directory"),
    ):
        arguments = ("threshold", tmp_path / "d.safetensors", drawn[0].parent, "--output", output)
        code, _, error = run(capsys, *arguments)
        assert code == 2 and message in error


def test_masks_and_boxes_need_a_pixel_threshold(narrow, drawn, tmp_path, capsys):
    narrow().save(tmp_path / "none.safetensors")
    for option in ("--masks", "--boxes", "--fail-on-anomaly"):
        code, _, error = run(
            capsys, "predict", tmp_path / "none.safetensors", drawn[0].parent,
            "--output", tmp_path / "out", option,
        )  # fmt: skip
        assert code == 2 and "threshold" in error
    assert not (tmp_path / "out").exists()


def test_boxes_by_hand():
    m = np.zeros((6, 8), np.float32)
    m[1, 1], m[2, 2], m[4, 5:8] = 0.6, 0.9, 0.7  # two pixels that touch by a corner, and a row
    boxes = bounding_boxes(Prediction(m[None], 0.9, m.shape, 0.5, 0.5))
    assert boxes == [
        {"x": 1, "y": 1, "width": 2, "height": 2, "peak": pytest.approx(0.9)},
        {"x": 5, "y": 4, "width": 3, "height": 1, "peak": pytest.approx(0.7)},
    ]
    assert bounding_boxes(Prediction(m[None], 0.9, m.shape, 0.5, 2.0)) == []


@pytest.fixture
def made(narrow, tmp_path):
    """The file of a detector."""
    narrow().save(tmp_path / "made.safetensors")
    return tmp_path / "made.safetensors"


def test_a_folder_may_follow_the_options(made, drawn, tmp_path, capsys):
    copy(drawn[:4], tmp_path / "good")
    options = ("--rate", "0.6", "--precision", "float32", "--output", tmp_path / "new.safetensors")
    code, text, error = run(capsys, "threshold", made, *options, tmp_path / "good")
    assert code == 0, error
    assert text.startswith("images: threshold") and "\npixels: threshold" in text
    assert text.endswith(f"written to {tmp_path / 'new.safetensors'}\n")


def test_too_few_images_for_a_rate_name_the_option_that_helps(made, drawn, tmp_path, capsys):
    copy(drawn[:4], tmp_path / "good")
    code, _, error = run(capsys, "threshold", made, tmp_path / "good", "--rate", "0.05")
    assert code == 2 and "4 good images are too few" in error and "which needs 59" in error
    rate = error.rpartition("--rate ")[2].strip()
    output = ("--output", tmp_path / "new.safetensors")
    assert run(capsys, "threshold", made, tmp_path / "good", "--rate", rate, *output)[0] == 0


def test_wrong_input_exits_with_2_in_every_command(tmp_path, capsys):
    """As `effad --help` says."""
    gone = tmp_path / "gone"
    for words in (
        ("train", gone), ("predict", gone, gone), ("threshold", gone, gone), ("export", gone, "x"),
        ("check-teacher", gone), ("benchmark", gone), ("distill", gone, "--run-dir", gone),
        ("gallery", f"{gone}={gone}", "--output", tmp_path / "x.png"), ("time", gone),
        ("costs", "nothing"), ("unpack", gone, tmp_path),
    ):  # fmt: skip
        code, _, error = run(capsys, *words)
        assert code == 2 and error.strip() and "Traceback" not in error, words


@pytest.mark.parametrize(
    ("folder", "name"), [("A/good", "A-good"), ("A/train", "A-train"), ("A/my bolt", "my bolt")]
)
def test_a_run_of_a_folder_called_good_has_its_parents_name(tmp_path, folder, name):
    assert own_images._run_name(str(tmp_path / folder), folder.partition("/")[2]) == name
    assert own_images._run_name(None, "good") == "good"


def test_a_detector_is_found_in_the_folder_of_its_run(made, drawn, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(made, tmp_path / "run" / "detector.safetensors")
    output = ("--output", tmp_path / "out")
    assert run(capsys, "predict", tmp_path / "run", drawn[0], *output)[0] == 0


def test_a_threshold_from_a_few_known_defects(narrow, drawn, tmp_path, capsys):
    """The labels choose the threshold alone; what the good images promise stands beside it."""
    made = tmp_path / "d.safetensors"
    ad = narrow()
    ad.save(made)
    good, bad = copy(drawn[:5], tmp_path / "good"), copy(drawn[5:], tmp_path / "bad")
    scores = {path: ad.predict(path).score for path in drawn}
    labels, values = [0] * 5 + [1] * 3, [scores[path] for path in drawn]
    options = ("--rate", "0.4", "--guarantee", "average", "--anomalous", bad)

    code, text, error = run(capsys, "threshold", made, good, *options, "--recall", "1")
    assert code == 0, error
    found = EfficientAD.load(made, "cpu")
    lowest = min(values[5:])
    above = [value for value in values if value > found.threshold]
    assert found.threshold < lowest and set(above) == {v for v in values if v >= lowest}
    false_alarms = sum(value >= lowest for value in values[:5])
    assert f"3 of 3 defects found, {false_alarms} of 5 good ones called anomalous" in text
    assert "from the good images alone it would be: threshold" in text
    assert found.operating_point.kind == "labels-recall"
    assert found.pixel_operating_point.kind == "fpr-average"
    for name, value in ad.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name

    for alarm, miss in ((1, 1), (1, 50), (50, 1)):
        cost = ("--cost", str(alarm), str(miss), "--prevalence", "0.2")
        assert run(capsys, "threshold", made, good, *options, *cost)[0] == 0
        threshold = EfficientAD.load(made, "cpu").threshold

        def expected(limit, alarm=alarm, miss=miss):
            called = [value > limit for value in values]
            wrong = sum(c for c, label in zip(called, labels, strict=True) if not label) / 5
            missed = sum(not c for c, label in zip(called, labels, strict=True) if label) / 3
            return 0.8 * alarm * wrong + 0.2 * miss * missed

        candidates = [-1e9, *values]
        assert expected(threshold) == pytest.approx(min(map(expected, candidates)))


@pytest.mark.parametrize(
    "options", [["--anomalous", "bad"], ["--recall", "0.9"], ["--cost", "1", "2"]]
)
def test_labels_need_images_and_an_aim(options, capsys):
    code, _, error = run(capsys, "threshold", "x.safetensors", "good", *options)
    assert code == 2 and "--anomalous needs either --recall or --cost" in error
    options = ("--value", "1", "--anomalous", "bad", "--recall", "0.9")
    code, _, error = run(capsys, "threshold", "x.safetensors", *options)
    assert code == 2 and "--anomalous needs a folder of good images" in error


def test_scores_between_0_and_1_and_maps_on_request(narrow, drawn, tmp_path, capsys):
    ad = narrow()
    scores = [ad.predict(path).score for path in drawn]
    ad.threshold = sorted(scores)[3]
    ad.save(tmp_path / "d.safetensors")
    folder, out = copy(drawn, tmp_path / "images"), tmp_path / "out"
    arguments = ("predict", tmp_path / "d.safetensors", folder, "--output", out, "--maps")
    code, _, error = run(capsys, *arguments, "--no-overlays", "--device", "cpu")
    assert code == 0, error
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(drawn)
    for row in rows:
        score, unit = float(row["score"]), float(row["unit_score"])
        assert 0 < unit < 1 and (unit > 0.5) == (row["is_anomalous"] == "True")
        distance = (score - ad.threshold) / 0.1
        assert unit == pytest.approx(0.5 + 0.5 * distance / (1 + abs(distance)))
        with Image.open(out / "maps" / f"{row['image']}.tiff") as image:
            m = ad.predict(folder / row["image"]).map  # alone: a batch rounds otherwise
            np.testing.assert_allclose(image, m, rtol=1e-4, atol=1e-5)
    ranks = [sorted(rows, key=lambda row: float(row[name])) for name in ("score", "unit_score")]
    assert ranks[0] == ranks[1]
    nothing = Prediction(np.zeros((1, 2, 2), np.float32), 0.9, (2, 2))
    with pytest.raises(ValueError, match="the detector has no threshold"):
        _ = nothing.unit_score
    far = [Prediction(nothing.maps, score, (2, 2), 0.5).unit_score for score in (-1e6, 0.5, 1e6)]
    assert 0 < far[0] < 1e-6 and far[1] == 0.5 and 1 - 1e-6 < far[2] < 1
