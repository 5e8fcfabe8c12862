"""The few file operations that every store goes through: cache, pack, receipts, checkpoints.

A file appears whole or not at all: `write_new` writes a fresh name and syncs it, `publish` renames it into
place (or `publish_once` links it, when the first writer must win) and syncs the folder. `OSError` becomes
`StorageError`; a full disk, quota or inode table becomes `SpaceError`.

A failed fsync is never repeated on the same file: the kernel may have dropped the dirty pages and report
success the second time. `write_new` then raises, and the caller may write once more under a new name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

Buffer: TypeAlias = bytes | bytearray | memoryview | np.ndarray
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    errno.EACCES: "make it writable for this user, or give another folder",
    errno.EPERM: "make it writable for this user, or give another folder (one whose file system knows hard links)",
    errno.EEXIST: "a file stands where a folder is needed: give another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: give another folder",
    errno.EROFS: "it is mounted read-only: give another folder",
    errno.EOPNOTSUPP: "give a folder on a file system that knows hard links",
}
_READ_BYTES = 1 << 20


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
def _reported(doing: str, path: Path) -> Iterator[None]:
    from proteus_cache.errors import SpaceError, StorageError

    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise SpaceError(
                f"{path}: cannot {doing}: {reason}; free space or inodes there and run the same command again, "
                "finished units are kept"
            ) from error
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        raise StorageError(f"{path}: cannot {doing}: {reason}{remedy}") from error


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
    with _reported("write", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with _reported("write", path):
            try:
                for chunk in _as_chunks(chunks):
                    view = memoryview(chunk).cast("B")  # type: ignore[arg-type]  # numpy types its buffer from 3.12 on
                    digest.update(view)
                    size += view.nbytes
                    _write_all(descriptor, view)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return Written(size, digest.hexdigest())


def write_durable(folder: Path, name: str, chunks: Callable[[], Buffer | Iterable[Buffer]]) -> tuple[Path, Written]:
    """Write a temporary file for `name` into `folder`; after one failure that is not a full disk, once more anew.

    Args:
        folder: where unfinished files live, on the file system of the final place.
        name: the final name, for the reader of a listing.
        chunks: makes the bytes; called again for the second attempt, which gets a new name.
    """
    from proteus_cache.errors import SpaceError, StorageError

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


def _as_chunks(chunks: Buffer | Iterable[Buffer]) -> Iterable[Buffer]:
    return (chunks,) if isinstance(chunks, bytes | bytearray | memoryview | np.ndarray) else chunks


def _write_all(descriptor: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def publish(temp: Path, final: Path) -> None:
    """Rename `temp` to `final`, replacing it, and sync the folder."""
    with _reported("rename to", final):
        os.replace(temp, final)
    sync_folder(final.parent)


def publish_once(temp: Path, final: Path) -> bool:
    """Give `temp` the name `final` unless that exists; `temp` is gone afterwards.

    Returns:
        True when this call made `final`; False when another writer was first (and perhaps removed `temp` when it had
        finished), or this call's link had already succeeded on a file system that lost the answer: read `final` to
        tell.
    """
    try:
        with _reported("link", final):
            try:
                os.link(temp, final)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if not os.path.lexists(final):
                    raise
                return False
    finally:
        with suppress(OSError):
            temp.unlink()
    sync_folder(final.parent)
    return True


def make_folder(path: Path) -> None:
    """Make `path` and its parents; each new name is synced into its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _reported("make folder", path):
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    with _reported("sync folder", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove one file and make that durable; a missing file is no error."""
    with _reported("remove", path):
        try:
            path.unlink()
        except FileNotFoundError:
            return
    sync_folder(path.parent)


def list_folder(path: Path) -> list[str]:
    """Sorted names in `path`; empty when it does not exist."""
    with _reported("list", path):
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []


def size_of(path: Path) -> int | None:
    """Size of a regular file in bytes, or None when there is none (links are not followed)."""
    import stat

    with _reported("look at", path):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def inode_of(path: Path) -> tuple[int, int] | None:
    """Which file has this name now (device and inode, kept by a rename), or None when there is none."""
    with _reported("look at", path):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
    return status.st_dev, status.st_ino


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a file of at most `limit` bytes.

    Raises:
        FormatError: the file is larger than `limit`.
        StorageError: it cannot be read.
    """
    from proteus_cache.errors import FormatError

    with _reported("read", path), open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path}: larger than the {limit:,} bytes that such a file may have")
    return data


def sha256_of(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 (64 hex digits) of a file.

    Args:
        path: of the file.
        from_disk: it was synced: have the system forget its copy in memory first (where it can be told to), so that
            the bytes are those of the disk.
    """
    digest = hashlib.sha256()
    size = 0
    with _reported("read", path), open(path, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def free_space(path: Path) -> Free:
    """Space and inodes left for this user on the file system that holds (or will hold) `path`."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    with _reported("ask for free space", path):
        status = os.statvfs(path)
    return Free(status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None)
