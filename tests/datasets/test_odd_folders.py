"""Folders as people bring them, wrong in some way: each opens as it must, or one sentence says why.

`FOLDERS` is the table: what is done to a sound folder, and the numbers of images in each split that
must come out, or the words of the sentence.
"""

import os
import shutil
import sys
import unicodedata
from pathlib import Path

from effad_core.datasets import hold_out, list_scenarios, open_folder, open_scenario
from effad_core.datasets.images import read_mask
from effad_core.datasets.layouts import good_images
from effad_core.datasets.scenario import Sample
from effad_core.distillation import teacher_check
from effad_core.errors import DataError, printable

import numpy as np
import pytest
from PIL import Image

MASK = np.zeros((4, 6), np.uint8)
MASK[1, 2] = 255


def draw(path, array=MASK):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def sound(root):
    """A part with 4 training images, 2 good ones to test on, and 2 bent ones with masks."""
    for i in range(4):
        draw(root / f"train/good/{i}.png")
    for i in range(2):
        draw(root / f"test/good/{i}.png")
        draw(root / f"test/bent/{i}.png")
        draw(root / f"ground_truth/bent/{i}_mask.png")


def move(root, *pairs):
    for old, new in pairs:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


def replace(root, name, target=None):
    """A link in the place of a file or folder; without target, a text file, as Git may leave it."""
    path = root / name
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    if target is None:
        path.write_text("../elsewhere")
    else:
        path.symlink_to(target)


def plain(root, *names):
    """A folder without layout instead."""
    shutil.rmtree(root)
    for name in names:
        draw(root / name)


E_ACUTE = {form: unicodedata.normalize(form, "é") for form in ("NFC", "NFD")}


def accents(root, of_image, of_mask):
    move(root, ("test/bent/0.png", f"test/bent/{E_ACUTE[of_image]}.png"))
    move(root, ("ground_truth/bent/0_mask.png", f"ground_truth/bent/{E_ACUTE[of_mask]}_mask.png"))


