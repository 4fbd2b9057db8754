"""Draws repeat with the generator, show what they promise, and never touch the network."""

import socket
import sys
import urllib.error
import urllib.request

from effad_core.datasets import PretrainingImages, open_pretraining, resize, to_tensor
from effad_core.errors import DataError

import numpy as np
import pytest
import torch
from PIL import Image


def rng(seed=0):
    return np.random.default_rng([seed, 5])


def folder_of(folder, count, size=(40, 30)):
    """Images of one colour each, so that a crop tells which image it is from."""
    for i in range(count):
        path = folder / f"n{i % 7:08}" / f"{i:04}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (i, 255 - i, 80)).save(path, "PNG")
    return folder


@pytest.fixture(scope="module")
def photographs():
    return open_pretraining()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)


def test_photographs_ship_with_the_packages(offline):
    images = open_pretraining()
    assert images.paths == open_pretraining("photographs").paths
    names = {path.name for path in images.paths}
    assert {"astronaut.png", "coffee.png", "china.jpg", "flower.jpg"} <= names
    assert len(images) == 12
    sizes = {path.name: images.read(i).size for i, path in enumerate(images.paths)}
    assert sizes["astronaut.png"] == (512, 512) and sizes["china.jpg"] == (640, 427)
    for word in ("12", "scikit-image", "scikit-learn", "CC BY 2.0"):
        assert word in images.describe()


def test_photographs_without_one_or_both_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert len(open_pretraining()) == 10
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(DataError, match="pip install scikit-image scikit-learn"):
        open_pretraining()


def test_a_folder_in_imagenets_layout(tmp_path):
    images = open_pretraining(str(folder_of(tmp_path, 10)))
    assert len(images) == 10 and f"folder {tmp_path.name} " in images.describe()
    assert str(tmp_path.parent) not in images.source  # it goes into runs and cards that are shared
    assert {images.read(i).getpixel((0, 0))[0] for i in range(10)} == set(range(10))


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_unusable_folders(tmp_path, kind):
    path = tmp_path if kind == "empty" else tmp_path / "missing"
    with pytest.raises(DataError) as error:
        open_pretraining(path)
    assert str(path) in str(error.value)


def test_imagenette_offline_is_one_sentence(tmp_path, offline):
    with pytest.raises(DataError) as error:
        open_pretraining("imagenette", root=tmp_path / "new" / "root")
    message = str(error.value)
    assert "imagenette2-320.tgz" in message and "photographs" in message and "\n" not in message
    assert error.value.__suppress_context__


def test_imagenette_that_is_there_is_not_downloaded(tmp_path, offline):
    for split in ("train", "val"):
        parent = tmp_path / "imagenette2-320" / split / "n01440764"
        parent.mkdir(parents=True)
        Image.new("RGB", (8, 6), "green").save(parent / f"{split}.JPEG")
    images = open_pretraining("imagenette", root=tmp_path)
    assert [path.name for path in images.paths] == ["train.JPEG"]  # not the validation images
    assert "Imagenette" in images.describe() and "ImageNet" in images.licence


@pytest.mark.parametrize("draw", ["whole_images", "crops"])
def test_draws_repeat_with_the_generator(photographs, draw):
    batches = [getattr(photographs, draw)(rng(seed), 6, 64) for seed in (0, 0, 1)]
    assert batches[0].dtype == torch.uint8 and batches[0].shape == (6, 3, 64, 64)
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    fresh = open_pretraining(cache_megabytes=0)  # reads every image anew
    assert torch.equal(getattr(fresh, draw)(rng(0), 6, 64), batches[0])
    distinct = {image.numpy().tobytes() for image in getattr(photographs, draw)(rng(2), 30, 16)}
    assert len(distinct) == 30


