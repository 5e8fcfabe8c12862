"""The protocols that may be cut off anywhere, each with the state it starts from and what must hold afterwards.

A protocol works in a folder, the world. `set_up` makes what a user has before the command, `start` is one ordinary
start of the command, the first or a later one; `damage` looks at what a cut left, `differences` at the finished result.
A start reports what it has promised ("committed v000/1", "packed", "saved 3"), and that must hold from then on.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from proteus_cache import storage
from proteus_cache.cache.layout import shard_stem
from proteus_cache.errors import ProteusCacheError
from proteus_cache.pack.reader import is_pack
from proteus_cache.pack.samples import tar_name
from proteus_cache.train.checkpoint import checkpoint_steps
from tests.reliability import invariants, worlds
from tests.reliability.disks import using
from tests.reliability.worlds import CHECKPOINT_STEPS, KEPT_CHECKPOINTS, Prepared

Report = Callable[[str], None]


class Protocol(ABC):
    """One command that writes."""

    name: str

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    def set_up(self, world: Path) -> None:
        """Make what is there before the first start."""
        world.mkdir(parents=True)

    @abstractmethod
    def start(self, world: Path, report: Report = lambda _: None) -> int:
        """Start the command; returns how many units (or steps) it did, and reports each when it is promised."""

    @abstractmethod
    def promised(self, world: Path) -> dict[str, str]:
        """Name to digest of what is committed and may never go."""

    @abstractmethod
    def damage(self, world: Path, reported: Sequence[str], kills: int) -> list[str]:
        """What is broken after `kills` cuts, before another start, when so much was reported."""

    @abstractmethod
    def differences(self, world: Path) -> list[str]:
        """What of a finished result is not as an undisturbed run leaves it."""

    def finish(self, world: Path, reported: Sequence[str], kills: int) -> list[str]:
        """Look, start once more, and look again: all that is broken after `kills` cuts."""
        wrong = self.damage(world, reported, kills)
        if wrong:
            return wrong
        before = self.promised(world)
        try:
            with using(storage.Disk()):
                done = self.start(world)
        except ProteusCacheError as error:
            return [f"one more start fails: {error}"]
        return [
            *invariants.lost(before, self.promised(world)),
            *self.differences(world),
            *self.redone(before, done),
        ]

    def redone(self, before: dict[str, str], done: int) -> list[str]:
        """A start does what is missing and nothing else."""
        missing = len(self.prepared.units) - len(before)
        return [] if done == missing else [f"{done} units were done, and {missing} were missing"]


class Extract(Protocol):
    """Plan, publish arrays, commit units, empty `tmp/`, in which killed runs have left files before."""

    name = "extract"

    def set_up(self, world: Path) -> None:
        temporary = world / "cache" / "tmp"
        temporary.mkdir(parents=True)
        for number in range(3):
            (temporary / f"s00000.tar.{number}.0123456789abcdef").write_bytes(b"cut off")
        (temporary / f"plan-{'0' * 64}.parquet").write_bytes(b"of a plan that was never published")

    def start(self, world: Path, report: Report = lambda _: None) -> int:
        return worlds.extract_prepared(world / "cache", self.prepared, report=report).units_committed

    def promised(self, world: Path) -> dict[str, str]:
        return invariants.committed(world / "cache")

    def damage(self, world: Path, reported: Sequence[str], kills: int) -> list[str]:
        wrong = invariants.damage_of_cache(world / "cache", most_unfinished=kills)
        if wrong:
            return wrong
        there = self.promised(world)
        units = {line.removeprefix("committed ") for line in reported if line.startswith("committed ")}
        if "finished" in reported:
            units = {f"{view}/{shard}" for view, shard in self.prepared.units}
        return [f"unit {unit} was reported and is lost" for unit in sorted(units - there.keys())]

    def differences(self, world: Path) -> list[str]:
        return invariants.differences_of_cache(world / "cache", self.prepared.identity)


class Pack(Protocol):
    """Plan, tars, notes, indices, `pack.json`, and `tmp/` removed."""

    name = "pack"

    def __init__(self, prepared: Prepared, scratch: Path) -> None:
        super().__init__(prepared)
        worlds.pack_prepared(prepared.path, scratch / "undisturbed pack")
        self.undisturbed = invariants.digests_below(scratch / "undisturbed pack")

    def set_up(self, world: Path) -> None:
        super().set_up(world)
        shutil.copytree(self.prepared.path, world / "cache")

    def start(self, world: Path, report: Report = lambda _: None) -> int:
        done = worlds.pack_prepared(world / "cache", world / "pack", move=self.moves(world)).units_written
        report("packed")
        return done

    def moves(self, world: Path) -> bool:
        """Whether this start is one of `pack --move`."""
        return False

    def promised(self, world: Path) -> dict[str, str]:
        """Tars that have a note or are in a finished pack."""
        pack = world / "pack"
        found = invariants.digests_below(pack)
        return {
            f"{view}/{shard}": found[tar_name(view, shard)]
            for view, shard in self.prepared.units
            if tar_name(view, shard) in found and (is_pack(pack) or f"tmp/{view}-{shard_stem(shard)}.json" in found)
        }

    def damage(self, world: Path, reported: Sequence[str], kills: int) -> list[str]:
        wrong = invariants.damage_of_pack(world / "pack")
        wrong += invariants.damage_of_cache(world / "cache", most_unfinished=kills)
        there = invariants.committed(world / "cache").keys() | self.promised(world).keys()
        wrong += [
            f"unit {view}/{shard} is neither in the cache nor in the pack"
            for view, shard in self.prepared.units
            if f"{view}/{shard}" not in there
        ]
        if "packed" in reported and not is_pack(world / "pack"):
            wrong.append("the pack was reported and is lost")
        return wrong

    def differences(self, world: Path) -> list[str]:
        return [
            *invariants.differences_of_folder(world / "pack", self.undisturbed),
            *invariants.damage_of_pack(world / "pack"),
            *invariants.differences_of_cache(world / "cache", self.prepared.identity),
        ]


class MovingPack(Pack):
    """The same, and each unit leaves the cache once its tar reads back."""

    name = "pack --move"

    def moves(self, world: Path) -> bool:
        return True

    def differences(self, world: Path) -> list[str]:
        return [
            *invariants.differences_of_folder(world / "pack", self.undisturbed),
            *invariants.damage_of_pack(world / "pack"),
            *invariants.differences_of_cache(world / "cache", {}),
        ]


class MovingFinishedPack(MovingPack):
    """The pack is there before; the units only leave the cache."""

    name = "pack --move of a finished pack"

    def set_up(self, world: Path) -> None:
        super().set_up(world)
        worlds.pack_prepared(world / "cache", world / "pack")


class PackThenMove(MovingPack):
    """A start of `pack` without `--move`, and later ones with it."""

    name = "pack, then pack --move"

    def differences(self, world: Path) -> list[str]:
        if invariants.committed(world / "cache"):  # this was the first start
            return Pack.differences(self, world)
        return super().differences(world)

    def moves(self, world: Path) -> bool:
        return (world / "pack").exists()


class Checkpoints(Protocol):
    """Files, state, the folder's name, and the removal of older ones, four times."""

    name = "checkpoint"

    def __init__(self, prepared: Prepared, *, keep: int = KEPT_CHECKPOINTS) -> None:
        super().__init__(prepared)
        self.keep = keep

    def start(self, world: Path, report: Report = lambda _: None) -> int:
        return CHECKPOINT_STEPS[-1] - worlds.train_prepared(world / "run", report=report, keep=self.keep)

    def promised(self, world: Path) -> dict[str, str]:
        """Nothing by name, since older checkpoints are to go: `damage` looks for the newest."""
        return {}

    def damage(self, world: Path, reported: Sequence[str], kills: int) -> list[str]:
        steps = [line.split() for line in reported]
        saved = max([0, *(int(step) for what, step in steps if what == "saved")])
        found = max([0, *(int(step) for what, step in steps if what == "found")])
        return invariants.damage_of_run(world / "run" / "checkpoints", saved, max(saved, found) + 1)

    def differences(self, world: Path) -> list[str]:
        checkpoints = world / "run" / "checkpoints"
        kept = list(CHECKPOINT_STEPS[-self.keep :])
        found = checkpoint_steps(checkpoints)
        wrong = [] if found == kept else [f"checkpoints {found} are kept instead of {kept}"]
        return wrong + invariants.damage_of_run(checkpoints, kept[-1], kept[-1]) + invariants.leftovers(checkpoints)

    def redone(self, before: dict[str, str], done: int) -> list[str]:
        return []  # a step takes as long as it takes: which one it is, `damage` says


def all_protocols(prepared: Prepared, scratch: Path) -> list[Protocol]:
    """Every protocol once."""
    return [
        Extract(prepared),
        Pack(prepared, scratch / "a"),
        MovingPack(prepared, scratch / "b"),
        MovingFinishedPack(prepared, scratch / "c"),
        PackThenMove(prepared, scratch / "d"),
        Checkpoints(prepared),
    ]
