"""DSR: codebooks, simulated anomalies and losses against NumPy, SciPy, scikit-learn and loops."""

import functools
from itertools import product

from baselines import dsr
from baselines.dsr import (
    DSR,
    Autoencoder,
    Codebook,
    SubspaceRestriction,
    UNet,
    autoencoder_loss,
    blocks_of,
    exchanged,
    focal_loss,
    perlin_noise,
    random_masks,
    turned,
)
from baselines.method import Schedule
from effad_core.datasets import ResizedImages
from effad_core.errors import RunError
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import uniform_filter
from scipy.special import log_softmax, softmax
from sklearn.metrics import pairwise_distances, pairwise_distances_argmin

SIZE = (64, 96)


def read(samples, size=SIZE):
    """Images as Pillow resizes them, uint8, (N, 3, H, W)."""
    found = [
        Image.open(s.path).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        for s in samples
    ]
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in found]))


def new_dsr(size=SIZE):
    torch.manual_seed(0)
    return DSR(8, 40, 4, size, pretrained=False)


@pytest.fixture
def method(scenario):
    """One whose codes are features of images."""
    made = new_dsr()
    with torch.no_grad():
        for _ in range(3):
            autoencoder_loss(made.autoencoder, read(scenario.train).float() / 255)
    return made


@pytest.fixture
def images(scenario):
    """In 0..1."""
    return read(scenario.train).float() / 255


# Codebooks.


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    made = Codebook(30, 5)
    made.usage.uniform_(0.5, 3)
    made.mean.copy_(made.entries * made.usage[:, None])
    return made


def cells_of(features):
    """(N, C, H, W) -> float64, (N * H * W, C)."""
    return features.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, features.shape[1])


def test_each_cell_becomes_the_nearest_code(codebook):
    features = torch.randn(2, 5, 3, 4)
    nearest = pairwise_distances_argmin(cells_of(features), codebook.entries.double().numpy())
    assert len(set(nearest)) > 5
    found = codebook(features)
    assert found.shape == features.shape
    np.testing.assert_allclose(cells_of(found), codebook.entries.numpy()[nearest], atol=1e-6)
    distances = codebook.distances(features)
    assert distances.shape == (2, 12, 30)
    expected = pairwise_distances(cells_of(features), codebook.entries.double().numpy()) ** 2
    np.testing.assert_allclose(distances.reshape(24, 30), expected, rtol=1e-4, atol=1e-5)


def test_gradients_pass_a_codebook_unchanged(codebook):
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    gradient = torch.randn(2, 5, 3, 4)
    codebook(features).backward(gradient)
    assert torch.equal(features.grad, gradient)
    assert codebook.entries.grad is None


