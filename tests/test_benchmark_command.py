"""`effad benchmark` resumes, skips nothing silently, and prints the numbers of its runs."""

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise

from effad_core import EfficientAD, PatchDescriptionNetwork, Schedule
from effad_core.datasets import DefectKind, Sample
from effad_core.distillation.algorithm import save_teacher
from effad_core.errors import DataError
from effad_core.evaluation import benchmark, methods, tables, tasks
from effad_core.storage.weights import fingerprint

import numpy as np
import pytest
import torch
from PIL import Image

OWN = "EfficientAD-S"
HERE = f"{OWN} (measured here)"


def scenario_folder(folder, drawn):
    """Three training images, a good test image and one with a white corner."""
    for name, images in (("train/good", drawn[:3]), ("test/good", drawn[3:5])):
        (folder / name).mkdir(parents=True)
        for path in images:
            shutil.copy(path, folder / name)
    (folder / "test" / "spot").mkdir()
    for path in drawn[5:7]:
        image = np.array(Image.open(path))
        image[:80, :80] = 255
        Image.fromarray(image).save(folder / "test" / "spot" / path.name)
    return folder


@pytest.fixture
def dataset(tmp_path, drawn):
    for name in ("bolt", "clip"):
        scenario_folder(tmp_path / "parts" / name, drawn)
    return tmp_path / "parts"


@pytest.fixture
def run(narrow, monkeypatch, tmp_path, capsys):
    """The command under the profile smoke, on narrow networks; returns its output and file."""

    class Narrow(EfficientAD):
        def __init__(self, size):
            super().__init__(size, out_channels=8)

        def load_teacher(self, path=None):
            return narrow() if path is None else super().load_teacher(path)

    monkeypatch.setattr(benchmark, "EfficientAD", Narrow)

    def call(*arguments, fails=False):
        output = tmp_path / "results.json"
        options = ["--profile", "smoke", "--runs", tmp_path / "runs", "--output", output]
        code = None
        try:
            benchmark.main([str(part) for part in (*arguments, *options)])
        except SystemExit as error:
            code = error.code
        assert bool(code) == fails, code
        content = json.loads(output.read_text()) if output.exists() else None
        printed = capsys.readouterr()
        return printed.out, content, printed.err if code in (1, 2) else code

    return call


