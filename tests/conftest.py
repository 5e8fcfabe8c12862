"""Settings and fixtures that every test shares.

One thread for torch keeps the numbers of the small models the same on every machine and leaves the cores to
the processes that tests start. Nothing here touches the network or the folders of a user.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples in every run, and no speed asserted: machines that run tests are shared.
settings.register_profile("proteus-cache", deadline=None, derandomize=True)
settings.load_profile("proteus-cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu`, with that reason, where torch finds no CUDA device."""
    if torch.cuda.is_available():
        return
    needs_gpu = pytest.mark.skip(reason="needs a CUDA device; torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(needs_gpu)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real photographs and reference outputs; it is not part of the repository."""
    folder = os.environ.get("PROTEUS_TEST_DATA")
    if not folder:
        pytest.skip("PROTEUS_TEST_DATA is not set: it names the folder with real photographs and reference outputs")
    path = Path(folder)
    if not path.is_dir():
        # A misspelt folder must not turn into a hundred quiet skips.
        pytest.fail(f"PROTEUS_TEST_DATA names {path}, which is not a folder")
    return path


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a home of its own and no images, so that no test reads or fills a user's folders."""
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("PROTEUS_IMAGES", raising=False)
