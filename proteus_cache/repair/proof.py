"""Can a unit be made again, and would it be the same? Asked before anything is touched."""

from __future__ import annotations

from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.layout import PROBE
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.documents import MAX_DOCUMENT_BYTES
from proteus_cache.errors import DamageError, StorageError
from proteus_cache.repair.damage import Unit


class ImageProof:
    """The images of a cache, as they lie on this machine.

    An image must have the SHA-256 that a receipt of another view index names, or, where none does, that of the damaged
    unit's own receipt as far as that can be read.
    """

    def __init__(self, cache: Cache, root: Path) -> None:
        """
        Args:
            cache: its `disbelieved` units prove nothing of others.
            root: the folder that the paths of the list are relative to.
        """
        self._cache = cache
        self._root = root

    def why_not(self, unit: Unit) -> str | None:
        """Why a unit cannot be redone from the images that are there; None when it can.

        Raises:
            StorageError: an image cannot be read.
        """
        view, shard = unit
        rows = [self._cache.image_row(view, row) for row in self._cache.rows(view, shard)]
        images = self._cache.image_table.take(rows)
        known = self._own(unit) | self._of_others(view, rows)
        for key, path in zip(images["key"].to_pylist(), images["path"].to_pylist(), strict=True):
            place = self._root / path
            if not place.is_file():
                return f"{place}: is not there; give the same --images as for extract, or put the file back"
            if key in known and storage.sha256_of(place)[1] != known[key]:
                return f"{place}: changed since its view was made; put the old file back"
        return None

    def _of_others(self, view: str, rows: list[int]) -> dict[str, str]:
        """Key to source digest, by receipts of other view indices that are not damaged."""
        missing = {row // self._cache.manifest.shard_size for row in rows}
        known: dict[str, str] = {}
        for other in self._cache.views():
            if other in (view, PROBE):
                continue
            for shard in missing & set(self._cache.units(other)):
                if (receipt := self._cache.receipt(other, shard)) is not None:
                    known |= _sources(receipt)
                    missing = missing - {shard}
        return known

    def _own(self, unit: Unit) -> dict[str, str]:
        path = self._cache.layout.receipt(*unit)
        try:
            if storage.size_of(path) is None:
                return {}
            receipt = Receipt.parse(storage.read_bytes(path, MAX_DOCUMENT_BYTES), str(path))
        except (DamageError, StorageError):
            return {}
        is_own = (receipt.manifest, receipt.view, receipt.shard) == (self._cache.manifest_digest, *unit)
        return _sources(receipt) if is_own else {}


def _sources(receipt: Receipt) -> dict[str, str]:
    return dict(zip(receipt.samples.keys, receipt.samples.source_sha256, strict=True))
