"""All that is measured of one stream of tokens: the patches of a target, or its CLS tokens.

A block target holds a CLS token in front of its patches. The two differ in spread and in how codecs treat them, so each
is a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proteus_cache.codecs.calibration import expected_excess_bits
from proteus_cache.codecs.codec import Codec, read_as
from proteus_cache.codecs.int4 import Int4Codec
from proteus_cache.codecs.klt import KltCodec
from proteus_cache.codecs.waterfill import gaussian_rate
from proteus_cache.fidelity.axes import CONSTANT, MOST_GROUPS, AxisMeasures, AxisMeter, bootstrap_weights
from proteus_cache.fidelity.conditional import Conditional, ConditionalMeter
from proteus_cache.fidelity.per_token import TokenMeasures, TokenMeter
from proteus_cache.fidelity.sides import Entry
from proteus_cache.fidelity.spread import Spread


@dataclass(frozen=True, slots=True)
class Stream:
    """Some tokens of every view of a target."""

    name: str
    """ "cls", "patch", or for example "block.9 cls" and "block.9 patch"."""
    target: str
    tokens: slice
    """Of the (B, T, D) tokens of the target; T is 1 for `cls`."""
    n_tokens: int
    """In a view."""
    width: int
    codec: Codec
    code_bytes: float
    """Of its share of a view's codes."""

    @property
    def bits_per_value(self) -> float:
        """Gains, headers and padding included."""
        return 8 * self.code_bytes / (self.n_tokens * self.width)

    @property
    def klt(self) -> KltCodec | None:
        """The codec, where it leaves components out; never for tokens in front, which it stores whole."""
        codec = self.codec
        return codec if isinstance(codec, KltCodec) and self.tokens.start == codec.n_lead else None

    @property
    def coding(self) -> str:
        """What its tokens are coded by, for people."""
        return "float16" if isinstance(self.codec, KltCodec) and self.klt is None else self.codec.name

    def of(self, tokens: Tensor) -> Tensor:
        """(B, n_tokens, D) from the (B, *shape) tokens of the target."""
        return tokens.reshape(len(tokens), -1, self.width)[:, self.tokens]

    def widened(self, codes: Tensor) -> Tensor:
        """(B,) int64: steps of its tokens that an overflow widened, from the (B, code_bytes) codes of the target."""
        if isinstance(self.codec, Int4Codec):
            gains = read_as(codes[:, : 2 * self.codec.n_tokens], torch.float16)
            return (gains[:, self.tokens] < 0).sum(dim=1)
        if isinstance(self.codec, KltCodec) and self.klt is None:
            return torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        return self.codec.widened(codes)


