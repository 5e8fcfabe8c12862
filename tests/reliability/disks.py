"""Disks to put under the stores: one that keeps a record, one that ends the process, one that fails.

`storage.disk` holds the operations that all stores are made of. `using(disk)` puts another one there, as in a process
that has just started. Every operation of a `Watched` disk passes `around`, as an `Operation` that says what is done
to which kind of file, so that tests name a place as "rename views tar" and not as "the 37th call".
"""

from __future__ import annotations

import errno as errors
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from proteus_cache import storage

Result = TypeVar("Result")

CHANGES = frozenset(
    {"create", "write", "sync", "sync folder", "close", "rename", "link", "unlink", "make folder", "remove folder"}
)
"""Operations after which a disk may look different; the others are open, read, close folder, names and status."""

_TEMPORARY = re.compile(r"\.?(?P<name>.+)\.\d+\.[0-9a-f]{16}")
_KINDS = (
    (r"tmp/v\d+-s\d+\.json", "packing note"),
    (r"plan-[0-9a-f]{64}\.parquet", "planned image list"),
    (r"plan-[0-9a-f]{64}\.safetensors", "planned codec"),
    (r"codec/[0-9a-f]{64}\.safetensors", "codec"),
    (r"[0-9a-f]{64}\.safetensors", "codec"),
    (r"(model|ema|optimizer)\.safetensors", "tensors"),
    (r"views/[^/]+/s\d+\.tar", "views tar"),
    (r"s\d+\.tar", "tar"),
    (r"v\d+-s\d+\.json", "packing note"),
    (r"s\d+\.json", "receipt"),
    (r"c(/\d+)+", "Zarr shard file"),
    (r"\d+", "Zarr shard file"),
    (r"v\d+\.idx", "index"),
)


def kind_of(path: Path) -> str:
    """What a path is: "views tar", "unfinished receipt", "folder views/vN"; numbers and random parts are left out."""
    unfinished = _TEMPORARY.fullmatch(path.name)
    name = unfinished["name"] if unfinished else path.name
    whole = (path.parent / name).as_posix()
    kind = next((kind for pattern, kind in _KINDS if re.search(rf"(^|/){pattern}\Z", whole)), None)
    if kind is None:
        kind = re.sub(r"\d+", "N", name)
    return f"unfinished {kind}" if unfinished else kind


@lru_cache(maxsize=4096)
def is_unfinished(path: str) -> bool:
    """Whether it has a temporary name, or is in a folder that has."""
    return any(_TEMPORARY.fullmatch(part) for part in path.split("/"))


def folder_kind(path: Path) -> str:
    """The same of a folder."""
    unfinished = _TEMPORARY.fullmatch(path.name)
    return f"folder {re.sub(r'[0-9]+', 'N', unfinished['name'] if unfinished else path.name)}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a disk."""

    name: str
    """Of `CHANGES`, or open, read, close folder, names, status."""
    path: Path
    """What it works on; of a descriptor, the path that it was opened at."""
    new: Path | None = None
    """Of a rename or a link: the new name."""
    data: bytes | None = None
    """Of a write: what it is asked to write (the first `taken` of it are)."""
    descriptor: int | None = None

    @property
    def label(self) -> str:
        """For example "rename views tar", "sync folder views", "write unfinished receipt"."""
        at = self.new or self.path
        if self.name == "sync folder":
            return f"sync {folder_kind(at)}"
        if self.name in ("make folder", "remove folder"):
            return f"{self.name.split()[0]} {folder_kind(at)}"
        return f"{self.name} {kind_of(at)}"


class Watched(storage.Disk):
    """Every operation passes `around`, which subclasses replace."""

    def __init__(self) -> None:
        self.opened: dict[int, tuple[Path, bool]] = {}
        """Descriptor to the path it was opened at, and whether to write."""

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        """Carry out one operation by calling `call`, or not."""
        return call()

    def create(self, path: Path) -> int:
        descriptor = self.around(Operation("create", path), lambda: storage.Disk.create(self, path))
        self.opened[descriptor] = path, True
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        operation = Operation("write", self.opened[descriptor][0], data=bytes(data), descriptor=descriptor)
        return self.around(operation, lambda: storage.Disk.write(self, descriptor, data))

    def sync(self, descriptor: int) -> None:
        path, to_write = self.opened[descriptor]
        operation = Operation("sync" if to_write else "sync folder", path, descriptor=descriptor)
        self.around(operation, lambda: storage.Disk.sync(self, descriptor))

    def close(self, descriptor: int) -> None:
        path, to_write = self.opened.pop(descriptor)
        operation = Operation("close" if to_write else "close folder", path, descriptor=descriptor)
        self.around(operation, lambda: storage.Disk.close(self, descriptor))

    def rename(self, old: Path, new: Path) -> None:
        self.around(Operation("rename", old, new), lambda: storage.Disk.rename(self, old, new))

    def link(self, old: Path, new: Path) -> None:
        self.around(Operation("link", old, new), lambda: storage.Disk.link(self, old, new))

    def unlink(self, path: Path) -> None:
        self.around(Operation("unlink", path), lambda: storage.Disk.unlink(self, path))

    def make_folder(self, path: Path) -> None:
        self.around(Operation("make folder", path), lambda: storage.Disk.make_folder(self, path))

    def remove_folder(self, path: Path) -> None:
        self.around(Operation("remove folder", path), lambda: storage.Disk.remove_folder(self, path))

    def open(self, path: Path) -> int:
        descriptor = self.around(Operation("open", path), lambda: storage.Disk.open(self, path))
        self.opened[descriptor] = path, False
        return descriptor

    def read(self, descriptor: int, size: int) -> bytes:
        operation = Operation("read", self.opened[descriptor][0], descriptor=descriptor)
        return self.around(operation, lambda: storage.Disk.read(self, descriptor, size))

    def names(self, path: Path) -> list[str]:
        return self.around(Operation("names", path), lambda: storage.Disk.names(self, path))

    def status(self, path: Path) -> os.stat_result:
        return self.around(Operation("status", path), lambda: storage.Disk.status(self, path))


