"""Folders as their owners lay them out: complete, bare, and wrong in the usual ways."""

import numpy as np
import pytest
from PIL import Image

from effad_core.datasets import DataError, open_scenario


def image(path, size=(6, 4), dots=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("L", size)
    for dot in dots:
        picture.putpixel(dot, 255)
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


def test_images_directly_in_the_folder(tmp_path):
    image(tmp_path / "a.PNG")
    message = refused(tmp_path)
    assert str(tmp_path / "train/good") in message and "put the normal ones into" in message


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
    assert str(tmp_path / "train/good") in refused(tmp_path)