def test_a_sweep_resumes_and_repeats_nothing(dataset, run, monkeypatch, tmp_path):
    text, content, _ = run(dataset, "--seeds", 0, 1)
    scenarios = content["methods"][OWN]
    assert list(scenarios) == ["bolt", "clip"] and content["failed"] == {}
    assert scenarios["bolt"]["dataset"] == "parts"
    for name, entry in scenarios.items():
        assert list(entry["seeds"]) == ["0", "1"]
        for seed, metrics in entry["seeds"].items():
            written = tmp_path / "runs" / f"{name}-smoke-small-seed{seed}" / "metrics.json"
            assert json.loads(written.read_text())["metrics"] == metrics
            assert set(metrics) == {"all", "spot"}
        areas = [m["all"]["image_auroc"] for m in entry["seeds"].values()]
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert f"{np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f}" in row

    def forbidden(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(tasks, "evaluate", forbidden)
    again_text, again, _ = run(dataset, "--seeds", 0, 1)
    assert again == content and again_text.count("evaluated before") == 4


def test_a_scenario_of_named_folders(dataset, run, tmp_path):
    part = dataset / "bolt"
    named = ("--normal", part / "train/good", "--normal-test", part / "test/good")
    _, content, _ = run(*named, "--anomalous", part / "test/spot", "--seeds", 0)
    assert content["methods"][OWN]["bolt"]["dataset"] == "bolt"
    metrics = content["methods"][OWN]["bolt"]["seeds"]["0"]
    assert set(metrics) == {"all", "spot"}
    assert metrics == run(part, "--seeds", 0)[1]["methods"][OWN]["bolt"]["seeds"]["0"]
    assert "give scenario names" in run(fails=True)[2]  # neither


def test_other_test_images_or_a_damaged_file_are_evaluated_again(dataset, run, tmp_path):
    run(dataset / "bolt", "--seeds", 0)
    metrics = tmp_path / "runs" / "bolt-smoke-small-seed0" / "metrics.json"
    (dataset / "bolt" / "test" / "spot" / "5.png").unlink()
    text, second, _ = run(dataset / "bolt", "--seeds", 0)
    assert "evaluated before" not in text
    assert len(json.loads(metrics.read_text())["images"]) == 3
    metrics.write_text(metrics.read_text()[:100])
    text, third, _ = run(dataset / "bolt", "--seeds", 0)
    assert "metrics.json is damaged and is written anew" in text and third == second


def white_corner(folder, name, size=80):
    mask = np.zeros((264, 280), np.uint8)
    mask[:size, :size] = 255
    (folder / "ground_truth" / "spot").mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(folder / "ground_truth" / "spot" / f"{name}_mask.png")


def test_masks_added_or_corrected_later_are_evaluated(dataset, run, drawn):
    part = dataset / "bolt"

    def swept():
        text, content, _ = run(part, "--seeds", 0)
        return "evaluated before" in text, content["methods"][OWN]["bolt"]["seeds"]["0"]["all"]

    assert "aupro_0.3" not in swept()[1]
    for name in ("5", "6"):
        white_corner(part, name)
    again, first = swept()
    assert not again and "aupro_0.3" in first
    assert swept() == (True, first)
    white_corner(part, "6", size=81)
    again, second = swept()
    assert not again and second["aupro_0.3"] != first["aupro_0.3"]
    assert second["image_auroc"] == first["image_auroc"]
    shutil.copy(drawn[7], part / "test" / "spot" / "6.png")  # another picture under its name
    assert not swept()[0] and swept()[0]


def test_everything_that_a_metric_is_computed_from_counts(drawn, tmp_path):
    mask = tmp_path / "mask.png"
    shutil.copy(drawn[2], mask)
    kind = DefectKind("scratch", 255, 3.0, False)
    first = Sample(drawn[0], 1, "a", (mask,), (kind,))
    good = Sample(drawn[1], 0, "good")
    others = [
        (first, good, good), (good, first), (first,), (replace(first, mask_paths=()), good),
        (replace(first, label=0), good), (replace(first, anomaly_type="b"), good),
        (replace(first, path=drawn[3]), good), (replace(first, mask_paths=(mask, mask)), good),
        (replace(first, defect_kinds=(replace(kind, saturation_threshold=4.0),)), good),
        (replace(first, mask_paths=(drawn[2],)), replace(good, path=drawn[3])),
    ]  # fmt: skip
    found = {tasks.tested(samples) for samples in ((first, good), *others)}
    assert len(found) == 11
    mask.write_bytes(drawn[3].read_bytes())
    assert tasks.tested((first, good)) not in found


def test_other_training_images_under_the_same_names_fail_with_a_reason(dataset, run, drawn):
    run(dataset, "--seeds", 0)
    shutil.copy(drawn[7], dataset / "bolt" / "train" / "good" / "1.png")
    text, content, code = run(dataset, "--seeds", 0, fails=True)
    assert "1 of 3 training and validation images has other content, the first is 1.png" in code
    assert "choose another run_dir (--run-dir or --runs of a command)" in code
    assert (
        content["methods"][OWN]["bolt"]["seeds"] == {} and "bolt-smoke-small-seed0 FAILED" in text
    )
    assert text.count("evaluated before") == 1  # the other scenario


def test_ones_own_bottle_stands_in_no_table_of_the_papers(dataset, run):
    (dataset / "bolt").rename(dataset / "bottle")
    text, content, _ = run(dataset / "bottle", "--seeds", 0)
    assert content["methods"][OWN]["bottle"]["dataset"] == "bottle" and "(paper)" not in text
    assert "bottle is called like a scenario of mvtec-ad, but its numbers of images" in text
    assert "are (3, 2, 2), not (209, 20, 63)" in text
    text, content, _ = run(dataset, "--seeds", 0)
    assert {e["dataset"] for e in content["methods"][OWN].values()} == {"parts"}


def test_maps_on_request_also_of_a_run_that_was_evaluated_before(dataset, run, tmp_path):
    _, first, _ = run(dataset / "bolt", "--seeds", 0)
    _, second, _ = run(dataset / "bolt", "--seeds", 0, "--maps", tmp_path / "maps")
    assert first == second
    folder = tmp_path / "maps" / "bolt-smoke-small-seed0" / "bolt" / "test"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tiff"))
    assert found == ["good/3.tiff", "good/4.tiff", "spot/5.tiff", "spot/6.tiff"]
    with Image.open(folder / found[0]) as m:
        assert m.size == (280, 264) and m.mode == "F"


def test_what_fails_is_named_and_the_rest_is_done(dataset, run):
    broken = dataset / "bolt" / "test" / "spot" / "5.png"
    broken.write_bytes(broken.read_bytes()[:500])
    text, content, code = run(dataset, "--seeds", 0, fails=True)
    assert "1 of the runs FAILED" in code and "5.png cannot be read" in code
    assert content["failed"].keys() == {"bolt-smoke-small-seed0"}
    assert content["methods"][OWN]["bolt"]["seeds"] == {}
    assert content["methods"][OWN]["clip"]["seeds"].keys() == {"0"}
    assert "clip" in text


def jpeg_masks(folder):
    for path in sorted((folder / "test" / "spot").iterdir()):
        mask = folder / "ground_truth" / "spot" / f"{path.stem}_mask.jpg"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (280, 264), 255).save(mask)


