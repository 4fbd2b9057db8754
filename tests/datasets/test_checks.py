"""What a run will read is looked at before: it says what `read_image` says, and decodes little."""

import os
from dataclasses import replace

from effad_core.datasets import Sample, Scenario, checks, read_image
from effad_core.datasets.checks import check_scenario, image_size
from effad_core.errors import DataError

import numpy as np
import pytest
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def save(path, pixels=NOISE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    options = {} if orientation is None or suffix == "bmp" else {"exif": rotated(orientation)}
    path = save(tmp_path / f"image.{suffix}", **options)
    assert image_size(path) == read_image(path).size


def test_a_whole_png_or_jpeg_is_not_decoded(tmp_path, monkeypatch):
    paths = [save(tmp_path / name) for name in ("a.png", "b.jpg", "c.JPEG")]
    paths.append(save(tmp_path / "d.jpg", exif=rotated(6)))

    def decoded(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(checks, "read_image", decoded)
    assert [image_size(path) for path in paths] == [(40, 24)] * 3 + [(24, 40)]


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_a_file_copied_in_part_is_refused_as_it_would_be_when_read(tmp_path, suffix):
    content = save(tmp_path / f"whole.{suffix}").read_bytes()
    path, refused = tmp_path / f"part.{suffix}", 0
    for length in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        try:
            expected = read_image(path).size
        except DataError as error:
            refused += 1
            with pytest.raises(DataError) as found:
                image_size(path)
            assert str(found.value) == str(error)
        else:
            assert image_size(path) == expected
    assert refused > 10


def test_what_is_no_image_file(tmp_path):
    (tmp_path / "text.jpg").write_text("no image, though it ends like one\xff\xd9", "latin-1")
    for name in ("absent.png", "", "text.jpg"):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            image_size(tmp_path / name)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(DataError, match="no regular file"):
            image_size(tmp_path / "pipe.png")


@pytest.fixture
def part(tmp_path):
    """A scenario with two kinds of anomalies, all with masks."""
    normal = [Sample(save(tmp_path / f"{n}.png"), 0, "good") for n in range(4)]
    white = np.full((24, 40), 255, np.uint8)
    anomalous = [
        Sample(
            save(tmp_path / f"{kind}{n}.png"), 1, kind, (save(tmp_path / f"{kind}{n}m.png", white),)
        )
        for kind in ("crack", "dirt")
        for n in range(2)
    ]
    return Scenario(
        "part", tuple(normal[:2]), tuple(normal[2:3]), (*normal[3:], *anomalous), "drawn", "CC0"
    )


def with_mask(part, path):
    """The scenario whose last test image has this mask."""
    *others, last = part.test
    return replace(part, test=(*others, replace(last, mask_paths=(path,))))


def test_a_scenario_without_faults_has_no_sentences(part):
    assert check_scenario(part, both_kinds=True) == []


def test_a_test_image_of_another_camera_is_refused(part, tmp_path):
    """12 bits in the training images, 16 in a test image."""

    def deep(name, highest):
        values = np.linspace(0, highest, 24 * 40).reshape(24, 40).astype(np.uint16)
        return Sample(save(tmp_path / name, values), 0, "good")

    train = (deep("12.png", 4095),)
    assert check_scenario(replace(part, train=train, test=(*part.test, deep("b.png", 4000)))) == []
    with pytest.raises(DataError, match=r"16.png has values up to 65535"):
        check_scenario(replace(part, train=train, test=(*part.test, deep("16.png", 65535))))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_unreadable_image_of_any_split_is_named(part, split):
    path = getattr(part, split)[0].path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{path.name} cannot be read as an image"):
        check_scenario(part)


def test_masks_that_cannot_be_used(part, tmp_path):
    black, small = np.zeros((24, 40), np.uint8), np.full((12, 20), 255, np.uint8)
    image = part.test[-1].path
    for name, pixels, message in (
        ("black.png", black, f"is all black: .* or remove both it and its image {image}"),
        ("small.png", small, "has 20x12 pixels but its image has 40x24"),
        ("lossy.jpg", black + 255, "is a JPEG"),
        ("absent.png", None, "does not exist"),
    ):
        path = tmp_path / name if pixels is None else save(tmp_path / name, pixels)
        with pytest.raises(DataError, match=f"{path} {message}"):
            check_scenario(with_mask(part, path))


def test_a_mask_of_several_may_be_removed_alone(part, tmp_path):
    black = save(tmp_path / "black.png", np.zeros((24, 40), np.uint8))
    *others, last = part.test
    last = replace(last, mask_paths=(*last.mask_paths, black))
    with pytest.raises(DataError, match=r"mark the defect in it, or remove it\.$"):
        check_scenario(replace(part, test=(*others, last)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_mask_drawn_on_the_image_before_its_rotation(part, tmp_path, suffix):
    turned = save(tmp_path / f"turned.{suffix}", exif=rotated(6))
    *others, last = part.test
    sideways = replace(part, test=(*others, replace(last, path=turned)))
    with pytest.raises(DataError, match="has 40x24 pixels but its image has 24x40"):
        check_scenario(sideways)
    upright = save(tmp_path / "upright.png", np.full((40, 24), 255, np.uint8))
    assert check_scenario(with_mask(sideways, upright)) == []


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [("", "test images"), ("good", "anomalous test images"), ("crack", "normal test images")],
)
def test_without_test_images_of_both_kinds(part, kept, lacking):
    some = replace(part, test=tuple(s for s in part.test if s.anomaly_type == kept))
    sentence = f"The scenario part has no {lacking}"
    assert [s.startswith(f"{sentence}: no image metrics") for s in check_scenario(some)] == [True]
    with pytest.raises(DataError, match=f"{sentence}, but AU-ROC compares .* `effad train`"):
        check_scenario(some, both_kinds=True)


def test_masks_that_are_missing_are_counted(part):
    def without(*kinds):
        test = [replace(s, mask_paths=()) if s.anomaly_type in kinds else s for s in part.test]
        return replace(part, test=tuple(test))

    (none,) = check_scenario(without("crack", "dirt"), both_kinds=True)
    assert none == "The scenario part has no masks: no pixel metrics are measured."
    (some,) = check_scenario(without("dirt"))
    assert "part have no mask (dirt: 2)" in some and "measured of crack alone" in some
    *others, last = without("crack").test
    (few,) = check_scenario(replace(part, test=(*others, replace(last, mask_paths=()))))
    assert "(crack: 2, dirt: 1)" in few and "of no kind of anomaly alone" in few
