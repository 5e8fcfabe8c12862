"""lloyd: distortion of the tables, cells, and the slope."""

import numpy as np
import pytest
import torch

from proteus_cache.codecs.lloyd import Histograms, nearest_levels, thresholds_of, unbiased_scale
from proteus_cache.codecs.waterfill import UNBIASED_ERROR

_LLOYD_MAX_ERROR = (0.36338, 0.11748, 0.03455, 9.501e-3, 2.505e-3, 6.44e-4, 1.635e-4, 4.12e-5)
"""Of a unit Gaussian at 1 to 8 bits, by numerical integration."""


def _quantise(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of one table for values, and what values decode to."""
    histograms = Histograms(1)
    histograms.add(values.reshape(-1, 1), torch.zeros(1, dtype=torch.long))
    levels = histograms.levels(bits, torch.zeros(1, dtype=torch.long)).float()
    bounds = torch.nn.functional.pad(thresholds_of(levels), (0, 1), value=torch.inf)
    cells = nearest_levels(values, torch.zeros((), dtype=torch.int32), bounds, bits)
    return levels[0], levels[0][cells.long()]


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_of_a_gaussian_is_the_textbook_one(bits: int) -> None:
    values = torch.from_numpy(np.random.default_rng(bits).standard_normal(400_000)).float()

    _, decoded = _quantise(values, bits)

    error = float((decoded - values).double().square().mean())
    assert 0.93 < error / _LLOYD_MAX_ERROR[bits - 1] < 1.03  # a fine table also follows its sample a little
    slope = float((decoded * values).double().mean() / values.double().square().mean())
    assert slope == pytest.approx(1 - _LLOYD_MAX_ERROR[bits - 1], abs=3e-3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_stretched_levels_have_slope_one_and_the_stated_error(bits: int) -> None:
    values = torch.from_numpy(np.random.default_rng(7).standard_normal(400_000)).float()
    _, decoded = _quantise(values, bits)

    products, squares = (values * decoded).double().sum(), values.double().square().sum()
    stretched = decoded * unbiased_scale(products, squares)

    assert float((stretched * values).double().sum() / squares) == pytest.approx(1, abs=1e-6)
    assert float((stretched - values).double().square().mean()) == pytest.approx(UNBIASED_ERROR[bits], rel=0.02)


def test_cells_are_those_of_the_nearest_level() -> None:
    rng = np.random.default_rng(1)
    levels = torch.from_numpy(np.sort(rng.standard_normal((5, 8)), axis=1)).float()
    values = torch.from_numpy(rng.standard_normal((3, 400))).float() * 2
    tables = torch.from_numpy(rng.integers(0, 5, 400)).int()
    bounds = torch.nn.functional.pad(thresholds_of(levels), (0, 1), value=torch.inf)

    found = nearest_levels(values, tables, bounds, 3)

    nearest = (values.unsqueeze(-1) - levels[tables.long()]).abs().argmin(dim=-1)
    assert torch.equal(found.long(), nearest)


def test_two_clusters_get_a_level_each() -> None:
    rng = np.random.default_rng(2)
    far = rng.random(100_000) < 0.02
    values = torch.from_numpy(np.where(far, 6.9, -0.14) + 0.01 * rng.standard_normal(100_000)).float()

    levels, decoded = _quantise(values, 1)

    assert levels.tolist() == pytest.approx([-0.14, 6.9], abs=0.02)
    assert float((decoded - values).square().mean()) < 1e-3


def test_a_table_that_saw_nothing_is_a_gaussian_one() -> None:
    levels = Histograms(1).levels(2, torch.zeros(1, dtype=torch.long))
    assert levels[0].tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=5e-3)


def test_ranges_are_those_of_the_values() -> None:
    histograms = Histograms(2)
    histograms.add(torch.tensor([[5.0, 0.1], [-3.0, 0.2]]), torch.tensor([0, 1]))
    assert histograms.low.tolist() == [-3.0, -1.0]
    assert histograms.high.tolist() == [5.0, 1.0]
