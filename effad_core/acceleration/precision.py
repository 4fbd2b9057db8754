"""The arithmetic of a computation: float32, the reference, or what this machine does faster."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

from effad_core.acceleration.shortcuts import dropout
from effad_core.acceleration.winograd import convolution, filter_convolutions
from effad_core.networks import PATCH_SIZE, PatchDescriptionNetwork

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WINOGRAD = "float32-winograd"
PRECISIONS = ("auto", "float32", WINOGRAD, "bfloat16")
CANDIDATES = {  # kind of work -> what is timed; "float16" is for prepared detectors alone
    "training": ("float32", WINOGRAD, "bfloat16"),
    "inference": ("float32", WINOGRAD, "bfloat16", "float16"),
}
SECONDS = 2.0  # no turn begins that would end later
TURNS = 7  # at most; the first warms up
SLOW = 3.0  # times as long as float32: said when a detector is loaded
TRIAL = {  # side of the image of a short trial: a slow format is many times slower on larger ones
    "training": PATCH_SIZE + 7,  # and in training it is slow enough on a few pixels
    "inference": 2 * PATCH_SIZE + 6,
}
HOPELESS = 4.0  # times as long as the fastest in a short trial: not timed any further


@dataclass(frozen=True)
class Measurement:
    """How long this machine takes for the same work in each arithmetic.

    Attributes:
        work: "training" or "inference".
        seconds: by precision, the fastest of several turns. What was given up after a short trial,
            or what this machine cannot do at all, is missing.
    """

    work: str
    seconds: dict[str, float]

    def fastest(self, allowed: tuple[str, ...] = PRECISIONS) -> str:
        """The fastest of the allowed precisions."""
        return min(self.seconds.keys() & set(allowed), key=self.seconds.__getitem__)

    def sentence(self, chosen: str) -> str:
        """One line: the chosen precision, how it compares with float32, and what was timed."""
        gain = self.seconds["float32"] / self.seconds[chosen]
        times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in self.seconds.items())
        return f"{chosen}, {gain:.2f} times as fast as float32 in {self.work} (timed: {times})"


def resolve_precision(
    precision: str,
    device: torch.device,
    work: str = "inference",
    allowed: tuple[str, ...] = PRECISIONS,
    size: str = "small",
) -> str:
    """ "auto" becomes what this machine was measured to be fastest in; other names stay.

    "float32" is the reference. "float32-winograd" is float32 in which a CPU does the large
    convolutions with a quarter of the multiplications (see `winograd`). "bfloat16" is autocast.
    Which of them is fastest differs from processor to processor, so they are timed, the first time
    that a process asks (see `measure`).

    Args:
        precision: "auto", "float32", "float32-winograd" or "bfloat16".
        device: where to compute.
        work: what "auto" is to be fastest in: "training" or "inference".
        allowed: the names accepted.
        size: of the PDN, "small" or "medium".

    Raises:
        ValueError: for any other name.
    """
    if precision not in allowed:
        raise ValueError(f"precision must be one of {', '.join(allowed)}, not {precision!r}")
    return measure(device, work, size).fastest(allowed) if precision == "auto" else precision


def number_format(precision: str) -> str:
    """The format of the numbers in a resolved precision: Winograd's way has that of float32."""
    return precision.removesuffix("-winograd")


def describe_precision(
    precision: str, device: torch.device, work: str = "training", size: str = "small"
) -> str:
    """One line on a resolved precision; with the times, if it was measured in this process.

    Args:
        precision, device, work, size: as in `resolve_precision`.
    """
    known = _measurements.get((device, work, size))
    if known is None or precision not in known.seconds or "float32" not in known.seconds:
        return precision
    return known.sentence(precision)


_measurements: dict[tuple[torch.device, str, str], Measurement] = {}


def measure(device: torch.device, work: str, size: str = "small") -> Measurement:
    """Time every candidate on the PDN's convolutions; once a process, device, work and size.

    Training is a pass forwards and backwards, inference one forwards. The candidates take turns, so
    that whatever else the machine does slows all of them alike. A format for which the processor
    has no instructions can take thirty times as long as float32: a trial on a few pixels finds
    those first. All together it takes a few seconds.

    Args:
        device: where to compute.
        work: "training" or "inference".
        size: of the PDN, "small" or "medium".
    """
    if (device, work, size) not in _measurements:
        _measurements[device, work, size] = _measure(device, work, size)
    return _measurements[device, work, size]


