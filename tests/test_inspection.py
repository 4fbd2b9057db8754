"""Every image gets its row, whatever its name, mode or state; thresholds come from good ones."""

import csv
import errno
import os
import subprocess
import sys

from effad_core import DataError, OperatingPoint, Sample
from effad_core.deployment import inspection, verdicts
from effad_core.deployment.inspection import fit_thresholds, inspect_images, main
from effad_core.deployment.overlays import OPACITY, UNKNOWN_SCALE, overlay
from effad_core.deployment.verdicts import COLUMNS

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image


def point(threshold):
    return OperatingPoint(threshold, "labels-f1", 9)


@pytest.fixture
def detector(narrow):
    made = narrow()
    made.operating_point, made.pixel_operating_point = point(1.0), point(0.5)
    return made


def rows(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def overlays(folder):
    root = folder / "overlays"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


# --- rows ----------------------------------------------------------------------------------------


def test_the_rows_say_what_predict_says(judging, drawn, tmp_path):
    out, options = tmp_path / "out", {"batch_size": 3}
    found = inspect_images(judging, drawn[0].parent, out, **options)
    text = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert [row["image"] for row in rows(tmp_path / "out")] == [path.name for path in drawn]
    for path, row in zip(drawn, rows(tmp_path / "out"), strict=True):
        alone = judging.predict(path)
        assert float(row["score"]) == pytest.approx(alone.score, rel=1e-4)
        assert float(row["threshold"]) == judging.threshold
        assert row["is_anomalous"] == str(float(row["score"]) > float(row["threshold"]))
        assert (row["width"], row["height"], row["error"]) == ("280", "264", "")
        share = (alone.map > judging.pixel_threshold).sum() / (280 * 264)
        assert float(row["anomalous_area"]) == pytest.approx(share, abs=1e-4)
        at_peak = alone.map[int(row["peak_y"]), int(row["peak_x"])]
        assert at_peak == pytest.approx(alone.map.max(), rel=1e-4)
    assert (found.images, found.anomalous, found.normal, found.unreadable) == (8, 4, 4, 0)
    assert found.errors == () and str(found).startswith("8 images: 4 anomalous, 4 normal, 0 unread")
    assert str(judging.operating_point) in str(found) and str(tmp_path / "out") in str(found)
    assert overlays(tmp_path / "out") == [f"{path.name}.png" for path in drawn]


def test_folders_paths_and_samples_are_the_same_images(detector, drawn, tmp_path, monkeypatch):
    paths = [picture(tmp_path / "in" / name, seed=1) for name in ("a.png", "b/c.png")]
    samples = [Sample(path, index % 2, "x") for index, path in enumerate(paths)]
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(path) for path in paths]
    contents = []
    for number, images in enumerate((tmp_path / "in", samples, iter(relative))):
        inspect_images(detector, images, tmp_path / str(number), overlays=False)
        contents.append((tmp_path / str(number) / "predictions.csv").read_bytes())
        assert not (tmp_path / str(number) / "overlays").exists()
    assert contents[0] == contents[1] == contents[2]
    for number, image in enumerate((drawn[0], str(drawn[0]), [drawn[0]])):
        inspect_images(detector, image, tmp_path / f"one{number}")
        assert [row["image"] for row in rows(tmp_path / f"one{number}")] == [drawn[0].name]


NAMES = (
    *("a.png", "a.jpg", "a.png.png", "deep/er/a.png", "deep/a.png", "Prüfung 検査/é.png"),
    *('x,y;"z".png', "two\nlines.png", "two\r\nlines.png", " space .png", "'.png", "%s{0}.png"),
    *("=1+2.png", "+1.png", "-1.png", "@SUM(A1).png", "\ttab.png", "=cmd/a.png", "a=1.png"),
)


