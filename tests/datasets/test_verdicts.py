"""Folders outside of a benchmark's layout: their names decide, and no bad part becomes good."""

from pathlib import Path

from effad_core.datasets import list_scenarios, open_scenario
from effad_core.datasets.layouts import good_images
from effad_core.errors import DataError

import numpy as np
import pytest
from PIL import Image


def draw(root, *names, value=0):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4), value).save(root / name)
    return root


def fill(root, *folders, count=3):
    for folder in folders:
        draw(root, *(f"{folder}/{n}.png" for n in range(count)))
    return root


def split(scenario, root):
    """{"train": folders, "test": kinds with their folders}; what is held out counts as train."""
    train = {s.path.parent.relative_to(root).as_posix() for s in scenario.train}
    train |= {s.path.parent.relative_to(root).as_posix() for s in scenario.validation}
    test = {(s.anomaly_type, s.path.parent.relative_to(root).as_posix()) for s in scenario.test}
    return train, test


def refused(root, *words):
    with pytest.raises(DataError) as error:
        open_scenario(root)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and ": " in message and message.endswith(".")
    for word in (str(root), *words):
        assert word in message
    return message


OPENS = {  # folders -> the folders trained on, and the kinds and folders tested on
    ("good",): ({"good"}, set()),
    ("good", "bad"): ({"good"}, {("bad", "bad")}),
    ("OK", "NIO"): ({"OK"}, {("NIO", "NIO")}),
    ("gut", "schlecht", "Kratzer"): (
        {"gut"},
        {("schlecht", "schlecht"), ("Kratzer", "Kratzer")},
    ),
    ("normal", "abnormal", "normal_test"): (
        {"normal"},
        {("good", "normal_test"), ("abnormal", "abnormal")},
    ),
    ("train_good", "test_good", "test_scratch"): (
        {"train_good"},
        {("good", "test_good"), ("test_scratch", "test_scratch")},
    ),
    ("good", "ok", "bad"): ({"good", "ok"}, {("bad", "bad")}),
    ("good/camera1", "good/camera2", "bad/camera1"): (
        {"good/camera1", "good/camera2"},
        {("bad", "bad/camera1")},
    ),
    ("good", "bad/scratch", "bad/odd one"): (
        {"good"},
        {("scratch", "bad/scratch"), ("odd one", "bad/odd one")},
    ),
    ("train/camera1/good", "test/camera1/bad"): (
        {"train/camera1/good"},
        {("bad", "test/camera1/bad")},
    ),
    ("camera1", "camera2"): ({"camera1", "camera2"}, set()),
    ("2024-05-01", "2024-05-02"): ({"2024-05-01", "2024-05-02"}, set()),
    ("batch_3/left", "batch_4/right"): ({"batch_3/left", "batch_4/right"}, set()),
    ("bolt 1", "bolt 2", "Bolt_3"): ({"bolt 1", "bolt 2", "Bolt_3"}, set()),
    ("bolt",): ({"bolt"}, set()),
    ("0", "1", "2"): ({"0", "1", "2"}, set()),
}


@pytest.mark.parametrize("folders", OPENS)
def test_what_opens(tmp_path, folders):
    scenario = open_scenario(fill(tmp_path / "part", *folders))
    assert split(scenario, tmp_path / "part") == OPENS[folders]
    assert scenario.ignored == () and len(scenario.validation) == 1
    assert all(s.label == (s.anomaly_type != "good") for s in scenario.test)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("positive", "negative"), "may be read as good or as bad"),
        (("0", "1"), "do not say whether"),
        (("class_0", "class_1"), "may be read as good or as bad"),
        (("good", "blobs"), "the folder blobs does not say"),
        (("good", "camera1"), "the folder camera1 does not say"),
        (("good", "bad", "blobs"), "the folder blobs does not say"),
        (("bad", "camera1"), "the folder camera1 does not say"),
        (("apples", "pears"), "whose names do not say"),
        (("line 1/apples", "line 1/pears"), "whose names do not say"),
        (("bad",), "no images of good parts"),
        (("bad", "scratch"), "no images of good parts"),
        (("good/scratch", "good/fine"), "may be read as good or as bad"),
        (("almost good", "good"), "almost good, which may be read as"),
        (("training", "testing"), "a folder testing, but no train/good"),
        (("train_set", "test_set"), "but no train/good"),
        (("train", "good"), "but no train/good"),
        (("P", "F"), "do not say whether"),
        (("+", "-"), "do not say whether"),
        (("good", "unsorted"), "unsorted, which may be read as good or as bad"),
        (("valid", "invalid"), "but no train/good"),
        (("train/good/train", "validation/bad"), "lies in a folder below"),
        (("train_good/test", "bad"), "folders of two splits"),
    ],
)
def test_what_may_be_bad_is_refused(tmp_path, folders, words):
    message = refused(fill(tmp_path / "part", *folders), words)
    remedies = ("effad train --normal", "train/good", "move it up", "keep one")
    assert any(remedy in message for remedy in remedies)


