"""Evidence: of today's code, teacher and list, and what its detectors say is what it says."""

import json
import shutil
from dataclasses import replace

from benchmarks import evidence as making
from benchmarks import studies
from benchmarks.studies import schedules
from effad_core import (
    EfficientAD,
    PatchDescriptionNetwork,
    RunError,
    Sample,
    Scenario,
    evaluate,
    open_scenario,
)
from effad_core.acceleration.precision import WINOGRAD
from effad_core.datasets import ResizedImages
from effad_core.evaluation import evidence as module
from effad_core.evaluation.evidence import (
    Study,
    detector_of,
    evidence_of,
    mean_levels,
    open_evidence,
    open_study,
)
from effad_core.evaluation.known import CELLS, KnownMaps
from effad_core.storage.shipped import shipped

import numpy as np
import pytest
import torch
from PIL import Image

LIST = making.entries()
REMEDY = "run make evidence, which trains it anew, and look at the notebooks that show it"


def test_evidence_was_made_by_what_the_code_computes_today():
    found = json.loads((shipped("evidence") / making.PROBE).read_text())
    assert making.same(found, making.probe()), REMEDY


@pytest.mark.parametrize("name", LIST)
def test_evidence_is_of_todays_list_teacher_and_schedules(name):
    reason = making.outdated(name, LIST[name], shipped("evidence"))
    assert reason is None, f"{reason}: {REMEDY}"


def test_nothing_else_is_shipped_as_evidence():
    folders = {path.name for path in shipped("evidence").iterdir() if path.is_dir()}
    assert folders == LIST.keys() | {"methods"}  # what tests/test_comparison.py looks at


@pytest.mark.parametrize("name", [name for name, entry in LIST.items() if "detector" in entry])
def test_a_shipped_detector_gives_the_scores_beside_it(name):
    path = shipped(f"evidence/{name}/detector.safetensors")
    assert path.stat().st_size < 12e6
    evidence = open_evidence(name)
    scenario, facts = open_scenario(evidence.facts["scenario"]), evidence.facts
    assert evidence_of(scenario) is not None  # wherever the tray was drawn
    assert facts["labels"] == [sample.label for sample in scenario.test]
    chosen = [0, len(scenario.test) // 2, len(scenario.test) - 1]
    detector = evidence.detector("cpu")
    found = evaluate(detector, [scenario.test[i] for i in chosen], device="cpu").scores
    for m, scores in facts["scores"].items():
        np.testing.assert_allclose(found[m], np.array(scores)[chosen], atol=1e-3, err_msg=m)
    assert detector.precision == "float32" and not detector.training
    assert str(evidence).startswith(f"evidence: {name}, profile laptop, {len(LIST[name]['seeds'])}")


def test_metrics_by_seed_and_group():
    evidence = open_evidence("tray")
    by_seed = evidence.facts["metrics"]
    expected = [by_seed[str(s)]["logical_anomalies"]["aupro_0.3"] for s in LIST["tray"]["seeds"]]
    found = evidence.metric("aupro_0.3", "logical_anomalies")
    assert found.tolist() == expected and len(set(expected)) > 1
    both = [(m["logical_anomalies"], m["structural_anomalies"]) for m in by_seed.values()]
    means = [np.mean([group["image_auroc"] for group in pair]) for pair in both]
    np.testing.assert_allclose(evidence.metric(), means)
    assert evidence.log["step"][-1] == 1500 and evidence.log.dtype.names[1] == "L_hard"


@pytest.mark.parametrize("name", [name for name, entry in LIST.items() if "variants" in entry])
def test_a_study_has_every_training_of_the_list(name):
    study, entry = open_study(name), LIST[name]
    expected = [(v, s.iterations, seed) for v, _, s in schedules(entry) for seed in entry["seeds"]]
    rows = study.facts["rows"]
    assert [(r["variant"], r["iterations"], r["seed"]) for r in rows] == expected
    assert study.variants == [*entry["variants"]]
    longest = [r for r in rows if r["variant"] == study.variants[-1]][-len(entry["seeds"]) :]
    for group, values in longest[0]["metrics"].items():
        for metric in values:
            expected = [row["metrics"][group][metric] for row in longest]
            assert study.metric(study.variants[-1], metric, group).tolist() == expected
    expected = [row["losses"]["L_AE"] for row in longest]
    assert study.metric(study.variants[-1], "L_AE").tolist() == expected
    expected = [row["photographs"]["difference"] for row in longest]
    assert study.metric(study.variants[-1], "difference").tolist() == expected
    assert str(study).startswith(f"evidence: {entry['scenario']}, {study.facts['images'][0]} train")


def test_a_study_trains_each_variant_once(drawn, narrow, pretraining, tmp_path, monkeypatch):
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self, *_: self)
    monkeypatch.setattr(studies, "EfficientAD", lambda size: narrow(size=size))
    monkeypatch.setattr(studies, "open_pretraining", lambda: pretraining)
    good = [Sample(path, 0, "good") for path in drawn]
    bent = replace(good[7], label=1, anomaly_type="bent")
    split = Scenario("drawn", (*good[:4],), (*good[4:6],), (good[6], bent), "drawn", "CC0")
    monkeypatch.setattr(studies, "open_scenario", lambda source: split)
    entry = {"scenario": "drawn", "profile": "smoke", "seeds": [0, 1], "size": "small"}
    entry |= {"changes": {"autoencoder_iterations": 0}, "iterations": [1, 2], "images": [3, 2]}
    entry["variants"] = {"with": {}, "without, penalty": {"penalty": False}}
    studies.make_study("pair", entry, tmp_path / "runs", tmp_path)
    facts = json.loads((tmp_path / "pair" / "run.json").read_text())
    assert facts["images"] == [3, 2] and facts["settings"] == studies.study_settings(entry)
    penalties = {t["variant"]: t["schedule"]["penalty"] for t in facts["settings"]["trainings"]}
    assert penalties == {"with": True, "without, penalty": False}
    study = Study(facts)
    assert study.iterations("with") == [1, 2] and study.metric("with").shape == (2,)
    trained = tmp_path / "runs" / "pair" / "without+penalty-2-seed1" / "detector.safetensors"
    detector = narrow()
    detector.load_state_dict(EfficientAD.load(trained).state_dict())
    found = studies.on_photographs(detector, pretraining)
    assert found == pytest.approx(facts["rows"][-1]["photographs"])
    other = entry | {"changes": {"autoencoder_iterations": 0, "weight_decay": 0.0}}
    with pytest.raises(RunError, match="holds a run with other settings"):
        studies.make_study("pair", other, tmp_path / "runs", tmp_path)
    fewer = entry | {"images": [2, 2]}
    with pytest.raises(RunError, match="other images"):
        studies.make_study("pair", fewer, tmp_path / "runs", tmp_path)
    monkeypatch.setattr(studies, "train", None)  # a second call takes up what is there
    studies.make_study("pair", entry, tmp_path / "runs", tmp_path)
    assert json.loads((tmp_path / "pair" / "run.json").read_text()) == facts


