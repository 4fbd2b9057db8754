"""The gallery: its rules against hand-worked cases and brute force; what its pictures hold."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from effad_core.datasets import Sample, Scenario, open_scenario, read_image
from effad_core.detector import place_cells
from effad_core.evaluation import gallery
from effad_core.evaluation.examples import (
    METHODS,
    Scored,
    Survey,
    choose_failures,
    choose_tested,
    colour_limits,
    kind_of,
    median_examples,
    peak_at_border,
    survey,
)
from effad_core.evaluation.gallery import (
    failure_pictures,
    overview_picture,
    scenario_pictures,
    write_gallery,
)
from effad_core.prediction import Prediction
from effad_core.thresholds import OperatingPoint, threshold_for_fpr

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

POINT = OperatingPoint(0.5, "fpr-average", 19, 0.05, 0.95, 0.05, 0.146)


class Brightness:
    """A detector whose maps are the image's brightness; it knows no network."""

    def __init__(self):
        self.seen = Counter()

    def stream(self, images):
        for path in images:
            yield read_image(path), self.predict(path)

    def predict(self, image):
        self.seen[image] += 1
        m = np.asarray(read_image(image), np.float32).mean(axis=2) / 255
        return Prediction(np.stack([m, 2 * m, 3 * m]), float(m.max()), m.shape)


def scored(name="a.png", score=0.0, kind="good", label=0, anomaly_type=None, border=False):
    sample = Sample(SimpleNamespace(name=name), label, anomaly_type or kind)
    sample = dataclasses.replace(sample, path=name)
    return Scored(sample, kind, score, dict.fromkeys(METHODS, score), border)


def surveyed(test=(), validation=(), name="part"):
    return Survey(name, Brightness(), tuple(validation), tuple(test), POINT)


def write_image(path, brightest, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side + 8), 10, np.uint8)
    pixels[16, 20] = brightest
    Image.fromarray(pixels).save(path)


@pytest.fixture
def part(tmp_path):
    """A folder of LOCO's layout: 8 validation images, 4 normal ones, 3 kinds of two anomalies."""
    root = tmp_path / "part"
    for index in range(8):
        write_image(root / "train" / "good" / f"{index}.png", 60)
        write_image(root / "validation" / "good" / f"{index}.png", 60 + index)
    for index, brightest in enumerate((50, 55, 65, 200)):
        write_image(root / "test" / "good" / f"{index}.png", brightest)
    kinds = ("missing_nut", "surplus_nut", "dent")
    for index, brightest in enumerate((58, 100, 120, 140, 160, 180)):
        kind = index // 2
        anomaly_type = ("logical", "logical", "structural")[kind] + "_anomalies"
        write_image(root / "test" / anomaly_type / f"{index}.png", brightest)
        mask = np.zeros((32, 40), np.uint8)
        mask[14:20, 18:24] = 255 - kind
        path = root / "ground_truth" / anomaly_type / f"{index}" / "000.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(mask).save(path)
    config = [
        {
            "defect_name": name,
            "pixel_value": 255 - value,
            "saturation_threshold": 1.0,
            "relative_saturation": True,
        }
        for value, name in enumerate(kinds)
    ]
    (root / "defects_config.json").write_text(json.dumps(config))
    return open_scenario(root)


def kind_in(label):
    return re.fullmatch(r"(.+) (?:passed|false alarm|found|missed) at [\d.]+", label)[1]


def labels(picture):
    """Of each row, without the line breaks that make it fit."""
    return [ax.get_ylabel().replace("\n", " ") for ax in picture.figure.axes if ax.get_ylabel()]


# --- which images are scored ---------------------------------------------------------------------


def test_the_kind_is_the_names_of_the_defects_or_the_anomaly_type(part, monkeypatch):
    kinds = Counter(kind_of(sample) for sample in part.test)
    assert kinds == {"good": 4, "missing nut": 2, "surplus nut": 2, "dent": 2}
    assert kind_of(Sample("x.png", 1, "cut_lead", ("mask.png",))) == "cut lead"
    names = ("swapped_nut", "dent", "swapped_nut")
    monkeypatch.setattr(Sample, "defect_names", lambda self: names)
    assert kind_of(part.test[0]) == "dent + swapped nut"


