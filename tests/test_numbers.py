"""NaN, infinite and meaningless numbers: refused where they arise, never a silent score."""

import json

from effad_core import EfficientAD, RunError, Sample, Schedule, evaluate, metrics, thresholds, train
from effad_core.deployment.onnx import export
from effad_core.deployment.prepared import prepare
from effad_core.evaluation.scores import Evaluation
from effad_core.explorer.choices import Choices
from effad_core.prediction import Predictor
from effad_core.statistics import ChannelMoments, channel_statistics, never_varies
from effad_core.storage.weights import read_tensors, write_tensors

import numpy as np
import pytest
import torch

HARM = [np.nan, np.inf, -np.inf]


def pixels(count=1):
    generator = np.random.default_rng(count)
    return torch.from_numpy(generator.integers(0, 256, (count, 3, 256, 256), np.uint8))


# --- the file of a detector -----------------------------------------------------------------------


@pytest.fixture
def saved(narrow, tmp_path):
    """A function that saves a detector with one number changed."""
    ad = narrow()
    path = tmp_path / "detector.safetensors"
    ad.save(path)
    tensors, header = read_tensors(path, "detector")

    def save(name, value, index=0):
        changed = tensors[name].clone()
        changed.view(-1)[index] = value
        write_tensors(path, tensors | {name: changed}, header)
        return path

    return save


PARTS = ["teacher.0.weight", "student.8.bias", "autoencoder.decoder.5.0.weight", "mu", "sigma"]


@pytest.mark.parametrize("name", PARTS)
def test_no_detector_with_nan_is_loaded(saved, name):
    for value in HARM:
        with pytest.raises(RunError, match=f"detector.safetensors holds NaN or .* in '{name}'"):
            EfficientAD.load(saved(name, value))


@pytest.mark.parametrize("value", [0.0, -0.1, -0.0])
def test_no_deviation_of_zero_is_loaded(saved, value):
    with pytest.raises(RunError, match=r"detector.safetensors has a standard deviation \(sigma\)"):
        EfficientAD.load(saved("sigma", value, index=5))


@pytest.mark.parametrize(
    ("index", "value"), [(0, np.nan), (3, np.inf), (1, -np.inf), (0, 0.4), (2, 0.06), (3, 0.01)]
)
def test_no_quantiles_without_an_order_are_loaded(saved, index, value):
    """The fixture's are 0.1, 0.4 and 0.01, 0.05."""
    with pytest.raises(RunError, match="detector.safetensors has damaged quantiles"):
        EfficientAD.load(saved("quantiles", value, index))


def test_quantiles_that_have_not_been_found_are_loaded(narrow, tmp_path):
    ad = narrow()
    ad.quantiles.fill_(torch.nan)
    ad.save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no quantiles yet"):
        EfficientAD.load(tmp_path / "x.safetensors").predict(np.zeros((9, 9, 3), np.uint8))


# --- maps and scores ------------------------------------------------------------------------------


