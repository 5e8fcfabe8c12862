"""The few file operations that every store goes through: cache, pack, receipts, checkpoints.

A file appears whole or not at all: `write_new` writes a fresh name and syncs it, `publish` renames it into
place (or `publish_once` links it, when the first writer must win) and syncs the folder. `OSError` becomes
`StorageError`; a full disk, quota or inode table becomes `SpaceError`.

A failed fsync is never repeated on the same file: the kernel may have dropped the dirty pages and report
success the second time. `write_new` then raises, and `write_durable` writes once more under a new name.

Beneath stand the operations of `Disk`, one system call each. Tests put another `disk` in their place: one that fails
at the n-th operation, kills the process there, or keeps a record for all the states that a power loss can leave.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from proteus_cache.errors import FormatError, SpaceError, StorageError

Buffer: TypeAlias = bytes | bytearray | memoryview | np.ndarray
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    errno.EACCES: "make it writable for this user, or give another folder",
    errno.EPERM: "make it writable for this user, or give another folder (one whose file system knows hard links)",
    errno.EEXIST: "a file stands where a folder is needed: give another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: give another folder",
    errno.EROFS: "it is mounted read-only: give another folder",
    errno.EOPNOTSUPP: "give a folder on a file system that knows hard links",
    errno.EIO: "look at the disk (dmesg) or the file server, then run the same command again",
    errno.ESTALE: "the file server lost sight of it: run the same command again",
    errno.ETIMEDOUT: "the file server does not answer: look at it, then run the same command again",
    errno.EINTR: "run the same command again",
}
_LOOKING = {"read", "list", "look at", "ask for free space"}
"""What changes nothing, and needs no permission to write."""
_READ_BYTES = 1 << 20


class Disk:
    """The operations of the system that stores are made of, each of which may fail with OSError."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file to write; it must not exist yet."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write from the start of `data`; returns how many bytes were taken, which may be fewer."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Make the bytes of an open file, or the names in an open folder, durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file or folder; some file systems report a failed write only here."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, in place of what had it."""
        os.replace(old, new)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        """Take the name of a file away."""
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """Make one folder, which must not exist."""
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """Remove one empty folder."""
        os.rmdir(path)

    def open(self, path: Path) -> int:
        """A descriptor for reading a file or syncing a folder; a pipe with nobody behind it does not block."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self, descriptor: int, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        return os.read(descriptor, size)

    def names(self, path: Path) -> list[str]:
        """The names in a folder, in no order."""
        return os.listdir(path)

    def status(self, path: Path) -> os.stat_result:
        """Kind, size and inode behind a name; a link is not followed."""
        return os.lstat(path)


disk = Disk()
"""What all functions of this module call; tests replace it."""