FAULTS = {  # what breaks a scenario's folder, and what is said of it
    "no test images": (lambda folder: shutil.rmtree(folder / "test"), "has no test images, but AU"),
    "no normal ones": (
        lambda folder: shutil.rmtree(folder / "test/good"),
        "has no normal test images, but AU-ROC compares images of both kinds: add images of good",
    ),
    "no anomalous ones": (
        lambda folder: shutil.rmtree(folder / "test/spot"),
        "has no anomalous test images, but AU-ROC",
    ),
    "masks in a lossy format": (jpeg_masks, "5_mask.jpg is a JPEG"),
    "a training image in part": (
        lambda folder: os.truncate(folder / "train/good/2.png", 900),
        "2.png cannot be read",
    ),
    "a test image in part": (
        lambda folder: os.truncate(folder / "test/good/4.png", 900),
        "4.png cannot be read",
    ),
    "no training images": (lambda folder: shutil.rmtree(folder / "train"), "bolt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_be_known_is_said_before_any_training(dataset, run, monkeypatch, fault, tmp_path):
    """Of the second scenario too: the first would train for hours."""
    (dataset / "bolt").rename(dataset / "nut")  # after clip
    change, message = FAULTS[fault]
    change(dataset / "nut")
    said, train = [], methods.train
    monkeypatch.setattr(methods, "train", lambda *a, **k: said.append(a[1].name) or train(*a, **k))
    options = ("--seeds", 0, 1) if fault == "no test images" else ("--seeds", 0)
    if fault == "no training images":  # then it is no scenario of a dataset's folder
        (dataset / "nut" / "train" / "good").mkdir(parents=True)
        message = "nut/train/good holds no image"
    text, content, code = run(dataset, *options, fails=True)
    assert message in code
    assert set(said) == {"clip"} and text.index("nut FAILED") < text.index("clip-smoke-small-seed0")
    assert all(run.startswith("nut-") for run in content["failed"])
    assert (
        len(content["failed"]) == len(options) - 1 == len(content["methods"][OWN]["clip"]["seeds"])
    )
    assert content["methods"][OWN]["nut"]["seeds"] == {}
    assert not (tmp_path / "runs" / "nut-smoke-small-seed0").exists()


def test_masks_for_one_kind(dataset, run, tmp_path):
    bolt = dataset / "bolt"
    shutil.copytree(bolt / "test" / "spot", bolt / "test" / "scratch")
    (bolt / "ground_truth" / "spot").mkdir(parents=True)
    for path in (bolt / "test" / "spot").iterdir():
        Image.new("L", (280, 264), 255).save(bolt / "ground_truth" / "spot" / path.name)
    text, content, _ = run(dataset, "--seeds", 0)
    sentence = "Some anomalous test images of bolt have no mask (scratch: 2)"
    assert text.count(sentence) == 1 and text.index(sentence) < text.index("bolt-smoke")
    assert "The scenario clip has no masks: no pixel metrics are measured." in text
    groups = content["methods"][OWN]["bolt"]["seeds"]["0"]
    assert {name for name, found in groups.items() if "aupro_0.3" in found} == {"spot"}


@pytest.mark.parametrize("option", ["--output", "--maps", "--runs"])
def test_an_output_that_cannot_be_written_is_said_at_once(
    dataset, narrow, monkeypatch, tmp_path, capsys, option
):
    monkeypatch.setattr(benchmark, "new_detector", lambda *_: narrow())
    monkeypatch.setattr(methods, "train", None)
    (tmp_path / "file").touch()
    places = {
        "--output": tmp_path / "r.json",
        "--maps": tmp_path / "m",
        "--runs": tmp_path / "runs",
    }
    places[option] = tmp_path / "file" / "below"
    options = [str(word) for pair in places.items() for word in pair]
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(dataset / "bolt"), "--profile", "smoke", "--seeds", "0", *options])
    assert stop.value.code == (1 if option == "--runs" else 2)  # what is of a run is in the table
    said = capsys.readouterr().err
    assert str(places[option]) in said and f"or choose another {option}" in said
    assert "cannot be written: Not a directory; check the folder" in said


