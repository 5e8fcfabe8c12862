"""A real file system that is too small: a tmpfs of a few hundred kilobytes or a few inodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PAGE_BYTES = 4096
"""What a tmpfs hands out at a time."""
BALLAST = "ballast"


class NoSmallDisk(Exception):
    """This machine does not let us mount one; says why."""


@contextmanager
def small_disk(folder: Path, *, size_bytes: int = 64 << 20, inodes: int = 100_000) -> Iterator[Path]:
    """Mount a tmpfs on `folder`, which is made; nothing of it is left afterwards.

    Args:
        folder: where.
        size_bytes: all that it holds, in whole pages.
        inodes: files and folders that it holds, its own top one included.

    Raises:
        NoSmallDisk: `mount` is refused, as it is without root.
    """
    folder.mkdir(parents=True)
    _mount(folder, f"size={size_bytes},nr_inodes={inodes}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def enlarge(folder: Path, *, size_bytes: int = 64 << 20, inodes: int = 100_000) -> None:
    """Give a mounted small disk more room, as somebody does who frees space."""
    _mount(folder, f"remount,size={size_bytes},nr_inodes={inodes}")


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", os.fspath(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoSmallDisk("there is no command mount") from error
    if done.returncode:
        raise NoSmallDisk(f"mount is refused: {done.stderr.strip()}")


@cache
def why_no_small_disk(scratch: Path) -> str | None:
    """Why this machine has no small disks; None where it has."""
    try:
        with small_disk(scratch / "probe"):
            return None
    except NoSmallDisk as error:
        return str(error)


def fill(folder: Path) -> None:
    """Use up every page that is free, as another user of the disk may do at any moment."""
    free = os.statvfs(folder)
    descriptor = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, free.f_bavail * free.f_frsize)
    finally:
        os.close(descriptor)


def make_room(folder: Path) -> None:
    """Take away what `fill` wrote."""
    (folder / BALLAST).unlink()