class Stub(Predictor):
    """Maps of zeros, but for one pixel of one image's map."""

    image_size, threshold, pixel_threshold = (256, 256), None, None

    def __init__(self, bad, value, channel):
        self.bad, self.value, self.channel, self.seen = bad, value, channel, 0

    def use_device(self, device=None):
        pass

    def combined_maps(self, images):
        maps = torch.zeros(len(images), 3, 256, 256)
        if 0 <= self.bad - self.seen < len(images):
            maps[self.bad - self.seen, self.channel, 200, 100] = self.value
        self.seen += len(images)
        return maps


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_image_whose_map_is_not_finite_is_named(drawn, value, channel):
    """It is the fourth, the second of its batch."""
    harm = "contains NaN or infinite values: the detector's weights"
    with pytest.raises(ValueError, match=f"the anomaly map of {drawn[3]} {harm}"):
        Stub(3, value, channel).predict(drawn, batch_size=2)
    arrays = np.zeros((5, 9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=f"the anomaly map of image 3 {harm}"):
        Stub(3, value, channel).predict(arrays, batch_size=2)
    samples = [Sample(path, 0, "good") for path in drawn]
    with pytest.raises(ValueError, match=f"the anomaly map of {drawn[3]} {harm}"):
        evaluate(Stub(3, value, channel), samples, batch_size=2)
    assert len(Stub(99, value, channel).predict(drawn, batch_size=2)) == 8


@pytest.mark.parametrize("gray", [0, 1, 128, 255])
def test_constant_images_have_finite_maps(narrow, gray):
    ad = narrow()
    for predictor in (ad, prepare(ad), prepare(ad, precision="bfloat16")):
        prediction = predictor.predict(np.full((50, 60, 3), gray, np.uint8))
        assert np.isfinite(prediction.score) and np.isfinite(prediction.map).all()


def amplified(ad, gain):
    """The same detector but for what passes between its networks' layers, `gain` times as large."""
    for network in (ad.teacher, ad.student):
        first, last = network[0], network[-1]
        first.weight.data.mul_(gain), first.bias.data.mul_(gain)
        for layer in list(network)[1:-1]:
            if hasattr(layer, "bias"):
                layer.bias.data.mul_(gain)
        last.weight.data.div_(gain)
    return ad


@pytest.mark.parametrize("gain", [1, 1e4, 3e5, 1e9])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float32-winograd"])
def test_an_overflow_between_layers_is_no_score(narrow, precision, gain):
    """Activations above 65504 are infinite in float16, and in no other precision."""
    expected = narrow().combined_maps(pixels())
    prepared = amplified(narrow(), gain)
    if precision == "float16" and gain > 3e5:  # so are the weights
        with pytest.raises(ValueError, match='in torch.float16.*use "float32" then'):
            prepare(prepared, precision=precision)
        return
    prepared = prepare(prepared, precision=precision)
    if precision == "float16" and gain > 1e4:
        with pytest.raises(ValueError, match="map of image 0 contains NaN or infinite"):
            prepared.predict(pixels()[0].permute(1, 2, 0).numpy())
        return
    found = prepared.combined_maps(pixels())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("value", HARM)
def test_damaged_weights_are_not_prepared_or_exported(narrow, tmp_path, value):
    for name in ("teacher.6.weight", "student.8.bias", "autoencoder.head.0.weight", "mu"):
        ad = narrow()
        ad.state_dict()[name].view(-1)[0] = value
        with pytest.raises(ValueError, match="contains NaN or infinite values once it is in"):
            prepare(ad, "cpu", "float32")
        with pytest.raises(ValueError, match="contains NaN or infinite values once it is in"):
            export(ad, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


# --- quantiles and statistics ---------------------------------------------------------------------


def with_maps(ad, monkeypatch, *maps):
    """Let `anomaly_maps` return these two in turns."""
    monkeypatch.setattr(type(ad), "anomaly_maps", lambda *_: maps)
    return ad


def test_one_validation_image(narrow):
    ad = narrow()
    maps = ad.anomaly_maps(pixels())
    ad.find_quantiles([pixels()], 1)
    expected = [np.quantile(m.double(), q) for m in maps for q in (0.9, 0.995)]
    np.testing.assert_allclose(ad.quantiles, expected, rtol=1e-6)


@pytest.mark.parametrize(("spread", "fits"), [(0, False), (8e-7, False), (1e-4, True)])
def test_quantiles_that_differ_by_rounding_are_equal(narrow, monkeypatch, spread, fits):
    m = torch.linspace(1, 1 + spread, 256 * 256).view(1, 256, 256)
    ad = with_maps(narrow(), monkeypatch, m, torch.linspace(0, 1, 256 * 256).view(1, 256, 256))
    before = ad.quantiles.clone()
    if not fits:
        with pytest.raises(ValueError, match=r"of the student-teacher map are equal \(1\)"):
            ad.find_quantiles([pixels()], 1)
        assert ad.quantiles.equal(before)
        return
    ad.find_quantiles([pixels()], 1)
    ad.check_quantiles()
    assert ad.normalise_maps(m, m)[0].isfinite().all()


@pytest.mark.parametrize("value", HARM)
def test_no_quantiles_of_nan(narrow, monkeypatch, value):
    m = torch.rand(1, 256, 256)
    bad = m.clone()
    bad[0, 3, 4] = value
    for maps in ((bad, m), (m, bad)):
        with pytest.raises(ValueError, match="NaN or infinite values in an anomaly map"):
            with_maps(narrow(), monkeypatch, *maps).find_quantiles([pixels()], 1)


@pytest.mark.parametrize("value", HARM)
def test_no_channel_statistics_of_nan_or_of_a_dead_channel(value):
    maps = torch.rand(2, 3, 4, 4)
    maps[:, 1] = 7.0
    with pytest.raises(ValueError, match=r"1 of 3 channels never vary .*channel 1"):
        channel_statistics([maps])
    maps[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite values"):
        channel_statistics([maps])
    moments = ChannelMoments()
    moments.add(maps)
    assert never_varies(moments.mean, moments.deviation).tolist() == [False, True, False]


# --- what is made of scores -----------------------------------------------------------------------

SCORES, LABELS = np.linspace(0, 1, 40), np.arange(40) % 2
MAPS = list(np.linspace(0, 1, 80).reshape(4, 5, 4))
MASKS = [None, np.eye(5, 4), None, np.eye(5, 4)]


def of_scores(call):
    return lambda value: call(np.where(np.arange(40) == 17, value, SCORES))


def of_maps(call):
    def with_pixel(value):
        maps = [m.copy() for m in MAPS]
        maps[2][1, 1] = value
        return call(maps)

    return with_pixel


class Looked:
    """An evaluation as the explorer reads it."""

    def __init__(self, scores, maps=None):
        self.scores, self.maps = {"combined": np.asarray(scores)}, maps
        self.labels = np.arange(len(scores)) % 2


USES = {
    "threshold_for_fpr": of_scores(lambda s: thresholds.threshold_for_fpr(s, 0.2)),
    "max_f1": of_scores(lambda s: thresholds.max_f1(LABELS, s)),
    "for_recall": of_scores(lambda s: thresholds.for_recall(LABELS, s, 0.9)),
    "for_cost": of_scores(lambda s: thresholds.for_cost(LABELS, s, 1, 1)),
    "confusion": of_scores(lambda s: thresholds.confusion(LABELS, s, 0.5)),
    "the threshold of confusion": lambda value: thresholds.confusion(LABELS, SCORES, value),
    "roc_curve": of_scores(lambda s: thresholds.roc_curve(LABELS, s)),
    "precision_recall_curve": of_scores(lambda s: thresholds.precision_recall_curve(LABELS, s)),
    "pixel_threshold": of_maps(lambda m: thresholds.pixel_threshold(m, 0.5, 0.5)),
    "pixel_threshold_for_fpr": of_maps(lambda m: thresholds.pixel_threshold_for_fpr(m, 0.1)),
    "operating point": lambda value: thresholds.OperatingPoint(value, "labels-f1", 3),
    "image_auroc": of_scores(lambda s: metrics.image_auroc(LABELS, s)),
    "image_auprc": of_scores(lambda s: metrics.image_auprc(LABELS, s)),
    "aupro": of_maps(lambda m: metrics.aupro(m, MASKS)),
    "pixel_metrics": of_maps(lambda m: metrics.pixel_metrics(m, MASKS)),
    "pro_curve": of_maps(lambda m: metrics.pro_curve(m, MASKS)),
    "defect_metrics": of_maps(lambda m: metrics.defect_metrics(m, [None, [(MASKS[1], 2)]] * 2)),
    "auspro": of_maps(lambda m: metrics.auspro(m, [None, [(MASKS[1], 2)]] * 2)),
    "explorer": of_scores(lambda s: Choices(Looked(s))),
    "explorer's validation": of_scores(lambda s: Choices(Looked(SCORES), s)),
    "explorer's maps": of_maps(lambda m: Choices(Looked([0.1, 0.2, 0.3, 0.4], m))),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_scores_and_maps_must_be_finite(use):
    USES[use](0.5)
    for value in HARM:
        with pytest.raises(ValueError, match=r"finite|must be float"):
            USES[use](value)


def test_labels_of_one_class_have_no_metrics(drawn, tmp_path):
    samples = tuple(Sample(path, 1, "spot") for path in drawn[:2])
    scores = dict.fromkeys(("combined", "student-teacher", "autoencoder"), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="the labels have one class"):
        Evaluation("x", samples, scores).save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ties_keep_the_stated_rate():
    """Every image at the threshold is normal: with all scores equal none is called anomalous."""
    point = thresholds.threshold_for_fpr(np.full(30, 0.5), 0.1, guarantee="average")
    assert thresholds.confusion(np.zeros(30), np.full(30, 0.5), point.threshold).fp == 0
    scores = np.repeat([0.1, 0.2, 0.3], 10)
    for rate in (0.05, 0.2, 0.35, 0.5, 0.9):
        point = thresholds.threshold_for_fpr(scores, rate, guarantee="average")
        assert np.mean(scores > point.threshold) <= rate


# --- training -------------------------------------------------------------------------------------


def test_the_progress_bar_shows_no_nan(narrow, scenario, pretraining, capsys):
    schedule = Schedule(iterations=1, autoencoder_iterations=1, precision="float32")
    train(narrow(), scenario, schedule, pretraining, log_every=1)
    shown = capsys.readouterr().err
    alone, *_, together = [part for part in shown.split("\r") if "L_AE=" in part]
    assert "nan" not in shown and "L_hard" not in alone
    assert all(f"{name}=" in together for name in ("L_hard", "penalty", "L_AE", "L_STAE"))


def test_a_checkpoint_with_nan_is_not_resumed(narrow, scenario, pretraining, tmp_path):
    schedule = Schedule(iterations=1, precision="float32")
    train(narrow(), scenario, schedule, pretraining, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, header = read_tensors(path, "checkpoint")
    tensors["student.0.bias"][0] = torch.nan
    write_tensors(path, tensors, json.loads(json.dumps(header)))
    with pytest.raises(RunError, match="checkpoint.safetensors holds NaN or infinite values in '0"):
        train(narrow(), scenario, schedule, pretraining, tmp_path)