def test_an_output_that_is_a_folder(dataset, run, tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(IsADirectoryError):  # of this test, which reads it
        run(dataset, "--seeds", 0, fails=True)
    assert not (tmp_path / "runs").exists()


def test_maps_that_would_share_a_file_are_said_before_the_training(dataset, run, tmp_path):
    spot = dataset / "bolt" / "test" / "spot"
    Image.open(spot / "5.png").save(spot / "5.bmp")
    _, _, code = run(dataset / "bolt", "--seeds", 0, "--maps", tmp_path / "maps", fails=True)
    assert "2 images would be saved as" in code and "5.tiff; rename them" in code
    assert not (tmp_path / "runs").exists()
    run(dataset / "bolt", "--seeds", 0)


def test_an_interrupted_sweep_goes_on(dataset, run, monkeypatch):
    calls, train = [], methods.train

    def pressed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(methods, "train", pressed)
    _, content, code = run(dataset, "--seeds", 0, fails=True)
    assert code == 130
    assert [len(entry["seeds"]) for entry in content["methods"][OWN].values()] == [1, 0]
    text, content, _ = run(dataset, "--seeds", 0)
    assert [len(entry["seeds"]) for entry in content["methods"][OWN].values()] == [1, 1]
    assert text.count("evaluated before") == 1


def test_sources_are_names_folders_and_datasets(dataset):
    entries = benchmark.plan(["solar-mono", str(dataset), "tray"])
    assert [(e.dataset, e.name) for e in entries] == [
        ("solar-mono", "solar-mono"), ("parts", "bolt"), ("parts", "clip"), ("tray", "tray")
    ]  # fmt: skip
    with pytest.raises(DataError, match="two scenarios are called bolt"):
        benchmark.plan([str(dataset), str(dataset / "bolt")])


def test_a_wrong_source_is_one_sentence(run):
    _, content, code = run("no-such-folder", fails=True)
    assert "no-such-folder" in code and content is None


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "runs").iterdir())


def test_each_teacher_has_its_own_runs(dataset, run, narrow, tmp_path):
    saved = {}
    for seed in (1, 2):
        weights = narrow(seed).teacher.half().float()
        save_teacher(tmp_path / f"{seed}.safetensors", weights, {"seed": seed})
        saved[seed] = fingerprint(weights.state_dict())
    found = {}
    for teacher in (None, "random", *(tmp_path / f"{seed}.safetensors" for seed in saved)):
        options = () if teacher is None else ("--teacher", teacher)
        text, content, _ = run(dataset / "bolt", "--seeds", 0, *options)
        assert "evaluated before" not in text
        found[content["settings"]["teacher"]] = content["settings"]["teacher_weights"][OWN]
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in saved]
    assert list(found) == ["shipped", "random", *paths]
    assert [found[path] for path in paths] == list(saved.values())
    run_name = "bolt-smoke-small-seed0"
    suffixes = ["", "-teacher-random", *(f"-teacher-{digits[:8]}" for digits in saved.values())]
    assert folders(tmp_path) == sorted(run_name + suffix for suffix in suffixes)
    for suffix, digits in zip(suffixes, found.values(), strict=True):
        trained = EfficientAD.load(tmp_path / "runs" / (run_name + suffix) / tasks.DETECTOR)
        assert fingerprint(trained.teacher.state_dict()) == digits
        assert trained.card["training"]["teacher_weights"] == digits
    assert trained.card["teacher"] == {"seed": 2}
    text, _, _ = run(dataset / "bolt", "--seeds", 0, "--teacher", paths[1])
    assert "evaluated before" in text and len(folders(tmp_path)) == 4


