"""Splits do not leak and depend on names alone; the solar scenarios are what their paper counts."""

import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

from effad_core.datasets import (
    ResizedImages,
    Sample,
    Scenario,
    evenly,
    hold_out,
    open_folder,
    open_scenario,
)
from effad_core.errors import DataError

import numpy as np
import pytest
from PIL import Image


def image(path, size=(6, 4), value=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def scenario(train=(), validation=(), test=()):
    return Scenario("toy", tuple(train), tuple(validation), tuple(test), "nowhere", "none")


def good(*names):
    return tuple(Sample(Path(name), 0, "good") for name in names)


def names(samples):
    return [sample.path.name for sample in samples]


def test_a_leak_is_refused_in_every_pair_of_splits():
    a, b, c = good("a.png", "b.png", "c.png")
    assert scenario([a], [b], [c]).test == (c,)
    for splits in (([a], [a], []), ([a], [], [a]), ([a], [b], [b])):
        with pytest.raises(DataError, match=r"[ab]\.png is in the"):
            scenario(*splits)


def test_a_leak_through_a_link_is_refused(tmp_path):
    image(tmp_path / "train/good/a.png")
    image(tmp_path / "train/good/b.png")
    (tmp_path / "test/good").mkdir(parents=True)
    (tmp_path / "test/good/other.png").symlink_to(tmp_path / "train/good/a.png")
    with pytest.raises(DataError, match="keep it in one of them"):
        open_folder(tmp_path)


def test_training_and_validation_images_are_normal():
    bad = Sample(Path("x.png"), 1, "scratch")
    for splits in (([bad], []), (good("a.png"), [bad])):
        with pytest.raises(DataError, match="x.png is anomalous"):
            scenario(*splits)
    with pytest.raises(DataError, match="no training image"):
        scenario([], good("a.png"))


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [
        (2, 0.1, 1),
        (3, 0.1, 1),
        (10, 0.1, 1),
        (19, 0.1, 2),
        (100, 0.1, 10),
        (100, 0.25, 25),
        (2, 0.99, 1),
    ],
)
def test_hold_out_sizes(count, fraction, held):
    samples = good(*(f"{i}.png" for i in range(count)))
    train, validation = hold_out(samples, fraction)
    assert len(validation) == held and len(train) == count - held
    assert sorted(names(train) + names(validation)) == sorted(names(samples))


def test_hold_out_depends_on_names_and_seed_alone():
    samples = list(good(*(f"folder/{i:03}.png" for i in range(50))))
    held = set(names(hold_out(samples)[1]))
    random.Random(0).shuffle(samples)
    assert set(names(hold_out(samples)[1])) == held
    moved = good(*(f"elsewhere/{name}" for name in names(samples)))
    assert set(names(hold_out(moved)[1])) == held
    others = [set(names(hold_out(samples, seed=seed)[1])) for seed in range(1, 9)]
    assert any(other != held for other in others)
    # by definition: the lowest SHA-256 of "seed:name"
    rank = sorted(names(samples), key=lambda n: hashlib.sha256(f"0:{n}".encode()).hexdigest())
    assert set(rank[:5]) == held


def test_hold_out_treats_composed_and_decomposed_names_alike():
    composed = good(*(f"tür{i}.png" for i in range(20)))
    decomposed = good(*(f"tu\u0308r{i}.png" for i in range(20)))
    held = [composed.index(sample) for sample in hold_out(composed)[1]]
    assert held == [decomposed.index(sample) for sample in hold_out(decomposed)[1]]


def test_hold_out_refuses():
    with pytest.raises(DataError, match="at least 2 images are needed, because one is held out"):
        hold_out(good("a.png"))
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            hold_out(good("a.png", "b.png"), fraction)


def test_masks_are_united_at_the_size_of_the_image(tmp_path):
    path = image(tmp_path / "a.png", size=(6, 4))
    masks = []
    for i, pixel in enumerate([(0, 0), (5, 3)]):
        mask = Image.new("L", (6, 4))
        mask.putpixel(pixel, 255 - i)
        mask.save(tmp_path / f"m{i}.png")
        masks.append(tmp_path / f"m{i}.png")
    expected = np.zeros((4, 6), bool)
    expected[0, 0] = expected[3, 5] = True
    np.testing.assert_array_equal(Sample(path, 1, "hole", tuple(masks)).load_mask(), expected)
    assert Sample(path, 1, "hole").load_mask() is None
    assert Sample(path, 0, "good", tuple(masks)).load_mask() is None
    image(tmp_path / "small.png", size=(5, 4))
    with pytest.raises(DataError, match="small.png has 5x4"):
        Sample(path, 1, "hole", (masks[0], tmp_path / "small.png")).load_mask()


