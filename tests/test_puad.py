"""PUAD, an extension: its score against NumPy, SciPy and the detector's own maps."""

from dataclasses import replace

from effad_core import PUAD, EfficientAD, evaluate
from effad_core.datasets import Sample, Scenario
from effad_core.deployment.inspection import fit_thresholds
from effad_core.errors import RunError
from effad_core.extensions.puad import RIDGE

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import mahalanobis

TRAINING, VALIDATION, TEST = range(12), range(12, 18), range(18, 23)


@pytest.fixture
def scenario(tmp_path):
    """Plain colours with noise: 12 training, 6 validation, 5 test images, the last anomalous."""
    samples = []
    for seed in range(TEST.stop):
        path = tmp_path / f"{seed}.png"
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, 3) + rng.normal(0, 9, (40, 44, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).resize((280, 264)).save(path)
        samples.append(Sample(path, 0, "good"))
    samples[-1] = replace(samples[-1], label=1, anomaly_type="defective")
    split = [tuple(samples[i] for i in part) for part in (TRAINING, VALIDATION, TEST)]
    return Scenario("drawn", *split, "drawn", "CC0")


def pixels(samples):
    """As Pillow resizes them, uint8, shape (N, 3, 256, 256)."""
    images = [Image.open(s.path).convert("RGB").resize((256, 256), Image.BILINEAR) for s in samples]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def features(detector, samples):
    """Of each image the means of the student's first channels, by its whole forward pass."""
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    output = detector.student((pixels(samples) / 255 - mean) / std)[:, : detector.out_channels]
    return output.double().mean(dim=(2, 3)).numpy()


def test_the_score_is_the_sum_of_two_standardised_ones(narrow, scenario):
    detector = narrow()
    puad = PUAD(detector).fit(scenario, device="cpu")

    known = features(detector, scenario.train)
    covariance = np.cov(known.T, bias=True)
    covariance += RIDGE * np.diag(covariance).mean() * np.eye(len(covariance))
    inverse, centre = np.linalg.inv(covariance), known.mean(axis=0)
    parts = []
    for samples in (scenario.validation, scenario.test):
        distances = [mahalanobis(x, centre, inverse) for x in features(detector, samples)]
        scores = [detector.predict(s.path).score for s in samples]
        parts.append(np.array([scores, distances]))
    validation, test = parts
    mean, deviation = validation.mean(axis=1), validation.std(axis=1, ddof=1)
    expected = ((test - mean[:, None]) / deviation[:, None]).sum(axis=0)

    found = puad.predict([s.path for s in scenario.test])
    np.testing.assert_allclose([p.score for p in found], expected, rtol=2e-3, atol=2e-3)
    assert np.ptp(expected) > 0.2  # a hundred times the tolerance


def test_maps_and_the_other_scores_stay_the_detectors(narrow, scenario):
    detector = narrow()
    puad = PUAD(detector).fit(scenario, device="cpu")
    own, found = (p.predict(scenario.test[0].path) for p in (detector, puad))
    assert (found.map == own.map).all() and (found.ae_map == own.ae_map).all()
    assert (found.st_score, found.ae_score) == (own.st_score, own.ae_score)
    assert found.score != own.score
    evaluation = evaluate(puad, scenario, device="cpu")
    assert evaluation.scores["combined"][0] == np.float32(found.score)


def test_it_learns_from_training_and_validation_images_alone(narrow, scenario):
    puad = PUAD(narrow()).fit(scenario, device="cpu")
    without = PUAD(narrow()).fit(replace(scenario, test=()), device="cpu")
    for name, value in puad.normal.state_dict().items():
        assert torch.equal(value, without.normal.state_dict()[name])


def test_fewer_images_than_channels_give_finite_distances(narrow, scenario):
    few = replace(scenario, train=scenario.train[:3])
    puad = PUAD(narrow()).fit(few, device="cpu")
    scores = [p.score for p in puad.predict([s.path for s in scenario.test])]
    assert np.isfinite(scores).all()


def test_it_has_thresholds_of_its_own_and_a_new_fit_takes_them_away(narrow, scenario):
    detector = narrow()
    detector.threshold = 0.5
    puad = PUAD(detector).fit(scenario, device="cpu")
    assert puad.threshold is None
    point, _ = fit_thresholds(puad, scenario.validation, 0.5, guarantee="average", device="cpu")
    assert puad.predict(scenario.test[0].path).threshold == point.threshold
    assert detector.threshold == 0.5
    assert puad.fit(scenario, device="cpu").threshold is None


def test_a_saved_one_predicts_the_same_bits(narrow, scenario, tmp_path):
    detector = narrow()
    puad = PUAD(detector).fit(scenario, device="cpu")
    fit_thresholds(puad, scenario.validation, 0.5, guarantee="average", device="cpu")
    puad.save(tmp_path / "puad.safetensors")
    loaded = PUAD.load(tmp_path / "puad.safetensors", detector)
    for sample in scenario.test:
        expected, found = puad.predict(sample.path), loaded.predict(sample.path)
        assert (found.score, found.threshold) == (expected.score, expected.threshold)
    assert loaded.pixel_operating_point == puad.pixel_operating_point


def test_a_file_of_another_detector_is_refused(narrow, scenario, tmp_path):
    puad = PUAD(narrow()).fit(scenario, device="cpu")
    puad.save(tmp_path / "puad.safetensors")
    with pytest.raises(RunError, match=r"puad.safetensors was fitted to another detector"):
        PUAD.load(tmp_path / "puad.safetensors", narrow(seed=1))
    other = narrow()
    other.precision = "bfloat16"
    with pytest.raises(RunError, match="in another precision"):
        PUAD.load(tmp_path / "puad.safetensors", other)


def test_what_cannot_be_fitted_is_refused_in_a_sentence(narrow, scenario):
    detector = narrow()
    path = scenario.test[0].path
    for call in (lambda p: p.predict(path), lambda p: p.save("nowhere.safetensors")):
        with pytest.raises(ValueError, match=r"call fit\(scenario\) first"):
            call(PUAD(detector))
    with pytest.raises(ValueError, match="two validation images at least, not 1"):
        PUAD(detector).fit(replace(scenario, validation=scenario.validation[:1]))
    alike = (scenario.train[0],) * 4
    with pytest.raises(ValueError, match="the same for all training images"):
        PUAD(detector).fit(replace(scenario, train=alike), device="cpu")
    with pytest.raises(ValueError, match="are they copies"):
        PUAD(detector).fit(
            replace(scenario, validation=(scenario.test[0],) * 4, test=()), device="cpu"
        )
    with pytest.raises(ValueError, match="no quantiles"):
        PUAD(EfficientAD())
