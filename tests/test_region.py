"""The inspected part of the image: nothing outside it counts."""

from effad_core import PUAD, EfficientAD, Schedule, export, fit_thresholds, prepare, train
from effad_core.datasets import DataError, Sample, to_tensor
from effad_core.deployment.own_images import train_main
from effad_core.errors import RunError
from effad_core.losses import hard_feature_loss
from effad_core.prediction import Predictor
from effad_core.region import Region
from effad_core.tiles import Crops, Tiles
from effad_core.training import loss_terms

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image


def half(height=264, width=280):
    """The left half."""
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = True
    return mask


class Bright(Predictor):
    map_names = ("combined",)
    image_size = (256, 256)
    operating_point = pixel_operating_point = None

    def __init__(self, region=None):
        self.region = region

    def use_device(self, device=None):
        pass

    def combined_maps(self, images):
        return images.float().mean(dim=1, keepdim=True)


# ---- the mask ------------------------------------------------------------------------------


def test_the_mask_at_other_sizes_is_pillows_nearest_neighbour():
    rng = np.random.default_rng(0)
    mask = rng.random((97, 130)) < 0.3
    for size in ((97, 130), (194, 260), (64, 64), (300, 120)):
        expected = Image.fromarray(np.uint8(255 * mask)).resize(size[::-1], Image.NEAREST)
        assert (Region(mask).at(size) == (np.asarray(expected) > 0)).mean() > 0.995
    assert (Region(mask).at((97, 130)) == mask).all()
    large = Region(np.pad(mask, ((0, 2000), (0, 0)), constant_values=True))
    assert large.mask.shape == (1024, round(130 * 1024 / 2097))
    assert large.share == pytest.approx((0.3 * 97 + 2000) / 2097, abs=0.01)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (300, 259)])
def test_a_cell_belongs_to_the_region_if_the_middle_of_its_patch_does(narrow, padding, size):
    """What reaches a cell, by the gradient: the middle of that patch is the cell's place."""
    network = narrow.network("small", 4, padding)
    image = torch.rand(1, 3, *size, requires_grad=True)
    found = network(image)
    rng = np.random.default_rng(0)
    inside = rng.random(size) < 0.5
    cells = Region(inside).cells(size, padding)
    assert cells.shape == found.shape[2:]
    for _ in range(12):
        row, column = (int(rng.integers(9, side - 9)) for side in cells.shape)
        (gradient,) = torch.autograd.grad(found[0, :, row, column].sum(), image, retain_graph=True)
        rows, columns = np.nonzero(gradient[0].abs().sum(dim=0).numpy())
        middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        near = inside[tuple(slice(int(m) - 2, int(m) + 4) for m in middle)]
        exact = inside[int(middle[0]), int(middle[1])]
        assert cells[row, column] == exact if not padding else cells[row, column] in near


def test_masks_that_cannot_be_are_refused(tmp_path):
    for mask, words in (
        (np.zeros((4, 4), bool), "empty"),
        (np.ones((4, 4), np.uint8), "a boolean array"),
        (np.ones((4, 4, 3), bool), "a boolean array"),
    ):
        with pytest.raises(ValueError, match=words):
            Region(mask)
    Image.new("L", (20, 20)).save(tmp_path / "black.png")
    with pytest.raises(DataError, match="black.png is black all over"):
        Region.read(tmp_path / "black.png")
    Image.new("L", (20, 20), 255).save(tmp_path / "mask.jpg")
    with pytest.raises(DataError, match="save the mask as PNG"):
        Region.read(tmp_path / "mask.jpg")
    corner = np.zeros((256, 256), bool)
    corner[:8, :8] = True  # the first cell's centre is the pixel 16, 16
    with pytest.raises(ValueError, match="no cell of the map has its centre in it"):
        EfficientAD(region=Region(corner))
    dot = np.zeros((1000, 1000), bool)
    dot[0, 0] = True
    with pytest.raises(ValueError, match="nothing is left of the region in a map of 56x56"):
        Region(dot).at((56, 56))


