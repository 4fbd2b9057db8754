"""The drawn parts tray: what is on the disk, what is in the pictures, what the masks promise."""

import json

from effad_core.datasets import open_folder, tray
from effad_core.errors import DataError
from parts_tray.parts import silhouette
from parts_tray.scene import (
    LOGICAL,
    STRUCTURAL,
    Drawing,
    View,
    break_rule,
    defect_name,
    defects_config,
    draw,
    normal_parts,
)

import numpy as np
import pytest
from PIL import Image
from skimage.filters import gaussian
from skimage.measure import label, regionprops
from skimage.morphology import dilation

CONFIG = {entry["defect_name"]: entry for entry in defects_config()}
REACH = 32  # pixels that a shadow reaches
NAMES = [name for names in LOGICAL.values() for name in names]
EVERY_DEFECT = [("logical_anomalies", name) for name in NAMES]
EVERY_DEFECT += [("structural_anomalies", name) for name in STRUCTURAL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small tray: three normal images, and eight of each kind to test on."""
    folder = tmp_path_factory.mktemp("data") / "tray"
    tray.write_tray(folder, train=2, validation=1, test=24)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Draws at once, and lists what it drew."""
    drawn = []

    def draw(seed, split, index):
        drawn.append((split, index))
        name = defect_name(split, index)
        masks = (np.eye(4, dtype=bool),) if name else ()
        return Drawing(np.full((4, 4, 3), seed, np.uint8), name, masks)

    monkeypatch.setattr(tray, "draw", draw)
    return drawn


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def anomalies(folder):
    """(image, defect name in the stamp, folder of its masks) of every anomalous image."""
    stamp = json.loads((folder / "tray.json").read_text())
    for name, defects in stamp["images"].items():
        if defects:
            image = folder / name
            yield image, defects[0], folder / "ground_truth" / image.parent.name / image.stem


# --- on the disk -----------------------------------------------------------------------------


def test_layout(folder):
    scenario = open_folder(folder)
    assert [len(s) for s in (scenario.train, scenario.validation, scenario.test)] == [2, 1, 24]
    kinds = [sample.anomaly_type for sample in scenario.test]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "good": 8,
        "logical_anomalies": 8,
        "structural_anomalies": 8,
    }
    assert {s.load().size for s in (*scenario.train, *scenario.test)} == {(480, 480)}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["defects_config.json", "ground_truth", "test", "train", "tray.json", "validation"]
    )
    stamp = json.loads((folder / "tray.json").read_text())
    assert {name for name in stamp["images"]} == {
        path.relative_to(folder).as_posix()
        for split in ("train", "validation", "test")
        for path in (folder / split).rglob("*.png")
    }


def test_config_has_the_keys_and_types_of_mvtec_loco(folder):
    config = json.loads((folder / "defects_config.json").read_text())
    assert config == defects_config()
    for entry in config:
        assert {key: type(value) for key, value in entry.items()} == {
            "defect_name": str,
            "pixel_value": int,
            "saturation_threshold": float if entry["relative_saturation"] else int,
            "relative_saturation": bool,
        }
    values = [entry["pixel_value"] for entry in config]
    assert len(set(values)) == len(values) and min(values) > 0 and max(values) == 255


def test_masks(folder):
    found = list(anomalies(folder))
    assert len(found) == 16
    for image, defect, masks in found:
        entry, paths = CONFIG[defect], sorted(masks.iterdir())
        assert [path.name for path in paths] == [f"{i:03}.png" for i in range(len(paths))]
        assert len(paths) == (2 if defect.startswith("swapped") else 1)
        for path in paths:
            mask = pixels(path)
            assert mask.dtype == np.uint8 and mask.shape == pixels(image).shape[:2]
            assert set(np.unique(mask)) == {0, entry["pixel_value"]}
            area = np.count_nonzero(mask)
            assert area > 150  # 40 pixels where the detector looks, at 256x256
            if entry["relative_saturation"]:
                assert entry["saturation_threshold"] == 1.0 and "structural" in str(path)
            else:
                assert 0 < entry["saturation_threshold"] <= area


def test_every_type_occurs():
    third = tray.COUNTS["test"] // 3
    logical = [defect_name("logical_anomalies", i) for i in range(third)]
    structural = [defect_name("structural_anomalies", i) for i in range(third)]
    assert set(logical) == set(NAMES) and len(LOGICAL) >= 4
    assert set(structural) == set(STRUCTURAL) and len(STRUCTURAL) >= 5
    assert set(CONFIG) == {name.replace(" ", "_") for name in (*NAMES, *STRUCTURAL)}
    counts = [sum(name in names for name in logical) for names in LOGICAL.values()]
    assert max(counts) - min(counts) <= 1


