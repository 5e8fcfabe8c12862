"""TensorBoard events of a run. A disk that fails is reported where the run can end with a message."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from proteus_cache.storage import reported

_FLUSH_S = 60.0
_NEVER_S = 10**9
"""TensorBoard's own thread flushes no more than the beginning: an error of it would be a stack trace and no more."""


class Board:
    """An event file in `folder`; events of an earlier start behind `first_step` are hidden.

    All methods raise SpaceError or StorageError where the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with reported("write", folder):
            self._writer = SummaryWriter(log_dir=str(folder), purge_step=first_step + 1, flush_secs=_NEVER_S)
        self._flushed = time.monotonic()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers of a step, by tag; what was added in the last minute may still be in memory."""
        with reported("write", self._folder):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hand all events to the operating system."""
        with reported("write", self._folder):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with reported("write", self._folder):
            self._writer.close()
