"""Training that goes on from a trained detector: new images, or false alarms as normal ones."""

from effad_core import EfficientAD, Schedule, train
from effad_core.datasets import Sample, Scenario
from effad_core.deployment.own_images import train_main
from effad_core.errors import RunError
from effad_core.region import Region

import numpy as np
import pytest
import torch

STILL = Schedule.smoke(precision="float32", learning_rate=0.0, weight_decay=0.0)


@pytest.fixture
def trained(narrow, scenario, pretraining):
    ad = narrow()
    train(ad, scenario, Schedule.smoke(precision="float32"), pretraining, device="cpu")
    ad.threshold = 0.5
    return ad


def other_images(drawn):
    samples = [Sample(path, 0, "good") for path in drawn]
    return Scenario("others", tuple(samples[3:]), tuple(samples[:3]), (), "drawn", "CC0")


def test_it_begins_with_the_weights_and_finds_every_number_anew(
    narrow, trained, drawn, pretraining
):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    ad, alone = narrow(), narrow()
    for one, start in ((ad, trained), (alone, None)):
        others = other_images(drawn)
        train(one, others, STILL, pretraining, seed=9, device="cpu", start=start)
    for name, value in trained.student.state_dict().items():
        assert torch.equal(ad.student.state_dict()[name], value)
        assert not torch.equal(alone.student.state_dict()[name], value)
    for name, value in trained.autoencoder.state_dict().items():
        assert torch.equal(ad.autoencoder.state_dict()[name], value)
    assert torch.equal(ad.mu, alone.mu) and not torch.equal(ad.mu, trained.mu)
    assert not torch.allclose(ad.quantiles, trained.quantiles)
    assert ad.threshold is None and trained.threshold == 0.5
    for name, value in trained.state_dict().items():
        assert torch.equal(before[name], value)  # the one to start from stays as it is
    history = ad.card["training"]
    assert history["scenario"] == "others" and history["seed"] == 9
    assert history["start"]["training"]["scenario"] == "drawn"
    assert "start" not in alone.card["training"]


def test_it_resumes_and_refuses_another_start(narrow, trained, drawn, pretraining, tmp_path):
    others = other_images(drawn)
    found = [narrow(), narrow()]
    for ad in found:
        train(ad, others, STILL, pretraining, tmp_path / "run", device="cpu", start=trained)
    assert torch.equal(found[0].quantiles, found[1].quantiles)
    for start in (None, narrow()):
        with pytest.raises(RunError, match="start"):
            train(narrow(), others, STILL, pretraining, tmp_path / "run", device="cpu", start=start)


def test_another_teacher_is_refused(narrow, trained, scenario, pretraining):
    for other in (narrow(seed=3), narrow(padding=True), narrow(out_channels=4)):
        with pytest.raises(ValueError, match="has another teacher, size or padding"):
            train(other, scenario, STILL, pretraining, device="cpu", start=trained)


def test_the_command_goes_on(drawn, tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.chdir(tmp_path)
    brief = Schedule.smoke(iterations=1, autoencoder_iterations=1)
    monkeypatch.setattr(Schedule, "smoke", lambda **_: brief)
    options = ["--profile", "smoke", "--rate", "0.5", "--guarantee", "average", "--device", "cpu"]
    folder = str(drawn[0].parent)
    train_main([folder, *options, "--run-dir", "first"])
    train_main([folder, *options, "--start", "first"])
    (run,) = (tmp_path / "build/runs").iterdir()
    assert run.name.endswith("-continued")
    ad = EfficientAD.load(run, "cpu")
    assert "start" in ad.card["training"] and ad.operating_point.images == 1
    ad.region = Region(np.arange(280) < 140 * np.ones((264, 1)))
    ad.save("half.safetensors")
    train_main([folder, *options, "--start", "half.safetensors", "--run-dir", "second"])
    assert EfficientAD.load("second", "cpu").region.share == 0.5  # it goes on looking there
    said = refusal(train_main, folder, "--start", "none")
    assert "none" in said and "does not exist" in said
