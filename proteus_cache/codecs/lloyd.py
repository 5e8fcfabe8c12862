"""Lloyd-Max quantisers: the levels with the least mean squared error for what was seen, made unbiased.

Every table belongs to one channel or component. What it is fitted to arrives as values in units of the component's
standard deviation and is kept as a fine histogram (counts and sums), so that a fit takes little memory whatever the
number of tokens. A few hundred values' worth of a Gaussian is mixed in: it stands for what a small sample did not show
and weighs nothing in a large one.

Centroids shrink: regressing them on the values gives the slope 1 - D, and a student learns the shrunk targets. Levels
are therefore stretched by `unbiased_scale`, 1 / (1 - D), after which the slope is 1 (codec facts: docs/codecs.md).

Source: S. P. Lloyd, Least squares quantization in PCM, 1982; J. Max, Quantizing for minimum distortion, 1960.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RANGE = 8.0
_BINS = 4096
_ROUNDS = 40
_SMOOTH = 32
_PRIOR_PER_LEVEL = 2.0


class Histograms:
    """Counts, sums and extremes of values of several tables.

    Args:
        n_tables: how many.
        device: where they are kept.
    """

    def __init__(self, n_tables: int, device: str | torch.device = "cpu") -> None:
        self.n_tables = n_tables
        self._counts = torch.zeros(n_tables * _BINS, dtype=torch.float64, device=device)
        self._sums = torch.zeros(n_tables * _BINS, dtype=torch.float64, device=device)
        self.low = torch.full((n_tables,), -1.0, device=device)
        self.high = torch.full((n_tables,), 1.0, device=device)

    def add(self, values: Tensor, tables: Tensor) -> None:
        """Take in values.

        Args:
            values: (n, m) float32, in standard deviations.
            tables: (m,) int64, the table of each column.
        """
        bins = ((values + _RANGE) * (_BINS / (2 * _RANGE))).long().clamp_(0, _BINS - 1)
        places = bins.add_(tables * _BINS).reshape(-1)
        flat = values.reshape(-1).double()
        self._counts.index_add_(0, places, torch.ones_like(flat))
        self._sums.index_add_(0, places, flat)
        self.low.scatter_reduce_(0, tables, values.amin(dim=0), "amin")
        self.high.scatter_reduce_(0, tables, values.amax(dim=0), "amax")

    def levels(self, bits: int, tables: Tensor) -> Tensor:
        """Centroids of a Lloyd-Max quantiser for some of the tables.

        Args:
            bits: 1 to 8.
            tables: (n,) int64, which.

        Returns:
            (n, 2 ** bits) float64, ascending.
        """
        n_levels = 1 << bits
        counts, sums = self._with_prior(tables, _PRIOR_PER_LEVEL * n_levels)
        count = _cumulative(counts)
        total = _cumulative(sums)
        edges = self._first_edges(counts, n_levels)
        for _ in range(_ROUNDS):
            found = _centroids(count, total, edges)
            middles = (found[:, 1:] + found[:, :-1]) / 2
            edges = ((middles + _RANGE) * (_BINS / (2 * _RANGE))).clamp_(0, _BINS)
        return _centroids(count, total, edges).sort(dim=1).values

    def _with_prior(self, tables: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        centres = (torch.arange(_BINS, dtype=torch.float64, device=tables.device) + 0.5) * (2 * _RANGE / _BINS) - _RANGE
        gaussian = torch.exp(-centres.square() / 2)
        gaussian *= weight / gaussian.sum()
        counts = self._counts.reshape(self.n_tables, _BINS)[tables] + gaussian
        sums = self._sums.reshape(self.n_tables, _BINS)[tables] + gaussian * centres
        return counts, sums

    def _first_edges(self, counts: Tensor, n_levels: int) -> Tensor:
        """Cells that hold equal shares of the cube root of the density: the best ones at a high rate."""
        count = torch.nn.functional.pad(counts.cumsum(dim=1), (_SMOOTH, _SMOOTH), mode="replicate")
        smooth = count[:, 2 * _SMOOTH :] - count[:, : -2 * _SMOOTH]
        mass = smooth.clamp_min(0).pow(1 / 3).cumsum(dim=1)
        shares = torch.arange(1, n_levels, dtype=torch.float64, device=counts.device) / n_levels
        return torch.searchsorted(mass, mass[:, -1:] * shares).double()


def _cumulative(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _centroids(count: Tensor, total: Tensor, edges: Tensor) -> Tensor:
    """Means of the cells between (n, L - 1) edges, in bins and parts of bins; an empty cell takes its own middle."""
    first = torch.zeros((edges.shape[0], 1), dtype=edges.dtype, device=edges.device)
    ends = torch.cat((first, edges, first + _BINS), dim=1)
    n = _between(count, ends)
    mean = _between(total, ends) / n.clamp_min(1e-12)
    middle = (ends[:, 1:] + ends[:, :-1]) * (_RANGE / _BINS) - _RANGE
    return torch.where(n > 1e-9, mean, middle)


def _between(cumulative: Tensor, ends: Tensor) -> Tensor:
    """What lies between neighbouring ends, a bin being spread evenly."""
    below = ends.long().clamp_max_(_BINS - 1)
    at_below, at_above = cumulative.gather(1, below), cumulative.gather(1, below + 1)
    return torch.lerp(at_below, at_above, ends - below).diff(dim=1)


def thresholds_of(levels: Tensor) -> Tensor:
    """(n, L - 1) middles between (n, L) levels: a value above t belongs to the level over t."""
    return (levels[:, 1:] + levels[:, :-1]) / 2


def nearest_levels(values: Tensor, tables: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """Index of each value's cell, by bisection: `bits` rounds of one look-up each.

    Args:
        values: float32, any shape.
        tables: int32 or int64 that broadcasts to it: row of `thresholds` of each value.
        thresholds: (n, 2 ** bits) float32, ascending, the last column +inf.
        bits: 1 to 8.

    Returns:
        uint8 of the shape of `values`.
    """
    flat = thresholds.reshape(-1)
    first = tables << bits
    found = torch.zeros_like(values, dtype=first.dtype)
    for step in reversed(range(bits)):
        probe = (found + ((1 << step) - 1)).add_(first)
        above = values > torch.index_select(flat, 0, probe.reshape(-1)).reshape(values.shape)
        found.add_(above, alpha=1 << step)
    return found.to(torch.uint8)


def unbiased_scale(products: Tensor, squares: Tensor) -> Tensor:
    """What stretches levels so that the slope of decoded on original is 1.

    Args:
        products: sums of original times decoded, by table.
        squares: sums of squares of the originals.
    """
    return torch.where(products > 0, squares / products.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
