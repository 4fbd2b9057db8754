"""Algorithm 2 against plain torch code, every accepted input, and the file on disk."""

from effad_core import EfficientAD, OperatingPoint, RunError, detector, evaluate, train
from effad_core.datasets import read_image, resize, to_tensor
from effad_core.deployment.inspection import fit_thresholds
from effad_core.deployment.prepared import prepare
from effad_core.detector import place_cells
from effad_core.distillation.algorithm import save_teacher
from effad_core.errors import DataError
from effad_core.networks import Autoencoder, PatchDescriptionNetwork
from effad_core.schedule import Schedule
from effad_core.storage.weights import write_tensors
from effad_core.thresholds import max_f1, pixel_threshold, threshold_for_fpr

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image


def by_hand(ad, path):
    """Algorithm 2 line by line, with whole networks, numpy padding and no shared helper."""
    image = Image.open(path).convert("RGB")
    x = torch.from_numpy(np.array(image.resize((256, 256), Image.BILINEAR))).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    x = x.permute(2, 0, 1)[None]
    with torch.no_grad():
        t, s, a = ad.teacher(x), ad.student(x), ad.autoencoder(x)
    t = (t - ad.mu) / ad.sigma
    c = t.shape[1]
    raw = [((t - s[:, :c]) ** 2).mean(1), ((a - s[:, c:]) ** 2).mean(1)]
    raw = [m / mean for m, mean in zip(raw, ad.cell_means, strict=True)]
    qa_st, qb_st, qa_ae, qb_ae = ad.quantiles.tolist()
    maps = []
    for m, qa, qb in zip(raw, (qa_st, qa_ae), (qb_st, qb_ae), strict=True):
        if ad.padding:
            m = F.interpolate(m[None], (256, 256), mode="bilinear")[0, 0].numpy()
        else:
            m = F.interpolate(m[None], (224, 224), mode="bilinear")[0, 0].numpy()
            m = np.pad(m, 16, mode="edge")
        maps.append(0.1 * (m - qa) / (qb - qa))
    combined = 0.5 * maps[0] + 0.5 * maps[1]
    own = torch.from_numpy(np.stack([combined, *maps]))[None]
    own = F.interpolate(own, (image.height, image.width), mode="bilinear")[0].numpy()
    return combined.max(), own


@pytest.mark.parametrize("padding, divided", [(False, False), (True, False), (False, True)])
def test_predict_is_algorithm_2(drawn, padding, divided):
    torch.manual_seed(3)
    ad = EfficientAD(padding=padding)
    if divided:
        ad.cell_means.uniform_(0.5, 2)
    ad.mu.normal_(0, 0.01)
    ad.sigma.uniform_(0.02, 0.05)
    ad.quantiles.copy_(torch.tensor([0.9, 1.3, 0.001, 0.002]))
    prediction = ad.predict(drawn[0])
    score, maps = by_hand(ad, drawn[0])
    assert prediction.score == pytest.approx(score, rel=1e-4)
    for found, expected in zip(
        (prediction.map, prediction.st_map, prediction.ae_map), maps, strict=True
    ):
        assert found.shape == (264, 280) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(maps).max())


def equal(a, b):
    return a.score == b.score and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("map", "st_map", "ae_map")
    )


def test_every_kind_of_image_gives_the_same_prediction(narrow, drawn):
    ad = narrow()
    expected = ad.predict(drawn[0])
    pixels = np.array(Image.open(drawn[0]))
    for image in (str(drawn[0]), Image.open(drawn[0]), pixels):
        assert equal(ad.predict(image), expected)
    (only,) = ad.predict([drawn[0]])
    assert equal(only, expected)
    assert ad.predict([]) == []