def test_the_untrained_teacher_is_the_same_for_every_seed():
    torch.manual_seed(0)
    expected = PatchDescriptionNetwork("small").state_dict()
    for seed in (3, 4):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        ad = benchmark.new_detector("small", "random")
        assert torch.equal(torch.get_rng_state(), state)
        assert fingerprint(ad.teacher.state_dict()) == fingerprint(expected)
        assert ad.card["teacher"] == "random"


def test_a_short_schedule_has_its_own_runs(dataset, run, tmp_path):
    usual = Schedule.named("smoke")
    options = [
        (),
        ("--iterations", usual.iterations),  # no change, no other folder
        ("--iterations", 2),
        ("--autoencoder-steps", 0),
        ("--iterations", 2, "--autoencoder-steps", 1),
    ]
    recorded = []
    for changes in options:
        _, content, _ = run(dataset / "bolt", "--seeds", 0, *changes)
        recorded.append(content["settings"]["schedule"])
    steps = [(entry["autoencoder_iterations"], entry["iterations"]) for entry in recorded]
    assert steps == [(2, 4), (2, 4), (2, 2), (0, 4), (1, 2)]
    assert folders(tmp_path) == [
        "bolt-smoke-small-seed0",
        "bolt-smoke-small-seed0-autoencoder-0",
        "bolt-smoke-small-seed0-iterations-2",
        "bolt-smoke-small-seed0-iterations-2-autoencoder-1",
    ]
    lines = (tmp_path / "runs" / folders(tmp_path)[3] / "log.csv").read_text().splitlines()
    assert lines[-1].startswith("3,")  # one step of the autoencoder alone, two of both


@pytest.mark.parametrize("wrong", [("--iterations", 0), ("--autoencoder-steps", -1),
                                   ("--iterations", "many")])  # fmt: skip
def test_a_schedule_that_cannot_be(dataset, run, wrong):
    _, content, code = run(dataset, *wrong, fails=True)
    assert "usage: effad benchmark" in code and content is None


def test_a_teacher_that_is_none_is_one_sentence(dataset, run, drawn, narrow, tmp_path):
    save_teacher(tmp_path / "medium.safetensors", narrow(size="medium").teacher, {})
    narrow().save(tmp_path / "detector.safetensors")
    for path, text in (
        (tmp_path / "absent.safetensors", "there is no teacher"),
        (drawn[0], "is not a whole safetensors file"),
        (tmp_path / "detector.safetensors", "not a teacher"),
        (tmp_path / "medium.safetensors", "is of another architecture"),
    ):
        _, content, code = run(dataset, "--teacher", path, fails=True)
        assert content is None and text in code and str(path) in code and code.count("\n") == 1


def seeds(*areas, **groups):
    """Metrics of one scenario, a seed for each area."""
    return {str(i): {"all": {"image_auroc": a}, **groups} for i, a in enumerate(areas)}


def loco(structural, logical, **others):
    """Metrics of one seed of a scenario in MVTec LOCO's layout, given as (structural, logical)."""
    pairs = {"image_auroc": (structural, logical), **others}
    kinds = [{name: pair[i] for name, pair in pairs.items()} for i in range(2)]
    mean = {name: sum(pair) / 2 for name, pair in pairs.items()}
    whole = {name: 0.99 for name in pairs}  # no number of the paper is of all images of MVTec LOCO
    names = ("all", "structural_anomalies", "logical_anomalies", "mean")
    return {"0": dict(zip(names, (whole, *kinds, mean), strict=True))}


def beside_the_papers(text):
    """The tables with the paper's numbers: its number, heading, columns, rows by method."""
    found = {}
    for heading, body in pairwise(text.split("\n\n")):
        if heading.startswith("The paper's Table "):
            first, *lines = [re.split(" {2,}", line) for line in body.splitlines()]
            rows = {line[0]: [float(cell) for cell in line[1:]] for line in lines}
            found[int(heading.split()[3].rstrip(","))] = (heading, first[1:], rows)
    return found