def test_names_that_collide_or_need_quoting(detector, tmp_path):
    for seed, name in enumerate(NAMES):
        picture(tmp_path / "in" / name, seed=seed)
    found = inspect_images(detector, tmp_path / "in", tmp_path / "out")
    cells = [row["image"] for row in rows(tmp_path / "out")]
    assert found.images == len(set(cells)) == len(NAMES) and found.errors == ()
    files = {tmp_path / "in" / name for name in NAMES}
    assert {tmp_path / "in" / cell for cell in cells} == files  # a cell can be opened as it is
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert {"./=1+2.png", "./-1.png", "./=cmd/a.png", "a=1.png"} <= set(cells)
    assert overlays(tmp_path / "out") == sorted(f"{name}.png" for name in NAMES)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_name_that_is_no_utf8(detector, tmp_path, capsys):
    bad = os.fsdecode(b"\xff.png")
    picture(tmp_path / "in" / bad)
    (tmp_path / "in" / os.fsdecode(b"\xfe.png")).touch()
    found = inspect_images(detector, tmp_path / "in", tmp_path / "out")
    assert [row["image"] for row in rows(tmp_path / "out")] == ["\\udcfe.png", "\\udcff.png"]
    assert overlays(tmp_path / "out") == [f"{bad}.png"]
    print(str(found).encode("utf-8").decode("utf-8"))  # a terminal can show it
    assert "1 unreadable" in capsys.readouterr().out


def test_images_of_every_kind(detector, tmp_path):
    root = tmp_path / "in"
    sizes = {"rgb.png": (40, 30), "tall.png": (3, 500), "dot.png": (1, 1), "large.bmp": (900, 700)}
    for name, size in sizes.items():
        picture(root / name, size)
    gray = np.linspace(0, 65535, 60 * 50).reshape(50, 60)
    Image.fromarray(gray.astype(np.uint16)).save(root / "deep.tif")
    Image.fromarray(np.uint8(gray / 257)).save(root / "gray.PNG")
    Image.fromarray(np.uint8(gray / 257)).convert("RGBA").save(root / "alpha.webp")
    Image.fromarray(np.uint8(gray / 257)).convert("CMYK").save(root / "print.jpg", quality=95)
    rotated = Image.Exif()
    rotated[274] = 6
    Image.fromarray(np.uint8(gray / 257)).save(root / "rotated.jpg", exif=rotated)
    found = inspect_images(detector, root, tmp_path / "out")
    assert found.unreadable == 0 and found.images == 9
    by_name = {row["image"]: row for row in rows(tmp_path / "out")}
    expected = sizes | dict.fromkeys(("deep.tif", "gray.PNG", "alpha.webp", "print.jpg"), (60, 50))
    for name, size in (expected | {"rotated.jpg": (50, 60)}).items():
        row = by_name[name]
        assert (int(row["width"]), int(row["height"])) == size, name
        assert int(row["peak_x"]) < size[0] and int(row["peak_y"]) < size[1]
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as shown:
            assert shown.size == size and shown.mode == "RGB"
    deep, plain = (float(by_name[name]["score"]) for name in ("deep.tif", "gray.PNG"))
    assert deep == pytest.approx(plain, rel=0.05)


def test_unreadable_images_have_a_row_and_stop_nothing(detector, drawn, tmp_path):
    images = list(drawn[:3])
    for name, content in {
        "empty.png": b"",
        "text.png": b"this is no image",
        "cut.png": drawn[3].read_bytes()[:5000],
    }.items():
        (tmp_path / name).write_bytes(content)
        images.insert(1, tmp_path / name)
    images += [tmp_path / "absent.png", tmp_path / ("n" * 300 + ".png")]
    (tmp_path / "folder.png").mkdir()
    images.append(tmp_path / "folder.png")
    found = inspect_images(detector, images, tmp_path / "out", batch_size=2)
    table = rows(tmp_path / "out")
    assert [row["image"].rpartition("/")[2] for row in table] == [path.name for path in images]
    assert found.unreadable == 6 and found.images == 9 and len(found.errors) == 6
    assert "and 1 more errors" in str(found) and "6 unreadable" in str(found)
    for path, row in zip(images, table, strict=True):
        if path in drawn:
            alone = detector.predict(path).score
            assert float(row["score"]) == pytest.approx(alone, rel=1e-4) and row["error"] == ""
        else:
            assert path.name in row["error"] and "\n" not in row["error"]
            assert set(row.values()) == {row["image"], row["error"], ""}
    only = inspect_images(detector, [tmp_path / "empty.png"], tmp_path / "out")
    assert str(only).startswith("1 images: 0 anomalous, 0 normal, 1 unreadable")
    assert overlays(tmp_path / "out") == []


def test_an_overlay_that_cannot_be_written_costs_no_score(detector, tmp_path):
    picture(tmp_path / "in/b.png")
    picture(tmp_path / "in/b.png.png/c.png")  # its overlays' folder takes the name of b.png's
    picture(tmp_path / "in/d.png")
    found = inspect_images(detector, tmp_path / "in", tmp_path / "out")
    assert found.unreadable == 0 and len(found.errors) == 1 and "cannot be written" in str(found)
    table = rows(tmp_path / "out")
    assert sum(row["error"] != "" for row in table) == 1 and all(row["score"] for row in table)


