"""Folders as their owners lay them out: complete, bare, and wrong in the usual ways."""

import json
import sys
from pathlib import Path
from types import ModuleType

from effad_core.datasets import (
    DATASETS,
    DefectKind,
    Sample,
    dataset_name,
    list_scenarios,
    open_scenario,
)
from effad_core.datasets.published import IMAGES, namesake_warning, published
from effad_core.errors import DataError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


def image(path, size=(6, 4), dots=(), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("L", size)
    for dot in dots:
        picture.putpixel(dot, value)
    picture.save(path)
    return path


@pytest.fixture
def bottle(tmp_path):
    """A scenario with MVTec AD's names."""
    root = tmp_path / "bottle"
    for i in range(20):
        image(root / f"train/good/{i:03}.png")
    for i in range(3):
        image(root / f"test/good/{i:03}.png")
        image(root / f"test/broken_large/{i:03}.png")
        image(root / f"ground_truth/broken_large/{i:03}_mask.png", dots=[(i, 1)])
    image(root / "test/contamination/000.png")
    (root / "license.txt").touch()
    return root


LOCO_CONFIG = [
    {
        "defect_name": "missing_top_label",
        "pixel_value": 255,
        "saturation_threshold": 1.0,
        "relative_saturation": True,
    },
    {
        "defect_name": "wrong_fill_level",
        "pixel_value": 254,
        "saturation_threshold": 3,
        "relative_saturation": False,
    },
    {
        "defect_name": "damaged_label",
        "pixel_value": 253,
        "saturation_threshold": 0.5,
        "relative_saturation": True,
    },
]


@pytest.fixture
def juice_bottle(tmp_path):
    """A scenario with MVTec LOCO's names, two defects in one of its images."""
    root = tmp_path / "juice_bottle"
    for split, count in (("train", 5), ("validation", 2), ("test", 3)):
        for i in range(count):
            image(root / f"{split}/good/{i:03}.png")
    image(root / "test/logical_anomalies/000.png")
    masks = root / "ground_truth/logical_anomalies/000"
    image(masks / "000.png", dots=[(0, 0), (1, 0)], value=255)
    image(masks / "001.png", dots=[(x, 3) for x in range(6)], value=254)
    image(root / "test/structural_anomalies/000.png")
    masks = root / "ground_truth/structural_anomalies/000"
    image(masks / "000.png", dots=[(2, 1), (3, 1), (4, 1)], value=253)
    (root / "defects_config.json").write_text(json.dumps(LOCO_CONFIG))
    for name in ("license.txt", "readme.txt"):
        (root / name).touch()
    return root


@pytest.fixture
def visa(tmp_path):
    """VisA as downloaded: two objects, the table with Windows' line ends as published."""
    root = tmp_path / "VisA"
    rows = []
    for name in ("candle", "pcb1"):
        for i in range(12):
            picture = f"{name}/Data/Images/Normal/{i:04}.JPG"
            image(root / picture)
            rows.append(f"{name},{'train' if i < 10 else 'test'},normal,{picture},")
        for i in range(2):
            picture, mask = (f"{name}/Data/{end}" for end in (f"Images/Anomaly/{i:03}.JPG", ""))
            mask += f"Masks/Anomaly/{i:03}.png"
            image(root / picture)
            image(root / mask, dots=[(i, 2)], value=i + 1)
            rows.append(f"{name},test,anomaly,{picture},{mask}")
        (root / name / "image_anno.csv").touch()
    write_table(root, rows)
    return root


HEADER = "object,split,label,image,mask"


def write_table(root, rows, header=HEADER, end="\r\n", encoding="utf-8"):
    (root / "split_csv").mkdir(exist_ok=True)
    text = end.join([header, *rows]) + end
    (root / "split_csv/1cls.csv").write_bytes(text.encode(encoding))


def read_rows(root):
    return (root / "split_csv/1cls.csv").read_text().splitlines()[1:]


def counts(scenario):
    return len(scenario.train), len(scenario.validation), len(scenario.test)


def refused(path, **options):
    with pytest.raises(DataError) as error:
        open_scenario(path, **options)
    assert "\n" not in str(error.value) and ": " in str(error.value)
    return str(error.value)


def test_mvtec_ad(bottle):
    scenario = open_scenario(str(bottle))
    assert scenario.name == "bottle" and counts(scenario) == (18, 2, 7)
    large = [s for s in scenario.test if s.anomaly_type == "broken_large"]
    assert [s.path.name for s in large] == ["000.png", "001.png", "002.png"]
    for i, sample in enumerate(large):
        assert sample.label == 1
        assert np.argwhere(sample.load_mask()).tolist() == [[1, i]]
    assert [s.label for s in scenario.test if s.anomaly_type == "good"] == [0, 0, 0]
    (contamination,) = (s for s in scenario.test if s.anomaly_type == "contamination")
    assert contamination.label == 1 and contamination.load_mask() is None  # no ground truth folder


def test_mvtec_loco_with_its_defects(juice_bottle):
    scenario = open_scenario(juice_bottle)
    assert scenario.name == "juice_bottle" and counts(scenario) == (5, 2, 5)
    good, logical, structural = (scenario.test[i] for i in (0, 3, 4))
    assert good.load_defects() == [] and good.defect_names() == ()
    assert logical.defect_names() == ("missing_top_label", "wrong_fill_level")
    (top, top_area), (level, level_area) = logical.load_defects()
    assert np.argwhere(top).tolist() == [[0, 0], [0, 1]] and top_area == 2
    assert np.argwhere(level).tolist() == [[3, x] for x in range(6)] and level_area == 3
    assert top.dtype == bool and top.shape == (4, 6)
    np.testing.assert_array_equal(logical.load_mask(), top | level)
    ((_, area),) = structural.load_defects()
    assert structural.defect_names() == ("damaged_label",) and area == 1.0
    assert [kind.name for kind in logical.defect_kinds] == [e["defect_name"] for e in LOCO_CONFIG]


def test_loco_without_its_config_counts_whole_defects(juice_bottle):
    (juice_bottle / "defects_config.json").unlink()
    logical = open_scenario(juice_bottle).test[3]
    assert [area for _, area in logical.load_defects()] == [2, 6]
    assert logical.defect_names() == ("", "")


def test_masks_that_the_config_does_not_explain(juice_bottle):
    path = juice_bottle / "ground_truth/structural_anomalies/000/000.png"
    sample = open_scenario(juice_bottle).test[4]
    for dots, value, message in (
        ([(0, 0)], 252, "the value 252, which defects_config.json does not list: use one of 253, "),
        ([], 0, "is all black"),
        ([(0, 0)], 254, None),
    ):
        image(path, dots=dots, value=value)
        for read in (sample.load_defects, sample.defect_names):
            if message is None:
                assert len(read()) == 1
                continue
            with pytest.raises(DataError) as error:
                read()
            assert message in str(error.value) and str(path) in str(error.value)
    with Image.open(path) as mask:
        mask.putpixel((1, 1), 253)
        mask.save(path)
    for read in (sample.load_defects, sample.defect_names):
        with pytest.raises(DataError, match="000.png holds the values 253, 254: save one mask"):
            read()
    assert sample.load_mask().sum() == 2  # the union needs no kinds


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("defect_name", [None, 1, ""]),
        ("pixel_value", [0, 256, -1, 254, 1.0, "255", True, None, [255]]),
        ("saturation_threshold", [0, -1, 1.0001, 2, "1", True, None, float("nan")]),
        ("relative_saturation", [0, 1, None, "true"]),
    ],
)
def test_a_wrong_value_in_the_config(juice_bottle, key, values):
    for value in values:
        config = [LOCO_CONFIG[0] | {key: value}, *LOCO_CONFIG[1:]]
        if (key, value) == ("pixel_value", 254):
            config = config[::-1]  # the second of the two is at fault
        (juice_bottle / "defects_config.json").write_text(json.dumps(config))
        message = refused(juice_bottle)
        number = config.index(LOCO_CONFIG[0] | {key: value}) + 1 if value == value else 1
        assert f"defects_config.json, entry {number} has the {key} " in message, value