@cache
def slowdown(precision: str, device: torch.device, size: str = "small") -> float:
    """How many times as long as float32 a precision takes here for inference, by a short trial.

    A processor without instructions for bfloat16 takes several times as long. The trial takes less
    than a second, once a process.

    Args:
        precision: "float32", "float32-winograd" or "bfloat16".
        device, size: as in `resolve_precision`.
    """
    with torch.random.fork_rng(devices=[]):
        network = PatchDescriptionNetwork(size).to(device)
        passes = {name: _pass(network, name, "inference") for name in ("float32", precision)}
        times = {
            name: min(_seconds(work, (1, 3, 128, 128), device) for _ in range(3))
            for name, work in passes.items()
        }
    return times[precision] / times["float32"]


def _measure(device: torch.device, work: str, size: str) -> Measurement:
    start = time.perf_counter()
    on_cpu = device.type == "cpu"
    # on a CPU a strip of an image, as wide as the real ones; a GPU needs more to be busy
    strip = (1, 3, 96 if size == "small" else 80, 256)
    real = strip if on_cpu else (4, 3, 256, 256)
    names = [name for name in CANDIDATES[work] if on_cpu or name != WINOGRAD]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PatchDescriptionNetwork(size).to(device, memory_format=torch.channels_last)
        passes, short = {}, {}
        for name in names:
            try:
                passes[name] = _pass(network, name, work)
                short[name] = _trial(
                    passes[name], TRIAL[work], device, min(short.values(), default=math.inf)
                )
            except (RuntimeError, TypeError):  # a format that the device does not have
                passes.pop(name, None)
    kept = [name for name in passes if short[name] <= HOPELESS * min(short.values())]
    seconds = {name: [] for name in kept}
    for turn in range(TURNS):
        began = time.perf_counter()
        for name in kept:
            seconds[name].append(_seconds(passes[name], real, device))
        now = time.perf_counter()
        if turn > 0 and now - start + (now - began) > SECONDS:
            break
    return Measurement(work, {name: min(times[1:]) for name, times in seconds.items()})


def _trial(work: Callable, side: int, device: torch.device, best: float) -> float:
    """The fastest of three passes over a small image; two are enough if they are hopeless."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 3 and min(times) <= HOPELESS * best):
        times.append(_seconds(work, (1, 3, side, side), device))
    return min(times)


def training_pass(
    precision: str, device: torch.device, size: str = "small"
) -> Callable[[], object]:
    """The work that training consists of, to be timed: a pass of the PDN on one image and back.

    Args:
        precision: a resolved one.
        device, size: as in `resolve_precision`.
    """
    network = PatchDescriptionNetwork(size).to(device, memory_format=torch.channels_last)
    return partial(_pass(network, precision, "training"), (1, 3, 256, 256))


def _pass(
    network: PatchDescriptionNetwork, precision: str, work: str
) -> Callable[[tuple[int, ...]], object]:
    """What is timed: the network on images of a shape, in a precision."""
    device = next(network.parameters()).device
    if work == "training":

        def train(shape: tuple[int, ...]) -> None:
            images = torch.ones(shape, device=device).contiguous(memory_format=torch.channels_last)
            with computing_in(precision, device):
                output = network(images)
            torch.autograd.grad(output.float().mean(), list(network.parameters()))

        return train
    dtype = getattr(torch, number_format(precision))
    ready = PatchDescriptionNetwork(network.size).requires_grad_(False)
    ready.to(device, dtype, memory_format=torch.channels_last)
    if precision == WINOGRAD:
        filter_convolutions(ready, torch.zeros(1, 3, 256, 256))

    @torch.inference_mode()
    def infer(shape: tuple[int, ...]) -> Tensor:
        images = torch.ones(shape, device=device, dtype=dtype)
        return ready(images.contiguous(memory_format=torch.channels_last))

    return infer


def _seconds(work: Callable, shape: tuple[int, ...], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work(shape)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a resolved precision, or of "float16". On a CPU, others take faster ways:

    Winograd's for the convolutions of "float32-winograd", and that of `shortcuts` for dropout.
    """
    faster = {}
    if device.type == "cpu" and precision != "float32":
        faster[F.dropout] = dropout
    if precision == WINOGRAD:
        faster[torch.conv2d] = convolution
    half = torch.float16 if precision == "float16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=precision in ("float16", "bfloat16"))
    with Instead(faster) if faster else nullcontext(), autocast:
        yield


class Instead(TorchFunctionMode):
    """Inside the block, other functions are called in place of some of torch's.

    Args:
        functions: by the one of torch's.
    """

    def __init__(self, functions: dict[Callable, Callable]):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.functions.get(func, func)(*args, **(kwargs or {}))
