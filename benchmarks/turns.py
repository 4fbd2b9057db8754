"""What the timing scripts share: ways to do the same work, each in a process of its own, in turns.

Each way has a process, because how a process keeps freed memory, for one, is part of the way. They
take turns: while one works the others sleep, and whatever else the machine does hits all alike.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from effad_core import EfficientAD
from effad_core.acceleration.memory import keep_freed_memory
from effad_core.evaluation.timing import machine

import torch
import torch.nn.functional as F

BATCH = 4  # images of the layer that is the limit
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        build: is called in the way's own process and returns what is timed.
        arguments: of `build`.
        flops: of the work, counted; 0 if they do not matter.
        number_format: the one whose direct convolution is the limit: "float32" or "bfloat16".
    """

    build: Callable[..., Callable[[], object]]
    arguments: tuple = ()
    flops: int = 0
    number_format: str = "float32"


def serve(way: Way, pipe: Connection) -> None:
    """In the way's process: do the work once for each message, and answer with its seconds."""
    work = way.build(*way.arguments)
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - start)


@contextmanager
def process(way: Way):
    """A process that does the work, for the length of the block; yields what asks it to."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=serve, args=(way, other), daemon=True)
    child.start()
    other.close()

    def once() -> float:
        pipe.send(True)
        return pipe.recv()

    try:
        pipe.recv()  # built
        yield once
    finally:
        child.kill()
        child.join()


def seconds_in_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Let all take turns; two more rounds warm up."""
    with ExitStack() as stack:
        asked = {name: stack.enter_context(process(way)) for name, way in ways.items()}
        taken = {name: [] for name in ways}
        for _ in range(rounds + 2):
            for name, once in asked.items():
                taken[name].append(once())
    return {name: times[2:] for name, times in taken.items()}


def direct_convolution(size: str, number_format: str) -> Callable[[], object]:
    """The PDN's second convolution alone, which is most of the work of Algorithm 2."""
    keep_freed_memory()
    dtype = getattr(torch, number_format)
    layer = EfficientAD(size).teacher[3].to(dtype, memory_format=torch.channels_last)
    images = torch.rand(BATCH, layer.in_channels, 126, 126, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def convolve() -> torch.Tensor:
        return F.conv2d(images, layer.weight, layer.bias)

    return convolve


def compare(title: str, size: str, ways: Mapping[str, Way], rounds: int) -> dict[str, float]:
    """Time the ways in turns and print a table; the first way is the plain one.

    Args:
        title: of the table.
        size: "small" or "medium", for the limit.
        ways: by name.
        rounds: how many count.

    Returns:
        Median seconds by name.
    """
    weights = EfficientAD(size).teacher[3].weight.numel()
    formats = dict.fromkeys(way.number_format for way in ways.values())
    limit = BATCH * 2 * weights * 123**2  # FLOPs
    limits = {
        f"limit {name}": Way(direct_convolution, (size, name), limit, name) for name in formats
    }
    taken = seconds_in_turns({**ways, **limits}, rounds)
    rates = {way.number_format: way.flops / min(taken.pop(name)) for name, way in limits.items()}
    print(f"\n{title}, EfficientAD-{size[0].upper()}: direct convolution", end=" ")
    print(", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    print(f"{'':46}GFLOPs  milliseconds  x plain  share of the limit")
    first = next(iter(taken.values()))
    for name, times in taken.items():
        gain = statistics.median(p / t for p, t in zip(first, times, strict=True))
        took, way = statistics.median(times), ways[name]
        share = way.flops / took / rates[way.number_format]
        print(f"{name:46}{way.flops / 1e9:6.0f}{1000 * took:14.0f}{gain:9.2f}{share:20.0%}")
    return {name: statistics.median(times) for name, times in taken.items()}


def print_choice(described: str, chosen: float, others: Mapping[str, float]) -> None:
    """What "auto" took, and how far it is from the fastest of all arithmetics."""
    best = min(others, key=others.get)
    print(f'"auto" took {described}')
    print(f"{chosen / others[best]:.3f} times the {1000 * others[best]:.0f} ms of the best, {best}")


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
    print(machine(CPU), flush=True)
    return args