@pytest.mark.parametrize("threshold", [0, -1, float("inf"), float("nan"), 10**400])
def test_a_wrong_number_of_pixels_in_the_config(juice_bottle, threshold):
    config = [LOCO_CONFIG[1] | {"saturation_threshold": threshold}]
    (juice_bottle / "defects_config.json").write_text(json.dumps(config))
    assert "write a number of pixels above 0" in refused(juice_bottle)


@pytest.mark.parametrize("content", ["", "[", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json(juice_bottle, content):
    (juice_bottle / "defects_config.json").write_bytes(content.encode("latin-1"))
    assert "cannot be read as JSON" in refused(juice_bottle)
    (juice_bottle / "defects_config.json").unlink()
    (juice_bottle / "defects_config.json").mkdir()
    assert "cannot be read as JSON" in refused(juice_bottle)


def test_a_config_that_is_no_list_of_complete_entries(juice_bottle):
    for content in ("{}", "[]", "3", "null"):
        (juice_bottle / "defects_config.json").write_text(content)
        assert "is not a list of defects" in refused(juice_bottle)
    for key in LOCO_CONFIG[0]:
        entry = {k: v for k, v in LOCO_CONFIG[1].items() if k != key}
        (juice_bottle / "defects_config.json").write_text(json.dumps([LOCO_CONFIG[0], entry]))
        assert f"entry 2 lacks {key}" in refused(juice_bottle)
    (juice_bottle / "defects_config.json").write_text("[3]")
    assert "entry 1 lacks defect_name, pixel_value, " in refused(juice_bottle)


@given(area=st.integers(1, 10**7), threshold=st.integers(1, 10**7), share=st.floats(0.001, 1))
def test_saturation_areas(area, threshold, share):
    absolute = DefectKind("a", 255, threshold, False).saturation_area(area)
    assert absolute == (threshold if threshold < area else area)
    relative = DefectKind("r", 255, share, True).saturation_area(area)
    whole = share * area // 1
    assert relative == (whole if whole >= 1 else 1)
    assert type(absolute) is type(relative) is float


def test_an_anomalous_image_without_masks_has_no_defects_to_load(bottle):
    (sample,) = (s for s in open_scenario(bottle).test if s.anomaly_type == "contamination")
    with pytest.raises(DataError, match="000.png is anomalous but has no mask"):
        sample.load_defects()
    assert sample.defect_names() == ()


def test_mask_values_are_read_in_any_mode_that_shows_gray(tmp_path):
    path = image(tmp_path / "a.png")
    kinds = (DefectKind("full", 255, 1.0, True), DefectKind("other", 7, 1.0, True))
    gray = Image.fromarray(np.array([[0, 0, 7, 7, 0, 0]] * 4, np.uint8))
    for number, (mask, name) in enumerate(
        [
            *((gray, "other"), (gray.convert("RGB"), "other"), (gray.convert("LA"), "other")),
            *((gray.convert("P"), "other"), (gray.convert("RGBA"), "other")),
            (gray.point(lambda v: 255 * (v > 0)).convert("1"), "full"),
        ]
    ):
        mask.save(tmp_path / f"mask{number}.png")
        sample = Sample(path, 1, "x", (tmp_path / f"mask{number}.png",), kinds)
        assert sample.defect_names() == (name,), mask.mode
        assert [area for _, area in sample.load_defects()] == [8.0]


def test_a_mask_of_another_size_is_refused_defect_by_defect(juice_bottle):
    path = image(
        juice_bottle / "ground_truth/structural_anomalies/000/000.png", (5, 4), [(0, 0)], 253
    )
    with pytest.raises(DataError, match="has 5x4 pixels"):
        open_scenario(juice_bottle).test[4].load_defects()
    assert path.exists()


def test_mvtec_loco(tmp_path):
    for split in ("train", "validation", "test"):
        image(tmp_path / split / "good/000.png")
    image(tmp_path / "test/logical_anomalies/v1.2.png")  # a dot in the name
    for i, dot in enumerate([(0, 0), (5, 3)]):
        image(tmp_path / f"ground_truth/logical_anomalies/v1.2/{i:03}.png", dots=[dot])
    scenario = open_scenario(tmp_path)
    assert counts(scenario) == (1, 1, 2)  # one training image is enough beside validation/good
    (logical,) = (s for s in scenario.test if s.label)
    assert np.argwhere(logical.load_mask()).tolist() == [[0, 0], [3, 5]]


def test_visa_after_its_split_script(tmp_path):
    for name in ("000.JPG", "001.JPG"):
        image(tmp_path / "train/good" / name)
    image(tmp_path / "test/bad/000.JPG")
    image(tmp_path / "ground_truth/bad/000.png", dots=[(2, 2)])
    (sample,) = open_scenario(tmp_path).test
    assert np.argwhere(sample.load_mask()).tolist() == [[2, 2]]


def test_train_good_alone_is_enough(tmp_path):
    for i in range(2):
        image(tmp_path / f"Überprüfung 1/train/good/{i}.png")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "Überprüfung 1")
    for path in (tmp_path / "Überprüfung 1", link):
        assert counts(open_scenario(path)) == (1, 1, 0)


def test_validation_fraction_and_seed_reach_the_split(bottle):
    assert counts(open_scenario(bottle, validation_fraction=0.5))[:2] == (10, 10)
    halves = [set(open_scenario(bottle, validation_fraction=0.5, seed=s).train) for s in (0, 1)]
    assert halves[0] != halves[1]


def test_one_training_image(tmp_path):
    image(tmp_path / "train/good/a.png")
    assert "at least 2 images" in refused(tmp_path)


def test_a_missing_mask_is_named(bottle):
    (bottle / "ground_truth/broken_large/001_mask.png").unlink()
    message = refused(bottle)
    assert str(bottle / "test/broken_large/001.png") in message and "001_mask.png" in message


def test_an_empty_mask_folder_of_loco_is_named(bottle):
    (bottle / "ground_truth/broken_large/001_mask.png").unlink()
    (bottle / "ground_truth/broken_large/001").mkdir()
    assert str(bottle / "ground_truth/broken_large/001") in refused(bottle)


def test_masks_of_a_misspelt_type(bottle):
    (bottle / "ground_truth/broken_large").rename(bottle / "ground_truth/broken-large")
    assert "same name" in refused(bottle)


def test_empty_masks_of_good_images_are_ignored(bottle):
    image(bottle / "ground_truth/good/000_mask.png")
    assert counts(open_scenario(bottle)) == (18, 2, 7)
    for path in (bottle / "test/good").iterdir():
        path.unlink()
    (bottle / "test/good").rmdir()
    assert counts(open_scenario(bottle)) == (18, 2, 4)


def test_a_folder_of_good_images(tmp_path, monkeypatch):
    root = tmp_path / "my part"
    image(root / "a.PNG")
    assert "at least 2 images" in refused(root)
    for i in range(18):
        image(root / f"line {i % 2}/{i:02}.jpg")
    image(root / "line 0/late/b.png")
    image(root / ".hidden/c.png")
    (root / "bad").mkdir()  # no image is in it
    (root / "notes.txt").touch()
    scenario = open_scenario(root)
    assert scenario.name == "my part" and counts(scenario) == (18, 2, 0)
    files = {sample.path.relative_to(root).as_posix() for sample in scenario.train}
    files |= {sample.path.relative_to(root).as_posix() for sample in scenario.validation}
    expected = {f"line {i % 2}/{i:02}.jpg" for i in range(18)}
    assert files == expected | {"a.PNG", "line 0/late/b.png"}
    said = "all 20 images in it and in line 0, line 0/late, line 1 are taken as good"
    assert said in scenario.summary() and str(root) in scenario.summary()
    assert counts(open_scenario(root, validation_fraction=0.5)) == (10, 10, 0)
    halves = [open_scenario(root, validation_fraction=0.5, seed=seed) for seed in (0, 1)]
    assert set(halves[0].train) != set(halves[1].train)
    monkeypatch.chdir(root / "line 1")
    here = open_scenario(".")
    assert here.name == "line 1" and "all 9 images in it are taken as good" in here.summary()
    for i in range(7):
        image(root / f"many/{i}/0.png")
    source = open_scenario(root / "many").source
    assert "all 7 images in it and in 0, 1, 2, 3, 4 and 2 more folders are" in source


@pytest.mark.parametrize("name", ["train", "validation", "test", "Test", "ground_truth"])
def test_images_beside_the_folders_of_a_layout(tmp_path, name):
    for i in range(3):
        image(tmp_path / f"{i}.png")
    assert counts(open_scenario(tmp_path)) == (2, 1, 0)
    image(tmp_path / f"a/{name}/b/0.png")
    message = refused(tmp_path)
    assert f"a folder {name}, " in message and str(tmp_path / "train/good") in message


def test_images_beside_empty_folders_of_a_layout(tmp_path):
    for i in range(3):
        image(tmp_path / f"{i}.png")
    (tmp_path / "train").mkdir()
    assert "a folder train, but no train/good: put the images of good" in refused(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["good", "Good", "OK", "not ok", "bad", "NG", "bad_2", "defects-2024", "masks", "normal"],
)
def test_folders_whose_names_say_that_not_all_images_are_good(tmp_path, name):
    for i in range(3):
        image(tmp_path / f"{i}.png")
        image(tmp_path / f"camera 2/{i}.png")  # a name that says nothing
    assert counts(open_scenario(tmp_path)) == (5, 1, 0)
    image(tmp_path / name / "0.png")
    image(tmp_path / name / "1.png")
    message = refused(tmp_path)
    assert f"a folder {name}, " in message and "name the folder of the good ones" in message
    assert counts(open_scenario(tmp_path / name)) == (1, 1, 0)  # as the message says


@pytest.mark.parametrize("name", ["goodyear book", "splatter", "zig"])
def test_an_unknown_folder_beside_images_is_not_taken_as_good(tmp_path, name):
    for i in range(3):
        image(tmp_path / f"{i}.png")
        image(tmp_path / name / f"{i}.png")
    assert name in refused(tmp_path) and "--normal" in refused(tmp_path)
    assert counts(open_scenario(normal=[tmp_path])) == (5, 1, 0)  # as the message says
    assert counts(open_scenario(tmp_path / name)) == (2, 1, 0)


def test_images_directly_in_test(bottle):
    path = image(bottle / "test/stray.png")
    assert str(path) in refused(bottle)


def test_a_folder_of_scenarios(bottle):
    message = refused(bottle.parent)
    assert str(bottle) in message and "several scenarios" in message


@pytest.mark.parametrize("name", ["train/good", "validation/good", "test/good", "test/dent"])
def test_empty_folders_are_named(bottle, name):
    folder = bottle / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    assert str(folder) in refused(bottle)


def test_validation_without_good(bottle):
    (bottle / "validation").mkdir()
    assert str(bottle / "validation/good") in refused(bottle)


def test_no_dataset_at_all(tmp_path):
    assert "train/good" in refused(tmp_path)
    assert "train/good" in refused(tmp_path / "nowhere")
    (tmp_path / "file.zip").touch()
    assert "is a file, not a folder" in refused(tmp_path / "file.zip")
    (tmp_path / "train").mkdir()
    message = refused(tmp_path)
    assert str(tmp_path / "train/good") in message and "holds no image" in message
    image(tmp_path / "train/0.png")
    message = refused(tmp_path)
    assert "a folder train" in message and str(tmp_path / "train/good") in message


def test_visa_as_downloaded(visa, monkeypatch):
    scenario = open_scenario(visa / "candle")
    assert scenario.name == "candle" and counts(scenario) == (9, 1, 4)
    assert scenario.licence == "CC BY 4.0" and "split_csv/1cls.csv" in scenario.source
    assert [s.anomaly_type for s in scenario.test] == ["good"] * 2 + ["anomaly"] * 2
    assert {s.path.suffix for s in scenario.train} == {".JPG"}
    for i, sample in enumerate(scenario.test[2:]):
        assert sample.path == visa / f"candle/Data/Images/Anomaly/{i:03}.JPG"
        assert np.argwhere(sample.load_mask()).tolist() == [[2, i]]  # the values 1 and 2
        assert [area for _, area in sample.load_defects()] == [1]
    assert counts(open_scenario(visa / "candle", validation_fraction=0.5)) == (5, 5, 4)
    halves = [open_scenario(visa / "candle", validation_fraction=0.5, seed=s) for s in (0, 1)]
    assert set(halves[0].train) != set(halves[1].train)
    monkeypatch.chdir(visa / "pcb1")
    assert open_scenario(".").name == "pcb1"


@pytest.mark.parametrize(
    "options",
    [{"encoding": "utf-8-sig"}, {"end": "\n"}, {"end": "\n\n"}, {"header": HEADER + ",note"}],
)
def test_visa_tables_as_spreadsheets_save_them(visa, options):
    write_table(visa, read_rows(visa), **options)
    assert counts(open_scenario(visa / "candle")) == (9, 1, 4)


def test_a_visa_table_whose_normal_rows_lack_the_last_comma(visa):
    write_table(visa, [row.removesuffix(",") for row in read_rows(visa)])
    assert counts(open_scenario(visa / "candle")) == (9, 1, 4)


def test_the_columns_of_a_visa_table(visa):
    rows = read_rows(visa)
    write_table(visa, rows, header="object,split,kind,image,file")
    for path in (visa, visa / "candle"):
        assert "1cls.csv has no column label, mask" in refused(path)
    (visa / "split_csv/1cls.csv").write_bytes(b"")
    assert "has no column object, split, label, image, mask" in refused(visa / "candle")
    write_table(visa, [",".join(row.split(",")[::-1]) for row in rows], header=HEADER[::-1])
    assert "has no column" in refused(visa / "candle")
    order = ",".join(HEADER.split(",")[::-1])
    write_table(visa, [",".join(row.split(",")[::-1]) for row in rows], header=order)
    assert counts(open_scenario(visa / "candle")) == (9, 1, 4)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"object\0,\0" + b"x" * 200_000 + b'"\n'])
