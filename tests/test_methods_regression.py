"""Descriptors, S-T and GCAD: against patches one by one, NumPy, and networks written out again."""

import functools
from dataclasses import replace
from itertools import product

from baselines import descriptors
from baselines.descriptors import (
    CHANNELS,
    DESCRIPTORS,
    DenseDescriptor,
    DensePool,
    Pooled,
    distillation_loss,
    interleave,
    open_descriptors,
)
from baselines.gcad import BOTTLENECK, GCAD, GLOBAL_CHANNELS, GlobalEncoder, UNet
from baselines.method import Schedule
from baselines.student_teacher import STUDENTS, StudentTeacher
from effad_core.datasets import ResizedImages
from effad_core.distillation.backbones import LITE0, normalisation, open_network
from effad_core.errors import RunError
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SIZE = (40, 48)  # of the images of S-T
MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet, as the networks want it
DEVIATION = np.array([0.229, 0.224, 0.225])[:, None, None]


def read(samples, size):
    """Images as Pillow resizes them: uint8, and normalised float32, both (N, 3, H, W)."""
    found = [
        Image.open(s.path).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        for s in samples
    ]
    whole = np.stack([np.asarray(image).transpose(2, 0, 1) for image in found])
    return torch.from_numpy(whole), torch.from_numpy((whole / 255 - MEAN) / DEVIATION).float()


@torch.no_grad()
def numbers(network, images):
    return network(images).double().numpy()


# Descriptors.


