"""Scores are those of `predict`; metrics by group are those of independent references."""

import json
from dataclasses import replace

from effad_core.datasets import DefectKind, Sample
from effad_core.deployment.inspection import fit_thresholds
from effad_core.errors import DataError
from effad_core.evaluation.scores import Evaluation, evaluate
from effad_core.metrics import aupro, auspro
from effad_core.prediction import MAPS, Predictor

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_and_maps_are_those_of_predict(narrow, drawn, batch_size):
    ad = narrow()
    samples = [Sample(path, i % 2, "x") for i, path in enumerate(drawn[:3])]
    result = evaluate(ad, samples, batch_size=batch_size, keep_maps=True)
    assert result.labels.tolist() == [0, 1, 0] and result.samples == tuple(samples)
    single = [ad.predict(path) for path in drawn[:3]]
    for name, attribute in (("student-teacher", "st_score"), ("autoencoder", "ae_score")):
        expected = [getattr(one, attribute) for one in single]
        np.testing.assert_allclose(result.scores[name], expected, rtol=1e-4)
    expected = [p.score for p in single]
    np.testing.assert_allclose(result.scores["combined"], expected, rtol=1e-5)
    assert len(set(expected)) == 3
    for m, prediction in zip(result.maps, single, strict=True):
        assert m.shape == (264, 280) and m.dtype == np.float32
        np.testing.assert_allclose(m, prediction.map, rtol=1e-4, atol=1e-5)
    for name, scores in result.scores.items():
        assert result.auroc()[name] == roc_auc_score([0, 1, 0], scores)


def test_each_map_has_its_own_score(narrow, drawn):
    ad = narrow()
    result = evaluate(ad, [Sample(drawn[0], 0, "good")])
    ad.quantiles[2:] += 10  # only the autoencoder's map changes
    moved = evaluate(ad, [Sample(drawn[0], 0, "good")])
    assert moved.scores["student-teacher"] == result.scores["student-teacher"]
    assert moved.scores["autoencoder"] < result.scores["autoencoder"]
    assert moved.scores["combined"] < result.scores["combined"]
    assert result.maps is None  # without masks nothing to compare a map with


def test_a_scenario_is_scored_on_its_test_images(narrow, scenario, drawn):
    test = (Sample(drawn[6], 0, "good"), Sample(drawn[7], 1, "spot"))
    result = evaluate(narrow(), replace(scenario, test=test))
    assert result.name == "drawn" and result.samples == test


def test_refused(narrow, drawn, scenario):
    with pytest.raises(ValueError, match="no test images"):
        evaluate(narrow(), [])
    with pytest.raises(ValueError, match="one class"):
        evaluate(narrow(), [Sample(drawn[0], 0, "good")]).auroc()
    with pytest.raises(DataError, match="absent.png does not exist"):
        evaluate(narrow(), scenario)


# ---- a predictor with one map --------------------------------------------------------------


class Brightness(Predictor):
    """Bright pixels are anomalous: one map, the mean of the three colours."""

    map_names = ("combined",)
    image_size = (33, 35)  # an eighth of the drawn images
    operating_point = pixel_operating_point = None

    def use_device(self, device=None):
        pass

    def combined_maps(self, images):
        return images.float().mean(dim=1, keepdim=True)


def brightness(path):
    """(score, map at the image's own size), by Pillow and numpy."""
    small = np.asarray(Image.open(path).resize((35, 33), Image.BILINEAR), np.float32).mean(2)
    return small.max(), np.asarray(Image.fromarray(small).resize((280, 264), Image.BILINEAR))


def test_a_predictor_with_one_map_predicts(drawn):
    for path, found in zip(drawn, Brightness().predict(drawn, batch_size=3), strict=True):
        score, m = brightness(path)
        assert found.score == pytest.approx(score, rel=1e-5) and isinstance(found.score, float)
        np.testing.assert_allclose(found.map, m, rtol=1e-4)
        for part in (found.st_map, found.ae_map):
            assert part.shape == (264, 280) and part.dtype == np.float32 and np.isnan(part).all()
        assert np.isnan(found.st_score) and np.isnan(found.ae_score)


def test_a_map_that_is_not_finite_is_refused_if_it_is_the_only_one_too(drawn, monkeypatch):
    maps = torch.zeros(2, 1, 33, 35)
    maps[1, 0, 3, 4] = torch.nan
    monkeypatch.setattr(Brightness, "combined_maps", lambda *_: maps)
    with pytest.raises(ValueError, match=f"the anomaly map of .*{drawn[1].name} contains NaN"):
        Brightness().predict(drawn[:2])