def test_large_sets_show_whole_images(tmp_path):
    folder_of(tmp_path, 99)
    Image.effect_noise((37, 53), 60).save(tmp_path / "noise.png")
    images = open_pretraining(tmp_path)
    assert len(images) == 100
    noise = next(i for i, path in enumerate(images.paths) if path.name == "noise.png")
    batch = images.whole_images(rng(), 600, 16)
    expected = to_tensor(resize(images.read(noise), 16))
    assert any(torch.equal(image, expected) for image in batch)
    reds = {int(image[0, 0, 0]) for image in batch if int(image[2].float().std() == 0)}
    assert len(reds) > 80  # every image has its turn


def ramp_images(tmp_path, width=256, height=200):
    """One image, red = x, green = y, blue 0: a crop tells its place, width and mirroring."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    Image.fromarray(np.dstack([x, y, 0 * x])).save(tmp_path / "ramp.png")
    return open_pretraining(tmp_path)


def spans(batch):
    """Source pixels from the left to the right column, positive unless mirrored, and top down."""
    batch = batch.float()
    wide = batch[:, 0, 0, -1] - batch[:, 0, 0, 0]
    high = batch[:, 1, -1, 0] - batch[:, 1, 0, 0]
    return wide.numpy(), high.numpy()


def test_crops_have_the_magnification_asked_for(tmp_path):
    images = ramp_images(tmp_path)
    wide, high = spans(images.crops(rng(), 400, 32, scale=(0.25, 1.0), gray_probability=0))
    assert np.abs(np.abs(wide) - high).max() <= 3  # square
    assert high.min() < 38 and 110 < high.max() <= 128  # 32 / 1.0 to 32 / 0.25 pixels
    assert abs(np.mean(high < 64) - 0.5) < 0.1  # log-uniform: half of them below 32 / 0.5
    assert abs(np.mean(wide < 0) - 0.5) < 0.1  # half of them mirrored


def test_crops_reach_every_corner_and_stay_inside(tmp_path):
    batch = ramp_images(tmp_path).crops(rng(), 600, 8, scale=(1, 1), gray_probability=0)
    red, green = batch[:, 0], batch[:, 1]
    assert red.min() <= 3 and red.max() >= 252 and green.min() <= 3 and 195 <= green.max() <= 199
    assert batch[:, 2].max() == 0


def test_pretraining_squares_of_a_small_set(tmp_path):
    wide, high = spans(ramp_images(tmp_path).whole_images(rng(), 400, 64))
    assert 56 <= high.min() < 70 and 185 < high.max() <= 199  # 0.3 to 1 times 200 pixels
    assert abs(np.mean(wide < 0) - 0.5) < 0.1


def test_crops_wider_than_the_image_are_cut_to_it(tmp_path):
    _, high = spans(ramp_images(tmp_path).crops(rng(), 20, 128, (0.1, 0.1), gray_probability=0))
    assert high.min() >= 196
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "ramp.png")
    assert open_pretraining(tmp_path).crops(rng(), 1, 32, gray_probability=0).unique().tolist() == [
        7, 8, 9,
    ]  # fmt: skip


def is_gray(batch):
    return ((batch[:, 0] == batch[:, 1]) & (batch[:, 1] == batch[:, 2])).flatten(1).all(1).numpy()


def test_gray_crops(tmp_path):
    images = ramp_images(tmp_path)
    assert not is_gray(images.crops(rng(), 50, 16, gray_probability=0)).any()
    assert is_gray(images.crops(rng(), 50, 16, gray_probability=1)).all()
    assert abs(is_gray(images.crops(rng(), 2000, 8)).mean() - 0.1) < 0.03
    colour = images.crops(rng(4), 1, 16, gray_probability=0)[0].double()
    gray = images.crops(rng(4), 1, 16, gray_probability=1)[0, 0]  # the same draws, turned gray
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert (gray - luma).abs().max() <= 1


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (1, 0.5), (float("nan"), 1)])
def test_impossible_scales(photographs, scale):
    with pytest.raises(ValueError, match="lowest"):
        photographs.crops(rng(), 1, 32, scale)


def test_the_cache_keeps_to_its_budget(tmp_path):
    folder_of(tmp_path, 10, size=(256, 256))  # a quarter of a megabyte each
    images = open_pretraining(tmp_path, cache_megabytes=1)
    first = [images.read(i) for i in range(10)]
    kept = [images.read(i) is first[i] for i in range(10)]
    assert kept == [True] * 4 + [False] * 6
    number = int(images.paths[3].stem)
    for path in images.paths:
        path.unlink()
    assert images.read(3).getpixel((0, 0)) == (number, 255 - number, 80)  # from memory
    with pytest.raises(DataError, match=images.paths[7].name):
        images.read(7)


def test_photographs_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    paths = open_pretraining(folder_of(tmp_path, 120)).paths
    paths[7].write_bytes(paths[7].read_bytes()[:-20])
    paths[30].write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.warns(UserWarning, match="2 of 120 pretraining images .* cannot be read") as said:
        images = open_pretraining(tmp_path)
    assert len(said) == 1 and str(paths[7]) in str(said[0].message)
    assert images.paths == tuple(p for i, p in enumerate(paths) if i not in (7, 30))
    assert "118 from" in images.describe()
    for path in images.paths:
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"None of the 120 images .* can be read: .*0000.JPEG is em"
    ):
        open_pretraining(tmp_path)


@pytest.mark.parametrize("count", [20, 150])
def test_one_that_becomes_unreadable_later_is_drawn_anew(tmp_path, count):
    """From the same generator; all other draws are what they were."""
    sound = open_pretraining(folder_of(tmp_path, count), cache_megabytes=0)
    seeds = range(4 * count)
    before = [sound.whole_images(rng(seed), 1, 8) for seed in seeds]
    first = [int(rng(seed).integers(count)) for seed in seeds]
    sound.paths[3].unlink()
    images = PretrainingImages(sound.paths, "a folder", "CC0", cache_megabytes=0)
    with pytest.warns(UserWarning, match=f"1 of {count} pretraining images of a folder") as said:
        after = [images.whole_images(rng(seed), 1, 8) for seed in seeds]
    assert len(said) == 1 and str(sound.paths[3]) in str(said[0].message)
    for seed in seeds:
        if first[seed] == 3:
            again = rng(seed)
            again.integers(count)
            assert torch.equal(after[seed], images.whole_images(again, 1, 8))
        else:
            assert torch.equal(after[seed], before[seed])
    assert 0 < first.count(3) < len(first)


@pytest.mark.filterwarnings("ignore:.*cannot be read and are left out")
@pytest.mark.parametrize("count", [1, 30, 3000])
def test_none_that_can_be_read_ends_with_an_error(tmp_path, count):
    images = PretrainingImages([tmp_path / f"{i}.png" for i in range(count)], "a disk", "CC0")
    with pytest.raises(DataError, match=r"\d+.png does not exist"):
        images.crops(rng(), 1, 8)


def test_no_paths_at_all():
    with pytest.raises(DataError, match="no pretraining images"):
        PretrainingImages([], "an empty list", "none")


def test_hold_out_splits_without_overlap_and_repeats(tmp_path):
    images = open_pretraining(folder_of(tmp_path, 20))
    train, held = images.hold_out(5)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(train.paths + held.paths) == sorted(images.paths)
    assert images.hold_out(5)[1].paths == held.paths != images.hold_out(5, seed=1)[1].paths
    assert held.source == images.source and held.licence == images.licence
    for count in (0, 20, 21, -1):
        with pytest.raises(DataError, match="cannot be held out"):
            images.hold_out(count)


@pytest.mark.parametrize("count", [5, 100])
def test_whole_images_may_be_non_square_and_gray(tmp_path, count):
    images = open_pretraining(folder_of(tmp_path, count))
    assert images.whole_images(rng(), 3, (12, 20)).shape == (3, 3, 12, 20)
    assert not is_gray(images.whole_images(rng(), 40, 8)).any()
    assert is_gray(images.whole_images(rng(), 40, 8, gray_probability=1)).all()
