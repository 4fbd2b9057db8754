"""Parameters and FLOPs of the ten methods of the paper's Table 11, counted without weights.

`effad costs` prints them beside the paper's. What is counted is the very networks that run here
(`effad_core.evaluation.methods`), with the paper's widths, on one image, built on torch's meta
device: shapes without memory.

A multiplication with its addition counts as two FLOPs, as `torch.utils.flop_counter` has it, and
only convolutions and matrix products count: so EfficientAD-S has 75.9 GFLOPs, the paper's 76 (one
FLOP for both would make it 38). PatchCore's search for nearest neighbours is in neither.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from textwrap import wrap

from effad_core.detector import EfficientAD
from effad_core.evaluation.methods import find_method
from effad_core.evaluation.tables import layout

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counted:
    """How a method is counted, and the paper's figures (Table 11, as rounded there)."""

    build: Callable[[], nn.Module]
    image_size: int  # pixels along each side
    paper_parameters: int  # millions
    paper_flops: int  # G, of one image
    assumed: str  # what was assumed, and where known why the count deviates


def efficientad(size: str, padding: bool = False, out_channels: int = 384) -> EfficientAD:
    """The detector itself; what is counted is its three networks on one image."""
    detector = EfficientAD(size, padding, out_channels=out_channels)
    detector.forward = detector.squared_differences
    return detector


def other(name: str) -> nn.Module:
    """The networks of another method that run for one image, as the paper has them."""
    return find_method(name).of_profile("paper", pretrained=False).counted()


METHODS = {
    "GCAD": Counted(
        partial(other, "GCAD"), 256, 65, 416,
        "one of its two models (the U-Nets of both alone have 124 M parameters), that with "
        "33-pixel patches (598.3 GFLOPs with 17). The global encoder's widths are a guess: those "
        "of EfficientAD's encoder, mirrored, without the skip connections that fade out in "
        "training.",
    ),
    "SimpleNet": Counted(
        partial(other, "SimpleNet"), 256, 73, 38,
        "WideResNet-50-2 with layer4 and fc, which the method does not read (without them it has "
        "29 M parameters), at 256x256 (at 288x288, the repository's size, 47.9 GFLOPs).",
    ),
    "S-T": Counted(
        partial(other, "S-T"), 256, 26, 4468,
        "patch sizes 17, 33, 65, a teacher and three students each, 128 features, no decoder to "
        "512. Public implementations differ in the widths at 65, by 3.7 M parameters in all. The "
        "image is padded for each patch size; padding it for 65 always gives 26 % more FLOPs.",
    ),
    "FastFlow": Counted(
        partial(other, "FastFlow"), 256, 92, 85,
        "WideResNet-50-2 to layer3; eight steps a layer, kernels 3 and 1 in turn; the fixed "
        "mixing matrices and their inverses are counted as parameters, as FrEIA stores them.",
    ),
    "DSR": Counted(
        partial(other, "DSR"), 256, 40, 267,
        "the public test script, with the general decoder run once; each look-up in a codebook is "
        "two matrix products, and its running mean counts as parameters.",
    ),
    "PatchCore": Counted(
        partial(other, "PatchCore"), 224, 83, 41,
        "WideResNet-101-2 to layer3, without the search for neighbours.",
    ),
    "PatchCore Ens": Counted(
        partial(other, "PatchCore Ens"), 320, 150, 159,
        "WideResNet-101-2 and ResNeXt-101 32x8d to layer3, DenseNet-201 to denseblock3, without "
        "the search for neighbours.",
    ),
    "AST": Counted(
        partial(other, "AST"), 768, 154, 199,
        "EfficientNet-B5 to block 35, flow of width 1024 (the repository's default is 64), student "
        "of width 1024, no depth image. The paper's other 3 M parameters are unexplained (B5's "
        "unread layers would be 13 M).",
    ),
    "EfficientAD-S": Counted(
        partial(efficientad, "small"), 256, 8, 76,
        "teacher, student with 768 channels and autoencoder, no padding (93.3 GFLOPs with it).",
    ),
    "EfficientAD-M": Counted(
        partial(efficientad, "medium"), 256, 21, 235,
        "teacher, student with 768 channels and autoencoder, no padding (287.4 GFLOPs with it).",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a method costs for one image, by our count and by the paper's Table 11."""

    method: str
    parameters: int
    flops: int
    paper_parameters: int  # millions, rounded by the paper
    paper_flops: int  # G, rounded by the paper
    assumed: str

    @property
    def parameters_deviation(self) -> float | None:
        """Our count over the paper's, less 1; None if ours rounds to the paper's (to 0.5 M)."""
        return _deviation(self.parameters / 1e6, self.paper_parameters)

    @property
    def flops_deviation(self) -> float | None:
        """The same of the FLOPs (to 0.5 G)."""
        return _deviation(self.flops / 1e9, self.paper_flops)


def count(
    build: Callable[[], nn.Module],
    image_size: int | tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Parameters and FLOPs of a network for one image, without its memory or its weights.

    Args:
        build: makes the network; called with torch's meta device as the default one.
        image_size: pixels, (height, width) or the side of a square; three channels.
        dtype: of the image.

    Returns:
        parameters, trained or not, and FLOPs of the forward pass in evaluation mode: two a
        multiplication with its addition, of convolutions and matrix products alone.

    Raises:
        ValueError: if the network holds memory: it was not made by `build`.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"), torch.no_grad():
        network = build().eval()
        tensors = [*network.parameters(), *network.buffers()]
        if not all(tensor.is_meta for tensor in tensors):
            raise ValueError("the network holds memory; build it inside the function given")
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, height, width, dtype=dtype))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def costs(methods: Iterable[str] = tuple(METHODS)) -> list[Cost]:
    """The table, one entry a method, in the order given (all ten in a few seconds).

    Args:
        methods: names in `METHODS`.

    Raises:
        ValueError: for an unknown name.
    """
    methods = list(methods)
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {name!r}")
    found = []
    for name in methods:
        m = METHODS[name]
        counted = count(m.build, m.image_size, torch.uint8)
        found.append(Cost(name, *counted, m.paper_parameters, m.paper_flops, m.assumed))
    return found


def table(rows: Iterable[Cost], width: int = 60) -> str:
    """The costs as text; `width` is that of the last column, in characters."""
    lines = [
        ["", "parameters", "paper", "off", "FLOPs", "paper", "off", ""],
        ["method", "millions", "", "", "G per image", "", "", "assumed"],
    ]
    for row in rows:
        first, *others = wrap(row.assumed, width)
        lines.append(
            [row.method, f"{row.parameters / 1e6:.1f}", f"{row.paper_parameters}",
             _percent(row.parameters_deviation), f"{row.flops / 1e9:.1f}", f"{row.paper_flops}",
             _percent(row.flops_deviation), first]
        )  # fmt: skip
        lines += [[""] * 7 + [other] for other in others]
    return layout(lines, left=(0, 7))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="effad costs",
        epilog="example: effad costs EfficientAD-S PatchCore",
        description="Parameters and FLOPs of the methods of the paper's Table 11, ours and the "
        "paper's; off: by how much ours misses it, where it does not round to it.",
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    chosen = parser.parse_args(arguments).methods or METHODS
    try:
        print(table(costs(chosen)))
    except ValueError as error:
        parser.error(str(error))


def _deviation(ours: float, paper: int) -> float | None:
    return None if abs(ours - paper) <= 0.5 else ours / paper - 1


def _percent(deviation: float | None) -> str:
    return "" if deviation is None else f"{100 * deviation:+.0f} %"
