"""Which device is chosen, by every entry point; and that nothing is left on another.

There is no GPU here. What is asked of one is tested up to the move to it; the arithmetic on fake
tensors of a GPU, which have shapes and a device but no numbers, and refuse to be mixed with others.
"""

import warnings

from effad_core import (
    EfficientAD,
    OperatingPoint,
    PatchDescriptionNetwork,
    Schedule,
    choose_device,
    distill,
    evaluate,
    teacher_report,
    train,
    training,
)
from effad_core.datasets import ResizedImages, Sample
from effad_core.deployment import inspection
from effad_core.deployment.prepared import InferenceGraph, prepare
from effad_core.distillation import algorithm, teacher_check
from effad_core.distillation.schedule import DistillationSchedule
from effad_core.evaluation import benchmark, gallery, tasks, timing
from effad_core.statistics import ChannelMoments
from effad_core.training import TeacherFeatures, autoencoder_loss, loss_terms

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

GPU = torch.device("cuda", 1)
HEALTH_CHECK = "_accelerator_graph_capture_health_check"  # asks the driver; newer torch


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: None)
    for name in (HEALTH_CHECK, "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [
        (True, True, GPU),
        (True, False, GPU),
        (False, True, torch.device("mps")),
        (False, False, torch.device("cpu")),
    ],
)
def test_the_gpu_is_chosen_where_there_is_one(monkeypatch, gpus, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == expected
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", "cpu", torch.device("cuda", 0)])
def test_a_device_that_is_there_is_taken(gpus, name):
    assert choose_device(name) == choose_device(name, now=GPU) == torch.device(name)
    assert choose_device("cuda") == GPU  # with its number


def test_what_is_on_a_gpu_stays_there_unless_told_otherwise(gpus):
    first = torch.device("cuda", 0)
    assert choose_device(now=first) == first
    assert choose_device(now=torch.device("cpu")) == GPU


def test_a_device_that_is_not_there_is_refused(monkeypatch, gpus):
    with pytest.raises(ValueError, match="no device cuda:2: choose another, for example cpu"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"no device {name}"):
            choose_device(name)
    with pytest.raises(ValueError, match=r"must be cpu, cuda, cuda:1, ... or mps, not 'gpu'"):
        choose_device("gpu")


class Moved(Exception):
    """Raised instead of the move to a GPU."""


@pytest.fixture
def moves(monkeypatch, gpus):
    """A module that moves to a GPU raises `Moved`."""
    to = nn.Module.to

    def watched(self, *args, **kwargs):
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type != "cpu":
            raise Moved(device)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", watched)


class Blocks(nn.Module):
    """An extractor of 8 channels."""

    name, out_channels = "blocks", 8

    def input_size(self, size):
        return 2 * size


@pytest.fixture
def entry_points(narrow, scenario, pretraining, drawn, tmp_path, monkeypatch):
    """Every function and command that computes, by name; each takes what names a device."""
    detector, saved = narrow(), tmp_path / "detector.safetensors"
    detector.operating_point = OperatingPoint(1.0, "labels-f1", 2)
    detector.save(saved)
    samples = [Sample(path, index % 2, "good") for index, path in enumerate(drawn[:4])]
    monkeypatch.setattr(benchmark, "new_detector", lambda *_: narrow())
    monkeypatch.setattr(tasks, "open_scenario", lambda *_, **__: scenario)
    monkeypatch.setattr(benchmark, "check_scenario", lambda *_, **__: [])  # its files are absent
    monkeypatch.setattr(benchmark, "plan", lambda *_: [benchmark.Entry("x", "x", "x")])
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self, _: self)
    monkeypatch.setattr(algorithm, "open_extractor", lambda *_: Blocks())
    folder = str(drawn[0].parent)
    schedule = DistillationSchedule.smoke()
    return {
        "train": lambda **d: train(detector, scenario, Schedule.smoke(), pretraining, **d),
        "evaluate": lambda **d: evaluate(detector, samples, **d),
        "fit_thresholds": lambda **d: inspection.fit_thresholds(
            detector, samples[::2], 0.5, guarantee="average", **d
        ),
        "load": lambda **d: EfficientAD.load(saved, **d),
        "prepare": lambda **d: prepare(detector, precision="float32", **d),
        "teacher_report": lambda **d: teacher_report(detector, drawn, **d),
        "distill": lambda **d: distill(
            PatchDescriptionNetwork("small", 8), Blocks(), pretraining, schedule, **d
        ),
        "effad benchmark": lambda *o: benchmark.main(
            ["x", "--profile", "smoke", "--runs", str(tmp_path / "runs"),
             "--output", str(tmp_path / "results.json"), *o]
        ),
        "effad predict": lambda *o: inspection.main(
            [str(saved), folder, "--output", str(tmp_path / "inspection"), *o]
        ),
        "effad check-teacher": lambda *o: teacher_check.main([folder, *o]),
        "effad time": lambda *o: timing.main(
            ["--runs", "1", "--warm-up", "0", "--precision", "float32", *o]
        ),
        "effad gallery": lambda *o: gallery.main(
            [f"{folder}={saved}", "--output", str(tmp_path / "x.png"), *o]
        ),
        "effad distill": lambda *o: algorithm.main(
            [folder, "--run-dir", str(tmp_path / "distil"), "--channels", "8", "--profile", "smoke",
             "--hold-out", "2", *o]
        ),
    }  # fmt: skip


