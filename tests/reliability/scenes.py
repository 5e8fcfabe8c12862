"""One short stretch of every protocol, so small that each of its operations can fail in turn.

A scene starts from a template, does little more than one commit, and comes to the same bytes every time. So what must
hold in between is plain: every file under its final name has the bytes of before or those of afterwards, and files that
are the same before and afterwards are there all the time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from proteus_cache import storage
from proteus_cache.cache.layout import CacheLayout
from proteus_cache.cache.reader import open_cache
from proteus_cache.cache.writer import commit_unit, publish_arrays
from proteus_cache.errors import StorageError
from proteus_cache.extract import planning
from proteus_cache.processes import Worker
from tests.reliability.disks import Failing, Operation, using
from tests.reliability.invariants import digests_below
from tests.reliability.protocols import MovingPack
from tests.reliability.worlds import (
    LAST_UNIT,
    N_UNITS,
    Prepared,
    extract_prepared,
    pack_prepared,
    save_checkpoint,
    train_prepared,
)


@dataclass
class Scene:
    """A stretch of one command."""

    name: str
    set_up: Callable[[Path], object]
    """Makes the template in an empty folder, the world."""
    start: Callable[[Path], object]
    """What may fail."""
    again: Callable[[Path], object]
    """The start after it, which must come to the end."""
    damage: Callable[[Path], list[str]] = lambda world: []
    """More that must hold in between."""
    not_promised: str = "-"
    """Start of the paths that were damaged before, and need not be there in between."""
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    """Path to SHA-256 of all files when nothing fails."""

    def prepare(self, template: Path, scratch: Path) -> None:
        """Make the template, and learn what an undisturbed run comes to."""
        template.mkdir(parents=True)
        self.set_up(template)
        shutil.copytree(template, scratch)
        self.before = digests_below(scratch)
        self.start(scratch)
        self.again(scratch)
        self.after = digests_below(scratch)
        shutil.rmtree(scratch)

    def wrong_between(self, world: Path) -> list[str]:
        """What of a world in which a start failed is not as it was or as it is to be."""
        found = digests_below(world)
        torn = [
            f"{path} has other bytes"
            for path, digest in found.items()
            if not _is_unfinished(path) and digest not in (self.before.get(path), self.after.get(path))
        ]
        gone = [
            f"{path} is gone"
            for path, digest in self.before.items()
            if self.after.get(path) == digest != found.get(path) and not path.startswith(self.not_promised)
        ]
        return torn + gone + self.damage(world)

    def wrong_at_the_end(self, world: Path) -> list[str]:
        """What differs from the undisturbed result."""
        found = digests_below(world)
        return [
            f"{path} differs" for path in found.keys() | self.after.keys() if found.get(path) != self.after.get(path)
        ]


def _is_unfinished(path: str) -> bool:
    return "tmp" in Path(path).parts or "/tmp-" in path or "/." in path


def all_scenes(prepared: Prepared, folder: Path) -> list[Scene]:
    """Every scene, with its template in `folder`."""
    moving = MovingPack(prepared, folder / "moving pack")
    scenes = [
        Scene(
            "planning",
            lambda world: None,
            lambda world: _plan(world, prepared),
            lambda world: extract_prepared(world / "cache", prepared),
        ),
        Scene(
            "the first unit",
            lambda world: _plan(world, prepared),
            lambda world: extract_prepared(world / "cache", prepared, Worker(0, N_UNITS)),
            lambda world: extract_prepared(world / "cache", prepared),
        ),
        Scene(
            "the last unit and the end",
            lambda world: _all_but_the_last_unit(world, prepared),
            lambda world: extract_prepared(world / "cache", prepared),
            lambda world: extract_prepared(world / "cache", prepared),
        ),
        Scene(
            "a unit that another worker has committed",
            lambda world: shutil.copytree(prepared.path, world / "cache"),
            lambda world: _commit_again(world, prepared),
            lambda world: extract_prepared(world / "cache", prepared),
        ),
        Scene(
            "packing",
            lambda world: _all_but_the_last_tar(world, prepared),
            lambda world: pack_prepared(world / "cache", world / "pack"),
            lambda world: pack_prepared(world / "cache", world / "pack"),
        ),
        Scene(
            "packing and moving",
            lambda world: _all_but_the_last_tar(world, prepared, move=True),
            lambda world: pack_prepared(world / "cache", world / "pack", move=True),
            lambda world: pack_prepared(world / "cache", world / "pack", move=True),
            damage=lambda world: moving.damage(world, (), 1),
        ),
        Scene(
            "moving out of a finished pack",
            lambda world: _all_but_the_last_move(world, prepared),
            lambda world: pack_prepared(world / "cache", world / "pack", move=True),
            lambda world: pack_prepared(world / "cache", world / "pack", move=True),
        ),
        Scene(
            "saving a checkpoint",
            lambda world: train_prepared(world / "run", (1, 2)),
            lambda world: train_prepared(world / "run", (1, 2, 3)),
            lambda world: train_prepared(world / "run", (1, 2, 3, 4)),
        ),
        Scene(
            "saving a damaged checkpoint anew",
            _damaged_checkpoint,
            lambda world: train_prepared(world / "run", (1, 2)),
            lambda world: train_prepared(world / "run", (1, 2, 3)),
            not_promised="run/checkpoints/step-00000002/",
        ),
    ]
    for number, scene in enumerate(scenes):
        scene.prepare(folder / f"template {number}", folder / f"undisturbed {number}")
    return scenes


def _plan(world: Path, prepared: Prepared) -> None:
    layout = CacheLayout(world / "cache")
    if planning._existing(layout) is None:
        planning.publish_plan(layout, prepared.plan_files, prepared.manifest)
    planning.finish_plan(layout)


def _all_but_the_last_unit(world: Path, prepared: Prepared) -> None:
    shutil.copytree(prepared.path, world / "cache")
    _remove_unit(world / "cache", LAST_UNIT)
    for number in range(2):
        (world / "cache" / "tmp" / f"s00002.tar.{number}.0123456789abcdef").write_bytes(b"cut off")


def _remove_unit(cache: Path, unit: str) -> None:
    opened = open_cache(cache)
    view, _, shard = unit.partition("/")
    for path in [*opened.unit_files(view, int(shard)), f"receipts/{view}/s{int(shard):05d}.json"]:
        (cache / path).unlink()


def _commit_again(world: Path, prepared: Prepared) -> None:
    """Commit a unit whose targets differ in their last bits from those that are committed."""
    layout = CacheLayout(world / "cache")
    opened = open_cache(layout.root)
    view, _, shard = LAST_UNIT.partition("/")
    unit = prepared.units[view, int(shard)]
    other = replace(unit, codes={name: codes ^ np.uint8(1) for name, codes in unit.codes.items()})
    zarr = publish_arrays(layout, opened.manifest, view)
    commit_unit(layout, opened.manifest, opened.manifest_digest, zarr, other)


class _FailingLastNote(Failing):
    """No more than five units are packed."""

    def _is_due(self, operation: Operation) -> bool:
        return operation.label == "create unfinished packing note" and super()._is_due(operation)


def _all_but_the_last_tar(world: Path, prepared: Prepared, *, move: bool = False) -> None:
    shutil.copytree(prepared.path, world / "cache")
    disk = _FailingLastNote(N_UNITS, sticky=True)
    try:
        with using(disk):
            pack_prepared(world / "cache", world / "pack", move=move)
    except StorageError:
        assert disk.fired == 2
        return
    raise AssertionError("the last note could be written")


def _all_but_the_last_move(world: Path, prepared: Prepared) -> None:
    shutil.copytree(prepared.path, world / "cache")
    pack_prepared(world / "cache", world / "pack")
    for view, shard in prepared.units:
        if f"{view}/{shard}" != LAST_UNIT:
            _remove_unit(world / "cache", f"{view}/{shard}")


def _damaged_checkpoint(world: Path) -> None:
    storage.make_folder(world / "run")
    for step in (1, 2):
        save_checkpoint(world / "run" / "checkpoints", step)
    (world / "run" / "checkpoints" / "step-00000002" / "ema.safetensors").write_bytes(b"damaged")
