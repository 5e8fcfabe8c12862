"""A repair that is killed at any operation on the disk, and one more that finishes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from proteus_cache import open_cache, storage
from proteus_cache.cache.verify import verify_cache
from proteus_cache.pack.verify import verify_pack
from proteus_cache.repair.cache import repair_cache
from proteus_cache.repair.pack import repair_pack
from proteus_cache.repair.report import RepairReport
from tests.makers import identity
from tests.repair.stores import UNITS, Stores, cut, flip, tree

CACHE_POINTS: Final = 14
"""Operations at which the repair of a cache is killed, spread over all that it does."""
PACK_POINTS: Final = 6
_KILLED: Final = 77
_WRITING: Final = ("create", "write", "sync", "close", "rename", "link", "unlink", "make_folder", "remove_folder")


class CountingDisk(storage.Disk):
    """Counts operations that write, and ends the process before one of them."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.count = 0
        self.kill_at = kill_at

    def __getattribute__(self, name: str) -> Any:  # one of the operations, of several types
        if name in _WRITING:
            self.count += 1
            if self.count == self.kill_at:
                os._exit(_KILLED)
        return super().__getattribute__(name)


def cache_repair(stores: Stores) -> RepairReport:
    return repair_cache(stores.cache, stores.settings, home=stores.home, units=["probe/s00000"])


def pack_repair(stores: Stores) -> RepairReport:
    return repair_pack(stores.pack, cache=None, home=stores.home)


def damage_cache(stores: Stores) -> None:
    """All kinds at once; "probe/s00000" is whole, and redone because it is named."""
    flip(stores.cache / "views/v000/s00001.tar")
    cut(stores.cache / "targets.zarr/v001/patch/c/2/0")
    flip(stores.cache / "receipts/v001/s00000.json")
    for name in ("images.parquet", "targets.zarr/v001/cls/zarr.json", "targets.zarr/zarr.json"):
        (stores.cache / name).unlink()
    next((stores.cache / "codec").iterdir()).unlink()


def damage_pack(stores: Stores) -> None:
    flip(stores.pack / "v000/s00001.tar")
    (stores.pack / "v001/s00002.tar").unlink()
    cut(stores.pack / "v000.idx")
    next((stores.pack / "codec").iterdir()).unlink()


def killed(repair: Callable[[Stores], RepairReport], stores: Stores, kill_at: int) -> int:
    """Exit code of a process that repairs and is killed before an operation."""
    child = os.fork()
    if child == 0:
        try:
            storage.disk = CountingDisk(kill_at)
            repair(stores)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def points(repair: Callable[[Stores], RepairReport], stores: Stores, count: int) -> list[int]:
    """Operations spread over an undisturbed repair, the first and the last among them."""
    disk = CountingDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        assert repair(stores).is_whole
    assert disk.count > 2 * count
    return sorted({1 + round(step * (disk.count - 1) / (count - 1)) for step in range(count)})


def test_a_killed_repair_of_a_cache_loses_nothing_and_is_finished_by_the_next(
    whole: Stores, stores: Stores, tmp_path: Path
) -> None:
    damage_cache(stores)
    before, good = tree(stores.cache), tree(whole.cache)
    kill_at = points(cache_repair, stores.copy_to(tmp_path / "counted"), CACHE_POINTS)
    harmed = {"v000/s00001", "v001/s00000", "v001/s00002", "probe/s00000"}

    for point in kill_at:
        copy = stores.copy_to(tmp_path / f"at-{point}")
        assert killed(cache_repair, copy, point) == _KILLED, f"point {point}"
        left = verify_cache(copy.cache, read_data=True)
        broken = {finding.unit for finding in left if finding.unit}
        assert broken <= harmed, f"point {point}: {broken - harmed} were whole before"
        assert whole_units(copy) >= set(UNITS) - harmed, f"point {point}"
        now = tree(copy.cache)
        assert all(digest in (good[name], before.get(name)) for name, digest in now.items()), f"point {point}"
        lost = {name.removeprefix("receipts/").removesuffix(".json") for name in before.keys() - now.keys()}
        assert lost <= harmed, f"point {point}: {lost} were not replaced"
        unfinished = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (copy.cache / "tmp").iterdir()}
        for unit in lost:  # its receipt goes only when all of its new files are on disk
            files = files_of(copy, unit)
            assert all(good[name] in (now.get(name), *unfinished) for name in files), f"point {point}: {unit}"
        assert repair_cache(copy.cache, copy.settings, home=copy.home).is_whole, f"point {point}"
        assert verify_cache(copy.cache, read_data=True) == [], f"point {point}"
        assert identity(open_cache(copy.cache)) == identity(open_cache(whole.cache)), f"point {point}"
        assert tree(copy.cache) == good, f"point {point}"
        assert list((copy.cache / "tmp").iterdir()) == [], f"point {point}"


def files_of(stores: Stores, unit: str) -> list[str]:
    """All files of a unit but its receipt."""
    view, _, stem = unit.partition("/")
    return open_cache(stores.cache).unit_files(view, int(stem[1:]))


def whole_units(stores: Stores) -> set[str]:
    """Units that have a receipt."""
    cache = open_cache(stores.cache)
    return {f"{view}/s{shard:05d}" for view in cache.views() for shard in cache.units(view)}


def test_a_killed_repair_of_a_pack_loses_nothing_and_is_finished_by_the_next(
    whole: Stores, stores: Stores, tmp_path: Path
) -> None:
    damage_pack(stores)
    before = tree(stores.pack)
    good = tree(whole.pack)
    kill_at = points(pack_repair, stores.copy_to(tmp_path / "counted"), PACK_POINTS)

    for point in kill_at:
        copy = stores.copy_to(tmp_path / f"at-{point}")
        assert killed(pack_repair, copy, point) == _KILLED, f"point {point}"
        for name, digest in tree(copy.pack).items():
            assert digest in (good[name], before.get(name)), f"point {point}: {name} is neither old nor new"
        assert pack_repair(copy).is_whole, f"point {point}"
        assert verify_pack(copy.pack, read_data=True) == [], f"point {point}"
        assert tree(copy.pack) == good, f"point {point}"
        assert not (copy.pack / "tmp").exists(), f"point {point}"
