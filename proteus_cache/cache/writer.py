"""Commit of one unit: its files first, its receipt last.

Every file is written under a temporary name, synced, and renamed; the receipt is published with `link()`, so the
first writer of a unit wins and two that race end with one receipt that names what is on disk. There are no locks: a
unit without a receipt does not exist, and redoing one is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from proteus_cache import storage, tar
from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.layout import CacheLayout, array_folder, views_tar, zarr_shard
from proteus_cache.cache.manifest import Manifest, TargetRecord
from proteus_cache.cache.receipt import FileRecord, Moments, Quarantined, Receipt, Samples
from proteus_cache.documents import MAX_DOCUMENT_BYTES
from proteus_cache.errors import DamageError, FormatError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredView:
    """One view on its way to disk."""

    row: int
    """Array row of the image (or of the probe)."""
    key: str
    data: bytes
    """The encoded view."""
    digest: str
    """BLAKE2b (8 bytes, hex) of its pixels."""
    sample_json: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """All that is committed together."""

    view: str
    shard: int
    first_row: int
    end_row: int
    views: list[StoredView]
    """In row order, without quarantined images."""
    codes: dict[str, NDArray[np.uint8]]
    """Target name to (end_row - first_row, code_bytes) uint8; rows of quarantined images are zero."""
    quarantined: list[Quarantined] = field(default_factory=list)
    moments: dict[str, Moments]
    precision: str
    made_with: dict[str, str]


def publish_arrays(layout: CacheLayout, manifest: Manifest, view: str) -> dict[str, str]:
    """Make the Zarr groups and arrays of one view index where they are missing.

    Returns:
        Relative path to SHA-256 of every zarr.json above the view's arrays, for the receipts.

    Raises:
        FormatError: one exists and describes something else.
    """
    n_rows, _ = rows_of_view(manifest, view)
    wanted = {
        "targets.zarr/zarr.json": zarr_arrays.group_metadata(),
        f"targets.zarr/{view}/zarr.json": zarr_arrays.group_metadata(),
    }
    for target in manifest.targets:
        path = f"{array_folder(view, target.name)}/zarr.json"
        wanted[path] = zarr_arrays.array_metadata(target, n_rows, manifest.shard_size)
    for path, data in wanted.items():
        final = layout.resolve(path)
        if storage.size_of(final) is None:
            storage.make_folder(final.parent)
            temp, _ = storage.write_durable(layout.temporary, "zarr.json", _giving(data))
            storage.publish_once(temp, final)
    found = {path: storage.read_bytes(layout.resolve(path), 1 << 20) for path in wanted}
    for target in manifest.targets:
        path = f"{array_folder(view, target.name)}/zarr.json"
        zarr_arrays.check_array_metadata(target, n_rows, manifest.shard_size, found[path], str(layout.resolve(path)))
    import hashlib

    return {path: hashlib.sha256(data).hexdigest() for path, data in found.items()}


def rows_of_view(manifest: Manifest, view: str) -> tuple[int, int]:
    """(rows, shards) of one view index or of the probe."""
    if view == "probe":
        return manifest.images.n_probe, manifest.n_probe_shards
    return manifest.images.n_images, manifest.n_shards


def commit_unit(
    layout: CacheLayout, manifest: Manifest, manifest_digest: str, zarr_digests: dict[str, str], unit: Unit
) -> Receipt:
    """Write all files of a unit and then its receipt; returns the receipt that holds afterwards.

    A receipt that is already there is kept when its files are whole, and replaced by this unit otherwise.

    Raises:
        SpaceError, StorageError: as the disk says; nothing that was committed before is touched, and the
            temporary files of this unit are removed.
    """
    temporary: list[Path] = []
    try:
        written: dict[str, tuple[Path, FileRecord]] = {}
        for relative, chunks in _files(manifest, unit):
            temp, record = storage.write_durable(layout.temporary, Path(relative).name, chunks)
            temporary.append(temp)
            written[relative] = temp, FileRecord(size=record.size, sha256=record.sha256)
        receipt = _receipt(manifest, manifest_digest, zarr_digests, unit, {k: v[1] for k, v in written.items()})
        sealed = receipt.sealed()
        existing = _whole_receipt(layout, unit.view, unit.shard)
        if existing is not None:
            return existing
        for relative, (temp, _) in written.items():
            final = layout.resolve(relative)
            storage.make_folder(final.parent)
            storage.publish(temp, final)
        return _publish_receipt(layout, receipt, sealed)
    except BaseException:
        for temp in temporary:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
        raise


def _publish_receipt(layout: CacheLayout, receipt: Receipt, sealed: bytes) -> Receipt:
    final = layout.receipt(receipt.view, receipt.shard)
    storage.make_folder(final.parent)
    while True:
        temp, _ = storage.write_durable(layout.temporary, final.name, _giving(sealed))
        if storage.publish_once(temp, final):
            return receipt
        winner = _whole_receipt(layout, receipt.view, receipt.shard)
        if winner is not None:
            return winner


def _whole_receipt(layout: CacheLayout, view: str, shard: int) -> Receipt | None:
    """The unit's receipt if all its files are what it says; a receipt whose files are not is removed."""
    path = layout.receipt(view, shard)
    if storage.size_of(path) is None:
        return None
    try:
        receipt = Receipt.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
        if all(storage.sha256_of(layout.resolve(p)) == (f.size, f.sha256) for p, f in receipt.files.items()):
            return receipt
    except DamageError as error:
        logger.warning("replaced receipt=%s reason=%s", path, error)
    storage.remove(path)
    return None


