"""What all methods beside EfficientAD share: runs that resume, files, thresholds, refusals.

Then SimpleNet by hand, and what the methods read of networks against torchvision and plain PyTorch.
"""

import copy
import csv
import functools
import json
import shutil
from dataclasses import replace

from baselines import layers as layers_module
from baselines import method as shared
from baselines.layers import LAYERS, Layers, PatchFeatures
from baselines.method import Frozen, Schedule, load_method, pixels
from baselines.patchcore import PatchCore
from baselines.simplenet import SimpleNet
from effad_core import evaluate
from effad_core.datasets import ResizedImages, Sample
from effad_core.deployment.inspection import fit_thresholds
from effad_core.distillation.backbones import LITE0, open_backbone, open_network
from effad_core.distillation.extractors import FeatureExtractor
from effad_core.errors import DataError, RunError
from effad_core.evaluation.methods import find_method, load_detector, method_names
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors, write_tensors

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

NAMES = [name for name in method_names() if not name.startswith("EfficientAD")]
SMALL = {  # arguments with which a step takes a fraction of a second
    "GCAD": {"width": 0.05, "base": 4, "image_size": 32},
    "S-T": {"width": 0.05, "image_size": 32},
    "DSR": {"width": 8, "codes": 32, "base": 4, "image_size": 64},
    "AST": {"image_size": 64, "teacher_width": 16, "student_width": 16},
}
SEED = 5


