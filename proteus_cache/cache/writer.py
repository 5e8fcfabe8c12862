"""Commit of one unit: its files first, its receipt last.

Every file is written under a temporary name, synced, and renamed; the receipt is published with `link()`, so the
first writer of a unit wins. There are no locks: a unit without a receipt does not exist, and redoing one is harmless.
Two writers of one unit may rename their files in turn. So each looks, after its receipt, whether the files that have
their names are still its own, takes the receipt back where they are not, and writes the unit once more.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
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
from proteus_cache.errors import DamageError, FormatError, StorageError

logger = logging.getLogger(__name__)
_ATTEMPTS = 10
_LOTS = random.SystemRandom()
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
"""Errors that say that a file is missing, or is no plain file."""


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
    source_sha256: str
    """Of the image file that it was made from."""
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
    widened: dict[str, int] = field(default_factory=dict)
    """Target name to the steps of codes that an overflow widened."""
    precision: str
    made_with: dict[str, str]


def publish_arrays(layout: CacheLayout, manifest: Manifest, view: str) -> dict[str, str]:
    """Make the Zarr groups and arrays of one view index where they are missing.

    Returns:
        Relative path to SHA-256 of every zarr.json above the view's arrays, for the receipts.

    Raises:
        FormatError: one exists and describes something else; remove it and extract again.
    """
    wanted = wanted_metadata(manifest, view)
    for path, data in wanted.items():
        final = layout.resolve(path)
        if storage.size_of(final) is None:
            storage.make_folder(final.parent, layout.root)
            temp, _ = storage.write_durable(layout.temporary, "zarr.json", partial(bytes, data))
            storage.publish_once(temp, final)
    found = {path: storage.read_bytes(layout.resolve(path), zarr_arrays.MAX_METADATA_BYTES) for path in wanted}
    for path, data in found.items():
        zarr_arrays.check_metadata(data, wanted[path], str(layout.resolve(path)))
    return {path: hashlib.sha256(data).hexdigest() for path, data in found.items()}


def wanted_metadata(manifest: Manifest, view: str) -> dict[str, bytes]:
    """Relative path to the bytes of every zarr.json above the arrays of one view index."""
    n_rows, _ = rows_of_view(manifest, view)
    wanted = {
        "targets.zarr/zarr.json": zarr_arrays.group_metadata(),
        f"targets.zarr/{view}/zarr.json": zarr_arrays.group_metadata(),
    }
    for target in manifest.targets:
        path = f"{array_folder(view, target.name)}/zarr.json"
        wanted[path] = zarr_arrays.array_metadata(target, n_rows, manifest.shard_size)
    return wanted


def rows_of_view(manifest: Manifest, view: str) -> tuple[int, int]:
    """(rows, shards) of one view index or of the probe."""
    if view == "probe":
        return manifest.images.n_probe, manifest.n_probe_shards
    return manifest.images.n_images, manifest.n_shards


def commit_unit(
    layout: CacheLayout,
    manifest: Manifest,
    manifest_digest: str,
    zarr_digests: dict[str, str],
    unit: Unit,
    *,
    replaces: str | None = None,
) -> Receipt:
    """Write all files of a unit and then its receipt; returns the receipt that holds afterwards.

    A receipt that is already there is kept when its files are whole, and replaced by this unit otherwise. A receipt
    whose bytes have the SHA-256 `replaces` is replaced in any case: it is known to be wrong.

    Raises:
        SpaceError, StorageError: as the disk says; nothing that was committed before is touched, and the
            temporary files of this unit are removed.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        began = time.monotonic()
        try:
            receipt = _try_commit(layout, manifest, manifest_digest, zarr_digests, unit, replaces)
        except StorageError as error:
            # The run that completes a cache empties tmp/: what vanished there is simply written again.
            if attempt == _ATTEMPTS or not isinstance(error.__cause__, FileNotFoundError):
                raise
            continue
        if receipt is not None:
            return receipt
        # Writers that go on in step would replace each other's files for ever: they draw lots who is first.
        time.sleep(_LOTS.uniform(0, attempt) * (time.monotonic() - began))
    raise StorageError(
        f"{layout.receipt(unit.view, unit.shard)}: other processes replaced the files of this unit {_ATTEMPTS} times; "
        "let fewer of them extract the same units, and run the same command again"
    )


