"""The protocol with a clock and a detector of the test's own; the table beside the paper's."""

import mmap
import sys

from effad_core.deployment.prepared import prepare
from effad_core.evaluation import timing
from effad_core.evaluation.costs import METHODS
from effad_core.evaluation.methods import find_method
from effad_core.evaluation.timing import main, measure, paper_timings, table

import numpy as np
import pytest
import torch


class Clocked:
    """Stands for a prepared detector: the n-th call takes n ms, as its own clock says."""

    device, precision, image_size = torch.device("cpu"), "float32", (256, 256)

    def __init__(self):
        self.now, self.sizes = 0.0, []

    def perf_counter(self):
        return self.now

    def combined_maps(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, *self.image_size)
        self.sizes.append(len(images))
        self.now += len(self.sizes) / 1000
        return torch.zeros(len(images), 3, 256, 256)


@pytest.fixture
def clocked(monkeypatch):
    detector = Clocked()
    monkeypatch.setattr(timing.time, "perf_counter", detector.perf_counter)
    return detector


def test_the_protocol(clocked):
    found = measure(clocked, "x", warm_up=20, runs=100, batches=3, batch_size=4)
    assert clocked.sizes == [1] * 120 + [4] * (10 + 3)  # warming up, then what counts
    np.testing.assert_allclose(found.latencies, np.arange(21, 121) / 1000)
    assert found.mean == pytest.approx(70.5) and found.percentile(50) == pytest.approx(70.5)
    assert found.percentile(99) == pytest.approx(21 + 0.99 * 99)
    assert found.throughput == pytest.approx(3 * 4 / (0.131 + 0.132 + 0.133))
    assert found.memory is None or found.memory > 10
    assert torch.__version__ in found.machine and "threads" in found.machine


def test_as_many_batches_as_runs(clocked):
    measure(clocked, warm_up=0, runs=5, batch_size=2)
    assert clocked.sizes == [1] * 5 + [2] * 5


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"batches": 0}, {"batch_size": 0}, {"warm_up": -1}])
def test_nothing_to_time(clocked, wrong):
    with pytest.raises(ValueError, match="at least one run"):
        measure(clocked, **{"runs": 1} | wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak start anew")
def test_the_peak_is_that_of_the_measurement(narrow):
    prepared = prepare(narrow(), precision="float32")
    measure(prepared, warm_up=1, runs=1, batch_size=1)  # what the first pass loads stays
    with mmap.mmap(-1, 2**29) as block:  # 512 MiB from before the measurement do not count
        for _ in range(512):
            block.write(bytes(2**20))
        before = timing._peak_memory(prepared.device)
    found = measure(prepared, warm_up=0, runs=1, batch_size=1)
    assert 100 < found.memory < before - 400


def test_the_table_and_the_paper(clocked):
    assert paper_timings().keys() == METHODS.keys()
    for name, values in paper_timings().items():
        batched, alone = 1000 / values["throughput"], values["latency_ms"]["RTX A6000"]
        assert 0.4 * alone < batched < alone, name  # an image of a batch takes less time
    found = measure(clocked, "EfficientAD-M", warm_up=0, runs=2, batch_size=1)
    lines = table([found]).splitlines()
    (ours,) = [line for line in lines if line.startswith("EfficientAD-M, float32")]
    assert ours.split()[2:5] == ["1.5", "1.5", "1.99"] and ours.split()[6:8] == ["21", "235"]
    clocked.image_size = (256, 512)
    wide = table([measure(clocked, "EfficientAD-M", 0, 2, batch_size=1)]).splitlines()
    (ours,) = [line for line in wide if line.startswith("EfficientAD-M, float32")]
    assert float(ours.split()[7]) == pytest.approx(2 * 235, rel=0.06)  # twice, but for the edge
    (paper,) = [line for line in lines if line.startswith("EfficientAD-S (paper)")]
    assert paper.split()[2:] == ["2.2", "614", "8", "76", "100"]


def test_the_command(narrow, tmp_path, capsys, refusal):
    path = tmp_path / "x.safetensors"
    narrow().save(path)
    brief = ["--runs", "1", "--warm-up", "0", "--batch-size", "2", "--precision", "float32"]
    main([str(path), *brief])
    assert "EfficientAD-S, float32" in capsys.readouterr().out
    main([*brief, "--size", "small", "--image-size", "256x288"])
    assert "EfficientAD-S, float32" in capsys.readouterr().out
    assert "an image size of its own" in refusal(main, path, "--image-size", "300")
    absent = tmp_path / "absent.safetensors"
    assert "absent.safetensors does not exist" in refusal(main, absent)
    assert "not 'int4'" in refusal(main, path, "--precision", "int4")


def test_other_methods_are_timed_as_they_are(capsys, refusal):
    brief = ["--runs", "1", "--warm-up", "0", "--batch-size", "2", "--profile", "smoke"]
    main(["--methods", "patchcore-ens", "FastFlow", "efficientad-s", *brief])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(", float32")[0]: line.split() for line in lines if ", float32" in line}
    assert list(rows) == ["PatchCore Ens", "FastFlow", "EfficientAD-S"]
    with torch.device("meta"):
        flows = find_method("FastFlow").of_profile("smoke", pretrained=False)
    millions = sum(p.numel() for p in flows.parameters()) / 1e6
    assert float(rows["FastFlow"][-3]) == pytest.approx(millions, abs=0.5)
    assert "must be one of GCAD" in refusal(main, "--methods", "PaDiM")
