"""R1 and R2: a process is killed at every named point of every protocol, and again while it makes good for that.

The points are read from the record of an undisturbed start, so there is no crash code in the product: a point is a
phase, an operation and a kind of file ("commit a unit: rename views tar"). A process is killed just before it, at its
first, middle and last occurrence, and at writes also in the middle of the bytes; one more start must then come to
what an undisturbed run comes to.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from proteus_cache import storage
from tests.reliability import protocols, worlds
from tests.reliability.disks import Killing, Operation, Recording, using
from tests.reliability.protocols import Protocol

LEAST_POINTS = {"extract": 69, "pack": 42, "pack --move": 46, "pack --move of a finished pack": 6, "checkpoint": 22}
"""Named points of each protocol; a change of the product may add some."""
LEAST_KILLS = {"extract": 160, "pack": 89, "pack --move": 101, "pack --move of a finished pack": 16, "checkpoint": 62}
"""At the first, middle and last occurrence of each, and at writes also halfway."""
N_DOUBLE_CRASHES = 60
N_DOUBLE_CRASHES_NIGHTLY = 500
SEED = 6

PROTOCOLS = tuple(LEAST_POINTS)


@dataclass(frozen=True, slots=True)
class Point:
    """One place in one protocol."""

    name: str
    """Phase, operation and kind of file."""
    label: str
    numbers: tuple[int, ...]
    """Which of the operations with this label, from 1, belong to this phase."""

    def occurrences(self) -> list[int]:
        """First, middle and last."""
        return sorted({self.numbers[0], self.numbers[len(self.numbers) // 2], self.numbers[-1]})


def points_of(operations: list[Operation], names: Callable[[str | None], str]) -> list[Point]:
    """The points in a record; `names` gives the name of the phase after the last note."""
    found: dict[tuple[str, str], list[int]] = {}
    counts: dict[str, int] = {}
    last_note = None
    for operation in operations:
        if operation.name == "note":
            last_note = str(operation.path)
            continue
        counts[operation.label] = counts.get(operation.label, 0) + 1
        found.setdefault((names(last_note), operation.label), []).append(counts[operation.label])
    return [Point(f"{phase}: {label}", label, tuple(numbers)) for (phase, label), numbers in found.items()]


def phase_of(protocol: str, last_note: str | None) -> str:
    """What a start is doing after its last report."""
    if protocol != "extract":
        return protocol
    phases = {None: "plan a cache", "planned": "publish arrays", f"committed {worlds.LAST_UNIT}": "finish"}
    return phases.get(last_note, "commit a unit")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> worlds.Prepared:
    return worlds.prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def protocol(request: pytest.FixtureRequest, prepared: worlds.Prepared, fast_folder: Path) -> Protocol:
    return {p.name: p for p in protocols.all_protocols(prepared, fast_folder)}[request.param]


def _record(protocol: Protocol, world: Path) -> list[Operation]:
    """The operations of an undisturbed start, and what it reports in between."""
    disk = Recording()
    with using(disk):
        protocol.start(world, disk.note)
    return disk.operations


def _killed_start(protocol: Protocol, world: Path, disk: storage.Disk) -> bool:
    """Start in a process of its own, which `disk` kills; what it reports is kept. False where it got through."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with using(disk), open(world / "reported", "a", buffering=1) as reported:
                protocol.start(world, lambda line: print(line, file=reported))
            status = 0
        finally:
            os._exit(status)  # nothing of the tests may run in a copy
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"ended with {os.waitstatus_to_exitcode(status)}"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _reported(world: Path) -> list[str]:
    path = world / "reported"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
def test_killed_at_any_point_one_more_start_finishes(protocol: Protocol, fast_folder: Path) -> None:
    world = fast_folder / "world"
    protocol.set_up(world)
    points = points_of(_record(protocol, world), lambda note: phase_of(protocol.name, note))
    wrong: list[str] = []
    trials = 0
    for point in points:
        for number in point.occurrences():
            for halfway in (False, True) if point.label.startswith("write") else (False,):
                shutil.rmtree(world)
                protocol.set_up(world)
                name = f"{point.name}, {'halfway' if halfway else 'before'}, number {number}"

                assert _killed_start(protocol, world, Killing(point.label, number, halfway=halfway)), name
                trials += 1

                wrong += [f"{name}: {what}" for what in protocol.finish(world, _reported(world), 1)]
    assert not wrong, "\n".join(wrong)
    assert len(points) >= LEAST_POINTS[protocol.name]
    assert trials >= LEAST_KILLS[protocol.name]


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
def test_killed_twice_one_more_start_finishes(protocol: Protocol, fast_folder: Path) -> None:
    _crash_twice(protocol, fast_folder, N_DOUBLE_CRASHES // len(PROTOCOLS))


@pytest.mark.nightly
@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
def test_killed_twice_one_more_start_finishes_nightly(protocol: Protocol, fast_folder: Path) -> None:
    _crash_twice(protocol, fast_folder, N_DOUBLE_CRASHES_NIGHTLY // len(PROTOCOLS))


def _crash_twice(protocol: Protocol, folder: Path, n_pairs: int) -> None:
    """Kill at a random operation, and the start after that at another: both uniform over all that it would do."""
    rng = random.Random(f"{SEED} {protocol.name}")
    world, copy = folder / "world", folder / "copy"
    protocol.set_up(world)
    n_first = _n_changes(protocol, world)
    wrong: list[str] = []
    n_done = 0
    while n_done < n_pairs:
        shutil.rmtree(world)
        protocol.set_up(world)
        first = rng.randint(1, n_first)
        assert _killed_start(protocol, world, Killing(None, first))
        shutil.copytree(world, copy)
        n_second = _n_changes(protocol, copy)
        shutil.rmtree(copy)
        if n_second == 0:  # nothing was left to do
            continue
        second = rng.randint(1, n_second)
        n_done += 1

        assert _killed_start(protocol, world, Killing(None, second))

        wrong += [f"operations {first} and {second}: {what}" for what in protocol.finish(world, _reported(world), 2)]
    assert not wrong, "\n".join(wrong)


def _n_changes(protocol: Protocol, world: Path) -> int:
    return sum(operation.name != "note" for operation in _record(protocol, world))
