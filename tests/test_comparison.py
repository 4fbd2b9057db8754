"""Many methods side by side: found by name, fitted by the benchmark, drawn, shipped as evidence."""

import json
import re

from baselines.patchcore import PatchCore
from benchmarks import methods as gathering
from effad_core.datasets import Sample
from effad_core.errors import RunError
from effad_core.evaluation import benchmark, tasks
from effad_core.evaluation.comparison import comparison_limits, comparison_picture
from effad_core.evaluation.evidence import open_methods
from effad_core.evaluation.examples import METHODS, Scored, Survey
from effad_core.evaluation.gallery import main as draw_gallery
from effad_core.evaluation.methods import (
    chosen_methods,
    find_method,
    load_detector,
    method_names,
    slug,
)
from effad_core.evaluation.tables import paper_results
from effad_core.figures import labelled_points
from effad_core.thresholds import OperatingPoint

import numpy as np
import pytest
import torch
from PIL import Image

POINT = OperatingPoint(0.5, "manual", 0)


# --- by name -------------------------------------------------------------------------------------


def test_the_papers_ten_methods_in_its_order():
    assert method_names()[:10] == list(paper_results())
    assert chosen_methods(["ALL"]) == method_names()


@pytest.mark.parametrize("written", ["PatchCore Ens", "patchcore-ens", "PATCHCORE_ENS"])
def test_a_name_may_be_written_in_many_ways(written):
    assert chosen_methods([written, "s-t", "efficientad-m"]) == [
        "PatchCore Ens",
        "S-T",
        "EfficientAD-M",
    ]
    assert slug("PatchCore Ens") == "patchcore-ens"


def test_a_method_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"one of GCAD, .*EfficientAD-M, not 'PaDiM'"):
        chosen_methods(["FastFlow", "PaDiM"])
    with pytest.raises(ValueError, match="not 'EfficientAD-S'"):
        find_method("EfficientAD-S")


def test_a_file_says_which_method_it_holds(narrow, scenario, tmp_path):
    narrow().save(tmp_path / "own.safetensors")
    patchcore = PatchCore.of_profile("smoke", pretrained=False, image_size=64)
    patchcore.fit(scenario, device="cpu").save(tmp_path / "other.safetensors")
    name, detector = load_detector(tmp_path / "other.safetensors", "cpu")
    assert name == "PatchCore" and torch.equal(detector.memory, patchcore.memory)
    with pytest.raises(RunError, match="does not exist"):
        load_detector(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:99])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        load_detector(tmp_path / "cut.safetensors")


# --- in the benchmark ----------------------------------------------------------------------------


@pytest.fixture
def part(drawn, tmp_path):
    """A scenario's folder in MVTec AD's layout: one anomalous image of two, with its mask."""
    root = tmp_path / "bolt"
    for place, numbers in (("train/good", range(6)), ("test/good", [6]), ("test/dent", [7])):
        (root / place).mkdir(parents=True)
        for number in numbers:
            Image.open(drawn[number]).save(root / place / f"{number}.png")
    (root / "ground_truth/dent").mkdir(parents=True)
    mask = np.zeros((264, 280), np.uint8)
    mask[50:90, 60:100] = 255
    Image.fromarray(mask).save(root / "ground_truth/dent/7_mask.png")
    return root


@pytest.fixture
def small(monkeypatch):
    """The profile smoke without pretrained weights, on small images."""
    whole = PatchCore.of_profile.__func__

    def of_profile(cls, profile="smoke"):
        torch.manual_seed(0)  # the same network each time, as pretrained ones are
        return whole(cls, profile, pretrained=False, image_size=64)

    monkeypatch.setattr(PatchCore, "of_profile", classmethod(of_profile))


