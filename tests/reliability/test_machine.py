"""F3: stores under everything that happens to them, in any order; a state machine of Hypothesis.

Workers extract, are killed at any operation of the disk, bits flip, files vanish; verify, repair, pack and training
come in between. A model knows of every unit whether it is missing, cut off, whole or damaged. After each step, what the
model calls whole is there to the byte (I1, I2) and no file is unknown (I5); what verify names is exactly what is
damaged. At the end one repair and one start make everything as if nothing had happened (I3, I4).

The units are rendered beforehand (`worlds`), so a step takes milliseconds; all else is the product's own code.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from proteus_cache import storage
from proteus_cache.cache.layout import shard_stem
from proteus_cache.cache.reader import is_cache, open_cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.cache.writer import commit_unit, publish_arrays
from proteus_cache.errors import ProteusCacheError
from proteus_cache.extract import run
from proteus_cache.extract.config import ExtractConfig
from proteus_cache.extract.planning import PlannedCache
from proteus_cache.pack.reader import is_pack
from proteus_cache.pack.verify import verify_pack
from proteus_cache.processes import Worker
from proteus_cache.recompute import teacher as recorded
from proteus_cache.repair import cache as cache_repair
from proteus_cache.repair.cache import repair_cache
from proteus_cache.repair.pack import repair_pack
from tests.makers import make_config
from tests.reliability import invariants, worlds
from tests.reliability.damage import Flip, flip_bit
from tests.reliability.disks import CHANGES, Operation, Result, Watched, using
from tests.reliability.invariants import digests_below, files_below
from tests.reliability.reading import batches_of

N_RUNS, N_STEPS = 100, 30
N_RUNS_NIGHTLY = 2_000
STARTS = ("nothing", "some units", "all units", "pack")
HAPPENED_AT_LEAST = {
    "worker finished its share": 100,
    "worker killed": 30,
    "unit cut off": 8,
    "bit flipped": 80,
    "file deleted": 40,
    "verify found damage": 30,
    "verify found nothing": 30,
    "cache repaired": 30,
    "repair killed": 20,
    "packed": 10,
    "packing killed": 8,
    "packing refused damage": 4,
    "pack damage found": 10,
    "pack repaired": 4,
    "trained": 20,
    "training refused damage": 8,
}
"""What the runs of CI must have seen, or the machine tests nothing."""

Unit = tuple[str, int]
UNITS: list[Unit] = [(view, shard) for view in ("v000", "v001") for shard in range(3)]


class Killed(BaseException):
    """The process is gone; nothing may catch this."""


class Stopping(Watched):
    """From the n-th changing operation on nothing happens any more: what a killed process leaves, in this process."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth
        self._lock = threading.Lock()

    def around(self, operation: Operation, call: Callable[[], Result]) -> Result:
        with self._lock:
            if operation.name in CHANGES:
                self._left -= 1
            if self._left > 0:
                return call()
            if self._left == 0 and operation.data is not None and operation.descriptor is not None:
                os.write(operation.descriptor, operation.data[: len(operation.data) // 2])
            self._left = min(self._left, -1)
        raise Killed

    def bury(self) -> None:
        """Close what the process had open."""
        for descriptor in self.opened:
            with suppress(OSError):
                os.close(descriptor)


@dataclass(frozen=True, slots=True)
class World:
    """What the stores must become, and where they are made."""

    prepared: worlds.Prepared
    folder: Path
    files: dict[Unit, list[str]]
    """Of each unit, receipt first."""
    cache: dict[str, bytes]
    """Path to content of every file of the undisturbed cache."""
    pack: dict[str, bytes]
    batches: list[str]
    happened: Counter[str]


@pytest.fixture(scope="module")
def world(shared_fast_folder: Path) -> World:
    folder = shared_fast_folder
    prepared = worlds.prepare(folder / "prepared")
    pack = worlds.pack_prepared(prepared.path, folder / "undisturbed").path
    whole = open_cache(prepared.path)
    files = {unit: [f"receipts/{_name(unit)}.json", *whole.unit_files(*unit)] for unit in UNITS}
    return World(prepared, folder, files, _contents(prepared.path), _contents(pack), batches_of(pack), Counter())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in files_below(folder)}


@pytest.fixture(scope="module")
def units_from_memory(world: World) -> Iterator[None]:
    """Repair commits what rendering and teacher said before, too; the teacher is loaded once."""

    def extract_units(planned: PlannedCache, units: list[Unit], **_: object) -> int:
        cache = planned.cache
        for unit in units:
            zarr = publish_arrays(cache.layout, cache.manifest, unit[0])
            known, wrong = world.prepared.units[unit], cache.disbelieved.get(unit)
            commit_unit(cache.layout, cache.manifest, cache.manifest_digest, zarr, known, replaces=wrong)
        return len(units)

    held: list[Any] = []  # the teacher

    def loaded(*args: Any, **named: Any) -> Any:  # as the real one
        if not held:
            held.append(recorded.load_recorded_teacher(*args, **named))
        return held[0]

    with (
        mock.patch.object(run, "extract_units", extract_units),
        mock.patch.object(cache_repair, "load_recorded_teacher", loaded),
    ):
        yield


class Stores(RuleBasedStateMachine):
    """A cache and its pack."""

    def __init__(self, world: World, start: str) -> None:
        super().__init__()
        self.world = world
        self.start = start
        self.root = Path(tempfile.mkdtemp(dir=world.folder))
        self.cache, self.pack = self.root / "cache", self.root / "pack"
        self.config: ExtractConfig = make_config(
            world.prepared.path.parent, views=worlds.N_VIEWS, shard_size=worlds.SHARD_SIZE, out=self.cache
        )
        self.committed: set[Unit] = set()
        """Units that were reported as committed and have a receipt, damaged or not."""
        self.cut_off: set[Unit] = set()
        """Units without a receipt of which files may be there."""
        self.damaged: set[str] = set()
        """Files of the cache that we damaged or took away, by path."""
        self.pack_is_there = False
        self.pack_damaged: set[str] = set()
        self.verified: object = None
        """What the model was like when the cache was verified last."""

    # --- what is what -------------------------------------------------------------------------------------------------

    def files_of(self, unit: Unit) -> list[str]:
        """Receipt first."""
        return self.world.files[unit]

    def is_whole(self, unit: Unit) -> bool:
        return unit in self.committed and not self.damaged & set(self.files_of(unit))

    def plan_files(self) -> list[str]:
        """Files that belong to no unit, without the manifest."""
        return [path for path in self.world.cache if path != "manifest.json" and _unit_of(path) is None]

    def state_of_cache(self) -> object:
        return frozenset(self.committed), frozenset(self.cut_off), frozenset(self.damaged)

    def damaged_plan(self) -> set[str]:
        return self.damaged & set(self.plan_files())

    def note(self, what: str) -> None:
        self.world.happened[what] += 1

    def look(self) -> None:
        """Take over into the model what a command that may change much has left."""
        for path in list(self.damaged):
            if _content(self.cache / path) == self.world.cache[path]:
                self.damaged.discard(path)
        for unit in UNITS:
            if (self.cache / self.files_of(unit)[0]).exists():
                self.committed.add(unit)
                self.cut_off.discard(unit)
            else:
                self.committed.discard(unit)
                self.damaged -= set(self.files_of(unit))
                is_begun = any((self.cache / path).exists() for path in self.files_of(unit))
                (self.cut_off.add if is_begun else self.cut_off.discard)(unit)

    @contextmanager
    def killed_at(self, nth: int, what: str) -> Iterator[None]:
        disk = Stopping(nth)
        with using(disk):
            try:
                yield
            except Killed:
                self.note(what)
            finally:
                disk.bury()

    # --- the beginning ------------------------------------------------------------------------------------------------

    @initialize(done=st.sets(st.sampled_from(UNITS)))
    def begin(self, done: set[Unit]) -> None:
        start = self.start
        if start != "nothing":
            shutil.copytree(self.world.prepared.path, self.cache)
            self.committed = done if start == "some units" else set(UNITS)
            for unit in set(UNITS) - self.committed:
                for path in self.files_of(unit):
                    (self.cache / path).unlink()
        if start == "pack":
            _write(self.pack, self.world.pack)
            self.pack_is_there = True

    # --- extract ------------------------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from([Worker(0, 1), Worker(0, 2), Worker(1, 2)]))
    def start_worker(self, worker: Worker) -> None:
        with using(storage.Disk()):
            self._extract(worker)

    @precondition(lambda self: self.committed != set(UNITS))
    @rule(worker=st.sampled_from([Worker(0, 1), Worker(0, 2), Worker(1, 2)]), nth=st.integers(1, 90))
    def kill_worker(self, worker: Worker, nth: int) -> None:
        before = len(self.cut_off)
        with self.killed_at(nth, "worker killed"):
            self._extract(worker)
        self.world.happened["unit cut off"] += len(self.cut_off) > before

    def _extract(self, worker: Worker) -> None:
        reports: list[str] = []
        mine = {unit for n, unit in enumerate(UNITS) if n % worker.count == worker.index}
        try:
            worlds.extract_prepared(self.cache, self.world.prepared, worker, reports.append)
        except ProteusCacheError:
            if not self.damaged_plan():
                raise
        else:
            self.note("worker finished its share")
            missing = [unit for unit in mine if not (self.cache / self.files_of(unit)[0]).exists()]
            assert missing == [], "a worker that ended well did its share"
        finally:
            reported = {_unit(text.removeprefix("committed ")) for text in reports if text.startswith("committed")}
            assert reported <= mine - self.committed, "only what is missing is done"
            # What this worker wrote is whole again, whatever was there of it.
            self.look()
            assert reported <= self.committed, "I2: what was reported as committed is there"

    # --- damage -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: bool(self.committed and self._of_cache()))
    @rule(data=st.data())
    def flip_in_cache(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self._of_cache()))
        self._flip(self.cache, path, data)
        self.damaged.add(path)

    @precondition(lambda self: bool(self.committed and self._of_cache()))
    @rule(data=st.data())
    def delete_from_cache(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self._of_cache()))
        (self.cache / path).unlink()
        self.damaged.add(path)
        self.note("file deleted")
        self.look()

    @precondition(lambda self: self.committed and not self.pack_is_there)
    @rule(units=st.sets(st.sampled_from(UNITS), min_size=1))
    def delete_units(self, units: set[Unit]) -> None:
        """Somebody wants them extracted anew."""
        for path in [path for unit in units for path in self.files_of(unit)]:
            (self.cache / path).unlink(missing_ok=True)
        self.look()

    def _of_cache(self) -> list[str]:
        """Files whose damage is known afterwards: those of committed units and of the plan."""
        units = [path for unit in sorted(self.committed) for path in self.files_of(unit)]
        paths = [*units, *self.plan_files()]
        return [path for path in paths if path not in self.damaged and (self.cache / path).exists()]

    @precondition(lambda self: self.pack_is_there)
    @rule(data=st.data(), delete=st.booleans())
    def damage_pack(self, data: st.DataObject, delete: bool) -> None:
        paths = [path for path in self.world.pack if path not in self.pack_damaged | {"pack.json"}]
        if paths:
            path = data.draw(st.sampled_from(paths))
            if delete:
                (self.pack / path).unlink()
            else:
                self._flip(self.pack, path, data)
            self.pack_damaged.add(path)

    @precondition(lambda self: not self.pack_is_there and bool(self._unfinished_tars()))
    @rule(data=st.data())
    def flip_in_unfinished_pack(self, data: st.DataObject) -> None:
        """Whoever goes on packing must not believe what is there."""
        self._flip(self.pack, data.draw(st.sampled_from(self._unfinished_tars())), data)

    def _unfinished_tars(self) -> list[str]:
        return [path for path in files_below(self.pack) if path.endswith(".tar") and not path.startswith("tmp/")]

    def _flip(self, root: Path, path: str, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, 8 * (root / path).stat().st_size - 1))
        flip_bit(root, Flip(path, *divmod(place, 8)))
        self.note("bit flipped")

    @precondition(lambda self: is_cache(self.cache))
    @rule(place=st.integers(0, 1 << 20))
    def damaged_manifest_stops_everything(self, place: int) -> None:
        """And nothing is changed until a good copy is back."""
        path = self.cache / "manifest.json"
        flip = Flip("manifest.json", *divmod(place % (8 * path.stat().st_size), 8))
        before = digests_below(self.cache)
        flip_bit(self.cache, flip)
        for command in (lambda: verify_cache(self.cache, read_data=True), lambda: self._plain_extract()):
            with pytest.raises(ProteusCacheError, match=r"manifest\.json"):
                command()
        flip_bit(self.cache, flip)
        assert digests_below(self.cache) == before

    def _plain_extract(self) -> None:
        worlds.extract_prepared(self.cache, self.world.prepared)

    # --- verify and repair --------------------------------------------------------------------------------------------

    @precondition(lambda self: is_cache(self.cache) and self.verified != self.state_of_cache())
    @rule()
    def verify(self) -> None:
        self.verified = self.state_of_cache()
        findings = verify_cache(self.cache, read_data=True)
        paths = {finding.path for finding in findings}
        named = {_unit(finding.unit) for finding in findings if finding.unit} | {
            unit for path in paths if (unit := _unit_of(path)) is not None
        }
        wrong = {unit for unit in self.committed if not self.is_whole(unit)}
        cut_off = {unit for unit in self.cut_off if any((self.cache / p).exists() for p in self.files_of(unit))}
        assert named == wrong | cut_off, f"verify names units {sorted(named)}"
        assert {path for path in paths if _unit_of(path) is None} >= self._visible_plan_damage()
        known = self.damaged | {path for unit in wrong | cut_off for path in self._names_for(unit)}
        if any(path.startswith("tmp/plan-") for path in files_below(self.cache)):  # cut off while it planned
            known |= {path for path in self.plan_files() if not (self.cache / path).exists()}
        assert paths <= known
        self.note("verify found damage" if findings else "verify found nothing")

    def _names_for(self, unit: Unit) -> list[str]:
        """What a finding about a unit may name: a file, or the array that one is part of."""
        files = self.files_of(unit)
        return [*files, *(path.partition("/c/")[0] for path in files if "/c/" in path)]

    def _visible_plan_damage(self) -> set[str]:
        """A zarr.json that is gone is missed only where units need it."""
        views = {view for view, _ in self.committed}
        found = set()
        for path in self.damaged_plan():
            parts = path.split("/")
            is_needed = parts[0] != "targets.zarr" or (parts[1] in views if len(parts) > 2 else bool(views))
            if is_needed or (self.cache / path).exists():
                found.add(path)
        return found

    @precondition(lambda self: is_cache(self.cache) and bool(self.damaged or self.cut_off))
    @rule()
    def repair(self) -> None:
        with using(storage.Disk()):
            self._repair()
        begun = {unit for unit in self.cut_off if unit[0] in _names_in(self.cache / "receipts")}
        assert not self.damaged & set(self.files_of_committed()), "units are mended"
        assert not begun, "what was cut off is redone"
        assert not self._visible_plan_damage()
        self.note("cache repaired")

    def files_of_committed(self) -> list[str]:
        return [path for unit in self.committed for path in self.files_of(unit)]

    @precondition(lambda self: is_cache(self.cache) and bool(self.damaged or self.cut_off))
    @rule(nth=st.integers(1, 60))
    def kill_repair(self, nth: int) -> None:
        with self.killed_at(nth, "repair killed"):
            self._repair()

    def _repair(self) -> None:
        whole = {unit for unit in UNITS if self.is_whole(unit)}
        try:
            repair_cache(self.cache, lambda: self.config, home=self.config.home)
        finally:
            self.look()
            assert all(self.is_whole(unit) for unit in whole), "repair leaves alone what is whole"

    # --- pack and train -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.committed == set(UNITS) and not self.pack_is_there)
    @rule()
    def make_pack(self) -> None:
        with using(storage.Disk()):
            self._make_pack()

    @precondition(lambda self: self.committed == set(UNITS) and not self.pack_is_there)
    @rule(nth=st.integers(1, 120))
    def kill_packing(self, nth: int) -> None:
        with self.killed_at(nth, "packing killed"):
            self._make_pack()

    def _make_pack(self) -> None:
        try:
            worlds.pack_prepared(self.cache, self.pack)
        except ProteusCacheError:
            if not self.damaged:
                raise
            self.note("packing refused damage")
        else:
            # Also where units are damaged that were packed before that.
            assert _contents(self.pack) == self.world.pack, "damage was packed"
            self.note("packed")
        finally:
            self.pack_is_there = is_pack(self.pack)

    @precondition(lambda self: self.pack_is_there)
    @rule()
    def verify_the_pack(self) -> None:
        findings = verify_pack(self.pack, read_data=True)
        assert {finding.path for finding in findings} == self.pack_damaged
        self.world.happened["pack damage found"] += bool(findings)

    @precondition(lambda self: self.pack_is_there)
    @rule(nth=st.one_of(st.none(), st.none(), st.integers(1, 40)))
    def repair_the_pack(self, nth: int | None) -> None:
        before = set(self.pack_damaged)
        source = self.cache if is_cache(self.cache) else None
        is_mended = False
        with self.killed_at(nth or 1 << 40, "repair killed"):
            is_mended = repair_pack(self.pack, cache=source, home=self.config.home).is_whole
        self.pack_damaged = {p for p in before if _content(self.pack / p) != self.world.pack[p]}
        assert not (is_mended and self.pack_damaged)
        if nth is None and self.committed == set(UNITS) and not self.damaged:
            assert is_mended, "from a whole cache everything is mended"
        self.world.happened["pack repaired"] += is_mended and bool(before)

    @precondition(lambda self: self.pack_is_there)
    @rule(first=st.integers(0, 6), n=st.integers(2, 4))
    def train(self, first: int, n: int) -> None:
        try:
            found = batches_of(self.pack, first, n)
        except ProteusCacheError:
            if not self.pack_damaged:
                raise
            self.note("training refused damage")
        else:
            assert found == self.world.batches[first : first + n], "I1: training gets what was packed, or nothing"
            assert not any(path.endswith((".idx", ".safetensors")) for path in self.pack_damaged)
            self.note("trained")

    # --- always, and at the end ---------------------------------------------------------------------------------------

    @invariant()
    def what_is_whole_is_there_to_the_byte(self) -> None:
        for path, content in self.world.cache.items():
            unit = _unit_of(path)
            if unit in self.committed and path not in self.damaged:
                assert _content(self.cache / path) == content, f"I1, I2: {path}"
        if self.pack_is_there:
            for path, content in self.world.pack.items():
                assert path in self.pack_damaged or _content(self.pack / path) == content, f"I1: {path}"

    @invariant()
    def nothing_is_unknown(self) -> None:
        for root, known in ((self.cache, self.world.cache), (self.pack, self.world.pack)):
            unknown = [path for path in files_below(root) if path not in known and not path.startswith("tmp/")]
            assert unknown == [], f"I5: {unknown} in {root.name}"

    def teardown(self) -> None:
        try:
            with using(storage.Disk()):
                if is_cache(self.cache):
                    self._repair()
                worlds.extract_prepared(self.cache, self.world.prepared)
                assert invariants.differences_of_cache(self.cache, self.world.prepared.identity) == []
                assert _contents(self.cache) == self.world.cache
                if self.pack_is_there:
                    assert repair_pack(self.pack, cache=self.cache, home=self.config.home).is_whole
                worlds.pack_prepared(self.cache, self.pack)
                assert verify_pack(self.pack, read_data=True) == []
                assert _contents(self.pack) == self.world.pack
        finally:
            shutil.rmtree(self.root, ignore_errors=True)


