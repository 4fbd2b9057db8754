"""DSR: an image rebuilt from codes that only normal images have, beside the same rebuilt as it is.

Zavrtanik, Kristan, Skočaj: DSR - A Dual Subspace Re-Projection Network for Surface Anomaly
Detection, ECCV 2022. Networks and settings as in the authors' code
(https://github.com/VitjanZ/DSR_anomaly_detection). Its test script runs the general decoder twice
and reads one result; here that decoder runs once.

    python -m baselines.dsr path/to/photographs --output autoencoder.safetensors

trains the quantised autoencoder, which the paper trains on ImageNet. The one that is shipped has a
quarter of the paper's channels and 512 codes.

EfficientAD's authors measured the defaults: 100,000 steps of 8 images, then 50,000 for the
upsampling (half of both on VisA). Otherwise than in the code, a code that nothing chooses any more
is drawn anew from the batch: in a short training most codes would be of no use.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from baselines.method import Method, Phase, Profile, Schedule, pixels, train_steps
from effad_core.acceleration.devices import DEVICE_HELP, choose_device
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.datasets import ResizedImages, open_pretraining
from effad_core.errors import command_errors
from effad_core.storage.files import as_path
from effad_core.storage.runs import Run
from effad_core.storage.shipped import shipped
from effad_core.storage.weights import load_weights, read_tensors, write_tensors

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import rotate

DECAY, SMOOTHING, COMMITMENT = 0.99, 1e-5, 0.25  # of the codebooks' running means, and their loss
FADED = 0.05  # cells a step: a code that fewer choose is drawn anew
WEAKEST = 0.2  # share of the codes that the weakest simulated anomaly may take from
NEAREST = 0.05  # share of the codes that are too near to be an anomaly
AVERAGED = 21  # pixels a side: a score is a mean over so many
SHIPPED, KIND = "baselines/dsr_autoencoder.safetensors", "autoencoder"
SMALL = {"width": 32, "codes": 512, "base": 16}


class Codebook(nn.Module):
    """Each cell's features become the nearest of the codes; their running means are kept too.

    Args:
        codes: how many there are.
        width: channels of the features.
    """

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.entries = nn.Parameter(torch.randn(codes, width), requires_grad=False)
        self.mean = nn.Parameter(self.entries.clone(), requires_grad=False)  # of what chose them
        self.register_buffer("usage", torch.zeros(codes))

    def distances(self, features: Tensor) -> Tensor:
        """Squared distances of each cell from each code, (N, H * W, codes)."""
        cells = features.flatten(2).transpose(1, 2)
        squares = cells.square().sum(dim=2, keepdim=True) + self.entries.square().sum(dim=1)
        return squares - 2 * cells @ self.entries.T

    def forward(self, features: Tensor) -> Tensor:
        """The nearest codes, (N, width, H, W); gradients pass as if nothing had been replaced."""
        nearest = self.distances(features).argmin(dim=2)
        chosen = F.one_hot(nearest, len(self.entries)).to(features.dtype)
        found = (chosen @ self.entries).transpose(1, 2).reshape(features.shape)
        return features + (found - features).detach()

    @torch.no_grad()
    def learn(self, features: Tensor) -> None:
        """Move each code to the running mean of the cells that choose it.

        A code that hardly any cell chooses any more becomes one of the batch's cells.
        """
        cells = features.transpose(0, 1).flatten(1).T  # (N * H * W, width)
        nearest = self.distances(features).argmin(dim=2).flatten()
        chosen = F.one_hot(nearest, len(self.entries)).to(cells.dtype)
        self.usage.mul_(DECAY).add_((1 - DECAY) * chosen.sum(dim=0))
        self.mean.mul_(DECAY).add_((1 - DECAY) * chosen.T @ cells)
        faded = self.usage < FADED  # at first all of them
        drawn = torch.randint(len(cells), (len(faded),), device=cells.device)
        self.mean.copy_(torch.where(faded[:, None], cells[drawn], self.mean))
        self.usage.copy_(torch.where(faded, 1.0, self.usage))
        self.entries.copy_(self.mean / (self.usage[:, None] + SMOOTHING))


class Residual(nn.Module):
    """A ReLU, then two convolutions without biases, added to what the ReLU gave."""

    def __init__(self, width: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.widen = nn.Conv2d(width // 2, width, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(features)
        return features + self.widen(F.relu(self.squeeze(features)))


def residuals(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width), Residual(width), nn.ReLU())


def up(inside: int, outside: int) -> nn.ConvTranspose2d:
    """Doubles height and width."""
    return nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1)


def down(inside: int, outside: int) -> nn.Conv2d:
    """Halves height and width."""
    return nn.Conv2d(inside, outside, 4, stride=2, padding=1)


def decoder(inside: int, width: int) -> nn.Sequential:
    """From features at stride 4 to an image."""
    first = nn.Conv2d(inside, width, 3, padding=1)
    ends = (up(width, width // 2), nn.ReLU(), up(width // 2, 3))
    return nn.Sequential(first, residuals(width), *ends)


def normed(*channels: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each normed over its image."""
    return nn.Sequential(*(
        layer
        for inside, outside in pairwise(channels)
        for layer in (
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.InstanceNorm2d(outside),
            nn.ReLU(),
        )
    ))  # fmt: skip


