"""Folders that the user names: in a call, as options of a command, in scenario.toml."""

import argparse

from effad_core.datasets import list_scenarios, open_scenario
from effad_core.datasets.chosen import add_options, given
from effad_core.errors import DataError

import pytest
from PIL import Image


def draw(root, *names, value=0):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4), value).save(root / name)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Folders whose names say nothing or are not known."""
    root = tmp_path / "part"
    for folder in ("0", "1", "2", "blobs"):
        draw(root, *(f"{folder}/{n}.png" for n in range(4)))
    draw(root, *(f"marks/{n}_mask.png" for n in range(4)), value=255)
    monkeypatch.chdir(root)
    return root


def refused(words, *args, **options):
    with pytest.raises(DataError) as error:
        open_scenario(*args, **options)
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
    assert str(error.value).endswith((".", "?"))


def kinds(scenario):
    return sorted({(s.anomaly_type, s.path.parent.name, len(s.mask_paths)) for s in scenario.test})


def check(scenario):
    assert {s.path.parent.name for s in (*scenario.train, *scenario.validation)} == {"0"}
    assert (len(scenario.train), len(scenario.validation)) == (3, 1)
    assert kinds(scenario) == [("blobs", "blobs", 1), ("good", "2", 0)]
    assert all(s.load_mask().all() for s in scenario.test if s.label)


def test_folders_by_name(part):
    options = {"normal_test": part / "2", "masks": "marks", "validation_fraction": 0.25}
    scenario = open_scenario(normal="0", anomalous=["blobs"], **options)
    check(scenario)
    assert scenario.name == "part"
    assert (
        scenario.source == f"normal: 0; anomalous: blobs; normal_test: {part / '2'}; masks: marks"
    )


def test_several_folders_and_files(part):
    scenario = open_scenario(normal=["0", "1/0.png", part / "1/1.png"], anomalous=("2", "blobs"))
    assert len(scenario.train) + len(scenario.validation) == 6
    assert kinds(scenario) == [("2", "2", 0), ("blobs", "blobs", 0)]
    assert open_scenario(normal="0").name == "0" and open_scenario(normal=".").name == "part"


def test_the_file(part, monkeypatch):
    (part / "scenario.toml").write_text(
        'normal = "0"\nanomalous = ["blobs"]  # one kind\nnormal_test = "2"\nmasks = ["marks"]\n'
    )
    assert open_scenario(".").name == "part"
    monkeypatch.chdir(part.parent)
    check(open_scenario(part))
    check(open_scenario("part/"))
    assert list_scenarios(part) == list_scenarios(part.parent) == [part]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("normal = ", "cannot be read as TOML"),
        ("\xff", "cannot be read as TOML"),
        ('anomalous = "blobs"', "names no normal images"),
        ("", "names no normal images"),
        ('normal = "0"\nanomalus = "blobs"', "did you mean anomalous?"),
        ('normal = "0"\ncolour = "blobs"', "use normal, anomalous, normal_test, masks"),
        ("normal = 3", "normal that is no path"),
        ("normal = []", "normal that is no path"),
        ('normal = ["0", 1]', "normal that is no path"),
        ('normal = "nowhere"', "nowhere, named as normal, does not exist"),
        ('normal = "0"\nanomalous = "0"', "is in the"),
    ],
)
def test_a_file_that_cannot_be_used(part, text, words):
    (part / "scenario.toml").write_bytes(text.encode("latin-1"))
    refused(words, part)
    if "is in the" not in words:
        refused(str(part / "scenario.toml"), part)


def test_a_file_that_is_a_folder(part):
    (part / "scenario.toml").mkdir()
    refused("cannot be read as TOML", part)


def test_what_is_refused(part):
    refused("either a source or normal images")
    refused("either a source or normal images", part, normal="0")
    refused("name one as normal", anomalous="blobs")
    refused("name one as normal", normal=[])
    refused("x, named as anomalous, does not exist", normal="0", anomalous="x")
    (part / "notes.txt").touch()
    refused("neither a folder nor an image file", normal="notes.txt")
    (part / "empty").mkdir()
    refused("holds no image", normal="empty")
    refused("holds no image", normal="0", anomalous="blobs", masks="empty")
    refused("fit no anomalous image", normal="0", anomalous="blobs/3.png", masks="marks/0_mask.png")
    refused("has no mask, but others", normal="0", anomalous="blobs", masks="marks/0_mask.png")
    refused("is in the", normal=["0", "1"], anomalous="1")
    refused("include_graded has no meaning for folders", normal="0", include_graded=True)


def test_a_name_below_a_named_folder_must_not_contradict(part):
    draw(part, "0/bad/9.png", "blobs/good/9.png")
    refused("named as normal, but is called otherwise", normal="0")
    refused("named as anomalous, but is called otherwise", normal="1", anomalous="blobs")
    assert len(open_scenario(normal=["1", "0/bad"]).train) == 4  # named as such: it is meant


def test_masks_and_system_files_in_named_folders_are_left_out(part):
    draw(part, "0/0_mask.png", "0/masks/1.png", "0/@eaDir/1.png", "blobs/2_GT.png")
    scenario = open_scenario(normal="0", anomalous="blobs/2.png")
    assert len(scenario.train) + len(scenario.validation) == 4
    assert scenario.ignored == (
        "1 file in @eaDir: thumbnails of a Synology NAS",
        "1 image in masks: the folder's name says masks; name it as masks to use it",
        "1 mask directly in 0: masks of good parts",
    )
    refused("has no mask, but others", normal="0", anomalous="blobs")
    draw(part, *(f"blobs/{n}_GT.png" for n in range(4)))
    assert kinds(open_scenario(normal="1", anomalous="blobs")) == [("blobs", "blobs", 1)]
    refused("keep one", normal="1", anomalous="blobs", masks="marks")


def test_options():
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = [
        "--normal",
        "a",
        "b",
        "--anomalous",
        "c",
        "--normal-test",
        "d",
        "--masks",
        "e",
        "--normal",
        "f",
    ]
    assert given(parser.parse_args(words)) == {
        "normal": ["a", "b", "f"],
        "anomalous": ["c"],
        "normal_test": ["d"],
        "masks": ["e"],
    }
    assert given(parser.parse_args([])) == {}


def test_a_folder_that_is_named_apart_is_no_part_of_the_one_around_it(tmp_path):
    draw(tmp_path, *(f"part/{n}.png" for n in range(4)), "part/returned/0.png")
    draw(tmp_path, "part/m/0_mask.png", value=255)
    part = tmp_path / "part"
    scenario = open_scenario(normal=part, anomalous=part / "returned", masks=part / "m")
    assert {s.path.parent.name for s in (*scenario.train, *scenario.validation)} == {"part"}
    assert kinds(scenario) == [("returned", "returned", 1)]