def test_batches_and_sequences_keep_order_and_own_sizes(narrow, drawn):
    ad = narrow()
    pixels = np.array(Image.open(drawn[1]))
    images = [drawn[0], pixels, pixels[:100, :40], Image.open(drawn[2]), pixels[..., 0]]
    several = ad.predict(images, batch_size=2)
    assert [p.map.shape for p in several] == [
        (264, 280), (264, 280), (100, 40), (264, 280), (264, 280)
    ]  # fmt: skip
    for together, alone in zip(several, map(ad.predict, images), strict=True):
        assert together.score == pytest.approx(alone.score, rel=1e-5)
        np.testing.assert_allclose(together.map, alone.map, rtol=1e-4, atol=1e-4)
    stacked = ad.predict(np.stack([pixels, 255 - pixels]))
    assert isinstance(stacked, list) and len(stacked) == 2
    assert stacked[0].score == pytest.approx(several[1].score, rel=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P"])
def test_a_file_and_its_pil_image_agree_in_every_mode(narrow, drawn, tmp_path, mode):
    ad = narrow()
    gray = Image.open(drawn[0]).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    elif mode == "RGBA":
        image = Image.merge("RGBA", (gray, gray, gray, gray))
    else:
        image = gray.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    prediction = ad.predict(path)
    assert prediction.map.shape == (264, 280)
    assert equal(prediction, ad.predict(Image.open(path)))
    if mode in ("L", "I;16", "P"):
        assert equal(prediction, ad.predict(np.asarray(gray)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "not float32"),
        (np.zeros((8, 8, 3), bool), "not bool"),
        (np.zeros((8, 8, 3), np.int32), "not int32"),
        (np.zeros((8, 8, 2), np.uint8), "shape .8, 8, 2."),
        (np.zeros((3, 8, 8), np.uint8), "shape .3, 8, 8."),
        (np.zeros((0, 8, 3), np.uint8), "shape .0, 8, 3."),
        (7, "not int"),
        ("absent.png", "absent.png does not exist"),
    ],
)
def test_what_is_no_image_is_refused(narrow, image, message):
    with pytest.raises(DataError, match=message):
        narrow().predict(image)


@pytest.mark.parametrize("cell", [(0, 0), (13, 40), (55, 55)])
def test_an_unpadded_peak_lies_at_the_centre_of_its_patch(cell):
    i, j = cell
    cells = torch.zeros(1, 1, 56, 56)
    cells[0, 0, i, j] = 1
    m = place_cells(cells, (256, 256), padding=False)[0, 0]
    peak = (m == m.max()).nonzero().double()
    if cell == (13, 40):
        assert (peak.mean(0) - torch.tensor([4 * i + 16.0, 4 * j + 16.0])).abs().max() <= 2
    else:  # replicated into the corner of the image
        corner = 0 if i == 0 else 255
        assert m[corner, corner] == m.max() > 0.5


@pytest.mark.parametrize("image_size", [(256, 256), (256, 320), (301, 258), (511, 259)])
@pytest.mark.parametrize("padding", [False, True])
def test_no_zeros_enter_a_map(image_size, padding):
    cells = 1 + torch.rand(2, 1, *PatchDescriptionNetwork(padding=padding).output_size(image_size))
    m = place_cells(cells, image_size, padding)
    assert m.shape == (2, 1, *image_size)
    assert cells.min() <= m.min() and m.max() <= cells.max()
    if not padding:
        inner = F.interpolate(cells, scale_factor=4, mode="bilinear")
        h, w = inner.shape[-2:]
        torch.testing.assert_close(m[..., 16 : 16 + h, 16 : 16 + w], inner)
        assert torch.equal(m[..., :16, 20], m[..., 16:17, 20].expand(-1, -1, 16))
        assert torch.equal(m[..., 40, 16 + w :], m[..., 40, 15 + w : 16 + w].expand_as(
            m[..., 40, 16 + w :]))  # fmt: skip


@pytest.mark.parametrize("padding", [False, True])
def test_non_square_image_size(narrow, drawn, tmp_path, padding):
    ad = narrow(image_size=(256, 320), padding=padding)
    prediction = ad.predict(drawn[0])
    assert prediction.map.shape == (264, 280)
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    assert loaded.image_size == (256, 320) and loaded.padding == padding
    assert equal(loaded.predict(drawn[0]), prediction)


@pytest.mark.parametrize("image_size", [200, (256, 255)])
def test_small_image_size(image_size):
    with pytest.raises(ValueError, match="at least 256 pixels"):
        EfficientAD(image_size=image_size)