_durable: dict[Path, tuple[int, int]] = {}
"""Folders that this process has synced into their parents, and which folder had the name then."""


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_new` put on disk."""

    size: int
    """Bytes."""
    sha256: str
    """64 hex digits of the bytes handed to the file."""


@dataclass(frozen=True, slots=True)
class Free:
    """What a file system still takes."""

    bytes: int
    inodes: int | None
    """None where the file system does not count them."""


@contextmanager
def reported(doing: str, path: Path) -> Iterator[None]:
    """OSError becomes StorageError or SpaceError: the path, what could not be done, why, and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise SpaceError(
                f"{path}: cannot {doing}: {reason}; free space or inodes there and run the same command again, "
                "what is finished is kept"
            ) from error
        is_closed = doing in _LOOKING and error.errno in (errno.EACCES, errno.EPERM)
        remedy = "make it readable for this user" if is_closed else _REMEDIES.get(error.errno or 0)
        raise StorageError(f"{path}: cannot {doing}: {reason}{f'; {remedy}' if remedy else ''}") from error


def temp_name(final_name: str) -> str:
    """A name beside nothing else: `final_name`, the process and 64 random bits."""
    return f"{final_name}.{os.getpid()}.{secrets.token_hex(8)}"


def write_new(path: Path, chunks: Buffer | Iterable[Buffer]) -> Written:
    """Write a file that must not exist yet, sync its bytes, and return its size and digest.

    Args:
        path: a fresh name; an existing file is an error.
        chunks: the bytes, or several buffers one after the other.

    Raises:
        SpaceError: the disk or quota is full; the partial file is removed.
        StorageError: any other failure of open, write, fsync or close; the partial file is removed.
    """
    digest = hashlib.sha256()
    size = 0
    with reported("write", path):
        descriptor = disk.create(path)
    try:
        with reported("write", path):
            try:
                for chunk in _as_chunks(chunks):
                    view = memoryview(chunk).cast("B")  # type: ignore[arg-type]  # numpy types its buffer from 3.12 on
                    digest.update(view)
                    size += view.nbytes
                    _write_all(descriptor, view)
                disk.sync(descriptor)
            finally:
                disk.close(descriptor)
    except BaseException:
        discard(path)
        raise
    return Written(size, digest.hexdigest())


def write_durable(folder: Path, name: str, chunks: Callable[[], Buffer | Iterable[Buffer]]) -> tuple[Path, Written]:
    """Write a temporary file for `name` into `folder`; after one failure that is not a full disk, once more anew.

    Args:
        folder: where unfinished files live, on the file system of the final place.
        name: the final name, for the reader of a listing.
        chunks: makes the bytes; called again for the second attempt, which gets a new name.
    """
    for attempt in (1, 2):
        path = folder / temp_name(name)
        try:
            return path, write_new(path, chunks())
        except SpaceError:
            raise
        except StorageError:
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def write_whole(
    final: Path, chunks: Callable[[], Buffer | Iterable[Buffer]], unfinished: Path | None = None
) -> Written:
    """Give a file new bytes, all or none: written under another name, synced, and renamed to `final`.

    Args:
        final: its place; a file that is there is replaced.
        chunks: makes the bytes, twice where the first attempt fails.
        unfinished: folder for the file until then, on the same file system; None is the final one, hidden by a dot.
    """
    hidden = final.name if unfinished is not None else f".{final.name}"
    temp, written = write_durable(unfinished or final.parent, hidden, chunks)
    try:
        publish(temp, final)
    except BaseException:
        discard(temp)
        raise
    return written


def _as_chunks(chunks: Buffer | Iterable[Buffer]) -> Iterable[Buffer]:
    return (chunks,) if isinstance(chunks, bytes | bytearray | memoryview | np.ndarray) else chunks


def _write_all(descriptor: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[disk.write(descriptor, view) :]


def publish(temp: Path, final: Path) -> None:
    """Rename `temp` to `final`, replacing it, and sync the folder; a `temp` that cannot be renamed stays.

    A file server may rename and lose the answer; which file then has the name decides.
    """
    with reported("rename to", final):
        ours = _inode(temp)
        try:
            disk.rename(temp, final)
        except OSError:
            if ours is None or _inode(final) != ours:
                raise
    sync_folder(final.parent)


def publish_once(temp: Path, final: Path) -> bool:
    """Give `temp` the name `final` unless that exists; `temp` is gone afterwards.

    Returns:
        True when this call made `final` (also where a file server lost the answer); False when another writer was
        first, and perhaps removed `temp` when it had finished.
    """
    is_ours = True
    try:
        with reported("link", final):
            try:
                disk.link(temp, final)
            except OSError as error:
                ours, found = _inode(temp), _inode(final)
                if found is None or found != ours:
                    if not (isinstance(error, FileExistsError) or (isinstance(error, FileNotFoundError) and found)):
                        raise
                    is_ours = False
    finally:
        discard(temp)
    sync_folder(final.parent)  # also a name that another process made: it may have been cut off before this
    return is_ours


def make_folder(path: Path, root: Path | None = None) -> None:
    """Make `path` and its parents; each new name is synced into its parent.

    Args:
        path: of the folder; one that exists is fine.
        root: of the store that it belongs to. From there down to `path` every name is synced once by this process,
            also those that exist: whoever made one may have been cut off before the sync.
    """
    found = _folder_inode(path)
    if found is not None and (root is None or _durable.get(path) == found):
        return
    if path != root:
        make_folder(path.parent, root)
    elif found is None:
        make_folder(path.parent)
    if found is None:
        with reported("make folder", path):
            try:
                disk.make_folder(path)
            except FileExistsError:  # by another process, just now
                if _folder_inode(path) is None:
                    raise
    try:
        sync_folder(path.parent)
    except StorageError as error:
        # Whoever made the root of the store may write in its parent; we need not.
        if found is None or path != root or not isinstance(error.__cause__, PermissionError):
            raise
    if root is not None and (made := _folder_inode(path)) is not None:
        _durable[path] = made


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    with reported("sync folder", path):
        descriptor = disk.open(path)
        try:
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)


def remove(path: Path) -> None:
    """Remove one file and make that durable; a missing file is no error."""
    with reported("remove", path):
        try:
            disk.unlink(path)
        except FileNotFoundError:
            return
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all that is in it; links are removed, not followed. Nothing is synced."""
    with reported("remove", path):
        _remove_tree(path)


def discard(path: Path) -> None:
    """Remove a temporary file or folder as well as that goes: what stays is found by the next run."""
    with suppress(OSError):
        _remove_tree(path)


def _remove_tree(path: Path) -> None:
    try:
        if not stat.S_ISDIR(disk.status(path).st_mode):
            disk.unlink(path)
            return
        for name in disk.names(path):
            _remove_tree(path / name)
        disk.remove_folder(path)
    except FileNotFoundError:
        return


def list_folder(path: Path) -> list[str]:
    """Sorted names in `path`; empty when it does not exist."""
    with reported("list", path):
        try:
            return sorted(disk.names(path))
        except FileNotFoundError:
            return []


def size_of(path: Path) -> int | None:
    """Size of a regular file in bytes, or None when there is none (links are not followed)."""
    with reported("look at", path):
        try:
            status = disk.status(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def inode_of(path: Path) -> tuple[int, int] | None:
    """Which file has this name now (device and inode, kept by a rename), or None when there is none."""
    with reported("look at", path):
        return _inode(path)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = disk.status(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _folder_inode(path: Path) -> tuple[int, int] | None:
    """Device and inode of a folder, or of the one that a link leads to; None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a file of at most `limit` bytes.

    Raises:
        FormatError: the file is larger than `limit`.
        StorageError: it cannot be read.
    """
    with reported("read", path), _opened(path) as descriptor:
        parts, left, step = [], limit + 1, min(limit, os.fstat(descriptor).st_size) + 1
        while left and (part := disk.read(descriptor, min(step, left))):
            parts.append(part)
            left, step = left - len(part), _READ_BYTES
    if left == 0:
        raise FormatError(f"{path}: larger than the {limit:,} bytes that such a file may have")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on; fewer where it ends before. A negative offset counts from the end."""
    with reported("read", path), _opened(path) as descriptor:
        os.lseek(descriptor, offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        parts = []
        while size and (part := disk.read(descriptor, size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def sha256_of(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 (64 hex digits) of a file.

    Args:
        path: of the file.
        from_disk: it was synced: have the system forget its copy in memory first (where it can be told to), so that
            the bytes are those of the disk.
    """
    digest = hashlib.sha256()
    size = 0
    with reported("read", path), _opened(path) as descriptor:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while part := disk.read(descriptor, _READ_BYTES):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A regular file, open for reading."""
    descriptor = disk.open(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield descriptor
    finally:
        disk.close(descriptor)


def free_space(path: Path) -> Free:
    """Space and inodes left for this user on the file system that holds (or will hold) `path`."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    with reported("ask for free space", path):
        status = os.statvfs(path)
    return Free(status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None)