def test_codes_learn_running_means_as_written_out(codebook):
    rng = np.random.default_rng(0)
    codebook.usage.fill_(10)  # none fades
    codebook.mean.copy_(10 * codebook.entries)
    entries, mean, usage = (
        t.detach().double().numpy().copy()
        for t in (codebook.entries, codebook.mean, codebook.usage)
    )
    for _ in range(6):
        cells = rng.normal(1, 2, (2, 3, 4, 5))
        codebook.learn(torch.from_numpy(cells.transpose(0, 3, 1, 2)).float())
        counts, sums = np.zeros(30), np.zeros((30, 5))
        for cell in cells.reshape(-1, 5):
            nearest = ((cell - entries) ** 2).sum(axis=1).argmin()
            counts[nearest] += 1
            sums[nearest] += cell
        usage = 0.99 * usage + 0.01 * counts
        mean = 0.99 * mean + 0.01 * sums
        entries = mean / usage[:, None]
        np.testing.assert_allclose(codebook.usage, usage, rtol=1e-5)
        np.testing.assert_allclose(codebook.mean, mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(codebook.entries, entries, rtol=1e-4, atol=1e-6)


def test_the_first_codes_are_features_of_the_first_batch():
    torch.manual_seed(0)
    codebook = Codebook(200, 5)
    features = torch.randn(1, 5, 3, 4)
    codebook.learn(features)
    apart = pairwise_distances(codebook.entries.numpy(), cells_of(features))
    is_a_cell = apart.min(axis=1) < 1e-4
    assert is_a_cell.sum() >= 198  # the others are means of five cells and more, of twelve
    assert set(apart[is_a_cell].argmin(axis=1)) == set(range(12))


def test_a_code_that_nothing_chooses_is_drawn_anew():
    torch.manual_seed(0)
    codebook = Codebook(3, 2)
    codebook.entries.copy_(torch.tensor([[1.0, 0], [50, 50], [60, 60]]))
    codebook.usage.copy_(torch.tensor([4.0, 0.04, 1.0]))  # the second one falls below 0.05
    codebook.mean.copy_(codebook.entries * codebook.usage[:, None])
    features = torch.tensor([[1.0, 2.0], [0.5, 0.25]]).T[None, :, :, None]  # two cells
    codebook.learn(features)
    cells = cells_of(features)
    assert any(np.allclose(codebook.entries[1], cell, atol=1e-4) for cell in cells)
    np.testing.assert_allclose(codebook.entries[2], [60, 60], rtol=1e-4)  # not yet
    assert codebook.usage[1] == 1 and codebook.usage[2] == pytest.approx(0.99)


def test_codes_move_to_the_middle_of_the_cells_that_choose_them():
    torch.manual_seed(0)
    codebook = Codebook(20, 2)
    middles = torch.tensor([[10.0, 0], [0, 10], [-10, -10]])
    for _ in range(600):
        cells = middles.repeat(16, 1) + 0.3 * torch.randn(48, 2)
        codebook.learn(cells.T[None, :, None])
    nearest = pairwise_distances_argmin(cells.numpy(), codebook.entries.numpy())
    assert 3 <= len(set(nearest)) <= 20
    for middle in range(3):
        own = codebook.entries[sorted(set(nearest[middle::3]))]
        assert (own - middles[middle]).norm(dim=1).max() < 1


# Simulated anomalies.


def test_perlin_noise_is_the_definitions():
    size, cells = (12, 15), (4, 3)
    found = perlin_noise(size, cells, np.random.default_rng(5))
    angles = 2 * np.pi * np.random.default_rng(5).random((5, 4))

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    expected = np.empty(size)
    for row, column in product(*map(range, size)):
        y, x = row * 4 / 12, column * 3 / 15
        total = 0
        for grid_y, grid_x in product((int(y), int(y) + 1), (int(x), int(x) + 1)):
            angle = angles[grid_y, grid_x]
            product_ = np.cos(angle) * (y - grid_y) + np.sin(angle) * (x - grid_x)
            total += fade(1 - abs(y - grid_y)) * fade(1 - abs(x - grid_x)) * product_
        expected[row, column] = np.sqrt(2) * total
    assert found.shape == size
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("cells", [(1, 1), (4, 8), (32, 2)], ids=str)
def test_perlin_noise_is_zero_where_its_gradients_lie_and_small_elsewhere(cells):
    noise = perlin_noise((64, 64), cells, np.random.default_rng(0))
    assert not noise[:: 64 // cells[0], :: 64 // cells[1]].any()
    assert 0.1 < np.abs(noise).max() <= 1


def test_masks_are_of_zeros_and_ones_and_about_half_of_them_are_empty():
    masks = random_masks(300, (32, 48), np.random.default_rng(0))
    assert masks.shape == (300, 1, 32, 48)
    assert set(masks.unique().tolist()) == {0, 1}
    shares = masks.mean(dim=(1, 2, 3)).numpy()
    assert 0.5 - 0.09 < (shares == 0).mean() < 0.5 + 0.2  # some noise stays below 0.5
    assert 0.02 < shares[shares > 0].mean() < 0.3
    again = random_masks(300, (32, 48), np.random.default_rng(0))
    assert torch.equal(masks, again)


def test_masks_are_the_turned_noise_above_a_half(monkeypatch):
    """With angles of 0, masks are where the noise of the same random numbers is above 0.5."""
    found = []

    def recording(*args):
        found.append(perlin_noise(*args))
        return found[-1]

    monkeypatch.setattr(dsr, "perlin_noise", recording)
    monkeypatch.setattr(dsr, "rotate", lambda image, angle, interpolation: image)
    masks = random_masks(40, (32, 32), np.random.default_rng(0))
    assert len(found) == 40 and masks.any()
    for mask, noise in zip(masks, found, strict=True):
        assert not mask.any() or np.array_equal(mask[0].numpy() == 1, noise > 0.5)


class Fixed:
    """Instead of a random generator: whether an image is turned, and by how many degrees."""

    def __init__(self, number: float, angle: float):
        self.number, self.angle = number, angle

    def random(self):
        return self.number

    def uniform(self, low, high):
        assert low <= self.angle <= high
        return self.angle


def test_images_are_turned_as_often_as_is_said():
    torch.manual_seed(0)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(turned(images, 0.4, Fixed(0.4, 90)), images)
    found = turned(images, 0.4, Fixed(0.39, 90))
    expected = torch.rot90(images, 1, (2, 3))
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1
    corner = turned(torch.full_like(images, 255), 0.4, Fixed(0.39, 45))[..., 0, 0]
    assert not corner.any()


def test_masks_of_whole_blocks_by_hand():
    torch.manual_seed(0)
    masks = (torch.rand(2, 1, 12, 20) < 0.04).float()
    found = blocks_of(masks, 4).numpy()
    expected = np.zeros((2, 1, 12, 20))
    for image, _, y, x in np.argwhere(masks.numpy()):
        expected[image, 0, y // 4 * 4 : y // 4 * 4 + 4, x // 4 * 4 : x // 4 * 4 + 4] = 1
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.mean() < 1


def test_codes_below_a_mask_are_exchanged_for_others_that_are_far_enough():
    torch.manual_seed(0)
    codebook = Codebook(60, 5)
    features = torch.randn(4, 5, 32, 24)
    quantised = codebook(features)
    masks = (torch.rand(4, 1, 128, 96) < 0.1).float()
    strengths = torch.tensor([0.21, 0.52, 1.0, 0.0])
    found = exchanged(features, quantised, codebook, masks, strengths)

    inside = masks.reshape(4, 32, 4, 24, 4).amax(dim=(2, 4)).bool()  # (N, h, w)
    assert 0.5 < inside.float().mean() < 0.95
    outside = ~inside[:, None].expand_as(found)
    assert torch.equal(found[outside], quantised[outside])

    highest = [int(0.21 * 60), int(0.52 * 60), 58, 3]  # ranks; 60 codes have the ranks 0 to 59
    entries = codebook.entries.double().numpy()
    for image in range(4):
        where = inside[image].flatten().numpy()
        chosen = cells_of(found[image : image + 1])[where]
        number = pairwise_distances_argmin(chosen, entries)
        np.testing.assert_array_equal(chosen, entries[number])  # each is an entry
        away = pairwise_distances(cells_of(features[image : image + 1])[where], entries)
        own = away[np.arange(len(away)), number]
        ranks = set((away < own[:, None] - 1e-7).sum(axis=1).tolist())
        assert ranks == set(range(3, highest[image] + 1))  # never of the nearest 5 %


def test_nothing_is_exchanged_without_a_mask():
    torch.manual_seed(0)
    codebook, features = Codebook(60, 5), torch.randn(2, 5, 8, 8)
    quantised = codebook(features)
    found = exchanged(features, quantised, codebook, torch.zeros(2, 1, 32, 32), torch.ones(2))
    assert torch.equal(found, quantised)


# Losses.


def test_the_focal_loss_is_that_of_a_softmax():
    torch.manual_seed(0)
    logits, masks = 3 * torch.randn(2, 2, 8, 9), (torch.rand(2, 1, 8, 9) < 0.3).float()
    logarithms = log_softmax(logits.double().numpy(), axis=1)
    own = np.where(masks[:, 0] > 0, logarithms[:, 1], logarithms[:, 0])
    expected = np.mean(-((1 - np.exp(own)) ** 2) * own)
    assert focal_loss(logits, masks).item() == pytest.approx(expected, rel=1e-5)


def test_without_anomalies_the_losses_are_those_of_restoring_the_codes(method, images):
    with torch.no_grad():
        terms = method.restoring_loss(images, torch.zeros(4, 1, *SIZE))
        codes = method.autoencoder
        low, high = codes.encode(images)
        restored = method.restrict_low(low), method.restrict_high(high)
        both = codes.codes_low(restored[0]), codes.codes_high(restored[1])
        normal = method.object_decoder(torch.cat([codes.enlarge(both[0]), both[1]], dim=1))
        general = codes.decoder(torch.cat([codes.enlarge(low), high], dim=1))
        logits = method.detect(torch.cat([normal, general], dim=1)).double().numpy()
    logarithms = log_softmax(logits, axis=1)[:, 0]
    expected = {
        "mask": np.mean(-((1 - np.exp(logarithms)) ** 2) * logarithms),
        "low": ((restored[0] - low) ** 2).mean().item(),
        "high": ((restored[1] - high) ** 2).mean().item(),
        "image": 10 * ((normal - images) ** 2).mean().item(),
    }
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_codes_are_exchanged_at_both_strides_or_at_one(method, images, monkeypatch):
    """And the mask that is asked for consists of the blocks of the coarsest stride."""
    seen = {"targets": []}

    def recording(logits, masks):
        seen["targets"].append(masks)
        return focal_loss(logits, masks)

    monkeypatch.setattr(dsr, "focal_loss", recording)
    for name in ("restrict_low", "restrict_high"):
        seen[name] = []
        getattr(method, name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0])
        )
    masks = torch.zeros(4, 1, *SIZE)
    masks[:, :, 9, 21] = 1
    with torch.no_grad():
        for _ in range(16):
            method.restoring_loss(images, masks)
        codes = method.autoencoder
        low, high = codes.encode(images)
    counts = {"both": 0, "low": 0, "high": 0}
    for low_in, high_in, targets in zip(
        seen["restrict_low"], seen["restrict_high"], seen["targets"], strict=True
    ):
        changed_low = (low_in - low).abs().amax(dim=1) > 1e-6  # (N, H / 8, W / 8)
        changed_high = (high_in - high).abs().amax(dim=1) > 1e-6
        for image in range(4):
            where_low = changed_low[image].nonzero().tolist()
            where_high = changed_high[image].nonzero().tolist()
            assert where_low in ([], [[1, 2]])
            if where_low:
                counts["both" if where_high else "low"] += 1
                if where_high:  # the codes at stride 4 around the mask know the ones at stride 8
                    with torch.no_grad():
                        encoded = codes.encoder_high(images)
                        known = codes.codes_high(codes.features_high(encoded, low_in))
                    away = (high_in - known)[image].abs().amax(dim=0) > 1e-6
                    assert away.nonzero().tolist() in ([], [[2, 5]])
            else:
                counts["high"] += 1
                assert where_high == [[2, 5]]
            expected = torch.zeros(SIZE)
            if where_low:
                expected[8:16, 16:24] = 1
            else:
                expected[8:12, 20:24] = 1
            assert torch.equal(targets[image, 0], expected)
    assert sum(counts.values()) == 64
    assert counts["both"] > max(counts["low"], counts["high"]) >= 1  # a half and two quarters
    assert min(counts.values()) > 64 / 4 / 2


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("mask", {"detect"}),
        ("low", {"restrict_low"}),
        ("high", {"restrict_high"}),
        ("image", {"restrict_low", "restrict_high", "object_decoder"}),
    ],
)
def test_which_networks_each_loss_trains(method, images, term, reached):
    method.restoring_loss(images, torch.ones(4, 1, *SIZE))[term].backward()
    for name, module in method.trained().items():
        found = {p.grad is not None and bool(p.grad.any()) for p in module.parameters()}
        assert (True in found) == (name in reached), name
    assert all(p.grad is None for p in method.autoencoder.parameters())