def test_the_benchmark_fits_another_method_and_takes_its_run_up(part, small, tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ["--methods", "patchcore", "--profile", "smoke", "--seeds", "0", "1"]
    command = [str(part), *options, "--runs", str(tmp_path / "runs"), "--output", str(output)]
    benchmark.main(command)
    printed = capsys.readouterr().out
    assert re.search(r"^bolt +PatchCore +2 ", printed, re.M)
    content = json.loads(output.read_text())
    assert content["settings"]["methods"] == ["PatchCore"] and content["failed"] == {}
    seeds = content["methods"]["PatchCore"]["bolt"]["seeds"]
    assert list(seeds) == ["0", "1"] and "aupro_0.3" in seeds["0"]["all"]
    folder = tmp_path / "runs" / "bolt-smoke-patchcore-seed0"
    took = json.loads((folder / tasks.TOOK).read_text())
    assert took["minutes"] > 0 and took["milliseconds"] > 0
    assert PatchCore.load(folder, "cpu").card["training"]["seed"] == 0
    benchmark.main(command)
    assert capsys.readouterr().out.count("evaluated before") == 2
    assert json.loads(output.read_text())["methods"] == content["methods"]

    results, machines = gathering.gathered(["bolt"], "smoke", tmp_path / "runs")
    assert list(results["bolt"]) == ["PatchCore"] and len(machines) == 1
    entry = results["bolt"]["PatchCore"]
    assert entry["seeds"]["1"]["all"]["image_auroc"] == round(seeds["1"]["all"]["image_auroc"], 4)
    (folder / tasks.TOOK).unlink()  # a run that is not whole does not take part
    results, _ = gathering.gathered(["bolt"], "smoke", tmp_path / "runs")
    assert list(results["bolt"]["PatchCore"]["seeds"]) == ["1"]


def test_a_method_that_nobody_knows_is_refused_before_anything_is_read(part, refusal):
    assert "not 'PaDiM'" in refusal(benchmark.main, part, "--methods", "PaDiM")


# --- as pictures ---------------------------------------------------------------------------------


def surveyed(peaks, level, detector=None, test=()):
    validation = tuple(
        Scored(Sample("v.png", 0, "good"), "good", p, dict.fromkeys(METHODS, p), None, level)
        for p in peaks
    )
    return Survey("part", detector, validation, tuple(test), POINT)


def test_a_methods_colours_begin_at_its_usual_value_and_are_those_of_its_worst_scenario():
    first = {"a": surveyed(range(1, 102), 0.5), "b": surveyed([2.0] * 5, 1.0)}
    second = {"a": surveyed([30.0] * 9, 0.25), "b": surveyed([9.0] * 5, 1.5)}
    limits = comparison_limits([first, second])
    assert limits["a"] == (0.25, 0.25 + 2 * (96 - 0.25))  # the 95 % quantile of 1 to 101 is 96
    assert limits["b"] == (1.0, 1.0 + 2 * (9 - 1))


def test_the_picture_has_a_column_a_method_and_a_row_a_kind(part, small, scenario, tmp_path):
    paths = []
    for seed in (0, 1):
        detector = PatchCore.of_profile().fit(scenario, seed=seed, device="cpu")
        paths.append(tmp_path / f"{seed}.safetensors")
        detector.save(paths[-1])
    output = tmp_path / "methods.png"
    draw_gallery([f"{part}={paths[0]}", "--output", str(output), "--device", "cpu"])
    with Image.open(output) as picture:
        assert picture.info["Title"] == "The median test image of each anomaly type, by PatchCore"
        assert "the maps of PatchCore" in picture.info["Description"]
        assert "bolt, dent" in picture.info["Description"]


def test_scenarios_with_other_methods_are_no_comparison(part, refusal, scenario, small, tmp_path):
    with pytest.raises(ValueError, match="a detector of each method"):
        comparison_picture([{"a": surveyed([1.0], 0.0)}, {"b": surveyed([1.0], 0.0)}])
    path = tmp_path / "x.safetensors"
    PatchCore.of_profile().fit(scenario, device="cpu").save(path)
    twice = (f"{part}={path}", f"{part}={path}", "--output", tmp_path / "m.png")
    assert "two detectors of PatchCore" in refusal(draw_gallery, *twice)


def test_points_lie_where_their_numbers_are():
    points = {"slow": (100.0, 0.9), "fast": (1.0, 0.5)}
    figure = labelled_points(points, "ms", "AU-ROC", "title", marked=["fast"])
    (ax,) = figure.axes
    drawn = {tuple(c.get_offsets()[0]): tuple(c.get_facecolor()[0]) for c in ax.collections}
    assert set(drawn) == set(points.values()) and len(set(drawn.values())) == 2
    assert {text.get_text(): text.xy for text in ax.texts} == points
    for wrong in ({}, {"a": (0.0, 1.0)}, {"a": (1.0, float("nan"))}):
        with pytest.raises(ValueError):
            labelled_points(wrong, "", "", "")


# --- as evidence ---------------------------------------------------------------------------------


def test_the_evidence_is_of_todays_settings():
    """A profile that has changed makes the shipped comparison out of date."""
    facts = open_methods().facts
    names = {name for found in facts["results"].values() for name in found}
    assert (
        names == facts["settings"].keys() == facts["costs"].keys() == facts["milliseconds"].keys()
    )
    for name, settings in facts["settings"].items():
        assert settings == gathering.settings_of(name, facts["profile"]), name
        assert facts["costs"][name] == list(gathering.cost_of(name, facts["profile"])), name


def test_metrics_of_the_evidence():
    methods = open_methods()
    scenario = next(iter(methods.facts["results"]))
    area = methods.metric(scenario, "PatchCore")
    assert area.shape == (len(methods.facts["results"][scenario]["PatchCore"]["seeds"]),)
    assert 0.5 < area.mean() < 1  # it detects
    assert methods.facts["profile"] in str(methods) and scenario in str(methods)
