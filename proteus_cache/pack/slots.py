"""Memory of batches, used again and again.

A slot holds one batch. It is lent to the consumer without a copy and comes back by itself when the last
tensor that looks into it is gone. So no page is faulted in twice, and a consumer that keeps batches keeps
them unharmed.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proteus_cache.memory import available_memory

_ALIGN = 4096


@dataclass(frozen=True, slots=True)
class SlotShape:
    """Where the fields of a batch of at most `n` samples are in a slot."""

    n: int
    code_bytes: int
    side_px: int

    @property
    def codes_start(self) -> int:
        """First byte of the codes; the views come before."""
        return -(-self.n * self.side_px**2 * 3 // _ALIGN) * _ALIGN

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, whole pages."""
        return self.codes_start + -(-self.n * self.code_bytes // _ALIGN) * _ALIGN

    def views(self, slot: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
        """(n, H, W, 3) uint8 in `slot`."""
        side = self.side_px
        return slot[: n * side * side * 3].reshape(n, side, side, 3)

    def codes(self, slot: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
        """(n, code_bytes) uint8 in `slot`."""
        return slot[self.codes_start : self.codes_start + n * self.code_bytes].reshape(n, self.code_bytes)


class SlotPool:
    """Equal slots in one mapping; numbers are taken, given back, or lent with the arrays that use them."""

    def __init__(self, slot_bytes: int, n_slots: int, descriptor: int = -1) -> None:
        """
        Args:
            slot_bytes: whole pages.
            n_slots: how many.
            descriptor: of a file of that size to share with other processes; -1 for memory of this process.
        """
        self.slot_bytes = slot_bytes
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(descriptor, slot_bytes * n_slots, flags=private if descriptor < 0 else mmap.MAP_SHARED)
        with suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._free = deque(range(n_slots))
        self._lent: dict[int, weakref.ref[NDArray[np.uint8]]] = {}

    @property
    def n_lent(self) -> int:
        """Slots that a consumer still looks into."""
        return len(self._lent)

    def take(self) -> int | None:
        """A free slot, or None."""
        with suppress(IndexError):
            return self._free.popleft()
        return None

    def give_back(self, slot: int) -> None:
        """The slot's content is no longer needed."""
        self._free.append(slot)

    def array(self, slot: int) -> NDArray[np.uint8]:
        """The slot as a flat array."""
        return np.frombuffer(self._map, dtype=np.uint8, count=self.slot_bytes, offset=slot * self.slot_bytes)

    def lend(self, slot: int) -> NDArray[np.uint8]:
        """The slot as a flat array; it is given back when this array and all views of it are gone."""
        array = self.array(slot)

        def release(_: object) -> None:
            if self._lent.pop(slot, None) is not None:
                self._free.append(slot)

        self._lent[slot] = weakref.ref(array, release)
        return array


def shared_file(size: int, folder: Path) -> int | None:
    """A descriptor of a nameless file of `size` bytes, every one reserved; None when there is no room for it.

    Nameless, so that nothing stays behind whoever is killed; reserved, so that a full file system is told now
    and not by a bus error in the middle of training. `folder` is a memory file system; at most half of the
    memory that is available is taken, whatever its limit says.
    """
    if size > available_memory() // 2:
        return None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EOPNOTSUPP):
            return None
        raise
    return descriptor