def test_a_damaged_visa_table(visa, content):
    (visa / "split_csv/1cls.csv").write_bytes(content)
    assert "1cls.csv" in refused(visa / "candle")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("candle,val,normal,candle/Data/Images/Normal/0000.JPG,", "the split 'val'"),
        ("candle,train,good,candle/Data/Images/Normal/0000.JPG,", "the label 'good'"),
        ("candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,", "name a mask for each anomaly"),
        (
            "candle,test,normal,candle/Data/Images/Normal/0000.JPG,candle/Data/Masks/Anomaly/000.png",
            "none for a normal image",
        ),
        (
            "candle,test,normal,candle/Data/Images/Normal/9999.JPG,",
            "9999.JPG, which does not exist",
        ),
        ("candle,test,normal,candle/Data/Images/Normal,", "Normal, which does not exist"),
        ("candle,test,normal,,", "write a path"),
        ("candle,test,normal", "write a path"),
        ("candle,test", "the label ''"),
        ("candle,test,normal,../outside.JPG,", "stays inside"),
        ("candle,test,normal,candle/../../outside.JPG,", "stays inside"),
        ("candle,test,normal,{root}/candle/Data/Images/Normal/0000.JPG,", "stays inside"),
        ("candle,test,normal,C:/outside.JPG,", "stays inside"),
        ("candle,test,normal,..\\outside.JPG,", "stays inside"),
        (
            "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,../outside.JPG",
            "names '../outside.JPG'",
        ),
        ("candle,test,normal,candle/link.JPG,", "a link that leads out of"),
        ("candle,test,normal,candle/door/outside.JPG,", "a link that leads out of"),
    ],
)
def test_a_row_of_a_visa_table_that_cannot_be_used(visa, row, message):
    outside = image(visa.parent / "outside.JPG")
    (visa / "candle/link.JPG").symlink_to(outside)
    (visa / "candle/door").symlink_to(visa.parent)
    write_table(visa, [*read_rows(visa), row.format(root=visa)])
    found = refused(visa / "candle")
    assert message in found and "1cls.csv line 30" in found
    assert counts(open_scenario(visa / "pcb1")) == (9, 1, 4)  # the other object is not at fault