@pytest.fixture(scope="module", autouse=True)
def drawn_networks():
    """Networks that are not pretrained are drawn once for each of the first seeds, then copied."""
    drawn, open_anew = {}, layers_module.open_network

    def opened(name, weights=None, pretrained=True):
        if pretrained:
            return open_anew(name, weights)
        key = name, min(torch.initial_seed(), 2)  # what is loaded from a file has any seed
        if key not in drawn:
            drawn[key] = open_anew(name, pretrained=False)
        return copy.deepcopy(drawn[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_module, "open_network", opened)
        yield


def made(name, seed=0, **changes):
    """A small one, not yet fitted, whose networks are drawn: no file of weights is read."""
    torch.manual_seed(seed)
    arguments = SMALL.get(name, {"image_size": 32}) | changes
    return find_method(name).of_profile("smoke", pretrained=False, **arguments)


def schedule_of(name):
    """Two steps in each phase."""
    profile = find_method(name).profile("smoke").schedule
    return replace(profile, lengths=(2,) * len(profile.lengths), batch_size=2)


def steps_of(name):
    return sum(schedule_of(name).lengths)


TRAINED = [name for name in NAMES if steps_of(name)]


def fit(name, scenario, run_dir=None, seed=SEED, **changes):
    return made(name, **changes).fit(scenario, schedule_of(name), seed, run_dir, "cpu")


@pytest.fixture(scope="module")
def runs(scenario, tmp_path_factory):
    """Gives the fitted method of a name, and the folder of its run; each is fitted once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("run")
        return fit(name, scenario, folder), folder

    return run


@pytest.fixture(params=NAMES)
def fitted(request, runs):
    return runs(request.param)


@pytest.fixture
def patchcore(runs):
    return runs("PatchCore")


def assert_same(found, expected, drawn=()):
    """That two fitted methods have equal bits, in tensors, maps, scores and thresholds."""
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key
    assert (found.threshold, found.pixel_threshold) == (
        expected.threshold,
        expected.pixel_threshold,
    )
    assert (found.full_scale, found.precision) == (expected.full_scale, expected.precision)
    for path in drawn:
        one, other = found.predict(path), expected.predict(path)
        assert one.score == other.score and np.array_equal(one.maps, other.maps)


def nothing_is_computed(monkeypatch, method):
    """Fitting it fails at the first loss, or at what follows the training."""

    def computed(*_):
        raise AssertionError("this was computed already")

    phases = type(method).phases
    monkeypatch.setattr(
        type(method),
        "phases",
        lambda self, images: [replace(p, loss=computed) for p in phases(self, images)],
    )
    monkeypatch.setattr(type(method), "finish", computed)


def interrupt_after(monkeypatch, method, steps):
    """The loss of step `steps` + 1 is where the user presses Ctrl-C; returns the steps done."""
    done, phases = [], type(method).phases

    def pressing(phase):
        def loss(*given):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(given)
            return phase.loss(*given)

        return replace(phase, loss=loss)

    monkeypatch.setattr(
        type(method), "phases", lambda self, images: [pressing(p) for p in phases(self, images)]
    )
    return done


# ---- a run ---------------------------------------------------------------------------------


def test_a_fit_leaves_a_run(fitted):
    method, folder = fitted
    config = json.loads((folder / "config.json").read_text())
    schedule = schedule_of(method.NAME)
    assert config["method"] == method.NAME and config["seed"] == SEED
    assert config["scenario"] == "drawn" and config["device"] == "cpu"
    assert config["schedule"] == json.loads(json.dumps(vars(schedule)))
    assert config["arguments"] == json.loads(json.dumps(method.arguments))
    _, header = read_tensors(folder / "detector.safetensors", "method")
    training = {key: value for key, value in config.items() if key != "device"}
    assert header["method"] == method.NAME and header["card"] == {"training": training}
    if method.NAME in TRAINED:
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        phases = len(schedule.lengths)
        assert [int(row["step"]) for row in rows] == [2 * (n + 1) for n in range(phases)]
        assert [int(row["phase"]) for row in rows] == list(range(1, phases + 1))
        assert all(np.isfinite(float(row["L"])) for row in rows)
    assert not any(module.training for module in method.modules())


def test_what_is_loaded_has_maps_of_the_same_bits(fitted, drawn, tmp_path):
    method, folder = fitted
    assert_same(type(method).load(folder, "cpu"), method, drawn[5:])
    method = type(method).load(folder / "detector.safetensors", "cpu")
    method.threshold, method.pixel_threshold = 0.125, 0.1
    method.save(tmp_path / "copy.safetensors")
    name, loaded = load_detector(tmp_path / "copy.safetensors", "cpu")
    assert name == method.NAME and type(loaded) is type(method)
    assert loaded.threshold == 0.125 and loaded.pixel_threshold == 0.1
    assert_same(loaded, method, drawn[7:])
    assert loaded.card == method.card


def test_a_second_fit_takes_the_run_up(fitted, scenario, drawn, monkeypatch):
    method, folder = fitted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    nothing_is_computed(monkeypatch, method)
    again = fit(method.NAME, scenario, folder)
    assert_same(again, method, drawn[7:])
    assert not any(module.training for module in again.modules())
    once_more = again.fit(scenario, schedule_of(method.NAME), SEED, folder, "cpu")
    assert_same(once_more, method)  # what a fitted one found on images is no other setting
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_thresholds_that_were_saved_in_the_run_are_taken_up(patchcore, scenario, tmp_path):
    shutil.copytree(patchcore[1], tmp_path / "run")
    found = PatchCore.load(tmp_path / "run", "cpu")
    found.threshold, found.pixel_threshold = 2.0, 1.5
    found.save(tmp_path / "run" / "detector.safetensors")
    again = fit("PatchCore", scenario, tmp_path / "run")
    assert (again.threshold, again.pixel_threshold) == (2.0, 1.5)


@pytest.mark.parametrize("other", ["seed", "schedule", "arguments", "weights", "images"])
def test_a_run_of_other_settings_is_refused(fitted, scenario, other):
    method, folder = fitted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    schedule, seed, built, message = schedule_of(method.NAME), SEED, made(method.NAME), other
    if other == "seed":  # of which the first random weights derive
        seed, message = SEED + 1, "seed|weights"
    elif other == "schedule":
        schedule = replace(schedule, batch_size=3)
    elif other == "arguments":
        built = made(method.NAME, image_size=96)
    elif other == "weights":
        if method.NAME == "DSR":  # what was drawn of the others is drawn anew
            built.autoencoder.decoder[0].bias.data += 1
        else:
            built = made(method.NAME, seed=1)
    else:
        scenario = replace(scenario, train=scenario.train[:3])
        message = "run of other images"
    with pytest.raises(RunError, match=message) as refused:
        built.fit(scenario, schedule, seed, folder, "cpu")
    assert "choose another run_dir" in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "fitted, done",
    [(name, done) for name in TRAINED for done in range(1, steps_of(name), 2)],
    indirect=["fitted"],
)
def test_a_resumed_training_gives_the_bits_of_an_uninterrupted_one(
    fitted, scenario, drawn, tmp_path, monkeypatch, done
):
    """Interrupted in the first phase or in the second, with a checkpoint after each step."""
    method, folder = fitted
    steps = steps_of(method.NAME)
    monkeypatch.setattr(shared, "Run", functools.partial(Run, save_seconds=0))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, method, done)
        with pytest.raises(KeyboardInterrupt):
            fit(method.NAME, scenario, tmp_path)
    assert not (tmp_path / "detector.safetensors").exists()
    _, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == done
    built = made(method.NAME)
    torch.manual_seed(99)  # what was drawn before does not count
    taken = interrupt_after(monkeypatch, method, steps)
    resumed = built.fit(scenario, schedule_of(method.NAME), SEED, tmp_path, "cpu")
    assert len(taken) == steps - done
    assert_same(resumed, method, drawn[7:])
    assert (tmp_path / "log.csv").read_bytes() == (folder / "log.csv").read_bytes()


def test_a_run_interrupted_after_its_training_is_finished_without_steps(
    fitted, scenario, drawn, tmp_path, monkeypatch
):
    """What a phase finds on images before its first step is found again."""
    method, _ = fitted

    def pressed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "finish", pressed)
        with pytest.raises(KeyboardInterrupt):
            fit(method.NAME, scenario, tmp_path)
    assert not (tmp_path / "detector.safetensors").exists()
    taken = interrupt_after(monkeypatch, method, steps_of(method.NAME))
    assert_same(fit(method.NAME, scenario, tmp_path), method, drawn[7:])
    assert not taken or method.NAME not in TRAINED


def test_a_fit_takes_thresholds_away_and_writes_nothing_by_itself(
    patchcore, scenario, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    method = made("PatchCore")
    method.threshold = method.pixel_threshold = 1.0
    assert method.fit(scenario, schedule_of("PatchCore"), SEED, device="cpu") is method
    assert method.threshold is None and method.pixel_threshold is None
    assert_same(method, patchcore[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(scenario, tmp_path, monkeypatch, value):
    monkeypatch.setattr(shared, "Run", functools.partial(Run, save_seconds=0))
    phases, calls = SimpleNet.phases, []

    def spoilt(self, images):
        (phase,) = phases(self, images)

        def loss(*given):
            calls.append(given)
            return {n: v * (value if len(calls) == 2 else 1) for n, v in phase.loss(*given).items()}

        return [replace(phase, loss=loss)]

    monkeypatch.setattr(SimpleNet, "phases", spoilt)
    with pytest.raises(ValueError, match=f"the loss of SimpleNet is {value} at step 2"):
        fit("SimpleNet", scenario, tmp_path)
    tensors, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 1 and len(calls) == 2
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_learning_rates_follow_their_phase(scenario, monkeypatch):
    """A cosine from 1 to 0.4, as torch's scheduler has it, of both groups' rates."""
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: rates.append([g["lr"] for g in self.param_groups]) or step(self, *a),
    )
    made("SimpleNet").fit(scenario, Schedule((5,), 1), 0, device="cpu")
    assert [group[0] for group in rates[:1]] == [1e-4]
    for group, (first, lowest) in enumerate([(1e-4, 0.4e-4), (2e-4, 0.8e-4)]):
        torch_adam = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=first)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch_adam, 5, lowest)
        expected = []
        for _ in range(5):
            expected.append(torch_adam.param_groups[0]["lr"])
            torch_adam.step()
            theirs.step()
        assert [row[group] for row in rates] == pytest.approx(expected)


def test_each_step_draws_by_the_seed_and_its_number(scenario, monkeypatch):
    """Other images and noise in each step and for each seed; the same in each repetition."""
    simplenet, drawn = find_method("SimpleNet"), []
    phases = simplenet.phases

    def watched(self, images):
        (phase,) = phases(self, images)
        loss = phase.loss

        def noting(chosen, rng):
            drawn[-1].append((*chosen, float(torch.rand(()))))
            return loss(chosen, rng)

        return [replace(phase, loss=noting)]

    monkeypatch.setattr(simplenet, "phases", watched)
    for seed in (0, 0, 1):
        drawn.append([])
        made("SimpleNet").fit(scenario, Schedule((4,), 3), seed, device="cpu")
    first, again, other = drawn
    assert first == again and len(first) == 4
    assert len({*first, *other}) == 8
    images = [step[:-1] for step in first + other]
    assert len(set(images)) > 4  # of few images, some steps draw the same


def test_lengths_are_steps_or_passes_over_the_images():
    assert Schedule((7, 2), 4).steps(9) == [7, 2]
    assert Schedule((7, 2), 4, epochs=True).steps(9) == [21, 6]  # of 3 batches, the last of one
    assert Schedule((7, 2), 4, epochs=True).steps(8) == [14, 4]
    assert Schedule().steps(9) == []


# ---- which images are read -----------------------------------------------------------------


def test_test_images_are_never_read(fitted, scenario, drawn, monkeypatch):
    """Those of the scenario do not exist; validation images are read by who needs them."""
    method, _ = fitted
    read, load = [], Sample.load
    monkeypatch.setattr(Sample, "load", lambda sample: read.append(sample.path) or load(sample))
    assert not scenario.test[0].path.exists()
    without = replace(scenario, validation=())
    if method.NEEDS_VALIDATION:
        with pytest.raises(ValueError, match="scenario drawn has no validation images, from which"):
            fit(method.NAME, without)
        assert not read
    found = fit(method.NAME, scenario if method.NEEDS_VALIDATION else without)
    assert read and set(read) <= set(drawn[:6])
    assert bool(set(read) & set(drawn[4:6])) == method.NEEDS_VALIDATION
    assert_same(found, method)


def test_images_that_cannot_be_read_are_named_before_anything_is_computed(
    fitted, scenario, tmp_path, monkeypatch
):
    method, _ = fitted
    nothing_is_computed(monkeypatch, method)
    broken = tmp_path / "broken.png"
    broken.write_bytes(scenario.train[0].path.read_bytes()[:-20])
    bad = replace(scenario, train=(*scenario.train, Sample(broken, 0, "good")))
    with pytest.raises(DataError, match="broken.png cannot be read"):
        fit(method.NAME, bad, tmp_path / "run")


# ---- maps, scores, thresholds --------------------------------------------------------------


def test_a_prediction_has_the_images_own_size(fitted, drawn):
    method, _ = fitted
    found = method.predict(drawn[7])
    assert found.map.shape == (264, 280) and found.map.dtype == np.float32
    assert np.isfinite(found.map).all() and np.ptp(found.map) > 0
    assert np.isnan(found.st_map).all() and np.isnan(found.ae_map).all()
    together = method.predict(drawn[4:8])[3]
    np.testing.assert_allclose(together.map, found.map, rtol=1e-3, atol=1e-3 * np.ptp(found.map))
    assert together.score == pytest.approx(found.score, rel=1e-3, abs=1e-3)
    x = pixels(ResizedImages([Sample(drawn[7], 0, "good")], method.image_size), [0], "cpu")
    assert torch.equal(method(x), torch.from_numpy(found.maps)[None])


def test_thresholds_and_scores_are_those_of_predictions(fitted, scenario, drawn):
    method = type(fitted[0]).load(fitted[1], "cpu")
    point, _ = fit_thresholds(method, scenario.validation, 0.5, guarantee="average", device="cpu")
    lower, higher = sorted(method.predict(drawn[4:6]), key=lambda prediction: prediction.score)
    assert point.threshold == method.threshold == higher.score  # of three, one may be above it
    assert lower.score < higher.score and not higher.is_anomalous
    test = tuple(Sample(path, number % 2, "spot") for number, path in enumerate(drawn[4:]))
    train, validation = scenario.train[:2], scenario.train[2:]
    other = replace(scenario, train=train, validation=validation, test=test)
    result = evaluate(method, other)
    own = [method.predict(path).score for path in drawn[4:]]
    scores = result.scores["combined"]
    np.testing.assert_allclose(scores, own, rtol=1e-3, atol=1e-3)
    area = roc_auc_score([sample.label for sample in test], scores)
    assert result.metrics()["all"]["image_auroc"] == pytest.approx(area)


# ---- files and names that are refused ------------------------------------------------------


@pytest.fixture
def damaged(patchcore, tmp_path):
    """Writes PatchCore's file with changes; returns its path."""
    tensors, header = read_tensors(patchcore[1] / "detector.safetensors", "method")

    def write(changes=None, **entries):
        path = tmp_path / "detector.safetensors"
        write_tensors(path, tensors | (changes or {}), header | entries)
        return path

    write.tensors, write.header = tensors, header
    return write


def refusal_of(path, opens=load_method):
    with pytest.raises(RunError) as refused:
        opens(path, "cpu")
    message = str(refused.value)
    assert "\n" not in message and path.name in message, message
    return message


def test_an_undamaged_copy_is_loaded(damaged, patchcore, drawn):
    assert_same(load_method(damaged(), "cpu"), patchcore[0], drawn[7:])


def test_a_file_that_is_cut_off_or_missing_or_no_method_is_refused(fitted, tmp_path):
    method, folder = fitted
    content = (folder / "detector.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 4, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for opens in (type(method).load, load_detector):
            assert "is not a whole safetensors file" in refusal_of(path, opens)
    path.unlink()
    assert "does not exist" in refusal_of(path, type(method).load)
    assert "not a method that effad_core" in refusal_of(folder / Run.CHECKPOINT)


def test_a_detector_of_efficientad_is_no_other_method(narrow, tmp_path):
    path = tmp_path / "detector.safetensors"
    narrow().save(path)
    assert "not a method that effad_core wrote" in refusal_of(path, PatchCore.load)
    assert load_detector(path, "cpu")[0] == "EfficientAD-S"


def test_a_file_of_another_method_is_refused(patchcore):
    path = patchcore[1] / "detector.safetensors"
    assert "holds a PatchCore, not a SimpleNet" in refusal_of(path, SimpleNet.load)


def test_a_method_that_nobody_registered_is_refused(damaged):
    path = damaged(method="HardCore")
    for opens in (load_method, load_detector):
        message = refusal_of(path, opens)
        assert "the method must be one of AST, DSR, " in message and "'HardCore'" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"share": 2}, {"share": "a half"}, {"read": []}, {"read": ["block9"]}, {"read": 5},
        {"network": "alexnet"}, {"network": ["resnet-18"]}, {"image_size": [64, 0]},
        {"image_size": [1e9, 1e9]}, {"depth": 3}, {"pooled": "all"}, {"pooled": -1},
        {"channels": 5}, {"smoothing": -1}, {"smoothing": 20}, {"smoothing": "wide"},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_describe_no_method_are_refused(damaged, changes):
    path = damaged(arguments=damaged.header["arguments"] | changes)
    message = refusal_of(path)
    assert "describe a method" in message or "of another architecture" in message


def test_a_damaged_header_is_refused(damaged):
    assert "precision 'float8' is unknown" in refusal_of(damaged(precision="float8"))
    assert "'card' is missing or no dict" in refusal_of(damaged(card=[]))
    for points in ({"threshold": 3}, {"threshold": {"threshold": "high"}}):
        assert "describe a method" in refusal_of(damaged(operating_points=points))
    for white in ("bright", -1, 0, 1.5, [255]):
        assert "describe a method" in refusal_of(damaged(full_scale=white))


def test_damaged_tensors_are_refused(damaged):
    memory = damaged.tensors["memory"].clone()
    memory[0, 0] = torch.nan
    assert "holds NaN or infinite values in 'memory'" in refusal_of(damaged({"memory": memory}))
    assert "has in addition 'more'" in refusal_of(damaged({"more": torch.zeros(2)}))
    del damaged.tensors["memory"]
    assert "memory" in refusal_of(damaged())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "much", True])
