"""What a distillation begins from: a known teacher's weights, or a PDN-S's inside a PDN-M."""

from effad_core import EfficientAD, PatchDescriptionNetwork, RunError
from effad_core.datasets import normalise
from effad_core.distillation import algorithm
from effad_core.distillation.algorithm import main, save_teacher
from effad_core.distillation.start import SHIFT, starting_weights, widened
from effad_core.storage.weights import load_weights, write_tensors

import pytest
import skimage.data
import torch
from torch import Tensor

LAST = {"small": {"8"}, "medium": {"10", "12"}}  # the layers whose shape the channels decide


def network(size, channels, seed, padding=False) -> PatchDescriptionNetwork:
    torch.manual_seed(seed)
    return PatchDescriptionNetwork(size, channels, padding).requires_grad_(False)


def photographs() -> Tensor:
    """Two photographs as a teacher sees them, (2, 3, 128, 128)."""
    pixels = [skimage.data.astronaut()[:256, 100:356], skimage.data.chelsea()[20:276, 80:336]]
    images = torch.stack([torch.from_numpy(one[::2, ::2].copy()) for one in pixels])
    return normalise(images.permute(0, 3, 1, 2))


def before_the_last(network, x) -> Tensor:
    """What enters the first layer whose shape the channels decide."""
    for layer in list(network)[: {"small": 8, "medium": 10}[network.size]]:
        x = layer(x)
    return x


# ---- a PDN-M with the output of a PDN-S ----------------------------------------------------


@pytest.mark.parametrize("padding", [False, True])
def test_a_widened_network_has_the_output_of_the_small_one(padding):
    """Down to -SHIFT, where the ReLU in front of Conv-6 cuts features off."""
    small, medium = network("small", 7, 0, padding), network("medium", 7, 1, padding)
    small[8].weight *= 300
    x = photographs()
    expected = small(x)
    assert (expected < -SHIFT).any() and (expected > SHIFT).any()
    medium.load_state_dict(widened(small.state_dict(), medium))
    found = medium(x)
    torch.testing.assert_close(found, expected.clamp(min=-SHIFT), rtol=1e-4, atol=1e-4)
    inside = expected > -SHIFT
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-4, atol=1e-4)


