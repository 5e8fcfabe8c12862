"""Which stored views are computed again: drawn by a seed, each at most once, and by nothing else."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from pathlib import Path

from proteus_cache import stores
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.errors import ConfigError, DamageError, UsageError
from proteus_cache.fidelity.sides import CacheSide, Entry, PackSide, Side
from proteus_cache.pack.reader import Pack, open_pack

Unit = tuple[str, int]


def fresh_seed() -> int:
    """A seed for a check that nobody wants to repeat; it is printed, so that somebody can."""
    return secrets.randbelow(1 << 31)


class Drawn:
    """Stored views in random order.

    Rows are drawn evenly over all units, and those that have no stored view (bad images) are passed over. Units whose
    receipt or index cannot be read are named in `damaged` and drawn from no more.
    """

    def __init__(self, path: Path, n_views: int, seed: int) -> None:
        """
        Args:
            path: of a cache or pack.
            n_views: to draw; all that there are where these are fewer.
            seed: of the draw.

        Raises:
            UsageError: `path` is neither cache nor pack, or holds no view.
            DamageError: its document is damaged.
        """
        if n_views < 1:
            raise ConfigError(f"--recompute takes a number of views of at least 1, got {n_views}")
        kind = stores.kind_of(path)
        self.side: Side
        self.damaged: dict[Unit, str] = {}
        self.precisions: dict[Unit, str] = {}
        """Precision that a unit was made in, where the store says it of every unit."""
        if kind == "cache":
            cache = open_cache(path)
            self.side, rows = CacheSide(cache), _rows_of_cache(cache)
        elif kind == "pack":
            pack = open_pack(path)
            self.side, rows = PackSide(pack, path), _rows_of_pack(pack)
        else:
            raise UsageError(stores.wrong_folder(path, "cache", "pack"))
        self.entries: list[Entry] = []
        """In the order of the store."""
        for view, shard, number in _in_random_order(rows, seed):
            if len(self.entries) == n_views:
                break
            entry = self._entry(view, shard, number)
            if entry is not None:
                self.entries.append(entry)
        self.entries.sort(key=lambda entry: (entry.view, entry.number))
        if kind == "cache":
            self.precisions = _precisions(cache, self.entries)
        if not self.entries and not self.damaged:
            raise UsageError(f"{path}: holds no view yet, so there is nothing to compute again")

    def _entry(self, view: str, shard: int, number: int) -> Entry | None:
        if (view, shard) in self.damaged:
            return None
        try:
            found = self.side.entries(view, shard)
        except DamageError as error:
            self.damaged[view, shard] = str(error)
            return None
        return next((entry for entry in found if entry.number == number), None)


def _rows_of_cache(cache: Cache) -> list[tuple[str, int, range]]:
    """(view index, shard, array rows) of every committed unit."""
    n_shards = {view: -(-n // cache.manifest.shard_size) for view, n in _n_rows(cache).items()}
    units = [(view, shard) for view in cache.views() for shard in cache.units(view) if shard < n_shards[view]]
    return [(view, shard, cache.rows(view, shard)) for view, shard in units]


def _n_rows(cache: Cache) -> dict[str, int]:
    images = cache.manifest.images
    return {view: images.n_probe if view == "probe" else images.n_images for view in cache.views()}


def _rows_of_pack(pack: Pack) -> list[tuple[str, int, range]]:
    """(view index, tar, record numbers) of every tar."""
    found = []
    for view in pack.document.view_names:
        first = 0
        for tar, count in enumerate(pack.counts(view).tolist()):
            found.append((view, tar, range(first, first + count)))
            first += count
    return found


def _precisions(cache: Cache, entries: list[Entry]) -> dict[Unit, str]:
    found: dict[Unit, str] = {}
    for view, shard in {(entry.view, entry.shard) for entry in entries}:
        receipt = cache.receipt(view, shard)
        if receipt is not None:
            found[view, shard] = receipt.precision
    return found


def _in_random_order(units: list[tuple[str, int, range]], seed: int) -> Iterator[tuple[str, int, int]]:
    """Every (view index, shard, number) once."""
    total = sum(len(rows) for _, _, rows in units)
    ends, end = [], 0
    for _, _, rows in units:
        end += len(rows)
        ends.append(end)
    generator = random.Random(f"proteus-cache recompute {seed}")
    seen: set[int] = set()
    while len(seen) < total:
        place = generator.randrange(total)
        if place in seen:
            continue
        seen.add(place)
        which = _first_above(ends, place)
        view, shard, rows = units[which]
        yield view, shard, rows[place - (ends[which] - len(rows))]


def _first_above(ends: list[int], place: int) -> int:
    from bisect import bisect_right

    return bisect_right(ends, place)
