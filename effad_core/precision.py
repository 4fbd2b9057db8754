"""The arithmetic of a computation: float32, the reference, or what is faster and as good."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from effad_core.winograd import minimal_filtering

WINOGRAD = "float32-winograd"
PRECISIONS = ("auto", "float32", WINOGRAD, "bfloat16")
WORTH = 2.0  # times faster than float32 that bfloat16 must be: about what Winograd's way gains


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" becomes what is fastest on a device, the others stay.

    "float32" is the reference. "float32-winograd" is float32 with the large convolutions done by
    `effad_core.winograd`, on a CPU. "bfloat16" is autocast. Instructions for bfloat16 do not make
    a processor fast in it: matrix units (AMX) do, vector instructions alone may be slower than
    float32. So a CPU is timed, once a process.

    Raises:
        ValueError: for any other name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_instructions = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if has_instructions and bfloat16_speed() > WORTH else WINOGRAD


@cache
def bfloat16_speed() -> float:
    """How many times faster than in float32 this CPU convolves in bfloat16 (takes about 0.1 s).

    Timed on a 4x4 convolution of the PDN's kind, the best of five turns of each format.
    """
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(6):  # the first warms up
        for dtype, times in seconds.items():
            images = torch.ones(1, 128, 62, 62, dtype=dtype).to(memory_format=torch.channels_last)
            kernel = torch.ones(128, 128, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
            start = time.perf_counter()
            F.conv2d(images, kernel)
            times.append(time.perf_counter() - start)
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a resolved precision."""
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with minimal_filtering(precision == WINOGRAD), half:
        yield