def test_means_over_seeds_then_over_scenarios():
    results = {
        "bottle": {"dataset": "mvtec-ad", "seeds": seeds(0.9, 1.0)},
        "cable": {"dataset": "mvtec-ad", "seeds": seeds(0.75)},
        "candle": {"dataset": "visa", "seeds": seeds(0.5)},
        "mine": {"dataset": "mine", "seeds": seeds(0.1)},
        "pill": {"dataset": "mvtec-ad", "seeds": {}},
    }
    means = tables.dataset_means(results, "image_auroc")
    assert means == pytest.approx({"mvtec-ad": 0.85, "visa": 0.5})
    text = tables.tables({OWN: results})
    last = text.splitlines()[-1].split()
    assert last == [*HERE.split(), "0.850", "0.500"]
    ((heading, columns, rows),) = beside_the_papers(text).values()
    assert heading.endswith("(scenarios measured: 2 of 15 of mvtec-ad, 1 of 12 of visa)")
    assert heading.startswith("The paper's Table 5, image AU-ROC") and "overall" not in text
    assert columns == ["mvtec-ad", "visa"] and rows["EfficientAD-S (paper)"] == [0.988, 0.975]


def test_all_three_datasets_have_an_overall_mean():
    results = {
        "mvtec-loco": {"dataset": "mvtec-loco", "seeds": loco(0.8, 0.4)},
        "mvtec-ad": {"dataset": "mvtec-ad", "seeds": seeds(0.9)},
        "visa": {"dataset": "visa", "seeds": seeds(0.6)},
    }
    ((_, columns, rows),) = beside_the_papers(tables.tables({OWN: results})).values()
    assert columns == [
        *("mvtec-ad", "visa", "mvtec-loco structural", "mvtec-loco logical", "mvtec-loco"),
        "overall",
    ]
    assert list(rows)[-1] == HERE and len(rows) == 11
    assert rows[HERE] == [0.9, 0.6, 0.8, 0.4, 0.6, 0.7]
    assert rows["EfficientAD-M (paper)"] == [0.991, 0.981, 0.947, 0.868, 0.907, 0.960]


PAIRS = {  # (structural, logical) of one scenario of MVTec LOCO
    "image_auprc": (0.7, 0.6),
    "aupro_0.3": (0.12, 0.14),
    "aupro_0.05": (0.16, 0.18),
    "auspro_0.3": (0.5, 0.4),
    "auspro_0.05": (0.3, 0.2),
    "pixel_auroc_0.05": (0.66, 0.64),
    "pixel_auroc_1": (0.9, 0.8),
    "pixel_auprc": (0.56, 0.54),
}
OTHERS = {  # of one scenario of MVTec AD
    name: value
    for name, value in zip(PAIRS, (0.71, 0.72, 0.73, 0.74, 0.75, 0.76, 0.77, 0.78), strict=True)
}


def test_every_metric_of_the_paper_has_a_table():
    """In MVTec LOCO's columns AU-sPRO, as in the paper; of MVTec AD and VisA AU-PRO."""
    results = {
        "pushpins": {"dataset": "mvtec-loco", "seeds": loco(0.8, 0.4, **PAIRS)},
        "bottle": {"dataset": "mvtec-ad", "seeds": {"0": {"all": {"image_auroc": 0.9, **OTHERS}}}},
    }
    found = beside_the_papers(tables.tables({OWN: results}))
    assert {number: rows[HERE] for number, (_, _, rows) in found.items()} == {
        5: [0.9, 0.8, 0.4, 0.6],
        6: [0.71, 0.7, 0.6, 0.65],
        7: [0.72, 0.5, 0.4, 0.45],
        8: [0.73, 0.3, 0.2, 0.25],
        9: [0.76, 0.66, 0.64, 0.65],
        10: [0.78, 0.56, 0.54, 0.55],
    }
    assert {number: rows["DSR (paper)"][1] for number, (_, _, rows) in found.items()} == {
        5: 0.902, 6: 0.882, 7: 0.813, 8: 0.671, 9: 0.660, 10: 0.504
    }  # fmt: skip
    heading = "The paper's Table 7, AU-PRO 0.3 (of mvtec-loco AU-sPRO 0.3): dataset means "
    assert (
        found[7][0] == heading + "(scenarios measured: 1 of 15 of mvtec-ad, 1 of 5 of mvtec-loco)"
    )