def test_samples_load_rgb(tmp_path):
    loaded = Sample(image(tmp_path / "a.png", value=70), 0, "good").load()
    assert loaded.mode == "RGB" and loaded.getpixel((5, 3)) == (70, 70, 70)


def test_resized_images_are_the_samples_in_order_within_their_budget(tmp_path):
    samples = [Sample(image(tmp_path / f"{i}.png", value=10 * i), 0, "good") for i in range(5)]
    for megabytes in (0, 3 * 4 * 8 * 12 / 2**20, 1):  # room for none, three and all of them
        images = ResizedImages(samples, (8, 12), cache_megabytes=megabytes)
        batches = list(images.batches(2))
        assert [tuple(batch.shape) for batch in batches] == [(2, 3, 8, 12)] * 2 + [(1, 3, 8, 12)]
        assert [int(one.unique()) for batch in batches for one in batch] == [0, 10, 20, 30, 40]
        kept = sum(images[i] is images[i] for i in range(5))
        assert kept == {0: 0, 1: 5}.get(megabytes, 3)


def test_summary_counts():
    test = (
        *good("x", "y"),
        Sample(Path("z"), 1, "hole", (Path("m"),)),
        Sample(Path("w"), 1, "cut"),
    )
    lines = scenario(good("a", "b", "c"), good("d"), test).summary().splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["train", "good", "3", "0"],
        ["validation", "good", "1", "0"],
        ["test", "cut", "1", "0"],
        ["test", "good", "2", "0"],
        ["test", "hole", "1", "1"],
    ]
    assert lines[0] == "toy: nowhere (none)"


SOLAR = {  # type: normal, 1/3, 2/3 and defective cells, as the data set's authors count them
    "solar-mono": (588, 117, 56, 313),
    "solar-poly": (920, 178, 50, 402),
}
# SHA-256 of the sorted names of each split, joined by newlines: the same on every machine, forever.
SPLITS = {
    "solar-mono": {
        "train": "4e4105c6162ad1fcaa8a1e807cc1e384186aa932a192674b4583a43b71ade7cc",
        "validation": "b6e2ad37f7029cbe25a5eec8129247e793e4906a6b7608ff42a2bfb2e4d25de4",
        "test": "eb78bcee08f10c8b45dca4a3d69b882ece5f0482110beb212e77704cf3decaf1",
    },
    "solar-poly": {
        "train": "c8b7b2888b650d647119e88346ebb1c580d5a1896ed4ba5a4a4123b75a4daaf4",
        "validation": "5b84269e4984a78ac7d55a1c601026163b1e5d96204c38a31b29c36d045579d9",
        "test": "3e5bd5b128fcb96b57f05193414d37a2a2cb7a0aa65dab3cc59b25b56aa4ca09",
    },
}


@pytest.mark.parametrize("name", SOLAR)
def test_solar_counts(name):
    normal, third, two_thirds, defective = SOLAR[name]
    plain, graded = open_scenario(name), open_scenario(name, include_graded=True)
    count = {
        kind: sum(s.anomaly_type == kind for s in graded.test)
        for kind in ("good", "graded-0.33", "graded-0.67", "defective")
    }
    assert len(plain.train) + len(plain.validation) + count["good"] == normal
    assert (count["graded-0.33"], count["graded-0.67"]) == (third, two_thirds)
    assert count["defective"] == defective
    assert count["good"] == normal / 4 and len(plain.validation) == round(0.75 * normal * 0.1)
    assert [s for s in graded.test if not s.anomaly_type.startswith("graded")] == list(plain.test)
    assert all(s.label == (s.anomaly_type != "good") for s in graded.test)
    assert plain.train == graded.train and plain.validation == graded.validation
    assert "CC BY-NC-SA" in plain.licence and plain.name == name


@pytest.mark.parametrize("name", SOLAR)
def test_solar_splits_are_the_recorded_ones(name):
    opened = open_scenario(name)
    digests = {
        split: hashlib.sha256("\n".join(sorted(names(getattr(opened, split)))).encode()).hexdigest()
        for split in ("train", "validation", "test")
    }
    assert digests == SPLITS[name]


