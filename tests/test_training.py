"""Algorithm 1 against a plain float32 implementation; what is read; resuming; bad input."""

import csv
import functools
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

from effad_core import EfficientAD, RunError, Schedule, train, training
from effad_core.acceleration import precision
from effad_core.datasets import (
    PretrainingImages,
    ResizedImages,
    Sample,
    Scenario,
    draw_augmentation,
    normalise,
    open_scenario,
    to_tensor,
)
from effad_core.errors import DataError
from effad_core.networks import Autoencoder
from effad_core.schedule import PROFILES
from effad_core.storage.runs import Run
from effad_core.storage.weights import read_tensors, write_tensors
from effad_core.training import loss_terms

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

TWO = Schedule.paper(iterations=2)
SEED = 7


def pixels(image):
    """Line by line the input of the networks: 256x256, ImageNet's mean and deviation."""
    x = np.asarray(image.convert("RGB").resize((256, 256), Image.BILINEAR), np.float32) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(x).permute(2, 0, 1)[None]  # a channels-last view


def algorithm_1(teacher, scenario, pretraining, iterations):
    """The paper's loop: one pass per image, whole networks, a sorted quantile."""
    train_images = [Image.open(s.path) for s in scenario.train]
    with torch.no_grad():
        y = torch.cat([teacher(pixels(image)) for image in train_images]).double()
    mu = y.mean((0, 2, 3)).float()[:, None, None]
    sigma = y.std((0, 2, 3), correction=0).float()[:, None, None]
    torch.manual_seed(SEED)
    c = teacher.out_channels
    s, a = type(teacher)(out_channels=2 * c), Autoencoder(c)
    s.train(), a.train().to(memory_format=torch.channels_last)  # dropout falls in memory order
    adam = torch.optim.Adam([*s.parameters(), *a.parameters()], lr=1e-4, weight_decay=1e-5)
    losses = []
    for step in range(iterations):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(int(rng.integers(2**63)))
        image = train_images[int(rng.integers(4))].resize((256, 256), Image.BILINEAR)
        i_aug, strength = draw_augmentation(rng)
        p = pretraining.whole_images(rng, 1, 256)[0].permute(1, 2, 0).numpy()
        adjust = {1: TF.adjust_brightness, 2: TF.adjust_contrast, 3: TF.adjust_saturation}[i_aug]
        augmented = adjust(image, strength)

        with torch.no_grad():
            y = (teacher(pixels(image)) - mu) / sigma
        d_st = (y - s(pixels(image))[:, :c]) ** 2
        ordered = d_st.detach().flatten().sort().values
        rank = 0.999 * (len(ordered) - 1)
        d_hard = torch.lerp(ordered[int(rank)], ordered[int(rank) + 1], rank % 1)
        l_hard = d_st[d_st >= d_hard].mean()
        penalty = (s(pixels(Image.fromarray(p)))[:, :c] ** 2).mean()
        y_a = a(pixels(augmented))
        with torch.no_grad():
            y = (teacher(pixels(augmented)) - mu) / sigma
        l_ae = ((y - y_a) ** 2).mean()
        l_stae = ((y_a - s(pixels(augmented))[:, c:]) ** 2).mean()
        adam.zero_grad()
        (l_hard + penalty + l_ae + l_stae).backward()
        if step == 0:
            gradients = [q.grad.clone() for q in (*s.parameters(), *a.parameters())]
        adam.step()
        losses.append([loss.item() for loss in (l_hard, penalty, l_ae, l_stae)])
    return mu, sigma, s, a, gradients, losses


class RecordingAdam(torch.optim.Adam):
    """Keeps its settings and the gradients of its first step in `record`, a list."""

    record = None

    def step(self, closure=None):
        if not self.record:
            groups = self.param_groups
            self.record += [p.grad.clone() for group in groups for p in group["params"]]
            self.record += [(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in groups]
        return super().step(closure)


@pytest.fixture(scope="module")
def trained(scenario, pretraining, tmp_path_factory):
    """A detector of the real size after two iterations, its run's folder, and Adam's record."""
    torch.manual_seed(0)
    folder, ad = tmp_path_factory.mktemp("run"), EfficientAD()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordingAdam, "record", record := [])
        patch.setattr(torch.optim, "Adam", RecordingAdam)
        train(ad, scenario, TWO, pretraining, folder, seed=SEED, log_every=1)
    return ad, folder, record