def test_a_scenario_without_a_metric_is_not_in_its_mean():
    """A scenario without masks has image metrics alone; so has one seed of pill here."""
    with_masks, without = {"image_auroc": 0.9, "aupro_0.3": 0.5}, {"image_auroc": 0.7}
    results = {
        "bottle": {"dataset": "mvtec-ad", "seeds": {"0": {"all": with_masks}}},
        "cable": {"dataset": "mvtec-ad", "seeds": {"0": {"all": without}}},
        "pill": {"dataset": "mvtec-ad", "seeds": {"0": {"all": with_masks}, "1": {"all": without}}},
        "pushpins": {"dataset": "mvtec-loco", "seeds": loco(0.8, 0.4)},
    }
    del results["pushpins"]["seeds"]["0"]["mean"]["image_auroc"]
    found = beside_the_papers(tables.tables({OWN: results}))
    assert {number: rows[HERE] for number, (_, _, rows) in found.items()} == {
        5: [0.8],
        7: [0.5],
    }
    assert "(scenarios measured: 3 of 15 of mvtec-ad)" in found[5][0]
    assert "(scenarios measured: 1 of 15 of mvtec-ad)" in found[7][0]


def test_loco_shows_both_kinds_and_counts_their_mean():
    maps = {"image_auroc_student_teacher": (0.8, 0.4), "image_auroc_autoencoder": (0.7, 0.6)}
    results = {"splicing_connectors": {"dataset": "mvtec-loco", "seeds": loco(0.9, 0.5, **maps)}}
    assert tables.dataset_means(results, "image_auroc") == {
        "mvtec-loco structural": 0.9,
        "mvtec-loco logical": 0.5,
        "mvtec-loco": 0.7,
    }
    text = tables.tables({OWN: results})
    rows = [line.split() for line in text.splitlines() if line.startswith("splicing")]
    assert rows[1:] == [
        ["splicing_connectors", OWN, "combined", "0.900", "0.500", "0.700"],
        ["splicing_connectors", OWN, "S-T", "alone", "0.800", "0.400", "0.600"],
        ["splicing_connectors", OWN, "AE", "alone", "0.700", "0.600", "0.650"],
    ]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0.5], "0.500"), ([0.5, 0.7], "0.600 ± 0.141"), ([0.5, None], "-")],
)
def test_spread(values, shown):
    runs = [{} if value is None else {"m": value} for value in values]
    assert tables.spread(runs, "m") == shown


def test_nothing_measured():
    assert tables.tables({OWN: {"a": {"dataset": "a", "seeds": {}}}}) == "nothing was measured"


def test_each_method_has_a_row_and_alike_ones_share_a_table():
    """FastFlow was measured on one scenario less: its means are of other images."""
    both = {
        "bottle": {"dataset": "mvtec-ad", "seeds": seeds(0.9, 1.0)},
        "cable": {"dataset": "mvtec-ad", "seeds": seeds(0.75)},
    }
    by_method = {
        "PatchCore": both,
        "FastFlow": {"bottle": both["bottle"], "cable": both["cable"] | {"seeds": {}}},
        OWN: {name: entry | {"seeds": seeds(0.5)} for name, entry in both.items()},
    }
    text = tables.tables(by_method)
    lines = [line.split() for line in text.splitlines()]
    assert [line[:4] for line in lines[3:8]] == [
        ["bottle", "PatchCore", "2", "0.950"],
        ["bottle", "FastFlow", "2", "0.950"],
        ["bottle", OWN, "1", "0.500"],
        ["cable", "PatchCore", "1", "0.750"],
        ["cable", OWN, "1", "0.500"],
    ]
    parts = text.split("The paper's Table 5")
    assert len(parts) == 3  # two tables of the same metric
    assert "2 of 15" in parts[1] and "1 of 15" in parts[2]
    assert parts[1].split()[-8:] == [
        *("PatchCore", "(measured", "here)", "0.850"), *HERE.split(), "0.500"
    ]  # fmt: skip
    assert parts[2].split()[-4:] == ["FastFlow", "(measured", "here)", "0.950"]
