"""Calibration views: what they must be for a codec to be fitted to them, and what a fit reports."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from proteus_cache.errors import ConfigError

ENOUGH_IMAGES = 2_000
ENOUGH_TOKENS = 100_000
"""Below either, a transform and tables follow their sample closely enough to cost bits (docs/codecs.md)."""
_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What fitting a codec showed. Stored with its parameters, so that a plan can show it again."""

    n_views: int
    n_tokens: int
    snr_db: float
    """Signal-to-noise ratio about the mean, on calibration views that the tables were not fitted to; components that
    are left out count as decoded to their mean."""
    bits_per_value: float
    """All bytes of the codes (whole tokens in front apart) over patches and channels."""
    gap_bits: float
    """Bits per value above the Gaussian bound of the codec's own transform at the same distortion."""
    n_kept: int
    """Components (or channels) that have bits, of `width`."""
    width: int
    dct: bool
    """Whether a 2-D DCT over the patch grid follows the transform over channels."""
    dct_saves_bits: float
    """Bits per value that the DCT saves, or would save, at this distortion."""
    transform_bound_excess_bits: float
    """Bits per value that a transform and variances of so few tokens are expected to cost."""

    @property
    def is_enough(self) -> bool:
        """Whether as many images and tokens as are asked for were there."""
        return self.n_views >= ENOUGH_IMAGES and self.n_tokens >= ENOUGH_TOKENS

    def to_tensor(self) -> Tensor:
        """All fields in their order, float64."""
        return torch.tensor([float(value) for value in astuple(self)], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> CalibrationReport:
        """What `to_tensor` wrote."""
        kinds = {"int": int, "bool": bool, "float": float}
        numbers = dict(zip([field.name for field in fields(cls)], values.tolist(), strict=True))
        return cls(**{field.name: kinds[str(field.type)](numbers[field.name]) for field in fields(cls)})


def expected_excess_bits(n_tokens: int, width: int) -> float:
    """Bits per value that the transform of an estimated covariance costs: (D + 1) / (4 n) nats, n independent tokens.

    Tokens of one image are not independent, so with few images it costs more than this.

    Source: asymptotic excess description length of a Gaussian with unknown covariance.
    """
    return (width + 1) / (4 * max(1, n_tokens)) / math.log(2)


def check_calibration(codec: str, tokens: Tensor) -> None:
    """Refuse tokens that nothing can be learnt from.

    Args:
        codec: for the message.
        tokens: (n, *shape) of calibration views.

    Raises:
        ConfigError: there are too few, one is not finite, or they do not vary.
    """
    width = tokens.shape[-1]
    n_tokens = tokens.numel() // max(1, width)
    needed = {"int8": 1, "int4": 64}.get(codec, 4 * width)
    if tokens.shape[0] == 0 or n_tokens < needed:
        raise ConfigError(
            f"codec {codec} is fitted to tokens of calibration views; {needed} are needed and there are {n_tokens}: "
            "give more images, or choose int8"
        )
    varies = False
    for first in range(0, tokens.shape[0], _AT_ONCE):
        part = tokens[first : first + _AT_ONCE]
        is_finite = torch.isfinite(part).reshape(part.shape[0], -1).all(dim=1)
        if not bool(is_finite.all()):
            number = first + int((~is_finite).nonzero()[0])
            raise ConfigError(
                f"codec {codec}: view {number} of the {tokens.shape[0]} calibration views holds NaN or infinite tokens"
            )
        varies = varies or bool((part.reshape(-1, width) != tokens.reshape(-1, width)[0]).any())
    if codec != "int8" and not varies:
        raise ConfigError(f"codec {codec}: the tokens of all calibration views are the same; it has nothing to fit")


N_NUMBERS = len(fields(CalibrationReport))
"""Of `CalibrationReport.to_tensor`."""