class Recording(Watched):
    """Keeps the operations that succeeded, in order; of writes, the bytes that were taken."""

    def __init__(self, only: frozenset[str] | None = CHANGES) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._only = only

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        result = call()
        if self._only is None or operation.name in self._only:
            if operation.data is not None and isinstance(result, int):
                operation = Operation("write", operation.path, data=operation.data[:result])
            self.operations.append(operation)
        return result

    def note(self, text: str) -> None:
        """Put a remark into the record, such as that a unit was reported as committed."""
        self.operations.append(Operation("note", Path(text)))


class Dying(Recording):
    """Keeps the record of a process that is killed before its n-th operation, without killing this one.

    `Killed` is raised there and at every operation after it, so that nothing is cleaned up.
    """

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        if operation.name in CHANGES:
            self._left -= 1
        if self._left > 0:
            return super().around(operation, call)
        if operation.name.startswith("close"):
            call()  # the system does that for the dead
        raise Killed


class Killed(BaseException):
    """No error: nothing may catch it."""


class Killing(Watched):
    """Ends this process with SIGKILL at the n-th operation that has a label.

    Args:
        label: of the operation, for example "rename views tar"; None counts all that change a disk.
        nth: which of those, counted from 1.
        halfway: in the middle of it, for a write: half of the bytes are written. Otherwise just before.
    """

    def __init__(self, label: str | None, nth: int, *, halfway: bool = False) -> None:
        super().__init__()
        self._label = label
        self._left = nth
        self._halfway = halfway
        self._lock = threading.Lock()

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        if operation.name in CHANGES and self._label in (None, operation.label):
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    if self._halfway and operation.data is not None and operation.descriptor is not None:
                        os.write(operation.descriptor, operation.data[: len(operation.data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
        return call()


class Failing(Watched):
    """Raises OSError at the n-th operation, or from there on.

    Args:
        nth: counted from 1, over all operations or over those that `only` names.
        errno: of the error.
        sticky: every later operation (of `only`) fails, too.
        only: names of the operations that are counted and may fail; None is all.
        afterwards: the operation is carried out, and its answer lost: a file server does that to rename and link.
        short: a write takes half of its bytes and reports that, instead of an error; others are left alone.

    `fired` tells how often it did; a loop over `nth` ends where it did not. A close is carried out even where it
    fails, as the system does.
    """

    def __init__(
        self,
        nth: int,
        errno: int = errors.EIO,
        *,
        sticky: bool = False,
        only: frozenset[str] | None = None,
        afterwards: bool = False,
        short: bool = False,
    ) -> None:
        super().__init__()
        self.fired = 0
        self.at: Operation | None = None
        """The first operation that failed."""
        self._nth = nth
        self._errno = errno
        self._sticky = sticky
        self._only = only
        self._afterwards = afterwards
        self._short = short
        self._seen = 0
        self._lock = threading.Lock()

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        if not self._is_due(operation):
            return call()
        if self._short and operation.data is not None and operation.descriptor is not None:
            return os.write(operation.descriptor, operation.data[: (len(operation.data) + 1) // 2])  # type: ignore[return-value]
        if self._afterwards or operation.name in ("close", "close folder"):
            call()
        raise OSError(self._errno, os.strerror(self._errno), str(operation.path))

    def _is_due(self, operation: Operation) -> bool:
        if (self._only is not None and operation.name not in self._only) or (self._short and operation.name != "write"):
            return False
        with self._lock:
            self._seen += 1
            if self._seen < self._nth or (self._seen > self._nth and not self._sticky):
                return False
            self.fired += 1
            self.at = self.at or operation
        return True


@contextmanager
def using(disk: storage.Disk) -> Iterator[None]:
    """Put `disk` under all stores, with nothing remembered of what was synced: as in a process that just started."""
    before, durable = storage.disk, dict(storage._durable)
    storage.disk = disk
    storage._durable.clear()
    try:
        yield
    finally:
        storage.disk = before
        storage._durable.clear()
        storage._durable.update(durable)