@pytest.fixture(scope="module")
def reference(trained, scenario, pretraining):
    return algorithm_1(trained[0].teacher, scenario, pretraining, 2)


def assert_algorithm_1(ad, folder, record, reference):
    """That a detector after two iterations, its log and Adam's record are the reference's."""
    mu, sigma, s, a, gradients, losses = reference
    torch.testing.assert_close(ad.mu, mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ad.sigma, sigma, rtol=1e-5, atol=0)
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [[float(row[name]) for name in training.TERMS] for row in rows]
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    np.testing.assert_allclose([float(row["L"]) for row in rows], np.sum(losses, 1), rtol=1e-4)
    *found, student_settings, autoencoder_settings = record
    assert student_settings == autoencoder_settings == (1e-4, 1e-5, (0.9, 0.999), 1e-8)
    for index, (gradient, expected) in enumerate(zip(found, gradients, strict=True)):
        assert (gradient - expected).norm() <= 1e-3 * expected.norm() > 0, index
    # where a gradient is nearly 0 its sign, and so Adam's step of 1e-4, is up to rounding
    for ours, plain in ((ad.student, s), (ad.autoencoder, a)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().max() < 4.1e-4 and (p - q).norm() <= 2e-3 * q.norm()


def test_two_iterations_are_algorithm_1(trained, reference):
    assert_algorithm_1(*trained, reference)


def test_two_iterations_of_narrow_networks_are_algorithm_1(
    narrow, scenario, pretraining, tmp_path, monkeypatch
):
    monkeypatch.setattr(RecordingAdam, "record", record := [])
    monkeypatch.setattr(torch.optim, "Adam", RecordingAdam)
    train(ad := narrow(), scenario, TWO, pretraining, tmp_path, seed=SEED, log_every=1)
    monkeypatch.undo()
    reference = algorithm_1(ad.teacher, scenario, pretraining, 2)
    assert_algorithm_1(ad, tmp_path, record, reference)
    assert_quantiles(ad, scenario)


def assert_quantiles(ad, scenario):
    """That a detector's quantiles are numpy's over its maps of the validation images."""
    maps = {"st": [], "ae": []}
    for sample in scenario.validation:
        x = pixels(Image.open(sample.path))
        with torch.no_grad():
            t, s, a = (ad.teacher(x) - ad.mu) / ad.sigma, ad.student(x), ad.autoencoder(x)
        c = t.shape[1]
        both = ("st", t - s[:, :c]), ("ae", a - s[:, c:])
        for (name, d), means in zip(both, ad.cell_means, strict=True):
            m = (d**2).mean(1, keepdim=True) / means
            m = F.interpolate(m, (224, 224), mode="bilinear")
            maps[name].append(np.pad(m[0, 0].double().numpy(), 16, mode="edge"))
    expected = [np.quantile(maps[name], q) for name in ("st", "ae") for q in (0.9, 0.995)]
    np.testing.assert_allclose(ad.quantiles, expected, rtol=1e-4)


def test_quantiles_are_numpys_over_the_validation_maps(trained, scenario):
    assert (trained[0].cell_means == 1).all()  # as in the paper
    assert_quantiles(trained[0], scenario)


@pytest.mark.parametrize(
    "most, taken", [(128, [0, 1, 2, 3]), (3, [0, 2, 3]), (2, [0, 3]), (1, [0])]
)
def test_cells_are_divided_by_their_means_over_training_images(
    narrow, scenario, pretraining, monkeypatch, most, taken
):
    """Of all training images, or evenly of at most so many; before the quantiles are found."""
    monkeypatch.setattr(training, "CELL_IMAGES", most)
    ad, plain = narrow(), narrow()
    for detector in (ad, plain):
        detector.cell_means.fill_(3)  # of a training before
    train(plain, scenario, TWO, pretraining, seed=SEED)
    train(ad, scenario, replace(TWO, divide_cells=True), pretraining, seed=SEED)
    x = torch.cat(
        [pixels(Image.open(sample.path)) for sample in [scenario.train[i] for i in taken]]
    )
    with torch.no_grad():
        t, s, a = (
            (plain.teacher(x) - plain.mu) / plain.sigma,
            plain.student(x),
            plain.autoencoder(x),
        )
    maps = [((t - s[:, :8]) ** 2).mean(1), ((a - s[:, 8:]) ** 2).mean(1)]
    cells = np.stack(maps).mean(1, dtype=np.float64)
    expected = (cells / cells.mean((1, 2), keepdims=True) + 0.3) / 1.3
    np.testing.assert_allclose(ad.cell_means, expected, rtol=1e-3)
    assert np.ptp(ad.cell_means.numpy(), (1, 2)).min() > 0.1
    assert_quantiles(ad, scenario)
    assert (plain.cell_means == 1).all()


def test_the_saved_detector_is_the_trained_one(trained, drawn):
    ad, folder, _ = trained
    loaded = EfficientAD.load(folder / "detector.safetensors")
    assert loaded.predict(drawn[7]).score == ad.predict(drawn[7]).score
    assert loaded.card["training"]["schedule"]["iterations"] == 2
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "checkpoint.safetensors", "config.json", "detector.safetensors", "log.csv"
    ]  # fmt: skip


