"""The files that planning wrote, made again: only bytes with the recorded digest ever take a place."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.manifest import TargetRecord
from proteus_cache.cache.reader import Cache
from proteus_cache.codecs import fit_codec
from proteus_cache.devices import use_device
from proteus_cache.errors import DamageError, ProteusCacheError, StorageError
from proteus_cache.extract.calibration import Photographs, calibrate
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.listing import image_table
from proteus_cache.extract.planning import parquet_bytes
from proteus_cache.extract.records import spec_of
from proteus_cache.extract.rendering import default_workers
from proteus_cache.processes import usable_cores
from proteus_cache.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

_MAX_BLOB_BYTES = 1 << 30


def image_list_bytes(cache: Cache, config: ExtractConfig) -> bytes:
    """`images.parquet`, listed again.

    Raises:
        ProteusCacheError: the images that are there make another list.
    """
    manifest = cache.manifest
    same = replace(
        config,
        seed=manifest.views.seed,
        shard_size=manifest.shard_size,
        probe_images=manifest.images.n_probe,
        limit=manifest.images.n_images,
    )
    table, _ = image_table(same)
    data = parquet_bytes(table)
    if hashlib.sha256(data).hexdigest() != manifest.images.sha256:
        raise ProteusCacheError(
            f"{config.images}: makes another image list now ({len(table):,} images) than the one of this cache "
            f"({manifest.images.n_images:,}): files were added, removed or renamed, or pyarrow is of another version"
        )
    return data


def find_parameters(home: Path, sha256: str) -> bytes | None:
    """A codec's parameters from a cache or pack below PROTEUS_HOME, by their digest; None where there are none."""
    for kind in ("packs", "caches"):
        with suppress(StorageError):
            for name in storage.list_folder(home / kind):
                data = _parameters_in(home / kind / name / "codec" / f"{sha256}.safetensors")
                if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return data
    return None


def _parameters_in(file: Path) -> bytes | None:
    """The bytes of a file of another store; None where it has none that can be read: its own verify says so."""
    try:
        return storage.read_bytes(file, _MAX_BLOB_BYTES) if storage.size_of(file) else None
    except (DamageError, StorageError) as error:
        logger.warning("passed over file=%s reason=%s", file, error)
        return None


def refit_parameters(
    cache: Cache, config: ExtractConfig, teacher: Teacher, progress: Callable[[int, int], None] | None = None
) -> dict[str, bytes]:
    """The parameters of all fitted codecs, fitted again as planning does it: SHA-256 to bytes.

    Args:
        cache: whose codecs they are; its image list must be whole.
        config: images and device.
        teacher: the cache's.
        progress: called with calibration views done and in all.

    Raises:
        ProteusCacheError: no image can be used, or the outputs are not finite.
    """
    manifest = cache.manifest
    root = config.images if config.images.is_dir() else config.images.parent
    workers = config.workers if config.workers is not None else default_workers(usable_cores(), 1)
    photographs = Photographs(root=root, table=cache.image_table, spec=spec_of(manifest), workers=workers)
    same = replace(config, seed=manifest.views.seed, shard_size=manifest.shard_size)
    codecs = {target.name: target.codec.name for target in manifest.targets}
    tokens = calibrate(same, teacher, photographs, codecs, progress).tokens
    found = {}
    for target in manifest.targets:
        if target.codec.parameters is not None:
            blob = fit_codec(target.codec.name, tokens[target.name], device=use_device(config.device)).parameters_blob()
            if blob is not None:
                found[hashlib.sha256(blob).hexdigest()] = blob
    return found


def parameters_of(cache: Cache, relative: str) -> TargetRecord:
    """The target whose parameters are in this file of a cache."""
    return next(t for t in cache.manifest.targets if relative == f"codec/{t.codec.parameters}.safetensors")
