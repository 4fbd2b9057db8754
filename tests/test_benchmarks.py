"""The benchmarks that are no mere timing, with small numbers on a CPU."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

from benchmarks import edges
from effad_core import EfficientAD, Sample, training

import pytest
import torch

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


# ---- where maps have their maxima (benchmarks/edges.py) ------------------------------------------


def test_shares_of_maxima_by_hand():
    maps = torch.zeros(4, 256, 256)
    for m, (y, x) in zip(maps, [(128, 128), (0, 128), (20, 20), (255, 15)], strict=True):
        m[y, x] = 1  # inside; border; corner, but not border; both
    assert edges.shares(maps) == (0.5, 0.5)


def test_rings_against_the_cells_inside():
    class Detector:
        def cells(self, images):
            cells = torch.ones(len(images), 2, 10, 12)
            cells[:, 1] = 6.0
            cells[:, 1, 2:-2, 2:-2] = 2.0
            return cells

    assert edges.ring_ratios(Detector(), [torch.zeros(3), torch.zeros(1)]) == [1.0, 3.0]


def test_the_table_of_edges(narrow, scenario, drawn, monkeypatch, tmp_path, capsys):
    test = Sample(drawn[6], 0, "good"), Sample(drawn[7], 1, "spot")
    monkeypatch.setattr(edges, "open_scenario", lambda _: replace(scenario, test=test))
    detector = narrow()
    detector.cell_means[:, :, :1] = 0.001  # the maxima lie at the left border then
    detector.save(tmp_path / "detector.safetensors")
    edges.main([str(tmp_path), "drawn"])
    said = capsys.readouterr().out
    assert re.search(r"share of the area +0\.23 +0\.06\n", said)
    found = re.findall(r"(combined|student-teacher|autoencoder), cells (.*?)  .* ([\d.]+) ", said)
    assert len(found) == 6 and said.count("cells divided") == 3
    assert re.search(r"combined, cells divided +1\.00 ", said)
    assert len(re.findall(r"\n(normal images|textures) +[\d.]+ +[\d.]+", said)) == 2
