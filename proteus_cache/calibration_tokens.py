"""Tokens of calibration views on their way to a fit: which views, how many may be kept, and in which type.

Extraction and packing both collect them here. What is kept stays below a quarter of the memory that is free; with
more than 2 GB it is kept in half precision, whose rounding (about -73 dB) is far below the error of any codec that is
fitted to many views.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.codecs.calibration import ENOUGH_IMAGES, ENOUGH_TOKENS, CalibrationReport

logger = logging.getLogger(__name__)

MEMORY_SHARE = 4
"""One part in so many of the free memory may hold tokens."""
_FLOAT32_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Room:
    """What may be kept."""

    n_views: int
    dtype: torch.dtype


def enough_images(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """2,000, or more where views have few tokens: 100,000 to fit to, when every eighth view only tests the tables.

    Args:
        shapes: target name to the shape of one view's tokens, (T, D).
    """
    n_tokens = min(shape[0] for shape in shapes.values())
    return max(ENOUGH_IMAGES, -(-ENOUGH_TOKENS * 8 // (7 * n_tokens)) + 8)


def room_for(shapes: Mapping[str, tuple[int, ...]], n_views: int, free_bytes: int) -> Room:
    """How many views to keep of those that are wanted, and in which type.

    Args:
        shapes: target name to the shape of one view's tokens.
        n_views: wanted.
        free_bytes: memory that is free now.
    """
    n_values = sum(map(math.prod, shapes.values()))
    is_large = 4 * n_values * n_views > min(_FLOAT32_BYTES, free_bytes // MEMORY_SHARE)
    dtype = torch.float16 if is_large else torch.float32
    fitting = free_bytes // MEMORY_SHARE // max(1, n_values * dtype.itemsize)
    return Room(max(1, min(n_views, int(fitting))), dtype)


def spread(n: int, n_all: int) -> NDArray[np.int64]:
    """`n` different numbers from 0 to `n_all` - 1, evenly spread; all of them where there are fewer."""
    n = min(n, n_all)
    return np.arange(n, dtype=np.int64) * n_all // max(1, n)


def warn_of_few_views(codecs: Mapping[str, str], reports: Mapping[str, CalibrationReport]) -> None:
    """One line where tables and transforms come from fewer views or tokens than they should.

    Args:
        codecs: target to its codec.
        reports: target to what fitting it showed.
    """
    few = {name: report for name, report in reports.items() if not report.is_enough}
    if not few:
        return
    first = next(iter(few.values()))
    losses = [
        f"{name} {report.transform_bound_excess_bits:.2g}"
        for name, report in few.items()
        if report.transform_bound_excess_bits > 0
    ]
    logger.warning(
        "codec %s is fitted to %s views with %s tokens; from %s views with %s tokens on it would do better%s",
        *(codecs[next(iter(few))], f"{first.n_views:,}", f"{first.n_tokens:,}"),
        *(f"{ENOUGH_IMAGES:,}", f"{ENOUGH_TOKENS:,}"),
        f": the expected loss is at least {', '.join(losses)} bits a value" if losses else "",
    )


class TokenStore:
    """Tokens of one or several targets, on the CPU, filled batch by batch."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], room: Room) -> None:
        """
        Args:
            shapes: target name to the shape of one view's tokens.
            room: for how many views, and in which type.
        """
        self._kept = {name: torch.empty((room.n_views, *shape), dtype=room.dtype) for name, shape in shapes.items()}
        self._room = room
        self.n_views = 0

    @property
    def n_missing(self) -> int:
        """Views that there is room for."""
        return self._room.n_views - self.n_views

    def add(self, tokens: Mapping[str, Tensor]) -> None:
        """Keep (B, *shape) tokens of each target; what there is no room for is left out."""
        n = self.n_views
        for name, kept in self._kept.items():
            kept[n:].narrow(0, 0, min(len(tokens[name]), self.n_missing)).copy_(tokens[name][: self.n_missing])
        self.n_views += min(len(next(iter(tokens.values()))), self.n_missing)

    def tokens(self) -> dict[str, Tensor]:
        """(n, *shape) of each target."""
        return {name: kept[: self.n_views] for name, kept in self._kept.items()}
