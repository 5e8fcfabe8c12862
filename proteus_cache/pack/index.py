"""The index of one view index of a pack: a 64-byte header and one fixed 64-byte record for every stored view.

Records are in the order of the tars and, inside a tar, of its members; so record numbers ascend with image
rows. Both header and records end with the CRC-32C of their other bytes. The file is mapped, never loaded.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from proteus_cache.errors import ChecksumError, FormatError, StorageError
from proteus_cache.tar import BLOCK, END

RECORD_BYTES = 64
RECORD = np.dtype(
    [
        ("tar", "<u4"),
        ("row", "<u4"),
        ("codes_offset", "<u8"),
        ("view_offset", "<u8"),
        ("json_offset", "<u8"),
        ("codes_size", "<u4"),
        ("view_size", "<u4"),
        ("json_size", "<u4"),
        ("codes_crc32c", "<u4"),
        ("view_crc32c", "<u4"),
        ("json_crc32c", "<u4"),
        ("label", "<u4"),
        ("record_crc32c", "<u4"),
    ]
)
NO_LABEL = 0xFFFFFFFF
PROBE_NUMBER = 0xFFFFFFFF
MAX_VIEW_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 20
_MAX_OFFSET = 1 << 60  # what a file system and `preadv` can take; the tar itself is far shorter
_MAGIC = b"PROTEUSX"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQIII24x")

Records = NDArray[np.void]
"""(n,) of dtype RECORD."""


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C of bytes or of a contiguous uint8 array, which is not copied."""
    return int(google_crc32c.value(data))


def seal_records(records: Records) -> Records:
    """A copy of `records` with the last field of each set to the CRC-32C of the others."""
    sealed = records.copy()
    data = sealed.tobytes()
    starts = range(0, len(data), RECORD_BYTES)
    sealed["record_crc32c"] = [google_crc32c.value(data[start : start + RECORD_BYTES - 4]) for start in starts]
    return sealed


def index_header(view_index: int | None, n_records: int, n_tars: int, code_bytes: int) -> bytes:
    """The first 64 bytes of an index file; `view_index` None means the probe."""
    number = PROBE_NUMBER if view_index is None else view_index
    head = _HEADER.pack(_MAGIC, _VERSION, RECORD_BYTES, n_records, number, n_tars, code_bytes)
    return head + struct.pack("<I", google_crc32c.value(head))


