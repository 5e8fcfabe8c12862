"""Commands that start at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.commands import CommandServer


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """What takes the arguments of `proteus-cache`, without paying for the import of torch each time."""
    with CommandServer(tmp_path_factory.mktemp("run"), {}) as server:
        yield [str(server.programs / "proteus-cache")]
