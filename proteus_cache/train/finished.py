"""`RUN/finished.json`: which files a finished run left, with size and SHA-256; sealed, and written after all of them.

So a file that is lost is missed, and one of another run is not taken for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from proteus_cache import storage
from proteus_cache.documents import Document, Sha256
from proteus_cache.train.run_folder import FINISHED

_MAX_BYTES = 1 << 20


class FinalFile(Document):
    """One file of a finished run."""

    size: int
    sha256: Sha256


class FinishedRun(Document):
    """What `finished.json` says."""

    format: Literal["proteus-cache/finished-run"] = "proteus-cache/finished-run"
    version: Literal[1] = 1
    steps: int
    """Steps done."""
    files: dict[str, FinalFile]
    """Final weights, and the start weights of a run that was given some, by file name."""


def withdraw_finished(run: Path) -> None:
    """Take the record away before its files are replaced."""
    storage.remove(run / FINISHED)


def write_finished(run: Path, steps: int, files: Mapping[str, storage.Written]) -> None:
    """Record the files of a finished run.

    Args:
        run: the RUN folder.
        steps: done.
        files: name to what was written under it.
    """
    named = {name: FinalFile(size=file.size, sha256=file.sha256) for name, file in files.items()}
    storage.write_whole(run / FINISHED, FinishedRun(steps=steps, files=named).sealed)


def read_finished(run: Path) -> FinishedRun | None:
    """The record of a finished run; None where there is none.

    Raises:
        DamageError: it is damaged.
        StorageError: it cannot be read.
    """
    path = run / FINISHED
    if storage.size_of(path) is None:
        return None
    return FinishedRun.parse(storage.read_bytes(path, _MAX_BYTES), str(path))
