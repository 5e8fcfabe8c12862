"""Rate against distortion of every codec, found by coding exact tokens anew.

Each codec is fitted to views of other images and measured on the views that everything else is measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from proteus_cache.codecs.codec import Codec, fit_codec
from proteus_cache.codecs.waterfill import gaussian_rate
from proteus_cache.errors import ConfigError
from proteus_cache.fidelity.spread import Spread
from proteus_cache.fidelity.stream import Stream, streams_of

CODECS: Final = ("float16", "int8", "int4", *(f"klt:{goal}dB" for goal in (10, 14, 20, 27)))
MOST_VALUES: Final = 64_000_000
"""Values that are kept to fit codecs to, and as many to measure them on."""
BOUND_DB: Final = tuple(range(1, 81))
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One codec."""

    codec: str
    bits_per_value: float
    snr_db: float | None
    """None where nothing is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Every codec on the tokens of one stream, with the bound."""

    stream: str
    n_fitted: int
    """Views that codecs were fitted to."""
    n_measured: int
    """Views that they were measured on."""
    points: tuple[CurvePoint, ...]
    missing: tuple[str, ...]
    """Codecs that could not be fitted, with the reason."""
    bound: tuple[tuple[float, float], ...]
    """Bits a value and dB of a Gaussian source with the covariance of the measured tokens."""


class Keeper:
    """Exact tokens of one target, up to a number of values: what a curve is made from."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._parts: dict[str, list[Tensor]] = {"bank": [], "measured": []}

    def add(self, part: str, tokens: Tensor) -> None:
        """Keep (B, *shape) tokens of the part "bank" or "measured" while there is room."""
        kept = self._parts[part]
        room = MOST_VALUES - sum(each.numel() for each in kept)
        n = min(len(tokens), room // max(1, tokens[0].numel()))
        if n > 0:
            kept.append(tokens[:n].cpu().clone())

    def curve(self, spread: Spread, device: torch.device, said: Callable[[str], None]) -> Curve | None:
        """The curve of the target's patches; None without views to fit to, or where the measured ones do not vary.

        Args:
            spread: of the measured patches.
            device: where codecs are fitted and run.
            said: called with what is done next.
        """
        if not self._parts["bank"] or not self._parts["measured"] or float(spread.covariance.trace()) <= 0:
            return None
        bank, measured = (torch.cat(self._parts[part]) for part in ("bank", "measured"))
        points, missing, stream = [], [], ""
        for name in CODECS:
            said(f"tries {name}")
            try:
                codec = fit_codec(name, bank, device=device)
            except ConfigError as error:
                missing.append(f"{name}: {error}")
                continue
            part = streams_of(self.target, codec)[-1]
            stream = part.name
            points.append(_point(part, measured, spread, device))
        return Curve(
            stream=stream,
            n_fitted=len(bank),
            n_measured=len(measured),
            points=tuple(points),
            missing=tuple(missing),
            bound=tuple(bound_curve(spread)) if spread.says_a_bound else (),
        )


def bound_curve(spread: Spread) -> Iterator[tuple[float, float]]:
    """Bits a value and dB along the Gaussian bound."""
    variances, _ = spread.axes()
    for decibel in BOUND_DB:
        bits = gaussian_rate(variances, float(variances.mean()) * 10 ** (-decibel / 10))
        if math.isfinite(bits):
            yield bits, float(decibel)


def _point(stream: Stream, tokens: Tensor, spread: Spread, device: torch.device) -> CurvePoint:
    codec: Codec = stream.codec.to(device)
    mean = spread.mean.to(device)
    error = energy = 0.0
    with torch.inference_mode():
        for batch in torch.split(tokens, _BATCH):
            exact = batch.to(device)
            decoded = stream.of(codec.decode(codec.encode(exact.clone())))
            error += float((decoded - stream.of(exact)).double().square().sum())
            energy += float((stream.of(exact).double() - mean).square().sum())
    snr = None if error == 0 or energy == 0 else -10 * math.log10(error / energy)
    return CurvePoint(codec=codec.name, bits_per_value=stream.bits_per_value, snr_db=snr)
