"""Batches for training: what an order asks for, read ahead by processes, threads, or by the caller itself.

Batch `t` is the same whoever reads it. Reader processes fill shared memory, which is handed out without a
copy; where `/dev/shm` has no room for it, threads of this process read instead and the log says so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from proteus_cache.cache.layout import PROBE, view_name
from proteus_cache.pack.order import BatchPlan, Order, check_shares, share_of
from proteus_cache.pack.samples import PackLayout, Part, SampleReader
from proteus_cache.pack.slots import SlotPool, SlotShape, shared_file
from proteus_cache.pack.worker import ReaderProcess
from proteus_cache.plan.human import human_bytes

if TYPE_CHECKING:
    from proteus_cache.pack.reader import Pack

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches on their way per reader."""
_LENT = 2  # batches that the consumer may hold without a copy: the one in use and the one before
_SHARED_FOLDER = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of one global batch."""

    step: int
    epoch: int
    view_indices: Tensor | None
    """(b,) int64; None for the probe."""
    positions: Tensor
    """(b,) int64, positions within the global batch."""
    views: Tensor
    """(b, H, W, 3) uint8."""
    codes: Tensor
    """(b, code_bytes) uint8."""


def open_loader(
    pack: Pack,
    order: Order,
    *,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    n_workers: int = 0,
    pin: bool = False,
    shared_folder: Path = _SHARED_FOLDER,
) -> Loader:
    """Read batches `first_step` to `last_step` - 1 of `order`.

    Args:
        pack: where samples are.
        order: what each global batch holds.
        first_step: of the first batch, counted from 0.
        last_step: the first step that is not read.
        rank: of this process; it gets positions rank * G // world_size to (rank + 1) * G // world_size - 1.
        world_size: processes that share a global batch.
        n_workers: reader processes; 0 reads in this process when a batch is asked for.
        pin: hand out tensors in pinned memory, which a GPU can copy from while the host goes on. Needs CUDA.
        shared_folder: a memory file system.

    Returns:
        An iterator of Batch; close it, or use it in a `with` statement, to end its readers early.

    Raises:
        UsageError: a rank would get no samples.
    """
    check_shares(order.batch_size, rank, world_size)
    for view in pack.layout.views:
        pack.check_index(view)
    shape = SlotShape(-(-order.batch_size // world_size), pack.code_bytes, pack.side_px)
    readers = _make_readers(pack.layout, shape, n_workers, shared_folder)
    return Loader(order, range(first_step, last_step), rank, world_size, readers, pin)


class _Readers(Protocol):
    """Something that fills slots; answers come in the order of the questions."""

    pool: SlotPool
    shape: SlotShape
    n_ahead: int

    def submit(self, slot: int, parts: list[Part]) -> None: ...

    def wait(self) -> int: ...

    def close(self) -> None: ...


class Loader(Iterator[Batch]):
    """Batches in the order of their steps."""

    def __init__(self, order: Order, steps: range, rank: int, world_size: int, readers: _Readers, pin: bool) -> None:
        self.bytes_read = 0
        """Codes and encoded views handed out so far."""
        self.waited_s = 0.0
        """Time that the consumer has waited for data."""
        self._order = order
        self._steps = iter(steps)
        self._rank = rank
        self._world_size = world_size
        self._readers = readers
        self._pin = pin
        self._pending: deque[tuple[int, BatchPlan, range, int]] = deque()
        self._finalizer = weakref.finalize(self, readers.close)
        self._fill()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        self._fill()
        if not self._pending:
            self.close()
            raise StopIteration
        step, plan, positions, slot = self._pending.popleft()
        try:
            self.bytes_read += self._readers.wait()
        except BaseException:
            self.close()
            raise
        batch = self._hand_out(step, plan, positions, slot)
        self._fill()
        self.waited_s += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the readers; batches that were handed out stay as they are."""
        self._steps = iter(range(0))
        self._pending.clear()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        """Ask for batches until enough are on their way."""
        while len(self._pending) < self._readers.n_ahead:
            slot = self._readers.pool.take()
            if slot is None:
                return
            step = next(self._steps, None)
            if step is None:
                self._readers.pool.give_back(slot)
                return
            plan = self._order.batch(step)
            positions = share_of(plan.records.size, self._rank, self._world_size)
            self._readers.submit(slot, _parts(plan, positions))
            self._pending.append((step, plan, positions, slot))

    def _hand_out(self, step: int, plan: BatchPlan, positions: range, slot: int) -> Batch:
        pool, shape, n = self._readers.pool, self._readers.shape, len(positions)
        lend = not self._pin and pool.n_lent < _LENT
        memory = pool.lend(slot) if lend else pool.array(slot)
        views, codes = torch.from_numpy(shape.views(memory, n)), torch.from_numpy(shape.codes(memory, n))
        if not lend:
            views, codes = _copied(views, self._pin), _copied(codes, self._pin)
            pool.give_back(slot)
        numbers = torch.arange(positions.start, positions.stop, dtype=torch.int64)
        indices = None
        if plan.view_indices is not None:
            indices = torch.from_numpy(plan.view_indices[positions.start : positions.stop])
        return Batch(step, plan.epoch, indices, numbers, views, codes)


