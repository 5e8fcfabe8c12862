"""Bad images: how many of them an extraction lets pass."""

from __future__ import annotations

import logging

from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import Quarantined
from proteus_cache.errors import ProteusCacheError

logger = logging.getLogger(__name__)

_SHARE = 0.001
_LEAST = 10


class QuarantineLimit:
    """How many bad images a cache may have, whichever process found them: 0.1 % of its images, at least 10."""

    def __init__(self, cache: Cache) -> None:
        self.limit = max(_LEAST, int(cache.manifest.images.n_images * _SHARE))
        self._cache = cache
        self._keys: set[str] = set()
        self._seen: set[tuple[str, int]] = set()

    def look(self) -> None:
        """Count the bad images of all units that were committed since the last look.

        Raises:
            ProteusCacheError: as `add`.
        """
        for view in self._cache.views():
            for shard in self._cache.units(view):
                if (view, shard) not in self._seen:
                    self._seen.add((view, shard))
                    receipt = self._cache.receipt(view, shard)
                    self._count(receipt.quarantined if receipt else [])

    def add(self, quarantined: list[Quarantined]) -> None:
        """Count and name bad images that this process met, each once.

        Raises:
            ProteusCacheError: there are more than the limit.
        """
        for image in quarantined:
            if image.key not in self._keys:
                logger.warning("quarantined path=%s reason=%s", image.path, image.reason)
        self._count(quarantined)

    def _count(self, quarantined: list[Quarantined]) -> None:
        for image in quarantined:
            self._keys.add(image.key)
            if len(self._keys) > self.limit:
                raise ProteusCacheError(
                    f"{len(self._keys)} images cannot be used, more than the {self.limit} that are let pass; the last: "
                    f"{image.path}: {image.reason}. Repair or remove them (a new list needs a new cache); "
                    "finished units are kept"
                )
