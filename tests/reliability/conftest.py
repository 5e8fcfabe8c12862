"""Where crashes happen: in memory, where there is such a place, since only the order of operations matters."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NEEDED_BYTES = 256 << 20


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, or on disk where there is no such place; removed afterwards."""
    with in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture(scope="module")
def shared_fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same for all tests of a file."""
    with in_memory(tmp_path_factory.mktemp("shared")) as folder:
        yield folder


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A new folder in `/dev/shm`, or `otherwise` where that is missing or small."""
    shared = Path("/dev/shm")
    if not (shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > _NEEDED_BYTES):
        yield otherwise
        return
    folder = Path(tempfile.mkdtemp(prefix="proteus-reliability-", dir=shared))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
