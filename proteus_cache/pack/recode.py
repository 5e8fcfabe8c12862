"""From the codes of a cache to the codes of a pack: the same bytes, or encoded again by another codec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.cache.reader import Cache
from proteus_cache.calibration_tokens import enough_images, warn_of_few_views
from proteus_cache.codecs import Codec, codec_for_target, fit_codec, load_codec
from proteus_cache.codecs.codec import largest_value
from proteus_cache.codecs.names import parse_codec, wants_many_views
from proteus_cache.errors import ConfigError, UsageError
from proteus_cache.pack.document import PackTarget
from proteus_cache.pack.sampling import Progress, refuse_unusable, sample_tokens
from proteus_cache.plan import human_bytes

_FEW_VIEWS = 256
"""Enough for a codec that only needs a scale for each channel."""
_MEASURED_AT_ONCE = 16
_BYTES_AT_ONCE = 32 << 20
"""Of tokens in float32, so that a thread needs little memory and its caches hold what it works on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondStep:
    """What encoding again adds, on views that the codec was not fitted to."""

    target: str
    source: str
    """Codec of the cache."""
    source_db: float | None
    """That the cache's codec keeps of the teacher's tokens, as its calibration showed; None where it has none."""
    codec: str
    """Of the pack."""
    added_db: float | None
    """Signal to noise of the pack's decoded tokens about the cache's; None: without any noise, or not measured."""
    n_fitted: int
    """Views that the pack's codec was fitted to; 0 for one without parameters."""
    n_measured: int
    """Views that the ratio was measured on."""
    source_bytes: int
    """Codes of one view in the cache."""
    code_bytes: int
    """Codes of one view in the pack."""

    @property
    def total_db(self) -> float | None:
        """Both steps together, their errors taken as independent; None where one of them is not known."""
        if self.source_db is None or self.added_db is None:
            return None
        return -10 * math.log10(10 ** (-self.source_db / 10) + 10 ** (-self.added_db / 10))

    def lines(self) -> list[str]:
        """For people."""
        sizes = f"{human_bytes(self.source_bytes)} to {human_bytes(self.code_bytes)} of codes a view"
        first = f"recoded   {self.target} from {self.source} to {self.codec}: {sizes}"
        if self.n_measured == 0:
            return [first, "          what that adds is not measured: the cache has no view that it was not fitted to"]
        if self.added_db is None:
            return [f"{first}, and nothing is lost"]
        added = f"          {self.added_db:.1f} dB of what the cache holds, on {self.n_measured:,} other views"
        if self.total_db is None:
            return [first, added if self.source == "float32" else f"{added}; the error of {self.source} comes on top"]
        return [first, f"{added}; with the {self.source_db:.1f} dB of {self.source} about {self.total_db:.1f} dB"]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"total_db": self.total_db}


@dataclass(frozen=True, slots=True)
class Recoded:
    """Codes of the pack, and how many of their steps an overflow widened."""

    codes: list[NDArray[np.uint8]]
    """(code_bytes,) uint8 each."""
    n_widened: int


