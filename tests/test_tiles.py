"""Large images: tiles, the maps put together from them, training and verdicts with them."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from effad_core import (
    EfficientAD,
    Schedule,
    evaluate,
    export,
    fit_thresholds,
    prepare,
    train,
    training,
)
from effad_core.datasets import DataError, Sample, Scenario, normalise, to_tensor
from effad_core.deployment.own_images import train_main
from effad_core.detector import place_cells
from effad_core.errors import RunError
from effad_core.evaluation.scores import map_size, reduced
from effad_core.extensions.puad import PUAD
from effad_core.metrics import aupro, pixel_auroc
from effad_core.prediction import Predictor
from effad_core.tiles import Crops, Tiles
from effad_core.tiles.cutting import tile_starts

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def picture(height, width, seed=0):
    """Noise: no two places of it are alike."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def large(tmp_path):
    """Paths of six images of 300x420 pixels."""
    paths = [tmp_path / f"large{index}.png" for index in range(6)]
    for index, path in enumerate(paths):
        picture(300, 420, index).save(path)
    return paths


def large_scenario(paths):
    samples = tuple(Sample(path, 0, "good") for path in paths)
    return Scenario("large", samples[:4], samples[4:], (), "drawn", "CC0")


# ---- cutting -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [4, 32, 64, 128])
def test_tiles_cover_a_side_with_the_overlap_and_none_is_spared(overlap):
    for length in range(256, 1400, 4):
        starts = tile_starts(length, 256, overlap)
        assert starts[0] == 0 and starts[-1] == length - 256
        assert all(start % 4 == 0 for start in starts)
        steps = np.diff(starts)
        assert (steps <= 256 - overlap).all() and (steps > 0).all()
        fewest = next(n for n in range(1, 99) if 256 + (n - 1) * (256 - overlap) >= length)
        assert len(starts) == fewest


@pytest.mark.parametrize("height, width", [(256, 256), (300, 420), (515, 258), (259, 700)])
def test_the_stitched_map_is_that_of_the_whole_image(narrow, height, width):
    """Teacher and student are convolutions: the map of the whole image at once shows no tiles."""
    ad, image = narrow(tiles=Tiles(256, 64)), picture(height, width)
    maps, covered = ad.tiles.stitched(image, ad.image_size, ad.padding, ad.divided_cells)
    whole = to_tensor(image)[None]
    whole = torch.nn.functional.pad(whole.float(), (0, -width % 4, 0, -height % 4), "replicate")
    with torch.no_grad():
        x = normalise(whole.byte())
        d = (ad.normalised_teacher(x) - ad.student(x)[:, : ad.out_channels]) ** 2
    expected = d.mean(dim=1)
    assert covered == (height, width)
    assert maps.shape[1:] == (math.ceil(height / 4), math.ceil(width / 4))
    assert maps.shape[1:] == ad.tiles.map_size(image.size, ad.image_size)
    torch.testing.assert_close(maps[:1, 4:-4, 4:-4], expected, rtol=1e-4, atol=1e-5)
    edge = torch.nn.functional.pad(expected[None], (4, 4, 4, 4), "replicate")[0]
    torch.testing.assert_close(maps[:1], edge, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(300, 420), (301, 423)])
def test_a_map_lies_where_the_whole_images_would(narrow, height, width):
    ad, image = narrow(tiles=Tiles(256, 64)), picture(height, width)
    found = ad.predict(image)
    with torch.no_grad():
        x = normalise(to_tensor(image)[None])
        d = (ad.normalised_teacher(x) - ad.student(x)[:, : ad.out_channels]) ** 2
    m = place_cells(d.mean(dim=1, keepdim=True), (height, width), padding=False)[0, 0]
    lower, upper = ad.quantiles[:2]
    expected = (0.1 * (m - lower) / (upper - lower)).numpy()
    # beyond the last multiple of four lies a cell that the whole image does not have
    inner = slice(None, None if height % 4 == 0 else -24)
    np.testing.assert_allclose(found.st_map[inner, inner], expected[inner, inner], rtol=1e-3)
    assert found.map.shape == (height, width)
    assert found.maps.shape == (3, math.ceil(height / 4), math.ceil(width / 4))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size, image_size", [(256, 256), ((300, 512), (256, 300)), (400, 256)])
