"""PatchCore against scikit-learn's neighbours and a naive coreset; its ensemble against numpy.

And `benchmarks/psi.py`, which chooses features by it.
"""

import doctest
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

from baselines import patchcore as module
from baselines.maps import scales_of, standardised
from baselines.patchcore import PROJECTED, PatchCore, PatchCoreEnsemble, coreset
from benchmarks import psi
from effad_core import evaluate, open_extractor
from effad_core.datasets import Sample, Scenario
from effad_core.deployment.inspection import fit_thresholds
from effad_core.distillation.algorithm import save_teacher
from effad_core.distillation.backbones import BACKBONES
from effad_core.errors import DataError, RunError
from effad_core.evaluation.methods import find_method, method_names
from effad_core.prediction import Predictor
from effad_core.region import Region
from effad_core.schedule import PROFILES

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch import nn

ROOT = Path(__file__).parents[1]


class Colours(nn.Module):
    """Features: fixed mixtures of the colours of each block of 8x8 pixels."""

    def __init__(self, channels=6, scale=1.0, shift=70.0):
        super().__init__()
        mixture = torch.linspace(-1, 1, 3 * channels).reshape(channels, 3, 1, 1).sin() * 50
        self.register_buffer("mixture", mixture)
        self.scale, self.shift = scale, shift

    def forward(self, images):
        assert images.dtype == torch.uint8
        found = F.conv2d(F.avg_pool2d(images.float() / 255, 8), self.mixture)
        return (found + self.shift) * self.scale


