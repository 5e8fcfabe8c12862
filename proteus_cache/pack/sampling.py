"""Stored views of a cache that a codec is fitted to, and others that tell what it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proteus_cache.cache.layout import PROBE
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.calibration_tokens import MEMORY_SHARE, TokenStore, room_for, spread
from proteus_cache.codecs import Codec
from proteus_cache.codecs.codec import largest_value
from proteus_cache.errors import UsageError
from proteus_cache.memory import available_memory

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (views read, views in all)."""
_MEASURED = 256
_PART = 8
"""One view in so many that the codec is fitted to is asked for besides, to measure on."""
_SHARDS = 4
"""Shards that many views come from, where there are as many; each is a random draw of all images."""
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded tokens of whole views, float32 or float16 on the CPU; no view is in both."""

    fitted: Tensor
    """(n, *shape) of trained images."""
    measured: Tensor
    """(m, *shape) of held-out images, or of trained ones where no shard is held out."""


def sample_tokens(
    cache: Cache,
    target: TargetRecord,
    decoder: Codec,
    view: str,
    *,
    codec: str,
    n_wanted: int,
    progress: Progress | None = None,
) -> Sample:
    """Tokens of views spread over a few shards, as many as are there and as memory allows.

    Args:
        cache: where from.
        target: of it.
        decoder: its codec.
        view: view index.
        codec: that is going to hold them.
        n_wanted: views to fit to; 0 for a codec that is not fitted.
        progress: of the reading.

    Raises:
        UsageError: the view index holds no view, or one with values that the codec cannot hold.
        DamageError: a unit is damaged.
    """
    held_out = set() if view == PROBE else set(cache.manifest.images.held_out)
    units = cache.units(view)
    trained = [shard for shard in units if shard not in held_out]
    others = [shard for shard in units if shard in held_out]
    n_measured = min(_MEASURED, max(1, n_wanted // _PART)) if n_wanted else _MEASURED // 4
    shapes = {target.name: tuple(target.shape)}
    room = room_for(shapes, n_wanted + n_measured, available_memory(), {target.name: codec})
    if room.n_views < n_wanted + n_measured:
        n_measured = room.n_views // (_PART + 1) if n_wanted else room.n_views
        n_wanted = room.n_views - n_measured
        logger.warning(
            "memory holds %s calibration views: at most 1/%d of what is free is used", f"{room.n_views:,}", MEMORY_SHARE
        )
    reader = _Reader(open_cache(cache.path), target, decoder, view, codec)  # what it holds goes with it
    from_trained = n_wanted if others else n_wanted + n_measured
    store = TokenStore(shapes, room)
    total = from_trained + (n_measured if others else 0)
    for part in reader.views(trained, from_trained):
        store.add({target.name: part})
        if progress is not None:
            progress(store.n_views, total)
    n_trained = store.n_views
    for part in reader.views(others, n_measured):
        store.add({target.name: part})
        if progress is not None:
            progress(store.n_views, total)
    if store.n_views == 0:
        raise UsageError(f"{cache.path}: {view} holds no view at all, so there is nothing to pack")
    tokens = store.tokens()[target.name]
    if others or n_wanted == 0:
        n_fitted = n_trained if n_wanted else 0
        return Sample(tokens[:n_fitted], tokens[n_fitted:])
    return _divided(tokens, n_measured)


def _divided(tokens: Tensor, n_measured: int) -> Sample:
    """At most a ninth, spread over all, becomes what is measured; a single view is fitted to."""
    n = len(tokens)
    n_measured = min(n_measured, n // (_PART + 1) or int(n > 1))
    is_measured = torch.zeros(n, dtype=torch.bool)
    is_measured[torch.from_numpy(spread(n_measured, n))] = True
    return Sample(tokens[~is_measured], tokens[is_measured])


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads views of one target."""

    cache: Cache
    target: TargetRecord
    decoder: Codec
    view: str
    codec: str

    def views(self, shards: Sequence[int], n: int) -> Iterator[Tensor]:
        """(b, *shape) decoded tokens of up to `n` views, a few at a time, spread over as few shards as hold them."""
        if n == 0 or not shards:
            return
        n_first = min(len(shards), max(-(-n // self.cache.manifest.shard_size), _SHARDS if n > _MEASURED else 1))
        first = [shards[place] for place in spread(n_first, len(shards))]
        left = n
        for number, shard in enumerate([*first, *(shard for shard in shards if shard not in set(first))]):
            share = -(-left // (n_first - number)) if number < n_first else left
            for part in self._of_shard(shard, share):
                left -= len(part)
                yield part
            if left == 0:
                return

    def _of_shard(self, shard: int, n: int) -> Iterator[Tensor]:
        receipt = self.cache.receipt(self.view, shard)
        if receipt is None:
            return
        samples = receipt.samples
        codes = self.cache.read_codes(self.view, shard, self.target.name)
        chosen = spread(n, len(samples.rows))
        for start in range(0, len(chosen), _AT_ONCE):
            places = chosen[start : start + _AT_ONCE]
            rows = [samples.rows[place] - receipt.first_row for place in places]
            with torch.inference_mode():
                tokens = self.decoder.decode(torch.from_numpy(np.ascontiguousarray(codes[rows])))
            refuse_unusable(
                tokens.abs().amax(dim=-1) <= largest_value(self.codec),
                [samples.keys[place] for place in places],
                target=self.target.name,
                codec=self.codec,
            )
            yield tokens


def refuse_unusable(is_usable: Tensor, keys: Sequence[str], *, target: str, codec: str) -> None:
    """Refuse values that a codec cannot hold.

    Args:
        is_usable: (B, ...) bool.
        keys: of the B views.
        target: for the message.
        codec: likewise.

    Raises:
        UsageError: names the first sample that has one.
    """
    by_view = is_usable.reshape(len(keys), -1).all(dim=1)
    if not bool(by_view.all()):
        raise UsageError(
            f"sample {keys[int((~by_view).nonzero()[0])]}, target {target}: has values that codec {codec} cannot hold "
            "(NaN, infinite or too large); pack it with --codec float32"
        )
