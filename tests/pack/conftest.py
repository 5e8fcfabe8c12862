"""Packs that several test files look into; tests that damage one copy it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from proteus_cache.pack.reader import Pack, open_pack
from tests.pack.synthetic import write_pack


@pytest.fixture(scope="session")
def whole_pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """23 stored views in two view indices, a probe, a held-out tar, a quarantined image; do not change it."""
    root = tmp_path_factory.mktemp("whole") / "pack"
    write_pack(root, n_images=12, shard_size=3, views=("v000", "v001", "probe"), held_out=(2,), quarantined=(4,))
    return open_pack(root)


@pytest.fixture
def pack_copy(whole_pack: Pack, tmp_path: Path) -> Pack:
    """The same, for a test to damage."""
    shutil.copytree(whole_pack.path, tmp_path / "pack")
    return open_pack(tmp_path / "pack")
