"""Where exact tokens lie and how they spread: mean, covariance and its axes, in one pass over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LEAST_TOKENS_A_CHANNEL: Final = 2


@dataclass(frozen=True, slots=True)
class Spread:
    """Second-order statistics of tokens."""

    n_tokens: int
    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, about the mean."""

    @property
    def says_a_bound(self) -> bool:
        """Whether there are enough tokens for the covariance to say something of a rate, and of axes."""
        return self.n_tokens >= LEAST_TOKENS_A_CHANNEL * len(self.mean)

    def axes(self) -> tuple[Tensor, Tensor]:
        """(D,) variances, descending, and (D, D) their directions in columns: the KLT of these tokens."""
        variances, vectors = torch.linalg.eigh(self.covariance)
        return variances.clamp_min(0).flip(0), vectors.flip(1)


class SpreadMeter:
    """Takes in tokens batch by batch. Sums are float64, about the first batch's mean: a large mean cancels nothing."""

    def __init__(self) -> None:
        self._n = 0
        self._centre: Tensor | None = None

    def add(self, tokens: Tensor) -> None:
        """Take in (n, D) float32."""
        tokens = tokens.double()
        if self._centre is None:
            self._centre = tokens.mean(dim=0)
            self._sum = torch.zeros_like(self._centre)
            self._products = torch.zeros(2 * tuple(self._centre.shape), dtype=torch.float64, device=tokens.device)
        tokens = tokens - self._centre
        self._n += len(tokens)
        self._sum += tokens.sum(dim=0)
        self._products.addmm_(tokens.T, tokens)

    def finish(self) -> Spread:
        """What was taken in; at least one token."""
        assert self._centre is not None
        shift = self._sum / self._n
        covariance = self._products / self._n - torch.outer(shift, shift)
        return Spread(self._n, self._centre + shift, (covariance + covariance.T) / 2)