@pytest.mark.parametrize("size", [(9, 11), (8, 10), (3, 1)], ids=str)
@pytest.mark.parametrize("patch_size", DESCRIPTORS)
def test_the_dense_descriptors_are_those_of_each_patch(patch_size, size):
    torch.manual_seed(0)
    network = DenseDescriptor(patch_size, 0.05).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        dense = network(images)
        padded = F.pad(images, [patch_size // 2] * 4)
        assert dense.shape == (2, CHANNELS, *size)
        for y, x in product(*map(range, size)):
            patch = padded[..., y : y + patch_size, x : x + patch_size]
            torch.testing.assert_close(dense[..., y, x], network.patches(patch))


@pytest.mark.parametrize("patch_size", DESCRIPTORS)
def test_a_descriptor_of_a_patch_is_a_plain_network_with_max_pooling(patch_size):
    torch.manual_seed(0)
    network = DenseDescriptor(patch_size, 0.05)
    plain = nn.Sequential(
        *(nn.MaxPool2d(2) if isinstance(layer, DensePool) else layer for layer in network)
    )
    patches = torch.randn(3, 3, patch_size, patch_size)
    with torch.no_grad():
        expected = plain(patches)
        assert expected.shape == (3, 128, 1, 1)  # one patch, one vector
        assert torch.equal(network.patches(patches), expected[..., 0, 0])


def test_the_layers_at_the_papers_width_and_at_others():
    with torch.device("meta"):
        whole = {size: DenseDescriptor(size) for size in DESCRIPTORS}
        narrow = DenseDescriptor(33, 0.25)
    parameters = {size: sum(p.numel() for p in net.parameters()) for size, net in whole.items()}
    assert parameters == {  # weights, then biases
        17: 3 * 128 * 36 + 128 * 256 * 25 + 256 * 256 * 25 + 256 * 128 * 16 + 128 + 256 + 256 + 128,
        33: 3 * 128 * 25 + 128 * 256 * 25 + 256 * 256 * 4 + 256 * 128 * 16 + 128 + 256 + 256 + 128,
        65: 3 * 128 * 25 + 2 * 128 * 128 * 25 + 128 * 256 * 16 + 256 * 128 + 3 * 128 + 256 + 128,
    }
    shapes = [layer.weight.shape[:2] for layer in narrow if isinstance(layer, nn.Conv2d)]
    assert shapes == [(32, 3), (64, 32), (64, 64), (128, 64)]
    assert {layer.negative_slope for layer in narrow if isinstance(layer, nn.LeakyReLU)} == {5e-3}


def test_an_unknown_patch_size_is_refused():
    with pytest.raises(ValueError, match="must be 17, 33 or 65, not 16"):
        StudentTeacher(patch_sizes=(16,), pretrained=False)


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (7, 6), (2, 5)], ids=str)
def test_the_dense_pooling_loses_no_window(size):
    features = torch.randn(2, 3, *size)
    pooled = DensePool()(features)
    assert pooled.shape == (8, 3, size[0] // 2, size[1] // 2)
    every = F.max_pool2d(features, 2, stride=1)
    found = interleave(pooled)[..., : size[0] - 1, : size[1] - 1]
    assert torch.equal(found, every)


def test_maps_are_interleaved_as_by_hand():
    maps = torch.randn(8, 3, 2, 4)  # those of two images, one offset after the other
    expected = np.empty((2, 3, 4, 8), np.float32)
    for image, y, x in product(range(2), range(4), range(8)):
        offset = 2 * (y % 2) + x % 2
        expected[image, :, y, x] = maps[2 * offset + image, :, y // 2, x // 2]
    np.testing.assert_array_equal(interleave(maps), expected)


def test_the_loss_of_the_distillation_by_hand():
    torch.manual_seed(0)
    decoded, target, found = torch.randn(9, 5), torch.randn(9, 5), torch.randn(9, 6) + 4
    terms = distillation_loss(decoded, target, found)
    correlations = np.abs(np.corrcoef(found.double().numpy().T))
    off_diagonal = correlations[~np.eye(6, dtype=bool)]
    assert terms["knowledge"].item() == pytest.approx(np.mean((decoded - target).numpy() ** 2))
    assert terms["compactness"].item() == pytest.approx(off_diagonal.mean(), rel=1e-5)


def test_uncorrelated_numbers_are_compact_and_equal_ones_are_not():
    found = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    zero = torch.zeros(4, 1)
    assert distillation_loss(zero, zero, found)["compactness"].item() == pytest.approx(0, abs=1e-6)
    twice = found[:, :1] * torch.tensor([1.0, -3.0]) + 7
    assert distillation_loss(zero, zero, twice)["compactness"].item() == pytest.approx(1)


def test_the_pretrained_features_are_means_of_two_layers_over_the_image():
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    network, layers = open_network(LITE0).eval(), []
    for block in network.blocks[3:5]:
        block.register_forward_hook(lambda module, args, output: layers.append(output))
    with torch.no_grad():
        network(normalisation(LITE0)(images))
    pooled = Pooled(LITE0)
    found = pooled(images)
    expected = torch.cat([layer.flatten(2).mean(dim=2) for layer in layers], dim=1)
    assert found.shape == (2, 80 + 112)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not any(module.training for module in pooled.modules())
    assert not any(p.requires_grad for p in pooled.parameters())


@pytest.mark.parametrize(("name", "features"), [("resnet-18", 512), ("densenet-201", 1920)])
def test_other_networks_lose_their_classifier_too(name, features, monkeypatch):
    def drawn_weights(name, weights):
        return open_network(name, weights, pretrained=False)

    monkeypatch.setattr(descriptors, "open_network", drawn_weights)
    assert Pooled(name)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, features)


# The command.


def command(folder, output, *more):
    """Arguments of a short distillation."""
    options = "--width 0.05 --patch-sizes 17 33 --steps 3 --batch-size 3 --input-size 64"
    return [str(folder), "--output", str(output), "--device", "cpu", *options.split(), *more]


@pytest.fixture(scope="module")
def distilled(drawn, tmp_path_factory):
    """What the command writes."""
    path = tmp_path_factory.mktemp("distilled") / "descriptors.safetensors"
    descriptors.main(command(drawn[0].parent, path))
    return path


def test_the_commands_file_is_opened(distilled, scenario):
    tensors, header = read_tensors(distilled, "descriptors")
    assert header["card"]["network"] == LITE0 and header["card"]["steps"] == 3
    networks = open_descriptors([33, 17], 0.05, distilled)
    assert [network.patch_size for network in networks.values()] == list(networks) == [33, 17]
    for size, network in networks.items():
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        for name, value in network.state_dict().items():
            assert torch.equal(value, tensors[f"{size}.{name}"].float())
    method = GCAD(17, 0.05, 4, 64, weights=distilled)
    assert torch.equal(method.local_encoder[0].weight, networks[17][0].weight)
    method = StudentTeacher((17, 33), 0.05, 64, weights=distilled)
    for teacher in method.teachers:
        assert torch.equal(teacher[0].weight, networks[teacher.patch_size][0].weight)


def test_the_command_trains_every_layer(drawn, tmp_path, distilled):
    descriptors.main(command(drawn[0].parent, tmp_path / "d", "--steps", "0"))
    before, _ = read_tensors(tmp_path / "d", "descriptors")
    after, _ = read_tensors(distilled, "descriptors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("sizes", "width", "message"),
    [([17], 0.1, "'0.bias' has shape"), ([65], 0.05, "it lacks '0.bias'")],
)
def test_descriptors_of_another_kind_are_refused(distilled, sizes, width, message):
    with pytest.raises(RunError, match=f"of another architecture: {message}"):
        open_descriptors(sizes, width, distilled)


def test_a_resumed_distillation_gives_bit_identical_weights(
    drawn, tmp_path, distilled, monkeypatch, refusal
):
    monkeypatch.setattr(descriptors, "Run", functools.partial(Run, save_seconds=0))
    arguments = command(drawn[0].parent, tmp_path / "d", "--run-dir", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        calls = iter(range(5))  # two a step

        def pressed(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return distillation_loss(*args)

        patch.setattr(descriptors, "distillation_loss", pressed)
        with pytest.raises(SystemExit, match="130"):
            descriptors.main(arguments)
    assert not (tmp_path / "d").exists()
    _, header = read_tensors(tmp_path / "run" / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 2
    expected, _ = read_tensors(distilled, "descriptors")
    for _ in range(2):  # the second call finds a finished run
        descriptors.main(arguments)
        found, _ = read_tensors(tmp_path / "d", "descriptors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    message = refusal(descriptors.main, *arguments, "--steps", "4")
    assert "other settings (steps: 3, now 4)" in message


def test_the_command_refuses_a_patch_size_that_it_does_not_know(drawn, tmp_path, refusal):
    arguments = command(drawn[0].parent, tmp_path / "d", "--patch-sizes", "16")
    assert "must be 17, 33 or 65, not 16" in refusal(descriptors.main, *arguments)


# S-T.


def new_student_teacher(size=SIZE):
    torch.manual_seed(0)
    return StudentTeacher((17, 33), 0.03, size, pretrained=False)


@pytest.fixture
def student_teacher():
    """One with arbitrary statistics."""
    method = new_student_teacher()
    method.mean.normal_()
    method.deviation.uniform_(0.5, 2)
    return method


def outputs(method, images):
    """Of each patch size the teacher's normalised output and the students', in NumPy."""
    for number, (teacher, students) in enumerate(
        zip(method.teachers, method.students, strict=True)
    ):
        mean, deviation = method.mean[number].numpy(), method.deviation[number].numpy()
        target = (numbers(teacher, images) - mean) / deviation
        yield target, np.stack([numbers(student, images) for student in students])


def test_the_teachers_statistics_are_those_of_all_pixels(student_teacher, scenario):
    student_teacher.find_statistics(ResizedImages(scenario.train, SIZE))
    _, images = read(scenario.train, SIZE)
    for number, teacher in enumerate(student_teacher.teachers):
        every = numbers(teacher, images)
        found = student_teacher.mean[number, :, 0, 0], student_teacher.deviation[number, :, 0, 0]
        np.testing.assert_allclose(found[0], every.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], every.std(axis=(0, 2, 3)), rtol=1e-3)


def test_the_students_loss_by_hand(student_teacher, scenario):
    (phase,) = student_teacher.phases(ResizedImages(scenario.train, SIZE))
    terms = phase.loss([3, 1], None)
    _, images = read([scenario.train[3], scenario.train[1]], SIZE)
    expected = [
        sum(((student - target) ** 2).sum(axis=1).mean() for student in students)
        for target, students in outputs(student_teacher, images)
    ]
    assert list(terms) == ["L17", "L33"]
    assert [t.item() for t in terms.values()] == pytest.approx(expected, rel=1e-4)

    sum(terms.values()).backward()
    assert len(student_teacher.students) == 2
    for students in student_teacher.students:
        assert len(students) == STUDENTS == 3
        assert all(p.grad.any() for p in students.parameters())
    assert all(p.grad is None for p in student_teacher.teachers.parameters())
    (group,) = phase.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 1e-5)


@pytest.mark.parametrize("method", [StudentTeacher, GCAD])
def test_the_short_profiles_alone_have_another_learning_rate(method, scenario):
    small = {"width": 0.05, "image_size": 32, "pretrained": False}
    images = ResizedImages(scenario.train, (32, 32))
    for arguments, rate in (({}, 1e-4), ({"learning_rate": 3e-3}, 3e-3)):
        (phase,) = method(**small, **arguments).phases(images)
        assert phase.optimizer.param_groups[0]["lr"] == rate
    rates = {p: profile.arguments.get("learning_rate") for p, profile in method.PROFILES.items()}
    assert rates == {"smoke": 1e-3, "quick": 1e-3, "laptop": 1e-3, "paper": None}


def maps_by_hand(method, images):
    """e and v of each patch size, float64, (patch sizes, 2, N, H, W)."""
    found = []
    for target, students in outputs(method, images):
        mean = students.mean(axis=0)
        error = ((mean - target) ** 2).sum(axis=1)
        # E|x|^2 - |E x|^2, as in the paper
        variance = (students**2).sum(axis=2).mean(axis=0) - (mean**2).sum(axis=1)
        found.append([error, variance])
    return np.array(found)


def test_e_and_v_by_hand(student_teacher, scenario):
    raw, images = read(scenario.train[:2], SIZE)
    with torch.no_grad():
        found = torch.cat(student_teacher.raw_maps(raw), dim=1).numpy()  # (N, maps, H, W)
    expected = maps_by_hand(student_teacher, images)
    assert found.shape == (2, 4, *SIZE)
    np.testing.assert_allclose(
        found, expected.reshape(4, 2, *SIZE).swapaxes(0, 1), rtol=1e-3, atol=1e-6
    )


def test_maps_are_standardised_by_validation_images_and_averaged_over_patch_sizes(
    student_teacher, scenario
):
    with torch.no_grad():
        student_teacher.finish(None, ResizedImages(scenario.validation, SIZE), 0)
    raw, images = read(scenario.train[:2], SIZE)
    known = maps_by_hand(student_teacher, read(scenario.validation, SIZE)[1])
    mean = known.mean(axis=(2, 3, 4), keepdims=True)
    deviation = known.std(axis=(2, 3, 4), keepdims=True)
    error, variance = np.moveaxis((maps_by_hand(student_teacher, images) - mean) / deviation, 1, 0)
    expected = (error + variance).mean(axis=0)
    shown, judged = student_teacher._shown_and_judged(raw)
    assert shown.shape == (2, 1, *SIZE)
    np.testing.assert_allclose(shown[:, 0].numpy(), expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(shown, judged)


# GCAD.


def new_gcad(size=(64, 96)):
    torch.manual_seed(0)
    return GCAD(17, 0.03, 4, size, pretrained=False)


def convolution(layer, features):
    return F.relu(F.conv2d(features, layer.weight, layer.bias, padding=1))


def test_the_u_net_is_the_one_written_out():
    torch.manual_seed(0)
    network = UNet(7, 4)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features, skips = images, []
        for level, block in enumerate([network.first, *network.down]):
            if level:
                skips.append(features)
                features = F.max_pool2d(features, 2)
            features = convolution(block[2], convolution(block[0], features))
            assert features.shape == (2, 4 * 2**level, 32 // 2**level, 48 // 2**level)
        for level in (3, 2, 1, 0):
            enlarge, block = network.enlarge[3 - level], network.merge[3 - level]
            features = F.conv_transpose2d(features, enlarge.weight, enlarge.bias, stride=2)
            features = torch.cat([features, skips[level]], dim=1)
            features = convolution(block[2], convolution(block[0], features))
            assert features.shape == (2, 4 * 2**level, 32 // 2**level, 48 // 2**level)
        expected = F.conv2d(features, network.head.weight, network.head.bias)
        assert expected.shape == (2, 7, 32, 48)
        torch.testing.assert_close(network(images), expected)


def test_the_papers_u_net_has_64_to_1024_channels():
    with torch.device("meta"):
        network = UNet(CHANNELS)
    wide = [64, 128, 256, 512, 1024]
    double = [9 * a * b + b + 9 * b * b + b for a, b in zip([3, *wide], wide, strict=False)]
    merge = [9 * 2 * b * b + b + 9 * b * b + b for b in wide[:-1]]
    enlarge = [4 * 2 * b * b + b for b in wide[:-1]]
    expected = sum(double) + sum(merge) + sum(enlarge) + 64 * CHANNELS + CHANNELS
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (256, 256)], ids=str)
def test_the_global_encoder_gives_a_map_as_large_as_the_image(size):
    with torch.device("meta"):
        network = GlobalEncoder(size)
        found = []
        network.narrow.register_forward_hook(lambda *call: found.append(call))
        assert network(torch.empty(2, 3, *size)).shape == (2, GLOBAL_CHANNELS, *size)
    ((_, (features,), output),) = found
    assert features.shape == (2, 64, size[0] // 32, size[1] // 32)
    assert output.shape == (2, BOTTLENECK, 1, 1)
    assert BOTTLENECK == 32 and GLOBAL_CHANNELS == 10


def test_sides_that_the_global_encoder_cannot_halve_are_refused():
    with pytest.raises(ValueError, match="multiples of 32 for GCAD, not"):
        new_gcad((64, 80))


@pytest.mark.parametrize("size", [(32, 32), (64, 96)], ids=str)
def test_whatever_the_image_32_numbers_decide_the_output(size):
    torch.manual_seed(0)
    network = GlobalEncoder(size)
    code = torch.randn(2, BOTTLENECK, 1, 1)
    images = torch.randn(2, 2, 3, *size)  # two pairs
    with torch.no_grad():
        assert not torch.allclose(network(images[0]), network(images[1]))
        network.narrow.register_forward_hook(lambda *call: code)
        assert torch.equal(network(images[0]), network(images[1]))
        assert not torch.allclose(network(images[0], skip=0.1), network(images[1], skip=0.1))


def test_32_directions_in_which_the_output_follows_the_image():
    """The rank of the Jacobian, which is that of its products with random vectors."""
    torch.manual_seed(0)
    network = GlobalEncoder((64, 64)).double()
    image = torch.randn(1, 3, 64, 64).double().requires_grad_()
    for skip, expected in ((0.0, 32), (1.0, 40)):  # the skip connections carry more
        output = network(image, skip)
        products = [
            torch.autograd.grad(output, image, torch.randn_like(output), retain_graph=True)[0]
            for _ in range(40)
        ]
        assert torch.linalg.matrix_rank(torch.stack(products).flatten(1), rtol=1e-9) == expected


def test_the_skip_connections_fade_within_the_first_quarter(scenario, monkeypatch):
    found, forward = [], GlobalEncoder.forward

    def recording(self, images, skip=0.0):
        found.append(skip)
        return forward(self, images, skip)

    monkeypatch.setattr(GlobalEncoder, "forward", recording)
    method = new_gcad((32, 32)).fit(scenario, Schedule((16,), 1), device="cpu")
    assert found[:16] == pytest.approx([1, 0.75, 0.5, 0.25] + 12 * [0])
    assert set(found[16:]) == {0}  # for the scales of the maps

    found.clear()
    method.maps_and_scores(read(scenario.train[:1], (32, 32))[0])
    assert found == [0]


def test_the_global_encoder_adds_faded_skips_as_written_out():
    torch.manual_seed(0)
    network = GlobalEncoder((64, 96))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, down = images, []
        for layer in network.down:
            features = F.relu(F.conv2d(features, layer.weight, layer.bias, stride=2, padding=1))
            down.append(features)
        code = torch.einsum("nchw,kchw->nk", features, network.narrow.weight)
        code = code + network.narrow.bias
        wide = torch.einsum("nk,kchw->nchw", code, network.widen.weight)
        wide = F.relu(wide + network.widen.bias[:, None, None])
        for layer, skip in zip(network.up, reversed(down), strict=True):
            wide = wide + 0.3 * skip
            wide = F.conv_transpose2d(wide, layer.weight, layer.bias, stride=2, padding=1)
            if layer is not network.up[-1]:
                wide = F.relu(wide)
        torch.testing.assert_close(network(images, skip=0.3), wide)


@pytest.fixture
def gcad_step(scenario):
    """GCAD with arbitrary statistics, and the losses of a step in the middle of its training."""
    method = new_gcad((32, 32))
    method.mean.normal_()
    method.deviation.uniform_(0.5, 2)
    (phase,) = method.phases(ResizedImages(scenario.train, (32, 32)))
    assert phase.rate(0.6) == 1
    return method, phase, phase.loss([2, 0], None)


def test_the_losses_by_hand(gcad_step, scenario):
    method, _, terms = gcad_step
    _, images = read([scenario.train[2], scenario.train[0]], (32, 32))
    local = (numbers(method.local_encoder, images) - method.mean.numpy()) / method.deviation.numpy()
    encoded = method.global_encoder(images)
    pairs = {
        "local": (numbers(method.local_regression, images), local),
        "knowledge": (method._decoder[0](encoded).detach().double().numpy(), local),
        "global": (numbers(method.global_regression, images), encoded.detach().double().numpy()),
    }
    expected = {key: ((a - b) ** 2).sum(axis=1).mean() for key, (a, b) in pairs.items()}
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("local", {"local_regression"}),
        ("knowledge", {"global_encoder", "decoder"}),
        ("global", {"global_regression"}),
    ],
)
def test_which_networks_each_loss_trains(gcad_step, term, reached):
    method, phase, terms = gcad_step
    terms[term].backward()
    for name, module in method.trained().items():
        for parameter in module.parameters():
            assert (parameter.grad is not None and parameter.grad.any()) == (name in reached), name
    assert all(p.grad is None for p in method.local_encoder.parameters())
    optimised = {id(p) for group in phase.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for m in method.trained().values() for p in m.parameters()}


def test_the_local_encoders_statistics_are_those_of_all_pixels(scenario):
    method = new_gcad((32, 64))
    method.find_statistics(ResizedImages(scenario.train, (32, 64)))
    every = numbers(method.local_encoder, read(scenario.train, (32, 64))[1])
    mean, deviation = every.mean(axis=(0, 2, 3)), every.std(axis=(0, 2, 3))
    np.testing.assert_allclose(method.mean[:, 0, 0], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(method.deviation[:, 0, 0], deviation, rtol=1e-3)


def test_the_map_is_the_sum_of_both_branches_each_standardised(scenario):
    size = (32, 64)
    method = new_gcad(size)
    method.mean.normal_()
    method.deviation.uniform_(0.5, 2)

    def branches(samples):
        images = read(samples, size)[1]
        local = (numbers(method.local_encoder, images) - method.mean.numpy()) / (
            method.deviation.numpy()
        )
        pairs = (
            (numbers(method.local_regression, images), local),
            (numbers(method.global_regression, images), numbers(method.global_encoder, images)),
        )
        return [((a - b) ** 2).sum(axis=1) for a, b in pairs]

    with torch.no_grad():
        method.finish(None, ResizedImages(scenario.validation, size), 0)
    expected = sum(
        (found - known.mean()) / known.std()
        for found, known in zip(
            branches(scenario.train[:2]), branches(scenario.validation), strict=True
        )
    )
    shown, judged = method._shown_and_judged(read(scenario.train[:2], size)[0])
    np.testing.assert_allclose(shown[:, 0].numpy(), expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(shown, judged)


# Fitting.


@pytest.mark.parametrize("build", [new_student_teacher, new_gcad], ids=["S-T", "GCAD"])
def test_fitting_finds_statistics_and_scales_and_leaves_the_frozen_network(build, scenario):
    method = build((32, 32))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.fit(scenario, Schedule((2,), 2), device="cpu")
    frozen = ("teachers.", "local_encoder.")
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name
    again = build((32, 32))
    again.load_state_dict(method.state_dict())
    again.find_statistics(ResizedImages(scenario.train, (32, 32)))
    torch.testing.assert_close(again.mean, method.mean)
    torch.testing.assert_close(again.deviation, method.deviation)
    shown, _ = method._shown_and_judged(read(scenario.validation, (32, 32))[0])
    assert shown.mean().item() == pytest.approx(0, abs=1e-3)  # on what scaled it


@pytest.mark.parametrize("build", [new_student_teacher, new_gcad], ids=["S-T", "GCAD"])
def test_a_file_holds_all_that_a_prediction_needs(build, scenario, tmp_path):
    method = build((32, 32)).fit(scenario, Schedule((2,), 2), run_dir=tmp_path, device="cpu")
    loaded = type(method).load(tmp_path, device="cpu")
    assert loaded.arguments == method.arguments
    images = read(scenario.train, (32, 32))[0]
    for a, b in zip(method.maps_and_scores(images), loaded.maps_and_scores(images), strict=True):
        assert torch.equal(a, b)


def test_gcads_decoder_is_in_the_checkpoint_and_not_in_the_detector(scenario, tmp_path):
    method = new_gcad((32, 32)).fit(scenario, Schedule((2,), 2), run_dir=tmp_path, device="cpu")
    checkpoint, _ = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    detector, _ = read_tensors(tmp_path / "detector.safetensors", "method")
    found = {name for name in checkpoint if name.startswith("decoder.")}
    assert found == {"decoder.weight", "decoder.bias"}
    assert torch.equal(checkpoint["decoder.weight"], method._decoder[0].weight)
    assert not [name for name in detector if "decoder" in name]


@pytest.mark.parametrize("build", [new_student_teacher, new_gcad], ids=["S-T", "GCAD"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_taken_up_equals_an_uninterrupted_one(
    build, steps, scenario, tmp_path, monkeypatch
):
    """Also one that was interrupted behind its last step, before its maps' scales were found."""
    schedule = Schedule((2,), 2)

    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if steps == 2:
            patch.setattr(type(build()), "finish", pressed)
        else:

            def saved_and_pressed(run, iteration):
                run.save(iteration)
                pressed()

            patch.setattr(Run, "after", saved_and_pressed)
        with pytest.raises(KeyboardInterrupt):
            build((32, 32)).fit(scenario, schedule, run_dir=tmp_path, device="cpu")
    header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")[1]
    assert header["iteration"] == steps
    resumed = build((32, 32)).fit(scenario, schedule, run_dir=tmp_path, device="cpu").state_dict()
    whole = build((32, 32)).fit(scenario, schedule, device="cpu").state_dict()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


@pytest.mark.parametrize("build", [new_student_teacher, new_gcad], ids=["S-T", "GCAD"])
def test_without_validation_images_neither_can_be_fitted(build, scenario):
    with pytest.raises(ValueError, match="has no validation images, from which"):
        build((32, 32)).fit(replace(scenario, validation=()), Schedule((1,), 1), device="cpu")