def test_overlaps_are_blended(padding, size, image_size):
    """Every cell is the mean of its tiles' values, weighted by the distance to the tile's end."""
    tiles, drawn = Tiles(size, 110), []
    ad = EfficientAD(padding=padding, image_size=image_size)
    tiles.check(ad.image_size, padding)
    counts = ad.teacher.output_size(ad.image_size)

    def cells(batch):
        values = torch.rand(len(batch), 2, *counts, generator=torch.Generator().manual_seed(1))
        drawn.extend(values)
        return values

    image = picture(611, 822)
    found, (height, width) = tiles.stitched(image, ad.image_size, padding, cells)
    scale = [s / t for s, t in zip(ad.image_size, tiles.size, strict=True)]
    assert (height, width) == (round(611 * scale[0]), round(822 * scale[1]))
    overlaps = [4 * math.ceil(110 * factor / 4) for factor in scale]
    sides = [4 * math.ceil(side / 4) for side in (height, width)]
    starts = [tile_starts(*s) for s in zip(sides, ad.image_size, overlaps, strict=True)]
    margin = 0 if padding else 4
    total, weights = np.zeros(found.shape), np.zeros(found.shape[1:])
    places = [(top, left) for top in starts[0] for left in starts[1]]
    assert len(places) == len(drawn) > 2
    for (top, left), tile in zip(places, drawn, strict=True):
        for row in range(counts[0]):
            for column in range(counts[1]):
                weight = 1
                ends = zip((row, column), counts, overlaps, strict=True)
                for place, count, overlap in ends:
                    weight *= min(place + 1, count - place, overlap // 4)
                where = top // 4 + row + margin, left // 4 + column + margin
                total[:, *where] += weight * tile[:, row, column].numpy()
                weights[where] += weight
    inner = slice(margin, -margin or None)
    expected = total[:, inner, inner] / weights[inner, inner]
    np.testing.assert_allclose(found[:, inner, inner], expected, rtol=1e-5)


def test_tiles_that_cannot_be_are_refused_in_one_sentence():
    for size, overlap, words in (
        (0, 1, "a tile's size must be pixels"),
        ((256, 256, 3), 1, "a tile's size must be pixels"),
        (256, 129, "the overlap of tiles must be 1 to 128 pixels"),
        (256, 0, "the overlap of tiles must be"),
        (True, 1, "a tile's size must be pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            Tiles(size, overlap)
    with pytest.raises(ValueError, match="tiles must overlap by at least 32 pixels, not 8"):
        EfficientAD(tiles=Tiles(256, 8))
    with pytest.raises(ValueError, match="at least 64 pixels, not 32"):
        EfficientAD(tiles=Tiles(512, 32))
    with pytest.raises(ValueError, match="multiples of 4, not 258x256"):
        EfficientAD(image_size=(258, 256), tiles=Tiles(258, 64))
    EfficientAD(padding=True, tiles=Tiles(256, 8))  # padded networks have cells up to the border


# ---- training ------------------------------------------------------------------------------


def test_crops_come_from_anywhere_in_the_images(large):
    samples = [Sample(path, 0, "good") for path in large]
    crops = Crops(samples, (256, 256), Tiles(256, 64), count=20, seed=3)
    assert len(crops) == 20
    places = []
    for crop in crops:
        pixels = np.asarray(crop)
        assert pixels.shape == (256, 256, 3)
        found = []
        for path in large:  # noise: a pixel's colour occurs in few places, the whole crop in one
            whole = np.asarray(Image.open(path))
            rows, columns = np.nonzero((whole[:45, :165] == pixels[0, 0]).all(axis=2))
            found += [
                (path, row, column)
                for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
                if np.array_equal(whole[row : row + 256, column : column + 256], pixels)
            ]
        assert len(found) == 1
        places += found
    assert [sum(path == place[0] for place in places) for path in large] == [4, 4, 3, 3, 3, 3]
    assert len({row for _, row, _ in places}) > 10 and len({column for *_, column in places}) > 10


def test_crops_of_larger_tiles_are_made_smaller(large):
    crops = Crops([Sample(large[0], 0, "good")], (256, 256), Tiles(300, 80), count=3)
    small = Image.open(large[0]).resize((358, 256), Image.BILINEAR)
    for crop in crops:
        strips = [np.asarray(small.crop((x, 0, x + 256, 256))) for x in range(103)]
        assert any(np.array_equal(crop, strip) for strip in strips)


def test_a_detector_with_tiles_is_trained_saved_and_taken_up(narrow, large, pretraining, tmp_path):
    scenario, schedule = large_scenario(large), Schedule.smoke(precision="float32")
    ad = narrow(tiles=Tiles(256, 64))
    train(ad, scenario, schedule, pretraining, tmp_path / "run", device="cpu")
    maps = [
        ad.tiles.stitched(Image.open(path), ad.image_size, False, ad.divided_cells)[0].numpy()
        for path in large[4:]
    ]
    pooled = np.stack(maps).transpose(1, 0, 2, 3).reshape(2, -1).astype(np.float64)
    expected = np.quantile(pooled, (0.9, 0.995), axis=1).T.ravel()
    np.testing.assert_allclose(ad.quantiles, expected, rtol=1e-5)
    assert ad.card["training"]["tiles"] == {"size": (256, 256), "overlap": 64, "crops": 256}

    fit_thresholds(ad, scenario.validation, 0.5, guarantee="average", device="cpu")
    ad.save(tmp_path / "ad.safetensors")
    loaded = EfficientAD.load(tmp_path / "ad.safetensors", "cpu")
    found, again = ad.predict(large[0]), loaded.predict(large[0])
    assert loaded.tiles == ad.tiles == Tiles(256, 64)
    assert (found.map == again.map).all() and found.is_anomalous == again.is_anomalous
    quick = prepare(loaded, "cpu").predict(large[0])
    np.testing.assert_allclose(quick.map, found.map, rtol=1e-3, atol=1e-3)

    finished = narrow(seed=5, tiles=Tiles(256, 64))
    finished.teacher.load_state_dict(ad.teacher.state_dict())
    train(finished, scenario, schedule, pretraining, tmp_path / "run", device="cpu")
    assert torch.equal(finished.quantiles, ad.quantiles)
    for other in (narrow(tiles=Tiles(256, 100)), narrow()):
        with pytest.raises(RunError, match="tiles"):
            train(other, scenario, schedule, pretraining, tmp_path / "run", device="cpu")


def test_an_image_smaller_than_a_tile_is_named_before_the_training(
    narrow, large, pretraining, tmp_path
):
    small = tmp_path / "small.png"
    picture(255, 400).save(small)
    ad, scenario = narrow(tiles=Tiles(256, 64)), large_scenario(large)
    for split in ("train", "validation"):
        samples = (*getattr(scenario, split), Sample(small, 0, "good"))
        with pytest.raises(DataError, match="small.png has 400x255 pixels"):
            wrong = replace(scenario, **{split: samples})
            train(ad, wrong, Schedule.smoke(), pretraining, tmp_path / split, device="cpu")
        assert not (tmp_path / split / "log.csv").exists()
    with pytest.raises(DataError, match="small.png has 400x255 pixels"):
        ad.predict(small)
    (_, first), (error, nothing), (_, last) = ad.stream([large[0], small, large[1]], 8, True)
    assert isinstance(error, DataError) and nothing is None
    assert first.score == pytest.approx(ad.predict(large[0]).score)
    assert last.score == pytest.approx(ad.predict(large[1]).score)


def test_the_command_trains_with_tiles(large, tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "FEWEST_CROPS", 8)
    folder = tmp_path / "parts"
    folder.mkdir()
    for path in large:
        path.rename(folder / path.name)
    options = "--profile smoke --tiles 256 --overlap 40 --image-size 256x260 --device cpu"
    train_main(["parts", *options.split(), "--rate", "0.5", "--guarantee", "average"])
    run = tmp_path / "build/runs/parts-smoke-small-seed0-256x260-tiles-256x256-overlap-40"
    ad = EfficientAD.load(run, "cpu")
    assert ad.image_size == (256, 260) and ad.tiles == Tiles(256, 40)
    said = refusal(train_main, "parts", "--overlap", "40")
    assert "--overlap needs --tiles" in said
    assert "neither pixels" in refusal(train_main, "parts", "--tiles", "many")


def test_what_needs_a_whole_image_refuses_tiles(narrow, tmp_path):
    ad = narrow(tiles=Tiles(256, 64))
    with pytest.raises(ValueError, match="PUAD needs the whole image at once"):
        PUAD(ad)
    with pytest.raises(ValueError, match="a detector with tiles cannot be exported"):
        export(ad, tmp_path / "ad.onnx")


def test_a_damaged_entry_is_refused(narrow, tmp_path):
    path = tmp_path / "ad.safetensors"
    narrow(tiles=Tiles(256, 64)).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["effad"])
    assert header["tiles"] == {"size": [256, 256], "overlap": 64}
    for wrong in ({"size": [256, 256]}, {"size": [256], "overlap": 64}, [1, 2], "tiles"):
        save_file(tensors, path, {"effad": json.dumps(header | {"tiles": wrong})})
        with pytest.raises(RunError, match="a header that does not describe a detector"):
            EfficientAD.load(path, "cpu")


# ---- judging -------------------------------------------------------------------------------


class Bright(Predictor):
    """The brightest pixel of a cell is its anomaly: nothing to train."""

    map_names = ("combined",)
    image_size = (256, 256)
    padding = True
    operating_point = pixel_operating_point = None

    def __init__(self, tiles=None):
        self.tiles = tiles

    def use_device(self, device=None):
        pass

    def combined_cells(self, images):
        return torch.nn.functional.max_pool2d(images.float().mean(dim=1, keepdim=True), 4)

    def combined_maps(self, images):
        return place_cells(self.combined_cells(images), self.image_size, True)


def test_tiles_see_a_speck_that_the_whole_image_loses(tmp_path):
    """`../shared/cases/12`: a speck of 8x8 pixels in a large image."""
    image = np.full((2000, 3000, 3), 100, np.uint8)
    image[1200:1208, 2100:2108] = 255
    Image.fromarray(image).save(tmp_path / "speck.png")
    whole, cut = (Bright(tiles).predict(tmp_path / "speck.png") for tiles in (None, Tiles(256)))
    assert whole.score < 145 and cut.score == 255
    row, column = divmod(int(cut.map.argmax()), 3000)
    assert 1200 <= row < 1208 and 2100 <= column < 2108
    assert cut.map[:1190].max() < 101 and cut.map[:, :2090].max() < 101


def test_predictions_of_large_images_stay_small():
    images = [np.zeros((1500, 2000), np.uint8)] * 3
    for tiles in (None, Tiles(256)):
        found = Bright(tiles).predict(images)
        assert all(one.map.shape == (1500, 2000) for one in found)
        assert sum(one.maps.nbytes for one in found) < 3 * 1500 * 2000 / 2


MEMORY = """
import re, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tiles import Bright, Tiles
found = Bright(Tiles(256)).predict({path!r})
assert found.score == 255 and found.map.shape == (10_000, 10_000)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such peak")
def test_an_image_of_100_megapixels_stays_under_2_gib(tmp_path):
    image = Image.new("RGB", (10_000, 10_000), (100, 100, 100))
    image.paste((255, 255, 255), (5_000, 5_000, 5_008, 5_008))
    image.save(tmp_path / "large.png", compress_level=1)
    code = MEMORY.format(tests=str(Path(__file__).parent), path=str(tmp_path / "large.png"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 2**20  # KiB


def test_masks_of_very_large_images_are_compared_at_a_lower_resolution(tmp_path, monkeypatch):
    assert map_size((1024, 1024)) == (1024, 1024) and map_size((2048, 2048)) == (2048, 2048)
    monkeypatch.setattr("effad_core.evaluation.scores.MAP_PIXELS", 100 * 100)
    assert map_size((100, 100)) == (100, 100) and map_size((151, 200)) == (76, 100)
    paths, masks = [tmp_path / f"{n}.png" for n in "ab"], [None, tmp_path / "mask.png"]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (2, 151, 200), np.uint8)
    mask = np.zeros((151, 200), np.uint8)
    mask[31:60, 41:70], mask[150, 199] = 255, 255
    pixels[1][mask > 0] += 55
    for path, values in zip(paths, pixels, strict=True):
        Image.fromarray(values).save(path)
    Image.fromarray(mask).save(masks[1])
    samples = [Sample(paths[0], 0, "good"), Sample(paths[1], 1, "spot", (masks[1],))]
    evaluation = evaluate(Bright(), samples)
    predictions = Bright().predict(paths)
    expected = np.zeros((76, 100), bool)
    for row, column in zip(*np.nonzero(mask), strict=True):
        expected[row // 2, column // 2] = True
    maps = [one.map_at((76, 100)) for one in predictions]
    found = evaluation.metrics()["all"]
    assert found["aupro_0.3"] == pytest.approx(aupro(maps, [None, expected], 0.3))
    assert found["pixel_auroc_1"] == pytest.approx(pixel_auroc(maps, [None, expected]))
    smaller, area = reduced(mask > 0, 421.0, (76, 100))
    assert np.array_equal(smaller, expected)
    assert area == pytest.approx(421.0 * expected.sum() / (mask > 0).sum())
