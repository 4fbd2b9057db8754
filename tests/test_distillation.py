"""Algorithm 3 against a plain implementation, with small stand-ins for Psi."""

import csv
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effad_core import DistillationSchedule, EfficientAD, RunError, distill, distillation
from effad_core.distillation import PRESETS
from effad_core.networks import PatchDescriptionNetwork
from effad_core.runs import Run, read_tensors

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
TINY = DistillationSchedule(
    iterations=1, batch_size=3, statistics_images=5, size=64, padding=False, scales=(0.4, 0.8)
)


class Colours(nn.Module):
    """Psi: eight fixed mixtures of the colours of each 8x8 block, scaled far from 0 and 1."""

    name, out_channels = "colours", 8

    def forward(self, images):
        assert images.dtype == torch.uint8
        mixture = torch.linspace(-1, 1, 24).reshape(8, 3, 1, 1).sin()
        return 100 + 30 * F.conv2d(F.avg_pool2d(images.float() / 255, 8), mixture)


class PaddedPDN(nn.Module):
    """Psi: a padded PDN on the image at half its size, so its cells are those of a padded T."""

    name, out_channels = "pdn", 8

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((F.avg_pool2d(images.float() / 255, 2) - MEAN) / STD)


@pytest.fixture
def network(narrow, monkeypatch):
    """Makes narrow networks; distillation uses them too."""
    monkeypatch.setattr(distillation, "PatchDescriptionNetwork", narrow.network)

    def make(seed=0, **options):
        torch.manual_seed(seed)
        return narrow.network(**{"out_channels": 8} | options)

    return make


def draws(images, schedule, key, count):
    rng, size = np.random.default_rng(key), 2 * schedule.size
    if schedule.scales is None:
        return images.whole_images(rng, count, size, schedule.gray_probability)
    return images.crops(rng, count, size, schedule.scales, schedule.gray_probability)


def algorithm_3(network, psi, images, schedule, seed):
    """The paper's loop: statistics at once, one pass per image, whole float32 networks."""
    crop = slice(None) if schedule.padding else slice(4, -4)
    counts, left = [], schedule.statistics_images
    while left > 0:
        counts.append(min(left, schedule.batch_size))
        left -= counts[-1]
    y = torch.cat([psi(draws(images, schedule, (seed, 0, i), n)) for i, n in enumerate(counts)])
    y = y[..., crop, crop].double()
    mu = y.mean((0, 2, 3)).float()[:, None, None]
    sigma = y.std((0, 2, 3), correction=0).float()[:, None, None]
    adam = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-5)
    losses = []
    for iteration in range(schedule.iterations):
        loss = 0
        for image in draws(images, schedule, (seed, 1, iteration), schedule.batch_size):
            target = (psi(image[None])[..., crop, crop] - mu) / sigma
            small = F.avg_pool2d(image[None].float() / 255, 2)
            loss = loss + ((target - network((small - MEAN) / STD)) ** 2).mean()
        loss = loss / schedule.batch_size
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses, adam


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("scales", [None, (0.4, 0.8)])
def test_two_iterations_are_algorithm_3(network, pretraining, tmp_path, padding, scales):
    schedule = DistillationSchedule(
        iterations=2, batch_size=3, statistics_images=5, size=64, padding=padding, scales=scales
    )
    ours, plain = network(), network(padding=padding)
    distill(ours, Colours(), pretraining, schedule, run_dir=tmp_path, seed=4, log_every=1)
    losses, adam = algorithm_3(plain, Colours(), pretraining, schedule, seed=4)
    with (tmp_path / "log.csv").open() as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    tensors, _ = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    for index, state in adam.state_dict()["state"].items():
        moment = tensors[f"optimizer.{index}.exp_avg"]
        assert (moment - state["exp_avg"]).norm() <= 1e-3 * state["exp_avg"].norm(), index
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().max() < 4.1e-4 and (p - q).norm() <= 2e-3 * q.norm()


