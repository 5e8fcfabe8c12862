"""Mean error given the original value: what a codec does to small and to large values that no slope shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

N_BINS: Final = 40
REACH: Final = 4.0
"""Standard deviations on each side; the outer bins hold all beyond."""
MOST_VALUES: Final = 50_000_000
"""Of more values, those of evenly spread tokens are binned."""
LEAST_COUNT: Final = 1_000
"""Bins with fewer values say nothing of the largest mean error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditional:
    """Errors in bins of the original value, both in standard deviations of their axis."""

    counts: tuple[int, ...]
    mean_errors: tuple[float, ...]
    """0 in empty bins."""
    standard_errors: tuple[float, ...]
    """As if all values were independent, so rather too small."""

    @property
    def largest(self) -> float | None:
        """Largest mean error of a bin with enough values; None without any."""
        pairs = zip(self.counts, self.mean_errors, strict=True)
        return max((abs(error) for count, error in pairs if count >= LEAST_COUNT), default=None)

    @property
    def rms(self) -> float:
        """Root mean square of the mean errors, by count."""
        total = sum(count * error**2 for count, error in zip(self.counts, self.mean_errors, strict=True))
        return float((total / max(1, sum(self.counts))) ** 0.5)


class ConditionalMeter:
    """Takes in deviations and errors batch by batch.

    Args:
        scale: (A,) standard deviations of the axes; 0 leaves an axis out.
        n_tokens: that will come.
    """

    def __init__(self, scale: Tensor, n_tokens: int) -> None:
        self._axes = (scale > 0).nonzero().squeeze(1)
        self._scale = scale[self._axes].float()
        self._stride = max(1, -(-n_tokens * max(1, len(self._axes)) // MOST_VALUES))
        self._seen = 0
        self._sums = torch.zeros(3, N_BINS, dtype=torch.float64, device=scale.device)

    def add(self, original: Tensor, error: Tensor) -> None:
        """Take in (n, A) float32 twice."""
        offset = -self._seen % self._stride
        self._seen += len(original)
        chosen = slice(offset, None, self._stride)
        values = (original[chosen][:, self._axes] / self._scale).reshape(-1)
        errors = (error[chosen][:, self._axes] / self._scale).reshape(-1).double()
        bins = ((values + REACH) * (N_BINS / (2 * REACH))).long().clamp_(0, N_BINS - 1)
        for row, weights in enumerate((None, errors, errors.square())):
            self._sums[row] += torch.bincount(bins, weights, minlength=N_BINS)

    def finish(self) -> Conditional:
        """What was taken in."""
        counts, errors, squares = self._sums.cpu()
        n = counts.clamp_min(1)
        return Conditional(
            counts=tuple(int(count) for count in counts.tolist()),
            mean_errors=tuple((errors / n).tolist()),
            standard_errors=tuple((((squares / n) - (errors / n).square()).clamp_min(0) / n).sqrt().tolist()),
        )