def test_bfloat16_is_near_float32(narrow, drawn):
    ad = narrow()
    exact = ad.predict(drawn[0])
    ad.precision = "bfloat16"
    rough = ad.predict(drawn[0])
    assert np.abs(rough.map - exact.map).max() < 0.05 * np.abs(exact.map).max()
    assert not equal(exact, rough)
    with pytest.raises(ValueError, match="not 'float16'"):
        ad.precision = "float16"
    assert ad.precision == "bfloat16"


def test_damaged_numbers_are_refused(narrow, drawn):
    ad = narrow()
    ad.student[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        ad.predict(drawn[0])
    ad = narrow()
    ad.quantiles[2:] = 0.3
    with pytest.raises(ValueError, match="q_b must lie above q_a"):
        ad.predict(drawn[0])
    ad.quantiles.fill_(torch.nan)
    with pytest.raises(ValueError, match="no quantiles yet"):
        ad.predict(drawn[0])


def test_find_quantiles_refuses_what_cannot_be_normalised(narrow):
    ad = narrow()
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    with pytest.raises(ValueError, match="no elements"):
        ad.find_quantiles([], 0)
    for parameter in (*ad.student.parameters(), *ad.autoencoder.parameters()):
        parameter.data.zero_()
    with pytest.raises(ValueError, match="of the autoencoder map are equal"):
        ad.find_quantiles([images], 1)
    ad.autoencoder.head[0].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        ad.find_quantiles([images], 1)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_save_and_load_are_exact(drawn, tmp_path, size):
    torch.manual_seed(1)
    ad = EfficientAD(size, out_channels=4)
    ad.quantiles.copy_(torch.tensor([0.1, 0.2, 0.1, 0.2]))
    ad.card["note"] = "kept"
    ad.to(memory_format=torch.channels_last)
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    assert loaded.card == ad.card and loaded.size == size and not loaded.training
    assert loaded.state_dict().keys() == ad.state_dict().keys()
    for name, value in ad.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_predictions_survive_the_disk_bit_for_bit(narrow, drawn, tmp_path):
    ad = narrow()
    ad.save(tmp_path / "x.safetensors")
    assert equal(EfficientAD.load(tmp_path / "x.safetensors").predict(drawn[0]),
                 ad.predict(drawn[0]))  # fmt: skip


def test_a_threshold_is_a_number_that_can_be_set_and_read(narrow, drawn, tmp_path):
    ad = narrow()
    assert ad.threshold is None and ad.pixel_threshold is None
    score = ad.predict(drawn[0]).score
    ad.threshold, ad.pixel_threshold = score - 0.01, np.float32(0.25)
    assert ad.operating_point == OperatingPoint(score - 0.01, "manual", 0)
    assert ad.predict(drawn[0]).is_anomalous
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    assert (loaded.threshold, loaded.pixel_threshold) == (score - 0.01, 0.25)
    assert prepare(ad, "cpu", "float32").threshold == ad.threshold
    ad.threshold = None
    assert ad.operating_point is None
    for wrong in ("0.3", np.nan, [1.0], max_f1([0, 1], [0.0, 1.0])):
        with pytest.raises(ValueError, match="threshold"):
            ad.threshold = wrong
    assert ad.operating_point is None


def test_the_verdict_is_that_of_the_stored_thresholds(narrow, drawn, tmp_path):
    ad = narrow()
    before = ad.predict(drawn)
    for prediction, name in ((before[0], "is_anomalous"), (before[0], "anomalous_pixels")):
        with pytest.raises(ValueError, match=r"no (pixel_)?threshold: find one with"):
            getattr(prediction, name)
    scores = np.array([p.score for p in before])
    ad.operating_point = threshold_for_fpr(scores, 0.5, guarantee="average")
    ad.pixel_operating_point = pixel_threshold([p.map for p in before], 0.5, guarantee="average")
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    assert loaded.operating_point == ad.operating_point
    assert loaded.pixel_operating_point == ad.pixel_operating_point
    limit = np.sort(scores)[4]  # the 5th of 8: 4 of 9 lie above on average
    after = loaded.predict(drawn)
    assert [p.is_anomalous for p in after] == [bool(score > limit) for score in scores]
    assert sum(p.is_anomalous for p in after) == 3
    for prediction in after:
        expected = prediction.map > np.sort([p.map.max() for p in before])[4]
        assert np.array_equal(prediction.anomalous_pixels, expected)


def test_a_score_equal_to_the_threshold_is_normal(narrow, drawn):
    ad = narrow()
    score = ad.predict(drawn[0]).score
    ad.operating_point = OperatingPoint(score, "labels-f1", 2)
    assert not ad.predict(drawn[0]).is_anomalous
    ad.operating_point = OperatingPoint(np.nextafter(score, -np.inf), "labels-f1", 2)
    assert ad.predict(drawn[0]).is_anomalous


def test_new_quantiles_take_the_thresholds_away(narrow):
    ad = narrow()
    ad.operating_point = ad.pixel_operating_point = max_f1([0, 1], [0.0, 1.0])
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    ad.find_quantiles([images], 2)
    assert ad.operating_point is None and ad.pixel_operating_point is None


def test_a_finished_run_brings_its_thresholds(narrow, scenario, pretraining, tmp_path):
    schedule = Schedule(iterations=1, autoencoder_iterations=0, precision="float32")
    ad = narrow()
    train(ad, scenario, schedule, pretraining, tmp_path)
    ad.operating_point = max_f1([0, 1], [0.0, 1.0])
    ad.save(tmp_path / "detector.safetensors")
    again = narrow()
    train(again, scenario, schedule, pretraining, tmp_path)
    assert again.operating_point == ad.operating_point and again.pixel_operating_point is None


@pytest.mark.parametrize(
    "points", [{"threshold": {"kind": "guess"}}, {"threshold": 3}, {"pixel_threshold": {}}, 7]
)
def test_a_damaged_operating_point_is_refused(narrow, tmp_path, points):
    ad, path = narrow(), tmp_path / "x.safetensors"
    header = dict(kind="detector", size="small", padding=False, image_size=(256, 256), card={})
    header |= {"out_channels": 8, "operating_points": points}
    write_tensors(path, ad.state_dict(), header)
    with pytest.raises(RunError, match=r"x.safetensors has a (damaged )?header"):
        EfficientAD.load(path)


def test_files_that_are_no_detector(narrow, tmp_path):
    ad, path = narrow(), tmp_path / "x.safetensors"
    ad.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="x.safetensors is not a whole"):
        EfficientAD.load(path)
    save_teacher(path, ad.teacher, {})
    with pytest.raises(RunError, match="x.safetensors .* not a detector"):
        EfficientAD.load(path)
    header = dict(kind="detector", size="small", padding=False, image_size=256, card={})
    write_tensors(path, ad.state_dict(), header)
    with pytest.raises(RunError, match="damaged header: 'operating_points' is missing or no dict"):
        EfficientAD.load(path)
    header |= {"operating_points": {}, "precision": "float32"}
    for wrong in (header, header | {"out_channels": 8, "image_size": (99, 99)}):
        write_tensors(path, ad.state_dict(), wrong)
        with pytest.raises(RunError, match="x.safetensors has a header"):
            EfficientAD.load(path)
    header |= {"image_size": (256, 256), "out_channels": 9}
    write_tensors(path, ad.state_dict(), header)
    with pytest.raises(RunError, match="x.safetensors is of another architecture"):
        EfficientAD.load(path)


