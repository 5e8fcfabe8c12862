"""R8: several writers of one unit or one pack at the same moment, also where a file server shows them old news."""

from __future__ import annotations

import ast
import errno
import fcntl
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import proteus_cache
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.writer import Unit, commit_unit, publish_arrays
from proteus_cache.errors import ProteusCacheError
from proteus_cache.extract import planning
from tests.reliability.disks import Operation, Watched, using
from tests.reliability.invariants import (
    damage_of_cache,
    damage_of_pack,
    differences_of_cache,
    differences_of_folder,
    digests_below,
    files_below,
)
from tests.reliability.worlds import N_UNITS, Prepared, extract_prepared, pack_prepared, prepare

Result = TypeVar("Result")

N_RACES_OF_TWO, N_RACES_OF_FOUR, N_RACES_WITHOUT_LOCKS, N_RACES_ON_OLD_NEWS = 50, 10, 10, 10
"""Units that several workers commit at the same moment."""
N_RACES_OF_PROCESSES = 4
"""Whole caches that two processes extract at once, every unit of them."""
N_RACES_OF_PACKERS = 16
MEETINGS = (
    *("status receipt", "rename views tar", "rename Zarr shard file", "link receipt"),
    *("sync folder vN", "unlink unfinished receipt", "create unfinished views tar"),
)
"""Where workers wait for each other, so that they do the same at the same moment; the places take turns."""
PACK_MEETINGS = (
    *("create unfinished plan.json", "rename plan.json", "rename tar", "rename packing note"),
    *("open packing note", "rename index", "rename pack.json", "remove folder tmp"),
)
_PATIENCE_S = 5.0
"""How long a worker waits for the others: one that has seen a finished unit does not come."""


class Meeting(Watched):
    """The first threads that reach an operation with a label go on together.

    Args:
        label: of the operation.
        n_threads: that are waited for.
    """

    def __init__(self, label: str, n_threads: int) -> None:
        super().__init__()
        self.met = False
        self._label, self._n_threads = label, n_threads
        self._waiting = 0
        self._changed = threading.Condition()

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        if operation.label == self._label and not self.met:
            self._meet()
        return call()

    def _meet(self) -> None:
        with self._changed:
            self._waiting += 1
            if self._waiting == self._n_threads:
                self.met = True
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: self.met, _PATIENCE_S):
                self._waiting -= 1


