"""The index format: golden bytes, what is refused, what is found damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proteus_cache.errors import ChecksumError, FormatError, StorageError
from proteus_cache.pack.index import RECORD, RECORD_BYTES, Index, Records, index_header, seal_records
from proteus_cache.pack.writer import index_buffers

CODE_BYTES = 60


@pytest.fixture
def records() -> Records:
    """Five samples in two tars."""
    records = np.zeros(5, dtype=RECORD)
    for number, record in enumerate(records):
        record["tar"], record["row"], record["label"] = number // 3, number, 7
        start = 512 + (number % 3) * 2560
        record["codes_offset"], record["codes_size"], record["codes_crc32c"] = start, CODE_BYTES, 1
        record["view_offset"], record["view_size"], record["view_crc32c"] = start + 1024, 300, 2
        record["json_offset"], record["json_size"], record["json_crc32c"] = start + 2048, 90, 3
    return seal_records(records)


def write_index(path: Path, records: Records) -> Path:
    path.write_bytes(b"".join(index_buffers(4, records.size, 2, CODE_BYTES, [records])))
    return path


def open_index(path: Path, n_records: int = 5) -> Index:
    return Index(path, 4, n_records, 2, CODE_BYTES)


def test_header_and_record_have_their_golden_bytes(records: Records) -> None:
    header = index_header(4, 5, 2, CODE_BYTES)

    assert header.hex() == (
        "50524f54455553580100000040000000050000000000000004000000020000003c000000" + "00" * 24 + "f65b53bd"
    )
    assert records[4].tobytes().hex() == (
        "01000000"
        "04000000"
        "000c000000000000"
        "0010000000000000"
        "0014000000000000"
        "3c000000"
        "2c010000"
        "5a000000"
        "01000000"
        "02000000"
        "03000000"
        "07000000"
        "9fa93928"
    )
    assert RECORD.itemsize == len(header) == RECORD_BYTES


def test_the_probe_has_its_own_number() -> None:
    assert index_header(None, 0, 1, 1)[24:28] == b"\xff" * 4


def test_records_come_back_in_any_order(tmp_path: Path, records: Records) -> None:
    index = open_index(write_index(tmp_path / "v004.idx", records))

    read = index.read(np.array([4, 0, 4]))

    assert np.array_equal(read, records[[4, 0, 4]])


@pytest.mark.parametrize("number", [-1, 5])
def test_a_number_out_of_range_is_refused(tmp_path: Path, records: Records, number: int) -> None:
    index = open_index(write_index(tmp_path / "v004.idx", records))

    with pytest.raises(IndexError, match="holds records 0 to 4"):
        index.read(np.array([number]))


def test_every_flipped_bit_is_found(tmp_path: Path, records: Records) -> None:
    path = write_index(tmp_path / "v004.idx", records[2:4])
    data = path.read_bytes()

    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises((ChecksumError, FormatError), match=r"v004\.idx.*proteus-cache repair"):
            open_index(path, n_records=2).read(np.arange(2))


@pytest.mark.parametrize("size", [0, 63, 64, 383, 385])
def test_another_length_is_refused(tmp_path: Path, records: Records, size: int) -> None:
    path = write_index(tmp_path / "v004.idx", records)
    path.write_bytes((path.read_bytes() + b"x")[:size])

    with pytest.raises(FormatError, match=f"{size} bytes instead of 384"):
        open_index(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tar", 2),
        ("codes_offset", 0),
        ("codes_offset", 2**63),
        ("codes_size", CODE_BYTES + 1),
        ("view_offset", 512),
        ("view_size", 2**31),
        ("json_offset", 2**64 - 1),
        ("json_size", 2**30),
    ],
)
def test_impossible_numbers_are_refused_though_the_checksum_holds(
    tmp_path: Path, records: Records, field: str, value: int
) -> None:
    records[3][field] = value
    path = write_index(tmp_path / "v004.idx", seal_records(records))

    with pytest.raises(FormatError, match="record 3 has impossible numbers"):
        open_index(path).read(np.arange(5))


def test_an_offset_that_no_file_has_is_refused(tmp_path: Path, records: Records) -> None:
    for field in ("codes_offset", "view_offset", "json_offset"):
        records[3][field] += np.uint64(2**63)
    path = write_index(tmp_path / "v004.idx", seal_records(records))

    with pytest.raises(FormatError, match="record 3 has impossible numbers"):
        open_index(path).read(np.arange(5))


def test_a_link_or_nothing_is_refused(tmp_path: Path, records: Records) -> None:
    path = write_index(tmp_path / "other", records)
    (tmp_path / "v004.idx").symlink_to(path)

    for name in ("v004.idx", "missing.idx"):
        with pytest.raises(StorageError, match=f"{name}: cannot open the index"):
            open_index(tmp_path / name)


def test_an_index_without_records_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "v004.idx"
    path.write_bytes(b"".join(index_buffers(4, 0, 2, CODE_BYTES, [])))

    assert open_index(path, n_records=0).read(np.arange(0)).size == 0
