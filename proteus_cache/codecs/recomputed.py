"""How far a target that was computed again may be from the stored one.

Let t be what the teacher says now, s the stored target as it decodes, and Q(t) what t becomes when it is encoded and
decoded like the store's. The relative error of a view is |Q(t) - s| / |s|, over all values of the target. It has two
sources, and the tolerance is their sum:

    codec       2 |Q(t) - t| / |s|     s = Q(t') for a t' near t, and each of the two quantisations is off by about
                                       |Q(t) - t|, which is measured on this very view. Components that a codec leaves
                                       out are no part of it: they are missing on both sides. Two, because a value near
                                       a threshold may fall to either side of it, and because a pack may have been
                                       encoded again.
    precision   0.002 in fp32, 0.01 in fp16, 0.08 in bf16, by the coarser of then and now: another batch shape, device
                or precision. Three times the largest relative differences that were measured (fp16 0.3 %, bf16 2.7 %,
                DINOv2-g/14 on an H200 against fp32).

Two views of different images differ by far more: by 75 to 130 % of their norm in the median, for the trained teachers
that were looked at. A coarse codec must not hide such a swap, so the codec's part never lifts the tolerance above half
of the median distance between drawn views.

A pack may have been encoded again, from a cache whose codec is coarser than the pack's (`int4`, 20 dB) and which its
document does not name. So the tolerance of a pack is at least a quarter of that distance; the test of the cache is
sharper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from proteus_cache.codecs.codec import Codec

PRECISION: Final = {"fp32": 0.002, "fp16": 0.01, "bf16": 0.08}
"""Relative error that a precision may add."""
_MOST_KEPT: Final = 16
"""Stored targets whose distances from each other are measured."""
_OF_A_PACK: Final = 0.25
"""Of the distance between views, that the error in a pack may be: 12 dB or more, and an `int4` cache has 20 dB."""
_TINY: Final = 1e-30


@dataclass(frozen=True, slots=True)
class Measured:
    """One target of one view; all numbers relative to the norm of the stored target, but the cosine."""

    place: int
    """Among the views that were added."""
    error: float
    cosine: float
    """Of the angle between recomputed and stored target, all values in one vector."""
    codec_error: float
    """|Q(t) - t| without what the codec leaves out."""
    precision: str
    """The coarser of then and now."""

    def tolerance(self, distance: float | None, is_packed: bool) -> float:
        """The largest error that this view may have.

        Args:
            distance: median between views, relative; None where only one view is known, and 1 is taken.
            is_packed: the store is a pack.
        """
        allowed = PRECISION[self.precision]
        codec = 2 * self.codec_error
        between = 1.0 if distance is None else distance
        return max(allowed, min(allowed + codec, between / 2), _OF_A_PACK * between if is_packed else 0.0)


class TargetComparison:
    """One target over all drawn views."""

    def __init__(self, name: str, codec: Codec, is_packed: bool) -> None:
        self.name = name
        self.codec = codec
        self.is_packed = is_packed
        self.views: list[Measured] = []
        self._kept: list[Tensor] = []

    def add(self, tokens: Tensor, codes: Tensor, precisions: list[str]) -> None:
        """Compare a batch.

        Args:
            tokens: (B, *shape) float32, what the teacher says now.
            codes: (B, code_bytes) uint8, what is stored, on the same device.
            precisions: of each view, the coarser of then and now.
        """
        with torch.inference_mode():
            stored = self.codec.decode(codes).float()
            again = self.codec.decode(self.codec.encode(tokens)).float()
            left = _held_by(self.codec, tokens.float())
            flat = [values.reshape(len(precisions), -1) for values in (stored, again, left)]
            norm = flat[0].norm(dim=1).clamp_min(_TINY)
            errors = ((flat[1] - flat[0]).norm(dim=1) / norm).tolist()
            cosines = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=1).tolist()
            codec_errors = ((flat[1] - flat[2]).norm(dim=1) / norm).tolist()
        places = range(len(self.views), len(self.views) + len(precisions))
        columns = zip(places, errors, cosines, codec_errors, precisions, strict=True)
        self.views += [Measured(*column) for column in columns]
        self._kept += [row.cpu() for row in flat[0][: max(0, _MOST_KEPT - len(self._kept))]]

    @property
    def distance(self) -> float | None:
        """Median distance between stored targets of different views, relative to their norm; None for one view."""
        if len(self._kept) < 2:
            return None
        rows = torch.stack(self._kept)
        distances = torch.cdist(rows, rows) / rows.norm(dim=1, keepdim=True).clamp_min(_TINY)
        return float(distances[~torch.eye(len(rows), dtype=torch.bool)].median())

    def tolerance(self, view: Measured) -> float:
        """The largest error that a view may have."""
        return view.tolerance(self.distance, self.is_packed)

    def failures(self) -> list[tuple[Measured, float]]:
        """Views beyond their tolerance, with it; a number that is not finite is beyond any."""
        distance = self.distance
        limits = [(view, view.tolerance(distance, self.is_packed)) for view in self.views]
        return [(view, limit) for view, limit in limits if not view.error <= limit]


def _held_by(codec: Codec, tokens: Tensor) -> Tensor:
    """(B, *shape): tokens without the components that the codec leaves out."""
    basis = codec.basis
    if basis is None:
        return tokens
    patches = tokens[:, basis.n_lead :] - basis.mean
    kept = torch.matmul(torch.matmul(patches, basis.vectors), basis.vectors.T) + basis.mean
    return torch.cat([tokens[:, : basis.n_lead], kept], dim=1)
