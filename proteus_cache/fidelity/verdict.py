"""Whether what was measured is what a codec promises: unbiased, and as good as its name says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from proteus_cache.codecs.names import parse_codec
from proteus_cache.fidelity.axes import sure_factor
from proteus_cache.fidelity.stream import Fidelity

SLOPE_TOLERANCE: Final = 0.005
MEAN_TOLERANCE: Final = 0.01
"""Of the mean error, in standard deviations of the axis."""
GOAL_TOLERANCE_DB: Final = 0.3
SURE: Final = 3.0
"""Standard errors that a single number may be off by chance."""
LEAST_IMAGES: Final = 30
"""With fewer images the standard errors themselves are unknown."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Gates that a stream passed or failed."""

    is_good: bool | None
    """None where nothing could be judged."""
    reasons: tuple[str, ...]
    """What failed, or why nothing was judged."""


def judge(found: Fidelity) -> Verdict:
    """Slope, mean error and goal of one stream.

    A number fails when it is off by more than its tolerance plus three standard errors. Of many axes some are off by
    more than three by chance, so for single axes the factor grows with their number: see `sure_factor`.
    """
    if found.relative_error == 0:
        return Verdict(True, ())
    if math.isinf(found.relative_error):
        return Verdict(None, ("all exact tokens are the same, so there is nothing to compare the error with",))
    if found.n_images < LEAST_IMAGES:
        return Verdict(None, (f"too few images to judge ({found.n_images} of at least {LEAST_IMAGES})",))
    reasons = [*_slope(found), *_mean(found), *_goal(found)]
    return Verdict(not reasons, tuple(reasons))


def outside(values: Tensor, errors: Tensor, target: float, tolerance: float, factor: float) -> Tensor:
    """(A,) which values are off by more than their tolerance and `factor` standard errors."""
    return (values - target).abs() > tolerance + factor * errors


def axis_word(found: Fidelity) -> str:
    """What the judged axes are called."""
    return "channel" if found.stream.klt is None else "component"


def _slope(found: Fidelity) -> list[str]:
    axes = found.judged
    pooled = axes.pooled_slope
    assert axes.slope_error is not None
    assert pooled is not None
    reasons = []
    if abs(pooled.value - 1) > SLOPE_TOLERANCE + SURE * pooled.standard_error:
        reasons.append(f"slope {pooled.value:.4f} over all {axis_word(found)}s, not 1")
    factor = sure_factor(axes.n_axes)
    is_off = outside(axes.slope, axes.slope_error, 1.0, SLOPE_TOLERANCE, factor)
    if bool(is_off.any()):
        reasons.append(_worst("slope", axes.slope, 1.0, axes.slope_error, is_off, axis_word(found)))
    return reasons


def _mean(found: Fidelity) -> list[str]:
    axes = found.judged
    assert axes.mean_error_error is not None
    factor = sure_factor(axes.n_axes)
    is_off = outside(axes.mean_error, axes.mean_error_error, 0.0, MEAN_TOLERANCE, factor)
    if not bool(is_off.any()):
        return []
    return [_worst("mean error", axes.mean_error, 0.0, axes.mean_error_error, is_off, axis_word(found))]


def _worst(what: str, values: Tensor, target: float, errors: Tensor, is_off: Tensor, word: str) -> str:
    distance = torch.where(is_off, (values - target).abs() - errors, -torch.inf)
    axis = int(distance.argmax())
    return (
        f"{what} {float(values[axis]):.4f} +- {float(errors[axis]):.4f} along {word} {axis}, and "
        f"{int(is_off.sum())} of {len(values)} {word}s are off"
    )


def _goal(found: Fidelity) -> list[str]:
    if found.stream.klt is None:
        return []
    choice = parse_codec(found.stream.codec.name)
    if choice.goal_db is not None and found.snr_db is not None:
        missing = choice.goal_db - found.snr_db
        if missing > GOAL_TOLERANCE_DB + SURE * found.snr_error_db:
            return [f"{found.snr_db:.2f} dB, and {choice.name} promises {choice.goal_db:g}"]
    if choice.goal_bytes is not None and found.stream.code_bytes > choice.goal_bytes:
        return [f"{found.stream.code_bytes:,.0f} bytes, and {choice.name} promises {choice.goal_bytes:,}"]
    return []
