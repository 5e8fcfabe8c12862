"""Links in a store that was sent lead nowhere: what writes into a store, or tidies it, stays inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_cache.errors import DamageError, ProteusCacheError
from proteus_cache.pack.build import build_pack
from tests.makers import make_config, run_extract
from tests.safety import readers
from tests.safety.stores import copied


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user's."""
    folder = tmp_path / "victim"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "thesis.txt").write_text("three years")
    (folder / "s00000.json").write_text("mine")
    return folder


def _files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["tmp", "codec", "views", "receipts", "targets.zarr", "views/v000", "receipts/v000", "targets.zarr/v000/patch"],
)
def test_a_cache_with_a_linked_folder_is_neither_read_nor_continued(tmp_path: Path, victim: Path, name: str) -> None:
    config = make_config(tmp_path, n_images=6, views=1)
    run_extract(config)
    place = config.out / name
    if place.exists():
        place.rename(tmp_path / "moved")
    place.symlink_to(victim)
    before = _files(victim)

    with pytest.raises(DamageError, match="is a link"):
        readers.check_cache(config.out)
    with pytest.raises(DamageError, match="is a link"):
        run_extract(make_config(tmp_path, views=2))

    assert _files(victim) == before


@pytest.mark.parametrize("name", ["tmp", "v000", "codec"])
def test_a_pack_is_not_written_through_a_link(honest_cache: Path, tmp_path: Path, victim: Path, name: str) -> None:
    out = tmp_path / "pack"
    out.mkdir()
    (out / name).symlink_to(victim)
    before = _files(victim)

    with pytest.raises(ProteusCacheError, match="is a link|give --out a new or empty folder"):
        build_pack(honest_cache, out)

    assert _files(victim) == before


def test_a_link_in_a_pack_is_a_finding(honest_pack: Path, victim: Path, tmp_path: Path) -> None:
    root = copied(honest_pack, tmp_path / "pack")
    (root / "more").symlink_to(victim)

    with pytest.raises(DamageError, match="more: does not belong"):
        readers.check_pack(root)
