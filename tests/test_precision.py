""" "auto" is what was measured to be fastest: no name, no capability, no constant decides."""

from effad_core.acceleration import precision
from effad_core.acceleration.precision import (
    CANDIDATES,
    Measurement,
    computing_in,
    describe_precision,
    measure,
    resolve_precision,
)
from effad_core.networks import Autoencoder, PatchDescriptionNetwork

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
TIMES = {"float32": 4.0, "float32-winograd": 3.0, "bfloat16": 2.1, "float16": 1.0}


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test measures anew."""
    monkeypatch.setattr(precision, "_measurements", {})


def test_a_given_precision_stays_and_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(precision, "_measure", None)
    for name in ("float32", "float32-winograd", "bfloat16"):
        assert resolve_precision(name, CPU) == name
        assert describe_precision(name, CPU) == name
    with pytest.raises(ValueError, match="auto, float32, float32-winograd, bfloat16, not 'half'"):
        resolve_precision("half", CPU)


@pytest.mark.parametrize("fastest", ["float32", "float32-winograd", "bfloat16"])
def test_auto_is_the_fastest_however_small_the_difference(monkeypatch, fastest):
    times = dict.fromkeys(("float32", "float32-winograd", "bfloat16"), 1.0) | {fastest: 0.99}
    monkeypatch.setattr(precision, "_measure", lambda device, work, size: Measurement(work, times))
    assert resolve_precision("auto", CPU, "training") == fastest


def test_only_a_prepared_detector_takes_float16(monkeypatch):
    monkeypatch.setattr(precision, "_measure", lambda device, work, size: Measurement(work, TIMES))
    assert resolve_precision("auto", CPU) == "bfloat16"
    assert resolve_precision("auto", CPU, "inference", ("auto", *TIMES)) == "float16"


def test_a_device_and_a_kind_of_work_are_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        precision, "_measure", lambda *of: asked.append(of) or Measurement(of[1], TIMES)
    )
    for work in ("training", "inference", "training"):
        resolve_precision("auto", CPU, work)
    resolve_precision("auto", torch.device("mps"), "training")
    resolve_precision("auto", CPU, "training", size="medium")
    assert asked == [
        (CPU, "training", "small"),
        (CPU, "inference", "small"),
        (torch.device("mps"), "training", "small"),
        (CPU, "training", "medium"),
    ]


def test_what_was_measured_is_said(monkeypatch):
    times = {"float32": 0.4, "bfloat16": 0.1}
    monkeypatch.setattr(
        precision, "_measurements", {(CPU, "training", "small"): Measurement("t", times)}
    )
    said = (
        "bfloat16, 4.00 times as fast as float32 in t (timed: float32 400.0 ms, bfloat16 100.0 ms)"
    )
    assert describe_precision("bfloat16", CPU) == said
    assert describe_precision("float32-winograd", CPU) == "float32-winograd"  # it was not timed


def times(*seconds):
    return dict(zip(CANDIDATES["training"], seconds, strict=True))


class Machine:
    """A machine with a clock of its own: each arithmetic takes as long as `seconds` says.

    Args:
        seconds: by precision, for a pass over the real strip; TypeError where it cannot be done.
        trial: by precision, for one over the few pixels of the trial.
    """

    def __init__(self, monkeypatch, seconds, trial=None):
        self.now, self.seconds, self.turns, self.trials = 0.0, seconds, [], []
        self.trial = trial or dict.fromkeys(seconds, 0.001)
        monkeypatch.setattr(precision.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(precision, "_pass", self.a_pass)

    def a_pass(self, network, name, work):
        def work_on(shape):
            if name not in self.seconds:
                raise TypeError("no such format here")
            real = shape[3] == 256
            self.now += (self.seconds if real else self.trial)[name]
            (self.turns if real else self.trials).append(name)

        return work_on


def test_candidates_take_turns_and_the_best_turn_counts(monkeypatch):
    machine = Machine(monkeypatch, times(0.03, 0.02, 0.01))
    found = measure(CPU, "training")
    assert found.seconds == pytest.approx(machine.seconds)
    assert machine.turns == list(CANDIDATES["training"]) * precision.TURNS


def test_a_slow_machine_takes_fewer_turns_but_one_that_counts(monkeypatch):
    machine = Machine(monkeypatch, times(0.5, 0.3, 0.2))
    assert measure(CPU, "training").fastest() == "bfloat16"
    assert machine.turns == list(CANDIDATES["training"]) * 2
    machine = Machine(monkeypatch, times(0.2, 0.11, 0.1))
    precision._measurements.clear()
    measure(CPU, "training")
    assert machine.now < precision.SECONDS + 0.01


def test_a_hopeless_format_is_given_up_after_the_trial(monkeypatch):
    """bfloat16 without instructions for it: 60 s an iteration instead of 2."""
    trial = {"float32": 0.004, "float32-winograd": 0.004, "bfloat16": 0.1}
    machine = Machine(monkeypatch, times(0.1, 0.05, 9.0), trial)
    assert measure(CPU, "training").seconds.keys() == {"float32", "float32-winograd"}
    assert "bfloat16" not in machine.turns
    assert [machine.trials.count(name) for name in machine.seconds] == [3, 3, 2]


def test_what_the_device_cannot_do_is_left_out(monkeypatch):
    Machine(monkeypatch, {"float32": 0.02, "bfloat16": 0.01})
    found = measure(CPU, "inference")
    assert found.seconds.keys() == {"float32", "bfloat16"}
    assert found.fastest() == "bfloat16"


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("work", ["training", "inference"])
def test_it_runs_on_this_machine(work, size):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = measure(CPU, work, size)
    assert torch.equal(state, torch.get_rng_state())
    assert {"float32", "float32-winograd"} <= found.seconds.keys() <= set(CANDIDATES[work])
    assert all(0 < seconds < 60 for seconds in found.seconds.values())
    assert found.sentence(found.fastest()).startswith(found.fastest())
    assert measure(CPU, work, size) is found


def test_the_candidates_compute_what_they_are_called(monkeypatch):
    """In training and in inference: the type that comes out, and Winograd's way where it is due."""
    network = PatchDescriptionNetwork("small")
    seen = []
    monkeypatch.setattr(
        PatchDescriptionNetwork,
        "forward",
        lambda self, images: (
            seen.append(super(PatchDescriptionNetwork, self).forward(images)) or seen[-1]
        ),
    )
    for work, names in CANDIDATES.items():
        for name in names:
            precision._pass(network, name, work)((1, 3, 40, 40))
            assert seen[-1].dtype == getattr(torch, name.removesuffix("-winograd"))
            assert seen[-1].requires_grad == (work == "training")


