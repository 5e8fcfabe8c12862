"""What a repair found, did and left."""

from __future__ import annotations

import errno
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from proteus_cache.cache.verify import Finding
from proteus_cache.errors import ProteusCacheError, SpaceError
from proteus_cache.stores import Kind

State: TypeAlias = Literal["done", "to do", "not done"]
"""`to do` stands in a dry run only."""
NAMED = "named with --unit"
"""The problem of a unit that looks whole, and is made again because somebody asks for it."""
STOPPED = "repair stopped before it was made, as said below"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that is damaged, and what becomes of it."""

    unit: str | None
    """For example "v000/s00012"; None for what belongs to no single unit."""
    paths: tuple[str, ...]
    """Damaged files, relative to the store."""
    problem: str
    remedy: str
    """What repair does about it; for `not done`, what a person can do."""
    state: State

    def but(self, state: State, remedy: str | None = None) -> Action:
        """The same in another state."""
        return replace(self, state=state, remedy=self.remedy if remedy is None else remedy)

    def lines(self) -> list[str]:
        """For people."""
        name = f"unit {self.unit}" if self.unit else ", ".join(self.paths)
        return [f"{name}: {self.problem}", f"    {self.state}: {self.remedy}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair found, did and left."""

    path: Path
    kind: Kind
    is_dry_run: bool
    actions: list[Action]
    left: list[Finding] = field(default_factory=list)
    """What a last check still finds; empty in a dry run, which ends with what it would do."""
    error: str | None = None
    """What ended the repair before its end."""
    needs: tuple[str, ...] = ()
    """Flags that were missing, each with a word in place of its value: "--images", "DIR"."""
    identity: tuple[str | None, str | None] | None = None
    """Identity of a cache before and after, where units were redone; None where it cannot be told."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to mend; a whole unit that was to be made again, and was not, is whole."""
        if self.is_dry_run:
            return not self.actions
        damaged = (action for action in self.actions if action.problem != NAMED)
        return not self.left and self.error is None and all(action.state == "done" for action in damaged)

    @property
    def is_done(self) -> bool:
        """Whether the store is whole, and all that was asked for was done."""
        return self.is_whole and all(action.state == "done" for action in self.actions)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "dry_run": self.is_dry_run,
            "is_whole": self.is_whole,
            "actions": [asdict(action) for action in self.actions],
            "left": [asdict(finding) for finding in self.left],
            "error": self.error,
            "identity": None if self.identity is None else {"before": self.identity[0], "after": self.identity[1]},
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [line for action in self.actions for line in action.lines()]
        told = {path for action in self.actions for path in action.paths}
        for finding in self.left:
            if finding.path not in told:
                lines += [f"{finding.path}: {finding.problem}", f"    left: {finding.remedy}"]
        if self.error is not None:
            lines.append(f"stopped: {self.error}")
        before, after = self.identity or (None, None)
        if before and after and before != after:
            lines.append(f"cache id is now {after[:16]} and was {before[:16]}: packs made before name the old one")
        lines.append(f"{self.kind} {self.path}: {self._outcome()}")
        return lines

    def _outcome(self) -> str:
        counts = {
            state: sum(action.state == state for action in self.actions) for state in ("done", "to do", "not done")
        }
        said = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        if self.is_dry_run:
            return f"{said}; nothing was changed" if said else "whole; there is nothing to repair"
        if self.is_whole:
            return f"{said}; whole" if said else "whole; there was nothing to repair"
        return f"{said or 'nothing done'}; not whole"


def in_repair(error: ProteusCacheError) -> str:
    """What an error says, without advice that a store which is there already cannot follow."""
    return re.sub(r"(, or|:) give another folder( \(.*?\))?", "", str(error))


def stops_writing(error: ProteusCacheError) -> bool:
    """Whether no other file of the store can be written either: the disk is full or mounted read-only."""
    return isinstance(error, SpaceError) or getattr(error.__cause__, "errno", None) == errno.EROFS