def test_each_term_reaches_only_its_half_of_the_student(narrow):
    ad = narrow().train()
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    terms = loss_terms(ad, TWO, *images)
    assert tuple(terms) == training.TERMS
    last = ad.student[-1].weight
    for name, half in (("L_hard", 0), ("penalty", 0), ("L_STAE", 1)):
        (gradient,) = torch.autograd.grad(terms[name], last, retain_graph=True)
        sizes = gradient.abs().flatten(1).sum(1).unflatten(0, (2, 8))
        assert (sizes[half] > 0).any() and (sizes[1 - half] == 0).all(), name
    without = loss_terms(ad, TWO, images[0], images[1], None)
    assert tuple(without) == ("L_hard", "L_AE", "L_STAE")
    torch.testing.assert_close(without["L_hard"], terms["L_hard"])


def test_only_training_and_validation_images_are_read(
    narrow, scenario, pretraining, monkeypatch, drawn
):
    read, load = [], Sample.load
    monkeypatch.setattr(Sample, "load", lambda sample: read.append(sample.path) or load(sample))
    ad = narrow()
    assert not scenario.test[0].path.exists()
    train(ad, scenario, TWO, pretraining)
    assert set(read) == set(drawn[:6])


@pytest.fixture
def always_saving(monkeypatch):
    monkeypatch.setattr(training, "Run", functools.partial(Run, save_seconds=0))