@pytest.mark.parametrize(
    ("name", "argument"),
    [("SimpleNet", "noise"), ("S-T", "learning_rate"), ("GCAD", "learning_rate")],
)
def test_noise_and_learning_rates_are_numbers_above_0(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a number above 0, not "):
        find_method(name)(**{argument: value}, pretrained=False)


def test_profiles_and_arguments_that_do_not_exist(scenario):
    for name in NAMES:
        with pytest.raises(ValueError, match="smoke, quick, laptop, paper, not 'nonsense'"):
            find_method(name).of_profile("nonsense", pretrained=False)
        with pytest.raises(ValueError, match="image_size must be pixels"):
            made(name, image_size=16)
        with pytest.raises(TypeError, match="depth"):
            made(name, depth=3)
    with pytest.raises(ValueError, match="smoke, quick, laptop, paper, not 'nonsense'"):
        made("PatchCore").fit(scenario, "nonsense")


# ---- features of training images, computed once --------------------------------------------


def test_frozen_features_do_not_depend_on_the_memory_for_them(scenario):
    """Each image is computed once if its output is kept, and anew each time if it is not."""
    images, found, calls = ResizedImages(scenario.train, (32, 48)), {}, {}
    size = 2 * (3 * 32 * 48 + 1)  # bytes of an image's output
    for kept in (0, 2, 100):
        calls[kept] = []

        def compute(batch, to=calls[kept]):
            to.append(len(batch))
            return [batch.float() / 7, batch.float().mean(dim=(1, 2, 3))[:, None, None, None]]

        frozen = Frozen(images, compute, torch.device("cpu"), megabytes=kept * size / 2**20)
        found[kept] = [frozen[[2, 0, 2, 1]], frozen[[1, 2]], *frozen]
    assert [len(calls[kept]) for kept in (0, 2, 100)] == [10, 4 - 2 + 2 + 1 + 1, 4]
    for kept in (2, 100):
        for one, other in zip(found[0], found[kept], strict=True):
            for a, b in zip(one, other, strict=True):
                assert a.dtype == torch.float32 and torch.equal(a, b)
    x = pixels(images, [2, 0, 2, 1], torch.device("cpu"))
    assert torch.equal(found[0][0][0], (x.float() / 7).half().float())


# ---- SimpleNet by hand ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def simplenet():
    """A small one whose batch norm has statistics as a training could leave them."""
    method = made("SimpleNet", read=("block2", "block4"), hidden=24, noise=0.3, image_size=(64, 96))
    norm = method.discriminator[1]
    for values, low, high in (
        (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2),
        (norm.weight.data, 0.5, 2), (norm.bias.data, -0.5, 0.5),
    ):  # fmt: skip
        nn.init.uniform_(values, low, high)
    return method.eval()


def discriminated(method, features, statistics=None):
    """The discriminator's output of features (n, C), and the hidden values, in float64."""
    first, norm, _, last = method.discriminator
    weight = first.weight.detach().double().numpy()[:, :, 0, 0]
    hidden = features @ weight.T + first.bias.detach().double().numpy()
    if statistics is None:
        mean, variance = hidden.mean(0), hidden.var(0)  # of the batch, as in training
    else:
        mean, variance = (values.double().numpy() for values in statistics)
    scale, shift = (values.detach().double().numpy() for values in (norm.weight, norm.bias))
    hidden = (hidden - mean) / np.sqrt(variance + 1e-5) * scale + shift
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden @ last.weight.detach().double().numpy()[0, :, 0, 0]


def projected(method, features):
    """Of features (N, C, h, w): a row for each cell, in float64."""
    rows = features.double().numpy().transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
    weight = method.projection.weight.detach().double().numpy()[:, :, 0, 0]
    return rows @ weight.T + method.projection.bias.detach().double().numpy()


def test_simplenets_losses_by_hand(simplenet, scenario, monkeypatch):
    images = ResizedImages(scenario.train, simplenet.image_size)
    (phase,) = simplenet.phases(images)
    x = pixels(images, [2, 0], torch.device("cpu"))
    normal = projected(simplenet, simplenet.features(x).half().float())
    noise = torch.randn(2, 152, 8, 12, generator=torch.manual_seed(3))
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    norm = simplenet.discriminator[1]
    kept = {name: value.clone() for name, value in norm.state_dict().items()}
    simplenet.train()
    try:
        terms = phase.loss([2, 0], np.random.default_rng(0))
    finally:
        simplenet.eval()
        norm.load_state_dict(kept)
    added = noise.double().numpy().transpose(0, 2, 3, 1).reshape(normal.shape)
    scores = discriminated(simplenet, np.concatenate([normal, normal + 0.3 * added]))
    expected = {
        "normal": np.maximum(0, 0.5 - scores[: len(normal)]).mean(),
        "noisy": np.maximum(0, 0.5 + scores[len(normal) :]).mean(),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert not any(p.requires_grad for p in simplenet.features.parameters())
    settings = [(g["lr"], g["weight_decay"]) for g in phase.optimizer.param_groups]
    assert settings == [(1e-4, 1e-2), (2e-4, 1e-5)]
    optimised = [p for group in phase.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in simplenet.parameters() if p.requires_grad}


def test_simplenets_score_is_the_highest_of_its_cells(simplenet, drawn):
    samples = [Sample(path, 0, "good") for path in drawn[6:]]
    x = pixels(ResizedImages(samples, simplenet.image_size), [0, 1], torch.device("cpu"))
    norm = simplenet.discriminator[1]
    rows = projected(simplenet, simplenet.features(x))
    cells = -discriminated(simplenet, rows, (norm.running_mean, norm.running_var))
    _, scores = simplenet.maps_and_scores(x)
    assert scores[:, 0].tolist() == pytest.approx(cells.reshape(2, -1).max(1).tolist(), rel=1e-4)


def test_simplenets_noise_is_the_authors_for_their_network_alone():
    paper = SimpleNet.of_profile("paper", pretrained=False)
    assert (paper.features.layers.network, paper.noise) == ("wide-resnet-50", 0.015)
    others = {SimpleNet.of_profile(name).noise for name in ("smoke", "quick", "laptop")}
    images = torch.stack([torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)])
    spread = SimpleNet().features(images).std().item()
    assert len(others) == 1 and 0.25 < others.pop() / spread < 1  # not lost in the features


def test_simplenet_learns_that_noisy_features_score_higher(scenario, monkeypatch):
    method = made("SimpleNet", hidden=32, noise=0.5).train()
    images = ResizedImages(scenario.train, (32, 32))
    (phase,) = method.phases(images)
    for group in phase.optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(40):
        phase.optimizer.zero_grad()
        sum(phase.loss([0, 1, 2, 3], None).values()).backward()
        phase.optimizer.step()
    x = pixels(ResizedImages(scenario.validation, (32, 32)), [0, 1], torch.device("cpu"))
    with torch.inference_mode():
        normal = method.projection(method.features(x))
        noise = 0.5 * torch.randn(normal.shape, generator=torch.manual_seed(0))
        method.eval()
        scores = []
        for added in (0, noise):
            monkeypatch.setattr(method.projection, "forward", lambda _, added=added: normal + added)
            scores.append(method.maps_and_scores(x)[0].mean().item())
    assert scores[1] > scores[0] + 0.2


# ---- layers and features of patches --------------------------------------------------------


def random_images(height, width, count=2):
    size = (count, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.manual_seed(0))


@pytest.mark.parametrize(
    "name, nodes",
    [
        ("resnet-18", ["layer1", "layer2", "layer3", "layer4"]),
        ("densenet-201", ["features.denseblock2", "features.denseblock3"]),
        ("efficientnet-b5", ["features.6"]),
    ],
)
def test_layers_are_those_of_torchvisions_networks(name, nodes, monkeypatch):
    """What the whole network gives where it is tapped, of images normalised by hand."""
    torch.manual_seed(0)
    network = open_network(name, pretrained=False).eval()
    monkeypatch.setattr(layers_module, "open_network", lambda *_: network)
    layers, expected = Layers(name, list(LAYERS[name]), pretrained=False), []
    x = random_images(64, 96, 1)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        found = layers.train()(x)
        for node in nodes:
            part = network.get_submodule(node)
            part.register_forward_hook(lambda *given: expected.append(given[2].clone()))
        network((x / 255 - mean) / std)
    assert [layer.shape[1] for layer in found] == list(LAYERS[name].values()) == layers.channels
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_layers_of_efficientnet_lite0_are_its_blocks():
    names = list(LAYERS[LITE0])
    torch.manual_seed(0)
    layers = Layers(LITE0, names, pretrained=False)
    torch.manual_seed(0)
    network = open_network(LITE0, pretrained=False).eval()
    x = random_images(64, 96)
    with torch.no_grad():
        values, found = network.bn1(network.conv_stem((x.float() - 127) / 128)), layers(x)
        for number, block in enumerate(network.blocks[:6]):
            values = block(values)
            if number:
                assert (found[number - 1] - values).abs().max() < 1e-5 * values.abs().max()
                assert values.shape[1] == LAYERS[LITE0][f"block{number}"]


@pytest.mark.parametrize("name", ["wide-resnet-50", "wide-resnet-101", "resnext-101"])
def test_large_networks_have_the_layers_that_are_listed(name):
    """Without numbers: on torch's device "meta"."""
    with torch.device("meta"):
        layers = Layers(name, list(LAYERS[name])[1:], pretrained=False)
        found = layers(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert [tuple(layer.shape) for layer in found] == [(1, 512, 8, 12), (1, 1024, 4, 6)]


def test_a_network_is_cut_off_behind_the_deepest_layer_that_is_read():
    layers = Layers("resnet-18", ["layer1", "layer2"], pretrained=False)
    assert list(layers.parts) == ["layer1", "layer2"]
    assert not any(p.requires_grad for p in layers.parameters())


def test_layers_that_do_not_exist():
    with pytest.raises(ValueError, match="the network must be one of efficientnet-lite0, .*'vgg'"):
        Layers("vgg", ["layer1"], pretrained=False)
    with pytest.raises(ValueError, match="resnet-18 has the layers layer1, .* not layer5"):
        Layers("resnet-18", ["layer1", "layer5"], pretrained=False)
    with pytest.raises(ValueError, match="at least one layer of resnet-18"):
        Layers("resnet-18", [], pretrained=False)
    for pooled, channels in ((0, None), (5, 0), (2.5, None), (None, 7)):
        with pytest.raises(ValueError, match=r"1 or more, not|needs pooled"):
            PatchFeatures(LITE0, ["block2"], pooled, channels, pretrained=False)


def patchcores_steps(layers, pooled, channels):
    """In their own order: unfold, resize, pool each layer, pool all."""
    height, width = layers[0].shape[2:]
    of_layers = []
    for x in layers:
        n, c, h, w = x.shape
        patches = F.unfold(x, kernel_size=3, padding=1).view(n, c * 9, h, w)
        patches = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
        cells = patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9)
        of_layers.append(F.adaptive_avg_pool1d(cells, pooled))
    cells = F.adaptive_avg_pool1d(torch.cat(of_layers, 2), channels)
    return cells.view(n, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(64, 96), (70, 99)])
