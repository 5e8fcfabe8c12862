"""The folder PROTEUS_HOME: where caches, packs and runs are kept, and which of them a training means.

$PROTEUS_HOME/caches/TEACHER     $PROTEUS_HOME/packs/CACHE_ID     $PROTEUS_HOME/runs/STUDENT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proteus_cache import storage, stores
from proteus_cache.cache.reader import is_cache, open_cache
from proteus_cache.errors import ProteusCacheError, UsageError
from proteus_cache.pack.reader import is_pack, open_pack


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A pack to train from, or the cache that it has to be made of first."""

    pack: Path
    cache: Path | None
    """None when `pack` is there already."""


def find_training_data(home: Path, given: Path | None) -> TrainingData:
    """The pack that `train` reads.

    Args:
        home: PROTEUS_HOME.
        given: a pack or a cache; None takes the only one below `home`, where a cache and its pack are one.

    Raises:
        UsageError: there is none, there are several (they are listed), or `given` is neither.
    """
    if given is not None:
        return _from_folder(home, given)
    packs = [path for path in _folders(home / "packs") if is_pack(path)]
    packed_ids = {open_pack(path).cache_id for path in packs}
    caches = {path: _cache_id(path) for path in _folders(home / "caches") if is_cache(path)}
    finished = [path for path, cache_id in caches.items() if cache_id is not None and cache_id not in packed_ids]
    found = [*packs, *finished] or list(caches)  # one whose views were moved away, or never came, is no choice
    if not found:
        raise UsageError(
            f"nothing to train from: {home} holds no cache and no pack; run `proteus-cache extract --teacher NAME` "
            "first, or say where they are with --data or PROTEUS_HOME"
        )
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise UsageError(f"several caches and packs could be trained from: {listed}; choose one with --data")
    return _from_folder(home, found[0])


def default_pack(home: Path, cache: Path) -> Path:
    """Where the pack of a cache goes: `packs/` and the first 16 digits of the cache's identity."""
    cache_id = _cache_id(cache)
    if cache_id is None:
        raise UsageError(f"{cache}: no view index is complete yet; run the same extract again to finish it")
    return home / "packs" / cache_id[:16]


def _from_folder(home: Path, path: Path) -> TrainingData:
    if is_pack(path):
        return TrainingData(path, None)
    if not is_cache(path):
        raise UsageError(stores.wrong_folder(path, "pack", "cache") + "; --data names it")
    pack = default_pack(home, path)
    return TrainingData(pack, None if is_pack(pack) else path)


def _cache_id(path: Path) -> str | None:
    cache = open_cache(path)
    try:
        return cache.cache_id() if any(view != "probe" for view in cache.complete_views()) else None
    except ProteusCacheError as error:
        error.add_note(f"while looking for something to train from: {path}")
        raise


def _folders(parent: Path) -> list[Path]:
    return [parent / name for name in storage.list_folder(parent) if (parent / name).is_dir()]
