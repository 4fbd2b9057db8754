"""What inference.py and training_iteration.py share: ways that take turns, and their table."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from effad_core import EfficientAD
from effad_core.timing import machine

BATCH = 4  # images of the layer that is the limit
HALF = "bfloat16"


def direct_convolution(detector: EfficientAD, precision: str) -> tuple[Callable[[], object], int]:
    """The PDN's second convolution alone, most of the work of Algorithm 2, and its FLOPs."""
    layer, dtype = detector.teacher[3], getattr(torch, precision)
    with torch.inference_mode():
        images = torch.rand(BATCH, layer.in_channels, 126, 126, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        weight = layer.weight.to(dtype, memory_format=torch.channels_last)
        bias = layer.bias.to(dtype)

    @torch.inference_mode()
    def convolve() -> Tensor:
        return F.conv2d(images, weight, bias)

    return convolve, BATCH * 2 * layer.weight.numel() * 123**2


def compare(
    size: str, ways: Mapping[str, Callable[[], object]], work: Mapping[str, int], rounds: int
) -> None:
    """Let all take turns, and print a table; the first way is the plain one.

    Args:
        size: of the detector, "small" or "medium".
        ways: by name; those in bfloat16 have that in it.
        work: FLOPs of each.
        rounds: how many count; two more warm up.
    """
    detector = EfficientAD(size)
    formats = ("float32", HALF) if any(HALF in name for name in ways) else ("float32",)
    limits = {name: direct_convolution(detector, name) for name in formats}
    turns = {**ways, **{name: convolve for name, (convolve, _) in limits.items()}}
    seconds = {name: [] for name in turns}
    for _ in range(rounds + 2):
        for name, way in turns.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: flops / min(seconds.pop(name)) for name, (_, flops) in limits.items()}
    print(f"\nEfficientAD-{size[0].upper()}: direct convolution", end=" ")
    print(", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    print(f"{'':34}GFLOPs  milliseconds  x plain  share of the limit")
    first = next(iter(seconds.values()))[2:]
    for name, (_, _, *times) in seconds.items():
        gain = statistics.median(p / t for p, t in zip(first, times, strict=True))
        took = statistics.median(times)
        share = work[name] / took / rates[HALF if HALF in name else "float32"]
        print(f"{name:34}{work[name] / 1e9:6.0f}{1000 * took:14.0f}{gain:9.2f}{share:20.0%}")


def anomalib_model(size: str) -> torch.nn.Module | None:
    """anomalib's EfficientAd with random weights, in training; None where it is not installed."""
    try:
        from anomalib.models.image.efficient_ad.torch_model import (
            EfficientAdModel,
            EfficientAdModelSize,
        )
    except ImportError:
        return None
    return EfficientAdModel(384, EfficientAdModelSize(size), padding=False)


def arguments(description: str) -> argparse.Namespace:
    """The command's sizes and rounds; prints the machine."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--size", nargs="+", choices=("small", "medium"), default=["small", "medium"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(machine(torch.device("cpu")), flush=True)
    return args
