"""The whole cache and pack, made once; every test damages a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_cache.pack.build import build_pack
from tests.makers import run_extract
from tests.repair.stores import Stores, make_settings


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Do not change it."""
    config = make_settings(tmp_path_factory.mktemp("whole"))
    run_extract(config)
    stores = Stores(config.home, config)
    build_pack(stores.cache, stores.pack)
    return stores


@pytest.fixture
def stores(whole: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    """A copy to damage; the images and weights are shared."""
    copy = whole.copy_to(tmp_path / "home")
    monkeypatch.setenv("PROTEUS_HOME", str(copy.home))
    return copy
