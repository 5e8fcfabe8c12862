"""Which stored view is where in training: a pure function of seed and epoch, for any ranks and workers.

    view indices of an epoch = views[(epoch r + j) mod V], j = 0 to r - 1, with r repeats of an image (1 by default)
    order of the tars        = permutation keyed by (seed, epoch, "tars")
    windows                  = consecutive tars of that order, closed as soon as they hold 16,384 images
    order inside a window    = permutation keyed by (seed, epoch, "window", number)
    drawn                    = the first of every window's images, so that 1 of r is drawn in all
    entry p of the epoch     = image i = p div r of those drawn, with the view index j = (p mod r + i) mod r
    global batch t           = entries t G to (t + 1) G - 1; what does not fill a batch is dropped

Images are those with a stored view of each of the epoch's view indices. The r views of an image are neighbours, and
start with another view index from image to image: every view index is as often at an odd position (masked) as at
an even one. A permutation of n is the stable argsort of n raw 64-bit outputs of Philox, whose stream numpy
guarantees. Only two windows are in memory at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from proteus_cache.errors import UsageError

WINDOW_SAMPLES = 16_384

Places = Callable[[int, int], NDArray[np.int64]]
"""(view index, tar) -> (m,) ascending places, within the tar's images, of those that have a stored view there."""


class BatchPlan(NamedTuple):
    """What one global batch is made of."""

    epoch: int
    view_indices: NDArray[np.int64] | None
    """(G,) of every entry; None for the probe."""
    records: NDArray[np.int64]
    """(G,) record numbers, each in the index of its view index."""


class Order(Protocol):
    """Anything that says what global batch number `step` holds."""

    @property
    def batch_size(self) -> int:
        """Largest global batch."""

    def batch(self, step: int) -> BatchPlan:
        """The global batch of this step, counted from 0."""


