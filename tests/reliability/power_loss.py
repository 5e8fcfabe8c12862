"""What a power loss can leave: a model file system that replays a record and builds the states of the disk.

After a prefix of the recorded operations the power goes. What was synced is there: the bytes of a file after its own
fsync, a name after an fsync of its folder. Of the rest anything may be there or not:

- Each change of a folder (create, link, rename, unlink, folder made or removed) that no sync of that folder followed
  is kept or lost, in any combination, or only in order within each folder (`in_order`). A rename between two folders is
  one change: both or neither.
- The bytes of a file that were not synced are absent (the file is empty), zeros, half there, or complete, whether
  its name survived or not.

A record may be that of several processes, one killed and the next one resuming: what the first did not sync stays
unsynced until somebody syncs it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.disks import Operation, is_unfinished

DATA = ("absent", "zeros", "half", "complete")
_ROOT = 0
_MOST_AT_ONCE = 64


@dataclass(slots=True)
class _File:
    data: bytes = b""
    synced: bytes | None = None

    def after(self, how: str) -> bytes:
        if self.synced == self.data:
            return self.data
        if how == "absent":
            return b""
        if how == "zeros":
            return bytes(len(self.data))
        return self.data[: len(self.data) // 2] if how == "half" else self.data


@dataclass(slots=True)
class _Change:
    """Entries of folders that change together: (folder, name) to what has the name then, None for nothing."""

    entries: dict[tuple[int, str], int | None]
    synced: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What is on the disk after the power loss."""

    files: tuple[tuple[str, bytes], ...]
    """Path below the world and bytes, sorted."""
    folders: tuple[str, ...]
    reported: tuple[str, ...]
    """What had been promised by then."""
    told: str
    """How it came about."""

    def key(self) -> object:
        """Equal for states that no program can tell apart; what unfinished files hold interests nobody."""
        files = tuple(file for file in self.files if not is_unfinished(file[0]))
        return files, tuple(folder for folder in self.folders if not is_unfinished(folder)), self.reported

    def write(self, world: Path) -> None:
        """Make it real below `world`, which must not exist."""
        world.mkdir()
        for folder in self.folders:
            os.mkdir(world / folder)
        for path, data in self.files:
            with open(world / path, "wb") as file:
                file.write(data)


@dataclass(slots=True)
class Model:
    """A file system of which it is known what is durable."""

    world: Path
    nodes: dict[int, _File | None] = field(default_factory=lambda: {_ROOT: None})
    """Inode to file, or None for a folder."""
    changes: list[_Change] = field(default_factory=list)
    entries: dict[tuple[int, str], int] = field(default_factory=dict)
    """As every process sees them."""
    reported: list[str] = field(default_factory=list)

    def load(self) -> None:
        """Take what is below the world now, all of it durable."""
        for parent, folders, files in os.walk(self.world):
            for name in folders:
                self._change({self._entry(Path(parent, name)): self._new(None)})
            for name in files:
                data = Path(parent, name).read_bytes()
                self._change({self._entry(Path(parent, name)): self._new(_File(data, data))})
        for change in self.changes:
            change.synced = True

    def replay(self, operation: Operation) -> None:
        """Take one operation over; those outside the world are nothing to it."""
        if operation.name == "note":
            self.reported.append(str(operation.path))
            return
        if not operation.path.is_relative_to(self.world):
            return
        match operation.name:
            case "write":
                self._file(operation.path).data += operation.data or b""
            case "sync":
                file = self._file(operation.path)
                file.synced = file.data
            case "sync folder":
                self._sync_folder(operation.path)
            case "create":
                self._change({self._entry(operation.path): self._new(_File())})
            case "make folder":
                self._change({self._entry(operation.path): self._new(None)})
            case "unlink" | "remove folder":
                self._change({self._entry(operation.path): None})
            case "link" if operation.new is not None:
                self._change({self._entry(operation.new): self._inode(operation.path)})
            case "rename" if operation.new is not None:
                inode = self._inode(operation.path)
                self._change({self._entry(operation.path): None, self._entry(operation.new): inode})
            case "close":
                pass
            case _:
                raise AssertionError(f"unknown operation {operation.name}")

    def pending(self) -> list[_Change]:
        """Changes of folders that may be lost, in order."""
        return [change for change in self.changes if not change.synced]

    def has_unsynced_data(self) -> bool:
        """Whether bytes may be lost of a file that has, or had, a name that means something."""
        named = {
            inode for change in self.changes for (_, name), inode in change.entries.items() if not is_unfinished(name)
        }
        return any(node.synced != node.data for inode in named if inode is not None and (node := self.nodes[inode]))

    def state(self, kept: set[int], data: dict[int, str] | str, told: str) -> State:
        """The disk after a power loss.

        Args:
            kept: which of `pending()`, by number.
            data: of `DATA`, what becomes of unsynced bytes: for all files, or for each inode.
            told: how the state came about.
        """
        entries: dict[int, dict[str, int]] = {}
        number = 0
        for change in self.changes:
            if not change.synced:
                number += 1
                if number - 1 not in kept:
                    continue
            for (folder, name), inode in change.entries.items():
                if inode is None:
                    entries.get(folder, {}).pop(name, None)
                else:
                    entries.setdefault(folder, {})[name] = inode
        files: list[tuple[str, bytes]] = []
        folders: list[str] = []
        waiting = [(_ROOT, "")]
        while waiting:
            folder, prefix = waiting.pop()
            for name, inode in sorted(entries.get(folder, {}).items()):
                node = self.nodes[inode]
                if node is None:
                    folders.append(prefix + name)
                    waiting.append((inode, f"{prefix}{name}/"))
                else:
                    files.append((prefix + name, node.after(data if isinstance(data, str) else data[inode])))
        return State(tuple(sorted(files)), tuple(sorted(folders)), tuple(self.reported), told)

    def _new(self, node: _File | None) -> int:
        self.nodes[len(self.nodes)] = node
        return len(self.nodes) - 1

    def _change(self, entries: dict[tuple[int, str], int | None]) -> None:
        self.changes.append(_Change(entries))
        for place, inode in entries.items():
            if inode is None:
                del self.entries[place]
            else:
                self.entries[place] = inode

    def _sync_folder(self, path: Path) -> None:
        folder = self._inode(path)
        for change in self.changes:
            if any(place[0] == folder for place in change.entries):
                change.synced = True

    def _entry(self, path: Path) -> tuple[int, str]:
        return self._inode(path.parent), path.name

    def _inode(self, path: Path) -> int:
        inode = _ROOT
        for name in path.relative_to(self.world).parts:
            inode = self.entries[inode, name]
        return inode

    def _file(self, path: Path) -> _File:
        node = self.nodes[self._inode(path)]
        assert node is not None
        return node


