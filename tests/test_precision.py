""" "auto" is bfloat16 only where this processor was measured to be far faster in it."""

from effad_core import precision, winograd
from effad_core.precision import computing_in, resolve_precision

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    precision.bfloat16_speed.cache_clear()
    yield
    precision.bfloat16_speed.cache_clear()


def test_a_given_precision_stays():
    for name in ("float32", "float32-winograd", "bfloat16"):
        assert resolve_precision(name, CPU) == name
    with pytest.raises(ValueError, match="auto, float32, float32-winograd, bfloat16, not 'half'"):
        resolve_precision("half", CPU)


@pytest.mark.parametrize(
    ("capabilities", "speed", "expected"),
    [
        ({"avx512_bf16": True}, 0.5, "float32-winograd"),  # instructions, but slower
        ({"avx512_bf16": True}, 1.9, "float32-winograd"),  # Winograd's way gains as much
        ({"avx512_bf16": True, "amx_bf16": True}, 2.5, "bfloat16"),
        ({"amx_bf16": True}, 2.5, "bfloat16"),
        ({}, 2.5, "float32-winograd"),
    ],
)
def test_auto(monkeypatch, capabilities, speed, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(precision, "bfloat16_speed", lambda: speed)
    assert resolve_precision("auto", CPU) == expected


def test_other_devices():
    assert resolve_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("name", ["float32", "float32-winograd", "bfloat16"])
def test_the_context(name):
    with computing_in(name, CPU):
        assert torch.is_autocast_enabled("cpu") == (name == "bfloat16")
        assert winograd._in_use.get() == (name == "float32-winograd")
    assert not torch.is_autocast_enabled("cpu") and not winograd._in_use.get()


def test_the_speed_is_the_ratio_of_the_best_times(monkeypatch):
    """A clock that makes bfloat16 three times faster, but for one slow turn of each."""
    ticks, clock = iter(range(1000)), [0.0]
    seconds = {torch.float32: 3.0, torch.bfloat16: 1.0}

    def conv2d(images, kernel):
        assert images.dtype == kernel.dtype
        clock[0] += seconds[images.dtype] * (10 if next(ticks) in (4, 5) else 1)

    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(precision.F, "conv2d", conv2d)
    assert precision.bfloat16_speed() == 3.0


def test_it_runs_on_this_machine():
    assert precision.bfloat16_speed() > 0.01
    first = precision.bfloat16_speed()
    assert precision.bfloat16_speed() == first  # timed once a process
