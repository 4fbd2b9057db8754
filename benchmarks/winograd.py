"""Winograd's convolution against torch's, for the large convolutions of the networks.

    python benchmarks/winograd.py

Both take turns in one process, in float32 and channels last; forwards, and forwards with both
gradients. The errors are against float64, relative to the standard deviation of the exact result.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from effad_core.acceleration.memory import keep_freed_memory
from effad_core.acceleration.winograd import conv2d

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = {  # name: channels, outputs, pixels along a side, kernel, padding
    "PDN-S Conv-2": (128, 256, 126, 4, 0),
    "PDN-S Conv-3": (256, 256, 61, 3, 0),
    "PDN-S Conv-4, teacher": (256, 384, 59, 4, 0),
    "PDN-S Conv-4, student": (256, 768, 59, 4, 0),
    "PDN-M Conv-2": (256, 512, 126, 4, 0),
    "PDN-M Conv-4": (512, 512, 61, 3, 0),
    "autoencoder DecConv-6": (64, 64, 127, 4, 2),
    "autoencoder DecConv-8": (64, 384, 56, 3, 1),
}


def ratio(ways: dict[str, Callable[[], object]], rounds: int) -> float:
    """How many times faster the second way is, the median over the rounds after the first two."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    first, second = (times[2:] for times in seconds.values())
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; times faster than torch's convolution, and errors")
    print(f"{'':24}forwards  with gradients  error   torch's")
    for name, (channels, outputs, side, r, padding) in LAYERS.items():
        images = torch.rand(1, channels, side, side).to(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, r, r) / (channels * r * r) ** 0.5
        weight = weight.to(memory_format=torch.channels_last).requires_grad_()
        images.requires_grad_()

        def run(convolve: Callable, images: Tensor = images, weight: Tensor = weight,
                padding: int = padding) -> Tensor:  # fmt: skip
            return convolve(images, weight, None, padding=padding)

        def both(convolve: Callable, run: Callable = run, images=images, weight=weight) -> None:
            result = run(convolve)
            torch.autograd.grad(result, (images, weight), torch.ones_like(result))

        with torch.no_grad():
            exact = F.conv2d(images.double(), weight.double(), padding=padding)
            errors = [
                ((run(way) - exact).square().mean().sqrt() / exact.std()).item()
                for way in (conv2d, F.conv2d)
            ]
            forwards = ratio(
                {"torch": lambda: run(F.conv2d), "w": lambda: run(conv2d)}, args.rounds
            )
        gradients = ratio({"torch": lambda: both(F.conv2d), "w": lambda: both(conv2d)}, args.rounds)
        print(f"{name:24}{forwards:8.2f}{gradients:16.2f}  {errors[0]:.1e} {errors[1]:.1e}")


if __name__ == "__main__":
    main()