def test_the_teachers_of_a_study(pretraining, tmp_path):
    def weights(name):
        detector = studies.with_teacher(name, "small", pretraining, tmp_path)
        return [w.clone() for w in detector.teacher.parameters()]

    shipped_one = EfficientAD().load_teacher()
    assert all(map(torch.equal, weights("shipped"), shipped_one.teacher.parameters()))
    torch.manual_seed(1)
    expected = PatchDescriptionNetwork("small", out_channels=shipped_one.out_channels)
    assert all(map(torch.equal, weights("random"), expected.parameters()))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Evidence of the tray in a folder of its own, which the module takes for the shipped one."""
    shutil.copytree(shipped("evidence/tray"), tmp_path / "evidence" / "tray")
    monkeypatch.setattr(module, "shipped", lambda name: tmp_path / name)
    return tmp_path / "evidence"


def test_absent_and_damaged_evidence_is_refused_in_a_sentence(copied):
    with pytest.raises(RunError, match="no evidence 'bottle'; there is: tray"):
        open_evidence("bottle")
    (copied / "tray" / "run.json").write_text("{")
    with pytest.raises(RunError, match="run.json is damaged"):
        open_evidence("tray")


@pytest.mark.parametrize(
    ("other", "found"),
    [("rounding", True), ("order", False), ("a spot", False), ("count", False)],
)
def test_images_that_another_processor_drew_are_recognised(copied, drawn, tmp_path, other, found):
    """Their pixels differ by rounding; everything else is another scenario."""
    path = copied / "tray" / "run.json"
    levels = [float(np.asarray(Image.open(image)).mean()) for image in drawn[:3]]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training_levels": levels}))
    changed = []
    for number, source in enumerate(drawn[:3]):
        pixels = np.array(Image.open(source).convert("RGB"))
        pixels[::50, ::50] ^= 1  # one level up or down
        if other == "a spot" and number == 1:
            side = pixels.shape[0] // 8
            pixels[:side, :side] = 255 - pixels[:side, :side]
        changed.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(changed[-1])
    changed = changed[::-1] if other == "order" else changed[: 2 if other == "count" else 3]
    train = tuple(Sample(path, 0, "good") for path in changed)
    rest = tuple(Sample(path, 0, "good") for path in drawn[4:6])
    scenario = Scenario("tray", train, rest[:1], rest[1:], "drawn", "CC0")
    assert (evidence_of(scenario) is not None) == found


def test_the_mean_level_is_that_of_all_pixels_and_colours(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0] = (30, 60, 90)  # half of the pixels, of mean 60
    Image.fromarray(pixels).save(tmp_path / "half.png")
    assert mean_levels([Sample(tmp_path / "half.png", 0, "good")]).tolist() == [30]


def test_a_detector_of_another_teacher_is_refused(copied, monkeypatch):
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self: self)  # a random one
    with pytest.raises(RunError, match="was trained with another teacher: run make evidence"):
        open_evidence("tray").detector("cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"profile": "quick"}, "says something else now"),
        ({"changes": {"iterations": 7}}, "says something else now"),
        ({"detector_seed": 5}, "other seeds"),
        ({"metrics": {}}, "other seeds"),
        ({"teacher_weights": "0" * 16}, "the teacher weights changed"),
        ({"schedule": {}}, "the schedule changed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changed_since_is_said(copied, change, reason):
    path = copied / "tray" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in making.outdated("tray", LIST["tray"], copied)
    path.unlink()
    assert making.outdated("tray", LIST["tray"], copied) == "it is missing"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"profile": "paper"}, "says something else now"),
        ({"seeds": [7]}, "says something else now"),
        ({"settings": {}}, "schedules or teachers changed"),
    ],
)
def test_what_changed_in_a_study_is_said(tmp_path, change, reason):
    shutil.copytree(shipped("evidence/warm-up"), tmp_path / "warm-up")
    path = tmp_path / "warm-up" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in making.outdated("warm-up", LIST["warm-up"], tmp_path)


def test_probes_of_other_code_differ():
    one = {"losses": [1.0, 0.5], "scores": [0.1]}
    assert making.same(one, {"losses": [1.01, 0.5], "scores": [0.1005]})  # rounding
    assert not making.same(one, {"losses": [1.1, 0.5], "scores": [0.1]})
    assert not making.same(one, {"losses": [1.0, 0.5]})


# --- which detector a notebook looks at -----------------------------------------------------------


def test_a_notebook_looks_at_the_shipped_detector_and_its_maps(tmp_path, capsys, monkeypatch):
    """It computes in a way whose quantiles are those of float32, and only what is not known."""
    scenario = open_scenario("solar-mono")
    asked = []
    monkeypatch.setattr(module, "resolve_precision", lambda *a: asked.append(a) or WINOGRAD)
    detector, folder = detector_of(scenario, tmp_path)
    assert folder == tmp_path / "solar-mono-evidence" and (folder / "log.csv").is_file()
    assert capsys.readouterr().out.startswith("evidence: solar-mono, profile laptop")
    assert detector.precision == WINOGRAD and "bfloat16" not in asked[0][3]
    assert torch.equal(detector.quantiles, open_evidence("solar-mono").detector("cpu").quantiles)
    known, images = KnownMaps(detector, folder), making.looked_at(scenario)
    for batch in ResizedImages(images, detector.image_size).batches(8):
        known.cells(batch)
    assert (known.computed, known.looked_up) == (0, len(images))
    monkeypatch.setattr(detector, "cells", lambda images: images.new_ones(len(images), 2, 56, 56))
    known.cells(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    _, folder = detector_of(scenario, tmp_path)  # a second notebook
    again = KnownMaps(detector, folder)
    assert again.cells(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)).mean() == 1
    assert again.computed == 0


@pytest.mark.parametrize("name", [name for name, entry in LIST.items() if "detector" in entry])
def test_the_shipped_maps_are_those_of_the_shipped_detector(name):
    folder = shipped(f"evidence/{name}")
    assert making.has_maps(folder), REMEDY
    assert (folder / CELLS).stat().st_size < 4e6
    detector = open_evidence(name).detector("cpu")
    images = ResizedImages(making.looked_at(open_scenario(name))[:2], detector.image_size)
    (batch,) = images.batches(2)
    known = KnownMaps(detector, folder)
    kept = [*known._kept.values()][:2]  # in the order of `looked_at`, wherever the tray was drawn
    found = detector.cells(batch)
    torch.testing.assert_close(torch.stack(kept), found, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("why", ["it is asked for", "no evidence", "other images"])
def test_a_notebook_trains_a_detector_of_its_own(
    why, scenario, narrow, pretraining, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self, *_: self)
    monkeypatch.setattr(module, "EfficientAD", narrow)
    monkeypatch.setattr(module, "open_pretraining", lambda source: pretraining)
    if why == "other images":
        scenario = replace(scenario, name="tray")  # which has evidence, of other images
    own = why == "it is asked for"
    detector, folder = detector_of(scenario, tmp_path, own, profile="smoke")
    assert folder == tmp_path / f"{scenario.name}-smoke"
    assert (folder / "detector.safetensors").is_file() and detector.quantiles.isfinite().all()
    said = capsys.readouterr().out
    assert f"a detector trained here: {scenario.name}, profile smoke, seed 0" in said