def test_a_predictor_with_one_map_is_evaluated(drawn, tmp_path):
    """Its metrics are those of the combined map; no file holds NaN."""
    masks = [tmp_path / f"{index}.png" for index in range(4)]
    for index, path in enumerate(masks):
        mask = np.zeros((264, 280), np.uint8)
        mask[20 * index : 90, 50:200] = 255
        Image.fromarray(mask).save(path)
    kinds = ["good"] * 4 + ["structural_anomalies", "logical_anomalies"] * 2
    samples = [
        Sample(path, int(index > 3), kind, (masks[index - 4],) if index > 3 else ())
        for index, (path, kind) in enumerate(zip(drawn, kinds, strict=True))
    ]
    predictor = Brightness()
    result = evaluate(predictor, samples, batch_size=3)
    expected = [brightness(path) for path in drawn]
    assert list(result.scores) == ["combined"] and list(result.auroc()) == ["combined"]
    np.testing.assert_allclose(result.scores["combined"], [s for s, _ in expected], rtol=1e-5)
    labels = [sample.label for sample in samples]
    metrics = result.save(tmp_path / "run")
    assert list(metrics) == ["all", "logical_anomalies", "structural_anomalies", "mean"]
    area = roc_auc_score(labels, [s for s, _ in expected])
    assert metrics["all"]["image_auroc"] == pytest.approx(area)
    truth = [sample.load_mask() for sample in samples]
    area = aupro([m for _, m in expected], truth, 0.3)
    assert metrics["all"]["aupro_0.3"] == pytest.approx(area, rel=1e-3)
    for found in metrics.values():
        assert {name for name in found if name.startswith("image_")} == {
            "image_auroc", "image_auprc"
        }  # fmt: skip
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert "NaN" not in text and set(json.loads(text)["images"][0]) == {
        "image", "label", "combined"
    }  # fmt: skip
    part = result.subset("logical_anomalies")
    assert list(part.scores) == ["combined"] and len(part.scores["combined"]) == 6
    fit_thresholds(predictor, samples[:4], 0.5, guarantee="average")
    assert predictor.threshold in result.scores["combined"]
    assert predictor.predict(drawn[0]).is_anomalous in (True, False)


KINDS = (DefectKind("hole", 255, 1.0, True), DefectKind("missing", 254, 4.0, False))


@pytest.fixture
def loco(tmp_path):
    """Two good images, two with a structural and two with a logical anomaly, 12x16 pixels."""
    rng = np.random.default_rng(0)
    types = ["good"] * 2 + ["structural_anomalies"] * 2 + ["logical_anomalies"] * 2
    samples, maps = [], []
    for index, kind in enumerate(types):
        path = tmp_path / kind / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
        masks = []
        for number in range(0 if kind == "good" else 2):
            mask = np.zeros((12, 16), np.uint8)
            row, column = rng.integers(0, 8, 2)
            value = 255 if kind == "structural_anomalies" else 254
            mask[row : row + 3, column : column + 4] = value
            masks.append(tmp_path / kind / f"{index:03}_{number}.png")
            Image.fromarray(mask).save(masks[-1])
        samples.append(Sample(path, int(kind != "good"), kind, tuple(masks), KINDS))
        maps.append(rng.integers(0, 30, (12, 16)).astype(np.float32))
    scores = {name: rng.integers(0, 5, 6).astype(float) for name in MAPS}
    return Evaluation("loco", tuple(samples), scores, tuple(maps))


def test_metrics_by_group(loco):
    metrics = loco.metrics()
    assert list(metrics) == ["all", "logical_anomalies", "structural_anomalies", "mean"]
    chosen = {
        "all": range(6),
        "structural_anomalies": (0, 1, 2, 3),
        "logical_anomalies": (0, 1, 4, 5),
    }
    for group, indices in chosen.items():
        indices, found = list(indices), metrics[group]
        labels = [loco.samples[i].label for i in indices]
        for name, key in zip(MAPS, ("", "_student_teacher", "_autoencoder"), strict=True):
            area = roc_auc_score(labels, loco.scores[name][indices])
            assert found[f"image_auroc{key}"] == pytest.approx(area)
        precision = average_precision_score(labels, loco.scores["combined"][indices])
        assert found["image_auprc"] == pytest.approx(precision)
        pixels = np.concatenate([loco.maps[i].ravel() for i in indices])
        masks = [loco.samples[i].load_mask() for i in indices]
        truth = [np.zeros((12, 16), bool) if m is None else m for m in masks]
        area = roc_auc_score(np.concatenate([m.ravel() for m in truth]), pixels)
        assert found["pixel_auroc_1"] == pytest.approx(area)
        maps = [loco.maps[i] for i in indices]
        assert found["aupro_0.3"] == pytest.approx(aupro(maps, masks, 0.3))
        defects = [loco.samples[i].load_defects() for i in indices]
        for limit in (0.05, 0.3):
            assert found[f"auspro_{limit}"] == pytest.approx(auspro(maps, defects, limit))
    for name, value in metrics["mean"].items():
        halves = [metrics[kind][name] for kind in ("structural_anomalies", "logical_anomalies")]
        assert value == pytest.approx(sum(halves) / 2)


