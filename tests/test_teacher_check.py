"""The report on a teacher: its numbers against numpy on all values at once, each finding made."""

import subprocess
import sys
from dataclasses import replace

import effad_core
from effad_core import EfficientAD, PatchDescriptionNetwork, open_scenario, teacher_report
from effad_core.datasets import IMAGENET_MEAN, IMAGENET_STD
from effad_core.distillation.algorithm import save_teacher
from effad_core.distillation.teacher_check import TeacherReport, main
from effad_core.errors import DataError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ARRAYS = ("mean", "deviation", "deviation_ratio", "shift")


def noise(count=2, seed=0, size=256):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def made(narrow):
    """A detector whose teacher is one layer of orthogonal filters: on noise, all is well."""
    ad = narrow()
    ad.teacher = nn.Conv2d(3, 8, 4, stride=4)
    nn.init.orthogonal_(ad.teacher.weight)
    ad.card["teacher"] = {}
    return ad


def outputs(ad, images):
    """The teacher's outputs on images of its own size, float64, shape (C, all cells)."""
    x = np.stack(images).astype(np.float64) / 255
    x = ((x - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        y = ad.teacher(torch.from_numpy(x)).double().numpy()
    return y.swapaxes(0, 1).reshape(y.shape[1], -1)


def same(a, b):
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)
    assert a.effective_channels == pytest.approx(b.effective_channels, rel=1e-5)
    assert (a.images, a.cells) == (b.images, b.cells)
    return True


def test_the_numbers_are_numpys_on_all_values_at_once(narrow):
    ad, images = narrow(), noise(3) // 2
    images[1, 40:200, 40:200] = 250
    expected_mean, expected_deviation = np.linspace(-0.1, 0.2, 8), np.linspace(0.3, 0.9, 8)
    ad.card["teacher"] = {
        "output_mean": expected_mean.tolist(),
        "output_deviation": expected_deviation.tolist(),
    }
    report = teacher_report(ad, images, batch_size=2)
    y = outputs(ad, images)
    assert (report.images, report.cells) == (3, y.shape[1]) == (3, 3 * 56 * 56)
    ratio = y.std(axis=1) / expected_deviation
    shift = (y.mean(axis=1) - expected_mean) / expected_deviation
    np.testing.assert_allclose(report.mean, y.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(report.deviation, y.std(axis=1), rtol=1e-4)
    np.testing.assert_allclose(report.deviation_ratio, ratio, rtol=1e-4)
    np.testing.assert_allclose(report.shift, shift, atol=1e-5)
    assert report.median_ratio == pytest.approx(np.median(ratio), rel=1e-4)
    assert report.distance == pytest.approx(np.sqrt((shift**2).mean()), rel=1e-4)
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(y))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert report.effective_channels == pytest.approx(expected, rel=1e-4)
    assert report.reference == "the pretraining images"


def test_the_batches_make_no_difference(made):
    images = noise(5)
    whole = teacher_report(made, images, batch_size=5)
    for batch_size in (1, 2, 8):
        assert same(teacher_report(made, images, batch_size), whole)


def test_it_takes_what_predict_takes_and_samples(made, scenario):
    paths = [sample.path for sample in scenario.train]
    expected = teacher_report(made, paths)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    mixed = [str(paths[0]), pictures[1], arrays[2], scenario.train[3]]
    for images in (scenario, scenario.train, pictures, arrays, np.stack(arrays), mixed):
        assert same(teacher_report(made, images), expected)
    one = teacher_report(made, paths[:1])
    for image in (paths[0], str(paths[0]), pictures[0], arrays[0]):
        assert same(teacher_report(made, image), one)


def test_gray_images_of_odd_sizes(made, tmp_path):
    gray = noise(1, size=301)[0, :, :257, 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    resized = Image.fromarray(np.repeat(gray[..., None], 3, 2)).resize((256, 256), 2)
    y = outputs(made, [np.asarray(resized)])
    for image in (gray, tmp_path / "gray.png"):
        report = teacher_report(made, image)
        np.testing.assert_allclose(report.mean, y.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(report.deviation, y.std(axis=1), rtol=1e-4)


def test_all_is_well(made):
    report = teacher_report(made, noise())
    assert report.ok and report.findings == () and report.effective_channels > 7
    assert report.nonfinite == report.dead == report.weak == report.shifted == ()
    text = str(report)
    assert (
        "on 2 images (8192 cells), beside mean 0 and standard deviation 1, which Algorithm 3"
        in text
    )
    assert f"deviation  {report.median_ratio:.2f} times" in text
    assert text.endswith("\nok: the teacher suits these images") and "nan" not in text


def only_finding(report, text):
    assert not report.ok and len(report.findings) == 1, report.findings
    assert text in report.findings[0], report.findings
    assert str(report).endswith(f"NOT OK:\n  - {report.findings[0]}")
    return True


def with_reference(ad, mean=0.0, deviation=1.0):
    """The detector's own outputs on noise become its reference, then changed."""
    report = teacher_report(ad, noise())
    ad.card["teacher"] = {
        "output_mean": (report.mean + mean).round(6).tolist(),
        "output_deviation": (report.deviation * deviation).round(6).tolist(),
    }
    return ad


def test_a_random_teacher_says_so(made):
    made.card["teacher"] = "random"
    assert only_finding(teacher_report(made, noise()), "the teacher is random")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_channels_that_are_not_finite(made, value):
    made.teacher.bias.data[5] = value
    report = teacher_report(made, noise())
    assert only_finding(report, "1 of 8 channels (5) are NaN or infinite")
    assert report.nonfinite == (5,) and report.dead == ()
    for name in ARRAYS:
        assert np.flatnonzero(~np.isfinite(getattr(report, name))).tolist() == [5]
        assert np.isnan(getattr(report, name)[5])
    assert np.isfinite([report.median_ratio, report.distance]).all()
    assert 6 < report.effective_channels < 7.01


def test_no_finite_channel_at_all(made):
    made.teacher.bias.data.fill_(torch.nan)
    report = teacher_report(made, noise())
    assert only_finding(report, "8 of 8 channels (0, 1, 2, 3, 4, 5, 6, 7) are NaN")
    assert np.isnan([report.median_ratio, report.distance]).all()
    assert report.effective_channels == 0


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_dead_channels(made, value):
    for channel in (2, 6):
        made.teacher.weight.data[channel], made.teacher.bias.data[channel] = 0, value
    report = teacher_report(made, noise())
    assert only_finding(report, "2 of 8 channels (2, 6) are the same in every cell")
    assert report.dead == (2, 6) and report.weak == () and report.effective_channels > 5


def test_images_of_one_colour(made):
    report = teacher_report(made, np.full((2, 256, 256, 3), (200, 40, 90), np.uint8))
    assert report.dead == tuple(range(8)) and report.effective_channels == 0
    assert only_finding(report, "use images that are not all one colour")


def test_weak_channels(made):
    with_reference(made)
    for share, weak in ((0.06, ()), (0.04, (3,))):
        copy = replace_weight(made, 3, share)
        report = teacher_report(copy, noise())
        assert report.deviation_ratio[3] == pytest.approx(share, rel=1e-3)
        assert report.weak == weak
    assert only_finding(report, "1 of 8 channels (3) are nearly constant")


def replace_weight(ad, channel, factor):
    """The detector with a teacher whose one channel varies less, around the same mean."""
    layer = nn.Conv2d(3, 8, 4, stride=4)
    layer.load_state_dict(ad.teacher.state_dict())
    mean = ad.card["teacher"]["output_mean"][channel]
    layer.weight.data[channel] *= factor
    layer.bias.data[channel] = mean + factor * (layer.bias.data[channel] - mean)
    copy = EfficientAD(out_channels=8)
    copy.teacher, copy.card = layer, ad.card
    return copy


def test_blank_images(made):
    with_reference(made, deviation=1 / 0.15)
    report = teacher_report(made, noise())
    assert report.median_ratio == pytest.approx(0.15, rel=1e-3)
    assert only_finding(report, "the channels deviate by 15% (median)")


def test_shifted_channels(made):
    deviation = teacher_report(made, noise()).deviation
    shift = np.zeros(8)
    shift[[1, 4]] = -2.9, 3.1
    with_reference(made, mean=-shift * deviation)
    report = teacher_report(made, noise())
    np.testing.assert_allclose(report.shift, shift, atol=1e-4)
    assert report.shifted == (4,)
    assert only_finding(report, "beyond 3 in 1 of 8 channels")


@pytest.mark.parametrize(("everywhere", "ok"), [(0.98, True), (-1.02, False)])
def test_images_far_from_the_pretraining_images(made, everywhere, ok):
    deviation = teacher_report(made, noise()).deviation
    with_reference(made, mean=everywhere * deviation)
    report = teacher_report(made, noise())
    assert report.distance == pytest.approx(abs(everywhere), rel=1e-3)
    assert report.shifted == () and report.ok == ok
    assert ok or only_finding(report, "far from the pretraining images, 1.0 standard deviations")


def test_one_percent_of_weak_or_shifted_channels_is_no_finding(narrow):
    ad = narrow(out_channels=100)
    ad.teacher, ad.card["teacher"] = nn.Conv2d(3, 100, 8, stride=8), {}
    nn.init.orthogonal_(ad.teacher.weight)
    with_reference(ad)
    card = ad.card["teacher"]
    card["output_mean"][7] += 4 * card["output_deviation"][7]
    card["output_deviation"][9] *= 30
    report = teacher_report(ad, noise())
    assert report.ok and report.shifted == (7,) and report.weak == (9,)
    card["output_deviation"][8] *= 30
    assert only_finding(teacher_report(ad, noise()), "2 of 100 channels (8, 9) are nearly constant")


def test_channels_that_say_the_same(made):
    layer = made.teacher
    for channel in range(2, 8):
        layer.weight.data[channel] = layer.weight[channel % 2] * (-1) ** (channel // 2)
    report = teacher_report(made, noise())
    assert report.effective_channels == pytest.approx(2, abs=0.01)
    assert only_finding(report, "vary as 2.0 independent ones")


def test_a_teacher_that_has_hardly_learnt_anything(made):
    made.teacher.weight.data *= 0.1
    assert only_finding(
        teacher_report(with_reference(made), noise()), "even on the pretraining images"
    )


def test_a_channel_dead_on_the_pretraining_images_too_divides_by_no_zero(made):
    with_reference(made)
    made.card["teacher"]["output_deviation"][2] = 0.0
    report = teacher_report(made, noise())
    assert np.isfinite(report.deviation_ratio).all() and report.deviation_ratio[2] > 1e5


def test_the_untrained_network_of_a_new_detector_varies_too_little(narrow, drawn):
    ad = narrow(out_channels=384)
    ad.teacher = PatchDescriptionNetwork()
    ad.card["teacher"] = {}  # as if its file did not say that it is untrained
    report = teacher_report(ad, drawn[0])
    assert not report.ok and len(report.weak) > 300


def test_the_reference_survives_the_disk(narrow, tmp_path):
    ad = narrow()
    ad.card["teacher"] = {"output_mean": [0.1] * 8, "output_deviation": [0.5] * 8}
    ad.save(tmp_path / "x.safetensors")
    loaded = EfficientAD.load(tmp_path / "x.safetensors")
    a, b = teacher_report(loaded, noise(1)), teacher_report(ad, noise(1))
    assert same(a, b) and str(a) == str(b) and "beside the pretraining images:" in str(a)


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 256, 256, 3), np.uint8)])
def test_no_images(made, images):
    with pytest.raises(ValueError, match="there are no images to check the teacher on"):
        teacher_report(made, images)