@dataclass(frozen=True, slots=True)
class Loss:
    """What losses see of a codec's error."""

    noise_floor: float
    """Mean squared error along what losses look at, over all channels: what a perfect student would still show."""
    dropped_share: float
    """Share of the variance in components that the codec leaves out."""
    n_kept: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Bits a value, and the fewest that a Gaussian source of the same variances needs at the measured distortion."""

    bits_per_value: float
    code_bytes: float
    bound: float | None
    """Of the covariance of the measured tokens; None without any error or with too few tokens."""
    bound_doubt: float
    """Bits by which a covariance of so few tokens is expected to make the bound too low."""
    own_bound: float | None
    """Of the variances in the codec's own transform; for klt."""

    @property
    def gap(self) -> float | None:
        """Above the bound."""
        return None if self.bound is None else self.bits_per_value - self.bound

    @property
    def own_gap(self) -> float | None:
        """Above the bound of the codec's own transform."""
        return None if self.own_bound is None else self.bits_per_value - self.own_bound


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What was measured of one stream."""

    stream: Stream
    n_tokens: int
    n_images: int
    relative_error: float
    """Sum of squared errors over sum of squared deviations from the mean; infinite where all tokens are the same and
    an error has nothing to be compared with."""
    snr_error_db: float
    """Standard error of `snr_db`."""
    tokens: TokenMeasures
    channels: AxisMeasures
    components: AxisMeasures | None
    """Along what the codec keeps where it has a basis, else along the KLT of the measured tokens; None where these are
    too few to have one."""
    conditional: Conditional
    rate: Rate
    loss: Loss
    n_widened: int
    """Steps that an overflow widened."""
    n_widened_views: int

    @property
    def snr_db(self) -> float | None:
        """About the mean; None where nothing is lost, or where all tokens are the same."""
        return -10 * math.log10(self.relative_error) if 0 < self.relative_error < math.inf else None

    @property
    def judged(self) -> AxisMeasures:
        """The axes that the codec quantises along: components where it has a basis, else channels."""
        return self.components if self.stream.klt is not None and self.components is not None else self.channels


def streams_of(target: str, codec: Codec) -> list[Stream]:
    """The streams of a target: its patches, and its CLS tokens where it has some."""
    shape, width = codec.shape, codec.shape[-1]
    n_tokens = math.prod(shape[:-1])
    n_lead = _n_lead(target, shape)
    lead_bytes = float(codec.lead_bytes) if isinstance(codec, KltCodec) else codec.code_bytes * n_lead / n_tokens
    rest = Stream(
        target, target, slice(n_lead, n_tokens), n_tokens - n_lead, width, codec, codec.code_bytes - lead_bytes
    )
    if not n_lead:
        return [rest]
    lead = Stream(f"{target} cls", target, slice(0, n_lead), n_lead, width, codec, lead_bytes)
    return [lead, Stream(f"{target} patch", target, rest.tokens, rest.n_tokens, width, codec, rest.code_bytes)]


def _n_lead(target: str, shape: tuple[int, ...]) -> int:
    return 1 if target.startswith("block.") and len(shape) == 2 and shape[0] > 1 else 0


class StreamMeter:
    """Takes in exact and decoded tokens batch by batch.

    Args:
        stream: which tokens.
        spread: of all exact tokens that will come.
        images: number of each image key.
        device: of the batches.
    """

    def __init__(self, stream: Stream, spread: Spread, images: dict[str, int], device: torch.device) -> None:
        self.stream, self._spread, self._images, self._device = stream, spread, images, device
        self._n_groups = min(len(images), MOST_GROUPS)
        klt = stream.klt
        variances, vectors = spread.axes()
        self._variances = variances
        self._vectors = vectors.float() if klt is None else klt.vectors
        n_axes = self._vectors.shape[1]
        self._channels = AxisMeter(spread.mean.numel(), 0 if klt is not None else self._n_groups, device)
        self._components = AxisMeter(n_axes, self._n_groups if klt is not None else 0, device)
        judged = spread.covariance.diagonal() if klt is None else self._along(spread.covariance)
        varies = judged > CONSTANT * judged.mean()
        self._conditional = ConditionalMeter(torch.where(varies, judged, 0.0).sqrt(), spread.n_tokens)
        self._tokens = TokenMeter()
        self._energy = torch.zeros(self._n_groups, 2, dtype=torch.float64, device=device)
        self._own = torch.zeros(n_axes, stream.n_tokens, dtype=torch.float64, device=device) if klt else None
        self._n_views = 0
        self._widened = [0, 0]

    def add(self, original: Tensor, decoded: Tensor, codes: Tensor, entries: Sequence[Entry]) -> None:
        """Take in the (B, *shape) tokens of the stream's target and the (B, code_bytes) codes of `decoded`."""
        stream = self.stream
        original, decoded = stream.of(original), stream.of(decoded)
        groups = torch.tensor([self._images[entry.key] % self._n_groups for entry in entries], device=self._device)
        deviation = (original.double() - self._spread.mean).float()  # a large mean must cost no digits
        error = decoded - original
        along, error_along = deviation @ self._vectors, error @ self._vectors
        self._channels.add(deviation, error, groups)
        self._components.add(along, error_along, groups)
        judged = (deviation, error) if stream.klt is None else (along, error_along)
        self._conditional.add(judged[0].flatten(0, 1), judged[1].flatten(0, 1))
        self._tokens.add(original, decoded, self._spread.mean, entries, stream.tokens.start or 0)
        sums = [part.double().square().sum(dim=(1, 2)) for part in (deviation, error)]
        self._energy.index_add_(0, groups, torch.stack(sums, dim=1))
        self._add_codes(original, codes)

    def _add_codes(self, original: Tensor, codes: Tensor) -> None:
        klt = self.stream.klt
        widened = self.stream.widened(codes)
        self._widened[0] += int(widened.sum())
        self._widened[1] += int((widened > 0).sum())
        if klt is not None and self._own is not None:
            self._n_views += len(original)
            self._own += klt.coefficients(original).double().square().sum(dim=0)

    def finish(self) -> Fidelity:
        """What was taken in."""
        spread, stream = self._spread, self.stream
        channels, components = self._channels.finish(), self._components.finish()
        has_axes = stream.klt is not None or self._spread.says_a_bound
        energy, error = self._energy.sum(dim=0).tolist()
        relative = error / energy if energy > 0 else math.inf if error > 0 else 0.0
        return Fidelity(
            stream=stream,
            n_tokens=spread.n_tokens,
            n_images=len(self._images),
            relative_error=relative,
            snr_error_db=self._snr_error(),
            tokens=self._tokens.finish(),
            channels=channels,
            components=components if has_axes else None,
            conditional=self._conditional.finish(),
            rate=self._rate(error / (spread.n_tokens * stream.width)),
            loss=self._loss(channels, components),
            n_widened=self._widened[0],
            n_widened_views=self._widened[1],
        )

    def _snr_error(self) -> float:
        """Of the ratio in dB, by the bootstrap over images; 0 where there is no ratio."""
        if not bool(self._energy[:, 0].any()):
            return 0.0
        sums = bootstrap_weights(self._n_groups).to(self._device) @ self._energy
        ratio = sums[:, 1] / sums[:, 0].clamp_min(1e-300)
        return float((10 * ratio.clamp_min(1e-300).log10()).std(correction=0))

    def _rate(self, distortion: float) -> Rate:
        spread, stream = self._spread, self.stream
        is_enough = self._spread.says_a_bound and distortion > 0
        own = self._own_variances() if is_enough else None
        return Rate(
            bits_per_value=stream.bits_per_value,
            code_bytes=stream.code_bytes,
            bound=gaussian_rate(self._variances, distortion) if is_enough else None,
            bound_doubt=expected_excess_bits(spread.n_tokens, stream.width),
            own_bound=None if own is None else gaussian_rate(own, distortion),
        )

    def _own_variances(self) -> Tensor | None:
        """In the codec's transform, frequency by frequency; what it leaves out counts with its own best axes."""
        if self._own is None or self.stream.klt is None:
            return None
        kept = self._own / self._n_views
        kept = kept if self.stream.klt.has_dct else kept.mean(dim=1, keepdim=True)
        vectors = self._vectors.double()
        outside = torch.eye(len(vectors), dtype=torch.float64, device=self._device) - vectors @ vectors.T
        rest = torch.linalg.eigvalsh(outside @ self._spread.covariance @ outside).flip(0)
        rest = rest[: len(vectors) - vectors.shape[1]].unsqueeze(1).expand(-1, kept.shape[1])
        return torch.cat([kept, rest]).clamp_min(0)

    def _loss(self, channels: AxisMeasures, components: AxisMeasures) -> Loss:
        n_values = self._spread.n_tokens * self.stream.width
        if self.stream.klt is None:
            return Loss(channels.squared_error / n_values, 0.0, self.stream.width)
        total = float(self._spread.covariance.trace())
        kept = float(self._along(self._spread.covariance).sum())
        share = max(0.0, 1 - kept / total) if total > 0 else 0.0
        return Loss(components.squared_error / n_values, share, self._vectors.shape[1])

    def _along(self, covariance: Tensor) -> Tensor:
        """(K,) variances along the components."""
        vectors = self._vectors.double()
        return (vectors * (covariance @ vectors)).sum(dim=0)
