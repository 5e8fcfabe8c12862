"""Where crashes happen: in memory, where there is such a place, since only the order of operations matters."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_NEEDED_BYTES = 256 << 20


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory (`/dev/shm`), or on disk where that is missing or small; removed afterwards."""
    shared = Path("/dev/shm")
    if not (shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > _NEEDED_BYTES):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="proteus-reliability-", dir=shared))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
