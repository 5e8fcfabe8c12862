"""Does a cache still hold what was written? Structure and sizes by default, every digest and checksum on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa

from proteus_cache import storage, stores
from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.layout import array_folder, is_view, shard_of_receipt, shard_stem
from proteus_cache.cache.reader import Cache, open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.writer import rows_of_view, wanted_metadata
from proteus_cache.documents import parse_sealed
from proteus_cache.errors import ChecksumError, DamageError, StorageError
from proteus_cache.views.encode import decode_view, digest_pixels

IMAGES = "images.parquet"
GO_ON = "run the same `proteus-cache extract` again (or `pack --move`, where that was stopped), or wait for it to end"
"""What to do about units without a receipt."""


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
    path: str | Path,
    read_data: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    chosen: Callable[[str, int], bool] | None = None,
) -> list[Finding]:
    """Check a cache; an empty list means that nothing is wrong.

    Args:
        path: the cache's folder.
        read_data: read every file and check every digest and checksum, view pixels included; otherwise structure,
            names and sizes, and the digests of the image list and of codec parameters.
        progress: called with (units done, units in all, bytes read of them).
        chosen: with `read_data`, whether the files of a unit (view index, shard) are read; None reads all. Structure,
            names and sizes are checked of every unit all the same.

    Raises:
        UsageError: there is no cache at `path`.
        DamageError: the manifest itself is damaged, so nothing else can be judged.
    """
    cache = open_cache(path)
    _repair_command.cache_clear()
    findings = [*_plan_files(cache, read_data)]
    has_list = all(finding.path != IMAGES for finding in findings)
    known = {"manifest.json", IMAGES}
    known |= {f"codec/{t.codec.parameters}.safetensors" for t in cache.manifest.targets if t.codec.parameters}
    units = [(view, shard) for view in cache.views() for shard in cache.units(view)]
    metadata = _Metadata(cache)
    n_bytes = 0
    for done, (view, shard) in enumerate(units):
        is_read = read_data and (chosen is None or chosen(view, shard))
        findings += _unit(cache, view, shard, known, metadata, is_read, has_list)
        if is_read:
            files = map(cache.layout.resolve, cache.unit_files(view, shard) if _exists(cache, view, shard) else [])
            n_bytes += sum(storage.size_of(file) or 0 for file in files)
        if progress is not None:
            progress(done + 1, len(units), n_bytes)
    return findings + metadata.findings + list(_unknown_files(cache, known))


def _plan_files(cache: Cache, read_data: bool) -> Iterator[Finding]:
    if storage.size_of(cache.layout.images) is None:
        yield Finding(IMAGES, None, "missing", _repair(cache))
    elif read_data:
        yield from _caught(cache, IMAGES, None, _repair(cache), lambda: cache.image_table)
    else:
        yield from _caught(cache, IMAGES, None, _repair(cache), lambda: _check_list(cache))
    for target in cache.manifest.targets:
        if target.codec.parameters is not None:
            relative = f"codec/{target.codec.parameters}.safetensors"
            yield from _caught(cache, relative, None, _repair(cache), partial(cache.parameters_blob, target))


def _check_list(cache: Cache) -> None:
    if storage.sha256_of(cache.layout.images)[1] != cache.manifest.images.sha256:
        raise ChecksumError(f"{IMAGES}: damaged (SHA-256 differs from the manifest)")


def incomplete_views(cache: Cache) -> dict[str, tuple[int, int]]:
    """View index, or the probe, to the units that it has and should have, of all that were begun and lack some.

    What is lost with its receipt and what is not extracted yet look the same; both are work for the same extract.
    """
    begun = {name for folder in ("receipts", "views", "targets.zarr") for name in _folders_in(cache.path / folder)}
    counts = {view: (len(cache.units(view)), rows_of_view(cache.manifest, view)[1]) for view in filter(is_view, begun)}
    return {view: counts[view] for view in sorted(counts) if counts[view][0] < counts[view][1]}


def _folders_in(path: Path) -> list[str]:
    return [name for name in storage.list_folder(path) if os.path.isdir(path / name)]


def _repair(cache: Cache) -> str:
    return f"run `{_repair_command(cache.path)}`"


@lru_cache(maxsize=1)
def _repair_command(path: Path) -> str:
    """Asked for at every unit, and it reads the manifest; `verify_cache` forgets it when it begins."""
    return stores.repair_command(path)


def _exists(cache: Cache, view: str, shard: int) -> bool:
    """Whether there is such a unit, with or without a receipt."""
    return shard < rows_of_view(cache.manifest, view)[1]


def _unit(
    cache: Cache, view: str, shard: int, known: set[str], metadata: _Metadata, read_data: bool, has_list: bool
) -> list[Finding]:
    name = f"{view}/{shard_stem(shard)}"
    relative = f"receipts/{name}.json"
    if not _exists(cache, view, shard):
        return []  # its receipt is among the unknown files
    remedy = f"{_repair(cache)}: it redoes this unit"
    known.update([relative, *cache.unit_files(view, shard)])
    try:
        receipt = cache.receipt(view, shard)
    except (DamageError, StorageError) as error:
        return [Finding(relative, name, _problem(cache, relative, error), remedy)]
    if receipt is None:
        return [Finding(relative, name, "vanished while it was checked, or is no plain file", remedy)]
    findings = []
    for file, record in receipt.files.items():
        size = storage.size_of(cache.layout.resolve(file))
        if size != record.size:
            problem = "missing" if size is None else f"{size:,} bytes instead of {record.size:,}"
            findings.append(Finding(file, name, problem, remedy))
    known.update(receipt_metadata := metadata.paths(view))
    if not metadata.is_of(receipt, receipt_metadata):
        findings.append(
            Finding(relative, name, "was written with another zarr.json than the one that is right", remedy)
        )
    if read_data and not findings:
        findings += _unit_data(cache, receipt, name, remedy, has_list)
    return findings


class _Metadata:
    """Every zarr.json above the units' arrays is the one that their receipts saw; each that is not is found once."""

    def __init__(self, cache: Cache) -> None:
        self.findings: list[Finding] = []
        self._cache = cache
        self._digests: dict[str, tuple[str | None, str]] = {}
        """Relative path to the SHA-256 of what is there (None without a file) and of what belongs there."""
        self._wrong: set[str] = set()
        """Those that say something else than the manifest, whatever a receipt says of them."""
        self._paths: dict[str, list[str]] = {}

    def paths(self, view: str) -> list[str]:
        """Of one view index."""
        if view in self._paths:
            return self._paths[view]
        wanted = wanted_metadata(self._cache.manifest, view)
        for path, data in wanted.items():
            if path not in self._digests:
                found = _metadata(self._cache, path)
                there = None if found is None else hashlib.sha256(found).hexdigest()
                self._digests[path] = there, hashlib.sha256(data).hexdigest()
                if found is not None and not _is_metadata(found, data, path):
                    self._wrong.add(path)
        self._paths[view] = sorted(wanted)
        return self._paths[view]

    def is_of(self, receipt: Receipt, paths: list[str]) -> bool:
        """False when the receipt, not the file, is the one that differs from what belongs there."""
        for path in paths:
            found, wanted = self._digests[path]
            seen = receipt.zarr.get(path)
            if seen == found and found is not None and path not in self._wrong:
                continue
            if found == wanted:
                return False
            problem = "missing" if found is None else "not the one that its units were written with"
            if path in self._wrong:
                problem = "not the array or group of this cache"
            finding = Finding(path, None, problem, f"{_repair(self._cache)}: it writes it anew")
            if finding not in self.findings:
                self.findings.append(finding)
        return True


