"""The benchmark of a GPU, with tiny numbers on a CPU: every line of its table is printed."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

from effad_core import EfficientAD, Sample, training

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", GPU)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_on_a_cpu_with_tiny_numbers(gpu, narrow, scenario, drawn, monkeypatch, capsys):
    test = Sample(drawn[6], 0, "good"), Sample(drawn[7], 1, "spot")
    small = replace(scenario, test=test)
    monkeypatch.setattr(gpu, "open_scenario", lambda _: small)
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self: self)
    monkeypatch.setattr(gpu, "untrained_detector", lambda size: narrow(size=size, out_channels=384))
    run, ahead = training.Run, training.ahead
    gpu.main(["--tiny", "--device", "cpu", "--size", "small"])
    assert (training.Run, training.ahead) == (run, ahead)  # the clock is gone
    said = capsys.readouterr().out
    for line in (
        r"products of large matrices in float16: \S+ TFLOP/s",
        r"EfficientAD-S, \S+: [\d.]+ ms .*, \d+ images/s in batches of 1, \d+% of the limit",
        r"the paper's: .* ms on .*; \d+ images/s on RTX A6000",
        r"EfficientAD-S, an iteration of `paper` in float32: [\d.]+ ms, of which \d+% waiting",
        r"the same without images to wait for, bfloat16: [\d.]+ ms",
        r"distillation from efficientnet-lite0, `paper`: \d+ images/s",
        r"`paper` on solar-mono, 2 iterations, [\d.]+ minutes: AU-ROC combined [\d.]+, student",
    ):
        assert re.search(line, said), line
