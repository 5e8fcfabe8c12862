"""The error tree: what can go wrong, and with which exit code a command then ends.

Every error that a user can cause or meet descends from `ProteusCacheError`; its message names the file or
sample, what is wrong and what to do. Anything else that escapes a command is a bug of ours. The tree, with exit codes::

    ProteusCacheError            1  failed
      UsageError                 2  misused: a wrong flag, folder or combination
        ConfigError                 a value that no run can have
        ImageListError              the images folder or list cannot be used
      BadImageError              1  this one image cannot become a view (quarantined, never an I/O error)
      WeightsError               1  weights missing, of another model, or unsafe to read
      DamageError                1  stored bytes are not what was written
        ChecksumError               a digest or CRC differs
        FormatError                 the structure is not the documented one
      CanaryError                1  teacher, decoder or device is not what it was; not to be trusted
      StorageError               1  the file system said no
        SpaceError                  disk, quota or inodes are exhausted
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from proteus_cache.text import printable


class ProteusCacheError(Exception):
    """Root of all errors that proteus-cache raises on purpose.

    Its text is one line without control characters, wherever it is shown or logged: it may quote a hostile file.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(ProteusCacheError):
    """The command or call was misused; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting has a value that no run can have."""


class ImageListError(UsageError):
    """The images folder or list cannot be used."""


class BadImageError(ProteusCacheError):
    """One image cannot become a view: damaged, too large, or of a kind that is not accepted."""


class WeightsError(ProteusCacheError):
    """Weights are missing, belong to another model, or are unsafe to read."""


class DamageError(ProteusCacheError):
    """Stored bytes are not what was written."""


class ChecksumError(DamageError):
    """A digest or CRC differs from the recorded one."""


class FormatError(DamageError):
    """A file's structure is not the documented one."""


class CanaryError(ProteusCacheError):
    """A check of the teacher, the decoder or the device failed: this process must not go on."""


class StorageError(ProteusCacheError):
    """The file system refused an operation."""


class SpaceError(StorageError):
    """Disk space, quota or inodes are exhausted; permanent for this process."""


@contextmanager
def at(**where: object) -> Iterator[None]:
    """Add where we were to any exception that passes through."""
    try:
        yield
    except Exception as error:
        error.add_note("at " + ", ".join(f"{name}={value}" for name, value in where.items()))
        raise