def _metadata(cache: Cache, path: str) -> bytes | None:
    """The bytes of a zarr.json; None where no file of a possible size has that name, or it cannot be read."""
    final = cache.layout.resolve(path)
    try:
        size = storage.size_of(final)
        if size is None or size > zarr_arrays.MAX_METADATA_BYTES:
            return None
        return storage.read_bytes(final, zarr_arrays.MAX_METADATA_BYTES)
    except StorageError:
        return None


def _is_metadata(found: bytes, wanted: bytes, path: str) -> bool:
    try:
        zarr_arrays.check_metadata(found, wanted, path)
    except DamageError:
        return False
    return True


def _unit_data(cache: Cache, receipt: Receipt, name: str, remedy: str, has_list: bool) -> Iterator[Finding]:
    """File digests, chunk checksums, code CRCs, sample documents and view pixels."""
    view, shard = receipt.view, receipt.shard
    if has_list:
        yield from _caught(cache, f"receipts/{name}.json", name, remedy, lambda: _check_images(cache, receipt))
    for target in cache.manifest.targets:
        relative = array_folder(view, target.name)
        yield from _caught(cache, relative, name, remedy, partial(cache.read_codes, view, shard, target.name))
    yield from _caught(cache, f"views/{name}.tar", name, remedy, lambda: _check_views(cache, receipt))


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
                yield _unknown(cache, path)


def _unknown(cache: Cache, path: str) -> Finding:
    if _is_of_a_unit(cache, path):
        return Finding(path, None, "its unit has no receipt: cut off, under way, or lost", GO_ON)
    match path.split("/"):
        case ["views" | "receipts" | "targets.zarr", view] if is_view(view):
            remedy = f"move it away and {_repair(cache)}"
            return Finding(path, None, "a file stands where a folder is needed", remedy)
        case ["views" | "targets.zarr", *_]:
            remedy = f"left by a unit that was cut off, or foreign; {_repair(cache)}, which redoes the unit or says so"
        case _:
            remedy = "remove it"
    return Finding(path, None, "does not belong to the cache", remedy)


def _is_of_a_unit(cache: Cache, path: str) -> bool:
    """Whether a unit that has no receipt here would have this file."""
    match path.split("/"):
        case ["views", view, name] if is_view(view):
            shard = shard_of_receipt(name.removesuffix(".tar") + ".json")
        case ["targets.zarr", view, _, "c", number, *_] if is_view(view) and number.isascii() and number.isdecimal():
            shard = int(number)
        case _:
            return False
    return shard is not None and _exists(cache, view, shard) and path in cache.unit_files(view, shard)


def _is_above_an_array(cache: Cache, path: str) -> bool:
    """Whether it is the right zarr.json of a view index of which no unit is committed yet."""
    match path.split("/"):
        case ["targets.zarr", "zarr.json"]:
            wanted: bytes | None = zarr_arrays.group_metadata()
        case ["targets.zarr", view, *_, "zarr.json"] if is_view(view):
            wanted = wanted_metadata(cache.manifest, view).get(path)
        case _:
            wanted = None
    if wanted is None:
        return False
    found = _metadata(cache, path)
    try:
        zarr_arrays.check_metadata(found or b"", wanted, path)
    except DamageError:
        return False
    return True


def _caught(cache: Cache, path: str, unit: str | None, remedy: str, check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except (DamageError, StorageError) as error:
        yield Finding(path, unit, _problem(cache, path, error), remedy)


def _problem(cache: Cache, path: str, error: Exception) -> str:
    """What an error says, without the path and the remedy that stand beside it in a finding."""
    said = str(error).replace(f"{cache.path}/", "").removeprefix(f"{path}: ")
    return said.partition(f"; {_repair(cache)}")[0].removesuffix("; copy it again from where it came from")