def test_the_second_phase_paints_what_the_mask_shows_in_one_colour(method, scenario, monkeypatch):
    size = ResizedImages(scenario.train, SIZE)
    mask = torch.zeros(2, 1, *SIZE)
    mask[:, :, 10:40, 20:70] = 1
    seen = {}
    monkeypatch.setattr(dsr, "turned", lambda images, probability, rng: images)
    monkeypatch.setattr(dsr, "random_masks", lambda count, size, rng: mask)
    for name, module in (
        ("painted", method.autoencoder.encoder_high),
        ("both", method.detect),
        ("refined", method.upsample),
    ):
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0], output)})
        )
    _, phase = method.phases(size)
    original = read([scenario.train[1], scenario.train[3]]).float() / 255
    inside = mask.bool().expand_as(original)
    opacities = []
    for _ in range(12):
        terms = phase.loss([1, 3], np.random.default_rng(0))
        painted = seen["painted"][0]
        assert torch.equal(painted[~inside], original[~inside])
        for image in range(2):
            slopes = []
            for channel in range(3):
                before, after = (
                    t[image, channel][mask[image, 0] > 0].double().numpy()
                    for t in (original, painted)
                )
                slope, offset = np.polyfit(before, after, 1)
                np.testing.assert_allclose(slope * before + offset, after, atol=1e-5)
                assert 0 <= offset / (1 - slope) <= 1  # the colour
                slopes.append(slope)
            assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-4)
            opacities.append(1 - slopes[0])
    assert 0.2 <= min(opacities) < 0.4 and 0.8 < max(opacities) <= 1

    inputs, coarse = seen["both"]
    expected = torch.cat([inputs, coarse.softmax(dim=1)], dim=1)
    torch.testing.assert_close(seen["refined"][0], expected)
    assert list(terms) == ["refined mask"]
    assert terms["refined mask"].item() == pytest.approx(
        focal_loss(seen["refined"][1], mask).item(), rel=1e-5
    )
    terms["refined mask"].backward()
    reached = {
        name for name, module in method.trained().items()
        if any(p.grad is not None and p.grad.any() for p in module.parameters())
    }  # fmt: skip
    assert reached == {"upsample"}