def test_a_link_inside_the_visa_folder_and_a_link_to_it(visa):
    (visa / "candle/link.JPG").symlink_to(visa / "candle/Data/Images/Normal/0010.JPG")
    rows = [row for row in read_rows(visa) if "Normal/0010" not in row]
    write_table(visa, [*rows, "candle,test,normal,candle/link.JPG,"])
    (visa.parent / "elsewhere").symlink_to(visa)
    assert counts(open_scenario(visa.parent / "elsewhere/candle")) == (9, 1, 4)


def test_leaks_and_anomalies_in_the_training_rows_of_visa(visa):
    rows = read_rows(visa)
    write_table(visa, [*rows, rows[0].replace("train", "test")])
    assert "is in the" in refused(visa / "candle")
    write_table(visa, [row.replace("candle,test", "candle,train") for row in rows])
    assert "is anomalous but in the training or validation split" in refused(visa / "candle")


def test_the_objects_of_visa_are_named(visa):
    message = refused(visa)
    assert "several scenarios" in message and "found candle, pcb1" in message
    (visa / "pcb9").mkdir()
    message = refused(visa / "pcb9")
    assert "names no object pcb9" in message and "candle, pcb1" in message
    assert "names no object" not in refused(visa / "split_csv")


def test_a_folder_with_train_good_needs_no_table(visa):
    image(visa / "candle/train/good/a.png")
    image(visa / "candle/train/good/b.png")
    assert counts(open_scenario(visa / "candle")) == (1, 1, 0)


