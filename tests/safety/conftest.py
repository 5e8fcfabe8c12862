"""Honest stores that the attacks start from, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.makers import make_cache
from tests.safety.stores import make_pack


@pytest.fixture(scope="session")
def honest_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_pack(tmp_path_factory.mktemp("safety") / "pack").path


@pytest.fixture(scope="session")
def honest_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two units of one view index; CLS in float16 (zstd), patches in int8 (raw). Not to be changed."""
    return make_cache(tmp_path_factory.mktemp("safety"), n_images=6, views=1, shard_size=4).path