def test_a_split_in_which_bad_parts_are_not_used(tmp_path):
    root = fill(tmp_path / "part", "train_good", "train_bad", "val_good", "test_bad")
    scenario = open_scenario(root)
    assert split(scenario, root) == ({"train_good", "val_good"}, {("test_bad", "test_bad")})
    assert len(scenario.validation) == 3
    assert scenario.ignored == ("3 images in train_bad: bad parts, which are not trained on",)
    assert "left out: 3 images in train_bad: bad parts" in scenario.summary()


def test_anomalib_folder_with_masks(tmp_path):
    root = fill(tmp_path, "normal", "abnormal", "normal_test")
    draw(root, *(f"mask/{n}.png" for n in range(4)), value=255)
    scenario = open_scenario(root)
    assert [s.mask_paths for s in scenario.test if s.label] == [
        (root / f"mask/{n}.png",) for n in range(3)
    ]
    assert all(s.load_mask().all() for s in scenario.test if s.label)
    assert scenario.ignored == ("1 mask in mask: no anomalous image has these",)
    (root / "mask/1.png").unlink()
    refused(root, "abnormal/1.png has no mask")


def test_masks_by_kind_and_several_for_one_image(tmp_path):
    root = fill(tmp_path, "good", "scratch", "dent", count=2)
    draw(
        root, *(f"ground_truth/{kind}/{n}_mask.png" for kind in ("scratch", "dent") for n in (0, 1))
    )
    masks = {s.path.relative_to(root).as_posix(): s.mask_paths for s in open_scenario(root).test}
    assert masks["dent/1.png"] == (root / "ground_truth/dent/1_mask.png",)
    assert masks["scratch/0.png"] == (root / "ground_truth/scratch/0_mask.png",)
    for n in (0, 1):
        (root / f"ground_truth/dent/{n}_mask.png").unlink()
        draw(root, f"ground_truth/dent/{n}/a.png", f"ground_truth/dent/{n}/b.png")
    masks = {s.path.relative_to(root).as_posix(): s.mask_paths for s in open_scenario(root).test}
    assert len(masks["dent/1.png"]) == 2 and len(masks["scratch/1.png"]) == 1


def test_masks_by_kind_of_images_that_lie_deeper(tmp_path):
    root = fill(tmp_path, "good", "scratch/line 1", "dent/line 1", count=2)
    draw(root, "masks/scratch/0.png", "masks/scratch/1.png")
    masks = {s.path.relative_to(root).as_posix(): s.mask_paths for s in open_scenario(root).test}
    assert masks["scratch/line 1/1.png"] == (root / "masks/scratch/1.png",)
    assert masks["dent/line 1/0.png"] == ()


def test_a_mask_that_fits_two_images(tmp_path):
    root = fill(tmp_path, "good", "scratch", "dent")
    draw(root, "masks/0.png")
    refused(root, "would share a mask")