def test_load_teacher(tmp_path, monkeypatch):
    torch.manual_seed(5)
    network = PatchDescriptionNetwork()
    monkeypatch.setattr(detector, "shipped", lambda name: tmp_path / name.rpartition("/")[2])
    with pytest.raises(RunError, match=r"no teacher .*pdn_small.safetensors: distil one"):
        EfficientAD().load_teacher()
    save_teacher(tmp_path / "pdn_small.safetensors", network, {"extractor": "stub"})
    ad = EfficientAD().load_teacher()
    assert ad.card["teacher"] == {"extractor": "stub"}
    for a, b in zip(ad.teacher.parameters(), network.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())
        assert not a.requires_grad
    with pytest.raises(RunError, match="pdn_small.safetensors is of another architecture"):
        EfficientAD("medium").load_teacher(tmp_path / "pdn_small.safetensors")
    network[0].bias.data[0] = torch.nan
    save_teacher(tmp_path / "pdn_small.safetensors", network, {})
    with pytest.raises(RunError, match="NaN or infinite values in '0.bias'"):
        EfficientAD().load_teacher()
    ad.save(tmp_path / "detector.safetensors")
    with pytest.raises(RunError, match="not a teacher"):
        EfficientAD().load_teacher(tmp_path / "detector.safetensors")
    write_tensors(tmp_path / "bare.safetensors", network.state_dict(), {"kind": "teacher"})
    with pytest.raises(RunError, match="bare.safetensors has a damaged header: 'card' is missing"):
        EfficientAD().load_teacher(tmp_path / "bare.safetensors")