@pytest.mark.parametrize("name", SOLAR)
def test_solar_splits_by_definition(name):
    from elpv_dataset import utils

    rows = np.loadtxt(Path(utils.__file__).parent / "data/labels.csv", dtype=str)
    normal = [Path(r[0]).name for r in rows if float(r[1]) == 0 and r[2] == name[-4:]]
    normal.sort(key=lambda n: hashlib.sha256(f"test:{n}".encode()).hexdigest())
    count = len(normal) // 4
    opened = open_scenario(name)
    assert {s.path.name for s in opened.test if s.label == 0} == set(normal[:count])
    rest = sorted(normal[count:], key=lambda n: hashlib.sha256(f"0:{n}".encode()).hexdigest())
    assert set(names(opened.validation)) == set(rest[: round(0.1 * len(rest))])
    assert sorted(names(opened.train)) == sorted(rest[round(0.1 * len(rest)) :])


def test_solar_labels_against_the_package():
    from elpv_dataset.utils import load_dataset

    images, probabilities, types = load_dataset()
    opened = open_scenario("solar-poly")
    expected = (types == "poly") & (probabilities == 1)
    anomalous = [s for s in opened.test if s.label]
    assert len(anomalous) == expected.sum()
    for sample, pixels in zip(anomalous[::40], images[expected][::40], strict=True):
        np.testing.assert_array_equal(np.asarray(sample.load())[..., 2], pixels)


def test_the_seed_moves_validation_but_never_the_test_split():
    first, second = open_scenario("solar-mono", seed=0), open_scenario("solar-mono", seed=1)
    assert first.test == second.test and set(first.validation) != set(second.validation)


def test_the_split_is_the_same_in_another_process():
    program = (
        "from effad_core.datasets import open_scenario\n"
        "print(*(s.path.name for s in open_scenario('solar-mono').validation))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.split() == names(open_scenario("solar-mono").validation)


def test_missing_solar_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    sentence = 'solar-mono needs the package elpv-dataset: run `pip install "effad-core[course]"`'
    with pytest.raises(DataError, match=re.escape(sentence)):
        open_scenario("solar-mono")


@pytest.mark.parametrize("content", [None, "images/cell0001.png 1.0", "a.png one mono", "\xff"])
def test_damaged_solar_labels(tmp_path, monkeypatch, content):
    monkeypatch.setattr("effad_core.datasets.solar.package_folder", lambda package: tmp_path)
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data/labels.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="labels.csv cannot be read"):
        open_scenario("solar-mono")


def test_unknown_source_lists_the_choices():
    with pytest.raises(DataError) as error:
        open_scenario("solar-momo")
    for word in ("solar-momo", "solar-mono", "solar-poly", "tray", "folder", "train/good"):
        assert word in str(error.value)


def test_graded_cells_exist_only_in_the_solar_scenarios(tmp_path):
    image(tmp_path / "train/good/a.png")
    with pytest.raises(DataError, match="include_graded"):
        open_scenario(tmp_path, include_graded=True)


@pytest.mark.parametrize(
    "count, expected", [(0, range(7)), (9, range(7)), (3, (0, 3, 6)), (2, (0, 6)), (1, (0,))]
)
def test_evenly_spaced_samples(count, expected):
    assert evenly(range(7), count) == tuple(expected)
    assert evenly((), count) == ()


@pytest.mark.parametrize(
    "count, expected",
    [(0, (5, 4)), (100, (5, 4)), (6, (3, 3)), (5, (2, 2)), (1, (1, 1))],
)
def test_a_part_of_the_test_images_is_half_normal(tmp_path, count, expected):
    for name in ("train/good/a", "train/good/b", *(f"test/good/{i}" for i in range(5))):
        image(tmp_path / f"{name}.png")
    for i in range(4):
        image(tmp_path / f"test/bent/{i}.png")
    scenario = open_scenario(tmp_path)
    normal, anomalous = scenario.test_part(count)
    assert (len(normal), len(anomalous)) == expected
    assert {s.label for s in normal} == {0} and {s.label for s in anomalous} == {1}
    assert {*normal, *anomalous} <= {*scenario.test}


def test_a_scenario_shows_itself_in_a_line():
    normal = tuple(Sample(Path(f"{i}.png"), 0, "good") for i in range(3))
    shown = repr(Scenario("part", normal[:2], normal[2:], (), "drawn", "CC0"))
    assert shown == "<Scenario part: 2 training, 1 validation, 0 test images>"
