"""R6: after a power loss at any moment, whatever of the unsynced came through, one more start finishes.

`power_loss.py` has the model. The records are those of undisturbed starts, and of starts that were killed before one
of their operations and then resumed, so that what the killed one had not synced is still at stake. States that no
program can tell apart are looked at once: made real, judged, recovered from, judged again. Protocols that are wrong on
purpose prove that the model finds what it is for.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import storage
from proteus_cache.cache import writer
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.receipt import Receipt
from proteus_cache.train.checkpoint import checkpoint_steps, write_checkpoint
from tests.reliability import protocols, worlds
from tests.reliability.disks import Dying, Killed, Operation, Recording, using
from tests.reliability.power_loss import History, Model, State, losses
from tests.reliability.protocols import Protocol

MOST_STATES = 25_000
"""States built of one protocol, at most: of the undisturbed start, and of kills at all its operations as far as that
goes. Nightly there is no limit, and there are twice as many units."""
LEAST_DIFFERENT = {
    "extract": 150,
    "pack": 28,
    "pack --move": 130,
    "pack --move of a finished pack": 28,
    "pack, then pack --move": 120,
    "checkpoint": 30,
}
"""States among them that differ, each of which is recovered from."""
SEED = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> worlds.Prepared:
    return worlds.prepare(tmp_path_factory.mktemp("prepared"), n_images=3, n_views=1)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> worlds.Prepared:
    return worlds.prepare(tmp_path_factory.mktemp("larger"), n_images=3, n_views=2)


def _protocol(name: str, prepared: worlds.Prepared, folder: Path) -> Protocol:
    return {protocol.name: protocol for protocol in protocols.all_protocols(prepared, folder)}[name]


def undisturbed(protocol: Protocol, world: Path, recording: Recording) -> History:
    """One start from beginning to end."""
    start = _start_of(protocol, world)
    with using(recording):
        protocol.start(world, recording.note)
    shutil.rmtree(world)
    return History(start, recording.operations, 0, "undisturbed")


def resumed(protocol: Protocol, world: Path, killed_at: int) -> History:
    """A start that is killed before one of its operations, and another one; the power goes in the second."""
    start = _start_of(protocol, world)
    first, second = Dying(killed_at), Recording()
    with using(first), pytest.raises(Killed):
        protocol.start(world, first.note)
    with using(second):
        protocol.start(world, second.note)
    shutil.rmtree(world)
    operations = [*first.operations, *second.operations]
    return History(start, operations, len(first.operations), f"killed at {killed_at} and resumed")


def _start_of(protocol: Protocol, world: Path) -> Model:
    protocol.set_up(world)
    model = Model(world)
    model.load()
    return model


def states_of(history: History, rng: random.Random, *, ordered: bool = False) -> Iterator[State]:
    """The states after a power loss at every moment of a history."""
    model = copy.deepcopy(history.start)
    for number in range(len(history.operations) + 1):
        if number >= history.first_loss:
            yield from losses(model, f"{history.told}, power lost after operation {number}", rng, ordered=ordered)
        if number < len(history.operations):
            model.replay(history.operations[number])


def all_states(protocol: Protocol, world: Path, rng: random.Random, *, ordered: bool = False) -> Iterator[State]:
    """Of an undisturbed start, and of starts killed before each of its operations, in random order."""
    whole = undisturbed(protocol, world, Recording())
    yield from states_of(whole, rng, ordered=ordered)
    n_changes = sum(operation.name != "note" for operation in whole.operations)
    for kill in rng.sample(range(1, n_changes + 1), n_changes):
        yield from states_of(resumed(protocol, world, kill), rng, ordered=ordered)


def different(states: Iterable[State], most: int | None = None) -> Iterator[State]:
    """The first of those that no program can tell apart, among the first so many."""
    seen: set[object] = set()
    for number, state in enumerate(states, 1):
        if state.key() not in seen:
            seen.add(state.key())
            yield state
        if number == most:
            return


def broken_by(protocol: Protocol, world: Path, states: Iterable[State]) -> Iterator[str]:
    """What recovery does not make good, state by state."""
    for state in states:
        state.write(world)
        try:
            for what in protocol.finish(world, state.reported, 2):
                yield f"{state.told}: {what}"
        finally:
            shutil.rmtree(world)


@pytest.mark.parametrize("name", list(LEAST_DIFFERENT))
def test_after_any_power_loss_one_more_start_finishes(name: str, prepared: worlds.Prepared, fast_folder: Path) -> None:
    protocol = _protocol(name, prepared, fast_folder)
    states = all_states(protocol, fast_folder / "world", random.Random(f"{SEED} {name}"))

    found = list(different(states, MOST_STATES))

    assert list(broken_by(protocol, fast_folder / "world", found)) == []
    assert len(found) >= LEAST_DIFFERENT[name]


@pytest.mark.nightly
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", list(LEAST_DIFFERENT))
def test_after_any_power_loss_of_more_units_one_more_start_finishes(
    name: str, ordered: bool, larger: worlds.Prepared, fast_folder: Path
) -> None:
    protocol = _protocol(name, larger, fast_folder)
    states = all_states(protocol, fast_folder / "world", random.Random(f"{SEED} {name}"), ordered=ordered)

    assert list(broken_by(protocol, fast_folder / "world", different(states))) == []


@pytest.mark.parametrize("name", list(LEAST_DIFFERENT))
def test_the_model_sees_what_the_disk_shows(name: str, prepared: worlds.Prepared, fast_folder: Path) -> None:
    protocol, world = _protocol(name, prepared, fast_folder), fast_folder / "world"
    model, disk, shown = _start_of(protocol, world), Recording(), Model(world)

    with using(disk):
        protocol.start(world, disk.note)
    for operation in disk.operations:
        model.replay(operation)
    shown.load()

    seen = model.state(set(range(len(model.pending()))), "complete", "all kept")
    real = shown.state(set(), "complete", "as it is")
    assert (seen.files, seen.folders) == (real.files, real.folders)


def test_what_was_not_synced_may_be_lost_in_every_way(fast_folder: Path) -> None:
    world = fast_folder / "world"
    (world / "tmp").mkdir(parents=True)
    model = Model(world)
    model.load()
    temp, final = world / "tmp" / "a", world / "a"
    for operation in (
        Operation("create", temp),
        Operation("write", temp, data=b"1234"),
        Operation("rename", temp, final),
    ):
        model.replay(operation)

    unsynced = {state.files for state in losses(model, "", random.Random(SEED))}
    model.replay(Operation("sync folder", world))
    named = {state.files for state in losses(model, "", random.Random(SEED))}
    model.replay(Operation("sync", final))
    durable = {state.files for state in losses(model, "", random.Random(SEED))}

    forms = {(("a", data),) for data in (b"", b"\0\0\0\0", b"12", b"1234")}
    assert unsynced == forms | {()} | {(("tmp/a", data),) for ((_, data),) in forms}
    assert named == forms
    assert durable == {(("a", b"1234"),)}


class Forgetting(Recording):
    """Leaves out operations of one name, and says that they were done."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def around(self, operation: Operation, call: Callable[[], Any]) -> Any:  # whatever the operation returns
        return None if operation.name == self._name else super().around(operation, call)