@pytest.mark.parametrize("name", ["float32", "float32-winograd", "bfloat16"])
def test_the_context(name, monkeypatch):
    taken = []
    monkeypatch.setattr(
        precision, "convolution", lambda *a, **k: taken.append("conv") or torch.conv2d(*a, **k)
    )
    monkeypatch.setattr(
        precision, "dropout", lambda x, *_, **__: taken.append("dropout") or torch.zeros_like(x)
    )
    autoencoder, images = Autoencoder(8).train(), torch.zeros(1, 3, 256, 256)
    with torch.no_grad(), computing_in(name, CPU):
        assert torch.is_autocast_enabled("cpu") == (name == "bfloat16")
        output = autoencoder(images)
    assert output.dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    assert taken.count("conv") == (14 if name == "float32-winograd" else 0)
    assert taken.count("dropout") == (0 if name == "float32" else 6)
    taken.clear()
    with torch.no_grad():
        autoencoder(images)
        F.dropout(images)
    assert not taken and not torch.is_autocast_enabled("cpu")


def test_a_slowdown_is_the_ratio_of_two_trials(monkeypatch):
    spent = {"float32": 2.0, "bfloat16": 7.0}
    monkeypatch.setattr(precision, "_pass", lambda network, name, work: name)
    monkeypatch.setattr(precision, "_seconds", lambda work, shape, device: spent[work])
    precision.slowdown.cache_clear()
    assert precision.slowdown("bfloat16", torch.device("cpu")) == 3.5
    precision.slowdown.cache_clear()
