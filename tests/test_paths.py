"""Paths as people write them work wherever a path is taken; files that are handed on name none.

"~", a path relative to the current folder, ".", a slash at the end, folders that do not exist yet.
"""

import os
import shutil
from pathlib import Path

from effad_core import (
    EfficientAD,
    RunError,
    Schedule,
    evaluate,
    export,
    inspect_images,
    open_pretraining,
    open_scenario,
    train,
)
from effad_core.cli import main
from effad_core.datasets import list_scenarios, read_image, read_mask
from effad_core.evaluation import benchmark
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors

import numpy as np
import onnx
import pytest
import torch
from PIL import Image


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home, in which a folder part/train/good lies; the current folder is another."""
    home, here = tmp_path / "home of someone", tmp_path / "here"
    here.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (264, 264, 3), np.uint8)
        path = home / "part/train/good" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not list(here.rglob("~*")), "a folder called ~ was made"


def ways(home, monkeypatch):
    """Ways to write the folder part, each with the current folder in which it holds."""
    yield from ("~/part", "~/part/", "../home of someone/part", "../home of someone/part//")
    monkeypatch.chdir(home / "part")
    yield "."
    yield "./"
    monkeypatch.chdir(home / "part/train")
    yield ".."


def test_folders_of_images(home, narrow, monkeypatch):
    for way in ways(home, monkeypatch):
        for path in (way, Path(way)):
            scenario = open_scenario(path)
            assert scenario.name == "part" and len(scenario.train) == 3, way
            assert open_pretraining(path).source == "the folder part", way
            assert [entry.name for entry in benchmark.plan([str(path)])] == ["part"], way
            found = inspect_images(narrow(), path, "~/out", overlays=False)
            assert found.images == 4 and (home / "out/predictions.csv").is_file(), way


def test_a_folder_of_visa_by_a_point(home, monkeypatch):
    root = home / "VisA"
    (root / "split_csv").mkdir(parents=True)
    row = "candle,train,normal,candle/{}.png,\n"
    table = "object,split,label,image,mask\n" + "".join(row.format(n) for n in range(4))
    (root / "split_csv/1cls.csv").write_text(table)
    shutil.copytree(home / "part/train/good", root / "candle")
    monkeypatch.chdir(root / "candle")
    assert open_scenario(".").name == "candle" and list_scenarios(".") == [Path()]


def test_files(home, narrow):
    detector = narrow()
    detector.save("~/new/d.safetensors")
    detector.save("deep/er/d.safetensors")
    export(detector, "~/newer/d.onnx")
    for path in ("~/new/d.safetensors", "deep/er/d.safetensors", "./deep/../deep/er/d.safetensors"):
        loaded = EfficientAD.load(path)
    assert (home / "newer/d.onnx").is_file()
    image = "~/part/train/good/0.png"
    assert loaded.predict(image).score == detector.predict(home / "part/train/good/0.png").score
    assert read_image(image).size == (264, 264) and read_mask(image, (264, 264)).any()
    teacher = home / "teacher.safetensors"
    shutil.copy(Path(__file__).parents[1] / "data/teachers/pdn_small.safetensors", teacher)
    with pytest.raises(RunError, match="of another architecture"):  # it was found, and is wider
        narrow().load_teacher("~/teacher.safetensors")


def test_runs(home, narrow, scenario, pretraining):
    schedule = Schedule.named("smoke")
    for _ in range(2):  # the second call finds the first one's run
        train(narrow(), scenario, schedule, pretraining, "~/runs/one")
    assert (home / "runs/one/detector.safetensors").is_file()
    with Run("~/runs/two", {}, {}, {}, 1):
        pass
    assert (home / "runs/two").is_dir()
    found = evaluate(narrow(), scenario.train, keep_maps=True)
    assert found.save_maps("~/maps") == home / "maps/samples"


def test_commands(home, narrow):
    detector = narrow()
    detector.threshold = 0.5
    detector.save("~/d.safetensors")
    for words in (
        ["threshold", "~/d.safetensors", "--value", "2", "--output", "~/a/b/d.safetensors"],
        ["predict", "~/a/b/d.safetensors", "~/part", "--output=~/c/d", "--no-overlays"],
        ["export", "~/a/b/d.safetensors", "~/e/f/d.onnx"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code, words
    assert (home / "c/d/predictions.csv").is_file() and (home / "e/f/d.onnx").is_file()


def test_where_nothing_can_be_written_is_said_before_the_work(narrow, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "d.onnx").mkdir()
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported in vain"))
    for path in (tmp_path / "file/d.onnx", tmp_path / "d.onnx"):
        with pytest.raises(RunError, match=r"d.onnx cannot be written: .*choose another path"):
            export(narrow(), path)
    with pytest.raises(RunError, match=r"d.safetensors cannot be written: "):
        narrow().save(tmp_path / "file/d.safetensors")


def test_no_file_tells_of_the_machine(home, narrow, scenario, pretraining):
    detector = narrow()
    photographs = open_pretraining("~/part")
    train(detector, scenario, Schedule.named("smoke", iterations=2), photographs, "~/run")
    detector.precision = "float32"
    export(detector, "~/d.onnx")
    secrets = {str(home), os.getcwd(), "/".join(Path(torch.__file__).parts[-3:-1])}
    secrets |= {str(Path(__file__).parents[1]), "site-packages", "effad_core/"}
    files = [home / "run" / name for name in ("detector.safetensors", "config.json", "log.csv")]
    for file in (*files, home / "d.onnx"):
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], file
    _, header = read_tensors("~/run/detector.safetensors", "detector", card=dict)
    assert "from the folder part (" in header["card"]["training"]["pretraining"]
    model = onnx.load(home / "d.onnx")
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert {prop.key for prop in model.metadata_props} == {
        "image_size",
        "full_scale",
        "operating_points",
        "threshold",
        "pixel_threshold",
    }