def listed(root):
    return [path.name for path in list_scenarios(root)]


def test_scenarios_are_listed_in_every_layout(bottle, juice_bottle, visa):
    root = bottle.parent
    image(root / "Zebra/train/good/a.png")
    image(root / "train_only/train/a.png")
    image(root / ".hidden/train/good/a.png")
    (root / "another").symlink_to(bottle)
    (root / "file").touch()
    assert listed(root) == ["Zebra", "another", "bottle", "juice_bottle"]
    assert list_scenarios(str(root))[2] == bottle
    assert listed(visa) == ["candle", "pcb1"]
    for path in list_scenarios(root)[2:] + list_scenarios(visa):
        assert open_scenario(path).name == path.name
    (visa / "pcb1").rename(visa / "gone")
    assert listed(visa) == ["candle"]


def test_one_scenario_lists_itself(bottle, visa):
    assert list_scenarios(bottle) == [bottle]
    assert list_scenarios(visa / "candle") == [visa / "candle"]


def test_listing_where_there_is_no_scenario(bottle, tmp_path):
    for path, message in (
        (bottle / "test", "holds no scenario"),
        (tmp_path / "absent", "does not exist"),
        (bottle / "license.txt", "is a file"),
    ):
        for function in (list_scenarios, dataset_name):
            with pytest.raises(DataError) as error:
                function(path)
            assert message in str(error.value) and str(path) in str(error.value)