def test_saturation_areas_reach_the_metric(loco):
    before = loco.metrics()
    kinds = (KINDS[0], replace(KINDS[1], saturation_threshold=12.0))
    stricter = replace(loco, samples=tuple(replace(s, defect_kinds=kinds) for s in loco.samples))
    after = stricter.metrics()
    assert after["logical_anomalies"]["auspro_0.05"] < before["logical_anomalies"]["auspro_0.05"]
    assert after["structural_anomalies"] == before["structural_anomalies"]


def test_only_locos_two_kinds_have_a_mean_and_masks_make_pixel_metrics(loco):
    other = [replace(s, anomaly_type="crack") if s.label else s for s in loco.samples]
    metrics = replace(loco, samples=tuple(other)).metrics()
    assert list(metrics) == ["all", "crack"] and metrics["all"] == metrics["crack"]
    assert not with_pixels(replace(loco, maps=None).metrics())
    no_kinds = replace(loco, samples=tuple(replace(s, defect_kinds=()) for s in loco.samples))
    assert "auspro_0.05" not in no_kinds.metrics()["all"]


def with_pixels(metrics):
    """The groups that have pixel metrics."""
    return {group for group, found in metrics.items() if any("image" not in name for name in found)}


@pytest.mark.parametrize("unmasked", [(4, 5), (5,), (4,)])
def test_masks_for_one_kind_give_pixel_metrics_of_that_kind_and_a_sentence(
    loco, unmasked, tmp_path
):
    """As if the others were not there; image metrics do not change."""
    samples = [
        replace(s, mask_paths=()) if i in unmasked else s for i, s in enumerate(loco.samples)
    ]
    partial = replace(loco, samples=tuple(samples))
    sentence = (
        rf"of loco have no mask \(logical_anomalies: {len(unmasked)}\): pixel metrics are measured "
        "of structural_anomalies alone"
    )
    with pytest.warns(UserWarning, match=sentence):
        metrics = partial.metrics()
    whole = loco.metrics()
    assert metrics["structural_anomalies"] == whole["structural_anomalies"]
    assert metrics["structural_anomalies"].keys() >= {"pixel_auroc_1", "aupro_0.3", "auspro_0.05"}
    for group in ("all", "logical_anomalies", "mean"):
        image_metrics = {name: whole[group][name] for name in whole[group] if "image" in name}
        assert metrics[group] == image_metrics
    with pytest.warns(UserWarning, match="have no mask"):
        assert partial.save(tmp_path) == metrics


def test_without_maps_nothing_is_said_of_masks(loco):
    unmasked = (*loco.samples[:5], replace(loco.samples[5], mask_paths=()))
    replace(loco, samples=unmasked, maps=None).metrics()
    bare = [replace(sample, mask_paths=()) for sample in loco.samples]
    assert not with_pixels(replace(loco, samples=tuple(bare)).metrics())


def test_subset_keeps_scores_and_maps_together(loco):
    half = loco.subset("logical_anomalies")
    assert half.samples == (*loco.samples[:2], *loco.samples[4:])
    assert [m.tolist() for m in half.maps] == [loco.maps[i].tolist() for i in (0, 1, 4, 5)]
    np.testing.assert_array_equal(half.scores["combined"], loco.scores["combined"][[0, 1, 4, 5]])


def test_metrics_json(loco, tmp_path):
    metrics = loco.save(tmp_path / "run", seed=3)
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert content["metrics"] == metrics == loco.metrics() and content["seed"] == 3
    assert [row["image"] for row in content["images"]][:3] == [
        "good/000.png", "good/001.png", "structural_anomalies/002.png"
    ]  # fmt: skip
    assert [row["combined"] for row in content["images"]] == loco.scores["combined"].tolist()


def test_maps_as_tiffs_for_mvtecs_scripts(loco, tmp_path):
    from tifffile import imread

    folder = loco.save_maps(tmp_path / "maps")
    assert folder == tmp_path / "maps" / "loco"
    for sample, m in zip(loco.samples, loco.maps, strict=True):
        read = imread(folder / "test" / sample.anomaly_type / f"{sample.path.stem}.tiff")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, m)
    with pytest.raises(ValueError, match="no maps to save"):
        replace(loco, maps=None).save_maps(tmp_path)
    twice = replace(loco, samples=(loco.samples[0], *loco.samples[:5]))
    with pytest.raises(ValueError, match=r"2 images would be saved as .*000.tiff; rename"):
        twice.save_maps(tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