@pytest.mark.parametrize("pooled, channels", [(1024, 1024), (1024, 384), (50, None), (33, 7)])
def test_pooled_features_are_those_of_literal_patchcore(size, pooled, channels):
    torch.manual_seed(0)
    features = PatchFeatures(LITE0, ("block2", "block4"), pooled, channels, pretrained=False)
    x = random_images(*size)
    with torch.no_grad():
        expected = patchcores_steps(features.layers(x), pooled, channels or pooled)
        found = features(x)
    assert found.shape == expected.shape and features.channels == expected.shape[1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_features_without_pooling_are_means_of_the_cells_inside():
    torch.manual_seed(0)
    features = PatchFeatures(LITE0, ("block2", "block4"), pretrained=False)
    x = random_images(64, 96)
    with torch.no_grad():
        fine, coarse = features.layers(x)
        found = features(x)
    means = []
    for layer in (fine, coarse):
        n, c, h, w = layer.shape
        sums = F.unfold(layer, 3, padding=1).view(n, c, 9, h, w).sum(2)
        inside = F.unfold(torch.ones(1, 1, h, w), 3, padding=1).view(1, 1, 9, h, w).sum(2)
        means.append(sums / inside)
    means[1] = F.interpolate(means[1], size=fine.shape[2:], mode="bilinear")
    expected = torch.cat(means, dim=1)
    assert found.shape == (2, 152, 8, 12) and features.channels == 152
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "patchcore"])
def test_features_are_psis(pooling):
    """Psi folds batch norms, pools by convolutions, and resizes to a finer grid."""
    psi = FeatureExtractor(LITE0, replace(open_backbone(LITE0), pooling=pooling))
    pooled = {"mean": (None, None), "patchcore": (1024, 384)}[pooling]
    features = PatchFeatures(LITE0, ("block3", "block4"), *pooled)
    x = random_images(96, 128)
    with torch.no_grad():
        found, expected = features(x), psi(x)
    if pooling == "mean":  # Psi's at stride 8
        found = F.interpolate(found, size=(12, 16), mode="bilinear")
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