def refusal(detector, images, folder):
    """The one sentence on a table that cannot be written."""
    with pytest.raises(DataError) as error:
        inspect_images(detector, images, folder)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.endswith("choose another output folder.")
    return message


@pytest.mark.skipif(sys.platform != "linux", reason="its pipes, links and limits are Linux's")
def test_a_table_that_cannot_be_written(detector, tmp_path, monkeypatch):
    image, out = picture(tmp_path / "in/a.png"), tmp_path / "out"
    inspect_images(detector, image, out)
    table, kept = out / "predictions.csv", out / "kept.csv"
    table.rename(kept)
    for make in (table.mkdir, lambda: os.mkfifo(table), lambda: table.symlink_to("/dev/full")):
        make()
        assert f"{table} is no file" in refusal(detector, image, out)  # and does not wait
        table.rmdir() if table.is_dir() else table.unlink()
    kept.rename(table)
    assert overlays(out) == ["a.png.png"]  # nothing was deleted
    (tmp_path / "file").touch()
    for folder, words in (
        (tmp_path / "file", "file cannot be written (File exists)"),
        (tmp_path / "file/out", "file/out cannot be written (Not a directory)"),
        (tmp_path / ("n" * 300), "(File name too long)"),
    ):
        assert words in refusal(detector, image, folder)

    class FullDisk(csv.DictWriter):
        def writerow(self, row):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verdicts.csv, "DictWriter", FullDisk)
    assert f"{table} cannot be written (No space left on device): make room" in refusal(
        detector, image, out
    )


def test_a_table_that_may_not_be_written(detector, tmp_path, nobody):
    inspect_images(detector, picture(tmp_path / "a.png"), tmp_path / "out")
    with nobody() as folder:
        image = picture(folder / "a.png")
        (folder / "out/overlays").mkdir(parents=True)
        (folder / "out/overlays/a.png.png").touch()
        (folder / "out/predictions.csv").write_text(",".join(COLUMNS))
        (folder / "out/predictions.csv").chmod(0o400)
        (folder / "closed").mkdir(0o500)
        for name in ("out", "closed"):
            words = f"{folder / name}/predictions.csv cannot be written (Permission denied)"
            assert words in refusal(detector, image, folder / name)
        assert overlays(folder / "out") == ["a.png.png"]  # nothing was deleted