class Index:
    """A mapped index file."""

    def __init__(self, path: Path, view_index: int | None, n_records: int, n_tars: int, code_bytes: int) -> None:
        """
        Args:
            path: of the `.idx` file.
            view_index: as pack.json says, like the numbers that follow; None for the probe.
            n_records: stored views.
            n_tars: tars of this view index.
            code_bytes: of every view.

        Raises:
            FormatError: the file's length or header is not the expected one.
            StorageError: it cannot be opened.
        """
        self.path = path
        self.n_records = n_records
        self._code_bytes = code_bytes
        self._n_tars = n_tars
        data = _map(path, RECORD_BYTES * (1 + n_records))
        if data[:RECORD_BYTES] != index_header(view_index, n_records, n_tars, code_bytes):
            raise FormatError(f"{path}: its header is not the one of this pack; {REMEDY}")
        self._records = np.frombuffer(data, dtype=RECORD, offset=RECORD_BYTES)

    def read(self, numbers: NDArray[np.int64]) -> Records:
        """Checked copies of the records with these numbers.

        Raises:
            IndexError: a number is out of range.
            ChecksumError: a record is damaged.
            FormatError: a record describes members that no packer writes.
        """
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.n_records):
            raise IndexError(f"{self.path}: holds records 0 to {self.n_records - 1}")
        records = self._records[numbers]
        data = records.tobytes()
        value = google_crc32c.value
        end = RECORD_BYTES - 4
        for place, stored in enumerate(records["record_crc32c"].tolist()):
            start = RECORD_BYTES * place
            if value(data[start : start + end]) != stored:
                raise ChecksumError(f"{self.path}: record {numbers[place]} is damaged (CRC-32C differs); {REMEDY}")
        self._check(records, numbers)
        return records

    def check_places(self, tar_sizes: Sequence[int]) -> None:
        """Check that the records describe the tars from end to end: nothing between, before, behind or twice.

        Args:
            tar_sizes: bytes of each tar, as pack.json says.

        Raises:
            FormatError: they do not.
        """
        records = self._records
        order = np.diff(records["tar"].astype(np.int64))
        begins = np.flatnonzero(np.concatenate(([1], order)))[: self.n_records]
        ends = np.append(begins[1:] - 1, self.n_records - 1)[: len(begins)]
        sizes = np.full(self._n_tars, len(END), dtype=np.uint64)
        if (order < 0).any() or (self.n_records and int(records["tar"][-1]) >= self._n_tars):
            raise FormatError(f"{self.path}: its records are not in the order of the tars; {REMEDY}")
        if (np.diff(records["row"].astype(np.int64)) <= 0).any():
            raise FormatError(f"{self.path}: its records are not in the order of the images; {REMEDY}")
        after = _next_data(records["json_offset"], records["json_size"])
        follows = after[:-1] == records["codes_offset"][1:]
        if not (follows | (order > 0)).all() or not (records["codes_offset"][begins] == BLOCK).all():
            raise FormatError(f"{self.path}: its records leave out parts of a tar, or name them twice; {REMEDY}")
        sizes[records["tar"][ends]] = after[ends] - np.uint64(BLOCK) + np.uint64(len(END))
        if sizes.tolist() != list(tar_sizes):
            raise FormatError(f"{self.path}: its tars are not as long as pack.json says; {REMEDY}")

    def rows(self, first: int, end: int) -> NDArray[np.int64]:
        """Image rows of records `first` to `end` - 1; unlike `read`, for a file that was proved as a whole."""
        rows: NDArray[np.int64] = self._records["row"][first:end].astype(np.int64)
        return rows

    def _check(self, records: Records, numbers: NDArray[np.int64]) -> None:
        good = (
            (records["tar"] < self._n_tars)
            & (records["codes_offset"] >= BLOCK)
            & (records["codes_offset"] <= _MAX_OFFSET)
            & (records["codes_size"] == self._code_bytes)
            & (records["view_offset"] == _next_data(records["codes_offset"], records["codes_size"]))
            & (records["view_size"] <= MAX_VIEW_BYTES)
            & (records["json_offset"] == _next_data(records["view_offset"], records["view_size"]))
            & (records["json_size"] <= MAX_JSON_BYTES)
        )
        if not good.all():
            raise FormatError(f"{self.path}: record {numbers[int(np.argmin(good))]} has impossible numbers; {REMEDY}")


REMEDY = "run `proteus-cache repair PACK`, which packs anew what is damaged"


def unreadable(what: str, error: OSError) -> StorageError:
    """Why a file of a pack cannot be opened or read, and what to do.

    Args:
        what: the file, perhaps the sample in it, and what was done: "v000.idx: cannot open the index".
        error: of the system.
    """
    return StorageError(f"{what}: {error.strerror or error}; {_remedy(error)}")


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ELOOP:
            return REMEDY
        case errno.EACCES | errno.EPERM:
            return "make it readable for this user"
        case errno.EMFILE | errno.ENFILE:
            return "this process may open no more files: raise `ulimit -n`"
    return "look at the disk (dmesg) or the file server, then run the same command again"


def _next_data(offset: NDArray[np.uint64], size: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Where the data of the next member starts: after whole blocks and one header."""
    blocks = (size.astype(np.uint64) + np.uint64(BLOCK - 1)) // np.uint64(BLOCK)
    return offset + (blocks + np.uint64(1)) * np.uint64(BLOCK)


def _map(path: Path, expected: int) -> mmap.mmap:
    """The file as a read-only map of exactly `expected` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            size = status.st_size
            if not stat.S_ISREG(status.st_mode) or size != expected:
                raise FormatError(f"{path}: {size:,} bytes instead of {expected:,}; {REMEDY}")
            return mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(f"{path}: cannot open the index", error) from error