def _try_commit(
    layout: CacheLayout,
    manifest: Manifest,
    manifest_digest: str,
    zarr_digests: dict[str, str],
    unit: Unit,
    replaces: str | None,
) -> Receipt | None:
    """The receipt that holds now, this unit's or another writer's; None when another process got in between."""
    temporary: dict[str, Path] = {}
    files: dict[str, FileRecord] = {}
    try:
        for relative, chunks in _files(manifest, unit):
            temporary[relative], written = storage.write_durable(layout.temporary, Path(relative).name, chunks)
            files[relative] = FileRecord(size=written.size, sha256=written.sha256)
        receipt = _receipt(manifest, manifest_digest, zarr_digests, unit, files)
        existing = _whole_receipt(layout, receipt, replaces)
        if existing is not None:
            storage.sync_folder(layout.receipt(unit.view, unit.shard).parent)  # its writer may have been cut off before
            return existing
        storage.remove(layout.receipt(unit.view, unit.shard))
        return receipt if _publish(layout, receipt, temporary) else None
    finally:
        for temp in temporary.values():
            storage.discard(temp)


def _publish(layout: CacheLayout, receipt: Receipt, temporary: dict[str, Path]) -> bool:
    """Give the files their names and then the receipt; whether all of them are this writer's afterwards."""
    final_receipt = layout.receipt(receipt.view, receipt.shard)
    ours = {}
    for relative, temp in temporary.items():
        final = layout.resolve(relative)
        storage.make_folder(final.parent, layout.root)
        if storage.size_of(final_receipt) is not None:
            return False
        ours[final] = storage.inode_of(temp)
        storage.publish(temp, final)
    storage.make_folder(final_receipt.parent, layout.root)
    sealed = receipt.sealed()
    temp, _ = storage.write_durable(layout.temporary, final_receipt.name, lambda: sealed)
    if not storage.publish_once(temp, final_receipt):
        return False
    return all(storage.inode_of(final) == inode for final, inode in ours.items())


def _whole_receipt(layout: CacheLayout, wanted: Receipt, replaces: str | None) -> Receipt | None:
    """The receipt of the same unit that is there, if all its files are what it says and it is not to be replaced."""
    path = layout.receipt(wanted.view, wanted.shard)
    if storage.size_of(path) is None:
        return None
    try:
        data = storage.read_bytes(path, MAX_DOCUMENT_BYTES)
        if hashlib.sha256(data).hexdigest() == replaces:
            logger.info("replaced receipt=%s reason=it is redone", path)
            return None
        found = Receipt.parse(data, str(path))
        of_this_unit = (found.manifest, found.view, found.shard) == (wanted.manifest, wanted.view, wanted.shard)
        if (
            of_this_unit
            and found.files.keys() == wanted.files.keys()
            and all(storage.sha256_of(layout.resolve(p)) == (f.size, f.sha256) for p, f in found.files.items())
        ):
            return found
        logger.warning("replaced receipt=%s reason=its files are not what it says", path)
    except (DamageError, StorageError) as error:
        # A disk that fails says nothing about what is on it, and what is committed stays then.
        if isinstance(error, StorageError) and getattr(error.__cause__, "errno", None) not in _NOT_THERE:
            raise
        logger.warning("replaced receipt=%s reason=%s", path, error)
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
    if any(len(unit.codes[target.name]) != unit.end_row - unit.first_row for target in manifest.targets):
        raise FormatError(f"unit {unit.view}/{unit.shard}: codes do not cover its rows")
    local = [view.row - unit.first_row for view in unit.views]
    crc32c = {
        target.name: [int(google_crc32c.value(unit.codes[target.name][row])) for row in local]
        for target in manifest.targets
    }
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
            source_sha256=[view.source_sha256 for view in unit.views],
            crc32c=crc32c,
        ),
        quarantined=unit.quarantined,
        moments=unit.moments,
        widened=unit.widened,
        made_with=unit.made_with,
    )