def test_the_learning_rate_falls_to_a_tenth_at_the_end_of_the_first_phase(method, scenario):
    first, second = method.phases(ResizedImages(scenario.train, SIZE))
    assert [first.rate(done) for done in (0, 0.79, 0.8, 0.99)] == [1, 1, 0.1, 0.1]
    assert second.rate(0.99) == 1
    assert [phase.optimizer.param_groups[0]["lr"] for phase in (first, second)] == [2e-4, 2e-4]


def test_each_phase_trains_its_own_networks(scenario):
    def weights(*lengths):
        fitted = new_dsr((64, 64)).fit(scenario, Schedule(lengths, 2), device="cpu")
        return fitted.state_dict()

    untrained, first, whole = weights(0, 0), weights(2, 0), weights(2, 2)
    for name in untrained:
        part = name.split(".")[0]
        in_first = part in ("restrict_low", "restrict_high", "object_decoder", "detect")
        assert torch.equal(first[name], whole[name]) or part == "upsample", name
        if not (in_first and name.endswith(".bias")):  # most lie before a norm, without effect
            assert torch.equal(untrained[name], first[name]) != in_first, name
    assert not torch.equal(first["upsample.head.weight"], whole["upsample.head.weight"])
    changed = {n.split(".")[0] for n in untrained if not torch.equal(untrained[n], whole[n])}
    assert changed == {"restrict_low", "restrict_high", "object_decoder", "detect", "upsample"}