class OldNews(Meeting):
    """Every worker sees the receipts of others only after the server has refused its own.

    So a client of NFS behaves that has just looked for a name: for up to a minute it answers from memory that there is
    none, in listings too, until an operation that the server must carry out tells it otherwise.
    """

    def __init__(self, label: str, n_threads: int) -> None:
        super().__init__(label, n_threads)
        self._known: dict[int, set[Path]] = {}
        self.hidden = 0

    def _is_hidden(self, path: Path) -> bool:
        mine = self._known.setdefault(threading.get_ident(), set())
        if path.parent.parent.name != "receipts" or path in mine or not path.exists():
            return False
        self.hidden += 1
        return True

    def link(self, old: Path, new: Path) -> None:
        self._known.setdefault(threading.get_ident(), set()).add(new)  # the server says whether it is there
        super().link(old, new)

    def status(self, path: Path) -> os.stat_result:
        if self._is_hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return super().status(path)

    def unlink(self, path: Path) -> None:
        if self._is_hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        super().unlink(path)

    def names(self, path: Path) -> list[str]:
        return [name for name in super().names(path) if not self._is_hidden(path / name)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def units(prepared: Prepared, fast_folder: Path) -> Callable[[int], tuple[Path, Unit]]:
    """Gives the n-th race its cache and its unit: six races share a cache."""
    planned = fast_folder / "planned"
    planning.publish_plan(CacheLayout(planned), prepared.plan_files, prepared.manifest)
    planning.finish_plan(CacheLayout(planned))

    def unit(number: int) -> tuple[Path, Unit]:
        cache = fast_folder / f"cache {number // N_UNITS}"
        if number % N_UNITS == 0:
            shutil.copytree(planned, cache)
        return cache, list(prepared.units.values())[number % N_UNITS]

    return unit


def _as_another_worker_made_it(unit: Unit, worker: int) -> Unit:
    """The same unit with targets that differ in their last bits, as those of another GPU do."""
    codes = {name: values ^ np.uint8(worker) for name, values in unit.codes.items()}
    return replace(unit, codes=codes)


def _race(cache: Path, unit: Unit, disk: Watched, n_workers: int) -> list[Receipt]:
    """What each worker says that holds now, in the order of the workers."""
    layout, opened = CacheLayout(cache), open_cache(cache)

    def commit(worker: int) -> Receipt:
        zarr = publish_arrays(layout, opened.manifest, unit.view)
        mine = _as_another_worker_made_it(unit, worker)
        return commit_unit(layout, opened.manifest, opened.manifest_digest, zarr, mine)

    with using(disk), ThreadPoolExecutor(n_workers) as workers:
        return list(workers.map(commit, range(n_workers)))


def _check(cache: Path, unit: Unit, said: list[Receipt], what: str) -> None:
    """There is one receipt, its files are what it says, the last worker to end knows it, and nothing is left."""
    receipts = [path for path in files_below(cache / "receipts" / unit.view) if path == f"s{unit.shard:05d}.json"]
    holds = open_cache(cache).receipt(unit.view, unit.shard)
    assert len(receipts) == 1, what
    assert holds in said, what
    assert damage_of_cache(cache, most_unfinished=0) == [], what
    assert files_below(cache / "tmp") == [], what


def _race_again_and_again(
    units: Callable[[int], tuple[Path, Unit]], n_races: int, n_workers: int, kind: type[Meeting] = Meeting
) -> list[Meeting]:
    disks = []
    for number, label in zip(range(n_races), itertools.cycle(MEETINGS), strict=False):
        cache, unit = units(number)
        disk = kind(label, n_workers)
        said = _race(cache, unit, disk, n_workers)
        _check(cache, unit, said, f"race {number} of {n_workers} workers, who met at {label}")
        disks.append(disk)
    return disks


def test_two_workers_commit_every_unit_at_once(units: Callable[[int], tuple[Path, Unit]]) -> None:
    disks = _race_again_and_again(units, N_RACES_OF_TWO, 2)

    assert sum(disk.met for disk in disks) > N_RACES_OF_TWO // 4


def test_four_workers_commit_every_unit_at_once(units: Callable[[int], tuple[Path, Unit]]) -> None:
    disks = _race_again_and_again(units, N_RACES_OF_FOUR, 4)

    assert sum(disk.met for disk in disks) > N_RACES_OF_FOUR // 4


def test_locks_that_lock_nothing_change_nothing(
    units: Callable[[int], tuple[Path, Unit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre, GPFS and some NFS, where everybody gets every lock."""
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, lambda *_: None)
    monkeypatch.setattr(os, "lockf", lambda *_: None)

    _race_again_and_again(units, N_RACES_WITHOUT_LOCKS, 2)


def test_no_code_asks_for_a_lock_on_a_file() -> None:
    root = Path(proteus_cache.__file__).parent
    asks = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if {"fcntl", "flock", "lockf", "filelock", "portalocker", "LOCK_EX", "O_EXLOCK"} & set(names):
                asks.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")
    assert asks == []


def test_workers_that_see_old_listings_and_states_leave_one_whole_unit(
    units: Callable[[int], tuple[Path, Unit]],
) -> None:
    disks = _race_again_and_again(units, N_RACES_ON_OLD_NEWS, 2, OldNews)

    assert sum(disk.hidden > 0 for disk in disks if isinstance(disk, OldNews)) >= N_RACES_ON_OLD_NEWS // 4


def test_a_worker_that_sees_nothing_of_a_finished_unit_leaves_it_whole(prepared: Prepared, fast_folder: Path) -> None:
    """It redoes all units, since its listing shows none, and finds out at the last moment."""
    cache = fast_folder / "cache"
    extract_prepared(cache, prepared)
    disk = OldNews("", 1)

    with using(disk):
        extract_prepared(cache, prepared)

    assert disk.hidden >= N_UNITS
    assert differences_of_cache(cache, prepared.identity) == []


def test_two_processes_extract_everything_at_once(prepared: Prepared, fast_folder: Path) -> None:
    for number in range(N_RACES_OF_PROCESSES):
        cache = fast_folder / f"cache {number}"
        gate, opener = os.pipe()
        children = [_forked(gate, opener, lambda cache=cache: extract_prepared(cache, prepared)) for _ in range(2)]  # type: ignore[misc]  # bound now
        os.close(opener)
        os.close(gate)

        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

        assert codes == [0, 0]
        assert differences_of_cache(cache, prepared.identity) == []


def _forked(gate: int, opener: int, work: Callable[[], object]) -> int:
    """A child that does `work` as soon as the other end of a pipe is closed everywhere."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(opener)
            os.read(gate, 1)
            work()
            code = 0
        finally:
            os._exit(code)  # nothing of the tests may run in a copy
    return child


def test_two_packers_of_one_folder(prepared: Prepared, fast_folder: Path) -> None:
    pack_prepared(prepared.path, fast_folder / "undisturbed")
    undisturbed = digests_below(fast_folder / "undisturbed")
    n_met = n_refused = 0

    for number, label in zip(range(N_RACES_OF_PACKERS), itertools.cycle(PACK_MEETINGS), strict=False):
        pack = fast_folder / f"pack {number}"
        disk = Meeting(label, 2)
        with using(disk), ThreadPoolExecutor(2) as packers:
            outcomes = [packers.submit(pack_prepared, prepared.path, pack) for _ in range(2)]
            errors: list[Any] = [outcome.exception() for outcome in outcomes]  # exceptions of any kind, or None
        refused = [error for error in errors if error is not None]
        n_met += disk.met
        n_refused += len(refused)

        assert all(isinstance(error, ProteusCacheError) for error in refused), (label, refused)
        assert damage_of_pack(pack) == [], label
        pack_prepared(prepared.path, pack)
        assert differences_of_folder(pack, undisturbed) == [], label

    assert n_met > N_RACES_OF_PACKERS // 4
