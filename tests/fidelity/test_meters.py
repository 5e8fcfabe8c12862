"""The parts of a stream's measures: spread, axes, single tokens, bins."""

from __future__ import annotations

from statistics import NormalDist
from unittest import mock

import numpy as np
import pytest
import torch

from proteus_cache.fidelity.axes import AxisMeter, bootstrap_weights, sure_factor
from proteus_cache.fidelity.conditional import N_BINS, ConditionalMeter
from proteus_cache.fidelity.per_token import TokenMeter, percentile
from proteus_cache.fidelity.sides import Entry
from proteus_cache.fidelity.spread import SpreadMeter

CPU = torch.device("cpu")


def test_a_large_mean_costs_no_digits() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(5000, 6)) * [1, 2, 0.1, 1, 1, 1] + [0, 0, -500, 9000, 0, 0]).astype(np.float32)
    meter = SpreadMeter()

    for part in torch.split(torch.from_numpy(tokens), 640):
        meter.add(part)

    spread = meter.finish()
    np.testing.assert_allclose(spread.mean, tokens.astype(np.float64).mean(axis=0), rtol=1e-12)
    expected = np.cov(tokens.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(spread.covariance, expected, atol=1e-10 * 4)
    variances, vectors = spread.axes()
    np.testing.assert_allclose(vectors @ torch.diag(variances) @ vectors.T, expected, atol=1e-9)
    assert bool((variances.diff() <= 0).all())


def test_bootstrap_weights_draw_as_many_groups_as_there_are() -> None:
    weights = bootstrap_weights(37)

    assert weights.sum(dim=1).tolist() == [37.0] * len(weights)
    assert torch.equal(weights, bootstrap_weights(37))
    assert float(weights.var()) == pytest.approx(1, abs=0.1)


def test_many_images_are_drawn_in_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(400, 5, 3, generator=generator)
    error = 0.1 * torch.randn(400, 5, 3, generator=generator)
    each, grouped = AxisMeter(3, 400, CPU), AxisMeter(3, 50, CPU)

    each.add(original, error, torch.arange(400))
    grouped.add(original, error, torch.arange(400) % 50)

    first, second = each.finish(), grouped.finish()
    assert torch.equal(first.slope, second.slope)
    assert first.slope_error is not None
    assert second.slope_error is not None
    torch.testing.assert_close(first.slope_error, second.slope_error, rtol=0.4, atol=0)
    torch.testing.assert_close(first.slope_error, torch.full((3,), 0.1 / 2000**0.5).double(), rtol=0.3, atol=0)


def test_the_factor_for_many_axes_keeps_the_chance_of_a_false_alarm() -> None:
    assert sure_factor(1) == pytest.approx(3.0)
    for n_axes in (10, 192, 1536):
        chance = n_axes * (1 - NormalDist().cdf(sure_factor(n_axes)))
        assert chance == pytest.approx(0.00135, rel=0.01)


@pytest.mark.parametrize("percent", [0, 1, 50, 99.9, 100])
def test_percentiles_are_those_of_numpy(percent: float) -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))

    assert percentile(values, percent) == pytest.approx(np.percentile(values.double().numpy(), percent), rel=1e-12)


def test_of_many_tokens_evenly_spread_ones_are_kept_and_the_worst_and_the_means_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(300, 10, 4, generator=generator)
    decoded = exact + 0.1 * torch.randn(300, 10, 4, generator=generator)
    decoded[217, 6] = -exact[217, 6]
    entries = [Entry(f"key_{number}", "", None, "v000", 0, number) for number in range(300)]
    mean = torch.zeros(4)
    whole = TokenMeter()
    whole.add(exact, decoded, mean, entries, 0)

    with mock.patch("proteus_cache.fidelity.per_token.MOST_KEPT", 400):
        thinned = TokenMeter()
        for first in range(0, 300, 7):
            part = slice(first, first + 7)
            thinned.add(exact[part], decoded[part], mean, entries[part], 0)

    few, all_of_them = thinned.finish(), whole.finish()
    assert few.worst == all_of_them.worst
    assert few.worst is not None
    assert (few.worst.key, few.worst.token) == ("key_217", 6)
    assert few.worst.relative_error == pytest.approx(4)
    assert few.cosine_mean == pytest.approx(all_of_them.cosine_mean, abs=1e-12)
    assert few.cosine_p1 == pytest.approx(all_of_them.cosine_p1, abs=0.02)
    kept = sum(part.shape[1] for part in thinned._kept)
    assert 100 < kept <= 400


def test_a_token_that_is_the_mean_has_no_relative_error() -> None:
    exact = torch.zeros(1, 2, 3)
    exact[0, 1] = 1.0
    meter = TokenMeter()

    meter.add(exact, exact + 0.5, torch.zeros(3), [Entry("key", "", None, "v000", 0, 0)], 0)

    found = meter.finish()
    assert found.worst is not None
    assert found.worst.token == 1
    assert found.worst.relative_error == pytest.approx(0.25)


def test_bins_show_a_dead_zone_that_no_slope_shows() -> None:
    values = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    decoded = torch.where(values.abs() < 0.5, torch.zeros(()), values)
    slope = float((values * decoded).sum() / values.square().sum())
    decoded = decoded / slope
    meter = ConditionalMeter(torch.ones(1, dtype=torch.float64), len(values))

    meter.add(values, decoded - values)

    found = meter.finish()
    assert found.largest is not None
    assert found.largest > 0.29
    middle = N_BINS // 2
    assert found.mean_errors[middle] == pytest.approx(-0.1, abs=0.01)  # 0 to 0.2: all of it is gone
    assert found.mean_errors[middle + 10] == pytest.approx(2.1 * (1 / slope - 1), abs=0.01)


def test_of_very_many_values_some_are_binned() -> None:
    values = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))

    with mock.patch("proteus_cache.fidelity.conditional.MOST_VALUES", 2000):
        meter = ConditionalMeter(torch.ones(8, dtype=torch.float64), 1000)
        for part in torch.split(values, 33):
            meter.add(part, 0.1 * part)

    assert sum(meter.finish().counts) == 250 * 8
