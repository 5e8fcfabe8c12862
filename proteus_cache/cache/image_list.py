"""Reading `images.parquet`, which others may have sent: exact columns and rows, names that stay where they belong."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from proteus_cache.cache.manifest import Manifest
from proteus_cache.errors import FormatError

_COLUMNS = {"key": pa.string(), "path": pa.string(), "label": pa.int32(), "probe": pa.bool_()}
_MAX_ROW_BYTES = 8192
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
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise FormatError(f"{what}: not a readable image list ({' '.join(str(error).split())[:200]})") from error
    return table


def _table(data: bytes, n_images: int, what: str) -> pa.Table:
    with pq.ParquetFile(io.BytesIO(data)) as file:
        schema, metadata = file.schema_arrow, file.metadata
        types = dict(zip(schema.names, schema.types, strict=True))
        if types != _COLUMNS or len(schema.names) != len(_COLUMNS) or metadata.num_rows != n_images:
            raise FormatError(f"{what}: not the image list of this cache: other columns, or another number of images")
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > _MAX_ROW_BYTES * n_images + (1 << 20):
            raise FormatError(f"{what}: unpacks to more than {n_images:,} images can need")
        table = file.read()
    if len(table) != n_images:
        raise FormatError(f"{what}: holds {len(table):,} images instead of {n_images:,}")
    return table
