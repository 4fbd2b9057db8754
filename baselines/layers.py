"""What the methods read of pretrained networks: whole layers, or features of patches."""

from collections.abc import Sequence
from pathlib import Path

from effad_core.distillation.backbones import LITE0, normalisation, open_network

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet, EfficientNet, ResNet

# Network -> its layers by name, from the image inwards, with their channels; see `_parts`.
LAYERS = {
    LITE0: {"block1": 24, "block2": 40, "block3": 80, "block4": 112, "block5": 192},
    "resnet-18": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
    "wide-resnet-50": {"layer1": 256, "layer2": 512, "layer3": 1024},
    "wide-resnet-101": {"layer1": 256, "layer2": 512, "layer3": 1024},
    "resnext-101": {"layer1": 256, "layer2": 512, "layer3": 1024},
    "densenet-201": {"denseblock2": 512, "denseblock3": 1792},
    "efficientnet-b5": {"block6": 304},
}


class Layers(nn.Module):
    """A frozen network, cut off behind the deepest layer that is read.

    Input: RGB images, uint8, shape (N, 3, H, W). Output: the layers asked for, from the image
    inwards, each float32 of shape (N, C, h, w).

    Args:
        network: one of `LAYERS`.
        read: names of its layers, from the image inwards.
        weights: a state dict on disk; None: the network's usual ImageNet weights.
        pretrained: False leaves the weights as they are drawn, for a file that holds them all.

    Raises:
        ValueError: for an unknown network or layer.
        RunError: as `effad_core.distillation.backbones.open_network`.

    Example:
        >>> layers = Layers("efficientnet-lite0", ["block2", "block4"])
        >>> [tuple(f.shape) for f in layers(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))]
        [(1, 40, 32, 32), (1, 112, 16, 16)]
    """

    def __init__(
        self,
        network: str,
        read: Sequence[str],
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        if network not in LAYERS:
            raise ValueError(f"the network must be one of {', '.join(LAYERS)}, not {network!r}")
        known = LAYERS[network]
        if not read:
            raise ValueError(f"name at least one layer of {network} to read")
        if unknown := [name for name in read if name not in known]:
            raise ValueError(f"{network} has the layers {', '.join(known)}, not {unknown[0]}")
        self.network, self.read = network, tuple(read)
        self.channels = [known[name] for name in read]
        self.normalise = normalisation(network)
        parts = _parts(open_network(network, weights, pretrained))
        last = list(known).index(read[-1])
        self.parts = nn.ModuleDict(dict(zip(list(known)[: last + 1], parts, strict=False)))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Layers":
        """Stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        found, features = [], self.normalise(images)
        for name, part in self.parts.items():
            features = part(features)
            if name in self.read:
                found.append(features.float())
        return found


def _parts(network: nn.Module) -> list[nn.Module]:
    """The consecutive parts of a network whose outputs are its `LAYERS`."""
    if isinstance(network, ResNet):
        stem = (network.conv1, network.bn1, network.relu, network.maxpool)
        first = nn.Sequential(*stem, network.layer1)
        return [first, network.layer2, network.layer3, network.layer4]
    if isinstance(network, DenseNet):
        return [network.features[:7], network.features[7:9]]
    if isinstance(network, EfficientNet):
        return [network.features[:7]]
    blocks = network.blocks  # timm's EfficientNet-Lite0
    return [nn.Sequential(network.conv_stem, network.bn1, *blocks[:2]), *blocks[2:6]]


class PatchFeatures(nn.Module):
    """Features of patches, as PatchCore makes them from several layers (its Section 3.1).

    Each cell of a layer is joined by its eight neighbours, zeros beyond the border; the 9 C numbers
    of each layer are averaged in groups to `pooled`, and those of all layers to `channels`. This
    was made for layers of 512 and more channels. Of smaller layers (`pooled` is None) each channel
    gets its mean over the neighbourhood, and the layers' channels lie one after the other.

    Input: uint8 images (N, 3, H, W). Output: float32, shape (N, channels, h, w), on the grid of the
    first layer, to which the others are resized bilinearly.

    Args:
        network, read, weights, pretrained: as in `Layers`.
        pooled: numbers a cell to which each layer is averaged, or None.
        channels: numbers a cell at the end; None with means.

    Raises:
        ValueError: for a wrong number, or as `Layers`.
        RunError: as `Layers`.
    """

    def __init__(
        self,
        network: str,
        read: Sequence[str],
        pooled: int | None = None,
        channels: int | None = None,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        for name, count in (("pooled", pooled), ("channels", channels)):
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name} must be a number of channels, 1 or more, not {count!r}")
        if pooled is None and channels is not None:
            raise ValueError("channels needs pooled: means have as many as the layers")
        self.layers = Layers(network, read, weights, pretrained)
        self.pooled = pooled
        self.channels = sum(self.layers.channels) if pooled is None else channels or pooled

    def forward(self, images: Tensor) -> Tensor:
        return self.of_layers(self.layers(images))

    def of_layers(self, layers: Sequence[Tensor]) -> Tensor:
        """The features of layers that are already computed."""
        grid = layers[0].shape[2:]
        found = torch.cat([self._neighbourhoods(layer, grid) for layer in layers], dim=1)
        return found if self.pooled is None else _pool_channels(found, self.channels)

    def _neighbourhoods(self, layer: Tensor, grid: Sequence[int]) -> Tensor:
        if self.pooled is None:
            found = F.avg_pool2d(layer, 3, stride=1, padding=1, count_include_pad=False)
        else:
            values = F.unfold(layer, 3, padding=1).view(len(layer), -1, *layer.shape[2:])
            found = _pool_channels(values, self.pooled)
        if found.shape[2:] == grid:
            return found
        return F.interpolate(found, size=grid, mode="bilinear")


def _pool_channels(features: Tensor, count: int) -> Tensor:
    """Means of neighbouring channels, (N, C, h, w) -> (N, count, h, w)."""
    rows = features.flatten(2).transpose(1, 2)  # (N, h * w, C)
    pooled = F.adaptive_avg_pool1d(rows, count).transpose(1, 2)
    return pooled.reshape(len(features), count, *features.shape[2:])