@dataclass(frozen=True, slots=True)
class History:
    """A record, the state that it began with, and how it came about."""

    start: Model
    """Not replayed yet."""
    operations: Sequence[Operation]
    first_loss: int
    """The power goes after this many operations at the earliest."""
    told: str


def in_order(pending: Sequence[_Change], kept: set[int]) -> set[int]:
    """Those of `kept` before which nothing of the same folder is lost."""
    cut: set[int] = set()
    result = set()
    for number, change in enumerate(pending):
        folders = {place[0] for place in change.entries}
        if number in kept and not folders & cut:
            result.add(number)
        else:
            cut |= folders
    return result


def losses(model: Model, told: str, rng: random.Random, *, ordered: bool = False) -> Iterator[State]:
    """States after a power loss at one moment: every combination of what may be kept, or `_MOST_AT_ONCE` random ones.

    Only names that mean something are combined: that of an unfinished file is kept or not as it comes.
    """
    pending = model.pending()
    numbers = {n for n, change in enumerate(pending) if any(not is_unfinished(name) for _, name in change.entries)}
    others = [n for n in range(len(pending)) if n not in numbers]
    for kept in _subsets(sorted(numbers), rng):
        kept = kept | {n for n in others if rng.random() < 0.5}
        kept = in_order(pending, kept) if ordered else kept
        mixed = {inode: rng.choice(DATA) for inode in model.nodes}
        for data in (*DATA, mixed) if model.has_unsynced_data() else (DATA[0],):
            how = data if isinstance(data, str) else "mixed"
            yield model.state(kept, data, f"{told}, {len(kept)} of {len(pending)} changes kept, data {how}")


def _subsets(numbers: list[int], rng: random.Random) -> Iterator[set[int]]:
    """All subsets of a few numbers; of many: none, all, all but one, one alone, and random ones."""
    if 2 ** len(numbers) <= _MOST_AT_ONCE:
        for bits in range(2 ** len(numbers)):
            yield {n for place, n in enumerate(numbers) if bits >> place & 1}
        return
    everything = set(numbers)
    special = [set[int](), everything, *(everything - {n} for n in numbers), *({n} for n in numbers)]
    yield from special
    for _ in range(_MOST_AT_ONCE - len(special)):
        yield {n for n in numbers if rng.random() < 0.5}
