"""Algorithm 3 against a plain implementation, with small stand-ins for Psi."""

import csv
import functools
import os
import subprocess
import sys
from dataclasses import replace

from effad_core import DistillationSchedule, EfficientAD, RunError, distill
from effad_core.acceleration import precision
from effad_core.datasets import PretrainingImages
from effad_core.datasets.pretraining import Draws
from effad_core.distillation import algorithm, pairs
from effad_core.distillation.algorithm import held_out_loss, main
from effad_core.distillation.muon import KernelMuon
from effad_core.distillation.pairs import Pairs
from effad_core.errors import DataError
from effad_core.networks import PatchDescriptionNetwork
from effad_core.schedule import PROFILES
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._utils import ExceptionWrapper

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
TINY = DistillationSchedule(
    iterations=1, batch_size=3, statistics_images=5, size=64, padding=False, scales=(0.4, 0.8)
)


class Colours(nn.Module):
    """Psi: eight fixed mixtures of the colours of each 8x8 block, scaled far from 0 and 1."""

    name, out_channels = "colours", 8

    def describe(self):
        return "mixtures of colours: 8 channels"

    def input_size(self, teacher_size):
        return 2 * teacher_size

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

    def describe(self):
        return "a PDN: 8 channels"

    def input_size(self, teacher_size):
        return 2 * teacher_size

    def forward(self, images):
        return self.network((F.avg_pool2d(images.float() / 255, 2) - MEAN) / STD)


@pytest.fixture
def network(narrow, monkeypatch):
    """Makes narrow networks; distillation uses them too."""
    monkeypatch.setattr(algorithm, "PatchDescriptionNetwork", narrow.network)

    def make(seed=0, **options):
        torch.manual_seed(seed)
        return narrow.network(**{"out_channels": 8} | options)

    return make


def draws(images, schedule, key, numbers):
    """Each image from a generator of its own, whatever batch it is in."""
    size, gray, drawn = 2 * schedule.size, schedule.gray_probability, []
    for number in numbers:
        rng = np.random.default_rng((*key, number))
        if schedule.scales is None:
            drawn.append(images.whole_images(rng, 1, size, gray))
        else:
            drawn.append(images.crops(rng, 1, size, schedule.scales, gray))
    return torch.cat(drawn)


