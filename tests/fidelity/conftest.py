"""Small stores to measure: a float32 cache with 32 held-out images of 320, and packs of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import run
from tests.makers import make_cache


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cache`, `images` and `teacher.safetensors`, and packs named by codec. Not to be changed."""
    folder = tmp_path_factory.mktemp("stores")
    make_cache(folder, n_images=320, shard_size=32, views=1, codec="float32", batch_size=64)
    for codec in ("float16", "int8", "int4"):
        run("pack", folder / "cache", "--codec", codec, "--out", folder / codec, "--workers", 1)
    run("pack", folder / "cache", "--codec", "klt:12dB", "--out", folder / "klt", "--workers", 1)
    return folder
