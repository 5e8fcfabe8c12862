"""The commit of one unit when another process writes the same unit, or empties tmp/, at the worst moment."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_cache import open_cache, storage
from proteus_cache.cache.layout import PROBE
from proteus_cache.cache.reader import Cache
from proteus_cache.cache.receipt import Receipt
from proteus_cache.cache.verify import verify_cache
from proteus_cache.cache.writer import StoredView, Unit, commit_unit, publish_arrays
from proteus_cache.errors import FormatError, StorageError
from tests.makers import make_cache

VIEW, SHARD = "v001", 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def cache(finished: Cache, tmp_path: Path) -> Cache:
    """A copy in which one unit is still to be committed."""
    shutil.copytree(finished.path, tmp_path / "cache")
    open_cache(tmp_path / "cache").layout.receipt(VIEW, SHARD).unlink()
    return open_cache(tmp_path / "cache")


def unit_of(finished: Cache, change: int = 0) -> Unit:
    """The unit as `finished` holds it; `change` alters the last bits of its codes, as another GPU would."""
    receipt = finished.receipt(VIEW, SHARD)
    assert receipt is not None
    views = finished.read_views(VIEW, SHARD)
    samples = receipt.samples
    return Unit(
        view=VIEW,
        shard=SHARD,
        first_row=receipt.first_row,
        end_row=receipt.end_row,
        views=[
            StoredView(
                row=row,
                key=key,
                data=views[key][0],
                digest=digest,
                source_sha256=source,
                sample_json=views[key][1],
            )
            for row, key, digest, source in zip(
                samples.rows, samples.keys, samples.view_digests, samples.source_sha256, strict=True
            )
        ],
        codes={name: finished.read_codes(VIEW, SHARD, name) ^ np.uint8(change) for name in samples.crc32c},
        moments=receipt.moments,
        precision=receipt.precision,
        made_with=receipt.made_with,
    )


def commit(cache: Cache, unit: Unit) -> Receipt:
    zarr = publish_arrays(cache.layout, cache.manifest, unit.view)
    return commit_unit(cache.layout, cache.manifest, cache.manifest_digest, zarr, unit)


def at_call(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, before: Callable[[], object], after: Callable[[], object]
) -> None:
    """Run `before` and `after` around the given call (from 1) of a storage operation, and around no other."""
    real, calls = getattr(storage, name), []

    def operation(*args: Any) -> Any:
        calls.append(args)
        is_now = len(calls) == number
        if is_now:
            before()
        result = real(*args)
        if is_now:
            after()
        return result

    monkeypatch.setattr(storage, name, operation)


def nothing() -> None:
    pass


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_writer_that_is_overtaken_keeps_the_winners_unit_whole(
    cache: Cache, finished: Cache, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    winner: list[Receipt] = []
    other = unit_of(finished, change=1)
    at_call(monkeypatch, "publish", number, before=lambda: winner.append(commit(cache, other)), after=nothing)

    committed = commit(cache, unit_of(finished))

    assert (committed == winner[0]) == (number == 1)  # the tar is the same from both; other codes were mixed up
    assert open_cache(cache.path).receipt(VIEW, SHARD) == committed
    assert verify_cache(cache.path, read_data=True) == []
    assert list(cache.layout.temporary.iterdir()) == []


def test_a_writer_whose_files_were_replaced_under_its_receipt_writes_them_again(
    cache: Cache, finished: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cache.layout.resolve(f"targets.zarr/{VIEW}/patch/c/{SHARD}/0")

    def replace_a_file() -> None:
        storage.write_new(target.with_name("new"), b"of another writer that was killed then")
        target.with_name("new").replace(target)

    at_call(monkeypatch, "publish_once", 1, before=nothing, after=replace_a_file)

    committed = commit(cache, unit_of(finished))

    assert open_cache(cache.path).receipt(VIEW, SHARD) == committed
    assert verify_cache(cache.path, read_data=True) == []


@pytest.mark.parametrize("operation", ["publish", "publish_once"])
def test_a_unit_whose_unfinished_files_were_removed_is_written_again(
    cache: Cache, finished: Cache, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def empty() -> None:
        for path in cache.layout.temporary.iterdir():
            path.unlink()

    at_call(monkeypatch, operation, 1, before=empty, after=nothing)

    commit(cache, unit_of(finished))

    assert verify_cache(cache.path, read_data=True) == []
    assert len(open_cache(cache.path)) == len(finished)


def test_a_full_disk_is_not_tried_again(cache: Cache, finished: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(temp: Path, final: Path) -> None:
        calls.append(temp)
        raise StorageError(f"{final}: cannot rename to: Disk quota exceeded")

    monkeypatch.setattr(storage, "publish", full)

    with pytest.raises(StorageError, match="quota"):
        commit(cache, unit_of(finished))

    assert len(calls) == 1
    assert list(cache.layout.temporary.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing file", "changed file", "damaged receipt", "receipt of another cache"])
def test_a_receipt_that_is_not_true_is_replaced(cache: Cache, finished: Cache, damage: str) -> None:
    receipt = commit(cache, unit_of(finished))
    path, tar = cache.layout.receipt(VIEW, SHARD), cache.tar_path(VIEW, SHARD)
    if damage == "missing file":
        tar.unlink()
    elif damage == "changed file":
        tar.write_bytes(tar.read_bytes()[:-1] + b"\1")
    elif damage == "damaged receipt":
        path.write_bytes(b"{}")
    else:
        path.write_bytes(receipt.model_copy(update={"manifest": "0" * 64}).sealed())

    commit(cache, unit_of(finished))

    assert verify_cache(cache.path, read_data=True) == []


def test_a_receipt_that_is_true_is_kept(cache: Cache, finished: Cache) -> None:
    first = commit(cache, unit_of(finished))

    assert commit(cache, unit_of(finished, change=1)) == first


def test_codes_must_cover_the_rows_of_a_unit(cache: Cache, finished: Cache) -> None:
    unit = unit_of(finished)

    with pytest.raises(FormatError, match="do not cover"):
        commit(cache, replace(unit, codes={name: codes[:-1] for name, codes in unit.codes.items()}))


@pytest.mark.parametrize("path", ["zarr.json", f"{VIEW}/zarr.json", f"{VIEW}/cls/zarr.json"])
def test_foreign_zarr_metadata_are_refused(cache: Cache, path: str) -> None:
    (cache.path / "targets.zarr" / path).write_text('{"zarr_format":2}')

    with pytest.raises(
        FormatError, match=r"zarr\.json: not the array or group of this cache .*; `proteus-cache repair`"
    ):
        publish_arrays(cache.layout, cache.manifest, VIEW)


def test_verify_compares_receipts_with_the_image_list(cache: Cache, finished: Cache) -> None:
    receipt = commit(cache, unit_of(finished))
    samples = receipt.samples.model_copy(update={"rows": receipt.samples.rows, "keys": receipt.samples.keys[::-1]})
    path = cache.layout.receipt(VIEW, SHARD)
    path.write_bytes(receipt.model_copy(update={"samples": samples}).sealed())

    assert any("names other images" in finding.problem for finding in verify_cache(cache.path, read_data=True))


def test_verify_reports_foreign_names_of_every_kind(cache: Cache, finished: Cache) -> None:
    commit(cache, unit_of(finished))
    (cache.path / "views/link").symlink_to(cache.path.parent)
    (cache.path / f"targets.zarr/{PROBE}").mkdir()
    (cache.path / f"targets.zarr/{PROBE}/zarr.json").write_bytes(b"0" * (2 << 20))
    (cache.path / "targets.zarr/mine").mkdir()
    shutil.copy(cache.path / f"targets.zarr/{VIEW}/zarr.json", cache.path / "targets.zarr/mine/zarr.json")

    found = {finding.path for finding in verify_cache(cache.path)}

    assert found == {"views/link", f"targets.zarr/{PROBE}/zarr.json", "targets.zarr/mine/zarr.json"}