def state(ad):
    return {name: value.clone() for name, value in ad.state_dict().items()}


def is_state(ad, before):
    """Bit by bit; NaN equals NaN."""
    now = ad.state_dict()
    assert now.keys() == before.keys()
    return all(
        now[name].shape == value.shape and torch.equal(now[name].nan_to_num(), value.nan_to_num())
        for name, value in before.items()
    )


@pytest.mark.parametrize("padding", [False, True])
def test_a_teacher_of_other_channels_makes_a_new_detector(narrow, drawn, tmp_path, padding):
    ad, other = narrow(padding=padding), narrow(seed=9, out_channels=5)
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, other.teacher, {"extractor": "stub"})
    ad.mu.fill_(3)
    ad.cell_means.fill_(2)
    ad.threshold = ad.pixel_threshold = 0.5
    ad.card["training"] = {"seed": 3}
    ad.precision = "bfloat16"
    assert ad.load_teacher(path) is ad
    assert (ad.out_channels, ad.teacher.out_channels, ad.student.out_channels) == (5, 5, 10)
    for p, q in zip(ad.teacher.parameters(), other.teacher.parameters(), strict=True):
        assert torch.equal(p, q.half().float()) and not p.requires_grad
    assert ad.teacher.padding == ad.student.padding == padding
    assert all(p.requires_grad for p in ad.student.parameters())
    assert ad.mu.equal(torch.zeros(5, 1, 1)) and ad.sigma.equal(torch.ones(5, 1, 1))
    assert ad.quantiles.isnan().all() and (ad.cell_means == 1).all()
    assert ad.operating_point is None and ad.pixel_operating_point is None
    assert ad.card == {"teacher": {"extractor": "stub"}} and ad.precision == "bfloat16"
    assert not ad.training and not any(part.training for part in ad.modules())
    with pytest.raises(ValueError, match="no quantiles yet"):
        ad.predict(drawn[0])
    x = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    with torch.no_grad():
        assert {d.shape[1] for d in ad.squared_differences(x)} == {5}
    ad.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
    ad.save(tmp_path / "x.safetensors")
    assert is_state(EfficientAD.load(tmp_path / "x.safetensors", "cpu"), state(ad))


def test_a_teacher_of_as_many_channels_draws_no_random_numbers(narrow, tmp_path):
    ad = narrow()
    ad.threshold = 0.5
    before, teacher = state(ad), narrow(seed=9).teacher
    save_teacher(tmp_path / "teacher.safetensors", teacher, {})
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ad.load_teacher(tmp_path / "teacher.safetensors")
    assert torch.rand(1) == expected and ad.threshold == 0.5
    after = {f"teacher.{name}": value.half() for name, value in teacher.state_dict().items()}
    assert is_state(ad, before | after)


def test_a_new_detector_stays_on_its_device(narrow, tmp_path):
    save_teacher(tmp_path / "teacher.safetensors", narrow(out_channels=5).teacher, {})
    ad = narrow().to("meta").load_teacher(tmp_path / "teacher.safetensors")
    assert ad.device.type == "meta"
    assert {value.device.type for value in ad.state_dict().values()} == {"meta"}


