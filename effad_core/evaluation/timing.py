"""Latency, throughput and memory of inference by the paper's protocol (supplement, Section 5).

    effad time                          # S and M, beside the paper's methods
    effad time --device cuda --compile
    effad time path/to/detector.safetensors --runs 50 --warm-up 5
    effad time --methods all --profile laptop --runs 10 --warm-up 2

The clock starts with an image's transfer to the device and stops when its anomaly map is on the
host. No losses, no padding, float16 on a GPU. The times of a network do not depend on its weights:
without a detector, new ones are timed. Other methods than EfficientAD compute as they are, on a GPU
under float16 autocast.
"""

import argparse
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effad_core.acceleration.devices import DEVICE_HELP
from effad_core.deployment.prepared import prepare
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.evaluation.costs import METHODS, count, efficientad
from effad_core.evaluation.methods import (
    SIZES,
    chosen_methods,
    find_method,
    load_detector,
    method_names,
)
from effad_core.evaluation.tables import layout, paper_results
from effad_core.prediction import Predictor
from effad_core.schedule import PROFILES
from effad_core.tiles.options import add_image_size

import numpy as np
import torch
from torch import Tensor

PAPER_GPU = "RTX A6000"  # of the paper's throughputs and memory
WARM_UP, RUNS, BATCH_SIZE = 1000, 1000, 16  # the paper's


@dataclass(frozen=True)
class Timing:
    """What was measured of one prepared detector.

    Attributes:
        name: of the detector.
        machine: processor or GPU, threads, version of torch.
        precision: the one in which it computed.
        latencies: seconds of each timed pass of a single image, shape (runs,).
        throughput: images per second in batches.
        batch_size: of these.
        memory: peak while it ran, MiB: on a GPU what torch reserved, on a CPU what was resident,
            Python and its packages included; None where the system does not say.
        image_size: (height, width) of the images, in pixels.
        cost: parameters and FLOPs of an image, as `costs.count` gives them.
    """

    name: str
    machine: str
    precision: str
    latencies: np.ndarray
    throughput: float
    batch_size: int
    memory: float | None
    image_size: tuple[int, int] = (256, 256)
    cost: tuple[int, int] = (0, 0)

    @property
    def mean(self) -> float:
        """Mean latency in milliseconds, the number that the paper reports."""
        return 1000 * float(np.mean(self.latencies))

    def percentile(self, q: float) -> float:
        """Latency in milliseconds that q % of the passes do not exceed; 50 is the median."""
        return 1000 * float(np.percentile(self.latencies, q))


def measure(
    prepared: Predictor,
    name: str = "EfficientAD",
    warm_up: int = WARM_UP,
    runs: int = RUNS,
    batches: int | None = None,
    batch_size: int = BATCH_SIZE,
    cost: tuple[int, int] | None = None,
) -> Timing:
    """Time a detector.

    Args:
        prepared: what `prepare` gives, or any other method's detector.
        name: kept in the result.
        warm_up: passes before the clock counts; also of batches, at most 10 of those.
        runs: timed passes of one image.
        batches: timed passes of a batch; as many as `runs` by default, as in the paper.
        batch_size: images in each.
        cost: kept in the result; None counts EfficientAD of the name's size.

    Raises:
        ValueError: for no runs, no batches or no images in one.
    """
    batches = runs if batches is None else batches
    if min(runs, batches, batch_size) < 1 or warm_up < 0:
        raise ValueError("at least one run, one batch and one image in it are needed")
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, 3, *prepared.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    _reset_peak_memory(prepared.device)
    latencies = _seconds(prepared, images[:1], warm_up, runs)
    throughput = batches * batch_size / _seconds(prepared, images, min(warm_up, 10), batches).sum()
    return Timing(
        name, machine(prepared.device), prepared.precision, latencies, float(throughput),
        batch_size, _peak_memory(prepared.device), prepared.image_size,
        cost or count(partial(efficientad, _size(name)), prepared.image_size),
    )  # fmt: skip


def _size(name: str) -> str:
    return "medium" if name.endswith("-M") else "small"


def _seconds(prepared: Predictor, images: Tensor, warm_up: int, runs: int) -> np.ndarray:
    seconds = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        prepared.combined_maps(images)[:, 0].cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[warm_up:])


