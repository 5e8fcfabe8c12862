"""Targets as Zarr v3 arrays: their metadata, and whole shard files to and from bytes.

One Zarr shard file holds one target of one unit; its inner chunks are single views. The metadata come from
zarr-python. The shard files follow the `sharding_indexed` specification and are laid out here, byte for byte as
zarr-python would (a test compares them), because a unit is always written and read whole: no copy of the codes is
made, the writing thread is free for hashing, and damaged input meets a strict reader instead of a general one.

    chunk 0 | CRC-32C | chunk 1 | CRC-32C | ...            chunks: raw rows (uint8), or zstd of them (float)
    (offset, size) as two u64 for each of the shard's rows, 2^64 - 1 twice where the array has ended
    CRC-32C of that index
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from proteus_cache import storage
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.documents import canonical, strict_json
from proteus_cache.errors import ChecksumError, FormatError

_ZSTD_LEVEL = 1
_EMPTY = np.uint64(2**64 - 1)
MAX_METADATA_BYTES = 1 << 20
OLD_METADATA = (".zarray", ".zgroup", ".zattrs", ".zmetadata")
"""Of Zarr v2, where the name of a codec can mean running a pickle. No cache has them, and a general reader may prefer
them to `zarr.json`, so they are refused wherever they lie."""
_MOST_NAMED = 5
_ANEW = "`proteus-cache repair` on the cache writes it anew"


def group_metadata() -> bytes:
    """The bytes of a group's zarr.json."""
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3)
    return _stored(store, "zarr.json")


def array_metadata(target: TargetRecord, n_rows: int, shard_size: int) -> bytes:
    """The bytes of the zarr.json of one target's array over `n_rows` rows."""
    store = MemoryStore()
    row = tuple(target.codec.array_shape)
    zarr.create_array(
        store,
        shape=(n_rows, *row),
        shards=(shard_size, *row),
        chunks=(1, *row),
        dtype=target.codec.array_dtype,
        compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()] if _is_compressed(target) else [Crc32cCodec()],
        filters=None,
        fill_value=0,
        zarr_format=3,
    )
    return _stored(store, "zarr.json")


def shard_buffers(target: TargetRecord, shard_size: int, codes: NDArray[np.uint8]) -> Iterator[bytes | memoryview]:
    """The bytes of one Zarr shard file, one buffer after the other.

    Args:
        target: type, shape and codec.
        shard_size: rows of a full shard.
        codes: (rows of this shard, code_bytes) uint8, C order; at most `shard_size` rows.
    """
    index = np.full((shard_size, 2), _EMPTY, dtype="<u8")
    compressor = Zstd(level=_ZSTD_LEVEL) if _is_compressed(target) else None
    offset = 0
    for row, code in enumerate(codes):
        chunk = memoryview(code) if compressor is None else compressor.encode(code)
        size = len(chunk) + 4
        index[row] = offset, size
        offset += size
        yield chunk
        yield _crc32c(chunk)
    tail = index.tobytes()
    yield tail
    yield _crc32c(tail)


def read_shard(target: TargetRecord, n_rows: int, shard_size: int, data: bytes, what: str) -> NDArray[np.uint8]:
    """The codes of one Zarr shard file, every checksum checked.

    Args:
        target: type, shape and codec.
        n_rows: rows that this shard holds.
        shard_size: rows of a full shard.
        data: the file's bytes.
        what: file name for messages.

    Returns:
        (n_rows, code_bytes) uint8.

    Raises:
        ChecksumError: a checksum differs.
        FormatError: the file is cut short, or a chunk is not where this writer puts it.
    """
    index = _read_index(data, shard_size, what)
    if (index[n_rows:] != _EMPTY).any():
        raise FormatError(f"{what}: holds rows beyond the {n_rows} that it should")
    codes = np.empty((n_rows, target.codec.code_bytes), dtype=np.uint8)
    decompressor = Zstd() if _is_compressed(target) else None
    expected = 0
    view = memoryview(data)
    for row, (offset, size) in enumerate(index[:n_rows].tolist()):
        if offset != expected or size < 4 or offset + size > len(data):
            raise FormatError(f"{what}: the view in row {row} is not where the index says")
        expected += size
        _read_chunk(decompressor, view[offset : offset + size], codes[row], f"{what}: the view in row {row}")
    return codes