WRONG = {  # of the last layer of a teacher with five channels
    "two counts": {"8.bias": torch.zeros(6)},
    "another two": {"8.weight": torch.zeros(6, 8, 4, 4)},
    "none": {"8.bias": torch.zeros(0), "8.weight": torch.zeros(0, 8, 4, 4)},
    "too many": {"8.bias": torch.zeros(4097), "8.weight": torch.zeros(4097, 8, 4, 4)},
    "a number": {"8.bias": torch.tensor(1.0)},
    "a matrix": {"8.bias": torch.zeros(5, 1)},
    "NaN": {"8.bias": torch.full((5,), torch.nan)},
    "a layer more": {"9.bias": torch.zeros(5)},
    "another layer": {"3.bias": torch.zeros(7)},
}


@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_teacher_leaves_the_detector_as_it_was(narrow, tmp_path, wrong, channels):
    ad, path = narrow(), tmp_path / "teacher.safetensors"
    ad.threshold = 0.5
    before, card = state(ad), dict(ad.card)
    weights = narrow(seed=9, out_channels=channels).teacher.state_dict()
    write_tensors(path, weights | WRONG[wrong], {"kind": "teacher", "card": {"extractor": "stub"}})
    sentence = "teacher.safetensors (is of another architecture|holds NaN or infinite values)"
    with pytest.raises(RunError, match=sentence):
        ad.load_teacher(path)
    assert is_state(ad, before) and ad.out_channels == 8
    assert ad.card == card and ad.threshold == 0.5


def test_means_of_cells_are_numpys(narrow, drawn):
    ad = narrow()
    ad.threshold = ad.pixel_threshold = 0.5
    images = torch.stack([to_tensor(resize(read_image(path), (256, 256))) for path in drawn[:5]])
    x = images.float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    x /= torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        t, s, a = (ad.teacher(x) - ad.mu) / ad.sigma, ad.student(x), ad.autoencoder(x)
    maps = [((t - s[:, :8]) ** 2).mean(1), ((a - s[:, 8:]) ** 2).mean(1)]
    cells = np.stack(maps).mean(1, dtype=np.float64)  # (2, 56, 56)
    expected = (cells / cells.mean((1, 2), keepdims=True) + 0.3) / 1.3
    ad.cell_means.fill_(7)  # what was there before does not count
    for sizes in ([2, 2, 1], [5]):
        ad.quantiles.copy_(torch.tensor([0.1, 0.4, 0.01, 0.05]))
        ad.find_cell_means(images.split(sizes))
        np.testing.assert_allclose(ad.cell_means, expected, rtol=1e-4)
        np.testing.assert_allclose(ad.cell_means.mean((1, 2)), 1, rtol=1e-5)
    assert ad.quantiles.isnan().all()
    assert ad.operating_point is None and ad.pixel_operating_point is None


def test_means_of_cells_that_cannot_be_found_change_nothing(narrow, drawn):
    ad = narrow()
    ad.threshold = 0.5
    ad.cell_means.uniform_(0.5, 2)
    before = state(ad)

    def unreadable():
        yield torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
        raise DataError("a.png is empty")

    with pytest.raises(DataError, match="a.png"):
        ad.find_cell_means(unreadable())
    with pytest.raises(ValueError, match="no finite means: there are no images"):
        ad.find_cell_means([])
    assert is_state(ad, before) and ad.threshold == 0.5
    ad.student[0].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="weights are damaged"):
        ad.find_cell_means([torch.zeros(1, 3, 256, 256, dtype=torch.uint8)])
    assert torch.equal(ad.cell_means, before["cell_means"])


def test_a_new_student_leaves_the_teacher_alone():
    torch.manual_seed(0)
    ad = EfficientAD()
    teacher = [p.clone() for p in ad.teacher.parameters()]
    first = ad.student[0].weight.clone()
    ad.initialise_student()
    assert not torch.equal(ad.student[0].weight, first)
    assert all(map(torch.equal, ad.teacher.parameters(), teacher))
    assert ad.student.out_channels == 768 and isinstance(ad.autoencoder, Autoencoder)


