"""Psi of Algorithm 3: pretrained feature extractors of patch features.

Two maps of a backbone (see `backbones`) become one map of patch features, which the teacher learns
to predict (notebook 02). The paper's backbones keep the post-processing of PatchCore (Roth et al.,
2022; https://github.com/amazon-science/patchcore-inspection). It was made for layers of 512 and
more channels; of smaller layers it repeats some channels and mixes others, so EfficientNet-Lite0
has a plain mean over each 3x3 neighbourhood instead. `benchmarks/psi.py` measures the difference,
`benchmarks/top1.py` proves that a backbone's pretrained weights are in their places.
"""

import copy
from collections import Counter
from itertools import accumulate
from pathlib import Path

from effad_core.distillation.backbones import Backbone, open_backbone

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

PAPER_CHANNELS = 384  # values per cell at the end
LAYER_DIMENSION = 1024  # values per cell to which PatchCore pools each layer
# The classes that can be folded, by name (importing timm is slow); their subclasses may differ.
CONVOLUTIONS, BATCH_NORMS = ("Conv2d", "Conv2dSame"), ("BatchNorm2d", "BatchNormAct2d")


def pooling_kernels(channels: list[int], out_channels: int = PAPER_CHANNELS) -> list[Tensor]:
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


class _Tracer(fx.Tracer):
    """Sees convolutions and batch norms as single steps, timm's included."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = type(module).__name__ in CONVOLUTIONS + BATCH_NORMS
        return known or super().is_leaf_module(module, name)


def fold_batch_norms(network: nn.Module) -> int:
    """Fold the batch norms that directly follow a convolution into it, in place.

    In evaluation mode a batch norm scales and shifts each channel, which the convolution can do
    itself: the output is the same up to rounding. A batch norm is folded if the traced network
    shows that it alone reads that convolution's output and that both run once; a network that
    torch.fx cannot trace stays as it is.

    Returns:
        The number of batch norms that are gone.
    """
    try:
        nodes = list(_Tracer().trace(network).nodes)
    except Exception:  # whatever a decision that depends on pixels raises
        return 0
    named = dict(network.named_modules(remove_duplicate=False))
    calls = Counter(named[node.target] for node in nodes if node.op == "call_module")
    places = Counter(named.values())

    def runs_once(node: fx.Node, types: tuple[str, ...]) -> bool:
        module = named[node.target] if node.op == "call_module" else None
        return type(module).__name__ in types and calls[module] == places[module] == 1

    folded = 0
    for node in nodes:
        if not runs_once(node, BATCH_NORMS):
            continue
        source, norm = node.all_input_nodes[0], named[node.target]
        if not runs_once(source, CONVOLUTIONS) or len(source.users) > 1 or norm.running_var is None:
            continue
        conv = named[source.target]
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]  # timm's
        parent, _, name = node.target.rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Sequential(*rest))
        folded += 1
    return folded


class FeatureExtractor(nn.Module):
    """A frozen backbone up to the last block that counts, then a pooling of 3x3 neighbourhoods.

    Input: RGB images, uint8 or float in 0..1, shape (N, 3, H, W). Output: patch features, float32,
    shape (N, out_channels, ceil(H / stride), ceil(W / stride)), where `stride` is the backbone's:
    pixels between neighbouring cells (DenseNet's pooling may drop an incomplete last cell).

    The backbone's `pooling` says what becomes of its layers. All of it happens at a layer's own
    resolution; then a coarser layer is resized bilinearly to the grid of the output.

    * "patchcore": PatchCore's post-processing, one convolution per layer (see `pooling_kernels`),
      zeros beyond the border; the layers' results are added.
    * "mean": the mean of each channel over the neighbourhood, of the cells inside the image; the
      layers' channels lie one after the other.

    Batch norms are folded into the convolutions. bfloat16 autocast is fine.

    Args:
        name: of the backbone, for logs and cards.
        backbone: see `Backbone`.
        out_channels: of the features; None: 384, the paper's, with PatchCore's post-processing, and
            all channels of the layers with means, which cannot give another number.

    Raises:
        ValueError: for another number of channels than the pooling can give.
    """

    def __init__(self, name: str, backbone: Backbone, out_channels: int | None = None):
        super().__init__()
        self.name, self.licence = name, backbone.licence
        self.stride, self.normalise = backbone.stride, backbone.normalise
        self.pooling, self.layer_channels = backbone.pooling, tuple(backbone.channels)
        self.stages = copy.deepcopy(nn.ModuleList(backbone.stages)).eval()  # folded: not shared
        for stage in self.stages:
            fold_batch_norms(stage)
        if backbone.pooling == "mean":
            self._pool_means(backbone.channels, out_channels)
        else:
            self._pool_as_patchcore(backbone.channels, out_channels)
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    def _pool_means(self, channels: list[int], out_channels: int | None) -> None:
        self.out_channels = sum(channels)
        if out_channels not in (None, self.out_channels):
            raise ValueError(
                f"the features of {self.name} have {self.out_channels} channels, not "
                f"{out_channels}: leave the number out"
            )
        ends = list(accumulate(channels))
        self.spans = [slice(end - count, end) for count, end in zip(channels, ends, strict=True)]
        means = (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False) for _ in channels)
        self.pools = nn.ModuleList(means)

    def _pool_as_patchcore(self, channels: list[int], out_channels: int | None) -> None:
        self.out_channels = PAPER_CHANNELS if out_channels is None else out_channels
        if self.out_channels < 1:
            raise ValueError(f"the number of channels must be 1 or more, not {out_channels}")
        self.pools = nn.ModuleList()
        self.spans = []  # the output channels that each layer reaches; the others are left out
        for kernel in pooling_kernels(channels, self.out_channels):
            reached = kernel.flatten(1).any(1).nonzero().flatten().tolist()
            span = slice(reached[0], reached[-1] + 1)
            pool = nn.Conv2d(kernel.shape[1], len(kernel[span]), 3, padding=1, bias=False)
            pool.weight.data = kernel[span].clone()
            self.pools.append(pool)
            self.spans.append(span)

    def describe(self) -> str:
        """Layers and pooling, for a teacher's card."""
        layers = " and ".join(map(str, self.layer_channels))
        pooling = {"mean": "3x3 means", "patchcore": "PatchCore's post-processing"}[self.pooling]
        return f"{pooling} of layers with {layers} channels: {self.out_channels} channels"

    def input_size(self, teacher_size: int) -> int:
        """The side of Psi's square input whose cells lie at those of a padded teacher.

        Args:
            teacher_size: side of the teacher's square input; it has one cell per 4 pixels.

        Raises:
            ValueError: if the teacher's cells do not fill its input.
        """
        if teacher_size < 4 or teacher_size % 4:
            raise ValueError(f"teacher_size must be a positive multiple of 4, not {teacher_size}")
        return teacher_size * self.stride // 4

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
            if features is None:
                grid = x.shape[2:]  # with PatchCore's post-processing: of the first, finest layer
                if self.pooling == "mean":
                    grid = (-(-length // self.stride) for length in images.shape[2:])
                shape, layout = (len(x), self.out_channels, *grid), torch.channels_last
                features = torch.empty(shape, device=x.device, memory_format=layout).zero_()
            if pooled.shape[2:] != features.shape[2:]:
                size = features.shape[2:]
                pooled = F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
            features[:, span] += pooled
        return features


def open_extractor(
    name: str = "efficientnet-lite0",
    out_channels: int | None = None,
    weights: str | Path | None = None,
) -> FeatureExtractor:
    """Psi: a pretrained extractor of patch features, frozen, in evaluation mode.

    Args:
        name: "efficientnet-lite0" (works offline), "wide-resnet-101" (the paper's choice),
            "resnext-101" or "densenet-201" (both in the paper's Table 4).
        out_channels: channels of the features; None: 192 for EfficientNet-Lite0, and 384 for the
            others as in the paper.
        weights: a state dict on disk (torch or safetensors); None: the default ImageNet weights.

    Raises:
        ValueError: for an unknown name, or a number of channels that its pooling cannot give.
        RunError: for a package that is not installed, or for weights that are out of reach,
            damaged or of another network.
    """
    return FeatureExtractor(name, open_backbone(name, weights), out_channels)