def test_bytes_depend_on_seed_split_and_index_alone(folder, tmp_path):
    tray.write_tray(tmp_path / "again", train=1, validation=1, test=3, workers=1)
    for path in (tmp_path / "again").rglob("*.png"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "again")).read_bytes()
    first = pixels(folder / "train/good/000.png")
    others = [draw(1, "train", 0), draw(0, "train", 1), draw(0, "validation", 0)]
    assert all((first != other.image).mean() > 0.5 for other in others)


def test_tray_folder_draws_once(tmp_path, quick, monkeypatch):
    assert tray.tray_folder(tmp_path / "data") == tmp_path / "data/tray"
    assert len(quick) == 360 and len(open_folder(tmp_path / "data/tray").train) == 200
    tray.tray_folder(tmp_path / "data")
    assert len(quick) == 360
    monkeypatch.setattr(tray, "VERSION", tray.VERSION + 1)
    (tmp_path / "data/tray/train/good/999.png").touch()
    tray.tray_folder(tmp_path / "data")
    assert len(quick) == 720 and not (tmp_path / "data/tray/train/good/999.png").exists()
    assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == [
        "tray"
    ]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("killed")])
def test_interrupted(tmp_path, quick, monkeypatch, interruption):
    tray.write_tray(tmp_path / "old", seed=3)

    def fail(seed, split, index):
        if split == "good":
            raise interruption
        return Drawing(np.zeros((4, 4, 3), np.uint8), "", ())

    with monkeypatch.context() as patch:
        patch.setattr(tray, "draw", fail)
        for name in ("tray", "old"):
            with pytest.raises((KeyboardInterrupt, RuntimeError)):
                tray.write_tray(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["old"]
    assert pixels(tmp_path / "old/train/good/000.png").max() == 3
    tray.tray_folder(tmp_path)
    assert len(open_folder(tmp_path / "tray").test) == 120


def test_a_folder_that_is_not_ours_is_kept(tmp_path, quick):
    target = tmp_path / "tray"
    target.mkdir()
    for content in ("", "{}", '{"drawing": "another", "version": 1}'):
        (target / "tray.json").write_text(content)
        with pytest.raises(DataError, match="holds something else"):
            tray.tray_folder(tmp_path)
        assert (target / "tray.json").read_text() == content and not quick
    (target / "tray.json").unlink()
    tray.tray_folder(tmp_path)  # an empty folder is free
    assert len(quick) == 360


def test_errors_name_the_folder(tmp_path, quick, monkeypatch):
    (tmp_path / "tray").touch()
    with pytest.raises(DataError, match="tray is a file: name a folder"):
        tray.tray_folder(tmp_path)
    with pytest.raises(DataError, match="cannot be written to .*tray/below"):
        tray.write_tray(tmp_path / "tray/below")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="full: the disk is full; free some space"):
        tray.write_tray(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["tray"]


# --- in the pictures -------------------------------------------------------------------------


def things(mask, at_least):
    """Bounding boxes (top, left, bottom, right) of the connected regions of a mask."""
    return [region.bbox for region in regionprops(label(mask)) if region.area >= at_least]


def inspect(image):
    """Read a tray by colour alone: what lies in each compartment, left before right."""
    red, green, blue = np.moveaxis(gaussian(image / 255, 1, channel_axis=2), 2, 0)
    brass = (red - blue > 0.2) & (red - green < 0.25)
    bright = (np.minimum(red, blue) > 0.55) & (abs(red - blue) < 0.1)
    metal = gaussian(bright.astype(float), 3) > 0.25
    top, middle, bottom = slice(40, 185), slice(200, 290), slice(306, 448)
    halves = slice(36, 232), slice(248, 444)
    seen = {}
    seen["nuts"] = [len(things(brass[top, half], 500)) for half in halves]
    seen["washers"] = [len(things(bright[top, half] & ~brass[top, half], 500)) for half in halves]
    seen["blue"] = [bool((blue - red)[middle, half].max() > 0.4) for half in halves]
    seen["orange"] = [bool((red - blue)[middle, half].max() > 0.4) for half in halves]
    screws = [things(metal[bottom, half], 500) for half in halves]
    seen["long"] = [sum(box[3] - box[1] > 130 for box in boxes) for boxes in screws]
    seen["short"] = [sum(box[3] - box[1] <= 130 for box in boxes) for boxes in screws]
    return seen


def rules(colour):
    both, none = [True, True], [False, False]
    return {
        "nuts": [3, 0],
        "washers": [0, 3],
        "blue": both if colour == "blue" else none,
        "orange": both if colour == "orange" else none,
        "long": [2, 0],
        "short": [0, 2],
    }


def test_good_images_obey_the_rules(folder):
    colours = set()
    for path in sorted(folder.glob("*/good/*.png")):
        seen = inspect(pixels(path))
        colours.add("blue" if seen["blue"][0] else "orange")
        assert seen in (rules("blue"), rules("orange")), path
    assert colours == {"blue", "orange"}


BROKEN_RULES = {
    "missing nut": {"nuts": [2, 0]},
    "missing washer": {"washers": [0, 2]},
    "missing long screw": {"long": [1, 0]},
    "missing short screw": {"short": [0, 1]},
    "missing cable": {"blue": [False, False], "orange": [False, False]},
    "surplus nut": {"nuts": [4, 0]},
    "surplus washer": {"washers": [0, 4]},
    "surplus long screw": {"long": [3, 0]},
    "surplus short screw": {"short": [0, 3]},
    "swapped nuts and washers": {"nuts": [0, 3], "washers": [3, 0]},
    "swapped screws": {"long": [0, 2], "short": [2, 0]},
    "long screws for short": {"long": [2, 2], "short": [0, 0]},
    "short screws for long": {"long": [0, 0], "short": [2, 2]},
}


def check_broken_rule(defect, seen):
    """One rule is broken, and in the way that the defect's name says."""
    wrong = {key for key in seen if all(seen[key] != rules(c)[key] for c in ("blue", "orange"))}
    if defect == "mismatched connectors":
        assert seen["blue"] == seen["orange"][::-1] and sum(seen["blue"]) == 1
        assert wrong == {"blue", "orange"}
    else:
        expected = BROKEN_RULES[defect]
        assert {key: seen[key] for key in expected} == expected
        assert wrong == (set() if defect == "missing cable" else set(expected))


@pytest.mark.parametrize(("split", "defect"), EVERY_DEFECT)
def test_images_differ_from_their_normal_twins_where_the_masks_say(split, defect):
    index = [defect_name(split, i) for i in range(40)].index(defect)
    drawing, twin = draw(0, split, index), draw(0, split, index, without_defect=True)
    assert twin.defect == "" and twin.masks == ()
    change = np.abs(drawing.image.astype(int) - twin.image).max(axis=2)
    changed = change > 6
    for mask in drawing.masks:
        entry = CONFIG[defect.replace(" ", "_")]
        if entry["relative_saturation"]:
            assert changed[mask].mean() > 0.5
        else:  # most of a part's area differs
            assert changed[mask].sum() > 0.7 * entry["saturation_threshold"]
    whole = np.logical_or.reduce(drawing.masks)
    assert change[~square_dilation(whole, REACH)].max() == 0
    assert (changed & ~square_dilation(whole, 4)).sum() < 0.4 * changed.sum()
    if split == "logical_anomalies":
        check_broken_rule(defect, inspect(drawing.image))


def square_dilation(mask, reach):
    for shape in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        mask = dilation(mask, np.ones(shape, bool))
    return mask


@pytest.mark.parametrize("defect", NAMES)
def test_saturation_fits_into_every_mask(defect):
    """Of every logical type, under twenty views, without drawing it."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        view = View(*rng.uniform(-4, 4, 2), rng.uniform(-0.017, 0.017), 1, 0, 0, 0, 0.6)
        parts = normal_parts(rng)
        broken, masks = break_rule(parts, defect, view, rng)
        assert broken != parts
        for mask in masks:
            assert CONFIG[defect.replace(" ", "_")]["saturation_threshold"] <= mask.sum()


def test_parts_never_overlap():
    """Not even a surplus part: each kind's silhouettes are disjoint, and inside their tray."""
    view = View(0, 0, 0, 1, 0, 0, 0, 0.6)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        parts = normal_parts(rng)
        for what in ("nut", "washer", "long screw", "short screw"):
            parts, _ = break_rule(parts, f"surplus {what}", view, rng)
        parts = [part for part in parts if part.kind != "cable"]
        assert len(parts) == 3 + 3 + 2 + 2 + 4 + 2
        covered = sum(silhouette(part, view).astype(int) for part in parts)
        assert covered.max() == 1