def test_one_precision_for_thresholds_and_verdicts(narrow, scenario, pretraining, drawn, tmp_path):
    """What was trained in bfloat16 computes in it everywhere, also from its file."""
    ad = narrow()
    assert ad.precision == "float32"
    brief = Schedule.smoke(precision="bfloat16", iterations=1, autoencoder_iterations=0)
    train(ad, scenario, brief, pretraining)
    assert ad.precision == "bfloat16"
    fit_thresholds(ad, scenario.validation, 0.5, guarantee="average")
    scores = [p.score for p in ad.predict([s.path for s in scenario.validation])]
    assert ad.threshold in scores  # the very number that is compared later
    found = evaluate(ad, scenario.validation).scores["combined"]
    assert found.tolist() == scores
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    assert loaded.precision == "bfloat16"
    assert loaded.predict(drawn[0]).score == ad.predict(drawn[0]).score
    assert loaded.threshold == ad.threshold
    loaded.precision = "float32"
    assert loaded.predict(drawn[0]).score != ad.predict(drawn[0]).score
    assert loaded.threshold is None and loaded.pixel_threshold is None


def test_thresholds_hold_in_one_number_format(narrow):
    ad = narrow()
    ad.threshold, ad.pixel_threshold = 0.5, 0.6
    ad.precision = "float32-winograd"  # the same format, another way to multiply
    assert (ad.threshold, ad.pixel_threshold) == (0.5, 0.6)
    for precision, threshold in (("float32", 0.5), (None, 0.5), ("bfloat16", None)):
        prepared = prepare(ad, "cpu", precision)
        assert prepared.precision == (precision or "float32-winograd")
        assert prepared.threshold == threshold
        assert prepared.pixel_threshold == (threshold and 0.6)
    ad.precision = "bfloat16"
    assert ad.threshold is None and ad.pixel_threshold is None
    ad.threshold = 0.4
    assert prepare(ad, "cpu").threshold == 0.4 and prepare(ad, "cpu").precision == "bfloat16"


def test_forward_gives_the_three_maps(narrow):
    ad, images = narrow(), torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    assert torch.equal(ad(images), ad.combined_maps(images)) and ad(images).shape[1] == 3


@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_precision_that_no_detector_has_is_refused(narrow, tmp_path, precision):
    ad = narrow()
    ad._precision = precision
    ad.save(tmp_path / "x.safetensors")
    with pytest.raises(RunError, match="the precision .* is unknown"):
        EfficientAD.load(tmp_path / "x.safetensors")


def test_a_stream_passes_over_what_cannot_be_read_only_if_it_may(narrow, drawn, tmp_path):
    ad = narrow()
    (tmp_path / "no.png").write_bytes(b"no image")
    paths = [drawn[0], tmp_path / "no.png", drawn[1], drawn[2]]
    found = list(ad.stream(iter(paths), batch_size=2, keep_going=True))
    assert [type(image).__name__ for image, _ in found] == ["Image", "DataError", "Image", "Image"]
    assert found[1][1] is None and "no.png" in str(found[1][0])
    for (_, prediction), path in zip(found, paths, strict=True):
        if prediction is not None:
            assert prediction.score == pytest.approx(ad.predict(path).score, rel=1e-4)
    rest = ad.stream(paths, batch_size=1)
    next(rest)
    with pytest.raises(DataError, match=r"no\.png"):
        next(rest)


def test_a_prediction_has_the_maximum_of_each_map(narrow, drawn):
    ad = narrow()
    prediction = ad.predict(drawn[0])
    image = to_tensor(resize(read_image(drawn[0]), ad.image_size))
    expected = ad.combined_maps(image[None])[0].flatten(1).amax(dim=1)
    scores = (prediction.score, prediction.st_score, prediction.ae_score)
    assert scores == tuple(expected.tolist())


def test_a_format_that_this_machine_is_slow_in_is_said_when_loading(narrow, tmp_path, monkeypatch):
    ad = narrow()
    ad.precision = "bfloat16"
    ad.save(tmp_path / "x.safetensors")
    monkeypatch.setattr(detector, "slowdown", lambda *_: 31.4)
    with pytest.warns(UserWarning, match=r"takes 31 times as long as for float32: set detector"):
        EfficientAD.load(tmp_path / "x.safetensors", "cpu")
    monkeypatch.setattr(detector, "slowdown", lambda *_: 1.1)
    EfficientAD.load(tmp_path / "x.safetensors", "cpu")  # a warning would be an error