@pytest.mark.parametrize("count", range(1, 13))
def test_half_of_the_tested_are_normal_and_kinds_take_turns(part, count):
    chosen = choose_tested(part.test, count)
    normal = [s for s in chosen if s.label == 0]
    anomalous = Counter(kind_of(s) for s in chosen if s.label)
    assert len(set(chosen)) == len(chosen)
    assert len(normal) == min(4, max(1, count // 2))
    assert sum(anomalous.values()) == min(6, max(1, count // 2))
    of_each = [anomalous[kind] for kind in ("missing nut", "surplus nut", "dent")]
    assert max(of_each) - min(of_each) <= 1


def test_the_images_of_a_kind_are_evenly_spaced(part):
    """The first files of a folder may be its easiest."""
    scratch = [dataclasses.replace(part.test[0], path=Path(f"{n}.png"), label=1) for n in range(9)]
    scratch = [
        dataclasses.replace(sample, anomaly_type="scratch", mask_paths=()) for sample in scratch
    ]
    dent = [dataclasses.replace(sample, anomaly_type="dent") for sample in scratch[:2]]
    chosen = choose_tested([*scratch, *dent], 10)
    found = [(s.anomaly_type, s.path.stem) for s in chosen]
    assert found == [*(("scratch", n) for n in "048"), ("dent", "0"), ("dent", "1")]


def test_zero_tests_all_and_one_class_will_do(part):
    assert choose_tested(part.test, 0) == part.test
    normal = [s for s in part.test if s.label == 0]
    anomalous = [s for s in part.test if s.label]
    assert list(choose_tested(normal, 40)) == normal and len(choose_tested(normal, 4)) == 2
    assert (
        set(choose_tested(anomalous, 40)) == set(anomalous)
        and len(choose_tested(anomalous, 4)) == 2
    )
    assert choose_tested((), 0) == choose_tested((), 7) == ()


# --- the border ----------------------------------------------------------------------------------


def one_peak(row, column, shape=(256, 256)):
    m = np.zeros(shape, np.float32)
    m[row, column] = 1
    return m


@pytest.mark.parametrize(
    ("m", "at_border"),
    [
        (one_peak(15, 100), True),
        (one_peak(16, 100), False),
        (one_peak(100, 239), False),
        (one_peak(100, 240), True),
        (one_peak(255, 255), True),
        (one_peak(100, 31, (256, 512)), True),  # the band is 32 wide where the image is 512
        (one_peak(100, 32, (256, 512)), False),
        (one_peak(16, 100) + one_peak(0, 0), True),  # a tie
        (one_peak(16, 100) + one_peak(15, 100) * (1 - 1e-6), True),  # a tie but for rounding
        (one_peak(16, 100) + one_peak(15, 100) * 0.999, False),
        (-1 - one_peak(0, 0), True),  # negative, and the lowest is in the corner
        (-1 + one_peak(99, 99), False),
        (np.zeros((256, 256)), True),  # constant: the maximum is everywhere
        (np.zeros((1, 1)), True),
        (one_peak(1, 1, (3, 3)), False),
    ],
)
def test_a_peak_is_at_the_border_in_the_outermost_sixteenth(m, at_border):
    assert peak_at_border(m) == at_border


@pytest.mark.parametrize(
    ("row", "column", "at_border"),
    [(5, 100, False), (21, 116, False), (22, 100, True), (5, 117, True), (200, 200, True)],
)
def test_a_defect_within_a_bands_width_explains_the_peak(row, column, at_border):
    assert peak_at_border(one_peak(5, 100), one_peak(row, column) > 0) == at_border
    assert not peak_at_border(one_peak(128, 128), one_peak(row, column) > 0)


def test_a_defect_counts_on_every_side_of_the_peak():
    for row, column, near in ((234, 250, 1), (233, 250, 0), (250, 234, 1), (250, 233, 0)):
        assert peak_at_border(one_peak(250, 250), one_peak(row, column) > 0) != near


@pytest.mark.parametrize("size", [(256, 256), (300, 300), (480, 480), (333, 700), (100, 90)])
def test_without_padding_the_outermost_cells_are_the_border(size):
    for seed in range(30):
        cells = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, 56, 56)))
        row, column = (seed * 7) % 56, 0 if seed % 2 else 20
        cells[0, 0, row, column] = 30.0  # far above the others at any size
        own = F.interpolate(place_cells(cells, (256, 256), False), size=size, mode="bilinear")
        outermost = row in (0, 55) or column in (0, 55)
        assert peak_at_border(own[0, 0].float().numpy()) == outermost, (row, column)


# --- the rules -----------------------------------------------------------------------------------


def test_the_example_is_the_median_of_its_kind():
    rng = np.random.default_rng(0)
    for count in range(1, 12):
        scores = rng.permutation(np.arange(count) / 10)
        images = [scored(f"{score}.png", score) for score in scores]
        (example,) = median_examples(images)
        assert example.score == np.quantile(scores, 0.5, method="lower")


def test_examples_come_one_a_kind_with_the_normal_one_first():
    images = [
        scored("1", 0.9, "a hole", 1, "logical"),
        scored("2", 0.1, "hair", 1, "structural"),
        scored("3", 0.3),
        scored("4", 0.7, "hair", 1, "logical"),
        scored("5", 0.8, "hair", 1, "logical"),
    ]
    for order in (images, images[::-1]):
        assert [s.sample.path for s in median_examples(order)] == ["3", "1", "4", "2"]
    by_type = median_examples(images, lambda s: s.sample.anomaly_type)
    assert [s.sample.path for s in by_type] == ["3", "5", "2"]
    assert median_examples([]) == []


def test_equal_scores_are_ordered_by_path():
    images = [scored(name, 0.5) for name in "bcaed"]
    for turn in range(5):
        assert median_examples(images[turn:] + images[:turn])[0].sample.path == "c"


def test_verdicts_follow_the_convention_of_thresholds():
    one = surveyed()
    for label, words in (
        (0, ("passed", "passed", "false alarm")),
        (1, ("missed",) * 2 + ("found",)),
    ):
        verdicts = [one.verdict(scored(score=s, label=label)) for s in (0.4, 0.5, 0.6)]
        assert tuple(verdicts) == words  # a score that equals the threshold is normal


def test_failures_are_the_worst_by_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(20):
        images = [
            scored(str(i), rng.random(), label=int(rng.integers(2)), border=bool(rng.integers(2)))
            for i in range(rng.integers(0, 25))
        ]
        found = choose_failures(surveyed(images), 3)
        alarms = sorted(s.score for s in images if s.sample.label == 0 and s.score > 0.5)
        misses = sorted(s.score for s in images if s.sample.label == 1 and s.score <= 0.5)
        borders = sorted(s.score for s in images if s.at_border)
        scores = {name: [s.score for s in chosen] for name, chosen in found.items()}
        assert scores == {
            "false alarms": alarms[::-1][:3],
            "misses": misses[:3],
            "borders": borders[::-1][:3],
        }


def test_an_unknown_place_is_no_border_failure():
    assert not choose_failures(surveyed([scored(border=None, label=1)]))["borders"]


def test_colour_limits_are_twice_the_95th_percentile_of_the_worst_scenario():
    quiet = [scored(score=s) for s in np.linspace(0, 0.2, 21)]
    loud = [scored(score=s) for s in np.linspace(0, 0.4, 21)]
    both = colour_limits([surveyed(validation=quiet), surveyed(validation=loud)])
    assert both == {name: (0, pytest.approx(0.76)) for name in METHODS}
    assert colour_limits([surveyed(validation=quiet)])["combined"][1] == pytest.approx(0.38)
    outlier = [scored(score=50.0)]
    hardly = colour_limits([surveyed(validation=quiet * 2 + outlier)])["combined"][1]
    assert hardly < 0.41


def test_colour_limits_do_not_read_test_images_and_do_not_collapse():
    validation = [scored(score=0.2)]
    alone = colour_limits([surveyed(validation=validation)])
    assert alone == colour_limits([surveyed([scored(score=9.0)], validation)])
    assert colour_limits([surveyed(validation=[scored(score=-3.0)])])["combined"] == (0, 0.1)
    with pytest.raises(ValueError, match="at least one survey"):
        colour_limits([])


# --- the survey ----------------------------------------------------------------------------------


def test_a_survey_scores_what_the_detector_predicts(part):
    found = survey(Brightness(), part)
    assert [s.sample for s in found.test] == list(part.test)
    for one in (*found.validation, *found.test):
        brightest = np.asarray(Image.open(one.sample.path)).max() / 255
        assert one.score == pytest.approx(brightest)
        expected = {"combined": brightest, "student-teacher": 2 * brightest}
        assert {name: one.peaks[name] for name in expected} == pytest.approx(expected)
        assert one.at_border is False
        assert one.level == np.median(Brightness().predict(one.sample.path).map)
    assert len(survey(Brightness(), part, test_images=4).test) == 4


def test_the_threshold_is_that_of_validation_scores(part):
    found = survey(Brightness(), part, rate=0.25)
    scores = (60 + np.arange(8)) / 255
    assert found.point == threshold_for_fpr(np.float32(scores).tolist(), 0.25, guarantee="average")
    assert found.point.rate == 0.25
    verdicts = Counter(found.verdict(s) for s in found.test)
    assert verdicts == {"passed": 3, "false alarm": 1, "missed": 1, "found": 5}


def test_too_few_validation_images_get_the_rate_that_they_support(part):
    point = survey(Brightness(), part, rate=0.05).point
    assert point.rate == pytest.approx(1 / 9) and "11.11 %" in str(point)
    single = dataclasses.replace(part, validation=part.validation[:1])
    assert survey(Brightness(), single).point.rate == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="part has no validation images"):
        survey(Brightness(), dataclasses.replace(part, validation=()))


