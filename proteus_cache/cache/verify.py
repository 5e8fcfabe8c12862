"""Does a cache still hold what was written? Structure and sizes by default, every digest and checksum on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from proteus_cache import storage
from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.layout import array_folder, is_view, shard_stem
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.writer import rows_of_view
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import DamageError, StorageError
from proteus_cache.views.encode import decode_view, digest_pixels


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was written."""

    path: str
    """Relative to the store."""
    unit: str | None
    """For example "v000/s00012"; None when no single unit is concerned."""
    problem: str
    remedy: str


def verify_cache(
    path: str | Path, read_data: bool = False, progress: Callable[[int, int, int], None] | None = None
) -> list[Finding]:
    """Check a cache; an empty list means that nothing is wrong.

    Args:
        path: the cache's folder.
        read_data: read every file and check every digest and checksum, view pixels included; otherwise structure,
            names and sizes.
        progress: called with (units done, units in all, bytes read of them).

    Raises:
        UsageError: there is no cache at `path`.
        DamageError: the manifest itself is damaged, so nothing else can be judged.
    """
    cache = open_cache(path)
    findings = [*_plan_files(cache, read_data)]
    known = {"manifest.json", "images.parquet"}
    known |= {f"codec/{t.codec.parameters}.safetensors" for t in cache.manifest.targets if t.codec.parameters}
    units = [(view, shard) for view in cache.views() for shard in cache.units(view)]
    n_bytes = 0
    for done, (view, shard) in enumerate(units):
        findings += _unit(cache, view, shard, known, read_data)
        if read_data:
            files = map(cache.layout.resolve, cache.unit_files(view, shard))
            n_bytes += sum(storage.size_of(file) or 0 for file in files)
        if progress is not None:
            progress(done + 1, len(units), n_bytes)
    return findings + list(_unknown_files(cache, known))


def _plan_files(cache: Cache, read_data: bool) -> Iterator[Finding]:
    again = "copy it back from where the cache came from; units are not affected"
    if storage.size_of(cache.layout.images) is None:
        yield Finding("images.parquet", None, "missing", again)
    elif read_data:
        yield from _caught("images.parquet", None, again, lambda: cache.image_table)
    for target in cache.manifest.targets:
        if target.codec.parameters is not None:
            relative = f"codec/{target.codec.parameters}.safetensors"
            yield from _caught(relative, None, again, partial(cache.parameters_blob, target))


def _unit(cache: Cache, view: str, shard: int, known: set[str], read_data: bool) -> list[Finding]:
    name = f"{view}/{shard_stem(shard)}"
    relative = f"receipts/{name}.json"
    remedy = f"remove {cache.path / relative} and run the same extract again: it redoes this unit only"
    known.update([relative, *cache.unit_files(view, shard)] if shard < rows_of_view(cache.manifest, view)[1] else [])
    try:
        receipt = cache.receipt(view, shard)
    except (DamageError, StorageError) as error:
        return [Finding(relative, name, str(error), remedy)]
    if receipt is None:
        return [Finding(relative, name, "vanished while it was checked", remedy)]
    findings = []
    for file, record in receipt.files.items():
        size = storage.size_of(cache.layout.resolve(file))
        if size != record.size:
            problem = "missing" if size is None else f"{size:,} bytes instead of {record.size:,}"
            findings.append(Finding(file, name, problem, remedy))
    findings += _arrays(cache, receipt, name, known)
    if read_data and not findings:
        findings += _unit_data(cache, receipt, name, remedy)
    return findings


def _arrays(cache: Cache, receipt: Receipt, name: str, known: set[str]) -> Iterator[Finding]:
    """Every zarr.json above the unit's arrays is the one that its receipt saw."""
    remedy = "remove it and run the same extract again: it writes it anew"
    expected = {"targets.zarr/zarr.json", f"targets.zarr/{receipt.view}/zarr.json"}
    expected |= {f"{array_folder(receipt.view, target.name)}/zarr.json" for target in cache.manifest.targets}
    known.update(expected)
    for path in sorted(expected):
        metadata = _metadata(cache, path)
        if metadata is None:
            yield Finding(path, name, "missing", remedy)
        elif hashlib.sha256(metadata).hexdigest() != receipt.zarr.get(path):
            yield Finding(path, name, "not the one that the unit was written with", remedy)


