"""Tables 1 to 3 line by line; sizes by running; receptive fields by gradient."""

from effad_core.networks import (
    STRIDE,
    Autoencoder,
    PatchDescriptionNetwork,
    output_length,
)

import pytest
import torch
from torch import nn

CONV, POOL = "conv", "pool"
TABLE_1 = [  # layer, stride, kernel, channels, padding, activation after it
    (CONV, 1, 4, 128, 3, True),
    (POOL, 2, 2, None, 1, False),
    (CONV, 1, 4, 256, 3, True),
    (POOL, 2, 2, None, 1, False),
    (CONV, 1, 3, 256, 1, True),
    (CONV, 1, 4, 384, 0, False),
]
TABLE_2 = [
    (CONV, 1, 4, 256, 3, True),
    (POOL, 2, 2, None, 1, False),
    (CONV, 1, 4, 512, 3, True),
    (POOL, 2, 2, None, 1, False),
    (CONV, 1, 1, 512, 0, True),
    (CONV, 1, 3, 512, 1, True),
    (CONV, 1, 4, 384, 0, True),
    (CONV, 1, 1, 384, 0, False),
]
ENCODER = [(CONV, 2, 4, channels, 1, True) for channels in (32, 32, 64, 64, 64)]
ENCODER += [(CONV, 1, 8, 64, 0, False)]
HEAD = [(CONV, 1, 3, 64, 1, True), (CONV, 1, 3, 384, 1, False)]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def table(layers):
    rows = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            rows[-1][-1] = True
            continue
        kind = {nn.Conv2d: CONV, nn.AvgPool2d: POOL}[type(layer)]
        square = [pair(v) for v in (layer.stride, layer.kernel_size, layer.padding)]
        assert all(a == b for a, b in square)
        stride, kernel, padding = (a for a, _ in square)
        rows.append(
            [kind, stride, kernel, getattr(layer, "out_channels", None), padding, False]
        )  # fmt: skip
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(("size", "rows"), [("small", TABLE_1), ("medium", TABLE_2)])
def test_pdn_tables(size, rows):
    assert table(PatchDescriptionNetwork(size, padding=True)) == rows
    unpadded = [(*row[:4], 0, row[5]) for row in rows]
    assert table(PatchDescriptionNetwork(size)) == unpadded


def test_autoencoder_table():
    network = Autoencoder(padding=True)
    assert table(network.encoder) == ENCODER and table(network.head) == HEAD
    assert len(network.decoder) == 6
    for block in network.decoder:
        assert table(block[:2]) == [(CONV, 1, 4, 64, 2, True)]
        assert isinstance(block[2], nn.Dropout) and block[2].p == 0.2 and len(block) == 3


@pytest.mark.parametrize(("padding", "last"), [(True, 64), (False, 56)])
def test_autoencoder_resizes_to_the_sizes_of_table_3(padding, last):
    network, seen = Autoencoder(padding=padding).eval(), []
    for block in (*network.decoder, network.head):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 256, 256))
    assert seen == [(s, s) for s in (3, 8, 15, 32, 63, 127, last)]


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("size", "teacher", "student"),
    [("small", 2_694_144, 4_267_392), ("medium", 8_026_624, 11_615_488)],
)
@pytest.mark.parametrize("padding", [False, True])
def test_parameters(size, teacher, student, padding):
    assert parameters(PatchDescriptionNetwork(size, padding=padding)) == teacher
    assert parameters(PatchDescriptionNetwork(size, 768, padding)) == student


def test_autoencoder_parameters():
    assert parameters(Autoencoder()) == 1_096_320


@pytest.mark.parametrize(
    ("image", "padding", "cells"),
    [
        ((256, 256), True, (64, 64)),
        ((256, 256), False, (56, 56)),
        ((212, 284), True, (53, 71)),
        ((33, 33), False, (1, 1)),
        ((33, 37), False, (1, 2)),
    ],
)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_sizes_that_the_paper_names(size, image, padding, cells):
    assert PatchDescriptionNetwork(size, padding=padding).output_size(image) == cells


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("padding", [False, True])
def test_output_length_is_the_length_of_the_output(size, padding):
    network = PatchDescriptionNetwork(size, 4, padding).eval()
    thin = nn.Sequential(  # the same geometry on one channel, so that many sizes are cheap
        *(
            nn.Conv2d(1, 1, layer.kernel_size, padding=layer.padding)
            if isinstance(layer, nn.Conv2d)
            else layer
            for layer in network
        )
    )
    with torch.no_grad():
        for length in (*range(33, 70), 97, 200, 255, 256, 257, 301):
            assert thin(torch.zeros(1, 1, length, 33)).shape[2] == output_length(length, padding)
        assert network(torch.zeros(1, 3, 41, 50)).shape[2:] == network.output_size((41, 50))


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="32x40 pixels is smaller than the 33x33 patch"):
        PatchDescriptionNetwork().output_size((32, 40))


def test_unknown_size():
    with pytest.raises(ValueError, match="'large'"):
        PatchDescriptionNetwork("large")


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize(("padding", "start"), [(False, 0), (True, -16)])
def test_receptive_field_by_gradient(size, padding, start):
    torch.manual_seed(0)
    network = PatchDescriptionNetwork(size, 4, padding)
    for parameter in network.parameters():
        parameter.data.abs_()  # no activation is off and nothing cancels
    images = torch.rand(1, 3, 64, 72, requires_grad=True)
    features = network(images)
    h, w = features.shape[2:]
    for i, j in [(0, 0), (2, 3), (h // 2, w // 2), (h - 1, w - 1)]:
        (gradient,) = torch.autograd.grad(features[..., i, j].sum(), images, retain_graph=True)
        seen = gradient[0].abs().sum(0) > 0
        expected = torch.zeros_like(seen)
        top, left = STRIDE * i + start, STRIDE * j + start
        expected[max(top, 0) : top + 33, max(left, 0) : left + 33] = True
        assert torch.equal(seen, expected), (i, j)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_unpadded_cells_are_the_inner_padded_ones(size):
    torch.manual_seed(0)
    padded = PatchDescriptionNetwork(size, 4, padding=True)
    unpadded = PatchDescriptionNetwork(size, 4)
    unpadded.load_state_dict(padded.state_dict())
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        inner = padded(images)[..., 4:-4, 4:-4]
        torch.testing.assert_close(unpadded(images), inner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_head_computes_only_the_channels_asked_for(size):
    torch.manual_seed(0)
    network = PatchDescriptionNetwork(size, 12)
    images = torch.randn(2, 3, 40, 44)
    with torch.no_grad():
        whole, trunk = network(images), network.trunk(images)
        for channels in (slice(None), slice(0, 6), slice(6, None)):
            part = network.head(trunk, channels)
            torch.testing.assert_close(part, whole[:, channels], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("image", [(256, 320), (300, 500), (257, 259)])
@pytest.mark.parametrize("padding", [False, True])
def test_autoencoder_and_pdn_have_the_same_cells(image, padding):
    network = Autoencoder(6, padding).eval()
    with torch.no_grad():
        cells = network(torch.zeros(1, 3, *image)).shape
    assert cells == (1, 6, *PatchDescriptionNetwork(padding=padding).output_size(image))


@pytest.mark.parametrize("image", [(255, 256), (256, 200)])
def test_autoencoder_refuses_small_images(image):
    with pytest.raises(ValueError, match=f"at least 256x256 pixels, not {image[0]}x{image[1]}"):
        Autoencoder(4)(torch.zeros(1, 3, *image))