def algorithm_3(network, psi, images, schedule, seed):
    """The paper's loop: statistics at once, one pass per image, whole float32 networks."""
    crop = slice(None) if schedule.padding else slice(4, -4)
    y = psi(draws(images, schedule, (seed, 0), range(schedule.statistics_images)))
    y = y[..., crop, crop].double()
    mu = y.mean((0, 2, 3)).float()[:, None, None]
    sigma = y.std((0, 2, 3), correction=0).float()[:, None, None]
    adam = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-5)
    losses, size = [], schedule.batch_size
    for iteration in range(schedule.iterations):
        loss, numbers = 0, range(iteration * size, (iteration + 1) * size)
        for image in draws(images, schedule, (seed, 1), numbers):
            target = (psi(image[None])[..., crop, crop] - mu) / sigma
            small = F.interpolate(image[None].float() / 255, scale_factor=0.5, mode="bilinear")
            loss = loss + ((target - network((small - MEAN) / STD)) ** 2).mean()
        loss = loss / size
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
        moment = tensors[f"adam.{index}.exp_avg"]
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
    y = psi(draws(pretraining, schedule, (0, 0), range(4)))[..., crop, crop]
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


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    network, pretraining, tmp_path, monkeypatch, optimizer
):
    monkeypatch.setattr(algorithm, "Run", functools.partial(Run, save_seconds=0))
    schedule = replace(TINY, iterations=4, batch_size=2, optimizer=optimizer, cosine=True)
    whole = network()
    row = distill(whole, Colours(), pretraining, schedule, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        calls, loss = iter(range(2)), pairs.mean_squared_difference

        def pressed(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(pairs, "mean_squared_difference", pressed)
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


def test_other_images_of_the_same_names_and_number_are_refused(network, drawn, tmp_path):
    first, second = (PretrainingImages(paths, "a", "b") for paths in (drawn[:2], drawn[2:4]))
    options = {"run_dir": tmp_path, "held_out": first}
    distill(network(), Colours(), first, TINY, **options)
    with pytest.raises(RunError, match=r"other images \(the distillation images are others\);"):
        distill(network(), Colours(), second, TINY, **options)
    with pytest.raises(RunError, match=r"other images \(the held-out images are others\); choose"):
        distill(network(), Colours(), first, TINY, **options | {"held_out": second})


def test_a_machine_that_is_timed_otherwise_later(network, pretraining, tmp_path, monkeypatch):
    for seconds in (3, 1):  # of bfloat16
        times = {"float32": 4, "float32-winograd": 2, "bfloat16": seconds}
        known = {
            (torch.device("cpu"), "training", "small"): precision.Measurement("training", times)
        }
        monkeypatch.setattr(precision, "_measurements", known)
        schedule = replace(TINY, precision="auto")
        distill(network(), Colours(), pretraining, schedule, run_dir=tmp_path)
        _, header = read_tensors(tmp_path / "teacher.safetensors", "teacher")
        assert header["card"]["schedule"]["precision"] == "float32-winograd"


def test_a_teacher_that_lay_there_before_is_not_taken_for_the_runs(network, pretraining, tmp_path):
    path = tmp_path / "teacher.safetensors"
    distill(network(), Colours(), pretraining, TINY, run_dir=tmp_path)
    expected = path.read_bytes()
    algorithm.save_teacher(path, network(seed=5), {"extractor": "colours"})
    distill(network(), Colours(), pretraining, TINY, run_dir=tmp_path)
    assert path.read_bytes() == expected


def test_ctrl_c_is_a_line_that_says_how_to_go_on(drawn, tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(algorithm, "distill", pressed)
    with pytest.raises(SystemExit) as stop:
        main([str(drawn[0].parent), *OPTIONS, "--run-dir", str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nInterrupted: the same command goes on from here.\n"


@pytest.mark.parametrize("size", ["small", "medium"])
def test_teacher_file_loads_into_a_detector(network, narrow, pretraining, tmp_path, size):
    teacher = network(size=size)
    distill(teacher, Colours(), pretraining, TINY, run_dir=tmp_path)
    ad = EfficientAD(size, out_channels=8).load_teacher(tmp_path / "teacher.safetensors")
    for p, q in zip(ad.teacher.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-3, atol=1e-6)
    card = ad.card["teacher"]
    assert card["extractor"] == "colours" and card["iteration"] == 1
    assert card["features"] == "mixtures of colours: 8 channels"
    inputs = F.avg_pool2d(draws(pretraining, TINY, (0, 0), range(5)).float() / 255, 2)
    with torch.no_grad():
        output = teacher((inputs - MEAN) / STD).double()
    for key, values in (
        ("output_mean", output.mean((0, 2, 3))),
        ("output_deviation", output.std((0, 2, 3), correction=0)),
    ):
        np.testing.assert_allclose(card[key], values, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
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


def test_profiles_by_name():
    iterations = [DistillationSchedule.named(name).iterations for name in PROFILES]
    assert iterations == sorted(iterations) and iterations[-1] == 60_000
    with pytest.raises(ValueError, match="smoke, quick, laptop, paper, not 'fast'"):
        DistillationSchedule.named("fast")


# ---- the images: other processes, other backbones ------------------------------------------


def test_a_worker_process_draws_the_same_images(network, pretraining):
    rows = [
        distill(network(), Colours(), pretraining, replace(TINY, iterations=2), workers=workers)
        for workers in (0, 1)
    ]
    np.testing.assert_array_equal(*(list(row.values()) for row in rows))


def test_a_damaged_image_is_one_sentence_from_a_worker_process_too(network, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    images = PretrainingImages([tmp_path / "a.png"], "an empty file", "CC0")

    def worker(draws, **options):
        """Raises an error as torch does that hears of it from a worker process."""
        try:
            yield draws[0]
        except DataError:
            error = ExceptionWrapper(where="in DataLoader worker process 0")
        error.reraise()

    for loader in (pairs.DataLoader, worker):
        monkeypatch.setattr(pairs, "DataLoader", loader)
        with pytest.raises(DataError) as error:
            distill(network(), Colours(), images, TINY)
        assert str(error.value) == (
            f"The image {tmp_path / 'a.png'} is empty (0 bytes): copy it again or remove it."
        )


def test_a_draw_depends_on_its_number_alone(pretraining):
    draw = Draws(pretraining, (3, 1), 64, (0.4, 0.8))
    first = draw[5]
    assert first.shape == (3, 64, 64) and first.dtype == torch.uint8
    assert not torch.equal(draw[6], first) and torch.equal(draw[5], first)
    assert not torch.equal(Draws(pretraining, (3, 2), 64, (0.4, 0.8))[5], first)


@pytest.mark.parametrize("stride", [4, 16])
def test_an_extractor_of_another_stride_sees_another_size(network, pretraining, stride):
    """T's side is 64 pixels, 16 cells with padding: Psi must see 16 * stride pixels."""

    class Blocks(Colours):
        def input_size(self, teacher_size):
            return teacher_size * stride // 4

        def forward(self, images):
            assert images.shape[2:] == (16 * stride, 16 * stride)
            return F.avg_pool2d(images.float() / 255, stride)[:, [0, 1, 2, 0, 1, 2, 0, 1]]

    class Mean(nn.Module):
        """The teacher without loss: the mean colour of the 4x4 pixels at each cell."""

        def forward(self, inputs):
            assert inputs.shape[2:] == (64, 64)
            colours = F.avg_pool2d(inputs * STD + MEAN, 4)[:, [0, 1, 2, 0, 1, 2, 0, 1]]
            return (colours - mu) / sigma

    schedule = replace(TINY, padding=True)
    pairs = Pairs(Blocks(), schedule, torch.device("cpu"))
    mu, sigma = pairs.statistics(pretraining, 0)
    (images,) = pairs.images(pretraining, (0, 1), [range(3)])
    assert pairs.loss(Mean(), images, mu, sigma) < 1e-6


# ---- Muon ----------------------------------------------------------------------------------


def test_muon_on_kernels_is_muon_on_their_matrices():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().permute(0, 2, 3, 1).reshape(6, -1).clone())
    ours = KernelMuon([kernel], lr=0.1, weight_decay=0.01)
    plain = torch.optim.Muon([matrix], 0.1, 0.01, adjust_lr_fn="match_rms_adamw")
    start = matrix.detach().clone()
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 2)
        kernel.grad = gradient.to(memory_format=torch.channels_last)
        matrix.grad = gradient.permute(0, 2, 3, 1).reshape(6, -1)
        ours.step()
        plain.step()
    difference = kernel.permute(0, 2, 3, 1).reshape(6, -1) - matrix
    assert difference.norm() < 0.02 * (matrix - start).norm()  # torch rounds to bfloat16 on its way


def test_a_muon_step_computes_in_float32():
    """Five Newton-Schulz iterations in float64 give the same; bfloat16 would be 100 times off."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(6, 4, 3, 2).to(memory_format=torch.channels_last))
    kernel.grad = torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last)
    x = kernel.grad.permute(0, 2, 3, 1).reshape(6, -1).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = -0.1 * 0.2 * 24**0.5 * x  # rate, and Adam's size of a matrix of 6x24
    KernelMuon([kernel], lr=0.1, weight_decay=0).step()
    found = kernel.detach().permute(0, 2, 3, 1).reshape(6, -1).double()
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_muon_step_turns_every_direction_alike():
    """A step is an orthogonal matrix, roughly; its root mean square is 0.2 times the rate."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last))
    kernel.grad = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    KernelMuon([kernel], lr=0.1, weight_decay=0).step()
    values = torch.linalg.svdvals(kernel.detach().permute(0, 2, 3, 1).reshape(8, -1))
    assert values.max() < 2 * values.min()
    rms = kernel.detach().square().mean().sqrt()
    assert 0.7 * 0.02 < rms < 1.3 * 0.02


def test_muon_refuses_kernels_that_it_could_not_change():
    with pytest.raises(ValueError, match="channels_last"):
        KernelMuon([nn.Parameter(torch.randn(6, 4, 3, 2))], lr=0.1, weight_decay=0)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="not 'sgd'"):
        DistillationSchedule(optimizer="sgd")


# ---- the command ---------------------------------------------------------------------------


OPTIONS = (
    *("--profile", "smoke", "--hold-out", "1", "--iterations", "1"),
    *("--precision", "float32"),  # also where bfloat16 is faster
)


def test_two_processes_make_the_step_of_one_on_the_joined_batch(drawn, tmp_path):
    folder, runs = drawn[0].parent, {name: tmp_path / name for name in ("one", "two")}
    main([str(folder), *OPTIONS, "--run-dir", str(runs["one"])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "effad_core", "distill", folder, *OPTIONS, "--run-dir", runs["two"]],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        read_tensors(run / "checkpoint.safetensors", "checkpoint")[0] for run in runs.values()
    )
    assert len((runs["two"] / "log.csv").read_text().splitlines()) == 2  # one process writes
    assert one.keys() == two.keys()
    moments = [name for name in one if "momentum_buffer" in name or "exp_avg" in name]
    assert len(moments) == 4 + 2 * 4  # Muon's of 4 kernels, Adam's of 4 biases
    for name in moments:  # after one step: the gradients
        assert one[name].norm() > 0 and (one[name] - two[name]).norm() < 1e-4 * one[name].norm()
    for name in (n for n in one if n.startswith("teacher.")):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_a_batch_that_two_processes_cannot_part(monkeypatch):
    monkeypatch.setattr(algorithm.distributed, "rank_and_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="batch of 3 images cannot be parted among 2"):
        algorithm.distributed.own_batches(range(2), 3)


def test_parts_of_a_batch_are_all_of_it(monkeypatch):
    parts = []
    for rank in range(4):
        monkeypatch.setattr(algorithm.distributed, "rank_and_world", lambda r=rank: (r, 4))
        parts.append(algorithm.distributed.own_batches(range(5, 7), 8))
    for iteration, batches in zip((5, 6), zip(*parts, strict=True), strict=True):
        numbers = [number for batch in batches for number in batch]
        assert numbers == list(range(8 * iteration, 8 * iteration + 8))


def test_measuring_and_going_on_from_a_teacher(drawn, tmp_path, capsys):
    common = [str(drawn[0].parent), *OPTIONS]
    main([*common, "--run-dir", str(tmp_path / "a")])
    held = float(capsys.readouterr().out.split("held_out_loss ")[1].splitlines()[0])
    path = tmp_path / "a" / "teacher.safetensors"
    main([*common, "--measure", str(path)])
    measured = float(capsys.readouterr().out.split("held-out loss ")[1])
    assert abs(measured - held) < 2e-3 * held  # half precision on disk
    detector = EfficientAD().load_teacher(path)  # student and autoencoder as well
    with torch.no_grad():
        maps = detector.squared_differences(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    assert [m.shape for m in maps] == [(1, 192, 56, 56)] * 2
    features = "3x3 means of layers with 80 and 112 channels: 192 channels"
    assert detector.card["teacher"]["features"] == features
    main([*common, "--start", str(path), "--run-dir", str(tmp_path / "b")])
    card = read_tensors(tmp_path / "b" / "teacher.safetensors", "teacher")[1]["card"]
    assert card["start"]["iteration"] == 1 and card["start"]["start"] is None
    checkpoint = tmp_path / "a" / "checkpoint.safetensors"
    main([*common, "--measure", str(checkpoint)])
    assert abs(float(capsys.readouterr().out.split("loss ")[-1]) - held) < 1e-3 * held
    for wrong in ([], ["--measure", str(path), "--start", str(path)]):
        with pytest.raises(SystemExit):
            main([*common, *wrong])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"images": "absent"}, "absent are no folder: name an existing folder"),
        ({"--hold-out": "99"}, "99 of 8 pretraining images cannot be held out"),
        ({"--start": "absent.safetensors"}, "absent.safetensors does not exist"),
        ({"--weights": "absent.pth"}, "absent.pth does not exist"),
        ({"--channels": "384"}, "efficientnet-lite0 have 192 channels, not 384: leave the number"),
    ],
)
def test_what_the_command_cannot_use_is_one_sentence(drawn, tmp_path, change, sentence, refusal):
    options = {"--run-dir": str(tmp_path), "--profile": "smoke", "--hold-out": "1"} | change
    images = options.pop("images", str(drawn[0].parent))
    words = (part for option in options.items() for part in option)
    assert sentence in refusal(main, images, *words)


def test_held_out_loss_of_an_untrained_teacher(network, pretraining):
    loss = held_out_loss(network(), Colours(), pretraining, pretraining, TINY)
    assert 0.9 < loss < 1.3  # 1: each channel's mean
