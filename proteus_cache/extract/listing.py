"""The frozen image list of a cache: mixed by seed, with the images of the probe and the shards that are held out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from proteus_cache.errors import UsageError
from proteus_cache.extract.config import (
    DEFAULT_PROBE_IMAGES,
    DEFAULT_SHARD_SIZE,
    PROBE_FROM_IMAGES,
    ExtractConfig,
)
from proteus_cache.images import draw_order, list_images

_HELD_OUT_SHARE = 0.01
_HELD_OUT_FROM_SHARDS = 10


def image_table(config: ExtractConfig) -> tuple[pa.Table, tuple[str, ...] | None]:
    """The mixed image list with its probe column, and the class names.

    Raises:
        ImageListError: the images cannot be listed.
        UsageError: more probe images are asked for than are trained on.
    """
    listing = list_images(config.images)
    order = draw_order(listing.table["key"], config.seed or 0)
    if config.limit is not None:
        order = order[: config.limit]
    table = listing.table.take(pa.array(order))
    n_images = len(table)
    n_probe = n_probe_images(n_images, config.probe_images)
    candidates = trained_rows(n_images, config.shard_size or DEFAULT_SHARD_SIZE, config.seed or 0)
    if n_probe > len(candidates):
        raise UsageError(f"--probe-images {n_probe}: only {len(candidates)} images are trained on; ask for fewer")
    probe = np.zeros(n_images, dtype=bool)
    probe[candidates[:n_probe]] = True  # the list is mixed already, so its first rows are a random choice
    return table.append_column("probe", pa.array(probe)), listing.classes


def n_probe_images(n_images: int, asked: int | None) -> int:
    """Images that get one more view: as asked for, else 4,096 from 16,384 images on, else none."""
    if asked is not None:
        return asked
    return DEFAULT_PROBE_IMAGES if n_images >= PROBE_FROM_IMAGES else 0


def held_out_shards(n_images: int, shard_size: int, seed: int) -> list[int]:
    """One shard in a hundred, chosen by seed; at least one from 10 shards on, none below."""
    n_shards = -(-n_images // shard_size)
    if n_shards < _HELD_OUT_FROM_SHARDS:
        return []
    order = draw_order([f"shard-{shard}" for shard in range(n_shards)], seed)
    return sorted(int(shard) for shard in order[: max(1, round(n_shards * _HELD_OUT_SHARE))])


def trained_rows(n_images: int, shard_size: int, seed: int) -> NDArray[np.int64]:
    """Rows of the images that training draws from, ascending: those of all shards but the held-out ones."""
    trained = np.ones(n_images, dtype=bool)
    for shard in held_out_shards(n_images, shard_size, seed):
        trained[shard * shard_size : (shard + 1) * shard_size] = False
    return np.flatnonzero(trained).astype(np.int64)


def n_trained_images(n_images: int, shard_size: int, seed: int) -> int:
    """Images that training draws from: those of all shards but the held-out ones."""
    held_out = held_out_shards(n_images, shard_size, seed)
    return n_images - sum(min(shard_size, n_images - shard * shard_size) for shard in held_out)
