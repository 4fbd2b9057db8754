"""Streams against numpy on everything at once, however the stream is cut."""

from effad_core.statistics import ChannelMoments, StreamQuantiles, channel_statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(maps):
    values = np.concatenate([m.double().numpy().transpose(1, 0, 2, 3).reshape(5, -1) for m in maps],
                            axis=1)  # fmt: skip
    return values.mean(1), values.std(1)


def random_maps(shapes, scale=1.0, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [shift + scale * torch.randn(n, 5, h, w, generator=generator) for n, h, w in shapes]


@pytest.mark.parametrize(
    ("scale", "shift"), [(1, 0), (3, -7), (1e-2, 1e4), (1e-3, 100), (1e-6, 0), (1e4, 1)]
)
def test_statistics_equal_numpys(scale, shift):
    maps = random_maps([(3, 4, 6), (1, 1, 1), (2, 7, 3)], scale, shift)
    mu, sigma = channel_statistics(maps)
    assert mu.dtype == sigma.dtype == torch.float32 and mu.shape == sigma.shape == (5,)
    expected_mu, expected_sigma = reference(maps)
    np.testing.assert_allclose(mu, expected_mu, rtol=1e-6, atol=1e-7 * scale)
    np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 5, 12])
def test_statistics_do_not_depend_on_the_chunks(chunk):
    (maps,) = random_maps([(12, 4, 4)], 1e-2, 50)
    whole, parts = channel_statistics([maps]), channel_statistics(maps.split(chunk))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -1234.567])
def test_dead_channel_is_named(value):
    maps = random_maps([(2, 4, 4), (1, 4, 4)])
    for m in maps:
        m[:, 3] = value
    with pytest.raises(ValueError, match=r"1 of 5 channels never vary .*\(channel 3\)"):
        channel_statistics(maps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_refuse_what_is_not_finite(value):
    (maps,) = random_maps([(2, 4, 4)])
    maps[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        channel_statistics([maps])


def test_statistics_of_nothing():
    with pytest.raises(ValueError, match="empty"):
        channel_statistics([])


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1e-2, 1e4)])
def test_covariances_equal_numpys(scale, shift):
    maps = random_maps([(3, 4, 6), (1, 1, 1), (2, 7, 3)], scale, shift)
    for m in maps:
        m[:, 1] += 0.5 * m[:, 0]
    moments = ChannelMoments(covariance=True)
    for m in maps:
        moments.add(m)
    values = np.concatenate([m.numpy().swapaxes(0, 1).reshape(5, -1) for m in maps], axis=1)
    expected = np.cov(values.astype(np.float64), bias=True)
    assert moments.count == values.shape[1] == 115
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9, atol=1e-9 * scale**2)
    np.testing.assert_allclose(moments.deviation, expected.diagonal() ** 0.5, rtol=1e-9)
    with pytest.raises(ValueError, match="no covariance was kept"):
        _ = ChannelMoments().covariance


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_of_other_channels_survive_what_is_not_finite(value, covariance):
    maps = random_maps([(2, 4, 4), (1, 4, 4)])
    expected_mu, expected_sigma = reference(maps)
    maps[1][0, 2, 3, 3] = value
    moments = ChannelMoments(covariance)
    for m in maps:
        before = m.clone()
        moments.add(m)
        assert torch.equal(m.nan_to_num(7), before.nan_to_num(7))
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(moments.mean[others], expected_mu[others])
    np.testing.assert_allclose(moments.deviation[others], expected_sigma[others])
    assert not torch.isfinite(moments.mean[2]) and not torch.isfinite(moments.deviation[2])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.sampled_from([(0.9, 0.995), (0.5, 0.0), (1.0, 0.25), (0.57,)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_quantiles_equal_numpys(sizes, quantiles, ties, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=sum(sizes)).astype(np.float32)
    values = np.round(values) if ties else values
    stream = StreamQuantiles(values.size, quantiles)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        stream.add(part)
    expected = np.quantile(values.astype(np.float64), quantiles)
    np.testing.assert_allclose(stream.result(), expected, rtol=1e-12, atol=1e-12)


def test_quantiles_take_any_shape_and_order():
    values = np.random.default_rng(0).normal(size=(7, 11, 13)).astype(np.float32)
    results = []
    for order in (values, values[::-1]):
        stream = StreamQuantiles(values.size, (0.9, 0.995))
        for part in order:
            stream.add(part)
        results.append(stream.result())
    assert results[0] == results[1]


def test_quantiles_hold_a_tenth_of_the_stream():
    stream = StreamQuantiles(100_000, (0.9, 0.995))
    for _ in range(100):
        stream.add(np.random.default_rng(1).normal(size=(10, 100)).astype(np.float32))
        held = stream._largest if stream._largest.base is None else stream._largest.base
        assert held.nbytes <= 4 * 10_001
    assert held.size == 10_001  # ranks 89,999 ... 99,999


def test_quantiles_refuse_another_number_of_elements():
    for came in (9, 11):
        stream = StreamQuantiles(10, (0.9,))
        stream.add(np.zeros(came, np.float32))
        with pytest.raises(ValueError, match=f"10 elements were announced, {came} came"):
            stream.result()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantiles_refuse_what_is_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        StreamQuantiles(3, (0.9,)).add(np.array([0, value, 1], np.float32))


def test_quantiles_of_nothing():
    with pytest.raises(ValueError, match="no elements"):
        StreamQuantiles(0, (0.9,))
