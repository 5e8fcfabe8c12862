"""Which block targets the block loss uses, and which block of the student faces each. Imports no torch.

Proteus itself has no such loss: its "feature" loss takes the last layer's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from proteus_cache.errors import ConfigError

_BLOCK = re.compile(r"block\.(0|[1-9]\d{0,2})(\.raw)?")


def is_block(target: str) -> bool:
    """Whether a target is `block.N` or `block.N.raw`."""
    return _BLOCK.fullmatch(target) is not None


def is_raw(target: str) -> bool:
    """Whether a block target was kept without the final norm."""
    return target.endswith(".raw")


def teacher_block(target: str) -> int:
    """The 0-based block of the teacher that a block target comes from."""
    match = _BLOCK.fullmatch(target)
    assert match is not None
    return int(match[1])


def parse_blocks(text: str) -> tuple[str, ...]:
    """The targets in a comma-separated list.

    Raises:
        ConfigError: one is no block target, or stands there twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not is_block(name):
            raise ConfigError(
                f"blocks must be block targets such as block.9 or block.9.raw, comma separated, got {name!r}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"blocks names {name} twice")
    return names


def chosen_blocks(named: tuple[str, ...] | None, held: Iterable[str]) -> tuple[str, ...]:
    """Block targets of the block loss: those named, or all that are held."""
    return tuple(name for name in held if is_block(name)) if named is None else named


def student_block(target: str, *, teacher_depth: int, student_depth: int) -> int:
    """The 0-based block of the student at the same relative depth.

    Teacher block n ends after (n + 1) / `teacher_depth` of the blocks; the student's block is the one that ends
    nearest to there, the later of two, and never before the first.
    """
    done = teacher_block(target) + 1
    return max((2 * done * student_depth + teacher_depth) // (2 * teacher_depth) - 1, 0)