# Networks and maps.


def test_the_shapes_between_the_networks(method, images):
    codes = method.autoencoder
    with torch.no_grad():
        low, high = codes.encode(images)
        assert low.shape == (4, 8, 8, 12) and high.shape == (4, 8, 16, 24)
        assert codes.joined(low, high).shape == (4, 16, 16, 24)
        for image in method.both(low, high):
            assert image.shape == (4, 3, *SIZE)
        for features in (low, high):
            assert SubspaceRestriction(8)(features).shape == features.shape
        assert UNet(6, 4)(torch.cat([images, images], dim=1)).shape == (4, 2, *SIZE)


@pytest.mark.parametrize("size", [48, (64, 72), 32, (32, 32)], ids=str)
def test_sizes_that_cannot_be_halved_so_often_are_refused(size):
    with pytest.raises(ValueError, match="must be multiples of 32 for DSR, more than 32x32, not"):
        new_dsr(size)


def test_the_smallest_size_gives_maps():
    shown, judged = new_dsr((32, 64)).shown_and_judged(torch.zeros(1, 3, 32, 64).byte())
    assert shown.shape == judged.shape == (1, 1, 32, 64)


def test_what_the_networks_are_shown(method, images):
    """Both images in their order, then with the coarse probabilities."""
    seen = {}
    watched = {
        "normal": method.object_decoder, "general": method.autoencoder.decoder,
        "coarse": method.detect, "refined": method.upsample,
    }  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0], output)})
        )
    with torch.no_grad():
        coarse, refined = method.logits(images)
        low, high = method.autoencoder.encode(images)
        joined = torch.cat([method.autoencoder.enlarge(low), high], dim=1)
    both = torch.cat([seen["normal"][1], seen["general"][1]], dim=1)
    assert torch.equal(seen["general"][0], joined)
    assert not torch.equal(seen["normal"][0], joined)
    assert torch.equal(seen["coarse"][0], both)
    assert torch.equal(seen["refined"][0][:, :6], both)
    np.testing.assert_allclose(seen["refined"][0][:, 6:], softmax(coarse, axis=1), atol=1e-6)
    assert torch.equal(seen["coarse"][1], coarse) and torch.equal(seen["refined"][1], refined)


