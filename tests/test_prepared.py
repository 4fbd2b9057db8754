"""A prepared detector against the detector that it was made from."""

from effad_core import EfficientAD, Sample, evaluate
from effad_core.acceleration.winograd import FilteredConvolution
from effad_core.deployment.prepared import prepare

import numpy as np
import pytest
import torch


def trained(size="small", **options):
    """A detector whose every number differs from its default."""
    torch.manual_seed(0)
    detector = EfficientAD(size, **options)
    detector.mu.normal_(0, 0.01)
    detector.sigma.uniform_(0.02, 0.05)
    detector.cell_means.uniform_(0.5, 2)
    detector.quantiles.copy_(torch.tensor([0.7, 1.1, 0.001, 0.003]))
    return detector


def pixels(count=1, size=(256, 256)):
    return torch.from_numpy(
        np.random.default_rng(count).integers(0, 256, (count, 3, *size), np.uint8)
    )


def assert_same_maps(found, expected, tolerance):
    assert found.dtype == torch.float32
    for m, reference in zip(found.unbind(1), expected.unbind(1), strict=True):
        span = reference.max() - reference.min()
        torch.testing.assert_close(m, reference, rtol=0, atol=tolerance * span.item())


@pytest.mark.parametrize("precision", ["float32", "float32-winograd"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("small", {}),
        ("medium", {}),
        ("small", {"padding": True}),
        ("small", {"image_size": (259, 301), "out_channels": 32}),
    ],
)
def test_maps_are_those_of_the_detector(size, options, precision):
    detector = trained(size, **options)
    images = pixels(size=detector.image_size)
    prepared = prepare(detector, precision=precision)
    assert_same_maps(prepared.combined_maps(images), detector.combined_maps(images), 1e-4)
    filtered = [m for m in prepared.graph.modules() if isinstance(m, FilteredConvolution)]
    assert bool(filtered) == (precision == "float32-winograd")


def test_a_batch_is_its_images(narrow):
    prepared = prepare(narrow())
    images = pixels(3)
    together = prepared.combined_maps(images)
    alone = torch.cat([prepared.combined_maps(image[None]) for image in images])
    assert_same_maps(together, alone, 1e-5)
    assert together.shape == (3, 3, 256, 256)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precisions_are_near(narrow, precision):
    detector = narrow()
    images = pixels()
    found = prepare(detector, precision=precision).combined_maps(images)
    assert_same_maps(found, detector.combined_maps(images), 0.05)
    assert not torch.equal(found, detector.combined_maps(images))


def test_predictions_and_evaluations(narrow, drawn):
    detector = narrow()
    detector.threshold = detector.predict(drawn[0]).score - 0.01
    prepared = prepare(detector, precision="float32")
    for found, expected in zip(prepared.predict(drawn), detector.predict(drawn), strict=True):
        assert found.score == pytest.approx(expected.score, rel=1e-4)
        assert found.map.shape == expected.map.shape
        np.testing.assert_allclose(found.ae_map, expected.ae_map, rtol=1e-3, atol=1e-3)
        assert found.is_anomalous == expected.is_anomalous
    samples = [Sample(path, index % 2, "good") for index, path in enumerate(drawn[:4])]
    scores = [evaluate(d, samples, "float32").scores["combined"] for d in (prepared, detector)]
    np.testing.assert_allclose(*scores, rtol=1e-4)


def test_the_detector_stays_as_it_is(narrow, drawn):
    detector = narrow()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.student.requires_grad_(True)
    prepared = prepare(detector)
    prepared.predict(drawn[0])
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert detector.student[0].weight.requires_grad
    maps = prepared.combined_maps(pixels())
    detector.student[0].weight.data.zero_()
    assert torch.equal(prepared.combined_maps(pixels()), maps)


def test_what_cannot_be_prepared(narrow):
    detector = narrow()
    with pytest.raises(ValueError, match="must be one of auto, float32.*not 'int8'"):
        prepare(detector, precision="int8")
    detector.student[0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="contains NaN"):
        prepare(detector, precision="float32").predict(np.zeros((64, 64, 3), np.uint8))
    detector.quantiles.fill_(torch.nan)
    with pytest.raises(ValueError, match="no quantiles yet"):
        prepare(detector, "cpu", "float32")