def test_a_mask_is_read_and_written(tmp_path):
    Image.fromarray(np.uint8(90 * half())).save(tmp_path / "mask.png")
    region = Region.read(tmp_path / "mask.png")
    assert (region.mask == half()).all() and region.share == 0.5
    assert (Region.from_text(region.to_text()).mask == half()).all()
    for damaged in ("", "no base64!", region.to_text()[:40], 7, None):
        with pytest.raises(ValueError):
            Region.from_text(damaged)


# ---- what a detector makes of it -----------------------------------------------------------


def test_what_lies_outside_changes_neither_scores_nor_thresholds(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (9, 256, 256, 3), np.uint8)
    spoilt = images.copy()
    spoilt[:, :, 128:] = 255
    found = []
    for name, pictures in (("a", images), ("b", spoilt)):
        paths = [tmp_path / f"{name}{index}.png" for index in range(9)]
        for path, pixels in zip(paths, pictures, strict=True):
            Image.fromarray(pixels).save(path)
        bright, samples = Bright(Region(half(256, 256))), [Sample(p, 0, "good") for p in paths]
        points = fit_thresholds(bright, samples, 0.2, guarantee="average", device="cpu")
        predictions = bright.predict(paths)
        found.append((points, [one.score for one in predictions]))
        for one, pixels in zip(predictions, pictures, strict=True):
            inner = pixels[:, :128].mean(axis=2)
            assert one.score == pytest.approx(inner.max(), rel=1e-5)
            np.testing.assert_allclose(one.map[:, :128], inner, rtol=1e-5)
            np.testing.assert_allclose(one.map[:, 128:], inner.min(), rtol=1e-5)
    assert found[0] == found[1]
    assert max(one.score for one in Bright().predict(list(spoilt))) == 255


def test_quantiles_are_of_the_region_alone(narrow, drawn):
    images = torch.stack([to_tensor(Image.open(path).resize((256, 256))) for path in drawn[:3]])
    region = Region(half(256, 256))
    ad, whole = narrow(region=region), narrow()
    ad.find_quantiles([images[:2], images[2:]], 3)
    maps = np.stack([m.numpy() for m in whole.anomaly_maps(images)])[..., :128]
    expected = np.quantile(maps.reshape(2, -1).astype(np.float64), (0.9, 0.995), axis=1).T.ravel()
    np.testing.assert_allclose(ad.quantiles, expected, rtol=1e-5)


