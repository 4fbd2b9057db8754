"""The faster dropout and mean squared difference against torch's."""

from effad_core.acceleration.shortcuts import dropout, mean_squared_difference_to
from effad_core.losses import mean_squared_difference

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom

FORMATS = [torch.float32, torch.bfloat16]


def features(dtype=torch.float32, shape=(2, 8, 33, 29), seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_sets_to_zero_or_scales(dtype, p):
    x = torch.ones_like(features(dtype)).requires_grad_()
    y = dropout(x, p)
    scaled = torch.ones((), dtype=dtype) / (1 - p)
    assert set(y.unique().tolist()) == {0.0, scaled.item()}
    assert y.dtype == dtype and y.stride() == x.stride()
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_dropout_drops_as_often_as_it_should(p):
    """The number dropped lies where a binomial of p does, but once in a million."""
    x = torch.ones(1_000_003)
    dropped = int((dropout(x, p) == 0).sum())
    low, high = binom(len(x), p).interval(1 - 1e-6)
    assert low < dropped < high


def test_dropout_treats_neighbours_independently():
    torch.manual_seed(5)
    kept = (dropout(torch.ones(400_000), 0.2) > 0).double()
    for lag in (1, 2, 3, 4, 8):
        correlation = np.corrcoef(kept[:-lag], kept[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(400_000)


def test_dropout_is_decided_by_torchs_seed():
    x = features()
    first, again, later = [], [], []
    for found, seed in ((first, 1), (again, 1), (later, 2)):
        torch.manual_seed(seed)
        found += [dropout(x), dropout(x)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(*first) and not torch.equal(first[0], later[0])


def test_dropout_is_nothing_in_evaluation():
    x = features()
    assert dropout(x, 0.2, training=False) is x
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_dropout_of_a_few_elements(count):
    assert dropout(torch.ones(count)).shape == (count,)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_loss_and_its_gradient_are_those_of_the_plain_one(dtype):
    prediction, target = features(dtype, seed=1).requires_grad_(), features(seed=2).half()
    before = prediction.detach().clone(), target.clone()
    found = mean_squared_difference_to(prediction, target)
    (3 * found).backward()
    other = prediction.detach().double().requires_grad_()
    expected = F.mse_loss(other, target.double())
    (3 * expected).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(prediction.grad.double(), other.grad, rtol=3 * rounding, atol=1e-10)
    assert prediction.grad.dtype == dtype
    assert torch.equal(prediction, before[0]) and torch.equal(target, before[1])


def test_the_loss_of_other_shapes_is_refused_by_both():
    for loss in (mean_squared_difference, mean_squared_difference_to):
        with pytest.raises(ValueError, match="shapes differ"):
            loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 1))
