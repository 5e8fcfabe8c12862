"""waterfill: the Gaussian bound and integer bits."""

import math

import numpy as np
import pytest
import torch

from proteus_cache.codecs.waterfill import UNBIASED_ERROR, allocate, gaussian_rate, price_for_error, price_for_rate


def test_bound_of_equal_variances_is_half_a_log() -> None:
    assert gaussian_rate(torch.full((7,), 3.0), 3.0 / 16) == pytest.approx(2.0)
    assert gaussian_rate(torch.full((7,), 3.0), 3.0) == pytest.approx(0.0, abs=1e-9)


def test_bound_follows_reverse_water_filling() -> None:
    variances = torch.tensor([16.0, 4.0, 1.0, 0.25])
    level = 0.5  # error 0.5, 0.5, 0.5, 0.25
    expected = (math.log2(32) + math.log2(8) + math.log2(2)) / 2 / 4
    assert gaussian_rate(variances, (3 * level + 0.25) / 4) == pytest.approx(expected)


def test_bound_at_no_error_is_infinite() -> None:
    assert gaussian_rate(torch.ones(3), 0.0) == math.inf


def test_components_have_bits_at_every_frequency_or_at_none() -> None:
    rng = np.random.default_rng(0)
    variances = torch.from_numpy(rng.lognormal(0, 3, (40, 16)))
    for price in (1e-3, 1e-1, 1.0, 10.0):
        bits = allocate(variances, price)
        assert bool(((bits > 0).all(dim=1) | (bits == 0).all(dim=1)).all())
        assert int(bits.max()) <= 8


def test_allocation_is_the_cheapest_of_all() -> None:
    variances = torch.tensor([[9.0], [0.3], [0.05]], dtype=torch.float64)
    price = 0.04
    table = torch.tensor(UNBIASED_ERROR, dtype=torch.float64)
    costs = variances * table + price * torch.arange(9)
    assert torch.equal(allocate(variances, price)[:, 0], costs.argmin(dim=1))


@pytest.mark.parametrize("rate", [0.3, 1.0, 2.5])
def test_prices_meet_their_goals(rate: float) -> None:
    variances = torch.from_numpy(1 / np.arange(1, 400.0)).reshape(-1, 1)
    bits = allocate(variances, price_for_rate(variances, rate)).double()
    assert rate - 0.02 < float(bits.mean()) <= rate
    error = float((variances * torch.tensor(UNBIASED_ERROR, dtype=torch.float64)[bits.long()]).mean())
    again = allocate(variances, price_for_error(variances, error * 1.0001)).double()
    assert float(again.mean()) == pytest.approx(float(bits.mean()), abs=0.02)
