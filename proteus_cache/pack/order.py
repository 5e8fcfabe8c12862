"""Which stored view is where in training: a pure function of seed and epoch, for any ranks and workers.

    view index of an epoch   = views[epoch mod V]
    order of the tars        = permutation keyed by (seed, epoch, "tars")
    windows                  = consecutive tars of that order, closed as soon as they hold 16,384 samples
    order inside a window    = permutation keyed by (seed, epoch, "window", number)
    global batch t           = entries t G to (t + 1) G - 1; what does not fill a batch is dropped

A permutation of n is the stable argsort of n raw 64-bit outputs of Philox, whose stream numpy guarantees.
Only two windows are in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from proteus_cache.errors import UsageError

WINDOW_SAMPLES = 16_384


class BatchPlan(NamedTuple):
    """What one global batch is made of."""

    epoch: int
    view_index: int | None
    """None for the probe."""
    records: NDArray[np.int64]
    """(G,) record numbers in the index of this view index."""


class Order(Protocol):
    """Anything that says what global batch number `step` holds."""

    @property
    def batch_size(self) -> int:
        """Largest global batch."""

    def batch(self, step: int) -> BatchPlan:
        """The global batch of this step, counted from 0."""


def permutation(n: int, *key: str | int) -> NDArray[np.int64]:
    """A permutation of 0 to n - 1 that depends on `key` alone, over all versions and machines."""
    text = "\n".join(["proteus-cache/order/1", *map(str, key)])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable").astype(np.int64)


class TrainingOrder:
    """The order of training: every epoch one view index, all tars that are not held out."""

    def __init__(
        self,
        counts: Mapping[int, NDArray[np.int64]],
        *,
        held_out: Collection[int],
        seed: int,
        batch_size: int,
    ) -> None:
        """
        Args:
            counts: view index to (n_tars,) stored views of each tar; epochs take the view indices in this
                order.
            held_out: tars that are never drawn.
            seed: of the run.
            batch_size: global, G.

        Raises:
            UsageError: no view index, or a batch is larger than the data.
        """
        if not counts:
            raise UsageError("the pack holds no view index to train on")
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        self.view_indices = tuple(counts)
        self.batch_size = batch_size
        self.seed = seed
        self._counts = [np.asarray(count, dtype=np.int64) for count in counts.values()]
        self._starts = [np.cumsum(count) - count for count in self._counts]
        excluded = np.fromiter(held_out, dtype=np.int64, count=len(held_out))
        self._tars = [np.setdiff1d(np.arange(count.size), excluded) for count in self._counts]
        self.n_samples = min(int(count[tars].sum()) for count, tars in zip(self._counts, self._tars, strict=True))
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
        first = place * self.batch_size
        end = first + self.batch_size
        _, starts = self._epoch_windows(epoch)
        numbers = range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, end)))
        parts = [
            self._window(epoch, number)[max(0, first - starts[number]) : end - starts[number]] for number in numbers
        ]
        return BatchPlan(epoch, self.view_indices[epoch % len(self.view_indices)], np.concatenate(parts))

    def _make_windows(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The tars of every window, and the position in the epoch where each window starts."""
        which = epoch % len(self.view_indices)
        tars = self._tars[which]
        tars = tars[permutation(tars.size, self.seed, epoch, "tars")]
        windows, sizes, first, held = [], [], 0, 0
        for place, count in enumerate(self._counts[which][tars].tolist()):
            held += count
            if held >= WINDOW_SAMPLES or place == tars.size - 1:
                windows.append(tars[first : place + 1])
                sizes.append(held)
                first, held = place + 1, 0
        ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        return windows, ends - sizes

    def _make_window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The record numbers of one window, permuted."""
        which = epoch % len(self.view_indices)
        windows, _ = self._epoch_windows(epoch)
        records = _records_of(windows[number], self._starts[which], self._counts[which])
        return records[permutation(records.size, self.seed, epoch, "window", number)]


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
        return BatchPlan(0, self.view_index, self.records[first : first + self.batch_size])


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
