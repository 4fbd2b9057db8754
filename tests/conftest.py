"""Fixtures for the tests of the core: drawn images and networks small enough for one core."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from effad_core import EfficientAD, OperatingPoint, PatchDescriptionNetwork, detector
from effad_core.datasets import PretrainingImages, Sample, Scenario

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


class NarrowPDN(PatchDescriptionNetwork):
    """A PDN's geometry with 8 channels inside: a training step takes a tenth of the time."""

    def __init__(self, size: str = "small", out_channels: int = 384, padding: bool = False):
        super().__init__(size, out_channels, padding)
        inside = 3
        for index, layer in enumerate(list(self)):
            if isinstance(layer, nn.Conv2d):
                outside = out_channels if index == len(self) - 1 else 8
                self[index] = nn.Conv2d(inside, outside, layer.kernel_size, padding=layer.padding)
                inside = outside


@pytest.fixture
def narrow(monkeypatch):
    """Detectors are built from narrow PDNs; returns a function that makes one with quantiles."""
    monkeypatch.setattr(detector, "PatchDescriptionNetwork", NarrowPDN)

    def make(seed: int = 0, **options) -> EfficientAD:
        torch.manual_seed(seed)
        made = EfficientAD(**{"out_channels": 8} | options)
        made.sigma.fill_(0.1)
        made.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
        return made

    make.network = NarrowPDN
    return make


@pytest.fixture
def nobody():
    """A context with a folder in which permissions count: meanwhile a superuser is somebody else.

    Whatever is imported there for the first time may be out of that user's reach.
    """
    if not hasattr(os, "seteuid"):
        pytest.skip("this system has other permissions")

    @contextmanager
    def somebody_else():
        Image.init()
        superuser = os.geteuid() == 0
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            own = Path(folder, "own")
            own.mkdir()
            if superuser:
                os.chown(own, 65534, 65534)
                os.seteuid(65534)
            try:
                yield own
            finally:
                if superuser:
                    os.seteuid(0)

    return somebody_else


def draw(path, seed: int):
    """Write a 280x264 image: a noisy slope with a disc, another one for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:264, :280]
    image = np.stack([90 + x // 4, 60 + y // 3, 120 + (x + y) // 8], 2) + rng.normal(0, 9, 3)
    image[(x - 140) ** 2 + (y - 120) ** 2 < rng.integers(30, 80) ** 2] = rng.integers(0, 256, 3)
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Paths of eight drawn images."""
    folder = tmp_path_factory.mktemp("drawn")
    return [draw(folder / f"{seed}.png", seed) for seed in range(8)]


@pytest.fixture
def judging(narrow, drawn):
    """A detector whose thresholds lie between the scores of the drawn images."""
    made = narrow()
    scores = sorted(p.score for p in made.predict(drawn))
    made.operating_point = OperatingPoint((scores[3] + scores[4]) / 2, "labels-f1", 9)
    made.pixel_operating_point = OperatingPoint(scores[3], "labels-f1", 9)
    return made


@pytest.fixture(scope="session")
def scenario(drawn):
    """Four training and two validation images; the test image does not exist: none may read it."""
    normal = [Sample(path, 0, "good") for path in drawn[:6]]
    test = (Sample(drawn[0].parent / "absent.png", 1, "spot"),)
    return Scenario("drawn", tuple(normal[:4]), tuple(normal[4:]), test, "drawn", "CC0")


@pytest.fixture(scope="session")
def pretraining(drawn):
    return PretrainingImages(drawn[6:], "two drawn images", "CC0")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The tests leave the user's cache alone (see `storage.digests`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def refusal(capsys):
    """Calls a command that must refuse its input, with exit code 2; returns its one message."""

    def call(main, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2, printed
        return printed.err.rstrip("\n").split("\n")[-1]

    return call