def _name(unit: Unit) -> str:
    return f"{unit[0]}/{shard_stem(unit[1])}"


def _unit(name: str) -> Unit:
    """ "v000/s00001" or "v000/1" to ("v000", 1)."""
    view, _, shard = name.partition("/")
    return view, int(shard.removeprefix("s"))


def _unit_of(path: str) -> Unit | None:
    """The unit that a file of the cache belongs to."""
    parts = path.split("/")
    if parts[0] in ("views", "receipts") and len(parts) == 3:
        return _unit(f"{parts[1]}/{parts[2].partition('.')[0]}")
    return _unit(f"{parts[1]}/{parts[4]}") if parts[0] == "targets.zarr" and "c" in parts[3:4] else None


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _names_in(path: Path) -> list[str]:
    return os.listdir(path) if path.is_dir() else []


def _write(root: Path, contents: dict[str, bytes]) -> None:
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def run_machine(world: World, n_runs: int) -> None:
    """As many runs from each of the four beginnings: rare ones would hardly be reached by chance."""
    for start in STARTS:
        _run_machine(lambda start=start: Stores(world, start), n_runs // len(STARTS))  # type: ignore[misc]


def _run_machine(machine: Callable[[], Stores], n_runs: int) -> None:
    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]  # it takes whatever makes a machine
        settings=settings(
            max_examples=n_runs,
            stateful_step_count=N_STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # to make a failing run shorter takes many minutes
        ),
    )


@pytest.mark.usefixtures("units_from_memory")
def test_whatever_happens_to_a_store_it_is_whole_in_the_end(world: World) -> None:
    run_machine(world, N_RUNS)

    happened = world.happened
    assert {what: happened[what] for what, least in HAPPENED_AT_LEAST.items() if happened[what] < least} == {}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("units_from_memory")
def test_the_same_for_a_night(world: World) -> None:
    run_machine(world, N_RUNS_NIGHTLY)
