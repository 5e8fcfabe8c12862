"""Shares of `--read-data-subset`: together they read every unit exactly once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proteus_cache import storage
from proteus_cache.cache.layout import unit_number
from proteus_cache.cache.share import Share
from proteus_cache.cache.verify import verify_cache
from proteus_cache.errors import ConfigError
from tests.cli.running import run
from tests.repair.stores import UNITS, Stores, flip


@pytest.mark.parametrize("of", [1, 2, 3, 7, 11])
def test_every_unit_is_in_exactly_one_share(of: int) -> None:
    units = [unit_number(view, shard, 5) for view in ("v000", "v001", "v012", "probe") for shard in range(5)]

    shares = [[unit for unit in units if Share(number, of).holds(unit)] for number in range(1, of + 1)]

    assert sorted(unit for share in shares for unit in share) == sorted(units)
    assert len({Share(number, of).next for number in range(1, of + 1)}) == of


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "1/3/4", "a/b", "-1/3", "1/ 3", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--read-data-subset takes n/t"):
        Share.parse(text)


@pytest.mark.parametrize("of", [1, 2, 4])
@pytest.mark.parametrize("kind", ["cache", "pack"])
def test_a_job_over_all_shares_reads_every_unit_once(
    stores: Stores, kind: str, of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_bytes, sha256_of = storage.read_bytes, storage.sha256_of

    def note(path: Path) -> None:
        if path.suffix == ".tar":
            read.append(f"{path.parent.name}/{path.stem}")

    def reading(path: Path, limit: int) -> bytes:
        note(path)
        return read_bytes(path, limit)

    def hashing(path: Path, **options: bool) -> tuple[int, str]:
        note(path)
        return sha256_of(path, **options)

    monkeypatch.setattr(storage, "read_bytes", reading)
    monkeypatch.setattr(storage, "sha256_of", hashing)

    for number in range(1, of + 1):
        run("verify", getattr(stores, kind), "--read-data-subset", f"{number}/{of}")

    assert sorted(read) == sorted(UNITS)


def test_damage_is_found_in_its_share_and_structure_in_all(stores: Stores) -> None:
    flip(stores.cache / "views/v001/s00001.tar")  # unit 4 of 7
    (stores.cache / "views/v000/s00000.tar").write_bytes(b"")

    found = {}
    for number in (1, 2, 3):
        outcome = run("verify", stores.cache, "--read-data-subset", f"{number}/3", "--json", code=1)
        found[number] = [finding["unit"] for finding in json.loads(outcome.stdout)["findings"]]

    assert found == {1: ["v000/s00000"], 2: ["v000/s00000", "v001/s00001"], 3: ["v000/s00000"]}
    assert len(verify_cache(stores.cache, read_data=True)) == 2
