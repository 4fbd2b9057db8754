"""Losses against exact rational arithmetic, torch.quantile and hand-worked numbers."""

from fractions import Fraction
from math import ceil, floor

from effad_core.losses import hard_feature_loss, mean_squared_difference, pretraining_penalty

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def exact_hard_loss(images, quantile: str) -> float:
    """Lines 19-20 in rational arithmetic: an interpolated quantile, then a mean, per image."""
    losses = []
    for values in images:
        values = sorted(Fraction(v) for v in values)
        rank = Fraction(quantile) * (len(values) - 1)
        low, high = values[floor(rank)], values[ceil(rank)]
        d_hard = low + (high - low) * (rank - floor(rank))
        hard = [v for v in values if v >= d_hard]
        losses.append(sum(hard) / len(hard))
    return float(sum(losses) / len(losses))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.integers(1, 40).flatmap(
            lambda size: st.lists(
                st.lists(st.integers(0, 6), min_size=size, max_size=size), min_size=n, max_size=n
            )
        )
    ),
    st.sampled_from(["0", "0.07", "0.5", "0.57", "0.9", "0.999"]),
)
def test_hard_loss_is_exact_with_ties_constants_and_batches(images, quantile):
    distances = torch.tensor(images, dtype=torch.float32)[:, None, :, None]
    found = hard_feature_loss(distances, float(quantile)).item()
    assert found == pytest.approx(exact_hard_loss(images, quantile), rel=1e-6)


@pytest.mark.parametrize("length", [2, 11, 101, 1001])
@pytest.mark.parametrize("quantile", ["0.07", "0.1", "0.29", "0.57", "0.58", "0.7", "0.999"])
def test_hard_loss_where_the_quantile_is_an_element(length, quantile):
    """0.07 * 100 is 7.000000000000001 in floating point: the seventh element must still count."""
    values = np.random.default_rng(0).permutation(length).tolist()
    found = hard_feature_loss(torch.tensor([values], dtype=torch.float64), float(quantile)).item()
    assert found == pytest.approx(exact_hard_loss([values], quantile), rel=1e-12)


def test_hard_loss_equals_the_papers_formula_in_torch():
    distances = torch.rand(3, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    d_hard = torch.quantile(distances.flatten(1), 0.999, dim=1)
    expected = torch.stack([d[d >= q].mean() for d, q in zip(distances, d_hard, strict=True)])
    torch.testing.assert_close(hard_feature_loss(distances), expected.mean())


def test_hard_loss_gradient_reaches_only_hard_elements():
    distances = torch.arange(40.0).reshape(2, 20).requires_grad_()
    hard_feature_loss(distances, 0.9).backward()  # rank 17.1: elements 18 and 19 of each image
    expected = torch.zeros(2, 20)
    expected[:, 18:] = 1 / 4
    assert torch.equal(distances.grad, expected)


def test_hard_loss_of_quantile_0_is_the_mean():
    distances = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(hard_feature_loss(distances, 0.0), distances.mean())


def test_hard_loss_beyond_the_limit_of_torch_quantile():
    distances = torch.rand(1, 17_000_001, generator=torch.Generator().manual_seed(0))
    assert distances.numel() > 2**24
    values = distances[0].numpy()
    # rank 16,983,000 of 0 ... 17,000,000
    hard = values[values >= np.partition(values, 16_983_000)[16_983_000]]
    assert hard.size >= 17_001
    expected = hard.astype(np.float64).mean()
    assert hard_feature_loss(distances).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 900, 1000])
def test_hard_loss_keeps_nan(count):
    distances = torch.rand(2, 1000)
    distances[1, :count] = torch.nan
    assert torch.isnan(hard_feature_loss(distances, 0.99))


@pytest.mark.parametrize("quantile", [-0.1, 1.0, float("nan")])
def test_hard_loss_refuses_other_quantiles(quantile):
    with pytest.raises(ValueError, match="quantile must be in"):
        hard_feature_loss(torch.ones(1, 4), quantile)


def test_hard_loss_refuses_nothing():
    with pytest.raises(ValueError, match="no distances"):
        hard_feature_loss(torch.ones(1, 0, 2, 2))


def test_penalty_by_hand():
    assert pretraining_penalty(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]])) == 14 / 4


def test_mean_squared_difference_by_hand():
    a, b = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[1.0, 4.0, 0.0]]]])
    assert mean_squared_difference(a, b).item() == pytest.approx(13 / 3)


def test_mean_squared_difference_refuses_to_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        mean_squared_difference(torch.ones(2, 4, 3, 3), torch.ones(1, 4, 3, 3))
