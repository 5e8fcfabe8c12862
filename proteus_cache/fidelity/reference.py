"""Exact tokens of stored views: those of a float cache or pack, or the teacher's own, computed again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from proteus_cache.cache.manifest import TeacherRecord
from proteus_cache.errors import ProteusCacheError, StorageError, UsageError
from proteus_cache.fidelity.sample import match
from proteus_cache.fidelity.sides import Entry, Side
from proteus_cache.plan.human import human_bytes
from proteus_cache.teachers.registry import load_teacher
from proteus_cache.teachers.teacher import Teacher


class Reference(Protocol):
    """Says what is exact."""

    description: str
    """For people."""
    codecs: dict[str, str]
    """Target to the codec that it is read from; empty for a teacher."""

    def tokens(self, entries: Sequence[Entry], target: str) -> Tensor:
        """(n, *shape) float32 on the device, finite.

        Raises:
            ProteusCacheError: a token is not finite.
        """


class StoredReference:
    """A float cache or pack.

    Args:
        measured: the side whose entries are asked for.
        side: the reference, checked by `check_reference`.
        device: where tokens are put.
    """

    def __init__(self, measured: Side, side: Side, device: torch.device) -> None:
        self.description = side.name
        self.codecs = {name: side.facts.targets[name].codec.name for name in measured.facts.targets}
        self._measured, self._side, self._device = measured, side, device
        self._codecs = {name: side.codec(name).to(device) for name in self.codecs}
        self._matches: dict[tuple[str, str], Entry] = {}

    def tokens(self, entries: Sequence[Entry], target: str) -> Tensor:
        codes = torch.from_numpy(self._side.codes(self._matched(entries), target)).to(self._device)
        tokens = self._codecs[target].decode(codes)
        check_finite(tokens, entries, f"{self._side.facts.path}: target {target}")
        return tokens

    def _matched(self, entries: Sequence[Entry]) -> list[Entry]:
        new = [entry for entry in entries if (entry.view, entry.key) not in self._matches]
        for entry, found in zip(new, match(self._measured, self._side, new), strict=True):
            self._matches[entry.view, entry.key] = found
        return [self._matches[entry.view, entry.key] for entry in entries]


class TeacherReference:
    """The teacher, run once over the stored views.

    What it says of views that are asked for again waits in a temporary file; of others only the last batch is held.

    Args:
        measured: the side whose views are shown to it.
        teacher: the one that made its targets, on its device.
        again: views that will be asked for again.
    """

    def __init__(self, measured: Side, teacher: Teacher, again: Sequence[Entry]) -> None:
        self.description = f"teacher {teacher.identity.name} ({teacher.identity.weights_source})"
        self.codecs: dict[str, str] = {}
        self._measured, self._teacher = measured, teacher
        self._shapes = {name: tuple(target.shape) for name, target in measured.facts.targets.items()}
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._starts = dict(zip(self._shapes, accumulate(sizes, initial=0), strict=False))
        self._view_values = sum(sizes)
        self._again = {entry: place for place, entry in enumerate(again)}
        self._written: set[Entry] = set()
        self._last: tuple[list[Entry], dict[str, Tensor]] = ([], {})
        self._file = TemporaryFile()  # noqa: SIM115  # has no name, and is gone with this object

    def tokens(self, entries: Sequence[Entry], target: str) -> Tensor:
        wanted = list(entries)
        if wanted != self._last[0] and not self._written.issuperset(wanted):
            self._run(wanted)
        return self._last[1][target] if wanted == self._last[0] else self._read(wanted, target)

    def _run(self, entries: list[Entry]) -> None:
        targets = self._teacher.targets(torch.from_numpy(self._measured.pixels(entries)), list(self._shapes))
        for name, tokens in targets.items():
            check_finite(tokens, entries, f"{self.description}: target {name}")
        self._last = entries, targets
        flat = torch.cat([tokens.reshape(len(entries), -1).cpu() for tokens in targets.values()], dim=1)
        for entry, values in zip(entries, flat, strict=True):
            if entry in self._again:
                self._write(entry, values)

    def _write(self, entry: Entry, values: Tensor) -> None:
        try:
            self._file.seek(4 * self._again[entry] * self._view_values)
            self._file.write(values.contiguous().numpy().tobytes())
        except OSError as error:
            needed = human_bytes(4 * len(self._again) * self._view_values)
            raise StorageError(
                f"{gettempdir()}: cannot keep what the teacher says ({error.strerror}); {needed} are needed there: set "
                "TMPDIR to another folder, or give fewer --samples"
            ) from error
        self._written.add(entry)

    def _read(self, entries: list[Entry], target: str) -> Tensor:
        rows = np.empty((len(entries), math.prod(self._shapes[target])), dtype=np.float32)
        for row, entry in zip(rows, entries, strict=True):
            self._file.seek(4 * (self._again[entry] * self._view_values + self._starts[target]))
            row[:] = np.frombuffer(self._file.read(row.nbytes), dtype=np.float32)
        return torch.from_numpy(rows).to(self._teacher.device).reshape(len(entries), *self._shapes[target])


def load_same_teacher(measured: Side, name: str, weights: str | None, home: Path, device: torch.device) -> Teacher:
    """The teacher that made the targets of `measured`, in the precision that it made them in (fp32 on a CPU).

    Raises:
        UsageError: the one asked for is another one.
        WeightsError: its weights cannot be had.
    """
    made = measured.facts.teacher
    if name != made.name:
        raise _another_teacher(measured, made, f"--teacher is {name}")
    teacher = load_teacher(name, weights=weights, home=home, size_px=measured.facts.views.size_px)
    given = teacher.identity
    if made.weights_sha256 != given.weights_sha256 or dict(made.architecture) != dict(given.architecture):
        raise _another_teacher(
            measured, made, f"the one given has weights {given.weights_sha256[:12]} ({given.weights_source})"
        )
    return teacher.to(device, made.precision if device.type == "cuda" else "fp32")


def check_finite(tokens: Tensor, entries: Sequence[Entry], what: str) -> None:
    """Refuse tokens of which one is NaN or infinite.

    Raises:
        ProteusCacheError: names the first such view.
    """
    is_finite = torch.isfinite(tokens).reshape(len(entries), -1).all(dim=1)
    if not bool(is_finite.all()):
        entry = entries[int((~is_finite).nonzero()[0])]
        raise ProteusCacheError(
            f"{what} of {entry.key} ({entry.view}) holds NaN or infinite tokens, so nothing can be measured; extract "
            "that shard again"
        )


def _another_teacher(measured: Side, made: TeacherRecord, given: str) -> UsageError:
    return UsageError(
        f"{measured.facts.path}: was made by {made.name} with weights {made.weights_sha256[:12]} "
        f"({made.weights_source}), and {given}; only the same teacher can tell what is exact: give its --teacher and "
        "--weights"
    )