WHOLE = (3, 1, 4)  # what `sound` opens as
FOLDERS = {
    "sound": (lambda r: None, WHOLE),
    # names
    "files of other programs": (
        lambda r: [
            (r / n).write_bytes(b"x")
            for n in ("Thumbs.db", "train/good/desktop.ini", "test/.DS_Store")
        ],
        WHOLE,
    ),
    "hidden images": (
        lambda r: [draw(r / n) for n in ("train/good/._0.png", "test/.x/0.png")],
        WHOLE,
    ),
    "upper-case suffixes": (lambda r: move(r, ("train/good/0.png", "train/good/0.PNG")), WHOLE),
    "two suffixes": (lambda r: move(r, ("train/good/0.png", "train/good/0.tar.png")), WHOLE),
    "names that differ in case": (
        lambda r: draw(r / "train/good/A.png") or draw(r / "train/good/a.png"),
        (5, 1, 4),
    ),
    "names that differ in suffix": (lambda r: draw(r / "train/good/0.bmp"), (4, 1, 4)),
    "spaces, quotes, line breaks": (
        lambda r: move(
            r,
            ("train/good/0.png", "train/good/ 'a' \"b\"\nc.png"),
            ("test/bent", "test/x\ny"),
            ("ground_truth/bent", "ground_truth/x\ny"),
        ),
        WHOLE,
    ),
    "a type that begins with a dash": (
        lambda r: move(r, ("test/bent", "test/-rf"), ("ground_truth/bent", "ground_truth/-rf")),
        WHOLE,
    ),
    "accents composed alike": (lambda r: accents(r, "NFC", "NFC"), WHOLE),
    "accents of the mask decomposed": (lambda r: accents(r, "NFC", "NFD"), WHOLE),
    "accents of the image decomposed": (lambda r: accents(r, "NFD", "NFC"), WHOLE),
    # masks
    "no masks at all": (lambda r: shutil.rmtree(r / "ground_truth"), WHOLE),
    "a mask that is missing": (
        lambda r: (r / "ground_truth/bent/0_mask.png").unlink(),
        "has no mask",
    ),
    "a mask of another type": (
        lambda r: move(r, ("ground_truth/bent", "ground_truth/Bent")),
        "the same name",
    ),
    "a mask too many": (lambda r: draw(r / "ground_truth/bent/7_mask.png"), WHOLE),
    "two masks of one image": (
        lambda r: draw(r / "ground_truth/bent/0.png"),
        "masks of the same test image 0",
    ),
    "a mask in two formats": (
        lambda r: draw(r / "ground_truth/bent/0_mask.bmp"),
        "masks of the same test image 0",
    ),
    "a mask and a folder of masks": (
        lambda r: draw(r / "ground_truth/bent/0/1.png"),
        "masks of the same test image 0",
    ),
    "two images of one mask": (lambda r: draw(r / "test/bent/0.bmp"), "would share a mask"),
    "two images without masks": (
        lambda r: draw(r / "test/bent/0.bmp") or shutil.rmtree(r / "ground_truth"),
        (3, 1, 5),
    ),
    "masks directly in ground_truth": (
        lambda r: draw(r / "ground_truth/0_mask.png"),
        "lies directly in ground_truth",
    ),
    "ground_truth that is a file": (
        lambda r: replace(r, "ground_truth"),
        "ground_truth is a file, not a folder",
    ),
    "ground_truth that leads nowhere": (
        lambda r: replace(r, "ground_truth", "/nowhere"),
        "ground_truth is a link to nothing",
    ),
    "a type's masks that lead nowhere": (
        lambda r: replace(r, "ground_truth/bent", "/nowhere"),
        "bent is a link to nothing",
    ),
    # train
    "train/good empty": (
        lambda r: [p.unlink() for p in (r / "train/good").iterdir()],
        "holds no image",
    ),
    "train/good with one image": (
        lambda r: [(r / f"train/good/{i}.png").unlink() for i in range(3)],
        "at least 2 images",
    ),
    "train/good with folders": (lambda r: draw(r / "train/good/more/9.png"), "move it up into"),
    "train/good with folders alone": (
        lambda r: move(r, ("train/good", "train/x"), ("train/x", "train/good/x")),
        "move it up into",
    ),
    "train/good with an empty folder": (lambda r: (r / "train/good/more").mkdir(), WHOLE),
    **{
        f"train/{name}": (lambda r, name=name: move(r, ("train/good", f"train/{name}")), WHOLE)
        for name in ("Good", "OK", "i.O.", "Gutteile")
    },
    "Training/good": (lambda r: move(r, ("train", "Training")), WHOLE),
    "train and Training": (lambda r: draw(r / "Training/good/9.png"), "both mean train"),
    "train/good and train/ok": (lambda r: draw(r / "train/ok/9.png"), (4, 1, 4)),
    "train/good and train/bad": (lambda r: draw(r / "train/bad/9.png"), WHOLE),
    "train/good and train/masks": (lambda r: draw(r / "train/masks/9.png"), WHOLE),
    "train/good and train/blue": (lambda r: draw(r / "train/blue/9.png"), "does not say whether"),
    "images beside train/good": (lambda r: draw(r / "train/9.png"), "lies directly in train"),
    "masks beside good images": (lambda r: draw(r / "train/good/0_mask.png"), WHOLE),
    "bad beside train": (lambda r: draw(r / "bad/9.png"), "is not known what it is for"),
    "a folder of another kind beside train": (lambda r: draw(r / "drawings/9.png"), WHOLE),
    "train without good": (
        lambda r: (
            [move(r, (f"train/good/{i}.png", f"train/{i}.png")) for i in range(4)]
            and shutil.rmtree(r / "train/good")
        ),
        "but no train/good",
    ),
    "train/good that is a file": (
        lambda r: replace(r, "train/good"),
        "good is a file, not a folder",
    ),
    "train/good that leads nowhere": (
        lambda r: replace(r, "train/good", "/nowhere"),
        "good is a link to nothing",
    ),
    "a loop in train/good": (lambda r: (r / "train/good/loop").symlink_to("."), WHOLE),
    "a link up in train/good": (lambda r: (r / "train/good/up").symlink_to(r), "move it up into"),
    "another suffix alone": (
        lambda r: (plain(r, "0.png"), (r / "0.png").rename(r / "0.raw")),
        "holds no image",
    ),
    # validation
    "validation": (lambda r: draw(r / "validation/good/9.png"), (4, 1, 4)),
    "validation empty": (lambda r: (r / "validation/good").mkdir(parents=True), "holds no image"),
    "validation without good": (
        lambda r: draw(r / "validation/9.png"),
        "validation/good does not exist",
    ),
    "validation that is a file": (
        lambda r: replace(r, "validation"),
        "validation is a file, not a folder",
    ),
    "validation that leads nowhere": (
        lambda r: replace(r, "validation", "/x/y"),
        "validation is a link to nothing",
    ),
    "validation that is training": (
        lambda r: (r / "validation").mkdir() or replace(r, "validation/good", r / "train/good"),
        "is in the train and in the validation split",
    ),
    # test
    "no test at all": (
        lambda r: [shutil.rmtree(r / n) for n in ("test", "ground_truth")],
        (3, 1, 0),
    ),
    "no good test images": (lambda r: shutil.rmtree(r / "test/good"), (3, 1, 2)),
    "test images beside their folders": (lambda r: draw(r / "test/0.png"), "lies directly in test"),
    "a text beside them": (lambda r: (r / "test/readme.txt").touch(), WHOLE),
    "a type without images": (lambda r: (r / "test/dent").mkdir(), "dent holds no image"),
    "a type with folders": (lambda r: draw(r / "test/bent/more/0.png"), "move it up into"),
    "test that is a file": (lambda r: replace(r, "test"), "test is a file, not a folder"),
    "test that leads nowhere": (
        lambda r: replace(r, "test", "/nowhere"),
        "test is a link to nothing",
    ),
    "a type that leads nowhere": (
        lambda r: replace(r, "test/bent", "/nowhere"),
        "bent is a link to nothing",
    ),
    "a type that leads to itself": (
        lambda r: replace(r, "test/bent", "bent"),
        "Too many levels of symbolic links",
    ),
    "a test image that is trained on": (
        lambda r: replace(r, "test/good/0.png", r / "train/good/0.png"),
        "split of",
    ),
    **{
        f"test/{name}": (lambda r, name=name: move(r, ("test/good", f"test/{name}")), WHOLE)
        for name in ("Good", "GOOD", "ok", "OK", "normal", "good ")
    },
    "test/ok beside test/good": (lambda r: draw(r / "test/ok/0.png"), (3, 1, 5)),
    **{
        f"test/{name}": (
            lambda r, name=name: draw(r / f"test/{name}/0.png"),
            "as good or as a kind of anomaly",
        )
        for name in ("positive", "almost good", "pass through", "good and bad", "class_1")
    },
    **{
        f"test/{name}": (lambda r, name=name: draw(r / f"test/{name}/0.png"), (3, 1, 5))
        for name in ("mixed", "half full", "label missing", "combined")
    },
    "test and test_public": (lambda r: draw(r / "test_public/good/9.png"), "both mean test"),
    "val": (lambda r: draw(r / "val/good/9.png"), (4, 1, 4)),
    "masks": (lambda r: move(r, ("ground_truth", "masks")), WHOLE),
    "masks and ground_truth": (lambda r: draw(r / "masks/bent/0_mask.png"), "both mean mask"),
    "ground_truth below test": (lambda r: move(r, ("ground_truth", "test/ground_truth")), WHOLE),
    "masks beside test images": (
        lambda r: (
            [
                move(r, (f"ground_truth/bent/{i}_mask.png", f"test/bent/{i}_GT.png"))
                for i in range(2)
            ]
            and shutil.rmtree(r / "ground_truth")
        ),
        WHOLE,
    ),
    "a mask beside one test image alone": (
        lambda r: shutil.rmtree(r / "ground_truth") or draw(r / "test/bent/0_mask.png"),
        "has no mask, but others",
    ),
    "masks in a folder below test images": (
        lambda r: move(r, ("ground_truth/bent", "test/bent/masks"), ("ground_truth", "x")),
        WHOLE,
    ),
    "test/not good": (lambda r: draw(r / "test/not good/0.png"), (3, 1, 5)),
    # special files
    "a config that is a pipe": (
        lambda r: os.mkfifo(r / "defects_config.json"),
        "is no regular file",
    ),
    "a config that leads nowhere": (
        lambda r: replace(r, "defects_config.json", "/x"),
        "is no regular file",
    ),
    "a pipe among the types": (lambda r: os.mkfifo(r / "test/pipe"), WHOLE),
    # no layout
    "images alone": (lambda r: plain(r, "0.png", "1.png", "2.png"), (2, 1, 0)),
    "images in folders of one name": (
        lambda r: plain(r, "a/0.png", "b/0.png", "c/0.png"),
        (2, 1, 0),
    ),
    "images beside bad ones": (
        lambda r: plain(r, "0.png", "1.png", "bad/2.png"),
        "not all of them may show good",
    ),
    "a folder linked to itself": (
        lambda r: plain(r, "0.png", "1.png") or (r / "loop").symlink_to(r),
        (1, 1, 0),
    ),
    "a folder linked twice": (
        lambda r: plain(r, "a/0.png", "a/1.png") or (r / "b").symlink_to("a"),
        (1, 1, 0),
    ),
    "two links round": (
        lambda r: (
            plain(r, "a/0.png", "b/1.png")
            or (r / "a/x").symlink_to("../b")
            or (r / "b/y").symlink_to("../a")
        ),
        (1, 1, 0),
    ),
    "a chain of folders": (lambda r: plain(r, "0.png", "/".join("d" * 100) + "/1.png"), (1, 1, 0)),
    "scenarios in it": (
        lambda r: move(r, ("train", "x/train"), ("test", "x/test")),
        "several scenarios",
    ),
    "nothing": (lambda r: plain(r) or r.mkdir(), "holds no image"),
    "a file instead": (lambda r: plain(r) or r.write_bytes(b"PK"), "is a file, not a folder"),
    "nothing at all": (lambda r: plain(r), "is neither a scenario"),
    "a link to nothing": (lambda r: plain(r) or r.symlink_to("/nowhere"), "is neither a scenario"),
    "a table of VisA that is a folder": (
        lambda r: (r.parent / "split_csv/1cls.csv").mkdir(parents=True),
        WHOLE,
    ),
    "a table of VisA that is damaged": (
        lambda r: (
            plain(r, "0.png")
            or (r.parent / "split_csv").mkdir()
            or (r.parent / "split_csv/1cls.csv").write_bytes(b"\xff\xfe")
        ),
        "cannot be read",
    ),
    "a table of VisA that names a line break": (
        lambda r: (
            plain(r, "0.png")
            or (r.parent / "split_csv").mkdir()
            or (r.parent / "split_csv/1cls.csv").write_text(
                'object,split,label,image,mask\npart,train,normal,"a\n\0b.png",\n'
            )
        ),
        "does not exist",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="its files and links are Linux's")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_opens_or_a_sentence_says_why(tmp_path, name):
    change, expected = FOLDERS[name]
    root = tmp_path / "part"
    sound(root)
    change(root)
    try:
        scenario = open_scenario(root)
    except DataError as error:
        message = str(error)
        assert isinstance(expected, str), message
        assert expected in message and printable(str(tmp_path)) in message and ": " in message
        assert len(message.splitlines()) == 1 and message.endswith((".", ")."))
        return
    found = tuple(map(len, (scenario.train, scenario.validation, scenario.test)))
    assert found == expected
    for sample in (*scenario.train, *scenario.validation, *scenario.test):
        assert sample.load().size == (6, 4)
        for path in sample.mask_paths:
            assert np.array_equal(read_mask(path, (6, 4)), MASK > 0)
    good = {"good", "Good", "GOOD", "ok", "OK", "normal", "good "}
    assert all(bool(s.label) == (s.path.parent.name not in good) for s in scenario.test)


def test_there_are_many_of_them():
    refused = sum(isinstance(expected, str) for _, expected in FOLDERS.values())
    assert len(FOLDERS) >= 70 and refused >= 35


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("n" * 300, "is neither a scenario"),
        ("a\0b", "is neither a scenario"),
        ("~nobody-of-this-name/part", "is neither a scenario"),
        ("", "is neither a scenario"),
        ("two\nlines", "'two\\nlines' is neither"),
        ("\udcff", "'\\udcff' is neither"),
    ],
)
def test_paths_that_cannot_be(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    for opened in (open_scenario, open_folder, list_scenarios) if path else (open_scenario,):
        with pytest.raises(DataError) as error:
            opened(path)
        assert words in str(error.value) or opened is not open_scenario
        assert len(str(error.value).splitlines()) == 1 and printable(path)[:20] in str(error.value)


def test_folders_that_may_not_be_opened(nobody):
    names = ("", "train", "train/good", "test", "test/bent", "ground_truth", "ground_truth/bent")
    with nobody() as folder:
        root = folder / "part"
        sound(root)
        for name in (*names, ".."):
            (root / name).chmod(0)
            with pytest.raises(DataError) as error:
                open_folder(root)
            (folder if name == ".." else root / name).chmod(0o755)
            assert "cannot be opened (Permission denied)" in str(error.value)
            assert str(root if name == ".." else root / name) in str(error.value)
        assert len(open_folder(root).test) == 4


# --- the report reads what a scenario's training would --------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("0.png", "bad/1.png"),
        ("a/train/good/0.png", "a/test/bent/0.png"),
        ("0.png", "test/1.png"),
        ("train/0.png", "train/1.png"),
        ("notes.txt",),
    ],
)
def test_the_report_refuses_what_a_scenario_refuses(tmp_path, names):
    for name in names:
        (draw if name.endswith("png") else Path.touch)(tmp_path / name)
    found = []
    for opened in (teacher_check._open_images, open_scenario):
        with pytest.raises(DataError) as error:
            opened(str(tmp_path))
        found.append(str(error.value))
    assert found[0] == found[1]


