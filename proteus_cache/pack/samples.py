"""The bytes of samples, read through the index into the places where a batch wants them.

One `preadv` fetches the codes and the view of a sample, which are neighbours in the tar; both CRCs are
checked before either is used. Needs numpy and nothing of torch, so reader processes start fast.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from proteus_cache.cache.layout import shard_stem, view_index
from proteus_cache.errors import ChecksumError, FormatError, at
from proteus_cache.pack.index import REMEDY, Index, Records, crc32c, unreadable
from proteus_cache.tar import BLOCK
from proteus_cache.views.encode import decode_view, most_view_bytes

_OPEN_TARS = 64


@dataclass(frozen=True, slots=True)
class PackLayout:
    """What a reader must know of a pack: plain values, so that a reader process can be told in JSON."""

    root: str
    code_bytes: int
    side_px: int
    views: dict[str, tuple[int, int]]
    """View index to (stored views, tars)."""

    def index_path(self, view: str) -> Path:
        """Of the index of one view index."""
        return Path(self.root, f"{view}.idx")


def tar_name(view: str, tar: int) -> str:
    """Relative path of a tar in a pack."""
    return f"{view}/{shard_stem(tar)}.tar"


class Part(NamedTuple):
    """The samples of one view index in a batch."""

    view: str
    """"v000", ... or "probe"."""
    numbers: NDArray[np.int64]
    """(n,) record numbers."""
    rows: NDArray[np.int64]
    """(n,) where they stand in the batch."""


@dataclass(frozen=True, slots=True)
class RawSamples:
    """Samples as they are stored."""

    codes: NDArray[np.uint8]
    """(n, code_bytes)."""
    view_bytes: NDArray[np.uint8]
    """All encoded views, back to back."""
    ends: list[int]
    """Where each view ends in `view_bytes`."""


class SampleReader:
    """Reads samples of one pack; for one thread. Tars stay open, at most 64 at a time."""

    def __init__(self, layout: PackLayout) -> None:
        self.layout = layout
        self.bytes_read = 0
        """Codes and encoded views, so far."""
        self.index = cache(self._open_index)
        self._tars: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._between = np.empty(2 * BLOCK, dtype=np.uint8)
        self._scratch = np.empty(1 << 20, dtype=np.uint8)
        self._most_view_bytes = most_view_bytes(layout.side_px)

    def read(self, part: Part, codes: NDArray[np.uint8], views: NDArray[np.uint8]) -> None:
        """Fill rows of a batch.

        Args:
            part: which samples, and the rows they fill.
            codes: (b, code_bytes) uint8, C order, overwritten in these rows.
            views: (b, H, W, 3) uint8, overwritten with decoded views in these rows.

        Raises:
            DamageError: bytes are not those that were packed; says which tar, row and byte.
            StorageError: a file cannot be read.
        """
        view, rows = part.view, part.rows.tolist()
        records = self.index(view).read(part.numbers)
        sizes = records["view_size"].tolist()
        largest = max(sizes, default=0)
        if largest > self._most_view_bytes:
            where = self._where(view, records, int(np.argmax(records["view_size"])))
            raise FormatError(f"{where}: {largest:,} bytes are more than a view can have; {REMEDY}")
        if largest > self._scratch.size:
            self._scratch = np.empty(largest, dtype=np.uint8)
        scratch = self._scratch
        places = (scratch[:size] for size in sizes)
        members = self._members(view, records, map(codes.__getitem__, rows), places)
        for number, row, size in zip(members, rows, sizes, strict=True):
            try:
                views[row] = decode_view(scratch[:size].data, self.layout.side_px)
            except FormatError as error:
                raise FormatError(f"{self._where(view, records, number)}: {error}; {REMEDY}") from error

    def read_raw(
        self, view: str, numbers: NDArray[np.int64], codes: NDArray[np.uint8], view_bytes: NDArray[np.uint8]
    ) -> RawSamples:
        """Fill a batch with codes and encoded views.

        Args:
            view: "v000", ... or "probe".
            numbers: (n,) record numbers.
            codes: (n, code_bytes) uint8, C order, overwritten.
            view_bytes: a uint8 buffer, overwritten from its start; `view_sizes` says how long it must be.
        """
        records = self.index(view).read(numbers)
        ends = np.cumsum(records["view_size"], dtype=np.int64).tolist()
        if ends and ends[-1] > view_bytes.size:
            raise ValueError(f"{ends[-1]} bytes of views do not fit into a buffer of {view_bytes.size}")
        starts = [0, *ends[:-1]]
        places = (view_bytes[start:end] for start, end in zip(starts, ends, strict=True))
        for _ in self._members(view, records, codes, places):
            pass
        return RawSamples(codes, view_bytes[: ends[-1] if ends else 0], ends)

    def view_sizes(self, view: str, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
        """(n,) bytes of the encoded views with these record numbers."""
        sizes: NDArray[np.uint32] = self.index(view).read(numbers)["view_size"]
        return sizes

    def read_json(self, view: str, number: int) -> bytes:
        """The sample document of one record, checksum checked."""
        records = self.index(view).read(np.array([number], dtype=np.int64))
        offset, size = int(records["json_offset"][0]), int(records["json_size"][0])
        place = np.empty(size, dtype=np.uint8)
        found = _preadv(self._tar(view, int(records["tar"][0])), [place], offset, self._where(view, records, 0))
        if found != size:
            raise FormatError(f"{self._where(view, records, 0)}: the tar is cut short; {REMEDY}")
        if crc32c(place) != int(records["json_crc32c"][0]):
            raise ChecksumError(f"{self._where(view, records, 0)}: its document is damaged; {REMEDY}")
        return place.tobytes()

    def close(self) -> None:
        """Close the tars; the reader can be used again."""
        while self._tars:
            os.close(self._tars.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_tars"):
            self.close()

    def _members(
        self, view: str, records: Records, codes: Iterable[NDArray[np.uint8]], places: Iterable[NDArray[np.uint8]]
    ) -> Iterator[int]:
        """Read codes and view of every record; yields the row once both are in place and checked.

        This is the inner loop of training: everything that can be done for a whole batch is done before it.
        """
        code_bytes = self.layout.code_bytes
        gap = (-code_bytes) % BLOCK + BLOCK
        between = self._between[:gap]
        wanted = (records["view_size"].astype(np.int64) + (code_bytes + gap)).tolist()
        self.bytes_read += int(records["view_size"].sum(dtype=np.int64)) + code_bytes * len(records)
        columns = zip(
            records["tar"].tolist(),
            records["codes_offset"].tolist(),
            wanted,
            records["codes_crc32c"].tolist(),
            records["view_crc32c"].tolist(),
            codes,
            places,
            strict=True,
        )
        tar_of, preadv, checksum = self._tar, os.preadv, google_crc32c.value
        for row, (tar, offset, size, codes_crc, view_crc, code, place) in enumerate(columns):
            descriptor = tar_of(view, tar)
            try:
                found = preadv(descriptor, (code, between, place), offset)  # type: ignore[arg-type]  # buffers
            except OSError as error:
                raise unreadable(f"{self._where(view, records, row)}: cannot read", error) from error
            if found != size:
                self._read_rest(descriptor, (code, between, place), offset, found, self._where(view, records, row))
            if checksum(code) != codes_crc:
                raise ChecksumError(self._damaged(view, records, row, "codes", "codes_offset"))
            if checksum(place) != view_crc:
                raise ChecksumError(self._damaged(view, records, row, "view", "view_offset"))
            yield row

    def _read_rest(
        self, descriptor: int, places: Sequence[NDArray[np.uint8]], offset: int, done: int, where: str
    ) -> None:
        """Go on after a short read; the end of the file is damage."""
        for place in places:
            size = place.size
            while done < size:
                found = _preadv(descriptor, [place[done:]], offset + done, where)
                if found == 0:
                    raise FormatError(f"{where}: the tar is cut short; {REMEDY}")
                done += found
            offset, done = offset + size, done - size

    def _tar(self, view: str, tar: int) -> int:
        """An open descriptor of a tar; the one that was not used for longest is closed."""
        key = (view, tar)
        descriptor = self._tars.get(key)
        if descriptor is None:
            descriptor = self._tars[key] = open_tar(Path(self.layout.root, tar_name(view, tar)))
            if len(self._tars) > _OPEN_TARS:
                os.close(self._tars.popitem(last=False)[1])
        else:
            self._tars.move_to_end(key)
        return descriptor

    def _open_index(self, view: str) -> Index:
        n_records, n_tars = self.layout.views[view]
        with at(view=view):
            return Index(self.layout.index_path(view), view_index(view), n_records, n_tars, self.layout.code_bytes)

    def _damaged(self, view: str, records: Records, row: int, what: str, offset: str) -> str:
        place = f"{self._where(view, records, row)}, byte {int(records[offset][row])}"
        return f"{place}: the {what} of this sample are damaged (CRC-32C differs); {REMEDY}"

    def _where(self, view: str, records: Records, row: int) -> str:
        path = Path(self.layout.root, tar_name(view, int(records["tar"][row])))
        return f"{path}: image row {int(records['row'][row])}"


def _preadv(descriptor: int, places: list[NDArray[np.uint8]], offset: int, where: str) -> int:
    try:
        return os.preadv(descriptor, [place.data for place in places], offset)
    except OSError as error:
        raise unreadable(f"{where}: cannot read", error) from error


def open_tar(path: Path) -> int:
    """A descriptor of a tar; neither it nor its folder may be a link."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        folder = os.open(path.parent, flags | os.O_DIRECTORY)
        try:
            descriptor = os.open(path.name, flags | os.O_NONBLOCK, dir_fd=folder)  # a pipe must not block us
        finally:
            os.close(folder)
    except OSError as error:
        raise unreadable(f"{path}: cannot open", error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: no plain file; {REMEDY}")
    return descriptor
