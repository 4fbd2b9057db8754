"""The methods beside EfficientAD: PatchCore against scikit-learn's neighbours and a naive coreset.

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
from baselines.patchcore import PROJECTED, PatchCore, coreset
from benchmarks import psi
from effad_core import evaluate, open_extractor
from effad_core.datasets import Sample, Scenario
from effad_core.deployment.inspection import fit_thresholds
from effad_core.distillation.algorithm import save_teacher
from effad_core.distillation.backbones import BACKBONES
from effad_core.errors import DataError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
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
    found = features(pixels(paths, size)).numpy().astype(np.float64)
    return found.transpose(0, 2, 3, 1).reshape(-1, found.shape[1])


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
    patchcore = PatchCore(Colours(), size, 0.02, standardise=standardise)
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
    patchcore = PatchCore(Colours(60, shift=1000), share=1).fit(scenario, device="cpu")
    assert patchcore.distances(pixels(training_paths(scenario)[:1])).max() < 0.3


def test_maps_are_the_distances_resized(scenario, drawn):
    patchcore = PatchCore(Colours(), (256, 320), 0.01).fit(scenario, device="cpu")
    x = pixels(drawn[5:7], (256, 320))
    maps, distances = patchcore.combined_maps(x), patchcore.distances(x).numpy()
    assert maps.shape == (2, 1, 256, 320)
    for m, cells in zip(maps[:, 0].numpy(), distances, strict=True):
        expected = np.asarray(Image.fromarray(cells).resize((320, 256), Image.BILINEAR))
        np.testing.assert_allclose(m, expected, rtol=1e-4, atol=1e-4)
    found = patchcore.predict(drawn[5])
    assert found.map.shape == (264, 280) and np.isnan(found.st_map).all()
    assert found.score == pytest.approx(maps[0].max().item(), rel=1e-5)


def test_the_memory_depends_on_the_seed_alone(scenario, drawn):
    expected = PatchCore(Colours(), share=0.01).fit(scenario, seed=3, device="cpu")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = PatchCore(Colours(), share=0.01, precision="float32")
    again.fit(scenario, seed=4, device="cpu")
    assert not torch.equal(again.memory, expected.memory)
    again.fit(scenario, seed=3)  # nothing is left of the memory before
    assert torch.equal(again.memory, expected.memory)
    assert again.predict(drawn[7]).score == expected.predict(drawn[7]).score
    assert torch.equal(torch.get_rng_state(), state)


def test_of_many_patches_as_many_of_each_image_are_drawn(scenario):
    images = [patches(Colours(), [path]) for path in training_paths(scenario)]
    memories = []
    for seed in (0, 1):
        patchcore = PatchCore(Colours(), share=1, most_patches=4 * 9 + 3)
        memory = patchcore.fit(scenario, seed, "cpu").memory.numpy()
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
    patchcore = PatchCore(Colours(2), share=0.001).fit(scenario, device="cpu")
    assert given == [(120 * (100_000 // 120), 100)]
    assert patchcore.memory.shape == (100, 2)


def test_a_memory_has_one_patch_at_least(scenario):
    patchcore = PatchCore(Colours(), share=1e-9).fit(scenario, device="cpu")
    assert patchcore.memory.shape == (1, 6)


def test_standardised_distances_do_not_depend_on_the_channels_scales(scenario, drawn):
    scales = torch.tensor([1, 2**-10, 2**10, 2, 0.5, 32]).view(6, 1, 1)
    plain, scaled = (
        PatchCore(Colours(scale=scale), share=0.01, standardise=True).fit(scenario, device="cpu")
        for scale in (1, scales)
    )
    x = pixels(drawn[5:6])
    np.testing.assert_allclose(scaled.distances(x), plain.distances(x), rtol=1e-4, atol=1e-4)
    unlike = PatchCore(Colours(scale=scales), share=0.01).fit(scenario, device="cpu")
    assert unlike.distances(x).max() > 10 * plain.distances(x).max()
    assert unlike.fit(scenario).deviation.equal(torch.ones(1))


def test_a_channel_that_never_varies_stays_as_it_is(scenario, drawn):
    """Neither NaN nor a rounding error that is magnified."""
    scales = torch.tensor([1, 0, 1, 1, 1, 1.0]).view(6, 1, 1)
    with_dead = PatchCore(Colours(scale=scales), share=0.01, standardise=True)
    with_dead.fit(scenario, device="cpu")
    assert with_dead.deviation[1] == 1 and (with_dead.deviation != 1).sum() == 5
    assert np.isfinite(with_dead.predict(drawn[5]).score)


# ---- what it refuses, what it reads --------------------------------------------------------


def test_an_empty_memory_is_said(drawn):
    with pytest.raises(ValueError, match="the memory is empty: call fit first"):
        PatchCore(Colours()).predict(drawn[0])


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=f"share must be above 0 and at most 1, not {share}"):
        PatchCore(Colours(), share=share)


def test_sizes_and_precisions_that_do_not_exist(scenario):
    with pytest.raises(ValueError, match="image_size must be at least 256"):
        PatchCore(Colours(), image_size=64)
    with pytest.raises(ValueError, match="precision must be one of auto, float32, .* not 'half'"):
        PatchCore(Colours(), precision="half").fit(scenario, device="cpu")


def test_auto_is_settled_when_it_is_fitted(scenario, monkeypatch):
    exact = PatchCore(Colours(), share=0.01).fit(scenario, device="cpu")
    asked = []
    monkeypatch.setattr(
        module, "resolve_precision", lambda *given: asked.append(given) or "bfloat16"
    )
    patchcore = PatchCore(Colours(), share=0.01, precision="auto").fit(scenario, device="cpu")
    assert asked == [("auto", torch.device("cpu"))]
    assert patchcore.precision == "bfloat16" and patchcore.memory.dtype == torch.float32
    assert not torch.equal(patchcore.memory, exact.memory)  # the features were computed in it


def test_training_images_alone_are_read(scenario, drawn, monkeypatch):
    read, load = [], Sample.load
    monkeypatch.setattr(Sample, "load", lambda sample: read.append(sample.path) or load(sample))
    patchcore = PatchCore(Colours(), share=0.01)
    patchcore.threshold = patchcore.pixel_threshold = 3.0
    patchcore.fit(scenario, device="cpu")
    assert read == drawn[:4]
    assert patchcore.threshold is None and patchcore.pixel_threshold is None


def test_an_unreadable_training_image_is_named(scenario, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = replace(scenario, train=(*scenario.train, Sample(tmp_path / "bad.png", 0, "good")))
    with pytest.raises(DataError, match="bad.png"):
        PatchCore(Colours()).fit(bad, device="cpu")


def test_16_bit_images_keep_their_white(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(0, 4096, (260, 260)).astype(np.uint16)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    samples = [Sample(tmp_path / f"{index}.png", 0, "good") for index in range(3)]
    scenario = Scenario("deep", tuple(samples[:2]), tuple(samples[2:]), (), "drawn", "CC0")
    patchcore = PatchCore(Colours(), share=0.01).fit(scenario, device="cpu")
    assert patchcore.full_scale == scenario.full_scale == 4095


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
    patchcore = PatchCore(network, share=0.02).fit(parts)
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


def test_baselines_are_not_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["packages"]
    assert not [name for name in packages if name.startswith("baselines")]
    for room in ("effad_core", "parts_tray"):  # what is installed does not know them
        for path in (ROOT / room).rglob("*.py"):
            assert not re.search(
                r"^\s*(from|import) (baselines|benchmarks)\b",
                path.read_text(encoding="utf-8"),
                re.M,
            ), path


def test_each_baseline_is_a_predictor_with_fit_and_names_its_paper():
    files = [path for path in (ROOT / "baselines").glob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in files] == ["patchcore.py"]
    assert "CVPR 2022" in module.__doc__ and callable(PatchCore.fit)
    assert PatchCore.map_names == ("combined",)


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
