"""Maps that are known: those of the detector, computed once, and never those of another one."""

from effad_core import RunError, Sample, evaluate, fit_thresholds
from effad_core.datasets import ResizedImages
from effad_core.evaluation.known import CELLS, KnownMaps, holds
from effad_core.region import Region
from effad_core.tiles import Tiles

import numpy as np
import pytest
import torch


@pytest.fixture
def batch(drawn):
    samples = [Sample(path, 0, "good") for path in drawn[:3]]
    return next(ResizedImages(samples, (256, 256)).batches(3))


def counted(detector, monkeypatch):
    """How many images the detector computes from now on, one entry a call."""
    calls, cells = [], detector.cells
    monkeypatch.setattr(detector, "cells", lambda i: calls.append(len(i)) or cells(i))
    return calls


def test_maps_are_the_detectors_and_computed_once(narrow, batch, tmp_path, monkeypatch):
    detector = narrow()
    expected = detector.combined_maps(batch), *detector.anomaly_maps(batch)
    calls = counted(detector, monkeypatch)
    known = KnownMaps(detector, tmp_path / "run")
    for _ in range(2):
        found = known.combined_maps(batch), *known.anomaly_maps(batch)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert calls == [3] and (known.computed, known.looked_up) == (3, 9)
    assert str(known) == "maps of 9 images looked up, of 3 computed here"


def test_what_a_folder_holds_is_used_again(narrow, batch, tmp_path, monkeypatch):
    first = KnownMaps(narrow(), tmp_path).cells(batch[:2])
    detector = narrow()
    calls = counted(detector, monkeypatch)
    again = KnownMaps(detector, tmp_path).cells(batch[[2, 1, 0]])  # in another order, and one new
    assert calls == [1] and torch.equal(again[1:], first.flip(0))
    assert KnownMaps(narrow(), tmp_path).cells(batch).shape == (3, 2, 56, 56)
    assert KnownMaps(narrow(), tmp_path)._kept.keys() == KnownMaps(detector, tmp_path)._kept.keys()


@pytest.mark.parametrize("change", ["student", "sigma", "precision"])
def test_maps_of_another_detector_are_not_used(narrow, batch, tmp_path, monkeypatch, change):
    KnownMaps(narrow(), tmp_path).cells(batch)
    other = narrow()
    if change == "student":
        other.student[-1].bias.data[0] += 1
    elif change == "sigma":
        other.sigma[0] *= 2
    else:
        other.precision = "bfloat16"
    assert holds(tmp_path / CELLS, narrow()) and not holds(tmp_path / CELLS, other)
    expected, calls = other.cells(batch), counted(other, monkeypatch)
    torch.testing.assert_close(KnownMaps(other, tmp_path).cells(batch), expected)
    assert calls == [3]


def test_quantiles_and_thresholds_found_later_count(narrow, drawn, tmp_path):
    detector = narrow()
    samples = [Sample(path, 0, "good") for path in drawn]
    known = KnownMaps(detector, tmp_path)
    known.predict(drawn)
    detector.quantiles.mul_(2)
    points = fit_thresholds(known, samples, 0.5, guarantee="average")
    assert (detector.operating_point, detector.pixel_operating_point) == points
    expected = [detector.predict(path) for path in drawn]
    found = known.predict(drawn)
    np.testing.assert_allclose([p.score for p in found], [p.score for p in expected], rtol=1e-5)
    assert [p.is_anomalous for p in found] == [p.is_anomalous for p in expected]
    assert known.computed == len(drawn)
    assert (
        evaluate(known, samples[:2]).scores.keys() == evaluate(detector, samples[:2]).scores.keys()
    )


def test_a_region_counts(narrow, drawn, tmp_path):
    mask = np.zeros((264, 280), bool)
    mask[:, :140] = True
    detector = narrow(region=Region(mask))
    found, expected = KnownMaps(detector, tmp_path).predict(drawn[0]), detector.predict(drawn[0])
    assert found.score == pytest.approx(expected.score)
    assert found.score < narrow().predict(drawn[0]).score


def test_half_the_space(narrow, batch, tmp_path):
    exact, half = (
        KnownMaps(narrow(), tmp_path / str(dtype), dtype).cells(batch)
        for dtype in (torch.float32, torch.float16)
    )
    assert torch.equal(half, exact.half().float()) and not torch.equal(half, exact)
    sizes = [(tmp_path / str(t) / CELLS).stat().st_size for t in (torch.float32, torch.float16)]
    assert sizes[1] < 0.55 * sizes[0]


def test_tiles_and_damaged_files_are_refused(narrow, batch, tmp_path):
    with pytest.raises(ValueError, match="without tiles"):
        KnownMaps(narrow(tiles=Tiles(256)), tmp_path)
    KnownMaps(narrow(), tmp_path).cells(batch)
    content = (tmp_path / CELLS).read_bytes()
    (tmp_path / CELLS).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"cells.safetensors is not a whole safetensors file"):
        KnownMaps(narrow(), tmp_path)


def test_another_number_format_has_maps_of_its_own(narrow, batch, tmp_path):
    detector = narrow()
    known = KnownMaps(detector, tmp_path)
    exact = known.cells(batch)
    detector.precision = "bfloat16"
    torch.testing.assert_close(known.cells(batch), detector.cells(batch))
    assert known.computed == 6 and not torch.equal(known.cells(batch), exact)


def test_maps_of_another_folder_are_taken_along(narrow, batch, tmp_path):
    KnownMaps(narrow(), tmp_path / "shipped").cells(batch[:2])
    KnownMaps(narrow(1), tmp_path / "foreign").cells(batch)
    own = KnownMaps(narrow(), tmp_path / "own")
    own.cells(batch[2:])
    for folder in ("shipped", "foreign", "absent"):
        own.take(tmp_path / folder)
    again = KnownMaps(narrow(), tmp_path / "own")
    torch.testing.assert_close(again.cells(batch), narrow().cells(batch))
    assert (again.looked_up, again.computed) == (3, 0)
