"""What the commands of these tests work on, made once by the commands themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import extract_arguments, run, train_arguments
from tests.makers import make_images, make_teacher


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher, and everything that the commands make of them. Not to be changed."""
    folder = tmp_path_factory.mktemp("work")
    make_images(folder / "images", 24)
    make_teacher(folder / "teacher.safetensors")
    run(*extract_arguments(folder))
    run("pack", folder / "cache", "--out", folder / "pack")
    run(*train_arguments(folder), "--out", folder / "run")
    return folder