def test_where_no_mask_says_the_place_of_a_defect_the_border_is_unknown(part):
    bare = [dataclasses.replace(s, mask_paths=(), defect_kinds=()) for s in part.test]
    found = survey(Brightness(), dataclasses.replace(part, test=tuple(bare)))
    assert [s.at_border for s in found.test] == [None if s.label else False for s in bare]
    assert {s.kind for s in found.test} == {"good", "logical anomalies", "structural anomalies"}


# --- pictures ------------------------------------------------------------------------------------


def test_every_kind_is_shown_once_below_the_normal_image(part):
    one = survey(Brightness(), part)
    limits = colour_limits([one])
    logical, structural = scenario_pictures(one, limits)
    assert (logical.name, structural.name) == ("part-1", "part-2")
    assert [kind_in(label) for label in labels(logical)] == [
        *("good", "missing nut", "surplus nut"),
    ]
    assert labels(structural)[1] == "dent found at 0.63"  # 160 of 255, the lower of two
    assert "logical anomalies" in logical.title and "structural anomalies" in structural.title


def test_all_figures_have_the_same_columns_and_colour_scales(part):
    one = survey(Brightness(), part)
    limits = colour_limits([one])
    pictures = [*scenario_pictures(one, limits), *failure_pictures([one], limits)]
    assert [p.name for p in pictures[2:]] == ["failures-false-alarms", "failures-misses"]
    for picture in pictures:
        rows = len(labels(picture))
        grid = np.array(picture.figure.axes).reshape(rows + 1, 5)
        titles = [ax.get_title() for ax in grid[0]]
        assert titles == ["image", "ground truth", *METHODS]
        for line in grid[:-1]:
            for ax, name in zip(line[2:], METHODS, strict=True):
                assert ax.images[0].get_clim() == limits[name]
            assert line[0].images[0].get_array().shape == (32, 40, 3)
            assert line[1].images[0].get_array().shape == (32, 40)
    miss = pictures[-1].figure.axes
    assert miss[1].images[0].get_array().sum() == 36  # the mask's pixels


