"""Error of single tokens: their distribution from a bounded sample of them, and the worst of all by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from proteus_cache.fidelity.sides import Entry

MOST_KEPT: Final = 1 << 20
"""Tokens whose numbers are kept; of more, evenly spread ones."""
_N_NUMBERS = 3
_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """The token with the largest relative error."""

    relative_error: float
    key: str
    view: str
    token: int
    """Its number in the view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMeasures:
    """Over all tokens of a stream."""

    worst: WorstToken | None
    """None where all tokens are the mean."""
    relative_error_p999: float
    """99.9th percentile of |e|^2 / |y - mean|^2."""
    cosine_mean: float
    cosine_p1: float
    """1st percentile of the cosine of decoded and exact tokens."""
    centred_cosine_mean: float
    centred_cosine_p1: float
    """The same once the mean token is taken off both."""


class TokenMeter:
    """Takes in tokens batch by batch."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._n_kept = self._n_seen = 0
        self._stride = 1
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._worst: WorstToken | None = None

    def add(self, original: Tensor, decoded: Tensor, mean: Tensor, entries: Sequence[Entry], first: int) -> None:
        """Take in (B, T, D) float32 exact and decoded tokens of B views; they begin at token `first` of each."""
        original, decoded = original.double(), decoded.double()
        deviation = original - mean
        energy = deviation.square().sum(dim=-1)
        error = (decoded - original).square().sum(dim=-1)
        # A token that is the mean itself has no direction and nothing to compare an error with.
        ratio = torch.where(energy > 0, error / energy.clamp_min(1e-300), torch.zeros_like(error))
        cosine = cosine_similarity(original, decoded, dim=-1, eps=_TINY)
        centred = torch.where(energy > 0, cosine_similarity(deviation, decoded - mean, dim=-1, eps=_TINY), 1.0)
        self._sums += torch.stack([cosine.sum(), centred.sum()]).cpu()
        self._keep(torch.stack([ratio, cosine, centred]).reshape(_N_NUMBERS, -1).cpu())
        place = int(ratio.argmax())
        largest = float(ratio.reshape(-1)[place])
        if self._worst is None or largest > self._worst.relative_error:
            entry, token = entries[place // ratio.shape[1]], first + place % ratio.shape[1]
            self._worst = WorstToken(relative_error=largest, key=entry.key, view=entry.view, token=token)

    def finish(self) -> TokenMeasures:
        """What was taken in."""
        ratio, cosine, centred = torch.cat(self._kept, dim=1)
        means = (self._sums / self._n_seen).tolist()
        return TokenMeasures(
            worst=self._worst,
            relative_error_p999=percentile(ratio, 99.9),
            cosine_mean=means[0],
            cosine_p1=percentile(cosine, 1),
            centred_cosine_mean=means[1],
            centred_cosine_p1=percentile(centred, 1),
        )

    def _keep(self, numbers: Tensor) -> None:
        """Every `stride`-th token so far; the stride doubles when there are too many."""
        offset = -self._n_seen % self._stride
        self._n_seen += numbers.shape[1]
        chosen = numbers[:, offset :: self._stride].clone()
        self._kept.append(chosen)
        self._n_kept += chosen.shape[1]
        if self._n_kept > MOST_KEPT:
            self._kept = [torch.cat(self._kept, dim=1)[:, ::2].clone()]
            self._n_kept = self._kept[0].shape[1]
            self._stride *= 2


def percentile(values: Tensor, percent: float) -> float:
    """Of (n,) values, n at least 1, linear between neighbours; of millions too, which torch.quantile refuses."""
    ordered = values.double().sort().values
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