@pytest.mark.parametrize("padding", [False, True])
def test_cells_of_teacher_and_psi_lie_over_one_another(network, pretraining, padding):
    """A teacher that is Psi, normalised, has no loss; one cell beside it would have much."""
    psi = PaddedPDN(network(padding=True)).requires_grad_(False)
    schedule = DistillationSchedule(
        iterations=1, batch_size=4, statistics_images=4, size=64, padding=padding,
        scales=(0.4, 0.8), learning_rate=0.0,
    )  # fmt: skip
    crop = slice(None) if padding else slice(4, -4)
    y = psi(draws(pretraining, schedule, (0, 0, 0), 4))[..., crop, crop]
    mu, sigma = y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0)
    teacher = network()
    last = teacher[-1]
    last.weight.data /= sigma[:, None, None, None]
    last.bias.data = (last.bias.data - mu) / sigma
    row = distill(teacher, psi, pretraining, schedule)
    assert row["loss"] < 1e-6
    shifted = network()  # the same weights, not normalised: the loss can be large
    assert distill(shifted, psi, pretraining, schedule)["loss"] > 0.1


def test_the_loss_falls(network, pretraining):
    schedule = DistillationSchedule(
        iterations=250, batch_size=2, statistics_images=8, size=48, padding=False,
        scales=(0.3, 0.6), learning_rate=1e-2, cosine=True,
    )  # fmt: skip
    row = distill(network(), Colours(), pretraining, schedule, held_out=pretraining, log_every=50)
    assert row["iteration"] == 250
    assert row["loss"] < 0.5 and row["held_out_loss"] < 0.5  # 1: a teacher that says nothing


def test_a_resumed_run_equals_an_uninterrupted_one(network, pretraining, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "Run", functools.partial(Run, save_seconds=0))
    schedule = DistillationSchedule(
        iterations=4, batch_size=2, statistics_images=4, size=64, scales=(0.4, 0.8), cosine=True
    )
    whole = network()
    row = distill(whole, Colours(), pretraining, schedule, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        calls, loss = iter(range(2)), distillation.mean_squared_difference

        def pressed(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(distillation, "mean_squared_difference", pressed)
        with pytest.raises(KeyboardInterrupt):
            distill(network(), Colours(), pretraining, schedule, run_dir=tmp_path, log_every=1)
    assert not (tmp_path / "teacher.safetensors").exists()
    for _ in range(2):  # the second call finds a finished run
        resumed = network()
        again = distill(resumed, Colours(), pretraining, schedule, run_dir=tmp_path, log_every=1)
        np.testing.assert_array_equal(list(again.values()), list(row.values()))
        assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    with pytest.raises(RunError, match="other settings"):
        distill(network(), Colours(), pretraining, schedule, run_dir=tmp_path, seed=1)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_teacher_file_loads_into_a_detector(network, narrow, pretraining, tmp_path, size):
    teacher = network(size=size)
    distill(teacher, Colours(), pretraining, TINY, run_dir=tmp_path)
    ad = EfficientAD(size, out_channels=8).load_teacher(tmp_path / "teacher.safetensors")
    for p, q in zip(ad.teacher.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-3, atol=1e-6)
    card = ad.card["teacher"]
    assert card["extractor"] == "colours" and card["iteration"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors", "config.json", "log.csv", "teacher.safetensors"
    ]  # fmt: skip


def test_other_channels_are_refused(pretraining):
    with pytest.raises(ValueError, match="the teacher has 4 output channels, the extractor 8"):
        distill(PatchDescriptionNetwork(out_channels=4), Colours(), pretraining, TINY)


def test_dead_channel_of_psi(network, pretraining):
    class Dead(Colours):
        def forward(self, images):
            features = super().forward(images)
            features[:, 5] = 3
            return features

    with pytest.raises(ValueError, match="channel 5"):
        distill(network(), Dead(), pretraining, TINY)


def test_a_loss_that_is_not_finite_stops_the_run(network, pretraining):
    teacher = network()
    teacher[0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss is nan at iteration 1"):
        distill(teacher, Colours(), pretraining, TINY)


def test_paper_schedule_is_algorithm_3():
    paper = DistillationSchedule.paper()
    assert (paper.iterations, paper.batch_size, paper.statistics_images) == (60_000, 16, 10_000)
    assert (paper.learning_rate, paper.weight_decay) == (1e-4, 1e-5) and not paper.cosine
    assert paper.gray_probability == 0.1 and paper.size == 256 and paper.scales is None
    assert paper.padding and paper.precision == "float32"


def test_presets_by_name():
    iterations = [DistillationSchedule.named(name).iterations for name in PRESETS]
    assert iterations == sorted(iterations) and iterations[-1] == 60_000
    with pytest.raises(ValueError, match="smoke, quick, laptop, paper, not 'fast'"):
        DistillationSchedule.named("fast")
