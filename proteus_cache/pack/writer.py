"""The bytes of a pack: tars, index records, indices. Equal samples give equal bytes, anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from proteus_cache import tar
from proteus_cache.errors import ChecksumError
from proteus_cache.pack.index import NO_LABEL, RECORD, Records, crc32c, index_header, seal_records


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One sample on its way into a tar."""

    key: str
    row: int
    """In the image list."""
    label: int | None
    view: bytes
    """Encoded."""
    json: bytes
    """The sealed sample document."""
    codes: Sequence[NDArray[np.uint8]]
    """The codes of every target, (code_bytes,) each, in the pack's order."""
    codes_crc32c: Sequence[int] | None = None
    """Of the codes of every target, as their source has them: `make_records` compares. None: it has none."""


def tar_buffers(samples: Sequence[PackedSample], extension: str) -> Iterator[bytes | NDArray[np.uint8]]:
    """The bytes of a tar, one buffer after the other.

    Args:
        samples: in row order.
        extension: of the views, "jpg" or "png".
    """
    for sample in samples:
        code_bytes = sum(code.size for code in sample.codes)
        yield tar.header(f"{sample.key}.codes", code_bytes)
        yield from sample.codes
        yield tar.padding(code_bytes)
        for suffix, data in ((extension, sample.view), ("json", sample.json)):
            yield tar.header(f"{sample.key}.{suffix}", len(data))
            yield data
            yield tar.padding(len(data))
    yield tar.END


def make_records(samples: Sequence[PackedSample], number: int) -> Records:
    """The index records of the samples of tar `number`, where `tar_buffers` puts them.

    Raises:
        ChecksumError: codes are not those that their source speaks of.
    """
    records = np.zeros(len(samples), dtype=RECORD)
    offset = 0
    for record, sample in zip(records, samples, strict=True):
        checksum = 0
        for code in sample.codes:
            checksum = google_crc32c.extend(checksum, code)
        if sample.codes_crc32c is not None and [*map(crc32c, sample.codes)] != [*sample.codes_crc32c]:
            raise ChecksumError(
                f"{sample.key}: its codes changed on their way into the pack (CRC-32C differs); run the same command "
                "again, and look at this machine's memory if that repeats"
            )
        sizes = sum(code.size for code in sample.codes), len(sample.view), len(sample.json)
        checksums = checksum, crc32c(sample.view), crc32c(sample.json)
        record["tar"], record["row"] = number, sample.row
        record["label"] = NO_LABEL if sample.label is None else sample.label
        for name, size, crc in zip(("codes", "view", "json"), sizes, checksums, strict=True):
            record[f"{name}_offset"], record[f"{name}_size"] = offset + tar.BLOCK, size
            record[f"{name}_crc32c"] = crc
            offset += tar.BLOCK + tar.padded(size)
    return seal_records(records)


def index_buffers(
    view_index: int | None, n_records: int, n_tars: int, code_bytes: int, tars: Iterable[Records]
) -> Iterator[bytes]:
    """The bytes of an index file; `tars` gives the records of every tar, from 0; None is the probe."""
    yield index_header(view_index, n_records, n_tars, code_bytes)
    for records in tars:
        yield records.tobytes()
