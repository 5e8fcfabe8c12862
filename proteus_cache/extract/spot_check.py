"""One stored view of every unit through the teacher again, against what the cache holds on disk.

Checksums are made of what arrived in a unit's buffer. Whether that is what the teacher says of these pixels (the right
view, target, row and unit, in the right byte order) only the teacher can tell.
"""

from __future__ import annotations

import hashlib

import torch

from proteus_cache.cache import zarr_arrays
from proteus_cache.cache.layout import shard_stem, zarr_shard
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.writer import StoredView, Unit
from proteus_cache.codecs.codec import Codec
from proteus_cache.codecs.recomputed import TargetComparison
from proteus_cache.errors import CanaryError, DamageError, StorageError
from proteus_cache.teachers.teacher import Teacher
from proteus_cache.views.encode import decode_view


def check_one_view(cache: Cache, unit: Unit, teacher: Teacher, codecs: dict[str, Codec]) -> None:
    """Compare the stored targets of one view of a committed unit with what the teacher says of it now.

    Args:
        cache: that holds the unit.
        unit: as it was committed; one without views has nothing to check.
        teacher: on its device, in the precision of the unit.
        codecs: of all targets, on the same device.

    Raises:
        CanaryError: they differ by more than `codecs.recomputed` lets pass, or the cache does not give them back.
    """
    if not unit.views:
        return
    view = _chosen(unit)
    pixels = torch.from_numpy(decode_view(view.data, cache.manifest.views.size_px)).unsqueeze(0)
    with torch.inference_mode():
        tokens = teacher.targets(pixels.to(teacher.device), list(codecs))
    for target in cache.manifest.targets:
        path = cache.layout.resolve(zarr_shard(unit.view, target.name, unit.shard, 1 + len(target.codec.array_shape)))
        try:
            stored = zarr_arrays.read_row(target, view.row - unit.first_row, cache.manifest.shard_size, path)
        except (DamageError, StorageError) as error:
            raise CanaryError(f"{error}; this unit was written a moment ago: look at the disk") from error
        comparison = TargetComparison(target.name, codecs[target.name], is_packed=False)
        codes = torch.from_numpy(stored).unsqueeze(0).to(teacher.device)
        comparison.add(tokens[target.name], codes, [unit.precision])
        for found, allowed in comparison.failures():
            raise CanaryError(
                f"{cache.path}: unit {unit.view}/{shard_stem(unit.shard)}: target {target.name} of {view.key} is not "
                f"what the teacher says of this view (relative error {found.error:.4f}, {allowed:.4f} is let pass); "
                "the device, its memory or this program put it there wrongly"
            )


def _chosen(unit: Unit) -> StoredView:
    """A view of the unit that nobody can foresee by its place, and that is the same each time."""
    digest = hashlib.blake2b(f"spot check {unit.view} {unit.shard}".encode(), digest_size=8).digest()
    return unit.views[int.from_bytes(digest, "little") % len(unit.views)]
