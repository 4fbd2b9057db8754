"""Winograd's convolution against torch's, forwards and backwards, in float64 and in float32."""

from effad_core import EfficientAD
from effad_core.acceleration import winograd
from effad_core.acceleration.winograd import conv2d, convolution

import pytest
import torch
import torch.nn.functional as F


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("images", "outputs", "r", "padding"),
    [
        ((2, 5, 13, 17), 7, 4, 0),
        ((1, 3, 9, 8), 4, 3, 1),
        ((2, 4, 6, 6), 3, 4, 3),
        ((1, 2, 4, 4), 2, 4, 0),  # a single output
        ((1, 2, 1, 1), 2, 3, 1),
        ((1, 2, 1, 50), 2, 3, 2),
        ((1, 1, 130, 125), 1, 4, 2),  # several strips, the last of them shorter
        ((0, 2, 9, 9), 2, 4, 0),  # no images
    ],
)
def test_values_and_gradients_are_those_of_torch(images, outputs, r, padding):
    torch.manual_seed(0)
    arguments = draw(*images), draw(outputs, images[1], r, r), draw(outputs)
    found = conv2d(*arguments, padding)
    expected = F.conv2d(*arguments, padding=padding)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slope = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, arguments, slope),
        torch.autograd.grad(expected, arguments, slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_memory_layout(layout):
    torch.manual_seed(0)
    images, weight = draw(2, 6, 20, 14), draw(4, 6, 4, 4)
    found = conv2d(images.contiguous(memory_format=layout), weight.to(memory_format=layout))
    torch.testing.assert_close(found, F.conv2d(images, weight))
    turned = images.transpose(2, 3)[..., ::2]
    torch.testing.assert_close(conv2d(turned, weight), F.conv2d(turned, weight))


@pytest.mark.parametrize(("channels", "side", "r"), [(128, 60, 4), (256, 30, 4), (256, 30, 3)])
def test_float32_is_nearly_as_accurate_as_adding_one_by_one(channels, side, r):
    """torch's own convolution is no measure here: its rounding depends on machine and layout."""
    torch.manual_seed(0)
    images = draw(1, channels, side, side, dtype=torch.float32).relu()
    weight = draw(96, channels, r, r, dtype=torch.float32) / (channels * r * r) ** 0.5
    exact = F.conv2d(images.double(), weight.double())
    one_by_one = torch.zeros(exact.shape).flatten(2)[0]
    for column, row in zip(weight.flatten(1).T, F.unfold(images, r)[0], strict=True):
        one_by_one = one_by_one + column[:, None] * row

    def error(found):
        return (found.reshape(exact.shape) - exact).square().mean().sqrt()

    assert error(conv2d(images, weight)) < 4 * error(one_by_one)


@pytest.mark.parametrize(
    ("images", "weight", "padding"),
    [
        ((1, 2, 9, 9), (2, 2, 5, 5), 0),
        ((1, 2, 9, 9), (2, 2, 3, 4), 0),
        ((1, 2, 3, 9), (2, 2, 4, 4), 0),
        ((1, 2, 9, 9), (2, 2, 3, 3), 3),
    ],
)
def test_what_it_does_not_do_is_refused(images, weight, padding):
    with pytest.raises(ValueError, match=r"kernel"):
        conv2d(torch.zeros(images), torch.zeros(weight), padding=padding)


def test_it_is_taken_where_it_pays_and_only_there(monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "conv2d", lambda *a: calls.append(a[3]) or F.conv2d(*a[:3]))
    large, small = torch.zeros(1, 128, 40, 40), torch.zeros(1, 128, 12, 12)
    weight, bias = torch.zeros(128, 128, 4, 4), torch.zeros(128)
    convolution(large, weight, bias)
    convolution(large, weight, bias, (1, 1), (0, 0), (1, 1), 1)  # as nn.Conv2d calls it
    convolution(large, weight, bias, padding=(2, 2))
    assert calls == [0, 0, 2]
    convolution(small, weight, bias)
    convolution(large, weight[:, :, :1, :1], bias)
    convolution(large, weight[:32], bias[:32])
    convolution(large.double(), weight.double(), bias.double())
    for other in ({"stride": 2}, {"padding": (1, 2)}, {"padding": "valid"}, {"dilation": (2, 2)}):
        found = convolution(large, weight, bias, **other)
        assert found.shape == F.conv2d(large, weight, bias, **other).shape
    convolution(large, weight[:, :64], bias, groups=2)
    assert len(calls) == 3


@pytest.mark.parametrize("size", ["small", "medium"])
def test_maps_are_those_of_float32(size):
    torch.manual_seed(0)
    detector = EfficientAD(size)
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    exact = detector.anomaly_maps(images)
    detector.precision = "float32-winograd"
    for found, expected in zip(detector.anomaly_maps(images), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert not torch.equal(found, expected)  # another way was taken