def test_the_report_takes_all_good_images(tmp_path):
    draw(tmp_path / "x/only.png")
    assert teacher_check._open_images(str(tmp_path)) == [
        tmp_path / "x/only.png"
    ]  # none is held out
    sound(tmp_path / "part")
    assert len(teacher_check._open_images(str(tmp_path / "part")).train) == 3
    assert good_images(tmp_path / "part/train/good") == [
        tmp_path / f"part/train/good/{i}.png" for i in range(4)
    ]


# --- what is held out of folders whose files have the same names ----------------------------------


def named(root, folders, files):
    return [Sample(Path(root, folder, file), 0, "good") for folder in folders for file in files]


def held(samples, **options):
    return {sample.path.parts[-2:] for sample in hold_out(samples, **options)[1]}


def test_images_of_one_name_in_several_folders_are_held_out_together():
    files = [f"{i:03}.png" for i in range(100)]
    found = held(named("/a", ("left", "right"), files), fraction=0.1)
    assert len(found) == 20 and len({file for _, file in found}) == 10
    odd = held(named("/a", ("left", "middle", "right"), files), fraction=0.1)  # 30 of 300: 10 names
    assert len({file for _, file in odd}) == 10
    cut = held(named("/a", ("left", "middle", "right"), files[:10]), fraction=0.1)
    assert len(cut) == 3 and len({file for _, file in cut}) == 1


def test_files_that_all_have_one_name_are_held_out_by_their_folders():
    parts = [f"part {i:03}" for i in range(100)]
    choices = [held(named("/a", parts, ["top.png"]), seed=seed) for seed in range(4)]
    assert len(set(map(frozenset, choices))) == 4  # the seed decides
    assert all(choice != {(part, "top.png") for part in parts[:10]} for choice in choices)
    moved = named("/elsewhere/b", parts[::-1], ["top.png"])
    assert held(moved, seed=2) == choices[2]  # where they lie does not, nor their order
    deeper = [Sample(Path("/a", part, "camera", "top.png"), 0, "good") for part in parts]
    chosen = [{s.path for s in hold_out(deeper, seed=seed)[1]} for seed in (0, 1)]
    assert chosen[0] != chosen[1] and chosen[0] != {s.path for s in deeper[:10]}