def share_of(n: int, rank: int, world_size: int) -> range:
    """Positions of a batch of `n` that one of `world_size` processes gets."""
    return range(rank * n // world_size, (rank + 1) * n // world_size)


def check_shares(batch_size: int, rank: int, world_size: int) -> None:
    """Refuse processes of which one would get nothing of a batch.

    Raises:
        UsageError: says so.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of {world_size} ranks does not exist")
    if batch_size < world_size:
        raise UsageError(f"a batch of {batch_size} cannot be shared by {world_size} ranks; raise --batch-size")


def permutation(n: int, *key: str | int) -> NDArray[np.int64]:
    """A permutation of 0 to n - 1 that depends on `key` alone, over all versions and machines."""
    text = "\n".join(["proteus-cache/order/1", *map(str, key)])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable").astype(np.int64)


@dataclass(frozen=True, slots=True)
class _ViewSet:
    """View indices that one epoch draws together."""

    which: tuple[int, ...]
    """Positions of them among the order's view indices."""
    tars: NDArray[np.int64]
    """Those that are not held out."""
    images: NDArray[np.int64]
    """(n_tars,) images of every tar that have a stored view of each of them; 0 where held out."""


class TrainingOrder:
    """The order of training: all tars that are not held out; every epoch one view index, or as many as repeats."""

    def __init__(
        self,
        counts: Mapping[int, NDArray[np.int64]],
        *,
        held_out: Collection[int],
        seed: int,
        batch_size: int,
        repeats: int = 1,
        images: NDArray[np.int64] | None = None,
        places: Places | None = None,
    ) -> None:
        """
        Args:
            counts: view index to (n_tars,) stored views of each tar; epochs take the view indices in this
                order.
            held_out: tars that are never drawn.
            seed: of the run.
            batch_size: global, G.
            repeats: views of an image in an epoch, which draws one image of as many.
            images: (n_tars,) images of each tar, with or without a stored view; needed with repeats.
            places: asked for tars that hold fewer stored views than images; needed with repeats.

        Raises:
            UsageError: no view index, fewer than repeats, or a batch is larger than the data.
        """
        if not counts:
            raise UsageError("the pack holds no view index to train on")
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        if repeats < 1:
            raise UsageError(f"repeats must be at least 1, got {repeats}")
        if repeats > len(counts):
            raise UsageError(
                f"--repeats {repeats} shows {repeats} different views of an image in an epoch, and the pack holds "
                f"{len(counts)}; choose --repeats {len(counts)}{' or less' * (len(counts) > 1)}, or extract and pack "
                "more --views"
            )
        self.view_indices = tuple(counts)
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self._counts = [np.asarray(count, dtype=np.int64) for count in counts.values()]
        self._starts = [np.cumsum(count) - count for count in self._counts]
        self._images = images
        self._places = places
        excluded = np.fromiter(held_out, dtype=np.int64, count=len(held_out))
        n_views = len(self.view_indices)
        self._sets = [
            self._view_set(tuple((epoch * repeats + j) % n_views for j in range(repeats)), excluded)
            for epoch in range(n_views // math.gcd(n_views, repeats))
        ]
        self.n_samples = min(repeats * (int(views.images.sum()) // repeats) for views in self._sets)
        """Entries that every epoch has at least; those that fill no batch are dropped."""
        self.steps_per_epoch = self.n_samples // batch_size
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"a batch of {batch_size:,} is larger than the {self.n_samples:,} views that an epoch draws "
                "from; choose a smaller --batch-size or pack more images"
            )
        self._epoch_windows = lru_cache(maxsize=1)(self._make_windows)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def batch(self, step: int) -> BatchPlan:
        """The global batch of optimiser step `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        entries = np.arange(place * self.batch_size, (place + 1) * self.batch_size, dtype=np.int64)
        images, copies = np.divmod(entries, self.repeats)
        _, starts = self._epoch_windows(epoch)
        first, end = int(images[0]), int(images[-1]) + 1
        numbers = range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, end)))
        parts = [
            self._window(epoch, number)[max(0, first - starts[number]) : end - starts[number]] for number in numbers
        ]
        columns = (copies + images) % self.repeats
        views = np.array([self.view_indices[which] for which in self._views_of(epoch).which], dtype=np.int64)
        return BatchPlan(epoch, views[columns], np.concatenate(parts)[images - first, columns])

    def _views_of(self, epoch: int) -> _ViewSet:
        return self._sets[epoch % len(self._sets)]

    def _view_set(self, which: tuple[int, ...], excluded: NDArray[np.int64]) -> _ViewSet:
        """What an epoch with these view indices can draw from."""
        counts = self._counts[which[0]]
        tars = np.setdiff1d(np.arange(counts.size), excluded)
        images = np.zeros_like(counts)
        if len(which) == 1:
            images[tars] = counts[tars]
            return _ViewSet(which, tars, images)
        if self._images is None or self._places is None:
            raise ValueError("repeats need the images of every tar, and the places of those that are stored")
        images[tars] = self._images[tars]
        gaps = np.any([self._counts[view][tars] != images[tars] for view in which], axis=0)
        for tar in tars[gaps].tolist():
            images[tar] = np.count_nonzero(self._has_all(which, tar))
        return _ViewSet(which, tars, images)

    def _make_windows(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The tars of every window, and how many images are drawn before each window (and in all, at the end)."""
        views = self._views_of(epoch)
        tars = views.tars[permutation(views.tars.size, self.seed, epoch, "tars")]
        windows, ends, first, held = [], [0], 0, 0
        for place, count in enumerate(views.images[tars].tolist()):
            held += count
            if held >= WINDOW_SAMPLES or place == tars.size - 1:
                windows.append(tars[first : place + 1])
                ends.append(ends[-1] + held)
                first, held = place + 1, 0
        return windows, np.asarray(ends, dtype=np.int64) // self.repeats

    def _make_window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """(m, r) record numbers of the images that are drawn from one window, permuted; a column for each view index
        of the epoch."""
        views = self._views_of(epoch)
        windows, starts = self._epoch_windows(epoch)
        columns = [self._records(which, windows[number], views) for which in views.which]
        order = permutation(columns[0].size, self.seed, epoch, "window", number)
        return np.stack(columns, axis=1)[order[: starts[number + 1] - starts[number]]]

    def _records(self, which: int, tars: NDArray[np.int64], views: _ViewSet) -> NDArray[np.int64]:
        """Record numbers, in one view index, of the images of `tars` that have all views, tar by tar."""
        records = _records_of(tars, self._starts[which], self._counts[which])
        if np.array_equal(self._counts[which][tars], views.images[tars]):
            return records
        kept = [self._has_all(views.which, tar)[self._has(which, tar)] for tar in tars.tolist()]
        return records[np.concatenate(kept)]

    def _has_all(self, which: tuple[int, ...], tar: int) -> NDArray[np.bool_]:
        """(n,) whether each image of a tar has a stored view of each of these view indices."""
        has_all: NDArray[np.bool_] = np.logical_and.reduce([self._has(view, tar) for view in which])
        return has_all

    def _has(self, which: int, tar: int) -> NDArray[np.bool_]:
        """(n,) whether each image of a tar has a stored view of this view index."""
        assert self._images is not None
        assert self._places is not None
        is_whole = self._counts[which][tar] == self._images[tar]
        has = np.full(self._images[tar], is_whole, dtype=np.bool_)
        if not is_whole:
            has[self._places(self.view_indices[which], tar)] = True
        return has


class SequentialOrder:
    """Given records of one view index once, in their order; the last batch holds what is left."""

    def __init__(self, view_index: int | None, records: NDArray[np.int64], batch_size: int) -> None:
        self.view_index = view_index
        self.records = records
        self.batch_size = min(batch_size, max(1, records.size))
        self.n_steps = -(-records.size // self.batch_size)

    def batch(self, step: int) -> BatchPlan:
        """Batch `step` of `n_steps`."""
        first = step * self.batch_size
        records = self.records[first : first + self.batch_size]
        return BatchPlan(0, None if self.view_index is None else np.full_like(records, self.view_index), records)


def records_of_tars(counts: NDArray[np.int64], tars: NDArray[np.int64]) -> NDArray[np.int64]:
    """Record numbers of all stored views of `tars`, tar by tar.

    Args:
        counts: (n_tars,) stored views of every tar of the view index.
        tars: the wanted ones.
    """
    return _records_of(tars, np.cumsum(counts) - counts, counts)


def _records_of(tars: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    sizes = counts[tars]
    offsets = np.cumsum(sizes) - sizes
    records: NDArray[np.int64] = np.arange(int(sizes.sum()), dtype=np.int64)
    records += np.repeat(starts[tars] - offsets, sizes)
    return records