def bilinear() -> nn.Upsample:
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


class Autoencoder(nn.Module):
    """A quantised autoencoder with codes at strides 4 (high) and 8 (low), trained on photographs.

    Args:
        width: channels of the features; 128 in the paper.
        codes: entries of each codebook; 4096 in the paper.
    """

    def __init__(self, width: int = 128, codes: int = 4096):
        super().__init__()
        self.encoder_high = nn.Sequential(
            down(3, width // 2), nn.ReLU(), down(width // 2, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), residuals(width),
        )  # fmt: skip
        self.encoder_low = nn.Sequential(
            down(width, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            residuals(width),
        )  # fmt: skip
        self.to_low = nn.Conv2d(width, width, 1)
        self.to_high = nn.Conv2d(2 * width, width, 1)
        self.codes_low, self.codes_high = Codebook(codes, width), Codebook(codes, width)
        self.enlarge = up(width, width)
        self.decoder = decoder(2 * width, width)

    def features_low(self, high: Tensor) -> Tensor:
        return self.to_low(self.encoder_low(high))

    def features_high(self, high: Tensor, low: Tensor) -> Tensor:
        """The features to be quantised at stride 4, which know the codes at stride 8."""
        return self.to_high(torch.cat([high, self.enlarge(low)], dim=1))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The codes at strides 8 and 4 of images in 0..1."""
        high = self.encoder_high(images)
        low = self.codes_low(self.features_low(high))
        return low, self.codes_high(self.features_high(high, low))

    def joined(self, low: Tensor, high: Tensor) -> Tensor:
        """Both at stride 4, (N, 2 width, h, w): what a decoder takes."""
        return torch.cat([self.enlarge(low), high], dim=1)


class SubspaceRestriction(nn.Sequential):
    """Codes -> the features of normal codes: a U-shaped network without skip connections."""

    def __init__(self, w: int):
        super().__init__(
            normed(w, w, w), nn.MaxPool2d(2), normed(w, 2 * w, 2 * w), nn.MaxPool2d(2),
            normed(2 * w, 4 * w, 4 * w), bilinear(), normed(4 * w, 2 * w, 2 * w, 2 * w),
            bilinear(), normed(2 * w, w, w, w), nn.Conv2d(w, w, 3, padding=1),
        )  # fmt: skip


class UNet(nn.Module):
    """Images -> two logits a pixel; `base` to 4 `base` channels, three skip connections."""

    def __init__(self, inside: int, base: int):
        super().__init__()
        one, two, four = base, 2 * base, 4 * base
        self.down = nn.ModuleList(
            [normed(inside, one, one), normed(one, two, two), normed(two, four, four)]
        )
        self.bottom = normed(four, four, four)
        self.up = nn.ModuleList([normed(four, four), normed(four, two), normed(two, one)])
        self.merge = nn.ModuleList(
            [normed(2 * four, four, four), normed(2 * two, two, two), normed(2 * one, one, one)]
        )
        self.bilinear, self.head = bilinear(), nn.Conv2d(one, 2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(images))
            images = F.max_pool2d(skips[-1], 2)
        images = self.bottom(images)
        for enlarge, merge in zip(self.up, self.merge, strict=True):
            images = merge(torch.cat([enlarge(self.bilinear(images)), skips.pop()], dim=1))
        return self.head(images)


class DSR(Method):
    """The autoencoder, and what is trained on a scenario.

    Args:
        width, codes: as in `Autoencoder`.
        base: channels of the first layers of the two U-Nets; 64 in the paper.
        image_size: images are resized to this before they enter; multiples of 32.
        weights: a file with the autoencoder; None takes the shipped one.
        pretrained: False leaves the autoencoder's weights as they are drawn.

    Example:
        >>> dsr = DSR.of_profile("smoke").fit(scenario, "smoke")
        >>> dsr.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "DSR"
    PROFILES: ClassVar = {
        "smoke": Profile(SMALL | {"image_size": 128}, Schedule((2, 2), 2)),
        "quick": Profile(SMALL | {"image_size": 128}, Schedule((80, 20), 2)),
        "laptop": Profile(SMALL, Schedule((400, 100), 2)),
        "paper": Profile({"width": 128, "codes": 4096, "base": 64}, Schedule((100_000, 50_000), 8)),
    }

    def __init__(
        self,
        width: int = 32,
        codes: int = 512,
        base: int = 16,
        image_size: int | Sequence[int] = 256,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        super().__init__(image_size, {"width": width, "codes": codes, "base": base})
        if any(side % 32 for side in self.image_size) or self.image_size == (32, 32):
            raise ValueError(  # of 32x32 pixels one cell would be left, which cannot be normed
                f"image_size must be multiples of 32 for DSR, more than 32x32, not {image_size}"
            )
        self.width, self.base = width, base
        self.autoencoder = Autoencoder(width, codes)
        if pretrained:
            path = shipped(SHIPPED) if weights is None else as_path(weights)
            load_weights(self.autoencoder, read_tensors(path, KIND)[0], path)
        self.autoencoder.requires_grad_(False)
        self.initialise()

    def initialise(self) -> None:
        w, base = self.width, self.base
        self.restrict_low, self.restrict_high = SubspaceRestriction(w), SubspaceRestriction(w)
        self.object_decoder = nn.Sequential(
            normed(2 * w, 2 * w, 4 * w), nn.MaxPool2d(2), normed(4 * w, 4 * w, 8 * w),
            nn.MaxPool2d(2), nn.Conv2d(8 * w, base, 1), up(base, base), nn.ReLU(),
            up(base, base), nn.ReLU(), decoder(base, w),
        )  # fmt: skip
        self.detect, self.upsample = UNet(6, base), UNet(8, base)
        for module in (*self.object_decoder.modules(), *self.detect.modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def trained(self) -> dict[str, nn.Module]:
        names = ("restrict_low", "restrict_high", "object_decoder", "detect", "upsample")
        return {name: getattr(self, name) for name in names}

    # --- Algorithm: both images, their difference, the mask ------------------------------------

    def both(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The image that normal codes would give, and the image of the codes as they are."""
        codes = self.autoencoder
        normal_low = codes.codes_low(self.restrict_low(low))
        normal_high = codes.codes_high(self.restrict_high(high))
        normal = self.object_decoder(codes.joined(normal_low, normal_high))
        return normal, codes.decoder(codes.joined(low, high))

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse and the refined logits of each pixel, (N, 2, H, W), of images in 0..1."""
        normal, general = self.both(*self.autoencoder.encode(images))
        coarse = self.detect(torch.cat([normal, general], dim=1))
        return coarse, self.upsample(torch.cat([normal, general, coarse.softmax(dim=1)], dim=1))

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The refined probability of an anomaly; the coarse one, averaged over 21x21 pixels."""
        coarse, refined = self.logits(images.float() / 255)
        averaged = F.avg_pool2d(coarse.softmax(dim=1)[:, 1:], AVERAGED, 1, AVERAGED // 2)
        return refined.softmax(dim=1)[:, 1:], averaged

    # --- training ------------------------------------------------------------------------------

    def phases(self, images: ResizedImages) -> list[Phase]:
        first = [name for name in self.trained() if name != "upsample"]
        parameters = [p for name in first for p in getattr(self, name).parameters()]
        optimizers = [
            torch.optim.Adam(group, lr=2e-4) for group in (parameters, self.upsample.parameters())
        ]

        def restoring(chosen: Sequence[int], rng: np.random.Generator) -> dict[str, Tensor]:
            batch = turned(pixels(images, chosen, self.device), 0.4, rng).float() / 255
            masks = random_masks(len(batch), self.image_size, rng).to(self.device)
            return self.restoring_loss(batch, masks)

        def refining(chosen: Sequence[int], rng: np.random.Generator) -> dict[str, Tensor]:
            batch = turned(pixels(images, chosen, self.device), 0.3, rng).float() / 255
            masks = random_masks(len(batch), self.image_size, rng).to(self.device)
            colours = torch.rand(len(batch), 3, 1, 1, device=self.device)
            opacity = 1 - 0.8 * torch.rand(len(batch), 1, 1, 1, device=self.device)
            painted = batch + masks * opacity * (colours - batch)
            with torch.no_grad():
                normal, general = self.both(*self.autoencoder.encode(painted))
                coarse = self.detect(torch.cat([normal, general], dim=1)).softmax(dim=1)
            refined = self.upsample(torch.cat([normal, general, coarse], dim=1))
            return {"refined mask": focal_loss(refined, masks)}

        return [
            Phase(optimizers[0], restoring, rate=lambda done: 0.1 if done >= 0.8 else 1.0),
            Phase(optimizers[1], refining),
        ]

    def restoring_loss(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """The losses of a step of the first phase.

        Args:
            images: in 0..1, shape (N, 3, H, W).
            masks: 1 where an anomaly is simulated, shape (N, 1, H, W).
        """
        codes, n = self.autoencoder, len(images)
        strengths = WEAKEST + (1 - WEAKEST) * torch.rand(2, n, device=images.device)
        both, only_low = torch.randint(0, 2, (2, n, 1, 1, 1), device=images.device).float()
        with torch.no_grad():
            encoded = codes.encoder_high(images)
            features_low = codes.features_low(encoded)
            low = codes.codes_low(features_low)
            changed_low = exchanged(features_low, low, codes.codes_low, masks, strengths[0])
            features_high = codes.features_high(encoded, low)
            high = codes.codes_high(features_high)
            changed_high = exchanged(features_high, high, codes.codes_high, masks, strengths[1])
            following = codes.features_high(encoded, changed_low)  # the high ones see the change
            of_both = exchanged(
                following, codes.codes_high(following), codes.codes_high, masks, strengths[1]
            )
            # in both; or in the low ones alone, the high ones as they were; or in the high ones
            low_in = torch.where((both + only_low) > 0, changed_low, low)
            high_in = torch.where(both > 0, of_both, torch.where(only_low > 0, high, changed_high))
            general = codes.decoder(codes.joined(low_in, high_in))
        restored_low, restored_high = self.restrict_low(low_in), self.restrict_high(high_in)
        normal = self.object_decoder(
            codes.joined(codes.codes_low(restored_low), codes.codes_high(restored_high))
        )
        logits = self.detect(torch.cat([normal.detach(), general], dim=1))
        coarse_low, coarse_high = (blocks_of(masks, stride) for stride in (8, 4))
        target = torch.where((both + only_low) > 0, coarse_low, coarse_high)
        return {
            "mask": focal_loss(logits, target),
            "low": F.mse_loss(restored_low, low),
            "high": F.mse_loss(restored_high, high),
            "image": 10 * F.mse_loss(normal, images),
        }


def exchanged(
    features: Tensor, quantised: Tensor, codebook: Codebook, masks: Tensor, strengths: Tensor
) -> Tensor:
    """Codes in which those below a mask are exchanged for others: a simulated anomaly.

    Args:
        features: before they were quantised, shape (N, C, h, w).
        quantised: their codes.
        codebook: where the others come from.
        masks: shape (N, 1, H, W); a cell is exchanged if any pixel of it is 1.
        strengths: of each image the share of the codes, from the nearest on, that one is drawn
            from, but for the nearest twentieth; shape (N,).
    """
    codes = len(codebook.entries)
    order = codebook.distances(features).argsort(dim=2)  # (N, h * w, codes)
    least = int(NEAREST * codes)
    most = (strengths * codes).long().add(1).clamp(least + 1, codes - 1)
    drawn = torch.rand(order.shape[:2], device=features.device)
    rank = least + (drawn * (most - least)[:, None]).long()
    others = codebook.entries[order.gather(2, rank[..., None])[..., 0]]  # (N, h * w, C)
    others = others.transpose(1, 2).reshape(quantised.shape)
    inside = F.max_pool2d(masks, masks.shape[-1] // features.shape[-1])
    return torch.where(inside > 0, others, quantised)


def blocks_of(masks: Tensor, stride: int) -> Tensor:
    """Masks of whole cells: 1 in a block of stride x stride pixels that has a 1."""
    return F.interpolate(F.max_pool2d(masks, stride), scale_factor=stride)


def focal_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The focal loss with gamma 2 of two logits a pixel, (N, 2, H, W), and masks (N, 1, H, W)."""
    difference = logits[:, 1:] - logits[:, :1]
    return sigmoid_focal_loss(difference, masks, alpha=-1, gamma=2, reduction="mean")


def perlin_noise(
    size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Perlin's gradient noise, float64, shape `size`, times the square root of two.

    Args:
        size: (H, W).
        cells: of the grid of random gradients, down and across.
    """
    angles = 2 * np.pi * rng.random((cells[0] + 1, cells[1] + 1))
    gradients = np.stack([np.cos(angles), np.sin(angles)])
    y, x = (np.arange(length) * count / length for length, count in zip(size, cells, strict=True))
    y, x = np.meshgrid(y, x, indexing="ij")
    row, column = y.astype(int), x.astype(int)
    dy, dx = y - row, x - column

    def corner(below: int, right: int) -> np.ndarray:
        gy, gx = gradients[:, row + below, column + right]
        return gy * (dy - below) + gx * (dx - right)

    fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (dy, dx))
    top = corner(0, 0) * (1 - fade_x) + corner(0, 1) * fade_x
    bottom = corner(1, 0) * (1 - fade_x) + corner(1, 1) * fade_x
    return np.sqrt(2) * (top * (1 - fade_y) + bottom * fade_y)


def random_masks(count: int, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Where anomalies are simulated: turned Perlin noise above 0.5; half of the masks are empty."""
    masks = torch.zeros(count, 1, *size)
    for mask in masks:
        cells = tuple(int(2**power) for power in rng.integers(0, 6, size=2))
        noise = torch.from_numpy(perlin_noise(size, cells, rng)).float()[None]
        noise = rotate(noise, float(rng.uniform(-90, 90)), InterpolationMode.BILINEAR)
        if rng.random() < 0.5:
            mask.copy_((noise > 0.5).float())
    return masks


def turned(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Images of which some are turned by up to 90 degrees; what comes into sight is black."""
    return torch.stack([
        rotate(image, float(rng.uniform(-90, 90)), InterpolationMode.BILINEAR)
        if rng.random() < probability
        else image
        for image in images
    ])  # fmt: skip


# --- the autoencoder's own training --------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a second call resumes."""
    parser = argparse.ArgumentParser(
        prog="python -m baselines.dsr", description="Train DSR's quantised autoencoder."
    )
    parser.add_argument("images", help="a folder of photographs, 'imagenette' or 'photographs'")
    parser.add_argument("--output", type=as_path, required=True, help="the file to write")
    parser.add_argument("--run-dir", type=as_path, help="where a checkpoint goes")
    parser.add_argument("--width", type=int, default=SMALL["width"], help="128 is the paper's")
    parser.add_argument("--codes", type=int, default=SMALL["codes"], help="4096 is the paper's")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, default=128, help="pixels a side of what it sees")
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(arguments)
    with command_errors():
        _train_autoencoder(args)


def _train_autoencoder(args: argparse.Namespace) -> None:
    keep_freed_memory()
    images, device = open_pretraining(args.images), choose_device(args.device)
    torch.manual_seed(0)
    network = Autoencoder(args.width, args.codes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    config = {
        "width": args.width, "codes": args.codes, "images": images.describe(),
        "digests": {"images": images.identity()}, "steps": args.steps,
        "batch_size": args.batch_size, "crop": args.crop,
    }  # fmt: skip

    def terms_of(step: int) -> dict[str, Tensor]:
        crops = images.crops(np.random.default_rng((0, step)), args.batch_size, args.crop)
        return autoencoder_loss(network, crops.to(device).float() / 255)

    run = Run(args.run_dir, config, {"autoencoder": network}, {"adam": optimizer}, args.steps)
    train_steps(run, optimizer, terms_of, lambda done: 1 - 0.9 * done)
    # but for the codebooks' sums, which only a training reads, and which half precision cannot hold
    weights = {
        name: value if name.endswith((".mean", ".usage")) else value.half()
        for name, value in network.state_dict().items()
    }
    write_tensors(args.output, weights, {"kind": KIND, "card": config})
    print(f"the autoencoder: {args.output}")


def autoencoder_loss(network: Autoencoder, images: Tensor) -> dict[str, Tensor]:
    """The losses of a step on images in 0..1; the codebooks learn from them too."""
    encoded = network.encoder_high(images)
    features_low = network.features_low(encoded)
    network.codes_low.learn(features_low)
    low = network.codes_low(features_low)
    features_high = network.features_high(encoded, low)
    network.codes_high.learn(features_high)
    high = network.codes_high(features_high)
    image = network.decoder(network.joined(low, high))
    return {
        "image": F.mse_loss(image, images),
        "low": COMMITMENT * F.mse_loss(features_low, low.detach()),
        "high": COMMITMENT * F.mse_loss(features_high, high.detach()),
    }


if __name__ == "__main__":
    main()