def machine(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        cpus = Path("/proc/cpuinfo")
        names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = names[0] if names else platform.processor() or platform.machine()
        what = f"{name}, {cores} cores, {torch.get_num_threads()} threads"
    return f"{what}, torch {torch.__version__}"


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux: the peak of the resident memory starts anew
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float | None:
    """MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
    except (OSError, TypeError):  # not Linux: since the process started
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def paper_timings() -> dict[str, dict]:
    """The paper's Tables 11 and 12 by method: latency_ms by GPU, throughput, gpu_memory_mb."""
    return {
        name: {key: values[key] for key in ("latency_ms", "throughput", "gpu_memory_mb")}
        for name, values in paper_results().items()
    }


def table(timings: Sequence[Timing]) -> str:
    """What was measured, and the paper's methods below it."""
    rows = [["", "mean", "median", "99 %", "images/s", "parameters", "FLOPs", "memory"]]
    rows.append(["", "ms", "ms", "ms", "in batches", "millions", "G", "MiB"])
    for timing in timings:
        parameters, flops = timing.cost
        times = (timing.mean, timing.percentile(50), timing.percentile(99), timing.throughput)
        memory = "-" if timing.memory is None else f"{timing.memory:.0f}"
        rows.append(
            [f"{timing.name}, {timing.precision}", *(f"{value:.4g}" for value in times),
             f"{parameters / 1e6:.0f}", f"{flops / 1e9:.0f}", memory]
        )  # fmt: skip
    for name, paper in paper_timings().items():
        cost = METHODS[name]
        rows.append(
            [f"{name} (paper)", f"{paper['latency_ms'][PAPER_GPU]:g}", "", "",
             f"{paper['throughput']}", f"{cost.paper_parameters}", f"{cost.paper_flops}",
             f"{paper['gpu_memory_mb']}"]
        )  # fmt: skip
    where = sorted({timing.machine for timing in timings})
    return "\n".join([*where, f"the paper's: {PAPER_GPU}, float16", "", layout(rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="effad time",
        description=__doc__.splitlines()[0],
        epilog="example: effad time --device cuda --compile",
    )
    parser.add_argument("detector", nargs="?", help="a detector.safetensors; new ones without it")
    parser.add_argument(
        "--size", nargs="+", choices=("small", "medium"), default=["small", "medium"]
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"all, or some of {', '.join(method_names())}",
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="paper", help="of the methods other than EfficientAD"
    )
    add_image_size(parser)
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, with CUDA graphs")
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--batches", type=int, help="as many as runs without it")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    args = parser.parse_args(arguments)
    with command_errors("nothing was printed"):
        if args.detector and args.image_size:
            raise ValueError("a detector has an image size of its own: leave out --image-size")
        if args.detector and args.methods:
            raise ValueError("a detector has a method of its own: leave out --methods")
        names = [f"EfficientAD-{size[0].upper()}" for size in args.size]
        names = chosen_methods(args.methods) if args.methods else names
        protocol = (args.warm_up, args.runs, args.batches, args.batch_size)
        if args.detector:
            timings = [_timed(*load_detector(args.detector), args, protocol)]
        else:
            size = args.image_size or 256
            timings = [
                _timed(name, untrained_detector(SIZES[name], size), args, protocol)
                if name in SIZES
                else _timed(name, find_method(name).untrained(args.profile), args, protocol)
                for name in names
            ]
    print(table(timings))


def _timed(
    name: str, detector: Predictor, args: argparse.Namespace, protocol: Sequence[int | None]
) -> Timing:
    """Time EfficientAD prepared, any other method as it is."""
    if isinstance(detector, EfficientAD):
        ready = prepare(detector, args.device, args.precision, args.compile)
        return measure(ready, name, *protocol)
    detector.use_device(args.device)
    if detector.device.type == "cuda":
        detector.precision = "float16"
    size = detector.image_size
    build = partial(type(detector), **detector.arguments, pretrained=False)
    cost = count(lambda: build().counted(), size, torch.uint8)
    return measure(detector, name, *protocol, cost=cost)


def untrained_detector(size: str, image_size: int | tuple[int, int] = 256) -> EfficientAD:
    """An untrained detector with quantiles, to be timed."""
    detector = EfficientAD(size, image_size=image_size)
    detector.quantiles.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    return detector