def _parts(plan: BatchPlan, positions: range) -> list[Part]:
    """What a rank reads of a batch, by view index: one part unless images are repeated."""
    mine = slice(positions.start, positions.stop)
    records = plan.records[mine]
    if plan.view_indices is None:
        return [Part(PROBE, records, np.arange(records.size, dtype=np.int64))]
    indices = plan.view_indices[mine]
    parts = []
    for view in np.unique(indices).tolist():
        rows = np.flatnonzero(indices == view)
        parts.append(Part(view_name(view), records[rows], rows))
    return parts


def _copied(tensor: Tensor, pin: bool) -> Tensor:
    """A copy; pinned ones come from torch's own pool, which waits for copies to the device before it reuses
    one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor)


def _make_readers(layout: PackLayout, shape: SlotShape, n_workers: int, shared_folder: Path) -> _Readers:
    if n_workers == 0:
        return _Inline(layout, shape)
    for prefetch in range(PREFETCH, 0, -1):
        n_slots = n_workers * prefetch + _LENT
        descriptor = shared_file(n_slots * shape.slot_bytes, shared_folder)
        if descriptor is not None:
            return _Processes(layout, shape, n_workers, prefetch, descriptor)
    logger.warning(
        "reading with threads instead of processes, which is slower: %s has no room for %s of batches; give it more "
        "(a container: --shm-size), or use fewer --workers or a smaller --batch-size",
        shared_folder,
        human_bytes(n_slots * shape.slot_bytes),
    )
    return _Threads(layout, shape, n_workers)


class _Inline:
    """The caller reads, when it waits."""

    n_ahead = 1

    def __init__(self, layout: PackLayout, shape: SlotShape) -> None:
        self.shape = shape
        self.pool = SlotPool(shape.slot_bytes, 1 + _LENT)
        self._reader = SampleReader(layout)
        self._task: tuple[int, list[Part]] | None = None

    def submit(self, slot: int, parts: list[Part]) -> None:
        self._task = slot, parts

    def wait(self) -> int:
        assert self._task is not None
        return _read(self._reader, self.pool, self.shape, *self._task)

    def close(self) -> None:
        self._reader.close()


class _Threads:
    """Threads of this process read; for machines without enough shared memory."""

    def __init__(self, layout: PackLayout, shape: SlotShape, n_workers: int) -> None:
        self.n_ahead = n_workers * PREFETCH
        self.shape = shape
        self.pool = SlotPool(shape.slot_bytes, self.n_ahead + _LENT)
        self._layout = layout
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="reader")
        self._answers: deque[Future[int]] = deque()

    def submit(self, slot: int, parts: list[Part]) -> None:
        self._answers.append(self._threads.submit(self._run, slot, parts))

    def wait(self) -> int:
        return self._answers.popleft().result()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, slot: int, parts: list[Part]) -> int:
        if not hasattr(self._own, "reader"):
            self._own.reader = SampleReader(self._layout)
        return _read(self._own.reader, self.pool, self.shape, slot, parts)


class _Processes:
    """Reader processes fill shared memory; whole batches go round them in turn."""

    def __init__(self, layout: PackLayout, shape: SlotShape, n_workers: int, prefetch: int, descriptor: int) -> None:
        self.n_ahead = n_workers * prefetch
        self.shape = shape
        self._readers: list[ReaderProcess] = []
        self._asked = self._answered = 0
        n_slots = self.n_ahead + _LENT
        try:
            self.pool = SlotPool(shape.slot_bytes, n_slots, descriptor)
            for _ in range(n_workers):
                self._readers.append(ReaderProcess(layout, shape, n_slots, descriptor))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)

    def submit(self, slot: int, parts: list[Part]) -> None:
        self._readers[self._asked % len(self._readers)].submit(slot, parts)
        self._asked += 1

    def wait(self) -> int:
        reader = self._readers[self._answered % len(self._readers)]
        self._answered += 1
        return reader.wait()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers.clear()


def _read(reader: SampleReader, pool: SlotPool, shape: SlotShape, slot: int, parts: list[Part]) -> int:
    n, memory, before = sum(part.numbers.size for part in parts), pool.array(slot), reader.bytes_read
    codes, views = shape.codes(memory, n), shape.views(memory, n)
    for part in parts:
        reader.read(part, codes, views)
    return reader.bytes_read - before