def interrupt_after(monkeypatch, steps):
    """The loss of step `steps` + 1 is where the user presses Ctrl-C."""
    calls, loss = iter(range(steps)), training.mean_squared_difference

    def pressed(prediction, target):
        if prediction.requires_grad and target.requires_grad and next(calls, None) is None:
            raise KeyboardInterrupt  # in L_STAE, once an iteration
        return loss(prediction, target)

    monkeypatch.setattr(training, "mean_squared_difference", pressed)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(
    narrow, scenario, pretraining, tmp_path, always_saving, warm_up
):
    schedule = Schedule.paper(
        iterations=3,
        autoencoder_iterations=warm_up,
        autoencoder_batch=2,
        cosine=bool(warm_up),
        cache_megabytes=warm_up,
    )
    whole = narrow()
    row = train(whole, scenario, schedule, pretraining, seed=SEED, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(narrow(), scenario, schedule, pretraining, tmp_path, seed=SEED, log_every=1)
    assert not (tmp_path / "detector.safetensors").exists()
    _, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 2 + warm_up
    resumed = narrow()
    again = train(resumed, scenario, schedule, pretraining, tmp_path, seed=SEED, log_every=1)
    assert again.keys() == row.keys()
    np.testing.assert_array_equal(list(again.values()), list(row.values()))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"][: 3 + warm_up]

    with pytest.MonkeyPatch.context() as patch:  # a third call has nothing left to do
        interrupt_after(patch, 0)
        finished = narrow()
        third = train(finished, scenario, schedule, pretraining, tmp_path, seed=SEED, log_every=1)
    np.testing.assert_array_equal(list(third.values()), list(row.values()))
    assert not any(module.training for module in finished.modules())  # no dropout in its scores
    for name, value in whole.state_dict().items():
        assert torch.equal(finished.state_dict()[name], value), name
    with pytest.raises(RunError, match="other settings"):
        train(narrow(), scenario, schedule, pretraining, tmp_path, seed=SEED + 1)
    with pytest.raises(RunError, match="teacher_weights"):
        train(narrow(seed=1), scenario, schedule, pretraining, tmp_path, seed=SEED)
    others = replace(scenario, train=scenario.train[::-1])
    with pytest.raises(RunError, match="the same images in another order"):
        train(narrow(), others, schedule, pretraining, tmp_path, seed=SEED)


@pytest.fixture
def own(tmp_path, drawn):
    """A folder of five images of one's own, and where its run is."""
    folder = scenario_of(tmp_path / "line A" / "part", [Image.open(path) for path in drawn[:5]])
    return folder, tmp_path / "run"


def files_of(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("finished", [False, True])
def test_other_images_under_the_same_names_are_refused(
    narrow, own, pretraining, drawn, always_saving, finished
):
    folder, run = own
    with pytest.MonkeyPatch.context() as patch:
        if not finished:
            interrupt_after(patch, 1)
        with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
            train(narrow(), open_scenario(folder), TWO, pretraining, run)
    before = files_of(run)
    other = folder.parents[1] / "line B" / "part"
    shutil.copytree(folder, other)
    for name in (1, 3):
        shutil.copy(drawn[5], other / "train" / "good" / f"{name}.png")
    for message in ("2 of 5 training and validation images have other content, the first is 1.png",
                    "choose another run_dir"):  # fmt: skip
        with pytest.raises(RunError, match=message):
            train(narrow(), open_scenario(other), TWO, pretraining, run)
    assert files_of(run) == before
    train(narrow(), open_scenario(folder), TWO, pretraining, run)  # its own images are welcome
    assert files_of(run).keys() - {".lock"} == {  # an older filelock removes it
        "checkpoint.safetensors", "config.json", "detector.safetensors", "log.csv"
    }  # fmt: skip
    (folder / "train" / "good" / "5.png").write_bytes(drawn[5].read_bytes())
    with pytest.raises(RunError, match="1 image was added, the first is 5.png"):
        train(narrow(), open_scenario(folder), TWO, pretraining, run)


def test_the_same_images_elsewhere_are_the_same_run(narrow, own, pretraining):
    folder, run = own
    first = narrow()
    row = train(first, open_scenario(folder), TWO, pretraining, run)
    moved = folder.parents[1] / "moved" / "part"
    shutil.copytree(folder, moved, copy_function=shutil.copyfile)
    again = narrow(seed=0)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 0)  # nothing is left to do
        found = train(again, open_scenario(moved), TWO, pretraining, run)
    np.testing.assert_array_equal(list(found.values()), list(row.values()))
    assert again.card["training"]["digests"].keys() == {"training", "validation", "pretraining"}


def test_other_pretraining_images_under_the_same_names_are_refused(narrow, own, pretraining, drawn):
    folder, run = own
    train(narrow(), open_scenario(folder), TWO, pretraining, run)
    other = PretrainingImages(drawn[5:7], pretraining.source, pretraining.licence)
    assert other.describe() == pretraining.describe()
    with pytest.raises(RunError, match=r"other images \(the pretraining images are others\);"):
        train(narrow(), open_scenario(folder), TWO, other, run)


def test_a_run_of_before_contents_were_written_down(narrow, own, pretraining, monkeypatch):
    folder, run = own
    with pytest.MonkeyPatch.context() as patch:
        run_of = functools.partial(Run, images=None)

        def older(folder, config, *rest, images, **options):
            return run_of(folder, {k: v for k, v in config.items() if k != "digests"}, *rest)

        patch.setattr(training, "Run", older)
        train(narrow(), open_scenario(folder), TWO, pretraining, run)
    with pytest.raises(RunError, match="run of an older version, which did not write down the con"):
        train(narrow(), open_scenario(folder), TWO, pretraining, run)


def test_a_run_whose_list_of_images_is_damaged_is_refused_all_the_same(narrow, own, pretraining):
    folder, run = own
    train(narrow(), open_scenario(folder), TWO, pretraining, run)
    path = run / Run.CHECKPOINT
    tensors, header = read_tensors(path, "checkpoint")
    (folder / "train" / "good" / "2.png").write_bytes(pretraining.paths[0].read_bytes())
    for damage in (b"", b"[" * 99_999, b"3", b'{"training": 3}', b'{"training": [["a", "b"]]}'):
        tensors[Run.IMAGES] = torch.tensor(list(damage), dtype=torch.uint8)
        write_tensors(path, tensors, header)
        with pytest.raises(RunError, match=r"\(the training images are others\); choose"):
            train(narrow(), open_scenario(folder), TWO, pretraining, run)


def test_images_drawn_ahead_give_the_same_bits(narrow, scenario, pretraining, tmp_path):
    """Threads draw the next steps' images meanwhile; each step's chance is its own."""
    schedule = Schedule.smoke(iterations=9, precision="float32")
    found = []
    for workers in (0, 1, 3):
        detector = narrow()
        train(detector, scenario, schedule, pretraining, seed=SEED, workers=workers)
        found.append(detector.state_dict())
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_an_image_that_cannot_be_drawn_ahead_stops_the_training(narrow, scenario, pretraining):
    def fails(step):
        if step == 4:
            raise DataError("x.png cannot be read")
        return step

    steps = []
    with pytest.raises(DataError, match=r"x.png cannot be read"):
        for step in training.ahead(fails, range(50), workers=3):
            steps.append(step)
    assert steps == [0, 1, 2, 3]
    assert list(training.ahead(str, range(11), 2)) == [str(step) for step in range(11)]


def test_what_was_measured_is_in_the_runs_config(narrow, scenario, pretraining, tmp_path):
    """A resumed run need not measure the same again."""
    train(narrow(), scenario, Schedule.smoke(), pretraining, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arithmetic"].startswith(config["schedule"]["precision"])
    assert "times as fast as float32 in training (timed: float32 " in config["arithmetic"]
    assert config["device"] == "cpu"


def test_a_machine_that_is_timed_otherwise_later(
    narrow, scenario, pretraining, tmp_path, monkeypatch
):
    """ "auto" would be another arithmetic now; a run that goes on keeps its own."""
    schedule = Schedule.paper(iterations=1, precision="auto")
    for first, second, expected in ((1, 3, "bfloat16"), (3, 1, "float32-winograd")):
        for seconds in (first, second):  # of bfloat16
            times = {"float32": 4, "float32-winograd": 2, "bfloat16": seconds}
            known = {
                (torch.device("cpu"), "training", "small"): precision.Measurement("training", times)
            }
            monkeypatch.setattr(precision, "_measurements", known)
            detector = narrow()
            train(detector, scenario, schedule, pretraining, tmp_path / expected)
            assert detector.card["training"]["schedule"]["precision"] == expected


def test_a_detector_that_lay_there_before_is_not_taken_for_the_runs(
    narrow, scenario, pretraining, tmp_path
):
    """As after a kill between the last checkpoint and the detector."""
    path = tmp_path / "detector.safetensors"
    train(narrow(), scenario, TWO, pretraining, tmp_path, seed=SEED)
    expected = path.read_bytes()
    narrow(seed=5).save(path)
    train(narrow(), scenario, TWO, pretraining, tmp_path, seed=SEED)
    assert path.read_bytes() == expected


def test_warm_up_trains_the_autoencoder_alone(narrow, scenario, pretraining):
    ad = narrow()
    schedule = Schedule.paper(iterations=0, autoencoder_iterations=1, autoencoder_batch=2)
    row = train(ad, scenario, schedule, pretraining, seed=SEED)
    torch.manual_seed(SEED)
    student, autoencoder = narrow.network(out_channels=16), Autoencoder(8)
    assert all(map(torch.equal, ad.student.parameters(), student.parameters()))
    assert not torch.equal(ad.autoencoder.head[2].weight, autoencoder.head[2].weight)
    assert np.isnan(row["L_hard"]) and np.isfinite(row["L_AE"])


def test_a_known_teacher_output_takes_the_place_of_the_computed_one(narrow):
    ad = narrow()
    image, augmented, p = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    known = ad.normalised_teacher(normalise(image[None]))
    terms = loss_terms(ad, TWO, image, augmented, p)
    for name, value in loss_terms(ad, TWO, image, augmented, p, known).items():
        torch.testing.assert_close(value, terms[name], rtol=1e-4, atol=0)
    other = loss_terms(ad, TWO, image, augmented, p, known + 1)
    assert other["L_hard"] > terms["L_hard"] and torch.equal(other["L_AE"], terms["L_AE"])


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_teacher_features_do_not_depend_on_how_many_fit(narrow, scenario, kept, monkeypatch):
    ad = narrow()
    images = ResizedImages(scenario.train, ad.image_size)
    size = 2 * 8 * 56 * 56 / 2**20  # megabytes of one output in half precision
    features = training.TeacherFeatures(ad, images, "float32", kept * size)
    calls, forward = [], ad.teacher.forward
    monkeypatch.setattr(ad.teacher, "forward", lambda x: calls.append(1) or forward(x))
    order = [0, 1, 2, 3, 0, 1, 2, 3]
    found = [features[index] for index in order]
    assert len(calls) == 4 + (4 - kept)
    for index, output in zip(order, found, strict=True):
        exact = ad.normalised_teacher(normalise(to_tensor(images[index])[None]))
        assert output.dtype == torch.float32 and output.shape == (1, 8, 56, 56)
        torch.testing.assert_close(output, exact, rtol=2**-11, atol=1e-6)
        assert torch.equal(output, found[index])


def test_without_penalty_the_log_and_config_say_so(narrow, scenario, tmp_path):
    ad = narrow()
    row = train(ad, scenario, Schedule.paper(iterations=1, penalty=False), run_dir=tmp_path)
    assert np.isnan(row["penalty"]) and np.isfinite(row["L"])
    assert "no penalty" in (tmp_path / "config.json").read_text()


def test_bfloat16_is_near_float32(narrow, scenario, pretraining):
    rows = [
        train(narrow(), scenario, Schedule.paper(iterations=1, precision=precision), pretraining)
        for precision in ("float32", "bfloat16")
    ]
    for name in training.TERMS:
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.05), name


def test_paper_schedule_is_algorithm_1():
    paper = Schedule.paper()
    assert (paper.iterations, paper.learning_rate, paper.weight_decay) == (70_000, 1e-4, 1e-5)
    assert (paper.hard_quantile, paper.penalty, paper.precision) == (0.999, True, "float32")
    assert paper.autoencoder_iterations == paper.cache_megabytes == 0 and not paper.cosine
    assert not paper.divide_cells
    # lines 42-44: the iteration 66,501 (step 66,500) still updates with 1e-4, then the rate decays
    assert [paper.learning_rates_at(step) for step in (0, 66_500)] == [(1e-4, 1e-4)] * 2
    for step in (66_501, 69_999):
        assert paper.learning_rates_at(step) == pytest.approx((1e-5, 1e-5))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles(name):
    schedule = Schedule.named(name, penalty=False)
    assert not schedule.penalty
    total = schedule.autoencoder_iterations + schedule.iterations
    for step in range(0, total, max(1, total // 997)):
        student, autoencoder = schedule.learning_rates_at(step)
        warm_up = step < schedule.autoencoder_iterations
        assert (student == 0) == warm_up and 0 < autoencoder <= schedule.learning_rate
        assert student <= schedule.learning_rate
    with pytest.raises(ValueError, match="smoke, quick, laptop, paper, not 'fast'"):
        Schedule.named("fast")


def test_the_learning_rate_rises_over_an_eighth_of_the_steps_and_at_most_50():
    short = Schedule(iterations=80, learning_rate=1.0, cosine=True)  # rises over 10 steps
    falls = [(1 + np.cos(np.pi * step / 80)) / 2 for step in range(80)]
    expected = [min(1, (step + 1) / 10) * (0.01 + 0.99 * fall) for step, fall in enumerate(falls)]
    assert [short.learning_rates_at(step)[0] for step in range(80)] == pytest.approx(expected)
    long = Schedule(iterations=800, learning_rate=1.0, cosine=True)
    assert long.learning_rates_at(24)[0] == pytest.approx(0.5, rel=0.01)
    assert long.learning_rates_at(49)[0] > 0.99 > 0.02 > long.learning_rates_at(799)[0] > 0.01
    after = replace(short, autoencoder_iterations=8)
    assert after.learning_rates_at(0) == (0.0, 1.0)  # an eighth of 8 steps: at once
    assert after.learning_rates_at(8) == pytest.approx((0.1, 0.01))


def scenario_of(folder, images):
    (folder / "train" / "good").mkdir(parents=True)
    for index, image in enumerate(images):
        image.save(folder / "train" / "good" / f"{index}.png")
    return folder


def test_one_training_image(tmp_path, drawn):
    folder = scenario_of(tmp_path / "one", [Image.open(drawn[0])])
    with pytest.raises(DataError, match="1 training image.* at least 2 images are needed"):
        open_scenario(folder)


def test_two_training_images_are_enough(narrow, tmp_path, drawn, pretraining):
    scenario = open_scenario(scenario_of(tmp_path / "two", map(Image.open, drawn[:2])))
    ad = narrow()
    train(ad, scenario, Schedule.paper(iterations=1), pretraining)
    assert np.isfinite(ad.predict(drawn[2]).score)


def test_constant_images(narrow, tmp_path, pretraining):
    images = [Image.new("RGB", (260, 256), (90, 120, 30))] * 3
    scenario = open_scenario(scenario_of(tmp_path / "flat", images))
    with pytest.raises(ValueError, match="each validation image of flat is of one colour"):
        train(narrow(), scenario, TWO, pretraining)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(scenario.validation[0].path)
    with pytest.raises(ValueError, match=r"8 of 8 channels never vary .* not all one colour"):
        train(narrow(), scenario, TWO, pretraining)


def test_constant_validation_images_are_refused_before_the_first_step(
    narrow, scenario, tmp_path, pretraining
):
    flat = [Sample(tmp_path / f"{n}.png", 0, "good") for n in range(2)]
    for sample, colour in zip(flat, ("black", "white"), strict=True):
        Image.new("RGB", (260, 256), colour).save(sample.path)
    with pytest.raises(ValueError, match=r"each validation image of drawn .* such as .*0.png: "):
        train(narrow(), replace(scenario, validation=tuple(flat)), TWO, pretraining, tmp_path / "r")
    assert not (tmp_path / "r" / "log.csv").exists()
    one_is_enough = replace(scenario, validation=(flat[0], *scenario.validation))
    train(narrow(), one_is_enough, TWO, pretraining)


def test_images_and_folder_are_looked_at_before_anything_is_computed(
    narrow, scenario, tmp_path, pretraining, monkeypatch
):
    monkeypatch.setattr(training, "settled_precision", None)  # it may time for seconds
    broken = tmp_path / "broken.png"
    broken.write_bytes(scenario.train[0].path.read_bytes()[:-20])
    bad = replace(scenario, train=(*scenario.train, Sample(broken, 0, "good")))
    with pytest.raises(DataError, match="broken.png cannot be read"):
        train(narrow(), bad, TWO, pretraining, tmp_path / "run")
    with pytest.raises(RunError, match="broken.png/run cannot be written: .* another run_dir"):
        train(narrow(), scenario, TWO, pretraining, broken / "run")


def test_corrupt_training_image_is_named(narrow, scenario, tmp_path, pretraining, drawn):
    broken = tmp_path / "broken.png"
    broken.write_bytes(drawn[0].read_bytes()[:5000])
    bad = Scenario(
        "bad", (*scenario.train, Sample(broken, 0, "good")), scenario.validation, (), "", ""
    )
    with pytest.raises(DataError, match="broken.png cannot be read"):
        train(narrow(), bad, TWO, pretraining)


def test_validation_images_are_checked_before_training(narrow, scenario, tmp_path, pretraining):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = replace(scenario, validation=(Sample(broken, 0, "good"),))
    with pytest.raises(DataError, match="broken.png cannot be read"):
        train(narrow(), bad, TWO, pretraining, tmp_path / "run")
    with pytest.raises(ValueError, match="the scenario drawn has no validation images"):
        train(narrow(), replace(scenario, validation=()), TWO, pretraining, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(
    narrow, scenario, pretraining, tmp_path, always_saving
):
    schedule = Schedule.paper(iterations=5, learning_rate=1e18)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 2; lower the learning"):
        train(narrow(), scenario, schedule, pretraining, tmp_path)
    tensors, header = read_tensors(tmp_path / "checkpoint.safetensors", "checkpoint")
    assert header["iteration"] == 1
    assert all(torch.isfinite(value).all() for value in tensors.values())
