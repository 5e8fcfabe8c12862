"""What a command is about to do, in numbers: bytes, files, hours, and whether it fits.

A plan is printed before anything large is written. It measures nothing itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proteus_cache.errors import SpaceError

_MARGIN = 1.05
_RECEIPT_BYTES_PER_VIEW = 160


def human_bytes(count: float) -> str:
    """Decimal units with three digits: 394,752 to "395 KB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """Seconds to "45 s", "12 min" or "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def human_rate(per_s: float) -> str:
    """Three digits, or all before the point: 0.213, 24.2, 1,270."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractPlan:
    """An extraction that is about to start or continue."""

    out: Path
    teacher: str
    weights: str
    n_images: int
    n_views: int
    n_probe: int
    n_held_out: int
    """Shards that training never draws from."""
    n_shards: int
    targets: dict[str, tuple[tuple[int, ...], str]]
    """Name to shape and codec."""
    code_bytes: int
    """Codes of one view."""
    view_bytes: float
    """Mean encoded view with its document, measured where possible."""
    units_todo: int
    units_all: int
    views_todo: int
    files_per_unit: int
    free_bytes: int
    free_inodes: int | None
    views_per_s: float | None
    """Of one process, measured on the planning batch; None when not measured."""
    processes: int
    is_published: bool
    """Whether the cache is there already, so that its image list cannot shrink any more."""

    @property
    def bytes_todo(self) -> float:
        """Still to be written."""
        return self.views_todo * (self.code_bytes + self.view_bytes + _RECEIPT_BYTES_PER_VIEW)

    @property
    def files_todo(self) -> int:
        """Still to be made."""
        return self.units_todo * self.files_per_unit

    @property
    def seconds(self) -> float | None:
        """Of the teacher's forward over what is missing, on all processes; None when its rate is unknown."""
        return None if self.views_per_s is None else self.views_todo / (self.views_per_s * self.processes)

    def lines(self) -> list[str]:
        """The plan for people."""
        targets = ", ".join(
            f"{name} {'x'.join(map(str, shape))} {codec}" for name, (shape, codec) in self.targets.items()
        )
        extra = f" + probe of {self.n_probe:,}" if self.n_probe else ""
        held_out = f"{self.n_held_out} of {self.n_shards} shards" if self.n_held_out else "none (fewer than 10 shards)"
        lines = [
            f"teacher   {self.teacher} ({self.weights})",
            f"views     {self.n_images:,} images x {self.n_views}{extra}; held out: {held_out}",
            f"targets   {targets}",
            f"bytes     {human_bytes(self.code_bytes)} codes + {human_bytes(self.view_bytes)} pixels a view",
        ]
        if self.units_todo == 0:
            return [*lines, f"to do     nothing: all {self.units_all} units are there"]
        done = self.units_all - self.units_todo
        present = f" ({done} of {self.units_all} units are there)" if done else ""
        inodes = "" if self.free_inodes is None else f", {self.free_inodes:,} inodes"
        lines += [
            f"to do     {self.views_todo:,} views, {human_bytes(self.bytes_todo)}, {self.files_todo:,} files{present}",
            f"free      {human_bytes(self.free_bytes)}{inodes} at {self.out}",
        ]
        if self.seconds is not None and self.views_per_s is not None:
            processes = f"{self.processes} process{'es' * (self.processes > 1)}"
            lines.append(
                f"time      {human_time(self.seconds)} of teacher forward "
                f"({human_rate(self.views_per_s)} views/s measured here, {processes})"
            )
        return lines

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            SpaceError: names what fits instead.
        """
        needed = self.bytes_todo * _MARGIN
        if needed > self.free_bytes:
            raise SpaceError(
                f"{self.out}: {human_bytes(needed)} are needed (with 5 % to spare) and "
                f"{human_bytes(self.free_bytes)} are free; {self._what_fits()}"
            )
        if self.free_inodes is not None and self.files_todo * _MARGIN > self.free_inodes:
            raise SpaceError(
                f"{self.out}: {self.files_todo:,} files are needed and {self.free_inodes:,} inodes are free; "
                "a larger --shard-size makes fewer files"
            )

    def _what_fits(self) -> str:
        per_view = (self.code_bytes + self.view_bytes + _RECEIPT_BYTES_PER_VIEW) * _MARGIN
        fitting = math.floor(self.free_bytes / per_view)
        n_done = self.n_images * self.n_views + self.n_probe - self.views_todo
        views = (fitting + n_done - self.n_probe) // self.n_images
        if views >= 1:
            return f"--views {views} fits"
        if fitting and not self.is_published:
            return f"--views 1 --limit {fitting} fits"
        return "nothing fits; free space there, or give --out a larger disk"

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        value = asdict(self) | {
            "out": str(self.out),
            "bytes_todo": self.bytes_todo,
            "files_todo": self.files_todo,
        }
        return value | {"targets": {n: {"shape": list(s), "codec": c} for n, (s, c) in self.targets.items()}}
