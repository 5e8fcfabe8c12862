"""What repair of a cache must not do: lose samples, trust a failing machine, or say what is not so."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proteus_cache import open_cache
from proteus_cache.cache.verify import verify_cache
from proteus_cache.errors import UsageError
from proteus_cache.extract.canary import CanaryWatch
from proteus_cache.repair import cache as module
from proteus_cache.repair.cache import repair_cache
from proteus_cache.repair.proof import sources_in_tar
from proteus_cache.repair.report import RepairReport
from tests.makers import run_extract
from tests.repair.stores import Stores, cut, flip, make_settings, refuse, tree

TAR, RECEIPT, CODES = "views/v000/s00001.tar", "receipts/v000/s00001.json", "targets.zarr/v000/patch/c/1/0"
ARRAY = "targets.zarr/v001/patch/zarr.json"


def repaired(stores: Stores, **options: Any) -> RepairReport:
    return repair_cache(stores.cache, stores.settings, home=stores.home, **options)


def n_samples(stores: Stores) -> dict[str, int]:
    """Stored views of each view index."""
    cache = open_cache(stores.cache)
    receipts = {view: [cache.receipt(view, shard) for shard in cache.units(view)] for view in cache.views()}
    return {view: sum(len(r.samples.rows) for r in found if r is not None) for view, found in receipts.items()}


@pytest.fixture
def own_images(stores: Stores, tmp_path: Path) -> Stores:
    """With images that may be broken."""
    shutil.copytree(stores.config.images, tmp_path / "images")
    return Stores(stores.home, replace(stores.config, images=tmp_path / "images"))


def image_of(stores: Stores, row: int) -> Path:
    return stores.config.images / str(open_cache(stores.cache).image_table["path"][row].as_py())


@pytest.mark.parametrize("also", [lambda cache: None, lambda cache: cut(cache / TAR)], ids=["tars whole", "one cut"])
def test_tars_without_receipts_still_know_their_images(own_images: Stores, also: Callable[[Path], None]) -> None:
    for view in ("v000", "v001"):
        (own_images.cache / f"receipts/{view}/s00001.json").unlink()
    also(own_images.cache)
    image_of(own_images, 7).write_bytes(b"no picture")  # the last of shard 1
    before = tree(own_images.cache)

    report = repaired(own_images)

    assert {action.unit: action.state for action in report.actions} == {
        "v000/s00001": "not done",
        "v001/s00001": "not done",
    }
    assert all("changed since its view was made" in action.remedy for action in report.actions)
    assert tree(own_images.cache) == before


def test_a_view_that_one_index_has_is_not_lost_because_others_quarantined_its_image(own_images: Stores) -> None:
    """Its receipt is gone, and its tar says that it had the view."""
    image = image_of(own_images, 5)
    image.write_bytes(b"no picture")
    for part in ("receipts", "views", "targets.zarr"):
        shutil.rmtree(own_images.cache / part / "v001")
    (own_images.cache / "receipts/v000").rename(own_images.cache.parent / "aside")
    extract_as_if_it_were_new(own_images)
    (own_images.cache / "receipts/v000").mkdir(exist_ok=True)
    for receipt in sorted((own_images.cache.parent / "aside").iterdir()):
        if receipt.name != "s00001.json":
            receipt.rename(own_images.cache / "receipts/v000" / receipt.name)
    tar = (own_images.cache / TAR).read_bytes()

    report = repaired(own_images)

    assert {action.unit: action.state for action in report.actions} == {"v000/s00001": "not done"}
    assert (own_images.cache / TAR).read_bytes() == tar


def extract_as_if_it_were_new(stores: Stores) -> None:
    """v001 only, while nothing is known of v000."""
    from proteus_cache.extract.planning import plan_cache
    from proteus_cache.extract.run import redo_units

    planned = plan_cache(stores.config)
    redo_units(stores.config, planned, [("v001", shard) for shard in range(3)], lambda at: None)


def test_a_mended_image_does_not_add_a_view_to_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_settings(tmp_path)
    image = next(config.images.rglob("*.JPEG"))
    whole_image = image.read_bytes()
    image.write_bytes(b"no picture")
    run_extract(config)
    stores = Stores(config.home, config)
    table = open_cache(stores.cache).image_table["path"].to_pylist()
    shard = table.index(str(image.relative_to(config.images))) // 4
    counts = n_samples(stores)
    damaged = stores.cache / f"views/v000/s0000{shard}.tar"
    whole_tar = damaged.read_bytes()
    flip(damaged)

    image.write_bytes(whole_image)
    refused = repaired(stores)
    image.write_bytes(b"no picture")
    mended = repaired(stores)

    assert [action.state for action in refused.actions] == ["not done"]
    assert "could not be used when its views were made, and can be now" in refused.actions[0].remedy
    assert mended.is_whole, mended.lines()
    assert n_samples(stores) == counts
    assert damaged.read_bytes() == whole_tar

    for view in ("v000", "v001"):  # nobody but the tar knows, and it is whole
        (stores.cache / f"receipts/{view}/s0000{shard}.json").unlink()
    image.write_bytes(whole_image)
    assert {action.state for action in repaired(stores).actions} == {"not done"}


def test_a_damaged_tar_still_tells_its_sources(whole: Stores, tmp_path: Path) -> None:
    receipt = open_cache(whole.cache).receipt("v000", 1)
    assert receipt is not None
    held = dict(zip(receipt.samples.keys, receipt.samples.source_sha256, strict=True))
    tar = tmp_path / "s00001.tar"
    shutil.copy(whole.cache / TAR, tar)

    assert sources_in_tar(tar) == (held, True)
    data = bytearray(tar.read_bytes())
    data[0] ^= 1  # the first header
    tar.write_bytes(bytes(data))
    assert sources_in_tar(tar) == (held, False)
    cut(tar)
    found, is_whole = sources_in_tar(tar)
    assert 0 < len(found) < len(held)
    assert found.items() <= held.items()
    assert not is_whole
    assert sources_in_tar(tmp_path) == ({}, False)


@pytest.mark.parametrize("lost", ["receipts/v001", "receipts/probe", "receipts"])
def test_lost_receipts_are_redone(whole: Stores, stores: Stores, lost: str) -> None:
    shutil.rmtree(stores.cache / lost)

    report = repaired(stores)

    assert report.is_whole, report.lines()
    assert {action.state for action in report.actions} == {"done"}
    assert tree(stores.cache) == tree(whole.cache)
    assert not any("cache id is now" in line for line in report.lines())


def test_what_a_failing_machine_made_is_not_done(
    whole: Stores, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary at the end differs: the next repair makes these units again."""
    from proteus_cache.errors import CanaryError

    def differs(watch: CanaryWatch) -> None:
        raise CanaryError("the teacher gives other numbers")

    flip(stores.cache / TAR)
    flip(stores.cache / "views/v001/s00002.tar")
    with monkeypatch.context() as patch:
        patch.setattr(CanaryWatch, "repeat", differs)
        failed = repaired(stores)

    assert {action.unit: action.state for action in failed.actions} == {
        "v000/s00001": "not done",
        "v001/s00002": "not done",
    }
    assert not failed.is_whole
    assert failed.error is not None
    assert not (stores.cache / RECEIPT).exists()
    again = repaired(stores)
    assert again.is_whole, again.lines()
    assert [action.unit for action in again.actions] == ["v000/s00001", "v001/s00002"]
    assert tree(stores.cache) == tree(whole.cache)