def _files(manifest: Manifest, unit: Unit) -> Iterator[tuple[str, Callable[[], Iterable[storage.Buffer]]]]:
    yield views_tar(unit.view, unit.shard), lambda: _tar_buffers(unit.views, manifest.views.view_format)
    for target in manifest.targets:
        path = zarr_shard(unit.view, target.name, unit.shard, 1 + len(target.codec.array_shape))
        yield path, _shard_chunks(target, manifest.shard_size, unit.codes[target.name])


def _shard_chunks(
    target: TargetRecord, shard_size: int, codes: NDArray[np.uint8]
) -> Callable[[], Iterable[storage.Buffer]]:
    return lambda: zarr_arrays.shard_buffers(target, shard_size, codes)


def _tar_buffers(views: list[StoredView], view_format: str) -> Iterator[bytes]:
    extension = "jpg" if view_format == "jpeg" else "png"
    for view in views:
        for suffix, data in ((extension, view.data), ("json", view.sample_json)):
            yield tar.header(f"{view.key}.{suffix}", len(data))
            yield data
            yield tar.padding(len(data))
    yield tar.END


def _receipt(
    manifest: Manifest,
    manifest_digest: str,
    zarr_digests: dict[str, str],
    unit: Unit,
    files: dict[str, FileRecord],
) -> Receipt:
    local = [view.row - unit.first_row for view in unit.views]
    crc32c = {
        target.name: [int(google_crc32c.value(unit.codes[target.name][row])) for row in local]
        for target in manifest.targets
    }
    if any(len(unit.codes[target.name]) != unit.end_row - unit.first_row for target in manifest.targets):
        raise FormatError(f"unit {unit.view}/{unit.shard}: codes do not cover its rows")
    return Receipt(
        manifest=manifest_digest,
        view=unit.view,
        shard=unit.shard,
        first_row=unit.first_row,
        end_row=unit.end_row,
        precision=unit.precision,  # type: ignore[arg-type]  # checked by pydantic
        files=files,
        zarr=zarr_digests,
        samples=Samples(
            rows=[view.row for view in unit.views],
            keys=[view.key for view in unit.views],
            view_digests=[view.digest for view in unit.views],
            crc32c=crc32c,
        ),
        quarantined=unit.quarantined,
        moments=unit.moments,
        made_with=unit.made_with,
    )


def _giving(data: bytes) -> Callable[[], bytes]:
    return lambda: data
