"""The benchmarks that are no mere timing, with small numbers on a CPU."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

from benchmarks import edges, peers, puad
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


# ---- PUAD and other methods (benchmarks/puad.py, benchmarks/peers.py) ----------------------------


@pytest.fixture
def tested(scenario, drawn, monkeypatch):
    """A scenario with test images of both kinds, which every name opens."""
    test = Sample(drawn[6], 0, "good"), Sample(drawn[7], 1, "spot")
    both = replace(scenario, test=test)
    for module in (peers, puad):
        monkeypatch.setattr(module, "open_scenario", lambda _: both)
    return both


def test_a_row_for_each_detector_without_and_with_puad(narrow, tested, tmp_path, capsys):
    narrow().save(tmp_path / "detector.safetensors")
    puad.main([str(tmp_path), "drawn", str(tmp_path), "again"])
    said = capsys.readouterr().out
    assert len(re.findall(r"  drawn all  [01]\.\d{3} -> [01]\.\d{3}  \(fitted in", said)) == 2
    with pytest.raises(SystemExit):
        puad.main([str(tmp_path)])


def test_a_row_for_each_method_and_seed(tested, monkeypatch, tmp_path, capsys):
    pooled = torch.nn.AvgPool2d(64)
    pooled.forward = lambda images: torch.nn.functional.avg_pool2d(images.float(), 64)
    monkeypatch.setattr(peers, "open_extractor", lambda: pooled)
    monkeypatch.setattr(peers, "TIMED", 1)
    output = tmp_path / "rows.json"
    peers.main(["drawn", "--methods", "patchcore", "--seeds", "0", "1", "--output", str(output)])
    said = capsys.readouterr().out
    rows = json.loads(output.read_text())
    assert [row["seed"] for row in rows] == [0, 1] and {r["method"] for r in rows} == {"patchcore"}
    area = rows[0]["metrics"]["all"]["image_auroc"]
    assert re.search(rf"drawn  all  patchcore  seed 0  AU-ROC {area:.3f}  .* ms  \d+ patches", said)


def test_anomalib_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(peers, "EfficientAd", None)
    with pytest.raises(SystemExit):
        peers.main(["tray"])
    assert "anomalib is not installed here" in capsys.readouterr().err