def _found(protocol: Protocol, world: Path, recording: Recording) -> str:
    """The first violation in a start with a wrong protocol; empty when there is none."""
    states = different(states_of(undisturbed(protocol, world, recording), random.Random(SEED)))
    return next(broken_by(protocol, world, states), "")


@pytest.mark.parametrize("forgotten", ["sync", "sync folder"])
@pytest.mark.parametrize("name", ["extract", "pack", "pack --move", "checkpoint"])
def test_a_forgotten_sync_is_found(name: str, forgotten: str, prepared: worlds.Prepared, fast_folder: Path) -> None:
    assert _found(_protocol(name, prepared, fast_folder), fast_folder / "world", Forgetting(forgotten)) != ""


def test_a_receipt_before_its_data_is_found(
    prepared: worlds.Prepared, fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(layout: CacheLayout, receipt: Receipt, temporary: dict[str, Path]) -> bool:
        final = layout.receipt(receipt.view, receipt.shard)
        moves = {final: storage.write_durable(layout.temporary, final.name, receipt.sealed)[0]}
        moves |= {layout.resolve(relative): temp for relative, temp in temporary.items()}
        for path, temp in moves.items():
            storage.make_folder(path.parent, layout.root)
            storage.publish(temp, path)
        return True

    monkeypatch.setattr(writer, "_publish", publish)

    assert _found(protocols.Extract(prepared), fast_folder / "world", Recording()) != ""


@pytest.mark.parametrize("is_wrong", [False, True])
def test_an_older_checkpoint_that_goes_first_is_found(
    is_wrong: bool, prepared: worlds.Prepared, fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, state: Any, tensors: Any, *, keep: int, after: int | None) -> Path:  # as the real one
        for step in checkpoint_steps(folder):
            storage.remove_tree(folder / f"step-{step:08d}")
            storage.sync_folder(folder)
        return write_checkpoint(folder, state, tensors, keep=keep, after=after)

    if is_wrong:
        monkeypatch.setattr(worlds, "write_checkpoint", write)

    found = _found(protocols.Checkpoints(prepared, keep=1), fast_folder / "world", Recording())

    assert bool(found) == is_wrong, found


def test_a_file_that_is_believed_because_it_is_there_is_found(
    prepared: worlds.Prepared, fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(final: Path, chunks: Callable[[], Any], unfinished: Path | None = None) -> storage.Written:
        return storage.write_new(final, chunks())

    monkeypatch.setattr(storage, "write_whole", in_place)

    assert _found(protocols.Extract(prepared), fast_folder / "world", Recording()) != ""