@pytest.mark.parametrize("name", ["{}_GT", "{}_mask", "{}-mask", "GT_{}", "{}.label", "{}_mask_1"])
def test_masks_beside_images_say_which_are_good(tmp_path, name):
    root = draw(tmp_path, *(f"{n}.png" for n in range(5)))
    draw(root, *(f"{name.format(n)}.png" for n in range(5)))
    scenario = open_scenario(root)
    found = {s.path.name for s in scenario.train + scenario.validation}
    assert found == {f"{n}.png" for n in range(5)} and scenario.test == ()
    assert scenario.ignored == (f"5 masks directly in {root.name}: masks of good parts",)
    draw(root, f"{name.format(3)}.png", value=9)
    scenario = open_scenario(root)
    assert [s.path.name for s in scenario.test] == ["3.png"]
    assert scenario.test[0].label == 1 and scenario.test[0].load_mask().all()
    (root / f"{name.format(2)}.png").unlink()
    refused(root, "but none of", "2.png")


def test_kolektor_sdd2(tmp_path):
    for part in ("train", "test"):
        draw(tmp_path, *(f"{part}/{n}{end}.png" for n in range(4) for end in ("", "_GT")))
        draw(tmp_path, f"{part}/3_GT.png", value=255)
    scenario = open_scenario(tmp_path)
    assert split(scenario, tmp_path) == ({"train"}, {("good", "test"), ("anomalous", "test")})
    assert len(scenario.train) + len(scenario.validation) == 3 and len(scenario.test) == 4
    assert "1 image in train: bad parts, which are not trained on" in scenario.ignored


def test_masks_in_a_folder_beside_the_images(tmp_path):
    root = fill(tmp_path, "images", "masks")
    draw(root, "masks/1.png", value=255)
    scenario = open_scenario(root)
    assert [s.path.name for s in scenario.test] == ["1.png"]
    assert {s.path.parent.name for s in scenario.train + scenario.validation} == {"images"}
    (root / "masks/2.png").unlink()
    refused(root, "a folder masks", "the folder images does not say")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("1.png", "2.png", "3_mask.png"), "3_mask.png is called like a mask"),
        (("1_mask.png", "2_mask.png"), "1_mask.png is called like a mask"),
        (("good/1.png", "good/2.png", "good/3_GT.png"), "3_GT.png is called like a mask"),
        (
            ("train/good/1.png", "train/good/2.png", "train/good/3_GT.png"),
            "3_GT.png is called like",
        ),
        (("1.jpg", "1.png", "2.jpg"), "differ in their suffix alone"),
        (("ok_1.png", "ok_2.png", "ng_1.png"), "ng_1.png is called like the image of a bad part"),
    ],
)
def test_files_that_may_be_masks_or_bad_parts(tmp_path, names, words):
    refused(draw(tmp_path, *names), words)


def test_files_whose_names_only_look_so(tmp_path):
    names = ("label_1.png", "label_2.png", "label_3.png")
    assert len(open_scenario(draw(tmp_path / "a", *names)).train) == 2
    names = ("gas_mask_01.png", "gas_mask_02.png", "gas_mask_03.png")
    assert len(open_scenario(draw(tmp_path / "d", *names)).train) == 2
    names = ("3bad9c.png", "bad1.png", "abad.png", "scratchcard 1.png")
    assert len(open_scenario(draw(tmp_path / "b", *names)).train) == 3
    names = ("scratch card 1.png", "scratch card 2.png")  # what all are called says nothing
    assert len(open_scenario(draw(tmp_path / "c", *names)).train) == 1


def test_thumbnails_and_overlays_are_no_images(tmp_path):
    root = draw(tmp_path, "1.png", "2.png", "3.png", "1_thumb.png", "2_overlay.png")
    scenario = open_scenario(root)
    assert len(scenario.train) + len(scenario.validation) == 3
    assert scenario.ignored[0].startswith(f"2 images directly in {root.name}: thumbnails or")