def _metadata(cache: Cache, path: str) -> bytes | None:
    """The bytes of a zarr.json; None where no file of a possible size has that name."""
    final = cache.layout.resolve(path)
    size = storage.size_of(final)
    if size is None or size > zarr_arrays.MAX_METADATA_BYTES:
        return None
    return storage.read_bytes(final, zarr_arrays.MAX_METADATA_BYTES)


def _unit_data(cache: Cache, receipt: Receipt, name: str, remedy: str) -> Iterator[Finding]:
    """File digests, chunk checksums, code CRCs, sample documents and view pixels."""
    view, shard = receipt.view, receipt.shard
    yield from _caught(f"receipts/{name}.json", name, remedy, lambda: _check_images(cache, receipt))
    for target in cache.manifest.targets:
        relative = array_folder(view, target.name)
        yield from _caught(relative, name, remedy, partial(cache.read_codes, view, shard, target.name))
    yield from _caught(f"views/{name}.tar", name, remedy, lambda: _check_views(cache, receipt))


def _check_images(cache: Cache, receipt: Receipt) -> None:
    """The rows of a receipt are those of the image list."""
    rows = [cache.image_row(receipt.view, row) for row in range(receipt.first_row, receipt.end_row)]
    keys = cache.image_table["key"].take(pa.array(rows)).to_pylist()
    held = dict(zip(receipt.samples.rows, receipt.samples.keys, strict=True))
    held |= {image.row: image.key for image in receipt.quarantined}
    if [held[row] for row in range(receipt.first_row, receipt.end_row)] != keys:
        raise DamageError(f"receipts/{receipt.view}/{shard_stem(receipt.shard)}.json: names other images than the list")


def _check_views(cache: Cache, receipt: Receipt) -> None:
    members = cache.read_views(receipt.view, receipt.shard)
    side_px = cache.manifest.views.size_px
    samples = receipt.samples
    for key, digest, source in zip(samples.keys, samples.view_digests, samples.source_sha256, strict=True):
        data, sample = members[key]
        document = parse_sealed(sample, f"{key}.json")
        stated = [document.get(field) for field in ("key", "view", "view_digest")]
        if stated != [key, receipt.view, digest] or dict(document.get("source", {})).get("sha256") != source:
            raise DamageError(f"{key}.json: is not the document of this view")
        if digest_pixels(decode_view(data, side_px)) != digest:
            raise DamageError(
                f"{key}: decodes to other pixels than the teacher saw ({cache.manifest.views.decoder}); "
                "another JPEG decoder, or damage"
            )


def _unknown_files(cache: Cache, known: set[str]) -> Iterator[Finding]:
    for folder, names, files in os.walk(cache.path):
        relative = Path(folder).relative_to(cache.path)
        if relative == Path("."):
            names[:] = [name for name in names if name != "tmp"]
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        for file in sorted([*files, *links]):
            path = (relative / file).as_posix()
            if path not in known and not _is_above_an_array(cache, path):
                yield Finding(path, None, "does not belong to the cache", _unknown_remedy(path))


def _unknown_remedy(path: str) -> str:
    if path.startswith(("views/", "targets.zarr/")):
        return "left by a unit that was cut off, or foreign; running extract again replaces or keeps it, else remove it"
    return "remove it"


def _is_above_an_array(cache: Cache, path: str) -> bool:
    """Whether it is the right zarr.json of a view index of which no unit is committed yet."""
    match path.split("/"):
        case ["targets.zarr", "zarr.json"]:
            wanted = zarr_arrays.group_metadata()
        case ["targets.zarr", view, "zarr.json"] if is_view(view):
            wanted = zarr_arrays.group_metadata()
        case ["targets.zarr", view, name, "zarr.json"] if is_view(view):
            targets = [target for target in cache.manifest.targets if target.name == name]
            if not targets:
                return False
            n_rows, _ = rows_of_view(cache.manifest, view)
            wanted = zarr_arrays.array_metadata(targets[0], n_rows, cache.manifest.shard_size)
        case _:
            return False
    found = _metadata(cache, path)
    try:
        zarr_arrays.check_metadata(found or b"", wanted, path)
    except DamageError:
        return False
    return True


def _caught(path: str, unit: str | None, remedy: str, check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except (DamageError, StorageError) as error:
        yield Finding(path, unit, str(error), remedy)
