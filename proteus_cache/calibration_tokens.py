"""Tokens of calibration views on their way to a fit: which views, how many may be kept, and in which type.

Extraction and packing both collect them here. What is kept stays below a quarter of the memory that is free, and of
what fitting `klt` leaves of it; with more than 2 GB it is kept in half precision, whose rounding (about -73 dB) is far
below the error of any codec that is fitted to many views.
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
from proteus_cache.codecs.names import parse_codec

logger = logging.getLogger(__name__)

MEMORY_SHARE = 4
"""One part in so many of the free memory may hold tokens."""
_FLOAT32_BYTES = 2_000_000_000
_FIT_TOKENS = 125_000
"""That a fit of `klt` holds as float32 components: 100,000 for tables and 25,000 to test them."""
_FIT_COPIES = 3.5
"""Of these: without and with the DCT, each with its levels, and what is being computed."""
_FEWEST = 64
"""Views to keep where a fit alone takes all of the memory, as long as they take no more than the usual part."""
_TABLES_FROM = 8
"""One view in so many tests the tables of a codec."""


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


def room_for(
    shapes: Mapping[str, tuple[int, ...]], n_views: int, free_bytes: int, codecs: Mapping[str, str] | None = None
) -> Room:
    """How many views to keep of those that are wanted, and in which type.

    Fitting `klt` holds components of up to 125,000 tokens beside what is kept here, about 3.5 times in float32: 2.7 GB
    for tokens of width 1,536. One target is fitted at a time. Where that leaves little, 64 views are still kept.

    Args:
        shapes: target name to the shape of one view's tokens.
        n_views: wanted.
        free_bytes: memory that is free now.
        codecs: target name to the codec that its tokens are for, as far as that is known.
    """
    n_values = sum(map(math.prod, shapes.values()))
    usual = free_bytes // MEMORY_SHARE
    left = max(0, free_bytes - _fit_bytes(shapes, n_views, codecs or {})) // MEMORY_SHARE
    is_large = 4 * n_values * n_views > min(_FLOAT32_BYTES, left)
    dtype = torch.float16 if is_large else torch.float32
    view_bytes = max(1, n_values * dtype.itemsize)
    fitting = max(left // view_bytes, min(_FEWEST, usual // view_bytes))
    return Room(max(1, min(n_views, fitting)), dtype)


def _fit_bytes(shapes: Mapping[str, tuple[int, ...]], n_views: int, codecs: Mapping[str, str]) -> int:
    """Memory that the largest fit of `klt` takes beside the tokens."""
    klt = [shapes[name] for name, codec in codecs.items() if parse_codec(codec).family == "klt"]
    n_bytes = (min(_FIT_TOKENS, shape[0] * n_views) * shape[-1] * 4 for shape in klt)
    return int(_FIT_COPIES * max(n_bytes, default=0))


def spread(n: int, n_all: int) -> NDArray[np.int64]:
    """`n` different numbers from 0 to `n_all` - 1, evenly spread; all of them where there are fewer."""
    n = min(n, n_all)
    return np.arange(n, dtype=np.int64) * n_all // max(1, n)


def warn_of_few_views(codecs: Mapping[str, str], reports: Mapping[str, CalibrationReport]) -> None:
    """One line where tables and transforms come from fewer views or tokens than they should, and what that means.

    Of a transform the expected loss is known; for tables alone, what the codec keeps of views that were left out.

    Args:
        codecs: target to its codec.
        reports: target to what fitting it showed.
    """
    few = {name: report for name, report in reports.items() if not report.is_enough}
    if not few:
        return
    first = next(iter(few.values()))
    losses = ", ".join(
        f"{name} {report.transform_bound_excess_bits:.2g}"
        for name, report in few.items()
        if report.transform_bound_excess_bits > 0
    )
    kept = ", ".join(
        f"{name} {report.snr_db:.1f} dB"
        for name, report in few.items()
        if report.transform_bound_excess_bits == 0 and report.n_views >= _TABLES_FROM
    )
    logger.warning(
        "codec %s is fitted to %s views with %s tokens; from %s views with %s tokens on it would do better%s%s",
        *(codecs[next(iter(few))], f"{first.n_views:,}", f"{first.n_tokens:,}"),
        *(f"{ENOUGH_IMAGES:,}", f"{ENOUGH_TOKENS:,}"),
        f": the expected loss is at least {losses} bits a value" if losses else "",
        f"; on views that it was not fitted to it keeps {kept}" if kept else "",
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
