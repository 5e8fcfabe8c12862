"""Can a unit be made again, and would it be the same? Asked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from proteus_cache import storage, tar
from proteus_cache.cache.layout import PROBE, is_view
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.documents import MAX_DOCUMENT_BYTES, parse_sealed
from proteus_cache.errors import BadImageError, DamageError, StorageError
from proteus_cache.extract.records import spec_of
from proteus_cache.repair.damage import Unit
from proteus_cache.views.make import make_view

_MAX_SAMPLE_JSON_BYTES = 1 << 20
_END_BLOCKS = len(tar.END) // tar.BLOCK


class ImageProof:
    """The images of a cache, as they lie on this machine.

    An image must have the SHA-256 that a receipt of another view index names, or, where none does, that of the damaged
    unit's own receipt or of the sample documents in its tar, as far as these can be read. An image that could not be
    used must still be so: a redone unit has the views that it had.
    """

    def __init__(self, cache: Cache, root: Path) -> None:
        """
        Args:
            cache: its `disbelieved` units prove nothing of others.
            root: the folder that the paths of the list are relative to.
        """
        self._cache = cache
        self._root = root
        self._spec = spec_of(cache.manifest)

    def why_not(self, unit: Unit) -> str | None:
        """Why a unit cannot be redone from the images that are there; None when it can.

        Raises:
            StorageError: an image cannot be read.
        """
        view, shard = unit
        rows = [self._cache.image_row(view, row) for row in self._cache.rows(view, shard)]
        images = self._cache.image_table.take(rows)
        sources, bad = self._known(unit, rows, set(images["key"].to_pylist()))
        columns = (images[name].to_pylist() for name in ("key", "path", "label"))
        for key, path, label in zip(*columns, strict=True):
            place = self._root / path
            if not place.is_file():
                return f"{place}: is not there; give the same --images as for extract, or put the file back"
            if key in sources:
                if storage.sha256_of(place)[1] != sources[key]:
                    return f"{place}: changed since its view was made; put the old file back"
            elif key in bad and self._can_be_used(place, path, key, label, view):
                return (
                    f"{place}: could not be used when its views were made, and can be now, so that {view} would get a "
                    "view that it did not have; put the old file back, or extract a new cache"
                )
        return None

    def _known(self, unit: Unit, rows: list[int], keys: set[str]) -> tuple[dict[str, str], set[str]]:
        """Key to source digest, and keys of images that some view index could not use, as far as the cache tells."""
        view, _ = unit
        own, others = self._own(unit), self._of_others(view, rows)
        held = _sources(own) if own is not None else {}
        bad = {image.key for receipt in (own, *others) if receipt is not None for image in receipt.quarantined}
        if own is None:
            held, is_whole = sources_in_tar(self._cache.tar_path(*unit))
            if is_whole and held and held.keys() <= keys:
                bad |= keys - held.keys()
        sources = dict(held)
        for receipt in others:
            sources |= _sources(receipt)
        if not keys <= sources.keys() | bad:
            for path in self._other_tars(view, rows):
                sources = sources_in_tar(path)[0] | sources
        return sources, bad

    def _can_be_used(self, place: Path, path: str, key: str, label: int | None, view: str) -> bool:
        try:
            make_view(place, path, key, label, view, self._spec)
        except BadImageError:
            return False
        return True

    def _of_others(self, view: str, rows: list[int]) -> list[Receipt]:
        """Receipts of the same images in other view indices that are not damaged, one for each shard."""
        missing = {row // self._cache.manifest.shard_size for row in rows}
        found: list[Receipt] = []
        for other in self._cache.views():
            if other in (view, PROBE):
                continue
            for shard in missing & set(self._cache.units(other)):
                if (receipt := self._cache.receipt(other, shard)) is not None:
                    found.append(receipt)
                    missing = missing - {shard}
        return found

    def _other_tars(self, view: str, rows: list[int]) -> Iterator[Path]:
        """Where other view indices have, or had, the same images."""
        for other in storage.list_folder(self._cache.path / "views"):
            if is_view(other) and other not in (view, PROBE):
                yield from (
                    self._cache.tar_path(other, shard)
                    for shard in sorted({row // self._cache.manifest.shard_size for row in rows})
                )

    def _own(self, unit: Unit) -> Receipt | None:
        path = self._cache.layout.receipt(*unit)
        try:
            if storage.size_of(path) is None:
                return None
            receipt = Receipt.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
        except (DamageError, StorageError):
            return None
        is_own = (receipt.manifest, receipt.view, receipt.shard) == (self._cache.manifest_digest, *unit)
        return receipt if is_own else None


def sources_in_tar(path: Path) -> tuple[dict[str, str], bool]:
    """Key to source digest by the sealed sample documents of a unit's tar, however damaged the rest of it is.

    Returns:
        The digests, and whether all members are there: then there was no other sample.
    """
    found: dict[str, str] = {}
    try:
        size = storage.size_of(path)
        if size is None:
            return {}, False
        with open(path, "rb") as file:
            is_whole = _read_documents(file, size, found)
    except (OSError, StorageError):
        return found, False
    return found, is_whole


def _read_documents(file: BinaryIO, size: int, found: dict[str, str]) -> bool:
    """Put the source digests of a tar into `found`; goes on block by block where a header is damaged."""
    offset = n_zero = 0
    is_whole = True
    while offset < size:
        file.seek(offset)
        block = file.read(tar.BLOCK)
        try:
            member = tar.parse_header(block, offset, size, "tar")
        except DamageError:
            member, is_whole = None, False
        if member is None:
            n_zero += block == bytes(tar.BLOCK)
            offset += tar.BLOCK
            continue
        is_whole = is_whole and n_zero == 0
        offset = member.end
        if member.extension == "json":
            source = _source_in(file.read(min(member.size, _MAX_SAMPLE_JSON_BYTES)), member.key)
            is_whole = is_whole and source is not None
            if source is not None:
                found[member.key] = source
    return is_whole and n_zero == _END_BLOCKS


def _source_in(sample: bytes, key: str) -> str | None:
    """The source digest in a sample document; None where that is damaged, or another sample's."""
    try:
        document = parse_sealed(sample, f"{key}.json")
    except DamageError:
        return None
    source = document.get("source")
    return str(source.get("sha256")) if isinstance(source, dict) and document.get("key") == key else None


def _sources(receipt: Receipt) -> dict[str, str]:
    return dict(zip(receipt.samples.keys, receipt.samples.source_sha256, strict=True))