def test_no_figure_has_more_than_eight_rows(part, monkeypatch):
    one = survey(Brightness(), part)
    anomalous = [s for s in one.test if s.sample.label]
    many = [dataclasses.replace(anomalous[0], kind=f"kind {i:02}") for i in range(15)]
    one = dataclasses.replace(one, test=(*(s for s in one.test if not s.sample.label), *many))
    pictures = scenario_pictures(one, colour_limits([one]))
    assert [len(labels(p)) for p in pictures] == [6, 6, 6]
    shown = [kind_in(label) for p in pictures for label in labels(p)[1:]]
    assert shown == [s.kind for s in many]
    surveys = [dataclasses.replace(one, name=f"part {i}") for i in range(5)]
    for picture in failure_pictures(surveys, colour_limits(surveys)):
        assert [kind_in(label).partition(",")[0] for label in labels(picture)] == [
            *(f"part {i}" for i in range(5)),
        ]


def test_without_test_images_validation_images_are_shown(part):
    one = survey(Brightness(), dataclasses.replace(part, test=()))
    (picture,) = scenario_pictures(one, colour_limits([one]))
    assert picture.name == "part" and "validation images" in picture.title
    scores = [float(label.rpartition(" ")[2]) for label in labels(picture)]
    assert scores == pytest.approx([60 / 255, 63 / 255, 67 / 255], abs=0.005)
    assert failure_pictures([one], colour_limits([one])) == []
    with pytest.raises(ValueError, match="no test image to show"):
        overview_picture([one], colour_limits([one]))


