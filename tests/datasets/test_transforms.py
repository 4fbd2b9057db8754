"""Algorithm 1's augmentations against the formulas in numpy, and their draws against statistics."""

from effad_core.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augment,
    draw_augmentation,
    normalise,
    to_tensor,
)
from effad_core.datasets import resize as resize_image

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

PIXELS = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


def by_formula(pixels, index, coefficient):
    """lambda * image + (1 - lambda) * black, mean gray, or gray, cut to 0..255."""
    pixels = pixels.astype(float)
    gray = np.rint(pixels @ [0.299, 0.587, 0.114])[..., None]
    other = {1: 0.0, 2: np.rint(gray.mean()), 3: gray}[index]
    return np.clip(coefficient * pixels + (1 - coefficient) * other, 0, 255)


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize("coefficient", [0.8, 0.93, 1.0, 1.07, 1.2])
def test_augment_follows_the_formula(index, coefficient):
    result = np.asarray(augment(IMAGE, index, coefficient)).astype(float)
    assert np.abs(result - by_formula(PIXELS, index, coefficient)).max() <= 1.01


@pytest.mark.parametrize(
    ("index", "adjust"),
    [(1, F.adjust_brightness), (2, F.adjust_contrast), (3, F.adjust_saturation)],
)
@pytest.mark.parametrize("coefficient", [0.8, 0.93, 1.0, 1.07, 1.2])
def test_augment_gives_the_bytes_of_torchvision(index, adjust, coefficient):
    result = np.asarray(augment(IMAGE, index, coefficient))
    np.testing.assert_array_equal(result, np.asarray(adjust(IMAGE, coefficient)))


def test_augmentations_differ_and_leave_the_input_alone():
    results = [np.asarray(augment(IMAGE, index, 0.8)) for index in (1, 2, 3)]
    for i in range(3):
        assert np.abs(results[i].astype(int) - PIXELS).max() > 5
        assert np.abs(results[i].astype(int) - results[i - 1]).max() > 5
    np.testing.assert_array_equal(np.asarray(IMAGE), PIXELS)


def test_saturation_leaves_gray_images_as_they_are():
    gray = Image.fromarray(np.repeat(PIXELS[..., :1], 3, axis=2))
    difference = np.asarray(augment(gray, 3, 1.2)).astype(int) - np.asarray(gray)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("index", [0, 4, -1])
def test_unknown_index(index):
    with pytest.raises(ValueError, match="1, 2 or 3"):
        augment(IMAGE, index, 1.0)


def test_draws_are_uniform_and_repeat_with_the_generator():
    rng = np.random.default_rng(3)
    indices, coefficients = np.array([draw_augmentation(rng) for _ in range(6000)]).T
    assert set(indices) == {1, 2, 3}
    assert np.abs(np.bincount(indices.astype(int))[1:] / 6000 - 1 / 3).max() < 0.03
    assert coefficients.min() >= 0.8 and coefficients.max() < 1.2
    counts, _ = np.histogram(coefficients, bins=4, range=(0.8, 1.2))
    assert np.abs(counts / 6000 - 0.25).max() < 0.03
    first, second = (draw_augmentation(np.random.default_rng([7, 123])) for _ in range(2))
    assert first == second


def test_to_tensor_keeps_every_value():
    tensor = to_tensor(IMAGE)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 31, 45) and tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), PIXELS)


def test_resize_takes_height_then_width():
    assert resize_image(IMAGE, 20).size == (20, 20)
    assert resize_image(IMAGE, (12, 34)).size == (34, 12)
    assert resize_image(Image.new("RGB", (1, 1), (1, 2, 3)), 4).getpixel((3, 3)) == (1, 2, 3)


def test_resize_is_antialiased_bilinear():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    inner = np.asarray(resize_image(Image.fromarray(stripes), 16))[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 100).max() <= 13  # point sampling would give 0 or 200
    batch = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(batch, (20, 33), mode="bilinear", antialias=True)
    result = to_tensor(resize_image(IMAGE, (20, 33)))
    assert (result - expected[0]).abs().max() <= 1.01


def test_imagenet_constants():
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_STD == (0.229, 0.224, 0.225)


def test_normalise_takes_bytes_or_unit_floats():
    tensor = to_tensor(IMAGE)[None]
    expected = (PIXELS / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for images in (tensor, tensor.float() / 255):
        result = normalise(images)
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