NAMES = [
    "train", "evaluate", "fit_thresholds", "load", "prepare", "teacher_report", "distill",
    "effad benchmark", "effad predict", "effad check-teacher", "effad time",
    "effad gallery", "effad distill",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_point_takes_the_gpu(entry_points, moves, monkeypatch, name):
    assert entry_points.keys() == set(NAMES)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with pytest.raises(Moved) as moved:
        entry_points[name]()
    assert moved.value.args == (GPU,)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_point_takes_the_device_that_is_named(entry_points, moves, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    named = ("--device", "cuda:0") if " " in name else ()
    with pytest.raises(Moved) as moved:
        entry_points[name](*named, **({} if named else {"device": "cuda:0"}))
    assert moved.value.args == (torch.device("cuda", 0),)


@pytest.mark.parametrize("name", ["train", "evaluate", "fit_thresholds", "load", "prepare"])
def test_the_cpu_is_taken_where_it_is_named(entry_points, moves, name):
    entry_points[name](device="cpu")


def test_a_prepared_detector_stays_where_it_is(narrow, drawn, gpus):
    prepared = prepare(narrow(), "cpu", "float32")
    samples = [Sample(path, index % 2, "good") for index, path in enumerate(drawn[:2])]
    evaluate(prepared, samples)
    evaluate(prepared, samples, device="cpu")
    with pytest.raises(ValueError, match="was prepared for cpu: prepare it anew for cuda:1"):
        evaluate(prepared, samples, device="cuda:1")


def test_a_command_says_in_one_sentence_that_there_is_no_such_device(monkeypatch, refusal):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(benchmark.main, "solar-mono", "--device", "cuda")
    assert "this machine has no device cuda" in said


@pytest.fixture
def fake():
    """Inside, tensors have shapes and devices but no numbers, and a GPU is there."""
    if not hasattr(torch.optim.Optimizer, HEALTH_CHECK):
        pytest.skip("this torch asks the driver of a GPU even for tensors without numbers")
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "CUDA is not available", UserWarning)
        yield


def fake_pixels(n, device=GPU):
    return torch.zeros(n, 3, 256, 256, dtype=torch.uint8, device=device)


@pytest.fixture
def detector():
    """Real, to be moved inside the fake mode."""
    made = EfficientAD()
    made.quantiles.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    return made, InferenceGraph(made)


def test_fake_tensors_of_two_devices_are_refused(fake):
    """Or the tests below could not fail."""
    with pytest.raises((RuntimeError, TypeError), match="(?i)device"):
        fake_pixels(1).float() + torch.ones(1, 3, 1, 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_left_on_another_device(detector, fake, precision):
    ad, graph = detector
    ad.to(GPU)
    assert {value.device for value in ad.state_dict().values()} == {GPU}
    schedule = Schedule(precision=precision)
    known = torch.zeros(1, 384, 56, 56, device=GPU)
    for given in (None, known):
        for terms in (
            loss_terms(ad, schedule, *fake_pixels(3), given),
            loss_terms(ad, schedule, *fake_pixels(3, "cpu"), given),
        ):
            assert {value.device for value in terms.values()} == {GPU}
    loss = autoencoder_loss(ad, precision, fake_pixels(4), torch.cat([known.half()] * 4))
    assert loss.device == GPU
    ad.precision = precision
    assert {m.device for m in ad.anomaly_maps(fake_pixels(2, "cpu"))} == {GPU}
    assert graph.to(GPU)(fake_pixels(2)).device == GPU


def test_the_teachers_outputs_are_on_the_detectors_device(detector, scenario, fake):
    ad = detector[0].to(GPU)
    images = ResizedImages(scenario.train, ad.image_size)
    assert TeacherFeatures(ad, images, "float32", 10)[0].device == GPU


@pytest.mark.parametrize(("device", "where"), [("xpu", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_statistics_need_no_float64_of_a_device_that_may_not_have_it(fake, device, where):
    """Apple's MPS has none; a fake device of another kind stands for it."""
    moments = ChannelMoments()
    moments.add(torch.zeros(2, 4, 8, 8, device=device))
    moments.add(torch.zeros(1, 4, 5, 5, device=device))
    assert moments.mean.dtype == moments.deviation.dtype == torch.float64
    assert moments.mean.device.type == moments.deviation.device.type == where


@pytest.fixture
def narrow_one(narrow):
    return narrow()


def test_a_training_leaves_nothing_behind_and_waits_only_for_rows(
    narrow_one, scenario, pretraining, fake, monkeypatch
):
    """The whole loop of `train` on a fake GPU: what needs numbers is replaced, and counted."""
    waits = []
    monkeypatch.setattr(training, "choose_device", lambda *_, **__: GPU)
    monkeypatch.setattr(training, "fingerprint", lambda _: "0")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(FakeTensor, "tolist", lambda t: waits.append(t.device) or [1.0] * t.numel())
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: waits.append(None))
    monkeypatch.setattr(training, "channel_statistics", statistics_of_fakes)
    monkeypatch.setattr(EfficientAD, "find_quantiles", lambda *_: None)
    monkeypatch.setattr(EfficientAD, "find_cell_means", lambda *_: None)
    monkeypatch.setattr(EfficientAD, "initialise_student", lambda _: None)
    detector = narrow_one
    schedule = Schedule.smoke(iterations=7, autoencoder_iterations=3, precision="bfloat16")
    row = train(detector, scenario, schedule, pretraining, log_every=5, workers=2)
    assert row["step"] == 10 and row["L"] == 1.0
    assert {value.device for value in detector.state_dict().values()} == {GPU}
    step = None
    assert waits == [step] * 3 + [GPU] + [step] * 2 + [GPU] + [step] * 5 + [GPU]


def statistics_of_fakes(maps):
    channels = {m.shape[1] for m in maps if m.device == GPU}
    return torch.zeros(*channels), torch.ones(*channels)