def test_what_is_no_image(made, tmp_path):
    with pytest.raises(DataError, match="absent.png does not exist"):
        teacher_report(made, [tmp_path / "absent.png"])
    with pytest.raises(DataError, match="must be uint8"):
        teacher_report(made, [np.zeros((256, 256, 3))])


@pytest.mark.parametrize(
    "damage",
    [
        {"output_mean": [0.0] * 8},
        {"output_mean": [0.0] * 7, "output_deviation": [1.0] * 7},
        {"output_mean": [0.0] * 8, "output_deviation": [1.0] * 7 + [np.nan]},
        {"output_mean": [0.0] * 8, "output_deviation": [1.0] * 7 + [-1.0]},
        {"output_mean": "eight", "output_deviation": [1.0] * 8},
        {"output_mean": None, "output_deviation": [1.0] * 8},
    ],
)
def test_a_damaged_card(made, damage):
    made.card["teacher"] = damage
    with pytest.raises(ValueError, match="card needs 8 finite numbers each .* distil the teacher"):
        teacher_report(made, noise(1))


@pytest.fixture
def files(narrow, tmp_path):
    """A folder of noise with one below it, and a teacher's file that suits them."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for name, array in zip(("a.png", "b.png", "more/c.png"), noise(3), strict=True):
        Image.fromarray(array).save(tmp_path / "images" / name)
    ad = narrow(out_channels=384)
    ad.teacher[-1].weight.data *= 300
    save_teacher(tmp_path / "bare.safetensors", ad.teacher, {})
    ad.load_teacher(tmp_path / "bare.safetensors")
    report = teacher_report(ad, noise(3))
    card = {"output_mean": report.mean.tolist(), "output_deviation": report.deviation.tolist()}
    save_teacher(tmp_path / "good.safetensors", ad.teacher, card)
    save_teacher(
        tmp_path / "far.safetensors", ad.teacher, card | {"output_mean": [1e3 for _ in range(384)]}
    )
    return tmp_path


@pytest.fixture
def command(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(part) for part in arguments])
        return stop.value.code, capsys.readouterr().out

    return call


def test_the_command_on_a_folder_and_a_scenario(files, command):
    code, text = command(files / "images", "--teacher", files / "good.safetensors")
    assert code == 0 and "on 3 images" in text and "ok: the teacher suits" in text
    code, text = command(files / "images", "--teacher", files / "far.safetensors")
    assert code == 1 and "NOT OK:\n  - these images lie far" in text
    small = command(files / "images", "--teacher", files / "good.safetensors")[1]
    large = command(
        files / "images", "--teacher", files / "good.safetensors", "--image-size", "512"
    )
    assert "on 3 images" in large[1] and large[1] != small
    train = files / "part" / "train" / "good"
    train.parent.mkdir(parents=True)
    (files / "images").rename(train)
    (train / "more" / "c.png").unlink()  # two images, of which one is held out for validation
    code, text = command(files / "part", "--teacher", files / "good.safetensors")
    assert code == 0 and "on 1 image (" in text


def test_what_the_command_cannot_read_is_one_sentence(files, refusal):
    said = refusal(main, files / "absent", "--teacher", files / "good.safetensors")
    assert "absent' is neither a scenario (solar-mono" in said
    said = refusal(main, files / "images", "--teacher", files / "absent.safetensors")
    assert "there is no teacher" in said and "absent.safetensors" in said
    said = refusal(main, files / "images", "--teacher", files / "images" / "a.png")
    assert "a.png is not a whole safetensors file" in said


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "effad_core", "check-teacher", tmp_path / "absent"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "neither a scenario" in done.stderr


def test_it_is_public():
    assert {"teacher_report", "TeacherReport"} <= set(effad_core.__all__)
    assert effad_core.TeacherReport is TeacherReport


def test_a_report_is_frozen_and_can_be_replaced(made):
    report = teacher_report(made, noise(1))
    with pytest.raises(AttributeError):
        report.images = 3
    assert not replace(report, findings=("x",)).ok


def test_the_shipped_teacher_on_real_images_and_on_camera_noise():
    detector = EfficientAD().load_teacher()
    cells = teacher_report(detector, open_scenario("solar-mono").train[:8])
    assert cells.ok and cells.reference == "the pretraining images", str(cells)
    rng = np.random.default_rng(0)
    wall = np.clip(rng.normal(128, 3, (2, 256, 256, 1)), 0, 255).astype(np.uint8)
    blank = teacher_report(detector, np.broadcast_to(wall, (2, 256, 256, 3)).copy())
    assert not blank.ok and blank.median_ratio < 0.2, str(blank)
    assert cells.median_ratio > 2 * blank.median_ratio
