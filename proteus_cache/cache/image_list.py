"""Reading `images.parquet`, which others may have sent: exact columns and rows, names that stay where they belong."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from proteus_cache.cache.manifest import Manifest
from proteus_cache.cache.parquet_pages import unpacked_bytes
from proteus_cache.errors import FormatError

_COLUMNS = {"key": pa.string(), "path": pa.string(), "label": pa.int32(), "probe": pa.bool_()}
_LEAST_BYTES = 4
"""Of an image in the file: its key ends with 10 digits of a hash, which no compression makes shorter than 5 bytes."""
_MEAN_BYTES = 1024
"""Of an image's key and path, at most."""
_MAX_FOOTER_BYTES = 8 << 20
_KEY = "^[a-z0-9_]{1,64}$"
_OUTSIDE = r"^/|(^|/)\.\.(/|$)|\x00"
"""An absolute path, one with `..` in it, or one with a NUL: a shared list must not name files outside the images."""


def parse_images(data: bytes, manifest: Manifest, what: str) -> pa.Table:
    """The image list of a cache: columns key, path, label (null without), probe (bool).

    Args:
        data: bytes of `images.parquet`, their digest checked.
        manifest: of the cache.
        what: file, for messages.

    Raises:
        FormatError: not a Parquet file of these columns and as many rows as the manifest says, or it holds a key or a
            path that no image of a cache has.
    """
    try:
        table = _table(data, manifest.images.n_images, what)
        keys, paths = table["key"], table["path"]
        has_keys = pc.all(pc.match_substring_regex(keys, _KEY)).as_py()
        leaves = pc.any(pc.match_substring_regex(paths, _OUTSIDE)).as_py()
        if not has_keys or leaves or keys.null_count or paths.null_count or table["probe"].null_count:
            raise FormatError(f"{what}: holds keys or paths that no image has")
        n_probe = pc.sum(table["probe"], min_count=0).as_py()
        if pc.count_distinct(keys).as_py() != len(table) or n_probe != manifest.images.n_probe:
            raise FormatError(f"{what}: a key occurs twice, or it has another number of probe images than it should")
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        raise FormatError(f"{what}: not a readable image list ({' '.join(str(error).split())[:200]})") from error
    return table


def _table(data: bytes, n_images: int, what: str) -> pa.Table:
    if (
        int.from_bytes(data[-8:-4], "little") > min(len(data), _MAX_FOOTER_BYTES)
        or n_images > len(data) // _LEAST_BYTES
    ):
        raise FormatError(f"{what}: not the image list of {n_images:,} images, which its size and its end do not fit")
    too_large = FormatError(f"{what}: unpacks to more than {n_images:,} images can need")
    most_bytes = _MEAN_BYTES * n_images + (1 << 20)
    # What a dictionary says once for many rows is written out only when its size is known.
    with pq.ParquetFile(io.BytesIO(data), read_dictionary=["key", "path"]) as file:
        schema, metadata = file.schema_arrow, file.metadata
        types = {name: _plain(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
        if types != _COLUMNS or len(schema.names) != len(_COLUMNS) or metadata.num_rows != n_images:
            raise FormatError(f"{what}: not the image list of this cache: other columns, or another number of images")
        if _unpacked_bytes(data, metadata) > most_bytes:
            raise too_large
        table = file.read()
    if len(table) != n_images:
        raise FormatError(f"{what}: holds {len(table):,} images instead of {n_images:,}")
    if sum(_text_bytes(table[name]) for name in ("key", "path")) > most_bytes:
        raise too_large
    return table.cast(pa.schema([field.with_type(_plain(field.type)) for field in schema]))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a column that is read as a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _unpacked_bytes(data: bytes, metadata: pq.FileMetaData) -> int:
    """Bytes of all columns after decompression."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    most_pages = 64 + metadata.num_rows // 1000
    total = 0
    for chunk in (group.column(number) for group in groups for number in range(len(_COLUMNS))):
        start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
        total += unpacked_bytes(data, start, chunk.total_compressed_size, most_pages)
    return total


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of all texts of a column that was read as a dictionary."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(length.cast(pa.int64())).as_py() or 0 for length in lengths)
