"""Descriptors of the patch around every pixel: the teachers of S-T, and GCAD's local encoder.

Networks and training after Bergmann, Fauser, Sattlegger, Steger: Uninformed Students, CVPR 2020
(Section 3.1); the dense computation after Bailer et al.: Fast Dense Feature Extraction with CNNs
that have Pooling or Striding Layers, BMVC 2017: every pooling is done at all four offsets, and the
maps of the offsets are interleaved at the end.

    python -m baselines.descriptors path/to/photographs --output descriptors.safetensors

distils a network for each patch size from features of a pretrained network. The ones that are
shipped have a quarter of the paper's channels, and were distilled so; without them the methods
would need days on a CPU.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from baselines.layers import Layers
from baselines.method import train_steps
from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.datasets import open_pretraining
from effad_core.datasets.transforms import normalise
from effad_core.distillation.backbones import LITE0, TORCHVISION, normalisation, open_network
from effad_core.errors import command_errors
from effad_core.storage.files import as_path
from effad_core.storage.runs import Run
from effad_core.storage.shipped import shipped
from effad_core.storage.weights import load_weights, read_tensors, write_tensors

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = None  # in the lists below; a convolution is (output channels, kernel size)
DESCRIPTORS = {  # patch size -> layers that turn one patch into 128 numbers
    17: ((128, 6), (256, 5), (256, 5), (128, 4)),
    33: ((128, 5), POOL, (256, 5), POOL, (256, 2), (128, 4)),
    65: ((128, 5), POOL, (128, 5), POOL, (128, 5), POOL, (256, 4), (128, 1)),
}
CHANNELS = 128  # of a descriptor, whatever the widths
SLOPE = 5e-3  # of the leaky ReLUs
SHIPPED = "baselines/descriptors.safetensors"
SHIPPED_WIDTH = 0.25
KIND = "descriptors"


class DensePool(nn.Module):
    """Max pooling at all four offsets of a 2x2 window, so that no position is lost.

    Input (N, C, H, W); output (4 N, C, H // 2, W // 2), one map an offset.
    """

    def forward(self, features: Tensor) -> Tensor:
        height, width = (length // 2 * 2 for length in features.shape[-2:])
        padded = F.pad(features, (0, 1, 0, 1))
        offsets = product(range(2), repeat=2)
        windows = [padded[..., y : y + height, x : x + width] for y, x in offsets]
        return F.max_pool2d(torch.cat(windows), 2)


class DenseDescriptor(nn.Sequential):
    """Descriptors of the patch around every pixel, zeros beyond the border.

    Input: normalised images, shape (N, 3, H, W). Output: (N, 128, H, W).

    Args:
        patch_size: 17, 33 or 65 pixels.
        width: what the paper's numbers of channels between the layers are multiplied by.

    Raises:
        ValueError: for another patch size.
    """

    def __init__(self, patch_size: int, width: float = 1.0):
        if patch_size not in DESCRIPTORS:
            raise ValueError(f"the patch size must be 17, 33 or 65, not {patch_size!r}")
        layers, inside = [], 3
        last = len(DESCRIPTORS[patch_size]) - 1
        for number, layer in enumerate(DESCRIPTORS[patch_size]):
            if layer is POOL:
                layers.append(DensePool())
                continue
            channels = CHANNELS if number == last else round(layer[0] * width)
            layers.append(nn.Conv2d(inside, channels, layer[1]))
            if number < last:
                layers.append(nn.LeakyReLU(SLOPE))
            inside = channels
        super().__init__(*layers)
        self.patch_size = patch_size
        self.pools = DESCRIPTORS[patch_size].count(POOL)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        before, after = self.patch_size // 2, self.patch_size // 2
        maps = super().forward(F.pad(images, (before, after, before, after)))
        for _ in range(self.pools):
            maps = interleave(maps)
        return maps[..., :height, :width]

    def patches(self, patches: Tensor) -> Tensor:
        """Descriptors of patches, (N, 3, p, p) -> (N, 128): the same layers, pooled once."""
        for layer in self:
            patches = F.max_pool2d(patches, 2) if isinstance(layer, DensePool) else layer(patches)
        return patches[..., 0, 0]


def interleave(maps: Tensor) -> Tensor:
    """Undo the last `DensePool`: (4 N, C, h, w), one map an offset -> (N, C, 2 h, 2 w)."""
    four, channels, height, width = maps.shape
    parts = maps.view(2, 2, four // 4, channels, height, width)
    return parts.permute(2, 3, 4, 0, 5, 1).reshape(four // 4, channels, 2 * height, 2 * width)


def open_descriptors(
    patch_sizes: Sequence[int], width: float, path: str | Path | None = None
) -> dict[int, DenseDescriptor]:
    """Distilled networks, frozen, by patch size.

    Args:
        patch_sizes: of 17, 33 and 65.
        width: as in `DenseDescriptor`.
        path: a file that this module's command wrote; None takes the shipped one.

    Raises:
        RunError: if it is missing, damaged, or of another width.
    """
    path = shipped(SHIPPED) if path is None else as_path(path)
    tensors, _ = read_tensors(path, KIND, card=dict)
    found = {}
    for size in patch_sizes:
        network = DenseDescriptor(size, width)
        prefix = f"{size}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        load_weights(network, own, path)
        found[size] = network.requires_grad_(False).eval()
    return found


# --- distillation --------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A pretrained network's features of whole patches: uint8 images (N, 3, H, W) -> (N, C).

    The paper has what ResNet-18's classifier sees. Of EfficientNet-Lite0 the mean over the patch of
    two middle layers is taken (192 numbers): a small network that is trained briefly learns little
    of the features that the classifier sees.
    """

    def __init__(self, name: str, weights: str | Path | None = None):
        super().__init__()
        if name == LITE0:
            self.normalise = nn.Identity()
            self.network = Layers(name, ["block3", "block4"], weights)
        else:
            self.normalise = normalisation(name)
            self.network = open_network(name, weights)
            last = "fc" if hasattr(self.network, "fc") else "classifier"
            setattr(self.network, last, nn.Identity())
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        found = self.network(self.normalise(images))
        if isinstance(found, list):
            found = torch.cat([layer.mean(dim=(2, 3)) for layer in found], dim=1)
        return found.float()


def distillation_loss(decoded: Tensor, target: Tensor, descriptors: Tensor) -> dict[str, Tensor]:
    """The teacher's loss in the paper, with its weights of 1, 0 and 1 for the three terms.

    Args:
        decoded: what a linear layer makes of the descriptors, shape (N, C).
        target: the pretrained network's features, shape (N, C).
        descriptors: shape (N, 128).

    Returns:
        "knowledge": the mean over patches and features of the squared difference; "compactness":
        the mean magnitude of the correlations between different numbers of a descriptor.
    """
    centred = descriptors - descriptors.mean(dim=0)
    correlation = F.normalize(centred, dim=0).T @ F.normalize(centred, dim=0)  # (128, 128)
    off_diagonal = correlation.abs().sum() - correlation.diagonal().abs().sum()
    pairs = descriptors.shape[1] * (descriptors.shape[1] - 1)
    return {
        "knowledge": (decoded - target).square().mean(),
        "compactness": off_diagonal / pairs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a second call resumes."""
    parser = argparse.ArgumentParser(
        prog="python -m baselines.descriptors",
        description="Distil the descriptors of S-T and GCAD from a pretrained network.",
    )
    parser.add_argument("images", help="a folder of photographs, 'imagenette' or 'photographs'")
    parser.add_argument("--output", type=as_path, required=True, help="the file to write")
    parser.add_argument("--run-dir", type=as_path, help="where a checkpoint goes")
    parser.add_argument("--network", choices=(LITE0, *TORCHVISION), default=LITE0)
    parser.add_argument("--weights", help="a state dict of the network on disk")
    parser.add_argument("--width", type=float, default=SHIPPED_WIDTH, help="1 is the paper's")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=list(DESCRIPTORS))
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--input-size", type=int, default=64, help="of the pretrained network")
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    with command_errors():
        _distil(args)


def _distil(args: argparse.Namespace) -> None:
    keep_freed_memory()
    images, device = open_pretraining(args.images), choose_device(args.device)
    pretrained = Pooled(args.network, args.weights).to(device)
    torch.manual_seed(0)
    networks = nn.ModuleDict({str(p): DenseDescriptor(p, args.width) for p in args.patch_sizes})
    for layer in networks.modules():  # outputs of about 1, or the correlations are learnt alone
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
    features = pretrained(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)).shape[1]
    decoders = nn.ModuleDict({p: nn.Linear(CHANNELS, features) for p in networks})
    for module in (networks, decoders):
        module.to(device, memory_format=torch.channels_last)
    parameters = [*networks.parameters(), *decoders.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-5)
    # each pretrained feature gets mean 0 and deviation 1, as mu^Psi and sigma^Psi of Algorithm 3
    some = torch.cat([
        pretrained(_crops(images, number, args, device)) for number in range(-8, 0)
    ])  # fmt: skip
    mean, deviation = some.mean(dim=0), some.std(dim=0).clamp(min=1e-6)
    config = {
        "network": args.network, "width": args.width, "patch_sizes": args.patch_sizes,
        "images": images.describe(), "digests": {"images": images.identity()},
        "steps": args.steps, "batch_size": args.batch_size, "input_size": args.input_size,
    }  # fmt: skip
    modules = {"networks": networks, "decoders": decoders}

    def terms_of(step: int) -> dict[str, Tensor]:
        crops = _crops(images, step, args, device)
        target = ((pretrained(crops) - mean) / deviation).clone()
        terms = {}
        for name, network in networks.items():
            size = (int(name),) * 2
            small = F.interpolate(crops.float() / 255, size, mode="bilinear", antialias=True)
            found = network.patches(normalise(small))
            own = distillation_loss(decoders[name](found), target, found)
            terms |= {f"{key} {name}": value for key, value in own.items()}
        return terms

    run = Run(args.run_dir, config, modules, {"optimizer": optimizer}, args.steps)
    train_steps(run, optimizer, terms_of, lambda done: 0.505 + 0.495 * math.cos(math.pi * done))
    weights = {
        f"{n}.{k}": v.half() for n, net in networks.items() for k, v in net.state_dict().items()
    }
    write_tensors(args.output, weights, {"kind": KIND, "card": config})
    print(f"descriptors of patches of {', '.join(networks)} pixels: {args.output}")


def _crops(images, number: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Squares of photographs at the size at which the pretrained network sees them, uint8."""
    rng = np.random.default_rng((0, number + 8))
    scale = args.input_size / np.array([128, 32])  # squares of 32 to 128 pixels of a photograph
    found = images.crops(rng, args.batch_size, args.input_size, scale)
    return found.to(device)


if __name__ == "__main__":
    main()