NAS = ("@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "#recycle/a.png", ".@__thumb/1.png", "Thumbs/1.png")


@pytest.mark.parametrize("layout", ["plain", "verdicts", "mvtec"])
def test_system_folders_are_left_out_and_listed(tmp_path, layout):
    root = tmp_path / "part"
    folders = {"plain": (".",), "verdicts": ("good", "bad")}.get(
        layout, ("train/good", "test/good", "test/bad")
    )
    fill(root, *folders)
    for folder in {".", *folders}:
        draw(root, *(f"{folder}/{name}" for name in NAS))
    (root / "lost+found").mkdir()
    draw(root, "._1.png")
    (root / "old.heic").touch()
    scenario = open_scenario(root)
    samples = (*scenario.train, *scenario.validation, *scenario.test)
    assert len(samples) == 3 * len(folders)
    assert {s.path.name for s in samples} == {"0.png", "1.png", "2.png"}
    number = len({".", *folders})
    assert set(scenario.ignored) == {
        f"{number} {'file' if number == 1 else 'files'} in {name}: {reason}"
        for name, reason in (
            ("@eaDir", "thumbnails of a Synology NAS"),
            ("#recycle", "the recycle bin of a NAS"),
            (".@__thumb", "hidden"),
            ("Thumbs", "thumbnails"),
        )
    } | {
        "1 file whose names begin with a dot: hidden",
        "1 .heic: formats that are not read in folders, save them as PNG",
    }
    assert "left out: " + scenario.ignored[0] in scenario.summary()


def test_a_benchmark_of_good_and_bad(tmp_path):
    fill(tmp_path / "bolt", "ok", "ng")
    fill(tmp_path / "nut", "train/ok", "test/ok", "test/ko")
    fill(tmp_path / "other", "camera1")
    fill(tmp_path / "test", "good", "bad")
    assert [path.name for path in list_scenarios(tmp_path)] == ["bolt", "nut"]
    assert list_scenarios(tmp_path / "bolt") == [tmp_path / "bolt"]
    refused(tmp_path, "several scenarios")


def test_btad(tmp_path):
    root = fill(tmp_path / "01", "train/ok", "test/ok", "test/ko")
    for n in range(3):
        (root / f"test/ko/{n}.png").rename(root / f"test/ko/{n}.bmp")
    fill(root, "ground_truth/ko")
    scenario = open_scenario(root)
    assert split(scenario, root) == ({"train/ok"}, {("good", "test/ok"), ("ko", "test/ko")})
    assert all(s.mask_paths[0].name == f"{s.path.stem}.png" for s in scenario.test if s.label)


def test_mvtec_ad_2(tmp_path):
    root = fill(tmp_path / "can", "train/good", "validation/good", "test_public/good")
    fill(root, "test_private", "test_private_mixed")
    draw(root, *(f"test_public/bad/{n}_regular.png" for n in range(2)))
    draw(root, *(f"test_public/ground_truth/bad/{n}_regular_mask.png" for n in range(2)), value=1)
    scenario = open_scenario(root)
    assert len(scenario.train) == len(scenario.validation) == 3
    assert split(scenario, root)[1] == {("good", "test_public/good"), ("bad", "test_public/bad")}
    assert all(s.load_mask().all() for s in scenario.test if s.label)
    assert len(scenario.ignored) == 2 and "ground truth is not public" in scenario.ignored[0]


def test_what_has_no_place_beside_train_good_is_listed(tmp_path):
    root = fill(tmp_path, "train/good", "train/bad", "drawings")
    draw(root, "cover.png")
    assert open_scenario(root).ignored == (
        "3 images in train/bad: bad parts, which are not trained on",
        "3 images in drawings: no part of a layout with train/good",
        f"1 image directly in {root.name}: no part of a layout with train/good",
    )


def test_good_images_for_a_threshold_leave_the_bad_ones_out(tmp_path):
    root = fill(tmp_path / "new", "good", "bad")
    assert {path.parent.name for path in good_images(root)} == {"good"}
    fill(tmp_path / "part", "train/good")
    with pytest.raises(DataError, match="is a whole scenario: name a folder of good images"):
        good_images(tmp_path / "part")
    with pytest.raises(DataError, match="do not say"):
        good_images(fill(tmp_path / "x", "0", "1"))


def test_masks_are_compared_with_an_independent_reading(tmp_path):
    root = fill(tmp_path, "good", "bad")
    expected = {}
    for n in range(3):
        mask = np.zeros((4, 6), np.uint8)
        mask[n, n] = 200
        Image.fromarray(mask).save(root / f"bad/{n}_mask.png")
        expected[f"{n}.png"] = [[n, n]]
    found = {
        Path(s.path).name: np.argwhere(s.load_mask()).tolist() for s in open_scenario(root).test
    }
    assert found == expected