def test_a_widened_shipped_teacher_has_its_output():
    small = EfficientAD("small").load_teacher().teacher
    x = photographs()
    with torch.no_grad():
        expected = small(x)
    assert expected.min() > -SHIFT  # of photographs; the features' standard deviation is about 1
    weights = {name: value.half() for name, value in small.state_dict().items()}  # as in the file
    medium = network("medium", small.out_channels, 0)
    medium.load_state_dict(widened(weights, medium))
    torch.testing.assert_close(medium(x), expected, rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_widened_network_can_learn_in_two_steps():
    """Channels that reach no output yet carry values, so the zeros that lead from them learn."""
    medium = network("medium", 4, 1).requires_grad_(True)
    medium.load_state_dict(widened(network("small", 4, 0).state_dict(), medium))
    optimizer = torch.optim.SGD(medium.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (medium(photographs()) - 1).square().mean().backward()
        moved = {name: weight.grad.flatten(1).any(1) for name, weight in weights_of(medium)}
        optimizer.step()
    for name, outputs in moved.items():
        assert outputs.float().mean() > 0.75, name  # the rest: a ReLU that is 0 everywhere


def weights_of(medium):
    return [(name, weight) for name, weight in medium.named_parameters() if weight.ndim == 4]


def test_neither_network_is_changed():
    small, medium = network("small", 5, 0), network("medium", 5, 1)
    before = [{n: w.clone() for n, w in part.state_dict().items()} for part in (small, medium)]
    widened(small.state_dict(), medium)
    starting_weights(small.state_dict(), medium, "x")
    for part, known in zip((small, medium), before, strict=True):
        assert all(torch.equal(value, known[name]) for name, value in part.state_dict().items())


# ---- a known teacher's weights for a new teacher -------------------------------------------


@pytest.mark.parametrize("known", [5, 9])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_layers_with_other_channels_alone_stay_random(size, known):
    start, teacher = network(size, known, 0), network(size, 5, 1)
    found = starting_weights(start.state_dict(), teacher, "x.safetensors")
    own = teacher.state_dict()
    for name, value in start.state_dict().items():
        anew = known != 5 and name.split(".")[0] in LAST[size]
        assert torch.equal(found[name], own[name] if anew else value), name
    load_weights(teacher, found, "x.safetensors")


@pytest.mark.parametrize("known", [5, 9])
def test_a_medium_teacher_begins_from_a_small_one(known):
    small, teacher = network("small", known, 0), network("medium", 5, 1)
    random = {name: value.clone() for name, value in teacher.state_dict().items()}
    load_weights(teacher, starting_weights(small.state_dict(), teacher, "x"), "x")
    x = photographs()
    if known == 5:
        torch.testing.assert_close(teacher(x), small(x), rtol=1e-4, atol=1e-4)
    else:
        for name in ("10.weight", "10.bias", "12.weight", "12.bias"):
            assert torch.equal(teacher.state_dict()[name], random[name]), name
    found, expected = before_the_last(teacher, x)[:, :256], before_the_last(small, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_small_teacher_cannot_begin_from_a_medium_one():
    weights, teacher = network("medium", 5, 0).state_dict(), network("small", 5, 1)
    with pytest.raises(RunError, match="^runs/m.safetensors is a medium teacher, .* --size medium"):
        starting_weights(weights, teacher, "runs/m.safetensors")


CHANGES = {
    "a layer of another shape": {"3.weight": torch.zeros(256, 96, 4, 4)},
    "a last layer of other shapes": {"8.weight": torch.zeros(6, 256, 4, 4)},
    "a bias that is a number": {"8.bias": torch.tensor(3.0)},
    "a bias of nothing": {"8.bias": torch.zeros(0)},
    "a layer more": {"9.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_another_network_are_refused(change, size):
    weights, teacher = network("small", 5, 0).state_dict() | CHANGES[change], network(size, 5, 1)
    with pytest.raises(RunError, match="x.safetensors is of another architecture"):
        load_weights(teacher, starting_weights(weights, teacher, "x"), "x.safetensors")


# ---- the command ---------------------------------------------------------------------------


@pytest.fixture
def begin(drawn, monkeypatch):
    """What `effad distill --start` hands to `distill`: the teacher, and the card of the start."""

    class Psi:
        out_channels = 5

    begun = []

    def distill(teacher, *_, start, **__):
        begun.append((teacher, start))
        return {"loss": 1.0}

    monkeypatch.setattr(algorithm, "open_extractor", lambda *_: Psi())
    monkeypatch.setattr(algorithm, "distill", distill)

    def call(path, size, *more):
        options = ("--start", path, "--size", size, "--hold-out", "1", "--run-dir", "run", *more)
        main([str(part) for part in (drawn[0].parent, *options)])
        return begun.pop()

    return call


@pytest.mark.parametrize("kind", ["teacher", "checkpoint"])
@pytest.mark.parametrize("known", [("small", 5), ("small", 9), ("medium", 5), ("medium", 9)])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_command_begins_from_a_file(begin, tmp_path, capsys, kind, known, size):
    start, card = network(*known, seed=3), {"extractor": "colours", "start": None}
    path = tmp_path / f"{kind}.safetensors"
    if kind == "teacher":
        save_teacher(path, start, card)
        weights = {name: value.half() for name, value in start.state_dict().items()}
    else:  # it holds more than the teacher
        weights = start.state_dict()
        tensors = {f"teacher.{name}": value for name, value in weights.items()}
        tensors |= {"psi.mu": torch.zeros(9, 1, 1), "adam.0.step": torch.tensor(3.0)}
        write_tensors(path, tensors, {"kind": "checkpoint", "iteration": 3, "config": card})
    if (known[0], size) == ("medium", "small"):
        with pytest.raises(SystemExit) as stop:
            begin(path, size)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert f"{path} is a medium teacher, from which a small one cannot begin" in said
        return
    teacher, begun_from = begin(path, size, "--seed", 4)
    assert (teacher.size, teacher.out_channels) == (size, 5)
    assert begun_from == card | ({"iteration": 3} if kind == "checkpoint" else {})
    if known[0] != size:
        x = photographs()
        with torch.no_grad():
            found, output = before_the_last(teacher, x)[:, :256], teacher(x)
        expected = before_the_last(start, x)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # half precision
        if known[1] == 5:
            torch.testing.assert_close(output, start(x), rtol=1e-2, atol=1e-3)
        return
    random = network(size, 5, seed=4).state_dict()  # what it has without a start
    for name, value in teacher.state_dict().items():
        anew = known[1] != 5 and name.split(".")[0] in LAST[size]
        assert torch.equal(value, random[name] if anew else weights[name].float()), name