@pytest.mark.parametrize(("label", "rows"), [(0, [1]), (1, [2, 1])])
def test_test_images_of_one_class_will_do(part, label, rows):
    chosen = tuple(s for s in part.test if s.label == label)
    one = survey(Brightness(), dataclasses.replace(part, test=chosen))
    pictures = scenario_pictures(one, colour_limits([one]))
    assert [len(labels(p)) for p in pictures] == rows
    assert pictures[0].title.startswith("part, logical" if label else "part, good")


def test_the_gallery_is_a_folder_of_pngs_and_a_page_that_shows_them(part, tmp_path):
    one = survey(Brightness(), part)
    pictures = write_gallery(tmp_path / "new" / "gallery", [one])
    files = {path.name for path in (tmp_path / "new" / "gallery").iterdir()}
    assert files == {f"{p.name}.png" for p in pictures} | {"gallery.md"}
    page = (tmp_path / "new" / "gallery" / "gallery.md").read_text()
    shown = dict((name, alt) for alt, name in re.findall(r"!\[(.+)\]\(<(.+)\.png>\)", page))
    assert shown == {p.name: p.alt for p in pictures} and str(one.point) in page
    for picture in pictures:
        with Image.open(tmp_path / "new" / "gallery" / f"{picture.name}.png") as image:
            assert image.text["Description"] == picture.alt
            assert image.width <= 960
        for ax in picture.figure.axes:
            kind, _, verdict = ax.get_ylabel().rpartition("\n")
            assert f"{kind}, {verdict}".replace("\n", " ") in picture.alt or not verdict


def test_two_scenarios_of_one_name_are_refused(part, tmp_path):
    one = surveyed(validation=[scored()])
    with pytest.raises(ValueError, match="each scenario may appear once, not part, part"):
        write_gallery(tmp_path, [one, one])
    with pytest.raises(ValueError, match="at least one survey"):
        write_gallery(tmp_path, [])


def test_the_same_images_make_the_same_file(part, tmp_path):
    for name in ("a.png", "b.png"):
        one = survey(Brightness(), part)
        gallery.save(overview_picture([one], colour_limits([one])), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_only_what_is_shown_is_predicted_twice(part):
    one = survey(Brightness(), part)
    assert set(one.detector.seen.values()) == {1}
    shown = sum(len(labels(p)) for p in scenario_pictures(one, colour_limits([one])))
    seen = one.detector.seen.total()
    assert seen == len(part.validation) + len(part.test) + shown


# --- the command ---------------------------------------------------------------------------------


def test_the_command_shows_the_median_of_each_type(part, narrow, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    narrow().save(run / "detector.safetensors")
    folder = part.train[0].path.parents[2]
    output = tmp_path / "docs" / "gallery.png"
    gallery.main([f"{folder}={run}", "--output", str(output)])
    with Image.open(output) as image:
        assert image.width == 960
        words = image.text["Description"]
    assert words in capsys.readouterr().out
    kinds = re.findall(r"part, ([a-z ]+), (?:passed|missed|found|false alarm) at", words)
    assert len(kinds) == 3 and kinds[0] == "good" and kinds[2] == "dent"


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("tray", "'tray' is not of the form SCENARIO=DETECTOR"),
        ("=x", "is not of the form"),
        ("tray=", "is not of the form"),
        ("tray=absent.safetensors", "absent.safetensors"),
    ],
)
def test_the_command_refuses_in_a_sentence(pair, words, tmp_path, refusal):
    assert words in refusal(gallery.main, pair, "--output", tmp_path / "gallery.png")
    assert not (tmp_path / "gallery.png").exists()


def test_a_truncated_image_is_named(part):
    broken = part.test[0].path
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=re.escape(broken.name)):
        survey(Brightness(), part)
    scenario = Scenario("x", part.train, part.validation, part.test[1:], "", "")
    assert survey(Brightness(), scenario).test