@dataclass(frozen=True)
class Recoding:
    """How one target of the pack comes from the cache."""

    target: PackTarget
    blob: bytes | None
    """Parameters of the pack's codec."""
    decoder: Codec | None
    encoder: Codec | None
    """Both None where the cache's codes are taken as they are."""
    step: SecondStep | None = None
    """What is known of it; None likewise."""

    @property
    def views_at_once(self) -> int:
        """Views in one call of the codecs."""
        return max(1, _BYTES_AT_ONCE // (4 * math.prod(self.target.shape)))

    @property
    def working_bytes(self) -> int:
        """Memory of one call of the codecs, about: some ten times its tokens in float32."""
        return 10 * 4 * self.views_at_once * math.prod(self.target.shape)

    def apply(self, codes: Sequence[NDArray[np.uint8]], keys: Sequence[str]) -> Recoded:
        """The pack's codes from the cache's codes of the same views.

        Args:
            codes: (code_bytes,) uint8 each.
            keys: of the same views, for messages.

        Raises:
            UsageError: a value is not finite, or beyond what the codec can hold; names the sample.
        """
        if self.decoder is None or self.encoder is None:
            return Recoded(list(codes), 0)
        recoded: list[NDArray[np.uint8]] = []
        n_widened = 0
        for first in range(0, len(codes), self.views_at_once):
            part = slice(first, first + self.views_at_once)
            with torch.inference_mode():
                tokens = self.decoder.decode(torch.from_numpy(np.stack(codes[part])))
                self._check(tokens.abs().amax(dim=-1) <= largest_value(self.encoder.name), keys[part])
                encoded = self.encoder.encode(tokens)
                self._check(_are_finite(self.encoder, encoded), keys[part])
                n_widened += int(self.encoder.widened(encoded).sum())
            recoded.extend(encoded.numpy())
        return Recoded(recoded, n_widened)

    def _check(self, is_usable: Tensor, keys: Sequence[str]) -> None:
        assert self.encoder is not None, "only what is encoded again is checked"
        refuse_unusable(is_usable, keys, target=self.target.name, codec=self.encoder.name)


def _are_finite(codec: Codec, codes: Tensor) -> Tensor:
    """(B, ...) bool: what codes decode to; components tell it for less work than channels."""
    if codec.basis is None:
        return torch.isfinite(codec.decode(codes)).reshape(codes.shape[0], -1)
    lead, components = codec.components(codes)
    return torch.cat([torch.isfinite(part).reshape(codes.shape[0], -1) for part in (lead, components)], dim=1)


@dataclass(frozen=True, slots=True)
class KnownStep:
    """A second step that an earlier start of the same pack has planned."""

    target: PackTarget
    blob: bytes | None
    step: SecondStep


def plan_recodings(
    cache: Cache,
    names: Sequence[str] | None,
    codec: str | None,
    view: str,
    *,
    known: Mapping[str, KnownStep] | None = None,
    progress: Progress | None = None,
) -> list[Recoding]:
    """What becomes of each target.

    Args:
        cache: where from.
        names: targets to take, in the cache's order whatever the order here; None takes all.
        codec: as in extract; None keeps every target's codec.
        view: view index whose stored views a codec is fitted to and measured on.
        known: target name to what need not be fitted again.
        progress: of the reading of views that a codec is fitted to.

    Raises:
        UsageError: the cache has no such target, or its codec has left out what another one would need.
        ConfigError: there is no such codec, or none reaches its goal; names the nearest that does.
    """
    wanted = {cache.target(name).name for name in names} if names is not None else None
    chosen = [target for target in cache.manifest.targets if wanted is None or target.name in wanted]
    if not chosen:
        raise UsageError("choose at least one target to pack")
    asked = {
        target.name: target.codec.name if codec is None else codec_for_target(codec, target.name) for target in chosen
    }
    for target in chosen:
        _refuse_left_out(cache, target, asked[target.name])
    recodings: list[Recoding] = []
    offset = 0
    for target in chosen:
        found = (known or {}).get(target.name)
        if found is not None and found.step.codec == asked[target.name] != target.codec.name:
            recoding = _as_known(cache, target, found, offset)
        else:
            recoding = _plan_one(cache, target, asked[target.name], view, offset, progress)
        offset += recoding.target.codec.code_bytes
        recodings.append(recoding)
    return recodings


def recodings_of_pack(cache: Cache, targets: Sequence[PackTarget], blobs: Mapping[str, bytes | None]) -> list[Recoding]:
    """What became of each target of a pack that is there.

    Args:
        cache: that it was made from.
        targets: of the pack.
        blobs: target name to the parameters of the pack's codec.

    Raises:
        DamageError: the cache's own parameters are damaged.
    """
    recodings = []
    for target in targets:
        held, blob, shape = cache.target(target.name), blobs[target.name], tuple(target.shape)
        if held.codec == target.codec:
            recodings.append(Recoding(target, blob, None, None))
        else:
            decoder = load_codec(held.codec, shape, cache.parameters_blob(held))
            recodings.append(Recoding(target, blob, decoder, load_codec(target.codec, shape, blob)))
    return recodings


def _refuse_left_out(cache: Cache, target: TargetRecord, codec: str) -> None:
    """What `klt` has dropped is in no code, and another codec would teach its mean instead of leaving it out."""
    if codec != target.codec.name and parse_codec(target.codec.name).family == "klt":
        raise UsageError(
            f"{cache.path}: target {target.name} is stored as {target.codec.name}, and {codec} cannot bring back what "
            f"that has left out; pack it without --codec, or extract a cache with --codec float16 and "
            "pack that"
        )


def _as_known(cache: Cache, target: TargetRecord, known: KnownStep, offset: int) -> Recoding:
    shape = tuple(target.shape)
    decoder = load_codec(target.codec, shape, cache.parameters_blob(target))
    encoder = load_codec(known.target.codec, shape, known.blob)
    record = PackTarget(name=target.name, shape=target.shape, codec=encoder.record(), offset=offset)
    return Recoding(record, known.blob, decoder, encoder, known.step)


def _plan_one(
    cache: Cache, target: TargetRecord, codec: str, view: str, offset: int, progress: Progress | None
) -> Recoding:
    blob = cache.parameters_blob(target)
    if codec == target.codec.name:
        record = PackTarget(name=target.name, shape=target.shape, codec=target.codec, offset=offset)
        return Recoding(record, blob, None, None)
    decoder = load_codec(target.codec, tuple(target.shape), blob)
    is_fitted = parse_codec(codec).family not in ("float32", "float16")
    n_wanted = 0
    if is_fitted:
        n_wanted = enough_images({target.name: tuple(target.shape)}) if wants_many_views(codec) else _FEW_VIEWS
    sample = sample_tokens(cache, target, decoder, view, codec=codec, n_wanted=n_wanted, progress=progress)
    try:
        encoder = fit_codec(codec, sample.fitted)
    except ConfigError as error:
        raise ConfigError(f"target {target.name}: {error}") from error
    if encoder.calibration is not None:
        warn_of_few_views({target.name: codec}, {target.name: encoder.calibration})
    record = PackTarget(name=target.name, shape=target.shape, codec=encoder.record(), offset=offset)
    step = SecondStep(
        target=target.name,
        source=target.codec.name,
        source_db=None if decoder.calibration is None else decoder.calibration.snr_db,
        codec=codec,
        added_db=_ratio_db(encoder, sample.measured),
        n_fitted=len(sample.fitted),
        n_measured=len(sample.measured),
        source_bytes=target.codec.code_bytes,
        code_bytes=encoder.code_bytes,
    )
    return Recoding(record, encoder.parameters_blob(), decoder, encoder, step)


def _ratio_db(codec: Codec, tokens: Tensor) -> float | None:
    """Signal about the mean over the error of decoded tokens; None without tokens, signal or error.

    Args:
        codec: that encodes and decodes them.
        tokens: (n, *shape); those in front that the codec stores whole do not count.
    """
    n_lead = 0 if codec.basis is None else codec.basis.n_lead
    counted = _counted(tokens, n_lead)
    if not len(counted):
        return None
    mean = counted.reshape(-1, counted.shape[-1]).mean(dim=0, dtype=torch.float64).float()
    signal = error = 0.0
    for part in torch.split(tokens, _MEASURED_AT_ONCE):
        with torch.inference_mode():
            exact = part.float()
            difference = codec.decode(codec.encode(exact)) - exact
        signal += float(_counted(exact, n_lead).sub(mean).double().square().sum())
        error += float(_counted(difference, n_lead).double().square().sum())
    return -10 * math.log10(error / signal) if error > 0 and signal > 0 else None


def _counted(tokens: Tensor, n_lead: int) -> Tensor:
    return tokens[:, n_lead:] if tokens.dim() == 3 else tokens