ODD = {  # name -> what its row's error says; None: it is judged
    "good.png": None,
    "empty.png": "is empty",
    "=cmd|' !A0.png": "is empty",
    "＝1.png": None,
    "\n=1.png": None,
    "a,b;c.png": "is empty",
    'say "no".png': "is empty",
    "two\nlines.png": "is empty",
    "page.jpg": "is a web page",
    "pointer.png": "git lfs pull",
    "pipe.png": "is no regular file",
    "nowhere.png": "is a link to nothing",
    "loop.png": "symbolic links",
    "x" * 250 + ".png": "overlay",  # its overlay's name is too long, its score is there
    "\udcff.png": "is empty",
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_damaged_images_among_sound_ones(detector, tmp_path, command):
    root = tmp_path / "in"
    root.mkdir()
    for name, words in ODD.items():
        if words is None or words == "overlay":
            picture(root / name)
        else:
            (root / name).touch()
    (root / "page.jpg").write_text("<!DOCTYPE html><html>")
    (root / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("pipe", "nowhere", "loop"):
        (root / f"{name}.png").unlink()
    os.mkfifo(root / "pipe.png")
    (root / "nowhere.png").symlink_to("/nowhere/x.png")
    (root / "loop.png").symlink_to("loop.png")
    found = inspect_images(detector, root, tmp_path / "out")
    table = {row["image"].removeprefix("./"): row for row in rows(tmp_path / "out")}
    assert len(table) == len(ODD) and not any(
        row["image"].startswith(tuple("=+-@\t\r\n＝＋－＠")) for row in table.values()
    )
    for name, words in ODD.items():
        row = table[name.encode("utf-8", "backslashreplace").decode()]
        assert (row["score"] != "") == (words in (None, "overlay")), name
        assert (words or "") in row["error"] and (words is not None or row["error"] == "")
        assert len(row["error"].splitlines()) <= 1 and not row["error"].startswith(tuple("=+-@"))
    assert found.unreadable == len(ODD) - 4 and len(found.errors) == len(ODD) - 3
    out = tmp_path / os.fsdecode(b"out\xff\n")
    code, text, error = command(tmp_path / "detector.safetensors", root, "--output", out)
    assert code == 1 and "\\udcff\\n" in text.splitlines()[-1] and "Traceback" not in error
    assert [row["score"] for row in rows(out)] == [row["score"] for row in rows(tmp_path / "out")]


def test_without_thresholds(narrow, drawn, tmp_path):
    found = inspect_images(narrow(), drawn[:2], tmp_path)
    for row in rows(tmp_path):
        empty = {name for name, cell in row.items() if cell == ""}
        assert empty == {"threshold", "is_anomalous", "anomalous_area", "unit_score", "error"}
    assert (found.anomalous, found.normal, found.unjudged) == (0, 0, 2)
    assert "2 images: 2 scored, 0 unreadable\nthe detector has no threshold" in str(found)
    assert "no pixel threshold" in str(found) and found.scale == UNKNOWN_SCALE
    half = narrow()
    half.pixel_operating_point = point(0.25)
    found = inspect_images(half, drawn[:2], tmp_path, overlays=False)
    assert all(row["anomalous_area"] and not row["is_anomalous"] for row in rows(tmp_path))
    assert found.scale is None and "colours" not in str(found)
    half.pixel_operating_point = point(-1.0)  # every pixel is above
    assert inspect_images(half, drawn[:2], tmp_path).scale == UNKNOWN_SCALE
    assert {row["anomalous_area"] for row in rows(tmp_path)} == {"1.0"}


# --- runs ----------------------------------------------------------------------------------------


def spied(detector, monkeypatch, stop_after=None):
    """The sizes of the batches that go through the detector."""
    batches, maps = [], detector.combined_maps

    def spy(images):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(len(images))
        return maps(images)

    monkeypatch.setattr(detector, "combined_maps", spy)
    return batches


def test_only_one_batch_is_in_memory(detector, drawn, tmp_path, monkeypatch):
    batches = spied(detector, monkeypatch)
    inspect_images(detector, drawn[:7], tmp_path, overlays=False, batch_size=3)
    assert batches == [3, 3, 1]
    monkeypatch.setattr("effad_core.prediction.BATCH_PIXELS", 280 * 264 + 1)
    inspect_images(detector, drawn[:5], tmp_path, overlays=False)
    assert batches[3:] == [2, 2, 1]  # the second image fills the batch


def test_rows_are_on_disk_before_the_next_batch_is_predicted(
    detector, drawn, tmp_path, monkeypatch
):
    on_disk, maps = [], detector.combined_maps

    def spy(images):
        on_disk.append(len(rows(tmp_path)))
        return maps(images)

    monkeypatch.setattr(detector, "combined_maps", spy)
    inspect_images(detector, drawn[:5], tmp_path, overlays=False, batch_size=2)
    assert on_disk == [0, 2, 4]


def test_an_interrupted_call_keeps_its_rows_and_the_next_one_starts_over(
    detector, drawn, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        spied(detector, patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            inspect_images(detector, drawn, tmp_path, batch_size=3)
    assert [row["image"] for row in rows(tmp_path)] == [path.name for path in drawn[:6]]
    assert len(overlays(tmp_path)) == 6
    inspect_images(detector, drawn[4:], tmp_path)
    assert [row["image"] for row in rows(tmp_path)] == [path.name for path in drawn[4:]]
    assert overlays(tmp_path) == [f"{path.name}.png" for path in drawn[4:]]


def test_what_must_not_be_overwritten(detector, narrow, drawn, tmp_path):
    root = tmp_path / "in"
    picture(root / "a.png")
    (tmp_path / "link").symlink_to(root)
    for folder in (root, root / "out", tmp_path / "link" / "out"):
        with pytest.raises(DataError, match="lies inside the images' folder"):
            inspect_images(detector, root, folder)
    inspect_images(detector, root, tmp_path / "out")
    before = (tmp_path / "out/predictions.csv").read_bytes()
    again = tmp_path / "out/overlays/a.png.png"
    with pytest.raises(DataError, match=r"a\.png\.png lies among the output's overlays"):
        inspect_images(detector, [again], tmp_path / "out")
    (tmp_path / "mine").symlink_to(tmp_path / "out/overlays")
    for images in (tmp_path / "mine", tmp_path / "out/overlays"):
        with pytest.raises(DataError, match="lies among the output's overlays"):
            inspect_images(detector, images, tmp_path / "out")
    untrained = narrow()
    untrained.quantiles.fill_(np.nan)
    for images, model, message in (
        (root, untrained, "no quantiles"),
        ([], detector, "no images to inspect"),
        ([drawn[0], drawn[0].parent / "." / drawn[0].name], detector, "is given more than once"),
        (tmp_path / "absent", detector, "does not exist"),
        (tmp_path / "out" / "empty", detector, "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_images(model, images, tmp_path / "out")
    assert (tmp_path / "out/predictions.csv").read_bytes() == before and again.exists()
    (tmp_path / "out/predictions.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(DataError, match="is of another program"):
        inspect_images(detector, root, tmp_path / "out")
    assert "label" in (tmp_path / "out/predictions.csv").read_text() and again.exists()
    (root / "predictions.csv").touch()
    inspect_images(detector, drawn[:1], root)
    assert len(rows(root)) == 1 and (root / "a.png").exists()


# --- overlays ------------------------------------------------------------------------------------


def test_the_colour_scale_is_fixed():
    gray = Image.new("RGB", (5, 4), (100, 120, 140))
    levels = np.array([0.0, 0.1, 0.4, -7.0, 9.0])
    shown = np.asarray(overlay(gray, np.tile(levels, (4, 1)), scale=0.4))
    colours = 255 * colormaps["inferno"](np.clip(levels / 0.4, 0, 1))[:, :3]
    share = OPACITY * np.clip(levels / 0.4, 0, 1)[:, None]
    expected = share * colours + (1 - share) * [100, 120, 140]
    np.testing.assert_allclose(shown, np.broadcast_to(expected, (4, 5, 3)), atol=3)
    assert (shown[:, [0, 3]] == [100, 120, 140]).all()  # nothing there, nothing drawn
    other = np.asarray(overlay(gray, np.full((4, 5), 0.1), scale=0.4))
    assert (other[0, 0] == shown[0, 1]).all()  # whatever else the map holds


def test_the_scale_is_twice_the_pixel_threshold(detector, drawn, tmp_path):
    found = inspect_images(detector, drawn[:2], tmp_path)
    assert found.scale == 1.0 and "0 to 1, the same" in str(found)
    for path in drawn[:2]:
        prediction = detector.predict(path)
        expected = overlay(Image.open(path).convert("RGB"), prediction.map, 1.0, 0.5)
        with Image.open(tmp_path / "overlays" / f"{path.name}.png") as shown:
            difference = np.abs(np.int16(shown) - np.int16(expected))
        assert (difference.max(axis=2) > 2).mean() < 1e-3  # a contour may lie a pixel beside it


@pytest.mark.parametrize("corner", [(10, 8), (0, 0), (20, 14)])
def test_the_contour_encloses_what_is_above_the_threshold(corner):
    scored = np.zeros((24, 30))
    x, y = corner
    scored[y : y + 10, x : x + 10] = 0.6
    image = Image.new("RGB", (30, 24), (90, 90, 90))
    plain = np.asarray(overlay(image, scored, 1.0))
    shown = np.asarray(overlay(image, scored, 1.0, threshold=0.59))
    above = np.pad(scored > 0.59, 1)  # beyond the border nothing is above
    for row in range(24):
        for column in range(30):
            around = above[row : row + 3, column : column + 3]
            if above[row + 1, column + 1]:
                expected = plain[row, column] if around.all() else (213, 94, 0)  # vermillion
            else:
                expected = (255, 255, 255) if around.any() else plain[row, column]
            assert (shown[row, column] == expected).all(), (row, column)
    for threshold in (0.6, None):  # equal is not above
        np.testing.assert_array_equal(overlay(image, scored, 1.0, threshold), plain)


def test_large_images_get_broader_contours():
    scored = np.zeros((20, 2000))
    scored[:, :1000] = 1
    shown = np.asarray(overlay(Image.new("RGB", (2000, 20)), scored, 2.0, 0.5))
    assert (shown[10, 1000:] == 255).all(axis=1).sum() == 4


# --- thresholds ----------------------------------------------------------------------------------


def good(paths):
    return [Sample(path, 0, "good") for path in paths]


def test_thresholds_from_good_images(narrow, drawn):
    detector = narrow()
    alone = [detector.predict(path) for path in drawn]
    scores = sorted(prediction.score for prediction in alone)
    highest = sorted(float(prediction.map.max()) for prediction in alone)
    points = fit_thresholds(detector, good(drawn), 0.25, guarantee="average")
    assert points == (detector.operating_point, detector.pixel_operating_point)
    assert points[0].threshold == pytest.approx(scores[-2], rel=1e-4)  # 2 / 9 <= 0.25 < 3 / 9
    assert points[1].threshold == pytest.approx(highest[-2], rel=1e-4)
    assert "on average at most 25 % of normal images" in str(points[0])
    assert points[0].expected_fpr == pytest.approx(2 / 9) and points[0].images == 8
    points = fit_thresholds(detector, good(drawn[:4]), 0.5, confidence=0.9)
    highest_of_four = max(prediction.score for prediction in alone[:4])
    assert points[0].threshold == pytest.approx(highest_of_four, rel=1e-4)  # 0.5^4 < 0.1
    assert points[0].kind == points[1].kind == "fpr-confident" and points[0].confidence == 0.9


def test_thresholds_that_cannot_be_found(narrow, drawn, tmp_path, monkeypatch):
    detector = narrow()
    detector.operating_point = before = point(3.0)
    batches = spied(detector, monkeypatch)
    few = r"needs 59 normal images, the 8 given support 0\.31"
    with pytest.raises(ValueError, match=few):
        fit_thresholds(detector, good(drawn), 0.05)
    with pytest.raises(ValueError, match="no good images"):
        fit_thresholds(detector, [], 0.05)
    bad = Sample(drawn[1], 1, "scratch")
    with pytest.raises(ValueError, match=f"{drawn[1].name} is anomalous: thresholds come from"):
        fit_thresholds(detector, [*good(drawn[2:]), bad], 0.4)
    assert batches == []  # all of it is known before any image is scored
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="empty.png is empty"):
        fit_thresholds(detector, good([*drawn[:3], tmp_path / "empty.png"]), 0.6)
    detector.quantiles.fill_(np.nan)
    with pytest.raises(ValueError, match="no quantiles"):
        fit_thresholds(detector, good(drawn), 0.4)
    assert detector.operating_point is before and detector.pixel_operating_point is None


def test_fitted_thresholds_judge_new_images_and_survive_a_file(narrow, drawn, tmp_path):
    detector = narrow()
    fit_thresholds(detector, good(drawn[:2]), 0.5, guarantee="average")
    detector.save(tmp_path / "detector.safetensors")
    loaded = type(detector).load(tmp_path / "detector.safetensors")
    found = [
        inspect_images(made, drawn[2:5], tmp_path / str(number))
        for number, made in enumerate((detector, loaded))
    ]
    assert found[0].operating_point == found[1].operating_point == detector.operating_point
    assert rows(tmp_path / "0") == rows(tmp_path / "1")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(detector, tmp_path, capsys):
    detector.save(tmp_path / "detector.safetensors")

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(part) for part in arguments])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command(command, drawn, tmp_path):
    weights, out = tmp_path / "detector.safetensors", tmp_path / "out"
    code, text, _ = command(weights, drawn[0].parent, "--output", out)
    assert code == 0 and text.startswith("8 images: ") and str(out) in text
    assert len(rows(out)) == len(overlays(out)) == 8
    picture(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").touch()
    code, text, _ = command(weights, tmp_path / "in", "--output", out, "--no-overlays")
    assert code == 1 and "1 unreadable" in text and "b.png is empty" in text
    assert len(rows(out)) == 2 and overlays(out) == []


def test_what_the_command_cannot_do_is_one_sentence(command, drawn, tmp_path, monkeypatch):
    weights, images = tmp_path / "detector.safetensors", drawn[0].parent
    (tmp_path / "none").mkdir()
    for arguments, message in (
        ((tmp_path / "absent", images), "absent does not exist"),
        ((drawn[0], images), "is not a whole safetensors file"),
        ((weights, tmp_path / "absent"), "absent does not exist"),
        ((weights, tmp_path / "none"), "holds no image"),
        ((weights, images, "--output", images / "out"), "lies inside"),
        ((weights, images, "--output", weights), str(weights)),
    ):
        code, text, error = command(*arguments)
        assert code == 2 and text == "" and message in error and len(error.splitlines()) == 1
    assert not (images / "out").exists()
    code, _, error = command(weights)
    assert code == 2 and "usage: effad predict" in error

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_images", interrupted)
    code, _, error = command(weights, images, "--output", tmp_path / "o")
    assert code == 130 and str(tmp_path / "o") in error


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "effad_core", "predict", tmp_path / "absent", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "absent does not exist" in done.stderr