def test_the_map_is_the_refined_probability_and_the_mean_coarse_one_is_judged(method, scenario):
    raw = read(scenario.train)
    with torch.no_grad():
        coarse, refined = (t.double().numpy() for t in method.logits(raw.float() / 255))
    shown, judged = method._shown_and_judged(raw)
    np.testing.assert_allclose(shown[:, 0], softmax(refined, axis=1)[:, 1], atol=1e-6)
    for own, probability in zip(judged[:, 0], softmax(coarse, axis=1)[:, 1], strict=True):
        expected = uniform_filter(probability, 21, mode="constant")  # zeros beyond the border
        np.testing.assert_allclose(own, expected, atol=1e-6)
    maps, scores = method.maps_and_scores(raw)
    assert torch.equal(maps, shown)
    np.testing.assert_allclose(scores[:, 0], judged.amax(dim=(1, 2, 3)), rtol=1e-6)


def test_a_file_holds_all_that_a_prediction_needs(scenario, tmp_path):
    schedule = Schedule((1, 1), 2)
    method = new_dsr().fit(scenario, schedule, run_dir=tmp_path, device="cpu")
    loaded = DSR.load(tmp_path, device="cpu")
    assert loaded.arguments == method.arguments
    images = read(scenario.train)
    for a, b in zip(method.maps_and_scores(images), loaded.maps_and_scores(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_resumed_run_gives_bit_identical_weights(steps, scenario, tmp_path, monkeypatch):
    """Interrupted in the first phase, between both, in the second one."""

    def fit(folder=None):
        method = new_dsr((32, 64))
        return method.fit(scenario, Schedule((2, 2), 2), run_dir=folder, device="cpu").state_dict()

    with monkeypatch.context() as patch:

        def pressed(run, iteration):
            if iteration == steps:
                run.save(iteration)
                raise KeyboardInterrupt

        patch.setattr(Run, "after", pressed)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    resumed, whole = fit(tmp_path), fit()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


# The autoencoder's own training.


def test_the_autoencoders_losses_by_hand(images):
    torch.manual_seed(0)
    network = Autoencoder(8, 40)
    terms = autoencoder_loss(network, images)
    with torch.no_grad():  # the codes have learnt, and now stay as they are
        encoded = network.encoder_high(images)
        low = network.to_low(network.encoder_low(encoded))
        numbers = pairwise_distances_argmin(
            cells_of(low), network.codes_low.entries.double().numpy()
        )
        nearest_low = network.codes_low.entries[numbers].view(4, 8, 12, 8).permute(0, 3, 1, 2)
        high = network.to_high(torch.cat([encoded, network.enlarge(nearest_low)], dim=1))
        numbers = pairwise_distances_argmin(
            cells_of(high), network.codes_high.entries.double().numpy()
        )
        nearest_high = network.codes_high.entries[numbers].view(4, 16, 24, 8).permute(0, 3, 1, 2)
        joined = torch.cat([network.enlarge(nearest_low), nearest_high], dim=1)
        expected = {
            "image": ((network.decoder(joined) - images) ** 2).mean().item(),
            "low": 0.25 * ((low - nearest_low) ** 2).mean().item(),
            "high": 0.25 * ((high - nearest_high) ** 2).mean().item(),
        }
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-3)


def test_the_image_loss_passes_the_codes_and_reaches_the_encoders(images):
    torch.manual_seed(0)
    network = Autoencoder(8, 40)
    autoencoder_loss(network, images)["image"].backward()
    for name, parameter in network.named_parameters():
        codes = name.startswith("codes_")
        assert parameter.requires_grad != codes
        assert (parameter.grad is None) if codes else parameter.grad.any(), name


def test_the_autoencoder_learns_to_rebuild_images():
    torch.manual_seed(0)
    network = Autoencoder(8, 40)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    squares = (torch.rand(4, 1, 4, 4) < 0.5).float()  # black and white
    images = squares.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    found = []
    for _ in range(80):
        terms = autoencoder_loss(network, images)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        found.append(terms["image"].item())
    assert found[0] > images.var().item() > 10 * found[-1]  # gray everywhere would cost as much


def command(folder, output, *more):
    """Arguments of a short training."""
    options = "--width 8 --codes 40 --steps 3 --batch-size 2 --crop 64"
    return [str(folder), "--output", str(output), "--device", "cpu", *options.split(), *more]


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    """What the command writes."""
    path = tmp_path_factory.mktemp("trained") / "autoencoder.safetensors"
    dsr.main(command(drawn[0].parent, path))
    return path


def test_the_commands_file_is_read(trained):
    tensors, header = read_tensors(trained, "autoencoder")
    assert header["card"]["steps"] == 3
    method = DSR(8, 40, 4, 64, weights=trained)
    found = method.autoencoder.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)
    assert not any(p.requires_grad for p in method.autoencoder.parameters())