def test_the_hard_feature_loss_looks_at_no_other_cell(narrow, drawn):
    ad = narrow()
    images = [to_tensor(Image.open(path).resize((256, 256))) for path in drawn[:3]]
    inside = torch.from_numpy(Region(half(256, 256)).cells((256, 256), False))
    assert inside.shape == (56, 56) and inside[:, :28].all() and not inside[:, 28:].any()
    schedule = Schedule(hard_quantile=0.9, precision="float32")
    terms = loss_terms(ad, schedule, *images, inside=inside)
    with torch.no_grad():
        d_st, _ = ad.squared_differences(images[0][None])
    expected = hard_feature_loss(d_st[..., :28], 0.9)
    assert terms["L_hard"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() != pytest.approx(hard_feature_loss(d_st, 0.9).item(), rel=1e-3)
    rest = loss_terms(ad, schedule, *images)
    for name in ("penalty", "L_AE", "L_STAE"):
        assert terms[name].item() == pytest.approx(rest[name].item(), rel=1e-5)


@pytest.mark.parametrize("tiles", [None, Tiles(256, 64)])
def test_a_detector_with_a_region_is_trained_saved_and_prepared(
    narrow, scenario, pretraining, tmp_path, tiles
):
    region, schedule = Region(half()), Schedule.smoke(precision="float32")
    ad = narrow(region=region, tiles=tiles)
    train(ad, scenario, schedule, pretraining, tmp_path / "run", device="cpu")
    ad.save(tmp_path / "ad.safetensors")
    loaded = EfficientAD.load(tmp_path / "ad.safetensors", "cpu")
    assert (loaded.region.mask == region.mask).all()
    path = scenario.train[0].path
    found, again = ad.predict(path), prepare(loaded, "cpu").predict(path)
    assert found.map[:, :120].max() >= found.map[:, 160:].max()
    assert found.score == pytest.approx(again.score, rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(again.map, found.map, rtol=1e-3, atol=1e-3)
    for other in (narrow(tiles=tiles), narrow(tiles=tiles, region=Region(~half()))):
        with pytest.raises(RunError, match="region"):
            train(other, scenario, schedule, pretraining, tmp_path / "run", device="cpu")


def test_crops_show_some_of_the_region(drawn):
    mask = np.zeros((264, 280), bool)
    mask[20:24, 20:24] = True  # in the corner: few crops have a cell's centre there
    samples, region = [Sample(drawn[0], 0, "good")], Region(mask)
    crops = Crops(samples, (256, 256), Tiles(256, 64), 9, region=region)
    assert all(crops.region_cells(index).any() for index in range(9))
    assert Crops(samples, (256, 256), Tiles(256, 64), 2).region_cells(0) is None
    mask[:] = False
    mask[0, 0] = True  # no centre at all
    with pytest.raises(DataError, match="so small that random crops miss it"):
        Crops(samples, (256, 256), Tiles(256, 64), 2, region=Region(mask))


def test_puad_averages_the_region_alone(narrow, scenario):
    ad = narrow(region=Region(half(256, 256)))
    image = to_tensor(Image.open(scenario.train[0].path).resize((256, 256)))[None]
    right = image.clone()
    right[..., 150:] = 255  # beyond the patches of the cells inside
    features = PUAD(ad).features
    torch.testing.assert_close(features(image), features(right), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(PUAD(narrow()).features(image), PUAD(narrow()).features(right))


def test_images_of_another_shape_are_refused_before_the_training(
    narrow, scenario, pretraining, tmp_path
):
    ad = narrow(region=Region(half(280, 264)))
    with pytest.raises(DataError, match="sides of 264:280, .*png has 280x264 pixels"):
        train(ad, scenario, Schedule.smoke(), pretraining, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_mask(drawn, tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(half()).save(tmp_path / "mask.png")
    options = ["--profile", "smoke", "--rate", "0.5", "--guarantee", "average", "--device", "cpu"]
    train_main([str(drawn[0].parent), *options, "--region", "mask.png"])
    assert "inspected: 50% of the image" in capsys.readouterr().out
    (run,) = (tmp_path / "build/runs").iterdir()
    assert run.name.endswith("-seed0-region")
    assert (EfficientAD.load(run, "cpu").region.mask == half()).all()
    said = refusal(train_main, drawn[0].parent, "--region", "none.png")
    assert "none.png does not exist" in said


def test_an_exported_detector_keeps_its_region(narrow, drawn, tmp_path):
    ad = narrow(region=Region(half(256, 256)))
    export(ad, tmp_path / "ad.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "ad.onnx"), providers=["CPUExecutionProvider"]
    )
    images = [Image.open(path).convert("RGB") for path in drawn[:2]]
    maps, scores = session.run(None, {"image": np.stack([np.asarray(i) for i in images])})
    for m, score, prediction in zip(maps, scores, ad.predict(images), strict=True):
        np.testing.assert_allclose(m, prediction.map, atol=0.01 * np.ptp(prediction.map))
        assert score == pytest.approx(prediction.score, rel=5e-3)


def test_a_region_of_everything_changes_nothing(narrow, drawn):
    everything = Region(np.ones((264, 280), bool))
    found, expected = narrow(region=everything).predict(drawn[0]), narrow().predict(drawn[0])
    assert found.score == expected.score and (found.map == expected.map).all()