def read_row(target: TargetRecord, row: int, shard_size: int, path: Path) -> NDArray[np.uint8]:
    """The codes of one row of a Zarr shard file, (code_bytes,) uint8; reads its index and one chunk.

    Raises:
        ChecksumError, FormatError: as `read_shard`.
        StorageError: it cannot be read.
    """
    index_bytes = 16 * shard_size + 4
    offset, size = _read_index(storage.read_part(path, -index_bytes, index_bytes), shard_size, str(path))[row].tolist()
    codes = np.empty(target.codec.code_bytes, dtype=np.uint8)
    if not 4 <= size <= 2 * codes.size + 1024:
        raise FormatError(f"{path}: the view in row {row} is not where the index says")
    chunk = memoryview(storage.read_part(path, offset, size))
    _read_chunk(Zstd() if _is_compressed(target) else None, chunk, codes, f"{path}: the view in row {row}")
    return codes


def _read_chunk(decompressor: Zstd | None, chunk: memoryview, codes: NDArray[np.uint8], what: str) -> None:
    """Check one chunk and unpack it into `codes`."""
    data, crc = chunk[:-4], chunk[-4:]
    if _crc32c(data) != crc:
        raise ChecksumError(f"{what} is damaged (CRC-32C differs)")
    if decompressor is not None:
        _decompress(decompressor, data, codes, what)
    elif len(data) != codes.size:
        raise FormatError(f"{what} has {len(data)} bytes of codes")
    else:
        codes[:] = np.frombuffer(data, dtype=np.uint8)


def check_metadata(found: bytes, wanted: bytes, what: str) -> None:
    """Compare a zarr.json with the one that the manifest asks for, of `array_metadata` or `group_metadata`.

    Raises:
        FormatError: not strict JSON, or any field differs: another shape, type, codec or format version.
    """
    expected = json.loads(wanted)
    try:
        there = strict_json(found, what)
    except FormatError as error:
        raise FormatError(f"{error}; {_ANEW}") from error
    if canonical(there) != canonical(expected):  # 1, 1.0 and true are equal in Python, and three things to Zarr
        differing = sorted(key for key in {*there, *expected} if there.get(key) != expected.get(key))
        named = ", ".join(f"{key[:40]!a}" for key in differing[:_MOST_NAMED]) or "the type of a number"
        raise FormatError(f"{what}: not the array or group of this cache (differs in {named}); {_ANEW}")


def _read_index(data: bytes, shard_size: int, what: str) -> NDArray[np.uint64]:
    index_bytes = 16 * shard_size
    if len(data) < index_bytes + 4:
        raise FormatError(f"{what}: {len(data)} bytes are too few for a shard of {shard_size} rows")
    index = data[-index_bytes - 4 : -4]
    if _crc32c(index) != data[-4:]:
        raise ChecksumError(f"{what}: its index is damaged (CRC-32C differs)")
    return np.frombuffer(index, dtype="<u8").reshape(shard_size, 2)


def _decompress(decompressor: Zstd, chunk: memoryview, out: NDArray[np.uint8], what: str) -> None:
    """Decode one zstd frame into a buffer of exactly its size; a frame that declares another size is refused first."""
    if _declared_size(bytes(chunk[:14])) != out.nbytes:
        raise FormatError(f"{what} does not unpack to {out.nbytes:,} bytes")
    try:
        decompressor.decode(bytes(chunk), out)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"{what} cannot be decompressed ({error})") from error


def _declared_size(frame: bytes) -> int | None:
    """Content size in the header of a zstd frame (RFC 8878, 3.1.1.1); None when there is none or it is no frame."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    size_flag, is_single_segment, dictionary_flag = frame[4] >> 6, frame[4] >> 5 & 1, frame[4] & 3
    n_bytes = (is_single_segment, 2, 4, 8)[size_flag]
    if n_bytes == 0:
        return None
    start = 5 + (1 - is_single_segment) + (0, 1, 2, 4)[dictionary_flag]
    size = int.from_bytes(frame[start : start + n_bytes], "little")
    return size + 256 if n_bytes == 2 else size


def _is_compressed(target: TargetRecord) -> bool:
    """Floats gain 8 to 17 % from zstd; packed codes nothing."""
    return target.codec.array_dtype != "uint8"


def _crc32c(buffer: Any) -> bytes:
    """CRC-32C as the four little-endian bytes of the Zarr codec; numpy takes the buffer without a copy."""
    return int(google_crc32c.value(np.frombuffer(buffer, dtype=np.uint8))).to_bytes(4, "little")


def _stored(store: MemoryStore, key: str) -> bytes:
    return bytes(store._store_dict[key].to_bytes())
