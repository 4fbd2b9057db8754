"""Several products, one training: shared networks, numbers and thresholds of each one's own."""

from dataclasses import replace

from effad_core import DataError, EfficientAD, Schedule, train
from effad_core.datasets import Sample, Scenario
from effad_core.deployment.own_images import train_main, train_products
from effad_core.deployment.products import for_product, together

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def products(drawn, tmp_path_factory):
    """The drawn images, and others that are darker."""
    folder = tmp_path_factory.mktemp("dark")
    dark = [folder / path.name for path in drawn]
    for path, source in zip(dark, drawn, strict=True):
        Image.fromarray(np.asarray(Image.open(source)) // 3).save(path)
    found = []
    for name, paths in (("bright", drawn), ("dark", dark)):
        good = [Sample(path, 0, "good") for path in paths]
        test = (Sample(paths[7], 1, "spot"),)
        found.append(Scenario(name, tuple(good[:4]), tuple(good[4:7]), test, "drawn", "CC0"))
    return found


def test_together_has_the_images_of_all_and_tests_none(products):
    whole = together(products)
    assert whole.name == "bright+dark" and whole.test == ()
    for split in ("train", "validation"):
        paths = [sample.path for sample in getattr(whole, split)]
        assert paths == [s.path for product in products for s in getattr(product, split)]
    with pytest.raises(
        DataError, match="two products are called dark: give their folders other names"
    ):
        together([products[1], replace(products[0], name="Dark")])
    shared = replace(products[1], name="x", validation=products[0].train[:1])
    with pytest.raises(DataError, match="keep it in one of them"):
        together([products[0], shared])


def test_each_product_has_the_numbers_that_its_own_images_give(narrow, products, pretraining):
    """As if the product had been the only one that numbers were looked for on."""
    schedule = Schedule.smoke(precision="float32")
    ad = narrow()
    train(ad, together(products), schedule, pretraining, device="cpu")
    ad.threshold = 0.5
    before = {name: value.clone() for name, value in ad.state_dict().items()}
    own = [for_product(ad, product, schedule) for product in products]
    for name, value in ad.state_dict().items():
        assert torch.equal(before[name], value)
        if name not in ("quantiles", "cell_means"):
            assert all(torch.equal(one.state_dict()[name], value) for one in own)
    assert not torch.allclose(own[0].quantiles, own[1].quantiles)
    for one, product in zip(own, products, strict=True):
        images = [np.asarray(s.load().resize((256, 256), Image.BILINEAR)) for s in product.train]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        means = ad.cells(batch).mean(dim=0)
        means /= means.mean(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(one.cell_means, (means + 0.3) / 1.3, rtol=1e-3, atol=1e-4)
        maps = [one.anomaly_maps(torch.from_numpy(np.array(s.load().resize((256, 256), 2)))
                .permute(2, 0, 1)[None])[0].numpy() for s in product.validation]  # fmt: skip
        expected = np.quantile(np.stack(maps), (0.9, 0.995))
        np.testing.assert_allclose(one.quantiles[:2], expected, rtol=1e-4)
        assert one.card["product"] == product.name and one.threshold is None


def test_sixteen_bits_have_one_white(narrow, products, pretraining, tmp_path, monkeypatch):
    """The darker product alone would have another white, and quantiles of other images."""
    deep, schedule = [], Schedule.smoke(precision="float32")
    for product, factor in zip(products, (60, 15), strict=True):
        samples = []
        for sample in (*product.train, *product.validation):
            path = tmp_path / f"{product.name}-{sample.path.name}"
            values = np.asarray(Image.open(sample.path).convert("L"), np.uint16) * factor
            Image.fromarray(values).save(path)
            samples.append(Sample(path, 0, "good"))
        deep.append(Scenario(product.name, tuple(samples[:4]), tuple(samples[4:]), (), "d", "CC0"))
    assert deep[0].full_scale != deep[1].full_scale
    ad = narrow()
    train(ad, together(deep), schedule, pretraining, device="cpu")
    own = for_product(ad, deep[1], schedule)
    assert own.full_scale == deep[0].full_scale
    maps = [own.predict(sample.path).st_map for sample in deep[1].validation]
    assert np.quantile(np.stack(maps), 0.9) == pytest.approx(0, abs=0.02)  # q_a, as it predicts


def test_a_file_for_each_product_and_one_for_all(narrow, products, tmp_path, monkeypatch):
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self, path=None: self)
    monkeypatch.setattr("effad_core.deployment.own_images.EfficientAD", lambda *a, **o: narrow())
    found = train_products(
        products, Schedule.smoke(precision="float32"), tmp_path, guarantee="average", rate=0.25,
        device="cpu",
    )  # fmt: skip
    for (own, points), product in zip(found, products, strict=True):
        loaded = EfficientAD.load(tmp_path / product.name)
        assert loaded.operating_point == points[0] == own.operating_point
        assert points[0].images == len(product.validation)
        scores = [loaded.predict(sample.path).score for sample in product.validation]
        assert loaded.threshold == pytest.approx(max(scores), rel=1e-5)
    assert EfficientAD.load(tmp_path).operating_point.images == 6
    assert found[0][0].threshold != found[1][0].threshold


def test_the_command(narrow, products, tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EfficientAD, "load_teacher", lambda self, path=None: self)
    monkeypatch.setattr("effad_core.deployment.own_images.EfficientAD", lambda *a, **o: narrow())
    for product in products:
        folder = tmp_path / product.name
        folder.mkdir()
        for sample in (*product.train, *product.validation):
            (folder / sample.path.name).write_bytes(sample.path.read_bytes())
    options = ("--profile", "smoke", "--device", "cpu", "--run-dir", tmp_path / "run")
    train_main([*map(str, ("bright", "dark", *options))])
    said = capsys.readouterr().out
    for product in products:
        path = tmp_path / "run" / product.name / "detector.safetensors"
        assert f"the detector: {path}\n" in said and f"\n{product.name}: trained on" in said
        assert str(EfficientAD.load(path).operating_point) in said
    twice = refusal(train_main, "bright", tmp_path / "bright", *options)
    assert "two products are called bright" in twice
    for product in products:  # folders that are all called "good" have their parents' names
        (tmp_path / "parts" / product.name).mkdir(parents=True)
        (tmp_path / product.name).rename(tmp_path / "parts" / product.name / "good")
    train_main([*map(str, ("parts/bright/good", "parts/dark/good", *options[:-1], "run2"))])
    assert (tmp_path / "run2/dark-good/detector.safetensors").is_file()