def pixels(paths, size=(256, 256)):
    """Images as Pillow resizes them, uint8, (N, 3, H, W)."""
    images = [Image.open(path).convert("RGB").resize(size[::-1], Image.BILINEAR) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def patches(features, paths, size=(256, 256)):
    """Their features, one row a patch, float64."""
    found = features(pixels(paths, size)).double().numpy()
    return found.transpose(0, 2, 3, 1).reshape(-1, found.shape[1])


def shown(cells, size, sigma):
    """Cells, (h, w), as a map: Pillow's bilinear resize, then SciPy's Gaussian."""
    cells = Image.fromarray(cells.astype(np.float32))
    m = np.asarray(cells.resize(size[::-1], Image.BILINEAR), np.float64)
    return gaussian_filter(m, sigma, mode="mirror", truncate=4) if sigma else m


def training_paths(scenario):
    return [sample.path for sample in scenario.train]


def farthest(points, first, count):
    """The greedy k-centre, one distance after the other."""
    chosen = [first]
    while len(chosen) < count:
        distances = [
            min(np.linalg.norm(point - points[other]) for other in chosen) for point in points
        ]
        chosen.append(int(np.argmax(distances)))
    return chosen


def radius(points, chosen):
    """How far a point lies at most from the nearest of those chosen."""
    return NearestNeighbors(n_neighbors=1).fit(points[chosen]).kneighbors(points)[0].max()


# ---- the coreset ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5, PROJECTED])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_coreset_is_the_greedy_k_centre(channels, seed):
    points = np.random.default_rng(seed).normal(0, 1, (150, channels))
    for shift in (3, 1000):  # far from 0, squares are large
        shifted = torch.tensor(points + shift, dtype=torch.float32)
        chosen = coreset(shifted, 25, seed).tolist()
        assert chosen == farthest(shifted.double().numpy(), chosen[0], 25)


def test_the_first_patch_is_drawn():
    points = torch.randn(50, 4, generator=torch.manual_seed(0))
    first = [int(coreset(points, 1, seed)[0]) for seed in range(30)]
    assert len(set(first)) > 10 and min(first) >= 0 and max(first) < 50


@pytest.mark.parametrize("channels", [3, PROJECTED + 72])
def test_a_coreset_of_all_is_all_equal_patches_too(channels):
    points = torch.randn(20, channels, generator=torch.manual_seed(0)).repeat(3, 1)
    assert sorted(coreset(points, 60).tolist()) == list(range(60))


def test_distances_between_long_vectors_are_projected():
    """As near to all patches as the exact choice, within what a projection costs."""
    generator = torch.manual_seed(0)
    centres = torch.randn(30, 400, generator=generator) * 5
    points = centres.repeat(10, 1) + torch.randn(300, 400, generator=generator) * 0.1
    chosen = coreset(points, 30, seed=1)
    assert sorted(number % 30 for number in chosen.tolist()) == list(range(30))  # one a cluster
    assert not torch.equal(coreset(points, 30, seed=2), chosen)
    exact = farthest(points.double().numpy(), int(chosen[0]), 30)
    assert radius(points.numpy(), chosen.numpy()) < 1.3 * radius(points.numpy(), exact)


# ---- memory and distances ------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (256, 320)])
def test_distances_are_scikit_learns(scenario, drawn, standardise, size):
    patchcore = PatchCore(features=Colours(), image_size=size, share=0.02, standardise=standardise)
    assert patchcore.fit(scenario, device="cpu") is patchcore
    known = patches(Colours(), training_paths(scenario), size)
    deviation = known.std(axis=0) if standardise else np.ones(6)
    memory = patchcore.memory.double().numpy()
    assert len(memory) == round(0.02 * len(known))
    among = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(known / deviation)
    np.testing.assert_allclose(among.kneighbors(memory)[0], 0, atol=1e-3)  # patches, as they were
    assert len(np.unique(memory, axis=0)) == len(memory)

    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(memory)
    expected = nearest.kneighbors(patches(Colours(), drawn[5:7], size) / deviation)[0]
    found = patchcore.distances(pixels(drawn[5:7], size))
    assert found.shape == (2, size[0] // 8, size[1] // 8) and found.dtype == torch.float32
    found = found.numpy().ravel()
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4, atol=1e-4)


def test_a_patch_in_the_memory_has_no_distance(scenario):
    """Of vectors of length 8,000 that differ by 200, rounding would make 6 from 0."""
    patchcore = PatchCore(features=Colours(60, shift=1000), share=1).fit(scenario, device="cpu")
    assert patchcore.distances(pixels(training_paths(scenario)[:1])).max() < 0.3


def test_maps_are_the_distances_resized(scenario, drawn):
    """By Pillow; then smoothed as SciPy does, by a Gaussian of 4 pixels, unless it is 0."""
    size = (256, 320)
    fitted = PatchCore(features=Colours(), image_size=size, share=0.01).fit(scenario, device="cpu")
    x = pixels(drawn[5:7], size)
    maps, distances = {4: fitted.combined_maps(x)}, fitted.distances(x).numpy()
    fitted.smoothing = 1.5
    maps[1.5] = fitted.combined_maps(x)
    fitted.smoothing = 0
    maps[0] = fitted.combined_maps(x)
    for sigma, found in maps.items():
        assert found.shape == (2, 1, *size)
        for m, cells in zip(found[:, 0].numpy(), distances, strict=True):
            np.testing.assert_allclose(m, shown(cells, size, sigma), rtol=1e-4, atol=1e-4)
    one = fitted.predict(drawn[5])
    assert one.map.shape == (264, 280) and np.isnan(one.st_map).all()


def test_the_score_is_the_largest_distance_of_a_patch(scenario, drawn):
    for smoothing in (0, 4):
        patchcore = PatchCore(features=Colours(), share=0.01, smoothing=smoothing)
        patchcore.fit(scenario, device="cpu")
        x = pixels(drawn[4:8])
        maps, scores = patchcore.maps_and_scores(x)
        largest = patchcore.distances(x).flatten(1).amax(dim=1)
        assert torch.equal(scores[:, 0], largest)
        assert (maps.flatten(1).amax(dim=1) < scores[:, 0]).all()  # the resize lowers its peak
        assert [found.score for found in patchcore.predict(drawn[4:8])] == largest.tolist()


def test_only_the_region_is_judged(scenario, drawn):
    patchcore = PatchCore(features=Colours(), share=0.01, smoothing=0).fit(scenario, device="cpu")
    cells = patchcore.distances(pixels(drawn[7:8]))[0]
    mask = np.zeros((256, 256), bool)
    mask[:72, :96] = True  # 9 x 12 cells
    patchcore.region = Region(mask)
    found = patchcore.predict(drawn[7])
    inside = cells[:9, :12]
    assert found.score == inside.max().item() < cells.max().item()
    assert found.maps[0, 72:].max() == found.maps[0, :, 96:].max() == found.maps[0].min()


def test_the_memory_depends_on_the_seed_alone(scenario, drawn):
    expected = PatchCore(features=Colours(), share=0.01).fit(scenario, seed=3, device="cpu")
    torch.manual_seed(99)
    again = PatchCore(features=Colours(), share=0.01)
    again.fit(scenario, seed=4, device="cpu")
    assert not torch.equal(again.memory, expected.memory)
    again.fit(scenario, seed=3)  # nothing is left of the memory before
    assert torch.equal(again.memory, expected.memory)
    assert again.predict(drawn[7]).score == expected.predict(drawn[7]).score


def test_of_many_patches_as_many_of_each_image_are_drawn(scenario):
    images = [patches(Colours(), [path]) for path in training_paths(scenario)]
    memories = []
    for seed in (0, 1):
        patchcore = PatchCore(features=Colours(), share=1, most_patches=4 * 9 + 3)
        memory = patchcore.fit(scenario, seed=seed, device="cpu").memory.numpy()
        memories.append(sorted(map(tuple, memory.tolist())))
        counts = [
            sum(np.abs(image - row).max(1).min() < 1e-4 for row in memory) for image in images
        ]
        assert counts == [9] * 4
    assert memories[0] != memories[1]


def test_of_more_than_100_000_patches_a_part_is_drawn(drawn, monkeypatch):
    """120 images of 1,024 patches each."""
    given = []

    def recorded(patches, count, seed):
        given.append((len(patches), count))
        return coreset(patches, count, seed)

    monkeypatch.setattr(module, "coreset", recorded)
    scenario = Scenario("many", (Sample(drawn[0], 0, "good"),) * 120, (), (), "drawn", "CC0")
    patchcore = PatchCore(features=Colours(2), share=0.001).fit(scenario, device="cpu")
    assert given == [(120 * (100_000 // 120), 100)]
    assert patchcore.memory.shape == (100, 2)


def test_a_memory_has_one_patch_at_least(scenario):
    patchcore = PatchCore(features=Colours(), share=1e-9).fit(scenario, device="cpu")
    assert patchcore.memory.shape == (1, 6)


def test_standardised_distances_do_not_depend_on_the_channels_scales(scenario, drawn):
    scales = torch.tensor([1, 2**-10, 2**10, 2, 0.5, 32]).view(6, 1, 1)
    plain, scaled = (
        PatchCore(features=Colours(scale=scale), share=0.01, standardise=True).fit(
            scenario, device="cpu"
        )
        for scale in (1, scales)
    )
    x = pixels(drawn[5:6])
    np.testing.assert_allclose(scaled.distances(x), plain.distances(x), rtol=1e-4, atol=1e-4)
    unlike = PatchCore(features=Colours(scale=scales), share=0.01).fit(scenario, device="cpu")
    assert unlike.distances(x).max() > 10 * plain.distances(x).max()
    assert unlike.fit(scenario).deviation.equal(torch.ones(1))


def test_a_channel_that_never_varies_stays_as_it_is(scenario, drawn):
    """Neither NaN nor a rounding error that is magnified."""
    scales = torch.tensor([1, 0, 1, 1, 1, 1.0]).view(6, 1, 1)
    with_dead = PatchCore(features=Colours(scale=scales), share=0.01, standardise=True)
    with_dead.fit(scenario, device="cpu")
    assert with_dead.deviation[1] == 1 and (with_dead.deviation != 1).sum() == 5
    assert np.isfinite(with_dead.predict(drawn[5]).score)


# ---- what it refuses, what it reads --------------------------------------------------------


def test_an_empty_memory_is_said(drawn):
    with pytest.raises(ValueError, match="the memory is empty: call fit first"):
        PatchCore(features=Colours()).predict(drawn[0])


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=f"share must be above 0 and at most 1, not {share}"):
        PatchCore(features=Colours(), share=share)


@pytest.mark.parametrize("size", [31, (256, 16), (256,), 256.0, (8192, 8192)])
def test_sizes_that_do_not_exist(size):
    with pytest.raises((ValueError, TypeError), match="image_size must be pixels|not iterable"):
        PatchCore(features=Colours(), image_size=size)


def test_features_are_computed_in_bfloat16_and_distances_in_float32(scenario, drawn):
    exact = PatchCore(features=Colours(shift=0), share=0.05).fit(scenario, device="cpu")
    patchcore = PatchCore(features=Colours(shift=0), share=0.05)
    patchcore.precision = "bfloat16"
    patchcore.fit(scenario, device="cpu")
    assert patchcore.memory.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        known = patches(Colours(shift=0), training_paths(scenario))
        asked = patches(Colours(shift=0), drawn[7:8])
    memory = patchcore.memory.double().numpy()
    assert not torch.equal(patchcore.memory, exact.memory)
    first = int(np.abs(known - memory[0]).max(1).argmin())
    assert np.array_equal(known[farthest(known, first, 12)], memory[:12])
    expected = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(memory).kneighbors(asked)[0]
    _, scores = patchcore.maps_and_scores(pixels(drawn[7:8]))
    assert scores.item() == pytest.approx(expected.max(), rel=1e-5)


def test_features_of_ones_own_are_not_saved(scenario, tmp_path):
    patchcore = PatchCore(features=Colours(), share=0.01).fit(scenario, device="cpu")
    with pytest.raises(RunError, match="own.safetensors cannot be written: features of your own"):
        patchcore.save(tmp_path / "own.safetensors")
    memory = patchcore.memory
    with pytest.raises(RunError, match="run cannot be written: features of your own"):
        patchcore.fit(scenario, seed=1, run_dir=tmp_path / "run", device="cpu")
    assert patchcore.memory is memory  # refused before anything is computed
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_holds_memory_deviations_and_thresholds(scenario, drawn, tmp_path):
    """The arguments of its features too: the loaded one has maps of the same bits."""
    torch.manual_seed(0)
    patchcore = PatchCore(
        read=("block2", "block4"), image_size=(64, 96), pooled=50, channels=30, share=0.1,
        standardise=True, smoothing=2, pretrained=False,
    )  # fmt: skip
    patchcore.fit(scenario, device="cpu")
    patchcore.threshold, patchcore.pixel_threshold = 3.5, 2.25
    patchcore.save(tmp_path / "detector.safetensors")
    torch.manual_seed(1)
    loaded = PatchCore.load(tmp_path / "detector.safetensors", "cpu")
    assert loaded.threshold == 3.5 and loaded.pixel_threshold == 2.25
    assert loaded.memory.shape == (round(0.1 * 4 * 8 * 12), 30) and loaded.deviation.shape == (30,)
    for name, value in patchcore.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for one, other in zip(patchcore.predict(drawn), loaded.predict(drawn), strict=True):
        assert one.score == other.score and np.array_equal(one.maps, other.maps)
        assert one.is_anomalous == other.is_anomalous


def test_training_images_alone_are_read(scenario, drawn, monkeypatch):
    read, load = [], Sample.load
    monkeypatch.setattr(Sample, "load", lambda sample: read.append(sample.path) or load(sample))
    patchcore = PatchCore(features=Colours(), share=0.01)
    patchcore.threshold = patchcore.pixel_threshold = 3.0
    patchcore.fit(scenario, device="cpu")
    assert set(read) == set(drawn[:4])
    assert patchcore.threshold is None and patchcore.pixel_threshold is None


def test_an_unreadable_training_image_is_named(scenario, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = replace(scenario, train=(*scenario.train, Sample(tmp_path / "bad.png", 0, "good")))
    with pytest.raises(DataError, match="bad.png"):
        PatchCore(features=Colours()).fit(bad, device="cpu")


def test_16_bit_images_keep_their_white(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(0, 4096, (260, 260)).astype(np.uint16)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    samples = [Sample(tmp_path / f"{index}.png", 0, "good") for index in range(3)]
    scenario = Scenario("deep", tuple(samples[:2]), tuple(samples[2:]), (), "drawn", "CC0")
    patchcore = PatchCore(features=Colours(), share=0.01).fit(scenario, device="cpu")
    assert patchcore.full_scale == scenario.full_scale == 4095


# ---- the ensemble --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(scenario):
    """Of two small members, fitted."""
    members = [
        {"read": ("block2", "block3"), "share": 0.05, "smoothing": 2},
        {"read": ("block4",), "share": 0.2, "pooled": 20, "standardise": True, "smoothing": 0},
    ]
    torch.manual_seed(0)
    made = PatchCoreEnsemble(members, image_size=(64, 96), pretrained=False)
    return made.fit(scenario, seed=2, device="cpu")


def test_members_of_an_ensemble_are_patchcores_of_their_own(ensemble, scenario):
    for member in ensemble.members:
        arguments = member.arguments | {"pretrained": False}
        alone = PatchCore(**arguments)
        alone.features.load_state_dict(member.features.state_dict())
        alone.fit(scenario, seed=2, device="cpu")
        assert torch.equal(alone.memory, member.memory)
        assert torch.equal(alone.deviation, member.deviation)


def test_maps_of_an_ensemble_are_standardised_on_validation_images_and_averaged(
    ensemble, scenario, drawn
):
    """Scales come from the unsmoothed maps; the score is of the distances, not of the map."""
    size, sigmas = (64, 96), (2, 0)
    validation = pixels([sample.path for sample in scenario.validation], size)
    scales = []
    for member in ensemble.members:
        rows = [shown(cells, size, 0) for cells in member.distances(validation).double().numpy()]
        scales.append((np.mean(rows), np.std(rows)))
    np.testing.assert_allclose(ensemble.scales, scales, rtol=1e-4)

    asked = drawn[5:8]
    maps, judged = [], []
    for member, (mean, deviation), sigma in zip(ensemble.members, scales, sigmas, strict=True):
        cells = member.distances(pixels(asked, size)).double().numpy()
        maps.append([(shown(one, size, sigma) - mean) / deviation for one in cells])
        repeats = size[0] // cells.shape[1], size[1] // cells.shape[2]
        judged.append((cells.repeat(repeats[0], 1).repeat(repeats[1], 2) - mean) / deviation)
    found = ensemble.predict(asked)
    np.testing.assert_allclose([p.maps[0] for p in found], np.mean(maps, 0), rtol=1e-3, atol=1e-3)
    scores = np.mean(judged, 0).max((1, 2))
    np.testing.assert_allclose([p.score for p in found], scores, rtol=1e-3)


def test_a_loaded_ensemble_has_maps_of_the_same_bits(ensemble, drawn, tmp_path):
    ensemble.save(tmp_path / "ensemble.safetensors")
    loaded = PatchCoreEnsemble.load(tmp_path / "ensemble.safetensors", "cpu")
    assert torch.equal(loaded.scales, ensemble.scales)
    assert [len(member.memory) for member in loaded.members] == [
        len(member.memory) for member in ensemble.members
    ]
    for one, other in zip(ensemble.predict(drawn), loaded.predict(drawn), strict=True):
        assert one.score == other.score and np.array_equal(one.maps, other.maps)


def test_an_ensemble_takes_as_many_weights_as_members():
    with pytest.raises(ValueError, match="longer than|shorter than"):
        PatchCoreEnsemble([{}, {}], weights=[None], pretrained=False)


def test_scales_need_maps_that_vary():
    batches = torch.rand(3, 2, 1, 8, 8, generator=torch.manual_seed(0), dtype=torch.float64)
    found = scales_of(iter(batches), lambda batch: [batch, 100 + 3 * batch])
    values = batches.numpy()
    expected = [(v.mean(), v.std()) for v in (values, 100 + 3 * values)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    made = standardised([batches[0], 100 + 3 * batches[0]], found)
    np.testing.assert_allclose(made[0], (values[0] - values.mean()) / values.std(), rtol=1e-5)
    np.testing.assert_allclose(made[1], made[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="never vary"):
        scales_of(iter(batches), lambda batch: [batch, torch.ones_like(batch)])


# ---- it detects ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Stripes with noise; half of the test images have a small dark square, with a mask."""
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    samples = []
    for index in range(16):
        stripes = 128 + 60 * np.sin(x / 9 + index) + 20 * np.sin(y / 30)
        image = np.stack([stripes, stripes * 0.8, 200 - stripes / 2], 2)
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        masks = ()
        if index >= 12:
            mask = np.zeros((256, 256), np.uint8)
            row, column = rng.integers(20, 200, 2)
            mask[row : row + 24, column : column + 24] = 255
            image[mask > 0] = (20, 60, 20)
            Image.fromarray(mask).save(folder / f"{index}_mask.png")
            masks = (folder / f"{index}_mask.png",)
        Image.fromarray(image).save(folder / f"{index}.png")
        kind = "square" if masks else "good"
        samples.append(Sample(folder / f"{index}.png", int(bool(masks)), kind, masks))
    train, validation, test = tuple(samples[:6]), tuple(samples[6:8]), tuple(samples[8:])
    return Scenario("parts", train, validation, test, "drawn", "CC0")


@pytest.mark.parametrize("features", ["colours", "efficientnet-lite0"])
def test_an_obvious_anomaly_is_found(parts, features):
    network = Colours() if features == "colours" else open_extractor()
    patchcore = PatchCore(features=network, share=0.02).fit(parts)
    result = evaluate(patchcore, parts)
    metrics = result.metrics()["all"]
    assert metrics["image_auroc"] == metrics["image_auprc"] == 1
    assert metrics["pixel_auroc_1"] > 0.95 and metrics["aupro_0.3"] > 0.8
    for sample, m in zip(result.samples, result.maps, strict=True):
        if sample.label:
            assert sample.load_mask()[np.unravel_index(m.argmax(), m.shape)]
    fit_thresholds(patchcore, parts.validation, 0.5, guarantee="average")
    assert patchcore.predict(parts.test[-1].path).is_anomalous


def test_the_example(scenario):
    names = {"open_extractor": open_extractor, "scenario": scenario}
    found = doctest.testmod(module, extraglobs=names)
    assert found.attempted == 2 and found.failed == 0


# ---- beside the core -----------------------------------------------------------------------


def test_what_is_installed_beside_them_does_not_import_them():
    """A wheel holds them; the core finds them by their entry points, as it finds strangers'."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "baselines" in settings["tool"]["setuptools"]["packages"]
    for room, unknown in (
        ("effad_core", "baselines|benchmarks"),
        ("parts_tray", "baselines|benchmarks"),
        ("baselines", "benchmarks|tests"),
    ):
        files = list((ROOT / room).rglob("*.py"))
        assert files
        for path in files:
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"^\s*(from|import) ({unknown})\b", text, re.M), path


def test_each_method_is_a_predictor_with_fit_and_names_its_paper():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = settings["project"]["entry-points"]["effad.methods"]
    assert {name for name in method_names() if not name.startswith("EfficientAD")} == set(points)
    for name, place in points.items():
        method = find_method(name)
        assert place == f"{method.__module__}:{method.__name__}" and name == method.NAME
        assert issubclass(method, Predictor) and method.map_names == ("combined",)
        assert callable(method.fit) and set(method.PROFILES) == set(PROFILES)
        assert re.search(r"\b20[12]\d\b", sys.modules[method.__module__].__doc__)


# ---- which features suit the teacher (benchmarks/psi.py) -----------------------------------


def test_the_benchmark_starts_from_the_projects_folder():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.psi", "--help"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--teacher" in done.stdout, done.stderr


@pytest.mark.parametrize("blocks", [(2, 4), (1, 2, 4), (3, 4), (4,)])
def test_other_blocks_of_the_same_backbone(blocks):
    """Each layer is the output of the block of that number."""
    backbone = BACKBONES["efficientnet-lite0"]()
    found = psi.blocks_of(backbone, blocks, "mean")
    net = backbone.network.eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected, layers = net.bn1(net.conv_stem(x)), {}
        for number, block in enumerate(net.blocks[:5]):
            expected = layers[number] = block(expected)
        for stage, channels, number in zip(found.stages, found.channels, blocks, strict=True):
            x = stage(x)
            assert torch.equal(x, layers[number]) and x.shape[1] == channels
    assert found.pooling == "mean"


def test_a_part_of_each_kind_takes_part(tmp_path):
    def samples(kind, count, label):
        return tuple(Sample(tmp_path / f"{kind}{i}.png", label, kind) for i in range(count))

    test = samples("good", 70, 0) + samples("structural_anomalies", 65, 1)
    test += samples("logical_anomalies", 3, 1)
    whole = Scenario("s", samples("train", 130, 0), samples("val", 5, 0), test, "drawn", "CC0")
    part = psi.part(whole)
    assert len(part.train) == 120 and set(part.train) <= set(whole.train)
    counts = [sum(s.anomaly_type == kind for s in part.test) for kind in ("good", *psi.KINDS)]
    assert counts == [60, 60, 3] and len(set(part.test)) == 123
    assert psi.part(whole) == part
    cracks = replace(
        whole, test=samples("good", 5, 0) + samples("crack", 50, 1) + samples("rust", 50, 1)
    )
    counts = [sum(s.label == label for s in psi.part(cracks).test) for label in (0, 1)]
    assert counts == [5, 60]  # of kinds that are not MVTec LOCO's together


def test_a_line_for_each_features(parts, narrow, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(psi, "open_scenario", lambda _: parts)
    monkeypatch.setattr(psi, "CHOICES", [((4,), "mean")])
    psi.main(["parts"])
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"parts +efficientnet-lite0, blocks 4, mean: 112 +1\.000", line)
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, narrow(out_channels=5).teacher, {})
    psi.main(["parts", "--teacher", str(path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("parts ") and f"teacher {path}: 5 " in line


def test_a_teachers_features_are_every_second_cell(narrow):
    detector = narrow()
    x = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        found = psi.Teacher(detector)(x)
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        expected = detector.teacher((x / 255 - mean) / std)[:, :, ::2, ::2]
    assert found.shape == (2, 8, 28, 28)
    torch.testing.assert_close(found, expected)


def test_what_the_benchmark_cannot_use_is_one_sentence(refusal):
    assert "absent" in refusal(psi.main, "absent-scenario")