def test_the_command_trains_every_weight(drawn, tmp_path, trained):
    dsr.main(command(drawn[0].parent, tmp_path / "a", "--steps", "0"))
    before, _ = read_tensors(tmp_path / "a", "autoencoder")
    after, _ = read_tensors(trained, "autoencoder")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("width", "codes"), [(16, 40), (8, 50)])
def test_an_autoencoder_of_another_kind_is_refused(trained, width, codes):
    with pytest.raises(RunError, match="is of another architecture: "):
        DSR(width, codes, 4, 64, weights=trained)


def test_sums_that_half_precision_cannot_hold_make_no_file_that_is_refused(
    drawn, tmp_path, monkeypatch
):
    def busy(network, images):
        terms = autoencoder_loss(network, images)
        network.codes_low.usage.mul_(1e5)
        network.codes_low.mean.mul_(1e5)
        return terms

    monkeypatch.setattr(dsr, "autoencoder_loss", busy)
    dsr.main(command(drawn[0].parent, tmp_path / "a", "--steps", "1"))
    assert DSR(8, 40, 4, 64, weights=tmp_path / "a").autoencoder.codes_low.usage.max() > 65504


def test_a_resumed_training_gives_bit_identical_weights(
    drawn, tmp_path, trained, monkeypatch, refusal
):
    monkeypatch.setattr(dsr, "Run", functools.partial(Run, save_seconds=0))
    arguments = command(drawn[0].parent, tmp_path / "a", "--run-dir", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        calls = iter(range(2))

        def pressed(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return autoencoder_loss(*args)

        patch.setattr(dsr, "autoencoder_loss", pressed)
        with pytest.raises(SystemExit, match="130"):
            dsr.main(arguments)
    assert not (tmp_path / "a").exists()
    _, header = read_tensors(tmp_path / "run" / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 2
    expected, _ = read_tensors(trained, "autoencoder")
    for _ in range(2):  # the second call finds a finished run
        dsr.main(arguments)
        found, _ = read_tensors(tmp_path / "a", "autoencoder")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    message = refusal(dsr.main, *arguments, "--codes", "50")
    assert "other settings (codes: 40, now 50)" in message