def test_only_units_since_the_last_good_canary_are_doubted(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    from proteus_cache.errors import CanaryError

    calls = 0

    def differs_the_second_time(watch: CanaryWatch) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise CanaryError("the teacher gives other numbers")

    units = ["v000/s00000", "v000/s00001", "v001/s00000", "v001/s00001", "v001/s00002"]
    monkeypatch.setattr(CanaryWatch, "repeat", differs_the_second_time)
    monkeypatch.setattr(module, "CANARY_EVERY", 2)

    report = repaired(stores, units=units)

    assert [action.state for action in report.actions] == ["done", "done", "not done", "not done", "not done"]
    assert "its receipt was taken away" in report.actions[3].remedy
    assert "it keeps what it has" in report.actions[4].remedy


@pytest.mark.parametrize("relative", [TAR, RECEIPT, CODES])
def test_a_folder_in_place_of_a_file_is_said_before_anything_is_touched(stores: Stores, relative: str) -> None:
    (stores.cache / relative).unlink()
    (stores.cache / relative).mkdir()
    flip(stores.cache / "views/v001/s00002.tar")
    before = {name: digest for name, digest in tree(stores.cache).items() if "v001" not in name}

    report = repaired(stores)

    assert {action.unit: action.state for action in report.actions} == {
        "v000/s00001": "not done",
        "v001/s00002": "done",
    }
    assert f"a folder stands in the place of {stores.cache / relative}" in report.actions[0].remedy
    assert {name: digest for name, digest in tree(stores.cache).items() if "v001" not in name} == before
    (stores.cache / relative).rmdir()
    assert repaired(stores).is_whole


def test_a_folder_in_place_of_a_zarr_json_is_said_and_the_rest_is_mended(stores: Stores) -> None:
    (stores.cache / ARRAY).unlink()
    (stores.cache / ARRAY).mkdir()
    flip(stores.cache / TAR)

    report = repaired(stores)

    assert {action.paths[0]: action.state for action in report.actions} == {ARRAY: "not done", TAR: "done"}


def test_without_images_the_rest_is_mended_and_every_finding_is_kept(stores: Stores) -> None:
    flip(stores.cache / TAR)
    (stores.cache / ARRAY).unlink()
    next((stores.cache / "codec").iterdir()).unlink()
    damaged = (stores.cache / TAR).read_bytes()

    report = repair_cache(stores.cache, lambda: None, home=stores.home)

    states = {action.unit or action.paths[0].partition("/")[0]: action.state for action in report.actions}
    assert states == {"codec": "done", "targets.zarr": "done", "v000/s00001": "not done"}
    assert "give --images DIR" in report.actions[-1].remedy
    assert report.needs == ("--images", "DIR", "--weights", "FILE")
    assert [(finding.path, finding.unit) for finding in report.left] == [(TAR, "v000/s00001")]
    assert (stores.cache / TAR).read_bytes() == damaged


def test_without_weights_the_rest_is_mended(stores: Stores) -> None:
    flip(stores.cache / TAR)
    (stores.cache / ARRAY).unlink()

    report = repair_cache(stores.cache, lambda: replace(stores.config, weights=None), home=stores.home)

    assert [action.state for action in report.actions] == ["done", "not done"]
    assert "vit needs --weights" in report.actions[1].remedy
    assert report.needs == ("--weights", "FILE")


@pytest.mark.parametrize("how", ["too large", "folder", "unreadable"])
def test_a_bad_file_of_another_store_does_not_end_the_repair(
    whole: Stores, stores: Stores, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proteus_cache.repair import plan_files

    blob = next((stores.cache / "codec").iterdir())
    other = stores.home / "caches" / "a" / "codec" / blob.name
    other.parent.mkdir(parents=True)
    if how == "folder":
        other.mkdir()
    else:
        other.write_bytes(bytes(2 * blob.stat().st_size))
    if how == "too large":
        monkeypatch.setattr(plan_files, "_MAX_BLOB_BYTES", blob.stat().st_size)
    if how == "unreadable":
        refuse(monkeypatch, "open", errno.EIO, lambda path: path == other)
    shutil.rmtree(stores.pack)
    shutil.copytree(stores.cache, stores.home / "caches" / "b")
    blob.unlink()

    assert repaired(stores).is_whole
    assert tree(stores.cache) == tree(whole.cache)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_said_once(stores: Stores, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = [TAR, "views/v001/s00000.tar", "views/v001/s00002.tar"]
    for relative in damaged:
        flip(stores.cache / relative)
    before = tree(stores.cache)
    with monkeypatch.context() as patch:
        refuse(patch, "create", number, lambda path: path.parent.name == "tmp")
        report = repaired(stores)

    assert [action.state for action in report.actions] == ["not done"] * 3
    assert {finding.path for finding in report.left} == set(damaged)
    assert "another folder" not in "\n".join(report.lines())
    assert [os.strerror(number) in line for line in report.lines()].count(True) == 1
    assert all("it keeps what it has" in action.remedy for action in report.actions)
    assert tree(stores.cache) == before


def test_misuse_that_shows_after_something_was_written_is_no_misuse(stores: Stores) -> None:
    """A unit whose damage hides behind another's: settings are asked for in the second round."""
    (stores.cache / ARRAY).unlink()
    asked = 0

    def settings() -> Any:
        nonlocal asked
        asked += 1
        raise UsageError("these settings cannot be")

    looks = 0

    def second_look(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:
            flip(stores.cache / TAR)
            options = {}
        return verify_cache(stores.cache, True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "verify_cache", second_look)
        report = repair_cache(stores.cache, settings, home=stores.home)

    assert asked == 1
    assert [action.state for action in report.actions] == ["done"]
    assert report.error == "these settings cannot be"
    assert [finding.path for finding in report.left] == [TAR]
    assert (stores.cache / ARRAY).is_file()