def full(folder, train, normal, anomalous, *, validation=0):
    """A scenario with so many images, which are empty files: whoever counts does not open them."""
    for split, count in (
        ("train/good", train), ("validation/good", validation), ("test/good", normal),
        ("test/a", anomalous // 2), ("test/b", anomalous - anomalous // 2),
    ):  # fmt: skip
        (folder / split).mkdir(parents=True)
        for i in range(count):
            (folder / split / f"{i:03}.png").touch()
    return folder


def test_the_names_of_the_papers_datasets():
    assert {name: len(scenarios) for name, scenarios in DATASETS.items()} == {
        "mvtec-ad": 15,
        "mvtec-loco": 5,
        "visa": 12,
    }
    every = [name for scenarios in DATASETS.values() for name in scenarios]
    assert len(set(every)) == 32 and all(list(s) == sorted(s) for s in DATASETS.values())


def test_datasets_are_told_apart(tmp_path, monkeypatch):
    ad, loco, visa = (tmp_path / name for name in ("ad", "loco", "split_visa"))
    toothbrush = full(ad / "toothbrush", 60, 12, 30)
    full(loco / "splicing_connectors", 360, 119, 193, validation=60)
    full(visa / "fryum", 450, 50, 100)
    for root, name in ((ad, "mvtec-ad"), (loco, "mvtec-loco"), (visa, "visa")):
        assert dataset_name(root) == dataset_name(str(root)) == name
    assert published(toothbrush) == "mvtec-ad" and namesake_warning(toothbrush) is None
    (toothbrush / "test/.hidden").mkdir()
    (toothbrush / "test/good/._000.png").touch()  # macOS leaves such files
    (toothbrush / "test/good/Thumbs.db").touch()
    assert dataset_name(toothbrush) == "mvtec-ad"
    wood = full(ad / "wood", 247, 19, 60)
    assert dataset_name(ad) == "mvtec-ad"
    full(ad / "tube", 247, 19, 60)
    monkeypatch.chdir(ad)
    assert dataset_name(".") == "ad" and published("wood") == published(wood) == "mvtec-ad"


@pytest.mark.parametrize(
    "change",
    [
        lambda bottle: (bottle / "train/good/008.png").unlink(),
        lambda bottle: (bottle / "train/good/new.PNG").touch(),
        lambda bottle: (bottle / "test/good/008.png").unlink(),
        lambda bottle: (bottle / "test/a/new.jpg").touch(),
        lambda bottle: (bottle / "test/good/008.png").rename(bottle / "test/a/good.png"),
        lambda bottle: (bottle / "test").rename(bottle / "tests"),
    ],
)
def test_other_numbers_of_images_are_another_dataset(tmp_path, change):
    bottle = full(tmp_path / "parts/bottle", 209, 20, 63)
    assert published(bottle) == "mvtec-ad"
    change(bottle)
    assert published(bottle) is None and dataset_name(bottle.parent) == "parts"
    assert "is called like a scenario of mvtec-ad, but its numbers" in namesake_warning(bottle)


def test_a_folder_of_ones_own_is_no_benchmark_for_its_name(tmp_path, bottle, juice_bottle, visa):
    for path in (bottle, juice_bottle, visa / "candle"):
        assert published(path) is None and dataset_name(path) == path.name
    assert dataset_name(visa) == "VisA"
    assert namesake_warning(bottle) == (
        f"{bottle} is called like a scenario of mvtec-ad, but its numbers of images (training, "
        "normal test, anomalous test) are (20, 3, 4), not (209, 20, 63): its results are kept out "
        "of the paper's tables."
    )
    assert namesake_warning("tray") is None
    image(tmp_path / "visa/my_part/train/good/0.png")  # nor for the name of the folder above it
    assert dataset_name(tmp_path / "visa") == "the folder visa"


def test_visa_is_recognised_by_its_table(tmp_path):
    (tmp_path / "fryum").mkdir()
    (tmp_path / "split_csv").mkdir()
    kinds = [("train", "normal", "")] * 450 + [("test", "normal", "")] * 50
    kinds += [("test", "anomaly", "m.png")] * 100
    rows = [f"fryum,{split},{label},i.JPG,{mask}" for split, label, mask in kinds]
    for count, dataset in ((600, "visa"), (599, tmp_path.name)):
        table = "\n".join(["object,split,label,image,mask", *rows[:count]])
        (tmp_path / "split_csv/1cls.csv").write_text(table)
        assert dataset_name(tmp_path) == dataset


@pytest.mark.parametrize(
    ("title", "dataset", "images"),
    [("MVTec AD", "mvtec-ad", 5354), ("MVTec LOCO", "mvtec-loco", 3651), ("VisA", "visa", 10821)],
)
def test_the_card_counts_every_scenario(title, dataset, images):
    card = (Path(__file__).parents[2] / "data/README.md").read_text(encoding="utf-8")
    (table,) = (part for part in card.split("\n\n") if part.startswith(f"| {title} | train |"))
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table.splitlines()]
    names = [row[0] for row in rows[2:-1]]
    assert names == list(DATASETS[dataset]) and rows[-1][0] == f"all {len(names)}"
    columns = zip(*([int(cell) for cell in row[1:]] for row in rows[2:-1]), strict=True)
    totals = [int(cell.replace(",", "")) for cell in rows[-1][1:]]
    assert [sum(column) for column in columns] == totals and sum(totals) == images
    for name, *cells in rows[2:-1]:
        numbers = [int(cell) for cell in cells]
        if dataset == "mvtec-loco":  # training and validation, then logical and structural, are one
            numbers = [numbers[0] + numbers[1], numbers[2], numbers[3] + numbers[4]]
        assert IMAGES[dataset][name] == tuple(numbers), name
    assert f"{images:,} images" in card


@pytest.fixture
def tray(juice_bottle, monkeypatch):
    """A stand-in for the drawn tray; calls are counted."""
    module = ModuleType("effad_core.datasets.tray")
    module.calls = 0

    def tray_folder():
        module.calls += 1
        return juice_bottle

    module.tray_folder = tray_folder
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_the_tray_opens_by_name(tray, tmp_path, monkeypatch):
    scenario = open_scenario("tray")
    assert tray.calls == 1 and counts(scenario) == (5, 2, 5)
    assert (scenario.name, scenario.licence) == ("tray", "Apache-2.0 (drawn by this project)")
    assert scenario.source == "a parts tray drawn by effad_core"
    assert scenario.test[3].defect_names() == ("missing_top_label", "wrong_fill_level")
    for i in range(2):
        image(tmp_path / f"tray/train/good/{i}.png")
    monkeypatch.chdir(tmp_path)
    assert counts(open_scenario("tray")) == (5, 2, 5)  # the name wins
    assert counts(open_scenario("./tray")) == (1, 1, 0) and tray.calls == 2
    assert "include_graded" in refused("tray", include_graded=True) and tray.calls == 2
