"""Error along axes (channels or components): how large, how slanted, how far off, and how sure one can be of it.

For every axis k, with z the original's deviation from the mean and e = decoded - original: sums of z z, z e, e e and e.
The slope of decoded on original is 1 + sum(z e) / sum(z z). Standard errors come from a bootstrap over images, for the
tokens of one image are far from independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 200
"""Of the bootstrap."""
MOST_GROUPS: Final = 1_024
"""More images than this are drawn in groups."""
CONSTANT: Final = 1e-6
"""An axis with less than this share of the mean variance counts as constant: a final norm leaves one such direction."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class AxisMeasures:
    """What was found along axes that vary; the first axis is 0."""

    n_axes: int
    n_constant: int
    """Axes without any variance, left out below."""
    relative_error: Tensor
    """(A,) squared error over variance; 0 along constant axes."""
    slope: Tensor
    """(A,) of decoded on original; 1 along constant axes."""
    slope_error: Tensor | None
    """(A,) standard errors; None where they were not asked for."""
    pooled_slope: Estimate | None
    """Over all axes together."""
    mean_error: Tensor
    """(A,) in standard deviations of the axis; 0 along constant ones."""
    mean_error_error: Tensor | None
    """(A,) standard errors of that."""
    squared_error: float
    """Sum over all axes and tokens."""


class AxisMeter:
    """Takes in deviations and errors batch by batch.

    Args:
        n_axes: A.
        n_groups: groups of images for the bootstrap; 0 for none.
        device: of the batches.
    """

    def __init__(self, n_axes: int, n_groups: int, device: torch.device) -> None:
        self._sums = torch.zeros(max(1, n_groups), 4, n_axes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(max(1, n_groups), dtype=torch.float64, device=device)
        self._has_groups = n_groups > 0

    def add(self, original: Tensor, error: Tensor, groups: Tensor) -> None:
        """Take in (B, T, A) float32 twice, and (B,) int64 groups of the B views."""
        original, error = original.double(), error.double()
        parts = (original.square(), original * error, error.square(), error)
        sums = torch.stack([part.sum(dim=1) for part in parts], dim=1)
        groups = groups if self._has_groups else torch.zeros_like(groups)
        self._sums.index_add_(0, groups, sums)
        self._counts.index_add_(0, groups, torch.full_like(sums[:, 0, 0], original.shape[1]))

    def finish(self) -> AxisMeasures:
        """What was taken in."""
        zz, ze, ee, e = self._sums.sum(dim=0)
        n = self._counts.sum()
        varies = zz > CONSTANT * zz.mean()
        safe = torch.where(varies, zz, torch.ones_like(zz))
        sd = (safe / n).sqrt()
        slope_error = mean_error_error = pooled = None
        if self._has_groups:
            slope_error, mean_error_error, pooled = self._bootstrap(varies, sd)
        return AxisMeasures(
            n_axes=len(zz),
            n_constant=int((~varies).sum()),
            relative_error=torch.where(varies, ee / safe, 0.0).cpu(),
            slope=torch.where(varies, 1 + ze / safe, 1.0).cpu(),
            slope_error=slope_error,
            pooled_slope=pooled,
            mean_error=torch.where(varies, e / n / sd, 0.0).cpu(),
            mean_error_error=mean_error_error,
            squared_error=float(ee.sum()),
        )

    def _bootstrap(self, varies: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Estimate]:
        weights = bootstrap_weights(len(self._counts)).to(self._sums.device)
        zz, ze, _, e = (weights @ self._sums[:, row] for row in range(4))
        slopes = 1 + ze / torch.where(zz > 0, zz, 1.0)
        means = e / (weights @ self._counts).unsqueeze(1) / sd
        total_zz, total_ze = zz[:, varies].sum(dim=1), ze[:, varies].sum(dim=1)
        whole = self._sums.sum(dim=0)
        value = 1 + float(whole[1, varies].sum() / whole[0, varies].sum().clamp_min(1e-300))
        pooled = Estimate(value, float((total_ze / total_zz.clamp_min(1e-300)).std(correction=0)))
        zero = torch.zeros_like(sd)
        return (
            torch.where(varies, slopes.std(dim=0, correction=0), zero).cpu(),
            torch.where(varies, means.std(dim=0, correction=0), zero).cpu(),
            pooled,
        )


def bootstrap_weights(n_groups: int) -> Tensor:
    """(ROUNDS, n_groups) float64: how often each group is drawn in each round; the same draws in every call."""
    draws = torch.randint(n_groups, (ROUNDS, n_groups), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(ROUNDS, n_groups, dtype=torch.float64)
    return weights.scatter_add_(1, draws, torch.ones_like(weights))


def sure_factor(n_axes: int) -> float:
    """How many standard errors one of so many axes exceeds by chance as rarely as a single one exceeds three."""
    return NormalDist().inv_cdf(1 - (1 - NormalDist().cdf(3.0)) / max(1, n_axes))
