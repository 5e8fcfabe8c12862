"""From the codes of a cache to the codes of a pack: the same bytes, or encoded again by another codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.cache.reader import Cache
from proteus_cache.codecs import Codec, codec_for_target, fit_codec, load_codec
from proteus_cache.errors import UsageError
from proteus_cache.pack.document import PackTarget

CALIBRATION_VIEWS = 256
"""Views that a fitted codec sees: the first stored ones, whose images are a random draw of all."""
_BATCH = 64


@dataclass(frozen=True)
class Recoding:
    """How one target of the pack comes from the cache."""

    target: PackTarget
    blob: bytes | None
    """Parameters of the pack's codec."""
    decoder: Codec | None
    encoder: Codec | None
    """Both None where the cache's codes are taken as they are."""

    def apply(self, codes: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """The pack's codes, (code_bytes,) uint8 each, from the cache's codes of the same views.

        Raises:
            UsageError: a value is beyond what the codec can hold.
        """
        if self.decoder is None or self.encoder is None:
            return list(codes)
        recoded: list[NDArray[np.uint8]] = []
        for first in range(0, len(codes), _BATCH):
            with torch.inference_mode():
                tokens = self.decoder.decode(torch.from_numpy(np.stack(codes[first : first + _BATCH])))
                encoded = self.encoder.encode(tokens)
                if not bool(torch.isfinite(self.encoder.decode(encoded)).all()):
                    raise UsageError(
                        f"target {self.target.name}: has values that codec {self.encoder.name} cannot hold; "
                        "pack it with --codec float32"
                    )
            recoded.extend(encoded.numpy())
        return recoded


def plan_recodings(cache: Cache, names: Sequence[str] | None, codec: str | None, view: str) -> list[Recoding]:
    """What becomes of each target.

    Args:
        cache: where from.
        names: targets to take, in the cache's order whatever the order here; None takes all.
        codec: as in extract; None keeps every target's codec.
        view: view index whose first stored views calibrate a fitted codec.

    Raises:
        UsageError: the cache has no such target.
        ConfigError: there is no such codec.
    """
    wanted = {cache.target(name).name for name in names} if names is not None else None
    chosen = [target for target in cache.manifest.targets if wanted is None or target.name in wanted]
    if not chosen:
        raise UsageError("choose at least one target to pack")
    recodings: list[Recoding] = []
    offset = 0
    for target in chosen:
        recoding = _plan_one(cache, target, codec, view, offset)
        offset += recoding.target.codec.code_bytes
        recodings.append(recoding)
    return recodings


def _plan_one(cache: Cache, target: TargetRecord, codec: str | None, view: str, offset: int) -> Recoding:
    blob = cache.parameters_blob(target)
    name = target.codec.name if codec is None else codec_for_target(codec, target.name)
    if name == target.codec.name:
        record = PackTarget(name=target.name, shape=target.shape, codec=target.codec, offset=offset)
        return Recoding(record, blob, None, None)
    decoder = load_codec(target.codec, tuple(target.shape), blob)
    tokens = decoder.decode(torch.from_numpy(_first_codes(cache, target, view)))
    encoder = fit_codec(name, tokens)
    record = PackTarget(name=target.name, shape=target.shape, codec=encoder.record(), offset=offset)
    return Recoding(record, encoder.parameters_blob(), decoder, encoder)


def _first_codes(cache: Cache, target: TargetRecord, view: str) -> NDArray[np.uint8]:
    """(n, code_bytes) codes of the first stored views, at most CALIBRATION_VIEWS."""
    found: list[NDArray[np.uint8]] = []
    for shard in cache.units(view):
        receipt = cache.receipt(view, shard)
        if receipt is None:
            continue
        codes = cache.read_codes(view, shard, target.name)
        rows = receipt.samples.rows[: CALIBRATION_VIEWS - len(found)]
        found += [codes[row - receipt.first_row] for row in rows]
        if len(found) == CALIBRATION_VIEWS:
            break
    if not found:
        raise UsageError(f"{cache.path}: {view} holds no view at all, so there is nothing to pack")
    return np.stack(found)
